"""Regression with a Gaussian process whose variance is itself random: scale mixtures, Student-t processes among them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from paperjax.kernels.posterior import posterior


class StudentT(NamedTuple):
    """A multivariate Student-t.

    Attributes
    ----------
    mean
        ``(M,)``.
    scale
        ``(M, M)``; the covariance is ``dof / (dof - 2)`` times that.
    dof
        Degrees of freedom.
    """

    mean: Array
    scale: Array
    dof: Array


class Mixture(NamedTuple):
    """A mixture of Gaussians of one mean: ``sum_s weights_s N(mean, variances_s covariance)``.

    Attributes
    ----------
    mean, covariance
        ``(M,)`` and ``(M, M)``, of the Gaussian process of variance 1.
    variances, weights
        ``(S,)``; weights sum to 1.
    effective
        ``1 / sum weights²``, how many equal weights would tell as much.
    """

    mean: Array
    covariance: Array
    variances: Array
    weights: Array
    effective: Array

    def moment(self) -> Array:
        """The covariance of the mixture, ``(M, M)``."""
        return jnp.sum(self.weights * self.variances) * self.covariance

    def cdf(self, y: Float[Array, " M"]) -> Array:
        """Probability that an output is at most y, each by itself, ``(M,)``."""
        stds = jnp.sqrt(self.variances[:, None] * jnp.diagonal(self.covariance)[None, :])
        return self.weights @ jax.scipy.special.ndtr((y - self.mean)[None, :] / stds)


def student_t_posterior(
    k_train: Any, y: Float[Array | np.ndarray, " N"], k_test: Any, k_test_test: Any, *, a: Any, b: Any, noise: Any = 0.0
) -> StudentT:
    """Regression with a kernel ``v K``, v of an inverse-gamma law with shape a and rate b.

    With m the mean and S the covariance of the Gaussian process of kernel K, and ``d² = yᵀ (K + noise)^-1 y``,

        ``f | y ~ t(2a + N, m, (2b + d²) / (2a + N) S)``;

    before y it is ``t(2a, 0, b/a K)``. As a = b grows it is the Gaussian process.

    Parameters
    ----------
    k_train, y, k_test, k_test_test
        ``(N, N)``, ``(N,)``, ``(M, N)`` and ``(M, M)``.
    a, b
        Positive.
    noise
        Variance of the labels around the function, in units of v.

    Returns
    -------
    StudentT

    Raises
    ------
    ValueError
        As `paperjax.kernels.predict.posterior`.

    References
    ----------
    Shah, Wilson and Ghahramani, arXiv 1402.4306, Lemma 3; of wide networks Lee et al., arXiv 2107.01408, Corollary 3.2.

    Examples
    --------
    >>> answer = student_t_posterior(jnp.eye(1), jnp.array([2.0]), jnp.zeros((1, 1)), jnp.eye(1), a=1.5, b=1.0)
    >>> float(answer.dof), answer.scale.tolist()  # (2 + 4) / (3 + 1)
    (4.0, [[1.5]])
    """
    gaussian = posterior(k_train, y, k_test, k_test_test, noise=noise)
    dof = 2 * a + y.shape[0]
    return StudentT(gaussian.mean, (2 * b + mahalanobis(k_train, y, noise)) / dof * gaussian.covariance, jnp.asarray(dof))


def mixture_posterior(
    k_train: Any, y: Float[Array | np.ndarray, " N"], k_test: Any, k_test_test: Any,
    variances: Float[Array | np.ndarray, " S"], log_weights: Any = 0.0, *, noise: Any = 0.0,
) -> Mixture:  # fmt: skip
    """Regression with a kernel ``v K``, v of any law, of which there are samples: importance sampling.

    Each sample counts by the likelihood of y, ``N(y; 0, v (K + noise))``: of v only ``yᵀ (K + noise)^-1 y`` is needed, so that thousands
    of samples cost one factorization (arXiv 2107.01408, Section 4).

    Parameters
    ----------
    k_train, y, k_test, k_test_test, noise
        As in `student_t_posterior`.
    variances
        Samples of v, or the nodes of a quadrature.
    log_weights
        Of the samples before y is seen, ``(S,)``: 0 for draws of the prior, ``log p(v) dv`` for a quadrature.

    Returns
    -------
    Mixture

    Examples
    --------
    >>> answer = mixture_posterior(jnp.eye(1), jnp.array([2.0]), jnp.zeros((1, 1)), jnp.eye(1), jnp.array([1.0, 1.0]))
    >>> answer.moment().tolist(), float(answer.effective)
    ([[1.0]], 2.0)
    """
    gaussian = posterior(k_train, y, k_test, k_test_test, noise=noise)
    logs = log_weights - 0.5 * (y.shape[0] * jnp.log(variances) + mahalanobis(k_train, y, noise) / variances)
    weights = jax.nn.softmax(logs)
    return Mixture(gaussian.mean, gaussian.covariance, jnp.asarray(variances), weights, 1 / jnp.sum(weights**2))


def mahalanobis(k_train: Any, y: Float[Array | np.ndarray, " N"], noise: Any = 0.0) -> Array:
    """``yᵀ (K + noise)^-1 y``: N on average for labels that the Gaussian process explains.

    Examples
    --------
    >>> round(float(mahalanobis(jnp.eye(2), jnp.array([1.0, 2.0]), noise=1.0)), 5)
    2.5
    """
    n = y.shape[0]
    return jnp.asarray(y) @ jax.scipy.linalg.solve(k_train + noise * jnp.eye(n, dtype=y.dtype), y, assume_a="pos")
