"""Residual adds and their writers: against hand-written expectations, and against what scaling the leaves does to the network."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.trace import primitives as prim
from paperjax.trace.interactions import interactions
from paperjax.trace.interpret import Edit, edited
from paperjax.trace.streams import residual_adds
from paperjax.trace.walk import walk

D = 6
X = jax.random.normal(jax.random.key(3), (4, 5, D))
MATRIX, VECTOR = (D, D), (D,)


def layer_norm(h):
    return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def batch_norm(h):
    return (h - h.mean((0, 1))) * jax.lax.rsqrt(h.var((0, 1)) + 1e-5)


def attention(q, k, v):
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / D**0.5), v)


def by_scan(p, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None), x, (p["a"], p["b"]))[0]


def by_remat_scan(p, x):
    body = jax.checkpoint(lambda h, w: (h + jax.nn.relu(layer_norm(h) @ w), None))
    return jax.lax.scan(body, x @ p["u"], p["w"])[0] @ p["v"]


def two_uses_of_a_half(p, x):
    """A gate and its value from one matrix: scaling the matrix scales the gate's argument as well."""
    a, b = jnp.split(layer_norm(x) @ p["w"], 2, axis=-1)
    return x[..., : D // 2] + a * jax.nn.sigmoid(b)


def value_seen_elsewhere(p, x):
    z = x @ p["w"]
    h = x + z
    return h @ p["v"] + jnp.tanh(z)


def time_residual(p, x):
    """h + tanh(U x_t + W h) along time, weights reused."""
    return jax.lax.scan(lambda h, row: (h + jnp.tanh(h @ p["w"] + row), h), jnp.zeros_like(x[:, 0]), x.transpose(1, 0, 2))[1]


def conditioned(p, x):
    """Each of two blocks looks at an embedding that no block owns."""
    c = jnp.tanh(x @ p["c"]).mean(1, keepdims=True)
    h = x @ p["u"]
    for i in range(2):
        h = h + jnp.tanh(h @ p[f"a{i}"] + c) @ p[f"b{i}"]
    return h


def modulated(blocks, first=False, apart=False):
    """Blocks of two sublayers, each modulated (arXiv 2212.09748, figure 3): by one matrix for both, or by one for each."""

    def apply(p, x):
        def modulation(c, j):
            return (c @ p[f"m{j}"], c @ p[f"n{j}"]) if apart else jnp.split(c @ p[f"m{j}"], 2, axis=-1)

        c = jnp.tanh(x @ p["c"]).mean(1, keepdims=True)
        ready = [modulation(c, j) for j in range(blocks)] if first else []
        h = x @ p["u"]
        for j in range(blocks):
            one, two = ready[j] if first else modulation(c, j)
            h = h + jnp.tanh(h * (1 + one)) @ p[f"a{j}"]
            h = h + jnp.tanh(h * (1 + two) @ p[f"b{j}"]) @ p[f"d{j}"]
        return h

    names = {"u": MATRIX, "c": MATRIX} | {f"{name}{j}": MATRIX for j in range(blocks) for name in "abd"}
    names |= {f"{name}{j}": MATRIX if apart else (D, 2 * D) for j in range(blocks) for name in ("mn" if apart else "m")}
    adds = []
    for j in range(blocks):
        adds += [(1, (f"a{j}",), (f"a{j}", f"m{j}")), (1, (f"d{j}",), (f"b{j}", f"d{j}", f"{'n' if apart else 'm'}{j}"))]
    return apply, names, adds


def modulated_by_scan(p, x):
    c = jnp.tanh(x @ p["c"])

    def block(h, w):
        one, two = jnp.split(c @ w["m"] + jnp.tanh(c @ p["t"]) @ w["e"], 2, axis=-1)
        h = h + jnp.tanh(h * (1 + one)) @ w["a"]
        return h + jnp.tanh(h * (1 + two)) @ w["b"], None

    return jax.lax.scan(block, x @ p["u"], {name: p[name] for name in "abme"})[0]


def seen_by_each_decoder(p, x):
    """What each of two decoder blocks looks at is an encoder's, of two blocks itself."""
    e = x @ p["u"]
    for i in range(2):
        e = e + jnp.tanh(e) @ p[f"e{i}"]
    e, h = layer_norm(e) * p["g"], x @ p["v"]
    for i in range(2):
        h = h + jnp.tanh(h @ p[f"a{i}"] + e) @ p[f"b{i}"]
    return h


CASES = {
    # name: (apply, shapes, [(repeats, writers, leaves in the branch)])
    "pre-activation": (
        lambda p, x: x + jax.nn.relu(batch_norm(x)) @ p["a"],
        {"a": MATRIX},
        [(1, "a", "a")],
    ),
    "branch first": (lambda p, x: jnp.tanh(x) @ p["a"] + x, {"a": MATRIX}, [(1, "a", "a")]),
    "post-activation": (
        lambda p, x: jax.nn.relu(x + batch_norm(jax.nn.relu(batch_norm(x @ p["a"])) @ p["b"])),
        {"a": MATRIX, "b": MATRIX},
        # A normalization takes any factor out again, and it has no gain here to scale.
        [(1, "", "ab")],
    ),
    "post-activation, gain of the last norm": (
        lambda p, x: jax.nn.relu(x + batch_norm(jax.nn.relu(x @ p["a"]) @ p["b"]) * p["g"] + p["c"]),
        {"a": MATRIX, "b": MATRIX, "g": VECTOR, "c": VECTOR},
        # (x + BN g) + c is x + (BN g + c): the shift is the branch's, though Python groups it otherwise.
        [(1, "g", "abcg")],
    ),
    "post-norm": (lambda p, x: layer_norm(layer_norm(x + x @ p["a"]) + x @ p["b"]), {"a": MATRIX, "b": MATRIX}, [(1, "a", "a")]),
    "two post-norm blocks": (
        lambda p, x: (lambda h: layer_norm(h + jnp.tanh(h) @ p["b"]))(layer_norm(x + x @ p["a"])),
        {"a": MATRIX, "b": MATRIX},
        [(1, "a", "a"), (1, "b", "b")],
    ),
    "relu at the end": (lambda p, x: x + jax.nn.relu(x @ p["w"] + p["b"]), {"w": MATRIX, "b": VECTOR}, [(1, "bw", "bw")]),
    "leaky relu at the end": (lambda p, x: x + jax.nn.leaky_relu(x @ p["w"] + p["b"]), {"w": MATRIX, "b": VECTOR}, [(1, "bw", "bw")]),
    "maxout at the end": (
        lambda p, x: x + jnp.maximum(x @ p["a"], x @ p["b"]),
        {"a": MATRIX, "b": MATRIX},
        [(1, "ab", "ab")],
    ),
    "max pool in the branch": (
        lambda p, x: x + (x @ p["w"]).max(1, keepdims=True),
        {"w": MATRIX},
        [(1, "w", "w")],
    ),
    "tanh at the end": (lambda p, x: x + jnp.tanh(x @ p["w"] + p["b"]), {"w": MATRIX, "b": VECTOR}, [(1, "", "bw")]),
    "gelu at the end": (lambda p, x: x + jax.nn.gelu(x @ p["w"]), {"w": MATRIX}, [(1, "", "w")]),
    "gelu's own adds are none": (lambda p, x: jax.nn.gelu(x @ p["w"]) @ p["v"], {"w": MATRIX, "v": MATRIX}, []),
    "relu of a shifted matrix": (lambda p, x: x + jax.nn.relu(x @ p["w"] + 1.0), {"w": MATRIX}, [(1, "", "w")]),
    "branch shifted by a constant": (lambda p, x: x + (x @ p["w"] + 1.0), {"w": MATRIX}, [(1, "", "w")]),
    "gain stored as 1 + g at the end": (
        lambda p, x: x + layer_norm(x @ p["w"]) * (1 + p["g"]),
        {"w": MATRIX, "g": VECTOR},
        [(1, "", "gw")],
    ),
    "layer scale": (lambda p, x: x + p["g"] * jnp.tanh(x @ p["w"]), {"w": MATRIX, "g": VECTOR}, [(1, "g", "gw")]),
    "divided by a leaf": (lambda p, x: x + jnp.tanh(x @ p["w"]) / p["g"], {"w": MATRIX, "g": VECTOR}, [(1, "", "gw")]),
    "gated with a matrix of its own": (
        lambda p, x: x + jax.nn.silu(x @ p["a"]) * (x @ p["b"]),
        {"a": MATRIX, "b": MATRIX},
        [(1, "b", "ab")],
    ),
    "gated with half of one matrix": (two_uses_of_a_half, {"w": MATRIX}, [(1, "", "w")]),
    "squared": (lambda p, x: x + (x @ p["w"]) ** 2, {"w": MATRIX}, [(1, "", "w")]),
    "two matrices in a row": (lambda p, x: x + (x @ p["a"]) @ p["b"], {"a": MATRIX, "b": MATRIX}, [(1, "b", "ab")]),
    "sum of a linear and a deeper way": (
        lambda p, x: x + (lambda z: z + jnp.tanh(z) @ p["b"])(x @ p["a"]),
        {"a": MATRIX, "b": MATRIX},
        # The inner sum is residual, with z as its stream; of the outer one the writers would be a and b, and a is inside the tanh.
        [(1, "b", "b"), (1, "", "ab")],
    ),
    "one matrix in both branches": (
        lambda p, x: (lambda h: h + jnp.tanh(h) @ p["a"])(x + jnp.tanh(x) @ p["a"]),
        {"a": MATRIX},
        [(1, "", "a"), (1, "", "a")],
    ),
    "branch seen elsewhere": (value_seen_elsewhere, {"w": MATRIX, "v": MATRIX}, [(1, "", "w")]),
    "parallel attention and perceptron": (
        lambda p, x: x + attention(x @ p["q"], x @ p["k"], x @ p["v"]) @ p["o"] + jax.nn.gelu(x @ p["u"]) @ p["d"],
        dict.fromkeys("qkvoud", MATRIX),
        [(1, "o", "koqv"), (1, "d", "du")],
    ),
    "parallel, summed first": (
        lambda p, x: x + (jnp.tanh(x @ p["a"]) @ p["b"] + jnp.tanh(x) @ p["c"]),
        dict.fromkeys("abc", MATRIX),
        [(1, "bc", "abc")],
    ),
    "projection shortcut is none": (lambda p, x: x @ p["s"] + jnp.tanh(x @ p["a"]) @ p["b"], dict.fromkeys("sab", MATRIX), []),
    "stream multiplied by a number": (lambda p, x: 0.8 * x + jnp.tanh(x) @ p["a"], {"a": MATRIX}, [(1, "a", "a")]),
    "subtracted branch": (lambda p, x: x - jnp.tanh(x) @ p["a"], {"a": MATRIX}, [(1, "a", "a")]),
    "subtracted stream is none": (lambda p, x: jnp.tanh(x) @ p["a"] - x, {"a": MATRIX}, []),
    "no weight in the branch": (lambda p, x: x + jnp.tanh(layer_norm(x)), {}, []),
    "scanned": (by_scan, {"a": (3, D, D), "b": (3, D, D)}, [(3, "b", "ab")]),
    "rematerialized and scanned": (by_remat_scan, {"u": MATRIX, "w": (4, D, D), "v": MATRIX}, [(4, "w", "w")]),
    "along time": (time_residual, {"w": MATRIX}, [(5, "", "w")]),
    "modulated": modulated(2),
    "modulated, all modulations made first": modulated(2, first=True),
    "modulated, a matrix for each": modulated(2, apart=True),
    "modulated, a matrix for each, made first": modulated(2, first=True, apart=True),
    "modulated, scanned": (
        modulated_by_scan,
        dict.fromkeys("ab", (3, D, D)) | dict.fromkeys("em", (3, D, 2 * D)) | dict.fromkeys("ctu", MATRIX),
        [(3, "a", "aem"), (3, "b", "bem")],
    ),
    "seen by each decoder": (
        seen_by_each_decoder,
        dict.fromkeys(("u", "v", "e0", "e1", "a0", "b0", "a1", "b1"), MATRIX) | {"g": VECTOR},
        [(1, (n,), (n,)) for n in ("e0", "e1")] + [(1, (f"b{i}",), (f"a{i}", f"b{i}")) for i in range(2)],
    ),
    "conditioned": (
        conditioned,
        dict.fromkeys(("u", "c", "a0", "b0", "a1", "b1"), MATRIX),
        [(1, ("b0",), ("a0", "b0")), (1, ("b1",), ("a1", "b1"))],
    ),
}


def numbers(shapes):
    return {name: jax.random.normal(jax.random.fold_in(jax.random.key(7), i), shape) for i, (name, shape) in enumerate(shapes.items())}


def walked(apply, params, x=X):
    leaves, tree = jax.tree.flatten(params)

    def flat(leaves, fixed, x):
        return apply(jax.tree.unflatten(tree, leaves), x)

    return walk(prim.trace(flat, leaves, [], x), len(leaves)), sorted(params)


@pytest.mark.parametrize("name", CASES)
def test_residual_adds_and_their_writers(name):
    apply, shapes, wanted = CASES[name]
    found, names = walked(apply, numbers(shapes))
    adds = [
        (add.repeats, tuple(names[i] for i in add.writers), tuple(sorted(names[i] for i in add.leaves))) for add in residual_adds(found)
    ]
    assert adds == [(repeats, tuple(writers), tuple(leaves)) for repeats, writers, leaves in wanted]


@pytest.mark.parametrize("name", [name for name, (_, _, adds) in CASES.items() if any(writers for _, writers, _ in adds)])
def test_scaling_the_writers_is_scaling_the_branch(name, x64):
    """The writers times c, and the add's operand times c by `edited`: one function, and not the one without c."""
    apply, shapes, _ = CASES[name]
    params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (numbers(shapes), X))
    found, names = walked(apply, params, x)
    for add in residual_adds(found):
        if not add.writers:
            continue
        written = {names[i] for i in add.writers}
        by_leaves = apply({key: 0.37 * value if key in written else value for key, value in params.items()}, x)
        scaled, _ = edited(apply, {add.path: [Edit(add.op, add.operand, lambda value: 0.37 * value)]}, ())
        np.testing.assert_allclose(scaled(params, x), by_leaves, rtol=1e-11, atol=1e-12)
        assert np.abs(by_leaves - apply(params, x)).max() > 1e-3


