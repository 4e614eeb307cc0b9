"""Scans over depth at infinite width: one compiled recursion of the second moments of what is carried.

A step multiplies what it is given by leaves of its own, which are independent of those of all others, so the second moments of the carry
after it are a function of those before; nothing else of the steps before matters if the carry is Gaussian, or is only multiplied by leaves.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paperjax.limits.nodes import Carried, Det, Wide

Asked = tuple[int, int, bool]
"""Second moments of two carries, by number, of a position with itself only or of all pairs; with ``MEAN`` for the second, the mean."""

MEAN = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan: what is carried, what it starts and what a step leaves; `rows` are deterministic inputs of a step with all of their rows."""

    carried: tuple[Carried, ...]
    starts: tuple[Wide, ...]
    ends: tuple[Wide, ...]
    length: int
    rows: tuple[tuple[Det, Det], ...] = ()


class Needs(NamedTuple):
    """What must be carried between two examples and for one, and what two ask of each in a step."""

    cross: tuple[Asked, ...]
    alone: tuple[Asked, ...]
    asked: tuple[Any, ...]


@runtime_checkable
class Runs(Protocol):
    """What is needed of `paperjax.limits.moments.Run`."""

    xs: tuple[Any, ...]
    cache: dict[Any, Any]
    shift: Any
    tapes: tuple[Any, ...]
    asked: dict[Any, None]

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> Array | None:
        """See there."""
        ...

    def mean(self, u: Wide, s: int) -> Array | None:
        """See there."""
        ...

    def det(self, node: Det, s: int) -> Array:
        """See there."""
        ...

    def read(self, key: Any, s: int) -> Any:
        """See there."""
        ...

    def inner(self, which: Sequence[int], tapes: tuple[Any, ...], state: Callable[..., Any], rows: Mapping[Det, Array]) -> "Runs":
        """See there."""
        ...


def _shape(loop: Loop, asked: Asked) -> tuple[int, ...]:
    i, j, diag = asked
    return loop.carried[i].shape if diag else loop.carried[i].shape + loop.carried[j].shape


def _array(found: Array | None, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape) if found is None else jnp.broadcast_to(found, shape)


def _moment(run: Runs, nodes: Sequence[Wide], asked: Asked, s: int, t: int) -> Array | None:
    i, j, diag = asked
    return run.mean(nodes[i], s) if j == MEAN else run.second(nodes[i], nodes[j], s, t, diag)


def needs(run: Runs, loop: Loop, first: Asked, cross: bool) -> Needs:
    """The least that is closed under steps; nothing is computed."""
    key = ("needs", loop, first, cross, run.shift is None)
    if key not in run.cache:
        run.cache[key] = _needs(run, loop, first, cross)
    return run.cache[key]


def _needs(run: Runs, loop: Loop, first: Asked, cross: bool) -> Needs:
    both: dict[Asked, None] = {first: None} if cross else {}
    alone: dict[Asked, None] = {} if cross else {first: None}
    tapes: dict[Any, None] = {}

    def dry(into: dict[Asked, None], which: Sequence[int], records: Callable[[Runs], Any], tapes_of: tuple[Any, ...] = ()) -> Runs:
        def state(i: int, j: int, diag: bool, same: bool) -> Array:
            into.setdefault((i, j, diag))
            return jnp.zeros(_shape(loop, (i, j, diag)))

        rows = {row: jnp.zeros(row.shape) for row, _ in loop.rows}
        made = run.inner(which, tapes_of, state, rows)

        def call() -> None:
            records(made)

        jax.eval_shape(call)
        return made

    def alone_again(records: Callable[[Runs], Any]) -> None:
        dry(alone, (0,), records)

    class Tape:
        def __getitem__(self, key: Any) -> Any:
            tapes.setdefault(key)
            found: list[Any] = []
            alone_again(lambda r: found.append(r.read(key, 0)))
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), found[0])

    seen = 0
    while seen < len(both):
        dry(both, (0, len(run.xs) - 1), lambda r, a=list(both)[seen]: _moment(r, loop.ends, a, 0, 1), (Tape(), Tape()))
        seen += 1
    seen = 0
    while seen < len(alone):
        alone_again(lambda r, a=list(alone)[seen]: _moment(r, loop.ends, a, 0, 0))
        seen += 1
    return Needs(tuple(both), tuple(alone), tuple(tapes))


def _state(values: Mapping[Asked, Array]) -> Callable[..., Array]:
    return lambda i, j, diag, same: values[i, j, diag]


def first_step(run: Runs, inside: Sequence[Loop]) -> Runs:
    """A run of one example within the first step of scans, from the outermost."""
    for loop in inside:
        outer = run

        def state(i: int, j: int, diag: bool, same: bool, loop: Loop = loop, outer: Runs = outer) -> Array:
            return _array(_moment(outer, loop.starts, (i, j, diag), 0, 0), _shape(loop, (i, j, diag)))

        run = outer.inner((0,), (), state, {row: outer.det(whole, 0)[0] for row, whole in loop.rows})
    return run


def after(run: Runs, loop: Loop, asked: Asked, s: int) -> Array:
    """Second moments of one example after all steps."""
    return _alone(run, loop, needs(run, loop, asked, False), s)[0][asked]


def tape(run: Runs, loop: Loop, asked: Asked, s: int) -> tuple[Any, ...]:
    """What two examples ask of one in every step, stacked."""
    return _alone(run, loop, needs(run, loop, asked, True), s)[1]


def _alone(run: Runs, loop: Loop, need: Needs, s: int) -> tuple[dict[Asked, Array], tuple[Any, ...]]:
    start = {a: _array(_moment(run, loop.starts, a, s, s), _shape(loop, a)) for a in need.alone}

    def step(values: dict[Asked, Array], rows: Sequence[Array]) -> Any:
        inner = run.inner((s,), (), _state(values), dict(zip((row for row, _ in loop.rows), rows)))
        found = {a: _array(_moment(inner, loop.ends, a, 0, 0), _shape(loop, a)) for a in need.alone}
        return found, tuple(inner.read(key, 0) for key in need.asked)

    return jax.lax.scan(step, start, [run.det(whole, s) for _, whole in loop.rows], length=loop.length)


def between(run: Runs, loop: Loop, asked: Asked, s: int, t: int, tapes: tuple[Any, Any]) -> Array:
    """Second moments of two examples after all steps."""
    need = needs(run, loop, asked, True)
    start = {a: _array(_moment(run, loop.starts, a, s, t), _shape(loop, a)) for a in need.cross}

    def step(values: dict[Asked, Array], given: Any) -> Any:
        left, right, rows = given
        held = tuple(dict(zip(need.asked, side)) for side in (left, right))
        inner = run.inner((s, t), held, _state(values), dict(zip((row for row, _ in loop.rows), rows)))
        return {a: _array(_moment(inner, loop.ends, a, 0, 1), _shape(loop, a)) for a in need.cross}, None

    # Deterministic inputs of a step are the tapes' business, but for numbers that are the same for all examples.
    rows = [run.det(whole, s) for _, whole in loop.rows]
    return jax.lax.scan(step, start, (*tapes, rows), length=loop.length)[0][asked]
