"""Gaussian expectations of one activation that the flow of a finite network through its layers needs; in NumPy's double precision."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from paperjax.limits import panels
from paperjax.limits.expectation import recognised
from paperjax.limits.panels import Pieces
from paperjax.limits.sampled import Sampled, double, name_of, sampled

Phi = Callable[[Array], Array]
Numbers = Float[np.ndarray, "..."]

AGREE = 1e-7
"""How far two orders of quadrature may be apart, relative; the better of the two is then off by far less, 1e-12 where it is smooth."""

CUTS = (0.0, 1.0, -1.0, 4.0, -4.0)
"""Where panels are cut besides breaks: activations bend near 0, sharply at large variances."""


class Activation(NamedTuple):
    """An activation as numpy computes it.

    Attributes
    ----------
    name
        For messages.
    phi
        The function, whose ``at`` and ``slope.at`` are its values and derivative at numbers.
    breaks
        Where it or one of its first three derivatives jumps.

    Examples
    --------
    >>> import jax
    >>> activation(jax.nn.relu6, "example").breaks
    (0.0, 6.0)
    """

    name: str
    phi: Sampled
    breaks: tuple[float, ...]

    def mean(self, f: Callable[[np.ndarray], np.ndarray], K: Numbers, centre: Numbers | None = None) -> Numbers:
        """``E f(z)``, ``z ~ N(centre, K)``, centre 0 if left out; NaN where two orders of quadrature differ by `AGREE` of ``E |f|``."""
        shape, K = np.shape(K), np.atleast_1d(np.asarray(K, np.float64))
        at = np.zeros_like(K) if centre is None else np.broadcast_to(np.asarray(centre, np.float64), K.shape)
        cuts = tuple(sorted({*self.breaks, *CUTS}))
        with np.errstate(all="ignore"):
            coarse, fine = (panels.single(Pieces(f, cuts), order, at, K) for order in panels.ORDERS[-2:])
            size = panels.single(Pieces(lambda z: np.abs(f(z)), cuts), panels.ORDERS[-1], at, K)
            ends = np.sqrt(K) * panels.REACH
            beyond = (np.abs(f(at + ends)) + np.abs(f(at - ends))) * np.exp(-(panels.REACH**2) / 2)
            fair = np.isfinite(fine) & (np.abs(fine - coarse) <= AGREE * size) & (beyond <= AGREE * size)
            return np.where(fair | (size == 0), fine, np.nan).reshape(shape)

    def square(self, K: Numbers) -> Numbers:
        """``g(K) = E φ²``."""
        return self.mean(lambda z: self.phi.at(z) ** 2, K)

    def slope_square(self, K: Numbers) -> Numbers:
        """``E φ'²``."""
        return self.mean(lambda z: self.phi.slope.at(z) ** 2, K)

    def square_slope(self, K: Numbers) -> Numbers:
        """``g'(K) = E z φ φ' / K``."""
        return np.asarray(self.mean(lambda z: z * self.phi.at(z) * self.phi.slope.at(z), K) / K)


def activation(phi: Phi, where: str, *, jumping: bool = False) -> Activation:
    """An activation, looked at.

    Parameters
    ----------
    phi
        A function of JAX arrays that acts entry by entry.
    where
        What messages begin with.
    jumping
        Whether it may jump, as sign does: no mean of its derivative is wanted.

    Raises
    ------
    ValueError
        If it does not act entry by entry, has no second moment at variance 1, or jumps where it may not.
    TypeError
        If it is no function, or not of floating point.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> float(activation(jnp.sin, "example").square(np.ones(())).round(6))  # (1 - exp(-2)) / 2
    0.432332
    """
    with double():
        recognised(phi, where)
        f = sampled(phi)
        with np.errstate(all="ignore"):
            found = Activation(_short(phi), f, panels.breaks(f))
            jumps = panels.jumps(Pieces(f, found.breaks))
            second = found.square(np.ones(()))
    if not np.isfinite(second):
        raise ValueError(
            f"{where}: {found.name} has no finite second moment under N(0, 1), or one that quadrature cannot find, so a wide layer has no "
            "kernel. Does it grow like exp(h²), or have a pole, a logarithm or a root? Give an activation whose square has a mean."
        )
    if any(jumps) and not jumping:
        at = [b for b, jump in zip(found.breaks, jumps) if jump]
        raise ValueError(
            f"{where}: {found.name} jumps at {at}, and the susceptibilities are means of its derivative's square, which is infinite there. "
            "Give a continuous activation."
        )
    return found


def _short(phi: Phi) -> str:
    if isinstance(phi, functools.partial):
        settings = (*map(repr, phi.args), *(f"{name}={value!r}" for name, value in phi.keywords.items()))
        return f"{name_of(phi.func)}({', '.join(settings)})"
    return name_of(phi)
