"""An Experiment under a parametrization is the training of the plan's model with the plan's optimizer."""

import jax
import numpy as np
import optax
import pytest

import paperjax as pj
from tests.zoo import as_users_run_it


def data():
    digits = pj.data.one_hot(pj.data.digits())
    return pj.data.Dataset(digits.x_train[:32], digits.y_train[:32], digits.x_test[:8], digits.y_test[:8], "few", "digits")


def net(width, scale=1.0):
    return pj.models.mlp(width, 2, 10, readout_variance=scale)


def experiment(**fields):
    settings = {
        "loss": "mse",
        "optimizer": optax.sgd,
        "parametrization": pj.mup,
        "base": {"width": 4},
        "grid": pj.grid(width=[4, 8], lr=[0.1, 0.2], seed=2),
        "steps": 3,
        "measure_at": [3],
    }
    return pj.Experiment(net, data(), **{**settings, **fields})


def test_cells_are_the_training_of_the_plan():
    result, here = experiment().run(), data()
    family = pj.family(net, x=here.x_train)
    plan = pj.plan(family, pj.mup, base={"width": 4}, target={"width": 8}, optimizer="sgd")
    params = plan.model.init(jax.random.fold_in(jax.random.key(1), 0), here.x_train)
    tx = plan.optimizer(optax.sgd, learning_rate=0.2)
    state = tx.init(params)

    def loss(params):
        return ((plan.model.apply(params, here.x_train) - here.y_train) ** 2).mean()

    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(result.train_loss.sel(width=8, lr=0.2, seed=1).item(), loss(params), rtol=1e-5)


@pytest.mark.slow
def test_the_base_itself_is_the_network_as_it_is():
    planned = experiment().run().sel(width=4)
    plain = experiment(parametrization=None, base=None).run().sel(width=4)
    np.testing.assert_array_equal(planned.train_loss, plain.train_loss)


@pytest.mark.slow
def test_a_parametrization_may_be_an_axis():
    grid = pj.grid(parametrization=[pj.mup, pj.ntp], width=[4, 8], lr=[0.5], seed=2)
    result = experiment(parametrization=None, grid=grid).run()
    assert list(result.parametrization.values) == ["muP", "NTP"]
    same = (result.train_loss.sel(parametrization="muP") == result.train_loss.sel(parametrization="NTP")).all(("lr", "seed", "step"))
    assert same.values.tolist() == [True, False]


@pytest.mark.slow
def test_a_traced_size_reaches_the_planned_network():
    grid = pj.grid(width=[8], scale=[1.0, 4.0], lr=[0.1], seed=2)
    result = experiment(grid=grid, steps=0, measure_at=[0]).run()
    alone = experiment(grid=pj.grid(width=[8], scale=4.0, lr=[0.1], seed=2), steps=0, measure_at=[0]).run()
    np.testing.assert_allclose(result.train_loss.sel(scale=4.0), alone.train_loss, rtol=1e-6)
    assert (result.train_loss.sel(scale=1.0) != result.train_loss.sel(scale=4.0)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": None}, "relative to a base"),
        ({"parametrization": None}, "relative to a base"),
        ({"base": {"widht": 4}}, "base names 'widht'.*width"),
        ({"base": {"width": 16}}, "base width = 16 is larger"),
        ({"base": 16}, "base must be a dict of sizes"),
        ({"parametrization": "mup"}, "pj.mup"),
        ({"optimizer": optax.sgd(0.1), "grid": pj.grid(width=[4, 8], seed=2)}, "already built"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with as_users_run_it(), pytest.raises((ValueError, TypeError), match=message):
        experiment(**fields).run()
