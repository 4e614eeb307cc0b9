"""Deterministic equivalent and error universality of deep random features learning.

Schröder, Cui, Dmitriev, Loureiro, ICML 2023, arXiv 2302.00401.

The weights of a deep network stay as drawn, and ridge regression fits the last layer, of features ``h = phi(W_L ... phi(W_1 x))``, to n
points. With x ~ N(0, I) a neuron is to leading order linear in the layer below plus noise of its own, so that with fan_in neurons below

    Omega_l = kappa_1^2 W_l Omega_{l-1} W_l^T / fan_in + kappa_*^2 I

and the test error is that of Gaussian features of this covariance, which has a deterministic equivalent. Both are `pj.limits`'s:
`feature_layers`, with a kappa_1 and a kappa_* of each neuron, and `random_features_error`. That the error is that of Gaussian
features is proved for ridge regression and conjectured for other losses (error universality).

Here: d = 200, three tanh layers of 300 with weights of variance 4 (over fan_in), one draw of them, no noise of labels, ridge 0.01; target
y = sign(w . x), of which a linear part with coefficient (2/pi)^1/2 is seen by the features and the rest, 1 - 2/pi, is noise to them.

Claims, expected numbers and tolerances
    test error over the equivalent, n = 75, 150, 300, 600, 1200: farthest      1, +-0.03
    error at n = 300 over the larger of those at n = 75 and 1200               at least 1.3 (double descent)
    Gaussian features of the same covariance: error over networks', farthest   1, +-0.03
    the same for logistic loss: share of wrong signs, n = 75, 150, 300         1, +-0.03
    log-log slope on d of the relative error of Omega_3, one kappa a layer     -0.5, +-0.1
    the same, a kappa of each neuron                                           -1, +-0.25

Controls: linear features, without kappa_*; a ridge of 1, with which there is no peak; Omega without kappa_*^2, whose error does not
fall; ReLU, which is not odd, so that neurons have products of second order in common.

What did not hold as first proposed
    - The n under the recursion of the covariance is fan_in, that of the equivalent the number of points.
    - O(d^-1/2) is the error of the paper's covariance, and comes from its diagonal alone: with a kappa_1 and a kappa_* for the variance
      of each neuron it is 1/d for odd activations.
    - Three per cent at n = 300 with a ridge small enough for a high peak: there the error varies by a tenth over draws of the points, so
      it is the mean of many draws that is compared.

Measured (quick): 1.003 +- 0.007, 1.430 +- 0.014, 0.998 +- 0.010, 1.006 +- 0.007, -0.487 +- 0.001, -0.84 +- 0.02.

Run time: quick about 50 s on two CPU cores (93 s of processor time)
Command:  paperjax run deep-random-features-deterministic-equivalent
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]
Features = Callable[[Array, Array], Array]
Fit = Callable[[Array, Array], Array]

SEEDS, LAYERS, GAIN = 8, 3, 2.0
D, WIDTH, FRESH = 200, 300, 4000
SAMPLES, FEW = (75, 150, 300, 600, 1200), (75, 150, 300)
RIDGE, HEAVY = 0.01, 1.0
NETS = 3  # Over which errors of covariances are averaged.
NOTHING = pj.Model(lambda key, x: jax.random.normal(key, (1,)), lambda params, x: params[None] * jnp.ones((1, 1)))


def one(key: Array) -> pj.data.Dataset:
    """A point that the measures, which draw their own, do not look at."""
    x = jax.random.normal(key, (1, 1))
    return pj.data.Dataset(x, x, x, x, "one point", "generated")


@functools.cache
def drawn_weights(d: int, width: int, net: int = 0) -> tuple[np.ndarray, ...]:
    """A network's."""
    rng = np.random.default_rng([d, net])
    return tuple(GAIN * rng.standard_normal((width, fan_in)) for fan_in in (d, *[width] * (LAYERS - 1)))


@functools.cache
def layers(d: int, width: int, phi: Any = jnp.tanh, net: int = 0) -> tuple[pj.limits.FeatureLayer, ...]:
    """Linearised, a kappa for each neuron."""
    return pj.limits.feature_layers(phi, drawn_weights(d, width, net))


