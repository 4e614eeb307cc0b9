"""Equations by number: equal numbers where two equations are the same but for the values they read."""

import functools
import types
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Trace, Tracer
from jax.extend import core as jex

_BIGGEST_COMPARED = 1 << 16
"""Constants inside equations with more entries than this are the same only if they are the same array."""


class Numbers:
    """Numbers for structures, the same for equal ones, for as long as the jaxprs they come from live.

    Two equations are equal if primitive, parameters, context and the types of what they read and write are. Jaxprs among the
    parameters are compared equation by equation with their wiring, and derivative rules by the code and the contents of their closures:
    each traced call of a `jax.custom_jvp` function makes functions of its own.

    Examples
    --------
    >>> jaxpr = jax.make_jaxpr(lambda x: jax.nn.relu(jax.nn.relu(x)) + x)(1.0)
    >>> numbers = Numbers()
    >>> first, second, sum = (numbers.equation(eqn) for eqn in jaxpr.eqns)
    >>> first == second, second == sum
    (True, False)
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, tuple[Any, Hashable]] = {}
        self._open: dict[int, int] = {}
        self._outmost = 0

    def of(self, key: Hashable) -> int:
        """The number of a key."""
        return self._numbers.setdefault(key, len(self._numbers))

    def equation(self, eqn: Any) -> int:
        """The number of an equation. One with effects equals no other."""
        if eqn.effects:
            return self.of(("effect", self._once(eqn)))
        params = tuple((name, self._key(eqn.params[name])) for name in sorted(eqn.params))
        read, written = tuple(v.aval for v in eqn.invars), tuple(v.aval for v in eqn.outvars)
        return self.of((eqn.primitive, id(eqn.ctx), params, read, written))

    def literal(self, literal: Any) -> int:
        """The number of a literal: by its bits and type."""
        return self.of(("literal", literal.aval, self._key(np.asarray(literal.val) if not _is_key(literal.val) else literal.val)))

    def _once(self, value: Any) -> Hashable:
        # Held, so that no other object gets its id.
        return self._known.setdefault(id(value), (value, ("object", id(value))))[1]

    def _key(self, value: Any) -> Hashable:
        if value is None or isinstance(value, bool | int | str | bytes | np.dtype):
            return type(value), value
        if isinstance(value, float | complex):
            return type(value), repr(value)
        if isinstance(value, tuple | list):
            return type(value), tuple(self._key(v) for v in value)
        if isinstance(value, dict):
            return dict, tuple((self._key(k), self._key(v)) for k, v in value.items())
        if id(value) in self._known:
            return self._known[id(value)][1]
        depth = len(self._open)
        if id(value) in self._open:  # A rule whose closure holds the function it is the rule of.
            self._outmost = min(self._outmost, self._open[id(value)])
            return "up", depth - self._open[id(value)]
        before, self._outmost, self._open[id(value)] = self._outmost, depth, depth
        contents = self._contents(value)
        del self._open[id(value)]
        if self._outmost >= depth:  # Else it depends on where it was reached from.
            self._known[id(value)] = value, contents
        self._outmost = min(before, self._outmost)
        return contents

    def _contents(self, value: Any) -> Hashable:
        if isinstance(value, jex.ClosedJaxpr):
            return self.of(("jaxpr", self._jaxpr(value.jaxpr), tuple(self._key(c) for c in value.consts)))
        if isinstance(value, jex.Jaxpr):
            return self.of(("jaxpr", self._jaxpr(value), ()))
        if isinstance(value, Tracer):
            return "object", id(value)
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            here = not isinstance(value, jax.Array) or value.is_fully_addressable
            if value.size > _BIGGEST_COMPARED or _is_key(value) or not here:
                return "object", id(value)
            return "array", value.dtype, value.shape, np.asarray(value).tobytes()
        if isinstance(value, functools.partial):
            return functools.partial, self._key(value.func), self._key(value.args), self._key(value.keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType, self._key(value.__func__), self._key(value.__self__)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if hasattr(value, "call_wrapped") and hasattr(value, "transforms"):
            return type(value), self._key(value.f), self._key(value.transforms), self._key(value.params)
        if isinstance(value, jax.custom_jvp | jax.custom_vjp):
            return type(value), self._key(vars(value))
        if type(value).__module__ == "jax._src.util" and hasattr(value, "val"):  # JAX's box around static arguments.
            return type(value), self._key(value.val)
        try:
            hash(value)
        except TypeError:
            return "object", id(value)
        return type(value), value

    def _function(self, f: types.FunctionType) -> Hashable:
        own = f.__module__ is not None and f.__module__.startswith("jax._src")
        cells = []
        for cell in f.__closure__ or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # Empty: a name not yet given.
                cells.append("empty")
                continue
            # JAX's memory of what a rule gave, the trace it was made in: what a rule gives does not depend on them.
            name = type(inside).__name__
            if own and (isinstance(inside, dict | Trace) or type(inside) is object or name in ("Store", "EqualStore")):
                cells.append(type(inside))
            else:
                cells.append(self._key(inside))
        return f.__code__, self._key(f.__defaults__), self._key(f.__kwdefaults__), tuple(cells), id(f.__globals__)

    def _jaxpr(self, jaxpr: jex.Jaxpr) -> Hashable:
        places: dict[Any, int] = {}

        def atoms(read: Sequence[Any]) -> tuple[Hashable, ...]:
            return tuple(("literal", self.literal(v)) if isinstance(v, jex.Literal) else places[v] for v in read)

        for var in (*jaxpr.constvars, *jaxpr.invars):
            places[var] = len(places)
        lines = []
        for eqn in jaxpr.eqns:
            lines.append((self.equation(eqn), atoms(eqn.invars)))
            for var in eqn.outvars:
                places[var] = len(places)
        given = tuple(v.aval for v in (*jaxpr.constvars, *jaxpr.invars))
        return given, tuple(lines), atoms(jaxpr.outvars)


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(getattr(value, "dtype", np.dtype(bool)), jax.dtypes.extended)
