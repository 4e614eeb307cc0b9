"""Kernels between two sets of examples, from programs of two: tapes first, then tiles of pairs."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex
from jaxtyping import Array

from paperjax.layout import peak_bytes
from paperjax.limits import nodes as nd
from paperjax.limits.program import Program, as_tape
from paperjax.limits.roll import roll, rolled
from paperjax.progress import progress_bar

TILE, CACHE = 256, 1 << 24
"""Examples along one side of a tile, and bytes of it, at most: what one layer makes of so many pairs fits a core's cache."""

Step = Callable[..., tuple[Any, ...]]


def pair_step(program: Program, asked: Sequence[Any], ntk: bool, leaves: bool) -> Callable[..., tuple[Array, ...]]:
    """``(x1, x2, tape1, tape2) -> (nngp,)`` or ``(nngp, ntk)`` of two examples, as arrays over the positions of the output."""
    shape = program.shape * 2
    n = len(program.paths)

    def step(x1: Array, x2: Array, tape1: Any, tape2: Any) -> tuple[Array, ...]:
        def kernel(shift: Array | None) -> Array:
            return program.pair(x1, x2, as_tape(asked, tape1), as_tape(asked, tape2), shift).reshape(shape)

        zero = jnp.zeros(n)
        if not ntk:
            return (kernel(None),)
        if leaves:
            return kernel(zero), jnp.moveaxis(jax.jacfwd(kernel)(zero), -1, 0)
        return jax.jvp(kernel, (zero,), (jnp.ones(n),))

    return step


def kernels(
    program: Program, x1: Any, x2: Any | None, ntk: bool, leaves: bool, dtype: Any, max_bytes: int, progress: bool | None
) -> tuple[Any, ...]:
    """The kernels between all examples of `x1` and of `x2` (or of `x1` itself), ``(N, M, ...)``; the trailing axes are those of a pair.

    Computed in double precision, whatever the user's flag, and kept in `dtype`.
    """
    with nd.usual(True):
        given = [_in(x) for x in ((x1,) if x2 is None else (x1, x2))]
        tapes = [_tapes(program, x, ntk) for x in given]
        if any(isinstance(x, Tracer) for x in given):
            step = pair_step(program, _asked(program, given[0], ntk), ntk, leaves)
            a, b = (given * 2)[:2], (tapes * 2)[:2]
            return tuple(k.astype(dtype) for k in _grid(step)(*map(_double, a), *b))
        return _tiled(program, given, tapes, x2 is None, ntk, leaves, dtype, max_bytes, progress)


def _in(x: Any) -> Any:
    """Floating-point numbers of a kind that XLA has, as wide as they come: they are widened tile by tile."""
    if isinstance(x, Tracer):
        return x
    x = np.asarray(x)
    return x if x.dtype in (np.float32, np.float64) or x.dtype.kind not in "fV" else x.astype(np.float64)


def _double(x: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.ShapeDtypeStruct(x.shape, jnp.float64) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.float64)


def _grid(step: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(jax.vmap(step, (None, 0, None, 0)), (0, None, 0, None))


def _form(tree: Any) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(tree))


def _asked(program: Program, x: Any, ntk: bool) -> tuple[Any, ...]:
    return program.kept(("asked", ntk, *_form(x[:1])), lambda: program.asked(_double(jax.ShapeDtypeStruct(x.shape[1:], x.dtype)), ntk))


def _tapes(program: Program, x: Any, ntk: bool) -> Any:
    asked = _asked(program, x, ntk)
    one = rolled(lambda x: program.tape(_double(x), asked))
    if isinstance(x, Tracer):
        return jax.vmap(one)(x)

    def compiled() -> Any:
        return jax.jit(lambda some: jax.lax.map(one, some, batch_size=min(TILE, len(x)))).lower(x).compile()

    return program.kept(("tapes", ntk, *_form(x)), compiled)(x)


