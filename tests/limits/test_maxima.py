"""Maxout and max pooling: of two Gaussian values exactly, of more drawn; against laws of maxout and one simulated channel."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.limits.ntk_networks import SENTENCES, VECTORS, B, W, conv, dense, flat, plain

KEY = jax.random.key(0)
GRAM = W**2 * VECTORS @ VECTORS.T / 5 + B**2
STRIPS = np.random.default_rng(3).normal(size=(2, 1, 4, 3))
limit = functools.partial(pj.limit, progress=False)


def maxout(pieces):
    return plain(lambda draw, x, n: dense(draw, jnp.max(dense(draw, x, pieces * n).reshape(x.shape[0], n, pieces), -1), 1, b=None))


def two_layers(draw, x, n):
    return dense(draw, jnp.maximum(dense(draw, x, n), dense(draw, x, n)), 1, b=None)


def fields(cov, shape, draws=400_000):
    return np.random.default_rng(1).multivariate_normal(np.zeros(len(cov)), cov, (draws, *shape))


def simulated(values):
    """``W² E v v'`` of a channel's values, (draws, N), and its standard error."""
    products = W**2 * values[:, :, None] * values[:, None, :]
    return products.mean(0), products.std(0) / len(products) ** 0.5


def exact_maxout():
    # (u + v + |u - v|) / 2, with u + v and u - v independent and of twice the covariance.
    with jax.enable_x64(True):
        k = jnp.asarray(2 * GRAM)
        covariances = jnp.diag(k)[:, None], k, jnp.diag(k)[None]
        absolute = pj.limits.dual(jnp.abs)
        nngp = W**2 / 4 * (k + absolute.value(*covariances))
        return nngp, nngp + W**2 / 4 * (2 + 2 * absolute.derivative(*covariances)) * k / 2


@pytest.mark.parametrize("family", [maxout(2), plain(two_layers)], ids=["pieces", "layers"])
def test_maxout_of_two_is_exact(family):
    ours, (nngp, ntk) = limit(family, VECTORS), exact_maxout()
    np.testing.assert_allclose(ours.nngp, nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, ntk, rtol=1e-12)
    # Of two pieces the second moment is that of one (Tseran and Montufar, arXiv 2301.06956).
    np.testing.assert_allclose(np.diag(ours.nngp), W**2 * np.diag(GRAM), rtol=1e-12)
    found, error = simulated(fields(GRAM, (2,)).max(1))
    assert (np.abs(ours.nngp - found) < 5 * error).all()


@pytest.mark.slow
@pytest.mark.parametrize(("pieces", "constant"), [(3, 0.78391), (5, 0.55555)])
def test_maxout_of_more_is_drawn(pieces, constant):
    ours = limit(maxout(pieces), VECTORS, key=KEY, samples=4096, ntk=False)
    error = np.asarray(ours.error[0])
    # The constants of maxout's initialization, one over the second moment of the largest of as many standard normal numbers.
    np.testing.assert_allclose(np.diag(ours.nngp), W**2 * np.diag(GRAM) / constant, atol=5 * error.max())
    found, other = simulated(fields(GRAM, (pieces,)).max(1))
    assert (np.abs(ours.nngp - found) < 5 * np.hypot(error, other)).all()
    assert (error < 0.03 * np.max(ours.nngp)).all()


def pooled(window, phi):
    def forward(draw, x, n):
        h = phi(conv(draw, x, n))
        return dense(draw, flat(nn.max_pool(h, (1, window), (1, window))), 1, b=None)

    return plain(forward)


def strips(window, phi):
    padded = np.pad(STRIPS, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, 0:3, j : j + 3].reshape(2, -1) for j in range(4)], 1).reshape(8, -1)
    h = phi(fields(W**2 * patches @ patches.T / 27 + B**2, ())).reshape(-1, 2, 4 // window, window).max(-1)
    products = W**2 * np.einsum("snp,smp->snm", h, h) / h.shape[-1]
    return products.mean(0), products.std(0) / len(products) ** 0.5


def test_pooling_of_two_gaussian_positions_is_exact():
    ours = limit(pooled(2, lambda h: h), STRIPS)
    found, error = strips(2, lambda h: h)
    assert (np.abs(ours.nngp - found) < 5 * error).all()
    assert (error < 0.01 * np.max(found)).all()
    assert ours.error is None


@pytest.mark.slow
def test_pooling_behind_a_relu_is_drawn():
    ours = limit(pooled(4, jax.nn.relu), STRIPS, key=KEY, samples=4096)
    found, error = strips(4, lambda h: np.maximum(h, 0))
    assert (np.abs(ours.nngp - found) < 5 * np.hypot(error, ours.error[0])).all()
    init, apply = pooled(4, jax.nn.relu)(1024)
    x = jnp.asarray(STRIPS, jnp.float32)

    @jax.jit
    def kernel(key):
        gradients = jax.jacobian(lambda p: apply(p, x)[:, 0])(init(key, x))
        return sum(jnp.einsum("i...,j...->ij", g, g) for g in gradients)

    networks = np.stack([kernel(key) for key in jax.random.split(KEY, 32)])
    spread = np.sqrt(networks.var(0, ddof=1) / len(networks) + np.asarray(ours.error[1]) ** 2)
    # Five standard errors; 1,024 channels are off by a tenth of a percent.
    assert (np.abs(networks.mean(0) - ours.ntk) < 5 * spread).all()
    assert (spread < 0.03 * np.max(ours.ntk)).all()


ORDER = r"primitive (top_k|sort): an ordering of wide values.*threshold.*jnp\.minimum"
REFUSED = {
    "three pieces": (maxout(3), VECTORS, r"maximum of 3 wide values.*key=jax\.random\.key\(0\)"),
    "behind a relu": (pooled(2, jax.nn.relu), STRIPS, r"not Gaussian.*behind a nonlinearity.*integral over as many fields"),
    "a growing axis": (plain(lambda d, x, n: jnp.max(dense(d, x, n), 1, keepdims=True)), VECTORS, r"more and more independent values"),
    "classes": (plain(lambda d, x, n: jax.nn.softmax(dense(d, dense(d, x, n), 3), -1)), VECTORS, "softmax over classes.*a loss can apply"),
    "a norm of outputs": (plain(lambda d, x, n: jnp.sum(dense(d, dense(d, x, n), 3) ** 2, -1)), VECTORS, "3 independent.*norm"),
    "the largest of a growing axis": (plain(lambda d, x, n: dense(d, jax.lax.top_k(dense(d, x, n), n // 2)[0], 1)), VECTORS, ORDER),
    "sorted positions": (plain(lambda d, x, n: dense(d, flat(jnp.sort(dense(d, x, n), 1)), 1)), SENTENCES, ORDER),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    family, x, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"(?s){message}"):
        limit(family, x)


@pytest.mark.slow
def test_a_product_of_functions_of_two_fields_that_one_leaf_gives():
    def forward(draw, x, n):
        w = draw(5, n)
        return jnp.tanh(x @ w / 5**0.5) * jnp.tanh((2 * x + 1) @ w / 5**0.5) @ draw(n, 1) / n**0.5

    x = VECTORS[:2]
    with pytest.raises(ValueError, match=r"product of functions of several fields.*key=jax\.random\.key"):
        pj.limit(plain(forward), x, progress=False)
    found = pj.limit(plain(forward), x, progress=False, key=jax.random.key(0), samples=4096)
    w = np.random.default_rng(0).normal(size=(400_000, 5))
    f = np.tanh(w @ x.T / 5**0.5) * np.tanh(w @ (2 * x + 1).T / 5**0.5)
    products = f[:, :, None] * f[:, None, :]
    error = np.hypot(found.error[0], products.std(0) / len(w) ** 0.5)
    # Drawn twice, independently: five standard errors.
    assert np.all(np.abs(np.asarray(found.nngp) - products.mean(0)) < 5 * error)
