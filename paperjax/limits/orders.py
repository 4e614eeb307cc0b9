"""How fine the sums of `paperjax.limits.panels` must be for two functions, in NumPy."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Array

from paperjax.limits import panels
from paperjax.limits.panels import Order, Pieces
from paperjax.limits.sampled import sampled, slope

Phi = Callable[[Array], Array]


def _squared(h: Pieces, variances: np.ndarray) -> np.ndarray:
    """``E h²``, in numpy."""
    return panels.single(h._replace(f=lambda x: h.f(x) ** 2), panels.ORDERS[-1], np.zeros_like(variances), variances)


def _cut_off(h: Pieces, variance: float) -> float:
    """About the part of ``E h²`` beyond the reach of the panels."""
    density = math.exp(-(panels.REACH**2) / 2) / math.sqrt(2 * math.pi)
    at_ends = float(np.max(h.f(math.sqrt(variance) * np.array([-panels.REACH, panels.REACH])) ** 2)) * density
    return 0.0 if at_ends == 0 else at_ends / float(_squared(h, np.array([variance]))[0]) if math.isfinite(at_ends) else math.inf


CORRELATIONS = (-1.0, -0.9, -0.3, 0.0, 0.6, 0.99, 0.9999, 1 - 1e-5, 1.0)
"""At which orders are compared. Slopes that jump are hardest near 1, where a sum over one variable bends within a width of the other's."""


def choose_order(f: Pieces, g: Pieces, variance: float, target: float, accepted: float, slopes: bool = True) -> tuple[Order, float]:
    """The lowest of `panels.ORDERS` that agrees with the highest up to this variance, and by how much, relative; for slopes, too, if asked.

    Examples
    --------
    >>> from jax.nn import relu6 as phi
    >>> relu6 = Pieces(phi, (0.0, 6.0))
    >>> choose_order(relu6, relu6, 1.0, 1e-7, 1e-6)[0]
    Order(outer=104, inner=80, sharp=False)
    """
    few = [(variance, variance), (variance, variance / 50), (variance / 50, variance)]
    table = np.array([(a, r * math.sqrt(a * b), b) for a, b in few for r in CORRELATIONS]).T
    breaks = f.breaks, g.breaks

    def by_numpy(f: Phi, g: Phi) -> tuple[Pieces, Pieces]:
        one, other = (Pieces(panels.but_at(panels.poles(h, b), sampled(h).at), b) for h, b in zip((f, g), breaks))
        return one, other

    pairs = [by_numpy(f.f, g.f), by_numpy(slope(f.f), slope(g.f))][: 1 + slopes]
    *lower, highest = panels.ORDERS
    with np.errstate(all="ignore"):
        scale = np.sqrt([_squared(h, table[0]) * _squared(h2, table[2]) for h, h2 in pairs])
        truth = panels.at_numbers(pairs, highest, *table)
        best = highest, math.inf
        beyond = max(_cut_off(h, variance) for pair in pairs for h in pair)
        if not np.all(np.isfinite(truth)) or not np.all(np.isfinite(scale)):
            return highest, math.inf
        if not beyond <= accepted:
            return highest, beyond
        for order in lower:
            off = np.abs(panels.at_numbers(pairs, order, *table) - truth) / np.where(scale > 0, scale, 1.0)
            best = order, float(off.max())
            if best[1] <= target:
                break
        return best