@functools.cache
def direction() -> np.ndarray:
    """The w of the target, of length 1."""
    w = np.random.default_rng(1).standard_normal(D)
    return w / np.linalg.norm(w)


@functools.cache
def theory(ridge: float) -> np.ndarray:
    """Error at every n."""
    target = pj.limits.single_index(jnp.sign, direction())
    return pj.limits.random_features_error(jnp.tanh, drawn_weights(D, WIDTH), target, SAMPLES, ridge).error


def tanh_network(x_BxD: Array, key: Array) -> Float[Array, "B width"]:
    """The last layer of the network."""
    h = x_BxD
    for w in drawn_weights(D, WIDTH):
        h = jnp.tanh(h @ jnp.asarray(w.T / w.shape[1] ** 0.5, jnp.float32))
    return h


def gaussian(noise: bool) -> Features:
    """Gaussian features: each neuron kappa_1 times its pre-activation plus, with noise, kappa_* times a normal number."""

    def features(x_BxD: Array, key: Array) -> Float[Array, "B width"]:
        h = x_BxD
        for w, layer, k in zip(drawn_weights(D, WIDTH), layers(D, WIDTH), jax.random.split(key, LAYERS)):
            kappa_1, kappa_star = (jnp.asarray(kappa, jnp.float32) for kappa in (layer.kappa_1, layer.kappa_star))
            h = kappa_1[None] * (h @ jnp.asarray(w.T / w.shape[1] ** 0.5, jnp.float32))
            if noise:
                h = h + kappa_star[None] * jax.random.normal(k, h.shape)
        return h

    return features


def solve(a_PxP: Array, b_P: Array) -> Array:
    """Of a positive matrix, by conjugate gradients.

    Factorizations at once, each over seeds, may wait for one another in XLA's pool of threads for ever.
    """
    return jax.scipy.sparse.linalg.cg(lambda v: a_PxP @ v, b_P, tol=1e-5, maxiter=400)[0]


def ridge_fit(ridge: float) -> Fit:
    """``argmin (1/n) sum (y - h . theta)^2 + ridge |theta|^2`` of the first n points, for every n of `SAMPLES`."""

    def fit(h_NxP: Array, y_N: Array) -> Float[Array, "n P"]:
        parts = list(zip(jnp.split(h_NxP, SAMPLES[:-1]), jnp.split(y_N, SAMPLES[:-1])))
        squares = jnp.cumsum(jnp.stack([h.T @ h for h, _ in parts]), axis=0)
        products = jnp.cumsum(jnp.stack([h.T @ y for h, y in parts]), axis=0)

        def one(given: tuple[Array, Array, Array]) -> Array:
            n, square, product = given
            return solve(square / n + ridge * jnp.eye(len(product)), product / n)

        return jax.lax.map(one, (jnp.array(SAMPLES), squares, products))

    return fit


def logistic_fit(h_NxP: Array, y_N: Array) -> Float[Array, "n P"]:
    """``argmin (1/n) sum log(1 + exp(-y h . theta)) + ridge/2 |theta|^2``, for every n of `FEW`, by Newton's method from 0."""
    p = h_NxP.shape[1]

    def one(n: Array) -> Array:
        h = jnp.where(jnp.arange(len(h_NxP))[:, None] < n, h_NxP, 0)

        def newton(theta_P: Array, _: None) -> tuple[Array, None]:
            odds_N = jax.nn.sigmoid(-y_N * (h @ theta_P))
            curvature_PxP = (h.T * (odds_N * (1 - odds_N))[None]) @ h / n + RIDGE * jnp.eye(p)
            return theta_P - solve(curvature_PxP, RIDGE * theta_P - h.T @ (y_N * odds_N) / n), None

        return jax.lax.scan(newton, jnp.zeros(p), length=6)[0]

    return jax.lax.map(one, jnp.array(FEW))


