"""Maxima of wide values: over positions (max pooling), and over independent coordinates (maxout)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paperjax.limits import fields as fl
from paperjax.limits import joined
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.elementwise import broadcasting, elementwise
from paperjax.limits.nodes import Axes, Node, Wide, axis_of, coordinates, rep_shape

EXTREMES = ("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min")
MOST = 64
"""Values that are compared one by one."""
KNOWN = (
    "Of two Gaussian values the maximum is (u + v + |u - v|) / 2, and has a closed form; of more, or of values behind a nonlinearity, it "
    "is an integral over as many fields as there are values. It can be drawn: opt in to Monte Carlo with key=jax.random.key(0), "
    "samples=4096. Or pool by means."
)


def sloped(extreme: Callable[[Any], Any], name: str, axes: Sequence[int]) -> Callable[[Any], Any]:
    """A maximum or minimum of known numbers, whose derivative is that of the first entry that has it.

    JAX's asks where entries equal the extreme, of which XLA may find none where it computes the entries twice and rounds them otherwise.

    Examples
    --------
    >>> jax.grad(sloped(lambda x: jnp.max(x), "reduce_max", (0,)))(jnp.array([1.0, 2.0, 2.0])).tolist()
    [0.0, 1.0, 0.0]
    """

    def slope(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        (x,), (moved,) = primals, tangents
        ends = range(-len(axes), 0)
        flat, along = (jnp.moveaxis(a, axes, ends).reshape(*(n for i, n in enumerate(a.shape) if i not in axes), -1) for a in (x, moved))
        at = (jnp.argmax if name == "reduce_max" else jnp.argmin)(flat, -1, keepdims=True)
        return call(x), jnp.take_along_axis(along, at, -1)[..., 0]

    call = jax.custom_jvp(extreme)
    call.defjvp(slope)
    return call


def extreme(reader: Any, eqn: Any, twin: Any, node: Node) -> Node:
    """A maximum or a minimum over axes, or over windows.

    Raises
    ------
    NotImplementedError
        If it runs along a growing axis, or is of more than two Gaussian values and is not to be drawn.
    """
    assert isinstance(node, Wide)
    name = eqn.primitive.name
    what = "max" if name.endswith("max") else "min"
    if "window" in name:
        return _windows(reader, eqn, twin, node, what)
    over = eqn.params["axes"]
    if any(atom.grows for i in over for atom in node.axes[i]):
        raise NotImplementedError("the maximum of more and more independent values along a growing axis, which grows with their number.")
    if not reader.draws and not any(atom.grows for axis in node.axes for atom in axis):
        raise NotImplementedError(f"a {what}imum over outputs of a layer that does not grow. {st.OUTPUTS}")
    left = [i for i in range(len(node.axes)) if i not in over]
    axes = tuple(node.axes[i] for i in left)
    if reader.draws and all(coordinates(node.axes[i]) == 1 for i in over):
        size = math.prod(nd.full_size(node.axes[i])[0] for i in over)
        if size > 2:
            return nd.Drawn(axes, broadcasting(eqn), (node,))
    sizes = [nd.full_size(axis)[0] for axis in node.axes]
    places = list(np.ndindex(*(sizes[i] for i in over)))
    if len(places) > (MOST if reader.draws else 2):
        raise NotImplementedError(f"a {what}imum of {len(places)} wide values (max pooling, maxout, a softmax). {KNOWN}")
    parts = []
    for place in places:
        starts, stops = [0] * len(sizes), list(sizes)
        for i, at in zip(over, place):
            starts[i], stops[i] = at, at + 1
        others = tuple(1 if i in over else nd.full_size(axis)[1] for i, axis in enumerate(node.axes))
        one = joined.cut(node, tuple(starts), tuple(stops), (1,) * len(sizes), others)
        parts.append(st.apply(one, st.drop(one.axes, list(left))))
    return _of(reader, parts, axes, what)


def _of(reader: Any, parts: list[Node], axes: Axes, what: str) -> Node:
    if len(parts) <= 2:
        return _pairwise(reader, parts, axes, what)
    several = functools.partial(functools.reduce, jnp.maximum if what == "max" else jnp.minimum)
    return nd.Drawn(axes, lambda *values: several(values), tuple(parts))


def _pairwise(reader: Any, parts: list[Node], axes: Axes, what: str) -> Node:
    from_two = jnp.maximum if what == "max" else jnp.minimum
    if len(parts) == 1:
        return parts[0]
    if not reader.draws and not all(isinstance(p, Wide) and fl.is_gaussian(p) for p in parts):
        raise NotImplementedError(f"a {what}imum of two wide values that are not Gaussian (max pooling behind a nonlinearity). {KNOWN}")
    return elementwise(what, from_two, parts, axes, reader.draws)


def _windows(reader: Any, eqn: Any, twin: Any, node: Wide, what: str) -> Node:
    p = eqn.params
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    if any(n > 1 and coordinates(axis) > 1 for n, axis in zip(window, node.axes)):
        raise NotImplementedError("max pooling along a growing axis, or one of independent coordinates.")
    sizes, others = (tuple(e.outvars[0].aval.shape) for e in (eqn, twin))
    axes = tuple(a if k == 1 else axis_of(n, m) for a, k, n, m in zip(node.axes, window, sizes, others))
    count, shape = math.prod(window), rep_shape(axes)
    simple = not any(map(any, padding)) and set(p["base_dilation"]) | set(p["window_dilation"]) == {1}
    if count > 2 or not simple:
        if not reader.draws:
            raise NotImplementedError(f"max pooling over windows of {count} positions. {KNOWN}")
        return nd.Drawn(axes, broadcasting(eqn), (node,))
    parts = []
    for offset in np.ndindex(*window):

        def see(a: Any, offset: tuple[int, ...] = offset) -> Any:
            stops = [o + (n - 1) * s + 1 for o, n, s in zip(offset, shape, strides)]
            return lax.slice(a, offset, stops, strides)

        parts.append(st.apply(node, st.Moved(axes, see)))
    return _pairwise(reader, parts, axes, what)
