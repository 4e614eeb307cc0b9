"""What the interpreter makes of each variable of a trace: a node, or a leaf on its way to its use."""

from typing import Any, NamedTuple

from paperjax.limits.nodes import Axes, Det
from paperjax.limits.views import View


class Spread(NamedTuple):
    """A leaf repeated along new axes; `view` has axes of size 1 there."""

    view: View
    axes: Axes


class Unread(NamedTuple):
    """A value that nothing may use; `why` it is none."""

    why: str


Value = Any
"""A `paperjax.limits.nodes.Node`, a `View`, a `Spread` or an `Unread`."""


def number_of(value: Value) -> float | None:
    """The one number that all entries of a value equal, if that is known."""
    return value.number if isinstance(value, Det) else None
