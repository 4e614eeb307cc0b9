"""What `read` finds of the zoo is what is written beside each of its models; what it cannot tell is refused, and settled by `uses`."""

import math
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.model import split
from paperjax.trace import Program, Use, read
from tests.trace.zoo_models import GPT, ROWS, SEQUENCE, TOKENS, ZOO, Case


@pytest.fixture(scope="module")
def programs():
    """Each model of the zoo is read once for all tests here."""
    known: dict[str, Program] = {}

    def program(name: str) -> Program:
        if name not in known:
            known[name] = read(ZOO[name].family, ZOO[name].base, ZOO[name].target)
        return known[name]

    return program


@pytest.mark.parametrize("name", ZOO)
def test_what_is_read_is_what_was_written_by_hand(name, programs):
    case, program = ZOO[name], programs(name)
    assert {leaf.path: leaf.role for leaf in program.leaves} == dict(case.roles)
    paths = [leaf.path for leaf in program.leaves]
    assert [(add.repeats, tuple(sorted(paths[i] for i in add.writers))) for add in program.adds] == list(case.adds)
    assert {growth[:2] for growth in program.growths} <= {(case.depth_ratio, case.depth_ratio)}
    assert [(found.size, round(exponent, 6)) for found, _, exponent in program.interactions] == list(case.interactions)


@pytest.mark.parametrize("name", ZOO)
def test_axes_and_shapes_agree_with_the_networks_themselves(name, programs):
    """The slow way: shapes of the networks built at both sizes."""
    case, program = ZOO[name], programs(name)
    there = jax.tree_util.tree_leaves_with_path(split(case.family.shapes(**case.target))[0])
    assert [(leaf.path, leaf.shape) for leaf in program.leaves] == [(jax.tree_util.keystr(p), leaf.shape) for p, leaf in there]
    for leaf in program.leaves:
        assert [bool(names) for names in leaf.infinite] == [a != b for a, b in zip(leaf.shape, leaf.base_shape)]
        for site in leaf.sites:
            named = (*site.inside, *site.out, *site.stack, *site.window)
            assert len(set(named)) == len(named)
            assert set(named) <= set(range(len(leaf.shape)))
            # Every infinite axis has a part to play, and a use of a leaf is where an activation is made.
            assert {axis for axis, names in enumerate(leaf.infinite) if names} <= set(named)
            assert 0 <= site.node < len(program.walk.nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linen mlp", "cnn", "gpt, remat, scan axis 1", "equinox mlp", "nnx transformer", "moe", "flax rnn", "vit"]
)
def test_laws_are_those_of_a_drawn_network(name, programs):
    """Mean and standard deviation against a draw: within 4.5 standard errors, here of about 400 numbers."""
    case, program = ZOO[name], programs(name)
    params = case.family(**case.target).init(jax.random.key(1), jnp.zeros(case.x.shape, case.x.dtype))
    for leaf, drawn in zip(program.leaves, jax.tree.leaves(split(params)[0])):
        entries = np.asarray(drawn, np.float64).ravel()
        if leaf.law.kind == "constant":
            assert np.ptp(entries) == 0
            np.testing.assert_allclose(entries[0], leaf.law.mean)
            continue
        assert leaf.law.kind == "random", leaf
        # Orthogonal columns have sums of squares that are exact; others are near normal, with kurtosis at most 3.
        error = leaf.law.std / math.sqrt(entries.size)
        assert abs(entries.mean() - leaf.law.mean) < 4.5 * error, leaf.path
        assert abs(np.sqrt((entries**2).mean()) - leaf.law.std) < 4.5 * error / math.sqrt(2) + 1e-3 * leaf.law.std, leaf.path


def test_nothing_is_allocated_at_a_size_that_could_not_be():
    """Two hidden matrices of 2^40 numbers each: 8 terabytes in float32."""
    family = pj.family(
        lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(width), nn.Dense(1)]), x=ROWS
    )
    before = sum(array.nbytes for array in jax.live_arrays())
    program = read(family, {"width": 2**10}, {"width": 2**20})
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
    hidden = [leaf for leaf in program.leaves if leaf.role == "hidden"]
    assert [leaf.shape for leaf in hidden] == [(2**20, 2**20)] * 2
    # LeCun normal: variance 1 / fan_in.
    assert [(round(leaf.law.std * 2**10, 3), round(leaf.base_law.std * 2**5, 3)) for leaf in hidden] == [(1.0, 1.0)] * 2


