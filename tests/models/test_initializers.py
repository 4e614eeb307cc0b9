"""Laws of structured random matrices, from their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.models.initializers import block_sparse, low_rank, orthogonal

MANY = 4000


def drawn(init, shape):
    return np.asarray(jax.lax.map(lambda key: init(key, shape, jnp.float32), jax.random.split(jax.random.key(0), MANY)), np.float64)


@pytest.mark.parametrize("init", [orthogonal(2.0), low_rank(2, 2.0), block_sparse(2, 2.0)])
def test_entries_have_mean_0_and_the_variance_over_fan_in(init):
    w = drawn(init, (6, 4))
    # Standard errors: at most 1.6 sqrt(2/6) / sqrt(4000) = 0.015 of the mean and 0.03 of the variance; five of them.
    np.testing.assert_allclose(w.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose((w**2).mean(axis=0), 2 / 6, atol=0.07)
    # Columns are uncorrelated: the condition of pseudo-iid weights.
    np.testing.assert_allclose((w[:, :, 0] * w[:, :, 1]).mean(axis=0), 0, atol=0.05)


def test_orthogonal_is_haar():
    w = drawn(orthogonal(), (3, 3))
    np.testing.assert_allclose(w.mT @ w, np.broadcast_to(np.eye(3), w.shape), atol=1e-5)  # float32
    # E w_ij⁴ = 3 / (n (n + 2)), and both orientations are equally likely.
    np.testing.assert_allclose((w**4).mean(axis=0), 3 / 15, atol=0.02)
    np.testing.assert_allclose(np.linalg.det(w).mean(), 0, atol=0.08)


def test_rank_and_blocks():
    assert np.linalg.matrix_rank(low_rank(2)(jax.random.key(1), (6, 5))) == 2
    w = np.asarray(block_sparse(3)(jax.random.key(1), (6, 9))) != 0
    assert (w.sum(axis=0) == 2).all()
    assert (w.sum(axis=1) == 3).all()
    assert len(np.unique(w, axis=1).T) == 3  # inputs of units are equal or disjoint


@pytest.mark.parametrize(
    ("init", "shape", "says"),
    [
        (low_rank(7), (6, 5), "rank = 7"),
        (low_rank(0), (6, 5), "rank = 0"),
        (block_sparse(4), (6, 8), "multiples of it"),
        (orthogonal(), (3, 4), "more columns than rows"),
        (low_rank(1), (3, 3, 4), "no matrix"),
    ],
)
def test_refuses(init, shape, says):
    with pytest.raises(ValueError, match=says):
        init(jax.random.key(0), shape)
