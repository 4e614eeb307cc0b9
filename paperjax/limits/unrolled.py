"""Where the layers are in an unrolled program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from paperjax.limits.runs import Run, Wiring, find_runs
from paperjax.limits.structure import Numbers

GATHERS = ("stack", "concatenate")
"""Primitives that put their operands into one array."""


class Row(NamedTuple):
    """An entry along one axis of an array: `others` are the bounds along all axes, None along this one; then axes are squeezed."""

    array: Any
    axis: int
    others: tuple[tuple[int, int] | None, ...]
    squeezed: tuple[int, ...]


class Plan(NamedTuple):
    """The equations in order, their wiring, the runs; the variables made and from outside, by number; and the arrays that rows are of.

    `inner` says that a function compiled inside has runs of its own.
    """

    eqns: list[Any]
    wiring: Wiring
    runs: list[Run]
    made: list[Any]
    outer: list[Any]
    families: list[Row]
    inner: bool


def plan_runs(closed: jex.ClosedJaxpr, fewest: int, saved: int, roll: Callable[[jex.ClosedJaxpr], jex.ClosedJaxpr]) -> Plan:
    """The runs of a program, and `roll` done on the functions compiled inside it."""
    jaxpr = closed.jaxpr
    numbers = Numbers()
    eqns = _useful(jaxpr)
    codes = {id(eqn): numbers.equation(eqn) for eqn in eqns}
    eqns = _rows_first(jaxpr, eqns)
    plan = _with_runs(jaxpr, eqns, codes, numbers, fewest, saved)
    left = len(eqns) - sum((run.repeats - 1) * run.period for run in plan.runs)
    if left > max(len(eqns) // 2, saved) and not any(eqn.effects for eqn in eqns):
        # Layers may be there, but interleaved with something else.
        other = _with_runs(jaxpr, _rows_first(jaxpr, _by_need(jaxpr, eqns)), codes, numbers, fewest, saved)
        if sum((run.repeats - 1) * run.period for run in other.runs) > len(eqns) - left:
            plan = other

    inner: dict[int, Any] = {}
    for eqn in plan.eqns:
        if eqn.primitive.name in ("jit", "pjit") and codes[id(eqn)] not in inner:
            was = eqn.params["jaxpr"]
            now = roll(was) if len(was.eqns) > saved else was
            inner[codes[id(eqn)]] = None if now is was else now
    if not any(inner.values()):
        return plan

    def within(eqn: Any) -> Any:
        now = inner.get(codes[id(eqn)])
        return eqn if now is None else eqn.replace(params={**eqn.params, "jaxpr": now})

    return plan._replace(eqns=[within(eqn) for eqn in plan.eqns], inner=True)


def _useful(jaxpr: jex.Jaxpr) -> list[Any]:
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            kept.append(eqn)
    return kept[::-1]


def _rows(eqns: Sequence[Any]) -> dict[Any, tuple[Row, int]]:
    """The variables that are rows of arrays, and which rows. The axis is the one along which the most different ones are taken."""
    slices = []
    for eqn in eqns:
        if eqn.primitive.name == "slice" and not isinstance(eqn.invars[0], jex.Literal) and set(eqn.params["strides"] or ()) <= {1}:
            slices.append((eqn.invars[0], tuple(zip(eqn.params["start_indices"], eqn.params["limit_indices"])), eqn.outvars[0]))
    different: dict[tuple[Any, int], set[int]] = {}
    for array, bounds, _ in slices:
        for axis, (low, high) in enumerate(bounds):
            if high - low == 1:
                different.setdefault((array, axis), set()).add(low)
    rows: dict[Any, tuple[Row, int]] = {}
    for array, bounds, out in slices:
        axes = [axis for axis, (low, high) in enumerate(bounds) if high - low == 1]
        if axes:
            axis = max(axes, key=lambda axis: len(different[array, axis]))
            rows[out] = Row(array, axis, (*bounds[:axis], None, *bounds[axis + 1 :]), ()), bounds[axis][0]
    for eqn in eqns:
        if eqn.primitive.name == "squeeze" and not isinstance(eqn.invars[0], jex.Literal) and eqn.invars[0] in rows:
            row, index = rows[eqn.invars[0]]
            if not row.squeezed:
                rows[eqn.outvars[0]] = row._replace(squeezed=tuple(eqn.params["dimensions"])), index
    return rows


_MANY = 3
"""Rows of one array that look like one per layer."""


def _rows_first(jaxpr: jex.Jaxpr, eqns: list[Any]) -> list[Any]:
    """Rows of an array just behind the array: their indices differ from layer to layer."""
    rows = _rows(eqns)
    count: dict[Any, int] = {}
    for row, _ in rows.values():
        count[row.array] = count.get(row.array, 0) + (not row.squeezed)
    behind: dict[Any, list[Any]] = {}
    others = []
    for eqn in eqns:
        row = rows.get(eqn.outvars[0]) if eqn.outvars else None
        if row is not None and count[row[0].array] >= _MANY:
            behind.setdefault(eqn.invars[0], []).append(eqn)
        else:
            others.append(eqn)
    order: list[Any] = []

    def place(variables: Sequence[Any]) -> None:
        waiting = [eqn for v in variables for eqn in behind.get(v, ())][::-1]
        while waiting:
            eqn = waiting.pop()
            order.append(eqn)
            waiting += behind.get(eqn.outvars[0], [])[::-1]

    place([*jaxpr.constvars, *jaxpr.invars])
    for eqn in others:
        order.append(eqn)
        place(eqn.outvars)
    return order


def _by_need(jaxpr: jex.Jaxpr, eqns: Sequence[Any]) -> list[Any]:
    """Each equation as late as the first result that needs it allows: depth first from the results."""
    maker = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    done = [False] * len(eqns)
    order = []
    for result in jaxpr.outvars:
        waiting = [] if isinstance(result, jex.Literal) or result not in maker else [(maker[result], False)]
        while waiting:
            i, ready = waiting.pop()
            if done[i]:
                continue
            if ready:
                done[i] = True
                order.append(eqns[i])
                continue
            waiting.append((i, True))
            waiting += [(maker[v], False) for v in reversed(eqns[i].invars) if not isinstance(v, jex.Literal) and v in maker]
    return order


def _with_runs(
    jaxpr: jex.Jaxpr, eqns: list[Any], codes: dict[int, int], numbers: Numbers, fewest: int, saved: int
) -> Plan:  # fmt: skip
    place: dict[Any, int] = {}
    outer: list[Any] = []
    literals: dict[int, int] = {}

    def number(atom: Any) -> int:
        if isinstance(atom, jex.Literal):
            known, key = literals, numbers.literal(atom)
        else:
            known, key = place, atom
        if key not in known:
            outer.append(atom)
            known[key] = -len(outer)
        return known[key]

    for var in (*jaxpr.constvars, *jaxpr.invars):
        number(var)
    made: list[Any] = []
    reads, first_read, first_made = [], [0], [0]
    for eqn in eqns:
        reads += [number(v) for v in eqn.invars]
        for var in eqn.outvars:
            place[var] = len(made)
            made.append(var)
        first_read.append(len(reads))
        first_made.append(len(made))
    results = [number(v) for v in jaxpr.outvars]

    family, index = np.full(len(made), -1), np.full(len(made), -1)
    families: dict[Row, int] = {}
    for var, (row, at) in _rows(eqns).items():
        family[place[var]], index[place[var]] = 2 * families.setdefault(row, len(families)), at
    wiring = Wiring(
        codes=np.array([codes[id(eqn)] for eqn in eqns], np.int64),
        reads=np.array(reads, np.int64),
        first_read=np.array(first_read, np.int64),
        first_made=np.array(first_made, np.int64),
        results=np.array(results, np.int64),
        free=np.array([isinstance(v, jex.Literal) for v in outer], bool),
        family=family,
        place=index,
    )
    runs = find_runs(wiring, fewest, saved, lambda i: eqns[i].primitive.name in GATHERS)
    return Plan(eqns, wiring, runs, made, outer, list(families), False)
