from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperjax.losses import mse
from paperjax.measures import accuracy, error, misclassified, parameter_change, test_loss, train_accuracy, train_error
from paperjax.model import Frozen
from tests.zoo import Data, line

test_loss.__test__ = False  # pytest would take it for a test.


@given(st.sampled_from([1, 9]), st.sampled_from([2, 5]), st.integers(0, 10**6))
def test_classes_one_hot_rows_and_shifted_one_hot_rows_agree(n, classes, seed):
    rng = np.random.default_rng(seed)
    f, y = rng.normal(size=(n, classes)).astype(np.float32), rng.integers(0, classes, n)
    expected = np.mean(f.argmax(1) != y)
    assert float(misclassified(jnp.asarray(f), jnp.asarray(y))) == pytest.approx(expected)
    rows = np.eye(classes, dtype=np.float32)[y]
    assert float(misclassified(jnp.asarray(f), jnp.asarray(rows))) == pytest.approx(expected)
    assert float(misclassified(jnp.asarray(f), jnp.asarray(rows - 1 / classes))) == pytest.approx(expected)


@given(st.sampled_from([1, 12]), st.integers(0, 10**6))
def test_the_sign_of_one_output_is_its_class(n, seed):
    rng = np.random.default_rng(seed)
    f, y = rng.normal(size=n).astype(np.float32), rng.choice([-1.0, 1.0], n).astype(np.float32)
    expected = np.mean(f * y <= 0)
    assert float(misclassified(jnp.asarray(f), jnp.asarray(y))) == pytest.approx(expected)
    assert float(misclassified(jnp.asarray(f)[:, None], jnp.asarray(y)[:, None])) == pytest.approx(expected)


def test_no_decision_is_wrong():
    assert float(misclassified(jnp.zeros(4), jnp.array([1.0, -1.0, 1.0, -1.0]))) == 1.0
    assert jnp.isnan(misclassified(jnp.full(2, jnp.nan), jnp.array([1.0, -1.0])))
    assert jnp.isnan(misclassified(jnp.full((2, 3), jnp.nan), jnp.array([0, 1])))


def test_sequences_are_counted_per_position():
    f = jnp.zeros((2, 3, 4)).at[:, :, 1].set(1.0)
    assert float(misclassified(f, jnp.array([[1, 1, 0], [1, 2, 3]]))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("f", "y"),
    [
        (np.zeros((4, 1), np.float32), np.zeros(4, np.int32)),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (np.zeros((4, 3), np.float32), np.zeros((4, 1), np.int32)),
        (np.zeros((4, 3), np.float32), np.zeros((4, 2), np.float32)),
        (np.zeros((4, 1), np.float32), np.zeros(4, np.float32)),
        (np.zeros(4, np.float32), np.zeros((4, 1), np.float32)),
    ],
)
def test_labels_that_do_not_fit_are_refused(f, y):
    with pytest.raises(ValueError, match="do not fit outputs"):
        misclassified(jnp.asarray(f), jnp.asarray(y))


def test_train_and_test_parts_are_not_mixed_up():
    x = jnp.eye(2)
    data = Data(x, jnp.array([[1.0], [1.0]]), x, jnp.array([[1.0], [-1.0]]))
    w = jnp.array([[2.0], [3.0]])
    assert float(train_error(line(), w, data)) == 0.0
    assert float(train_accuracy(line(), w, data)) == 1.0
    assert float(error(line(), w, data)) == 0.5
    assert float(accuracy(line(), w, data)) == 0.5
    assert float(test_loss(line(), w, data, mse)) == pytest.approx((1 + 16) / 2)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_parameter_change_is_relative_and_leaves_frozen_and_integer_leaves_out(seed, scale):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 7)).astype(np.float32)

    def tree(v, extra):
        v = jnp.asarray(v)
        return {"w": v[:4], "v": v[4:], "fixed": Frozen(jnp.full(3, extra)), "n": jnp.arange(2)}

    expected = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert float(parameter_change(tree(a, 1.0), tree(b, 5.0))) == pytest.approx(expected, rel=1e-4)
    assert float(parameter_change(tree(scale * a, 1.0), tree(scale * b, 1.0))) == pytest.approx(expected, rel=1e-4)
    assert float(parameter_change(tree(b, 0.0), tree(b, 0.0))) == 0.0


def test_measures_are_in_the_models_precision(x64):
    f, y = jnp.zeros((2, 3), jnp.float64), jnp.array([0, 1])
    assert misclassified(f, y).dtype == jnp.float64
    assert misclassified(f.astype(jnp.float32), y).dtype == jnp.float32
    data = SimpleNamespace(x_test=jnp.eye(2, dtype=jnp.float32), y_test=jnp.ones((2, 1), jnp.float32))
    assert accuracy(line(), jnp.ones((2, 1), jnp.float32), data).dtype == jnp.float32
