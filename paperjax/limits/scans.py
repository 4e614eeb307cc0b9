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
from paperjax.limits.values import Spread, Unread, Value
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
    shared_leaves = any(isinstance(c, (View, Spread)) and any(atom.grows for axis in c.axes for atom in axis) for c in consts)
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
    """A scan over depth as a recursion of second moments."""
    starts = [reader.settled(reader.node(value), "scan") for value in carry]
    wide = [i for i, node in enumerate(starts) if isinstance(node, Wide)]
    outer = frozenset[Any]().union(*(fl.sources(c) for c in consts if isinstance(c, Wide)))
    if outer & frozenset[Any]().union(*(fl.sources(starts[i]) for i in wide)):  # type: ignore[arg-type]
        raise NotImplementedError("a scan over depth whose steps see a value that also starts it (a skip from the input to every layer).")
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
    before = len(reader.noises)
    while True:
        name = object()
        del reader.noises[before:]
        made = {i: nd.Carried(starts[i].axes, id(name), k, gaussian[i], frozenset({("scan", id(name), i)})) for k, i in enumerate(wide)}
        outputs = reader.jaxpr(body, other, [*consts, *(made.get(i, node) for i, node in enumerate(starts)), *steps])
        ends = [reader.node(value, starts[i].axes) for i, value in enumerate(outputs[: len(carry)])]
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
    own = frozenset[Any]().union(*(fl.sources(node) for node in (*loop.starts, *loop.ends)))
    results: list[Value] = [nd.Scanned(loop.carried[wide.index(i)].axes, loop, wide.index(i), gaussian[i], own) if i in wide else s
                            for i, s in enumerate(starts)]  # fmt: skip
    return [*results, *(Unread("what every step of a scan over depth returns by itself") for _ in outputs[len(carry) :])]


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
