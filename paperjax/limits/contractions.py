"""Products with leaves, and of values with each other, at infinite width."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from paperjax.limits import fields as fl
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.dependence import refuse_given, refuse_own
from paperjax.limits.heads import paired
from paperjax.limits.nodes import Axes, Axis, Det, Node, Wide, coordinates, rep_shape, rep_size
from paperjax.limits.views import View, iid, order_of, placed
from paperjax.limits.windows import Window, joint_sum, window_taps


class LeafLaw(NamedTuple):
    """What is known of a leaf's entries: its path, mean, variance, and whether they are Gaussian."""

    path: str
    mean: float
    variance: float
    gaussian: bool


LawOf = Callable[[int], LeafLaw]


def key_of(view: View, way: Any) -> nd.Key:
    """What names the random numbers of a use of a leaf; `way` tells a matrix from its transpose. One that is turned around is another."""
    return (view.leaf, view.entries, (way, view.back) if view.back else way)


def dot_leaf(node: Node, view: View, eqn_axes: tuple[Any, Any], leaf_first: bool, law: LeafLaw) -> Node:
    """``dot_general`` of a value and a leaf: a new Gaussian field.

    ``eqn_axes`` are the contracted and the batch axes, of the value first.
    """
    (inside, leaf_inside), (batch, leaf_batch) = eqn_axes
    # In the order of the leaf, so that two uses of it sum over the same entries in turn.
    turn = sorted(range(len(inside)), key=lambda i: view.parts[leaf_inside[i]])
    inside, leaf_inside = [inside[i] for i in turn], [leaf_inside[i] for i in turn]
    axes, leaf_axes = node.axes, view.axes
    free = [i for i in range(len(axes)) if i not in inside and i not in batch]
    leaf_free = [i for i in range(len(leaf_axes)) if i not in leaf_inside and i not in leaf_batch]
    for i, j in zip(batch, leaf_batch):
        if any(atom.grows for atom in (*axes[i], *leaf_axes[j])):
            raise NotImplementedError(f"{law.path}: a growing axis is neither summed over nor free (a matrix for each channel).")
    if any(atom.grows for i in free for atom in axes[i]):
        raise NotImplementedError(
            f"{law.path}: it multiplies positions and leaves the growing axis alone, so that all coordinates share one "
            f"finite matrix, which "
            "stays random at infinite width (token mixing)."
        )
    count = math.prod(coordinates(axes[i]) for i in inside)
    grows = any(atom.grows for i in inside for atom in axes[i])
    if isinstance(node, Wide) and not grows:
        raise NotImplementedError(
            f"{law.path}: it sums over {count * math.prod(rep_size(axes[i]) for i in inside)} coordinates that do not grow with the width, "
            "behind a layer that does. A finite layer behind a wide one is not Gaussian at infinite width. Let that layer grow too."
        )
    refuse_mean(law)
    leaf_made = placed([view.parts[j] for j in leaf_free])
    kept = [axes[i] for i in batch] + ([*leaf_made, *(axes[i] for i in free)] if leaf_first else [*(axes[i] for i in free), *leaf_made])
    out = tuple(kept)
    order = [*batch, *free, *inside]
    shape = rep_shape(out)

    def tap(a: Any) -> Any:
        return jnp.transpose(a, order).reshape(*shape, -1)

    way = tuple(sorted({k for j in leaf_inside for k, _, _ in view.parts[j]}))
    # Positions (experts) with a matrix for each.
    alone = tuple(at for at, i in enumerate(batch) if rep_size(axes[i]) > 1)
    if alone:
        way = (way, *(tuple((k, j) for k, j, _ in view.parts[leaf_batch[at]]) for at in alone))
    # Coordinates in another order (a shuffle) meet other entries.
    key = key_of(view, (*way, *_met(axes[i] for i in inside), *order_of(view.parts[j] for j in leaf_inside)))
    refuse_own(node, key, law.path)
    scale, gaussian = math.sqrt(count) * view.factor, law.gaussian or grows
    return nd.Field(out, key, node, (tap,), scale, gaussian, law.variance == 0, alone)


