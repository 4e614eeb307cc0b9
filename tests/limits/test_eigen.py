"""Eigenvectors matrix by matrix, which no other program's can keep waiting."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits.draws import _square_root
from paperjax.limits.eigen import eigh
from paperjax.limits.joint import _factor

RNG = np.random.default_rng(0)
MANY = RNG.normal(size=(2, 3, 5, 5))
MANY = MANY + MANY.swapaxes(-1, -2)
WAYS = {"at once": eigh, "mapped": jax.vmap(eigh), "mapped twice": jax.vmap(jax.vmap(eigh)), "in a loop": lambda C: jax.lax.map(eigh, C)}


@pytest.mark.parametrize("way", WAYS)
def test_they_are_orthogonal_and_make_the_matrix(way):
    with jax.enable_x64(True):
        values, Q = map(np.asarray, jax.jit(WAYS[way])(MANY))
    # Float64 rounding.
    np.testing.assert_allclose(Q @ Q.swapaxes(-1, -2), np.broadcast_to(np.eye(5), MANY.shape), atol=1e-13)
    np.testing.assert_allclose(np.einsum("abij,abj,abkj->abik", Q, values, Q), MANY, atol=1e-13)
    assert (np.diff(values) > 0).all()


def test_they_move_with_the_matrix():
    def of(C, how):
        values, Q = how(C)
        return jnp.sum(jnp.sin(values)) + jnp.sum(Q[:, 0] ** 3 * Q[:, 1])

    with jax.enable_x64(True):
        ours, theirs = (np.asarray(jax.vmap(jax.grad(of), (0, None))(MANY[0], how)) for how in (eigh, jnp.linalg.eigh))
        # Eigenvalues that several share move as their sum does.
        level = np.asarray(jax.jacfwd(lambda t: eigh(jnp.diag(jnp.array([1.0, 1.0, 2.0])) + t * jnp.ones((3, 3)))[0])(0.0))
    np.testing.assert_allclose(*(d + d.swapaxes(-1, -2) for d in (ours, theirs)), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose([level[:2].sum(), level[2]], [2.0, 1.0], rtol=1e-12)


@pytest.mark.parametrize("fn", [eigh, _factor, jax.vmap(jax.vmap(lambda C: _square_root(C)))], ids=["eigh", "quadrature", "draws"])
def test_a_program_calls_for_one_matrix_at_a_time(fn):
    """A call for several waits for threads of a pool that it may be on itself; those who wait are soon all."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        text = jax.jit(fn).lower(MANY).as_text()
    calls = re.findall(r"custom_call @lapack_dsyevd_ffi\(.*?\) .*?: \((.*?)\)", text)
    assert calls
    assert set(calls) == {"tensor<5x5xf64>"}
