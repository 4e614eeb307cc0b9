"""The kernels of wide perceptrons: against their recursion by another quadrature, against finite networks, and their laws."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from paperjax import limits
from paperjax.limits import mlp_kernels
from tests.limits.gaussian import expectation

X = np.random.default_rng(0).standard_normal((3, 4))
GRAM = X @ X.T / 4
FUNCTIONS = {
    "relu": (jax.nn.relu, lambda h: np.maximum(h, 0), lambda h: 1.0 * (h > 0)),
    "erf": (jax.scipy.special.erf, scipy.special.erf, lambda h: 2 / np.pi**0.5 * np.exp(-(h**2))),
    "tanh": (limits.quadrature(jnp.tanh, points=64, tolerance=1e-4), np.tanh, lambda h: 1 / np.cosh(h) ** 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_the_recursion_written_out(name, x64):
    phi, f, slope = FUNCTIONS[name]
    w, b = 1.6, 0.2
    sigma = theta = w * GRAM + b
    for _ in range(2):
        q = sigma.diagonal()
        means = [np.array([[expectation(g, g, q[i], sigma[i, j], q[j]) for j in range(3)] for i in range(3)]) for g in (f, slope)]
        sigma, theta = w * means[0] + b, w * means[0] + b + w * means[1] * theta
    ours = mlp_kernels(GRAM, 2, phi, weight_variance=w, bias_variance=b)
    # The reference's own correlations are off by rounding on the diagonal, and a ReLU's angle by the root of that.
    np.testing.assert_allclose(ours.nngp, sigma, rtol=1e-7)
    np.testing.assert_allclose(ours.ntk, theta, rtol=1e-7)


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_the_relu_diagonal(depth):
    """``L + 1`` with unit-variance weights and a ReLU that keeps the second moment, for |x|² = d: twice that with variance 2 and ReLU."""
    x = jax.random.normal(jax.random.key(0), (5, 7))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True) * 7**0.5
    gram = x @ x.T / 7
    gram = gram.at[jnp.diag_indices(5)].set(1.0)
    kernels = mlp_kernels(gram, depth, jax.nn.relu, weight_variance=2.0)
    np.testing.assert_allclose(jnp.diagonal(kernels.nngp), 2.0, rtol=1e-6)
    np.testing.assert_allclose(jnp.diagonal(kernels.ntk), 2 * (depth + 1), rtol=1e-6)
    normalised = mlp_kernels(gram, depth, limits.piecewise_linear(2**0.5, 0.0))
    np.testing.assert_allclose(jnp.diagonal(normalised.ntk), depth + 1, rtol=1e-5)
    np.testing.assert_allclose(kernels.ntk, 2 * normalised.ntk, rtol=1e-5, atol=1e-5)


def test_a_linear_network_has_depth_plus_one_times_the_gram(x64):
    kernels = mlp_kernels(GRAM, 4, jax.nn.identity)
    np.testing.assert_allclose(kernels.nngp, GRAM, rtol=1e-12)
    np.testing.assert_allclose(kernels.ntk, 5 * GRAM, rtol=1e-12)


def test_under_a_step_only_the_readout_trains(x64):
    kernels = mlp_kernels(GRAM, 3, limits.step)
    np.testing.assert_array_equal(kernels.ntk, kernels.nngp)


def finite_ntk(rng, n, w, b):
    """The NTK of one network with two hidden tanh layers of n units: its gradients written out, layer by layer."""
    W1, W2, v = rng.standard_normal((4, n)), rng.standard_normal((n, n)), rng.standard_normal(n)
    b1, b2 = rng.standard_normal((2, n))
    h1 = (w / 4) ** 0.5 * X @ W1 + b**0.5 * b1
    h2 = (w / n) ** 0.5 * np.tanh(h1) @ W2 + b**0.5 * b2
    g2 = (w / n) ** 0.5 * v / np.cosh(h2) ** 2
    g1 = (w / n) ** 0.5 * (g2 @ W2.T) / np.cosh(h1) ** 2
    inputs = [w / 4 * X @ X.T + b, w / n * np.tanh(h1) @ np.tanh(h1).T + b, w / n * np.tanh(h2) @ np.tanh(h2).T + b]
    return inputs[2] + inputs[1] * (g2 @ g2.T) + inputs[0] * (g1 @ g1.T)


def test_finite_networks_approach_it(x64):
    """Mean over draws within five standard errors plus 1/n; the deviation of one draw falls as n^-1/2 (laws of the NTK)."""
    w, b = 1.5, 0.1
    ours = np.asarray(mlp_kernels(GRAM, 2, FUNCTIONS["tanh"][0], weight_variance=w, bias_variance=b).ntk)
    rng = np.random.default_rng(1)
    widths = [64, 128, 256, 512]
    draws = {n: np.array([finite_ntk(rng, n, w, b) for _ in range(24)]) for n in widths}
    scale = np.abs(ours).max()
    mean, error = draws[512].mean(0), draws[512].std(0) / 24**0.5
    assert np.all(np.abs(mean - ours) < 5 * error + 5 * scale / 512)
    rms = [np.sqrt(np.mean((draws[n] - ours) ** 2)) / scale for n in widths]
    assert abs(np.polyfit(np.log(widths), np.log(rms), 1)[0] + 0.5) < 0.15
    assert rms[-1] < 0.1


@functools.cache
def compiled(name):
    return jax.jit(lambda gram: mlp_kernels(gram, 3, FUNCTIONS[name][0], weight_variance=1.5, bias_variance=0.1))


@pytest.mark.parametrize("name", ["relu", "erf"])
@hypothesis.given(seed=st.integers(0, 10_000))
def test_positive_semidefinite_symmetric_and_of_any_order(name, seed):
    x = np.random.default_rng(seed).standard_normal((6, 2))
    x = np.concatenate([x, x[:1], -x[:1], 0 * x[:1]])
    gram, order = x @ x.T, np.random.default_rng(seed).permutation(9)
    with jax.enable_x64(True):
        kernels = compiled(name)(gram)
        shuffled = compiled(name)(gram[np.ix_(order, order)])
    for K, of_shuffled in zip(kernels, shuffled):
        K = np.asarray(K)
        np.testing.assert_array_equal(K, K.T)
        np.testing.assert_allclose(of_shuffled, K[np.ix_(order, order)], rtol=1e-12)
        assert np.linalg.eigvalsh(K).min() > -1e-6 * np.trace(K)


def test_a_subset_has_the_block(x64):
    whole, part = mlp_kernels(GRAM, 2, jnp.sin), mlp_kernels(GRAM[:2, :2], 2, jnp.sin)
    np.testing.assert_allclose(part.ntk, whole.ntk[:2, :2], rtol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_in_the_inputs_are_finite_at_repeated_antipodal_and_zero_inputs(name, x64):
    x = jnp.concatenate([X[:2], X[:1], -X[:1], 0 * X[:1]])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(mlp_kernels(x @ x.T / 4, 2, FUNCTIONS[name][0]).ntk))))(x)
    assert np.all(np.isfinite(gradient))
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GRAM, 0, jnp.sin), "depth = 0"),
        ((GRAM, True, jnp.sin), "depth = True"),
        ((X, 2, jnp.sin), r"shape \(3, 4\)|gram"),
        ((GRAM - 9 * np.eye(3), 2, jnp.sin), "k11 has an entry.*variance"),
        ((GRAM + np.triu(np.full((3, 3), 0.01), 1), 2, jnp.sin), "off symmetry by 0.01"),
        ((GRAM * np.nan, 2, jnp.sin), "NaN"),
        ((np.eye(3, dtype=int), 2, jnp.sin), "dtype int|gram"),
        ((GRAM, 2, jnp.sin, -1.0), "weight_variance = -1"),
        ((GRAM, 2, jnp.sin, 1.0, float("nan")), "bias_variance = nan"),
        ((GRAM, 2, lambda h: jnp.floor(20 * h)), "more than 12 breaks"),
    ],
)
def test_what_is_refused(arguments, message, x64):
    with pytest.raises(Exception, match=message):
        mlp_kernels(*arguments)


def test_a_relu_is_known_however_it_is_spelled(x64):
    spelled, named = mlp_kernels(GRAM, 2, lambda h: jnp.maximum(h, 0)), mlp_kernels(GRAM, 2, jax.nn.relu)
    np.testing.assert_array_equal(spelled.ntk, named.ntk)


def test_variances_too_large_for_a_quadrature_are_refused(x64):
    with pytest.raises(ValueError, match=r"expectations of tanh are not found to 1e-06.*the first of which is 10000.*Scale the inputs"):
        mlp_kernels(10000.0 * jnp.eye(2), 1, jnp.tanh)
    traced = jax.jit(lambda gram: mlp_kernels(gram, 1, jnp.tanh).nngp)(10000.0 * jnp.eye(2))
    assert np.isnan(traced).all()
