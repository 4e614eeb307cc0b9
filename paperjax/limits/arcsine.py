"""The arcsine by a polynomial, which XLA makes a few vector instructions of; its own goes by an arctangent of two arguments."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TERMS = {4: 8, 8: 15}
"""Terms of ``arcsin(s) / s`` in ``s²`` on [0, 1/4], by bytes of the dtype. The nearest singularity is at 1, so that each is worth a
factor of 13.9, and these leave less than rounding."""

SINGLE = 9
"""Terms of ``arccos(s) / sqrt(1 - s)`` on [0, 1], which leave 4e-9."""


@functools.cache
def coefficients(terms: int) -> tuple[float, ...]:
    """Of the interpolation of ``arcsin(sqrt(t)) / sqrt(t)`` at the Chebyshev points of [0, 1/4], the constant first.

    In rational numbers, from ``sum_n binom(2n, n) t^n / (4^n (2n + 1))``: those of a fit in double precision are rounding.

    Examples
    --------
    >>> [round(c, 6) for c in coefficients(15)[:3]]  # 1, 1/6, 3/40
    [1.0, 0.166667, 0.075]
    """
    points = [Fraction(math.cos(math.pi * (k + 0.5) / terms) / 8 + 0.125) for k in range(terms)]
    series = [Fraction(math.comb(2 * n, n), 4**n * (2 * n + 1)) for n in range(36)]
    # Newton's divided differences, and his polynomial in powers of t from the last one down.
    differences = [sum((c * t**n for n, c in enumerate(series)), Fraction(0)) for t in points]
    for order in range(1, terms):
        for k in range(terms - 1, order - 1, -1):
            differences[k] = (differences[k] - differences[k - 1]) / (points[k] - points[k - order])
    found: list[Fraction] = []
    for difference, t in zip(reversed(differences), reversed(points)):
        found = [a - t * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)])]
        found[0] += difference
    return tuple(map(float, found))


@jax.custom_jvp
def arcsine(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``arcsin x`` for -1 <= x <= 1, to rounding; NaN beyond, or elsewhere than in single and double precision what `jax.numpy.arcsin` is.

    Beyond 1/2 it is ``pi/2 - 2 arcsin sqrt((1 - x) / 2)``. The derivative is ``((1 - x)(1 + x))^-1/2``.

    Examples
    --------
    >>> arcsine(jnp.array([0.0, -0.5, 1.0])).round(6).tolist()
    [0.0, -0.523598..., 1.57079...]
    """
    terms = TERMS.get(x.dtype.itemsize)
    if terms is None:
        return jnp.arcsin(x)
    size = jnp.abs(x)
    large = size > 0.5
    t = jnp.where(large, (1 - size) * 0.5, size * size)
    *rest, ratio = coefficients(terms)
    ratio = jnp.full_like(t, ratio)
    for c in reversed(rest):
        ratio = ratio * t + c
    # The root comes last: XLA computes a root once, and what is cheap again for each use. Where t underflows an angle is its sine.
    small = jnp.where(size > jnp.finfo(x.dtype).eps ** 0.5, jnp.sqrt(t * ratio * ratio), size)
    angle = jnp.where(large, math.pi / 2 - 2 * small, small)
    return jnp.where(x < 0, -angle, angle)


@arcsine.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return arcsine(x), dx * jax.lax.rsqrt((1 - x) * (1 + x))


@functools.cache
def cosine_coefficients(terms: int) -> tuple[float, ...]:
    """Of the interpolation of ``arccos(s) / sqrt(1 - s)`` at the Chebyshev points of [0, 1], the constant first.

    Its nearest singularity is at -1, so that each term is worth a factor of 5.8 (that of Abramowitz and Stegun, 4.4.46, has 8 terms and is
    off by 2e-8).

    Examples
    --------
    >>> [round(c, 4) for c in cosine_coefficients(9)[:2]]  # pi/2, and pi/4 - 1
    [1.5708, -0.2146]
    """
    found = np.polynomial.Chebyshev.interpolate(lambda s: np.arccos(s) / np.sqrt(1 - s), terms - 1, [0, 1])
    return tuple(map(float, found.convert(kind=np.polynomial.Polynomial).coef))


def _single_arcsine(x: Array) -> Array:
    """``arcsin x`` to the rounding of pi/2 in single precision, by one formula for small and large x, of fewer steps after the root."""
    size = jnp.abs(x)
    *rest, ratio = cosine_coefficients(SINGLE)
    ratio = jnp.full_like(size, ratio)
    for c in reversed(rest):
        ratio = ratio * size + c
    # The root comes last, as in `arcsine`.
    angle = math.pi / 2 - jnp.sqrt((1 - size) * ratio * ratio)
    return jnp.where(x < 0, -angle, angle)


@jax.custom_jvp
def root_and_arcsine(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """``sqrt(1 - x²)`` and ``arcsin x`` of x cut to [-1, 1]; there, where they have no finite gradient, it is 0.

    In single precision the latter is right to the rounding of pi/2, not to its own.

    Examples
    --------
    >>> root_and_arcsine(jnp.ones(()))
    (Array(0., dtype=float32), Array(1.5707964, dtype=float32))
    """
    x = jnp.clip(x, -1.0, 1.0)
    # Of kernels, an angle is a term beside others of size one.
    return jnp.sqrt((1 - x) * (1 + x)), _single_arcsine(x) if x.dtype == jnp.float32 else arcsine(x)


@root_and_arcsine.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (x,), (dx,) = primals, tangents
    inside = jnp.abs(x) < 1
    safe = jnp.where(inside, x, jnp.zeros_like(x))
    slope = jnp.where(inside, jax.lax.rsqrt((1 - safe) * (1 + safe)), jnp.zeros_like(x))
    return root_and_arcsine(x), (-x * slope * dx, slope * dx)
