"""Scans at infinite width: few steps one by one, many over depth as a recursion."""

from typing import Any

import numpy as np

from paperjax.limits import fields as fl
from paperjax.limits import joined
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.loops import Loop
from paperjax.limits.nodes import Det, Node, Wide
from paperjax.limits.rules import cut, kept
from paperjax.limits.subsets import apart
from paperjax.limits.values import Joined, Spread, Unread, Value
from paperjax.limits.views import View
from paperjax.trace import primitives as prim

SHORT, LONGEST = 6, 64
"""Steps of a scan that are unrolled where they might be a recursion, and where they must."""


def as_carry(node: Node, like: Node) -> Wide:
    """What a step ends with, with the axes of what it began with."""
    made = st.as_wide(node)
    if made.shape != like.shape:
        raise NotImplementedError(f"a scan over depth that carries a value of shape {like.shape} and leaves one of shape {made.shape}.")
    nd.refuse_turned(made.axes, like.axes)
    return made


def scan(reader: Any, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
    """The results of a scan."""
    p = eqn.params
    n_consts, n_carry, length = p["num_consts"], p["num_carry"], p["length"]
    body, other = prim.closed(p["jaxpr"]), prim.closed(twin.params["jaxpr"])
    if twin.params["length"] != length:
        raise NotImplementedError(
            "the number of steps of a scan grows with the sizes that go to infinity: it is a depth, and no width. Give it a finite value, "
            "sizes=dict(depth=...)."
        )
    consts, carry, rows = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
    stacked_leaves = any(isinstance(row, View) for row in rows)
    shared_leaves = any(isinstance(c, (View, Spread, Joined)) and any(atom.grows for axis in c.axes for atom in axis) for c in consts)
    if length > SHORT and stacked_leaves and not shared_leaves:
        return loop(reader, eqn, body, other, consts, carry, rows)
    if length > LONGEST:
        raise NotImplementedError(
            f"a scan of {length} steps that share their leaves, or have none: steps are then followed one by one, up to {LONGEST}."
        )
    made: list[list[Value]] = []
    order = range(length)[::-1] if p["reverse"] else range(length)
    for i in order:
        step = [row_of(reader, row, i) for row in rows]
        outputs = reader.jaxpr(body, other, [*consts, *carry, *step])
        carry = outputs[:n_carry]
        made.append(outputs[n_carry:])
    if p["reverse"]:
        made = made[::-1]
    rest = [stacked(reader, [reader.node(step[k]) for step in made]) for k in range(len(made[0]))] if made else []
    return [*carry, *rest]


def loop(reader: Any, eqn: Any, body: Any, other: Any, consts: list[Value], carry: list[Value], rows: list[Value]) -> list[Value]:
    """A scan over depth as a recursion of second moments. A wide value that every step sees is carried with the rest, as it is."""
    given = [i for i, c in enumerate(consts) if isinstance(c, Wide) and fl.sources(c)]
    starts = [reader.settled(reader.node(value), "scan") for value in (*carry, *(consts[i] for i in given))]
    wide = [i for i, node in enumerate(starts) if isinstance(node, Wide)]
    stacked_leaves = _stacks(rows)
    for key in (key for i in wide for key in fl.sources(starts[i])):  # type: ignore[arg-type]
        if key[0] in stacked_leaves:
            raise NotImplementedError(
                f"{key[0]}: a scan over depth of this leaf starts with what the leaf made before (two scans of one stack of weights), and "
                "its steps are not independent of that. Give each scan leaves of its own, or let a layer with weights lie between."
            )
    steps: list[Value] = []
    dets: list[tuple[Det, Det]] = []
    for row in rows:
        if isinstance(row, View):
            steps.append(row_of(reader, row, 0))
            continue
        node = reader.settled(reader.node(row), "scan")
        if not isinstance(node, Det) or node.const is None:
            raise NotImplementedError("a scan over depth whose steps read something of the data by number.")
        one = Det(node.axes[1:], lambda a: a, (Det((), const=np.zeros(())),))
        dets.append((one, Det(node.axes, const=node.const[::-1] if eqn.params["reverse"] else node.const)))
        steps.append(one)
    gaussian = {i: fl.is_gaussian(starts[i]) for i in wide}  # type: ignore[arg-type]
    before, computed = len(reader.noises), dict(reader.computed)
    while True:
        name = object()
        # What a pass computes is noted where it is computed, so it is computed again by the next.
        del reader.noises[before:]
        reader.computed = dict(computed)
        made = {i: nd.Carried(starts[i].axes, id(name), k, gaussian[i], frozenset({("scan", id(name))})) for k, i in enumerate(wide)}
        seen = [made.get(i, node) for i, node in enumerate(starts)]
        same = dict(zip(given, seen[len(carry) :]))
        outputs = reader.jaxpr(body, other, [*(same.get(i, c) for i, c in enumerate(consts)), *seen[: len(carry)], *steps])
        ends = [reader.node(value, starts[i].axes) for i, value in enumerate(outputs[: len(carry)])] + seen[len(carry) :]
        if any(isinstance(node, Wide) and fl.is_joined(node) for node in (*starts, *ends)):
            raise NotImplementedError(
                "a scan over depth that carries channels of several kinds side by side (halves that take turns, as in a reversible "
                "network): carry them apart, as a tuple."
            )
        wrong = [i for i in wide if gaussian[i] and not (isinstance(ends[i], Wide) and fl.is_gaussian(ends[i]))]  # type: ignore[arg-type]
        if not wrong:
            break
        gaussian |= dict.fromkeys(wrong, False)
    for start, end in zip(starts, ends):
        if isinstance(start, Det) and end is not start:
            raise NotImplementedError("a scan over depth that carries a deterministic value from step to step.")
    loop = Loop(
        tuple(made[i] for i in wide), tuple(starts[i] for i in wide),  # type: ignore[arg-type]
        tuple(as_carry(ends[i], made[i]) for i in wide), eqn.params["length"], tuple(dets),
    )  # fmt: skip
    reader.kept_alive.append(name)
    reader.noises[before:] = [(where, size, (loop, *inside)) for where, size, inside in reader.noises[before:]]
    # A step names its own part of a stack of leaves; all steps together have used the whole.
    used = frozenset[Any]().union(*(fl.sources(node) for node in (*loop.starts, *loop.ends)))
    own = frozenset((k[0], stacked_leaves[k[0]].entries, *k[2:]) if k[0] in stacked_leaves else k for k in used)
    results: list[Value] = [nd.Scanned(loop.carried[wide.index(i)].axes, loop, wide.index(i), gaussian[i], own) if i in wide else s
                            for i, s in enumerate(starts[: len(carry)])]  # fmt: skip
    return [*results, *(Unread("what every step of a scan over depth returns by itself") for _ in outputs[len(carry) :])]


def _stacks(rows: list[Value]) -> dict[int, View]:
    """The leaves that are stacked over the steps."""
    found: dict[int, View] = {}
    for row in rows:
        if not isinstance(row, View):
            continue
        first = found.setdefault(row.leaf, row)
        if row.back != first.back or (row.entries != first.entries and not apart(row.entries, first.entries)):
            raise NotImplementedError(f"{row.leaf}: steps of a scan over depth share parts of this leaf (layers in two orders).")
    return found


def row_of(reader: Any, value: Value, i: int) -> Value:
    """One step's part of an input of a scan."""
    sizes = [nd.full_size(axis) for axis in value.axes]
    starts, stops = [0] * len(sizes), [n for n, _ in sizes]
    starts[0], stops[0] = i, i + 1
    one = cut(reader, value, starts, stops, (1,) * len(sizes), (1, *(m for _, m in sizes[1:])))
    return kept(reader, one, list(range(1, len(sizes))))


def stacked(reader: Any, rows: list[Node]) -> Node:
    """Values side by side along a new first axis."""
    return joined.concatenate([st.apply(row, st.drop(row.axes, [None, *range(len(row.axes))])) for row in rows], 0)
