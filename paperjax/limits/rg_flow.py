"""What a network of finite width adds to its kernel at order 1/n, layer by layer: the flow of the representation group."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from paperjax.limits.layer_moments import Activation, Phi, activation
from paperjax.limits.sampled import double

Weights = Literal["gaussian", "orthogonal"]
Layers = Float[np.ndarray, " depth"]


class RGFlow(NamedTuple):
    """A network of many neurons n in every layer, for one input, by layers 1 to depth; z are pre-activations, H is the NTK of a layer.

    Attributes
    ----------
    K
        ``E z²`` at infinite width.
    chi_parallel, chi_perp
        The susceptibilities of the map to the next layer.
    V
        The four-point vertex: ``E z_i² z_j² - (E z_i²)² = V / n`` for i ≠ j, and ``E z⁴ = 3 [(E z²)² + V / n]``.
    theta
        The mean of the NTK at infinite width.
    D, F
        Its correlation with pre-activations: ``Cov(H_ij, z_k z_l) = [δ_ij δ_kl D + (δ_ik δ_jl + δ_il δ_jk) F] / n``.
    A, B
        Its covariance: ``Cov(H_ij, H_kl) = [δ_ij δ_kl A + (δ_ik δ_jl + δ_il δ_jk) B] / n``.

    Examples
    --------
    >>> import jax
    >>> rg_flow(jax.nn.relu, 4, C_W=2.0).vertex.round(6)
    array([ 0.,  5., 10., 15.])
    """

    K: Layers
    chi_parallel: Layers
    chi_perp: Layers
    V: Layers
    theta: Layers
    D: Layers
    F: Layers
    A: Layers
    B: Layers

    @property
    def vertex(self) -> Layers:
        """``V / K²``: n times the excess kurtosis over 3."""
        return self.V / self.K**2

    @property
    def norm_variance(self) -> Layers:
        """``n Var(|z|² / n) / K²``, which is ``2 + V / K²``."""
        return 2 + self.vertex

    @property
    def ntk_variance(self) -> Layers:
        """``n Var(H_ii) / theta²``, which is ``(A + 2 B) / theta²``."""
        return (self.A + 2 * self.B) / self.theta**2


class _Layer(NamedTuple):
    """Expectations over z ~ N(0, K) of what a layer does."""

    g: float
    """E φ²."""
    g_slope: float
    """d/dK of it."""
    s: float
    """E φ'²."""
    s_slope: float
    """d/dK of it."""
    gg: float
    """E φ⁴."""
    gs: float
    """E φ² φ'²."""
    ss: float
    """E φ'⁴."""


def _layer(act: Activation, K: float, where: str) -> _Layer:
    def phi(z: np.ndarray) -> np.ndarray:
        return act.phi.at(z)

    def slope(z: np.ndarray) -> np.ndarray:
        return act.phi.slope.at(z)

    of = [
        lambda z: phi(z) ** 2,
        lambda z: z * phi(z) * slope(z) / K,
        lambda z: slope(z) ** 2,
        lambda z: slope(z) ** 2 * (z**2 - K) / (2 * K**2),
        lambda z: phi(z) ** 4,
        lambda z: phi(z) ** 2 * slope(z) ** 2,
        lambda z: slope(z) ** 4,
    ]
    found = _Layer(*(float(act.mean(f, np.array(K))) for f in of))
    if not all(math.isfinite(m) for m in found):
        missing = next(name for name, m in zip(found._fields, found) if not math.isfinite(m))
        raise ValueError(
            f"{where}: an expectation of {act.name} at K = {K:g} ({missing} of E phi^2, E phi'^2, E phi^4, E phi^2 phi'^2, E phi'^4 and "
            "slopes in K) is not finite, or cannot be found by quadrature. Does the kernel explode? Choose C_b and C_W by criticality(phi)."
        )
    return found


