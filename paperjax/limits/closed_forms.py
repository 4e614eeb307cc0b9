"""Duals in closed form."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Real

from paperjax.limits.arcsine import root_and_arcsine

Covariance = Real[ArrayLike, "..."]


class Dual(NamedTuple):
    """The dual of an activation phi: expectations over ``(u, v) ~ N(0, [[k11, k12], [k12, k22]])``.

    Each is a function of ``(k11, k12, k22)``: floating-point arrays that broadcast against each other, such as (N, 1), (N, M) and
    (1, M), or Python numbers. The result has their dtype. Float64 is advised: in float32, where |k12| comes within rounding of
    ``sqrt(k11 k22)`` and is not equal to it, the derivative of the dual of a function with a kink is off by the root of the rounding,
    1e-4; see `correlation`.

    Attributes
    ----------
    value
        ``E[phi(u) phi(v)]``.
    derivative
        ``E[phi'(u) phi'(v)]`` with the derivative almost everywhere, which is what a network trains by. Where phi is continuous it is
        ``d value / d k12`` (Price 1958).
    error
        Estimate of the absolute error of the two, the larger one; 0 for a closed form, whose error is rounding.
    name
        Of phi.

    Raises
    ------
    ValueError
        From each of the functions, if a variance is negative, ``k12² > k11 k22`` beyond rounding, or a number is not finite. Traced
        arrays cannot be looked at; there the correlation is cut to [-1, 1].
    TypeError
        If a number is complex.

    Examples
    --------
    >>> relu.value(1.0, 1.0, 1.0), relu.derivative(1.0, 1.0, 1.0)
    (Array(0.5, dtype=float32), Array(0.5, dtype=float32))
    """

    value: Callable[[Covariance, Covariance, Covariance], Float[Array, "..."]]
    derivative: Callable[[Covariance, Covariance, Covariance], Float[Array, "..."]]
    error: Callable[[Covariance, Covariance, Covariance], Float[Array, "..."]]
    name: str

    def __repr__(self) -> str:
        return f"<dual of {self.name}>"


Formula = Callable[[Array, Array, Array], Array]


def checked(formula: Formula) -> Callable[[Covariance, Covariance, Covariance], Float[Array, "..."]]:
    """A formula of three floating-point arrays of one dtype, behind the checks of `Dual`."""

    def call(k11: Covariance, k12: Covariance, k22: Covariance) -> Float[Array, "..."]:
        given = [jnp.asarray(k) for k in (k11, k12, k22)]
        if any(jnp.issubdtype(k.dtype, jnp.complexfloating) for k in given):
            raise TypeError("dual: a covariance is complex. Give the covariances of real pre-activations.")
        with_dtype = [k for k in given if jnp.issubdtype(k.dtype, jnp.floating) and not k.weak_type] or [jnp.zeros(())]
        ks = [k.astype(jnp.result_type(*with_dtype)) for k in given]
        check_covariances(*ks)
        return formula(*ks)

    return call


def check_covariances(k11: Array, k12: Array, k22: Array) -> None:
    """Refuse three numbers that are no covariance matrix; traced ones pass.

    Raises
    ------
    ValueError
        Saying which of the three, and its worst value.
    """
    if any(isinstance(k, Tracer) for k in (k11, k12, k22)):
        return
    for name, k in (("k11", k11), ("k12", k12), ("k22", k22)):
        if not np.all(np.isfinite(k)):
            raise ValueError(f"dual: {name} holds a NaN or an infinity. Inputs with missing values, or an overflow in a layer below?")
        if name != "k12" and np.any(np.asarray(k) < 0):
            raise ValueError(f"dual: {name} has an entry {float(np.min(k))}, but it is a variance, at least 0. Are k11 and k12 swapped?")
    wide = [np.asarray(k, np.float64) for k in (k11, k12, k22)]
    room = float(jnp.finfo(k12.dtype).eps) ** 0.5
    excess = np.abs(wide[1]) - (1 + room) * np.sqrt(wide[0]) * np.sqrt(wide[2])
    if np.any(excess > 0):
        raise ValueError(
            f"dual: |k12| exceeds sqrt(k11 k22) by {float(np.max(excess)):.3g}, so no Gaussian pair has these covariances. The arguments "
            "are (k11, k12, k22), variances first and last, of shapes such as (N, 1), (N, M), (1, M)."
        )


def closed_form(name: str, value: Formula, derivative: Formula) -> Dual:
    """A `Dual` from two formulas.

    Examples
    --------
    >>> closed_form("h -> 1 + h", lambda k11, k12, k22: 1 + k12, lambda k11, k12, k22: jnp.ones_like(k12)).value(1.0, 0.5, 1.0)
    Array(1.5, dtype=float32)
    """
    return Dual(checked(value), checked(derivative), checked(_nothing), name)


def _nothing(k11: Array, k12: Array, k22: Array) -> Array:
    return jnp.zeros_like(k11 + k12 + k22)


NEAR = 4
"""Roundings of the dtype to which a correlation is taken to be 1; see `correlation`."""


def correlation(k11: Array, k12: Array, k22: Array) -> tuple[Array, Array, Array]:
    """``sqrt(k11 k22)``, ``sqrt(1 - rho²)`` and ``(2/pi) arcsin(rho)``, with gradient 0 where they have none: rho = ±1, zero variance.

    In ``sqrt(1 - rho²) + rho arcsin(rho)`` the infinite parts of the last two gradients cancel, so 0 for each is right there.

    Rounding leaves the rho of equal inputs off 1 by some units, and its arcsine off by the root of that, differently for each pair of
    three equal inputs, so that their kernel has a negative eigenvalue of 1e-4 in float32. So rho is stretched by `NEAR` units and
    cut at ±1: equal inputs have an arcsine of exactly ±pi/2, and the others stay within their own rounding.
    """
    # What is of one example alone stays so: of pairs there are many more. One root for all uses, which XLA then computes once.
    r1, r2 = (jax.lax.rsqrt(jnp.where(k > 0, k, jnp.full_like(k, jnp.inf))) for k in (k11, k22))
    rho = k12 * (r1 * (1 + NEAR * float(jnp.finfo(k12.dtype).eps))) * r2
    root, angle = root_and_arcsine(rho)
    return (k11 * r1) * (k22 * r2), root, (2 / math.pi) * angle


def piecewise_linear(positive: Real[ArrayLike, ""], negative: Real[ArrayLike, ""]) -> Dual:
    """Dual of ``phi(h) = positive · h`` for h > 0 and ``negative · h`` below: ReLU is (1, 0), the absolute value (1, -1).

    With ``phi(h) = c h + d |h|``, c and d half the sum and half the difference of the slopes,

        ``E phi phi = c² k12 + d² (2/pi) sqrt(k11 k22) (sqrt(1 - rho²) + rho arcsin rho)``,  ``E phi' phi' = c² + d² (2/pi) arcsin rho``,

    which for ReLU are half the arc-cosine kernels of degree 1 and 0 (Cho and Saul, NIPS 2009, Section 2).

    At correlation ±1 and at zero variance values and gradients are finite. At ±1 the gradient of `value` is right, and that of
    `derivative`, which is infinite, is taken as 0. phi'(0) is the mean of the slopes.

    Parameters
    ----------
    positive, negative
        The slopes; they may be traced.

    Examples
    --------
    A ReLU that keeps the second moment:

    >>> piecewise_linear(2**0.5, 0.0).value(1.0, 1.0, 1.0).round(6)
    Array(1., dtype=float32)
    """

    def parts(dtype: jnp.dtype) -> tuple[Array, Array]:
        p, n = (jnp.asarray(slope).astype(dtype) for slope in (positive, negative))
        return jnp.square((p + n) / 2), jnp.square((p - n) / 2)

    def value(k11: Array, k12: Array, k22: Array) -> Array:
        scale, root, fraction = correlation(k11, k12, k22)
        odd, even = parts(k12.dtype)
        return odd * k12 + even * (scale * root * (2 / math.pi) + k12 * fraction)

    def derivative(k11: Array, k12: Array, k22: Array) -> Array:
        odd, even = parts(k12.dtype)
        return odd + even * correlation(k11, k12, k22)[2]

    return closed_form("piecewise_linear", value, derivative)


def leaky_relu(slope: Real[ArrayLike, ""]) -> Dual:
    """Dual of ``phi(h) = max(h, 0) + slope · min(h, 0)``; see `piecewise_linear`.

    Examples
    --------
    >>> leaky_relu(0.5).value(1.0, 1.0, 1.0)  # (1 + 0.25) / 2
    Array(0.625, dtype=float32)
    """
    return piecewise_linear(1.0, slope)._replace(name="leaky_relu")


def polynomial(coefficients: Sequence[float] | Real[ArrayLike, "terms"]) -> Dual:
    """Dual of ``phi(h) = sum_i c_i h^i``, the constant term first.

    From the Hermite coefficients at either variance, ``a_r(k) = sum_i c_i binom(i, r) (i - r - 1)!! k^((i - r)/2)`` over i - r even,

        ``E phi(u) phi(v) = sum_r r! a_r(k11) a_r(k22) k12^r``

    (Mehler's formula). Exact, with finite gradients everywhere.

    Parameters
    ----------
    coefficients
        ``c_0, c_1, ...``; they may be traced. Moments grow as factorials: float32 overflows near degree 30.

    Raises
    ------
    ValueError
        If there is no coefficient.

    Examples
    --------
    The fourth moment of a Gaussian is 3:

    >>> polynomial([0.0, 0.0, 1.0]).value(1.0, 1.0, 1.0)
    Array(3., dtype=float32)
    """
    c = list(coefficients)  # type: ignore[arg-type]
    if not c:
        raise ValueError("polynomial: no coefficients. Give c_0, c_1, ..., the constant term first.")
    slopes = [i * c_i for i, c_i in enumerate(c)][1:] or [0.0]
    return closed_form("polynomial", lambda *k: mehler(c, c, *k), lambda *k: mehler(slopes, slopes, *k))


def monomial(degree: int) -> Dual:
    """Dual of ``phi(h) = h^degree``; see `polynomial`.

    Raises
    ------
    ValueError
        If `degree` is negative.

    Examples
    --------
    >>> monomial(3).value(1.0, 0.5, 1.0)  # 6 rho^3 + 9 rho
    Array(5.25, dtype=float32)
    """
    if degree < 0:
        raise ValueError(f"monomial: degree = {degree}, and E u^{degree} is infinite. Give a degree of at least 0.")
    return polynomial([0.0] * degree + [1.0])._replace(name=f"h^{degree}")


def mehler(c: Sequence, d: Sequence, k11: Array, k12: Array, k22: Array) -> Array:
    """``E p(u) q(v)`` of the polynomials with coefficients c and d, the constant first; see `polynomial`.

    Examples
    --------
    >>> mehler([0.0, 1.0], [1.0, 2.0], jnp.ones(()), jnp.full((), 0.5), jnp.ones(()))
    Array(1., dtype=float32)
    """

    def hermite(c: Sequence[Real[ArrayLike, ""]], r: int, k: Array) -> Array:
        # (m - 1)!! = m! / (2^(m/2) (m/2)!) for even m = i - r; powers from the highest down, as Horner's.
        total = jnp.zeros((), k.dtype)
        for i in range(len(c) - 1 - (len(c) - 1 - r) % 2, r - 1, -2):
            half = (i - r) // 2
            weight = math.comb(i, r) * math.factorial(i - r) / (2**half * math.factorial(half))
            term = jnp.asarray(c[i]).astype(k.dtype) * weight
            total = term if i + 2 >= len(c) else total * k + term
        return total

    def nothing(c: Sequence, r: int) -> bool:
        return all(isinstance(a, (int, float)) and a == 0 for a in c[r::2])

    total = None
    for r in range(min(len(c), len(d)) - 1, -1, -1):
        total = None if total is None else total * k12
        if not (nothing(c, r) or nothing(d, r)):
            term = math.factorial(r) * 1.0 * hermite(c, r, k11) * hermite(d, r, k22)
            total = term if total is None else total + term
    return jnp.broadcast_to(jnp.zeros((), k12.dtype) if total is None else total, jnp.broadcast_shapes(k11.shape, k12.shape, k22.shape))


def _shrinkage(k11: Array, k12: Array, k22: Array) -> Array:
    """``det(1 + K)``, which is at least 1; large variances in low precision would make it negative."""
    determinant = 1 + k11 + k22 + (k11 * k22 - k12 * k12)
    return jnp.where(determinant < 1, jnp.ones_like(determinant), determinant)


def _erf_value(k11: Array, k12: Array, k22: Array) -> Array:
    # arcsin(r) as arctan(r / sqrt(1 - r²)): no rounding takes this argument out of the domain.
    return (2 / math.pi) * jnp.arctan(2 * k12 / jnp.sqrt(_shrinkage(2 * k11, 2 * k12, 2 * k22)))


def _erf_derivative(k11: Array, k12: Array, k22: Array) -> Array:
    return (4 / math.pi) / jnp.sqrt(_shrinkage(2 * k11, 2 * k12, 2 * k22))


def _gelu_parts(k11: Array, k12: Array, k22: Array) -> tuple[Array, Array, Array, Array]:
    """``E Phi(u) Phi(v)``, ``det(1 + K)``, the density ``E Phi'(u) Phi'(v) = det(1 + K)^-1/2 / 2 pi``, and ``sum 1 / (1 + k)``."""
    shrinkage = _shrinkage(k11, k12, k22)
    both = 0.25 + jnp.arctan(k12 / jnp.sqrt(shrinkage)) / (2 * math.pi)
    return both, shrinkage, 1 / (2 * math.pi * jnp.sqrt(shrinkage)), 1 / (1 + k11) + 1 / (1 + k22)


def _gelu_value(k11: Array, k12: Array, k22: Array) -> Array:
    both, _, density, shrunk = _gelu_parts(k11, k12, k22)
    return k12 * both + density * (k11 * k22 - k12 * k12 + k12 * k12 * shrunk)


def _gelu_derivative(k11: Array, k12: Array, k22: Array) -> Array:
    both, shrinkage, density, shrunk = _gelu_parts(k11, k12, k22)
    return both + density * k12 * (shrunk + 1 / shrinkage)


def _sin_value(k11: Array, k12: Array, k22: Array) -> Array:
    # exp(-m) sinh(k12): the second form loses small k12, the first overflows for large.
    mean = (k11 + k22) / 2
    small = jnp.abs(k12) < 1
    sinh = jnp.sinh(jnp.where(small, k12, jnp.zeros_like(k12)))
    return jnp.where(small, jnp.exp(-mean) * sinh, (jnp.exp(k12 - mean) - jnp.exp(-k12 - mean)) / 2)


def _cos_value(k11: Array, k12: Array, k22: Array) -> Array:
    mean = (k11 + k22) / 2
    return (jnp.exp(k12 - mean) + jnp.exp(-k12 - mean)) / 2


def _exp_value(k11: Array, k12: Array, k22: Array) -> Array:
    return jnp.exp((k11 + k22) / 2 + k12)


identity = polynomial([0.0, 1.0])._replace(name="identity")
"""Dual of ``phi(h) = h``: ``k12`` and 1."""

relu = piecewise_linear(1.0, 0.0)._replace(name="relu")
"""Dual of ``phi(h) = max(h, 0)``; see `piecewise_linear`."""

absolute = piecewise_linear(1.0, -1.0)._replace(name="absolute")
"""Dual of ``phi(h) = |h|``; see `piecewise_linear`."""

sign = closed_form("sign", lambda *k: correlation(*k)[2], _nothing)
"""Dual of the sign: ``(2/pi) arcsin rho`` (Sheppard 1899), and 0, the derivative almost everywhere: weights below a sign do not
train. With delta functions it is ``(2/pi) / sqrt(k11 k22 - k12²)``, which is ``d value / d k12``."""

step = closed_form("step", lambda *k: (1 + correlation(*k)[2]) / 4, _nothing)
"""Dual of the step from 0 to 1, 1/2 at 0: ``1/4 + arcsin(rho) / 2 pi``, and 0 as for `sign`."""

erf = closed_form("erf", _erf_value, _erf_derivative)
"""Dual of the error function: ``(2/pi) arcsin(2 k12 / sqrt((1 + 2 k11)(1 + 2 k22)))`` (Williams, NIPS 1996, eq. 11), and
``(4/pi) / sqrt(det(1 + 2 K))``."""

gelu = closed_form("gelu", _gelu_value, _gelu_derivative)
"""Dual of ``h Phi(h)``, Phi the normal distribution function: the exact GELU, ``jax.nn.gelu(h, approximate=False)``. With
``D = det(1 + K)^-1/2 / 2 pi`` and ``E = 1/4 + arcsin(k12 / sqrt((1 + k11)(1 + k22))) / 2 pi``,

    ``E phi phi = k12 E + D (k11 k22 - k12² + k12² (1/(1 + k11) + 1/(1 + k22)))``,
    ``E phi' phi' = E + D k12 (1/(1 + k11) + 1/(1 + k22) + 1/det(1 + K))``

(by Stein's lemma; the first is the kernel of Tsuchida et al., arXiv 2002.08517)."""

sin = closed_form("sin", _sin_value, _cos_value)
"""Dual of the sine: ``exp(-(k11 + k22)/2) sinh k12``, and that of the cosine."""

cos = closed_form("cos", _cos_value, _sin_value)
"""Dual of the cosine: ``exp(-(k11 + k22)/2) cosh k12``, and that of the sine."""

exp = closed_form("exp", _exp_value, _exp_value)
"""Dual of the exponential: ``exp((k11 + k22)/2 + k12)``, twice."""
