"""Which closed form an elementwise function is, whatever its spelling."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Array

from paperjax.limits.sampled import sample

Phi = Callable[[Array], Array]


class Term(NamedTuple):
    """``weight · base(scale · h)``, with base one of ``"erf"``, ``"gelu"``, ``"sin"``, ``"cos"``, ``"exp"``, ``"signed k"``.

    ``"signed k"`` is ``|h| h^(k - 1)``: the sign for k = 0, the absolute value for 1.
    """

    weight: float
    base: str
    scale: float


class Affine(NamedTuple):
    """``sum_j polynomial[j] h^j + sum_i terms[i](h)``: a function whose Gaussian expectations are in closed form.

    With terms, the polynomial has degree at most 1, or else only powers of the parity that a sole ``"signed k"`` has not.
    """

    polynomial: tuple[float, ...]
    terms: tuple[Term, ...] = ()

    def __str__(self) -> str:
        powers = {0: "", 1: " h"}
        parts = [f"{c:.6g}{powers.get(j, f' h^{j}')}" for j, c in enumerate(self.polynomial) if c]
        parts += [f"{t.weight:.6g} {t.base}({t.scale:.6g} h)" for t in self.terms]
        return " + ".join(parts) or "0"


def base_value(base: str, h: np.ndarray) -> np.ndarray:
    """A base of `Term` in numpy.

    Examples
    --------
    >>> base_value("signed 2", np.array([-3.0, 2.0])).tolist()
    [-9.0, 4.0]
    """
    if base.startswith("signed"):
        return np.sign(h) * np.abs(h) ** int(base.split()[1]) * (np.sign(h) if int(base.split()[1]) % 2 else 1)
    with np.errstate(over="ignore"):
        return _SMOOTH[base](h)


_SMOOTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "erf": scipy.special.erf,
    "gelu": lambda h: h * scipy.special.ndtr(h),
    "sin": np.sin,
    "cos": np.cos,
    "exp": np.exp,
}
_SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "erf": lambda h: 2 / math.sqrt(math.pi) * np.exp(-h * h),
    "gelu": lambda h: scipy.special.ndtr(h) + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi),
    "sin": np.cos,
    "cos": lambda h: -np.sin(h),
    "exp": np.exp,
}
_FAMILIES = (("erf",), ("gelu",), ("sin", "cos"), ("exp",))
DEGREE = 8
"""Of the highest power that is looked for."""
TOLERANCE = 1e-12
"""Of the size of the terms at each point: float64 rounding of a few operations, and far below what a float32 step inside leaves."""

_NEAR = np.logspace(-6, 0, 19)
_FAR = np.array([14.0, 17.0, 21.0, 27.0, 36.0, 50.0, 70.0, 100.0])


@functools.cache
def _points() -> np.ndarray:
    rng = np.random.default_rng(0)
    positive = [_NEAR, np.linspace(0.55, 12, 24), _FAR]
    return np.sort(np.concatenate([*positive, *(-p for p in positive), 3 * rng.standard_normal(24), rng.uniform(-12, 12, 24)]))


def recognise(phi: Phi) -> Affine | None:
    """The closed form that phi is, found from its values alone, or None.

    In float64 at about 150 points, ±100 the farthest and 1e-6 the nearest to 0, phi is fitted by: polynomials of degree up to 8;
    ``c + l h + d |h| + e sign(h)``, in which are the ReLU, leaky ReLU, step; ``c + l h + a max(h, 0)^k + b min(h, 0)^k``; and ``c + l h``
    with ``a erf(b h)``, ``a gelu(b h)`` (the exact one), ``a sin(b h + s)`` or ``a exp(b h)``. It is accepted if it agrees at all of
    them to 1e-12 of the terms' size. So ``jnp.where(x > 0, x, 0.1 * x)`` is a leaky ReLU, ``0.5 * x * (1 + erf(x / sqrt(2)))`` a GELU,
    and ``x + sin(x)**2`` has a cosine; but the tanh GELU is none of these, nor ``softplus(50 x)/50`` a ReLU.

    Parameters
    ----------
    phi
        Acts entry by entry. A feature that falls between the points, or beyond 100, is not seen; nor is what phi is at 0 itself. A
        function that computes in float32 inside is not recognised.

    Returns
    -------
    Affine or None

    Raises
    ------
    TypeError
        If phi closes over a traced value.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> print(recognise(lambda x: jnp.maximum(x, 0) * 2))
    1 h + 1 signed 1(1 h)
    >>> print(recognise(lambda x: 3 + 2 * jnp.sin(x)))
    3 + 2 sin(1 h)
    >>> recognise(jnp.tanh) is None
    True
    """
    x = _points()
    y = sample(phi, x)
    # A pole among the points (log|h + 1| at -1) would leave no size to compare with; of the forms only an exponential overflows, farther.
    if y is None or np.isnan(y).any() or not np.isfinite(y[np.abs(x) <= 12]).all():
        return None
    for candidate in _candidates(x, y):
        if agrees(candidate, x, y):
            tidy = Affine(
                tuple(map(_short, candidate.polynomial)), tuple(Term(_short(t.weight), t.base, _short(t.scale)) for t in candidate.terms)
            )
            return tidy if agrees(tidy, x, y) else candidate
    return None


def _short(c: float) -> float:
    """The number of six digits that c is off by rounding, if there is one."""
    short = float(f"{c:.6g}")
    return short if abs(short - c) <= 1e-13 * abs(c) else c


def agrees(affine: Affine, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the function is y at x, to `TOLERANCE` of the size of its terms.

    Examples
    --------
    >>> agrees(Affine((0.0, 2.0)), np.ones(1), np.array([2.0])), agrees(Affine((0.0, 2.0)), np.ones(1), np.array([2.001]))
    (True, False)
    """
    powers = [c * x**j for j, c in enumerate(affine.polynomial)]
    values = powers + [t.weight * base_value(t.base, t.scale * x) for t in affine.terms]
    # A gelu and an exponential are the small remainder of larger numbers; a wave far out has a phase off by rounding.
    sizes = powers + [t.weight * _size(t.base, t.scale * x) for t in affine.terms]
    with np.errstate(invalid="ignore"):
        off = np.abs(sum(values) - y)
    same = np.isinf(y) & (sum(values) == y)
    floor = 1e-13 * np.max(np.abs(y[np.abs(x) <= 1]), initial=0.0)
    room = TOLERANCE * sum(np.abs(s) for s in sizes) + floor
    return bool(np.all(same | (np.isfinite(off) & (off <= room))))


