"""Functions whose square, or whose slope's, has no mean: a sum over a grid is finite, and wrong."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

import paperjax as pj
from tests.limits.ntk_networks import IMAGES, VECTORS, dense, plain

limit = functools.partial(pj.limit, progress=False)
X = VECTORS[:2]


def of(phi):
    return plain(lambda draw, x, n: phi(x @ draw(5, n) / math.sqrt(5)) @ draw(n, 1) / math.sqrt(n))


ROOTS = {"sqrt": lambda h: jnp.sqrt(jnp.abs(h)), "log": lambda h: jnp.log(jnp.abs(h)), "-1/4": lambda h: jnp.abs(h) ** -0.25}


@pytest.mark.parametrize("name", ROOTS)
def test_a_slope_without_a_mean_square_has_no_tangent_kernel(name):
    with pytest.raises(ValueError, match=r"slope that grows near .* ntk=False"):
        limit(of(ROOTS[name]), X)


def test_a_value_without_a_mean_square_has_no_kernel():
    with pytest.raises(ValueError, match="mean"):
        limit(of(lambda h: 1 / h), X, ntk=False)


@pytest.mark.parametrize("ntk", [False, True])
def test_a_pole_at_one_is_no_closed_form(ntk):
    """Of log|h + 1|, infinite at a point that is looked at, the kernel was 0."""
    with pytest.raises(ValueError, match="no expectation, or none that is found here"):
        limit(of(lambda h: jnp.log(jnp.abs(h + 1))), X, ntk=ntk)


def test_a_root_has_an_nngp():
    size = np.sqrt(np.mean(X**2, 1))
    found = np.diag(limit(of(ROOTS["sqrt"]), X, ntk=False).nngp)
    np.testing.assert_allclose(found, size * math.sqrt(2 / math.pi), rtol=1e-8)


def test_a_power_has_an_nngp():
    # E |h|^(2p) = (2k)^p gamma(p + 1/2) / sqrt(pi).
    found = limit(of(lambda h: jnp.abs(h) ** 0.8), X, ntk=False).nngp
    expected = (2 * np.mean(X**2, 1)) ** 0.8 * special.gamma(1.3) / math.sqrt(math.pi)
    np.testing.assert_allclose(np.diag(found), expected, rtol=1e-8)


@pytest.mark.parametrize("power", [0.6, 0.8])
def test_a_steep_slope_has_a_tangent_kernel_that_is_not_found(power):
    """Of |h|^0.6 it was off by 6e-4: nodes within a rounding unit of 0 hold that much of the mean square of the slope."""
    with pytest.raises(ValueError, match=rf"slope that grows near 0 as .h.\^-{1 - power:.1f}: the tangent kernel exists.* ntk=False"):
        limit(of(lambda h: jnp.abs(h) ** power), X)


@pytest.mark.slow
def test_a_less_steep_slope_has_a_tangent_kernel():
    # k E phi'^2 = p^2 E phi^2 / (2 p - 1).
    p = 0.9
    found = limit(of(lambda h: jnp.abs(h) ** p), X)
    np.testing.assert_allclose(np.diag(found.ntk), np.diag(found.nngp) * (1 + p**2 / (2 * p - 1)), rtol=1e-10)


def test_a_function_of_a_depthwise_convolution_is_refused_by_name():
    def forward(draw, x, n):
        h = jnp.maximum(dense(draw, x, n), 0)
        h = lax.conv_general_dilated(h, draw(3, 3, 1, n), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=n)
        return dense(draw, jnp.mean(jnp.maximum(h, 0), (1, 2)), 1)

    with pytest.raises(NotImplementedError, match=r"fields at once .*depthwise"):
        limit(plain(forward), IMAGES[:2], ntk=False)
