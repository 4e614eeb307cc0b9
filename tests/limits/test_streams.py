"""Residual streams of functions of fields, normed before each layer, against a recursion written out; and outputs that are bent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import SENTENCES, VECTORS, plain

limit = functools.partial(pj.limit, progress=False)
relu = jax.nn.relu
DEPTH, BIAS, EPS = 7, 0.3, 1e-6


def normed(h, centred):
    h = h - jnp.mean(h, -1, keepdims=True) if centred else h
    return h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + EPS)


def stream(centred, depth, scanned):
    """``h + relu(W norm(h) + b)``: what is added has a mean, and is not Gaussian."""

    def forward(draw, x, n):
        h = x @ draw(x.shape[-1], n) / math.sqrt(x.shape[-1])
        layers = draw(depth, n, n), draw(depth, n)

        def step(h, layer):
            w, b = layer
            return h + relu(normed(h, centred) @ w / math.sqrt(n) + BIAS * jnp.broadcast_to(b, h.shape)), None

        if scanned:
            h, _ = lax.scan(step, h, layers)
        else:
            for i in range(depth):
                h, _ = step(h, [leaf[i] for leaf in layers])
        return normed(h, centred) @ draw(n, 1) / math.sqrt(n)

    return plain(forward)


def written_out(x, centred, depth):
    """Second moments S, means m and tangents T of the stream; those of relu are arc-cosines."""
    S = x @ x.T / x.shape[-1]
    T, m = S.copy(), np.zeros(len(x))

    def after_norm(S, m):
        C = S - np.outer(m, m) if centred else S
        size = np.sqrt(np.diag(C) + EPS)
        return C / np.outer(size, size), np.outer(size, size)

    for _ in range(depth):
        N, size = after_norm(S, m)
        K = N + BIAS**2
        d = np.sqrt(np.diag(K))
        angle = np.arccos(np.clip(K / np.outer(d, d), -1, 1))
        slopes = (math.pi - angle) / (2 * math.pi)
        squares = np.outer(d, d) * (np.sin(angle) + (math.pi - angle) * np.cos(angle)) / (2 * math.pi)
        mean = d / math.sqrt(2 * math.pi)
        T = T + slopes * (T / size + N + BIAS**2)
        S, m = S + np.outer(m, mean) + np.outer(mean, m) + squares, m + mean
    N, size = after_norm(S, m)
    return N, N + T / size


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("scanned", [True, False], ids=["scan", "unrolled"])
def test_a_stream_of_functions_of_fields_is_normed(centred, scanned):
    depth = DEPTH if scanned else 2
    found = limit(stream(centred, depth, scanned), VECTORS)
    nngp, ntk = written_out(VECTORS, centred, depth)
    np.testing.assert_allclose(found.nngp, nngp, rtol=1e-9)
    np.testing.assert_allclose(found.ntk, ntk, rtol=1e-7)


def bent(phi):
    def forward(draw, x, n):
        return phi(relu(x @ draw(x.shape[-1], n)) @ draw(n, 1) / math.sqrt(5 * n))

    return plain(forward)


@pytest.mark.parametrize("phi", [jnp.tanh, jnp.square, lambda f: f + jnp.sin(f)], ids=["tanh", "square", "a skip around sin"])
def test_a_nonlinear_output_has_a_random_tangent_kernel(phi):
    with pytest.raises(ValueError, match="tangent kernel stays random"):
        limit(bent(phi), VECTORS)


def test_a_nonlinear_output_has_second_moments():
    straight, squared = (limit(bent(phi), VECTORS, ntk=False).nngp for phi in (lambda f: f, jnp.square))
    k = np.diag(straight)
    np.testing.assert_allclose(squared, np.outer(k, k) + 2 * np.asarray(straight) ** 2, rtol=1e-9)


def linear_attention(unscaled, tied):
    """Attention without a softmax, over the width once at the end or in the logits."""

    def forward(draw, x, n):
        h = x @ draw(x.shape[-1], n) / math.sqrt(x.shape[-1])
        w = draw(n, n)
        keys = h @ w / math.sqrt(n)
        queries = keys if tied else keys + h @ draw(n, n) / math.sqrt(n)
        values = h @ draw(n, n) / math.sqrt(n)
        logits = queries @ jnp.swapaxes(keys, 1, 2)
        mixed = logits @ values / n if unscaled else (logits / n) @ values
        return jnp.mean(mixed, 1) @ draw(n, 1) / math.sqrt(n)

    return plain(forward)


@pytest.mark.parametrize("tied", [True, False], ids=["one", "two"])
def test_attention_whose_logits_are_not_scaled_before_they_are_used(tied):
    found, scaled = (limit(linear_attention(unscaled, tied), SENTENCES[:2]) for unscaled in (True, False))
    one = [x @ x.T / x.shape[-1] for x in SENTENCES[:2]]
    between = SENTENCES[0] @ SENTENCES[1].T / SENTENCES.shape[-1]
    # Logits are E q k' = E k k', whose training moves them by terms of order 1/n.
    np.testing.assert_allclose(found.nngp[0, 1], np.mean(one[0] @ between @ one[1].T), rtol=1e-9)
    np.testing.assert_allclose(found.nngp, scaled.nngp, rtol=1e-12)
    np.testing.assert_allclose(found.ntk, scaled.ntk, rtol=1e-12)
