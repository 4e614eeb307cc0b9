"""Largest eigenvalues from products, against numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.kernels import spectrum

N, OUT = 5, 2


def full(seed=0, n=N, outputs=(OUT,), features=30):
    jac = np.random.default_rng(seed).normal(size=(n, int(np.prod(outputs)), features)) / features**0.5
    kernel = np.einsum("nop,mqp->nmoq", jac, jac)
    return kernel.reshape(n, n, *outputs, *outputs)


def gram(seed=0, n=N, features=3):
    x = np.random.default_rng(seed).normal(size=(n, features))
    return x @ x.T


def close(got, wanted, tol=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tol, atol=tol)


def run(matrix, k, shape=None, **options):
    matrix = jnp.asarray(matrix, jnp.result_type(float))
    shape = (len(matrix),) if shape is None else shape
    return spectrum.lanczos(lambda v: (matrix @ v.reshape(-1)).reshape(shape), shape, k, key=jax.random.key(0), **options)


def check(got, matrix, k, tol):
    wanted = np.linalg.eigvalsh(np.asarray(matrix, float))[::-1][:k]
    scale = np.abs(wanted).max() or 1.0
    np.testing.assert_allclose(got.eigenvalues, wanted, atol=tol * scale)
    flat = np.asarray(got.vectors).reshape(k, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(k), atol=100 * tol)
    residuals = np.linalg.norm(np.asarray(matrix) @ flat.T - flat.T * np.asarray(got.eigenvalues), axis=0)
    np.testing.assert_allclose(got.residuals, residuals, atol=tol * scale)
    assert got.converged.all()


def test_lanczos_is_eigh(x64):
    kernel = full(n=30, features=80)
    matrix = np.asarray(spectrum.as_matrix(kernel))
    got = run(matrix, 6, (30, OUT))
    check(got, matrix, 6, 1e-10)
    assert got.vectors.shape == (6, 30, OUT)
    assert got.products < 6 * 60
    close(np.abs(np.sum(np.asarray(got.vectors) * np.asarray(spectrum.eigenvalues(kernel).vectors[:6]), axis=(1, 2))), np.ones(6), 1e-6)


@pytest.mark.parametrize(
    ("matrix", "k"),
    [
        (np.kron(gram(features=2), np.eye(3)), 8),
        (np.eye(6), 4),
        (np.zeros((3, 3)), 2),
        (np.diag([2.0, -1.0, -1.0, -3.0]), 4),
        (np.ones((1, 1)), 1),
    ],
    ids=["each thrice", "identity", "zero", "negative", "number"],
)
def test_lanczos_finds_what_one_run_cannot(matrix, k):
    check(run(matrix, k), matrix, k, 1e-5)


@pytest.mark.slow
def test_lanczos_says_what_has_not_converged(x64):
    matrix = np.diag(np.linspace(1.0, 2.0, 60))
    with pytest.warns(UserWarning, match="2 of 2 eigenpairs have not converged"):
        got = run(matrix, 2, steps=4, max_steps=8)
    assert not got.converged.any()
    assert (got.residuals > 1e-6).all()
    # An eigenvalue lies within the residual of each.
    assert (np.abs(np.diag(matrix)[:, None] - np.asarray(got.eigenvalues)).min(0) <= got.residuals).all()
    check(run(matrix, 2, steps=4), matrix, 2, 1e-10)


def test_lanczos_refuses():
    with pytest.raises(ValueError, match="k = 4"):
        run(np.eye(3), 4)
    with pytest.raises(ValueError, match="not symmetric"):
        run(np.triu(np.ones((3, 3))), 1)
    with pytest.raises(ValueError, match="holds nan"):
        run(np.full((3, 3), np.nan), 1)
    with pytest.raises(ValueError, match="must keep shape"):
        spectrum.lanczos(lambda v: v[:1], (3,), 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="tol"):
        run(np.eye(3), 1, tol=0.0)
    with pytest.raises(ValueError, match="steps"):
        run(np.eye(3), 1, steps=0)