def learned(features: Features, fit: Fit, wrong: Callable[[Array, Array], Array], most: int, draws: int) -> Callable[..., Array]:
    """Test error at each n, of the first n of the points that are drawn; mean over draws."""
    w = direction().astype(np.float32)

    def measure(data: Any, key: Array) -> Float[Array, " n"]:
        k_fresh, k_noise, k_draws = jax.random.split(key, 3)
        fresh = jax.random.normal(k_fresh, (FRESH, D))
        h_fresh, y_fresh = features(fresh, k_noise), jnp.sign(fresh @ w)

        def draw(k: Array) -> Array:
            k_x, k_h = jax.random.split(k)
            x = jax.random.normal(k_x, (most, D))
            theta_nxP = fit(features(x, k_h), jnp.sign(x @ w))
            return jax.vmap(lambda theta: wrong(y_fresh, h_fresh @ theta))(theta_nxP)

        return jnp.mean(jax.lax.map(draw, jax.random.split(k_draws, draws)), axis=0)

    return measure


def square(y: Array, f: Array) -> Array:
    """Mean square error."""
    return jnp.mean((y - f) ** 2)


def signs(y: Array, f: Array) -> Array:
    """Share of wrong signs."""
    return jnp.mean((y * f < 0).astype(jnp.float32))


def one_kappa(d: int, net: int, stars: bool) -> np.ndarray:
    """The paper's covariance of the last layer, whose kappas are those of the mean variance of a layer; or that without kappa_*."""
    omega, added = np.eye(d), np.eye(d)
    for w in drawn_weights(d, d, net):
        r = GAIN**2 * np.trace(omega) / d
        kappas = pj.limits.feature_layers(jnp.tanh, [np.full((1, 1), r**0.5)])[0]
        omega, added = (kappas.kappa_1**2 * (w @ below @ w.T) / d for below in (omega, added))
        omega[np.diag_indices(d)] += kappas.kappa_star**2
    return omega if stars else added


def covariance_errors(phi: Any, stars: bool, points: int) -> Callable[..., Array]:
    """Relative Frobenius errors of the last layer's covariance, squared: the product of its differences from two halves of points.

    First of that with one kappa a layer (of tanh; without kappa_* if not stars), then of that with a kappa of each neuron.
    """

    def measure(data: Any, key: Array, d: int) -> Float[Array, "2"]:
        last = [layers(d, d, phi, net)[-1] for net in range(NETS)]
        omegas = np.stack([[one_kappa(d, net, stars), layer.covariance] for net, layer in enumerate(last)])
        weights = np.stack([drawn_weights(d, d, net) for net in range(NETS)]) / d**0.5
        given = weights, omegas, np.stack([layer.mean for layer in last])

        def of_net(given: Any) -> Array:
            (weights_LxDxD, omegas_2xDxD, mean_D), key = given

            def part(total: Array, k: Array) -> tuple[Array, None]:
                h = jax.random.normal(k, (500, d))
                h = jax.lax.scan(lambda h, w: (phi(h @ w.T), None), h, weights_LxDxD)[0] - mean_D[None]
                return total + h.T @ h, None

            def half(k: Array) -> Array:
                keys = jax.random.split(k, points // (500 * NETS))
                return jax.lax.scan(part, jnp.zeros((d, d)), keys)[0] / (500 * len(keys))

            first, second = (half(k)[None] - omegas_2xDxD for k in jax.random.split(key))
            return jnp.sum(first * second, axis=(1, 2)) / jnp.sum(omegas_2xDxD**2, axis=(1, 2))

        given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given)
        return jnp.mean(jax.lax.map(of_net, (given, jax.random.split(key, NETS))), axis=0)

    return measure


