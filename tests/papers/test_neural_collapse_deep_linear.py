"""What the paper's file trains, written out, and its critical decay from the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.papers.dynamics import neural_collapse_deep_linear as paper
from tests.zoo import as_users_run_it


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_model_objective_and_first_step_written_out(depth, bias):
    data = paper.labels([3, 2])
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    model = paper.free(depth, 4, 2, bias)
    params = model.init(jax.random.key(0), x)
    if bias:
        params["bias"] = jnp.array([0.1, -0.2])
    z = np.asarray(params["features"], np.float64)
    for w in params["layers"]:
        z = z @ np.asarray(w)
    np.testing.assert_allclose(paper.singular_values(params), np.linalg.svd(z, compute_uv=False), rtol=1e-4)
    z = z + (np.array([0.1, -0.2]) if bias else 0)
    np.testing.assert_allclose(model.apply(params, x), z, rtol=1e-4, atol=1e-6)
    squares = [float((np.asarray(w) ** 2).sum()) for w in (params["features"], *params["layers"])]
    expected = ((z - data.y_train) ** 2).sum() / 10 + 0.3 * (2 * squares[0] + sum(squares[1:])) / 2
    lost = dict(data=data, loss=paper.half_mse, weight_decay=0.3, ratio=2.0)
    np.testing.assert_allclose(paper.objective(model, params, **lost), expected, rtol=1e-5)
    # With the decay risen, the step is along the gradient of that: from the first on with rise 0, but for the momentum that Nesterov adds.
    tx = paper.descent(0.1, 0.3, 2.0, rise=1.0)
    state = tx.init(params)
    gradient = jax.grad(lambda p: paper.half_mse(model.apply(p, x), y))(params)
    first, state = tx.update(gradient, state, params)
    np.testing.assert_allclose(first["features"], -0.19 * gradient["features"], rtol=1e-5)  # No decay yet; 1 + momentum.
    second = tx.update(jax.tree.map(jnp.zeros_like, gradient), state, params)[0]
    whole = jax.grad(lambda p: paper.objective(model, p, **lost))(params)
    for name in params:
        for step, of_loss, of_all in zip(*(jax.tree.leaves(tree[name]) for tree in (second, gradient, whole))):
            np.testing.assert_allclose(step, -0.081 * of_loss - 0.19 * (of_all - of_loss), rtol=1e-4, atol=1e-6)


def test_critical_decay_is_where_the_closed_form_jumps():
    for factor, left in ((0.9999, True), (1.0001, False)):
        decay = factor * paper.critical_decay()
        found = pj.limits.mse_minimiser([paper.PER_CLASS] * paper.CLASSES, 3, weight_decay=decay, feature_decay=decay)
        assert (found.singular_values > 0).all() == left


def test_a_class_without_examples_is_refused_in_the_measures():
    with as_users_run_it(), pytest.raises(ValueError, match=r"no example of class 1 of 0\.\.2"):
        paper.cosines({"features": jnp.eye(5)}, paper.labels([3, 0, 2]))