def test_a_loop_may_number_layers_of_several_kinds_in_one_row():
    def make(width: int, depth: int) -> nn.Module:
        return nn.Sequential([nn.Dense(width), *[layer for _ in range(depth) for layer in (nn.relu, nn.Dense(width))], nn.Dense(3)])

    program = read(pj.family(make, x=ROWS), {"width": 8, "depth": 1}, {"width": 16, "depth": 3})
    roles = {leaf.path: leaf.role for leaf in program.leaves if "kernel" in leaf.path}
    numbers = {0: "input", 2: "hidden", 4: "hidden", 6: "hidden", 7: "output"}
    assert roles == {f"['layers_{i}']['kernel']": role for i, role in numbers.items()}
    assert all(names <= {"width"} for leaf in program.leaves for names in leaf.infinite)


# What cannot be told ----------------------------------------------------------------------------------------------------

KEY = jax.random.key


def pair(shapes, apply):
    """A bare model whose leaves are normal, of these shapes."""

    def init(key, x):
        return {name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (name, shape) in enumerate(shapes.items())}

    return init, apply


def weight_norm(width):
    shapes = {"u": (5, width), "v": (width, width), "g": (width,), "out": (width, 3)}
    return pair(shapes, lambda p, x: jnp.tanh(x @ p["u"]) @ (p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=0))[None]) @ p["out"])


def standardised(width):
    """Weight standardisation (arXiv 1903.10520)."""

    def apply(p, x):
        w = (p["w"] - p["w"].mean(0, keepdims=True)) / jnp.std(p["w"], axis=0, keepdims=True)
        return jnp.tanh(x @ p["u"]) @ w @ p["out"]

    return pair({"u": (5, width), "w": (width, width), "out": (width, 3)}, apply)


def lora(width):
    shapes = {"u": (5, width), "w": (width, width), "a": (width, 2), "b": (2, width), "out": (width, 3)}
    return pair(shapes, lambda p, x: jnp.tanh(x @ p["u"]) @ (p["w"] + p["a"] @ p["b"]) @ p["out"])


def hypernetwork(width):
    shapes = {"u": (5, width), "z": (4,), "h": (4, width, width), "out": (width, 3)}
    return pair(shapes, lambda p, x: jnp.tanh(x @ p["u"]) @ jnp.einsum("z,zio->io", p["z"], p["h"]) @ p["out"])


def experts(width, n):
    """Independent experts share one input; their results are averaged."""
    shapes = {"u": (5, width), "up": (n, width, 8), "down": (n, 8, width), "out": (width, 3)}

    def apply(p, x):
        z = jax.vmap(lambda h, up, down: jnp.tanh(h @ up) @ down, (None, 0, 0))(x @ p["u"], p["up"], p["down"])
        return z.mean(0) @ p["out"]

    return pair(shapes, apply)


def mixture(width, n):
    """One layer of experts, weighted by a router: nothing but the weighted sum says that the axis counts copies."""
    shapes = {"u": (5, width), "gate": (width, n), "w": (n, width, width), "out": (width, 3)}

    def apply(p, x):
        h = x @ p["u"]
        return jnp.einsum("be,ebf->bf", jax.nn.softmax(h @ p["gate"]), jnp.einsum("bd,edf->ebf", h, p["w"])) @ p["out"]

    return pair(shapes, apply)


def ensemble_by_scan(width, n):
    """A scan over members is no depth: no member sees another's result."""
    shapes = {"u": (5, width), "w": (n, width, width), "out": (width, 3)}

    def apply(p, x):
        h = x @ p["u"]
        total, _ = jax.lax.scan(lambda total, w: (total + jnp.tanh(h @ w), None), jnp.zeros_like(h), p["w"])
        return total @ p["out"]

    return pair(shapes, apply)