def rg_flow(
    phi: Phi,
    depth: int,
    *,
    C_W: float,
    C_b: float = 0.0,
    K: float = 1.0,
    weights: Weights = "gaussian",
    learning_rates: tuple[float, float] | None = None,
) -> RGFlow:
    """Kernel, four-point vertex and NTK with its fluctuations at order 1/n, for ``z' = b + W φ(z)``, by recursion over layers.

    With means over z ~ N(0, K), ``Ω = λ_W φ² + C_W θ φ'²``, ``χ∥ = C_W d⟨φ²⟩/dK`` and ``χ⊥ = C_W ⟨φ'²⟩``::

        K' = C_b + C_W ⟨φ²⟩                             θ' = λ_b + λ_W ⟨φ²⟩ + χ⊥ θ
        V' = χ∥² V + C_W² (⟨φ⁴⟩ - ⟨φ²⟩²)                D' = χ∥ χ⊥ D + C_W (⟨Ω φ²⟩ - ⟨Ω⟩ ⟨φ²⟩) + χ∥ V d⟨Ω⟩/dK
        F' = χ∥² F + C_W² ⟨φ² φ'²⟩ θ                    B' = χ⊥² B + C_W² ⟨φ'⁴⟩ θ²
        A' = χ⊥² A + ⟨Ω²⟩ - ⟨Ω⟩² + V (d⟨Ω⟩/dK)² + 2 χ⊥ D d⟨Ω⟩/dK

    Haar orthogonal weights, derived here from the integrals of Weingarten at order 1/n, subtract ``2 (C_W ⟨φ²⟩)²`` from V',
    ``χ⊥ C_W ⟨φ²⟩ θ`` from F' and ``χ⊥² θ²`` from B'.

    Parameters
    ----------
    phi
        A function of JAX arrays that acts entry by entry.
    depth
        Layers of weights, at least 1: pre-activations of layer 1 to depth. All hidden layers have n neurons.
    C_W, C_b
        Variance of a weight times fan-in, and of a bias.
    K
        Of the first layer, ``C_b + C_W |x|² / n_0``.
    weights
        ``"gaussian"``, or ``"orthogonal"``: Haar in every layer, the first too, which keeps the norm of x, so that V starts at
        ``-2 (K - C_b)²`` and not at 0.
    learning_rates
        ``(λ_b, λ_W)``, of biases, and of weights times fan-in. Left out: ``(C_b, C_W)``, which is NTK parametrization.

    Returns
    -------
    RGFlow
        In float64.

    Raises
    ------
    ValueError
        If depth is below 1, a variance is negative, both learning rates are 0, K is not positive, weights is another word, or an
        expectation is not finite; as `criticality` does for an activation that jumps or has no second moment.
    TypeError
        If phi is no function, or depth is no whole number.

    References
    ----------
    Roberts, Yaida and Hanin, arXiv 2106.10165, chapters 4, 5 and 8; orthogonal weights: Day, Kahn and Roberts, arXiv 2310.07765.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> flow = rg_flow(jnp.tanh, 100, C_W=1.0)
    >>> float(flow.K[-1].round(4)), float(np.diff(flow.vertex)[-1].round(2))  # 1 / 2l, 2/3
    (0.0051, 0.66)
    """
    _check_depth(depth, "rg_flow")
    _check_weights(weights, "rg_flow")
    rate_b, rate_W = (C_b, C_W) if learning_rates is None else learning_rates
    for name, number in (("C_W", C_W), ("C_b", C_b), ("learning_rates[0]", rate_b), ("learning_rates[1]", rate_W)):
        if not 0 <= number < math.inf:
            raise ValueError(f"rg_flow: {name} = {number}. Give a finite number that is not negative.")
    if C_W == 0:
        raise ValueError("rg_flow: C_W = 0 cuts the network after the first layer. Give a positive one; criticality(phi) finds one.")
    if rate_b == rate_W == 0:
        raise ValueError("rg_flow: learning_rates = (0, 0) train nothing, so that there is no NTK. Give one that is positive.")
    if not C_b < K < math.inf:
        raise ValueError(f"rg_flow: K = {K} is C_b + C_W |x|² / n_0, so it is finite and above C_b = {C_b}. Give an input that is not 0.")
    act = activation(phi, "rg_flow")
    haar = float(weights == "orthogonal")
    x_square = (K - C_b) / C_W
    V, theta, D, F, A, B = 0.0 - 2 * haar * (K - C_b) ** 2, rate_b + rate_W * x_square, 0.0, 0.0, 0.0, 0.0
    rows = []
    for _ in range(depth):
        with double():
            m = _layer(act, K, "rg_flow")
        along, across = C_W * m.g_slope, C_W * m.s
        rows.append((K, along, across, V, theta, D, F, A, B))
        c = C_W * theta
        omega, omega_slope = rate_W * m.g + c * m.s, rate_W * m.g_slope + c * m.s_slope
        omega_g = rate_W * m.gg + c * m.gs - omega * m.g
        omega_omega = rate_W**2 * m.gg + 2 * rate_W * c * m.gs + c**2 * m.ss - omega**2
        A = across**2 * A + omega_omega + V * omega_slope**2 + 2 * across * D * omega_slope
        B = across**2 * B + c**2 * m.ss - haar * (across * theta) ** 2
        D = along * across * D + C_W * omega_g + along * V * omega_slope
        F = along**2 * F + C_W * c * m.gs - haar * across * C_W * m.g * theta
        V = along**2 * V + C_W**2 * (m.gg - m.g**2) - 2 * haar * (C_W * m.g) ** 2
        K, theta = C_b + C_W * m.g, rate_b + rate_W * m.g + across * theta
        if not K > 0:
            raise ValueError(f"rg_flow: the kernel of {act.name} is {K} after layer {len(rows)}. Choose C_b and C_W by criticality(phi).")
    return RGFlow(*np.array(rows).T)


class ExactFluctuations(NamedTuple):
    """Of a network of n neurons a layer at its criticality, exactly, by layers 1 to depth.

    Attributes
    ----------
    vertex
        ``n (E z_i² z_j² / K² - 1)``, i ≠ j; the excess kurtosis of z is 3/n times it.
    norm_variance
        ``n Var(|z|² / n) / K²``.

    Examples
    --------
    >>> import jax
    >>> exact_fluctuations(jax.nn.identity, 3, 10).norm_variance.round(3)
    array([2.  , 4.4 , 7.28])
    """

    vertex: Layers
    norm_variance: Layers


