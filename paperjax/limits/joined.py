"""Channels side by side, and slices of them.

What is joined stays apart, part by part: a function entry by entry of joined channels is that function of each part, and a slice that
takes one part is that part.
"""

import itertools
from collections.abc import Callable, Sequence

from jax import lax

from paperjax.limits import fields as fl
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Axes, Det, Mixed, Node, Wide, axis_of, coordinates, rep_shape, rep_size
from paperjax.limits.positions import piece, stack_in

Shape = tuple[int, ...]


def iid_axis(size: int, other: int) -> nd.Axis:
    """An axis of independent coordinates."""
    return axis_of(size, other, "iid")


def cut(node: Node, starts: Shape, stops: Shape, steps: Shape, others: Shape) -> Node:
    """``slice``: entries along finite axes, coordinates along growing ones. `others` are the sizes of the result at the other width."""
    axes, after, bounds = node.axes, [], []
    for i, (axis, other) in enumerate(zip(axes, others)):
        size, picked = nd.full_size(axis)[0], range(starts[i], stops[i], steps[i])
        if len(picked) == size:
            after.append(axis)
            bounds.append((0, rep_size(axis), 1))
        elif coordinates(axis) == 1 and not any(atom.grows for atom in axis):
            after.append(axis_of(len(picked), other))
            bounds.append((starts[i], stops[i], steps[i]))
        elif len(axis) == 1:
            if isinstance(node, Wide):
                node = _some(node, i, picked, other)
            after.append(iid_axis(len(picked), other))
            bounds.append((0, 1, 1))
        else:
            raise NotImplementedError(f"a slice of an axis of {size} entries in which positions and channels are flattened together.")
    for i, (low, high, by) in enumerate(bounds):
        if by == 1 and isinstance(node, Wide) and stack_in(node) is not None:
            node, bounds[i] = piece(node, i, low, high), (0, high - low, 1)
    first, last, by = zip(*bounds) if bounds else ((), (), ())
    if all(b == (0, n, 1) for b, n in zip(bounds, rep_shape(node.axes))):
        return fl.relabelled(node, tuple(after))
    return st.apply(node, st.Moved(tuple(after), lambda a: lax.slice(a, first, last, by)))


def _some(node: Wide, at: int, picked: range, other: int) -> Wide:
    """Some of the coordinates along an axis of independent ones."""
    new = tuple(iid_axis(len(picked), other) if j == at else axis for j, axis in enumerate(node.axes))
    if isinstance(node, Mixed) and node.axis == at:
        return _some_joined(node, picked, other)
    if fl.is_joined(node):
        raise NotImplementedError("a slice of joined channels that were summed over positions or flattened. Cut them before.")
    layout = [(j, atom) for j, axis in enumerate(node.axes) for atom in axis if atom.kind == "iid"]
    number = [j for j, _ in layout].index(at)
    return _part(node, new, nd.Range(tuple(atom.size for _, atom in layout), number, picked.start, picked.stop, picked.step))


def _part(node: Wide, axes: Axes, which: nd.Range) -> Wide:
    """One node for the same coordinates, whoever asks for them; what a gain starts as stays apart from what it is trained to."""
    if isinstance(node, nd.Const):
        return nd.Const(axes, st.det(axes, lambda a: a, st.same_shape(node.value, node.axes)))
    if isinstance(node, nd.Add) and any(isinstance(term, nd.Const) for term in (node.u, node.v)):
        return nd.Add(axes, *(_part(st.same(term, node.axes), axes, which) for term in (node.u, node.v)))
    if isinstance(node, nd.Scale):
        by = node.by if not node.by.axes else st.det(axes, lambda a: a, st.same_shape(node.by, node.axes))
        return fl.scale(_part(st.same(node.u, node.axes), axes, which), by, axes)
    made = node.__dict__.setdefault("_parts", {})
    if (axes, which) not in made:
        made[axes, which] = nd.Part(axes, node, which)
    return made[axes, which]