def drawn(measure: Any, **axes: Any) -> pj.Experiment:
    """Networks as they are drawn; the measures fit the last layer."""
    grid = pj.grid(**axes, lr=1.0, seed=SEEDS)
    return pj.Experiment(lambda: NOTHING, one, grid=grid, steps=0, measure_at=[0], measures={"error": measure})


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Ridge and logistic regression on networks and on Gaussian features, and the error of covariances over d."""
    quick = size == "quick"
    draws, points, sizes = (20, 18_000, [20, 40, 80, 160]) if quick else (240, 400_000, [32, 64, 128, 256, 512])
    tanh, surrogate, linear, most = tanh_network, gaussian(True), gaussian(False), SAMPLES[-1]
    return {
        "networks": drawn(learned(tanh, ridge_fit(RIDGE), square, most, draws)),
        "heavy-ridge": drawn(learned(tanh, ridge_fit(HEAVY), square, most, 2)),
        "gaussian": drawn(learned(surrogate, ridge_fit(RIDGE), square, most, draws)),
        "linear": drawn(learned(linear, ridge_fit(RIDGE), square, most, 2)),
        "logistic-networks": drawn(learned(tanh, logistic_fit, signs, FEW[-1], draws // 4)),
        "logistic-gaussian": drawn(learned(surrogate, logistic_fit, signs, FEW[-1], draws // 4)),
        "logistic-linear": drawn(learned(linear, logistic_fit, signs, FEW[-1], 2)),
        "covariance": drawn(covariance_errors(jnp.tanh, True, points), d=sizes),
        "covariance-no-star": drawn(covariance_errors(jnp.tanh, False, points // 6), d=sizes),
        "covariance-relu": drawn(covariance_errors(jax.nn.relu, True, points // 6), d=sizes),
    }


def errors(result: "xarray.Dataset") -> np.ndarray:
    """Test errors, ``(seed, n)``."""
    return result.error.isel(step=0).transpose("seed", "error_0").values.astype(np.float64)


def farthest(ratio_SxN: np.ndarray) -> Estimate:
    """Of the ratios at every n, that which may be the farthest from 1."""
    return max((estimate(ratio) for ratio in ratio_SxN.T), key=lambda e: max(abs(end - 1) for end in e.interval))


def over(results: Results, name: str, other: str) -> Estimate:
    """Errors of one experiment over the mean of another's, farthest from 1; standard errors of both."""
    ours, theirs = errors(results[name]), errors(results[other])
    return farthest(ours / theirs.mean(axis=0) - theirs / theirs.mean(axis=0) + 1)


def peak(result: "xarray.Dataset") -> Estimate:
    """Error at n = 300 over the larger of those at the ends."""
    found = errors(result)
    return estimate(found[:, SAMPLES.index(WIDTH)] / found[:, [0, -1]].max(axis=1))


def relative(result: "xarray.Dataset", each: bool) -> np.ndarray:
    """Relative Frobenius error with one kappa a layer, or one of each neuron, ``(seed, d)``."""
    found = result.error.isel(step=0, error_0=int(each)).transpose("seed", "d").values.astype(np.float64)
    return np.sqrt(np.maximum(found, 1e-12))


def slope(result: "xarray.Dataset", each: bool) -> Estimate:
    """Of the relative error on d."""
    return fit_slope(result.d.values, relative(result, each))


