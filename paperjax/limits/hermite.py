"""Gaussian expectations of analytic functions by their Hermite series."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits.sampled import sample, slope

Phi = Callable[[Array], Array]


class Grid(NamedTuple):
    """`points` nodes on ``[-reach, reach]`` standard deviations, and terms of the series up to `degree`.

    If `parity` is 0 or 1, those above the first two are left out unless their order is even or odd.
    """

    points: int
    reach: float
    degree: int
    parity: int | None = None

    @property
    def of_slopes(self) -> "Grid":
        """For the derivatives of the functions."""
        return self if self.parity is None else self._replace(parity=1 - self.parity)


def balanced(points: int, reach: float = 10.0) -> Grid:
    """As many terms as the nodes can tell apart: ``sqrt(degree) = pi / step``.

    For a function with its nearest pole at height a, at standard deviation s, sums over nodes of that step and series cut there are
    both off by about ``exp(-2 pi a / (step s))`` (the coefficients fall as ``exp(-a sqrt(r) / s)``).

    Examples
    --------
    >>> balanced(64)
    Grid(points=64, reach=10.0, degree=98, parity=None)
    """
    return Grid(points, reach, math.ceil((math.pi * (points - 1) / (2 * reach)) ** 2))


RUNGS = tuple(balanced(points) for points in (32, 48, 64, 96, 128, 192, 256, 384, 512, 768))
VARIANCES = (1.0, 4.0, 16.0, 100.0)
"""A grid is chosen for the least of these that the variances do not exceed."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def series(f: Phi, g: Phi, grid: Grid, k11: Array, k12: Array, k22: Array) -> Array:
    """``E f(u) g(v) = sum_r a_r(k11) b_r(k22) rho^r`` with ``a_r(k) = E f(sqrt(k) z) He_r(z) / sqrt(r!)`` (Mehler's formula).

    The coefficients are found at the shapes of k11 and k22: where these are (N, 1) and (1, M) and k12 (N, M), or under `vmap` over rows
    and columns, f is evaluated at ``N · points`` numbers and the coefficients are a matrix product; for each entry of k12 there remain
    three operations a term. By the trapezoidal rule on the nodes. Gradients are expectations, by Price's theorem:
    ``d/dk11 = E f'' g / 2``, ``d/dk12 = E f' g'``, so finite at correlation ±1 and at zero variance.

    Examples
    --------
    >>> float(series(jnp.exp, jnp.exp, balanced(64), jnp.ones(()), jnp.zeros(()), jnp.ones(())))  # e
    2.7182...
    """
    nodes, weights = _nodes(grid)
    z_J, w_J = (jnp.asarray(a, k12.dtype) for a in (nodes, weights))
    positive = (k11 > 0) & (k22 > 0)
    s1, s2 = jnp.sqrt(k11), jnp.sqrt(k22)
    rho = jnp.where(positive, k12 / jnp.where(positive, s1 * s2, jnp.ones_like(s1 * s2)), jnp.zeros_like(k12))
    f_J, g_J = (h(s[..., None] * z_J.reshape(*(1,) * s.ndim, -1)) for h, s in ((f, s1), (g, s2)))
    return _sum(grid, f_J.astype(k12.dtype), g_J.astype(k12.dtype), z_J, w_J, jnp.clip(rho, -1, 1))


BLOCK = 32
"""Terms summed at once, by Horner's rule."""


