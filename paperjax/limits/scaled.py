"""Slopes in a learned scale: of ``phi(h + s y)`` in s they are ``y phi'(h + y)``, linear in one field and any function of another.

With L and A such fields at one example and L' and A' at another, ``L = a A + u`` and ``L' = a' A' + u'``, u of no covariance with A and u'
of none with A', Stein's lemma gives, with ``d = E u A'`` and ``d' = E u' A``,

    E L f(A) L' f'(A') = a a' E[A f A' f'] + a d' E[(A f)_A f'] + a' d E[f (A' f')_A'] + E[u u'] E[f f'] + d d' E[f_A f'_A'],

of integrals over two fields. A jump of f at 0 is none of ``A f``; where both have one, ``E[f_A f'_A']`` is the density of (A, A') at 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits import fields as fl
from paperjax.limits.covariances import Moments, placed
from paperjax.limits.expectation import analytic
from paperjax.limits.merged import LINES, POINTS, PROBES, merged, on_line, one_sum
from paperjax.limits.nodes import Wide
from paperjax.limits.panels import breaks
from paperjax.limits.sampled import Sampled, sampled, slope

Pair = Callable[[Callable[..., Any], Callable[..., Any], Wide, Wide], Array]
NEAR = 1e-9
"""To the right and to the left of a break."""


@runtime_checkable
class Runs(Protocol):
    """What is needed of `paperjax.limits.moments.Run`."""

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> Moments:
        """See there."""
        ...

    @property
    def cache(self) -> dict[Any, Any]:
        """See there."""
        ...


class Scaled(NamedTuple):
    """``number by f(of)``, `by` and `of` Gaussian.

    Attributes
    ----------
    by
        ``None`` for the slope in a number that is added, which is f itself.
    number
        0 of a number that is itself multiplied by a scale that starts at 0.
    jump
        That of f at 0, where f is constant on either side; 0 where f has no jump.
    """

    f: Sampled
    of: Wide
    by: Wide | None
    number: float
    jump: float


def scaled(cache: dict[Any, Any], fn: Callable[..., Any], rate: Callable[..., Any], fields: Sequence[Wide]) -> Scaled | None:
    """The slope `rate` of a function of one sum of fields in a number that scales some of them, or that is added to them.

    ``None`` where it is not, or where f has other jumps than one at 0 between two constants.
    """
    key = ("scaled", fn, rate, tuple(fields))
    if key not in cache:
        cache[key] = _scaled(cache, fn, rate, fields)
    return cache[key]


def _scaled(cache: dict[Any, Any], fn: Callable[..., Any], rate: Callable[..., Any], fields: Sequence[Wide]) -> Scaled | None:
    n = len(fields)
    one, single = merged(cache, fn, fields)
    if not 1 < n <= POINTS.shape[1] or len(single) != 1:
        return None
    weights = one_sum(fn, n)
    assert weights is not None
    _, number = fl.multiple({z: float(a) for z, a in zip(fields, weights) if a})
    f = slope(one)
    assert isinstance(f, Sampled)
    lines = list(zip(LINES[:, :n], POINTS[:, :n]))
    wanted = np.concatenate([on_line(rate, way, point).at(PROBES) for way, point in lines])
    at = np.concatenate([PROBES[:, None] * way + point for way, point in lines])
    table = f.at(at @ weights / number)[:, None] * np.concatenate([np.ones((len(at), 1)), at], 1)
    if not (np.isfinite(wanted).all() and np.isfinite(table).all()):
        return None
    if not wanted.any():
        return Scaled(f, single[0], None, 0.0, 0.0)
    added, *by = np.linalg.lstsq(table, wanted, rcond=None)[0]
    largest = np.abs([added, *by]).max()
    added, *by = (0.0 if abs(b) < 1e-9 * largest else float(b) for b in (added, *by))
    jump = _jump(f)
    if np.abs(table @ np.array([added, *by]) - wanted).max() > 1e-10 * np.abs(wanted).max() or jump is None or bool(added) == any(by):
        return None
    if added:
        return Scaled(f, single[0], None, added, jump)
    linear, scale = fl.multiple({z: b for z, b in zip(fields, by) if b})
    return Scaled(f, single[0], linear, scale, jump)


def _jump(f: Sampled) -> float | None:
    """That of f at 0, or 0; ``None`` where there are others, or one between functions that are not constant."""
    if analytic(f):
        return 0.0
    jumps = {b: float(np.diff(f.at(np.array([b - NEAR, b + NEAR])))[0]) for b in breaks(f)}
    jumps = {b: by for b, by in jumps.items() if abs(by) > 1e-6}
    if not jumps:
        return 0.0
    sides = [np.unique(f.at(PROBES[side])) for side in (PROBES > 0, PROBES < 0)]
    return next(iter(jumps.values())) if set(jumps) == {0.0} and all(side.size == 1 for side in sides) else None


def _times(f: Sampled, cache: dict[Any, Any]) -> Sampled:
    """``z f(z)``, the same function whoever asks."""
    return cache.setdefault(("times", f), sampled(lambda z: z * f(z)))


def second(run: Runs, one: Scaled, two: Scaled, s: int, t: int, diag: bool, pair: Pair) -> Array | None:
    """``E`` of the product of two; `pair` gives that of functions of two fields. ``None`` where they are of two kinds."""
    f, g = one.f, two.f
    if one.number == 0 or two.number == 0:
        return jnp.zeros(())
    if one.by is None and two.by is None:
        return one.number * two.number * pair(f, g, one.of, two.of)
    if one.by is None or two.by is None or (one.jump == 0) != (two.jump == 0):
        return None

    def own(a: Wide, b: Wide, at: int, left: bool) -> Array:
        return _or_nothing(placed(run.second(a, b, at, at, True), left, one.of.shape, two.of.shape, diag))

    k11, k22 = own(one.of, one.of, s, True), own(two.of, two.of, t, False)
    k12, across, back, both = (
        _or_nothing(run.second(a, b, s, t, diag)) for a, b in ((one.of, two.of), (one.by, two.of), (one.of, two.by), (one.by, two.by))
    )
    with_own = own(one.by, one.of, s, True), own(two.by, two.of, t, False)
    a, b = (jnp.where(k > 0, c / jnp.where(k > 0, k, 1.0), 0.0) for c, k in zip(with_own, (k11, k22)))
    d, e = across - a * k12, back - b * k12
    zf, zg = _times(f, run.cache), _times(g, run.cache)
    total = a * b * pair(zf, zg, one.of, two.of)
    total = total + a * e * pair(slope(zf), g, one.of, two.of) + b * d * pair(f, slope(zg), one.of, two.of)
    total = total + (both - b * across - a * back + a * b * k12) * pair(f, g, one.of, two.of)
    if one.jump == 0:
        last = d * e * pair(slope(f), slope(g), one.of, two.of)
    else:
        # Of examples that coincide d e is 0, and faster so than the density there is infinite.
        left = k11 * k22 - k12**2
        apart = left > 4 * jnp.finfo(left.dtype).eps * k11 * k22
        last = jnp.where(apart, one.jump * two.jump * d * e / (2 * math.pi * jnp.sqrt(jnp.where(apart, left, 1.0))), 0.0)
    return one.number * two.number * (total + last)


def _or_nothing(moment: Moments) -> Array:
    return jnp.zeros(()) if moment is None else moment
