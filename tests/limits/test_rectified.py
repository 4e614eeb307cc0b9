"""Arc-cosine kernels of every degree: against the published ones, adaptive quadrature, and each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax import limits
from paperjax.limits import rectified_monomial, signed_power
from paperjax.limits.rectified import arc_cosine
from tests.limits.gaussian import adaptive

COVARIANCES = [(1.0, 0.3, 1.0), (0.5, -0.6, 2.0), (2.25, 2.25, 2.25), (0.25, -0.25, 0.25), (0.04, 0.05, 1.0), (0.0, 0.0, 1.0)]


def columns(covariances):
    return tuple(jnp.asarray(column) for column in np.array(covariances).T)


def test_published_angular_parts():
    """J_0, J_1, J_2 of Cho and Saul (NIPS 2009, eqs. 5 to 7)."""
    t = np.linspace(0.1, 3.0, 9)
    c, s = np.cos(t), np.sin(t)
    published = [np.pi - t, s + (np.pi - t) * c, 3 * s * c + (np.pi - t) * (1 + 2 * c**2)]
    for n, J in enumerate(published):
        p, q = (np.polynomial.polynomial.polyval(c, a or (0.0,)) for a in arc_cosine(n))
        np.testing.assert_allclose(p * s + q * (np.pi - t), J, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_against_adaptive_quadrature(n, x64):
    k = columns(COVARIANCES)
    d, signed = rectified_monomial(n), signed_power(n)
    for ours, f in (
        (d.value, lambda h: np.maximum(h, 0) ** n * np.heaviside(h, 0.5)),
        (signed.value, lambda h: np.sign(h) ** (n + 1) * np.abs(h) ** n),
    ):
        truth = np.array([adaptive(f, f, *c) for c in COVARIANCES[: 5 if n == 0 else 6]])
        moments = np.array([(a * b) ** (n / 2) for a, _, b in COVARIANCES])[: len(truth)] * math.prod(range(1, 2 * n, 2))
        assert np.all(np.abs(np.asarray(ours(*k))[: len(truth)] - truth) <= 1e-11 * moments + 1e-14)
    # (max(h, 0)^n)' is n max(h, 0)^(n - 1).
    below = n**2 * rectified_monomial(n - 1).value(*k) if n else jnp.zeros(6)
    np.testing.assert_allclose(d.derivative(*k), below, rtol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_price(n, x64):
    """At correlation ±1 and zero variance, too."""
    k = columns([*COVARIANCES, (1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (0.0, 0.0, 0.0)])
    d = rectified_monomial(n)
    gradients = [jax.vmap(jax.grad(d.value, argnums=axis))(*k) for axis in (0, 1, 2)]
    assert np.all(np.isfinite(gradients))
    np.testing.assert_allclose(gradients[1], d.derivative(*k), rtol=1e-10, atol=1e-12)


def test_the_first_two_are_the_step_and_the_relu(x64):
    k = columns(COVARIANCES)
    np.testing.assert_allclose(rectified_monomial(0).value(*k), limits.step.value(*k), rtol=1e-13)
    np.testing.assert_allclose(rectified_monomial(1).value(*k), limits.relu.value(*k), rtol=1e-12, atol=1e-16)
    with pytest.raises(ValueError, match="degree = -1"):
        rectified_monomial(-1)