def entry_by_entry(q, k):
    return (q[:, :, None] * k[:, None]).sum(-1)


def squared_distances(q, k):
    return -((q[:, :, None] - k[:, None]) ** 2).sum(-1)


SCORES = {
    "einsum": lambda q, k: jnp.einsum("btd,bsd->bts", q, k),
    "entry by entry": entry_by_entry,
    "keys told apart": lambda q, k: (jnp.tile(q[:, :, None], (1, 1, 5, 1)) * jnp.broadcast_to(k[:, None], (4, 5, 5, 16))).sum(-1),
    "summed in two steps": lambda q, k: (q[:, :, None] * k[:, None]).reshape(4, 5, 5, 2, 8).sum(-1).sum(-1),
    "a mean, times their number": lambda q, k: (q[:, :, None] * k[:, None]).mean(-1) * 16,
    "two halves": lambda q, k: (q[:, :, None, :8] * k[:, None, :, :8] + q[:, :, None, 8:] * k[:, None, :, 8:]).sum(-1) * 1.0,
    "squared distances": squared_distances,
    "squared half distances, times 4": lambda q, k: 4 * (((q[:, :, None] - k[:, None]) / 2) ** 2).sum(-1),
    "distances by products": lambda q, k: (lambda d: (d * d).sum(-1))(q[:, :, None] - k[:, None]),
}


