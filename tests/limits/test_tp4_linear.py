"""Linear networks as coefficients in a basis of their initial weights: the same training by automatic differentiation, and free chains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits.tp4_linear import coefficients

RNG = np.random.default_rng(0)
X, TEST = RNG.standard_normal((4, 5)), RNG.standard_normal((2, 5))
LR = 0.1
BATCHES = [[0, 1], [2], [3, 1], [0, 2], [1], [3, 0], [2, 3], [1, 2]]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_of_the_coefficients_trains_to_the_same(x64, depth):
    """By automatic differentiation, with several classes: another route than the steps written out."""
    classes = np.array([0, 2, 1, 2])
    answer = pj.limits.tp4_limit(
        X, classes, depth=depth, learning_rate=LR, steps=len(BATCHES), outputs=3, loss="cross_entropy", batches=BATCHES, x_test=TEST
    )
    model = pj.limits.tp4_linear(5, 3, depth=depth, steps=len(BATCHES))
    params = model.init(jax.random.key(0), jnp.asarray(X))
    for t, batch in enumerate(BATCHES):
        np.testing.assert_allclose(model.apply(params, jnp.asarray(TEST)), answer.test_outputs[t], atol=1e-13)
        x, y = jnp.asarray(X[batch]), jnp.asarray(classes[batch])
        loss, grads = jax.value_and_grad(lambda p, x=x, y=y: pj.losses.cross_entropy(model.apply(p, x), y))(params)
        np.testing.assert_allclose(loss, answer.report.loss[t], atol=1e-13)
        params = jax.tree.map(lambda w, g: w - LR * g, params, grads)
    np.testing.assert_allclose(model.apply(params, jnp.asarray(X)), answer.outputs[-1], atol=1e-13)


def test_chains_have_the_moments_of_the_marchenko_pastur_law():
    """E v^T (W W^T)^k v is the k-th Catalan number, and E U^T (W^T W)^k U as well."""
    first, hidden, readout = coefficients(2, 2, 2, 8, np.ones(3))
    square = hidden.toarray()
    for k in range(6):
        catalan = math.comb(2 * k, k) / (k + 1) * np.eye(2)
        np.testing.assert_allclose(readout.T @ np.linalg.matrix_power(square.T @ square, k) @ readout, catalan)
        np.testing.assert_allclose(first @ np.linalg.matrix_power(square @ square.T, k) @ first.T, catalan)
        np.testing.assert_allclose(first @ square @ np.linalg.matrix_power(square.T @ square, k) @ readout, 0)


@pytest.mark.slow
def test_meta_learning_with_it_is_that_of_a_very_wide_network():
    """MAML, of which the paper takes the limit: second derivatives through an inner step, outer steps, new tasks; muP as TP4 has it."""
    n, tasks = 40_000, [jax.random.normal(jax.random.key(i), (2, 6, 5)) for i in range(4)]
    wide = pj.models.linear_net(n, 1, 2)

    def start(key):
        u, v = jax.random.split(key)
        return {"first": {"w": jax.random.normal(u, (5, n)) / n**0.5}, "readout": {"w": jax.random.normal(v, (n, 2)) / n**0.5}}

    def apply(params, x):
        return wide.apply({"first": {"w": params["first"]["w"] * n**0.5}, "readout": {"w": params["readout"]["w"] / n**0.5}}, x)

    def after(apply, params, rate, loss):
        return jax.tree.map(lambda w, g: w - rate * g, params, jax.grad(loss)(params))

    def learned(apply, params):
        def adapted(params, x, y):
            return after(apply, params, 0.1, lambda p: pj.losses.mse(apply(p, x), y))

        found = []
        for i, (support, query) in enumerate(tasks):
            y = [jnp.stack([x[:, i], -x[:, 0]], axis=1) for x in (support, query)]
            found.append(apply(adapted(params, support, y[0]), query))
            params = after(apply, params, 0.1, lambda p, s=support, q=query, y=y: pj.losses.mse(apply(adapted(p, s, y[0]), q), y[1]))
        return jnp.stack(found)

    limit = pj.limits.tp4_linear(5, 2)
    expected = learned(limit.apply, limit.init(jax.random.key(0), tasks[0][0]))
    found = learned(apply, start(jax.random.key(1)))
    # 1 / sqrt(n) is 0.005, of each of several means.
    assert jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features": 0}, "features = 0"),
        ({"depth": 3}, "one or two hidden layers"),
        ({"depth": 2}, "steps = None"),
        ({"variances": (1.0, -1.0)}, "one for each of 2 layers"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        pj.limits.tp4_linear(**{"features": 2, "outputs": 1, **options})
