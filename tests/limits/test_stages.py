"""Networks deeper than Python's stack, and the same numbers whatever the stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits import mlp_kernels, stages
from tests.limits.ntk_networks import SENTENCES, VECTORS, B, W, attending, dense, normed, perceptron, plain, residual

limit = functools.partial(pj.limit, progress=False)


def looped(draw, x, n):
    h, w = dense(draw, x, n), draw(n, n)
    h = jax.lax.fori_loop(0, 4, lambda i, h: h + jnp.sin(h @ w / n**0.5), h)
    return dense(draw, jnp.sin(dense(draw, h, n)), 1)


@pytest.mark.parametrize(
    ("forward", "x"),
    [(residual, VECTORS), (normed, SENTENCES), (attending("SOFTMAX")[0], SENTENCES), (looped, VECTORS)],
    ids=["residual", "norm", "attention", "loop"],
)
def test_the_numbers_do_not_depend_on_the_stages(forward, x, monkeypatch):
    expected = limit(plain(forward), x, per="leaf")
    monkeypatch.setattr(stages, "STAGE", 1)
    found = limit(plain(forward), x, per="leaf")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15), (found.nngp, found.ntk), (expected.nngp, expected.ntk)
    )


def test_errors_of_the_innermost_come_through():
    class Run:
        known, open = {}, 0

    run, other = Run(), Run()
    run.known, other.known = {}, {}

    def down(n):
        if n == 100:
            raise ValueError("at the bottom")
        # Two that ask each other: each goes down in stages of its own.
        of = (run, other)[n % 2]
        return stages.kept(of, n, lambda: down(n + 1))

    with pytest.raises(ValueError, match="at the bottom"):
        down(0)
    assert (run.open, other.open) == (0, 0)


@pytest.mark.slow
def test_a_network_deeper_than_pythons_stack():
    x, depth = VECTORS.astype(np.float64), 150
    found = limit(plain(perceptron("relu", depth, B)[0]), x)
    with jax.enable_x64(True):
        expected = mlp_kernels(x @ x.T / x.shape[1], depth, jax.nn.relu, weight_variance=W**2, bias_variance=B**2)
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-12)
    # Correlations come near 1, where the angle of a step takes the root of their rounding.
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-9)
