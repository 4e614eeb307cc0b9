"""The symmetry of the abc algebra: forms of one parametrization give one trajectory, at float64."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from tests.parametrization.trajectories import distance, trajectory
from tests.zoo import as_users_run_it

# Updates large enough that ten steps move the function by order 1, and an eps that Adam feels.
OPTIMIZERS = {
    "sgd": lambda plan: plan.optimizer(optax.sgd, 0.05, momentum=0.9),
    "adam": lambda plan: plan.optimizer(optax.adam, 0.02, eps=1e-3),
}
ROWS = np.random.default_rng(0).normal(size=(6, 3))
TARGETS = np.random.default_rng(1).normal(size=(6, 2))
FAMILY = pj.family(lambda width: pj.models.mlp(width, 3, 2, activation=jnp.tanh, bias_variance=0.1), x=ROWS)


@pytest.fixture(autouse=True)
def double():
    # Optax's own Adam promotes.
    with as_users_run_it(), jax.enable_x64(True):
        yield


def normed(width):
    """What starts at one number: gains of 1, biases of 0.3 and 0, logarithms of scales for each unit and for all; and a readout of ones."""

    def init(key, x):
        u, w = jax.random.split(key)
        return {
            "u": jax.random.normal(u, (3, width)), "b": jnp.full(width, 0.3), "gain": jnp.ones(width), "shift": jnp.zeros(width),
            "w": jax.random.normal(w, (width, width)) / width**0.5, "log_scale": jnp.full(width, -0.5), "log_all": jnp.full((), 0.2),
            "v": jnp.full((width, 2), 1 / width), "c": jnp.full(2, 0.1),
        }  # fmt: skip

    def apply(p, x):
        h = x @ p["u"] + p["b"][None]
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6) * p["gain"][None] + p["shift"][None]
        h = jnp.tanh(jnp.tanh(h) @ p["w"] * jnp.exp(p["log_scale"])[None])
        return jnp.exp(p["log_all"]) * (h @ p["v"]) + p["c"][None]

    return pj.Model(init, apply)


NORMED = pj.family(normed, x=ROWS)


def run(scheme, rule, optimizer=OPTIMIZERS, family=FAMILY):
    plan = pj.plan(family, scheme, base={"width": 4}, target={"width": 32}, optimizer=rule)
    x, y = jnp.asarray(ROWS), jnp.asarray(TARGETS)
    return trajectory(plan.model.apply, plan.model.init(jax.random.key(0), x), optimizer[rule](plan), x, y)


@functools.cache
def reference(rule, family=FAMILY):
    return run(pj.mup, rule, family=family)


@pytest.mark.parametrize("family", [FAMILY, NORMED], ids=["mlp", "gains, biases, scales"])
@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("scheme", [pj.mup_table8, pj.mup_table9, pj.mean_field], ids=lambda s: s.name)
def test_the_forms_of_mup_are_one_trajectory(scheme, rule, family):
    assert distance(run(scheme, rule, family=family), reference(rule, family)) < 1e-10


OWN = pj.abc("of one's own", a=(0.3, -0.2, 0.6), b=(-0.3, 0.7, 0.4), c_sgd=(-1.6, pj.Exponent(1.4, -1.0), -0.2), c_adam=(-0.3, 1.2, 0.4))


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_constants_are_the_same_under_every_shift_and_in_a_form_of_ones_own(rule):
    for scheme in (pj.mup.shifted((0.7, -0.3, 0.4)), OWN):
        assert distance(run(scheme, rule, family=NORMED), reference(rule, NORMED)) < 1e-10
    tx = {
        "sgd": lambda plan: plan.optimizer(optax.sgd, 0.05, momentum=0.9, weight_decay=0.3),
        "adam": lambda plan: plan.optimizer(optax.adamw, 0.02, eps=1e-3, weight_decay=0.5),
    }
    assert distance(run(pj.mup_table9, rule, tx, NORMED), run(pj.mup, rule, tx, NORMED)) < 1e-10


@pytest.mark.parametrize("scheme", [pj.mup_table8, pj.mup_table9, pj.ntp, OWN], ids=lambda s: s.name)
def test_what_starts_at_one_number_starts_there_under_every_plan(scheme):
    plan = pj.plan(NORMED, scheme, base={"width": 4}, target={"width": 32})
    ours, own = (net.init(jax.random.key(0), ROWS) for net in (plan.model, plan.network))
    ours = jax.tree.map(jnp.multiply, ours, plan.factors("multiplier", ours))
    for name in ("b", "gain", "shift", "log_scale", "log_all", "v", "c"):
        np.testing.assert_allclose(ours[name], own[name], rtol=1e-12, err_msg=name)


theta = st.floats(-1, 1)
# A smaller example of a broken law says no more, and costs a compilation.
FEW = hypothesis.settings(
    max_examples=2,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@FEW
@hypothesis.example((0.7, -0.3, 0.4), "adam")
@hypothesis.example((-0.2, 0.8, -0.6), "sgd")
@hypothesis.given(st.tuples(theta, theta, theta), st.sampled_from(["sgd", "adam"]))
def test_every_shift_is_the_same_trajectory(theta, rule):
    assert distance(run(pj.mup.shifted(theta), rule), reference(rule)) < 1e-10


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_the_other_optimizers_rule_breaks_it(rule):
    # The shift of Table 8 with c moved as the other optimizer would have it.
    other = {"sgd": "adam", "adam": "sgd"}[rule]
    moved = pj.mup.shifted((0, 0, 1))
    by_other = moved.c[other]["output"].power("output") - pj.mup.c[other]["output"].power("output")
    wrong = {**moved.c, rule: {**pj.mup.c[rule], "output": pj.mup.c[rule]["output"].plus(pj.Exponent(fan_in=by_other))}}
    assert distance(run(dataclasses.replace(moved, c=wrong), rule), reference(rule)) > 0.1


def test_forms_differ_under_adam_without_the_factors_of_eps():
    def with_eps(plan):
        return plan.optimizer(optax.adam, 0.1, eps=0.3)

    def without(plan):
        leaves = tuple(dataclasses.replace(leaf, factors=leaf.factors._replace(eps=1.0)) for leaf in plan.leaves)
        return with_eps(dataclasses.replace(plan, leaves=leaves))

    assert distance(run(pj.mup_table8, "adam", {"adam": with_eps}), run(pj.mup, "adam", {"adam": with_eps})) < 1e-10
    assert distance(run(pj.mup_table8, "adam", {"adam": without}), run(pj.mup, "adam", {"adam": without})) > 0.1


@pytest.mark.slow
def test_lr_coupled_decay_and_momentum_keep_the_forms_one():
    tx = {
        "sgd": lambda plan: plan.optimizer(optax.sgd, 0.05, momentum=0.9, nesterov=True, weight_decay=0.3),
        "adam": lambda plan: plan.optimizer(optax.adamw, 0.02, eps=1e-3, weight_decay=0.5),
    }
    for rule in tx:
        ours, theirs = run(pj.mup_table9, rule, tx), run(pj.mup, rule, tx)
        assert distance(ours, theirs) < 1e-10
        assert distance(theirs, reference(rule)) > 1e-3  # the decay is felt
