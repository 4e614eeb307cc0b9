"""Depth where several streams run side by side: each gets so many branches as there are layers, whatever else it is made of.

RevNet (arXiv 1707.04585, eq. 6), i-RevNet and Reformer; cross attention both ways; streams that are mixed (Hyper-Connections). A stream of
L independent branches is of order 1 if each is L^-1/2 (arXiv 2310.02244), and so is one of two that write into each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.zoo import as_users_run_it

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
BASE, TARGET = 2, 8


@pytest.fixture(autouse=True)
def _usual_promotion():
    with as_users_run_it():
        yield


def norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def f(h, a, b):
    return jax.nn.relu(norm(h) @ a) @ b


def g(h, other, a, c, b):
    return jnp.tanh(norm(h) @ a + norm(other) @ c) @ b


def rev(s, p):
    x, y = s
    x = x + f(y, p["a"], p["b"])
    return x, y + f(x, p["c"], p["d"])


def conditioned_rev(s, p):
    """With a condition that every branch looks at, and biases beside the branches."""
    x, y, c = s
    x = x + (jax.nn.gelu(y @ p["a"] + c) @ p["b"] + p["E"][None])
    return x, y + jax.nn.gelu(x @ p["c"] + c) @ p["d"] + p["K"][None], c


def packed(h, p):
    return jnp.concatenate(rev(jnp.split(h, 2, -1), p), -1)


def swapped(s, p):
    return s[1], s[0] + f(s[1], p["a"], p["b"])


def hamiltonian(s, p):
    x, y = s
    y = y + jnp.tanh(x @ p["a"]) @ p["b"]
    return x - jnp.tanh(y @ p["c"]) @ p["d"], y


def crossed(s, p):
    x, y = s
    return x + g(x, y, p["a"], p["c"], p["b"]), y + g(y, x, p["e"], p["k"], p["d"])


def crossed_in_turn(s, p):
    x, y = s
    x = x + g(x, y, p["a"], p["c"], p["b"])
    return x, y + g(y, x, p["e"], p["k"], p["d"])


def own_and_other(s, p):
    x, y = s
    x, y = x + f(x, p["a"], p["b"]), y + f(y, p["c"], p["d"])
    return x + f(y, p["e"], p["k"]), y + f(x, p["m"], p["n"])


def towers(s, p):
    return s[0] + f(s[0], p["a"], p["b"]), s[1] + f(s[1], p["c"], p["d"])


def beside(s, p):
    """One looks at the other, which does not look back."""
    x, y = s
    x = x + f(x, p["a"], p["b"])
    return x, y + g(y, x, p["c"], p["e"], p["d"])


def mixed(s, p):
    """What a block makes of a mix of the streams is added to each (arXiv 2409.19606 with fixed connections)."""
    out = f(0.5 * (s[0] + s[1]), p["a"], p["b"])
    return s[0] + out, s[1] + out


def alternating(s, p):
    """What a block changes of one stream is added to both, and they change places (AltUp, arXiv 2301.13310, with constants)."""
    change = s[0] + f(s[0], p["a"], p["b"]) - s[0]
    return s[1] + change, s[0] + change


def two_of_two(s, p):
    out = f(s[0], p["a"], p["b"])
    return s[1] + out, s[0] + out


STARTS = {
    "halves": (lambda p, x: tuple(jnp.split(x @ p["u"], 2, -1)), {"u": (5, 16)}),
    "copies": (lambda p, x: (x @ p["u"], x @ p["u"]), {"u": (5, 8)}),
    "one copied": (lambda p, x: (lambda h: (h, h))(x @ p["u"]), {"u": (5, 8)}),
    "two stems": (lambda p, x: (x @ p["u"], x @ p["t"]), {"u": (5, 8), "t": (5, 8)}),
    "whole": (lambda p, x: x @ p["u"], {"u": (5, 16)}),
    "with a condition": (lambda p, x: (x @ p["u"], x @ p["t"], jnp.tanh(x @ p["q"])), {"u": (5, 8), "t": (5, 8), "q": (5, 8)}),
}
ENDS = {
    "beside each other": (lambda s: jnp.concatenate(s, -1), 16),
    "summed": (lambda s: s[0] + s[1], 8),
    "the first": (lambda s: s[0], 8),
    "the second": (lambda s: s[1], 8),
    "the first two": (lambda s: jnp.concatenate(s[:2], -1), 16),
    "whole": (lambda s: s, 16),
}


def family(step, names, start, end, loop):
    (begin, stems), (finish, wide) = STARTS[start], ENDS[end]

    def make(depth, factor=lambda p: p):
        sizes = {n: (8,) if n.isupper() else (8, 8) for n in names}
        each = (
            {n: (depth, *s) for n, s in sizes.items()} if loop == "scan" else {f"{n}{i}": s for n, s in sizes.items() for i in range(depth)}
        )
        shapes = stems | each | {"v": (wide, 3)}

        def init(key, x):
            keys = jax.random.split(key, len(shapes))
            return {n: jax.random.normal(k, s) * (s[-2] if len(s) > 1 else 1.0) ** -0.5 for k, (n, s) in zip(keys, shapes.items())}

        def apply(p, x):
            s = begin(p, x)
            if loop == "scan":
                s = jax.lax.scan(lambda s, layer: (step(s, factor(layer)), None), s, {n: p[n] for n in names})[0]
            else:
                for i in range(depth):
                    s = step(s, factor({n: p[f"{n}{i}"] for n in names}))
            return finish(s) @ p["v"]

        return pj.Model(init, apply)

    return make


# Step, its leaves, and those that write into a stream.
STEPS = {
    "revnet": (rev, "abcd", "bd"),
    "conditioned revnet": (conditioned_rev, "abcdEK", "bdEK"),
    "hamiltonian": (hamiltonian, "abcd", "bd"),
    "crossed": (crossed, "abcdek", "bd"),
    "crossed in turn": (crossed_in_turn, "abcdek", "bd"),
    "towers": (towers, "abcd", "bd"),
    "beside": (beside, "abcde", "bd"),
    "own and other": (own_and_other, "abcdekmn", "bdkn"),
    "mixed": (mixed, "ab", "b"),
    "swapped": (swapped, "ab", "b"),
    "packed": (packed, "abcd", "bd"),
    "alternating": (alternating, "ab", "b"),
    "exchanged": (two_of_two, "ab", "b"),
}
ROWS = [
    ("revnet", "halves", "beside each other"), ("revnet", "one copied", "summed"), ("revnet", "two stems", "beside each other"),
    ("revnet", "two stems", "the first"), ("revnet", "copies", "summed"), ("hamiltonian", "two stems", "beside each other"),
    ("hamiltonian", "one copied", "summed"), ("crossed", "two stems", "summed"), ("crossed in turn", "halves", "beside each other"),
    ("crossed in turn", "two stems", "summed"), ("towers", "one copied", "summed"), ("beside", "two stems", "the first"),
    ("beside", "halves", "beside each other"), ("own and other", "halves", "beside each other"), ("mixed", "two stems", "summed"),
    ("mixed", "one copied", "summed"), ("swapped", "halves", "beside each other"), ("packed", "whole", "whole"),
    ("alternating", "one copied", "summed"), ("revnet", "two stems", "the second"),
    ("conditioned revnet", "with a condition", "the first two"), ("exchanged", "one copied", "summed"),
]  # fmt: skip


@pytest.mark.parametrize("loop", ["python", "scan"])
@pytest.mark.parametrize(("step", "start", "end"), ROWS, ids=lambda one: one.replace(" ", "_"))
def test_every_branch_of_every_stream_is_one_of_so_many_layers(step, start, end, loop):
    """By hand: what writes is multiplied by m^-1/2, and all in a branch learns at m^-1/2; the function is the one with that factor."""
    body, names, writers = STEPS[step]
    make = family(body, names, start, end, loop)
    plan = pj.plan(pj.family(make, x=X), pj.depth_mup, base=dict(depth=BASE), target=dict(depth=TARGET), optimizer="adam")
    half = (TARGET / BASE) ** -0.5
    rates = {leaf.path[2:-2]: leaf.factors.learning_rate for leaf in plan.leaves}
    assert rates == pytest.approx({path: half if path[0] in names else 1.0 for path in rates})
    params = plan.network.init(jax.random.key(0), X)
    twin = make(TARGET, factor=lambda p: {n: w * (half if n in writers else 1.0) for n, w in p.items()})
    np.testing.assert_allclose(plan.model.apply(params, X), twin.apply(params, X), rtol=1e-4, atol=1e-5)
    assert np.abs(plan.model.apply(params, X) - plan.network.apply(params, X)).max() > 1e-2


@pytest.mark.parametrize("start", ["halves", "two stems", "one copied"])
def test_one_layer_at_the_base_is_counted_alike(start):
    make = family(rev, "abcd", start, "beside each other" if start != "one copied" else "summed", "python")
    plan = pj.plan(pj.family(make, x=X), pj.completep, base=dict(depth=1), target=dict(depth=4), optimizer="sgd")
    found = {leaf.path[2]: leaf.factors for leaf in plan.leaves}
    # CompleteP: branches 1/m, SGD's learning rate m.
    assert {name: round(found[name].multiplier, 6) for name in "abcd"} == {"a": 1, "b": 0.25, "c": 1, "d": 0.25}
    assert {round(found[name].learning_rate, 6) for name in "abcd"} == {4.0}


def test_one_layer_that_does_not_tell_its_streams_apart_is_refused_as_a_base():
    """``y + g(x + f(y))``, and nothing else sees x: it is one branch, and of two layers it is two kinds."""
    fam = pj.family(family(rev, "abcd", "two stems", "the second", "python"), x=X)
    with pytest.raises(ValueError, match="has no like at the base, depth=1"):
        pj.plan(fam, pj.depth_mup, base=dict(depth=1), target=dict(depth=4))


def test_streams_of_a_revnet_keep_their_size_however_deep():
    """Of order 1 as L^-1/2 makes them; without a factor they grow like L^1/2: 32 layers are 4 times 2."""

    def size(depth, planned):
        make = family(rev, "abcd", "two stems", "beside each other", "scan")
        plan = pj.plan(pj.family(make, x=X), pj.depth_mup, base=dict(depth=2), target=dict(depth=depth), optimizer="adam")
        model = plan.model if planned else plan.network
        outs = [model.apply(model.init(jax.random.key(seed), X), X) for seed in range(20)]
        return float(np.sqrt(np.mean(np.square(outs))))

    # 20 seeds, 4 inputs, 3 outputs: 10 % of a standard deviation.
    assert size(32, True) / size(2, True) == pytest.approx(1.0, abs=0.3)
    assert size(32, False) / size(2, False) > 2


def conditioned(s, p):
    return s[0] + f(s[0], p["a"], p["b"]) + s[1] @ p["c"], s[1]


def lateral(s, p):
    x, y = s
    x, y = x + f(x, p["a"], p["b"]), y + f(y, p["c"], p["d"])
    return x, y + f(x, p["e"], p["k"])


def skips(s, p):
    z = jnp.tanh(s[0] @ p["a"])
    return s[0] + z @ p["b"], s[1] + z @ p["c"]


def leapfrog(s, p):
    v = s[1] + f(s[0], p["a"], p["b"])
    return s[0] + v, v


UNREAD = {
    "a condition of each layer": (conditioned, "abc"), "a stream beside it": (lateral, "abcdek"), "skips": (skips, "abc"),
    "leapfrog": (leapfrog, "ab"), "own and other": (own_and_other, "abcdekmn"),
}  # fmt: skip


@pytest.mark.parametrize("loop", ["python", "scan"])
@pytest.mark.parametrize("name", UNREAD)
def test_what_is_added_in_every_layer_and_is_no_branch_is_refused(name, loop):
    """A sum over layers that no factor keeps from growing with the depth; silence would be wrong numbers."""
    step, names = UNREAD[name]
    fam = pj.family(family(step, names, "two stems", "beside each other", loop), x=X)
    with pytest.raises(ValueError, match=r"sum over layers|layers share it|what the step before it made"):
        pj.plan(fam, pj.depth_mup, base=dict(depth=BASE), target=dict(depth=TARGET))
    # Nothing is scaled with depth, and nothing is refused; nor where the depth stays.
    pj.plan(fam, pj.mup, base=dict(depth=BASE), target=dict(depth=TARGET))
    pj.plan(fam, pj.depth_mup, base=dict(depth=BASE), target=dict(depth=BASE))


def test_the_form_that_the_refusal_names_is_planned():
    def told(s, p):
        return s[0] + (f(s[0], p["a"], p["b"]) + s[1] @ p["c"]), s[1]

    fam = pj.family(family(told, "abc", "two stems", "the first", "python"), x=X)
    plan = pj.plan(fam, pj.depth_mup, base=dict(depth=BASE), target=dict(depth=TARGET))
    found = {leaf.path[2]: leaf.factors.multiplier for leaf in plan.leaves}
    assert found == pytest.approx({"a": 1, "b": 0.5, "c": 0.5, "t": 1, "u": 1, "v": 1})


def test_sums_that_the_depth_does_not_lengthen_are_none_of_it():
    """Four terms in a branch, a mean taken out of the stream in every layer, a sum over time in each layer, a head's own output."""

    def make(depth, heads):
        def apply(p, x):
            h = jnp.repeat((x @ p["u"])[:, None], 4, 1)
            for i in range(depth):
                h = h - h.mean(-1, keepdims=True)
                a, b, c = (norm(h) @ p[f"{n}{i}"] for n in "abc")
                state = jax.lax.scan(lambda s, row: (s + row[0] * row[1], s + row[1]), jnp.zeros_like(a[:, 0]), (a, b))[1]
                h = h + sum(jnp.tanh((a + b + c + state) * k) @ p[f"d{i}_{k}"] for k in range(heads))
            return h[:, -1] @ p["v"]

        shapes = {"u": (5, 8), "v": (8, 3)} | {f"{n}{i}": (8, 8) for n in "abc" for i in range(depth)}
        shapes |= {f"d{i}_{k}": (8, 8) for i in range(depth) for k in range(heads)}

        def init(key, x):
            keys = jax.random.split(key, len(shapes))
            return {n: jax.random.normal(k, s) * (s[-2] if len(s) > 1 else 1.0) ** -0.5 for k, (n, s) in zip(keys, shapes.items())}

        return pj.Model(init, apply)

    plan = pj.plan(pj.family(make, x=X), pj.depth_mup, base=dict(depth=2, heads=3), target=dict(depth=8, heads=3))
    found = {leaf.path: leaf.factors.multiplier for leaf in plan.leaves if leaf.path[2] == "d"}
    assert found == pytest.approx(dict.fromkeys(found, 0.5))
