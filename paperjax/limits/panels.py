"""Gaussian expectations of functions with kinks, jumps or sharp bends, by integrals from one break to the next."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits.closed_forms import NEAR
from paperjax.limits.sampled import sampled, slope

Phi = Callable[[Array], Array]
Numbers = TypeVar("Numbers", Array, np.ndarray)
REACH = 8.6
"""Standard deviations at which the integrals are cut: 1e-17 is beyond."""
TINY = 1e-30
MOST_BREAKS = 12


class Order(NamedTuple):
    """Nodes on a panel of the outer sum, and of the inner one; and whether the inner rule, too, is for bends at the ends of a panel."""

    outer: int
    inner: int
    sharp: bool = False


ORDERS = (Order(56, 40), Order(72, 56), Order(104, 80), Order(144, 176, sharp=True), Order(208, 256, sharp=True))


class Pieces(NamedTuple):
    """A function that is analytic between its breaks.

    Attributes
    ----------
    f
        The function, of JAX's arrays or of numpy's.
    breaks
        Where it, or one of its first three derivatives, jumps; or bends sharply.
    """

    f: Callable[[Any], Any]
    breaks: tuple[float, ...]


def _derivatives(f: Phi) -> Callable[[np.ndarray], np.ndarray]:
    f0 = sampled(f)
    f1 = f0.slope
    f2 = f1.slope
    f3 = f2.slope
    return lambda x: np.stack([d.at(x) for d in (f0, f1, f2, f3)])


def breaks(f: Phi) -> tuple[float, ...]:
    """Where f or one of its first three derivatives jumps, up to 100, found from their values on a grid and by bisection.

    A jump is a difference between neighbouring points that is eight times those on either side. More than a dozen are noise, and
    none are returned: f computes in float32 inside, or oscillates.

    Examples
    --------
    >>> breaks(jax.nn.relu6)
    (0.0, 6.0)
    """
    at = _derivatives(f)
    fine = np.arange(-16.0, 16.0, 1 / 256) + 1e-3 * math.sqrt(2)
    coarse = np.arange(16.1, 100.0, 1 / 16)
    x = np.concatenate([-coarse[::-1], fine, coarse])
    F = at(x)
    F = np.where(np.isfinite(F), F, 0.0)
    with np.errstate(over="ignore"):
        step = np.abs(np.diff(F, axis=1))
    around = np.maximum(np.pad(step[:, :-1], ((0, 0), (1, 0))), np.pad(step[:, 1:], ((0, 0), (0, 1))))
    size = np.maximum(np.abs(F[:, 1:]), np.abs(F[:, :-1]))
    with np.errstate(over="ignore"):
        outlying = step > 8 * around + 1e-8 * (1 + size)
    # The spacing itself jumps there.
    edges = np.searchsorted(x, [-16.05, 16.05]) - 1
    outlying[:, edges] = False
    (where,) = np.nonzero(outlying.any(0))
    if len(where) == 0 or len(where) > MOST_BREAKS:
        return ()
    used = outlying[:, where]
    low, high = x[where], x[where + 1]
    F_low, F_high = F[:, where], F[:, where + 1]
    width = np.where(used, np.abs(F_high - F_low), np.inf)
    for _ in range(56):
        middle = (low + high) / 2
        F_middle = at(middle)
        with np.errstate(invalid="ignore"):  # Poles: infinite slopes on both sides are not counted.
            left = np.nansum(np.abs(F_middle - F_low) / width, 0) < np.nansum(np.abs(F_middle - F_high) / width, 0)
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    found = (low + high) / 2
    rounded = np.round(found, 10)
    return tuple(float(b) + 0.0 for b in np.unique(np.where(np.abs(found - rounded) < 1e-12, rounded, found)))


def jumps(pieces: Pieces) -> tuple[float, ...]:
    """Of the function at each of its breaks.

    Examples
    --------
    >>> jumps(Pieces(jnp.sign, (0.0,)))
    (2.0,)
    """
    if not pieces.breaks:
        return ()
    b = np.array(pieces.breaks)
    apart = 1e-12 * np.maximum(np.abs(b), 1.0)
    f = sampled(pieces.f)
    above, below = f.at(b + apart), f.at(b - apart)
    with np.errstate(invalid="ignore"):
        jump = above - below
    jump = np.where(np.isfinite(jump), jump, 0.0)
    return tuple(float(j) for j in np.where(np.abs(jump) > 1e-9 * (1 + np.abs(above)), jump, 0.0))


STEEP = 0.18
"""Slopes that grow as ``|h - b|^-q`` at a break with q above that are not integrated: ``eps^(1 - 2q)`` of the mean square, more than 1e-10
of it, lies within a rounding unit eps of the break."""


def steepness(phi: Phi, breaks: Sequence[float]) -> float:
    """The largest q with which a slope grows as ``|h - b|^-q`` at a break b.

    Examples
    --------
    >>> round(steepness(lambda h: jnp.abs(h) ** 0.8, (0.0,)), 3), steepness(jnp.abs, (0.0,))
    (0.2, 0.0)
    """
    apart = np.array([1e-10, 1e-6])
    points = np.asarray(breaks)[:, None, None] + np.array([[-1.0], [1.0]]) * apart
    with np.errstate(all="ignore"):
        sizes = np.log(np.maximum(np.abs(sampled(slope(phi)).at(points)), 1e-300))
        powers = (sizes[..., 0] - sizes[..., 1]) / math.log(apart[1] / apart[0])
    return float(np.max(powers, initial=0.0, where=np.isfinite(powers)))


def poles(f: Phi, breaks: Sequence[float]) -> tuple[float, ...]:
    """The breaks at which f is infinite, or is no number.

    Examples
    --------
    >>> poles(lambda h: jnp.abs(h) ** -0.2, (0.0, 1.0))
    (0.0,)
    """
    with np.errstate(all="ignore"):
        return tuple(b for b, y in zip(breaks, sampled(f).at(np.array(breaks))) if not np.isfinite(y))


def but_at(points: Sequence[float], f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function with 0 in place of poles, where rounding may put a node.

    Examples
    --------
    >>> but_at((0.0,), lambda h: 1 / h)(np.array([0.0, 2.0])).tolist()
    [0.0, 0.5]
    """

    def without(x: Any) -> Any:
        xp, at = x.__array_namespace__(), functools.reduce(operator.or_, [x == b for b in points])
        return xp.where(at, xp.zeros_like(x), f(xp.where(at, x + 1, x)))

    return without if points else f


