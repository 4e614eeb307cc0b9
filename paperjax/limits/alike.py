"""Whether two programs are one but for the rounding of their numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

ROUNDING = 1e-12
"""Difference of two numbers, relative, that rounding makes of one; a kernel must not change with the width by more than 1e-6."""


def alike(one: jex.ClosedJaxpr, other: jex.ClosedJaxpr) -> bool:
    """Whether the same equations are wired alike, and what they make of the same arguments differs by rounding.

    The numbers in them may differ where that cancels, as in ``(n x) / n``: of each value the factor is followed by which it is another in
    the second program, through products, quotients, powers and what is linear; elsewhere it must be 1. Functions among the parameters of
    an equation, such as the derivatives that belong to it, are not looked at.

    Examples
    --------
    >>> f = lambda n, m: jax.make_jaxpr(lambda x: n * x / m)(1.0)
    >>> alike(f(3 * 0.1, 2.0), f(0.3, 2.0)), alike(f(8.0, 2.0), f(4.0, 1.0)), alike(f(8.0, 2.0), f(4.0, 2.0))
    (True, True, False)
    """
    if len(one.consts) != len(other.consts) or not all(map(_same_numbers, one.consts, other.consts)):
        return False
    return _same_results(one.jaxpr, other.jaxpr)


def _same_results(one: jex.Jaxpr, other: jex.Jaxpr) -> bool:
    factors = _factors(one, other)
    return factors is not None and all(factor in (1.0, ZERO) for factor in factors)


ZERO = 0.0
"""In place of the factor of what is 0 in both."""

LINEAR = ("neg", "reshape", "transpose", "broadcast_in_dim", "reduce_sum", "squeeze", "expand_dims", "slice", "copy", "copy_p")


def _factors(one: jex.Jaxpr, other: jex.Jaxpr) -> list[float] | None:
    """Of the results, if the arguments are the same; ``None`` if the programs are not alike."""
    numbers: tuple[dict[Any, int], dict[Any, int]] = {}, {}
    factors: list[float] = []

    def bind(names: Sequence[Any], others: Sequence[Any], by: float) -> bool:
        if len(names) != len(others) or any(_form(a) != _form(b) for a, b in zip(names, others)):
            return False
        for a, b in zip(names, others):
            numbers[0][a] = numbers[1][b] = len(factors)
            factors.append(by)
        return True

    def read(a: Any, b: Any) -> float | None:
        literal = [isinstance(v, jex.Literal) for v in (a, b)]
        if any(literal):
            return _factor(a.val, b.val) if all(literal) and _form(a) == _form(b) else None
        return factors[numbers[0][a]] if numbers[0][a] == numbers[1][b] else None

    def read_all(names: Sequence[Any], others: Sequence[Any]) -> list[float] | None:
        found = [read(a, b) for a, b in zip(names, others)]
        return None if len(names) != len(others) or None in found else [f for f in found if f is not None]

    if not bind([*one.constvars, *one.invars], [*other.constvars, *other.invars], 1.0) or len(one.eqns) != len(other.eqns):
        return None
    for a, b in zip(one.eqns, other.eqns):
        given = read_all(a.invars, b.invars)
        if a.primitive is not b.primitive or a.params.keys() != b.params.keys() or given is None:
            return None
        by = _through(a, given)
        if by is None or not all(_same(value, b.params[key]) for key, value in a.params.items()) or not bind(a.outvars, b.outvars, by):
            return None
    return read_all(one.outvars, other.outvars)


def _factor(a: Any, b: Any) -> float | None:
    """Of two numbers."""
    if np.shape(a) == () and np.shape(b) == () and np.asarray(a).dtype.kind == "f" == np.asarray(b).dtype.kind:
        a, b = float(a), float(b)
        if a == b == 0:
            return ZERO
        return _rounded(b / a) if a and b and np.isfinite(a) and np.isfinite(b) else 1.0 if _same_numbers(a, b) else None
    return 1.0 if _same_numbers(a, b) else None


def _rounded(factor: float) -> float:
    return 1.0 if abs(factor - 1) <= ROUNDING else factor


def _through(eqn: Any, given: Sequence[float]) -> float | None:
    """The factor of what an equation makes, by those of its operands; ``None`` if it is not known."""
    name = eqn.primitive.name
    if all(f in (1.0, ZERO) for f in given) and name not in ("mul", "div", "add", "add_any", "sub", *LINEAR):
        return 1.0
    if name in ("mul", "dot_general"):
        return _rounded(given[0] * given[1])
    if name == "div" and given[1]:
        return _rounded(given[0] / given[1])
    if name in ("add", "add_any", "sub"):
        some = {f for f in given if f != ZERO}
        return None if len(some) > 1 else next(iter(some), ZERO)
    if name in LINEAR or (name == "convert_element_type" and eqn.outvars[0].aval.dtype.kind == "f"):
        return given[0]
    power = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "integer_pow": eqn.params.get("y")}.get(name)
    return _rounded(given[0] ** power) if power is not None and given[0] > 0 else None


def _same_numbers(a: Any, b: Any) -> bool:
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return isinstance(b, jax.Array) and b.dtype == a.dtype and _same_numbers(jax.random.key_data(a), jax.random.key_data(b))
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    return bool(np.allclose(a, b, rtol=ROUNDING, atol=0.0, equal_nan=True))


def _form(v: Any) -> tuple[Any, ...]:
    return v.aval.shape, v.aval.dtype


def _same(a: Any, b: Any) -> bool:
    """Of two parameters of an equation."""
    if isinstance(a, jex.ClosedJaxpr) and isinstance(b, jex.ClosedJaxpr):
        return alike(a, b)
    if isinstance(a, jex.Jaxpr) and isinstance(b, jex.Jaxpr):
        return _same_results(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (float, np.ndarray, np.generic, jax.Array)):
        return _same_numbers(a, b)
    return isinstance(a, Callable) or bool(a == b)
