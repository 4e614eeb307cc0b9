"""Dropping neurons against the average over all sets of them, and the path against the network at its corners."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.measures import barrier, dropout_path, dropout_variance, keep, losses_along

N, KEPT = 6, 2


@pytest.fixture(scope="module", params=[0.5, 1.0])
def case(request):
    model = pj.models.two_layer(N, 3, scaling=request.param)
    x = jax.random.normal(jax.random.key(0), (4, 5))
    y = jax.random.normal(jax.random.key(1), (4, 3))
    return model, x, y, [model.init(jax.random.key(2 + i), x) for i in range(2)]


def square(model, x, y):
    return lambda params: jnp.mean(jnp.square(model.apply(params, x) - y))


def test_all_sets_of_neurons_give_the_formula(case):
    """All 15 sets of 2 of 6: the mean output is the network's, the mean increase of the square loss (1/M - 1/N) S²."""
    model, x, y, (params, _) = case
    sets = jnp.array([[i in kept for i in range(N)] for kept in itertools.combinations(range(N), KEPT)])
    f = jax.vmap(lambda kept: model.apply(keep(params, kept), x))(sets)
    np.testing.assert_allclose(f.mean(axis=0), model.apply(params, x), rtol=1e-4, atol=1e-5)  # float32
    increase = jnp.mean(jnp.square(f - y[None])) - square(model, x, y)(params)
    expected = (1 / KEPT - 1 / N) * dropout_variance(model, params, x)
    np.testing.assert_allclose(increase, expected, rtol=1e-4)  # float32, a difference of two numbers of its size


def test_variance_against_numpy(case):
    model, x, _, (params, _) = case
    w, a, x64 = (np.asarray(v, np.float64) for v in (params["first"]["w"], params["readout"]["w"], x))
    one = model.apply({"first": {"w": jnp.ones((1, 1))}, "readout": {"w": jnp.ones((1, 1))}}, jnp.ones((1, 1)))
    parts = N * float(one[0, 0]) * np.maximum(x64 @ w, 0)[:, :, None] * a
    np.testing.assert_allclose(dropout_variance(model, params, x), parts.var(axis=1, ddof=1).mean(), rtol=1e-5)


def test_the_largest_loss_on_the_path_is_at_a_corner(case):
    model, x, y, (one, other) = case
    kept = jnp.arange(N) < KEPT
    loss, corners = square(model, x, y), dropout_path(one, other, kept)
    losses = losses_along(loss, corners, 5)
    assert losses.shape == (26,)
    at_corners = [float(loss(p)) for p in (one, keep(one, kept), keep(one, kept), keep(other, ~kept), keep(other, ~kept), other)]
    np.testing.assert_allclose(losses[::5], at_corners, rtol=1e-5)
    assert float(losses.max()) <= max(at_corners) * (1 + 1e-5)
    np.testing.assert_allclose(losses[5:11], losses[5], rtol=1e-5)  # The first swap changes nothing.
    np.testing.assert_allclose(float(barrier(losses)), max(at_corners) - max(at_corners[0], at_corners[-1]), rtol=1e-4, atol=1e-6)


def test_without_the_swap_hidden_weights_move_in_use(case):
    model, x, y, (one, other) = case
    kept = jnp.arange(N) < KEPT
    corners = dropout_path(one, other, kept, swap=False)
    assert len(corners) == 4
    middle = losses_along(square(model, x, y), corners[1:3], 2)[1]
    swapped = losses_along(square(model, x, y), dropout_path(one, other, kept)[2:4], 2)[1]
    assert abs(float(middle - swapped)) > 1e-3


def test_not_rescaled():
    params = {"first": {"w": jnp.ones((2, 3))}, "readout": {"w": jnp.array([[1.0], [2.0], [4.0]])}}
    kept = jnp.array([True, False, True])
    np.testing.assert_allclose(keep(params, kept, rescaled=False)["readout"]["w"][:, 0], [1, 0, 4])
    np.testing.assert_allclose(keep(params, kept)["readout"]["w"][:, 0], [1.5, 0, 6])


def net(width):
    return {"first": {"w": jnp.ones((2, width))}, "readout": {"w": jnp.ones((width, 1))}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep(net(3), jnp.ones(2, bool)), r"kept_N has shape \(2,\)"),
        (lambda: keep(net(3), jnp.zeros(3, bool)), "keeps no neuron"),
        (lambda: dropout_path(net(3), net(3), jnp.ones(3, bool)), "keeps no neuron"),
        (lambda: keep({"w": jnp.ones((2, 3))}, jnp.ones(3, bool)), "needs the parameters of paperjax.models.two_layer"),
        (lambda: keep({**net(3), "readout": {"w": jnp.ones((4, 1))}}, jnp.ones(3, bool)), r"must be \(D, N\) and \(N, O\)"),
        (lambda: dropout_path(net(3), net(4), jnp.ones(3, bool)), "differ in shape"),
        (lambda: dropout_variance(pj.models.two_layer(1), net(1), jnp.ones((1, 2))), "one neuron"),
        (lambda: losses_along(jnp.sum, [jnp.ones(2)]), "two corners or more"),
        (lambda: losses_along(jnp.sum, [jnp.ones(2)] * 2, 0), "two corners or more"),
        (lambda: barrier(jnp.ones(1)), r"must be \(points,\)"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
