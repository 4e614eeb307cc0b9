"""Gaussian expectations of analytic functions by their Hermite series."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits.recognise import sample

Phi = Callable[[Array], Array]


class Grid(NamedTuple):
    """`points` nodes on ``[-reach, reach]`` standard deviations, and terms of the series up to `degree`."""

    points: int
    reach: float
    degree: int


def balanced(points: int, reach: float = 10.0) -> Grid:
    """As many terms as the nodes can tell apart: ``sqrt(degree) = pi / step``.

    For a function with its nearest pole at height a, at standard deviation s, sums over nodes of that step and series cut there are
    both off by about ``exp(-2 pi a / (step s))`` (the coefficients fall as ``exp(-a sqrt(r) / s)``).

    Examples
    --------
    >>> balanced(64)
    Grid(points=64, reach=10.0, degree=98)
    """
    return Grid(points, reach, math.ceil((math.pi * (points - 1) / (2 * reach)) ** 2))


RUNGS = tuple(balanced(points) for points in (32, 48, 64, 96, 128, 192, 256, 384, 512, 768))
VARIANCES = (1.0, 4.0, 16.0, 100.0)
"""A grid is chosen for the least of these that the variances do not exceed."""


_ASKED = 3 * RUNGS[-1].points


def slope(f: Phi) -> Phi:
    """``f'``, almost everywhere, by JAX.

    Examples
    --------
    >>> slope(jnp.square)(jnp.ones(()))
    Array(2., dtype=float32)
    """
    return lambda h: jax.jvp(f, (h,), (jnp.ones_like(h),))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def series(f: Phi, g: Phi, grid: Grid, k11: Array, k12: Array, k22: Array) -> Array:
    """``E f(u) g(v) = sum_r a_r(k11) b_r(k22) rho^r`` with ``a_r(k) = E f(sqrt(k) z) He_r(z) / sqrt(r!)`` (Mehler's formula).

    The coefficients are found at the shapes of k11 and k22: where these are (N, 1) and (1, M) and k12 (N, M), f is evaluated at
    ``N · points`` numbers, and the rest is products and sums. By the trapezoidal rule on the nodes. Gradients are expectations, by
    Price's theorem: ``d/dk11 = E f'' g / 2``, ``d/dk12 = E f' g'``, so finite at correlation ±1 and at zero variance.

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
    return _sum(grid.degree, f_J.astype(k12.dtype), g_J.astype(k12.dtype), z_J, w_J, jnp.clip(rho, -1, 1))


@functools.partial(jax.jit, static_argnums=0)
def _sum(degree: int, f_J: Array, g_J: Array, z_J: Array, w_J: Array, rho: Array) -> Array:
    def term(carry: tuple[Array, ...], r: Array) -> tuple[tuple[Array, ...], None]:
        before, now, power, total = carry
        a, b = (jnp.matmul(h, now, precision=jax.lax.Precision.HIGHEST) for h in (f_J, g_J))
        after = (z_J * now - jnp.sqrt(r) * before) / jnp.sqrt(r + 1)
        return (now, after, power * rho, total + a * b * power), None

    r = jnp.arange(degree + 1, dtype=rho.dtype)
    shape = jnp.broadcast_shapes(f_J.shape[:-1], g_J.shape[:-1], rho.shape)
    start = jnp.zeros_like(w_J), w_J, jnp.ones(rho.shape, rho.dtype), jnp.zeros(shape, rho.dtype)
    return jax.lax.scan(term, start, r)[0][3]


@series.defjvp
def _series_jvp(f: Phi, g: Phi, grid: Grid, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    df, dg = slope(f), slope(g)
    by_k11, by_k22 = series(slope(df), g, grid, *primals) / 2, series(f, slope(dg), grid, *primals) / 2
    change = by_k11 * tangents[0] + series(df, dg, grid, *primals) * tangents[1] + by_k22 * tangents[2]
    return series(f, g, grid, *primals), change


def tail(f: Phi, grid: Grid, k: Array) -> Array:
    """``E f(u)² - sum_r a_r(k)²`` up to ``grid.degree``, the square of what the series lacks (Parseval), from a grid twice as fine.

    What a series of f and g lacks at any correlation is at most the root of the product of their tails, by Cauchy and Schwarz.

    Examples
    --------
    >>> tail(jnp.tanh, Grid(64, 10.0, 3), jnp.ones(())) > 1e-4
    Array(True, dtype=bool)
    """
    finer = Grid(2 * grid.points, 1.25 * grid.reach, 0)
    return jnp.abs(series(lambda h: f(h) ** 2, jnp.ones_like, finer, k, jnp.zeros_like(k), k) - series(f, f, grid, k, k, k))


@functools.cache
def _nodes(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    nodes = np.linspace(-grid.reach, grid.reach, grid.points)
    return nodes, np.exp(-(nodes**2) / 2) * (2 * grid.reach / (grid.points - 1) / math.sqrt(2 * math.pi))


def shortfall(f: Phi, g: Phi, grid: Grid, variance: float) -> float:
    """Largest error of the series at this variance and correlation ±1, and of ``E f``, ``E g``, relative to ``sqrt(E f² E g²)``.

    In float64 numpy. Infinite where the functions overflow or are no numbers.

    Examples
    --------
    >>> shortfall(jnp.tanh, jnp.tanh, balanced(96), 1.0) < 1e-13 < shortfall(jnp.tanh, jnp.tanh, balanced(64), 100.0)
    True
    """
    s = math.sqrt(variance)
    finer = Grid(2 * grid.points, 1.25 * grid.reach, 0)
    (z, w), (fine_z, fine_w) = _nodes(grid), _nodes(finer)
    # Of one length, so that the operations of f compile once.
    ask = s * np.concatenate([z, fine_z, np.zeros(_ASKED - len(z) - len(fine_z))])
    found = [sample(h, ask) for h in (f, g)]
    if any(v is None or not np.all(np.isfinite(v)) for v in found):
        return math.inf
    values = [part for v in found for part in (v[: len(z)], v[len(z) : len(z) + len(fine_z)])]  # type: ignore[index]
    f_J, fine_f, g_J, fine_g = values
    coefficients = np.empty((2, grid.degree + 1))
    before, now, both = np.zeros_like(w), w, np.stack([f_J, g_J])
    for r in range(grid.degree + 1):
        coefficients[:, r] = both @ now
        before, now = now, (z * now - math.sqrt(r) * before) / math.sqrt(r + 1)
    a, b = coefficients
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.array([fine_w @ fine_f**2, fine_w @ fine_g**2])
        scale = math.sqrt(squares[0] * squares[1])
        lacks = np.abs(squares - [a @ a, b @ b])
        sides = [fine_w @ (fine_f * fine_g) - a @ b, fine_w @ (fine_f * fine_g[::-1]) - a @ (b * (-1.0) ** np.arange(len(b)))]
        means = [(fine_w @ v - c[0]) * math.sqrt(other) for v, c, other in ((fine_f, a, squares[1]), (fine_g, b, squares[0]))]
        worst = max(math.sqrt(lacks[0] * lacks[1]), *np.abs(sides), *np.abs(means))
    if not math.isfinite(worst) or not math.isfinite(scale):
        return math.inf
    return float(worst / scale) if scale else 0.0


def choose(f: Phi, g: Phi, variance: float, target: float) -> tuple[Grid, float]:
    """The coarsest grid at which the series of f and g, and of their derivatives, have a `shortfall` below `target`, or the best one.

    Returns
    -------
    Grid, float
        With its shortfall.

    Examples
    --------
    >>> choose(jnp.tanh, jnp.tanh, 1.0, 1e-11)[0].points
    96
    """
    best = RUNGS[0], math.inf
    for grid in RUNGS:
        off = max(shortfall(f, g, grid, variance), shortfall(slope(f), slope(g), grid, variance))
        best = (grid, off) if off < best[1] else best
        if best[1] <= target or not math.isfinite(off):
            break
    return best
