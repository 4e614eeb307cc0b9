"""Laws of Taylor series in the parameters."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.model import Frozen, Model, as_model, count, join, split
from paperjax.models import linear_net, mlp, two_layer
from paperjax.transforms import center, linearize, subspace, taylor
from tests.transforms.compiled import X, moved, ntk, run, start

X32 = X.astype(np.float32)
TANH = mlp(5, 2, 2, activation=jnp.tanh, bias_variance=0.1)


def test_it_is_the_function_plus_its_jacobian(x64):
    """Against a Jacobian written out, with leaves that are not trained."""
    inner = two_layer(6, 2, activation=jnp.tanh, train_readout=False)
    model = Model(
        lambda key, x: {"net": inner.init(key, x), "n": jnp.arange(3)},
        lambda p, x: inner.apply(p["net"], x) * p["n"][2].astype(x.dtype),
    )
    linear = linearize(model)
    params = moved(start(linear, 0, X), 2.0)
    origin, given = split(params["origin"].value)
    flat_0, unravel = jax.flatten_util.ravel_pytree(origin)
    flat = jax.flatten_util.ravel_pytree(split(params["trained"])[0])[0]
    f = lambda flat: run(model, join(unravel(flat), given), X)  # noqa: E731
    expected = f(flat_0) + jax.jacobian(f)(flat_0) @ (flat - flat_0)
    np.testing.assert_allclose(run(linear, params, X), expected, rtol=1e-12)
    assert count(params) == count(start(model, 0, X))


def test_taylor_of_degree_1_is_linearize_and_of_degree_0_is_the_start(x64):
    params = moved(start(linearize(TANH), 0, X), 3.0)
    np.testing.assert_array_equal(run(taylor(TANH, 1), params, X), run(linearize(TANH), params, X))
    np.testing.assert_array_equal(run(taylor(TANH, 0), params, X), run(TANH, params["origin"].value, X))


@pytest.mark.parametrize("model", [TANH, center(TANH), subspace(TANH, 7)], ids=["mlp", "center", "subspace"])
def test_linearised_twice_is_linearised_once(model, x64):
    once, twice = linearize(model), linearize(linearize(model))
    p = start(once, 2, X)
    q = start(twice, 2, X)
    p = moved(p, 2.0)
    q["trained"] = {**q["trained"], "trained": p["trained"]}
    np.testing.assert_allclose(run(twice, q, X), run(once, p, X), rtol=1e-12, atol=1e-14)
    # A series of a lower degree cannot be bettered by a longer one of it.
    np.testing.assert_allclose(run(taylor(linearize(model), 3), q, X), run(once, p, X), rtol=1e-12, atol=1e-14)


def test_the_ntk_of_a_linearised_network_is_constant(x64):
    model = linearize(TANH)
    params = start(model, 3, X)
    at_init = ntk(TANH, params["origin"].value)
    np.testing.assert_allclose(ntk(model, params), at_init, rtol=1e-10)
    np.testing.assert_allclose(ntk(model, moved(params, 5.0)), at_init, rtol=1e-10)
    # The network's own moves.
    assert np.abs(ntk(TANH, moved(params, 5.0)["trained"]) / at_init - 1).max() > 0.1


@pytest.mark.parametrize("depth", [1, 2])
def test_exact_for_polynomials_of_its_degree(depth, x64):
    """A deep linear net with L hidden layers is a polynomial of degree L + 1 in its weights, and of no lower one."""
    net = linear_net(4, depth, 2)
    params = moved(start(linearize(net), 4, X), 3.0)
    expected = run(net, params["trained"], X)
    off = [np.abs(run(taylor(net, order), params, X) - expected).max() for order in range(depth + 3)]
    assert max(off[depth + 1 :]) < 1e-12 * np.abs(expected).max()
    assert min(off[: depth + 1]) > 1e-2


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_error_is_of_the_next_order(order, x64):
    """Slope of the error over five distances, against order + 1."""
    model = taylor(TANH, order)
    at_start = start(model, 5, X)
    distances = np.geomspace(0.02, 0.2, 5)
    error = jax.jit(lambda p: jnp.linalg.norm(run(model, p, X) - run(TANH, p["trained"], X)))
    errors = [error(moved(at_start, by)) for by in distances]
    assert abs(np.polyfit(np.log(distances), np.log(errors), 1)[0] - (order + 1)) < 0.1


def test_the_quadratic_term_is_half_the_hessian(x64):
    params = moved(start(linearize(TANH), 6, X), 1.5)
    flat_0, unravel = jax.flatten_util.ravel_pytree(params["origin"].value)
    d = jax.flatten_util.ravel_pytree(params["trained"])[0] - flat_0
    H = jax.jit(jax.hessian(lambda flat: TANH.apply(unravel(flat), X)[0, 0]))(flat_0)
    term = run(taylor(TANH, 2), params, X) - run(linearize(TANH), params, X)
    np.testing.assert_allclose(term[0, 0], d @ H @ d / 2, rtol=1e-10)


def test_about_given_parameters(x64):
    about = moved(start(TANH, 7, X), 1.0)
    model = linearize(TANH, about)
    params = start(model, 8, X)
    for part in (params["trained"], params["origin"].value):
        jax.tree.map(np.testing.assert_array_equal, part, about)
    np.testing.assert_allclose(run(model, params, X), run(TANH, about, X), rtol=1e-12)
    near = moved(params, 1e-4)
    np.testing.assert_allclose(run(model, near, X), run(TANH, near["trained"], X), atol=1e-6)
    assert start(taylor(TANH, 2, about), 0, X)["origin"].value is not about


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"first": p["first"]}, r"lack the leaf \['(hidden|readout)'\]"),
        (lambda p: {**p, "extra": jnp.ones(2)}, r"have a leaf \['extra'\] that the model has not"),
        (lambda p: {**p, "readout": {**p["readout"], "b": jnp.ones(1)}}, r"\['readout'\]\['b'\].*shape \(1,\); the model's has \(2,\)"),
    ],
)
def test_parameters_of_another_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linearize(TANH, change(start(TANH, 0, X32))).init(jax.random.key(0), X32)


@pytest.mark.parametrize("change", [lambda p: p["trained"], lambda p: {**p, "origin": p["trained"]}, lambda p: p["origin"]])
def test_what_is_no_pair_of_parameters_is_refused(change):
    model = linearize(TANH)
    with pytest.raises(ValueError, match=r"must be \{'trained': theta, 'origin': Frozen"):
        model.apply(change(start(model, 0, X32)), X32)


@pytest.mark.parametrize("order", [-1, 1.5, True])
def test_orders_that_are_refused(order):
    with pytest.raises(Exception, match=r"order"):
        taylor(TANH, order)


def test_a_function_without_forward_derivative_is_refused():
    @jax.custom_vjp
    def square(w):
        return w**2

    square.defvjp(lambda w: (w**2, w), lambda w, g: (2 * w * g,))
    model = linearize(Model(lambda key, x: jnp.ones(3), lambda w, x: x * square(w)[None, :]))
    with pytest.raises(TypeError, match="custom_vjp"):
        run(model, start(model, 0, X32), X32)


def test_gradient_descent_on_it_is_kernel_regression(x64):
    """Residuals after t steps under loss |f - y|²/2 are (1 - lr Theta)^t of the first (arXiv 1902.06720, Section 2.2)."""
    model = linearize(TANH)
    params = start(model, 9, X)
    theta, y = ntk(TANH, params["trained"]), np.random.default_rng(2).standard_normal((4, 2))
    first = (run(model, params, X) - y).ravel()
    lr, steps = 1 / np.linalg.eigvalsh(theta).max(), 20
    trained, given = split(params)

    def step(trained: Any, _: None) -> tuple[Any, None]:
        gradient = jax.grad(lambda t: jnp.sum((run(model, join(t, given), X) - y) ** 2) / 2)(trained)
        return jax.tree.map(lambda w, g: w - lr * g, trained, gradient), None

    last = jax.jit(lambda t: jax.lax.scan(step, t, length=steps)[0])(trained)
    expected = np.linalg.matrix_power(np.eye(8) - lr * theta, steps) @ first
    np.testing.assert_allclose((run(model, join(last, given), X) - y).ravel(), expected, atol=1e-11)


def test_batch_statistics_are_given():
    """Flax's BatchNorm: what is no parameter is kept as it is at the origin."""
    model = linearize(as_model(nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.tanh, nn.Dense(1)])))
    params = start(model, 0, X32)
    frozen = [isinstance(node, Frozen) for node in jax.tree.leaves(params["trained"], is_leaf=lambda node: isinstance(node, Frozen))]
    assert any(frozen)
    assert np.isfinite(run(model, moved(params, 0.5), X32)).all()


def test_equinox():
    net = as_model(lambda key: eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=key))
    model = taylor(net, 2)
    params = moved(jax.jit(model.init)(jax.random.key(0), X32), 0.05)
    outputs = jax.jit(lambda p: (run(model, p, X32), run(net, p["trained"], X32)))(params)
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_integers_in_and_a_loop_inside():
    """An embedding and a while loop: primitives of all kinds have forward derivatives."""
    model = Model(
        lambda key, x: {"table": jax.random.normal(key, (7, 3)), "w": jnp.eye(3) / 2},
        lambda p, x: jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["w"]), p["table"][x]),
    )
    tokens = jnp.array([1, 5, 1])
    second = taylor(model, 2)
    params = second.init(jax.random.key(0), tokens)
    near = moved(params, 0.01)
    np.testing.assert_allclose(jax.jit(second.apply)(near, tokens), model.apply(near["trained"], tokens), atol=1e-5)


def test_under_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    model = linearize(TANH)
    outputs = jax.jit(jax.vmap(lambda key: run(model, model.init(key, X32), X32)))(keys)
    np.testing.assert_allclose(outputs[1], run(TANH, TANH.init(keys[1], X32), X32), rtol=1e-5, atol=1e-6)
