"""The jaxpr of ``init``, read for the law of each entry of its results; nothing of a leaf's size is computed.

An initializer draws bits, makes a uniform number of them, and of that a normal one by ``erf_inv``: the three are told by what is done to
the bits, and scales and shifts are followed in float64. Keys are followed too, so that two arrays of one key are known to be dependent.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.limits import combine
from paperjax.limits import keys as ks
from paperjax.limits.entries import (
    Bits,
    Draw,
    Function,
    Given,
    Number,
    Random,
    Triangle,
    Unread,
    Value,
    mixture,
)
from paperjax.limits.keys import Key, Source, Sources, one_key
from paperjax.limits.rounded import in_float64, unrounded
from paperjax.trace import primitives as prim

# Numbers that are not drawn are computed where they are no more than this: a scale of the shape is, a table of positions is not.
FEW = 4096
_MOVES = (*prim.RESHAPING, *prim.KEEPING_AXES, "gather")
_JOINS = ("concatenate", "stack")
_BITWISE: dict[str, Callable[..., Any]] = {
    "shift_right_logical": np.right_shift, "shift_left": np.left_shift, "or": np.bitwise_or, "and": np.bitwise_and,
    "xor": np.bitwise_xor,
}  # fmt: skip


def read_entries(jaxpr: jex.ClosedJaxpr) -> Sequence[Value]:
    """What the entries of each result of the jaxpr of ``init(key, x)`` are; its first input is the key."""
    with jax.ensure_compile_time_eval():
        reader = _Reader()
        inputs: list[Value] = [Unread("it depends on the batch x, not on its shape alone")] * len(jaxpr.jaxpr.invars)
        inputs[0] = one_key(reader.intern("the key"))
        values = reader.jaxpr(jaxpr, inputs, [True] * len(jaxpr.jaxpr.outvars))
        return [_number(value) for value in values]


class _Reader:
    def __init__(self) -> None:
        self.ids: dict[tuple[Any, ...], int] = {}
        self.count = itertools.count()
        self.words: dict[int, int] = {}

    def new(self) -> int:
        return next(self.count)

    def intern(self, *made: Any) -> int:
        """One number for all that is made in one way."""
        if made not in self.ids:
            self.ids[made] = self.new()
        return self.ids[made]

    def jaxpr(self, jaxpr: jex.ClosedJaxpr, inputs: Sequence[Value], wanted: Sequence[bool]) -> Sequence[Value]:
        inner = jaxpr.jaxpr
        values: dict[Any, Value] = {var: self.constant(const) for var, const in zip(inner.constvars, jaxpr.consts)}
        values.update(zip(inner.invars, inputs))
        needed = {v for v, want in zip(inner.outvars, wanted) if want and not isinstance(v, jex.Literal)}
        eqns = []
        for eqn in reversed(inner.eqns):
            if needed.intersection(eqn.outvars):
                eqns.append(eqn)
                needed.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, jex.Literal) else values.get(atom, Unread("not wanted"))

        for eqn in reversed(eqns):
            values.update(zip(eqn.outvars, self.equation(eqn, [read(atom) for atom in eqn.invars], [v in needed for v in eqn.outvars])))
        return [read(atom) for atom in inner.outvars]

    def constant(self, value: Any) -> Value:
        if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
            if isinstance(value, Tracer):
                return Key(self.new())
            return self.given_key(np.asarray(jax.random.key_data(value)))
        if isinstance(value, Tracer):
            return Given(self.new())
        array = np.asarray(value)
        if np.iscomplexobj(array):
            return Unread("complex numbers")
        if _equal(array):
            return Number(unrounded(array.flat[0], array.dtype))
        few = array.size <= FEW
        return Given(self.intern("array", array.tobytes() if few else id(value)), (lambda: array) if few else None)

    def equation(self, eqn: Any, inputs: list[Value], wanted: Sequence[bool]) -> Sequence[Value]:
        name, n = eqn.primitive.name, len(eqn.outvars)
        inner = prim.called(eqn)
        if inner is not None:
            return self.jaxpr(inner, inputs, wanted)
        if name == "scan":
            return self.scan(eqn, inputs, wanted)
        if name in ("optimization_barrier", "device_put"):
            return inputs
        if name == "cond" and isinstance(inputs[0], Number):
            taken = min(max(int(inputs[0].value), 0), len(eqn.params["branches"]) - 1)
            return self.jaxpr(prim.closed(eqn.params["branches"][taken]), inputs[1:], wanted)
        lost = next((value for value in inputs if isinstance(value, Unread)), None)
        if lost is not None:
            return [lost] * n
        if any(jnp.issubdtype(var.aval.dtype, jnp.complexfloating) for var in eqn.outvars):
            return [Unread(f"{name} of complex numbers")] * n
        if name == "random_bits":
            return [self.bits(inputs[0], eqn.outvars[0].aval.dtype)]
        if name.startswith(("random_", "threefry")) or (inputs and all(isinstance(value, Key) for value in inputs)):
            return self.key(eqn, inputs)
        if any(isinstance(value, Key) for value in inputs[: 1 if name in _MOVES else None]):
            return self.key(eqn, inputs) if name in _MOVES else [Unread(f"{name} of a random key")] * n
        if name == "qr":
            return combine.decomposed(eqn, inputs)
        if all(isinstance(value, Number | Given) for value in inputs):
            return self.given(eqn, inputs)
        if any(isinstance(value, Triangle) for value in inputs):
            return [combine.with_triangle(name, inputs)] * n
        if name in _MOVES and isinstance(inputs[0], Random | Bits):
            return self.moved(eqn, inputs)
        if name in _JOINS:
            return [self.mixed(name, list(zip(inputs, eqn.invars)))]
        if name in ("scatter", "dynamic_update_slice"):
            return [self.placed(eqn, inputs)]
        return [self.entrywise(eqn, inputs)] * n

    def key(self, eqn: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        keys = [value for value in inputs if isinstance(value, Key)]
        known = name.startswith(("random_", "threefry")) or name in (*_MOVES, *_JOINS)
        # random_gamma and its like are draws of their own.
        if not known or jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return [Unread(f"{name} of a random key")] * len(eqn.outvars)
        told = str({what: value for what, value in eqn.params.items() if not hasattr(value, "eqns")})
        ids = tuple(_token(value) or self.new() for value in inputs)
        steps = frozenset().union(*(value.steps for value in inputs if isinstance(value, Key | Given)))
        made = [self.intern(name, told, i, *ids) for i in range(len(eqn.outvars))]
        arrays = [_array(value, atom.aval) for value, atom in zip(inputs, eqn.invars) if not isinstance(value, Key)]
        others = [None if array is None else np.asarray(array()) for array in arrays]
        if name in ("random_clone", "convert_element_type", "copy", "copy_p"):
            return inputs
        if name in ("random_split", "random_fold_in") and keys:
            return [ks.children(eqn, keys[0], others[0] if others else None, steps, self.intern, made[0])]
        if name == "random_unwrap" and keys:
            found = ks.words(keys[0], eqn.outvars[0].aval.shape[-1], self.intern, made[0])
            self.words.update((self.intern("word", of, i), of) for of in keys[0].whole for i in range(eqn.outvars[0].aval.shape[-1]))
            return [found]
        if name == "random_wrap":
            if keys:
                return [ks.of_words(keys[0], self.words, made[0])]
            data = others[0] if others else None
            return [Key(made[0], steps) if data is None else self.given_key(data)]
        if name in (*_MOVES, *_JOINS) and name != "pad":
            return [ks.moved(eqn, keys, others, i, n) for i, n in enumerate(made)]
        if name == "random_seed" and eqn.outvars[0].aval.shape == ():
            return [one_key(made[0])._replace(steps=steps)]
        return [Key(n, steps, any(key.repeated for key in keys)) for n in made]

    def given_key(self, data: np.ndarray) -> Key:
        """Keys that are numbers of the code."""
        rows = data.reshape(-1, data.shape[-1])
        table = np.array([self.intern("key", row.tobytes()) for row in rows]).reshape(data.shape[:-1])
        return ks.of_table(table, self.new())

    def bits(self, key: Value, dtype: Any) -> Value:
        if not isinstance(key, Key):
            return Unread("random_bits of no random key")
        size = jnp.iinfo(dtype).bits
        points = np.array([(2 * i + 1) << (size - 5) for i in range(16)], dtype)
        sources = frozenset(Source(of, (), key.steps) for of in key.whole)
        return Bits(points, self.intern("bits", key.id), sources, key.repeated)

    def given(self, eqn: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        name, n = eqn.primitive.name, len(eqn.outvars)
        if n == 1 and inputs and all(isinstance(value, Number) for value in inputs):
            numbers = [cast(Number, value).value for value in inputs]
            if name in (*prim.RESHAPING, "slice", "dynamic_slice", "gather", "copy", "copy_p", "stop_gradient", "rev", "tile", "squeeze"):
                return [inputs[0]]
            if name in (*prim.ELEMENTWISE, "convert_element_type"):
                found = in_float64(eqn, numbers)
                if found is None:
                    found = prim.fold_scalar(eqn, numbers)
                    return [Number(unrounded(found, eqn.outvars[0].aval.dtype))]
                return [Number(float(found))]
            if name in (*_JOINS, "pad") and len(set(numbers)) == 1:
                return [inputs[0]]
        few = all(math.prod(atom.aval.shape) <= FEW for atom in (*eqn.invars, *eqn.outvars))
        arrays = [_array(value, atom.aval) for value, atom in zip(inputs, eqn.invars)]
        known = [array for array in arrays if array is not None]
        steps = frozenset().union(*(value.steps for value in inputs if isinstance(value, Given)))

        @functools.cache
        def compute() -> tuple[Any, ...]:
            with jax.ensure_compile_time_eval():
                found = eqn.primitive.bind(*(array() for array in known), **eqn.params)
            return tuple(map(np.asarray, found if eqn.primitive.multiple_results else [found]))

        def part(i: int) -> Callable[[], Any] | None:
            return (lambda: compute()[i]) if few and len(known) == len(arrays) else None

        return [Given(self.intern(name, str(eqn.params), i, *map(_token, inputs)), part(i), steps) for i in range(n)]

    def moved(self, eqn: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        name, value = eqn.primitive.name, inputs[0]
        if name in ("convert_element_type", "pad"):
            parts = [(value, eqn.invars[0]), (inputs[-1], eqn.outvars[0])] if name == "pad" else []
            return [self.padded(eqn, inputs) if parts else self.entrywise(eqn, inputs)]
        repeated = name in ("broadcast_in_dim", "tile", "gather") and _grown(eqn)
        if name == "gather" and not eqn.params["unique_indices"] and eqn.invars[1].aval.shape[:-1] not in ((), (1,)):
            repeated = True
        assert isinstance(value, Random | Bits)
        found = []
        for i in range(len(eqn.outvars)):
            move = (name, str(eqn.params), i, *map(_token, inputs[1:]))
            # Other entries of one drawing are other numbers, where slices do not overlap.
            starts = [other.value if isinstance(other, Number) else None for other in inputs[1:]]
            by = ks.box(eqn, i, starts) or self.intern(*move)
            sources = frozenset(source.moved(by) for source in value.sources)
            found.append(self.elsewhere(value, move, sources, value.repeated or repeated))
        return found

    def elsewhere(self, value: Random | Bits, move: tuple[Any, ...], sources: Sources, repeated: bool) -> Value:
        """The same law; entry by entry it goes with others only where they were moved likewise."""
        if isinstance(value, Bits | Draw | Function):
            return dataclasses.replace(value, variable=self.intern(*move, value.variable), sources=sources, repeated=repeated)
        return dataclasses.replace(value, sources=sources, repeated=repeated)

    def padded(self, eqn: Any, inputs: Sequence[Value]) -> Value:
        if any(count < 0 for axis in eqn.params["padding_config"] for count in axis):
            return Unread("pad by a negative amount")
        inside, whole = (math.prod(atom.aval.shape) for atom in (eqn.invars[0], eqn.outvars[0]))
        return mixture([(inputs[0], inside), (inputs[1], whole - inside)], self.new, "pad") or Unread("pad")

    def mixed(self, name: str, parts: list[tuple[Value, Any]]) -> Value:
        return mixture([(_number(value), math.prod(atom.aval.shape)) for value, atom in parts], self.new, name) or Unread(name)

    def placed(self, eqn: Any, inputs: Sequence[Value]) -> Value:
        name = eqn.primitive.name
        at = 2 if name == "scatter" else 1
        if name == "scatter" and eqn.invars[1].aval.shape[:-1] not in ((), (1,)) and not eqn.params["unique_indices"]:
            return Unread("scatter to places that may be the same")
        inside, whole = (math.prod(eqn.invars[i].aval.shape) for i in (at, 0))
        return mixture([(_number(inputs[at]), inside), (_number(inputs[0]), whole - inside)], self.new, name) or Unread(name)

    def entrywise(self, eqn: Any, inputs: Sequence[Value]) -> Value:
        name = eqn.primitive.name
        values = [_number(value) for value in inputs]
        if any(isinstance(value, Given) for value in values):
            return Unread(f"{name} with numbers that differ from entry to entry")
        bits = [value for value in values if isinstance(value, Bits)]
        if bits:
            return self.of_bits(eqn, values) if len(bits) == 1 else Unread(f"{name} of random bits")
        if name not in (*prim.ELEMENTWISE, "convert_element_type"):
            return Unread(name)
        before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        if name == "convert_element_type" and isinstance(values[0], Draw | Function) and _half(before) and not _half(after):
            return Unread(f"drawn in {before}, in whose few levels the mean is not 0, and made {after} after that; draw in {after}")
        found = combine.entrywise(eqn, values, self.new)
        if isinstance(found, Unread):
            return found
        fewer = any(
            isinstance(value, Random) and math.prod(atom.aval.shape) < math.prod(eqn.outvars[0].aval.shape)
            for value, atom in zip(values, eqn.invars)
        )
        return dataclasses.replace(found, repeated=True) if fewer else found

    def of_bits(self, eqn: Any, values: Sequence[Value]) -> Value:
        name, after = eqn.primitive.name, eqn.outvars[0].aval.dtype
        bits = next(value for value in values if isinstance(value, Bits))
        points = [value.points if isinstance(value, Bits) else value.value for value in cast(list[Bits | Number], values)]
        if name in _BITWISE:
            found = _BITWISE[name](*(np.asarray(array).astype(after) for array in points))
        elif name == "convert_element_type":
            found = bits.points.astype(after)
        elif name == "bitcast_convert_type":
            found = bits.points.view(after)
        else:
            return Unread(f"{name} of random bits")
        if not jnp.issubdtype(after, jnp.floating):
            return dataclasses.replace(bits, points=found)
        numbers = found.astype(np.float64)
        step = (numbers[-1] - numbers[0]) / 15
        line = numbers[0] + step * np.arange(16)
        if step <= 0 or np.any(abs(numbers - line) > 4 * float(jnp.finfo(after).eps) * abs(line)):
            return Unread(f"{name} of random bits, which are then not evenly spaced")
        return Draw("uniform", bits.variable, bits.sources, float(16 * step), float(line[0] - step / 2), repeated=bits.repeated)

    def scan(self, eqn: Any, inputs: Sequence[Value], wanted: Sequence[bool]) -> Sequence[Value]:
        p, mark = eqn.params, self.new()
        body = prim.closed(p["jaxpr"])
        first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
        inside: list[Value] = list(inputs[:first])
        for i in range(first, last):
            # What a step hands on as it came stays what it was.
            kept = body.jaxpr.outvars[i - first] is body.jaxpr.invars[i]
            inside.append(inputs[i] if kept else self.carried(inputs[i], mark))
        inside += [self.sliced(value, mark) for value in inputs[last:]]
        found = self.jaxpr(body, inside, wanted)
        carry = p["num_carry"]
        return [*found[:carry], *(_stacked(value, mark, p["length"]) for value in found[carry:])]

    def carried(self, value: Value, mark: int) -> Value:
        if isinstance(value, Key):
            made = self.new()
            return Key(made, value.steps | {mark}, value.repeated, covers=value.whole | {made})
        if isinstance(value, Number | Given):
            return Given(self.new(), steps=frozenset({mark}))
        return value if isinstance(value, Unread) else Unread("scan, which carries it from step to step")

    def sliced(self, value: Value, mark: int) -> Value:
        if isinstance(value, Key):
            return Key(self.intern("step", mark, value.id), value.steps | {mark}, value.repeated, covers=value.whole)
        if isinstance(value, Random | Bits):
            sources = frozenset(source._replace(steps=source.steps | {mark}).moved(("step", mark)) for source in value.sources)
            return self.elsewhere(value, ("step", mark), sources, value.repeated)
        return Given(self.new(), steps=value.steps | {mark}) if isinstance(value, Given) else value


def _token(value: Value) -> tuple[str, Any] | None:
    """What equal numbers and keys have in common, and no others; `None` of what is random."""
    if isinstance(value, Number):
        return "number", value.value
    return (type(value).__name__, value.id) if isinstance(value, Key | Given) else None


def _stacked(value: Value, mark: int, length: int) -> Value:
    """What the steps of a scan made, side by side."""
    if isinstance(value, Random | Bits):
        again = length > 1 and any(mark not in source.steps for source in value.sources)
        sources = frozenset(source.moved(("stacked", mark)) for source in value.sources)
        return dataclasses.replace(value, sources=sources, repeated=value.repeated or again)
    if isinstance(value, Key):
        return Key(value.id, value.steps, value.repeated or (length > 1 and mark not in value.steps), covers=value.whole)
    return value._replace(array=None) if isinstance(value, Given) and length > 1 else value


def _equal(array: np.ndarray) -> bool:
    return array.size > 0 and bool(np.all(array == array.flat[0]) or np.all(array != array))


def _grown(eqn: Any) -> bool:
    return math.prod(eqn.outvars[0].aval.shape) > math.prod(eqn.invars[0].aval.shape)


def _array(value: Value, aval: Any) -> Callable[[], Any] | None:
    if isinstance(value, Number):
        number = value.value
        return lambda: np.broadcast_to(np.asarray(number).astype(aval.dtype), aval.shape)
    return value.array if isinstance(value, Given) else None


def _number(value: Value) -> Value:
    """Of few given numbers that turn out to be equal, the one number."""
    if not isinstance(value, Given) or value.array is None:
        return value
    array = np.asarray(value.array())
    return Number(unrounded(array.flat[0], array.dtype)) if _equal(array) else value


def _half(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize == 2
