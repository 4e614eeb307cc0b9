"""Sums over windows: of values at one example, and of second moments of two, where both windows move together."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax


class Window(NamedTuple):
    """Spatial parameters of a convolution, and where batch, channels and space lie in its operand and its result."""

    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    inside: Sequence[int]
    between: Sequence[int]
    sizes: Sequence[int]
    lhs: Sequence[int]
    out: Sequence[int]


def window_taps(window: Window, shape: Sequence[int]) -> list[Callable[[Any], Any]]:
    """For each entry of the window, what it sees of a representative, ``(batch, *space, channels)`` in the order of the result.

    The first function takes a representative of the operand and returns one whose axes are batch, space and, last, channels.
    """
    b, c, *space = window.lhs
    reach = [(n - 1) * d for n, d in zip(window.sizes, window.between)]
    padded = [(shape[a] - 1) * i + 1 + lo + hi for a, i, (lo, hi) in zip(space, window.inside, window.padding)]
    counts = [(p - r - 1) // s + 1 for p, r, s in zip(padded, reach, window.strides)]
    config = [(0, 0, 0), *((lo, hi, i - 1) for i, (lo, hi) in zip(window.inside, window.padding)), (0, 0, 0)]

    def tap(offset: Sequence[int]) -> Callable[[Any], Any]:
        starts = [o * d for o, d in zip(offset, window.between)]

        def see(a: Any) -> Any:
            a = jnp.transpose(a, (b, *space, c))
            a = lax.pad(a, jnp.zeros((), a.dtype), config)
            stops = [s0 + (n - 1) * s + 1 for s0, n, s in zip(starts, counts, window.strides)]
            return lax.slice(a, (0, *starts, 0), (a.shape[0], *stops, a.shape[-1]), (1, *window.strides, 1))

        return see

    return [tap(offset) for offset in np.ndindex(*window.sizes)]


def joint_sum(window: Window, shape: Sequence[int], out: Sequence[int]) -> Callable[[Any, Any], Any] | None:
    """``sum_o K[p + o, q + o]`` over the offsets o of a window, from moments ``(*shape, *shape)`` to ``(*out, *out)``.

    One spatial axis after the other, three shifted terms each for three rows, not nine; `None` where batch or channels are more than one
    or the result has its axes in another order. The second argument is the number 1 of `paperjax.limits.moments.Run`, or ``None``.
    """
    b, c, *space = window.lhs
    _, _, *out_space = window.out
    if shape[b] > 1 or shape[c] > 1 or list(np.argsort(space)) != list(np.argsort(out_space)):
        return None
    order = list(np.argsort(space))
    small = [shape[space[i]] for i in order]

    def total(k: Any, unit: Any) -> Any:
        n = len(small)
        k = k.reshape(*small, *small)
        for axis in reversed(range(n)):
            i = order[axis]
            terms = [
                _shifted(
                    k, (axis, n + axis), o * window.between[i], window.strides[i], window.inside[i], window.padding[i], out[out_space[i]]
                )
                for o in range(window.sizes[i])
            ]
            k = sum(terms[1:], start=terms[0])
            k = k if unit is None or axis == 0 else k / unit
        return k.reshape(*out, *out)

    return total


def _shifted(k: Any, axes: tuple[int, int], offset: int, stride: int, inside: int, padding: tuple[int, int], count: int) -> Any:
    """``k[offset - lo + stride i]`` for i < count along two axes at once, 0 where there is none."""
    n, start = k.shape[axes[0]], offset - padding[0]
    if inside > 1:
        # Zeros between the entries.
        config = [(0, 0, inside - 1 if a in axes else 0) for a in range(k.ndim)]
        k, n = lax.pad(k, jnp.zeros((), k.dtype), config), (n - 1) * inside + 1
    first = max(0, math.ceil(-start / stride))
    last = min(count, (n - 1 - start) // stride + 1)
    if last <= first:
        return jnp.zeros([count if a in axes else m for a, m in enumerate(k.shape)], k.dtype)
    for a in axes:
        k = lax.slice_in_dim(k, start + first * stride, start + (last - 1) * stride + 1, stride, a)
    return lax.pad(k, jnp.zeros((), k.dtype), [(first, count - last, 0) if a in axes else (0, 0, 0) for a in range(k.ndim)])


MOST_TERMS = 64
"""Entries of a window that are added one by one: XLA on CPU is slow at windows."""


def window_adds(params: dict[str, Any], otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``reduce_window_sum`` as a sum of slices; `otherwise` for large windows."""
    sizes, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    inside, between = params["base_dilation"], params["window_dilation"]
    if math.prod(sizes) > MOST_TERMS:
        return otherwise

    def total(a: Any) -> Any:
        # An axis of a representative may be smaller than that of the array; its window is then of size 1.
        for axis, size in enumerate(sizes):
            lo, hi = padding[axis]
            if size == 1 and strides[axis] == 1 and lo == hi == 0 and inside[axis] == 1:
                continue
            config = [(lo, hi, inside[axis] - 1) if i == axis else (0, 0, 0) for i in range(a.ndim)]
            a = lax.pad(a, jnp.zeros((), a.dtype), config) if any(map(any, config)) else a
            reach = (size - 1) * between[axis]
            count = (a.shape[axis] - reach - 1) // strides[axis] + 1
            starts = [o * between[axis] for o in range(size)]
            terms = [lax.slice_in_dim(a, s, s + (count - 1) * strides[axis] + 1, strides[axis], axis) for s in starts]
            a = sum(terms[1:], start=terms[0])
        return a

    return total
