"""Kernels between two sets of examples, from programs of two: tapes first, then tiles of pairs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex
from jaxtyping import Array

from paperjax.layout import peak_bytes
from paperjax.limits import nodes as nd
from paperjax.limits.levels import settled
from paperjax.limits.program import Program, as_tape
from paperjax.limits.roll import roll, rolled
from paperjax.limits.spread import computed, enough
from paperjax.progress import progress_bar

TILE = 256
"""Examples along one side of a tile, at most: what one layer makes of so many pairs fits a core's cache."""

Step = Callable[..., tuple[Any, ...]]


def pair_step(program: Program, asked: Sequence[Any], ntk: bool, leaves: bool) -> Callable[..., tuple[Array, ...]]:
    """``(x1, x2, tape1, tape2) -> (nngp,)`` or ``(nngp, ntk)`` of two examples, as arrays over the positions of the output."""
    shape = program.pair_shape
    n = len(program.paths)

    def step(x1: Array, x2: Array, tape1: Any, tape2: Any) -> tuple[Array, ...]:
        def kernel(shift: Array | None) -> Array:
            return program.pair(x1, x2, as_tape(asked, tape1), as_tape(asked, tape2), shift).reshape(shape)

        zero = jnp.zeros(n)
        if not ntk:
            return (kernel(None),)
        if leaves:
            return kernel(zero), jnp.moveaxis(jax.jacfwd(kernel)(zero), -1, 0).reshape(-1, *program.shape * 2)
        return jax.jvp(kernel, (zero,), (jnp.ones(n),))

    return step


def kernels(
    program: Program,
    x1: Any,
    x2: Any | None,
    ntk: bool,
    leaves: bool,
    dtype: Any,
    max_bytes: int,
    progress: bool | None,
    devices: Sequence[Any] = (),
) -> tuple[Any, ...]:
    """The kernels between all examples of `x1` and of `x2` (or of `x1` itself), ``(N, M, ...)``; the trailing axes are those of a pair.

    In double or single precision, whatever the user's flag.
    """
    with nd.usual(dtype == np.float64):
        given = [_in(x, dtype) for x in ((x1,) if x2 is None else (x1, x2))]
        asked = program.asked(given[0][0], ntk)
        program, tapes = settled(program, asked, lambda which: [_tapes(which, asked, x) for x in given])
        step = pair_step(program, asked, ntk, leaves)
        if any(isinstance(x, Tracer) for x in given):
            a, b = (given * 2)[:2], (tapes * 2)[:2]
            return _grid(step)(*a, *b)
        return _tiled(step, given, tapes, x2 is None, max_bytes, progress, devices)


def _in(x: Any, dtype: Any) -> Any:
    if isinstance(x, Tracer):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    x = np.asarray(x)
    return x.astype(dtype) if x.dtype.kind == "f" or x.dtype.kind == "V" else x


def _grid(step: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(jax.vmap(step, (None, 0, None, 0)), (0, None, 0, None))


def _tapes(program: Program, asked: Sequence[Any], x: Any) -> Any:
    one = rolled(functools.partial(program.tape, asked=asked))
    if isinstance(x, Tracer):
        return jax.vmap(one)(x)
    each = jax.jit(lambda some: jax.lax.map(one, some, batch_size=min(TILE, len(x))))
    return each(x)


def _tiled(
    step: Callable[..., Any],
    given: list[Any],
    tapes: list[Any],
    symmetric: bool,
    max_bytes: int,
    progress: bool | None,
    devices: Sequence[Any],
) -> tuple[Any, ...]:
    rows, columns = given[0], given[-1]
    one = _part(rows, columns, tapes[0], tapes[-1], range(1), range(1))
    pair = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), one)
    traced, form = jax.make_jaxpr(step, return_shape=True)(*pair)
    traced = roll(traced)
    step = lambda *args: tuple(jex.jaxpr_as_fun(traced)(*jax.tree.leaves(args)))  # noqa: E731

    def tiles_of(side: int) -> list[tuple[range, range]]:
        heights, widths = (_edges(len(x), side) for x in (rows, columns))
        return [(a, b) for a in heights for b in widths if not symmetric or b.start >= a.start]

    side = enough(_side(step, pair, max_bytes // max(1, len(devices))), tiles_of, devices)
    out = [np.empty((len(rows), len(columns), *a.shape), a.dtype) for a in form]
    run = jax.jit(_grid(step) if side > 1 else _one_by_one(step))
    tiles = tiles_of(side)
    with progress_bar("infinite width", float(len(tiles)), progress) as bar:
        for (a, b), made in computed(run, lambda tile: _part(rows, columns, tapes[0], tapes[-1], *tile), tiles, devices):
            for whole, tile in zip(out, made):
                whole[a.start : a.stop, b.start : b.stop] = tile
            bar.advance(1.0)
    if symmetric:
        for whole in out:
            _mirror(whole)
    return tuple(jnp.asarray(whole) for whole in out)


def _mirror(whole: np.ndarray) -> None:
    """The lower triangle from the upper one: exactly symmetric, whatever a tile rounds."""
    for r in range(0, len(whole), TILE):
        square = whole[r : r + TILE, r : r + TILE]
        below = np.tril_indices(len(square), -1)
        square[below] = _turned(square)[below]
        whole[r + TILE :, r : r + TILE] = _turned(whole[r : r + TILE, r + TILE :])


def _turned(tile: np.ndarray) -> np.ndarray:
    """``K(x', x)`` of ``K(x, x')``: examples and positions change places."""
    half = (tile.ndim - 2) // 2
    lead = (tile.ndim - 2) % 2
    order = [1, 0, *range(2, 2 + lead), *range(2 + lead + half, tile.ndim), *range(2 + lead, 2 + lead + half)]
    return tile.transpose(order)


def _edges(n: int, side: int) -> list[range]:
    """Ranges of one length, the last ones overlapping."""
    return [range(min(a, max(n - side, 0)), min(a, max(n - side, 0)) + min(side, n)) for a in range(0, n, side)]


def _part(rows: Any, columns: Any, tape1: Any, tape2: Any, a: range, b: range) -> tuple[Any, ...]:
    cut = [jax.tree.map(lambda x, r=r: x[r.start : r.stop], tree) for tree, r in ((rows, a), (columns, b), (tape1, a), (tape2, b))]
    return tuple(cut)


def _one_by_one(step: Callable[..., Any]) -> Callable[..., Any]:
    """Pair by pair, where one fills the memory that a tile may have."""

    def run(x1: Any, x2: Any, tape1: Any, tape2: Any) -> Any:
        return jax.lax.map(lambda row: jax.lax.map(lambda column: step(row[0], column[0], row[1], column[1]), (x2, tape2)), (x1, tape1))

    return run


def _side(step: Callable[..., Any], pair: tuple[Any, ...], max_bytes: int) -> int:
    """Examples along a side of a tile that keep to a budget."""
    each = max(peak_bytes(step, *pair), 8)
    if each > max_bytes:
        raise ValueError(
            f"pj.limit: one pair of examples takes {each / 1e9:.2g} GB, and max_bytes is {max_bytes / 1e9:.2g} GB. A "
            f"kernel over all pairs of "
            "positions is kept where the network averages over them: give more memory, fewer positions, or flatten them."
        )
    return max(1, min(TILE, math.isqrt(max(1, max_bytes // each))))
