"""The tables against the papers', number by number, and against what theory says of their gradients."""

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj
from paperjax.parametrization import Exponent, abc, classify
from paperjax.parametrization.abc import COLUMNS

SCHEMES = {
    "standard": pj.standard, "standard_full_align": pj.standard_full_align, "ntp": pj.ntp, "mean_field": pj.mean_field, "mup": pj.mup,
    "mup_table8": pj.mup_table8, "mup_table9": pj.mup_table9, "depth_mup": pj.depth_mup, "completep": pj.completep, "spectral": pj.spectral,
    "u_mup": pj.u_mup, "wd_layerwise": pj.wd_layerwise,
}  # fmt: skip

# (input, hidden, output) of a, b, c for SGD, c for Adam. SP, NTP, muP's forms: Tensor Programs IV (arXiv 2011.14522), Table 1 and Tensor
# Programs V (arXiv 2203.03466), Tables 3, 8, 9. Full alignment: arXiv 2407.05872. u-muP: arXiv 2407.17465 (Adam; SGD by the symmetry).
T3 = ((0, 0, 0), (0, 0.5, 1), (-1, 0, 1), (0, 1, 1))
T8 = ((0, 0, 1), (0, 0.5, 0), (-1, 0, -1), (0, 1, 0))
PAPER = {
    "standard": ((0, 0, 0), (0, 0.5, 0.5), (0, 0, 0), (0, 0, 0)),
    "standard_full_align": ((0, 0, 0), (0, 0.5, 0.5), (-0.5, 0.5, 1), (0, 1, 1)),
    "ntp": ((0, 0.5, 0.5), (0, 0, 0), (0, 0, 0), (0, 0.5, 0.5)),
    "mean_field": ((0, 0.5, 1), (0, 0, 0), (-1, -1, -1), (0, 0.5, 0)),
    "mup": T3,
    "mup_table8": T8,
    "mup_table9": ((-0.5, 0, 0.5), (0.5, 0.5, 0.5), (0, 0, 0), (0.5, 1, 0.5)),
    "depth_mup": T3,
    "completep": T8,
    "spectral": T3,
    "u_mup": ((0, 0.5, 1), (0, 0, 0), (-1, -1, -1), (0.5, 0.5, 0)),
    "wd_layerwise": T8,
}  # fmt: skip

# Sizes of a gradient's entries in width, n^-e: Tensor Programs V, B.3, for Tables 3 and 8; the others through the symmetry.
EPS = {
    "mup": (1, 1, 0), "depth_mup": (1, 1, 0), "spectral": (1, 1, 0), "mup_table8": (1, 1, 1), "completep": (1, 1, 1),
    "wd_layerwise": (1, 1, 1), "mup_table9": (0.5, 1, 0.5), "mean_field": (1, 1.5, 1), "u_mup": (1, 1.5, 1),
    "ntp": (0.5, 1, 0.5), "standard": (0.5, 0.5, 0), "standard_full_align": (0.5, 0.5, 0),
}  # fmt: skip

UNIT = {"u_mup"}  # muP, but for an embedding that learns more slowly


def powers(table):
    return tuple(table[column].power(column) for column in COLUMNS)