def _size(base: str, h: np.ndarray) -> np.ndarray:
    if base in ("sin", "cos"):
        return 1 + np.abs(h) / 10
    if base == "exp":
        return base_value(base, h) * (1 + np.abs(h) / 10)
    return np.abs(h) if base == "gelu" else np.ones_like(h) if base == "erf" else base_value(base, h)


def _candidates(x: np.ndarray, y: np.ndarray) -> Iterator[Affine]:
    inner = np.abs(x) <= 4
    t, target = x[inner] / 4, y[inner]
    if np.all(np.isfinite(target)):
        for degree in range(DEGREE + 1):
            c = np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebfit(t, target, degree)) / 4.0 ** np.arange(degree + 1)
            yield Affine(_clean(c, 4.0 ** np.arange(len(c))))
    yield from _with_signed_powers(x, y)
    for bases in _FAMILIES:
        yield from _with_smooth_terms(bases, x, y)


def _clean(c: np.ndarray, sizes: np.ndarray) -> tuple[float, ...]:
    """Coefficients that are rounding made 0."""
    size = np.abs(c * sizes)
    return tuple(float(c_j) if s > 1e-13 * size.max() else 0.0 for c_j, s in zip(c, size))


def _with_signed_powers(x: np.ndarray, y: np.ndarray) -> Iterator[Affine]:
    near = (np.abs(x) <= 3) & (np.abs(x) >= 0.3)
    t, target = x[near], y[near]
    for k in range(1, DEGREE + 1):
        signed = base_value(f"signed {k}", t)
        columns = [np.ones_like(t), t, signed, np.sign(t) if k == 1 else t**k]
        c = np.linalg.lstsq(np.stack(columns, 1), target, rcond=None)[0]
        const, linear, weight, other = _clean(c, 3.0 ** np.array([0, 1, k, 0 if k == 1 else k]))
        terms = tuple(Term(w, f"signed {j}", 1.0) for w, j in ((weight, k), (other if k == 1 else 0.0, 0)) if w)
        yield Affine((const, linear) if k == 1 else (const, linear, *[0.0] * (k - 2), other), terms)


