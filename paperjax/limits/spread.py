"""How tiles of pairs are spread over devices and threads: each computes some, and none needs what another does."""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def enough(side: int, tiles: Callable[[int], int], devices: int) -> int:
    """The side of a tile, made smaller until there are as many tiles as devices.

    Examples
    --------
    >>> import math
    >>> enough(256, lambda side: math.ceil(300 / side) ** 2, 8)
    128
    """
    while side > 1 and tiles(side) < devices:
        side = max(1, side // 2)
    return side


def together(work: Callable[[Any, Callable[[], T]], None], items: Sequence[Any], workers: int, first: Callable[[], T]) -> None:
    """Do work on items in threads, of which this is one; it begins with `first`, whose result the others wait for when they ask for it.

    A thread more has to be started, and on a busy core it waits for milliseconds: this one begins at once. What goes wrong anywhere is
    raised, and nobody takes another item or waits any longer.

    Examples
    --------
    >>> found = []
    >>> together(lambda item, one: found.append(item + one()), range(10), 2, lambda: 1)
    >>> sorted(found) == list(range(1, 11))
    True
    """
    left = iter(items)
    made: Future[T] = Future()

    def stop() -> None:
        collections.deque(left, 0)

    def go() -> None:
        try:
            for item in left:
                work(item, made.result)
        except BaseException:
            stop()
            raise

    with ThreadPoolExecutor(max(1, workers - 1)) as pool:
        try:
            others = [pool.submit(go) for _ in range(workers - 1)]
            made.set_result(first())
            go()
        except BaseException as error:
            stop()
            if not made.done():
                # Interrupted, as likely as not: no thread waits for what does not come.
                made.set_exception(error)
            raise
        for other in others:
            other.result()
