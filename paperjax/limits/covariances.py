"""Arrays of second moments ``(*u, *v)`` over positions of two values, or ``(*u,)`` where the positions are the same."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Node

# A moment that is 0 whatever the data is not computed.
Moments = Array | None


def placed(moment: Moments, left: bool, shape_u: tuple[int, ...], shape_v: tuple[int, ...], diag: bool) -> Moments:
    """A moment of one side, in the shape of moments of two."""
    if moment is None or diag:
        return moment
    return moment.reshape(*shape_u, *(1,) * len(shape_v)) if left else moment.reshape(*(1,) * len(shape_u), *shape_v)


def swapped(moment: Moments, v: Node, diag: bool) -> Moments:
    """With the two values in the other order; `v` is now first."""
    if moment is None or diag:
        return moment
    n = len(v.shape)
    return moment.transpose(*range(n, moment.ndim), *range(n))


def outer(a: Array, b: Array) -> Array:
    """``a_u b_v``."""
    return a.reshape(*a.shape, *(1,) * b.ndim) * b


def plus(a: Moments, b: Moments) -> Moments:
    """A sum, of which a part may be 0."""
    return b if a is None else a if b is None else a + b


def times(a: Moments, b: Any) -> Moments:
    """A multiple of what may be 0."""
    return None if a is None else a * b


def total_of(terms: Sequence[Moments]) -> Any:
    """A sum of what may be 0."""
    total = None
    for term in terms:
        total = plus(total, term)
    return total


def own_matrices(k: Any, u: nd.Field, diag: bool) -> Any:
    """No covariance between positions with different matrices."""
    n = len(u.shape)
    for axis in () if diag else u.alone:
        same = jnp.eye(u.shape[axis], dtype=k.dtype)
        k = k * jnp.expand_dims(same, [i for i in range(2 * n) if i not in (axis, n + axis)])
    return k


def diagonal(full: Moments, u: Node) -> Moments:
    """Where both positions are the same."""
    if full is None:
        return None
    n = math.prod(u.shape)
    return jnp.diagonal(full.reshape(n, n)).reshape(u.shape)


def contracted(a: Array, b: Array, diag: bool) -> Array:
    """``sum_c a[..., c] b[..., c]`` over the last axes."""
    if diag and math.prod(a.shape[:-1]) > 1:
        return (a * b).sum(-1)
    if diag:
        # So that over many pairs it is a product of matrices.
        return (a.reshape(-1) @ b.reshape(-1)).reshape(a.shape[:-1])
    flat = a.reshape(-1, a.shape[-1]) @ b.reshape(-1, b.shape[-1]).T
    return flat.reshape(a.shape[:-1] + b.shape[:-1])


def trace(k: Array, n: int) -> Array:
    """Of ``(*u, c, *v, c)`` over both c."""
    return jnp.trace(k, axis1=n, axis2=k.ndim - 1) if k.shape[-1] > 1 else k[(*(slice(None),) * n, 0)][..., 0]


def on_left(fn: nd.Fn, k: Array, n: int) -> Array:
    """A function of the first `n` axes, for every entry along the others."""
    rest = k.shape[n:]
    size = math.prod(rest)
    if size == 1:
        out = fn(k.reshape(k.shape[:n]))
        return out.reshape(out.shape + rest)
    out = jax.vmap(fn, in_axes=n, out_axes=-1)(k.reshape(*k.shape[:n], size))
    return out.reshape(out.shape[:-1] + rest)


def on_right(fn: nd.Fn, k: Array, n: int) -> Array:
    """A function of the axes after the first `n`, for every entry along those."""
    rest = k.shape[:n]
    size = math.prod(rest)
    if size == 1:
        out = fn(k.reshape(k.shape[n:]))
        return out.reshape(rest + out.shape)
    out = jax.vmap(fn)(k.reshape(size, *k.shape[n:]))
    return out.reshape(rest + out.shape[1:])
