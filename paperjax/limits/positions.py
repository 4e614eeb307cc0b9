"""Positions side by side: cut, written over, and, where they are not Gaussian, functions entry by entry, part by part."""

from collections.abc import Callable, Sequence

from jax import lax

from paperjax.limits import contractions as con
from paperjax.limits import fields as fl
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Axes, Det, Node, Stacked, Wide, axis_of, rep_shape, rep_size

Shape = Sequence[int]


def piece(node: Node, axis: int, low: int, high: int) -> Node:
    """Entries along a finite axis: one node for the same ones, whoever asks, and of positions side by side the parts that lie there."""
    if (low, high) == (0, rep_size(node.axes[axis])):
        return node
    made = node.__dict__.setdefault("_pieces", {})
    if (axis, low, high) not in made:
        made[axis, low, high] = _piece(node, axis, low, high)
    return made[axis, low, high]


def _piece(node: Node, axis: int, low: int, high: int) -> Node:
    after = _with(node.axes, axis, high - low)
    if isinstance(node, Stacked) and node.axis == axis:
        parts, first = [], 0
        for part in node.parts:
            n = rep_size(part.axes[axis])
            a, b = max(low - first, 0), min(high - first, n)
            parts += [piece(part, axis, a, b)] if a < b else []
            first += n
        return parts[0] if len(parts) == 1 else Stacked(after, tuple(map(st.as_wide, parts)), axis)
    if isinstance(node, Wide) and stack_in(node) is not None:
        if isinstance(node, Stacked):
            return Stacked(after, tuple(st.as_wide(piece(part, axis, low, high)) for part in node.parts), node.axis)
        if isinstance(node, nd.Scale):
            return fl.scale(_wide(node.u, node.axes, axis, low, high), _of_number(node.by, node.axes, axis, low, high), after)
        factors = (node.u, node.v) if isinstance(node, nd.Add) else node.factors if isinstance(node, nd.Prod) else ()
        if factors:
            both = [_wide(part, node.axes, axis, low, high) for part in factors]
            return nd.Add(after, *both) if isinstance(node, nd.Add) else con.product(both, after)
    start = [low if i == axis else 0 for i in range(len(after))]
    stop = [high if i == axis else n for i, n in enumerate(node.shape)]
    return st.apply(node, st.Moved(after, lambda a: lax.slice(a, start, stop)))


def _wide(node: Wide, axes: Axes, axis: int, low: int, high: int) -> Wide:
    return st.as_wide(piece(st.same(node, axes), axis, low, high))


def _of_number(by: Det, axes: Axes, axis: int, low: int, high: int) -> Det:
    made = by if by.number is not None else piece(st.same_shape(by, axes), axis, low, high)
    assert isinstance(made, Det)
    return made


def _with(axes: Axes, axis: int, size: int) -> Axes:
    return tuple(axis_of(size, size) if i == axis else each for i, each in enumerate(axes))


@fl.memoized
def stack_in(node: Wide) -> Stacked | None:
    """Positions side by side, not all Gaussian, that a value is a sum or a product of, entry by entry."""
    if fl.is_gaussian(node):
        return None
    if isinstance(node, Stacked):
        return node
    if isinstance(node, nd.Scale):
        return stack_in(node.u)
    parts = (node.u, node.v) if isinstance(node, nd.Add) else node.factors if isinstance(node, nd.Prod) else ()
    return next((found for part in parts if (found := stack_in(part)) is not None), None)


def by_position(make: Callable[[list[Node], Axes], Node], operands: Sequence[Node], axes: Axes) -> Wide | None:
    """A function entry by entry, part by part; ``None`` if no operand has positions side by side."""
    stack = next((found for u in operands if isinstance(u, Wide) and (found := stack_in(u)) is not None), None)
    if stack is None or stack.shape != rep_shape(axes):
        return None
    axis, made, low = stack.axis, [], 0
    whole = [st.same(u, axes) if isinstance(u, Wide) else st.same_shape(u, axes) if isinstance(u, Det) and u.axes else u for u in operands]
    for part in stack.parts:
        high = low + rep_size(part.axes[axis])
        mine = _with(axes, axis, high - low)
        made.append(st.as_wide(make([piece(u, axis, low, high) if u.axes else u for u in whole], mine)))
        low = high
    return Stacked(axes, tuple(made), axis)


def put(node: Node, block: Node, starts: Shape) -> Node:
    """A value of which a block is another one."""
    if isinstance(node, Det) and isinstance(block, Det):
        return st.det(node.axes, lambda a, b: lax.dynamic_update_slice(a, b.astype(a.dtype), starts), node, block)
    return _put(node, block, starts, 0)


def _put(node: Node, block: Node, starts: Shape, axis: int) -> Node:
    if axis == len(node.axes):
        return block
    low, n = starts[axis], rep_size(node.axes[axis])
    high = low + rep_size(block.axes[axis])
    inside = _put(piece(node, axis, low, high), block, starts, axis + 1)
    if (low, high) == (0, n):
        return inside
    around = [piece(node, axis, a, b) for a, b in ((0, low), (high, n)) if a < b]
    parts = [*around[: low > 0], inside, *around[low > 0 :]]
    flat = [part for u in parts for part in (u.parts if isinstance(u, Stacked) and u.axis == axis else [st.as_wide(u)])]
    return Stacked(node.axes, tuple(flat), axis)
