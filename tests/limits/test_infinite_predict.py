"""`pj.predict` of what `pj.limit` returns, against neural-tangents' predictions from its own kernels, and whatever the user's precision."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.interop import neural_tangents as nt
from tests.limits.ntk_networks import IMAGES, SENTENCES, average, dense, perceptron, plain, pooled

RNG = np.random.default_rng(3)
POINTS, TRAIN = RNG.normal(size=(7, 5)), 4
Y = RNG.normal(size=(TRAIN, 2))
F0 = RNG.normal(size=(len(POINTS), 2))
TIMES = (0.0, 0.7, 20.0, math.inf)


@pytest.fixture
def library(x64):
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip(f"neural-tangents is not installed: {nt.INSTALL}")
    # Its users have JAX's default promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield nt


@functools.cache
def limit_of(name):
    forward, _, x = NETWORKS[name]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return pj.limit(plain(forward), x, progress=False)


def blocks(k, n):
    return k[:n, :n], k[n:, :n], k[n:, n:]


def images(n):
    return np.concatenate([IMAGES, RNG.normal(size=(n - len(IMAGES), *IMAGES.shape[1:]))])


# Their relu is off by the root of the rounding unit where an input meets itself, so it is not among these.
NETWORKS = {
    "perceptron of erf, depth 3": (*perceptron("erf", 3, 0.2), POINTS),
    "perceptron of gelu, depth 1": (*perceptron("gelu", 1, 0.2), POINTS),
    "average pooling": (*pooled(*average("VALID"), "mean"), images(6)),
}


def ours(name, t):
    """Mean and covariance from the limit, and one network's outputs from a given start."""
    k, n = limit_of(name), TRAIN
    train, cross, _ = blocks(k.ntk, n)
    ensemble = pj.predict.ensemble_posterior(train, Y, cross, pj.predict.Prior(*blocks(k.nngp, n)), t=t)
    m = len(k.ntk) - n
    return ensemble, pj.predict.gradient_flow(train, Y, cross)(t, F0[:n], F0[n : n + m])


def same(got, wanted):
    # Float64, through the inverse of a kernel of condition number below 1e4.
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-10, atol=1e-10 * np.abs(wanted).max() + 1e-300)


@pytest.mark.parametrize("name", [n if i == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(NETWORKS)])
def test_neural_tangents_predicts_the_same(name, library):
    _, layers, x = NETWORKS[name]
    kernel_fn, x, n = layers(library.stax)[2], jnp.asarray(x), TRAIN
    predict = library.predict.gradient_descent_mse_ensemble(kernel_fn, x[:n], jnp.asarray(Y))
    k = limit_of(name)
    one = library.predict.gradient_descent_mse(kernel_fn(x[:n], None, "ntk"), jnp.asarray(Y))
    for t in TIMES:
        # Their loss is half of ours: their time 2t is our t.
        theirs = None if math.isinf(t) else 2 * t
        got, (train, test) = ours(name, t)
        wanted = predict(theirs, x[n:], "ntk", compute_cov=True)
        same(got.mean, wanted.mean)
        same(got.covariance, wanted.covariance)
        f_train, f_test = one(theirs, jnp.asarray(F0[:n]), jnp.asarray(F0[n : len(x)]), kernel_fn(x[n:], x[:n], "ntk"))
        same(train, f_train)
        same(test, f_test)
    for noise in (0.0, 0.1):
        infer = library.predict.gp_inference(kernel_fn(x[:n], None, "nngp"), jnp.asarray(Y), diag_reg=noise, diag_reg_absolute_scale=True)
        wanted = infer("nngp", kernel_fn(x[n:], x[:n], "nngp"), kernel_fn(x[n:], None, "nngp"))
        train, cross, test = blocks(k.nngp, n)
        got = pj.predict.posterior(train, Y, cross, test, noise=noise)
        assert got.jitter == 0
        same(got.mean, wanted.mean)
        same(got.covariance, wanted.covariance)


def test_single_precision_predicts_what_double_does():
    # Kernels of a limit are in double precision also where JAX is not.
    name = next(iter(NETWORKS))
    train, cross, test = blocks(limit_of(name).nngp, TRAIN)
    assert train.dtype == np.float64
    got = ours(name, 20.0)[0], pj.predict.posterior(train, Y.astype(np.float32), cross, test, noise=0.1)
    with jax.enable_x64(True):
        wanted = ours(name, 20.0)[0], pj.predict.posterior(train, Y, cross, test, noise=0.1)
    for single, double in zip(got, wanted):
        assert single.mean.dtype == jnp.float32
        # Rounding of float32 through kernels of condition number 100.
        np.testing.assert_allclose(single.mean, double.mean, atol=1e-4)
        np.testing.assert_allclose(single.covariance, double.covariance, atol=1e-4)


def test_repeated_examples_are_told_of(x64):
    x = np.concatenate([POINTS[:TRAIN], POINTS[:1]])
    k = pj.limit(plain(NETWORKS[next(iter(NETWORKS))][0]), x, progress=False)
    train, cross, test = k.nngp[:4, :4], k.nngp[4:, :4], k.nngp[4:, 4:]
    seen = pj.predict.posterior(train, Y, cross, test)
    # A test example that was trained on is known: its variance is rounding.
    np.testing.assert_allclose(seen.mean[0], Y[0], atol=1e-10)
    assert abs(seen.covariance[0, 0]) < 1e-10
    with pytest.warns(UserWarning, match="k_train is singular in float64"):
        twice = pj.predict.posterior(k.nngp, np.concatenate([Y, Y[:1]]), k.nngp, k.nngp)
    assert 0 < twice.jitter < 1e-12
    # Gradient flow needs nothing added: what two equal examples differ in does not move.
    ends = pj.predict.gradient_flow(k.ntk, np.concatenate([Y, Y[:1] + 2]))(math.inf).train
    np.testing.assert_allclose(ends[0], Y[0] + 1, atol=1e-8)
    np.testing.assert_allclose(ends[0], ends[4], atol=1e-12)


def test_outputs_at_every_position(x64):
    # One output at each of three positions: kernels (N, M, 3, 3), labels (N, 3).
    k = pj.limit(plain(lambda draw, x, n: dense(draw, jax.lax.erf(dense(draw, x, n)), 1)[..., 0]), SENTENCES, progress=False)
    assert k.ntk.shape == (3, 3, 3, 3)
    y = RNG.normal(size=(2, 3))
    got = pj.predict.gradient_flow(k.ntk[:2, :2], y, k.ntk[2:, :2], loss="half_sum_of_squares")(math.inf).test
    train = np.einsum("nmij->nimj", k.ntk[:2, :2]).reshape(6, 6)
    cross = np.einsum("nmij->nimj", k.ntk[2:, :2]).reshape(3, 6)
    np.testing.assert_allclose(got.ravel(), cross @ np.linalg.solve(train, y.ravel()), rtol=1e-9)
