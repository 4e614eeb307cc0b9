"""Layers that Flax numbers in one row have the plan of the same network with names written out, or none.

``Dense_7`` is one layer at one depth and another at another, so what is compared with the base's must be found by what it is used for.
"""

from collections import Counter
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.zoo import as_users_run_it

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
SMALL, LARGE = {"width": 8, "depth": 2}, {"width": 16, "depth": 6}
WIDE = nn.initializers.variance_scaling(4.0, "fan_in", "normal")


@pytest.fixture(autouse=True)
def _usual_promotion():
    with as_users_run_it():
        yield


class Net(nn.Module):
    """Layers of a kind between an embedding and a head, numbered by Flax or named."""

    width: int
    depth: Any
    kind: str
    named: bool

    @nn.compact
    def __call__(self, x):
        def dense(n, name, **settings):
            return nn.Dense(n, name=name if self.named else None, **settings)

        h = KINDS[self.kind](lambda name, **s: dense(s.pop("n", self.width), name, **s), self.depth, x)
        return dense(3, "head")(h)


def two_and_deep(d, depth, x):
    h = d("embed")(x)
    for i in range(2):
        h = h + d(f"first{i}")(nn.relu(h))
    for i in range(depth):
        h = h + d(f"b{i}")(nn.tanh(d(f"a{i}")(h)))
    return h


def every_second(d, depth, x):
    h = d("embed")(x)
    for i in range(depth):
        h = h + d(f"a{i}")(nn.relu(h))
        h = h + d(f"c{i}")(nn.tanh(d(f"b{i}")(h))) if i % 2 == 0 else h
    return h


def divided(d, depth, x):
    h = d("embed")(x)
    for i in range(depth):
        h = h + d(f"b{i}")(nn.tanh(d(f"a{i}")(h))) / depth**0.5
    return h


def divided_ends(d, depth, x):
    h = d("embed")(x)
    for i in range(depth):
        h = h + nn.tanh(d(f"a{i}")(h)) / depth**0.5
        h = h + nn.tanh(d(f"c{i}")(nn.relu(d(f"b{i}")(h))))
    return h


def wide_output(d, depth, x):
    h = d("embed")(x)
    for i in range(depth):
        h = h + d(f"b{i}", kernel_init=WIDE)(nn.tanh(d(f"a{i}")(h)))
    return h


def before_the_head(d, depth, x):
    h = d("embed")(x)
    for i in range(depth):
        h = h + d(f"b{i}")(nn.tanh(d(f"a{i}")(h)))
    return nn.tanh(d("last", kernel_init=WIDE)(h))


def modulated(d, depth, x):
    """adaLN (arXiv 2212.09748), with gates that are zero at first."""
    c, h = nn.silu(d("condition")(x)), d("embed")(x)
    for i in range(depth):
        shift, scale, gate = jnp.split(d(f"m{i}", n=3 * h.shape[-1], kernel_init=nn.initializers.zeros)(c), 3, axis=-1)
        h = h + gate * d(f"b{i}")(nn.relu(d(f"a{i}")(h * (1 + scale) + shift)))
    return h


def towers(d, depth, x):
    a, b = d("embed_a")(x), d("embed_b")(x)
    for i in range(2):
        a = a + d(f"a{i}")(nn.relu(a))
    for i in range(depth):
        b = b + d(f"b{i}")(nn.relu(b))
    return a * b


def stages(d, depths, x):
    h = d("embed")(x)
    for s, depth in enumerate(depths):
        h = d(f"down{s}")(h)
        for i in range(depth):
            h = h + d(f"stage{s}_b{i}")(nn.relu(d(f"stage{s}_a{i}")(h)))
    return h


def late(n, d, depth, x, **settings):
    h = d("embed")(x)
    for i in range(depth):
        h = h + d(f"a{i}")(nn.relu(h))
        h = h + d(f"c{i}", **settings)(nn.tanh(d(f"b{i}", **({"n": n} if n else {}), **settings)(h))) if i % 4 == 3 else h
    return h