def unused(width):
    shapes = {"u": (5, width), "spare": (width, width), "out": (width, 3)}
    return pair(shapes, lambda p, x: x @ p["u"] @ p["out"])


def opaque(width):
    def apply(p, x):
        w = jax.pure_callback(lambda w: np.asarray(w), jax.ShapeDtypeStruct((width, width), jnp.float32), p["w"])
        return jnp.tanh(x @ p["u"]) @ w @ p["out"]

    return pair({"u": (5, width), "w": (width, width), "out": (width, 3)}, apply)


def per_head_mix(width):
    """Heads cut out of a matrix, each contracted by itself: one axis is summed over and counted at once."""

    def apply(p, x):
        h = (x @ p["u"]).reshape(2, 4, -1)
        w = p["w"].reshape(4, -1, p["w"].shape[1])
        return jnp.einsum("bhk,hko->bho", h, w).sum(1) @ p["out"]

    return pair({"u": (5, width), "w": (width, width), "out": (width, 3)}, apply)


def heads_one_by_one(width, n):
    """A loop over heads that one leaf holds: its first axis is taken at 0, 1, 2, ..., and no head sees another."""

    def apply(p, x):
        h = x @ p["u"]
        return jnp.concatenate([jnp.tanh(h @ p["w"][i]) for i in range(n)], -1) @ p["out"]

    return pair({"u": (5, width), "w": (n, width, 4), "out": (4 * n, 3)}, apply)


def fast_weights(width):
    """A matrix gated entry by entry by the data before it multiplies them."""

    def apply(p, x):
        h = x @ p["u"]
        w = p["w"][None] * jnp.tanh(h)[:, None, :] * jnp.tanh(h)[:, :, None]
        return jnp.einsum("bio,bi->bo", w, h) @ p["out"]

    return pair({"u": (5, width), "w": (width, width), "out": (width, 3)}, apply)


def through_a_constant(width):
    """x (W P) with a fixed P: W is summed over twice, with the constant and with the data."""
    return pair(
        {"u": (5, width), "w": (width, 4), "out": (width, 3)}, lambda p, x: (x @ p["u"]) @ (p["w"] @ jnp.ones((4, width))) @ p["out"]
    )


HIDDEN = Use(inside=(0,), out=(1,))
WIDTHS, EXPERTS = ({"width": 8}, {"width": 16}), ({"width": 8, "n": 2}, {"width": 16, "n": 4})
REFUSED = {
    # name: family, sizes, leaf -> (axes named, primitive, part of the reason), overrides that settle it, roles then
    "weight norm": (weight_norm, WIDTHS, {"v": ("0, 1", "dot_general", ""), "g": ("0", "dot_general", "")},
                    {"v": HIDDEN, "g": Use(out=(0,), kind="elementwise")}, {"v": "hidden", "g": "vector"}),
    "weight standardisation": (standardised, WIDTHS, {"w": ("0, 1", "dot_general", "")}, {"w": HIDDEN}, {"w": "hidden"}),
    "lora": (lora, WIDTHS, {"w": ("0, 1", "dot_general", "it enters add with others"), "a": ("0", "dot_general", "another parameter"),
                            "b": ("1", "dot_general", "another parameter")},
             {"w": HIDDEN, "a": HIDDEN, "b": HIDDEN}, {"w": "hidden", "a": "output", "b": "input"}),
    "hypernetwork": (hypernetwork, WIDTHS, {"h": ("1, 2", "dot_general", "another parameter")},
                     {"h": Use(inside=(1,), out=(2,), stack=(0,))},
                     {"h": "hidden"}),
    "growing experts": (experts, EXPERTS, {"up": ("0", "dot_general", "copies that share one input"),
                                                    "down": ("0", "dot_general", "copies whose")},
                        {"up": Use((1,), (2,), (0,)), "down": Use((1,), (2,), (0,))}, {"up": "output", "down": "input"}),
    "growing mixture": (mixture, EXPERTS, {"w": ("0", "dot_general", "copies that share one input"),
                                                    "gate": ("1", "dot_general", "copies that share one input")},
                        {"w": Use((1,), (2,), (0,)), "gate": Use((0,), stack=(1,))}, {"w": "hidden", "gate": "output"}),
    "ensemble by scan": (ensemble_by_scan, EXPERTS, {"w": ("0", "dot_general", "copies whose")},
                         {"w": Use((1,), (2,), (0,))}, {"w": "hidden"}),
    "unused": (unused, WIDTHS, {"spare": ("0, 1", "no primitive", "does not use it")}, {"spare": HIDDEN}, {"spare": "hidden"}),
    "opaque": (opaque, WIDTHS, {"w": ("0, 1", "dot_general", "pure_callback")}, {"w": HIDDEN}, {"w": "hidden"}),
    "per-head mix": (per_head_mix, WIDTHS, {"w": ("0, 1", "dot_general", "axis 0 plays two parts")},
                     {"w": HIDDEN}, {"w": "hidden"}),
    "heads one by one": (heads_one_by_one, EXPERTS, {"w": ("0", "dot_general", "at fixed places")},
                         {"w": Use((1,), (0, 2))}, {"w": "hidden"}),
    "fast weights": (fast_weights, WIDTHS, {"w": ("0, 1", "mul", "several axes")}, {"w": HIDDEN}, {"w": "hidden"}),
    "through a constant": (through_a_constant, WIDTHS, {"w": ("0", "dot_general", "with a constant")}, {"w": HIDDEN},
                           {"w": "output"}),
}  # fmt: skip


