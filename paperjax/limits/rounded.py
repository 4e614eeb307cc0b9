"""The numbers that a jaxpr computes with, in float64: read back from their float32 roundings, and worked with entry by entry."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from paperjax.limits.sampled import UFUNCS

# Of a standard normal cut at two of its standard deviations: the std by which variance_scaling divides (jax.nn.initializers).
TRUNCATED_STD = 0.87962566103423978
_NAMED = (math.sqrt(2), TRUNCATED_STD)


def unrounded(value: Any, dtype: Any) -> float:
    """The simplest number that rounds to `value` in `dtype`.

    It is p / q or its square root with p q at most ``1 / (16 eps)``, a decimal two digits short of the dtype's, or the std of the normal
    cut at ±2; where none of them rounds to it, one of the first with p q at most ``1 / (64 eps)`` that rounds to a neighbour of it, as
    what a float32 division left; else the value itself. Float64 numbers and whole ones are themselves.

    Parameters
    ----------
    value
        One number.
    dtype
        In which it is written.

    Examples
    --------
    >>> [unrounded(np.float32(number), np.float32) for number in (1 / 3, 2**0.5, 0.0213)]
    [0.3333333333333333, 1.4142135623730951, 0.0213]
    """
    x = float(value)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits == 64 or x == 0 or not math.isfinite(x):
        return x
    eps, size = float(jnp.finfo(dtype).eps), abs(x)
    half = eps * 2.0 ** (math.frexp(size)[1] - 2)
    decimal = float(f"{size:.{max(1, int(-math.log10(eps)))}g}")
    rounding = [c for c in (*_NAMED, *_simple(size, half, 1 / (16 * eps)), decimal) if float(np.asarray(c).astype(dtype)) == size]
    return math.copysign((rounding or _simple(size, 3 * half, 1 / (64 * eps)) or [size])[0], x)


def _simple(size: float, half: float, bound: float) -> list[float]:
    """Of fractions and of roots of fractions within `half` of a number the simplest, if numerator times denominator is in bounds."""
    found = []
    for power in (1, 2):
        simple = _simplest(Fraction(size - half) ** power, Fraction(size + half) ** power)
        if simple.numerator * simple.denominator <= bound:
            found.append(float(simple) ** (1 / power))
    return found


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of least denominator between two positive ones, from their continued fractions."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(max(whole, 1))
    floor = low.numerator // low.denominator
    return floor + 1 / _simplest(1 / (high - floor), 1 / (low - floor))


# Without those that have a pole at a number that a draw may come near to: there a variance need not exist.
_FLOAT64 = {
    name: UFUNCS[name]
    for name in (
        "abs", "add", "add_any", "and", "cbrt", "ceil", "cos", "cosh", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
        "ge", "gt", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "neg", "not", "or", "pow", "rsqrt", "select_n", "sign",
        "sin", "sinh", "sqrt", "square", "sub", "tanh",
    )
}  # fmt: skip


def in_float64(eqn: Any, values: Sequence[Any]) -> Any:
    """An elementwise primitive of float64 numbers or arrays of one shape; `None` where it is not one of those known here."""
    name, before, after = eqn.primitive.name, eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    with np.errstate(all="ignore"):
        if name == "convert_element_type":
            if jnp.issubdtype(after, jnp.floating):
                return np.asarray(values[0], np.float64)
            return np.trunc(values[0]) if after != np.bool_ else np.asarray(values[0]) != 0
        if name == "integer_pow":
            return np.power(np.asarray(values[0], np.float64), float(eqn.params["y"]))
        if name == "clamp":
            return np.minimum(np.maximum(values[0], values[1]), values[2])
        whole = not jnp.issubdtype(after, jnp.floating) and after != np.bool_
        logical = name in ("and", "or", "not") and before != np.bool_
        if name not in _FLOAT64 or logical or (whole and name not in ("abs", "add", "max", "min", "mul", "neg", "select_n", "sign", "sub")):
            return None
        return _FLOAT64[name](*values)