def refuse_mean(law: LeafLaw) -> None:
    """Refuse a matrix whose entries do not have mean 0, or no law at all."""
    if math.isnan(law.mean):
        raise ValueError(
            f"pj.limit: {law.path}: init does not draw this matrix (its entries are given numbers, loaded or made by NumPy), so it has no "
            "law. Draw it by jax.random (an nnx module in the family, of its rngs: lambda width, rngs: Net(width, rngs=rngs)), or declare "
            "its law, the variance being that of one entry: "
            f'laws={{"{law.path}": pj.limits.normal(1 / fan_in)}}, or, where that is the width, laws=lambda width: {{"{law.path}": ...}}.'
        )
    if law.mean:
        raise NotImplementedError(
            f"{law.path}: the entries of this matrix have mean {law.mean:g}, not 0: sums over a growing axis diverge, or pick it up. "
            "Draw them around 0, or, if they are, declare their law, the variance being that of one entry: "
            f'laws=lambda width: {{"{law.path}": pj.limits.normal(... / width)}}.'
        )


def _met(axes: Iterable[Axis]) -> tuple[Any, ...]:
    """In which order entries of a leaf meet coordinates: those that were shuffled, and positions that are flattened with channels."""
    atoms = [atom for axis in axes for atom in axis]
    runs = [(kind, math.prod(atom.size for atom in run)) for kind, run in itertools.groupby(atoms, lambda atom: atom.kind)]
    return (*(atom for atom in atoms if atom.turn), *(runs if len(runs) > 1 else ()))


def dot_values(u: Node, v: Node, eqn_axes: tuple[Any, Any]) -> Node:
    """``dot_general`` of two values."""
    (inside, v_inside), (batch, v_batch) = eqn_axes
    u, v = st.meeting(u, v, list(zip(batch, v_batch)), list(zip(inside, v_inside)))
    free, v_free = (
        [i for i in range(len(w.axes)) if i not in a and i not in b] for w, a, b in ((u, inside, batch), (v, v_inside, v_batch))
    )
    batch_axes = [u.axes[i] or v.axes[j] for i, j in zip(batch, v_batch)]
    axes = tuple([*batch_axes, *(u.axes[i] for i in free), *(v.axes[i] for i in v_free)])
    numbers = ((tuple(inside), tuple(v_inside)), (tuple(batch), tuple(v_batch)))
    count = math.prod(max(coordinates(u.axes[i]), coordinates(v.axes[j])) for i, j in zip(inside, v_inside))

    def product(a: Any, b: Any) -> Any:
        return count * lax.dot_general(a, b, numbers, preferred_element_type=jnp.result_type(a, b))

    if isinstance(u, Det) and isinstance(v, Det):
        return st.det(axes, product, u, v, noise=_noise_of_product(u, v, count))
    if isinstance(u, Wide) and isinstance(v, Wide):
        nd.refuse_turned([u.axes[i] for i in (*batch, *inside)], [v.axes[j] for j in (*v_batch, *v_inside)])
        return _inner(u, v, axes, numbers, count)
    wide, known = (u, v) if isinstance(u, Wide) else (v, u)
    assert isinstance(wide, Wide)
    assert isinstance(known, Det)
    which = inside if wide is u else v_inside
    if any(coordinates(wide.axes[i]) > 1 for i in which):
        raise NotImplementedError("a sum over a growing axis with numbers that are not a leaf's: a table multiplied from the right?")
    if wide is u:
        return nd.Linear(axes, wide, lambda k, d: product(k, d.astype(k.dtype)), (known,), False)
    return nd.Linear(axes, wide, lambda k, d: product(d.astype(k.dtype), k), (known,), False)


def _noise_of_product(u: Det, v: Det, count: int) -> Det | None:
    """Of a sum of products of deterministic arrays, whose coordinates share it."""
    sizes = [w.noise or Det((), const=np.zeros(())) for w in (u, v)]

    def size(a: Any, b: Any, s: Any, t: Any) -> Any:
        return count * (s * jnp.max(jnp.abs(b)) + t * jnp.max(jnp.abs(a)) + s * t)

    return None if u.noise is None and v.noise is None else st.det((), size, u, v, *sizes)


