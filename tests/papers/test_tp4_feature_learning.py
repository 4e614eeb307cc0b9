"""The table's literal definition against the plans of the library, and the closed-form limit against a very wide net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.papers.feature_learning import tp4_feature_learning as paper

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [("muP", pj.mup_table9), ("NTP", pj.ntp)])
def test_rows_are_the_librarys_parametrizations(name, scheme):
    """Base 8, width 32: the same function at the start, and the same after a step of SGD."""
    family = pj.family(lambda width: pj.models.mlp(width, 2, 1, activation=jnp.tanh, bias=False, weight_variance=1.0), x=X)
    plan = pj.plan(family, scheme, base=dict(width=8), target=dict(width=32), optimizer="sgd")
    ours = paper.tanh_net(32, paper.ROW[name], 1.0)
    outputs = []
    for model, tx in ((plan.model, plan.optimizer("sgd", 0.1)), (ours, paper.sgd(0.1, 32, paper.ROW[name]))):
        params = model.init(jax.random.key(0), X)
        grads = jax.grad(lambda p, model=model: jnp.sum(jnp.square(model.apply(p, X) - 1.0)))(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        after = jax.tree.map(jnp.add, params, updates)
        outputs.append((model.apply(params, X), model.apply(after, X)))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=2e-4, atol=1e-5)
    assert float(jnp.abs(outputs[0][1] - outputs[0][0]).max()) > 0.01


def test_every_regime_is_on_the_table_for_both_optimizers():
    for rule in ("sgd", "adam"):
        assert {paper.theory(row, rule)[0] for row in paper.ROW.values()} == {"unstable", "trivial", "kernel", "feature learning"}


@pytest.mark.slow
def test_the_closed_form_is_where_a_very_wide_linear_net_goes():
    data = pj.data.single_index(jax.random.key(1), 6, 0, 3, lambda z: z)
    model, row, lr = paper.linear_net(100_000, paper.ROW["muP"]), paper.ROW["muP"], 0.2
    start = params = model.init(jax.random.key(0), data.x_train)
    tx = paper.sgd(lr, paper.BASE, row)
    loss = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, data.x_train) - data.y_train))))
    for _ in range(4):
        params = jax.tree.map(jnp.add, params, tx.update(loss(params), tx.init(params), params)[0])

    def mse(f, y):
        return jnp.mean(jnp.square(f - y))

    distance = paper.mup_limit(model, params, data, mse, 4, lr)
    assert float(distance) < 0.02 * float(pj.measures.output_change(model, params, start, data))


def test_regimes_are_read_off_exponents():
    assert paper.regime_of(0.0, 0.0, -1.0) == "feature learning"
    assert paper.regime_of(-0.5, -1.0, 0.0) == "kernel"
    assert paper.regime_of(0.0, -0.5, -0.5) == "trivial"
    assert paper.regime_of(-0.5, 0.0, 0.5) == paper.regime_of(0.5, 0.0, 0.0) == paper.regime_of(np.nan, 0.0, 0.0) == "unstable"
