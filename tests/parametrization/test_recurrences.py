"""Depth schemes where loops run over time, in a branch or around the layers: whose the leaves in the carries are."""

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj
from tests.parametrization.test_depth import factors, network, norm


def read_first(step, *names):
    """A recurrence over the first axis whose state is read before it is written, so that leaves act in what it carries."""

    def mixer(p, y):
        return jax.lax.scan(lambda s, a: (step(p, s, a), s), jnp.zeros_like(y[0]), y)[1]

    return mixer, names


RECURRENCES = {
    "decay": read_first(lambda p, s, a: jax.nn.sigmoid(p["w"]) * s + a @ p["k"], "w", "k"),
    "decay of a matrix": read_first(lambda p, s, a: jnp.exp(-jnp.exp(p["w"])) * s + (a @ p["k"]) * (a @ p["q"]), "w", "k", "q"),
    "recurrent": read_first(lambda p, s, a: jnp.tanh(s @ p["k"] + a @ p["q"]), "k", "q"),
    "recurrent, with a stream of its own": read_first(lambda p, s, a: s + jnp.tanh(s @ p["k"] + a @ p["q"]), "k", "q"),
    "recurrent, with a stream that fades in time": read_first(lambda p, s, a: 0.9 * s + jnp.tanh(s @ p["k"] + a @ p["q"]), "k", "q"),
}


@pytest.mark.parametrize("looped", [False, True], ids=["python", "scan"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_what_acts_in_the_state_of_a_recurrence_in_a_branch_is_the_branchs(name, looped):
    """Adam's rates in a branch are times m^(alpha - 1), its eps times m^-alpha (arXiv 2310.02244; 2505.01618), m = 4."""
    mixer, names = RECURRENCES[name]

    def make(depth, width=8):
        inner = {n: (width,) if n == "w" else (width, width) for n in (*names, "o")}
        many = {n: (depth, *s) for n, s in inner.items()} if looped else {f"{n}{i}": s for n, s in inner.items() for i in range(depth)}

        def block(h, p):
            return h + mixer(p, norm(h)) @ p["o"], None

        def apply(p, x):
            h = x @ p["u"]
            if looped:
                return jax.lax.scan(block, h, {n: p[n] for n in inner})[0] @ p["v"]
            for i in range(depth):
                h, _ = block(h, {n: p[f"{n}{i}"] for n in inner})
            return h @ p["v"]

        return network({"u": (5, width), "v": (width, 3)} | many, apply)

    for scheme, rate, eps in ((pj.depth_mup, 1 / 2, 1 / 2), (pj.completep, 1.0, 1 / 4)):
        plan, found = factors(make, dict(depth=2), dict(depth=8), scheme)
        assert not plan.scalings
        for path, its in found.items():
            inside, writes = path[0] in (*names, "o"), path[0] == "o"
            wanted = (rate, eps, eps if writes else 1.0) if inside else (1.0, 1.0, 1.0)
            assert (its.learning_rate, its.eps, its.multiplier) == pytest.approx(wanted), path


def test_a_branch_that_the_next_layer_adds_is_refused():
    """As Mamba's blocks (arXiv 2312.00752) do: in a scan the first step adds the embedding, which a factor must leave alone."""

    def make(depth):
        def layer(carry, w):
            made, h = carry
            h = h + made
            return (jax.nn.relu(norm(h)) @ w, h), None

        def apply(p, x):
            made, h = jax.lax.scan(layer, (x @ p["u"], jnp.zeros((len(x), 8))), p["w"])[0]
            return (h + made) @ p["v"]

        return network({"u": (5, 8), "w": (depth, 8, 8), "v": (8, 3)}, apply)

    with pytest.raises(ValueError, match="adds in each step what the step before it made"):
        factors(make, dict(depth=2), dict(depth=4))
    assert factors(make, dict(depth=2), dict(depth=4), pj.mup)[1]["w"].multiplier == 1


@pytest.mark.parametrize("looped", [False, True], ids=["python", "scan"])
def test_a_loop_over_time_around_the_layers_does_not_make_them_share(looped):
    """All layers in each step: each leaf is used as often at the base, and a state that is read first is still the branch's."""

    def make(depth, width=8):
        many = {"w": (depth, width)} | {n: (depth, width, width) for n in "kof"}
        layers = many if looped else {f"{n}{i}": s[1:] for n, s in many.items() for i in range(depth)}

        def layer(h, given):
            p, s = given
            after = p["w"] * s + jnp.tanh(norm(h) @ p["k"])
            h = h + s @ p["o"]
            return h + jnp.tanh(h) @ p["f"], after

        def apply(p, x):
            def step(states, h):
                if looped:
                    h, states = jax.lax.scan(layer, h, ({n: p[n] for n in many}, states))
                    return states, h
                after = []
                for i, s in enumerate(states):
                    h, s = layer(h, ({n: p[f"{n}{i}"] for n in many}, s))
                    after.append(s)
                return tuple(after), h

            start = jnp.zeros((depth, width)) if looped else (jnp.zeros(width),) * depth
            return jax.lax.scan(step, start, x @ p["u"])[1] @ p["v"]

        return network({"u": (5, width), "v": (width, 3)} | layers, apply)

    plan, found = factors(make, dict(depth=2), dict(depth=8))
    rates = [its.learning_rate for path, its in found.items() if path[0] in "wkof"]
    assert rates == pytest.approx([1 / 2] * len(rates))
    assert found["u"].learning_rate == found["v"].learning_rate == 1
    # A leaf that time runs over cannot be multiplied for the branch alone.
    assert [s.factor for s in plan.scalings] == pytest.approx([1 / 2] * (2 if looped else 16))
