"""Ridge regression on the last layer of a deep network whose other weights stay as drawn: its test error in high dimension, in closed form.

The features of ``x ~ N(0, Ω_0)`` are ``h_l = φ_l(W_l h_{l-1} / sqrt(fan_in))``, ``h_0 = x``. To leading order each neuron is linear in
the layer below plus independent noise (`feature_layers`), a target is linear in x plus independent noise (`Target`), and ridge
regression does as if features were Gaussian (`ridge_equivalent`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from paperjax.limits.layer_moments import Activation, Phi, activation
from paperjax.limits.ridge import Matrix, RidgeEquivalent, Vector, checked_covariance, ridge_equivalent
from paperjax.limits.sampled import double


class FeatureLayer(NamedTuple):
    """A layer of p random features of Gaussian inputs, ``h ≈ mean + linear x + noise``, with the weights as they are.

    Attributes
    ----------
    mean
        ``κ_0 = E φ(u)`` of each neuron, ``(p,)``; its pre-activation u has mean ``W mean / sqrt(fan_in)`` and variance r.
    covariance
        Ω, ``(p, p)``.
    kappa_1
        ``E φ'(u)``, found as ``E (u - E u) φ(u) / r``, which exists where φ jumps, ``(p,)``.
    kappa_star
        ``(Var φ(u) - r κ_1²)^(1/2)``, ``(p,)``.
    linear
        Φ, ``(p, d)``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> layer = feature_layers(jnp.tanh, [np.ones((1, 4))])[0]  # one neuron, u ~ N(0, 1)
    >>> float(layer.kappa_1[0].round(4)), float(layer.kappa_star[0].round(4)), layer.linear.round(4).tolist()
    (0.6057, 0.1656, [[0.3029, 0.3029, 0.3029, 0.3029]])
    """

    mean: Float[np.ndarray, " p"]
    covariance: Float[np.ndarray, "p p"]
    kappa_1: Float[np.ndarray, " p"]
    kappa_star: Float[np.ndarray, " p"]
    linear: Float[np.ndarray, "p d"]


class Target(NamedTuple):
    """What of a function ``y(x)``, x ~ N(0, Ω_0), random features see; the rest of it is noise to them.

    Attributes
    ----------
    mean
        ``E y``.
    linear
        ``a = E ∇y = Ω_0^-1 E x y``, ``(d,)``.
    square
        ``E y²``, without the noise of labels.

    Examples
    --------
    >>> Target(0.0, np.ones(3), 5.0).square  # y = x_1 + x_2 + x_3 + something of variance 2
    5.0
    """

    mean: float
    linear: Vector
    square: float


def feature_layers(phi: Phi | Sequence[Phi], weights: Sequence[Matrix], covariance: Matrix | None = None) -> tuple[FeatureLayer, ...]:
    """Mean and covariance of every layer of features, linearised neuron by neuron.

    With ``r = diag(W Ω_{l-1} Wᵀ) / fan_in``, and expectations over ``u ~ N(W mean_{l-1} / sqrt(fan_in), r)`` for each neuron::

        Ω_l = κ_1 κ_1ᵀ ∘ W Ω_{l-1} Wᵀ / fan_in + diag(κ_*²)        Φ_l = diag(κ_1) W Φ_{l-1} / sqrt(fan_in)

    For odd φ and normal weights every κ_1 and κ_* tends to one number, and this is the paper's recursion, whose error in Ω is of relative
    size d^-1/2 (Frobenius). With a κ of each neuron, as here, the diagonal is right and the error is 1/d for odd φ; others have
    means and terms of second order, ``(φ_2 c)²/2`` with c ~ d^-1/2, and keep d^-1/2.

    Parameters
    ----------
    phi
        A function of JAX arrays that acts entry by entry, or one for each layer. It may jump.
    weights
        ``(p_l, p_{l-1})`` from the first layer on, with entries of order 1: pre-activations are ``W h / sqrt(fan_in)``.
    covariance
        ``Ω_0`` of the inputs, ``(d, d)``; the identity if left out.

    Returns
    -------
    tuple of FeatureLayer
        From the first layer to the last, in float64.

    Raises
    ------
    ValueError
        If there are no weights (depth 0) or a size is 0, shapes do not chain, there are not as many activations as layers, a number is
        not finite, the covariance is none, or an activation has no finite second moment.
    TypeError
        If an activation is no function.

    References
    ----------
    Schröder, Cui, Dmitriev and Loureiro, arXiv 2302.00401.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> rng = np.random.default_rng(0)
    >>> W = [rng.standard_normal((300, 200)), rng.standard_normal((300, 300))]
    >>> [float((np.trace(layer.covariance) / 300).round(2)) for layer in feature_layers(jnp.tanh, W)]  # E tanh², twice
    [0.39, 0.24]
    """
    where = "feature_layers"
    matrices = _weights(weights, where)
    acts = _activations(phi, len(matrices), where)
    omega = _input_covariance(covariance, matrices[0].shape[1], where)
    mean, linear = np.zeros(len(omega)), np.eye(len(omega))
    layers = []
    for number, (act, W_PxF) in enumerate(zip(acts, matrices), 1):
        W_PxF = W_PxF / math.sqrt(W_PxF.shape[1])
        before_PxP, centre = W_PxF @ omega @ W_PxF.T, W_PxF @ mean
        r = np.diagonal(before_PxP).copy()
        mean, kappa_1, kappa_star = _kappas(act, centre, r, f"{where}: layer {number}")
        omega = kappa_1[:, None] * before_PxP * kappa_1
        omega[np.diag_indices_from(omega)] += kappa_star**2
        linear = kappa_1[:, None] * (W_PxF @ linear)
        layers.append(FeatureLayer(mean, omega, kappa_1, kappa_star, linear))
    return tuple(layers)


def single_index(link: Phi, direction: Vector, covariance: Matrix | None = None) -> Target:
    """The target ``y = g(w·x)``: by Stein's lemma ``a = w E g'(s)``, ``s ~ N(0, wᵀ Ω_0 w)``.

    Parameters
    ----------
    link
        g, a function of JAX arrays that acts entry by entry; it may jump.
    direction
        w, ``(d,)``.
    covariance
        ``Ω_0``; the identity if left out.

    Raises
    ------
    ValueError
        If direction is 0, empty or not finite, the covariance is none, or g has no finite second moment.
    TypeError
        If g is no function.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> target = single_index(jnp.sign, np.array([1.0, 0.0]))
    >>> target.linear.round(4).tolist(), round(target.square, 6)  # sqrt(2 / pi)
    ([0.7979, 0.0], 1.0)
    """
    w = np.asarray(direction, np.float64)
    if w.size == 0 or not np.all(np.isfinite(w)) or not np.any(w):
        raise ValueError("single_index: direction is empty, 0 or not finite, so the target is a constant or nothing. Give a vector of x.")
    omega = _input_covariance(covariance, len(w), "single_index")
    act = activation(link, "single_index", jumping=True)
    mean, kappa_1, kappa_star = (float(k[0]) for k in _kappas(act, np.zeros(1), np.array([w @ omega @ w]), "single_index"))
    return Target(mean, kappa_1 * w, mean**2 + kappa_1**2 * float(w @ omega @ w) + kappa_star**2)


def network_target(phi: Phi | Sequence[Phi], weights: Sequence[Matrix], readout: Vector, covariance: Matrix | None = None) -> Target:
    """The target ``y = w·h_L(x) / sqrt(fan_in)`` of another deep network, whose moments are those of `feature_layers`.

    Parameters
    ----------
    phi, weights, covariance
        As in `feature_layers`.
    readout
        w, of as many entries as the last layer has neurons.

    Raises
    ------
    ValueError, TypeError
        As `feature_layers` does, and if readout has another size.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> W = np.random.default_rng(0).standard_normal((400, 100))
    >>> round(network_target(jnp.tanh, [W], np.ones(400)).square, 1)  # about E tanh²
    0.4
    """
    layer = feature_layers(phi, weights, covariance)[-1]
    w = np.asarray(readout, np.float64)
    if w.shape != layer.mean.shape or not np.all(np.isfinite(w)):
        raise ValueError(
            f"network_target: readout has shape {w.shape}, or is not finite, and the last layer has {layer.mean.size} neurons."
        )
    w = w / math.sqrt(len(w))
    mean = float(w @ layer.mean)
    return Target(mean, w @ layer.linear, mean**2 + float(w @ layer.covariance @ w))


def random_features_error(
    phi: Phi | Sequence[Phi],
    weights: Sequence[Matrix],
    target: Target,
    samples: int | Sequence[int] | np.ndarray,
    ridge: float | Sequence[float] | np.ndarray,
    *,
    noise: float = 0.0,
    covariance: Matrix | None = None,
) -> RidgeEquivalent:
    """Test error of ridge regression on the last layer of a deep network with random weights: `feature_layers`, then `ridge_equivalent`.

    Features have the second moments ``Ω_L + mean meanᵀ`` and ``E h y = Φ_L Ω_0 a + mean E y``. Over many samples it is a curve with
    double descent.

    Parameters
    ----------
    phi, weights, covariance
        As in `feature_layers`.
    target
        `single_index`, `network_target`, or moments of your own.
    samples, ridge
        As in `ridge_equivalent`.
    noise
        Variance of what is added to labels.

    Returns
    -------
    RidgeEquivalent
        In float64.

    Raises
    ------
    ValueError, TypeError
        As the two functions do, and if noise is negative or the target has another dimension.

    References
    ----------
    Schröder, Cui, Dmitriev and Loureiro, arXiv 2302.00401.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> rng = np.random.default_rng(0)
    >>> weights = [rng.standard_normal((60, 40)), rng.standard_normal((60, 60))]
    >>> target = single_index(jnp.tanh, rng.standard_normal(40) / 40**0.5)
    >>> found = random_features_error(jnp.tanh, weights, target, [20, 40, 60, 200], 1e-5, noise=0.1)
    >>> bool(found.error[1:3].max() > 2 * found.error[[0, 3]].max())
    True
    """
    where = "random_features_error"
    if not 0 <= noise < math.inf:
        raise ValueError(f"{where}: noise = {noise}. Give the variance of what is added to labels, finite and not negative.")
    layer = feature_layers(phi, weights, covariance)[-1]
    a, d = np.asarray(target.linear, np.float64), layer.linear.shape[1]
    if a.shape != (d,):
        raise ValueError(
            f"{where}: target.linear has shape {a.shape}, and inputs have dimension {d}. Give E x y / E x² of each entry of x."
        )
    omega_0 = _input_covariance(covariance, d, where)
    cross = layer.linear @ (omega_0 @ a) + layer.mean * target.mean
    return ridge_equivalent(layer.covariance + np.outer(layer.mean, layer.mean), cross, target.square + noise, samples, ridge)


def _kappas(act: Activation, centre: np.ndarray, r: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with double():
        mean = act.mean(act.phi.at, r, centre)
        square = act.mean(lambda u: act.phi.at(u) ** 2, r, centre)
        # About a fixed point, so that one function serves neurons of every mean.
        first = act.mean(lambda u: u * act.phi.at(u), r, centre) - centre * mean
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(square)) and np.all(np.isfinite(first))):
        raise ValueError(
            f"{where}: {act.name} has no finite second moment at variance {r.max():g}, or one that quadrature cannot find. Do the layers "
            "explode? Weights have entries of order 1, as pre-activations are W h / sqrt(fan_in)."
        )
    kappa_1 = np.divide(first, r, out=np.zeros_like(r), where=r > 0)
    return mean, kappa_1, np.sqrt(np.maximum(square - mean**2 - r * kappa_1**2, 0.0))


def _weights(weights: Sequence[Matrix], where: str) -> list[np.ndarray]:
    found = [np.asarray(w, np.float64) for w in weights]
    if not found:
        raise ValueError(
            f"{where}: weights is empty, a network of depth 0 with no features. Give a matrix (neurons, fan_in) for each layer."
        )
    for i, w in enumerate(found):
        if w.ndim != 2 or 0 in w.shape:
            raise ValueError(f"{where}: weights[{i}] has shape {w.shape}. Give a matrix (neurons, fan_in), no size of which is 0.")
        if i and w.shape[1] != found[i - 1].shape[0]:
            raise ValueError(
                f"{where}: weights[{i}] has fan_in {w.shape[1]}, and the layer below {found[i - 1].shape[0]} neurons. "
                "Matrices are (neurons, fan_in): transpose those that are (fan_in, neurons)."
            )
        if not np.all(np.isfinite(w)):
            raise ValueError(f"{where}: weights[{i}] has entries that are not finite.")
    return found


def _activations(phi: Phi | Sequence[Phi], depth: int, where: str) -> list[Activation]:
    if isinstance(phi, Callable):
        return [activation(phi, where, jumping=True)] * depth
    if len(phi) != depth:
        raise ValueError(f"{where}: {len(phi)} activations and {depth} layers of weights. Give one for each layer, or one for all.")
    return [activation(each, where, jumping=True) for each in phi]


def _input_covariance(covariance: Matrix | None, d: int, where: str) -> np.ndarray:
    if covariance is None:
        return np.eye(d)
    found = checked_covariance(covariance, where)
    if len(found) != d:
        raise ValueError(f"{where}: covariance is {found.shape}, and inputs have dimension {d}.")
    return found
