"""Blocks that a condition modulates (adaLN of DiT, arXiv 2212.09748): ``h + gate(c) f(norm(h) (1 + scale(c)) + shift(c))``.

By hand, Depth-muP (arXiv 2310.02244) at m times the depth: every branch is times m^-1/2, gates included, and all leaves of a block, those
of its modulation among them, learn with Adam at m^-1/2. Table 3 of Tensor Programs V (arXiv 2203.03466) at twice the width: matrices that
sum over the width, 1/2; a modulation of a finite condition is an input matrix. What all blocks see (the condition) is no block's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.zoo import as_users_run_it

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 5)), jnp.float32)
WIDTH, M = 16, 3


@pytest.fixture(autouse=True)
def _usual_promotion():
    with as_users_run_it(), jax.numpy_rank_promotion("allow"):
        yield


def layer_norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


# Leaves of the modulation, with their outputs over the width, and how they make shift, scale and gate of two sublayers.
MODULATIONS = {
    "one matrix": ({"m": 6}, lambda c, p: jnp.split(c @ p("m") + p("m_b"), 6, -1)),
    "one for each sublayer": (
        {"m": 3, "n": 3},
        lambda c, p: [part for name in "mn" for part in jnp.split(c @ p(name) + p(f"{name}_b"), 3, -1)],
    ),
    "one for each": ({f"m{j}": 1 for j in range(6)}, lambda c, p: [c @ p(f"m{j}") + p(f"m{j}_b") for j in range(6)]),
}
GATES = {"plain": lambda z: z, "one more": lambda z: 1 + z, "tanh": jnp.tanh}


def network(modulation="one matrix", wide=True, loop=False, first=False, gate="plain", dropped=False):
    """A family over width and depth, and its function with a factor on each branch."""
    outputs, modulate = MODULATIONS[modulation]

    def shapes(n, depth):
        k = n if wide else 4
        block = {name: (k, times * n) for name, times in outputs.items()} | {f"{name}_b": (times * n,) for name, times in outputs.items()}
        block |= {"mix": (n, n), "mix_b": (n,), "up": (n, 4 * n), "down": (4 * n, n), "down_b": (n,)}
        blocks = {f"block_{name}": (depth, *s) for name, s in block.items()} if loop else {}
        blocks |= {} if loop else {f"block{i}_{name}": s for i in range(depth) for name, s in block.items()}
        return {"u": (5, n), "v": (n, 3), "last": (k, 2 * n)} | ({"c0": (5, n), "c1": (n, n)} if wide else {}) | blocks

    def apply(p, x, depth, factor=1.0):
        c = jnp.tanh(x.mean(1) @ p["c0"]) @ p["c1"] if wide else x.mean(1)[:, :4]
        c = jax.nn.silu(c)[:, None]

        def block(h, get, made):
            opened = [{name: g(made[j]) for name, g in GATES.items()} for j in (2, 5)] if dropped else None
            one, two = (opened[j][gate] if opened else GATES[gate](made[2 + 3 * j]) for j in (0, 1))
            h = h + factor * one * (jnp.tanh(layer_norm(h) * (1 + made[1]) + made[0]) @ get("mix") + get("mix_b"))
            z = jax.nn.relu((layer_norm(h) * (1 + made[4]) + made[3]) @ get("up"))
            return h + factor * two * (z @ get("down") + get("down_b"))

        def step(h, w):
            return block(h, lambda name: w[f"block_{name}"], modulate(c, lambda name: w[f"block_{name}"])), None

        h = x @ p["u"]
        if loop:
            h = jax.lax.scan(step, h, {name: leaf for name, leaf in p.items() if name.startswith("block")})[0]
        else:
            gets = [lambda name, i=i: p[f"block{i}_{name}"] for i in range(depth)]
            ready = [modulate(c, get) for get in gets] if first else None
            for i, get in enumerate(gets):
                h = block(h, get, ready[i] if ready else modulate(c, get))
        shift, scale = jnp.split(c @ p["last"], 2, -1)
        return (layer_norm(h) * (1 + scale) + shift) @ p["v"]

    def make(width, depth):
        sizes = shapes(width, depth)

        def init(key, x):
            keys = jax.random.split(key, len(sizes))
            return {name: jax.random.normal(k, s) / (s[-2] ** 0.5 if len(s) > 1 else 1.0) for k, (name, s) in zip(keys, sizes.items())}

        return pj.Model(init, lambda p, x: apply(p, x, depth))

    return pj.family(make, x=X), apply


CASES = {
    "one matrix": {}, "a finite condition": {"wide": False}, "in a scan": {"loop": True}, "made first": {"first": True},
    "one for each sublayer": {"modulation": "one for each sublayer"}, "one for each": {"modulation": "one for each"},
    "one for each, in a scan": {"modulation": "one for each", "loop": True, "wide": False},
    "gates of one more": {"gate": "one more"}, "gates of tanh": {"gate": "tanh", "modulation": "one for each"},
    # What a function computes and drops is seen by nothing, so the gates serve the branch alone.
    "with results that are dropped": {"dropped": True},
    "one for each, with results that are dropped": {"dropped": True, "modulation": "one for each"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", [1, 2])
def test_a_modulation_is_part_of_its_block(name, base):
    family, apply = network(**CASES[name])
    plan = pj.plan(family, pj.depth_mup, {"width": 8, "depth": base}, {"width": WIDTH, "depth": M * base}, "adam")
    for leaf in plan.leaves:
        matrix = not leaf.path.endswith("_b']") and leaf.shape[-2] % WIDTH == 0
        block = M**-0.5 if "block" in leaf.path else 1.0
        assert leaf.factors.learning_rate == pytest.approx((0.5 if matrix else 1.0) * block), leaf.path
    params = plan.network.init(jax.random.key(0), X)
    np.testing.assert_allclose(plan.model.apply(params, X), apply(params, X, M * base, M**-0.5), rtol=1e-3, atol=1e-3)
    # Width alone: nothing of the function changes, and no learning rate knows the depth.
    flat = pj.plan(family, pj.mup, {"width": 8, "depth": base}, {"width": WIDTH, "depth": M * base}, "adam")
    assert {leaf.factors.multiplier for leaf in flat.leaves} == {1.0}
    assert not flat.scalings


def test_copies_in_a_loop_that_goes_through_no_layers_are_refused():
    """A sum of functions of one input, one a step, is an ensemble: no leaf acts on what the step before made."""

    def make(width, members):
        shapes = {"w": (members, 5, width), "v": (width, 3)}

        def init(key, x):
            return {name: jax.random.normal(key, s) for name, s in shapes.items()}

        def apply(p, x):
            return jax.lax.scan(lambda h, w: (h + jnp.tanh(x @ w), None), jnp.zeros((*x.shape[:2], width)), p["w"])[0] @ p["v"]

        return pj.Model(init, apply)

    with pytest.raises(ValueError, match=r"\['w'\] .*axis 0 \(grows with members\).* independent copies whose number grows"):
        pj.plan(pj.family(make, x=X), pj.mup, {"width": 8, "members": 2}, {"width": 16, "members": 4}, "adam")
