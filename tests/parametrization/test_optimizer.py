"""Families of optimizers by their law, schedules, modes of weight decay, and Muon."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from paperjax.parametrization.factors import RULES, Factors
from paperjax.parametrization.plan import Plan, PlannedLeaf
from tests.zoo import as_users_run_it

pytestmark = pytest.mark.slow

PARAMS = {"w": np.array([[0.3, -0.2], [0.1, 0.4]])}
GRADS = [np.random.default_rng(k).normal(size=(2, 2)) for k in range(8)]


@pytest.fixture(autouse=True)
def double():
    with as_users_run_it(), jax.enable_x64(True):
        yield


def one_leaf(rule="adam", mode="coupled", role="adam", **factors):
    leaf = PlannedLeaf("['w']", (2, 2), "float64", "hidden", ("", ""), (0,), (1,), (), role, 1.0, Factors(**factors))
    return Plan("test", rule, mode, (), (), (leaf,))


def updates(tx, scale=1.0, params=PARAMS):
    """Updates of eight gradients of a given size, one after the other, parameters kept."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    state, out = tx.init(params), []
    for g in GRADS:
        u, state = tx.update({"w": jnp.asarray(scale * g)}, state, params)
        out.append(u["w"])
    return np.asarray(out)


# What moves a plan's factors to an optimizer is right iff this law holds, whatever the optimizer does inside.
@pytest.mark.parametrize("name", RULES["adam"])
def test_adam_like_updates_have_a_size_of_their_own(name):
    settings = {"b3": 0.99} if name == "adan" else {}
    ours = updates(one_leaf(eps=1e-3, learning_rate=0.25).optimizer(name, 0.4, **settings), scale=1e-3)
    theirs = updates(one_leaf().optimizer(name, 0.1, **settings))
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_eps_outside_the_root_of_rmsprop():
    ours, theirs = (
        updates(one_leaf(eps=s).optimizer(optax.rmsprop, 0.1, eps=0.2, eps_in_sqrt=False, initial_scale=0.3), scale=s) for s in (1e-3, 1.0)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_updates_are_proportional_to_gradients(settings):
    plan = one_leaf("sgd", role="sgd", learning_rate=0.25)
    ours = updates(plan.optimizer(optax.sgd, 0.4, **settings), scale=1e-3)
    np.testing.assert_allclose(ours, 1e-3 * updates(optax.sgd(0.1, **settings)), rtol=1e-8)


def test_what_is_in_no_family_keeps_neither_law():
    # Why these are refused: scaled gradients change their updates, and not in proportion.
    for make in (optax.yogi, optax.radam, optax.noisy_sgd):
        tx = make(0.1, **({"key": 0} if make is optax.noisy_sgd else {}))
        small, large = updates(tx, 1e-3), updates(tx)
        assert not np.allclose(small, large, rtol=0.1)
        assert not np.allclose(small, 1e-3 * large, rtol=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_schedule_is_multiplied_after_it_is_evaluated(optimizer):
    role = "sgd" if optimizer == "sgd" else "adam"
    plan = one_leaf(role, role=role, learning_rate=0.25, weight_decay=4.0)
    constant = updates(plan.optimizer(optimizer, 0.1))
    np.testing.assert_allclose(updates(plan.optimizer(optimizer, optax.constant_schedule(0.1))), constant, rtol=1e-12)
    halving = updates(plan.optimizer(optimizer, lambda step: 0.1 * 0.5**step))
    np.testing.assert_allclose(halving, constant * 0.5 ** np.arange(8)[:, None, None], rtol=1e-12)

    @jax.jit
    def traced(lr):
        tx = plan.optimizer(optimizer, lr)
        return tx.update({"w": GRADS[0]}, tx.init(PARAMS), PARAMS)[0]["w"]

    np.testing.assert_allclose(traced(0.1), constant[0], rtol=1e-6)


def shrinkage(plan, optimizer, rate=0.1, **settings):
    """What one step without gradient takes of a weight, as a fraction."""
    tx = plan.optimizer(optimizer, rate, **settings)
    params = {"w": jnp.ones((2, 2))}
    return -float(tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)[0]["w"][0, 0])


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw", "lion", "adan", "sgd"])
def test_modes_of_decay(optimizer):
    rule = "sgd" if optimizer == "sgd" else "adam"
    lr, wd = 0.25, 4.0
    plan = one_leaf(rule, role=rule, learning_rate=lr, weight_decay=wd, multiplier=7.0)
    # Coupled: lr × decay of the base, whatever the leaf's own lr; the multiplier of the leaf plays no part.
    assert shrinkage(plan, optimizer, weight_decay=0.5) == pytest.approx(0.1 * 0.5)
    assert shrinkage(plan, optimizer, rate=0.2, weight_decay=0.5) == pytest.approx(0.2 * 0.5)
    independent = one_leaf(rule, "independent", role=rule, learning_rate=lr)
    assert shrinkage(independent, optimizer, weight_decay=0.01) == pytest.approx(0.01)
    assert shrinkage(independent, optimizer, rate=0.2, weight_decay=0.01) == pytest.approx(0.01)
    assert shrinkage(independent, optimizer, weight_decay=lambda step: 0.02) == pytest.approx(0.02)
    for each in (plan, independent):
        assert shrinkage(each, optimizer, weight_decay=0.5, mask={"w": False}) == 0.0
        assert shrinkage(each, optimizer, weight_decay=0.5, mask=lambda params: jax.tree.map(jnp.ndim, params)) > 0


def test_decay_that_nobody_said():
    assert shrinkage(one_leaf(learning_rate=0.25, weight_decay=4.0), "adamw") == pytest.approx(0.1 * 1e-4)  # optax's own default
    assert shrinkage(one_leaf("sgd", role="sgd"), "sgd") == 0.0
    with pytest.raises(ValueError, match=r"default weight_decay=0.0001 is meant to be multiplied"):
        one_leaf(mode="independent").optimizer("adamw", 0.1)
    with pytest.raises(ValueError, match=r"adam takes no weight_decay: use optax\.adamw"):
        one_leaf().optimizer("adam", 0.1, weight_decay=0.1)


def test_a_factory_of_ones_own():
    def mine(learning_rate, eps=1e-8):
        return optax.adam(learning_rate, eps=eps)

    plan = one_leaf(learning_rate=0.25, eps=1e-3)
    np.testing.assert_allclose(updates(plan.optimizer(mine, 0.4, follows="adam"), 1e-3), updates(optax.adam(0.1)), rtol=1e-8)


def test_leaves_that_are_not_trained_get_no_update():
    def init(key, x):
        return {"w": jnp.ones((2, 2)), "fixed": pj.Frozen({"a": jnp.ones(3), "n": jnp.zeros((), int)}), "count": jnp.zeros((), int)}

    params = init(None, None)
    tx = one_leaf(learning_rate=0.5).optimizer("adam", 0.1)
    out, _ = tx.update(params, tx.init(params), params)
    assert float(jnp.abs(out["fixed"].value["a"]).max()) == 0.0
    assert float(out["w"][0, 0]) == pytest.approx(-0.05)


# Muon -------------------------------------------------------------------------------------------------------------------

TOKENS = jnp.zeros((2, 4), int)
FAMILY = pj.family(lambda width, inner: blocks(width, inner), x=TOKENS)


def blocks(width, inner):
    """Two scanned blocks whose inner width grows at its own pace; weights of rank 3 and 4."""

    def init(key, x):
        shapes = {"e": (5, width), "qkv": (2, width, 2, width // 2), "up": (2, inner, width), "down": (2, inner, width), "v": (width, 5)}
        return {k: 0.3 * jax.random.normal(jax.random.fold_in(key, i), s) for i, (k, s) in enumerate(shapes.items())}

    def apply(p, x):
        def block(h, b):
            h = h + jnp.einsum("btd,dhk->bthk", jnp.tanh(h), b["qkv"]).reshape(h.shape)
            return h + jnp.einsum("btd,id->bti", jnp.tanh(h), b["up"]) @ b["down"], None

        h, _ = jax.lax.scan(block, p["e"][x], {k: p[k] for k in ("qkv", "up", "down")})
        return h @ p["v"]

    return pj.Model(init, apply)


def muon_plan(scheme=pj.mup, width=16, inner=64, base_inner=16):
    return pj.plan(FAMILY, scheme, base={"width": 8, "inner": base_inner}, target={"width": width, "inner": inner}, optimizer="muon")


def test_muons_axes_are_the_traces():
    plan = muon_plan()
    params = jax.eval_shape(plan.network.init, jax.random.key(0), TOKENS)
    axes = plan.muon_dimension_numbers(params)
    numbers = optax.contrib.MuonDimensionNumbers
    assert axes == {"e": None, "v": None, "qkv": numbers((1,), (2, 3)), "up": numbers((2,), (1,)), "down": numbers((1,), (2,))}
    with pytest.raises(ValueError, match="made for optimizer='adam'"):
        dataclasses.replace(plan, rule="adam").muon_dimension_numbers(params)


@pytest.mark.parametrize("scheme", [pj.mup, pj.spectral, pj.mup_table8, pj.mup.shifted((0.5, -0.25, 1))], ids=lambda s: s.name)
def test_muons_updates_have_the_spectral_norm_of_the_condition(scheme):
    """At every size, multiplier × update has norm sqrt(fan_out / fan_in) up to one constant for each leaf (arXiv 2310.17813)."""
    norms = {}
    for sizes in ({"width": 8, "inner": 16}, {"width": 16, "inner": 64}, {"width": 32, "inner": 64}):
        plan = muon_plan(scheme, **sizes)
        params = jax.eval_shape(plan.network.init, jax.random.key(0), TOKENS)
        params = jax.tree.map(lambda leaf: 1e-3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
        # Many more steps of Newton-Schulz with the classical coefficients: singular values of 1, not of 0.7 to 1.2.
        tx = plan.optimizer("muon", 0.1, ns_coeffs=(2.0, -1.5, 0.5), ns_steps=60, eps=0.0)
        out, _ = jax.jit(tx.update)(params, tx.init(params), params)
        out = jax.tree.map(jnp.multiply, out, plan.factors("multiplier", params))
        fans = {"qkv": (sizes["width"],) * 2, "up": (sizes["width"], sizes["inner"]), "down": (sizes["inner"], sizes["width"])}
        for name, (fan_in, fan_out) in fans.items():
            matrix = np.asarray(out[name][1]).reshape((fan_in, fan_out) if name != "up" else (fan_out, fan_in))
            norms.setdefault(name, []).append(np.linalg.norm(matrix, 2) / (fan_out / fan_in) ** 0.5)
    for name, values in norms.items():
        np.testing.assert_allclose(values, values[0], rtol=1e-3, err_msg=name)


def test_the_rest_follows_adam_under_muon():
    muon, adam = muon_plan(), pj.plan(FAMILY, pj.mup, base=dict(muon_plan().base), target=dict(muon_plan().target), optimizer="adam")
    rest = [(a, b) for a, b in zip(muon.leaves, adam.leaves) if a.rule == "adam"]
    assert [a.path for a, _ in rest] == ["['e']", "['v']"]
    assert all(a == b for a, b in rest)
    params = muon.network.init(jax.random.key(0), TOKENS)
    tx = muon.optimizer(optax.contrib.muon, 0.1, adam_learning_rate=0.4, weight_decay=0.5, nesterov=False)
    out, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(out["e"], -0.4, rtol=1e-5)
    np.testing.assert_allclose(out["v"], -0.4 / 2, rtol=1e-5)
    still, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(still["up"], -0.1 * 0.5 * params["up"], rtol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("consistent_rms", 0.2), ("adaptive", True), ("muon_weight_dimension_numbers", {})])
def test_settings_of_muon_that_the_plan_cannot_keep(name, value):
    with pytest.raises(ValueError, match=f"{name} cannot be given"):
        muon_plan().optimizer("muon", 0.1, **{name: value})


def test_an_optax_without_muon_is_told(monkeypatch):
    monkeypatch.delattr(optax.contrib, "MuonDimensionNumbers")
    with pytest.raises(ValueError, match="MuonDimensionNumbers is needed"):
        muon_plan().optimizer("muon", 0.1)


@pytest.mark.parametrize("rate", [None, "0.1"])
def test_a_learning_rate_is_a_number_or_a_schedule(rate):
    with pytest.raises(TypeError, match="give a number, or a schedule"):
        muon_plan().optimizer(optax.contrib.muon, rate)
