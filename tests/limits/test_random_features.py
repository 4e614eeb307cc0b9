"""Deep random features against features that are drawn, by NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits import Target, feature_layers, network_target, random_features_error, single_index

relu, identity = jax.nn.relu, jax.nn.identity
BY_NUMPY = {jnp.tanh: np.tanh, relu: lambda z: np.maximum(z, 0), jnp.sign: np.sign}


def drawn(d, widths, seed, gain=1.0):
    rng = np.random.default_rng(seed)
    fans = [d, *widths[:-1]]
    return [gain * rng.standard_normal((p, fan)) for p, fan in zip(widths, fans)]


def features(phi, weights, x):
    for w in weights:
        x = BY_NUMPY[phi](x @ w.T / math.sqrt(w.shape[1]))
    return x


def fitted(train, labels, test, truth, ridge):
    n, p = train.shape
    theta = np.linalg.solve(train.T @ train / n + ridge * np.eye(p), train.T @ labels / n)
    return np.mean((truth - test @ theta) ** 2), np.mean((labels - train @ theta) ** 2)


def agrees(found, predicted, slack):
    """To four standard errors, and slack for the next order in 1/n."""
    predicted = np.array(predicted)
    stderr = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - predicted) < 4 * stderr + slack * predicted), (found.mean(axis=0) / predicted, stderr)


@pytest.mark.slow
@pytest.mark.parametrize(("phi", "gain", "link"), [(jnp.tanh, 2.0, jnp.sign), (relu, 1.4, relu), (jnp.sign, 1.0, jnp.tanh)])
def test_deep_features_err_as_the_equivalent_says(phi, gain, link):
    """Three layers of the weights as drawn, on both sides of n = p; the target has a mean where it is a ReLU, and features of one do."""
    d, widths, ridge, noise = 80, (120, 120, 120), 0.01, 0.1
    weights, rng = drawn(d, widths, 0, gain), np.random.default_rng(1)
    w = rng.standard_normal(d) / math.sqrt(d)
    target, samples = single_index(link, w), [40, 120, 400]
    curve = random_features_error(phi, weights, target, samples, ridge, noise=noise)
    fresh = rng.standard_normal((4000, d))
    test, truth = features(phi, weights, fresh), BY_NUMPY[link](fresh @ w)
    for i, n in enumerate(samples):
        found = []
        for _ in range(16):
            x = rng.standard_normal((n, d))
            labels = BY_NUMPY[link](x @ w) + math.sqrt(noise) * rng.standard_normal(n)
            error, training = fitted(features(phi, weights, x), labels, test, truth, ridge)
            found.append([error + noise, training])
        # 4,000 fresh points are off by 2 %, and norms, which fluctuate by 2/d + 5/p a layer with ReLU, make the next order.
        predicted = np.array([curve.error[i], curve.training[i]])
        agrees(np.array(found)[:, : 1 + (n > 120)], predicted[: 1 + (n > 120)], 0.06)


def test_correlated_inputs():
    """With Ω_0 the features are those of the weights times its root, and the target's too."""
    d, rng = 30, np.random.default_rng(0)
    root = np.diag(np.linspace(0.3, 2.0, d)) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    omega = root.T @ root
    symmetric = np.linalg.cholesky(omega)
    weights, w = drawn(d, (40, 40), 1), rng.standard_normal(d) / math.sqrt(d)
    ours = random_features_error(jnp.tanh, weights, single_index(relu, w, omega), 50, 0.1, covariance=omega)
    white = [weights[0] @ symmetric, weights[1]]
    theirs = random_features_error(jnp.tanh, white, single_index(relu, symmetric.T @ w), 50, 0.1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_invariances():
    """Rotated inputs; neurons in another order; features twice as large, with four times the ridge."""
    weights, rng = drawn(20, (30, 25), 2, 1.5), np.random.default_rng(0)
    w, samples = rng.standard_normal(20), [10, 40]
    same = random_features_error(relu, weights, single_index(jnp.sign, w), samples, 0.1)
    turn, order = np.linalg.qr(rng.standard_normal((20, 20)))[0], rng.permutation(30)
    others = [
        random_features_error(relu, [weights[0] @ turn, weights[1]], single_index(jnp.sign, turn.T @ w), samples, 0.1),
        random_features_error(relu, [weights[0][order], weights[1][:, order]], single_index(jnp.sign, w), samples, 0.1),
        random_features_error([relu, lambda z: 2 * relu(z)], weights, single_index(jnp.sign, w), samples, 0.4),
    ]
    for other in others:
        np.testing.assert_allclose(other.error, same.error, rtol=1e-8)


def test_linear_networks_are_exact():
    weights = drawn(5, (7, 6), 3)
    *_, last = feature_layers(identity, weights)
    product = weights[1] @ weights[0] / math.sqrt(5 * 7)
    np.testing.assert_allclose(last.linear, product, rtol=1e-9)
    np.testing.assert_allclose(last.covariance, product @ product.T, atol=1e-9)
    np.testing.assert_allclose(last.kappa_star, 0, atol=1e-6)  # the root of rounding
    np.testing.assert_allclose(last.mean, 0, atol=1e-12)


def test_first_layer_of_erf_is_williams_kernel_to_first_order():
    """Exactly ``(2/π) arcsin(2 c_ij / sqrt((1 + 2 c_ii)(1 + 2 c_jj)))``; its diagonal is exact here, and the rest to third order."""
    (w,) = drawn(50, (30,), 4)
    c = w @ w.T / 50
    s = 1 / np.sqrt(1 + 2 * np.diagonal(c))
    angle = 2 * c * s[:, None] * s
    exact = 2 / np.pi * np.arcsin(angle)
    found = feature_layers(jax.scipy.special.erf, [w])[0].covariance
    np.testing.assert_allclose(np.diagonal(found), np.diagonal(exact), rtol=1e-9)
    off = ~np.eye(30, dtype=bool)
    np.testing.assert_allclose(found[off], 2 / np.pi * angle[off], rtol=1e-9)


def off(phi, d, seed):
    """Relative Frobenius errors of the last of three covariances, and of Φ; two halves of the points make their squares without bias."""
    weights = drawn(d, (d, d, d), seed, 1.5)
    x = np.random.default_rng(seed + 1).standard_normal((40_000, d), np.float32)
    last = feature_layers(phi, weights)[-1]
    h = features(phi, [w.astype(np.float32) for w in weights], x) - last.mean
    halves = list(zip(np.split(h, 2), np.split(x, 2)))
    found = []
    for by_half, truth in (([a.T @ a / len(a) for a, _ in halves], last.covariance), ([a.T @ b / len(a) for a, b in halves], last.linear)):
        one, other = (half - truth for half in by_half)
        found.append(math.sqrt(max(np.sum(one * other), 0.0)) / np.linalg.norm(truth))
    return found


@pytest.mark.parametrize(("phi", "least", "most"), [(jnp.tanh, 0.0, 0.05), (relu, 0.05, 0.3)])
def test_moments_of_three_layers(phi, least, most):
    """Off by a relative size of 1/d where φ is odd, and of d^-1/2 = 0.1 where it is not, with a factor of about 2 in three layers."""
    for error in off(phi, 100, 5):
        assert least <= error < most


@pytest.mark.parametrize(
    ("link", "mean", "slope", "square"),
    [(jnp.sign, 0.0, math.sqrt(2 / math.pi) / 2, 1.0), (jnp.square, 4.0, 0.0, 48.0), (relu, 2 / math.sqrt(2 * math.pi), 0.5, 2.0)],
)
def test_single_index_targets_are_known(link, mean, slope, square):
    """s ~ N(0, 4)."""
    w = np.array([0.0, 2.0, 0.0])
    target = single_index(link, w)
    assert target.mean == pytest.approx(mean, abs=1e-9)
    np.testing.assert_allclose(target.linear, slope * w, atol=1e-9)
    assert target.square == pytest.approx(square, rel=1e-9)


def test_moments_of_a_network_as_target():
    weights, rng = drawn(60, (90, 90), 7, 1.4), np.random.default_rng(8)
    readout, x = rng.standard_normal(90), rng.standard_normal((100_000, 60))
    y = features(relu, weights, x) @ readout / math.sqrt(90)
    target = network_target(relu, weights, readout)
    assert target.mean == pytest.approx(y.mean(), abs=0.02)
    # Of second order in d^-1/2, about.
    assert target.square == pytest.approx((y**2).mean(), rel=0.03)
    np.testing.assert_allclose(target.linear, x.T @ y / len(x), atol=0.03)


W, V = drawn(4, (3, 2), 0), np.ones(4)
GOOD = Target(0.0, V, 5.0)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: feature_layers(jnp.tanh, []), ValueError, "depth 0"),
        (lambda: feature_layers(jnp.tanh, [np.ones((0, 4))]), ValueError, r"weights\[0\] has shape \(0, 4\)"),
        (lambda: feature_layers(jnp.tanh, [W[0], W[1].T]), ValueError, "transpose"),
        (lambda: feature_layers(jnp.tanh, [np.full((2, 2), np.nan)]), ValueError, "not finite"),
        (lambda: feature_layers([jnp.tanh], W), ValueError, "1 activations and 2 layers"),
        (lambda: feature_layers(lambda h: jnp.exp(h * h), W), ValueError, "no finite second moment"),
        (lambda: feature_layers(lambda h: jnp.exp(h * h / 8), [9 * W[0]]), ValueError, "layer 1.*no finite second moment at variance"),
        (lambda: feature_layers(jnp.tanh, W, -np.eye(4)), ValueError, "eigenvalue -1"),
        (lambda: feature_layers(jnp.tanh, W, np.eye(3)), ValueError, "inputs have dimension 4"),
        (lambda: single_index(jnp.tanh, np.zeros(3)), ValueError, "direction is empty, 0"),
        (lambda: single_index(jnp.tanh, np.zeros(0)), ValueError, "direction is empty"),
        (lambda: network_target(jnp.tanh, W, np.ones(3)), ValueError, "the last layer has 2 neurons"),
        (lambda: random_features_error(jnp.tanh, W, GOOD, 3, 1.0, noise=-1.0), ValueError, "noise = -1"),
        (lambda: random_features_error(jnp.tanh, W, Target(0.0, np.ones(3), 5.0), 3, 1.0), ValueError, "target.linear has shape"),
    ],
)
def test_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()
