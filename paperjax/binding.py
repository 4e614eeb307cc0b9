"""Call a user's function with just the arguments it names, and find the name that was meant."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def argument_names(fn: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that `fn` must be given, and names that it may be given.

    Parameters
    ----------
    fn
        Any callable with a signature; `functools.partial` counts what it binds as given.

    Returns
    -------
    required, optional
        Two tuples of names, in the order of the signature. ``*args`` and ``**kwargs`` name nothing.

    Examples
    --------
    >>> argument_names(lambda width, depth=2: None)
    (('width',), ('depth',))
    """
    required, optional = [], []
    for name, parameter in _signature(fn).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        (required if parameter.default is parameter.empty else optional).append(name)
    return tuple(required), tuple(optional)


def call_by_name(fn: Callable[..., Any], given: Mapping[str, Any], what: str) -> Any:
    """Call `fn` with those entries of `given` that its signature names.

    Raises
    ------
    TypeError
        If `fn` needs a name that is not in `given`; the message lists what there is.

    Examples
    --------
    >>> call_by_name(lambda width: width + 1, dict(width=2, lr=0.1), "family")
    3
    """
    required, optional = argument_names(fn)
    missing = [name for name in required if name not in given]
    if missing:
        raise TypeError(
            f"{what} needs {', '.join(map(repr, missing))}, which nothing provides. It can be given: "
            f"{', '.join(sorted(given)) or 'nothing so far'}. Give the missing name a default, or add it as an axis of the grid."
        )
    return fn(**{name: given[name] for name in (*required, *optional) if name in given})


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    """Of a class that its metaclass calls with anything (Flax nnx), that of its ``__init__``."""
    found = inspect.signature(fn)
    anything = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.parameters.values())
    if not (inspect.isclass(fn) and found.parameters and anything):
        return found
    own = inspect.signature(fn.__init__)
    return own.replace(parameters=list(own.parameters.values())[1:])


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the `known` names were probably meant, as the tail of an error message.

    Examples
    --------
    >>> nearest("widht", ["width", "depth"])
    "Did you mean 'width'? Known: depth, width."
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{meant}Known: {', '.join(known)}."
