"""NumPy arrays as XLA on CPU takes them without a copy, and kernels turned around."""

import math
from typing import Any

import numpy as np
from jax.core import Tracer

ALIGNED, COPIED = 64, 1 << 25
"""Bytes: addresses of arrays that XLA on CPU takes over as they are, and of examples that are copied for that, at most."""


def aligned(x: Any) -> Any:
    """A copy whose rows JAX can read where they are; a larger array is copied tile by tile instead."""
    if isinstance(x, Tracer) or x.ctypes.data % ALIGNED == 0 or x.nbytes > COPIED:
        return x
    copy = empty(x.shape, x.dtype)
    copy[:] = x
    return copy


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX can take over as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def turned(tile: np.ndarray) -> np.ndarray:
    """``K(x', x)`` of ``K(x, x')``: examples and positions change places."""
    half = (tile.ndim - 2) // 2
    lead = (tile.ndim - 2) % 2
    order = [1, 0, *range(2, 2 + lead), *range(2 + lead + half, tile.ndim), *range(2 + lead, 2 + lead + half)]
    return tile.transpose(order)


def placed(whole: np.ndarray, part: np.ndarray, at: tuple[int, int], symmetric: bool, own: np.ndarray | None) -> bool:
    """Write a tile, and what is its mirror image, to their place; whether all of it is finite. `own` is to be on the diagonal."""
    (a, b), (n, m), finite = at, part.shape[:2], all_finite(part)
    there = whole[a : a + n, b : b + m]
    there[:] = part
    if symmetric and a != b:
        whole[b : b + m, a : a + n] = turned(part)
    elif symmetric:
        # The lower triangle from the upper one: exactly symmetric, whatever a tile rounds.
        np.copyto(there, turned(part), where=np.tri(n, k=-1, dtype=bool).reshape(n, n, *(1,) * (part.ndim - 2)))
        index = np.arange(n)
        if own is not None:
            there[index, index] = own[a : a + n]
            finite = finite and all_finite(own[a : a + n])
        if part.ndim > 3:
            there[index, index] = _from_upper(there[index, index])
    return finite


def _from_upper(own: np.ndarray) -> np.ndarray:
    """Kernels of examples with themselves, ``(n, ..., *positions, *positions)``, whose lower triangles are their upper ones."""
    size = math.prod(own.shape[own.ndim - (own.ndim - 1) // 2 :])
    each = own.reshape(-1, size, size)
    return np.where(np.tri(size, k=-1, dtype=bool), each.transpose(0, 2, 1), each).reshape(own.shape)


def all_finite(x: np.ndarray) -> bool:
    """Whether no number is NaN or infinite."""
    # A sum is neither only if no number is, and takes a third of the time of a look at each; that of large numbers may overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(x))) or bool(np.isfinite(x).all())
