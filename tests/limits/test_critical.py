"""The edge of chaos against its definition, by Gauss-Hermite quadrature in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits import edge_of_chaos


@pytest.mark.parametrize(("phi", "slope", "bias"), [(jnp.tanh, lambda u: 1 / np.cosh(u) ** 2, 0.05), (jnp.sin, np.cos, 0.02)])
def test_is_a_fixed_point_with_slope_1(phi, slope, bias):
    edge = edge_of_chaos(phi, bias)
    x, w = np.polynomial.hermite_e.hermegauss(120)
    u, w = edge.variance**0.5 * x, w / w.sum()
    value = getattr(np, phi.__name__)(u)
    np.testing.assert_allclose(edge.weight_variance * w @ slope(u) ** 2, 1, rtol=1e-8)  # the last bracket's width
    np.testing.assert_allclose(edge.weight_variance * w @ value**2 + bias, edge.variance, rtol=1e-8)


def test_known_point_and_small_bias():
    assert abs(edge_of_chaos(jnp.tanh, 0.05).weight_variance - 1.76) < 0.005  # arXiv 1611.01232, Fig. 2
    assert abs(edge_of_chaos(jax.scipy.special.erf, 1e-7).weight_variance - np.pi / 4) < 0.01  # (0, pi/4)


@pytest.mark.parametrize(("phi", "bias", "says"), [(jnp.tanh, 0.0, "Give one above 0"), (jax.nn.relu, 0.1, "no variance up to")])
def test_refuses(phi, bias, says):
    with pytest.raises(ValueError, match=says):
        edge_of_chaos(phi, bias)
