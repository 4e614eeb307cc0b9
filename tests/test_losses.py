import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj
from paperjax.losses import check_labels, cross_entropy, logistic, mse, resolve_loss
from tests.zoo import blobs, classes, net

RNG = np.random.default_rng(0)


@given(st.sampled_from([1, 5]), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_mse_is_the_mean_over_examples_and_outputs(b, o, seed):
    rng = np.random.default_rng(seed)
    f, y = rng.normal(size=(2, b, o)).astype(np.float32)
    assert float(mse(jnp.asarray(f), jnp.asarray(y))) == pytest.approx(((f.astype(float) - y) ** 2).mean(), rel=1e-5)


def test_cross_entropy_of_integer_labels_is_that_of_their_one_hot_rows():
    f = RNG.normal(size=(6, 4)).astype(np.float32)
    y = np.array([0, 3, 1, 1, 2, 0], np.int32)
    p = np.exp(f.astype(float)) / np.exp(f.astype(float)).sum(1, keepdims=True)
    expected = -np.log(p[np.arange(6), y]).mean()
    assert float(cross_entropy(jnp.asarray(f), jnp.asarray(y))) == pytest.approx(expected, rel=1e-5)
    assert float(cross_entropy(jnp.asarray(f), jnp.eye(4)[y])) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_over_the_last_axis_of_sequences():
    f = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    y = RNG.integers(0, 4, size=(2, 3))
    whole = cross_entropy(jnp.asarray(f), jnp.asarray(y))
    np.testing.assert_allclose(whole, cross_entropy(jnp.asarray(f.reshape(6, 4)), jnp.asarray(y.reshape(6))), rtol=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_label():
    f, y = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([1])
    np.testing.assert_allclose(jax.grad(cross_entropy)(f, y), jax.nn.softmax(f) - jnp.eye(3)[y], atol=1e-6)


def test_cross_entropy_of_huge_scores_is_finite():
    assert float(cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))) == pytest.approx(2e4)


@given(st.floats(-30, 30), st.sampled_from([-1.0, 1.0]))
def test_logistic_is_softplus_of_the_negative_margin(f, y):
    assert float(logistic(jnp.array([f]), jnp.array([y]))) == pytest.approx(np.log1p(np.exp(-y * f)), rel=1e-4, abs=1e-7)


def test_logistic_of_huge_margins_is_finite():
    assert float(logistic(jnp.array([1e4]), jnp.array([-1.0]))) == pytest.approx(1e4)


def test_integer_labels_are_refused_by_mse_and_logistic():
    with pytest.raises(TypeError, match=r"'mse'.*int32\[2\].*one_hot"):
        mse(jnp.ones((2, 3)), jnp.array([0, 1]))
    with pytest.raises(TypeError, match=r"'logistic'.*2\.0 \* y - 1\.0"):
        logistic(jnp.ones(2), jnp.array([0, 1]))


@pytest.mark.parametrize("loss", [mse, logistic])
def test_no_broadcast_of_a_column_against_a_row(loss):
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 1\)|\(4, 1\).*\(4,\)"):
        loss(jnp.ones((4, 1)), jnp.ones(4))
    with pytest.raises(ValueError, match="must be equal"):
        loss(jnp.ones(4), jnp.ones((4, 1)))


def test_cross_entropy_refuses_what_is_no_classification():
    with pytest.raises(ValueError, match="at least two classes"):
        cross_entropy(jnp.ones((4, 1)), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match="at least two classes"):
        cross_entropy(jnp.ones(4), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match="do not fit scores"):
        cross_entropy(jnp.ones((4, 2)), jnp.zeros((4, 1), jnp.int32))
    with pytest.raises(ValueError, match="must be equal"):
        cross_entropy(jnp.ones((4, 2)), jnp.ones((4, 3)))


def test_labels_that_the_outputs_have_no_class_for_are_refused():
    # take_along_axis would give NaN for 3, and class n - 1 for -1.
    check_labels(cross_entropy, np.array([0, 2]), (2, 3))
    check_labels(cross_entropy, np.eye(3), (3, 3))
    for bad in (np.array([0, 3]), np.array([-1, 1])):
        with pytest.raises(ValueError, match=r"the labels lie in .*classes 0\.\.2"):
            check_labels(cross_entropy, bad, (2, 3))
    with pytest.raises(ValueError, match=r"±1, and the labels hold 0\.0"):
        check_labels(logistic, np.array([1.0, 0.0]), (2,))
    check_labels(mse, np.array([17.0]), (1,))


@pytest.mark.parametrize("outputs", [2, 3])
def test_an_experiment_checks_label_values_before_training(outputs):
    exp = pj.Experiment(lambda: net(4, outputs=outputs), classes(n_classes=3), loss="cross_entropy", grid=pj.grid(lr=0.1))
    if outputs == 3:
        exp.check()
    else:
        with pytest.raises(ValueError, match=r"labels y_train lie in 0\.\.2"):
            exp.check()
    with pytest.raises(ValueError, match="±1"):
        pj.Experiment(lambda: net(4), blobs(), loss="logistic", grid=pj.grid(lr=0.1)).check()


def test_resolve_loss():
    assert resolve_loss("cross-entropy") is cross_entropy
    assert resolve_loss(logistic) is logistic
    with pytest.raises(ValueError, match=r"unknown loss 'mes'\. Did you mean 'mse'"):
        resolve_loss("mes")
