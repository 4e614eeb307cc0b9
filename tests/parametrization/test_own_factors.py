"""A model that writes factors of width or depth itself gets them once: its plan is that of the same network without them.

Each pair is one network written twice; under the plan both must be the same function with the same trajectory, whatever the factors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj

X = np.random.default_rng(0).normal(size=(6, 5))
Y = np.random.default_rng(1).normal(size=(6, 3))


def perceptron(own, where="after"):
    """Two hidden layers; with `own`, unit variance and an explicit fan_in^-1/2 on the product, the weight or the data (NTK style)."""
    phi = jax.nn.relu if where == "after a relu" else jnp.tanh

    def family(width):
        sizes = ((5, width), (width, width), (width, 3))

        def init(key, x):
            keys = jax.random.split(key, 3)
            return [jax.random.normal(k, s) * (1.0 if own else s[0] ** -0.5) for k, s in zip(keys, sizes)]

        def apply(params, x):
            h = x
            for i, w in enumerate(params):
                factor = w.shape[0] ** -0.5 if own else 1.0
                if where == "after a relu":
                    h = h @ w if not own or i == 2 else phi(h @ w) * factor
                    h = phi(h) if not own and i < 2 else h * factor if own and i == 2 else h
                    continue
                h = h @ (w * factor) if where == "before" else (h * factor) @ w if where == "on the data" else (h @ w) * factor
                h = phi(h) if i < 2 else h
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


def tied(own):
    """Tokens whose table reads out as well, with d^-1/2 in front of the readout (T5's spelling) or behind it."""

    def family(width):
        def init(key, x):
            return {"table": jax.random.normal(key, (4, width)), "w": jax.random.normal(jax.random.fold_in(key, 1), (width, width))}

        def apply(params, x):
            h, s = jnp.tanh(params["table"][x] @ params["w"]), width**-0.5
            return (h * s) @ params["table"].T if own else (h @ params["table"].T) * s

        return pj.Model(init, apply)

    return family


def test_a_tied_readout_of_scaled_features():
    x = np.array([0, 1, 2, 3, 0, 1])
    (after, plan), (before, other) = (effective(tied(own), pj.mup, {"width": 4}, {"width": 64}, x) for own in (False, True))
    np.testing.assert_allclose(before, after, rtol=1e-9)
    # The readout wants 1/n in all, and the model has n^-1/2 of it.
    assert [s.factor for s in plan.scalings] == [s.factor for s in other.scalings] == [pytest.approx(1 / 4)]


def mean_of_neurons(width):
    """The mean over neurons is a limit, not a factor on a weight."""
    return pj.Model(
        lambda key, x: {"u": jax.random.normal(key, (5, width)), "v": jnp.ones((1, 3))},
        lambda p, x: jnp.mean(jax.nn.relu(x @ p["u"]), axis=1, keepdims=True) @ p["v"],
    )


def test_a_mean_over_neurons_stays():
    _, plan = effective(mean_of_neurons, pj.mup, {"width": 4}, {"width": 64}, X)
    assert {leaf.path: leaf.factors.multiplier for leaf in plan.leaves} == {"['u']": 1.0, "['v']": 1.0}


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
@pytest.mark.parametrize("where", ["before", "after", "on the data", "after a relu"])
def test_ntk_style_weights(scheme, where):
    base, target = {"width": 4}, {"width": 16}
    plain, _ = effective(perceptron(False, where), scheme, base, target, X)
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


def logits(spelling):
    """One attention whose queries and keys are spelt in the ways of several models; what is left before the softmax differs by them."""

    def mean_one(a):
        return a * jax.lax.rsqrt(jnp.mean(a**2, axis=-1, keepdims=True) + 1e-6)

    def turned(a):
        half = a.shape[-1] // 2
        angle = jnp.exp(1j * jnp.arange(a.shape[0], dtype=a.dtype)[:, None] / (1 + jnp.arange(half)[None]))
        rotated = jax.lax.complex(a[:, :half], a[:, half:]) * angle
        return jnp.concatenate([rotated.real, rotated.imag], axis=-1)

    ways = {
        "plain": lambda a: a, "rms norm": mean_one, "layer norm": lambda a: mean_one(a - jnp.mean(a, axis=-1, keepdims=True)),
        "rms norm by a quotient": lambda a: a / jnp.sqrt(jnp.mean(a**2, axis=-1, keepdims=True)), "complex rotary": turned,
        "unit length": lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True), "elu": lambda a: jax.nn.elu(a) + 1,
        "a factor and a norm": lambda a: mean_one(a / a.shape[-1] ** 0.5),
    }  # fmt: skip

    def family(width):
        def init(key, x):
            keys = jax.random.split(key, 3)
            return {n: jax.random.normal(k, (5, width)) for n, k in zip("qkv", keys)}

        def apply(p, x):
            q, k = (ways[spelling](x @ p[n]) for n in "qk")
            scale = 1.0 if spelling == "unit length" else width**-0.5
            return jax.nn.softmax(q @ k.T * scale) @ (x @ p["v"])

        return pj.Model(init, apply)

    return family


