"""Gaussian predictions against numpy's, and against priors pushed through the dynamics."""

import warnings

import jax
import numpy as np
import pytest

from paperjax.kernels import predict
from tests.kernels.problems import KINDS, OUT, M, N, close, flowed, problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_posterior_is_that_of_numpy(x64, kind, noise):
    (k, y, k_test), _, dense, kernel = problem(kind)
    got = predict.posterior(k, y, k_test, kernel[N:, N:], noise=noise)
    system = dense[0] + noise * np.eye(N * OUT)
    prior = {"full": lambda: kernel[N:, N:].transpose(0, 2, 1, 3).reshape(M * OUT, M * OUT)}.get(kind)
    close(got.mean, (dense[1] @ np.linalg.solve(system, y.ravel())).reshape(M, OUT), 1e-9)
    assert got.jitter == 0
    assert got.covariance.shape == kernel[N:, N:].shape
    if prior is not None:
        wanted = prior() - dense[1] @ np.linalg.solve(system, dense[1].T)
        close(got.covariance, wanted.reshape(M, OUT, M, OUT).transpose(0, 2, 1, 3), 1e-9)
        return
    for o in range(OUT):
        one, cross, test = (part if kind == "shared" else part[..., o] for part in (k, k_test, kernel[N:, N:]))
        wanted = test - cross @ np.linalg.solve(one + noise * np.eye(N), cross.T)
        close(got.covariance if kind == "shared" else got.covariance[..., o], wanted, 1e-9)


def test_posterior_without_noise_is_flow_without_end_and_knows_the_training_points(x64):
    (k, y, k_test), _, _, kernel = problem()
    close(predict.posterior(k, y, k_test, kernel[N:, N:]).mean, predict.gradient_flow(k, y, k_test)(np.inf).test, 1e-9)
    there = predict.posterior(k, y, k, k)
    close(there.mean, y, 1e-9)
    close(there.covariance, np.zeros(k.shape), 1e-9)


def test_jitter_is_reported():
    x = np.array([[1.0, 0.3], [1.0, 0.3], [0.2, 1.0]], np.float32)
    k, y = x @ x.T, np.array([1.0, 1.0, 2.0], np.float32)
    with pytest.warns(UserWarning, match="singular in float32"):
        got = predict.solve(k, y)
    assert 0 < got.jitter < 1e-4
    np.testing.assert_allclose(k @ got.x, y, atol=1e-3)
    with pytest.warns(UserWarning, match="posterior: k_train is singular"):
        posterior = predict.posterior(k, y, k, k)
    assert posterior.jitter == got.jitter
    assert predict.solve(k, y, ridge=1e-2).jitter == 0
    np.testing.assert_allclose(predict.solve(k, y, ridge=1e-2).x, np.linalg.solve(k + 1e-2 * np.eye(3), y), rtol=1e-3)


def test_no_jitter_makes_an_indefinite_kernel_definite():
    k = np.diag(np.array([1.0, -0.5], np.float32))
    with pytest.raises(ValueError, match=r"not positive semi-definite; its lowest eigenvalue is -0\.5"):
        predict.solve(k, np.ones(2, np.float32))
    np.testing.assert_allclose(predict.solve(k, np.ones(2, np.float32), ridge=1.0).x, [0.5, 2.0], rtol=1e-6)


def test_a_kernel_of_zeros_is_named_as_such():
    with pytest.raises(ValueError, match="k_train is 0 everywhere"):
        predict.solve(np.zeros((2, 2), np.float32), np.ones(2, np.float32))
    np.testing.assert_allclose(predict.solve(np.zeros((2, 2), np.float32), np.ones(2, np.float32), ridge=2.0).x, [0.5, 0.5])


def test_solve_can_be_jitted_and_differentiated(x64):
    (k, y, _), _, dense, _ = problem()
    slope = jax.jacobian(jax.jit(lambda ridge: predict.solve(k, y, ridge=ridge).x))(0.1)
    inverse = np.linalg.inv(dense[0] + 0.1 * np.eye(N * OUT))
    close(slope.ravel(), -inverse @ inverse @ y.ravel(), 1e-9)


def priors(kind):
    _, _, _, kernel = problem(kind, seed=9, features=40)
    return predict.Prior(kernel[:N, :N], kernel[N:, :N], kernel[N:, N:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 1.3, np.inf])