# A distance to a multiple is no multiple of the distance.
WHERE = [
    (scores, where)
    for scores in SCORES
    for where in ("before", "query", "after", "as an array")
    if not ("distance" in scores and where == "query")
]


@pytest.mark.parametrize(("scores", "where"), WHERE)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scale_of_logits_wherever_it_is_multiplied(power, where, scores):
    scale = 16.0**-power

    def apply(p, x):
        q, k = x @ p["q"], x @ p["k"]
        if where == "query":
            q = q * scale
        if where == "before":
            q, k = q * scale**0.5, scale**0.5 * k
        logits = SCORES[scores](q, k)
        if where == "after":
            logits = jnp.where(np.tri(5) > 0, logits / (1 / scale), -1e9)
        if where == "as an array":
            logits = logits * jnp.full(logits.shape, scale)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits), x @ p["v"])

    found, names = walked(apply, numbers({"q": (D, 16), "k": (D, 16), "v": MATRIX}))
    *parts, logits, values = interactions(found)
    assert [[names[i] for i in side] for side in logits.leaves] == [["q"], ["k"]]
    assert math.prod(part.size for part in (*parts, logits)) == (8 if scores == "two halves" else 16)
    assert logits.op == found.nodes[logits.node].op == ("dot_general" if scores == "einsum" else "reduce_sum")
    np.testing.assert_allclose(logits.log_scale, np.log(scale), atol=1e-6)
    assert (values.size, values.log_scale) == (5, 0.0)


