"""Criticality: the variances of weights and biases at which a deep network keeps its signals, for any activation."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy import optimize

from paperjax.limits.layer_moments import Activation, Phi, activation
from paperjax.limits.sampled import double

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Universality = Literal["scale-invariant", "K* = 0", "half-stable", "none"]

TRIED = np.geomspace(1e-4, 1e3, 141)
"""Kernels between which roots are looked for."""


class PhaseDiagram(NamedTuple):
    """The fixed point that K = 1 flows to, and the susceptibilities there, over a grid; NaN where K grows past 1e3.

    Attributes
    ----------
    C_b, C_W
        The axes.
    K, chi_parallel, chi_perp
        ``(C_b, C_W)``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> phase_diagram(jnp.tanh, np.array([0.0]), np.array([0.5, 2.0])).chi_perp.round(2)  # ordered, chaotic
    array([[0.5 , 1.11]])
    """

    C_b: Float[np.ndarray, " biases"]
    C_W: Float[np.ndarray, " weights"]
    K: Float[np.ndarray, "biases weights"]
    chi_parallel: Float[np.ndarray, "biases weights"]
    chi_perp: Float[np.ndarray, "biases weights"]


class Criticality(NamedTuple):
    """Where an activation is critical. It prints as a table; `plot` draws the phase diagram.

    Attributes
    ----------
    C_b, C_W
        The critical variances, of biases and of weights times fan-in; None if there are none.
    K
        The fixed point of the kernel; None if every K is one (scale-invariant), or there is none.
    universality
        ``"scale-invariant"``: χ∥ = χ⊥ = 1 at every K. ``"K* = 0"``: K falls as ``1 / (-a1 l)``. ``"half-stable"``: K* > 0, approached from
        one side and left on the other. ``"none"``: no critical point.
    a1
        ``σ3/σ1 + 3/4 (σ2/σ1)²``, of the derivatives at 0; None where it is not defined: σ(0) ≠ 0, σ1 = 0, or a break at 0.
    chi_parallel, chi_perp
        There: 1 and 1, to rounding; None if there is none.
    name
        Of the activation.
    phi
        The activation.

    Examples
    --------
    >>> import jax
    >>> print(criticality(jax.nn.relu))
    activation    relu
    universality  scale-invariant
    C_b           0
    C_W           2
    K*            any
    chi_parallel  1
    chi_perp      1
    """

    C_b: float | None
    C_W: float | None
    K: float | None
    universality: Universality
    a1: float | None
    chi_parallel: float | None
    chi_perp: float | None
    name: str
    phi: Callable[[Array], Array]

    def __str__(self) -> str:
        def shown(x: float | None, otherwise: str = "none") -> str:
            return otherwise if x is None else f"{x:.10g}"

        rows = [("activation", self.name), ("universality", self.universality), ("C_b", shown(self.C_b)), ("C_W", shown(self.C_W))]
        rows.append(("K*", shown(self.K, "any" if self.universality == "scale-invariant" else "none")))
        if self.universality == "K* = 0":
            rows.append(("a1", shown(self.a1)))
        rows += [("chi_parallel", shown(self.chi_parallel)), ("chi_perp", shown(self.chi_perp))]
        return "\n".join(f"{label:14}{text}" for label, text in rows)

    def plot(self) -> "Figure":
        """χ∥ and χ⊥ over (C_b, C_W) at the fixed point that K = 1 flows to; the cross is the critical point.

        Thin lines are levels of χ, on the thick one it passes 1. Where K grows past 1e3 it is hatched, and χ is that at K = 1e3.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> [ax.get_xlabel() for ax in criticality(jnp.tanh).plot().axes[:2]]
        ['$C_b$', '$C_b$']
        """
        from matplotlib.figure import Figure

        weight, bias = self.C_W or 1.0, self.C_b or 0.0
        biases, weights = np.linspace(0, max(2 * bias, 0.5), 61), np.linspace(0, 2, 121) * weight
        found = phase_diagram(self.phi, biases, weights)
        grows = np.isnan(found.K)
        if grows.any():
            # No more of where all signals grow than shows that they do.
            kept = weights <= 1.15 * weights[~grows.all(axis=0)].max()
            weights, grows = weights[kept], grows[:, kept]
        act, end = activation(self.phi, "criticality"), np.array(TRIED[-1])
        with double():
            last = [float(chi) if np.isfinite(chi) else math.nan for chi in (act.square_slope(end), act.slope_square(end))]
        fig = Figure((8.4, 3.6), layout="constrained")
        for ax, chi, at_end, label in zip(fig.subplots(1, 2), (found.chi_parallel, found.chi_perp), last, ("parallel", "perp")):
            inside = chi[:, : len(weights)]
            everywhere = np.where(grows, weights * at_end, inside)
            image = ax.pcolormesh(biases, weights, everywhere.T, cmap="viridis", vmin=0, vmax=1.5, shading="nearest", rasterized=True)
            levels = np.array([0.25, 0.5, 0.75, 1.25])
            levels = levels[(levels > np.nanmin(inside)) & (levels < np.nanmax(inside))]
            if levels.size:
                colours = ["white" if level < 1 else "black" for level in levels]
                lines = ax.contour(biases, weights, np.ma.masked_invalid(inside.T), levels=levels, colors=colours, linewidths=0.8)
                ax.clabel(lines, fmt="%g", fontsize=8)
            if np.nanmin(everywhere) < 1 < np.nanmax(everywhere):
                one = ax.contour(biases, weights, np.ma.masked_invalid(everywhere.T), levels=[1.0], colors="black", linewidths=2)
                ax.clabel(one, fmt="%g", fontsize=8)
            if grows.any():
                ax.contourf(biases, weights, grows.T, levels=[0.5, 1.5], colors="none", hatches=["///"])
            if self.C_W is not None:
                ax.plot([bias], [self.C_W], "X", color="white", markeredgecolor="black", markersize=9, clip_on=False, zorder=5)
            ax.set(xlabel="$C_b$", ylabel="$C_W$", title=f"$\\chi_\\{label}$")
            fig.colorbar(image, ax=ax, extend="max")
        fig.suptitle(f"{self.name}" + ("; hatched: K grows past 1,000, χ at K = 1,000" if grows.any() else ""), fontsize=10)
        return fig


def criticality(phi: Phi) -> Criticality:
    """The critical variances of an activation: ``χ∥ = C_W g'(K*) = 1``, ``χ⊥ = C_W E φ'² = 1``, ``K* = C_b + C_W g(K*)``.

    g(K) is ``E φ(z)²``, z ~ N(0, K). χ∥ is what a small change of the kernel K is multiplied with in a layer, χ⊥ that of a small
    difference of two inputs. With ``φ(αh) = α φ(h)`` for α > 0 all K are critical at ``(0, 1/g(1))``. If ``φ(0) = 0`` and σ1 = φ'(0) is
    not 0, ``(0, 1/σ1²)`` makes K* = 0 critical, and K falls to it where a1 < 0. Else the roots of ``g'(K) = E φ'²``, K in [1e-4, 1e3], are
    found; the least with C_b ≥ 0 is given.

    Parameters
    ----------
    phi
        Any function of JAX arrays that acts entry by entry. ``jax.nn.gelu`` is an approximation by a tanh; the exact GELU of the table in
        the book is ``functools.partial(jax.nn.gelu, approximate=False)``.

    Returns
    -------
    Criticality
        Errors about 1e-11 for activations that are analytic between their breaks.

    Raises
    ------
    ValueError
        If phi does not act entry by entry, has no second moment, jumps, or has a break at 0 that leaves K* = 0 undecided.
    TypeError
        If phi is no function, or not of floating point.

    References
    ----------
    Roberts, Yaida and Hanin, *The Principles of Deep Learning Theory*, arXiv 2106.10165, chapter 5.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> found = criticality(jnp.tanh)
    >>> found.universality, round(found.C_W, 8), round(found.a1, 8)
    ('K* = 0', 1.0, -2.0)
    >>> round(criticality(jax.nn.silu).C_W, 8), criticality(jax.nn.sigmoid).universality
    (1.98800468, 'none')
    """
    act = activation(phi, "criticality")
    with double():
        return _found(act, phi)


def _found(act: Activation, phi: Phi) -> Criticality:
    if _homogeneous(act):
        g = float(act.square(np.ones(())))
        if g == 0:
            raise ValueError(f"criticality: {act.name} is 0 everywhere, so no variance of the weights keeps a signal.")
        return _at(act, phi, 0.0, 1 / g, None, "scale-invariant", None)
    through_0 = abs(float(act.phi.at(np.zeros(())))) < 1e-14
    smooth_at_0 = 0.0 not in act.breaks
    a1 = None
    if through_0 and smooth_at_0:
        s1, a1 = _expansion(act)
        if a1 is not None:
            # Where the first order vanishes the kernel itself tells.
            falls = a1 < -1e-9 or (abs(a1) <= 1e-9 and float(act.square(np.array(0.1))) / s1**2 < 0.1 * (1 - 1e-9))
            if falls:
                return _at(act, phi, 0.0, 1 / s1**2, 0.0, "K* = 0", a1)
    for K in _roots(act):
        weight = 1 / float(act.slope_square(np.array(K)))
        bias = K - weight * float(act.square(np.array(K)))
        if bias >= -1e-10 * K:
            return _at(act, phi, max(bias, 0.0), weight, K, "half-stable", a1)
    if through_0 and not smooth_at_0:
        raise ValueError(
            f"criticality: {act.name} is not smooth at 0, and no K in [1e-4, 1e3] is critical; whether K* = 0 is takes the first three "
            "derivatives there. Give a function that is smooth at 0, or one with phi(a h) = a phi(h), such as jax.nn.relu."
        )
    return _at(act, phi, None, None, None, "none", a1)


def _at(
    act: Activation, phi: Phi, C_b: float | None, C_W: float | None, K: float | None, kind: Universality, a1: float | None
) -> Criticality:
    chi: tuple[float, float] | tuple[None, None] = (None, None)
    if C_W is not None:
        if K == 0:
            slope = float(act.phi.slope.at(np.zeros(())))
            chi = C_W * slope**2, C_W * slope**2
        else:
            at = np.array(1.0 if K is None else K)
            chi = C_W * float(act.square_slope(at)), C_W * float(act.slope_square(at))
    return Criticality(C_b, C_W, K, kind, a1, *chi, act.name, phi)


def _homogeneous(act: Activation) -> bool:
    """Whether phi(a h) = a phi(h) for a > 0: linear on either side of 0."""
    h = np.geomspace(1e-3, 30, 60)
    sides = act.phi.at(h), act.phi.at(-h)
    return all(np.allclose(side, side[30] * h / h[30], rtol=1e-12, atol=1e-14) for side in sides)


def _expansion(act: Activation) -> tuple[float, float | None]:
    """``σ1`` and ``a1``, None if σ1 = 0."""
    first = act.phi.slope
    s1, s2, s3 = (float(f.at(np.zeros(()))) for f in (first, first.slope, first.slope.slope))
    if not all(math.isfinite(s) for s in (s1, s2, s3)):
        raise ValueError(
            f"criticality: the first three derivatives of {act.name} at 0 are {s1:g}, {s2:g}, {s3:g}; that it has a critical K* = 0 takes "
            "finite ones. Does it divide 0 by 0 there? Use jnp.where on both the argument and the result, or jnp.sinc."
        )
    return s1, s3 / s1 + 0.75 * (s2 / s1) ** 2 if abs(s1) > 1e-12 else None


def _roots(act: Activation) -> list[float]:
    """Kernels at which ``g' = E φ'²``, from the least."""

    def gap(K: np.ndarray) -> np.ndarray:
        slope = act.slope_square(K)
        # NaN where phi is constant.
        return np.asarray(act.square_slope(K) / np.where(slope == 0, np.nan, slope) - 1)

    at = gap(TRIED)
    clear = np.isfinite(at) & (np.abs(at) > 1e-11)
    crossing = clear[1:] & clear[:-1] & (np.sign(at[1:]) != np.sign(at[:-1]))
    (where,) = np.nonzero(crossing)
    brackets = [(float(TRIED[i]), float(TRIED[i + 1])) for i in where]
    return [
        optimize.root_scalar(lambda K: float(gap(np.array(K))), bracket=b, method="brentq", xtol=1e-14, rtol=1e-14).root for b in brackets
    ]


def phase_diagram(phi: Phi, C_b: Float[np.ndarray, " biases"], C_W: Float[np.ndarray, " weights"]) -> PhaseDiagram:
    """χ∥ and χ⊥ over the variances of biases and weights, at the fixed point that ``K = 1`` flows to in 2,000 layers.

    Interpolated between 281 kernels, with an error of about 1e-4: for pictures.

    Parameters
    ----------
    phi
        As in `criticality`.
    C_b, C_W
        The axes, not negative.

    Raises
    ------
    ValueError, TypeError
        As `criticality`; if a variance is negative.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> phase_diagram(jnp.sin, np.array([0.0, 0.1]), np.array([1.5])).chi_parallel.round(2)
    array([[0.63],
           [0.42]])
    """
    for name, axis in (("C_b", C_b), ("C_W", C_W)):
        if np.any(~(axis >= 0)):
            raise ValueError(f"phase_diagram: {name} has the value {np.min(axis)}. A variance is not negative, nor NaN.")
    act = activation(phi, "phase_diagram")
    known = np.geomspace(1e-7, 1e3, 281)
    with double():
        g, along, across = act.square(known), act.square_slope(known), act.slope_square(known)
    fair = np.isfinite(g) & np.isfinite(along) & np.isfinite(across)
    known, g, along, across = (a[fair] for a in (known, g, along, across))
    logs = np.log(known)

    def read(table: np.ndarray, K: np.ndarray) -> np.ndarray:
        return np.interp(np.log(np.maximum(K, known[0])), logs, table)

    weights, biases = np.meshgrid(C_W, C_b)
    K = np.ones_like(weights)
    for _ in range(2000):
        # In K between the tables' ends, g/K is what is smooth.
        K = np.minimum(biases + weights * K * read(g / known, K), 2 * known[-1])
    K = np.where(known[-1] > K, K, np.nan)
    return PhaseDiagram(C_b, C_W, K, *(weights * read(table, K) for table in (along, across)))
