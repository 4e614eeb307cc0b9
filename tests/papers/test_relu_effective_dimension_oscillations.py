"""The formulas that take the printed one's place, against draws of what they are formulas of."""

import jax
import jax.numpy as jnp
import numpy as np

from paperjax.papers.finite_width import relu_effective_dimension_oscillations as paper


def test_share_of_neurons_that_are_on_against_draws():
    """Normal vectors of 64 entries with correlation c_l: 20,000 of them, so that four standard errors are at most 0.015."""
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, paper.M))
    for layer in (0, 4, 19):
        c = paper.correlations()[layer]
        on = (np.sqrt(c) * common + np.sqrt(1 - c) * own > 0).any(axis=1).mean()
        np.testing.assert_allclose(paper.live_share()[layer], on, atol=0.015)


def test_limits_of_the_formulas():
    # Independent inputs: a neuron is off for all with probability 2^-m. Correlation 1/π after one layer, and 1 - 9π²/2l² far on.
    np.testing.assert_allclose(paper.live_share()[0], 1 - 2.0**-paper.M)
    np.testing.assert_allclose(paper.correlations()[:2], [0, 1 / np.pi])
    np.testing.assert_allclose(paper.printed()[0], paper.M * 2 / np.pi)
    assert round(2 * paper.M / np.pi) == paper.PRINTED
    assert (np.diff(paper.printed()) > 0).all(), "monotone, so without maxima"
    np.testing.assert_array_equal(paper.expected(1000), np.full(paper.LAYERS, paper.M))


def test_describe_written_out():
    """Orthogonal columns of norms 3 and 2, one of 1e-3 and one of zeros."""
    h = jnp.zeros((paper.M, 4)).at[jnp.arange(3), jnp.arange(3)].set(jnp.array([3.0, 2.0, 1e-3]))
    z = jnp.where(h > 0, h, -1.0)
    found = jax.jit(paper.describe)(z, h)
    # float32: singular values to 1e-6.
    np.testing.assert_allclose(found, [3, 3, 13**2 / (81 + 16), 2], rtol=1e-4)
