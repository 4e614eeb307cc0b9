"""Learned queries that are given to each example: data from there on, where nothing else resolves them."""

import jax
import jax.numpy as jnp
import pytest

from paperjax.trace import primitives as prim
from paperjax.trace.latents import walked
from paperjax.trace.walk import walk

N, D, B = 3, 6, 4
X = jax.ShapeDtypeStruct((B, 5, D), jnp.float32)


def rms_norm(h):
    return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6)


def attended(p, q, x):
    """Attention of normed queries, and their residual stream."""
    z = rms_norm(q) * p["g"]
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", z @ p["a"], x @ p["k"]) / D)
    return q + jnp.einsum("bqk,bkd->bqd", weights, x @ p["v"])


SHAPES = {"q": (N, D), "g": (D,), "a": (D, D), "k": (D, D), "v": (D, D)}
SPREAD = {
    "broadcast": lambda q, n: jnp.broadcast_to(q, (n, *q.shape)),
    "repeated": lambda q, n: jnp.repeat(q[None], n, 0),
    "tiled": lambda q, n: jnp.tile(q[None], (n, 1, 1)),
    "batch second": lambda q, n: jnp.broadcast_to(q[:, None], (len(q), n, q.shape[-1])).swapaxes(0, 1),
    "a sum with zeros": lambda q, n: q[None] + jnp.zeros((n, 1, 1)),
    "a product with ones": lambda q, n: jnp.ones((n, *q.shape)) * q[None],
    "scaled and cast first": lambda q, n: jnp.broadcast_to((2 * q).astype(jnp.float32), (n, *q.shape)),
}


def read(apply, shapes, x=X):
    names = sorted(shapes)
    params = [jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in names]
    traced = []

    def trace(x):
        traced.append(x.shape)
        return prim.trace(lambda leaves, x: apply(dict(zip(names, leaves)), x), params, x)

    jaxpr = trace(x)
    return walked(jaxpr, len(names), x, trace), walk(jaxpr, len(names)), names, traced


@pytest.mark.parametrize("how", SPREAD)
def test_what_is_spread_over_the_batch_is_data(how):
    found, plain, names, _ = read(lambda p, x: attended(p, SPREAD[how](p["q"], len(x)), x), SHAPES)
    assert {names[u.leaf] for u in plain.unresolved} == {"q", "g", "a"}
    assert not found.unresolved
    by_name = {name: [site for site in found.sites if site.leaf == i] for i, name in enumerate(names)}
    (q,), (g,), (a,) = by_name["q"], by_name["g"], by_name["a"]
    assert (q.kind, q.out, q.inside, q.operand) == ("elementwise", (0, 1), (), None)
    assert (g.kind, g.effect) == ("elementwise", "times")
    assert (a.kind, a.inside, a.out) == ("product", (0,), (1,))


REFUSED = {
    # A size that only looks like the batch's: copies of a weight, say.
    "spread over as many as there are examples": (
        lambda p, x: attended(p, jnp.broadcast_to(p["q"], (B, N, D)), x),
        SHAPES,
        {"q", "g", "a"},
    ),
    "normed before it is spread": (
        lambda p, x: jnp.einsum("bqd,bkd->bqk", jnp.broadcast_to(rms_norm(p["q"]), (len(x), N, D)), x @ p["k"]),
        {"q": (N, D), "k": (D, D)},
        {"q"},
    ),
    "a weight's norm": (lambda p, x: x @ (p["w"] / jnp.sqrt((p["w"] ** 2).sum(0, keepdims=True))), {"w": (D, D)}, {"w"}),
    "two weights in a row": (lambda p, x: x @ (p["a"] @ p["b"]) + p["c"], {"a": (D, 2), "b": (2, D), "c": (D,)}, {"a", "b"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_spread_over_the_batch_is_no_data(name):
    apply, shapes, wanted = REFUSED[name]
    found, plain, names, _ = read(apply, shapes)
    assert found == plain
    assert {names[u.leaf] for u in found.unresolved} == wanted


def test_only_what_is_in_question_is_taken_for_data():
    """A bias that is spread over the batch is added to the data as ever; and nothing is traced twice where all is resolved."""

    def biased(p, x):
        return x @ p["k"] + jnp.broadcast_to(p["c"], x.shape)

    found, plain, _, traced = read(biased, {"k": (D, D), "c": (D,)})
    assert found == plain
    assert len(traced) == 1

    def both(p, x):
        return attended(p, jnp.broadcast_to(p["q"], (len(x), N, D)), biased(p, x))

    found, _, names, traced = read(both, SHAPES | {"c": (D,)})
    (c,) = [site for site in found.sites if names[site.leaf] == "c"]
    assert (c.op, c.operand is None, found.unresolved, len(traced)) == ("add", False, (), 2)


@pytest.mark.parametrize("gain", ["on the quotient", "on the norm"])
def test_gain_and_bias_of_a_norm_of_zeros_are_data(gain):
    """DETR's decoder with norms first (arXiv 2005.12872) starts from zeros for each example: their norm's bias is what comes in."""

    def apply(p, x):
        zeros = jnp.zeros((len(x), N, D))
        root, g = jax.lax.rsqrt((zeros**2).mean(-1, keepdims=True) + 1e-6), p["g"][None, None]
        h = (zeros * root * g if gain == "on the quotient" else zeros * (root * g)) + p["c"][None, None]
        return attended({**p, "g": p["h"]}, h @ p["w"], x)

    shapes = {name: shape for name, shape in SHAPES.items() if name != "q"}
    found, plain, names, _ = read(apply, shapes | {"c": (D,), "h": (D,), "w": (D, D)})
    assert {"g", "c", "w"} <= {names[u.leaf] for u in plain.unresolved}
    assert not found.unresolved
    by_name = {name: [site for site in found.sites if site.leaf == i] for i, name in enumerate(names)}
    assert [(site.kind, site.out) for name in "gc" for site in by_name[name]] == [("elementwise", (0,))] * 2
    assert [(site.kind, site.inside, site.out) for site in by_name["w"]] == [("product", (0,), (1,))]