@pytest.mark.parametrize("name", SCHEMES)
def test_exponents_are_the_papers(name):
    scheme = SCHEMES[name]
    assert (powers(scheme.a), powers(scheme.b), powers(scheme.c["sgd"]), powers(scheme.c["adam"])) == PAPER[name]
    assert powers(scheme.eps) == EPS[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_eps_is_the_size_of_the_gradient(name):
    # W = n^-a w: the gradient of w is n^-a times that of W, which is n^-(a+b) of the readout for what lies below it, and 1 for itself.
    (a_in, a_hidden, a_out), (_, _, b_out) = powers(SCHEMES[name].a), powers(SCHEMES[name].b)
    back = a_out + b_out
    assert powers(SCHEMES[name].eps) == (a_in + back, a_hidden + back, a_out)


@pytest.mark.parametrize(("name", "optimizer", "depth", "regime", "r"), [
    ("standard", "sgd", 2, "unstable", -1), ("standard", "adam", 2, "unstable", -1),
    ("standard_full_align", "sgd", 3, "unstable", 0), ("standard_full_align", "adam", 3, "unstable", 0),
    ("ntp", "sgd", 2, "kernel", 0.5), ("ntp", "adam", 1, "unstable", 0), ("mean_field", "sgd", 1, "feature learning", 0),
    *[(name, rule, depth, "feature learning", 0) for name in PAPER for rule in ("sgd", "adam") for depth in (1, 2, 5)
      if PAPER[name][0][2] + PAPER[name][1][2] == 1 and name not in UNIT],
    ("u_mup", "sgd", 3, "feature learning", 0), ("u_mup", "adam", 3, "feature learning", 0), ("u_mup", "adam", 1, "kernel", 0.5),
])  # fmt: skip
def test_regimes(name, optimizer, depth, regime, r):
    found = classify(SCHEMES[name], depth, optimizer)
    assert (found.regime, found.r) == (regime, r)
    assert found.faithful is (None if optimizer == "sgd" else True)


def test_ntp_under_adam_learns_features_in_the_input_layer_only():
    # NTP with Adam's c = (0, 1/2, 1/2) of the tables is full alignment in another form; with c = (1/2, 1, 1/2) it is a kernel.
    assert classify(pj.ntp, 2, "adam").regime == "unstable"
    kernel = abc("NTP, Adam", (0, 0.5, 0.5), (0, 0, 0), (0, 0, 0), (0.5, 1, 0.5), eps=(0.5, 1, 0.5))
    assert classify(kernel, 2, "adam")[:2] == ("kernel", 0.5)


def test_mup_forms_are_one():
    for other, theta in ((pj.mup_table8, (0, 0, 1)), (pj.mup_table9, (-0.5, 0, 0.5)), (pj.mean_field, (0, 0.5, 1))):
        moved = pj.mup.shifted(theta)
        assert (moved.a, moved.b, moved.c, moved.eps) == (other.a, other.b, other.c, other.eps)
    assert pj.mup.shifted((0, 0, 1)).shifted((0, 0, -1)).c == pj.mup.c
    sp = pj.standard_full_align.shifted((0, 0.5, 0.5))
    assert (sp.a, sp.b, sp.c["adam"]) == (pj.ntp.a, pj.ntp.b, pj.ntp.c["adam"])


def test_depth():
    # Tensor Programs VI (arXiv 2310.02244): 1/sqrt(L), Adam lr 1/sqrt(L), SGD lr 1. CompleteP (arXiv 2505.01618), Table 1: 1/L, lr 1.
    for scheme, multiplier, adam, sgd in ((pj.depth_mup, 0.5, 0.5, 1.0), (pj.completep, 0.25, 1.0, 4.0), (pj.u_mup, 0.5, 0.5, 1.0)):
        depth = scheme.depth
        assert (depth.multiplier(4), depth.eps_factor(4)) == (multiplier, multiplier)
        assert (depth.learning_rate_factor(4, "adam"), depth.learning_rate_factor(4, "sgd")) == (adam, sgd)
    alone = pj.mup.with_depth(1.0, learning_rate=False).depth
    assert (alone.multiplier(4), alone.learning_rate_factor(4, "adam")) == (0.25, 1.0)


def two_widths(n, m):
    """Hidden layers of two widths: n to m and back to n."""

    def init(key, x):
        keys = jax.random.split(key, 4)
        shapes = {"in": (x.shape[1], n), "up": (n, m), "down": (m, n), "out": (n, 3)}
        return {k: jax.random.normal(key, s) / s[0] ** 0.5 for key, (k, s) in zip(keys, shapes.items())}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["in"]) @ p["up"]) @ p["down"]) @ p["out"]

    return pj.Model(init, apply)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_spectral_is_its_paper(rule):
    # arXiv 2310.17813, Parametrization 1, evaluated by hand at both sizes.
    family = pj.family(two_widths, x=jnp.ones((2, 5)))
    base, target = {"n": 8, "m": 8}, {"n": 16, "m": 128}
    plan = pj.plan(family, pj.spectral, base=base, target=target, optimizer=rule)

    def paper(fan_in, fan_out):
        sigma = min(1, (fan_out / fan_in) ** 0.5) / fan_in**0.5
        return sigma, fan_out / fan_in if rule == "sgd" else 1 / fan_in

    sizes = {"in": ((5, 8), (5, 16)), "up": ((8, 8), (16, 128)), "down": ((8, 8), (128, 16)), "out": ((8, 3), (16, 3))}
    for leaf in plan.leaves:
        small, large = sizes[leaf.path[2:-2]]
        (s0, lr0), (s1, lr1) = paper(*small), paper(*large)
        assert leaf.init_std == pytest.approx(s1 / s0 / small[0] ** 0.5, rel=1e-3)  # the model's own base std is 1/sqrt(fan_in)
        assert leaf.factors.learning_rate == pytest.approx(lr1 / lr0)
    # muP knows fans, not aspects: it leaves 'down' larger.
    mup = pj.plan(family, pj.mup, base=base, target=target, optimizer=rule)
    ratio = {leaf.path: leaf.init_std for leaf in mup.leaves}["['down']"] / {leaf.path: leaf.init_std for leaf in plan.leaves}["['down']"]
    assert ratio == pytest.approx(8**0.5)