def _inner(u: Wide, v: Wide, axes: Axes, numbers: tuple[Any, Any], count: int) -> Node:
    (inside, v_inside), (batch, v_batch) = numbers
    pairs = [*zip(batch, v_batch), *zip(inside, v_inside)]
    if not any(atom.grows for i in inside for atom in u.axes[i]):
        st.refuse_unlike(u, v, pairs)
        return paired(u, v, axes, numbers, count)
    if any(atom.grows for axis in axes for atom in axis):
        for w in (u, v):
            if sum(any(atom.grows for atom in axis) for axis in w.axes) > 1 and fl.sources(w):
                _refuse_made(w)
        raise NotImplementedError(
            "a product of two wide values that sums over one of two growing axes. (Attention whose heads grow in number and in size: give "
            "their size a finite value, sizes=...)"
        )
    n, m = len(u.axes), len(v.axes)
    left, right = list(range(n)), list(range(n, n + m))
    for i, j in pairs:
        right[j] = left[i]
    free, v_free = (
        [k[i] for i in range(len(k)) if i not in a and i not in b] for k, a, b in ((left, inside, batch), (right, v_inside, v_batch))
    )
    out = [*(left[i] for i in batch), *free, *v_free]
    shape = rep_shape(axes)

    def fn(k: Any) -> Any:
        return count * jnp.einsum(k, [*left, *right], out).reshape(shape)

    noise = st.rms_of_sum(u, v, count)
    if fl.independent(u, v) and (fl.centred(u) or fl.centred(v)):
        return Det(axes, const=nd.fold(lambda: jnp.zeros(shape)), noise=noise)
    st.refuse_unlike(u, v, pairs)
    return Det(axes, lambda a: a, (nd.Moment(u, v, fn),), noise=noise)


def _refuse_made(matrix: Wide) -> None:
    """Of leaves alone: a value of two growing axes that the data enter is an outer product, and refused where it is made."""
    leaves = sorted({key[0] for key in fl.sources(matrix)})
    raise NotImplementedError(
        f"{leaves[0]}: a matrix is computed of this leaf{' and others' if leaves[1:] else ''} before it multiplies (a sum of two, one that "
        "is shifted, a leaf times a learned number or gain, a function of its entries), and a sum over a growing axis is followed of a "
        "leaf itself. Put what is linear before or after the product: s * (h @ w), h @ u + h @ w, (h * g) @ w; and draw what a function "
        "makes."
    )


def fixed_conv(node: Wide, by: Det, params: dict[str, Any], sizes: tuple[int, ...], others: tuple[int, ...]) -> Node:
    """A depthwise convolution with numbers that are the same for all channels: patches, a blur."""
    numbers = params["dimension_numbers"]
    out_of, into, *over = numbers.rhs_spec
    b, c, *_ = numbers.lhs_spec
    out_b, out_c, *out_space = numbers.out_spec
    channels, made = node.axes[c], by.axes[out_of]
    inner = made[len(channels) :]
    coordinatewise = made[: len(channels)] == channels and rep_size(channels) == 1 and not any(a.kind == "iid" for a in inner)
    if not coordinatewise or rep_size(by.axes[into]) > 1 or params["batch_group_count"] != 1:
        raise NotImplementedError("a convolution with numbers that are no leaf's, and sum over channels.")
    window = Window(
        params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], [rep_size(by.axes[i]) for i in over],
        numbers.lhs_spec, numbers.out_spec,
    )  # fmt: skip
    taps = window_taps(window, node.shape)
    axes = [node.axes[b]] * len(sizes)
    axes[out_c] = made
    for i in out_space:
        axes[i] = nd.axis_of(sizes[i], others[i])
    back = [0] * len(sizes)
    for place, axis in enumerate((out_b, *out_space, out_c)):
        back[axis] = place

    def fn(a: Any, weights: Any) -> Any:
        w = jnp.transpose(weights, (*over, into, out_of)).reshape(len(taps), -1).astype(a.dtype)
        return jnp.transpose(sum(see(a) * row for see, row in zip(taps, w)), back)

    return nd.Linear(tuple(axes), node, fn, (by,), False)


