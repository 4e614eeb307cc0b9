"""What the interpreter makes of each variable of a trace: a node, or a leaf on its way to its use."""

from typing import Any, NamedTuple

from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Axes, Det, axis_of
from paperjax.limits.views import View


class Spread(NamedTuple):
    """A leaf repeated along new axes; `view` has axes of size 1 there."""

    view: View
    axes: Axes


class Joined(NamedTuple):
    """Leaves side by side along the growing axis number `axis`: a fused layer made of several."""

    parts: tuple[View, ...]
    axis: int

    @property
    def axes(self) -> Axes:
        """The axes of the whole."""
        along = [nd.full_size(view.axes[self.axis]) for view in self.parts]
        total = axis_of(sum(n for n, _ in along), sum(m for _, m in along), "iid")
        return tuple(total if i == self.axis else made for i, made in enumerate(self.parts[0].axes))


class Unread(NamedTuple):
    """A value that nothing may use; `why` it is none."""

    why: str


Value = Any
"""A `paperjax.limits.nodes.Node`, a `View`, a `Spread`, a `Joined` or an `Unread`."""


def number_of(value: Value) -> float | None:
    """The one number that all entries of a value equal, if that is known."""
    return value.number if isinstance(value, Det) else None
