"""Numbers that a model multiplies by and that change with the width: each is one leaf's, once; what is nobody's is warned of.

Pairs of networks written with and without such numbers, whose plans must make them the same function: the expectation is the plain one's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
BASE, TARGET = 16, 64


def family(body, own, both=False, **leaves):
    """`body(h, p, root)` between tanh(x U) and a readout; with `own`, hidden weights of variance 1 and root = sqrt(n), else 1."""

    def make(width):
        shapes = {"a": (width, width), "o": (width, 3)} | ({"b": (width, width)} if both else {}) | leaves

        def init(key, x):
            keys = dict(zip(("u", *shapes), jax.random.split(key, 1 + len(shapes))))
            drawn = {"u": jax.random.normal(keys["u"], (5, width)) * 5**-0.5}
            for name, shape in shapes.items():
                size = tuple(width if n is None else n for n in shape)
                drawn[name] = jax.random.normal(keys[name], size) * (1.0 if own else width**-0.5) if len(size) > 1 else jnp.ones(size)
            return drawn

        def apply(p, x):
            root = width**0.5 if own else 1.0
            return jnp.tanh(body(jnp.tanh(x @ p["u"]), p, root)) @ p["o"] / root

        return pj.Model(init, apply)

    return make


SEEN_THROUGH = {
    "a sum of two products": (lambda h, p, r: (h @ p["a"] + jnp.sin(h) @ p["b"]) / r, {}),
    "a difference": (lambda h, p, r: (h @ p["a"] - jnp.sin(h) @ p["b"]) / r, {}),
    "a sum of a product and a moved one": (lambda h, p, r: (h @ p["a"] + (jnp.sin(h) @ p["b"])[:, ::-1]) / r, {}),
    "two uses": (lambda h, p, r: (lambda z: jax.nn.silu(z / r) + jnp.sin(z / r))(h @ p["a"]), {}),
    "halves, each by itself": (
        lambda h, p, r: (lambda z: jnp.sin(z[:, : h.shape[1] // 2] / r) * jax.nn.sigmoid(z[:, h.shape[1] // 2 :] / r))(h @ p["a"]).repeat(
            2, 1
        ),
        {},
    ),
    "a gain and then the number": (lambda h, p, r: (h @ p["a"]) * p["g"][None] / r, {"g": (None,)}),
    "the number and then a gain": (lambda h, p, r: (h @ p["a"]) / r * p["g"][None], {"g": (None,)}),
    "a scalar before the product": (lambda h, p, r: (p["s"] * h / r) @ p["a"], {"s": ()}),
    "a scalar behind it": (lambda h, p, r: (h @ p["a"]) * p["s"] / r, {"s": ()}),
    "numbers that make up for each other": (lambda h, p, r: jnp.sin(jnp.cos(h) / r * r) @ p["a"] / r, {}),
    "a gate on what goes in": (lambda h, p, r: (h * jax.nn.sigmoid(h @ p["b"] / r) / r) @ p["a"], {}),
}


def planned(make, optimizer):
    """The model's output under its plan at the target, and the plan's learning rates."""
    plan = pj.plan(pj.family(make, x=X), pj.mup, base=dict(width=BASE), target=dict(width=TARGET), optimizer=optimizer)
    params = plan.model.init(jax.random.key(0), X)
    return plan.model.apply(params, X), {leaf.path: leaf.factors.learning_rate for leaf in plan.leaves}


@pytest.mark.parametrize("name", SEEN_THROUGH)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_that_writes_its_initialization_as_numbers_is_the_plain_one(name, optimizer):
    """The plain one draws weights of std n^-1/2; the other writes std 1 and 1 / sqrt(n) instead, from the same draws."""
    body, more = SEEN_THROUGH[name]
    both = name in ("a sum of two products", "a difference", "a sum of a product and a moved one", "a gate on what goes in")
    ours, rates = planned(family(body, True, both, **more), optimizer)
    plain, expected = planned(family(body, False, both, **more), optimizer)
    np.testing.assert_allclose(ours, plain, rtol=2e-5, atol=1e-6)
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_finite_bias_in_front_of_the_number_is_kept():
    """``(h W + b) / n`` is ``h W / n + b``, with b as large at every width: b is multiplied by 64 / 16."""

    def make(width):
        def init(key, x):
            return {"u": jax.random.normal(key, (5, width)), "o": jax.random.normal(key, (width, 3)), "c": jnp.zeros(3)}

        return pj.Model(init, lambda p, x: (jnp.tanh(x @ p["u"]) @ p["o"] + p["c"][None]) / width)

    plan = pj.plan(pj.family(make, x=X), pj.mup, base=dict(width=BASE), target=dict(width=TARGET), optimizer="sgd")
    assert {leaf.path: leaf.factors.multiplier for leaf in plan.leaves}["['c']"] == pytest.approx(4.0)


NOBODYS = {
    "a gate over a root, and a product over it": lambda h, p, r: (lambda a, b: a * jax.nn.sigmoid(b / r) / r)(
        *jnp.split(h @ jnp.concatenate([p["a"], p["b"]], 1), 2, -1)
    ),
    "a function over a root, on a stream": lambda h, p, r: h + jnp.sin(h @ p["a"] / r + h @ p["b"] / r) / r,
    "a product that also goes on without it": lambda h, p, r: (lambda z: jnp.sin(z) + z / r)(h @ p["a"]) + h @ p["b"] / r,
}


@pytest.mark.parametrize("name", NOBODYS)
def test_a_number_that_is_nobodys_is_warned_of(name):
    with pytest.warns(UserWarning, match="multiplies an activation by a number that changes with the width .*0.5 times"):
        planned(family(NOBODYS[name], True, both=True), "adam")


def attention(combine, **leaves):
    """One layer of two heads whose size grows; `combine(logits, other, p, root)` makes what softmax takes."""

    def make(width):
        d = width // 2

        def init(key, x):
            keys = jax.random.split(key, 5)
            drawn = {name: jax.random.normal(k, (width, width)) * width**-0.5 for name, k in zip("qkvo", keys)}
            return drawn | {"e": jax.random.normal(keys[4], (7, width)), **{name: jnp.ones(shape) for name, shape in leaves.items()}}

        def apply(p, tokens):
            h = p["e"][tokens]
            q, k, v = ((h @ p[name]).reshape(*tokens.shape, 2, d) for name in "qkv")
            logits = combine(jnp.einsum("bthd,bshd->bhts", q, k), lambda: jnp.einsum("bthd,bshd->bhts", q, k[:, ::-1]), p, d**-0.5)
            return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v).reshape(*tokens.shape, width) @ p["o"]

        return pj.Model(init, apply)

    return make


LOGITS = {
    "plain": (lambda e, f, p, s: e * s, {}),
    "a learned temperature": (lambda e, f, p, s: e * p["t"][None] * s, {"t": (2, 1, 1)}),
    "a learned bias before the number": (lambda e, f, p, s: (e + p["c"][None, None]) * s, {"c": (4, 4)}),
    "a mask before the number": (lambda e, f, p, s: jnp.where(jnp.tril(jnp.ones((4, 4), bool)), e, -1e9) * s, {}),
    "two products": (lambda e, f, p, s: (e + f()) * s, {}),
}


@pytest.mark.parametrize("name", LOGITS)
def test_the_number_of_logits_is_counted_whatever_stands_before_it(name):
    """1 / sqrt(d) is there, 1 / d is wanted (Tensor Programs V, arXiv 2203.03466, definition 4.1): sqrt(16 / 64) is missing."""
    combine, leaves = LOGITS[name]
    tokens = np.zeros((2, 4), np.int32)
    fam = pj.family(attention(combine, **leaves), x=tokens)
    plan = pj.plan(fam, pj.mup, base=dict(width=BASE), target=dict(width=TARGET), optimizer="adam")
    assert {round(scaling.factor, 9) for scaling in plan.scalings} == {0.5}


def rooted(h):
    return jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


LAST = {
    # Flax's spelling: the gain multiplies the quotient, and the bias is added to what the two make of h.
    "a norm with gain and bias": lambda h, p: h * (rooted(h) * p["g"][None]) + p["b"][None],
    "a norm, then gain and bias": lambda h, p: (h * rooted(h)) * p["g"][None] + p["b"][None],
    # T5's spelling: the number is the gain's.
    "a norm and a gain": lambda h, p: p["g"][None] * (h * rooted(h)),
    "a residual stream": lambda h, p: h,
    "a function and a bias": lambda h, p: jnp.tanh(h * p["g"][None]) + p["b"][None],
}


@pytest.mark.parametrize("spelling", LAST)
@pytest.mark.parametrize("tied", [False, True], ids=["readout", "tied"])
def test_a_number_in_front_of_the_readout_is_the_number_behind_it(spelling, tied):
    """``(h / sqrt(n)) @ w`` is ``(h @ w) / sqrt(n)``, whatever h is a sum of, and nothing is warned of."""

    def make(before):
        def at(width):
            shapes = {"e": (4, width), "a": (width, width), "o": (width, 4)}
            if tied:
                del shapes["o"]

            def init(key, x):
                drawn = {n: jax.random.normal(k, s) for k, (n, s) in zip(jax.random.split(key, len(shapes)), shapes.items())}
                vectors = {"g": jnp.ones(width), "b": jnp.zeros(width)} if spelling != "a residual stream" else {}
                vectors = {"g": vectors["g"]} if spelling == "a norm and a gain" else vectors
                return drawn | {"a": drawn["a"] * width**-0.5} | vectors

            def apply(p, x):
                h = p["e"][x]
                h = LAST[spelling](h + jnp.tanh(h * rooted(h)) @ p["a"], p)
                w = p["e"].T if tied else p["o"]
                return (h * width**-0.5) @ w if before else (h @ w) * width**-0.5

            return pj.Model(init, apply)

        return at

    x = np.arange(4)
    outputs, rates = [], []
    for before in (True, False):
        plan = pj.plan(pj.family(make(before), x=x), pj.mup, base=dict(width=BASE), target=dict(width=TARGET), optimizer="adam")
        params = jax.tree.map(lambda leaf: leaf + 0.1, plan.network.init(jax.random.key(0), x))
        scaled = jax.tree.map(lambda leaf, scale: leaf * scale, params, plan.factors("init_scale", params))
        outputs.append(plan.model.apply(scaled, x))
        # What an entry moves by in a step of Adam, as it acts.
        rates.append([leaf.factors.learning_rate for leaf in plan.leaves])
    np.testing.assert_allclose(*outputs, rtol=2e-5, atol=1e-6)
    assert rates[0] == pytest.approx(rates[1])
