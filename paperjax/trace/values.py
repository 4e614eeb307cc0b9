"""What is known of a value in the jaxpr of ``apply``, and what primitives do to values made of parameters alone.

A value is one of four: known without parameters and data (constant); made of parameters alone by moving, adding and scaling them
(`Value.pieces`: which leaf, and which of its axes each axis of the value runs over); made of parameters alone in any other way
(`Value.tangled`); or dependent on the data (`Value.node`, a node of the graph of activations).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paperjax.trace import primitives as prim
from paperjax.trace.pairs import Pair


class Piece(NamedTuple):
    """A parameter inside a value.

    Attributes
    ----------
    leaf
        Number of the leaf.
    axes
        For each axis of the value, the axes of the leaf that it runs over; none for a broadcast axis.
    stack, scans
        Axes of the leaf that a scan runs over, one slice a step; and the paths of those scans.
    linear
        Whether only moves, sums and constant factors came before; if not, `reason` says what did.
    scales
        Whether the value is multiplied by c when all leaves in it are; not so after ``1 + g``.
    reused
        Whether a loop uses the same numbers in every step.
    looked
        Axes of the leaf that were looked up at fixed places.
    log_factor
        Logarithm of the known numbers that multiply it.
    """

    leaf: int
    axes: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()
    scans: tuple[tuple[int, ...], ...] = ()
    linear: bool = True
    scales: bool = True
    reused: bool = False
    looked: tuple[int, ...] = ()
    reason: str = ""
    log_factor: float = 0.0


class Tangled(NamedTuple):
    """A parameter inside a value that is no longer made of pieces, why, and what is known of its axes all the same.

    `axes` are those of a `Piece`, `None` where they are lost. `summed` are the axes that a product with another parameter sums over.
    `spread` says that it was combined entry by entry with others, and has fewer axes than they have: a bias, a gain.
    """

    leaf: int
    reason: str
    axes: tuple[tuple[int, ...], ...] | None = None
    summed: tuple[int, ...] = ()
    spread: bool = False


class Row(NamedTuple):
    """A parameter whose axes can still be told apart in an activation.

    `kind` says how it came in, at `node`: ``"lookup"`` (rows looked up by the data), ``"constant"`` (a weight times a constant),
    ``"times"`` (an elementwise multiple of the data), ``"made"`` (the free axes of a product).
    """

    piece: Piece
    kind: str
    node: int


class Value(NamedTuple):
    """What is known of a value; see the module. `scalar` is the number that all its entries equal, where they do and it is known.

    Of an activation, `even` are the axes that it was broadcast over, and `pair` the two that it is an entry-by-entry product of.
    """

    pieces: tuple[Piece, ...] = ()
    node: int | None = None
    tangled: tuple[Tangled, ...] = ()
    scalar: Any = None
    rows: tuple[Row, ...] = ()
    even: frozenset[int] = frozenset()
    pair: Pair | None = None

    @property
    def is_constant(self) -> bool:
        """Whether neither parameters nor data are in it."""
        return self.node is None and not self.pieces and not self.tangled

    @property
    def is_zero(self) -> bool:
        """Whether it is known to be zero everywhere."""
        return self.scalar is not None and not np.any(self.scalar)

    def leaves(self) -> tuple[int, ...]:
        """The parameters in it."""
        return tuple(dict.fromkeys([p.leaf for p in self.pieces] + [t.leaf for t in self.tangled]))


# A carry that is an activation before the loop has run at all: its node is not known yet.
SOME_NODE = -1


def parameters(eqn: Any, inputs: Sequence[Value]) -> Value:
    """The result of a primitive whose operands are parameters and constants; that of every result, where it has several."""
    name = eqn.primitive.name
    involved = [value for value in inputs if not value.is_constant]
    if any(value.tangled for value in involved):
        reasons = [t for value in involved for t in value.tangled]
        reasons += [Tangled(p.leaf, f"it enters {name} with others", p.axes) for value in involved for p in value.pieces]
        return Value(tangled=tuple(dict.fromkeys(_followed(t, eqn, len(involved) > 1) for t in reasons)))
    first, single = inputs[0], len(involved) == 1
    if name in prim.RESHAPING and single:
        return Value(moved(first.pieces, eqn))
    if name == "gather" and single and first.pieces:
        return Value(tuple(_gathered(p, eqn) for p in first.pieces))
    if name in prim.KEEPING_AXES and single and first.pieces:
        return Value(tuple(p._replace(scales=p.scales and (name != "pad" or inputs[1].is_zero)) for p in first.pieces))
    rank = len(eqn.outvars[0].aval.shape)
    # A number broadcasts over any axes.
    pieces = tuple(p._replace(axes=p.axes or ((),) * rank) for value in involved for p in value.pieces)
    fixed = all(value.is_zero for value in inputs if value.is_constant)
    if name == "stack":
        pieces = moved(pieces, eqn)
    if name in prim.ADDITIVE or name in ("concatenate", "stack"):
        return Value(_distinct(p._replace(scales=p.scales and fixed) for p in pieces))
    if name == "select_n" and inputs[0].is_constant:
        fixed = all(value.is_zero for value in inputs[1:] if value.is_constant)
        return Value(_distinct(p._replace(scales=p.scales and fixed) for p in pieces))
    if name == "neg":
        return Value(pieces)
    if single and (name == "mul" or (name == "div" and not first.is_constant)):
        log = log_of(next(value for value in inputs if value.is_constant)) * (1 if name == "mul" else -1)
        return Value(tuple(p._replace(log_factor=p.log_factor + log) for p in pieces))
    if name == "mul" and not single:
        # A number that is trained multiplies a weight: the weight's axes mean what they meant.
        numbers = [value for value in involved if not any(axes for p in value.pieces for axes in p.axes)]
        if len(numbers) == len(involved) - 1:
            bent = {p.leaf for value in numbers for p in value.pieces}
            reason = "it multiplies another parameter"
            return Value(_distinct(p._replace(linear=False, reason=reason) if p.leaf in bent else p for p in pieces))
    if name in prim.ELEMENTWISE:
        several = len({p.leaf for p in pieces}) > 1
        reason = f"it is combined with another parameter by {name}" if several else f"the elementwise function {name} is applied to it"
        return Value(
            _distinct(p._replace(linear=False, scales=False, reason=p.reason or f"{reason} before it meets the data") for p in pieces)
        )
    several = len({p.leaf for p in pieces}) > 1
    how = "is combined with another parameter by" if several else "goes through"
    leaves = dict.fromkeys(p.leaf for p in pieces)
    return Value(tangled=tuple(Tangled(leaf, f"it {how} {name} before it meets the data") for leaf in leaves))


def moved(pieces: Iterable[Piece], eqn: Any) -> tuple[Piece, ...]:
    """Pieces after a reshaping primitive."""
    places = prim.moved_axes(eqn)
    return tuple(p._replace(axes=tuple(union(p.axes[a] for a in old) for old in places)) for p in pieces)


def multiplied(inputs: Sequence[Value], eqn: Any, kind: str) -> Value:
    """The product of two parameters, which no data are in yet."""
    reason, found = "it is multiplied with another parameter before it meets the data", []
    for i, value in enumerate(inputs):
        own = [*value.tangled, *(Tangled(p.leaf, reason, p.axes) for p in value.pieces)]
        if kind != "product":
            found += [t._replace(axes=None) for t in own]
            continue
        inside, place = prim.dot_axes(eqn, i).contracted, {new: old for old, new in prim.dot_output(eqn, i).items()}
        for t in own:
            if t.axes is None:
                found.append(t)
                continue
            axes = tuple(t.axes[place[a]] if a in place else () for a in range(len(eqn.outvars[0].aval.shape)))
            found.append(t._replace(axes=axes, summed=union((t.summed, *(t.axes[a] for a in inside)))))
    return Value(tangled=tuple(dict.fromkeys(found)))


def likely(tangled: Tangled, met: prim.Contraction | None) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """Kind, summed and free axes of a tangled leaf where they can mean one thing only; `met` says how the data meet the value's axes."""
    if tangled.axes is None:
        return None
    own = tuple(sorted(union(tangled.axes)))
    if met is not None:
        # The data sum over one of its axes and leave another: a matrix of theirs, (W + A B) say, or a product that could be read both ways.
        inside, out = (union(tangled.axes[a] for a in which) for which in (met.contracted, met.free))
        if inside and out:
            return None
    if tangled.spread:
        return "elementwise", (), own
    summed = tuple(sorted(tangled.summed))
    # Of two matrices that are multiplied, either may be the one that acts on the data. A projection to heads has its inputs first.
    if len(own) > 1 and summed and summed == tuple(range(len(summed))) and not set(summed) & set(own):
        return "product", summed, own
    return None


