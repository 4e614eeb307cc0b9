"""Kernels of small random linear models, and their linear dynamics written out."""

import numpy as np
import scipy.linalg

N, M, OUT = 4, 3, 2
KINDS = ("full", "shared", "diagonal")


def problem(kind="full", seed=0, features=20):
    """Kernels of a random linear model, labels and outputs before training, and the kernels as matrices over (example, output)."""
    rng = np.random.default_rng(seed)
    rows = N + M
    if kind == "full":
        jac = rng.normal(size=(rows, OUT, features)) / features**0.5
        kernel = np.einsum("nop,mqp->nmoq", jac, jac)
        dense = np.einsum("nmoq->nomq", kernel)
    elif kind == "shared":
        jac = rng.normal(size=(rows, features)) / features**0.5
        kernel = jac @ jac.T
        dense = np.einsum("nm,oq->nomq", kernel, np.eye(OUT))
    else:
        jac = rng.normal(size=(rows, OUT, features)) / features**0.5
        kernel = np.einsum("nop,mop->nmo", jac, jac)
        dense = np.einsum("nmo,oq->nomq", kernel, np.eye(OUT))
    y, f0 = rng.normal(size=(N, OUT)), rng.normal(size=(rows, OUT))
    dense = dense.reshape(rows * OUT, rows * OUT)
    return (kernel[:N, :N], y, kernel[N:, :N]), (f0[:N], f0[N:]), (dense[: N * OUT, : N * OUT], dense[N * OUT :, : N * OUT]), kernel


def flowed(dense, y, starts, t):
    """Solution of f' = -K (f - y), f_test' = -K_test (f - y) by the exponential of the joint generator."""
    k, k_test = dense
    n, m = len(k), len(k_test)
    generator = np.zeros((n + m, n + m))
    generator[:n, :n], generator[n:, :n] = -k, -k_test
    end = scipy.linalg.expm(generator * t) @ np.concatenate([(starts[0] - y).ravel(), starts[1].ravel()])
    return end[:n].reshape(y.shape) + y, end[n:].reshape(-1, y.shape[1])


def close(got, wanted, tol=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tol, atol=tol)