KINDS = {
    "two and deep": two_and_deep, "every second": every_second, "divided": divided, "divided ends": divided_ends,
    "wide output": wide_output, "before the head": before_the_head, "modulated": modulated, "towers": towers, "stages": stages,
    "late": lambda d, depth, x: late(None, d, depth, x, kernel_init=WIDE), "late, narrow": lambda d, depth, x: late(3, d, depth, x),
}  # fmt: skip
SIZES = {
    "every second": ({"width": 8, "depth": 3}, LARGE),
    "stages": ({"width": 8, "depth": (1, 2, 1)}, {"width": 16, "depth": (1, 6, 1)}),
    "late": ({"width": 8, "depth": 4}, {"width": 16, "depth": 12}),
    "late, narrow": ({"width": 8, "depth": 4}, {"width": 16, "depth": 12}),
}


def planned(kind, named, scheme=pj.depth_mup, sizes=None, **settings):
    base, target = sizes or SIZES.get(kind, (SMALL, LARGE))
    family = pj.family(lambda width, depth: Net(width, depth, kind, named), x=X)
    return pj.plan(family, scheme, base=base, target=target, optimizer="adam", **settings)


def rows(plan):
    factors = [(leaf.shape, leaf.role, tuple(float(f"{factor:.3g}") for factor in leaf.factors)) for leaf in plan.leaves]
    return Counter(factors), sorted(float(f"{scaling.factor:.4g}") for scaling in plan.scalings)


@pytest.mark.parametrize("kind", KINDS)
def test_numbered_layers_have_the_plan_of_named_ones(kind):
    assert rows(planned(kind, False)) == rows(planned(kind, True))


# Of some kernels: multiplier, init scale, and Adam's learning rate times n = 2, for Depth-muP at three times the depth. Flax makes b of
# ``b(tanh(a(h)))`` first, and numbers it so.
R = 3**-0.5
BY_HAND = {
    "two and deep": {"Dense_1": (1, 1, 1), "Dense_2": (1, 1, 1), "Dense_3": (R, 1, R), "Dense_4": (1, 1, R), "Dense_13": (R, 1, R)},
    # The model divides by sqrt(L) itself.
    "divided": {"Dense_1": (1, 1, R), "Dense_2": (1, 1, R), "Dense_11": (1, 1, R), "Dense_12": (1, 1, R)},
    "wide output": {"Dense_1": (R, 1, R), "Dense_2": (1, 1, R), "Dense_11": (R, 1, R), "Dense_12": (1, 1, R)},
    "before the head": {"Dense_11": (R, 1, R), "Dense_12": (1, 1, R), "Dense_13": (1, 1, 1)},
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_numbered_layers_by_hand(kind):
    """arXiv 2310.02244: branches times 3^-1/2, Adam's learning rate too; arXiv 2203.03466, Table 3, for hidden matrices at n = 2."""
    found = {leaf.path: leaf.factors for leaf in planned(kind, False).leaves}
    for name, wanted in BY_HAND[kind].items():
        f = found[f"['{name}']['kernel']"]
        # The model's own standard deviation falls as n^-1/2.
        assert (f.multiplier, f.init_scale, 2 * f.learning_rate) == pytest.approx(wanted, rel=1e-3), name


def test_a_kind_of_layer_that_the_base_has_none_of_is_refused():
    sizes = SMALL, LARGE
    # Of its own shape it has nothing to be compared with, and under any parametrization its axes could not be told.
    for scheme in (pj.mup, pj.depth_mup):
        with pytest.raises(
            ValueError, match=r"\['Dense_5'\]\['kernel'\] of shape \(3, 16\).* no leaf that is numbered with it has that shape"
        ):
            planned("late, narrow", False, scheme, sizes)
    with pytest.raises(
        ValueError, match=r"\['Dense_5'\]\['kernel'\]: no leaf of the base has its place .*starts at other numbers.*init_std="
    ):
        planned("late", False, sizes=sizes)
    # Where the widths alone are scaled it is compared with itself.
    planned("late", False, pj.mup, sizes)
