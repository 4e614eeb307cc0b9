"""Repeated layers of an unrolled program as one scan."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from paperjax.limits.runs import CARRIED, COLUMN, INSIDE, SHARED, Run, row_step, segments
from paperjax.limits.unrolled import GATHERS, Plan, plan_runs

P = ParamSpec("P")
T = TypeVar("T")


def rolled(fn: Callable[P, T], fewest: int = 3, saved: int = 16) -> Callable[P, T]:
    """The same function, in which layers that repeat run in one `jax.lax.scan`.

    A Python loop over L layers traces to L copies of a layer, whose compilation takes L times as long or worse. Where the copies are
    the same equations, wired alike, they become a scan: what a layer reads from the one before is carried; what all read is a constant;
    what differs from layer to layer is stacked; and of the results those that are read later are kept.

    Parameters
    ----------
    fn
        Of pytrees of arrays, as for `jax.jit`.
    fewest
        Layers that make a scan, at least 3.
    saved
        Equations saved that make a scan worth it, at least 1. A polynomial in Horner's form repeats itself too.

    Returns
    -------
    Callable
        Equal to `fn` up to rounding, as XLA fuses otherwise; weak types may become strong. It may be differentiated, mapped and
        compiled: compile it, as outside `jax.jit` the equations between scans run one by one.

    Raises
    ------
    ValueError
        If `fewest` is below 3 or `saved` below 1.

    Examples
    --------
    >>> def network(x):
    ...     for _ in range(100):
    ...         x = jnp.tanh(2 * x) + x
    ...     return x
    >>> len(jax.make_jaxpr(network)(1.0).eqns), len(jax.make_jaxpr(rolled(network))(1.0).eqns)
    (300, 2)
    >>> bool(jnp.allclose(rolled(network)(1.0), network(1.0)))
    True
    """
    _check(fewest, saved)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves((args, kwargs))]
        results = _evaluate(_plan(jaxpr, fewest, saved), jaxpr, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def roll(jaxpr: jex.ClosedJaxpr, fewest: int = 3, saved: int = 16) -> jex.ClosedJaxpr:
    """The same program, in which layers that repeat run in one `jax.lax.scan`; see `rolled`.

    A run is a sequence of at least `fewest` consecutive blocks of equations with the same primitives, parameters and types, the same
    wiring inside, and inputs that are (a) the same output of the block before, (b) the same for all blocks or (c) of the same type.
    Beforehand equations without use are dropped, and rows of an array go to where the array is made. A run takes the place of
    ``(r - 1) n`` equations, n per block and r blocks; the longest savings go first. Blocks within `jax.jit` are found as well, those
    within the bodies of loops and of custom derivatives are not. Equations with effects stay where they are. The search takes
    ``O(n log² n)`` for n equations.

    Parameters
    ----------
    jaxpr
        As of `jax.make_jaxpr`.
    fewest, saved
        As for `rolled`.

    Returns
    -------
    jax.extend.core.ClosedJaxpr
        `jaxpr` itself if nothing repeats.

    Raises
    ------
    ValueError
        If `fewest` is below 3 or `saved` below 1.

    Examples
    --------
    >>> def network(w, x):
    ...     for layer in range(9):
    ...         x = jnp.sin(w[layer] * x) + x
    ...     return x
    >>> jaxpr = roll(jax.make_jaxpr(network)(jnp.ones(9), jnp.ones(3)))
    >>> [eqn.primitive.name for eqn in jaxpr.eqns]
    ['scan']
    """
    _check(fewest, saved)
    plan = _plan(jaxpr, fewest, saved)
    if not plan.runs and not plan.inner:
        return jaxpr
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=getattr(v, "weak_type", False)) for v in jaxpr.in_avals]
    return jax.make_jaxpr(lambda *args: _evaluate(plan, jaxpr, args))(*shapes)


def _plan(jaxpr: jex.ClosedJaxpr, fewest: int, saved: int) -> Plan:
    return plan_runs(jaxpr, fewest, saved, lambda inner: roll(inner, fewest, saved))


def _check(fewest: int, saved: int) -> None:
    if fewest < 3 or saved < 1:
        raise ValueError(f"roll: fewest = {fewest} and saved = {saved}, but a run has at least 3 blocks and saves at least 1 equation.")


class _Step(NamedTuple):
    """Equations one by one, one that gathers rows, or a run with the outputs that are kept of its last block and of all."""

    part: range | Run
    rows: tuple[int, int, int] | None = None
    last: tuple[int, ...] = ()
    all: tuple[int, ...] = ()
    alone: tuple[int, ...] = ()


def _steps(plan: Plan) -> list[_Step]:
    """What is to be done, from the results back: rows of an array that are taken together need not be taken apart."""
    wiring, n = plan.wiring, len(plan.eqns)
    needed = np.zeros(len(plan.made), bool)
    whole: set[int] = set()

    def need(values: np.ndarray) -> None:
        needed[values[values >= 0]] = True

    def need_rows(family: int) -> None:
        if family % 2:
            whole.add(family // 2)
        else:
            need(np.array([place[plan.families[family // 2].array]]))

    place = {v: i for i, v in enumerate(plan.made)} | {v: -1 - i for i, v in enumerate(plan.outer) if not isinstance(v, jex.Literal)}
    need(wiring.results)
    steps: list[_Step] = []
    for part in reversed(segments(n, plan.runs)):
        if isinstance(part, Run):
            low, high = wiring.first_made[part.start], wiring.first_made[part.stop]
            width = int(high - low) // part.repeats
            wanted = needed[low:high].reshape(part.repeats, width)
            stacked = {f - low for f in whole if low <= f < low + width} | set(np.flatnonzero(wanted[:-1].any(axis=0)))
            last = tuple(int(o) for o in np.flatnonzero(wanted[-1]) if o not in stacked)
            alone = tuple(int(low + i) for i in np.flatnonzero(needed[low:high]) if i % width in stacked)
            if not last and not stacked:
                continue
            steps.append(_Step(part, None, last, tuple(sorted(int(o) for o in stacked)), alone))
            need(part.reads[0][part.kinds == CARRIED])
            need(part.reads[0][part.kinds == SHARED])
            for column in part.reads.T[part.kinds == COLUMN]:
                rows = row_step(column, wiring)
                need(column) if rows is None else need_rows(rows[0])
            continue
        for i in reversed(part):
            made = slice(wiring.first_made[i], wiring.first_made[i + 1])
            if not (plan.eqns[i].effects or needed[made].any()):
                continue
            reads = wiring.reads[wiring.first_read[i] : wiring.first_read[i + 1]]
            rows = row_step(reads, wiring) if plan.eqns[i].primitive.name in GATHERS and len(reads) > 1 else None
            steps.append(_Step(range(i, i + 1), rows))
            need(reads) if rows is None else need_rows(rows[0])
    return steps[::-1]


def _evaluate(plan: Plan, closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    wiring, jaxpr = plan.wiring, closed.jaxpr
    given = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args)))
    number = {v: i for i, v in enumerate(plan.made)}
    values: dict[int, Any] = {-1 - i: v.val if isinstance(v, jex.Literal) else given[v] for i, v in enumerate(plan.outer)}
    stacks: dict[int, Any] = {}
    last_read = np.full(len(plan.made), -1)
    reader = np.repeat(np.arange(len(plan.eqns)), np.diff(wiring.first_read))
    np.maximum.at(last_read, wiring.reads[wiring.reads >= 0], reader[wiring.reads >= 0])
    last_read[wiring.results[wiring.results >= 0]] = len(plan.eqns)
    # Rows are taken where they are needed, not where the program takes them.
    last_read[[number[row.array] for row in plan.families if row.array in number]] = len(plan.eqns)

    def rows(family: int, first: int, step: int, count: int) -> Any:
        low, high = sorted((first, first + step * (count - 1)))
        if family % 2:
            array = stacks[family // 2]
            if (low, high + 1, abs(step)) != (0, array.shape[0], 1):
                array = jax.lax.slice_in_dim(array, low, high + 1, abs(step))
        else:
            row = plan.families[family // 2]
            array = values[number[row.array]] if row.array in number else given[row.array]
            bounds = [(*bound, 1) if bound is not None else (low, high + 1, abs(step)) for bound in row.others]
            if bounds != [(0, n, 1) for n in array.shape]:
                array = jax.lax.slice(array, *zip(*bounds))
            array = jnp.moveaxis(array, row.axis, 0)
            if row.squeezed != (row.axis,):
                array = jax.lax.squeeze(jnp.expand_dims(array, row.axis + 1), [axis + 1 for axis in row.squeezed])
        return array if step > 0 else jnp.flip(array, 0)

    def column(ids: np.ndarray) -> Any:
        found = row_step(ids, wiring)
        if found is not None:
            return rows(*found, len(ids))
        return _stack([values[int(i)] for i in ids], plan, ids)

    waiting: list[int] = []

    def flush() -> None:
        if waiting:
            eqns = [plan.eqns[i] for i in waiting]
            ours = {v for eqn in eqns for v in eqn.outvars}
            read = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal) and v not in ours))
            kept = [v for eqn in eqns for v in eqn.outvars if last_read[number[v]] > waiting[-1]]
            operands = [values[number[v]] if v in number else given[v] for v in read]
            values.update(zip((number[v] for v in kept), _bind(jaxpr, eqns, read, kept, operands)))
            waiting.clear()

    for step in _steps(plan):
        if isinstance(step.part, range) and step.rows is None:
            waiting.append(step.part.start)
            continue
        flush()
        if step.rows is not None:
            eqn = plan.eqns[step.part.start]
            family, first, apart = step.rows
            array = rows(family, first, apart, len(eqn.invars))
            values[number[eqn.outvars[0]]] = _gathered(eqn, array)
            continue
        assert isinstance(step.part, Run)
        low = int(wiring.first_made[step.part.start])
        last, ys = _scan(plan, jaxpr, step, values, column)
        width = int(wiring.first_made[step.part.start + step.part.period]) - low
        values.update((low + width * (step.part.repeats - 1) + o, v) for o, v in last.items())
        stacks.update((low + o, v) for o, v in ys.items())
        for i in step.alone:
            block, o = divmod(i - low, width)
            values[i] = jax.lax.index_in_dim(ys[o], block, keepdims=False)
    flush()
    return [values[int(i)] for i in wiring.results]


def _bind(around: jex.Jaxpr, eqns: list[Any], read: list[Any], kept: list[Any], operands: list[Any]) -> list[Any]:
    # How a primitive is bound is nobody else's to know.
    part = around.replace(constvars=[], invars=read, outvars=kept, eqns=eqns)
    return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))(*operands))


def _strong(value: Any, aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return value
    return jax.lax.convert_element_type(value, aval.dtype)


def _varying(body: Callable[..., Any], start: list[Any], xs: list[Any], constants: list[Any]) -> list[Any]:
    """What starts a scan, differing from device to device in `jax.shard_map` if what it becomes does."""

    def axes(kind: Any) -> frozenset[str]:
        # JAX 0.10 and the versions before it.
        manual = getattr(kind, "manual_axis_type", None)
        return frozenset(getattr(kind, "vma", None) or () if manual is None else manual.varying)

    missing = [frozenset(())]
    while any(axes(jax.typeof(v)) for v in (*start, *xs, *constants)) and missing:
        after, _ = jax.eval_shape(body, start, [x[0] for x in xs])
        missing = [axes(new) - axes(jax.typeof(old)) for new, old in zip(after, start)]
        start = [jax.lax.pcast(v, tuple(sorted(m)), to="varying") if m else v for v, m in zip(start, missing)]
        missing = [m for m in missing if m]
    return start


def _stack(entries: list[Any], plan: Plan, ids: np.ndarray) -> Any:
    avals = [(plan.made[i] if i >= 0 else plan.outer[-1 - i]).aval for i in ids]
    if all(i < 0 and plan.wiring.free[-1 - i] for i in ids):
        return np.stack([np.asarray(entry, aval.dtype) for entry, aval in zip(entries, avals)])
    return jnp.stack([_strong(entry, aval) for entry, aval in zip(entries, avals)])


def _gathered(eqn: Any, rows: Any) -> Any:
    if eqn.primitive.name == "stack":
        return jnp.moveaxis(rows, 0, eqn.params["axis"])
    axis = eqn.params["dimension"]
    return jnp.moveaxis(rows, 0, axis).reshape(eqn.outvars[0].aval.shape)


def _scan(
    plan: Plan, around: jex.Jaxpr, step: _Step, values: dict[int, Any], column: Callable[[np.ndarray], Any]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """A run: the outputs kept of its last block, and of all blocks, by their place in the block."""
    run = step.part
    assert isinstance(run, Run)
    bases = plan.wiring.first_made[run.start + run.period * np.arange(3)]
    # The second block stands for all.
    block = plan.eqns[run.start + run.period : run.start + 2 * run.period]
    made: list[Any] = [v if not isinstance(v, jex.DropVar) else jex.Var(v.aval) for v in plan.made[bases[1] : bases[2]]]

    shared: dict[int, Any] = {}
    stacked: dict[bytes, Any] = {}
    carried: dict[tuple[int, int], Any] = {}
    operands: list[Any] = []
    xs = []
    for k, atom in enumerate(v for eqn in block for v in eqn.invars):
        kind, now, before = run.kinds[k], int(run.reads[1, k]), int(run.reads[0, k])
        if kind == INSIDE or (kind == SHARED and isinstance(atom, jex.Literal)):
            operands.append(atom)
        elif kind == SHARED:
            operands.append(shared.setdefault(now, jex.Var(atom.aval)))
        elif kind == CARRIED:
            operands.append(carried.setdefault((now - int(bases[0]), before), jex.Var(atom.aval)))
        else:
            ids = run.reads[:, k]
            if ids.tobytes() not in stacked:
                xs.append(column(ids))
            operands.append(stacked.setdefault(ids.tobytes(), jex.Var(atom.aval)))
    at = iter(operands)
    outs = iter(made)
    eqns = [eqn.replace(invars=[next(at) for _ in eqn.invars], outvars=[next(outs) for _ in eqn.outvars]) for eqn in block]

    in_carry = {o for o, _ in carried}
    every = [*step.all, *(o for o in step.last if o not in in_carry and jnp.issubdtype(made[o].aval.dtype, jax.dtypes.extended))]
    only = [o for o in step.last if o not in in_carry and o not in every]
    handed = [*(o for o, _ in carried), *only]
    read, kept = [*shared.values(), *carried.values(), *stacked.values()], [made[o] for o in [*handed, *every]]
    constants = [values[i] for i in shared]

    def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        out = _bind(around, eqns, read, kept, [*constants, *carry[: len(carried)], *rows])
        return [_strong(v, made[o].aval) for v, o in zip(out, handed)], out[len(handed) :]

    start = [_strong(values[i], made[o].aval) for o, i in carried]
    start += [jnp.zeros(made[o].aval.shape, made[o].aval.dtype) for o in only]
    start = _varying(body, start, xs, constants)
    end, ys = jax.lax.scan(body, start, xs, length=run.repeats)
    by_place = dict(zip(every, ys))
    last = dict(zip(handed, end))
    return {o: last[o] if o in last else by_place[o][-1] for o in step.last}, by_place