def exact_fluctuations(phi: Phi, depth: int, width: int, weights: Weights = "gaussian") -> ExactFluctuations:
    """The fluctuations of a bias-free network with ``φ(αh) = α φ(h)``, α > 0 (ReLU, linear, leaky ReLU, abs), at any width.

    ``E|z|⁴ / (E|z|²)²`` is multiplied in each layer with r, and ``A_k`` is half the sum of the k-th powers of the two slopes::

        gaussian    (1 + 2/n) r^(l-1)    r = 1 + (3 A_4/A_2² - 1)/n             1 + 5/n for ReLU, 1 + 2/n for linear
        orthogonal  r^(l-1)              r = 1 + 3 (A_4/A_2² - 1)/(n + 2)       1 + 3/(n + 2), 1

    Parameters
    ----------
    phi, weights
        As in `rg_flow`; orthogonal in the first layer too.
    depth, width
        Layers of weights, and neurons n in each.

    Raises
    ------
    ValueError
        If phi is not linear on either side of 0, depth or width is below 1, or weights is another word.
    TypeError
        If phi is no function, or depth or width no whole number.

    References
    ----------
    Linear, Gaussian: arXiv 2106.10165, chapter 3. The others are derived here; orthogonal from ``E u_1⁴ = 3 E u_1² u_2²`` on the sphere.

    Examples
    --------
    >>> import jax
    >>> exact_fluctuations(jax.nn.relu, 3, 10).vertex.round(3)  # n [(1 + 5/n)^(l - 1) - 1]
    array([ 0. ,  5. , 12.5])
    """
    _check_depth(depth, "exact_fluctuations")
    _check_depth(width, "exact_fluctuations", "width")
    _check_weights(weights, "exact_fluctuations")
    act = activation(phi, "exact_fluctuations")
    h = np.geomspace(1e-2, 10, 20)
    with double():
        above, below = act.phi.at(h) / h, act.phi.at(-h) / -h
    if not (np.ptp(above) <= 1e-12 * abs(above[0]) + 1e-14 and np.ptp(below) <= 1e-12 * abs(below[0]) + 1e-14):
        raise ValueError(
            f"exact_fluctuations: {act.name} is not linear on either side of 0, and only then are the moments known at finite width. "
            "rg_flow has them to first order in 1/n for any activation."
        )
    a2, a4 = (above[0] ** 2 + below[0] ** 2) / 2, (above[0] ** 4 + below[0] ** 4) / 2
    if a2 == 0:
        raise ValueError(f"exact_fluctuations: {act.name} is 0 everywhere. Give an activation that keeps a signal.")
    n, before = float(width), np.arange(depth)
    if weights == "gaussian":
        # By expm1 and log1p: at large widths r is 1 to rounding.
        grown = np.expm1(before * np.log1p((3 * a4 / a2**2 - 1) / n))
        return ExactFluctuations(n * grown, n * grown + 2 * (1 + grown))
    grown = np.expm1(before * np.log1p(3 * (a4 / a2**2 - 1) / (n + 2)))
    return ExactFluctuations((n * n * grown - 2 * n) / (n + 2), n * grown)


def optimal_ratio(growth: float, outputs: int = 1) -> float:
    """The ratio of depth to width at which the mutual information of two halves of the outputs is largest: ``4 / ((20 + 3 n_L) ν)``.

    Past it, fluctuations between networks take more than the interaction of neurons gives.

    Parameters
    ----------
    growth
        ν, by which ``V / K²`` grows a layer: 5 for ReLU, 2 for linear, 2/3 for tanh and sin; see ``rg_flow(...).vertex``.
    outputs
        ``n_L``, neurons in the last layer.

    Raises
    ------
    ValueError
        If growth is not positive (orthogonal weights may have none, and then there is no such ratio), or outputs below 1.
    TypeError
        If outputs is no whole number.

    References
    ----------
    arXiv 2106.10165, appendix A: the maximum of ``x² - (20 + 3 n_L) x³ / 6``, x = ν L / n, which leading orders are proportional to.

    Examples
    --------
    >>> round(optimal_ratio(5.0, 10), 3)
    0.016
    """
    _check_depth(outputs, "optimal_ratio", "outputs")
    if not 0 < growth < math.inf:
        raise ValueError(
            f"optimal_ratio: growth = {growth}. Give how much V / K² grows a layer, a positive number; where it does not grow, as with "
            "orthogonal weights and tanh, no ratio is the best."
        )
    return 4 / ((20 + 3 * outputs) * growth)


def _check_depth(number: object, where: str, name: str = "depth") -> None:
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
        raise TypeError(f"{where}: {name} = {number!r} is no whole number. Give one of at least 1.")
    if number < 1:
        raise ValueError(f"{where}: {name} = {number}, and pre-activations begin with layer 1. Give at least 1.")


def _check_weights(weights: str, where: str) -> None:
    if weights not in ("gaussian", "orthogonal"):
        raise ValueError(f"{where}: weights = {weights!r} is neither 'gaussian' nor 'orthogonal'.")