# Nothing in these traces says which axes the data sum over.
CHOICES = ("weight standardisation", "lora", "hypernetwork", "unused", "opaque", "per-head mix", "fast weights", "through a constant")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_and_the_override_settles_it(name):
    make, (base, target), problems, settle, roles = REFUSED[name]
    family = pj.family(make, x=ROWS)
    with pytest.raises(ValueError, match="cannot tell how these leaves scale") as refused:
        read(family, base, target)
    lines = str(refused.value).splitlines()[1:]
    for leaf, (axes, primitive, reason) in problems.items():
        path = f"['{leaf}']"
        mine = [line for line in lines if line.startswith(f"  {path} ")]
        assert any(f"axis {axes} (" in line and f"at {primitive}," in line and reason in line for line in mine), (leaf, lines)
        assert all(f"uses={{{path!r}: pj.trace.Use(" in line for line in mine)
        for line in mine:
            suggested = re.findall(r"uses=(\{.*?\)\})", line)
            assert name not in CHOICES or re.search(r"one by one$", line)
            assert suggested
            # Each is Python that works as it is written.
            for text in suggested:
                read(family, base, target, uses={f"['{k}']": use for k, use in settle.items()} | eval(text, {"pj": pj}))
    # No other leaf is in doubt.
    assert {line.split()[0] for line in lines} == {f"['{leaf}']" for leaf in problems}
    program = read(family, base, target, uses={f"['{leaf}']": use for leaf, use in settle.items()})
    found = {leaf.path: leaf.role for leaf in program.leaves}
    assert {leaf: found[f"['{leaf}']"] for leaf in roles} == roles


def test_one_override_alone_leaves_the_other_leaf_in_doubt():
    with pytest.raises(ValueError, match=r"\['g'\]") as refused:
        read(pj.family(weight_norm, x=ROWS), *WIDTHS, uses={"['v']": HIDDEN})
    assert "['v'] (" not in str(refused.value)


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ({"['w']": HIDDEN}, "no|not there"),
        ({"['v']": Use(inside=(0,), out=(2,))}, "names axis 2"),
        ({"['v']": Use(inside=(0,), out=(0,))}, "two parts"),
        ({"['v']": Use(inside=(0,), out=(1,), kind="prodct")}, "Did you mean 'product'"),
        ({"['v']": Use(inside=(0,))}, r"leaves out axis 1, which grows with width.*Use\(inside=\(0,\), out=\(1,\)\) if it is free"),
        ({"['v']": Use(kind="elementwise")}, r"leaves out axis 0, 1.*Use\(out=\(0, 1\), kind='elementwise'\)"),
        ({"['g']": Use(kind="elementwise")}, r"\['g'\].* leaves out axis 0, which grows with width"),
    ],
)
def test_bad_overrides_are_named(uses, message):
    with pytest.raises(ValueError, match=message):
        read(pj.family(weight_norm, x=ROWS), *WIDTHS, uses=uses)


