"""Gaussian expectations of what `recognise` finds, in closed form."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from paperjax.limits import closed_forms
from paperjax.limits.closed_forms import Dual, closed_form, mehler
from paperjax.limits.recognise import Affine, Term
from paperjax.limits.rectified import signed_power


class Base(NamedTuple):
    """What there is to know of a base of `Term`.

    Attributes
    ----------
    dual
        Of itself.
    parity
        ±1, or 0 for neither even nor odd.
    mean, slope
        ``E B(v)``, and ``E v B(v) / k``, which is ``E B'(v)``, as functions of the variance k of v.
    slope_almost
        ``E B'(v)`` of the derivative almost everywhere: 0 for a sign.
    """

    dual: Dual
    parity: int
    mean: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    slope_almost: Callable[[Array], Array]


def _nothing(k: Array) -> Array:
    return jnp.zeros_like(k)


def _absolute_moment(n: int, k: Array) -> Array:
    """``E |v|^n``; for n = -1, twice the density at 0. Gradient 0 at 0, where it has none."""
    scale = math.sqrt(2 / math.pi) if n == -1 else 2 ** (n / 2) * math.gamma((n + 1) / 2) / math.sqrt(math.pi)
    if n % 2 == 0:
        return scale * k ** (n // 2)
    positive = k > 0
    root = jnp.sqrt(jnp.where(positive, k, jnp.ones_like(k)))
    return jnp.where(positive, scale * (1 / root if n == -1 else root * k ** ((n - 1) // 2)), jnp.zeros_like(k))


def base(name: str) -> Base:
    """The base of that name.

    Examples
    --------
    >>> float(base("signed 1").mean(jnp.ones(())))  # E |v| = sqrt(2 / pi)
    0.7978...
    """
    if name.startswith("signed"):
        n = int(name.split()[1])
        even = n % 2 == 1
        mean = (lambda k: _absolute_moment(n, k)) if even else _nothing
        slope = _nothing if even else (lambda k: max(n, 1) * _absolute_moment(n - 1, k))
        return Base(signed_power(n), 1 if even else -1, mean, slope, slope if n else _nothing)
    half = jnp.exp
    erf = lambda k: 2 / math.sqrt(math.pi) / jnp.sqrt(1 + 2 * k)  # noqa: E731
    gelu = lambda k: jnp.full_like(k, 0.5)  # noqa: E731
    smooth = {
        "erf": (closed_forms.erf, -1, _nothing, erf),
        "gelu": (closed_forms.gelu, 0, lambda k: k / jnp.sqrt(2 * math.pi * (1 + k)), gelu),
        "sin": (closed_forms.sin, -1, _nothing, lambda k: half(-k / 2)),
        "cos": (closed_forms.cos, 1, lambda k: half(-k / 2), _nothing),
        "exp": (closed_forms.exp, 0, lambda k: half(k / 2), lambda k: half(k / 2)),
    }
    dual, parity, mean, slope = smooth[name]
    return Base(dual, parity, mean, slope, slope)


def mean_of(phi: Affine) -> Callable[[Array], Array]:
    """``E phi(u)`` as a function of the variance.

    Examples
    --------
    >>> mean_of(Affine((1.0, 5.0, 2.0)))(jnp.full((), 3.0))
    Array(7., dtype=float32)
    """

    def mean(k: Array) -> Array:
        total = mehler(phi.polynomial, [1.0], k, jnp.zeros_like(k), jnp.ones_like(k))
        return total + sum(t.weight * base(t.base).mean(t.scale**2 * k) for t in phi.terms)

    return mean


def pair_of(phi: Affine, psi: Affine) -> Dual | None:
    """``E phi(u) psi(v)`` and ``E phi'(u) psi'(v)`` by expanding both, or None if a product of two parts has no closed form here.

    Of a line and any base by ``E u B(v) = k12 E B'(v)`` (Stein); of opposite parities 0; of the same base its dual; of an exponential
    and a sine or cosine from ``E exp(u + iv) = exp((k11 - k22)/2 + i k12)``.

    Examples
    --------
    >>> line, square = Affine((1.0, 2.0)), Affine((0.0, 0.0, 1.0))
    >>> pair_of(line, square).value(1.0, 0.5, 3.0)
    Array(3., dtype=float32)
    """
    if not all(_line_with(p, t) for p, q in ((phi, psi), (psi, phi)) for t in q.terms):
        return None
    if not all(_terms_meet(s, t) for s in phi.terms for t in psi.terms):
        return None

    def value(k11: Array, k12: Array, k22: Array) -> Array:
        total = mehler(phi.polynomial, psi.polynomial, k11, k12, k22) + jnp.zeros_like(k11 + k22)
        for p, q, k in ((phi, psi, k22), (psi, phi, k11)):
            for t in q.terms:
                b, inner = base(t.base), t.scale**2 * k
                if _at(p, 0) and b.mean is not _nothing:
                    total = total + t.weight * _at(p, 0) * b.mean(inner)
                if _at(p, 1) and b.slope is not _nothing:
                    total = total + t.weight * _at(p, 1) * t.scale * k12 * b.slope(inner)
        return total + sum(_product(s, t, k11, k12, k22) for s in phi.terms for t in psi.terms)

    def derivative(k11: Array, k12: Array, k22: Array) -> Array:
        of_phi, of_psi = ([j * c for j, c in enumerate(p.polynomial)][1:] or [0.0] for p in (phi, psi))
        total = mehler(of_phi, of_psi, k11, k12, k22) + jnp.zeros_like(k11 + k22)
        for p, q, k in ((phi, psi, k22), (psi, phi, k11)):
            for t in q.terms:
                slope = base(t.base).slope_almost
                if _at(p, 1) and slope is not _nothing:
                    total = total + t.weight * t.scale * _at(p, 1) * slope(t.scale**2 * k)
        return total + sum(_product_of_slopes(s, t, k11, k12, k22) for s in phi.terms for t in psi.terms)

    return closed_form(str(phi) if phi == psi else f"{phi}, {psi}", value, derivative)


def _at(p: Affine, j: int) -> float:
    return p.polynomial[j] if len(p.polynomial) > j else 0.0


def _line_with(p: Affine, t: Term) -> bool:
    parity = base(t.base).parity
    return all(c == 0 or (parity != 0 and (-1) ** j != parity) for j, c in enumerate(p.polynomial) if j >= 2)


_WAVES = ("sin", "cos")


def _terms_meet(s: Term, t: Term) -> bool:
    opposite = base(s.base).parity * base(t.base).parity == -1
    return s.base == t.base or opposite or (s.base in _WAVES and t.base == "exp") or (s.base == "exp" and t.base in _WAVES)


def _scaled(s: Term, t: Term, k11: Array, k12: Array, k22: Array) -> tuple[Array, Array, Array]:
    return s.scale**2 * k11, s.scale * t.scale * k12, t.scale**2 * k22


def _product(s: Term, t: Term, k11: Array, k12: Array, k22: Array) -> Array:
    k11, k12, k22 = _scaled(s, t, k11, k12, k22)
    if s.base == t.base:
        return s.weight * t.weight * base(s.base).dual.value(k11, k12, k22)
    if "exp" in (s.base, t.base):
        wave, of_exp, of_wave = (t.base, k11, k22) if s.base == "exp" else (s.base, k22, k11)
        return s.weight * t.weight * jnp.exp((of_exp - of_wave) / 2) * (jnp.sin(k12) if wave == "sin" else jnp.cos(k12))
    return jnp.zeros_like(k12)


def _product_of_slopes(s: Term, t: Term, k11: Array, k12: Array, k22: Array) -> Array:
    weight = s.weight * t.weight * s.scale * t.scale
    k11, k12, k22 = _scaled(s, t, k11, k12, k22)
    if s.base == t.base:
        return weight * base(s.base).dual.derivative(k11, k12, k22)
    if "exp" in (s.base, t.base):
        wave, of_exp, of_wave = (t.base, k11, k22) if s.base == "exp" else (s.base, k22, k11)
        return weight * jnp.exp((of_exp - of_wave) / 2) * (jnp.cos(k12) if wave == "sin" else -jnp.sin(k12))
    return jnp.zeros_like(k12)
