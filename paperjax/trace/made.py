"""Weights that the data make (a hypernetwork's) of a leaf one of whose axes is split in two: one part is summed over, one is left.

``W = (context @ H).reshape(n, n); h @ W`` uses the axis of H that has n² entries as fan-in and as fan-out at once, so no use of that axis
says how H scales. Where the leaf has two axes for the two parts, the walk itself can tell them apart.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from paperjax.trace import primitives as prim
from paperjax.trace.graph import WEIGHTED, Part, Unresolved, Walk
from paperjax.trace.values import Row, Value, moved, union

PARTIAL = (
    "what it multiplies is added up one after the other, so that its axis is summed over and left at once; write (w * x).sum() where the "
    "last sum alone is meant"
)


def split_by_product(eqn: Any, inputs: Sequence[Value], axes: Sequence[prim.Contraction]) -> Iterator[Unresolved]:
    """Axes of leaves of which a product of two activations sums over one part and leaves another."""
    for value, atom, its in zip(inputs, eqn.invars, axes) if not are_scores(inputs, axes) else ():
        for row in value.rows:
            yield from _split(eqn, row, atom.aval.shape, its.contracted, its.free)


def are_scores(inputs: Sequence[Value], axes: Sequence[prim.Contraction]) -> bool:
    """Whether a product pairs positions, q_t . k_s, and sums over coordinates; weights of copies belong to the position that is copied."""

    def has_positions(value: Value, its: prim.Contraction) -> bool:
        # A free axis that the data bring: it runs over no axis of a parameter.
        return any(not any(row.piece.axes[a] for row in value.rows) for a in its.free)

    return all(map(has_positions, inputs, axes))


def split_by_sum(eqn: Any, value: Value, over: Sequence[int]) -> Iterator[Unresolved]:
    """The same of a product that is written entry by entry and then summed; and axes that it sums over of a leaf that has others."""
    if value.pair is None or value.pair.kind != "product":
        return
    shared = value.pair.shared
    shape = next(atom.aval.shape for atom in eqn.invars if len(atom.aval.shape) == len(shared))
    rows = [row for row in value.rows if len(row.piece.axes) == len(shape)]
    # What both operands run over is no fan-out: heads, one by one.
    free = tuple(a for a in range(len(shape)) if a not in over and not shared[a])
    # Scores of attention pair positions.
    if sum(not any(row.piece.axes[a] for row in rows) for a in free) > 1:
        return
    inside = tuple(a for a in over if shared[a])
    for row in rows:
        yield from _split(eqn, row, shape, inside, free)
        axes, left = (union(row.piece.axes[a] for a in which) for which in (inside, free))
        if row.kind == "made" and set(left) - set(axes):
            yield from (Unresolved(row.piece.leaf, eqn.primitive.name, WEIGHTED, axis) for axis in axes)


def _split(eqn: Any, row: Row, shape: Sequence[int], over: Sequence[int], free: Sequence[int]) -> Iterator[Unresolved]:
    if row.kind not in ("made", "added"):
        return
    for axis in sorted(set(union(row.piece.axes[a] for a in over)) & set(union(row.piece.axes[a] for a in free))):
        named = {a: "inside" for a in over} | {a: "out" for a in free}
        parts = tuple(Part(n, named.get(a, "stack")) for a, n in enumerate(shape) if axis in row.piece.axes[a])
        alone = all(axes == (axis,) for axes in row.piece.axes if axis in axes)
        inside, out = (" x ".join(str(part.size) for part in parts if part.kind == kind) for kind in ("inside", "out"))
        reason = (
            f"the axis is split, and a product with other activations sums over one part of it ({inside}) and leaves another ({out}): a "
            "kernel that the data make, whose axis is fan-in and fan-out at once"
        )
        yield Unresolved(row.piece.leaf, eqn.primitive.name, reason, axis, parts if alone else (Part(0, "inside"), Part(0, "out")))


def only_growing(found: Walk, base: Walk, like: Sequence[int]) -> Walk:
    """Of the split axes only those both of whose parts grow; `like` says which leaf of the base each leaf is compared with.

    With a finite part it is no hidden matrix: what sums over a growing part alone is a product of activations like any other.
    """
    kept, seen = [], dict[int, int]()
    for problem in found.unresolved:
        if problem.parts:
            there = [u for u in base.unresolved if u.parts and (u.leaf, u.axis) == (like[problem.leaf], problem.axis)]
            n = seen[problem.leaf] = seen.get(problem.leaf, -1) + 1
            if there and not all(_grows(problem, there[n % len(there)], kind) for kind in ("inside", "out")):
                continue
        kept.append(problem)
    return found._replace(unresolved=tuple(kept))


def _grows(here: Unresolved, there: Unresolved, kind: str) -> bool:
    ours, theirs = ([part.size for part in problem.parts if part.kind == kind] for problem in (here, there))
    return ours != theirs or 0 in ours


def over_copies(
    eqn: Any, value: Value, weight: int, axes: Sequence[prim.Contraction], shapes: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """What is left of the data once a product with copies of a weight has summed what they meet, ``(sum_h x_h) @ w`` of ``sum_h x_h @ w``.

    `value` is the operand with number `weight`, `shapes` are those of the leaves. `None` where there are no copies.
    """
    inside, shape = axes[weight].contracted, eqn.invars[weight].aval.shape
    kinds = {(p.leaf, union(p.axes[a] for a in inside)) for p in value.pieces}
    entries = sum(math.prod(shapes[leaf][a] for a in own) for leaf, own in kinds)
    copies, rest = divmod(math.prod(shape[a] for a in inside), max(1, entries))
    if rest or copies < 2:
        return None
    left = list(eqn.invars[1 - weight].aval.shape)
    for mine, its in zip(inside, axes[1 - weight].contracted):
        part = math.gcd(copies, shape[mine])
        copies, left[its] = copies // part, left[its] // part
    return tuple(left)


def beside_weights(eqn: Any, value: Value) -> tuple[int, ...] | None:
    """What ``sum(w * x)`` leaves once it has summed over the axes that w does not have; `None` where w has all."""
    shape, over = eqn.invars[0].aval.shape, prim.summed_axes(eqn)
    axes = [row.piece.axes for row in value.rows if row.kind == "times" and any(row.piece.axes[a] for a in over)]
    others = [a for a in over if shape[a] > 1 and not any(its[a] for its in axes)]
    return tuple(1 if a in others else n for a, n in enumerate(shape)) if axes and others else None


def rows_after(eqn: Any, inputs: Sequence[Value]) -> tuple[Row, ...]:
    """What can still be told of the parameters' axes in the result of an equation on activations."""
    name = eqn.primitive.name
    rows = tuple(row for value in inputs for row in value.rows)
    if not rows or len(eqn.outvars) != 1:
        return rows if name == "split" else ()
    if name in prim.RESHAPING:
        return tuple(row._replace(piece=moved([row.piece], eqn)[0]) for row in rows)
    if name in prim.KEEPING_AXES:
        return rows
    rank = len(eqn.outvars[0].aval.shape)
    if name in prim.ELEMENTWISE:
        return tuple(row for row in rows if row.kind in ("made", "added") and len(row.piece.axes) == rank)
    return ()


def passed_on(value: Value, sliced: bool) -> tuple[Row, ...]:
    """Rows of an activation that a loop's steps use as it is, or, `sliced`, one slice of it a step."""
    rows = [row for row in value.rows if row.kind in ("made", "added")]
    return tuple(row._replace(piece=row.piece._replace(axes=row.piece.axes[1:])) for row in rows) if sliced else tuple(rows)
