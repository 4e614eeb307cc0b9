"""`limit` against neural-tangents 0.6.5, and against exact formulas where that is known to be off."""

import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax import limits
from paperjax.interop import neural_tangents as nt
from tests.limits.gaussian import adaptive
from tests.limits.ntk_networks import IMAGES, QUICK, SLOW, VECTORS, B, W, conv, dense, perceptron, plain

GRAM = VECTORS @ VECTORS.T / 5


@pytest.fixture
def stax():
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip(f"neural-tangents is not installed: {nt.INSTALL}")
    # Its users have JAX's default promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield nt.stax


def limit(forward, *args, **kwargs):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return pj.limit(plain(forward), *args, progress=False, **kwargs)


def relative(got, wanted):
    assert got.shape == wanted.shape
    return float(np.max(np.abs(np.asarray(got) - np.asarray(wanted))) / np.max(np.abs(np.asarray(wanted))))


def agree(case, stax):
    forward, layers, x = case
    ours = limit(forward, x[:1], x[1:])
    with jax.enable_x64(True):
        # Jitted, it takes twice as long.
        theirs = layers(stax)[2](jnp.asarray(x[:1]), jnp.asarray(x[1:]), ("nngp", "ntk"))
    # Float64 rounding through ten layers. No input meets itself: there its ReLU is off by the root of one (see paperjax.interop).
    assert relative(ours.nngp, theirs.nngp) < 1e-10
    assert relative(ours.ntk, theirs.ntk) < 1e-10


@pytest.mark.filterwarnings("ignore:Linear scaling attention", "ignore:`FanIn` layers assume")
@pytest.mark.parametrize("name", QUICK)
def test_neural_tangents(name, stax):
    agree(QUICK[name], stax)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Linear scaling attention", "ignore:`FanIn` layers assume")
@pytest.mark.parametrize("name", SLOW)
def test_all_of_neural_tangents(name, stax):
    agree(SLOW[name], stax)


class Net(nn.Module):
    """Standard parametrization."""

    width: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.variance_scaling(W**2, "fan_in", "normal")
        h = nn.relu(nn.Dense(self.width, use_bias=False, kernel_init=init)(x))
        return nn.Dense(1, use_bias=False, kernel_init=init)(h)


def test_flax_under_the_ntk_parametrization(stax):
    ours = pj.limit(Net, VECTORS, parametrization=pj.ntp, base=dict(width=64), per="leaf", progress=False)
    with jax.enable_x64(True):
        layers = stax.Dense(8, W), stax.Relu(), stax.Dense(1, W)
        theirs = stax.serial(*layers)[2](jnp.asarray(VECTORS[:1]), jnp.asarray(VECTORS[1:]), ("nngp", "ntk"))
    # Flax draws in float32, which rounds the standard deviations.
    assert relative(ours.nngp[:1, 1:], theirs.nngp) < 3e-7
    # At the base width learning rates are those of the Flax network: an entry of variance W² / fan_in counts fan_in / W² times as much.
    readout, first = np.asarray(theirs.nngp), np.asarray(theirs.ntk) - np.asarray(theirs.nngp)
    parts = {"['Dense_0']['kernel']": 5 / W**2 * first, "['Dense_1']['kernel']": 64 / W**2 * readout}
    assert set(ours.ntk) == set(parts)
    for path, part in parts.items():
        assert relative(ours.ntk[path][:1, 1:], part) < 3e-7


def exact(phi, depth, b=B, gram=GRAM):
    with jax.enable_x64(True):
        return limits.mlp_kernels(jnp.asarray(gram), depth, phi, weight_variance=W**2, bias_variance=0.0 if b is None else b**2)


def mlp(phi, depth, b=B):
    def forward(draw, x, n):
        for _ in range(depth):
            x = phi(dense(draw, x, n, b=b))
        return dense(draw, x, 1, b=b)

    return forward


SMOOTH = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu by tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def summed(phi, depth):
    """NNGP and NTK by a sum over a grid of 401 by 401 points up to ten standard deviations, which for these functions is exact."""
    z = np.linspace(-10, 10, 401)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    slope = jax.vmap(jax.grad(phi))
    k = theta = W**2 * GRAM + B**2
    for _ in range(depth):
        std = np.sqrt(k.diagonal())
        rho = np.clip(k / np.outer(std, std), -1, 1)
        value, derivative = np.empty_like(k), np.empty_like(k)
        for i, j in np.ndindex(k.shape):
            u, v = std[i] * z, std[j] * (rho[i, j] * z[:, None] + np.sqrt(1 - rho[i, j] ** 2) * z)
            for out, f in ((value, phi), (derivative, slope)):
                out[i, j] = (weight * np.asarray(f(jnp.asarray(u)))) @ (np.asarray(f(jnp.asarray(v).ravel())).reshape(v.shape) @ weight)
        k, theta = W**2 * value + B**2, W**2 * (value + derivative * theta) + B**2
    return k, theta