def _with_smooth_terms(bases: tuple[str, ...], x: np.ndarray, y: np.ndarray) -> Iterator[Affine]:
    size = np.abs(y[np.abs(x) <= 1]).max()
    # A slow wave is a line near 0; what grows or turns fast is told apart only there.
    for reaches in ((1.0, 3.0, 12.0), (12.0,)):
        b, c, off = None, np.zeros(0), 0.0
        for reach in reaches:
            within = np.abs(x) <= reach
            t, target = x[within], y[within]
            if size == 0 or not np.all(np.isfinite(target)):
                return
            row = 1 / (size + np.abs(target))
            b, c, off = _refined(bases, _start(bases, t, target, row) if b is None else b, t, target, row)
            if not off < 1e-7:
                break
        if b is not None and off < 1e-7:
            const, slope, *weights = _clean(c, np.ones(len(c)))
            terms = tuple(Term(w, base, b) for w, base in zip(weights, bases) if w)
            yield Affine((const, slope), terms)


def _start(bases: tuple[str, ...], t: np.ndarray, target: np.ndarray, row: np.ndarray) -> float:
    """The scale, of a few hundred, that with a line fits best."""
    # exp(b h + s) is a exp(b h), and erf and gelu of -b h are of b h up to a line.
    scales = np.geomspace(0.02, 50, 160)
    scales = np.concatenate([scales, -scales]) if bases == ("exp",) else scales
    found = np.linalg.qr(np.stack([row, t * row], 1))[0]
    left = target * row - found @ (found.T @ (target * row))
    gain, others = np.zeros(len(scales)), np.empty((len(scales), 0, len(t)))
    for base in bases:
        column = base_value(base, scales[:, None] * t) * row
        column /= np.abs(column).max(1, keepdims=True)
        size = np.sqrt(np.sum(column**2, 1))
        column = column - (column @ found) @ found.T
        column = column - np.einsum("bk,bkt->bt", np.einsum("bkt,bt->bk", others, column), others)
        rest = np.sqrt(np.sum(column**2, 1))
        # What is a line but for rounding gains nothing.
        column = np.where((rest > 1e-13 * size)[:, None], column / np.where(rest > 0, rest, 1.0)[:, None], 0.0)
        gain += (column @ left) ** 2
        others = np.concatenate([others, column[:, None]], 1)
    return float(scales[np.argmax(gain)])


def _refined(bases: tuple[str, ...], b: float, t: np.ndarray, target: np.ndarray, row: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Scale, other coefficients and what is left, by Gauss-Newton in the scale alone (variable projection, Kaufman 1975)."""

    def fit(b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        A = np.stack([np.ones_like(t), t, *(base_value(base, b * t) for base in bases)], 1) * row[:, None]
        if not np.all(np.isfinite(A)):
            return A, np.zeros(A.shape[1]), target, math.inf
        c = np.linalg.lstsq(A, target * row, rcond=None)[0]
        r = target * row - A @ c
        return A, c, r, float(np.linalg.norm(r))

    A, c, r, off = fit(b)
    for _ in range(40):
        if not math.isfinite(off):
            break
        by_b = row * t * sum(w * _SLOPES[base](b * t) for base, w in zip(bases, c[2:]))
        by_b = by_b - A @ np.linalg.lstsq(A, by_b, rcond=None)[0]
        square = by_b @ by_b
        step = float(by_b @ r / square) if square > 0 else 0.0
        if not abs(step) > 1e-16 * abs(b):
            break
        better = None
        for _ in range(8):
            tried = fit(b + step)
            if tried[3] < off:
                better = tried
                break
            step /= 4
        if better is None:
            break
        gained = off - better[3]
        b, (A, c, r, off) = b + step, better
        if gained < 1e-3 * off and off > 1e-7:
            break
    return b, c, off
