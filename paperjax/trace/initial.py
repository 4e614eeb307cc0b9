"""The law of each leaf's entries at initialization, read from the jaxpr of ``init``; nothing of the leaf's size is computed.

An initializer draws uniform bits and then works entry by entry. So its jaxpr is run on `QUANTILES` evenly spaced bit patterns in
place of the draws: every later step is exact for each of them, and their mean and mean square are those of the law up to the spacing.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.trace import primitives as prim

QUANTILES = 4096


class Law(NamedTuple):
    """Mean and standard deviation of a leaf's entries at initialization.

    Attributes
    ----------
    kind
        ``"random"`` (mean and std known), ``"constant"`` (computed without the key), ``"given"`` (unequal numbers that ``init`` neither
        draws nor computes: those of an instance, or of NumPy), ``"data"`` (they depend on the batch) or ``"unread"`` (random in a way that
        was not followed; `why` names the primitive).
    mean, std
        NaN where not known; `mean` of a constant that is not one number is NaN too.
    """

    kind: str
    mean: float = math.nan
    std: float = math.nan
    why: str = ""


class _Seen(NamedTuple):
    """A value in the jaxpr of init: `kind` adds to those of `Law` ``"key"``, ``"bits"`` (entries known on the quantiles) and ``"unit"``."""

    kind: str
    entries: Any = None
    draw: int = 0
    mean: float = math.nan
    std: float = math.nan
    why: str = ""


_KEY, _FIXED, _DATA, _UNIT, _GIVEN = _Seen("key"), _Seen("constant"), _Seen("data"), _Seen("unit"), _Seen("given")


def read_laws(jaxpr: jex.ClosedJaxpr, n: int) -> list[Law]:
    """Laws of the first `n` outputs of the jaxpr of ``init(key, x)``, whose first input is the key."""
    reader = _Reader()
    # Bits and quantiles are computed here and now, even when a plan is made inside a jitted function.
    with jax.ensure_compile_time_eval():
        wanted = [i < n for i in range(len(jaxpr.jaxpr.outvars))]
        seen = reader.jaxpr(jaxpr, [_KEY] + [_DATA] * (len(jaxpr.jaxpr.invars) - 1), wanted)
        return [_law(value) for value in seen[:n]]


def _law(seen: _Seen) -> Law:
    if seen.kind == "bits":
        entries = np.asarray(seen.entries, np.float64)
        return Law("random", float(entries.mean()), float(entries.std()))
    if seen.kind == "moments":
        return Law("random", seen.mean, seen.std)
    if seen.kind == "constant":
        return Law("constant", math.nan if seen.entries is None else float(seen.entries), 0.0)
    if seen.kind in ("data", "given"):
        return Law(seen.kind, why=seen.why)
    return Law("unread", why=seen.why or "a random key")


class _Reader:
    def __init__(self) -> None:
        self.draws = 0
        # Layers draw by the same function, and JAX traces that once.
        self.known: dict[Any, list[_Seen]] = {}

    def jaxpr(self, jaxpr: jex.ClosedJaxpr, inputs: Sequence[_Seen], wanted: Sequence[bool] | None = None) -> list[_Seen]:
        inner = jaxpr.jaxpr
        values: dict[Any, _Seen] = {}
        for var, const in zip(inner.constvars, jaxpr.consts):
            values[var] = _of_constant(const)
        values.update(zip(inner.invars, inputs))
        needed = {v for i, v in enumerate(inner.outvars) if not isinstance(v, jex.Literal) and (wanted is None or wanted[i])}
        # flax runs the whole network in init, and its parameters do not need it.
        eqns = []
        for eqn in reversed(inner.eqns):
            if needed.intersection(eqn.outvars):
                eqns.append(eqn)
                needed.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))

        def read(atom: Any) -> _Seen:
            return _of_constant(atom.val) if isinstance(atom, jex.Literal) else values.get(atom, _FIXED)

        for eqn in reversed(eqns):
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars], [v in needed for v in eqn.outvars])
            values.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in inner.outvars]

    def equation(self, eqn: Any, inputs: list[_Seen], wanted: Sequence[bool]) -> list[_Seen]:
        name = eqn.primitive.name
        inner = prim.called(eqn)
        if inner is not None:
            return self.remembered(inner, inputs, wanted)
        if name == "scan":
            return self.jaxpr(prim.closed(eqn.params["jaxpr"]), inputs, wanted)
        if name == "random_bits":
            return [self.draw(eqn.outvars[0].aval.dtype)]
        if any(value.kind == "data" for value in inputs):
            return [_Seen("data", why=name)] * len(eqn.outvars)
        if name.startswith(("random_", "threefry")):
            return [_KEY] * len(eqn.outvars)
        if all(value.kind == "key" for value in inputs) and inputs:
            return [
                _KEY if name in (*prim.RESHAPING, *prim.KEEPING_AXES, "gather", "concatenate", "stack") else _Seen("unread", why=name)
            ] * len(eqn.outvars)
        if name in ("qr", "householder_product", "geqrf"):
            return self.orthogonal(eqn)
        return [self.one(eqn, inputs)] * len(eqn.outvars)

    def remembered(self, inner: jex.ClosedJaxpr, inputs: list[_Seen], wanted: Sequence[bool]) -> list[_Seen]:
        if any(value.kind == "bits" for value in inputs):
            return self.jaxpr(inner, inputs, wanted)
        told = tuple(value._replace(entries=None if value.entries is None else str(value.entries)) for value in inputs)
        key = (inner.jaxpr, tuple(wanted), told)
        if key not in self.known:
            self.known[key] = self.jaxpr(inner, inputs, wanted)
            return self.known[key]
        # Another draw, of the same law.
        new: dict[int, int] = {}
        for value in self.known[key]:
            if value.kind == "bits" and value.draw not in new:
                self.draws += 1
                new[value.draw] = self.draws
        return [value._replace(draw=new.get(value.draw, value.draw)) for value in self.known[key]]

    def draw(self, dtype: Any) -> _Seen:
        bits = jnp.iinfo(dtype).bits
        points = ((2 * np.arange(QUANTILES) + 1) * 2**bits // (2 * QUANTILES)) if bits < 64 else None
        if points is None:
            points = np.array([(2 * i + 1) * 2**64 // (2 * QUANTILES) for i in range(QUANTILES)], np.uint64)
        self.draws += 1
        return _Seen("bits", jnp.asarray(points.astype(dtype)), self.draws)

    def orthogonal(self, eqn: Any) -> list[_Seen]:
        # Columns of Q have norm 1 and no preferred direction: entries have mean square 1 / rows.
        rows = eqn.outvars[0].aval.shape[-2]
        return [_Seen("moments", mean=0.0, std=rows**-0.5)] + [_UNIT] * (len(eqn.outvars) - 1)

    def one(self, eqn: Any, inputs: list[_Seen]) -> _Seen:
        name = eqn.primitive.name
        kinds = {value.kind for value in inputs}
        if name in (*prim.RESHAPING, *prim.KEEPING_AXES, "gather") and name != "convert_element_type" and inputs[0].kind != "unread":
            padded = name == "pad" and inputs[0].kind != "constant"
            return _Seen("unread", why=name) if padded else inputs[0]
        if name in ("concatenate", "stack"):
            return _mixture(eqn, inputs)
        if kinds <= {"constant"}:
            return self.constant(eqn, inputs)
        if kinds <= {"constant", "given"}:
            return _GIVEN
        if "unit" in kinds and kinds <= {"unit", "moments", "constant"}:
            moments = [value for value in inputs if value.kind == "moments"]
            return moments[0] if name == "mul" and moments else _UNIT if not moments else _Seen("unread", why=name)
        if name in (*prim.ELEMENTWISE, "convert_element_type", "bitcast_convert_type", "shift_right_logical", "shift_left"):
            if kinds <= {"bits", "constant"} and len({v.draw for v in inputs if v.kind == "bits"}) == 1 and all(_known(v) for v in inputs):
                return _Seen("bits", self.apply(eqn, inputs), next(v.draw for v in inputs if v.kind == "bits"))
            if kinds <= {"moments", "constant"} and all(_known(v) for v in inputs):
                return _affine(name, inputs)
        return _Seen("unread", why=name)

    def constant(self, eqn: Any, inputs: list[_Seen]) -> _Seen:
        if (
            eqn.primitive.name in (*prim.ELEMENTWISE, "convert_element_type")
            and inputs
            and all(value.entries is not None for value in inputs)
        ):
            return _Seen("constant", self.apply(eqn, inputs))
        return _FIXED

    def apply(self, eqn: Any, inputs: list[_Seen]) -> Any:
        # One number stands for an array of equal ones.
        rank = any(value.kind == "bits" for value in inputs)
        values = [jnp.asarray(v.entries).astype(atom.aval.dtype) for v, atom in zip(inputs, eqn.invars)]
        shaped = [jnp.broadcast_to(value, (QUANTILES,)) for value in values] if rank else values
        return eqn.primitive.bind(*shaped, **eqn.params)


def _of_constant(value: Any) -> _Seen:
    if isinstance(value, Tracer):
        return _GIVEN if value.ndim else _FIXED
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        return _KEY
    array = np.asarray(value)
    equal = array.size > 0 and bool(np.all(array == array.flat[0]))
    return _Seen("constant", array.flat[0]) if equal else _GIVEN if array.size else _FIXED


def _known(value: _Seen) -> bool:
    return value.kind != "constant" or value.entries is not None


def _affine(name: str, inputs: list[_Seen]) -> _Seen:
    if len(inputs) == 1:
        if name in ("neg", "convert_element_type"):
            return inputs[0]._replace(mean=-inputs[0].mean if name == "neg" else inputs[0].mean)
        return _Seen("unread", why=name)
    if len(inputs) != 2 or sum(value.kind == "moments" for value in inputs) != 1:
        return _Seen("unread", why=name)
    random, number = inputs if inputs[0].kind == "moments" else inputs[::-1]
    c = float(number.entries)
    if name == "mul" or (name == "div" and random is inputs[0]):
        factor = c if name == "mul" else 1 / c
        return random._replace(mean=random.mean * factor, std=random.std * abs(factor))
    if name == "add":
        return random._replace(mean=random.mean + c)
    return _Seen("unread", why=name)


def _mixture(eqn: Any, inputs: list[_Seen]) -> _Seen:
    """Parts with laws of their own: moments over all entries."""
    if all(value.kind == "key" for value in inputs):
        return _KEY
    laws = [_law(value) for value in inputs]
    if any(law.kind not in ("random", "constant") or math.isnan(law.mean) for law in laws):
        kinds = {law.kind for law in laws}
        if kinds <= {"constant", "given"}:
            return _GIVEN if "given" in kinds else _FIXED
        return _Seen("unread", why="concatenate")
    sizes = np.array([math.prod(atom.aval.shape) for atom in eqn.invars], float)
    weights, means = sizes / sizes.sum(), np.array([law.mean for law in laws])
    mean = float(weights @ means)
    square = float(weights @ (np.array([law.std for law in laws]) ** 2 + means**2))
    if all(law.kind == "constant" for law in laws):
        return _Seen("constant", mean) if np.ptp(means) == 0 else _FIXED
    return _Seen("moments", mean=mean, std=math.sqrt(max(0.0, square - mean**2)))
