"""Norms and ranks against numpy's singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperjax.measures import spectral_norm, stable_rank


@pytest.mark.slow
@given(st.sampled_from([(1, 7), (5, 5), (20, 9), (9, 20)]), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_small_matrices_are_exact(shape, scale, seed):
    w = (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
    exact = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    assert float(spectral_norm(jnp.asarray(w))) == pytest.approx(exact[0], rel=1e-4)
    assert float(stable_rank(jnp.asarray(w))) == pytest.approx(np.sum(exact**2) / exact[0] ** 2, rel=1e-3)


@pytest.mark.parametrize(("rank", "error"), [(3, 1e-5), (None, 0.01)])
def test_large_matrices(rank, error):
    """Low rank plus a little noise, and noise alone, which has no gap."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(300, 400))
    if rank is not None:
        w = rng.normal(size=(300, rank)) @ rng.normal(size=(rank, 400)) + 0.01 * w
    found = float(spectral_norm(jnp.asarray(w, jnp.float32)))
    exact = np.linalg.norm(w, 2)
    assert exact * (1 - error) < found < exact * (1 + 1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_exactly_low_rank_and_multiples_of_the_identity(rank):
    """The Krylov space is full after `rank` steps, long before 32."""
    rng = np.random.default_rng(rank)
    w = rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 50))
    assert float(spectral_norm(jnp.asarray(w, jnp.float32))) == pytest.approx(np.linalg.norm(w, 2), rel=1e-5)
    assert float(spectral_norm(3 * jnp.eye(40))) == pytest.approx(3, rel=1e-5)
    assert float(spectral_norm(jnp.diag(jnp.repeat(jnp.arange(1.0, rank + 1), 20)))) == pytest.approx(rank, rel=1e-5)


def test_zeros_and_rank_one():
    assert float(spectral_norm(jnp.zeros((4, 3)))) == 0
    assert float(stable_rank(jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0)))) == pytest.approx(1, rel=1e-5)
    assert jnp.isnan(stable_rank(jnp.zeros((4, 3))))


def test_it_is_mapped_and_compiled():
    ws = jax.random.normal(jax.random.key(0), (3, 6, 4))
    expected = np.linalg.svd(np.asarray(ws), compute_uv=False)[:, 0]
    np.testing.assert_allclose(jax.jit(jax.vmap(spectral_norm))(ws), expected, rtol=1e-4)
