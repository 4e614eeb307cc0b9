"""Neural collapse measured on features made to have it, against its definition in numpy, and on models of all kinds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj
from paperjax.measures import (
    class_cosines,
    class_means,
    frame_distance,
    last_features,
    nc1,
    nc2,
    nc3,
    readout_weights,
    self_duality,
    within_class,
)
from paperjax.models.layers import affine
from tests.zoo import as_users_run_it


def drawn(seed, sizes, dim, spread=0.3):
    """Features around random means, and labels in no order."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    mu = rng.standard_normal((len(sizes), dim))
    return mu[y] + spread * rng.standard_normal((len(y), dim)), y


def definition(h, y):
    """``tr(S_W S_B^+) / K`` in float64."""
    K = y.max() + 1
    mu = np.array([h[y == k].mean(0) for k in range(K)])
    S_W, c = np.cov((h - mu[y]).T, bias=True), mu - mu.mean(0)
    return np.trace(S_W @ np.linalg.pinv(c.T @ c / K, rcond=1e-9)) / K


@given(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=2, max_size=5), st.sampled_from([2, 7]))
def test_nc1_is_its_definition_and_knows_no_rotation_shift_or_scale(seed, sizes, dim):
    h, y = drawn(seed, sizes, dim)
    found = within_class(jnp.asarray(h, jnp.float32), jnp.asarray(y))
    expected = definition(h, y)
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # float32, means that are nearly equal
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]
    np.testing.assert_allclose(within_class(jnp.asarray(3 * h @ q + 1, jnp.float32), jnp.asarray(y)), found, rtol=2e-3)
    rows = jax.nn.one_hot(jnp.asarray(y), len(sizes))
    assert within_class(jnp.asarray(h, jnp.float32), rows) == found
    mu = class_means(jnp.asarray(h, jnp.float32), jnp.asarray(y))
    np.testing.assert_allclose(mu, [h[y == k].mean(0) for k in range(len(sizes))], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("K", [2, 3, 7])
def test_frames_are_told_apart(K):
    y = np.tile(np.arange(K), 4)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 9)))[0][:K]
    orthogonal = 2 * rotation[y]
    simplex = orthogonal - 2 * rotation.mean(0)
    for features in (orthogonal, simplex, simplex + 5):
        features, labels = jnp.asarray(features, jnp.float32), jnp.asarray(y)
        assert within_class(features, labels) < 1e-10
        assert frame_distance(features, labels) < 1e-5  # float32
        np.testing.assert_allclose(class_cosines(features, labels), (K * np.eye(K) - 1) / (K - 1), atol=1e-5)
    at = functools.partial(frame_distance, y=jnp.asarray(y), frame="orthogonal")
    assert at(jnp.asarray(orthogonal, jnp.float32)) < 1e-5
    np.testing.assert_allclose(class_cosines(jnp.asarray(orthogonal, jnp.float32), jnp.asarray(y), centred=False), np.eye(K), atol=1e-5)
    # 1 - 11^T / K against 1: cosine ((K - 1) / K)^(1/2).
    np.testing.assert_allclose(at(jnp.asarray(simplex, jnp.float32)), np.sqrt(2 - 2 * np.sqrt((K - 1) / K)), rtol=1e-4)


def test_duality_of_the_readout():
    h, y = (jnp.asarray(a) for a in drawn(0, [3, 4, 5], 6))
    h = h.astype(jnp.float32)
    mu = class_means(h, y)
    centred = mu - mu.mean(0, keepdims=True)
    assert self_duality(7 * centred, h, y) < 1e-6
    assert self_duality(7 * mu, h, y, centred=False) < 1e-6
    np.testing.assert_allclose(self_duality(-centred, h, y), 2, rtol=1e-6)
    assert self_duality(jnp.roll(centred, 1, axis=0), h, y) > 0.5


def test_of_minimisers_in_closed_form():
    """A matrix with the Gram of the global minimiser of pj.limits, which has collapsed."""
    y = np.repeat(np.arange(4), 5)
    for bias, frame in ((False, "orthogonal"), (True, "simplex")):
        theory = pj.limits.mse_minimiser([5] * 4, 2, weight_decay=0.01, feature_decay=0.02, bias=bias)
        values, vectors = np.linalg.eigh(theory.means_gram)
        means = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        assert frame_distance(jnp.asarray(means[y]), jnp.asarray(y), frame=frame) < 1e-5
        # What is learned maps means to outputs, and so do its first factors; W_M is parallel to the means.
        assert self_duality(jnp.asarray(means), jnp.asarray(means[y]), jnp.asarray(y), centred=bias) < 1e-5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.relu(nn.Dense(5)(x))))


DATA = pj.data.Dataset(*(np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32), np.arange(12) % 3) * 2)


