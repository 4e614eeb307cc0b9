"""The two means and the variance, by elementary formulas in n and k, without a matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.papers.infinite_width import permutation_exact_learning as paper


def nngp(u):
    """Arc-cosine kernel of degree 1, of inputs of length 1 with cosine u (Cho and Saul, 2009)."""
    return (np.sqrt(1 - u**2) + u * (math.pi - np.arccos(u))) / (2 * math.pi)


def ntk(u):
    return nngp(u) + u * (math.pi - np.arccos(u)) / (2 * math.pi)


def elementary(k, n):
    """mu_1, mu_0 and the variance: the training kernel is inverted by Sherman and Morrison."""
    u, c = 1 / np.sqrt(n), ntk(0.0)
    common = c * (n * ntk(u) + (k - n) * c) / (1 - c + c * k)
    high, low = (ntk(u) - common) / (1 - c), (c - common) / (1 - c)
    total, squares = n * high + (k - n) * low, n * high**2 + (k - n) * low**2
    before, beside = nngp(1.0), nngp(0.0)
    return high, low, before - 2 * (n * high * nngp(u) + (k - n) * low * beside) + (before - beside) * squares + beside * total**2


@pytest.fixture(scope="module")
def five_bits():
    data = jax.tree.map(jnp.asarray, paper.unseen_inputs(5))
    return data, paper.gaussian(data)


def test_gaussian_is_the_elementary_one(five_bits):
    data, answer = five_bits
    high, low, variance = elementary(5, (data.y_test > 0).sum(axis=1))
    np.testing.assert_allclose(answer.mean, np.where(data.y_test > 0, high[:, None], low[:, None]), atol=2e-6)
    np.testing.assert_allclose(np.diagonal(answer.covariance), variance, atol=2e-6)
    np.testing.assert_allclose(answer.high, high, atol=2e-6)
    # for the input of ones too, which has no 0 to read it from
    np.testing.assert_allclose(answer.low, low, atol=2e-6)


@pytest.mark.parametrize(("share", "worst"), [pytest.param(1.0, 40, marks=pytest.mark.slow), (0.0, 2)])
def test_worst_input_of_all(share, worst):
    """`models_needed` looks at some n only; the worst of all is among them, and is the one that the docstring names."""
    k, n = 40, np.arange(2, 41)
    high, low, variance = elementary(k, n)
    cut = share * (high + low) / 2
    need = variance / np.minimum(high - cut, np.where(n < k, cut - low, np.inf)) ** 2
    assert n[need.argmax()] == worst
    assert float(paper.models_needed(jax.tree.map(jnp.asarray, paper.one_of_each(k)), share)) == pytest.approx(need.max(), rel=2e-3)


def test_midpoint_law_with_its_next_order():
    k = 4.0 ** np.arange(8, 13)
    high, low, variance = elementary(k, k)
    need = variance / ((high - low) / 2) ** 2
    leading = 16 * (0.5 - 1 / (2 * math.pi)) * (1 - 1 / (2 * math.pi)) ** 2 * k
    # A slope of 1 + 1.21 k^-1/2 is a factor exp(-2.42 k^-1/2).
    np.testing.assert_allclose(np.log(need / leading) * np.sqrt(k), -2.42, atol=0.03)


def test_law_of_the_signs():
    """mu_0 <= 0 where t(u) - c >= u^2 (1 - c): derived for one kernel, and here on two."""
    n = np.arange(2, 200)
    u, c = 1 / np.sqrt(n), ntk(0.0)
    assert (ntk(u) - c > u**2 * (1 - c)).all()
    assert (elementary(200, n)[1] < 0).all()
    even = 2 / math.pi * (np.sqrt(1 - u**2) + 2 * u * np.arcsin(u))
    assert (even - 2 / math.pi < u**2 * (2 - 2 / math.pi)).all()


def test_every_input_is_there_once():
    data = paper.every_input(6)
    assert len(np.unique(data.y_test, axis=0)) == 63
    assert len(data.y_test) == 64
    np.testing.assert_array_equal(data.y_test, (data.x_test > 0)[:, paper.permutation(6)])
    assert len(paper.unseen_inputs(6).y_test) == 63 - 6
