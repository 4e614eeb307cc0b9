"""A recursion with memory that goes down in stages, so that networks of any depth do with Python's stack."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

STAGE = 25
"""Calls inside of each other before the innermost is taken first: of about ten frames each, of the thousand that Python has."""


@runtime_checkable
class Keeping(Protocol):
    """What is found, by key, and how many calls are open."""

    known: dict[Any, Any]
    open: int


class DeeperError(Exception):
    """Something that is to be found first, ``make()``, to be kept under `key` by `of`, and after it what asked for it."""

    def __init__(self, of: Keeping, key: Any, make: Callable[[], Any]) -> None:
        super().__init__(key)
        self.of, self.waiting = of, [(key, make)]


def kept(of: Keeping, key: Any, make: Callable[[], Any]) -> Any:
    """What is known under a key, or else ``make()``, which may ask for more in this way.

    Examples
    --------
    >>> class Sums:
    ...     def __init__(self):
    ...         self.known, self.open = {}, 0
    ...
    ...     def up_to(self, n):
    ...         return kept(self, n, lambda: n and n + self.up_to(n - 1))
    >>> Sums().up_to(10_000)
    50005000
    """
    if key in of.known:
        return of.known[key]
    if of.open >= STAGE:
        raise DeeperError(of, key, make)
    if of.open:
        try:
            of.known[key] = _opened(of, make)
        except DeeperError as deeper:
            if deeper.of is of:
                deeper.waiting.append((key, make))
            raise
        return of.known[key]
    waiting = [(key, make)]
    while waiting:
        this, made = waiting[-1]
        try:
            if this not in of.known:
                of.known[this] = _opened(of, made)
        except DeeperError as deeper:
            if deeper.of is not of:
                raise
            # Those that asked for it are next, from the innermost, so that what is found is not asked for from the outermost again.
            waiting.extend(deeper.waiting[::-1])
        else:
            waiting.pop()
    return of.known[key]


def _opened(of: Keeping, make: Callable[[], Any]) -> Any:
    of.open += 1
    try:
        return make()
    finally:
        of.open -= 1
