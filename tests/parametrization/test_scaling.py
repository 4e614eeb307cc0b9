"""Factors on activations stand at the same place for every batch, whatever equations its dtype or shape adds; or the batch is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.parametrization.plan import Plan
from tests.zoo import as_users_run_it

ROWS = np.round(3 * np.random.default_rng(0).normal(size=(2, 6, 5)))
TOKENS = np.random.default_rng(1).integers(0, 5, size=(2, 6))
BASE, TARGET = {"width": 4, "depth": 1}, {"width": 16, "depth": 4}


@pytest.fixture(autouse=True)
def usual():
    with as_users_run_it():
        yield


def drawn(shapes):
    def init(key, x):
        return {k: jax.random.normal(jax.random.fold_in(key, i), s) / s[-2] ** 0.5 for i, (k, s) in enumerate(shapes.items())}

    return init


def attention(width, depth, logits=1.0, **_):
    """A batch that is not float32 is cast, which is an equation more; the logits' power of the width is not that of muP."""

    def apply(p, x):
        h = x.astype(jnp.float32) @ p["i"]
        q, k, v = (h @ p[n] for n in "qkv")
        return jax.nn.softmax(logits * (q @ k.swapaxes(-1, -2)) / width**0.5) @ v @ p["o"]

    return pj.Model(drawn({"i": (5, width), **dict.fromkeys("qkv", (width, width)), "o": (width, 5)}), apply)


def tied(width, depth, output=1.0, **_):
    def apply(p, x):
        h = p["e"][x.astype(jnp.int32)]
        return output * (jnp.tanh(h @ p["w"]) @ p["e"].T)

    return pj.Model(drawn({"e": (5, width), "w": (width, width)}), apply)


def branches(width, depth, branch=1.0, **_):
    """Scanned blocks that end in tanh, so that no weight can stand for the factor of depth."""

    def apply(p, x):
        h, _ = jax.lax.scan(lambda h, w: (h + branch * jnp.tanh(h @ w), None), x.astype(jnp.float32) @ p["i"], p["w"])
        return h @ p["o"]

    return pj.Model(drawn({"i": (5, width), "w": (depth, width, width), "o": (width, 5)}), apply)


# By hand: sqrt(4)/d and 1/sqrt(d) agree at the base of 4; a tied readout is 1/n; branches 1/sqrt(m).
CASES = {
    "logits": (attention, pj.mup, ROWS.astype(np.float32), {"logits": 0.5}),
    "tied": (tied, pj.mup, TOKENS.astype(np.int32), {"output": 0.25}),
    "branch": (branches, pj.depth_mup, ROWS.astype(np.float32), {"branch": 0.5}),
}
BATCHES = {
    "as planned": lambda x: x, "bfloat16": lambda x: x.astype(jnp.bfloat16), "int8": lambda x: x.astype(np.int8),
    "uint16": lambda x: abs(x).astype(np.uint16), "longer": lambda x: np.concatenate([x, x], axis=1), "one row": lambda x: x[:1],
}  # fmt: skip
every_case = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("logits", "tied") else n for n in CASES])


def case(name):
    network, scheme, x, hand = CASES[name]
    plan = pj.plan(network, scheme, base=BASE, target=TARGET, x=x)
    assert len(plan.scalings) == 1
    return plan, network(**TARGET, **hand), x


def both(plan, twin, params, x):
    params = jax.tree.map(jnp.multiply, params, plan.factors("multiplier", params)), params
    return plan.model.apply(params[1], x), twin.apply(params[0], x)


@pytest.mark.parametrize("width", [1024, 2048])
def test_a_root_that_the_model_divides_by_itself_needs_no_factor(width):
    # In single precision 1 / sqrt(2048) is off by 2e-8, and 1 / sqrt(1024) is not.
    def network(width):
        return tied(width, 1, output=float(np.float32(width) ** -0.5))

    assert not pj.plan(network, pj.ntp, base={"width": 64}, target={"width": width}, optimizer="sgd", x=TOKENS.astype(np.int32)).scalings


@every_case
def test_the_factor_is_found_again_whatever_the_batch(name):
    plan, twin, x = case(name)
    params = plan.model.init(jax.random.key(0), x)
    for batch in BATCHES.values():
        if name == "tied" and jnp.issubdtype(batch(x).dtype, jnp.inexact):
            continue
        ours, theirs = both(plan, twin, params, jnp.asarray(batch(x)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        # A factor that stood elsewhere, or nowhere, would be seen.
        assert np.abs(ours - plan.network.apply(params, jnp.asarray(batch(x)))).max() > 1e-2


@every_case
def test_and_whatever_the_dtype_of_the_parameters_in_every_transformation_and_from_a_file(name):
    plan, twin, x = case(name)
    params = plan.model.init(jax.random.key(0), x)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ours, theirs = both(plan, twin, half, jnp.asarray(x))
    np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=0.1, atol=0.05)
    small = jnp.asarray(x.astype(np.int8))
    ours, theirs = both(plan, twin, params, small)
    read = Plan.from_json(plan.to_json()).bind(plan.network)
    assert read == plan
    mapped = jax.vmap(lambda row: plan.model.apply(params, row[None])[0])
    for out in (read.model.apply(params, small), jax.jit(plan.model.apply)(params, small), mapped(small)):
        np.testing.assert_allclose(out, theirs, rtol=1e-4, atol=1e-5)


def test_a_trace_in_which_the_place_is_not_found_is_refused():
    def network(width, depth):
        """Positions are read by dot products of float32, and summed without them otherwise."""
        long = attention(width, depth)

        def apply(p, x):
            return long.apply(p, x) if x.dtype == jnp.float32 else x.astype(jnp.float32) @ p["i"] @ p["o"]

        return pj.Model(long.init, apply)

    x = jnp.asarray(ROWS, jnp.float32)
    plan = pj.plan(network, pj.mup, base=BASE, target=TARGET, x=x)
    params = plan.model.init(jax.random.key(0), x)
    message = r"logits of d.*a batch int8\[2,6,5\], and the plan was made with float32\[2,6,5\].*make a plan with x=\.\.\."
    with pytest.raises(ValueError, match=message):
        plan.model.apply(params, x.astype(jnp.int8))


def test_a_network_of_other_places_is_refused():
    def twice(width, depth):
        one = attention(width, depth)

        def apply(p, x):
            h = one.apply(p, x)
            return one.apply(p, h)

        return pj.Model(one.init, apply)

    plan = pj.plan(attention, pj.mup, base=BASE, target=TARGET, x=jnp.asarray(ROWS, jnp.float32))
    params = plan.model.init(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match=r"the network or the version of JAX is another\. Of the 1 places like that one 2 are left"):
        plan.bind(twice(**TARGET)).model.apply(params, jnp.asarray(ROWS, jnp.float32))


def test_a_plan_without_factors_on_activations_is_the_same_for_every_batch():
    plans = [pj.plan(attention, pj.standard, base=BASE, target=TARGET, x=jnp.asarray(x)) for x in (ROWS, ROWS[:1].astype(np.int8))]
    assert plans[0] == plans[1]
    assert plans[0].wiring == plans[0].batch == ""
    assert dataclasses.replace(plans[0], batch="x") != plans[0]