def _followed(tangled: Tangled, eqn: Any, together: bool) -> Tangled:
    """What is still known of the axes after a primitive, which combines several parameters or has this one alone."""
    name = eqn.primitive.name
    if tangled.axes is None or (name in prim.KEEPING_AXES and not together):
        return tangled
    if name in prim.RESHAPING and not together:
        return tangled._replace(axes=tuple(union(tangled.axes[a] for a in old) for old in prim.moved_axes(eqn)))
    if name in prim.ELEMENTWISE and len(tangled.axes) == len(eqn.outvars[0].aval.shape):
        fewer = any(tangled.axes) and not all(tangled.axes)
        return tangled._replace(spread=tangled.spread or (together and fewer and not tangled.summed))
    return tangled._replace(axes=None)


def _gathered(piece: Piece, eqn: Any) -> Piece:
    places = prim.gather_output(eqn)
    axes = tuple(union(piece.axes[a] for a in old) for old in places)
    # A single number as index takes a slice; many look rows up.
    many = len(eqn.params["dimension_numbers"].offset_dims) < len(axes)
    looked = union(piece.axes[a] for a in prim.gather_axes(eqn).contracted) if many else ()
    return piece._replace(axes=axes, looked=union((piece.looked, looked)))


def join(a: Value, b: Value) -> Value:
    """The kind that covers both; an activation covers all."""
    if a.node is not None:
        return a
    if b.node is not None:
        return Value(node=SOME_NODE)
    if a.tangled or b.tangled:
        changed = (Tangled(p.leaf, "it changes in a loop") for p in (*a.pieces, *b.pieces))
        return Value(tangled=tuple(dict.fromkeys((*a.tangled, *b.tangled, *changed))))
    return Value(_distinct((*a.pieces, *b.pieces)))


