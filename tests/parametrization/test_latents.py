"""Latents and queries that a network learns (Perceiver, arXiv 2103.03206; DETR, 2005.12872) scale as an embedding does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj

N = 3
TOKENS = np.zeros((2, 4), np.int32)
SPELLINGS = {
    "given to each example": lambda q, x: jnp.broadcast_to(q, (len(x), *q.shape)),
    "added to zeros of the data": lambda q, x: 0.0 * x[:, :1, None].astype(q.dtype) + q[None],
    "looked up by the data": lambda q, x: q[jnp.arange(N)[None] + 0 * x[:, :1]],
}


def perceiver(spelling, norm=True):
    """Latents that attend to embedded tokens, in pre-norm blocks of two branches."""

    def make(width, depth=2):
        layers = {f"{n}{i}": (width, width) for n in ("q", "k", "v", "o", "f") for i in range(depth)}
        shapes = {"table": (5, width), "latents": (N, width), "out": (width, 2)} | layers
        shapes |= {f"g{i}": (width,) for i in range(depth)}

        def init(key, x):
            keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
            fixed = ("table", "latents")
            drawn = {n: jax.random.normal(keys[n], s) / (1 if n in fixed else s[0] ** 0.5) for n, s in shapes.items() if n[0] != "g"}
            return drawn | {n: jnp.ones(s) for n, s in shapes.items() if n[0] == "g"}

        def normed(h):
            return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) if norm else h

        def apply(p, x):
            e, h = p["table"][x], SPELLINGS[spelling](p["latents"], x)
            for i in range(depth):
                z = normed(h) * p[f"g{i}"][None, None]
                weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", z @ p[f"q{i}"], e @ p[f"k{i}"]) / width)
                h = h + jnp.einsum("bqk,bkd->bqd", weights, e @ p[f"v{i}"]) @ p[f"o{i}"]
                h = h + jnp.tanh(normed(h)) @ p[f"f{i}"]
            return h.mean(1) @ p["out"]

        return pj.Model(init, apply)

    return make


def planned(make, scheme, rule):
    fam = pj.family(make, x=TOKENS)
    return pj.plan(fam, scheme, base=dict(width=16, depth=2), target=dict(width=64, depth=8), optimizer=rule)


@pytest.mark.parametrize(("scheme", "rule"), [(pj.mup, "adam"), (pj.mup, "sgd"), (pj.depth_mup, "adam"), (pj.completep, "adam")])
@pytest.mark.parametrize("norm", [True, False])
def test_latents_have_one_plan_however_they_are_spelt(norm, scheme, rule):
    # What zeros of the tokens are added to is a stream that begins with the tokens, and so their table would be in its branches.
    spellings = [spelling for spelling in SPELLINGS if scheme is pj.mup or "zeros" not in spelling]
    plans = [planned(perceiver(spelling, norm), scheme, rule) for spelling in spellings]
    first, *others = [{leaf.path: (leaf.factors, leaf.init_std) for leaf in plan.leaves} for plan in plans]
    for other in others:
        for path, (factors, std) in first.items():
            assert factors == pytest.approx(other[path][0]), path
            assert std == pytest.approx(other[path][1]), path
    # Table 3 of Tensor Programs V (arXiv 2203.03466): input weights keep std and Adam's rate, and SGD's is times the width.
    factors, std = first["['latents']"]
    assert (std, factors.learning_rate) == pytest.approx((1.0, 4.0 if rule == "sgd" else 1.0), rel=1e-3)


def test_the_first_branch_on_latents_is_a_branch():
    """The stream that begins with them is one: all of the first block's leaves have the factors of the last block's."""
    factors = {leaf.path.strip("[]'"): leaf.factors for leaf in planned(perceiver("given to each example"), pj.depth_mup, "adam").leaves}
    for name in "gqkvof":
        assert factors[f"{name}0"] == pytest.approx(factors[f"{name}7"])
    assert factors["o0"].multiplier == factors["f0"].multiplier == pytest.approx(1 / 2)
    assert factors["latents"].multiplier == factors["latents"].learning_rate == 1