NO_PRODUCTS = {
    "a gate for all coordinates": lambda p, x: ((x @ p["a"]) * jnp.tanh(x @ p["b"])[..., :1]).sum(-1),
    "a gate that was spread over them": lambda p, x: ((x @ p["a"]) * jnp.broadcast_to(jnp.tanh(x @ p["b"])[..., :1], x.shape)).sum(-1),
    "a norm of what is gated": lambda p, x: layer_norm((x @ p["a"]) * (x @ p["b"])),
    "a variance": lambda p, x: ((x @ p["a"] - (x @ p["a"]).mean(-1, keepdims=True)) ** 2).sum(-1),
    "flax's norms of a difference": lambda p, x: nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x @ p["a"] - x @ p["b"]),
    "a root mean square of a difference": lambda p, x: nn.RMSNorm(use_scale=False).apply({}, x @ p["a"] - x @ p["b"]),
    "a length": lambda p, x: jnp.linalg.norm(x @ p["a"] - x @ p["b"], axis=-1),
    "normed and summed": lambda p, x: (x @ p["a"] * jax.lax.rsqrt(((x @ p["a"]) ** 2).mean(-1, keepdims=True))).sum(-1),
    "a share": lambda p, x: (lambda z: z / z.sum(-1, keepdims=True))((x @ p["a"]) * jnp.tanh(x @ p["b"])),
    "a square": lambda p, x: (lambda z: (z * z).sum(-1))(x @ p["a"]),
    "a sum of a sum": lambda p, x: (x @ p["a"] + x @ p["b"]).sum(-1),
}


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_sums_that_are_no_products_of_two_activations(name):
    found, _ = walked(NO_PRODUCTS[name], numbers({"a": MATRIX, "b": MATRIX}))
    assert interactions(found) == ()


