"""Kernels between two sets of examples, from programs of two: tapes first, then tiles of pairs."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.devices import ONE_THREAD, compiler_options, known_options
from paperjax.kernels.store import Block, Store
from paperjax.layout import grid_bytes, peak_bytes
from paperjax.limits import nodes as nd
from paperjax.limits.buffers import COPIED, aligned, empty, placed
from paperjax.limits.double import in_double
from paperjax.limits.levels import LEVELS, ordinary, refuse_not_finite, settled
from paperjax.limits.pairs import as_double, as_single, called, grid, one_thread_each, pair_step, product, without_product
from paperjax.limits.program import Program
from paperjax.limits.roll import roll, rolled
from paperjax.limits.spread import enough, together
from paperjax.progress import progress_bar

TILE, CACHE = 512, 1 << 24
"""Examples along one side of a tile, and bytes of it, at most: what one layer makes of so many pairs fits a core's cache."""

PAIRS, OWN, NEAR = 256, 2048, 1e-3
"""Pairs of examples, and of one with itself, that are computed one by one in a call, and how far a correlation is from 1, at most."""


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
    into: Callable[[Sequence[jax.ShapeDtypeStruct]], Store] | None = None,
) -> tuple[Any, ...]:
    """The kernels between all examples of `x1` and of `x2` (or of `x1` itself), ``(N, M, ...)``; the trailing axes are those of a pair.

    In double precision, whatever the user's flag; in single precision what is of one example alone is in double, and so are pairs of
    outputs that are almost the same, and all that is drawn. In the arrays of the store that `into` makes of their forms, if there is one.
    """
    up = jax.config.read("jax_enable_x64")
    with nd.usual(True):
        given = [aligned(_in(x)) for x in ((x1,) if x2 is None else (x1, x2))]
        asked = _asked(program, given[0], ntk)
        if any(isinstance(x, Tracer) for x in given):
            traced = functools.partial(_of_traced, program, asked, ntk, leaves, dtype)
            return traced(*given) if up else in_double(traced, *given)
        program, tapes = settled(program, asked, lambda which: [_tapes(which, x, ntk) for x in given])
        return _tiled(program, given, tapes, x2 is None, ntk, leaves, dtype, max_bytes, progress, devices, into)


def _of_traced(program: Program, asked: Sequence[Any], ntk: bool, leaves: bool, dtype: Any, *given: Any) -> tuple[Any, ...]:
    """The kernels as one function of examples that are traced."""

    def tapes_of(which: Program) -> list[Any]:
        return [_tapes(which, x, ntk) for x in given]

    def at(which: Program) -> tuple[Any, ...]:
        a, b = (list(given) * 2)[:2], (tapes_of(which) * 2)[:2]
        return tuple(k.astype(dtype) for k in grid(pair_step(which, asked, ntk, leaves))(*map(as_double, a), *b, None))

    few = ordinary(program, asked, tapes_of)
    return at(program) if few is None else jax.lax.cond(few, lambda: at(program), lambda: at(program.up_to(LEVELS[-1])))


def _in(x: Any) -> Any:
    """Floating-point numbers of a kind that XLA has, as wide as they come: they are widened tile by tile."""
    if isinstance(x, Tracer):
        return x
    x = np.asarray(x)
    return x if x.dtype in (np.float32, np.float64) or x.dtype.kind not in "fV" else x.astype(np.float64)


def _form(tree: Any) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(tree))


def _asked(program: Program, x: Any, ntk: bool) -> tuple[Any, ...]:
    return program.seen(as_double(jax.ShapeDtypeStruct(x.shape[1:], x.dtype)), ntk).asked