def test_a_finite_leaf_may_be_used_in_any_way():
    """What does not grow needs no role: a weight-normed readout of fixed size."""
    program = read(pj.family(lambda width: weight_norm(8), x=ROWS), {"width": 1}, {"width": 2})
    assert {leaf.role for leaf in program.leaves} == {"finite"}


def test_init_that_looks_at_the_data_is_said_to():
    def make(width):
        def init(key, x):
            return {"w": jax.random.normal(key, (5, width)) / jnp.std(x), "b": jnp.zeros(width) + x.mean(), "v": jnp.ones((width, 1))}

        return init, lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]

    program = read(pj.family(make, x=ROWS), *WIDTHS)
    assert {leaf.path: leaf.law.kind for leaf in program.leaves} == {"['b']": "data", "['v']": "constant", "['w']": "data"}


def test_fixed_heads_of_fixed_size_are_warned_of():
    def make(width):
        shapes = {"e": (11, width), "q": (width, 2, 4), "k": (width, 2, 4), "v": (width, 2, 4), "o": (2, 4, width), "out": (width, 11)}

        def apply(p, x):
            h = p["e"][x]
            q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
            weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2.0)
            return (h + jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])) @ p["out"]

        return pair(shapes, apply)

    with pytest.warns(UserWarning, match=r"\['q'\], \['k'\].*4 coordinates that do not grow"):
        program = read(pj.family(make, x=TOKENS), *WIDTHS)
    roles = {leaf.path: leaf.role for leaf in program.leaves}
    assert roles == {"['e']": "embedding", "['k']": "output", "['o']": "input", "['out']": "output", "['q']": "output", "['v']": "output"}


@pytest.mark.parametrize("name", ["gpt, tied, heads grow", "vit", "moe"])
def test_heads_that_grow_in_number_or_size_are_not(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(ZOO[name].family, ZOO[name].base, ZOO[name].target)


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        ({"widht": 8}, {"widht": 16}, "Did you mean 'width'"),
        ({"width": 16}, {"width": 8}, "larger than the target's 8"),
        ({"width": 8}, {"width": 16, "depth": 2}, "same sizes; depth"),
    ],
)
def test_sizes_that_do_not_fit_are_named(base, target, message):
    with pytest.raises(ValueError, match=message):
        read(pj.family(lambda width, depth=1: nn.Dense(width), x=ROWS), base, target)


@pytest.mark.slow
def test_a_size_is_probed_on_a_multiple_that_the_model_accepts():
    """With width 24 at the target, base heads of 5 do not divide it; 10, 15, ... do not either, and the constraint is named."""
    case = Case(lambda width, heads: GPT(width, 1, heads=heads), {}, {}, TOKENS, {})
    program = read(case.family, {"width": 8, "heads": 2}, {"width": 24, "heads": 6})
    assert {leaf.role for leaf in program.leaves if "kernel" in leaf.path and "head" not in leaf.path} == {"hidden"}
    with pytest.raises(ValueError, match="size heads could not be probed"):
        read(case.family, {"width": 10, "heads": 5}, {"width": 24, "heads": 6})


def test_sequences_are_not_part_of_a_family():
    assert read(pj.family(lambda width: nn.Dense(width), x=SEQUENCE), *WIDTHS).leaves[1].role == "input"


@pytest.mark.parametrize("x", [{"a": ROWS}, (ROWS, ROWS), 3.0])
def test_a_batch_that_is_not_one_array_is_refused(x):
    case = ZOO["scan rnn"]
    for entry in (lambda: read(case.make, case.base, case.target, x=x), lambda: pj.plan(case.make, pj.mup, case.base, case.target, x=x)):
        with pytest.raises(TypeError, match=r"^x is a .*, and must be one array, batch first"):
            entry()
