"""Products of two activations that are written entry by entry and then summed: ``(a * b).sum(-1)`` is ``einsum("...d,...d->...", a, b)``.

A sum of squared differences, ``((a - b) ** 2).sum(-1)``, is of the same kind: it is of the order of the number of its coordinates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from paperjax.trace import primitives as prim


class Pair(NamedTuple):
    """Two activations that were combined entry by entry.

    Attributes
    ----------
    node
        The activation that combines them; its parents are the two.
    shared
        For each axis of the value, whether both vary along it.
    kind
        ``"product"``, ``"difference"``, or ``"distance"``: a squared difference.
    """

    node: int
    shared: tuple[bool, ...]
    kind: str


def even_axes(eqn: Any, inputs: Sequence[Any]) -> frozenset[int]:
    """Axes of an activation along which all its entries are the same, because it was broadcast over them."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name in prim.RESHAPING:
        even, before = inputs[0].even, eqn.invars[0].aval.shape
        return frozenset(a for a, old in enumerate(prim.moved_axes(eqn)) if shape[a] > 1 and all(o in even or before[o] == 1 for o in old))
    if name in prim.KEEPING_AXES and name not in ("tile", "pad"):
        return inputs[0].even
    if name not in prim.ELEMENTWISE or not any(value.even for value in inputs):
        return frozenset()
    # A number is even along every axis; a constant array along none that is known.
    arrays = [(v, atom.aval.shape) for v, atom in zip(inputs, eqn.invars) if atom.aval.shape and v.scalar is None]
    return frozenset(a for a in range(len(shape)) if all(_is_even(value, before, a) for value, before in arrays))


def _is_even(value: Any, shape: Sequence[int], axis: int) -> bool:
    return shape[axis] == 1 or axis in value.even


def paired(eqn: Any, inputs: Sequence[Any], node: int, how: str) -> Pair | None:
    """What is known of the pair in the result of an equation, which is the activation `node` and depends on its operands as `how` says."""
    name, data = eqn.primitive.name, [value for value in inputs if value.node is not None]
    first = data[0].pair
    if name in ("mul", "sub") and len(data) == 2 and data[0].node != data[1].node:
        rank = len(eqn.outvars[0].aval.shape)
        shapes = [atom.aval.shape for atom in eqn.invars]
        if any(len(shape) != rank for shape in shapes):
            return None
        shared = tuple(not any(_is_even(value, shape, a) for value, shape in zip(inputs, shapes)) for a in range(rank))
        return Pair(node, shared, "product" if name == "mul" else "difference") if any(shared) else None
    if first is None or len(eqn.outvars) != 1:
        return None
    if name in ("square", "integer_pow") or (name == "mul" and len(data) == 2):
        squared = name != "integer_pow" or eqn.params["y"] == 2
        return first._replace(kind="distance") if first.kind == "difference" and squared else None
    if name in prim.RESHAPING:
        return first._replace(shared=tuple(any(first.shared[o] for o in old) for old in prim.moved_axes(eqn)))
    if name == "reduce_sum":
        return first._replace(shared=tuple(s for a, s in enumerate(first.shared) if a not in eqn.params["axes"]))
    together = name in ("add", "add_any") and all(value.pair is not None and value.pair.kind == first.kind for value in data)
    if together or name in prim.KEEPING_AXES or (name in prim.ELEMENTWISE and how == "linear" and len(data) == 1):
        return first if len(eqn.outvars[0].aval.shape) == len(first.shared) else None
    return None


def pair_summed(pair: Pair | None, shape: Sequence[int], over: Sequence[int]) -> dict[str, Any]:
    """What a node that sums over some axes knows of the pair that it sums: sizes of the axes that both vary along, and the pair's node."""
    if pair is None or pair.kind == "difference":
        return {}
    sizes = tuple(n for a, n in enumerate(shape) if a in over and pair.shared[a])
    return {"contracted": sizes, "pair": pair.node} if sizes else {}
