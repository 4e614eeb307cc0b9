"""The printed plan: everything a reader checks against the paper, within the terminal."""

import jax.numpy as jnp
import pytest

import paperjax as pj
from paperjax.parametrization.show import NUMBERS, broken, merged, render

TOKENS = jnp.zeros((2, 4), int)


def loop(width, depth):
    """A tied transformer-like net of a Python loop with long names."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(50, width)
            h = embed(x) + self.param("position", nn.initializers.normal(0.02), (x.shape[1], width))[None]
            for _ in range(depth):
                h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
            return embed.attend(nn.LayerNorm()(h))

    return Net()


@pytest.fixture(scope="module")
def plan():
    family = pj.family(loop, x=TOKENS)
    return pj.plan(family, pj.depth_mup, base={"width": 8, "depth": 1}, target={"width": 32, "depth": 4}, optimizer="adamw")


@pytest.mark.parametrize("width", [120, 160])
def test_every_column_within_the_terminal(plan, width):
    text = render(plan, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text.replace("{0…3}", "")  # nothing is cut
    head = next(line for line in lines if "leaf" in line)
    assert all(name in head for name in ("leaf", "role", "axes", *NUMBERS))
    for role in ("hidden", "vector", "embedding+output"):
        assert role in text
    assert "Depth-muP, adam rule" in text
    assert "lr × decay" in text
    assert "width=8, depth=1 → width=32, depth=4" in text
    # Alike layers are one row, and what no leaf can carry stands below.
    assert sum("query" in line.replace("ProductAttention", "") for line in lines) == 2  # kernel and bias, of four layers each
    assert "× 0.25 on the result of dot_general: output use of tied ['Embed_0']['embedding']" in text
    assert "4 places: logits of d^-0.5 to d^-1" in text


def test_the_product_of_lr_and_decay(plan):
    row = next(line for line in render(plan, 160).splitlines() if "query.kernel" in line)
    # Adam lr 1/(n sqrt(m)) = 1/8 and decay × 8: 1.
    assert row.split()[-5:] == ["1", "0.125", "0.125", "8", "1"]
    assert str(plan) == render(plan, 160)


def test_muon_and_finite_leaves_are_named():
    family = pj.family(lambda width: pj.models.mlp(width, 2, 3), x=jnp.ones((1, 5)))
    text = str(pj.plan(family, pj.mup, base={"width": 8}, target={"width": 16}, optimizer="muon", weight_decay="independent"))
    assert "hidden, Muon" in text
    assert "finite" in text
    assert "decay alone" in text


def test_paths():
    assert merged(["['a']['w']"]) == "a.w"
    assert merged([".stack[0].w", ".stack[2].w", ".stack[1].w"]) == "stack[{0…2}].w"
    assert broken("a.b", 20) == "a.b"
    assert broken("blocks_{0…3}.LayerNorm_0.scale", 16).splitlines() == ["blocks_{0…3}", ".LayerNorm_0", ".scale"]