@functools.partial(jax.jit, static_argnums=0)
def _sum(grid: Grid, f_J: Array, g_J: Array, z_J: Array, w_J: Array, rho: Array) -> Array:
    first, stride = (0, 1) if grid.parity is None else (grid.parity, 2)
    count = max(0, (grid.degree - first) // stride + 1)
    blocks = max(1, math.ceil(count / BLOCK))
    block = math.ceil(count / blocks)

    def after(carry: tuple[Array, Array], r: Array) -> tuple[tuple[Array, Array], Array]:
        before, now = carry
        return (now, (z_J * now - jnp.sqrt(r) * before) / jnp.sqrt(r + 1)), now

    def products(he_RxJ: Array) -> tuple[Array, ...]:
        return tuple(jnp.matmul(h, he_RxJ.T, precision=jax.lax.Precision.HIGHEST) for h in (f_J, g_J))

    constant = jnp.zeros_like(w_J), w_J
    linear = after(constant, jnp.zeros((), w_J.dtype))[0]
    total = jnp.zeros_like(rho)
    if stride == 2 and grid.degree >= 1 - first:
        # The one term of the other parity.
        a, b = products((linear if first == 0 else constant)[1][None])
        total = total + a[..., 0] * b[..., 0] * (rho if first == 0 else jnp.ones_like(rho))
    rho_step = rho if stride == 1 else rho * rho

    def terms(carry: tuple[Any, ...], r: Array) -> tuple[tuple[Any, ...], None]:
        weighted, power, total = carry
        weighted, he_RxJ = jax.lax.scan(after, weighted, r)
        a, b = products(he_RxJ[::stride])
        a = jnp.where(r[::stride] <= grid.degree, a, jnp.zeros_like(a))
        inner = jnp.zeros_like(rho)
        for j in reversed(range(block)):
            inner = inner * rho_step + a[..., j] * b[..., j]
        return (weighted, power * rho_step**block, total + power * inner), None

    if count == 0:
        return total
    start = (constant, jnp.ones_like(rho)) if first == 0 else (linear, rho)
    r = first + jnp.arange(blocks * stride * block, dtype=rho.dtype).reshape(blocks, -1)
    return jax.lax.scan(terms, (*start, total), r)[0][2]


@series.defjvp
def _series_jvp(f: Phi, g: Phi, grid: Grid, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    df, dg = slope(f), slope(g)
    by_k11, by_k22 = series(slope(df), g, grid, *primals) / 2, series(f, slope(dg), grid, *primals) / 2
    change = by_k11 * tangents[0] + series(df, dg, grid.of_slopes, *primals) * tangents[1] + by_k22 * tangents[2]
    return series(f, g, grid, *primals), change


def tail(f: Phi, grid: Grid, k: Array) -> Array:
    """``E f(u)² - sum_r a_r(k)²`` up to ``grid.degree``, the square of what the series lacks (Parseval), from a grid twice as fine.

    What a series of f and g lacks at any correlation is at most the root of the product of their tails, by Cauchy and Schwarz.

    Examples
    --------
    >>> tail(jnp.tanh, Grid(64, 10.0, 3), jnp.ones(())) > 1e-4
    Array(True, dtype=bool)
    """
    return jnp.abs(series(lambda h: f(h) ** 2, jnp.ones_like, finer(grid), k, jnp.zeros_like(k), k) - series(f, f, grid, k, k, k))


@functools.cache
def _nodes(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    nodes = np.linspace(-grid.reach, grid.reach, grid.points)
    return nodes, np.exp(-(nodes**2) / 2) * (2 * grid.reach / (grid.points - 1) / math.sqrt(2 * math.pi))


class Spectrum(NamedTuple):
    """Of one function at one variance, in float64: its values on a finer grid, their weights, and the coefficients of its series.

    `checked` are the coefficients by the finer grid. Oscillations that a grid takes for slower ones keep their mean square, so that
    sums of squares do not tell.
    """

    fine: np.ndarray
    weights: np.ndarray
    coefficients: np.ndarray
    checked: np.ndarray

    @property
    def square(self) -> float:
        """``E f²``."""
        return float(self.weights @ self.fine**2)

    def tails(self) -> np.ndarray:
        """Of the series cut at each degree, its `tail`, which below rounding is not known."""
        a = self.coefficients
        lacks = abs(self.square - a @ a)
        return lacks + np.concatenate([np.cumsum((a * a)[:0:-1])[::-1], [0.0]])


def spectra(functions: Sequence[Phi], grid: Grid, variance: float) -> list[Spectrum] | None:
    """In numpy; None where a function overflows or is no number.

    Examples
    --------
    >>> spectra([jnp.square], Grid(64, 10.0, 2), 1.0)[0].coefficients.round(12).tolist()  # 1 + (h² - 1) / sqrt(2) · sqrt(2)
    [1.0, 0.0, 1.414213562373]
    """
    s = math.sqrt(variance)
    (z, w), (fine_z, fine_w) = _nodes(grid), _nodes(finer(grid))
    values = [sample(f, s * np.concatenate([z, fine_z])) for f in functions]
    if any(v is None or not np.all(np.isfinite(v)) for v in values):
        return None
    both = np.stack(values)  # type: ignore[arg-type]

    def coefficients(values: np.ndarray, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        found = np.empty((len(values), grid.degree + 1))
        before, now = np.zeros_like(w), w
        for r in range(grid.degree + 1):
            found[:, r] = values @ now
            before, now = now, (z * now - math.sqrt(r) * before) / math.sqrt(r + 1)
        return found

    coarse, fine = both[:, : len(z)], both[:, len(z) :]
    return [Spectrum(*of_one) for of_one in zip(fine, [fine_w] * len(fine), coefficients(coarse, z, w), coefficients(fine, fine_z, fine_w))]


def finer(grid: Grid) -> Grid:
    """Twice as fine, and reaching a quarter further, for means.

    Examples
    --------
    >>> finer(balanced(64))
    Grid(points=128, reach=12.5, degree=0, parity=None)
    """
    return Grid(2 * grid.points, 1.25 * grid.reach, 0)


def shortfall(f: Spectrum, g: Spectrum) -> float:
    """Error of the series at this variance, at correlation ±1, of ``E f`` and ``E g``, and of a term; relative to ``sqrt(E f² E g²)``.

    Examples
    --------
    >>> at = lambda points, variance: spectra([jnp.tanh], balanced(points), variance) * 2
    >>> shortfall(*at(96, 1.0)) < 1e-13 < shortfall(*at(64, 100.0))
    True
    """
    w, a, b = f.weights, f.coefficients, g.coefficients
    with np.errstate(over="ignore", invalid="ignore"):
        squares = f.square, g.square
        scale = math.sqrt(squares[0]) * math.sqrt(squares[1])
        lacks = [abs(square - c @ c) for square, c in zip(squares, (a, b))]
        sides = [w @ (f.fine * g.fine) - a @ b, w @ (f.fine * g.fine[::-1]) - a @ (b * (-1.0) ** np.arange(len(b)))]
        means = [(w @ h.fine - h.coefficients[0]) * math.sqrt(other) for h, other in ((f, squares[1]), (g, squares[0]))]
        worst = max(math.sqrt(lacks[0] * lacks[1]), *np.abs(sides), *np.abs(means), np.max(np.abs(a * b - f.checked * g.checked)))
    if not math.isfinite(worst) or not math.isfinite(scale):
        return math.inf
    return float(worst / scale) if scale else 0.0


def parities(f: Phi, reach: float) -> frozenset[int]:
    """0 if f is even but for a line, 1 if it is odd but for a constant: to rounding, up to `reach`.

    So is tanh less 0 but for no line; silu, gelu and softplus less ``h / 2`` are even, and sigmoid less 1/2 is odd.

    Examples
    --------
    >>> parities(jax.nn.silu, 10.0), parities(jax.nn.sigmoid, 10.0), parities(jnp.exp, 10.0)
    (frozenset({0}), frozenset({1}), frozenset())
    """
    x = np.linspace(0, reach, 65)[1:]
    values = sample(f, np.concatenate([x, -x]))
    if values is None or not np.all(np.isfinite(values)):
        return frozenset()
    right, left = values[: len(x)], values[len(x) :]
    room = 1e-14 * (np.abs(right) + np.abs(left))
    even, odd = (right + left) / 2, (right - left) / 2
    is_line = np.all(np.abs(odd - odd[-1] / x[-1] * x) <= room)
    is_constant = np.all(np.abs(even - even[0]) <= room + 1e-14 * abs(even[0]))
    return frozenset(p for p, found in ((0, is_line), (1, is_constant)) if found)


def choose(f: Phi, g: Phi, variance: float, target: float) -> tuple[Grid, float]:
    """The coarsest grid at which the series of f and g, and of their derivatives, have a `shortfall` below `target`, or the best one.

    Of its terms as many as leave a `tail` below `target`.

    Returns
    -------
    Grid, float
        With its shortfall.

    Examples
    --------
    >>> choose(jnp.tanh, jnp.tanh, 1.0, 1e-11)[0]
    Grid(points=96, reach=10.0, degree=106, parity=1)
    """
    best = RUNGS[0], math.inf
    functions = (f, slope(f)) if f is g else (f, g, slope(f), slope(g))
    parity = parities(f, 10 * math.sqrt(variance)) & parities(g, 10 * math.sqrt(variance))
    for grid in RUNGS:
        found = spectra(functions, grid, variance)
        if found is None:
            break
        spectrum_f, spectrum_g, *of_slopes = found if f is not g else [found[0], *found, found[1]]
        pairs = (spectrum_f, spectrum_g), (of_slopes[0], of_slopes[1])
        off = max(shortfall(*pair) for pair in pairs)
        if off < best[1]:
            best = grid._replace(degree=max(_enough(*pair, target) for pair in pairs), parity=min(parity, default=None)), off
        if best[1] <= target or not math.isfinite(off):
            break
    return best


def _enough(f: Spectrum, g: Spectrum, target: float) -> int:
    """The degree from which on the root of the product of the tails is below `target`."""
    if any(np.ptp(h.fine) == 0 for h in (f, g)):
        return 0
    floors = [2.0**-52 * h.square for h in (f, g)]
    tails = np.sqrt(np.maximum(f.tails(), floors[0])) * np.sqrt(np.maximum(g.tails(), floors[1]))
    (enough,) = np.nonzero(tails <= target * math.sqrt(f.square) * math.sqrt(g.square))
    return int(enough[0]) if len(enough) else len(tails) - 1