CLAIMS = (
    Claim(
        "test error of ridge regression over its deterministic equivalent, farthest of n = 75 to 1200",
        "the theorem on ridge regression: formula of pj.limits.ridge_equivalent", 1.0,
        lambda results: farthest(errors(results["networks"]) / theory(RIDGE)[None]), 0.03,
        "as first proposed: the next order is of size 1/d = 0.005, and chance 1 %",
        Control("linear features, without kappa_*: of rank 200, so that the peak is elsewhere", {"networks": "linear"}),
    ),
    Claim(
        "double descent: error at n = 300, as many as features, over the larger of those at n = 75 and 1200",
        "the figures of learning curves", 1.3, lambda results: peak(results["networks"]), 0.0,
        "a bound: the equivalent has 1.44 with this ridge, and more with less",
        Control("a ridge of 1: more data never hurt", {"networks": "heavy-ridge"}), relation=">=",
    ),
    Claim(
        "universality: ridge error of networks over that of Gaussian features of the same covariance, farthest n",
        "abstract: error universality, proved for ridge regression", 1.0, lambda results: over(results, "networks", "gaussian"), 0.03,
        "as first proposed: the difference is of order 1/d, and chance 1 %",
        Control("Gaussian features without kappa_*", {"gaussian": "linear"}),
    ),
    Claim(
        "universality: wrong signs of logistic regression on networks over those on Gaussian features, farthest n",
        "abstract: conjectured for other losses", 1.0,
        lambda results: over(results, "logistic-networks", "logistic-gaussian"), 0.03,
        "as first proposed: the difference is of order 1/d, and chance 1 %",
        Control("Gaussian features without kappa_*", {"logistic-gaussian": "logistic-linear"}),
    ),
    Claim(
        "relative Frobenius error of the linearised covariance, three layers, one kappa_1 and kappa_* a layer: log-log slope on d",
        "the bound on the covariance, O(d^-1/2)", -0.5, lambda results: slope(results["covariance"], False), 0.1,
        "the next order, 1/d, is half as large at d = 20, and draws of the weights differ",
        Control("without kappa_*^2 it does not fall", {"covariance": "covariance-no-star"}),
    ),
    Claim(
        "the same with a kappa_1 and a kappa_* of each neuron",
        "derived here: pj.limits.feature_layers", -1.0, lambda results: slope(results["covariance"], True), 0.25,
        "the next order at d = 20, and draws of the weights",
        Control("ReLU, which is not odd: d^-1/2", {"covariance": "covariance-relu"}),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Learning curves of ridge and logistic regression, and errors of covariances."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(1, 3, (4.4, 3.6))
    ridge, logistic, covariance = axes.reshape(-1)
    for name, label, strength in (("networks", "networks, ridge 0.01", RIDGE), ("heavy-ridge", "networks, ridge 1", HEAVY)):
        colour = points(ridge, np.asarray(SAMPLES), errors(results[name]), label)
        prediction(ridge, np.asarray(SAMPLES), theory(strength), f"equivalent, ridge {strength:g}", color=colour)
    points(ridge, np.asarray(SAMPLES), errors(results["gaussian"]), "Gaussian features")
    points(ridge, np.asarray(SAMPLES), errors(results["linear"]), "without $\\kappa_*$")
    for name, label in (("networks", "networks"), ("gaussian", "Gaussian features"), ("linear", "without $\\kappa_*$")):
        points(logistic, np.asarray(FEW), errors(results[f"logistic-{name}"]), label)
    ridge.set(title="ridge regression", ylabel="test error, mean square", yscale="log")
    logistic.set(title="logistic regression", ylabel="share of wrong signs")
    d = results["covariance"].d.values
    kinds = (
        ("covariance", False, "$\\kappa$ of a layer; line: slope −1/2", -0.5),
        ("covariance", True, "$\\kappa$ of each neuron; line: slope −1", -1.0),
        ("covariance-relu", True, "the same, ReLU; line: slope −1/2", -0.5),
        ("covariance-no-star", False, "without $\\kappa_*$; line: slope 0", 0.0),
    )
    for name, each, label, power in kinds:
        found = relative(results[name], each)
        colour = points(covariance, np.asarray(d), found, label)
        middle = np.exp(np.log(found).mean()) * (d / np.exp(np.log(d).mean())) ** power
        prediction(covariance, np.asarray(d), middle, "", color=colour)
    covariance.set(title="covariance of layer 3", ylabel="relative error", xlabel="d", xscale="log", yscale="log", ylim=(2e-3, 1))
    covariance.set_xticks(d, [str(size) for size in d])
    for ax, samples in ((ridge, SAMPLES), (logistic, FEW)):
        ax.set(xlabel="points, n", xscale="log")
        ax.set_xticks(samples, [str(n) for n in samples])
    ridge.set_ylim(bottom=0.2)
    logistic.set_ylim(bottom=0.2)
    for ax in (ridge, logistic, covariance):
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7, loc="lower left")
    return fig


PAPER = Paper(
    slug="deep-random-features-deterministic-equivalent",
    title="Deterministic equivalent and error universality of deep random features learning",
    authors="Dominik Schröder, Hugo Cui, Daniil Dmitriev, Bruno Loureiro",
    year=2023,
    arxiv="2302.00401",
    area="infinite-width",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 50 s on two CPU cores", "full": "not measured"},
    data="generated: x ~ N(0, I), y = sign(w . x)",
)
