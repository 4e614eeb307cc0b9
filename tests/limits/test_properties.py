"""Laws of every kernel at infinite width, over drawn batches with repeated, nearly repeated, opposite, parallel and zero examples."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.limits.ntk_networks import attention, conv, dense, layer_norm, perceptron, plain

N, SPLIT = 6, 2


def tanh(draw, x, n):
    return dense(draw, jnp.tanh(dense(draw, x, n)), 1)


def images(draw, x, n):
    return dense(draw, jnp.mean(jax.nn.relu(conv(draw, x, n)), (1, 2)), 1)


def normed(draw, x, n):
    return dense(draw, jnp.sin(layer_norm(dense(draw, x, n))), 1)


def attending(draw, x, n):
    h = attention(draw, dense(draw, x, n), n, lambda g: jax.nn.softmax(g, -1))
    return dense(draw, jnp.mean(h, 1), 1)


def recurrent(draw, x, n):
    u, w = draw(x.shape[-1], n), draw(n, n)
    h = jnp.zeros((x.shape[0], n))
    for t in range(x.shape[1]):
        h = jax.nn.relu(h @ w / n**0.5 + x[:, t] @ u / x.shape[-1] ** 0.5)
    return dense(draw, h, 1)


def scanned(draw, x, n):
    layers = draw(3, n, n)
    h, _ = jax.lax.scan(lambda h, w: (h + jax.nn.relu(h) @ w / (3 * n) ** 0.5, None), dense(draw, x, n), layers)
    return dense(draw, h, 1)


NETWORKS = {
    "relu": (perceptron("relu", 2, 0.3)[0], (5,)),
    "erf": (perceptron("erf", 2, 0.3)[0], (5,)),
    "tanh": (tanh, (5,)),
    "convolution": (images, (3, 3, 2)),
    "layer norm": (normed, (5,)),
    "attention": (attending, (3, 2)),
    "recurrent": (recurrent, (3, 2)),
    "scan": (scanned, (5,)),
}
QUICK = ("relu", "layer norm")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


@functools.cache
def program(name):
    forward, shape = NETWORKS[name]
    return pj.limit(plain(forward), np.random.default_rng(0).normal(size=(N, *shape)), progress=False).program


def limit(name, *x, dtype="float64"):
    found = pj.limit(program(name), *x, dtype=dtype, progress=False)
    return {kernel: np.asarray(getattr(found, kernel)) for kernel in ("nngp", "ntk")}


@st.composite
def batches(draw, name):
    """Rows of which each is new, of some size, or made of one before."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [rng.normal(size=NETWORKS[name][1])]
    for _ in range(N - 1):
        before, new = rows[draw(st.integers(0, len(rows) - 1))], rng.normal(size=rows[0].shape)
        kind = draw(st.sampled_from(("new", "large", "small", "repeated", "near", "opposite", "parallel", "zero")))
        made = {"large": 10 * new, "small": 1e-2 * new, "repeated": before, "near": before + 1e-5 * new, "opposite": -before}
        rows.append({**made, "new": new, "parallel": 3 * before, "zero": 0 * new}[kind])
    return np.stack(rows)


def over(name, fn):
    """Run a property of batches of a network."""
    hypothesis.settings(max_examples=15, deadline=None, derandomize=True)(hypothesis.given(batches(name))(fn))()


@pytest.mark.parametrize("name", ALL)
def test_symmetric_and_positive(name):
    def law(x):
        for k in limit(name, x).values():
            np.testing.assert_array_equal(k, k.T)
            # Entries of 1e2 with rounding of 1e-16 through three layers and sums of 6 rows; drawn batches leave 1e-15.
            assert np.linalg.eigvalsh(k).min() >= -1e-12 * np.abs(k).max()

    over(name, law)


@pytest.mark.parametrize("name", ALL)
def test_a_block_of_the_whole_in_any_order(name):
    def law(x):
        order = np.roll(np.arange(N), 2)[::-1]
        whole, turned, block = limit(name, x), limit(name, x[order]), limit(name, x[:SPLIT], x[SPLIT:])
        for kernel, k in whole.items():
            # Of almost equal examples an angle is the root of what rounding leaves of a difference: 1e-8 of 1.
            room = dict(rtol=1e-9, atol=1e-9 * np.abs(k).max())
            np.testing.assert_allclose(turned[kernel], k[np.ix_(order, order)], **room)
            np.testing.assert_allclose(block[kernel], k[:SPLIT, SPLIT:], **room)

    over(name, law)


@pytest.mark.parametrize("name", ALL)
def test_single_precision(name):
    def law(x):
        x = x.astype(np.float32)
        exact, single = limit(name, x.astype(np.float64)), limit(name, x, dtype="float32")
        for kernel, k in single.items():
            assert np.isfinite(k).all()
            np.testing.assert_allclose(k.diagonal(), exact[kernel].diagonal(), rtol=1e-6, atol=1e-6 * exact[kernel].max())
            np.testing.assert_array_equal(k, k.T)
            # Six rows, each rounded to 6e-8 of the largest entry, and pairs that are almost opposite to 1e-5 (test_tiles).
            assert np.linalg.eigvalsh(k.astype(np.float64)).min() >= -1e-6 * np.abs(k).max()

    over(name, law)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite(name):
    with jax.enable_x64(True):

        def total(x):
            found = pj.limit(program(name), x, progress=False)
            return jnp.sum(found.nngp) + jnp.sum(found.ntk)

        gradient = jax.jit(jax.grad(total))

        def law(x):
            found = np.asarray(gradient(jnp.asarray(x)))
            assert np.isfinite(found).all(), np.argwhere(~np.isfinite(found))

        over(name, law)
