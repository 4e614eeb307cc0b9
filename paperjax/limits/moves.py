"""Primitives that move, cut, repeat and sum entries: what they do to axes, and to representatives."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd
from paperjax.limits.dependence import refuse_shared
from paperjax.limits.nodes import Atom, Axes, Axis, Det, Fn, Node, Wide, axis_of, coordinates, rep_shape

Shape = tuple[int, ...]
OUTPUTS = (
    "They stay random at infinite width, and so does what is made of them together (a softmax over classes, a router's gate over experts, "
    "a norm of the outputs). Where that is the output of the network, take the limit of the network without it: a loss can apply it. What "
    "such a gate multiplies is Gaussian given the gate alone, and has no one kernel: make the gate of the data, without random weights."
)
"""What is known of functions of several outputs."""
UNLIKE = (
    "numbers that differ from one independent coordinate (output, head, entry of a head) to the next, as those of rotary positions do: "
    "such coordinates are not alike, and one does not stand for all. Learned positions, a leaf that is drawn, have a limit, and so have "
    "heads of a fixed number with a slope each (ALiBi), where each head is written as layers of its own."
)
FOLLOWED = "values that are followed entry by entry along an axis meet others that are independent along it."


class Moved(NamedTuple):
    """The axes of a result, and the function of the representative; `selects` as in `paperjax.limits.nodes.Linear`."""

    axes: Axes
    fn: Fn
    selects: bool = True


def apply(node: Node, moved: Moved) -> Node:
    """A linear function of the representative of a value."""
    axes, fn, selects = moved
    if isinstance(node, Det):
        return det(axes, fn, node)
    assert isinstance(node, Wide)
    if isinstance(node, nd.Const):
        return nd.Const(axes, det(axes, fn, same_shape(node.value, node.axes)))
    if isinstance(node, nd.Add):
        # What a leaf starts as stays apart from what it is trained to.
        u, v = (apply(same(part, node.axes), moved) for part in (node.u, node.v))
        assert isinstance(u, Wide)
        assert isinstance(v, Wide)
        return nd.Add(axes, u, v)
    if isinstance(node, nd.Scale) and selects:
        moved_by = det(axes, fn, same_shape(node.by, node.axes))
        u = apply(same(node.u, node.axes), moved)
        assert isinstance(u, Wide)
        return fl.scale(u, moved_by, axes)
    if isinstance(node, nd.Mixed):
        return node.mapped(axes, lambda part, own: apply(same(part, node.axes), Moved(own, fn, selects)))
    return nd.Linear(axes, node, fn, (), selects)


def same(node: Wide, axes: Axes) -> Wide:
    """A wide value repeated along axes that it has not."""
    shape = rep_shape(axes)
    refuse_shared(node, node.axes, axes)
    if node.shape == shape:
        return node
    made = apply(node, Moved(axes, lambda a: jnp.broadcast_to(a, shape)))
    assert isinstance(made, Wide)
    return made


def det(axes: Axes, fn: Fn, *args: Det | nd.Moment, noise: Det | None = None) -> Det:
    """A deterministic array, computed here and now if all that it is made of is known."""
    known = [arg.const for arg in args if isinstance(arg, Det) and arg.const is not None]
    noise = noise or next((arg.noise for arg in args if isinstance(arg, Det) and arg.noise is not None), None)
    if len(known) == len(args) and args:
        return Det(axes, const=nd.fold(fn, *known), noise=noise)
    return Det(axes, fn, args, noise=noise)


Pairs = Sequence[tuple[int, int]]


def meeting(u: Node, v: Node, batch: Pairs, inside: Pairs) -> tuple[Node, Node]:
    """Two values that are to meet entry by entry along pairs of axes: numbers that all coordinates share are followed for each of them.

    Raises
    ------
    NotImplementedError
        If numbers of one entry each are to meet random coordinates that are alike.
    """

    def met(node: Node, i: int, axis: Axis) -> Node:
        alike = isinstance(node, Det) and nd.rep_size(node.axes[i]) == 1 < nd.rep_size(axis)
        return same_shape(node, (*node.axes[:i], axis, *node.axes[i + 1 :])) if alike and isinstance(node, Det) else node

    for i, j in (*batch, *inside):
        u, v = met(u, i, v.axes[j]), met(v, j, u.axes[i])
    if (isinstance(u, Det) or isinstance(v, Det)) and _unlike(u, v, batch):
        raise NotImplementedError(UNLIKE)
    return u, v


def refuse_unlike(u: Node, v: Node, pairs: Pairs) -> None:
    """Refuse coordinates of one value that are alike where those of the other are followed one by one.

    Raises
    ------
    NotImplementedError
        If there are any.
    """
    if _unlike(u, v, pairs):
        raise NotImplementedError(FOLLOWED)


def _unlike(u: Node, v: Node, pairs: Pairs) -> bool:
    return any(nd.rep_size(u.axes[i]) != nd.rep_size(v.axes[j]) for i, j in pairs)


def same_shape(node: Det, axes: Axes) -> Det:
    """A deterministic array with the axes of another: a scalar becomes an array of it."""
    shape = rep_shape(axes)
    return node if node.axes == axes else det(axes, lambda a: jnp.broadcast_to(a, shape), node)


def transpose(axes: Axes, permutation: Sequence[int]) -> Moved:
    """Axes in another order."""
    return Moved(nd.turned(axes, permutation), lambda a: jnp.transpose(a, tuple(permutation)))


def reshape(axes: Axes, sizes: Shape, others: Shape) -> Moved:
    """Row-major. An axis of independent coordinates may be split and merged like any other."""
    todo = [atom for axis in axes for atom in axis]
    after: list[Axis] = []
    for size, other in zip(sizes, others):
        made: list[Atom] = []
        while size > 1 or other > 1:
            atom = todo.pop(0)
            if size % atom.size == 0 and other % atom.other == 0:
                made.append(atom)
                size, other = size // atom.size, other // atom.other
            elif atom.size % size == 0 and atom.other % other == 0:
                first, rest = (((*atom.turn, i) if atom.turn else ()) for i in (0, 1))
                made.append(Atom(atom.kind, size, other, first))
                todo.insert(0, Atom(atom.kind, atom.size // size, atom.other // other, rest))
                size = other = 1
            else:
                raise NotImplementedError(f"a reshape that cuts an axis of {atom.size} in parts of {size}, which does not divide it.")
        after.append(tuple(made))
    shape = rep_shape(tuple(after))
    return Moved(tuple(after), lambda a: jnp.reshape(a, shape))


def broadcast(axes: Axes, sizes: Shape, others: Shape, places: Sequence[int]) -> Moved:
    """``broadcast_in_dim``. Along a new axis that grows nothing varies, so its representative has size 1."""
    after: list[Axis] = [axis_of(n, m) for n, m in zip(sizes, others)]
    for old, new in enumerate(places):
        if nd.full_size(axes[old]) == (sizes[new], others[new]):
            after[new] = axes[old]
    shape = rep_shape(tuple(after))
    return Moved(tuple(after), lambda a: lax.broadcast_in_dim(a, shape, tuple(places)))


def drop(axes: Axes, keep: Sequence[int | None]) -> Moved:
    """Axes of size 1 taken out, or put in where `keep` is ``None``."""
    after = tuple(() if i is None else axes[i] for i in keep)
    return Moved(after, lambda a: jnp.reshape(a, rep_shape(after)))


def pad(axes: Axes, low_high_inside: Sequence[tuple[int, int, int]], sizes: Shape, others: Shape) -> Moved:
    """With zeros."""
    for axis, config in zip(axes, low_high_inside):
        if any(config) and (len(axis) > 1 or coordinates(axis) > 1):
            raise NotImplementedError("padding of an axis of independent coordinates.")
    after = tuple(axis if not any(c) else axis_of(n, m) for axis, c, n, m in zip(axes, low_high_inside, sizes, others))
    return Moved(after, lambda a: lax.pad(a, jnp.zeros((), a.dtype), tuple(low_high_inside)))


def reverse(axes: Axes, dimensions: Sequence[int]) -> Moved:
    """Entries in the opposite order."""
    if any(coordinates(axes[i]) > 1 for i in dimensions):
        raise NotImplementedError("an axis of independent coordinates turned around.")
    return Moved(axes, lambda a: jnp.flip(a, tuple(dimensions)))


def as_wide(node: Node) -> Wide:
    """A value as a wide one."""
    if isinstance(node, Wide):
        return node
    assert isinstance(node, Det)
    return nd.Const(node.axes, node)


def reduce_sum(node: Node, dimensions: Sequence[int]) -> Node:
    """A sum over positions stays what it is; over growing coordinates it is their number times the mean, by the law of large numbers."""
    axes = node.axes
    after = tuple(axis for i, axis in enumerate(axes) if i not in dimensions)
    count = math.prod(coordinates(axes[i]) for i in dimensions)
    grows = any(atom.grows for i in dimensions for atom in axes[i])

    def total(a: Any) -> Any:
        return count * jnp.sum(a, tuple(dimensions))

    if isinstance(node, Det):
        # All coordinates share its noise.
        noise = node.noise if node.noise is None or count == 1 else det((), lambda a: count * a, node.noise)
        return det(after, total, node, noise=noise)
    assert isinstance(node, Wide)
    if count > 1 and not grows and any(atom.grows for i, axis in enumerate(axes) if i not in dimensions for atom in axis):
        raise NotImplementedError(
            f"a sum over {count} independent coordinates, whose number does not grow, at each coordinate of a growing axis: the norm of "
            "a group of fixed size stays random. Where parts that one leaf holds side by side (as of nn.vmap) are added, give each part a "
            "leaf of its own."
        )
    if count > 1 and not grows:
        raise NotImplementedError(f"a sum over {count} independent coordinates, whose number does not grow. {OUTPUTS}")
    if not grows:
        return apply(node, Moved(after, total, False)) if isinstance(node, nd.Mixed) else nd.Linear(after, node, total, (), False)
    if any(atom.kind == "iid" for i, axis in enumerate(axes) if i not in dimensions for atom in axis if atom.grows):
        raise NotImplementedError(
            "a sum over one of two growing axes. (Of a matrix of weights, to normalise it: weight normalisation or standardisation is not "
            "followed. Each norm settles: take the limit without it, entries being of variance 1 / fan_in.)"
        )
    if fl.centred(node):
        value = Det(after, const=nd.fold(lambda: jnp.zeros(rep_shape(after))))
    else:
        value = Det(after, lambda a: a, (nd.Moment(node, None, total),))
    return dataclasses.replace(value, noise=rms_of_sum(node, None, count))


def rms_of_sum(u: Wide, v: Wide | None, count: int) -> Det:
    """The size of the fluctuations of a sum of so many products; of values themselves where there is one."""

    def size(*sizes: Any) -> Any:
        return math.sqrt(count) * math.prod(sizes)

    return det((), size, *(_rms(w) for w in ((u,) if v is None else (u, v))))


def _rms(u: Wide) -> Det:
    """The largest root mean square; of products of sums, such as the squares of a residual stream, a bound's order.

    How it changes with the width is what is looked at, and moments of fourth order of a sum are integrals over all its terms.
    """
    if _of_sums(u):
        if isinstance(u, nd.Prod):
            return det((), lambda *sizes: math.prod(sizes), *map(_rms, u.factors))
        if isinstance(u, nd.Add):
            return det((), lambda a, b: a + b, _rms(u.u), _rms(u.v))
        assert isinstance(u, nd.Scale)
        return det((), lambda a, by: a * jnp.max(jnp.abs(by)), _rms(u.u), dataclasses.replace(u.by, noise=None))
    square = nd.Moment(u, u, functools.partial(_squares, math.prod(u.shape)))
    return det((), lambda a: jnp.sqrt(jnp.max(a)), square)


@fl.memoized
def _of_sums(u: Wide) -> bool:
    """Whether a product of sums that are not Gaussian, or are known by their second moments alone, is a term of a value."""
    if isinstance(u, nd.Prod):
        return any((_is_sum(w) and not fl.is_gaussian(w)) or _of_sums(w) for w in u.factors)
    if isinstance(u, nd.Add):
        return _of_sums(u.u) or _of_sums(u.v)
    return isinstance(u, nd.Scale) and _of_sums(u.u)


def _is_sum(u: Wide) -> bool:
    return isinstance(u, (nd.Add, nd.Carried, nd.Scanned)) or (isinstance(u, nd.Linear) and not u.selects)


def repeated(fn: Fn) -> Fn:
    """A function of one representative for a stack of them."""
    return jax.vmap(fn)


def _squares(n: int, k: Any) -> Any:
    return jnp.diagonal(k.reshape(n, n))
