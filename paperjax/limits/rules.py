"""What primitives that are not entry by entry do to values: leaves that are moved stay leaves, sums over growing axes are means."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from paperjax.limits import contractions as con
from paperjax.limits import joined
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits import scatters as sc
from paperjax.limits.dependence import refuse_shared
from paperjax.limits.elementwise import broadcasting, relative
from paperjax.limits.lookups import lookup
from paperjax.limits.nodes import Axes, Det, Node, Wide, axis_of, coordinates
from paperjax.limits.positions import put
from paperjax.limits.values import Joined, Spread, Value, number_of
from paperjax.limits.views import View
from paperjax.limits.windows import window_adds


@runtime_checkable
class Reader(Protocol):
    """What is needed of `paperjax.limits.interpreter.Interpreter`."""

    laws: Any
    draws: bool
    stopped: set[int | None]

    def node(self, value: Value, like: Axes | None = None) -> Node:
        """See there."""
        ...

    def nodes(self, values: list[Value]) -> list[Node]:
        """See there."""
        ...

    def settled(self, node: Node, where: str) -> Node:
        """See there."""
        ...

    def cast(self, node: Node, target: Any) -> Node:
        """See there."""
        ...

    def known(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
        """See there."""
        ...


def _transpose(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    permutation = eqn.params["permutation"]
    if isinstance(operands[0], View):
        return operands[0].transposed(permutation)
    node = reader.node(operands[0])
    return st.apply(node, st.transpose(node.axes, permutation))


def _reshape(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    if isinstance(operands[0], View):
        made = operands[0].reshaped(sizes, others)
        if made is not None:
            return made
    node = reader.node(operands[0])
    return st.apply(node, st.reshape(node.axes, sizes, others))


def _broadcast_in_dim(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    places = tuple(map(int, eqn.params["broadcast_dimensions"]))
    value = operands[0]
    if isinstance(value, View):
        view = value.with_axes([places.index(i) if i in places else None for i in range(len(sizes))])
        same = all(nd.full_size(axis) == (n, m) for axis, n, m in zip(view.axes, sizes, others))
        return view if same else Spread(view, tuple(a if a else axis_of(n, m) for a, n, m in zip(view.axes, sizes, others)))
    node = reader.node(value)
    moved = st.broadcast(node.axes, sizes, others, places)
    refuse_shared(node, tuple(node.axes[places.index(i)] if i in places else () for i in range(len(sizes))), moved.axes)
    return st.apply(node, moved)


def _squeeze(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    gone = [int(d) % len(operands[0].axes) for d in eqn.params["dimensions"]]
    return kept(reader, operands[0], [i for i in range(len(operands[0].axes)) if i not in gone])


def _expand_dims(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    old = iter(range(len(operands[0].axes)))
    return kept(reader, operands[0], [None if i in eqn.params["dimensions"] else next(old) for i in range(len(sizes))])


def kept(reader: Reader, value: Value, keep: list[int | None]) -> Value:
    """Axes of size 1 taken out or put in, as `paperjax.limits.moves.drop`."""
    if isinstance(value, View):
        return value.with_axes(keep)
    node = reader.node(value)
    return st.apply(node, st.drop(node.axes, keep))


def _slice(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    return cut(reader, operands[0], starts, stops, steps, others)


def cut(reader: Reader, value: Value, starts: Any, stops: Any, steps: Any, others: Any) -> Value:
    """A slice: of a leaf it is a leaf."""
    if isinstance(value, View):
        view: View | None = value
        for i, (a, b, c, m) in enumerate(zip(starts, stops, steps, others)):
            if view is not None and len(range(a, b, c)) != nd.full_size(view.axes[i])[0]:
                view = view.sliced(i, a, b, c, m)
        if view is not None:
            return view
    return joined.cut(reader.node(value), *(tuple(map(int, bounds)) for bounds in (starts, stops, steps, others)))


def split(reader: Reader, eqn: Any, twin: Any, value: Value) -> list[Value]:
    """Parts of an axis, each of them a slice."""
    axis, parts, start = eqn.params["axis"], [], 0
    shape = tuple(nd.full_size(a)[0] for a in value.axes)
    for size, like in zip(eqn.params["sizes"], twin.outvars):
        starts = tuple(start if i == axis else 0 for i in range(len(shape)))
        stops = tuple(start + size if i == axis else n for i, n in enumerate(shape))
        parts.append(cut(reader, value, starts, stops, (1,) * len(shape), tuple(like.aval.shape)))
        start += size
    return parts


def _dynamic_slice(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    numbers = [number_of(index) for index in operands[1:]]
    if any(number is None for number in numbers):
        return reader.known(eqn, twin, operands)[0]
    full = [nd.full_size(axis)[0] for axis in operands[0].axes]
    starts = [int(np.clip(int(a), 0, n - k)) for a, n, k in zip(numbers, full, sizes)]  # type: ignore[arg-type]
    return cut(reader, operands[0], starts, [a + k for a, k in zip(starts, sizes)], (1,) * len(sizes), others)


def _concatenate(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    axis = int(eqn.params["dimension"])
    if all(isinstance(value, View) and any(atom.grows for atom in value.axes[axis]) for value in operands):
        return Joined(tuple(operands), axis)
    return joined.concatenate(_all_settled(reader, operands, "concatenate"), axis)


def _stack(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    axis, n = eqn.params["axis"], len(operands[0].axes)
    new = [*range(axis), None, *range(axis, n)]
    return joined.concatenate([st.apply(node, st.drop(node.axes, new)) for node in _all_settled(reader, operands, "stack")], axis)


def unstack(reader: Reader, eqn: Any, twin: Any, value: Value) -> list[Value]:
    """Entries along a finite axis, each a slice."""
    axis, shape = eqn.params["axis"], tuple(nd.full_size(a)[0] for a in value.axes)
    others = tuple(1 if i == axis else nd.full_size(a)[1] for i, a in enumerate(value.axes))
    rest = [i for i in range(len(shape)) if i != axis]
    found = []
    for k in range(shape[axis]):
        starts = tuple(k if i == axis else 0 for i in range(len(shape)))
        stops = tuple(k + 1 if i == axis else n for i, n in enumerate(shape))
        found.append(kept(reader, cut(reader, value, starts, stops, (1,) * len(shape), others), list(rest)))
    return found


def _all_settled(reader: Reader, operands: list[Value], where: str) -> list[Node]:
    return [reader.settled(reader.node(value), where) for value in operands]


def _pad(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    if number_of(operands[1]) != 0:
        return reader.known(eqn, twin, operands)[0]
    node = reader.node(operands[0])
    config = [(int(low), int(high), int(inside)) for low, high, inside in eqn.params["padding_config"]]
    return st.apply(node, st.pad(node.axes, config, sizes, others))


def _rev(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    if isinstance(operands[0], View):
        view = operands[0].reversed(eqn.params["dimensions"])
        if view is not None:
            return view
    node = reader.node(operands[0])
    return st.apply(node, st.reverse(node.axes, eqn.params["dimensions"]))


def _iota(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    if eqn.params["shape"] != twin.params["shape"]:
        raise NotImplementedError(
            "numbers that count along a growing axis (a table of frequencies, of rotary or sinusoidal positions): coordinates are not "
            "alike. Learned positions, a leaf that is drawn, have a limit."
        )
    return reader.known(eqn, twin, operands)[0]


def _reduce_sum(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    return st.reduce_sum(reader.node(operands[0]), tuple(map(int, eqn.params["axes"])))


def _cumsum(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    node = reader.node(operands[0])
    axis = eqn.params["axis"]
    if coordinates(node.axes[axis]) > 1:
        raise NotImplementedError("a running sum along a growing axis.")
    fn = broadcasting(eqn)
    return st.apply(node, st.Moved(node.axes, fn, False))


def _reduce_window_sum(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    node, window = reader.node(operands[0]), eqn.params["window_dimensions"]
    if any(n > 1 and coordinates(axis) > 1 for n, axis in zip(window, node.axes)):
        raise NotImplementedError("pooling along a growing axis.")
    after = tuple(a if k == 1 else axis_of(n, m) for a, k, n, m in zip(node.axes, window, sizes, others))
    return st.apply(node, st.Moved(after, window_adds(eqn.params, broadcasting(eqn)), False))


def _dot_general(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    contracted, batch = eqn.params["dimension_numbers"]
    left, right = operands
    leaves = [isinstance(value, (View, Joined)) for value in operands]
    made = eqn.outvars[0].aval.dtype
    if jnp.issubdtype(made, jnp.floating):
        # A product takes whole numbers as they are, whose own products would be whole, and overflow.
        mixed = [not leaf and not jnp.issubdtype(var.aval.dtype, jnp.floating) for leaf, var in zip(leaves, eqn.invars)]
        left, right = operands = [reader.cast(reader.node(w), made) if whole else w for w, whole in zip(operands, mixed)]
    if all(leaves):
        # Learned queries, latents, positions: a leaf whose growing axes are all summed over is what is multiplied.
        queries = next((i for i in (0, 1) if _is_activation(operands[i], contracted[i])), None)
        if queries is None:
            raise NotImplementedError("a product of two leaves (a low-rank or a generated weight): its entries are not independent.")
        left, right = (reader.node(value) if i == queries else value for i, value in enumerate(operands))
        leaves[queries] = False
    if any(leaves):
        node, view = (right, left) if leaves[0] else (left, right)
        numbers = (contracted[::-1], batch[::-1]) if leaves[0] else (contracted, batch)
        return _dot_leaf(reader, reader.settled(reader.node(node), "dot_general"), view, numbers, leaves[0])
    u, v = reader.nodes(operands)
    if isinstance(u, Wide) != isinstance(v, Wide):
        wide = next(w for w in (u, v) if isinstance(w, Wide))
        u, v = (reader.settled(relative(w, "mul", wide), "dot_general") for w in (u, v))
    return con.dot_values(u, v, (contracted, batch))


def _is_activation(leaf: Value, inside: Any) -> bool:
    grows = [any(atom.grows for atom in axis) for axis in leaf.axes]
    return isinstance(leaf, View) and any(grows) and all(i in inside for i, g in enumerate(grows) if g)


def _dot_leaf(reader: Reader, node: Node, leaf: Value, numbers: Any, first: bool) -> Node:
    """Of leaves side by side, what each of them makes, side by side."""
    if isinstance(leaf, View):
        return con.dot_leaf(node, leaf, numbers, first, reader.laws[leaf.leaf])
    (inside, leaf_inside), (batch, leaf_batch) = numbers
    if leaf.axis in (*leaf_inside, *leaf_batch):
        raise NotImplementedError(
            "matrices of several layers are joined along the axis that is summed over. Multiply with each of them, and add what they make."
        )
    free = [j for j in range(len(leaf.axes)) if j not in leaf_inside and j not in leaf_batch]
    before = len(batch) + (0 if first else len(node.axes) - len(inside) - len(batch))
    made = [con.dot_leaf(node, view, numbers, first, reader.laws[view.leaf]) for view in leaf.parts]
    return joined.concatenate(made, before + free.index(leaf.axis))


def _conv_general_dilated(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    by = operands[1]
    if isinstance(by, Det) and eqn.params["feature_group_count"] != twin.params["feature_group_count"]:
        node = reader.settled(reader.node(operands[0]), "convolution")
        if isinstance(node, Wide):
            return con.fixed_conv(node, by, eqn.params, sizes, others)
    if not isinstance(by, View):
        raise NotImplementedError("a convolution with something that is no leaf.")
    view = operands[1]
    node = reader.settled(reader.node(operands[0]), "convolution")
    return con.conv(node, view, eqn.params, sizes, others, twin.params["feature_group_count"], reader.laws[view.leaf])


def _gather(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    if isinstance(operands[0], View):
        index = reader.settled(reader.node(operands[1]), "gather")
        assert isinstance(index, Det)
        return lookup(operands[0], index, eqn, sizes, reader.laws[operands[0].leaf])
    node, index = reader.nodes(operands)
    taken, whole_sizes = eqn.params["slice_sizes"], [nd.full_size(axis)[0] for axis in node.axes]
    if not isinstance(index, Det) or any(k != n and coordinates(a) > 1 for k, n, a in zip(taken, whole_sizes, node.axes)):
        raise NotImplementedError("a gather along a growing axis.")
    here = tuple(1 if coordinates(a) > 1 else k for k, a in zip(taken, node.axes))
    numbers = eqn.params["dimension_numbers"]
    kept = iter([node.axes[i] for i in range(len(taken)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)])
    slices = {i: next(kept) for i in numbers.offset_dims}
    axes = tuple(
        slices[i] if i in slices and nd.full_size(slices[i]) == (n, m) else axis_of(n, m) for i, (n, m) in enumerate(zip(sizes, others))
    )
    fn = broadcasting(eqn, slice_sizes=here)
    if isinstance(node, Det):
        return st.det(axes, fn, node, index)
    assert isinstance(node, Wide)
    return sc.by_index(axes, node, fn, index)


def _scatter_add(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    base, index, terms = reader.nodes(operands)
    base, index = (reader.settled(node, "scatter-add") for node in (base, index))
    start = base.number if isinstance(base, Det) else None
    if not (isinstance(index, Det) and isinstance(terms, Wide) and (isinstance(base, Wide) or start is not None)):
        return reader.known(eqn, twin, operands)[0]
    return sc.added_at(sc.scatter_of(eqn, base, terms, sizes, others), base if isinstance(base, Wide) else float(start), index, terms)  # type: ignore[arg-type]


def _scatter(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    base, index, terms = (reader.settled(node, "scatter") for node in reader.nodes(operands))
    if not isinstance(base, Wide) and not isinstance(terms, Wide) and not _along(base, terms):
        return reader.known(eqn, twin, operands)[0]
    if not isinstance(index, Det) or index.const is None:
        raise NotImplementedError("entries are set at positions that the data choose. Where they are numbers of the code, it has a limit.")
    return sc.set_at(sc.scatter_of(eqn, base, terms, sizes, others), base, index.const, terms)


def _dynamic_update_slice(reader: Reader, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
    base, terms = (reader.settled(node, "dynamic_update_slice") for node in reader.nodes(operands[:2]))
    if not isinstance(base, Wide) and not isinstance(terms, Wide) and not _along(base, terms):
        return reader.known(eqn, twin, operands)[0]
    numbers = [number_of(start) for start in operands[2:]]
    if any(number is None for number in numbers):
        raise NotImplementedError("entries are set at positions that the data, or the steps of a loop, choose.")
    size, other = (tuple(nd.full_size(axis)[i] for axis in terms.axes) for i in (0, 1))
    apart = [coordinates(a) > 1 or coordinates(b) > 1 for a, b in zip(base.axes, terms.axes)]
    if any(a and (n, m) != (k, j) for a, n, m, k, j in zip(apart, sizes, others, size, other)):
        raise NotImplementedError(sc.INDEPENDENT)
    starts = [int(np.clip(int(a), 0, n - k)) for a, n, k in zip(numbers, sizes, size)]  # type: ignore[arg-type]
    return put(base, terms, starts)


def _along(*nodes: Node) -> bool:
    """Whether an axis grows with the width."""
    return any(coordinates(axis) > 1 for node in nodes for axis in node.axes)


def _stop_gradient(reader: Reader, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
    (value,) = operands
    if isinstance(value, Wide) and reader.draws:
        return nd.Drawn(value.axes, lax.stop_gradient, (value,))
    if not isinstance(value, Det):
        # What the network computes is not changed by it.
        reader.stopped.add(value.leaf if isinstance(value, View) else None)
    return value


RULES = {
    "stop_gradient": _stop_gradient,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "rev": _rev,
    "iota": _iota,
    "reduce_sum": _reduce_sum,
    "cumsum": _cumsum,
    "reduce_window_sum": _reduce_window_sum,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "gather": _gather,
    "scatter-add": _scatter_add,
    "scatter": _scatter,
    "dynamic_update_slice": _dynamic_update_slice,
}
