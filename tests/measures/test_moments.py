"""Excess kurtosis of known laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.measures import excess_kurtosis


@pytest.mark.parametrize(("draw", "expected"), [(jax.random.normal, 0.0), (jax.random.laplace, 3.0), (jax.random.rademacher, -2.0)])
def test_of_known_laws(draw, expected):
    x = draw(jax.random.key(0), (200_000,)).astype(jnp.float32)
    np.testing.assert_allclose(excess_kurtosis(x), expected, atol=0.25)  # five standard errors of the heaviest, Laplace's


def test_along_an_axis_and_without_scale():
    x = jnp.array([[1.0, -1.0], [2.0, 0.0]])
    np.testing.assert_allclose(excess_kurtosis(x, axis=1), [-2.0, -1.0])
    np.testing.assert_allclose(excess_kurtosis(7 * x, axis=1), excess_kurtosis(x, axis=1), rtol=1e-6)