def reuse(value: Value) -> Value:
    """A value that a loop uses in each of its steps."""
    return value._replace(pieces=_distinct(p._replace(reused=True) for p in value.pieces), scalar=None, rows=())


def union(parts: Iterable[Iterable[int]]) -> tuple[int, ...]:
    """Distinct numbers in the order in which they first come."""
    return tuple(dict.fromkeys(axis for part in parts for axis in part))


def _distinct(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """One piece for each leaf and way that its axes lie: as linear as the least linear of them."""
    found: dict[Any, Piece] = {}
    for p in pieces:
        key = (p.leaf, p.axes, p.stack, p.scans, p.looked)
        q = found.get(key, p)
        found[key] = q._replace(
            linear=p.linear and q.linear, scales=p.scales and q.scales, reused=p.reused or q.reused, reason=q.reason or p.reason
        )
    return tuple(found.values())


def log_of(value: Value) -> float:
    """Logarithm of the size of a known number; 0 of anything else."""
    # NumPy's, which knows complex numbers and truth values.
    number = 0.0 if value.scalar is None else float(np.abs(value.scalar))
    return math.log(number) if 0 < number < math.inf else 0.0


def as_root(name: str, inputs: Sequence[Value]) -> str:
    """The primitive that a power with a known exponent is, ``x ** 0.5`` being ``sqrt(x)``; any other by its own name."""
    known = name == "pow" and inputs[1].scalar is not None
    return prim.ROOTS.get(np.asarray(inputs[1].scalar).item(), name) if known else name


def dependence(eqn: Any, inputs: Sequence[Value], signs: Sequence[bool]) -> tuple[str, float]:
    """How a result depends on the activations that go in, and the logarithm of the known number that it multiplies them by.

    Parameters
    ----------
    eqn, inputs
        The equation, and what is known of its operands; one at least is an activation.
    signs
        For each operand, whether it is the sign of an activation.

    Returns
    -------
    how, log_factor
        As in `Node`.
    """
    name = eqn.primitive.name
    data = [value.node is not None for value in inputs]
    zero = [value.is_zero or not value.is_constant for value in inputs]
    if name in ("real", "imag", *prim.ADDITIVE, "concatenate", "stack"):
        return ("linear" if all(zero) else "affine"), 0.0
    if name in ("pad", "dynamic_update_slice"):
        return ("nonlinear" if any(data[2:]) else "linear" if all(zero[:2]) else "affine"), 0.0
    if name in ("scatter-add", "scatter"):
        return ("nonlinear" if data[1] else "linear" if zero[0] and zero[2] else "affine"), 0.0
    if name in ("gather", "dynamic_slice"):
        return ("nonlinear" if not data[0] else "first" if any(data[1:]) else "linear"), 0.0
    if name in prim.LINEAR or name in prim.RESHAPING or name in prim.KEEPING_AXES:
        return "linear", 0.0
    if name in ("mul", "div"):
        if all(data):
            return ("bilinear" if name == "mul" else "first"), 0.0
        other = inputs[1] if data[0] else inputs[0]
        if name == "div" and not data[0]:
            return "nonlinear", log_of(other)
        return "linear", log_of(other) if name == "mul" else -log_of(other)
    if name in prim.HOMOGENEOUS or (name in ("max", "min") and all(d or v.is_zero for d, v in zip(data, inputs))):
        return "homogeneous", 0.0
    if name in ("gt", "ge", "lt", "le", "sign") and all(d or v.is_zero for d, v in zip(data, inputs)) and sum(data) == 1:
        return "sign", 0.0
    if name == "select_n":
        if data[0] and not signs[0]:
            return "nonlinear", 0.0
        if not all(zero[1:]):
            return ("nonlinear" if data[0] else "affine"), 0.0
        return ("homogeneous" if data[0] else "linear"), 0.0
    return "nonlinear", 0.0


def sliced(value: Value, path: tuple[int, ...]) -> Value:
    """What a scan takes of a value made of parameters in one step."""
    taken = [(p, p.axes[0]) for p in value.pieces]
    pieces = tuple(p._replace(axes=p.axes[1:], stack=p.stack + a, scans=p.scans + (path,) * len(a)) for p, a in taken)
    return Value(pieces, tangled=() if pieces else value.tangled)


def unsliced(value: Value, path: tuple[int, ...]) -> Value:
    """Slices that a scan took, put back where they were among the scan's stacked results."""
    pieces = []
    for p in value.pieces:
        n = len(p.stack) - p.scans.count(path)
        pieces.append(p._replace(axes=(p.stack[n:], *p.axes), stack=p.stack[:n], scans=p.scans[:n]))
    return Value(tuple(pieces), tangled=() if pieces else value.tangled)


def effect_of(name: str, operand: int) -> str:
    """What multiplying operand number `operand` does to the result; see `Site`."""
    if name == "mul" or (name == "div" and operand == 0):
        return "times"
    if name == "select_n":
        return "plus" if operand > 0 else "other"
    return "plus" if name in (*prim.ADDITIVE, *prim.RESHAPING, *prim.KEEPING_AXES, *prim.LINEAR) else "other"


def known_number(value: Any) -> Any:
    """The known number that all entries of a constant equal; `None` for anything else."""
    if isinstance(value, Tracer) or jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):
        return None
    if np.shape(value) == ():
        return value
    if np.size(value) == 0 or not getattr(value, "is_fully_addressable", True):
        return None
    entries = np.asarray(value).reshape(-1)
    return entries[0] if entries[0] == entries[-1] and np.all(entries == entries[0]) else None