@pytest.mark.parametrize("spelling", ["plain", "rms norm", "layer norm", "rms norm by a quotient", "complex rotary", "a factor and a norm"])
def test_logits_of_normalized_queries_and_keys_become_one_over_d(spelling):
    _, plan = effective(logits(spelling), pj.mup, {"width": 8}, {"width": 32}, X)
    assert [s.factor for s in plan.scalings] == [pytest.approx(4**-0.5)]


def test_cosines_are_divided_by_d_already():
    assert effective(logits("unit length"), pj.mup, {"width": 8}, {"width": 32}, X)[1].scalings == ()


def test_a_product_that_cannot_be_read_is_warned_of():
    with pytest.warns(UserWarning, match=r"sums over 32 coordinates, 8 at the base.*leaves it as it is"):
        effective(logits("elu"), pj.mup, {"width": 8}, {"width": 32}, X)
    # A parametrization that does not touch logits has nothing to say.
    effective(logits("elu"), pj.ntp, {"width": 8}, {"width": 32}, X)


@pytest.mark.parametrize("scheme", [pj.u_mup, pj.completep, pj.depth_mup], ids=lambda s: s.name)
def test_without_branches_and_without_growing_depth_only_the_width_counts(scheme):
    sizes = {"width": 4}, {"width": 16}
    deep, flat = (effective(perceptron(False), s, *sizes, X)[1] for s in (scheme, dataclasses.replace(scheme, depth=None)))
    assert [leaf.factors for leaf in deep.leaves] == [leaf.factors for leaf in flat.leaves]


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_numbers_after_a_use_that_bends_the_leaf_belong_to_the_next(rule):
    """``h * exp(g) / sqrt(n) @ w`` is ``h * exp(g) @ (w / sqrt(n))``: g has the plan that it has where the factor stands after w."""

    def family(early):
        def make(width):
            def init(key, x):
                keys = jax.random.split(key, 3)
                shapes = {"u": (5, width), "w": (width, width), "v": (width, 1)}
                return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())} | {"g": jnp.zeros((1, width))}

            def apply(p, x):
                own = width**-0.5
                h = jnp.tanh(x @ p["u"]) * jnp.exp(p["g"])
                h = (h * own) @ p["w"] if early else (h @ p["w"]) * own
                return jnp.tanh(h) @ p["v"] * own

            return pj.Model(init, apply)

        return pj.family(make, x=jnp.ones((2, 5)))

    plans = [pj.plan(family(early), pj.mup, base=dict(width=16), target=dict(width=64), optimizer=rule) for early in (True, False)]
    assert [leaf.factors for leaf in plans[0].leaves] == [leaf.factors for leaf in plans[1].leaves]
    # Table 8 (arXiv 2203.03466): a vector's rate grows with the width under SGD, and stays under Adam; its gradient is that of h * exp(g).
    rates = {leaf.path: leaf.factors.learning_rate for leaf in plans[0].leaves}
    assert rates["['g']"] == pytest.approx(4.0 if rule == "sgd" else 1.0)
