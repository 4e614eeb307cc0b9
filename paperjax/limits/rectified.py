"""Duals of the signed powers ``|h| h^(k - 1)``, and so of rectified monomials: the arc-cosine kernels of every degree."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits.closed_forms import Dual, absolute, closed_form, correlation, mehler, sign


@functools.cache
def arc_cosine(degree: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Polynomials P and Q in ``c = cos(theta)``, the constant first, of ``J_degree(theta) = P(c) sin(theta) + Q(c) (pi - theta)``.

    J is the angular part of the arc-cosine kernel (Cho and Saul, NIPS 2009, eq. 4):
    ``E max(u, 0)^n max(v, 0)^n = (k11 k22)^(n/2) J_n(theta) / 2 pi``. From Price's theorem, ``dJ_n / dc = n² J_(n-1)``, so that with
    ``Q_n = E (u v)^n`` at unit variances, ``(1 - c²) P_n' - c P_n = n² (1 - c²) P_(n-1) - Q_n``.

    Examples
    --------
    Of degree 2, ``3 sin cos + (pi - theta) (1 + 2 cos²)``:

    >>> arc_cosine(2)
    ((0.0, 3.0), (1.0, 0.0, 2.0))
    """
    n = degree
    q = np.zeros(n + 1)
    for r in range(n % 2, n + 1, 2):
        half = (n - r) // 2
        q[r] = math.factorial(r) * (math.comb(n, r) * math.factorial(n - r) / (2**half * math.factorial(half))) ** 2
    if n == 0:
        return (), (1.0,)
    poly = np.polynomial.polynomial
    before = np.array(arc_cosine(n - 1)[0] or (0.0,))
    target = poly.polysub(n**2 * poly.polymul([1, 0, -1], before), q)
    system = np.zeros((n + 2, n))
    for j in range(n):
        # (1 - c²) (c^j)' - c c^j
        if j:
            system[j - 1, j] += j
        system[j + 1, j] -= j + 1
    p = np.linalg.lstsq(system, np.pad(target, (0, n + 2 - len(target))), rcond=None)[0]
    # Integers, as Q's coefficients are.
    return tuple(map(float, np.round(p))), tuple(map(float, q))


def _horner(coefficients: tuple[float, ...], c: Array) -> Array:
    total = jnp.zeros_like(c)
    for a in reversed(coefficients):
        total = total * c + a
    return total


def _signed(degree: int, k11: Array, k12: Array, k22: Array) -> Array:
    """``E s(u) s(v)`` of ``s(h) = |h| h^(degree - 1)``: ``4 E max(u, 0)^n max(v, 0)^n`` without its part ``E (u v)^n``."""
    scale, root, fraction = correlation(k11, k12, k22)
    positive = scale > 0
    c = jnp.where(positive, k12 / jnp.where(positive, scale, jnp.ones_like(scale)), jnp.zeros_like(k12))
    p, q = arc_cosine(degree)
    power = scale**degree if degree else jnp.ones_like(scale)
    return power * (_horner(p, c) * root * (2 / math.pi) + _horner(q, c) * fraction)


def _rectified(degree: int, k11: Array, k12: Array, k22: Array) -> Array:
    power = [0.0] * degree + [1.0]
    return (mehler(power, power, k11, k12, k22) + _signed(degree, k11, k12, k22)) / 4


def rectified_monomial(degree: int) -> Dual:
    """Dual of ``phi(h) = max(h, 0)^degree``: ``(k11 k22)^(n/2) J_n(theta) / 2 pi`` and ``n²`` times that of degree n - 1.

    Cho and Saul, NIPS 2009, eq. 1: half their kernels. Of degree 0 it is the step, of degree 1 the ReLU.

    Raises
    ------
    ValueError
        If `degree` is negative.

    Examples
    --------
    ``E max(u, 0)^4 = 3/2`` at unit variance:

    >>> rectified_monomial(2).value(1.0, 1.0, 1.0)
    Array(1.5, dtype=float32)
    """
    if degree < 0:
        raise ValueError(f"rectified_monomial: degree = {degree}. Give 0 for a step, 1 for a ReLU, 2 for its square.")

    def derivative(k11: Array, k12: Array, k22: Array) -> Array:
        if degree == 0:
            return jnp.zeros_like(k11 + k12 + k22)
        return degree * degree * _rectified(degree - 1, k11, k12, k22)

    return closed_form(f"max(h, 0)^{degree}", lambda *k: _rectified(degree, *k), derivative)


def signed_power(degree: int) -> Dual:
    """Dual of ``phi(h) = |h| h^(degree - 1)``, the part of ``2 max(h, 0)^degree`` whose parity ``h^degree`` has not.

    The sign for degree 0, the absolute value for 1.

    Examples
    --------
    >>> signed_power(1).value(1.0, 0.0, 1.0).round(6)  # 2 / pi
    Array(0.63662, dtype=float32)
    """
    name = f"|h| h^{degree - 1}"
    if degree < 2:
        return (sign, absolute)[degree]._replace(name=name)

    def derivative(k11: Array, k12: Array, k22: Array) -> Array:
        return degree * degree * _signed(degree - 1, k11, k12, k22)

    return closed_form(name, lambda *k: _signed(degree, *k), derivative)