# The tanh kernel of neural-tangents is off by 3e-3, and its approximate gelu has the kernel of the exact one.
@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_functions_without_closed_form(name):
    phi, depth = SMOOTH[name], 2 if name == "tanh" else 1
    ours = limit(mlp(phi, depth), VECTORS)
    with jax.enable_x64(True):
        nngp, ntk = summed(phi, depth)
    assert relative(ours.nngp, nngp) < 1e-10
    assert relative(ours.ntk, ntk) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_variances_from_one_to_a_thousand(scale):
    # Integrals for the variances that there are; against adaptive quadrature in the plane.
    x = VECTORS[:2] * scale
    k, cuts = W**2 * x @ x.T / 5 + B**2, (-200, -50, -12, -3, 0, 3, 12, 50, 200)
    assert (k.max() < 1) if scale < 1 else (k.max() > 100)
    ours = limit(mlp(jnp.tanh, 1), x)

    def expected(f):
        return np.array([[adaptive(f, f, k[i, i], k[i, j], k[j, j], cuts, cuts) for j in range(2)] for i in range(2)])

    nngp = W**2 * expected(np.tanh) + B**2
    assert relative(ours.nngp, nngp) < 1e-10
    assert relative(ours.ntk, nngp + W**2 * expected(lambda h: 1 / np.cosh(np.clip(h, -300, 300)) ** 2) * k) < 1e-10


@pytest.mark.slow
def test_a_gate_that_shares_a_field():
    # relu(h) (h + g) = relu(h)² + relu(h) g, whose products have mean 0; h and g have one covariance.
    def forward(draw, x, n):
        h, g = dense(draw, x, n), dense(draw, x, n)
        return dense(draw, jax.nn.relu(h) * (h + g), 1)

    ours = limit(forward, VECTORS)
    with jax.enable_x64(True):
        k = jnp.asarray(W**2 * GRAM + B**2)
        covariances = jnp.diag(k)[:, None], k, jnp.diag(k)[None]
        square, relu = limits.rectified_monomial(2), limits.relu
        nngp = W**2 * (square.value(*covariances) + relu.value(*covariances) * k) + B**2
        slopes = square.derivative(*covariances) + relu.derivative(*covariances) * k + relu.value(*covariances)
        ntk = nngp + W**2 * slopes * k
    assert relative(ours.nngp, nngp) < 1e-12
    assert relative(ours.ntk, ntk) < 1e-12


def test_known_examples_in_a_function_that_is_traced():
    forward = mlp(jax.nn.relu, 1)
    wanted = limit(forward, VECTORS).ntk
    found = jax.jit(lambda s: limit(forward, VECTORS).ntk * s)(1.0)
    # Single precision outside.
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


SPECIAL = np.stack([VECTORS[0], VECTORS[0], -VECTORS[0], 2 * VECTORS[0], np.zeros(5), VECTORS[1]])
"""Repeated, antipodal, parallel, zero."""


def test_rectified_monomial_of_repeated_and_antipodal_inputs():
    # NaN in neural-tangents.
    ours = limit(mlp(lambda h: jax.nn.relu(h) ** 2, 1, None), SPECIAL)
    wanted = exact(limits.rectified_monomial(2), 1, None, SPECIAL @ SPECIAL.T / 5)
    assert relative(ours.nngp, wanted.nngp) < 1e-10
    assert relative(ours.ntk, wanted.ntk) < 1e-10


def test_single_precision():
    # Off by 5e-4 to 2e-3 on the diagonal in neural-tangents, whose kernel of near duplicates is not definite.
    near = np.concatenate([SPECIAL, SPECIAL[:1] * (1 + 1e-4)])
    ours = limit(perceptron("relu", 10, None)[0], near, dtype="float32")
    wanted = exact(jax.nn.relu, 10, None, near @ near.T / 5)
    for name in ("nngp", "ntk"):
        got, truth = np.asarray(getattr(ours, name)), np.asarray(getattr(wanted, name))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got.diagonal(), truth.diagonal(), rtol=1e-6)
        assert np.isfinite(got).all()
        # Rounding of float32, of 7 rows.
        assert np.linalg.eigvalsh(got.astype(np.float64)).min() > -1e-6 * truth.max()


@pytest.mark.slow
def test_resized_images():
    # Against all pairs of positions by hand; neural-tangents is off by 1e-4 to 1e-2 behind a nonlinearity.
    def forward(draw, x, n):
        h = jax.nn.relu(conv(draw, x, n))
        h = jax.image.resize(h, (h.shape[0], 6, 3, h.shape[3]), "linear")
        return dense(draw, jnp.mean(h, (1, 2)), 1)

    ours = limit(forward, IMAGES, ntk=False)
    padded = np.pad(IMAGES, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 3, j : j + 3].reshape(3, -1) for i in range(4) for j in range(4)], 1).reshape(48, -1)
    k = W**2 * patches @ patches.T / 27 + B**2
    with jax.enable_x64(True):
        wide = np.asarray(limits.relu.value(jnp.asarray(k.diagonal())[:, None], jnp.asarray(k), jnp.asarray(k.diagonal())[None]))
        resized = jax.image.resize(jnp.eye(16).reshape(16, 4, 4), (16, 6, 3), "linear")
    weights = np.asarray(resized).reshape(16, -1).mean(1)
    wanted = W**2 * np.einsum("p,npmq,q->nm", weights, wide.reshape(3, 16, 3, 16), weights) + B**2
    assert relative(ours.nngp, wanted) < 1e-10
