"""The expansion's terms written out for two blocks, and the growth against its exact variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.papers.depth import residual_expansion as paper


def test_orders_are_the_coefficients_of_the_forward_pass_in_lambda():
    """A polynomial of degree L, found from its values at L + 1 points."""
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=3), rng.normal(size=(paper.BLOCKS, 3, 3))
    scales = np.linspace(-1, 1, paper.BLOCKS + 1)
    values = []
    for scale in scales:
        x = h
        for block in w:
            x = x + scale * block @ x
        values.append(x)
    with jax.enable_x64(True):
        terms = paper.orders(jnp.asarray(h), jnp.asarray(w))
        # Nine equidistant points: the Vandermonde matrix has condition number 1e3 or so.
        np.testing.assert_allclose(terms, np.linalg.solve(np.vander(scales, increasing=True), np.stack(values)), rtol=1e-10, atol=1e-9)
        assert list(np.count_nonzero(paper.orders(jnp.ones(1), jnp.ones((paper.BLOCKS, 1, 1))), axis=1)) == [1] * (paper.BLOCKS + 1)
        np.testing.assert_array_equal(paper.orders(jnp.ones(1), jnp.ones((paper.BLOCKS, 1, 1)))[:, 0], paper.PATHS)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_growth_is_that_of_networks_with_matrices(power):
    """Mean of |h^L|² over 4,000 networks of 8 neurons with matrices drawn: relative variance (1 + 6 / 4n)^4 - 1 = 1 at most."""
    depth, width, nets = 4, 8, 4000
    h, w = jax.random.normal(jax.random.key(0), (width,)), jax.random.normal(jax.random.key(1), (nets, depth, width, width)) / width**0.5
    ends = jax.jit(jax.vmap(lambda w: paper.forward(jax.nn.identity, h, w, depth**-power)))(w)
    found = float(jnp.mean(jnp.sum(ends**2, axis=1)) / jnp.sum(h**2))
    # Four standard errors.
    np.testing.assert_allclose(found, paper.expected(depth, power), rtol=4 * nets**-0.5)


def test_undone_branches_start_as_the_function_of_lambda_one():
    x = jnp.ones((2, 5))
    whole, small = paper.residual(1.0, 0.0), paper.residual(0.25, 1.0)
    outputs = [model.apply(model.init(jax.random.key(0), x), x) for model in (whole, small)]
    np.testing.assert_allclose(*outputs, rtol=1e-4)  # float32 over eight blocks


def test_complexity_of_a_linear_map_is_its_squared_norm():
    model = pj.Model(lambda key, x: jnp.arange(6.0).reshape(2, 3), lambda w, x: x @ w)
    x, y = jnp.ones((4, 2)), jnp.ones((4, 3))
    data = pj.data.Dataset(x, y, x, y, "linear", "generated")
    np.testing.assert_allclose(paper.complexity(model, jnp.arange(6.0).reshape(2, 3), data), 55.0)