def test_sums_over_positions_are_told_from_sums_over_coordinates():
    """Attention without an einsum: scores sum over 16 coordinates, values over 5 positions."""

    def apply(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        weights = jax.nn.softmax(entry_by_entry(q, k))
        return (weights[..., None] * v[:, None]).sum(2)

    found, _ = walked(apply, numbers({"q": (D, 16), "k": (D, 16), "v": MATRIX}))
    assert [a.size for a in interactions(found)] == [16, 5]


def test_flax_attention_and_jax_dot_product_attention_are_read():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.MultiHeadDotProductAttention(num_heads=2, name="flax")(x)
            q, k, v = (nn.DenseGeneral((2, 3), name=name)(h) for name in "qkv")
            return jax.nn.dot_product_attention(q, k, v)

    params = Net().init(jax.random.key(0), X)["params"]
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tree = jax.tree.structure(params)
    found, names = walked(lambda p, x: Net().apply({"params": jax.tree.unflatten(tree, [p[name] for name in flat])}, x), flat)
    logits = [
        (a.size, round(a.log_scale / np.log(a.size), 4), [names[s[0]] for s in a.leaves]) for a in interactions(found) if all(a.leaves)
    ]
    assert logits[0] == (3, -0.5, ["['flax']['query']['kernel']", "['flax']['key']['kernel']"])
    assert logits[1] == (3, -0.5, ["['q']['kernel']", "['k']['kernel']"])
