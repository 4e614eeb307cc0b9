"""The largest eigenvalue of a Hessian against closed forms and whole Hessians."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import paperjax as pj
from paperjax.losses import mse
from paperjax.measures import sharpness
from paperjax.model import Model
from tests.zoo import blobs

LINE = Model(lambda key, x: jnp.zeros((x.shape[1], 1)), lambda w, x: x @ w)


def data(x, y=None):
    return SimpleNamespace(x_train=jnp.asarray(x, jnp.float32), y_train=jnp.asarray(jnp.ones((len(x), 1)) if y is None else y))


@pytest.mark.parametrize("shape", [(30, 1), (30, 8), (5, 12)])
def test_linear_regression(shape):
    """Loss mean (x w - y)²: the Hessian is 2 X^T X / n, at any w; of a rank below its size too."""
    x = np.random.default_rng(0).normal(size=shape)
    exact = 2 * np.linalg.norm(x, 2) ** 2 / len(x)
    w = jnp.full((shape[1], 1), 0.3)
    assert float(sharpness(LINE, w, data(x), "mse")) == pytest.approx(exact, rel=1e-5)
    assert float(sharpness(LINE, w, data(x), mse, examples=4)) == pytest.approx(2 * np.linalg.norm(x[:4], 2) ** 2 / 4, rel=1e-5)


def test_half_the_square_of_one_parameter():
    # f = w² x with x = 1, y = 1: d²/dw² (w² - 1)² = 12 w² - 4, which is negative at 0.
    square = Model(lambda key, x: jnp.zeros(1), lambda w, x: x * jnp.square(w)[None, :])
    for w, exact in ((0.0, -4.0), (1.0, 8.0), (2.0, 44.0)):
        assert float(sharpness(square, jnp.array([w]), data([[1.0]]), "mse")) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("eigenvalues", [(-5.0, -2.0, -1.0), (-5.0, 1.0, 3.0), (0.0, 0.0, 0.0), (2.0, 2.0, 2.0), (7.0, 1e-3, -7.0)])
def test_the_largest_not_the_largest_in_size(eigenvalues):
    """A loss that is a quadratic form: positive, negative, repeated and vanishing eigenvalues."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    h = jnp.asarray(rotation @ np.diag(eigenvalues) @ rotation.T, jnp.float32)
    itself = Model(lambda key, x: jnp.zeros(3), lambda theta, x: theta)
    found = sharpness(itself, jnp.array([0.1, 0.2, 0.3]), data([[1.0]]), lambda f, y: f @ h @ f / 2)
    assert float(found) == pytest.approx(max(eigenvalues), rel=1e-5, abs=1e-5)


def test_a_network_against_its_whole_hessian():
    few = blobs(n=12, features=4)
    model = pj.models.mlp(6, 2, 2, activation=jnp.tanh)
    params = {**model.init(jax.random.key(0), jnp.asarray(few.x_train)), "steps": jnp.int32(3)}
    trained = {name: params[name] for name in ("first", "hidden", "readout")}
    theta, unravel = ravel_pytree(trained)
    x, y = jnp.asarray(few.x_train), jax.nn.one_hot(jnp.arange(12) % 2, 2)
    hessian = jax.hessian(lambda theta: pj.losses.cross_entropy(model.apply(unravel(theta), x), y))(theta)
    exact = float(np.linalg.eigvalsh(np.asarray(hessian, np.float64))[-1])
    found = sharpness(model, params, SimpleNamespace(x_train=x, y_train=y), "cross_entropy")
    assert float(found) == pytest.approx(exact, rel=0.01)
    assert float(found) <= exact * (1 + 1e-5)
    more = sharpness(model, params, SimpleNamespace(x_train=x, y_train=y), "cross_entropy", iterations=60)
    assert float(more) == pytest.approx(exact, rel=1e-5)


def test_frozen_leaves_are_held():
    x = np.diag([3.0, 1.0, 1.0])
    part = Model(lambda key, x: {}, lambda p, x: x[:, :1] * p["fixed"].value + x[:, 1:] @ p["w"])
    params = {"fixed": pj.Frozen(jnp.ones((1, 1))), "w": jnp.zeros((2, 1))}
    assert float(sharpness(part, params, data(x), "mse")) == pytest.approx(2 / 3, rel=1e-5)


def test_in_an_experiment():
    """Which hands over its loss; cells are vmapped. 2 |X|² / n does not move while a line is trained."""
    line = pj.data.Dataset(np.diag([2.0, 1.0]).astype(np.float32), np.ones((2, 1), np.float32), np.eye(2, dtype=np.float32),
                           np.ones((2, 1), np.float32), "line", "generated")  # fmt: skip
    drawn = Model(lambda key, x: jax.random.normal(key, (x.shape[1], 1)), lambda w, x: x @ w)
    grid = pj.grid(lr=[0.1, 0.2], seed=2)
    result = pj.Experiment(lambda: drawn, line, grid=grid, steps=3, measure_at=2, measures={"sharpness": sharpness}).run(progress=False)
    np.testing.assert_allclose(result.sharpness.values, 4.0, rtol=1e-5)


def test_in_double_precision(x64):
    x = np.random.default_rng(0).normal(size=(9, 4))
    found = sharpness(LINE, jnp.zeros((4, 1)), SimpleNamespace(x_train=jnp.asarray(x), y_train=jnp.ones((9, 1))), "mse")
    assert found.dtype == jnp.float64
    assert float(found) == pytest.approx(2 * np.linalg.norm(x, 2) ** 2 / 9, rel=1e-12)


def test_nan_is_nan():
    assert np.isnan(float(sharpness(LINE, jnp.zeros((2, 1)), data([[1.0, np.nan], [0.0, 1.0]]), "mse")))


@pytest.mark.parametrize(
    ("params", "settings", "match"),
    [
        (jnp.zeros((2, 1)), {"iterations": 0}, "iterations = 0"),
        (jnp.zeros((2, 1)), {"examples": 0}, "examples = 0"),
        (pj.Frozen(jnp.zeros((2, 1))), {}, "no parameter"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.float16)}, {}, "float16, float32"),
    ],
)
def test_bad_input(params, settings, match):
    with pytest.raises(ValueError, match=match):
        sharpness(LINE, params, data(np.eye(2)), "mse", **settings)
