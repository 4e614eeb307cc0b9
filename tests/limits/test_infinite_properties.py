"""What holds of the kernels of any network, over random examples: small networks, each traced once and compiled once for a size."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import attention, conv, dense, flat, layer_norm, plain, sum_pool

VECTOR, IMAGE, SENTENCE = (4,), (4, 4, 2), (3, 4)


def perceptron(phi, b):
    return lambda draw, x, n: dense(draw, phi(dense(draw, x, n, b=b)), 1, b=b)


def pooled(draw, x, n):
    h = sum_pool(jax.nn.relu(conv(draw, x, n)), 2, 2, "SAME") / 4
    return dense(draw, flat(h), 1)


def normed(draw, x, n):
    return dense(draw, jax.nn.relu(layer_norm(dense(draw, x, n))), 1)


def attentive(draw, x, n):
    h = attention(draw, dense(draw, x, n), n, lambda g: jax.nn.softmax(g, -1))
    return dense(draw, jnp.mean(h, 1), 1)


def recurrent(draw, x, n):
    again, enter = draw(n, n), draw(x.shape[2], n)
    h = jnp.zeros((x.shape[0], n), x.dtype)
    for t in range(x.shape[1]):
        h = jax.nn.relu((h @ again) / n**0.5 + (x[:, t] @ enter) / x.shape[2] ** 0.5)
    return dense(draw, h, 1)


def scanned(draw, x, n):
    h, stacked = dense(draw, x, n), draw(8, n, n)
    h, _ = lax.scan(lambda h, w: (h + jax.nn.relu(h) @ w / (8 * n) ** 0.5, None), h, stacked)
    return dense(draw, h, 1)


QUICK = {
    "relu": (perceptron(jax.nn.relu, None), VECTOR),
    "LayerNorm": (normed, VECTOR),
}
SLOW = {
    "relu with biases": (perceptron(jax.nn.relu, 0.2), VECTOR),
    "erf": (perceptron(lax.erf, 0.2), VECTOR),
    "tanh": (perceptron(jnp.tanh, None), VECTOR),
    "convolution and pooling": (pooled, IMAGE),
    "attention": (attentive, SENTENCE),
    "recurrence": (recurrent, SENTENCE),
    "scan": (scanned, VECTOR),
}
NETWORKS = QUICK | SLOW
TABLE = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
KERNELS = ("nngp", "ntk")
ORDER = np.array([3, 0, 5, 1, 4, 2])


@functools.cache
def program(name):
    return pj.limit(plain(NETWORKS[name][0]), examples(name, 0, 1.0, 1e-3), progress=False).program


def limit(name, x1, x2=None, **options):
    return pj.limit(program(name), x1, x2, progress=False, **options)


def examples(name, seed, scale, apart):
    """Two examples apart; the first again, nearly, and turned round; and zero."""
    a, b = scale * np.random.default_rng(seed).normal(size=(2, *NETWORKS[name][1]))
    return np.stack([a, b, a, a + apart * b, -a, 0 * a])


@functools.cache
def slopes(name):
    """Gradients of all kernels at once, compiled."""

    def sums(x):
        k = limit(name, x)
        return jnp.sum(jnp.sin(k.nngp)) + jnp.sum(jnp.cos(k.ntk))

    return jax.jit(jax.grad(sums))


over = hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0.03, 0.3, 1.0, 3.0]), st.sampled_from([1e-9, 1e-6, 1e-4, 1e-2]))
few = hypothesis.settings(max_examples=8)


@pytest.mark.parametrize("name", TABLE)
@few
@over
def test_a_kernel_whatever_the_order_and_the_blocks(name, seed, scale, apart):
    x = examples(name, seed, scale, apart)
    whole, turned, block = limit(name, x), limit(name, x[ORDER]), limit(name, x[:3], x[3:])
    for kernel in KERNELS:
        k = np.asarray(getattr(whole, kernel))
        assert np.isfinite(k).all()
        np.testing.assert_array_equal(k, k.T)
        # Float64 rounding of six rows, of which two are the same and a third may be to nine digits.
        assert np.linalg.eigvalsh(k).min() > -1e-13 * len(k) * k.max()
        # Rounding, in other tiles and orders; an arccosine near the diagonal takes the root of it.
        np.testing.assert_allclose(getattr(turned, kernel), k[np.ix_(ORDER, ORDER)], rtol=1e-10, atol=1e-12 * k.max())
        np.testing.assert_allclose(getattr(block, kernel), k[:3, 3:], rtol=1e-7, atol=1e-8 * k.max())


@pytest.mark.parametrize("name", TABLE)
@few
@over
def test_single_precision(name, seed, scale, apart):
    x = examples(name, seed, scale, apart)
    exact, single = limit(name, x), limit(name, x, dtype="float32")
    for kernel in KERNELS:
        k, truth = np.asarray(getattr(single, kernel)), np.asarray(getattr(exact, kernel))
        assert k.dtype == np.float32
        assert np.isfinite(k).all()
        np.testing.assert_array_equal(k, k.T)
        np.testing.assert_allclose(k.diagonal(), truth.diagonal(), rtol=1e-6)
        # Rows that are alike are rounded alike, to 2^-24 an entry.
        assert np.linalg.eigvalsh(k.astype(np.float64)).min() > -1e-6 * truth.max()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@few
@over
def test_gradients_are_finite(name, seed, scale, apart):
    with jax.enable_x64(True):
        gradient = np.asarray(slopes(name)(jnp.asarray(examples(name, seed, scale, apart))))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[1]).max() > 0