def test_the_ensemble_is_its_prior_pushed_through_the_dynamics(x64, kind, t):
    (k, y, k_test), _, dense, _ = problem(kind)
    nngp = priors(kind)
    _, _, _, prior = problem(kind, seed=9, features=40)
    got = predict.ensemble_posterior(k, y, k_test, nngp, t=t, loss="half_sum_of_squares")
    # f(t) on the test inputs is affine in the start: its matrix and its offset from the exponential of the generator.
    zero = np.zeros((N, OUT)), np.zeros((M, OUT))
    if t == np.inf:
        carry = dense[1] @ np.linalg.inv(dense[0])
        offset, push = (carry @ y.ravel()).reshape(M, OUT), np.concatenate([-carry, np.eye(M * OUT)], 1)
    else:
        offset = flowed(dense, y, zero, t)[1]
        rows = np.eye((N + M) * OUT).reshape(-1, N + M, OUT)
        push = np.stack([(flowed(dense, y, (row[:N], row[N:]), t)[1] - offset).ravel() for row in rows], 1)
    eye = np.eye(OUT)
    joint = {
        "full": lambda: np.einsum("nmoq->nomq", prior),
        "shared": lambda: np.einsum("nm,oq->nomq", prior, eye),
        "diagonal": lambda: np.einsum("nmo,oq->nomq", prior, eye),
    }[kind]().reshape((N + M) * OUT, (N + M) * OUT)
    wanted = (push @ joint @ push.T).reshape(M, OUT, M, OUT)
    close(got.mean, offset, 1e-8)
    covariance = np.asarray(got.covariance)
    as_dense = {
        "full": lambda: np.einsum("nmoq->nomq", covariance),
        "shared": lambda: np.einsum("nm,oq->nomq", covariance, eye),
        "diagonal": lambda: np.einsum("nmo,oq->nomq", covariance, eye),
    }[kind]()
    close(as_dense, wanted, 1e-8)
    assert np.linalg.eigvalsh(wanted.reshape(M * OUT, M * OUT)).min() > -1e-9


def test_the_ensemble_by_sampling(x64):
    (k, y, k_test), _, _, _ = problem("shared")
    _, _, _, prior = problem("shared", seed=9, features=40)
    got = predict.ensemble_posterior(k, y, k_test, priors("shared"), t=2.0)
    f = jax.vmap(predict.gradient_flow(k, y, k_test), in_axes=(None, 0, 0))
    starts = np.einsum("nm,smo->sno", np.linalg.cholesky(prior), np.random.default_rng(0).normal(size=(20_000, N + M, OUT)))
    ends = np.asarray(f(2.0, starts[:, :N], starts[:, N:]).test)
    # Standard errors of a mean and of a variance of 20,000 and 40,000 draws.
    spread = np.sqrt(np.diag(got.covariance))
    assert (np.abs(ends.mean(0) - got.mean) < 5 * spread[:, None] / 20_000**0.5).all()
    centred = (ends - ends.mean(0)).transpose(1, 0, 2).reshape(M, -1)
    assert (np.abs(centred @ centred.T / 40_000 - got.covariance) < 5 * 2**0.5 * np.outer(spread, spread) / 40_000**0.5).all()


def test_the_ensemble_whose_ntk_is_the_nngp_kernel_is_bayesian(x64):
    (k, y, k_test), _, _, kernel = problem()
    got = predict.ensemble_posterior(k, y, k_test, predict.Prior(k, k_test, kernel[N:, N:]))
    wanted = predict.posterior(k, y, k_test, kernel[N:, N:])
    close(got.mean, wanted.mean, 1e-8)
    close(got.covariance, wanted.covariance, 1e-8)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_prior_shared_over_outputs_goes_with_any_ntk(x64, kind):
    (k, y, k_test), _, _, _ = problem(kind)
    shared = priors("shared")
    spread = np.eye(OUT) if kind == "full" else np.ones(OUT)
    wide = predict.Prior(*(np.multiply.outer(np.asarray(part), spread) for part in shared))
    one, other = (predict.ensemble_posterior(k, y, k_test, prior, t=1.0) for prior in (shared, wide))
    close(one.covariance, other.covariance, 1e-12)


def test_gaussian_predictions_refuse():
    (k, y, k_test), _, _, kernel = problem("shared")
    test, prior = kernel[N:, N:], priors("shared")
    for noise in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="noise or ridge"):
            predict.posterior(k, y, k_test, test, noise=noise)
    with pytest.raises(ValueError, match="k_test_test has 2 rows"):
        predict.posterior(k, y, k_test, test[:2, :2])
    with pytest.raises(ValueError, match="k_test_test is 3 by 2"):
        predict.posterior(k, y, k_test, test[:, :2])
    with pytest.raises(ValueError, match=r"nngp\.train has 3 rows"):
        predict.ensemble_posterior(k, y, k_test, prior._replace(train=test))
    with pytest.raises(ValueError, match=r"nngp\.cross is \(4, 3\)"):
        predict.ensemble_posterior(k, y, k_test, prior._replace(cross=np.asarray(prior.cross).T))
    with pytest.raises(ValueError, match=r"nngp\.test is not symmetric"):
        predict.ensemble_posterior(k, y, k_test, prior._replace(test=test + np.triu(np.ones((M, M)))))
    with pytest.raises(ValueError, match="'full' and k_train 'shared'"):
        predict.ensemble_posterior(k, y, k_test, priors("full"))
    with pytest.raises(ValueError, match="one time"):
        predict.ensemble_posterior(k, y, k_test, prior, t=-1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_condition_number_is_told_of(dtype):
    """A rotated diagonal: eigenvalues are known, and every pivot is clear of rounding, so that no jitter is needed."""
    with jax.enable_x64(dtype == np.float64):
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
        for condition, told in ((1e-3, False), (0.2, True)):
            # Over the rounding unit.
            values = np.geomspace(1.0, np.finfo(dtype).eps / condition, 6)
            k, y = (turn * values @ turn.T).astype(dtype), np.ones(6, dtype)
            k = (k + k.T) / 2
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                got = predict.posterior(k, y, k, k)
            assert got.jitter == 0
            assert [("condition number" in str(w.message), "noise" in str(w.message)) for w in seen] == [(True, True)] * told
