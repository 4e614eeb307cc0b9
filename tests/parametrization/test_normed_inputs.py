"""A vector of length 1 has entries of n^-1/2, which is a factor of the model's own: ``h / ||h|| @ w`` is ``rms_norm(h) / sqrt(n) @ w``.

One function has one plan, however it is spelt: the leaves' factors are compared, and the function at initialization under the plan.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from tests.zoo import as_users_run_it

X = np.random.default_rng(0).normal(size=(4, 5))
RMS = lambda h: h / jnp.sqrt((h**2).mean(-1, keepdims=True))  # noqa: E731


@pytest.fixture(autouse=True)
def _double():
    with as_users_run_it(), jax.enable_x64(True):
        yield


def total(h):
    return (h**2).sum(-1, keepdims=True)


UNIT = {
    "a norm": lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "a norm, times": lambda h: h * (1 / jnp.linalg.norm(h, axis=-1, keepdims=True)),
    "a reciprocal root": lambda h: h * jax.lax.rsqrt(total(h)),
    "a root": lambda h: h / jnp.sqrt(total(h)),
    "a power": lambda h: h / total(h) ** 0.5,
    "a negative power": lambda h: h * total(h) ** -0.5,
    "eps in the root": lambda h: h / jnp.sqrt(total(h) + 1e-14),
    "eps beside the root": lambda h: h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + 1e-14),
    "a bound": lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12),
    "a bound in the root": lambda h: h * jax.lax.rsqrt(jnp.maximum(total(h), 1e-12)),
    "a clip": lambda h: h / jnp.clip(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12),
    "optax's safe norm": lambda h: h / optax.safe_norm(h, 1e-12, axis=-1, keepdims=True),
    "a product": lambda h: h / jnp.sqrt(jnp.einsum("bn,bn->b", h, h))[:, None],
    "under vmap": jax.vmap(lambda h: h / jnp.sqrt(h @ h)),
    "numbers that are divided out": lambda h: (3 * h * h.shape[-1]) / jnp.linalg.norm(3 * h * h.shape[-1], axis=-1, keepdims=True),
    "a root mean square, over a root": lambda h: RMS(h) / h.shape[-1] ** 0.5,
}


def network(normed, gain=False):
    """Features that `normed` makes, a hidden weight, and features of it that it makes once more, read out."""

    def family(width):
        def init(key, x):
            keys = jax.random.split(key, 3)
            shapes = {"u": (5, width), "w": (width, width), "v": (width, 3)}
            drawn = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
            return {**drawn, **({"g": jnp.ones((1, width))} if gain else {})}

        def apply(p, x):
            h = normed(jnp.tanh(x @ p["u"]))
            return normed(jnp.tanh((h * p["g"] if gain else h) @ p["w"])) @ p["v"]

        return pj.Model(init, apply)

    return family


def planned(family, scheme, width=16, rule="adam"):
    plan = pj.plan(pj.family(family, x=X), scheme, base={"width": 4}, target={"width": width}, optimizer=rule)
    return plan, plan.model.apply(plan.model.init(jax.random.key(0), X), X)


def same(ours, theirs):
    for a, b in zip(ours[0].leaves, theirs[0].leaves):
        assert a.factors == pytest.approx(b.factors), a.path
        assert a.init_std == pytest.approx(b.init_std), a.path
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-8)


@pytest.mark.parametrize("spelling", UNIT)
def test_unit_vectors_have_one_plan(spelling):
    ours, theirs = (planned(network(UNIT[name]), pj.mup) for name in (spelling, "a root mean square, over a root"))
    same(ours, theirs)
    # A fourfold width: sqrt(4) is put back to what has entries of n^-1/2.
    assert {leaf.path: leaf.factors.multiplier for leaf in ours[0].leaves} == pytest.approx({"['u']": 1.0, "['v']": 2.0, "['w']": 2.0})


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("scheme", [pj.mup, pj.ntp, pj.mup_table8, pj.spectral], ids=lambda s: s.name)
def test_unit_vectors_with_a_gain_are_those_of_a_root_mean_square(scheme, rule):
    ours, theirs = (planned(network(UNIT[name], gain=True), scheme, rule=rule) for name in ("a norm", "a root mean square, over a root"))
    same(ours, theirs)


def test_a_root_mean_square_has_no_factor_of_its_own():
    standardized = lambda h: (h - h.mean(-1, keepdims=True)) / h.std(-1, ddof=1, keepdims=True)  # noqa: E731
    for normed in (RMS, standardized, jnp.tanh):
        plan, _ = planned(network(normed), pj.mup)
        assert [leaf.factors.multiplier for leaf in plan.leaves] == [1.0, 1.0, 1.0]


def test_pooled_unit_vectors_keep_their_size():
    pooled = lambda h: UNIT["a norm"](jnp.stack([h, 2 + h], axis=1)).mean(1)  # noqa: E731
    plan, _ = planned(network(pooled), pj.mup)
    assert [leaf.factors.multiplier for leaf in plan.leaves] == pytest.approx([1.0, 2.0, 2.0])


def test_what_another_norm_divides_is_left():
    """``a / ||b||`` has entries of no known size where a is not of order 1 to begin with."""

    def family(width):
        shapes = {"u": (5, width), "b": (5, width), "v": (width, 3)}

        def apply(p, x):
            return (jnp.exp(x @ p["u"]) / jnp.linalg.norm(x @ p["b"], axis=-1, keepdims=True)) @ p["v"]

        return pj.Model(lambda key, x: {n: jax.random.normal(key, s) for n, s in shapes.items()}, apply)

    plan, _ = planned(family, pj.mup)
    assert [leaf.factors.multiplier for leaf in plan.leaves] == [1.0, 1.0, 1.0]


SHARES = {
    "softmax": jax.nn.softmax,
    "exponentials": lambda h: jnp.exp(h) / jnp.exp(h).sum(-1, keepdims=True),
    "exponentials, with a bound": lambda h: jnp.exp(h) / (jnp.exp(h).sum(-1, keepdims=True) + 1e-14),
    "over their mean, over n": lambda h: jax.nn.softmax(h) * h.shape[-1] / h.shape[-1],
}


@pytest.mark.parametrize("spelling", SHARES)
def test_shares_have_entries_of_one_over_n(spelling):
    ours, theirs = (planned(network(SHARES[name]), pj.mup) for name in (spelling, "softmax"))
    same(ours, theirs)
    assert [leaf.factors.multiplier for leaf in ours[0].leaves] == pytest.approx([1.0, 4.0, 4.0])


def test_outputs_of_unit_features_learn_alike_at_all_widths():
    """One Adam step moves the readout of unit features by as much at 16 times the width."""

    def moved(width):
        plan = pj.plan(pj.family(network(UNIT["a norm"]), x=X), pj.mup, base={"width": 32}, target={"width": width}, optimizer="adam")
        params = plan.model.init(jax.random.key(1), X)
        grads = jax.grad(lambda p: (plan.model.apply(p, X) * np.sign(X[:, :3])).sum())(params)
        tx = plan.optimizer(optax.adam, 1e-3)
        updates, _ = tx.update(grads, tx.init(params), params)
        return float(jnp.abs(plan.model.apply(optax.apply_updates(params, updates), X) - plan.model.apply(params, X)).mean())

    assert np.log(moved(512) / moved(32)) / np.log(16) == pytest.approx(0.0, abs=0.15)
