"""The equivalent of ridge regression against regressions, by NumPy, and against its closed forms."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from paperjax.limits import ridge_equivalent


def agrees(found, predicted, slack):
    """To four standard errors, and slack for the next order in 1/n."""
    predicted = np.array(predicted)
    stderr = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - predicted) < 4 * stderr + slack * predicted), (found.mean(axis=0) / predicted, stderr)


@pytest.mark.parametrize("n", [30, 60, 150])
def test_equivalent_is_what_regression_on_gaussian_features_does(n):
    """With a covariance of decaying spectrum that is not aligned with the target; test error without test points, from θ itself."""
    rng, p, ridge, noise = np.random.default_rng(n), 60, 0.02, 0.3
    scale = np.arange(1, p + 1) ** -0.4
    beta = rng.standard_normal(p) / math.sqrt(p)
    found = []
    for _ in range(300):
        h = rng.standard_normal((n, p)) * scale
        y = h @ beta + math.sqrt(noise) * rng.standard_normal(n)
        theta = np.linalg.solve(h.T @ h / n + ridge * np.eye(p), h.T @ y / n)
        found.append([noise + np.sum(scale**2 * (theta - beta) ** 2), np.mean((y - h @ theta) ** 2)])
    curve = ridge_equivalent(np.diag(scale**2), scale**2 * beta, float(np.sum(scale**2 * beta**2)) + noise, n, ridge)
    agrees(np.array(found), [curve.error[0], curve.training[0]], 1.5 / n)


@hypothesis.given(n=st.integers(1, 400), ridge=st.floats(1e-4, 10.0), noise=st.floats(0.0, 3.0))
def test_isotropic_features_have_the_transform_of_marchenko_and_pastur(n, ridge, noise):
    """Ω = 1: κ is the root of a quadratic, and errors are sums over equal directions; squared roots cost half of the digits."""
    p = 50
    b = 1 - ridge - p / n
    kappa = (-b + math.sqrt(b * b + 4 * ridge)) / 2
    beta = np.full(p, p**-0.5)
    curve = ridge_equivalent(np.eye(p), beta, 1 + noise, n, ridge)
    assert curve.kappa[0] == pytest.approx(kappa, rel=1e-7)
    shrink = kappa / (1 + kappa)
    assert curve.error[0] == pytest.approx((noise + shrink**2) / (1 - p / n / (1 + kappa) ** 2), rel=1e-6)
    # Generalised cross-validation: the error is that of training over the square of the share of freedom that is left.
    assert curve.training[0] == pytest.approx(curve.error[0] * (1 - curve.df1[0] / n) ** 2, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("n", [20, 35, 49, 51, 120])
def test_no_ridge_is_the_limit_of_a_small_one(n):
    omega = np.diag(np.append(np.linspace(0.1, 2.0, 50), np.zeros(10)))  # of rank 50
    cross = np.diagonal(omega) * 0.2
    limit, near = (ridge_equivalent(omega, cross, 5.0, n, ridge) for ridge in (0.0, 1e-9))
    for ours, theirs in zip(limit, near):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)  # first order in the ridge over (1 - p/n)²
    assert (limit.kappa[0] == 0) == (n > 50)


def test_without_ridge_errors_are_known():
    """Of pure noise 1 / (1 - p/n) (Wishart's inverse), and 1 / (1 - n/p) before the threshold."""
    found = ridge_equivalent(np.eye(40), np.zeros(40), 1.0, [10, 80], 0.0)
    np.testing.assert_allclose(found.error, [4 / 3, 2.0], rtol=1e-9)
    np.testing.assert_allclose(found.training, [0.0, 0.5], atol=1e-12)


def test_features_that_are_zero_explain_nothing():
    found = ridge_equivalent(np.zeros((3, 3)), np.zeros(3), 2.0, [1, 5], [0.0, 0.1])
    np.testing.assert_allclose(found.error, 2.0)
    np.testing.assert_allclose(found.training, 2.0)


def test_many_samples_leave_the_floor_and_a_large_ridge_the_target():
    found = ridge_equivalent(np.eye(4), np.ones(4), 6.0, [10**7, 10], [0.0, 1e9])
    np.testing.assert_allclose(found.error, [2.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(found.floor, 2.0)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ridge_equivalent(np.eye(2), np.ones(3), 1.0, 3, 1.0), ValueError, r"cross has shape \(3,\)"),
        (lambda: ridge_equivalent(np.zeros((0, 0)), np.zeros(0), 1.0, 3, 1.0), ValueError, r"covariance has shape \(0, 0\)"),
        (lambda: ridge_equivalent(np.array([[1.0, 1.0], [0.0, 1.0]]), np.zeros(2), 1.0, 3, 1.0), ValueError, "not symmetric"),
        (lambda: ridge_equivalent(np.eye(2), np.ones(2), 1.0, 3, 1.0), ValueError, "explain 2"),
        (lambda: ridge_equivalent(np.diag([1.0, 0.0]), np.ones(2), 3.0, 3, 1.0), ValueError, "outside the range"),
        (lambda: ridge_equivalent(np.eye(2), np.zeros(2), 1.0, 3, -1.0), ValueError, "ridge = -1"),
        (lambda: ridge_equivalent(np.eye(2), np.zeros(2), 1.0, 0, 1.0), ValueError, "samples = 0"),
        (lambda: ridge_equivalent(np.eye(2), np.zeros(2), 1.0, np.array([1.5]), 1.0), TypeError, "no whole number"),
        (lambda: ridge_equivalent(np.eye(2), np.zeros(2), 1.0, [1, 2, 3], [1.0, 2.0]), ValueError, "of one length"),
        (lambda: ridge_equivalent(np.eye(2), np.zeros(2), 1.0, 2, 0.0), ValueError, "rank of the features"),
    ],
)
def test_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()
