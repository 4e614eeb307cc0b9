"""A model that writes factors of width or depth itself gets them once: its plan is that of the same network without them.

Each pair is one network written twice; under the plan both must be the same function with the same trajectory, whatever the factors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj

X = np.random.default_rng(0).normal(size=(6, 5))
Y = np.random.default_rng(1).normal(size=(6, 3))


def perceptron(own, where="after"):
    """Two hidden layers; with `own`, unit variance and an explicit fan_in^-1/2 on the product or on the weight (NTK style)."""

    def family(width):
        sizes = ((5, width), (width, width), (width, 3))

        def init(key, x):
            keys = jax.random.split(key, 3)
            return [jax.random.normal(k, s) * (1.0 if own else s[0] ** -0.5) for k, s in zip(keys, sizes)]

        def apply(params, x):
            h = x
            for i, w in enumerate(params):
                factor = w.shape[0] ** -0.5 if own else 1.0
                h = h @ (w * factor) if where == "before" else (h @ w) * factor
                h = jnp.tanh(h) if i < 2 else h
            return h

        return pj.Model(init, apply)

    return family


def embedding(own):
    """Tokens, with std d^-1/2 and a factor sqrt(d), or with std 1."""

    def family(width):
        def init(key, x):
            keys = jax.random.split(key, 2)
            return {
                "table": jax.random.normal(keys[0], (4, width)) * (width**-0.5 if own else 1.0),
                "out": jax.random.normal(keys[1], (width, 3)),
            }

        def apply(params, x):
            h = params["table"][x] * (width**0.5 if own else 1.0)
            return jnp.tanh(h) @ params["out"]

        return pj.Model(init, apply)

    return family


def residual(own, activation):
    """Blocks ``h + s phi(W h)``; with `own`, s = depth^-1/2 is written in the model."""

    def family(width, depth):
        def init(key, x):
            keys = jax.random.split(key, 3)
            return {
                "first": jax.random.normal(keys[0], (5, width)),
                "blocks": jax.random.normal(keys[1], (depth, width, width)) * width**-0.5,
                "out": jax.random.normal(keys[2], (width, 3)),
            }

        def apply(params, x):
            s = depth**-0.5 if own else 1.0
            h, _ = jax.lax.scan(lambda h, w: (h + s * activation(h @ w), None), x @ params["first"], params["blocks"])
            return h @ params["out"]

        return pj.Model(init, apply)

    return family


def trajectory(family, scheme, base, target, optimizer, x, steps=4):
    """Outputs of a few steps of training; what the model multiplies by itself is the same number at the base for both writings."""
    plan = pj.plan(pj.family(family, x=x), scheme, base=base, target=target, optimizer=optimizer)
    params = plan.model.init(jax.random.key(0), x)
    tx = plan.optimizer(getattr(optax, optimizer), learning_rate=0.01, **({"eps": 1e-12} if optimizer == "adam" else {}))
    state, seen = tx.init(params), []
    for _ in range(steps):
        seen.append(plan.model.apply(params, x))
        grads = jax.grad(lambda p: ((plan.model.apply(p, x) - Y) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return np.array(seen)


def effective(family, scheme, base, target, x):
    """The output at the start: the same for both writings if multipliers and initializations come out right."""
    plan = pj.plan(pj.family(family, x=x), scheme, base=base, target=target, optimizer="sgd")
    return plan.model.apply(plan.model.init(jax.random.key(0), x), x), plan


@pytest.fixture(autouse=True)
def _double():
    # optax's Adam needs JAX's own promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("scheme", [pj.mup, pj.ntp, pj.standard, pj.mup_table9], ids=lambda s: s.name)
@pytest.mark.parametrize("where", ["before", "after"])
def test_ntk_style_weights(scheme, where):
    base, target = {"width": 4}, {"width": 16}
    plain, _ = effective(perceptron(False), scheme, base, target, X)
    own, plan = effective(perceptron(True, where), scheme, base, target, X)
    np.testing.assert_allclose(own, plain, rtol=1e-9)
    assert plan.leaves[1].factors.multiplier * 2**-1 == pytest.approx(4 ** -scheme.a["hidden"].power("hidden"))


def test_embeddings_times_the_root_of_the_width():
    x = np.array([0, 1, 2, 3, 0, 1])
    plain, _ = effective(embedding(False), pj.mup, {"width": 4}, {"width": 16}, x)
    own, _ = effective(embedding(True), pj.mup, {"width": 4}, {"width": 16}, x)
    np.testing.assert_allclose(own, plain, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [lambda h: h, jnp.tanh, jax.nn.relu], ids=["linear", "tanh", "relu"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_branches_that_know_their_depth(activation, optimizer):
    # At depth 1 both writings are the same base.
    base, target = {"width": 4, "depth": 1}, {"width": 8, "depth": 4}
    plain = trajectory(residual(False, activation), pj.depth_mup, base, target, optimizer, X)
    own = trajectory(residual(True, activation), pj.depth_mup, base, target, optimizer, X)
    np.testing.assert_allclose(own, plain, rtol=1e-8)


def attention(own=(), scale="on the logits"):
    """One head without a residual; the projections in `own` have unit variance and ``/ sqrt(n)`` after the product."""

    def family(width):
        def init(key, x):
            names = ("first", "query", "key", "value", "out")
            sizes = ((5, width), *((width, width),) * 3, (width, 3))
            keys = jax.random.split(key, 5)
            stds = [1.0 if n in ("first", *own) else width**-0.5 for n in names]
            return {n: std * jax.random.normal(k, size) for n, k, size, std in zip(names, keys, sizes, stds)}

        def apply(p, x):
            h = x @ p["first"]
            q, k, v = ((h @ p[n]) / (width**0.5 if n in own else 1.0) for n in ("query", "key", "value"))
            if scale == "on the queries":
                q = q / width**0.5
            if scale == "on both":
                q, k = q / width**0.25, k / width**0.25
            logits = q @ k.T / (width**0.5 if scale == "on the logits" else 1.0)
            return (jax.nn.softmax(logits) @ v) @ p["out"]

        return pj.Model(init, apply)

    return family


PROJECTIONS = [(("value",), "on the logits"), (("query", "key"), "on the logits"), (("query", "key"), "on the queries"), ((), "on both")]


@pytest.mark.parametrize("scheme", [pj.mup, pj.ntp, pj.standard], ids=lambda s: s.name)
@pytest.mark.parametrize(("own", "scale"), PROJECTIONS, ids=lambda a: a if isinstance(a, str) else " and ".join(a) or "none")
def test_projections_divided_by_the_root_of_the_width(scheme, own, scale):
    plain, _ = effective(attention(), scheme, {"width": 4}, {"width": 16}, X)
    ours, _ = effective(attention(own, scale), scheme, {"width": 4}, {"width": 16}, X)
    # At the base the two writings differ by nothing: 4^-1/2 is in the init of one, in the product of the other.
    np.testing.assert_allclose(ours, plain, rtol=1e-9)


def test_muP_alone_leaves_the_models_own_depth():
    base, target = {"width": 4, "depth": 1}, {"width": 8, "depth": 4}
    _, plan = effective(residual(True, jnp.tanh), pj.mup, base, target, X)
    assert [leaf.factors.multiplier for leaf in plan.leaves] == [1.0, 1.0, 1.0]
    assert plan.scalings == ()


def test_the_library_own_residual_network():
    base, target = {"width": 4, "depth": 1}, {"width": 8, "depth": 4}
    plans = [
        pj.plan(
            pj.family(lambda width, depth, e=e: pj.models.resmlp(width, depth, 3, branch_exponent=e), x=X),
            pj.depth_mup, base=base, target=target, optimizer="adam",
        )
        for e in (0.0, 0.5)
    ]  # fmt: skip
    blocks = [next(leaf for leaf in plan.leaves if "blocks" in leaf.path).factors for plan in plans]
    assert blocks[0].multiplier == pytest.approx(0.5)
    assert blocks[1].multiplier == pytest.approx(1.0)
    assert blocks[0].learning_rate == pytest.approx(blocks[1].learning_rate)
