"""Leaves that start at a constant which changes with the size: a number of the model's own, which the trace cannot assign."""

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj

TOKENS = jnp.zeros((2, 4), jnp.int32)
BASE, TARGET = {"width": 8}, {"width": 32}


def attention(start, scale=lambda logits, t, size: logits * t):
    """Two heads whose size grows, with a temperature that is trained."""

    def net(width):
        size = width // 2
        shapes = {"e": (5, width), "q": (width, width), "k": (width, width), "v": (width, width), "o": (width, 3)}

        def init(key, x):
            keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
            drawn = {name: jax.random.normal(keys[name], shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
            return {**drawn, "t": start(size)}

        def apply(p, tokens):
            h = p["e"][tokens]
            q, k, v = (jnp.reshape(h @ p[name], (2, 4, 2, size)) for name in "qkv")
            logits = scale(jnp.einsum("bqhd,bkhd->bhqk", q, k), p["t"], size)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
            return jnp.reshape(mixed, (2, 4, width)) @ p["o"]

        return pj.Model(init, apply)

    return pj.family(net, x=TOKENS)


def gain(value, name="g"):
    """``x / |x|`` times a gain."""

    def net(width):
        def init(key, x):
            u, o = jax.random.split(key)
            drawn = {"u": jax.random.normal(u, (3, width)), "o": jax.random.normal(o, (width, 2)) * width**-0.5}
            return {**drawn, name: jnp.full((1, width), value(width))}

        def apply(p, x):
            h = x @ p["u"]
            return jnp.tanh(h / jnp.sqrt(jnp.sum(h**2, -1, keepdims=True)) * p[name]) @ p["o"]

        return pj.Model(init, apply)

    return pj.family(net, x=jnp.ones((4, 3)))


REFUSED = {
    # At the base heads have size 4, at the target 16; 1/2 and 1/4.
    "temperature": (attention(lambda d: jnp.full((), d**-0.5)), "t", "0.25, and at 0.5 at"),
    "temperature by head": (attention(lambda d: jnp.full((1, 2, 1, 1), d**-0.5)), "t", "0.25, and at 0.5 at"),
    "logarithm of it": (
        attention(lambda d: jnp.log(jnp.full((), d**-0.5)), lambda z, t, d: z * jnp.exp(t)), "t", "-1.386, and at -0.6931 at",
    ),
    "gain of sqrt(d)": (gain(lambda d: d**0.5), "g", "5.657, and at 2.828 at"),
    "gain that vanishes": (gain(lambda d: float(d < 10)), "g", "0, and at 1 at"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", [pj.mup, pj.mup_table9, pj.standard, pj.depth_mup], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name, scheme):
    family, leaf, values = REFUSED[name]
    with pytest.raises(ValueError, match=rf"leaf \['{leaf}'\]: all its entries start at {values} the base.*multiply by the number"):
        pj.plan(family, scheme, base=BASE, target=TARGET)
    # At the base nothing changes.
    assert pj.plan(family, scheme, base=BASE, target=BASE).leaves


def factors(family, **more):
    plan = pj.plan(family, pj.mup, base=BASE, target=TARGET, optimizer="adam", **more)
    return plan, {leaf.path: leaf.factors for leaf in plan.leaves}


def test_the_number_in_the_models_code_is_read():
    _, found = factors(gain(lambda d: 1.0))
    # Entries of x / |x| over n coordinates are of order n^-1/2; to be of order 1 the gain is times 2 at four times the width.
    assert (found["['g']"].multiplier, found["['g']"].init_scale) == pytest.approx((2.0, 1.0))


def test_a_told_init_takes_it_as_it_stands():
    plan, found = factors(attention(lambda d: jnp.full((), d**-0.5)), init_std={"['t']": lambda fan_in, fan_out: 1.0})
    assert found["['t']"] == (1.0, 1.0, 1.0, 1.0, 1.0)
    assert float(plan.model.init(jax.random.key(0), TOKENS)["t"]) == pytest.approx(0.25)
    # As a function of the fans it takes the number out: the gain starts at the base's sqrt(8).
    plan, found = factors(gain(lambda d: d**0.5), init_std={"['g']": lambda fan_in, fan_out: fan_out**0.5})
    assert found["['g']"].init_scale == pytest.approx(0.5)
    assert jnp.allclose(plan.model.init(jax.random.key(0), jnp.ones((4, 3)))["g"], 8**0.5)


def test_a_mean_and_constants_that_stay_are_none():
    def net(width):
        shapes = {"u": (3, width), "b": (1, width), "v": (width, 1)}
        values = {"u": 0.5, "b": 0.0, "v": 1 / width}
        return lambda key, x: {k: jnp.full(shapes[k], values[k]) for k in shapes}, lambda p, x: jnp.tanh(x @ p["u"] + p["b"]) @ p["v"]

    _, found = factors(pj.family(net, x=jnp.ones((4, 3))))
    assert {path: f.init_scale for path, f in found.items()} == dict.fromkeys(("['u']", "['b']", "['v']"), 1.0)


def test_a_constant_by_the_number_of_its_layer_plans_with_a_word_under_depth():
    """The third layer of four has no like among the two of the base; its start is its place's, so the plan is that of equal starts."""

    def family(start):
        def make(width, depth):
            def init(key, x):
                keys = jax.random.split(key, depth + 2)
                draw = [
                    {"w": jax.random.normal(k, (width, width)) * width**-0.5, "g": jnp.full(width, start(i))}
                    for i, k in enumerate(keys[2:])
                ]
                return {"u": jax.random.normal(keys[0], (5, width)), "layers": draw, "o": jax.random.normal(keys[1], (width, 3))}

            def apply(p, x):
                h = x @ p["u"]
                for q in p["layers"]:
                    h = h + jnp.tanh(h * q["g"][None]) @ q["w"]
                return h @ p["o"]

            return pj.Model(init, apply)

        x = jnp.ones((2, 5))
        return pj.plan(pj.family(make, x=x), pj.depth_mup, base=dict(width=8, depth=2), target=dict(width=32, depth=4), optimizer="adam")

    with pytest.warns(UserWarning, match=r"\['g'\]: all its entries start at .*number of the layer"):
        found = family(lambda i: 0.8 - 0.1 * i)
    assert [leaf.factors for leaf in found.leaves] == [leaf.factors for leaf in family(lambda i: 0.8).leaves]