def _some_joined(node: Mixed, picked: range, other: int) -> Wide:
    lows = [0, *itertools.accumulate(n for n, _ in node.sizes)]
    found = []
    for part, (n, m), low in zip(node.parts, node.sizes, lows):
        inside = [k for k in (picked.start, picked.stop - 1) if low <= k < low + n]
        first = picked.start + -(-max(low - picked.start, 0) // picked.step) * picked.step
        here = range(first - low, min(picked.stop, low + n) - low, picked.step)
        if not here:
            continue
        # At the other width the same portion of each part.
        there = m if len(here) == n else other if len(inside) == 2 else m * len(here) // n
        if there * n != m * len(here) and len(inside) < 2:
            raise NotImplementedError("a slice across joined channels that takes another portion of them at another width.")
        found.append((part, n, here, there))
    if sum(there for *_, there in found) != other:
        raise NotImplementedError("a slice of joined channels that takes other parts of them at another width.")
    at = node.axis
    taken = [part if len(here) == n else _some(part, at, here, there) for part, n, here, there in found]
    if len(taken) == 1:
        return taken[0]
    axes = tuple(iid_axis(len(picked), other) if j == at else axis for j, axis in enumerate(node.axes))
    return Mixed(axes, tuple(taken), at, tuple((len(here), there) for _, _, here, there in found))


def concatenate(operands: Sequence[Node], axis: int) -> Node:
    """Positions, or channels, side by side."""
    sizes = [nd.full_size(u.axes[axis]) for u in operands]
    total = sum(n for n, _ in sizes), sum(m for _, m in sizes)
    along = [u.axes[axis] for u in operands]
    for u in operands[1:]:
        nd.refuse_turned(operands[0].axes, u.axes)
    if all(coordinates(ax) == 1 and not any(atom.grows for atom in ax) for ax in along):
        axes = tuple(axis_of(*total) if i == axis else ax for i, ax in enumerate(operands[0].axes))
        if all(isinstance(u, Det) for u in operands):
            return st.det(axes, lambda *parts: lax.concatenate(parts, axis), *operands)  # type: ignore[arg-type]
        return nd.Stacked(axes, tuple(st.as_wide(u) for u in operands), axis)
    if any(rep_size(ax) > 1 or any(atom.kind != "iid" for atom in ax) for ax in along):
        raise NotImplementedError(
            "channels are joined with entries that are followed one by one (features of the data, positions that are flattened). Give them "
            "a layer with weights of their own, and join or add what it makes."
        )
    if any(atom.turn for ax in along for atom in ax):
        raise NotImplementedError("channels are joined of which some were shuffled.")
    like = operands[0].axes
    axes = tuple(iid_axis(*total) if i == axis else ax for i, ax in enumerate(like))
    parts, kept = [], []
    for u, own in zip(operands, sizes):
        mine = tuple(iid_axis(*own) if i == axis else ax for i, ax in enumerate(like))
        part = st.as_wide(u)
        if len(u.axes[axis]) > 1:
            # Groups or heads in one axis, as a GroupNorm leaves them: their coordinates are alike.
            part = fl.relabelled(part, tuple(iid_axis(*own) if i == axis else ax for i, ax in enumerate(u.axes)))
        if part.shape != rep_shape(mine):
            if not isinstance(part, nd.Const):
                raise NotImplementedError("channels are joined of which some are independent along an axis where others are not.")
            part = st.same(part, mine)
        inner = part if isinstance(part, Mixed) and part.axis == axis else None
        parts += [part] if inner is None else inner.parts
        kept += [own] if inner is None else inner.sizes
    return Mixed(axes, tuple(parts), axis, tuple(kept))


def by_part(make: Callable[..., Node], operands: Sequence[Node], axes: Axes) -> Wide | None:
    """A function entry by entry, part by part; ``None`` if parts of operands do not meet part by part."""
    first = next(u for u in operands if isinstance(u, Mixed))
    at, total = first.axis, nd.full_size(first.axes[first.axis])
    joined = [u for u in operands if isinstance(u, Mixed)]
    if len(axes) != len(first.axes) or any((u.axis, u.sizes) != (at, first.sizes) or len(u.axes) != len(axes) for u in joined):
        return None
    if nd.full_size(axes[at]) != total or any(fl.is_joined(u) for u in operands if isinstance(u, Wide) and not isinstance(u, Mixed)):
        return None
    made, low = [], 0
    for i, (n, m) in enumerate(first.sizes):
        mine = tuple(iid_axis(n, m) if j == at else axis for j, axis in enumerate(axes))
        made.append(st.as_wide(make([_of_part(u, i, axes, at, range(low, low + n), m) for u in operands], mine)))
        low += n
    return Mixed(axes, tuple(made), at, first.sizes)


def _of_part(node: Node, i: int, axes: Axes, at: int, picked: range, other: int) -> Node:
    if isinstance(node, Mixed):
        return node.parts[i]
    if isinstance(node, Det):
        mine = tuple(iid_axis(len(picked), other) if j == at else axis for j, axis in enumerate(node.axes))
        return st.det(mine, lambda a: a, node) if node.axes and node.axes[at] else node
    assert isinstance(node, Wide)
    return _some(st.same(node, axes), at, picked, other)