@pytest.mark.parametrize("network", [pj.models.mlp(5, 2, 3), pj.models.mlp(5, 9, 3), pj.models.resmlp(5, 2, 3), Net()])
def test_features_and_readout_of_any_model(network):
    model = pj.as_model(network)
    x = jnp.asarray(DATA.x_train)
    params = model.init(jax.random.key(0), x)
    z, w = last_features(model, params, x), readout_weights(model, params, x)
    f = model.apply(params, x)
    # An affine readout: outputs less those of the first example are the weights' work.
    np.testing.assert_allclose((z - z[:1]) @ w.T, f - f[:1], rtol=1e-4, atol=1e-5)
    assert nc1(model, params, DATA) == within_class(z, DATA.y_train)
    assert nc2(model, params, DATA) == frame_distance(z, DATA.y_train)
    assert nc3(model, params, DATA) == self_duality(w, z, DATA.y_train)


def test_multipliers_belong_to_the_readout():
    net = pj.models.linear_net(5, 1, outputs=3)
    scaled = pj.Model(net.init, lambda params, x: 10 * (affine(params["first"], x) @ (0.5 * params["readout"]["w"])))
    params = net.init(jax.random.key(0), jnp.asarray(DATA.x_train))
    np.testing.assert_allclose(readout_weights(scaled, params, jnp.asarray(DATA.x_train)), 5 * params["readout"]["w"].T, rtol=1e-6)


def experiment(data, **measures):
    net = lambda: pj.models.mlp(5, 1, outputs=3)  # noqa: E731
    return pj.Experiment(net, data, loss="cross_entropy", optimizer=optax.sgd, grid=pj.grid(lr=0.1, seed=2), steps=2, measures=measures)


def test_in_an_experiment():
    result = experiment(DATA, nc1=nc1, nc2=nc2, nc2_frame=functools.partial(nc2, frame="orthogonal"), nc3=nc3).run(progress=False)
    for name in ("nc1", "nc2", "nc2_frame", "nc3"):
        assert np.isfinite(result[name]).all()
        assert result[name].sizes["seed"] == 2


def test_an_experiment_without_a_class_is_refused_before_it_runs():
    absent = DATA.replace(y_train=np.where(DATA.y_train == 1, 2, DATA.y_train))
    experiment(absent).check()
    for measure in (nc1, nc3, functools.partial(nc2, frame="orthogonal")):
        with as_users_run_it(), pytest.raises(ValueError, match=r"measure 'it': no example of class 1 of 0\.\.2"):
            experiment(absent, it=measure).run()


def test_under_jit_an_absent_class_is_nan():
    h, y = jnp.ones((4, 2)) * jnp.arange(4.0)[:, None], jnp.array([0, 0, 2, 2])
    assert jnp.isnan(jax.jit(within_class, static_argnums=2)(h, y, 3))
    assert jnp.isnan(jax.jit(frame_distance, static_argnums=2)(h, y, 3))


def test_equal_means_have_no_measure():
    assert jnp.isnan(within_class(jnp.ones((4, 2)), jnp.array([0, 1, 0, 1])))


H = jnp.ones((4, 2)) * jnp.arange(4.0)[:, None]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: within_class(H, jnp.array([0, 0, 2, 2])), ValueError, r"within_class: no example of class 1 of 0\.\.2"),
        (lambda: within_class(H, jnp.array([0, 0, 1, 1]), 4), ValueError, r"no example of class 2, 3 of 0\.\.3"),
        (lambda: within_class(H, jax.nn.one_hot(jnp.array([0, 0, 1, 1]), 3)), ValueError, "no example of class 2"),
        (lambda: frame_distance(H, jnp.zeros(4, int)), ValueError, r"frame_distance: 1 class\(es\)"),
        (lambda: class_means(H[:0], jnp.zeros(0, int)), ValueError, r"0 class\(es\)"),
        (lambda: class_cosines(H, jnp.array([0, 1, -1, 1])), ValueError, r"labels lie in -1\.\.1"),
        (lambda: class_cosines(H, jnp.array([0, 1, 2, 1]), 2), ValueError, r"labels lie in 0\.\.2"),
        (lambda: class_means(H, jnp.array([0, 1])), ValueError, r"labels have shape \(2,\) for a batch of 4"),
        (lambda: class_means(H, jnp.array([0.0, 1, 0, 1])), TypeError, "labels are float32"),
        (lambda: class_means(H, jnp.eye(4), 3), ValueError, "rows of 4 for 3 classes"),
        (lambda: jax.jit(class_means)(H, jnp.array([0, 1, 0, 1])), ValueError, "under jit"),
        (lambda: frame_distance(H, jnp.array([0, 1, 0, 1]), frame="cube"), ValueError, "'cube' is neither"),
        (lambda: self_duality(jnp.ones((2, 3)), H, jnp.array([0, 1, 0, 1])), ValueError, "must be equal"),
        (lambda: nc1(pj.models.linear_net(3, 1, 1), *both(pj.models.linear_net(3, 1, 1))), ValueError, r"1 class\(es\)"),
        (lambda: last_features(*linear()), ValueError, "last_features: no product with a parameter comes before"),
    ],
)  # fmt: skip
def test_refuses(call, error, says):
    with as_users_run_it(), pytest.raises(error, match=says):
        call()


def both(model):
    return model.init(jax.random.key(0), jnp.asarray(DATA.x_train)), DATA


def linear():
    model = pj.Model(lambda key, x: jnp.ones((2, 2)), lambda w, x: x @ w)
    return model, jnp.ones((2, 2)), H