def _tapes(program: Program, x: Any, ntk: bool) -> Any:
    asked = _asked(program, x, ntk)
    if isinstance(x, Tracer):
        return jax.vmap(rolled(lambda x: program.tape(as_double(x), asked)))(x)

    def compiled() -> Any:
        one = rolled(lambda x, unit: program.tape(as_double(x), asked, unit))
        size = peak_bytes(one, jax.ShapeDtypeStruct(x.shape[1:], x.dtype), np.float64(1))
        batch = max(1, min(TILE, len(x), CACHE // max(1, size)))
        whole = jax.jit(lambda some, unit: jax.lax.map(lambda x: one(x, unit), some, batch_size=batch)).lower(x, np.float64(1))
        return whole.compile(compiler_options=compiler_options(jax.default_backend(), True))

    return program.kept(("tapes", ntk, *_form(x)), compiled)(x, np.float64(1))


def _tiled(
    program: Program, given: list[Any], tapes: list[Any], symmetric: bool, ntk: bool, leaves: bool, dtype: Any, max_bytes: int,
    progress: bool | None, devices: Sequence[Any], into: Callable[[Sequence[jax.ShapeDtypeStruct]], Store] | None,
) -> tuple[Any, ...]:  # fmt: skip
    rows, columns = given[0], given[-1]
    single = _in_single(program, dtype)
    args = rows, columns, tapes[0], tapes[-1]
    made = _Made(program, args, ntk, leaves, np.dtype(dtype), max_bytes, symmetric, max(1, len(devices)))
    everywhere = [made.on(device) for device in devices] or [made]
    height, width, forms, _ = everywhere[0].tile(single)
    shapes = [jax.ShapeDtypeStruct((len(rows), len(columns), *form.shape), form.dtype) for form in forms]

    def fill(number: int, block: Block, out: Sequence[np.ndarray], own: Callable[[], Any]) -> bool:
        made, (a, b) = everywhere[number % len(everywhere)], block[:2]
        # The last ones reach back, so that all have one shape; what another one has made is left out.
        starts = [min(at, len(x) - side) for at, x, side in zip((a, b), (rows, columns), (height, width))]
        # A thread has JAX's flags of its own.
        with nd.usual(True):
            parts = [np.asarray(part) for part in made.tile(single)[-1](*starts)]
            known = own()
            if known is not None:
                parts = made.repaired(parts, starts, known)
        finite = True
        for k, (whole, part) in enumerate(zip(out, parts)):
            part = part[a - starts[0] :, b - starts[1] :]
            finite = placed(whole, part, (a, b), symmetric, None if known is None else known[0][0][k]) and finite
        return finite

    # The store first: it refuses what a disk does not hold before the tiles of it are listed.
    with contextlib.nullcontext() if into is None else into(shapes) as store:
        tiles = itertools.product(range(0, len(rows), height), range(0, len(columns), width))
        blocks = [Block(a, b, min(height, len(rows) - a), min(width, len(columns) - b)) for a, b in tiles if not symmetric or b >= a]
        workers = _workers(len(blocks), len(devices))
        out = [empty(form.shape, form.dtype) for form in shapes] if store is None else list(store.arrays.values())
        # Those on the diagonal take less: last, they fill up the cores.
        left = sorted(blocks if store is None else store.missing(blocks), key=lambda block: symmetric and block[0] == block[1])

        finite: list[bool] = []

        def work(numbered: tuple[int, Block], own: Callable[[], Any]) -> None:
            good = fill(*numbered, out, own)
            finite.append(good)
            # Else it is computed again, and refused again, by the next call.
            if store is not None and good:
                store.finished(numbered[1])
            bar.advance(1.0)

        def own() -> Any:
            return [made.own(x, tape) for x, tape in zip(given, tapes)] * 2 if single and left else None

        with progress_bar("infinite width", float(len(blocks)), progress) as bar, one_thread_each():
            bar.advance(float(len(blocks) - len(left)))
            together(work, list(enumerate(left)), workers, own)
    if not all(finite):
        refuse_not_finite(out)
    return tuple(out)


def _in_single(program: Program, dtype: Any) -> bool:
    """Whether pairs are computed in single precision: what a jump makes of rounding is its root, of which the next one makes the root."""
    return dtype == np.float32 and program.draws is None and not program.cache.get("jumps", False)


def _workers(tiles: int, devices: int = 0) -> int:
    """Tiles under way at once: one a core and one more, as their threads wait for XLA's; or enough to keep other devices busy."""
    cores = os.cpu_count() or 1
    return min(tiles, max(devices, cores + (cores > 1) if jax.default_backend() == "cpu" else 2 * max(1, devices)))


@dataclasses.dataclass(frozen=True)
class _Made:
    """Compiled programs for two sets of examples, ``args = (x1, x2, tapes1, tapes2)``; each is made where it is first needed, and kept.

    There are at least as many tiles as `devices`; a device of `None` is JAX's own choice.
    """

    program: Program
    args: tuple[Any, ...]
    ntk: bool
    leaves: bool
    dtype: Any
    max_bytes: int
    symmetric: bool
    devices: int
    device: Any = None
    there: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def on(self, device: Any) -> "_Made":
        """The same on a device, where the tapes then are."""
        x1, x2, *tapes = self.args
        return dataclasses.replace(self, args=(x1, x2, *jax.device_put(tapes, device)), device=device, there={})

    @property
    def platform(self) -> str:
        return jax.default_backend() if self.device is None else self.device.platform

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        key = what, self.ntk, self.leaves, self.dtype, self.max_bytes, self.symmetric, self.devices, self.device, *_form(self.args)
        return self.program.kept(key, make)

    def compiled(self, fn: Callable[..., Any], *forms: Any) -> Any:
        options = compiler_options(self.platform, True)
        if self.platform == "cpu":
            options |= known_options(ONE_THREAD if _workers(1 << 30) > 1 else {})
        with jax.default_device(self.device) if self.device is not None else contextlib.nullcontext():
            return jax.jit(fn).lower(*forms).compile(compiler_options=options)

    def traced(self, single: bool) -> tuple[jex.ClosedJaxpr, Any, Any]:
        """``(x1, x2, tape1, tape2, unit) -> kernels`` of a pair, in single or double precision; its arguments' and results' form."""
        cast = as_single if single else as_double
        pair = jax.tree.map(lambda x: cast(jax.ShapeDtypeStruct(x.shape[1:], x.dtype)), self.args)
        pair = *pair, cast(jax.ShapeDtypeStruct((), np.float64))
        step = pair_step(self.program, _asked(self.program, self.args[0], self.ntk), self.ntk, self.leaves)
        with nd.usual(not single):
            traced, forms = jax.make_jaxpr(lambda *pair: tuple(k.astype(self.dtype) for k in step(*pair)), return_shape=True)(*pair)
            return roll(traced), pair, forms

    def tile(self, single: bool) -> tuple[int, int, Any, Any]:
        """Sides of a tile, the form of a pair, and the compiled ``(row, column) -> tile``."""
        height, width, forms, run = self.kept(f"tile {single}", lambda: self._tile(single))
        return height, width, forms, functools.partial(run, self)

    def _tile(self, single: bool) -> tuple[int, int, Any, Any]:
        traced, pair, forms = self.traced(single)
        cast = as_single if single else as_double
        step = called(traced, cast)
        side = enough(_side(traced, pair, self.max_bytes, self.devices), self._tiles, self.devices)
        if self._tiles(side) < 3 * _workers(1 << 30):
            # A few large ones leave cores without work at the end.
            side = min(side, TILE // 2)
        if not single and _in_single(self.program, self.dtype):
            # These are to fit within those of single precision, see `_doubly`.
            side = min(side, *self.tile(True)[:2])
        # Of one size, rather than a small one at the end.
        height, width = (math.ceil(n / math.ceil(n / side)) for n in (len(self.args[0]), len(self.args[1])))

        def rows(tape: Any, start: Any, units: Any) -> Any:
            def of(x: Any) -> Any:
                x = cast(jax.lax.dynamic_slice_in_dim(x, start, len(units)))
                # Or XLA takes and casts them again for each pair; a quotient by numbers that it does not know is computed once.
                return x / cast(units).reshape(-1, *(1,) * (x.ndim - 1)) if jnp.issubdtype(x.dtype, jnp.floating) else x

            return jax.tree.map(of, tape)

        # A product of matrices by itself, where that is how examples meet; else within the tile.
        alone = without_product(traced) if self.platform == "cpu" else None
        meeting = None if alone is None else alone.jaxpr.invars[0].aval.dtype

        def tile(met: Any, tape1: Any, tape2: Any, row: Any, column: Any, unit: Any, units: Any) -> Any:
            tape1, tape2 = rows(tape1, row, units[:height]), rows(tape2, column, units[:width])
            if alone is not None:
                each = jax.vmap(called(alone, cast), (0, None, 0, None))
                return jax.vmap(each, (0, 0, None, None))(met, tape1, tape2, unit)
            if height == width == 1:
                return jax.tree.map(lambda k: k[None, None], step(*jax.tree.map(lambda x: x[0], (*met, tape1, tape2)), unit))
            return grid(step)(*met, tape1, tape2, unit)

        run = self.compiled(tile, *self.part(height, width, 0, 0, meeting))
        return height, width, forms, lambda made, row, column: run(*made.part(height, width, row, column, meeting))

    def _tiles(self, side: int) -> int:
        n, m = (math.ceil(len(x) / side) for x in self.args[:2])
        return n * (n + 1) // 2 if self.symmetric else n * m

    def part(self, height: int, width: int, row: int, column: int, meeting: Any) -> tuple[Any, ...]:
        """The arguments of a tile: two sets of examples or, where their product has a dtype, that of all pairs."""
        x1, x2, tape1, tape2 = self.args

        def rows(x: np.ndarray, start: int, n: int) -> Any:
            # Rows of what may be large are taken here, which is no copy.
            some = x[start : start + n]
            return some if meeting is not None or x.nbytes > COPIED else self.brought((id(x), start, n), lambda: some)

        met = rows(x1, row, height), rows(x2, column, width)
        starts = (self.brought(n, lambda n=n: np.int32(n)) for n in (row, column))
        units = (self.brought(shape, lambda shape=shape: np.ones(shape)) for shape in ((), (max(height, width),)))
        return met if meeting is None else product(*met, meeting), tape1, tape2, *starts, *units

    def brought(self, key: Any, make: Callable[[], Any]) -> Any:
        """What many tiles take, where they are computed: to bring all of it there for each is a tenth of the time of a small one."""
        if key not in self.there:
            self.there[key] = jax.device_put(make(), self.device)
        return self.there[key]

    def some_pairs(self, what: str, most: int) -> tuple[int, Any]:
        """How many pairs are computed together, at most, and the compiled ``(x1, x2, tapes1, tapes2, unit) -> kernels``."""

        def compiled() -> Any:
            traced, pair, _ = self.traced(False)
            step = called(traced, as_double)
            n = max(1, min(most, CACHE // max(1, peak_bytes(step, *pair))))
            n = math.ceil(most / math.ceil(most / n))
            forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), self.args)
            return n, self.compiled(jax.vmap(step, (0, 0, 0, 0, None)), *forms, np.float64(1))

        return self.kept(what, compiled)

    def pairs(self, i: np.ndarray, j: np.ndarray) -> list[np.ndarray]:
        """Kernels of examples i of the first set and j of the second, in double precision inside."""
        (n, run), found = self.some_pairs("pairs", min(PAIRS, len(i))), []
        # Rows are taken by NumPy, as XLA on CPU takes them entry by entry.
        sides = [jax.tree.map(np.asarray, side) for side in self.args]
        for start in range(0, len(i), n):
            index = [np.resize(k[start : start + n], n) for k in (i, j)]
            some = [jax.tree.map(lambda x, k=k: x[k], side) for side, k in zip(sides, index * 2)]
            found.append([np.asarray(k)[: len(i) - start] for k in run(*some, np.float64(1))])
        return [np.concatenate(parts) for parts in zip(*found)]

    def own(self, x: Any, tape: Any) -> tuple[list[np.ndarray], np.ndarray]:
        """Kernels of examples with themselves, and the roots of their covariances, ``(N, *positions)``."""
        twice, shape = dataclasses.replace(self, args=(x, x, tape, tape)), self.program.shape
        n, run = twice.some_pairs("own", min(OWN, len(x)))
        x, tape = jax.tree.map(np.asarray, (x, tape))

        def some(start: int) -> list[np.ndarray]:
            # The last ones reach back, so that all are as many.
            begin = min(start, len(x) - n)
            rows, tapes = jax.tree.map(lambda a: a[begin : begin + n], (x, tape))
            return [np.asarray(k)[start - begin :] for k in run(rows, rows, tapes, tapes, np.float64(1))]

        found = [np.concatenate(parts) for parts in zip(*map(some, range(0, len(x), n)))]
        size = math.prod(shape)
        return found, np.sqrt(np.diagonal(found[0].reshape(len(x), size, size), axis1=1, axis2=2).reshape(len(x), *shape))

    def repaired(self, parts: list[np.ndarray], starts: Sequence[int], own: Any) -> list[np.ndarray]:
        """A tile of single precision, in which examples whose outputs are almost the same are computed in double.

        A correlation of ``1 - e`` that is off by rounding makes an angle that is off by ``rounding / sqrt(2 e)``.
        """
        nngp, height, width = parts[0], *parts[0].shape[:2]
        a, b = (root[start : start + n] for (_, root), start, n in zip(own, starts, (height, width)))
        k = len(self.program.shape)
        diagonal = own[0] is own[1] and starts[0] == starts[1]
        low, largest = (1 - 1.01 * NEAR) * a.reshape(height, -1).min(1), nngp.reshape(height, -1).max(1)
        # Most tiles need no look at each pair in double precision, and many none at each pair. NaN is less than nothing.
        if not diagonal and (largest < low * b.min()).all():
            return parts
        # A root of 0 makes this NaN or infinite.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            shares = nngp * (1 / b).astype(nngp.dtype).reshape(1, width, *(1,) * k, *b.shape[1:])
        if diagonal:
            # Known already, see `own`.
            shares[(np.arange(height),) * 2] = -np.inf
        if (shares.reshape(height, -1).max(1) < low).all():
            return parts
        bound = ((1 - NEAR) * a).reshape(height, 1, *a.shape[1:], *(1,) * k) * b.reshape(1, width, *(1,) * k, *b.shape[1:])
        near = nngp > bound
        near = near.reshape(height, width, -1).any(-1) if k else near
        if diagonal:
            near[(np.arange(height),) * 2] = False
        if not near.any():
            return parts
        i, j = np.nonzero(near)
        if len(i) > near.size // 8 and near.size > PAIRS:
            return self._doubly(parts, starts)
        parts = [part.copy() for part in parts]
        for part, found in zip(parts, self.pairs(starts[0] + i, starts[1] + j)):
            part[i, j] = found
        return parts

    def _doubly(self, parts: list[np.ndarray], starts: Sequence[int]) -> list[np.ndarray]:
        height, width, _, run = self.tile(False)
        (n, m), whole = parts[0].shape[:2], [np.empty_like(part) for part in parts]
        for r, c in itertools.product(range(0, n, height), range(0, m, width)):
            r, c = min(r, n - height), min(c, m - width)
            for there, tile in zip(whole, run(starts[0] + r, starts[1] + c)):
                there[r : r + height, c : c + width] = tile
        return whole


def _side(step: jex.ClosedJaxpr, pair: tuple[Any, ...], whole: int, devices: int) -> int:
    """Examples along a side of a tile that keep to a budget, which devices share, and to a cache."""
    max_bytes = whole // devices
    sides = [frozenset(of) for of, tree in zip(((0,), (1,), (0,), (1,), ()), pair) for _ in jax.tree.leaves(tree)]
    one, two, four = (grid_bytes(step.jaxpr, sides, n) for n in (1, 2, 4))
    if one > max_bytes:
        raise ValueError(
            f"pj.limit: one pair of examples takes {one / 1e9:.2g} GB, and max_bytes is {whole / 1e9:.2g} GB"
            f"{f', for {devices} devices that work at once' if devices > 1 else ''}: give more memory. A network that averages over "
            "positions needs all pairs of them: give fewer positions, or flatten them."
        )
    # What grows as the square of the side is of pairs, the rest of examples.
    each = max((four - 2 * two) // 8, 8)
    return max(1, min(TILE, math.isqrt(max(1, min(max_bytes // _workers(1 << 30), CACHE) // each))))
