"""Which closed form an elementwise function is, whatever its spelling."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jax.core import Tracer
from jaxtyping import Array

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


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Float64 and concrete values inside, also under a trace, without touching the caller's flags.

    Examples
    --------
    >>> with double():
    ...     print(jnp.zeros(()).dtype)
    float64
    """
    enable = getattr(jax, "enable_x64", None)  # jax.experimental has it before jax 0.8.
    if enable is None:
        enable = jax.experimental.enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    # Constants in phi are likely of the caller's dtype, float32.
    with enable(True), jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        yield


def sample(phi: Phi, points: np.ndarray) -> np.ndarray | None:
    """``phi(points)`` in float64, or None if phi does not take them, mixes entries, or gives no floating-point numbers of that shape.

    Examples
    --------
    >>> sample(jnp.square, np.array([1.0, 2.0])).tolist(), sample(jnp.sum, np.array([1.0, 2.0]))
    ([1.0, 4.0], None)
    """
    with double():
        out = phi(jnp.asarray(points, float))
        if isinstance(out, Tracer):
            raise TypeError(
                f"{name_of(phi)} closes over a traced value, so it cannot be looked at. Give that value as a Python number, or use a "
                "closed form whose parameters may be traced: leaky_relu(slope), polynomial(coefficients)."
            )
        if not (isinstance(out, jax.Array) and out.shape == points.shape and jnp.issubdtype(out.dtype, jnp.floating)):
            return None
        some = phi(jnp.asarray(points[::2, None], float))
        alone = some.shape == (len(points[::2]), 1) and np.allclose(some[:, 0], out[::2], rtol=1e-5, atol=1e-30, equal_nan=True)
        return np.asarray(out, np.float64) if alone else None


def name_of(phi: Phi) -> str:
    """What messages call phi.

    Examples
    --------
    >>> name_of(math.sin)
    'sin'
    """
    return getattr(phi, "__name__", None) or repr(phi)


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
    >>> print(recognise(lambda x: jnp.maximum(x, 0) * 2))
    1 h + 1 signed 1(1 h)
    >>> print(recognise(lambda x: 3 + 2 * jnp.sin(x)))
    3 + 2 sin(1 h)
    >>> recognise(jnp.tanh) is None
    True
    """
    x = _points()
    y = sample(phi, x)
    if y is None or np.isnan(y).any():
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
    return bool(np.all(same | (off <= room)))


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
    for reach in (1.0, 12.0):
        within = np.abs(x) <= reach
        t, target = x[within], y[within]
        if size == 0 or not np.all(np.isfinite(target)):
            return
        row = 1 / (size + np.abs(target))

        def design(b: float, t: np.ndarray = t) -> np.ndarray:
            return np.stack([np.ones_like(t), t, *(base_value(base, b * t) for base in bases)], 1)

        def linear(b: float, design: Callable = design, row: np.ndarray = row, target: np.ndarray = target) -> tuple[float, np.ndarray]:
            A = design(b) * row[:, None]
            if not np.all(np.isfinite(A)):
                return math.inf, np.zeros(A.shape[1])
            c = np.linalg.lstsq(A, target * row, rcond=None)[0]
            return float(np.linalg.norm(A @ c - target * row)), c

        scales = np.geomspace(0.02, 50, 160)
        scales = np.concatenate([scales, -scales]) if bases == ("exp",) else scales
        # exp(b h + s) is a exp(b h), and erf and gelu of -b h are of b h up to a line.
        start = min(scales, key=lambda b: linear(b)[0])
        if not math.isfinite(linear(start)[0]):
            continue
        yield from _refined(bases, x, y, size, start, linear(start)[1])


def _refined(bases: tuple[str, ...], x: np.ndarray, y: np.ndarray, size: float, b: float, c: np.ndarray) -> Iterator[Affine]:
    """All parameters by Gauss-Newton, on the points near first, then on all."""
    p = np.array([b, *c])
    for reach in (1.0, 3.0, 12.0):
        t, target = x[np.abs(x) <= reach], y[np.abs(x) <= reach]
        if not np.all(np.isfinite(target)):
            return
        row = 1 / (size + np.abs(target))

        def residual(p: np.ndarray, t: np.ndarray = t, target: np.ndarray = target, row: np.ndarray = row) -> np.ndarray:
            value = p[1] + p[2] * t + sum(w * base_value(base, p[0] * t) for base, w in zip(bases, p[3:]))
            return np.clip(np.nan_to_num((value - target) * row, posinf=1e9, neginf=-1e9), -1e9, 1e9)

        p = scipy.optimize.least_squares(residual, p, method="lm", x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=400).x
    const, slope, *weights = p[1:]
    clean = _clean(np.array([const, slope, *weights]), np.array([1.0, 1.0, *[1.0] * len(bases)]))
    terms = tuple(Term(w, base, float(p[0])) for w, base in zip(clean[2:], bases) if w)
    yield Affine(clean[:2], terms)