def _tiled(
    program: Program, given: list[Any], tapes: list[Any], symmetric: bool, ntk: bool, leaves: bool, dtype: Any, max_bytes: int,
    progress: bool | None,
) -> tuple[Any, ...]:  # fmt: skip
    rows, columns = given[0], given[-1]
    args = rows, columns, tapes[0], tapes[-1]
    key = "tile", ntk, leaves, np.dtype(dtype), max_bytes, *_form(args)
    height, width, forms, run = program.kept(key, lambda: _compiled(program, args, ntk, leaves, dtype, max_bytes))
    out = [_empty((len(rows), len(columns), *form.shape), form.dtype) for form in forms]
    tiles = list(itertools.product(range(0, len(rows), height), range(0, len(columns), width)))
    tiles = [(a, b) for a, b in tiles if not symmetric or b >= a]

    def fill(tile: tuple[int, int]) -> None:
        # The last ones reach back, so that all have one shape; what another one has made is left out.
        (a, b), starts = tile, [min(at, len(x) - side) for at, x, side in zip(tile, (rows, columns), (height, width))]
        made = run(*args, *(np.int32(at) for at in starts))
        for whole, part in zip(out, made):
            part = np.asarray(part)[a - starts[0] :, b - starts[1] :]
            n, m = part.shape[:2]
            if not symmetric:
                whole[a : a + n, b : b + m] = part
            elif a == b:
                # The lower triangle from the upper one: exactly symmetric, whatever a tile rounds.
                below = np.tril_indices(n, -1)
                whole[a : a + n, b : b + n] = part
                whole[a : a + n, b : b + n][below] = _turned(part)[below]
            else:
                whole[a : a + n, b : b + m] = part
                whole[b : b + m, a : a + n] = _turned(part)

    with progress_bar("infinite width", float(len(tiles)), progress) as bar, ThreadPoolExecutor(_workers(len(tiles))) as pool:
        for _ in pool.map(fill, tiles):
            bar.advance(1.0)
    return tuple(out)


def _workers(tiles: int) -> int:
    """Tiles under way at once: one a core, or enough to keep another device busy."""
    return min(tiles, (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 2)


def _compiled(program: Program, args: tuple[Any, ...], ntk: bool, leaves: bool, dtype: Any, max_bytes: int) -> tuple[Any, ...]:
    """Sides of a tile, the form of a pair, and the compiled ``(x1, x2, tapes1, tapes2, row, column) -> tile``."""
    asked = _asked(program, args[0], ntk)
    x1, x2, tape1, tape2 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), args)
    step = pair_step(program, asked, ntk, leaves)
    pair = jax.tree.map(_double, (x1, x2, tape1, tape2))
    traced, forms = jax.make_jaxpr(lambda *pair: tuple(k.astype(dtype) for k in step(*pair)), return_shape=True)(*pair)
    traced = roll(traced)

    def rolled_step(*pair: Any) -> Any:
        return tuple(jex.jaxpr_as_fun(traced)(*jax.tree.leaves(pair)))

    side = _side(rolled_step, pair, max_bytes)
    # Of one size, rather than a small one at the end.
    height, width = (math.ceil(n / math.ceil(n / side)) for n in (len(args[0]), len(args[1])))

    def tile(x1: Any, x2: Any, tape1: Any, tape2: Any, row: Any, column: Any) -> Any:
        part = [jax.tree.map(lambda x: _double(jax.lax.dynamic_slice_in_dim(x, row, height)), side) for side in (x1, tape1)]
        part += [jax.tree.map(lambda x: _double(jax.lax.dynamic_slice_in_dim(x, column, width)), side) for side in (x2, tape2)]
        if height == width == 1:
            return jax.tree.map(lambda k: k[None, None], rolled_step(*(jax.tree.map(lambda x: x[0], part[i]) for i in (0, 2, 1, 3))))
        return _grid(rolled_step)(part[0], part[2], part[1], part[3])

    return height, width, forms, jax.jit(tile).lower(*args, np.int32(0), np.int32(0)).compile()


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX can take over as it is: it wants addresses that are multiples of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _turned(tile: np.ndarray) -> np.ndarray:
    """``K(x', x)`` of ``K(x, x')``: examples and positions change places."""
    half = (tile.ndim - 2) // 2
    lead = (tile.ndim - 2) % 2
    order = [1, 0, *range(2, 2 + lead), *range(2 + lead + half, tile.ndim), *range(2 + lead, 2 + lead + half)]
    return tile.transpose(order)


def _side(step: Callable[..., Any], pair: tuple[Any, ...], max_bytes: int) -> int:
    """Examples along a side of a tile that keep to a budget and to a cache."""
    one, two, four = (peak_bytes(_grid(step), *_repeated(pair, n)) for n in (1, 2, 4))
    if one > max_bytes:
        raise ValueError(
            f"pj.limit: one pair of examples takes {one / 1e9:.2g} GB, and max_bytes is {max_bytes / 1e9:.2g} GB. A "
            f"kernel over all pairs of "
            "positions is kept where the network averages over them: give more memory, fewer positions, or flatten them."
        )
    # What grows as the square of the side is of pairs, the rest of examples.
    each = max((four - 2 * two) // 8, 8)
    return max(1, min(TILE, math.isqrt(max(1, min(max_bytes // _workers(1 << 30), CACHE) // each))))


def _repeated(pair: tuple[Any, ...], n: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), pair)
