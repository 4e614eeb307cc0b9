"""The network's two devices, a rescaled input layer and a masked width, against plain ones; how eta* is read off."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import paperjax as pj
from paperjax.papers.optimization import maximal_initial_learning_rate as paper

X = jax.random.normal(jax.random.key(1), (5, 6))
Y = jnp.arange(5) % 3


def steps(model, params, x, optimizer, number=3):
    """Outputs before and after each of a few steps."""
    state, outputs = optimizer.init(params), []
    gradient = jax.jit(jax.grad(lambda p: pj.losses.cross_entropy(model.apply(p, x), Y)))
    for _ in range(number):
        outputs.append(model.apply(params, x))
        updates, state = optimizer.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    return np.array([*outputs, model.apply(params, x)])


@pytest.mark.parametrize("times", [1, 4])
def test_the_input_rate_is_one_of_an_optimizer_and_of_more_inputs(times):
    """A plain perceptron whose input layer has 0.3 of the rate, on inputs that are repeated; units beyond the width are not there."""
    ours = paper.network(4, 3, 0.3 * times, 7)
    params = ours.init(jax.random.key(0), X)
    plain = pj.models.mlp(4, 3, bias=False)
    first = jnp.sqrt(jnp.float32(0.3 * times)) * params["first"]["w"][:, :4]
    theirs = {
        "first": {"w": jnp.repeat(first, times, axis=0) / times},
        "hidden": {"w": params["hidden"]["w"][:, :4, :4]},
        "readout": {"w": params["readout"]["w"][:4]},
    }
    by_layer = optax.multi_transform(
        {"input": optax.sgd(0.3 * 0.5), "rest": optax.sgd(0.5)}, {"first": "input", "hidden": "rest", "readout": "rest"}
    )
    expected = steps(plain, theirs, jnp.repeat(X, times, axis=1), by_layer)
    found = steps(ours, params, X, optax.sgd(0.5))
    assert np.ptp(expected, axis=0).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_unused_units_stay_at_zero():
    model = paper.network(jnp.int32(4), 3, jnp.float32(0.1), 7)
    params = model.init(jax.random.key(0), X)
    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, X) ** 2))(params)
    for tree in (params, gradient):
        unused = (tree["first"]["w"][:, 4:], tree["hidden"]["w"][:, 4:], tree["hidden"]["w"][:, :, 4:], tree["readout"]["w"][4:])
        assert not any(np.any(part) for part in unused)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("rate", "depth"), [(0.1, 3), (48.0, 4)])
def test_the_kernel_is_depth_times_width_and_the_inputs(rate, depth):
    """E |df/dtheta|² = (L n + r d) |x|² / d at every width, for each output; the mean over draws to three standard errors."""
    width, x = 16, X[:1]
    model = paper.network(width, depth, rate, width)

    def squares(key):
        params = model.init(key, x)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(lambda p: model.apply(p, x)[0, 0])(params)))

    found = np.asarray(jax.jit(jax.vmap(squares))(jax.random.split(jax.random.key(2), 4000)), np.float64)
    expected = (depth * width + rate * 6) * float(jnp.sum(x**2)) / 6
    assert abs(found.mean() - expected) < 3 * found.std() / len(found) ** 0.5
    assert found.std() / len(found) ** 0.5 < 0.03 * expected


def test_only_the_input_layer_is_trained():
    params = paper.input_only(4, 3, 0.1, 4).init(jax.random.key(0), X)
    assert sorted(name for name, layer in params.items() if isinstance(layer, pj.Frozen)) == ["hidden", "readout"]
    np.testing.assert_array_equal(
        paper.input_only(4, 3, 0.1, 4).apply(params, X),
        paper.network(4, 3, 0.1, 4).apply(paper.network(4, 3, 0.1, 4).init(jax.random.key(0), X), X),
    )


def accuracies(*rows):
    """A result with widths 2 and 4 at depth 4, one seed; each row is a width, over rates 1, 2, 4, 8."""
    values = np.array(rows, float)[None, :, None, :, None]
    axes = {"seed": [0], "width": [2, 4], "depth": [4], "lr": [1.0, 2.0, 4.0, 8.0], "step": [16]}
    return xr.Dataset({"accuracy": (tuple(axes), values)}, axes)


def test_the_maximal_rate_is_between_the_last_that_reaches_and_the_next():
    # Too slow at 1 for the second, which a fluke at 8 does not help.
    found = paper.maximal_rates(accuracies([0.5, 0.6, 0.1, 0.1], [0.1, 0.9, 0.1, 0.3]))
    np.testing.assert_allclose(found, [[8**0.5 / 8 ** (2 / 3), 8**0.5 / 16 ** (2 / 3)]])
    assert list(paper.sizes(accuracies([0.5] * 4, [0.5] * 4))) == [8, 16]


@pytest.mark.parametrize("row", [[0.1] * 4, [0.1, 0.5, 0.5, 0.5]])
def test_outside_of_the_grid_is_an_error(row):
    with pytest.raises(ValueError, match="width 4, depth 4, seed 0"):
        paper.maximal_rates(accuracies([0.5, 0.6, 0.1, 0.1], row))


def test_the_axis_of_rates_is_over_a_power_of_the_size():
    updates, _ = paper.sgd(2.0, 4, 2).update(jnp.ones(1), paper.sgd(2.0, 4, 2).init(jnp.ones(1)))
    assert float(updates[0]) == pytest.approx(-2.0 / 4)
    assert paper.rates(0, 1) == pytest.approx([1, 2**0.5, 2])


def test_a_power_law_is_explained():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert paper.explained(x, 3 * x**-0.7) == pytest.approx(1.0)
    assert paper.explained(x, np.array([1.0, 2.0, 2.0, 1.0])) == pytest.approx(0.0, abs=1e-12)
