"""Student-t posteriors against integrals over the variance, and limits of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from paperjax.kernels.mixtures import mahalanobis, mixture_posterior, student_t_posterior

K = np.array([[2.0, 0.5, 0.3], [0.5, 1.0, 0.4], [0.3, 0.4, 1.5]])
Y = np.array([1.0, -2.0])
PROBLEM = (K[:2, :2], Y, K[2:, :2], K[2:, 2:])


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("a", "b", "noise"), [(1.5, 1.0, 0.0), (3.0, 0.5, 0.2)])
def test_density_is_a_ratio_of_joint_densities(a, b, noise):
    # f(x* | y) = f(x*, y) / f(y), both Student-t of 2a degrees, from scipy; the noise is on the labels only.
    answer = student_t_posterior(*PROBLEM, a=a, b=b, noise=noise)
    joint = K + noise * np.diag([1, 1, 0])
    at = np.array([-1.0, 0.3, 2.0])
    together = stats.multivariate_t(shape=b / a * joint, df=2 * a)
    alone = stats.multivariate_t(shape=b / a * joint[:2, :2], df=2 * a)
    expected = [together.pdf([*Y, f]) / alone.pdf(Y) for f in at]
    mine = stats.t(float(answer.dof), float(answer.mean[0]), float(answer.scale[0, 0]) ** 0.5).pdf(at)
    np.testing.assert_allclose(mine, expected, rtol=1e-10)  # rounding


def test_quadrature_of_the_mixture_is_student():
    log_v = jnp.linspace(-14, 14, 2001)
    prior = -(1.5 + 1) * log_v - 1.0 / jnp.exp(log_v) + log_v
    mixture, answer = mixture_posterior(*PROBLEM, jnp.exp(log_v), prior), student_t_posterior(*PROBLEM, a=1.5, b=1.0)
    expected = stats.t(float(answer.dof), float(answer.mean[0]), float(answer.scale[0, 0]) ** 0.5)
    np.testing.assert_allclose(mixture.cdf(jnp.array([0.7]))[0], expected.cdf(0.7), rtol=1e-9)  # the trapezoid rule's
    np.testing.assert_allclose(mixture.moment()[0, 0], expected.var(), rtol=1e-6)  # its cut at v = exp(14)


def test_one_variance_is_the_gaussian_process():
    mixture = mixture_posterior(*PROBLEM, jnp.array([2.0]))
    gain = np.linalg.solve(K[:2, :2], K[:2, 2])
    np.testing.assert_allclose(mixture.mean[0], gain @ Y)
    np.testing.assert_allclose(mixture.moment()[0, 0], 2 * (1.5 - gain @ K[:2, 2]))
    wide = student_t_posterior(*PROBLEM, a=1e9, b=1e9)
    np.testing.assert_allclose(wide.scale[0, 0], 1.5 - gain @ K[:2, 2], rtol=1e-8)


def test_samples_of_any_prior():
    # A uniform v on (1/2, 2): against scipy's quadrature. 20,000 samples, relative standard error 0.4 %.
    v = jax.random.uniform(jax.random.key(0), (20_000,), minval=0.5, maxval=2.0)
    found = mixture_posterior(*PROBLEM, v)
    weight = lambda v: np.exp(-0.5 * float(mahalanobis(*PROBLEM[:2])) / v) / v  # noqa: E731
    expected = integrate.quad(lambda v: v * weight(v), 0.5, 2)[0] / integrate.quad(weight, 0.5, 2)[0]
    np.testing.assert_allclose(found.moment()[0, 0] / found.covariance[0, 0], expected, rtol=0.02)
    assert 1000 < found.effective < 20_000
