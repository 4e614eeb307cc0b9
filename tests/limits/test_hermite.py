"""Hermite series: which terms are needed, and what they cost for rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits import hermite
from paperjax.limits.hermite import Grid, balanced, choose, parities, series


@pytest.mark.parametrize(
    ("f", "g", "parity"),
    [
        (jnp.tanh, jnp.tanh, 1),
        (jax.nn.silu, jax.nn.silu, 0),
        (jax.nn.sigmoid, jnp.tanh, 1),
        (jnp.tanh, jax.nn.silu, None),
        (lambda h: jnp.exp(-h / 2), jnp.tanh, None),
    ],
)
def test_terms_left_out_are_not_missed(f, g, parity, x64):
    """Against as many terms as the nodes can tell apart, of both parities; value, derivative and gradients."""
    grid, off = choose(f, g, 2.0, 1e-11)
    assert grid.parity == parity
    assert off < 1e-11
    full = balanced(grid.points)
    assert grid.degree < full.degree
    k = tuple(jnp.asarray(column) for column in np.array([(2.0, 1.2, 1.5), (0.3, -0.6, 2.0), (1.0, 1.0, 1.0), (1e-3, 0.0, 0.5)]).T)

    def all_of(grid):
        value, by = jax.value_and_grad(lambda *k: jnp.sum(series(f, g, grid, *k)), argnums=(0, 1, 2))(*k)
        return jnp.stack([jnp.full(4, value), *by])

    np.testing.assert_allclose(jax.jit(all_of, static_argnums=0)(grid), jax.jit(all_of, static_argnums=0)(full), rtol=1e-10, atol=2e-11)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 31, 32, 33, 70])
@pytest.mark.parametrize("parity", [None, 0, 1])
def test_blocks_of_terms_are_their_sum(degree, parity, x64):
    """Of ``exp(s h)``, whose coefficients are ``exp(s²/2) s^r / sqrt(r!)``."""
    rho, s = 0.7, 1.3
    r = np.arange(degree + 1)
    terms = np.exp(s * s) * np.cumprod(np.concatenate([[1.0], s * s * rho / r[1:]]))
    kept = (r < 2) | (parity is None) | (r % 2 == parity)
    k = jnp.asarray(s * s)
    np.testing.assert_allclose(series(jnp.exp, jnp.exp, Grid(96, 12.0, degree, parity), k, rho * k, k), terms[kept].sum(), rtol=1e-12)


def test_a_constant_needs_no_terms():
    assert choose(jnp.tanh, jnp.ones_like, 1.0, 1e-11)[0].degree == 0


def test_parities():
    assert parities(lambda h: 2 * h + 1, 10.0) == {0, 1}
    assert parities(lambda h: h + 1e-9 * h**3, 10.0) == {1}
    assert parities(lambda h: jnp.tanh(h) + 1e-9 * h**2, 10.0) == set()
    assert parities(lambda h: 1 / h, 10.0) == {1}


def test_under_vmap_a_function_is_evaluated_for_rows_and_columns_only(x64):
    """Not for each pair, of which there are only sums of products; the 9 polynomials at the nodes are the largest array."""
    grid = Grid(32, 10.0, 8)
    over = jax.vmap(jax.vmap(lambda *k: series(jnp.tanh, jnp.tanh, grid, *k), (None, 0, 0)), (0, 0, None))
    jaxpr = jax.make_jaxpr(over)(jnp.ones(5), jnp.full((5, 7), 0.5), jnp.ones(7))
    sizes = [eqn.outvars[0].aval.shape for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "tanh"]
    assert sorted(sizes) == [(5, 32), (7, 32)]
    assert max(np.prod(v.aval.shape) for eqn in _equations(jaxpr.jaxpr) for v in eqn.outvars) <= 9 * 32


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_spectra_that_overflow_are_none():
    assert hermite.spectra([jnp.exp, lambda h: jnp.exp(h * h)], balanced(32), 100.0) is None