def conv(
    node: Node, view: View, params: dict[str, Any], sizes: tuple[int, ...], others: tuple[int, ...], groups_other: int, law: LeafLaw
) -> Node:
    """``conv_general_dilated`` of a value with a leaf."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise NotImplementedError(f"{law.path}: a convolution with groups of the batch.")
    leaf_out, leaf_in, *leaf_window = numbers.rhs_spec
    leaf_axes = view.axes
    b, c, *space = numbers.lhs_spec
    out_b, out_c, *out_space = numbers.out_spec
    window = Window(
        params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"],
        [rep_size(leaf_axes[i]) for i in leaf_window], numbers.lhs_spec, numbers.out_spec,
    )  # fmt: skip
    if any(coordinates(node.axes[i]) > 1 for i in (b, *space)):
        raise NotImplementedError(f"{law.path}: a convolution along a growing axis.")
    channels = node.axes[c]
    out: list[Axis] = [()] * len(sizes)
    out[out_b] = node.axes[b]
    for i in out_space:
        out[i] = nd.axis_of(sizes[i], others[i])
    taps = window_taps(window, node.shape)
    place = {out_b: 0, **{axis: 1 + i for i, axis in enumerate(out_space)}}
    if groups != groups_other:
        return _by_channel(node, view, out, out_c, place, taps, leaf_window, leaf_in, law)
    refuse_mean(law)
    grows = any(atom.grows for atom in channels)
    if isinstance(node, Wide) and not grows:
        raise NotImplementedError(
            f"{law.path}: a convolution sums over {coordinates(channels) * rep_size(channels)} channels that do not grow with the width, "
            "behind a layer that does. A finite layer behind a wide one is not Gaussian at infinite width."
        )
    if groups > 1 and rep_size(channels) > 1:
        raise NotImplementedError(f"{law.path}: groups of channels of the data itself, each with fields of its own.")
    (out[out_c],) = placed([view.parts[leaf_out]])
    axes = tuple(out)
    shape = rep_shape(axes)
    order = [place[i] for i in range(len(sizes)) if i != out_c]

    def traced(see: Callable[[Any], Any]) -> Callable[[Any], Any]:
        # Batch and space in the order of the result, whose channels have size 1; those of the operand are summed over.
        return lambda a: jnp.transpose(see(a), (*order, len(order))).reshape(*shape, -1)

    scale = math.sqrt(coordinates(channels) / groups) * view.factor
    orders = *order_of([view.parts[leaf_in]]), *order_of(view.parts[i] for i in leaf_window)
    key = key_of(view, (*sorted({k for k, _, _ in view.parts[leaf_in]}), *_met([channels]), *orders))
    refuse_own(node, key, law.path)
    joint = joint_sum(window, node.shape, shape)
    return nd.Field(axes, key, node, tuple(map(traced, taps)), scale, law.gaussian or grows, law.variance == 0, joint=joint)


def _by_channel(
    node: Node, view: View, out: list[Axis], out_c: int, place: dict[int, int], taps: Sequence[Any], leaf_window: Sequence[int],
    leaf_in: int, law: LeafLaw,
) -> Node:  # fmt: skip
    """A depthwise convolution: each channel is a sum over the window of products of entries of the leaf and of the value."""
    if not isinstance(node, Wide) or view.axes[leaf_in]:
        raise NotImplementedError(f"{law.path}: a convolution in growing groups of more than one channel.")
    leaf_out = next(i for i in range(len(view.axes)) if i != leaf_in and i not in leaf_window)
    (out[out_c],) = placed([view.parts[leaf_out]])
    nd.refuse_turned([a for a in node.axes if coordinates(a) > 1], [out[out_c]])
    axes = tuple(out)
    shape = rep_shape(axes)
    order = [place[i] for i in range(len(out)) if i != out_c]
    weights = activated(view, law)
    total: Wide | None = None
    for offset, see in zip(np.ndindex(*[rep_size(view.axes[i]) for i in leaf_window]), taps):
        at = [slice(None)] * len(view.axes)
        for i, o in zip(leaf_window, offset):
            at[i] = slice(o, o + 1)

        def entry(a: Any, at: Any = tuple(at)) -> Any:
            return jnp.broadcast_to(a[at].reshape((1,) * len(shape)), shape)

        def seen(a: Any, see: Any = see) -> Any:
            return jnp.transpose(see(a), (*order, len(order))).reshape(shape)

        weight = st.apply(weights, st.Moved(axes, entry))
        term = product([st.as_wide(weight), nd.Linear(axes, node, seen, (), True)], axes)
        total = term if total is None else nd.Add(axes, total, term)
    assert total is not None
    return total


def product(factors: Sequence[Wide], axes: Axes) -> Wide:
    """A product of wide values. Scales go to one factor, and a gain ``1 + g`` is what it starts as and what training changes."""
    flat, scales = [], []
    for factor in factors:
        while isinstance(factor, nd.Scale):
            scales.append(factor.by)
            factor = factor.u
        flat += factor.factors if isinstance(factor, nd.Prod) else [factor]
    if scales:
        by = scales[0]
        for other in scales[1:]:
            by = st.det(axes, lambda a, b: jnp.broadcast_to(a * b, rep_shape(axes)), by, other)
        # One node for a field times a number, in all terms: what is linear in one field stays so.
        at = next((i for i, f in enumerate(flat) if not isinstance(f, nd.Const) and not _gain(f) and not fl.is_still(f)), 0)
        flat[at] = (
            nd.Const(axes, st.det(axes, _times, flat[at].value, by)) if isinstance(flat[at], nd.Const) else fl.scale(flat[at], by, axes)
        )
    for i, factor in enumerate(flat):
        rest = [*flat[:i], *flat[i + 1 :]]
        if _gain(factor) and rest:
            return nd.Add(axes, product([factor.u, *rest], axes), product([factor.v, *rest], axes))
        if isinstance(factor, nd.Const) and rest:
            others = _joined(rest, axes)
            return others if factor.value.number == 1 else fl.scale(others, st.same_shape(factor.value, axes), axes)
    return _joined(flat, axes)


def _joined(flat: Sequence[Wide], axes: Axes) -> Wide:
    return flat[0] if len(flat) == 1 else nd.Prod(axes, tuple(flat))


def _gain(factor: Wide) -> Any:
    return isinstance(factor, nd.Add) and isinstance(factor.u, nd.Const)


def _times(a: Any, b: Any) -> Any:
    return a * b


def activated(view: View, law: LeafLaw, like: Axes | None = None, last: bool = False) -> Node:
    """A leaf as an activation: its mean, and its entries less the mean. Along finite axes that `like` says are of independent coordinates
    so are its own.
    """
    refuse_given(law.mean, law.path)
    pairs = zip(view.axes, like or view.axes)
    axes = tuple(iid(a) if b and all(atom.kind == "iid" for atom in b) else a for a, b in pairs)
    moved = placed(view.parts)
    axes = tuple(m if a and all(atom.kind == "iid" for atom in a) else a for a, m in zip(axes, moved))
    shape = rep_shape(axes)
    mean = Det(axes, const=np.full(shape, law.mean * view.factor))
    if not last and not any(atom.kind == "iid" for axis in axes for atom in axis):
        if law.variance:
            raise NotImplementedError(
                f"{law.path}: a random leaf none of whose axes grows acts on wide values entry by entry, so that all coordinates share it "
                "and it stays random at infinite width."
            )
        return mean
    # Finite axes in another order are other entries, position by position.
    way = tuple((k, j) for made, axis in zip(view.parts, axes) for (k, j, _), atom in zip(made, axis) if atom.kind == "pos")
    entries = nd.Entries(axes, key_of(view, way), view.factor, law.gaussian, law.variance == 0)
    return nd.Add(axes, nd.Const(axes, mean), entries) if law.mean else entries
