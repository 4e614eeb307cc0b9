"""Gaussian expectations of one and of two functions, each in the best way there is for it."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Real

from paperjax.limits import hermite, panels
from paperjax.limits.affine import mean_of, pair_of
from paperjax.limits.closed_forms import Covariance, Dual, Formula, checked
from paperjax.limits.hermite import Grid
from paperjax.limits.orders import choose_order
from paperjax.limits.panels import Order, Pieces
from paperjax.limits.recognise import Affine, recognise
from paperjax.limits.sampled import name_of, sampled, slope

Phi = Callable[[Array], Array]


class Mean(NamedTuple):
    """``E phi(u)``, ``u ~ N(0, k)``, as a function of k, and the absolute error of it.

    Examples
    --------
    >>> mean(jnp.square)
    <mean of 1 h^2>
    """

    value: Callable[[Covariance], Float[Array, "..."]]
    error: Callable[[Covariance], Float[Array, "..."]]
    name: str

    def __repr__(self) -> str:
        return f"<mean of {self.name}>"


def pair(phi: Phi, psi: Phi | None = None, *, variance: float = 100.0, tolerance: float = 1e-10) -> Dual:
    """``E phi(u) psi(v)`` and ``E phi'(u) psi'(v)`` over ``(u, v) ~ N(0, [[k11, k12], [k12, k22]])``, for any two elementwise functions.

    In closed form where `recognise` finds one for both, however they are spelled, and the two meet in one (`pair_of`). Else:

    - analytic functions (tanh, sigmoid, softplus, silu, the tanh gelu) by their Hermite series, see `series`. Its cost is least where
      k11 is (N, 1), k12 (N, M) and k22 (1, M): phi is evaluated at N · points numbers. The number of terms is the least that
      suffices at the largest variance. ``error`` is a bound, by Parseval and Cauchy–Schwarz: ``sqrt(T_phi T_psi)``,
      ``T = E phi² - sum_r a_r²``.
    - functions with kinks or jumps (relu6, hard swish, elu, selu), or sharp bends, by integrals between their breaks, see
      `double_panels`; about 1e5 evaluations for a covariance. ``error`` is the change with half as many nodes again.

    Gradients in all three are right, and finite at correlation ±1 and at zero variance. Where slopes grow at a break faster than
    ``|h - b|^-0.18``, as that of ``|h|^0.8``, `Dual.derivative` is NaN: its integral is not found to `tolerance`, or is infinite.

    Parameters
    ----------
    phi, psi
        Act entry by entry; psi is phi if not given.
    variance
        The largest there will be where covariances are traced and cannot be looked at, at most 100 for a Hermite series. Say it if it is
        smaller, since the terms of a series are about proportional to it: for each entry of k12 and in float64 53 for tanh at 1, 200
        at 4, 4900 at 100; 15, 51 and 1060 for silu. Results at larger ones are NaN.
    tolerance
        Largest error accepted, relative to ``sqrt(E phi² E psi²)``; it is estimated in float64 for each new range of variances. In
        float32 it is 1e-6 at the least.

    Returns
    -------
    Dual
        Its functions take concrete or traced covariances. Float64 is advised; the result has the dtype of the covariances.

    Raises
    ------
    ValueError
        If `variance` is not positive, if a function is not elementwise, or if, here or at the first covariance that is too large,
        neither way reaches `tolerance`.
    TypeError
        If a function closes over a traced value, or is not of floating point.

    Examples
    --------
    >>> pair(lambda x: jnp.where(x > 0, x, 0.0))
    <dual of 0.5 h + 0.5 signed 1(1 h)>
    >>> float(pair(jnp.tanh, jax.nn.silu).value(1.0, 0.5, 1.0))
    0.1514...
    """
    if not 0 < variance < math.inf:
        raise ValueError(f"pair: variance = {variance}, but it is the largest that occurs, a positive number. The default is 100.")
    psi = phi if psi is None else psi
    phi, psi = sampled(phi), sampled(phi if psi is phi else psi)
    psi = phi if psi.phi is phi.phi else psi
    exact = closed(phi, psi)
    if exact:
        return exact
    of = ranged(phi, psi, tolerance)
    # Refused here rather than at the first covariance.
    of.way(1.0, jnp.result_type(float) == jnp.float64)
    return of(variance)


class Ranged(NamedTuple):
    """`pair` of two functions without a closed form: ``way(largest, wide)`` is the compiled way up to a variance, kept once it is found.

    Called with the largest variance that there will be where covariances are traced, it gives their `Dual`.
    """

    way: Callable[[float, bool], Dual]
    name: str

    def __call__(self, variance: float) -> Dual:
        """The expectations, with `variance` as in `pair`."""
        plan, names = planner(self.way, variance), self.name
        return _planned(plan, variance, names)


def _planned(plan: Callable[..., Dual], variance: float, names: str) -> Dual:
    def value(k11: Array, k12: Array, k22: Array) -> Array:
        return _within(variance, plan(k11, k12, k22).value(k11, k12, k22), k11, k22)

    def derivative(k11: Array, k12: Array, k22: Array) -> Array:
        return _within(variance, plan(k11, k12, k22).derivative(k11, k12, k22), k11, k22)

    def error(k11: Array, k12: Array, k22: Array) -> Array:
        return plan(k11, k12, k22).error(k11, k12, k22)

    return Dual(checked(value), checked(derivative), checked(error), names)


def closed(phi: Phi, psi: Phi) -> Dual | None:
    """The closed form of `pair`, if there is one.

    Examples
    --------
    >>> closed(jnp.tanh, jnp.tanh) is None, closed(jnp.abs, jnp.abs) is None
    (True, False)
    """
    forms = [recognised(f, "pair") for f in ((phi,) if psi is phi else (phi, psi))]
    return pair_of(forms[0], forms[-1]) if forms[0] and forms[-1] else None


def jumps(phi: Phi) -> bool:
    """Whether a function jumps, at 0 or elsewhere: its dual then falls as the root of the distance of a correlation from 1.

    Examples
    --------
    >>> jumps(jnp.sign), jumps(lambda h: jnp.where(h > 0.5, jnp.tanh(h), 0.0)), jumps(jax.nn.relu), jumps(jax.nn.elu)
    (True, True, False, False)
    """
    form = recognised(phi, "pair")
    if form is not None:
        return any(term.base == "signed 0" for term in form.terms)
    return not analytic(phi) and any(panels.jumps(Pieces(phi, panels.breaks(phi))))


BENDS = ((), (0.0,), (-5.0, 0.0, 5.0), (-12.0, -3.0, 0.0, 3.0, 12.0))
"""Where panels are cut besides breaks, each tried where the one before does not do: functions bend near 0, sharply at large variances."""


def mean(phi: Phi, *, variance: float = 100.0, tolerance: float = 1e-10) -> Mean:
    """``E phi(u)`` for ``u ~ N(0, k)``, by the ways of `pair`.

    Parameters
    ----------
    phi, variance, tolerance
        As there.

    Raises
    ------
    ValueError, TypeError
        As there.

    Examples
    --------
    >>> mean(jax.nn.relu).value(1.0).round(6)  # 1 / sqrt(2 pi)
    Array(0.398942, dtype=float32)
    >>> mean(jax.nn.softplus).value(1.0).round(6)
    Array(0.806059, dtype=float32)
    """
    phi = sampled(phi)
    form = recognised(phi, "mean")
    name = name_of(phi)
    if form:
        formula, name = mean_of(form), str(form)
        return Mean(_of_one(lambda k11, k12, k22: formula(k11)), _of_one(lambda k11, k12, k22: jnp.zeros_like(k11)), name)
    both = pair(phi, _one, variance=variance, tolerance=tolerance)
    return Mean(_of_one(both.value), _of_one(both.error), name)


def moment(phi: Phi, power: int, *, variance: float = 100.0, tolerance: float = 1e-10) -> Mean:
    """``E phi(u)^power``; see `mean`.

    Raises
    ------
    ValueError
        If `power` is negative, and as `pair` does.

    Examples
    --------
    >>> moment(jnp.sin, 2).value(1.0).round(6)  # (1 - exp(-2)) / 2
    Array(0.432332, dtype=float32)
    """
    if power < 0:
        raise ValueError(f"moment: power = {power}. Give a whole number of at least 0.")
    found = mean(lambda h: phi(h) ** power, variance=variance, tolerance=tolerance)
    return found._replace(name=f"{name_of(phi)}^{power}")


def _within(variance: float, found: Array, k11: Array, k22: Array) -> Array:
    """NaN where traced variances turn out to be larger than what the sum was made for."""
    if not isinstance(k11, Tracer) and not isinstance(k22, Tracer):
        return found
    return jnp.where(jnp.maximum(k11, k22) <= variance * (1 + 1e-6), found, jnp.full_like(found, jnp.nan))


def _one(h: Array) -> Array:
    return jnp.ones_like(h)


def _of_one(formula: Formula) -> Callable[[Covariance], Float[Array, "..."]]:
    both = checked(formula)

    def call(k: Real[Array, "..."] | Covariance) -> Float[Array, "..."]:
        return both(k, 0 * k, k)

    return call


def recognised(phi: Phi, where: str) -> Affine | None:
    """`recognise`, after a check that phi is elementwise.

    Raises
    ------
    ValueError
        If it is not.
    TypeError
        If it is not of floating point.

    Examples
    --------
    >>> recognised(jnp.abs, "pair").terms
    (Term(weight=1.0, base='signed 1', scale=1.0),)
    """
    if not callable(phi):
        raise TypeError(f"{where}: phi = {phi!r} is no function. Give the function itself: {where}(jax.nn.relu).")
    if not sampled(phi).elementwise:
        raise ValueError(
            f"{where}: {name_of(phi)} does not act entry by entry on floating-point arrays, so it has no expectation over two "
            "pre-activations. Give a function such as jnp.tanh, whose result has the shape of its argument."
        )
    return recognise(phi)


def analytic(*functions: Phi) -> bool:
    """Whether they are made of functions without break, so that none need be looked for.

    Examples
    --------
    >>> analytic(jnp.tanh), analytic(jnp.tanh, jnp.abs)
    (True, False)
    """
    tapes = [sampled(f).tape for f in functions]
    return all(tape and tape.analytic for tape in tapes)


class NoExpectationError(ValueError):
    """No way here reaches the tolerance at this variance."""

    def __init__(self, said: str, variance: float) -> None:
        super().__init__(said)
        self.variance = variance


def ranged(phi: Phi, psi: Phi, tolerance: float = 1e-10) -> Ranged:
    """The ways of `pair` for two functions, whatever the variances.

    Examples
    --------
    >>> ranged(jnp.tanh, jnp.tanh).way(1.0, True).name
    'tanh: Grid(points=96, reach=10.0, degree=106, parity=1)'
    """
    phi, psi = sampled(phi), sampled(phi if psi is phi else psi)
    psi = phi if psi.phi is phi.phi else psi
    names = name_of(phi) if psi is phi else f"{name_of(phi)}, {name_of(psi)}"

    @functools.cache
    def breaks() -> tuple[tuple[float, ...], tuple[float, ...]]:
        found = panels.breaks(phi)
        return found, found if psi is phi else panels.breaks(psi)

    @functools.cache
    def way(largest: float, wide: bool) -> Dual:
        target, accepted = (tolerance / 10, tolerance) if wide else (1e-7, max(tolerance, 1e-6))
        off = math.inf
        if largest <= hermite.VARIANCES[-1] and (analytic(phi, psi) or not any(breaks())):
            grid, off = hermite.choose(phi, psi, largest, target)
            if off <= accepted:
                return _by_series(phi, psi, grid, f"{names}: {grid}")
        reached = math.inf
        for bends in BENDS:
            f, g = (Pieces(h, tuple(sorted({*b, *bends})) or (0.0,)) for h, b in zip((phi, psi), breaks()))
            slopes = panels.steepness(phi, f.breaks) + panels.steepness(psi, g.breaks) <= 2 * panels.STEEP
            order, reached = choose_order(f, g, largest, target, accepted, slopes)
            if reached <= accepted:
                return _by_panels(f, g, order, f"{names}: {order}, breaks {f.breaks}, {g.breaks}", slopes)
        raise NoExpectationError(
            f"expectation of {names}: off by {min(off, reached):.1e} of its size at variance {largest:g}, more than tolerance = "
            f"{accepted:g}. Does it grow faster than exponentials do, oscillate, have more than {panels.MOST_BREAKS} breaks or one beyond "
            "100, or compute in float32 inside? Breaks were found at "
            f"{breaks()[0]} and {breaks()[1]}. Rescale to smaller variances (where they are traced: give the largest as variance=), "
            "or accept the error with tolerance=.",
            largest,
        )

    return Ranged(way, names)


def planner(way: Callable[[float, bool], Dual], variance: float) -> Callable[..., Dual]:
    """A function of the covariances that gives the way for them, that for `variance` where they are traced.

    Examples
    --------
    >>> one = jnp.ones(())
    >>> planner(ranged(jnp.tanh, jnp.tanh).way, 100.0)(one, one, one).name
    'tanh: Grid(points=64, reach=10.0, degree=50, parity=1)'
    """

    def plan(k11: Array | np.ndarray, k12: Array | np.ndarray, k22: Array | np.ndarray) -> Dual:
        if any(isinstance(k, Tracer) for k in (k11, k22)):
            return way(variance, k12.dtype == jnp.float64)
        # One program for many covariances: for powers of ten beyond the last.
        largest = float(max(np.max(k11, initial=0.0), np.max(k22, initial=0.0)))
        bounds = [b for b in hermite.VARIANCES if largest <= b * (1 + 1e-6)]
        bound = bounds[0] if bounds else 10.0 ** math.ceil(math.log10(largest))
        return way(bound, k12.dtype == jnp.float64)

    return plan


def _by_series(f: Phi, g: Phi, grid: Grid, name: str) -> Dual:
    (df, dg), of_slopes = (slope(f), slope(g)), grid.of_slopes

    def error(k11: Array, k12: Array, k22: Array) -> Array:
        if grid.degree == 0:
            return jnp.abs(hermite.series(f, g, grid, k11, k12, k22) - hermite.series(f, g, hermite.finer(grid), k11, k12, k22))
        parts = (f, g, grid), (df, dg, of_slopes)
        bounds = [jnp.sqrt(hermite.tail(h, each, k11) * hermite.tail(h2, each, k22)) for h, h2, each in parts]
        return jnp.maximum(*bounds) + jnp.zeros_like(k12)

    def value(*k: Array) -> Array:
        return hermite.series(f, g, grid, *k)

    def derivative(*k: Array) -> Array:
        return hermite.series(df, dg, of_slopes, *k)

    return Dual(jax.jit(value), jax.jit(derivative), jax.jit(error), name)


def _by_panels(f: Pieces, g: Pieces, order: Order, name: str, slopes: bool) -> Dual:
    def whole(h: Pieces) -> Pieces:
        return h._replace(f=panels.but_at(panels.poles(h.f, h.breaks), h.f))

    df, dg = (whole(h._replace(f=slope(h.f))) for h in (f, g))
    f, g = whole(f), whole(g)
    finer = order._replace(outer=order.outer * 3 // 2, inner=order.inner * 3 // 2)

    def value(order: Order, *k: Array) -> Array:
        return panels.double_panels(f, g, order, *k)

    def derivative(order: Order, *k: Array) -> Array:
        return panels.double_panels(df, dg, order, *k) if slopes else jnp.full_like(sum(k), jnp.nan)

    def error(*k: Array) -> Array:
        return functools.reduce(jnp.maximum, [jnp.abs(h(finer, *k) - h(order, *k)) for h in (value, derivative)[: 1 + slopes]])

    return Dual(jax.jit(functools.partial(value, order)), jax.jit(functools.partial(derivative, order)), jax.jit(error), name)
