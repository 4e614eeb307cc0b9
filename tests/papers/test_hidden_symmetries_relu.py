"""Ranks against exact arithmetic, the bound against the paper's shapes, and the symmetries that are counted."""

import itertools
from fractions import Fraction

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.papers.landscape import hidden_symmetries_relu as paper


def exact_rank(matrix):
    """By elimination in rational numbers; the entries must be integers."""
    rows, rank = [[Fraction(int(v)) for v in row] for row in matrix], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank])]
        rank += 1
    return rank


def network(key, *sizes):
    return paper.network(jax.random.normal(key, (paper.parameters(*sizes),)), *sizes)


@pytest.mark.parametrize(("sizes", "expected"), [((5, 5, 1), 31), ((5, 5, 2), 56), ((5, 5, 3), 81), ((10, 10, 2), 211)])
def test_bound_is_the_papers(sizes, expected):
    assert paper.bound(*sizes) == expected


@pytest.mark.parametrize("seed", range(3))
def test_rank_is_that_of_exact_arithmetic(seed):
    """A net with integer weights at integer inputs: its Jacobian is of integers, which float64 holds."""
    rng = np.random.default_rng(seed)
    sizes = (2, 3, 3, 1)
    layers = [{"w": rng.integers(-3, 4, (a, b)) * 1.0, "b": rng.integers(-3, 4, b) * 1.0} for a, b in itertools.pairwise(sizes)]
    with jax.enable_x64(True):
        found = np.asarray(paper.jacobian(jax.nn.relu, jax.tree.map(jnp.asarray, layers), jnp.asarray(rng.integers(-9, 10, (60, 2)) * 1.0)))
        mixed = paper.rank(jnp.asarray(found), jnp.asarray(rng.normal(size=(2, 30, 2))))
    np.testing.assert_array_equal(found, np.round(found))
    assert float(mixed) == exact_rank(found) <= paper.bound(2, 3, 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_neuron_of_one_sign_is_found_and_is_a_symmetry(sign):
    layers = network(jax.random.key(0), 3, 4, 2)
    layers[1]["w"] = layers[1]["w"].at[:, 2].set(jnp.array([1.0, -1.0, 1.0, 1.0]))
    layers[1]["w"] = jnp.where(jnp.arange(4) == 2, layers[1]["w"], jnp.array([1.0, -1.0, 1.0, -1.0])[:, None])
    layers[1]["b"] = jnp.full(4, 1.0 * sign)
    assert not bool(paper.one_sign(layers))
    layers[1]["w"] = layers[1]["w"].at[:, 2].set(sign * jnp.array([0.5, 0.1, 0.2, 0.3]))
    assert bool(paper.one_sign(layers))
    x = jax.random.normal(jax.random.key(1), (50, 3))
    outputs = jax.vmap(lambda x, shift: paper.output(jax.nn.relu, shifted(layers, shift), x), in_axes=(0, None))
    np.testing.assert_allclose(outputs(x, 0.05), outputs(x, 0.0), rtol=1e-4, atol=1e-5)  # float32


def shifted(layers, shift):
    """The bias of neuron 2 of layer 2 moved; if it is on, the output's bias undoes that."""
    moved = [dict(layer) for layer in layers]
    on = jnp.all(layers[1]["w"][:, 2] > 0)
    moved[1]["b"] = layers[1]["b"].at[2].add(shift)
    moved[2]["b"] = layers[2]["b"] - jnp.where(on, shift, 0.0) * layers[2]["w"][2]
    return moved


def test_chance_of_no_neuron_of_one_sign():
    """Against 4,000 networks of width 3 and depth 3; four standard errors of a share are 0.032."""
    found = jax.jit(jax.vmap(lambda key: paper.one_sign(network(key, 3, 3, 3))))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(1 - float(found.mean()), paper.least_share(3, 3), atol=0.032)