@functools.cache
def _tanh_sinh(points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On (0, 1): distances from 0, from 1, and weights (Takahasi and Mori 1974). Nodes crowd at the ends on every scale."""
    x, step = np.linspace(-3.15, 3.15, points, retstep=True)
    lift = np.pi / 2 * np.sinh(x)
    return 1 / (1 + np.exp(-2 * lift)), 1 / (1 + np.exp(2 * lift)), step * np.pi / 4 * np.cosh(x) / np.cosh(lift) ** 2


@functools.cache
def _legendre(points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, w = np.polynomial.legendre.leggauss(points)
    return (1 + x) / 2, (1 - x) / 2, w / 2


def _nodes(cuts: Numbers, rule: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[Numbers, Numbers]:
    """Nodes and Gaussian weights on the panels between cuts (..., K), which are sorted here: (..., (K + 1) · points)."""
    xp = cuts.__array_namespace__()
    ends = xp.full((*cuts.shape[:-1], 1), REACH, cuts.dtype)
    cuts = xp.sort(xp.concatenate([-ends, xp.clip(cuts, -REACH, REACH), ends], -1), axis=-1)
    from_0, from_1, weight = (xp.asarray(a, cuts.dtype).reshape(*(1,) * cuts.ndim, -1) for a in rule)
    low, high = cuts[..., :-1, None], cuts[..., 1:, None]
    z = xp.where(from_0 < 0.5, low + (high - low) * from_0, high - (high - low) * from_1)
    w = (high - low) * weight * xp.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return z.reshape(*cuts.shape[:-1], -1), w.reshape(*cuts.shape[:-1], -1)


def _over(points: tuple[float, ...], by: Numbers) -> Numbers:
    """``points / by``, with a last axis; large where `by` is 0."""
    xp = by.__array_namespace__()
    by = xp.where(xp.abs(by) < TINY, xp.full_like(by, TINY), by)[..., None]
    return xp.asarray(points, by.dtype).reshape(*(1,) * (by.ndim - 1), -1) / by


def _root(k: Numbers) -> Numbers:
    """Square root with gradient 0 at 0."""
    xp, positive = k.__array_namespace__(), k > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, k, xp.ones_like(k))), xp.zeros_like(k))


def single(g: Pieces, order: Order, mean: Numbers, variance: Numbers) -> Numbers:
    """``E g(v)`` for v of this mean and variance, in JAX or numpy as these are.

    Examples
    --------
    >>> single(Pieces(jax.nn.relu, (0.0,)), ORDERS[1], jnp.zeros(()), jnp.ones(())).round(4)  # 1 / sqrt(2 pi)
    Array(0.3989, dtype=float32)
    """
    xp = mean.__array_namespace__()
    mean, variance = xp.broadcast_arrays(mean, variance)
    s = _root(variance)
    cuts = _over(g.breaks, s) - _over((1.0,), s) * mean[..., None]
    z, w = _nodes(cuts, (_tanh_sinh if order.sharp else _legendre)(order.inner))
    return xp.sum(w * g.f(mean[..., None] + s[..., None] * z), -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def double_panels(f: Pieces, g: Pieces, order: Order, k11: Array, k12: Array, k22: Array) -> Array:
    """``E f(u) g(v)`` by iterated sums between breaks, the outer by the tanh-sinh rule, the inner by that or Gauss-Legendre.

    ``u = s1 z`` and ``v = s2 (rho z + c z')``, ``c = sqrt(1 - rho²)``. The sum over z' is cut where v is at a break of g. That over z
    is cut where u is at a break of f, and where ``s2 rho z`` is at one of g: there the sum over z' bends within a width of c, and
    tanh-sinh nodes crowd at the ends of a panel on every scale. A covariance costs at most
    ``(|f| + |g| + 2)(|g| + 1) · outer · inner`` evaluations of g, |f| being the number of breaks.

    The gradient in k12 is ``E f' g'``, jumps included as delta functions (Price); those in the variances follow from it by scaling,
    ``2 k11 d/dk11 = E u f'(u) g(v) - k12 d/dk12``, which needs no second derivative of a kink. Taken as 0 at zero variance, and the
    delta functions of two jumps at the same place, infinite at correlation ±1, too.

    Examples
    --------
    >>> relu = Pieces(jax.nn.relu, (0.0,))
    >>> float(double_panels(relu, relu, ORDERS[0], jnp.ones(()), jnp.zeros(()), jnp.ones(())))  # 1 / 2 pi
    0.1591...
    """
    k11, k12, k22 = jnp.broadcast_arrays(k11, k12, k22)
    s1, s2, rho, across = _standard(k11, k12, k22)
    z, w = _nodes(_outer_cuts(f, g, s1, s2 * rho), _tanh_sinh(order.outer))

    def row(total: Array, node: tuple[Array, Array]) -> tuple[Array, None]:
        z, w = node
        inner = single(g, order, s2 * rho * z, jnp.square(s2 * across))
        return total + w * f.f(s1 * z) * inner, None

    return jax.lax.scan(row, jnp.zeros_like(k12), (jnp.moveaxis(z, -1, 0), jnp.moveaxis(w, -1, 0)))[0]


def _outer_cuts(f: Pieces, g: Pieces, s1: Numbers, s2_rho: Numbers) -> Numbers:
    xp = s1.__array_namespace__()
    elsewhere = [tuple(b for b in h.breaks if b) for h in (f, g)]
    return xp.concatenate([_over(elsewhere[0], s1), _over(elsewhere[1], s2_rho), xp.zeros((*s1.shape, 1), s1.dtype)], -1)


ROWS = 64
"""Nodes of the outer sum taken at once in numpy, for the processor's cache."""


def _standard(k11: Numbers, k12: Numbers, k22: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    xp = k12.__array_namespace__()
    positive = (k11 > 0) & (k22 > 0)
    s1, s2 = _root(k11), _root(k22)
    rho = xp.where(positive, k12 / xp.where(positive, s1 * s2, xp.ones_like(s1)), xp.zeros_like(k12))
    # As in `correlation`: equal inputs, whose rho is off 1 by rounding, are equal.
    rho = xp.clip(rho * (1 + NEAR * float(jnp.finfo(k12.dtype).eps)), -1, 1)
    return s1, s2, rho, _root((1 - rho) * (1 + rho))


def at_numbers(pairs: Sequence[tuple[Pieces, Pieces]], order: Order, k11: np.ndarray, k12: np.ndarray, k22: np.ndarray) -> np.ndarray:
    """`double_panels` in numpy, of pairs of functions of one pair of breaks: (pairs, covariances).

    Examples
    --------
    >>> relu = Pieces(lambda h: np.maximum(h, 0), (0.0,))
    >>> at_numbers([(relu, relu)], ORDERS[0], np.ones(1), np.zeros(1), np.ones(1)).round(4)  # 1 / 2 pi
    array([[0.1592]])
    """
    f, g = pairs[0]
    s1, s2, rho, across = _standard(k11, k12, k22)
    total = np.zeros((len(pairs), len(k12)))
    for i, cuts in enumerate(_outer_cuts(f, g, s1, s2 * rho)):
        z_J, w_J = _nodes(cuts, _tanh_sinh(order.outer))
        # Panels beyond the reach have no width.
        z_J, w_J = z_J[w_J > 0], w_J[w_J > 0]
        spread = s2[i] * across[i]
        by = np.full(1, spread)
        for part in np.array_split(np.arange(len(z_J)), max(1, len(z_J) // ROWS)):
            mean = s2[i] * rho[i] * z_J[part]
            # At correlation ±1 v is its mean, and at 0 all rows are one.
            rows = mean if rho[i] else mean[:1]
            z, w = _nodes(_over(g.breaks, by) - _over((1.0,), by) * rows[:, None], (_tanh_sinh if order.sharp else _legendre)(order.inner))
            used = w.any(0)
            v, w = (rows[:, None] + spread * z[:, used], w[:, used]) if spread else (rows[:, None], np.ones((len(rows), 1)))
            for j, (h, h2) in enumerate(pairs):
                total[j, i] += np.sum(w_J[part] * h.f(s1[i] * z_J[part]) * np.sum(w * h2.f(v), 1))
    return total


def _bell(b: Array | float, k: Array) -> Array:
    """Density at b of a Gaussian of variance k; 0 at zero variance."""
    positive = k > 0
    k = jnp.where(positive, k, jnp.ones_like(k))
    return jnp.where(positive, jnp.exp(-b * b / (2 * k)) / jnp.sqrt(2 * math.pi * k), jnp.zeros_like(k))


def _given(g: Pieces, order: Order, b: float, k11: Array, k12: Array, k22: Array) -> Array:
    """``E[g(v) | u = b]`` times the density of u there."""
    positive = k11 > 0
    ratio = jnp.where(positive, k12 / jnp.where(positive, k11, jnp.ones_like(k11)), jnp.zeros_like(k12))
    return _bell(b, k11) * single(g, order, ratio * b, jnp.maximum(k22 - ratio * k12, jnp.zeros_like(k22)))


@double_panels.defjvp
def _double_panels_jvp(f: Pieces, g: Pieces, order: Order, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    k11, k12, k22 = jnp.broadcast_arrays(*primals)
    df, dg = (h._replace(f=slope(h.f)) for h in (f, g))
    at_f, at_g = ([(b, j) for b, j in zip(h.breaks, jumps(h)) if j] for h in (f, g))

    by_k12 = double_panels(df, dg, order, k11, k12, k22)
    by_k12 = by_k12 + sum(j * _given(dg, order, b, k11, k12, k22) for b, j in at_f)
    by_k12 = by_k12 + sum(j * _given(df, order, b, k22, k12, k11) for b, j in at_g)
    for b, j in at_f:
        positive = k11 > 0
        ratio = jnp.where(positive, k12 / jnp.where(positive, k11, jnp.ones_like(k11)), jnp.zeros_like(k12))
        for b2, j2 in at_g:
            left = k22 - ratio * k12
            apart = jnp.where(left > 2 * NEAR * jnp.finfo(left.dtype).eps * k22, left, jnp.zeros_like(left))
            by_k12 = by_k12 + j * j2 * _bell(b, k11) * _bell(b2 - ratio * b, apart)

    def by_variance(f: Pieces, g: Pieces, at: list[tuple[float, float]], k11: Array, k22: Array) -> Array:
        moved = f._replace(f=lambda h: h * slope(f.f)(h))
        stretched = double_panels(moved, g, order, k11, k12, k22)
        stretched = stretched + sum(j * b * _given(g, order, b, k11, k12, k22) for b, j in at if b)
        positive = k11 > 0
        twice = jnp.where(positive, 2 * k11, jnp.ones_like(k11))
        return jnp.where(positive, (stretched - k12 * by_k12) / twice, jnp.zeros_like(k11))

    change = by_k12 * tangents[1]
    change = change + by_variance(f, g, at_f, k11, k22) * tangents[0] + by_variance(g, f, at_g, k22, k11) * tangents[2]
    return double_panels(f, g, order, k11, k12, k22), change
