"""What cannot run is refused with the reason, before anything is compiled or trained."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paperjax as pj
from paperjax import driver
from paperjax.model import Frozen, Model
from tests.zoo import as_users_run_it, blobs, classes, line, net


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(driver, "compile_cells", lambda *args: pytest.fail("it was compiled"))


def experiment(**fields):
    usual = {"family": net, "data": blobs(), "optimizer": optax.sgd, "grid": pj.grid(lr=[0.1], width=[2]), "steps": 2}
    return pj.Experiment(**{**usual, **fields})


def refused(error, message, **fields):
    with as_users_run_it(), pytest.raises(error, match=message):
        experiment(**fields).run()


def test_the_usual_one_is_fine():
    experiment().check()


# Fields ----------------------------------------------------------------------------------------------------------------


def test_unknown_optimizer():
    refused(ValueError, r"unknown optimizer 'sdg'\. Did you mean 'sgd'", optimizer="sdg")
    refused(ValueError, r"unknown optimizer 'admaw'\. Did you mean .*'adamw'", grid=pj.grid(optimizer=["sgd", "admaw"], lr=0.1))
    refused(TypeError, "optimizer must be a name in optax, a factory or a GradientTransformation, not 3", optimizer=3)


def test_unknown_loss():
    refused(ValueError, r"unknown loss 'cross entropy'\. Did you mean 'cross_entropy'", loss="cross entropy")
    refused(ValueError, r"unknown loss 'mae'", grid=pj.grid(loss=["mse", "mae"], lr=0.1))
    refused(TypeError, "loss must be a name", loss=3)
    refused(ValueError, r"the loss must be one number, and it has shape \(16, 1\)", loss=lambda f, y: (f - y) ** 2)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_learning_rates(lr):
    with pytest.raises(ValueError, match="lr"):
        pj.grid(lr=[0.1, lr])


def test_no_learning_rate():
    refused(TypeError, r"sgd needs a learning rate: add an axis lr", grid=pj.grid(width=[2]))


def test_a_learning_rate_axis_with_a_ready_transformation():
    refused(ValueError, r"axis 'lr' is taken by nothing.*The optimizer is already built; pass its factory", optimizer=optax.sgd(0.1))


def test_two_names_of_the_learning_rate():
    refused(ValueError, r"both lr and learning_rate", grid=pj.grid(width=[2], lr=[0.1], learning_rate=[0.1, 0.2]))


@pytest.mark.parametrize("steps", [-1, 2.5, "10", True])
def test_steps(steps):
    refused(ValueError, "steps = .*: give a whole number of updates, 0 or more", steps=steps)


@pytest.mark.parametrize(
    ("measure_at", "message"), [("linear", "'log'"), (0, "at least one"), ([], "there must be one"), ([3], r"0\.\.2"), ([0.5], "whole")]
)
def test_measure_at(measure_at, message):
    refused(ValueError, message, measure_at=measure_at)


@pytest.mark.parametrize("batch", [0, -4, 17])
def test_batch(batch):
    refused(ValueError, rf"batch = {batch} with 16 training examples", batch=batch)
    refused(ValueError, rf"batch = {batch} with 16 training examples", grid=pj.grid(lr=0.1, batch=[4, batch]))


def test_other_fields():
    refused(TypeError, r"grid must be made by pj\.grid\(\.\.\.\), not dict", grid={"lr": [0.1]})
    refused(TypeError, "family must be a callable", family=net(3))
    refused(TypeError, "data must be a Dataset or a callable", data=np.ones(3))
    refused(ValueError, "max_bytes = 0", max_bytes=0)
    refused(MemoryError, "Give max_bytes=", max_bytes=10)
    refused(ValueError, r"the layout has 64 lanes and JAX sees 2", layout=pj.Layout(64, 1, 1))
    with pytest.raises(TypeError, match=r"Experiment has no field 'optimiser'\. Did you mean 'optimizer'"):
        experiment().replace(optimiser="sgd")


# Grid ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [{"width": []}, {"lr": []}, {"seed": []}])
def test_an_empty_axis(grid):
    with pytest.raises(ValueError, match="the axis has no value"):
        pj.grid(**grid)


def test_an_axis_that_nothing_takes():
    refused(ValueError, r"axis 'widht' is taken by nothing.*Did you mean 'width'", grid=pj.grid(widht=[2, 3], lr=0.1))
    refused(ValueError, r"axis 'momentun' is taken by nothing.*Did you mean 'momentum'", grid=pj.grid(momentun=0.9, lr=0.1))
    refused(ValueError, "steps cannot be an axis", grid=pj.grid(steps=[1, 2], lr=0.1), family=lambda steps: net(3))
    refused(ValueError, "an axis cannot be called 'params'", grid=pj.grid(params=[1, 2], lr=0.1), family=lambda params: net(3))


def test_a_repeated_value():
    with pytest.raises(ValueError, match="axis width repeats 64"):
        pj.grid(width=[64, 64])


# Network ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [[0], [2, 0], [-1]])
def test_a_width_below_one(widths):
    refused(ValueError, r"size width = (0|-1): a whole-number size must be at least 1", grid=pj.grid(lr=0.1, width=widths))


def test_a_width_that_becomes_zero():
    refused(ValueError, "axis of size 0", family=lambda width: net(width // 4), grid=pj.grid(lr=0.1, width=[2]))
    refused(
        ValueError, "cannot be built at width=2.*a size is 0", family=lambda width: net(8 // (width - 2)), grid=pj.grid(width=2, lr=0.1)
    )


def wrong(apply):
    model = net(2)
    return Model(model.init, lambda params, x: apply(model.apply(params, x)))


@pytest.mark.parametrize(
    ("apply", "error", "message"),
    [
        (lambda y: [y], TypeError, "returns a list, not one array"),
        (lambda y: (y, y), TypeError, "returns a tuple, not one array"),
        (lambda y: y.sum(), ValueError, r"returns shape \(\) for a batch of 16"),
        (lambda y: y[:3], ValueError, r"returns shape \(3, 1\) for a batch of 16"),
        (lambda y: y.argmax(1), TypeError, "not a floating-point array"),
    ],
)
def test_a_network_that_returns_something_else(apply, error, message):
    refused(error, f"the family's network: .*{message}", family=lambda: wrong(apply), grid=pj.grid(lr=0.1))


@pytest.mark.parametrize("params", [{"w": Frozen(1.0)}, {"n": 3}, {}])
def test_a_network_with_nothing_to_train(params):
    model = Model(lambda key, x: jax.tree.map(jnp.asarray, params), lambda params, x: x)
    refused(ValueError, "no parameter to train", family=lambda: model, data=blobs(outputs=3), grid=pj.grid(lr=0.1))


def test_what_is_no_network():
    refused(TypeError, "as_model does not know what to do with 3", family=lambda: 3, grid=pj.grid(lr=0.1))
    refused(TypeError, "the family needs 'depth', which nothing provides", family=lambda width, depth: net(width))


def test_seeds_of_a_network_that_has_its_numbers_already():
    instance = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    refused(ValueError, "the seeds change nothing", family=lambda: instance, grid=pj.grid(lr=0.1, seed=3))
    experiment(family=lambda: lambda rngs: nnx.Linear(3, 1, rngs=rngs), grid=pj.grid(lr=0.1, seed=3)).check()
    experiment(family=lambda width, rngs: nnx.Linear(3, 1, rngs=rngs), grid=pj.grid(lr=0.1, width=[2], seed=3)).check()
    refused(ValueError, "axis 'rngs' is taken by nothing", family=lambda rngs: nnx.Linear(3, 1, rngs=rngs), grid=pj.grid(lr=0.1, rngs=[1]))
    experiment(family=lambda width: nn.Sequential([nn.Dense(width), nn.Dense(1)]), grid=pj.grid(lr=0.1, width=[2], seed=3)).check()


# Data ------------------------------------------------------------------------------------------------------------------


def test_labels_that_do_not_fit_the_loss():
    many = {"family": lambda: net(3, outputs=3), "grid": pj.grid(lr=0.1)}
    refused(TypeError, r"loss 'mse' needs floating-point targets, and y is int32\[16\].*one_hot", data=classes(), **many)
    refused(TypeError, "loss 'logistic' needs floating-point labels", data=classes(), loss="logistic", **many)
    refused(ValueError, "needs labels ±1", loss="logistic")
    refused(ValueError, "at least two classes", data=classes(), loss="cross_entropy")
    shifted = classes()._replace(y_train=classes().y_train + 1)
    refused(ValueError, r"the labels y_train lie in 1\.\.3, and 3 outputs", data=shifted, loss="cross_entropy", **many)
    tested = classes()._replace(y_test=classes().y_test - 1)
    refused(ValueError, r"the labels y_test lie in -1\.\.1, and 3 outputs", data=tested, loss="cross_entropy", **many)
    ones = blobs()._replace(y_train=np.sign(blobs().y_train))
    refused(ValueError, r"needs labels ±1, and the labels y_test hold", data=ones, loss="logistic")
    experiment(data=ones._replace(y_test=np.sign(ones.y_test)), loss="logistic").check()
    both = pj.grid(lr=0.1, data=[classes(), shifted])
    refused(ValueError, r"the labels y_train lie in 1\.\.3, and 3 outputs", loss="cross_entropy", family=many["family"], grid=both)


def test_a_row_is_not_broadcast_against_a_column():
    data = blobs()
    refused(
        ValueError, r"the model returns shape \(16, 1\) and the labels have shape \(16,\)", data=data._replace(y_train=data.y_train[:, 0])
    )
    row = Model(line().init, lambda w, x: (x @ w)[:, 0])
    refused(ValueError, r"the model returns shape \(16,\) and the labels have shape \(16, 1\)", family=lambda: row, grid=pj.grid(lr=0.1))


def test_inputs_and_labels_of_different_lengths():
    data = blobs()
    with pytest.raises(ValueError, match="equally long"):
        pj.data.Dataset(data.x_train, data.y_train[:-1], data.x_test, data.y_test)


@pytest.mark.parametrize("field", ["x_train", "y_train", "x_test", "y_test"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite(field, value):
    data = blobs()
    array = getattr(data, field).copy()
    array[3, 0] = value
    refused(ValueError, rf"{field}\[3, 0\] is not finite", data=data._replace(**{field: array}))
    both = [data, data._replace(**{field: array})]
    refused(ValueError, "not finite", grid=pj.grid(lr=0.1, data=both))


def test_a_data_function_that_needs_what_is_not_there():
    refused(TypeError, "data needs 'n', which nothing provides", data=lambda n: blobs(n))


# Measures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "width", "step", "train_loss", "diverged_at"])
def test_a_measure_named_like_something_else(name):
    refused(ValueError, f"a measure cannot be called '{name}'", measures={name: lambda params: 1.0})


def test_names_that_a_file_or_the_result_cannot_hold():
    refused(ValueError, "no name with a slash", measures={"a/b": lambda params: 1.0})
    refused(ValueError, r"axis 0 of measure 'v' is called v_0", measures={"v": lambda params: params["v"], "v_0": lambda step: step})


def test_measures_that_return_something_else():
    refused(TypeError, "measure 'm' returns a list", measures={"m": lambda params: [1.0, 2.0]})
    refused(TypeError, "measure 'm' returns a dict", measures={"m": lambda params: params})
    refused(TypeError, "measure 'm' is a float, not a function", measures={"m": 1.0})
    refused(TypeError, "measure 'm' needs 'parms', which nothing provides", measures={"m": lambda parms: 1.0})


def test_a_measure_whose_shape_changes_with_the_width():
    message = r"measure 'v' has shape \(3, 1\) at .*width=3.* and \(2, 1\) at .*width=2.*one shape over the whole grid"
    refused(ValueError, message, measures={"v": lambda params: params["v"]}, grid=pj.grid(lr=[0.1], width=[2, 3]))


def test_an_error_in_a_measure_is_its_own():
    def broken(params):
        raise RuntimeError("its own")

    refused(RuntimeError, "^its own", measures={"m": broken})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(data=lambda key: 3), TypeError, "the data function returned a int"),
        (dict(batch=2.5), TypeError, "batch = 2.5: give a whole number"),
        (dict(batch=True), TypeError, "batch = True"),
        (dict(measure_at=None), TypeError, "measure_at = None: give a number of points"),
        (dict(measures=[len]), TypeError, "measures must be a dict of functions by name"),
        (dict(layout=(1, 1, 1)), TypeError, r"layout must be a pj.Layout"),
        (dict(max_bytes=math.nan), ValueError, "max_bytes = nan"),
        (dict(max_bytes="1G"), ValueError, "max_bytes = '1G'"),
        (dict(checkpoint=3), TypeError, "checkpoint must be the name of a folder"),
        (dict(save_every=math.nan), ValueError, "save_every = nan"),
        (dict(grid=pj.grid(width=[2], lr=[0.1], seed=[1.5])), ValueError, "seed = 1.5: a seed is a whole number"),
    ],
)
def test_fields_of_another_kind(fields, error, message):
    refused(error, message, **fields)