@pytest.mark.parametrize("rule", ["sgd", "adam", "muon"])
def test_spectral_is_mup_where_widths_grow_alike(rule):
    family = pj.family(lambda width: two_widths(width, 4 * width), x=jnp.ones((2, 5)))
    plans = [pj.plan(family, s, base={"width": 8}, target={"width": 64}, optimizer=rule) for s in (pj.spectral, pj.mup)]
    for ours, theirs in zip(plans[0].leaves, plans[1].leaves):
        assert ours.factors == pytest.approx(theirs.factors, rel=1e-12)
        assert (ours.path, ours.rule, ours.inside, ours.out) == (theirs.path, theirs.rule, theirs.inside, theirs.out)


def test_exponent_of_the_aspect_is_one_below_square():
    assert Exponent(aspect=1.0).factor((4, 16), base=(4, 4)) == 1.0
    assert Exponent(0.5, 0, 0.5).power("output") == 1.0


def test_layerwise_decay():
    # arXiv 2510.15262: matrices lr 1/d and decay sqrt(d), vectors constant lr and no decay.
    family = pj.family(lambda width: pj.models.transformer(width, 1, 2, vocab=7), x=jnp.ones((2, 4), int))
    for mode in ("coupled", "independent"):
        plan = pj.plan(family, pj.wd_layerwise, base={"width": 8}, target={"width": 32}, optimizer="adamw", weight_decay=mode)
        for leaf in plan.leaves:
            lr, decay = leaf.factors.learning_rate, leaf.factors.weight_decay
            shrinks = decay if mode == "independent" else lr * decay
            assert (lr, shrinks) == (pytest.approx((0.25, 0.5)) if leaf.role == "hidden" else (1.0, 0.0)), leaf


def biased(width):
    """An MLP with biases, and with a finite matrix before it, which is no vector."""
    shapes = {"a": (5, 4), "u": (4, width), "b": (width,), "v": (width, 3), "c": (3,)}

    def init(key, x):
        return {k: jax.random.normal(jax.random.fold_in(key, i), s) for i, (k, s) in enumerate(shapes.items())}

    return pj.Model(init, lambda p, x: jnp.tanh(x @ p["a"] @ p["u"] + p["b"][None]) @ p["v"] + p["c"][None])


@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_no_bias_is_decayed_where_vectors_are_not(mode):
    # arXiv 2510.15262: no decay of vector-like leaves; a bias of the outputs is one, though it does not grow.
    family = pj.family(biased, x=jnp.ones((2, 5)))

    def decays(scheme, target=32, optimizer="adamw"):
        plan = pj.plan(family, scheme, base={"width": 8}, target={"width": target}, optimizer=optimizer, weight_decay=mode)
        assert {leaf.path: leaf.role for leaf in plan.leaves}["['c']"] == "finite"
        return {leaf.path[2:-2]: leaf.factors.weight_decay for leaf in plan.leaves}

    undecayed = {"a": 1.0, "u": 0.0, "b": 0.0, "v": 0.0, "c": 0.0}
    assert decays(pj.wd_layerwise) == decays(pj.wd_layerwise, 8) == decays(pj.wd_layerwise, optimizer="muon") == undecayed
    assert decays(pj.wd_layerwise, optimizer="sgd")["c"] == decays(pj.mup)["c"] == 1.0
    # Columns may be left without decay by a parametrization that has no exponents of decay of its own.
    t8 = {"a": (0, 0, 1), "b": (0, 0.5, 0), "c_sgd": (-1, 0, -1), "c_adam": (0, 1, 0), "attention": 1.0}
    assert decays(abc("muP, vectors undecayed", **t8, no_decay=("input",))) == {**undecayed, "v": 1.0}
