"""Sums of activations that no leaf weighs: which are found, and how they are told apart between two sizes of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.trace import primitives as prim
from paperjax.trace.probe import leaf_shapes
from paperjax.trace.sums import growing_sums, sums, unscaled
from paperjax.trace.walk import walk

X = jnp.ones((4, 6, 5))

FOUND = {
    "a sum": (lambda p, x: (x @ p["w"]).sum(-1), [8]),
    "a product with ones": (lambda p, x: (x @ p["w"]) @ jnp.ones(p["w"].shape[1]), [8]),
    "a product with an array that is one number": (lambda p, x: np.full((1, p["w"].shape[1]), 0.5) @ jnp.tanh(x @ p["w"])[0].T, [8]),
    "partial sums": (lambda p, x: jnp.cumsum(x @ p["w"], -1)[..., -1], [8]),
    "partial sums from the end": (lambda p, x: jax.lax.cumsum(x @ p["w"], 2, reverse=True), [8]),
    "a weight's own axis, by ones": (lambda p, x: ((x @ p["w"]) * p["g"]) @ jnp.ones(p["w"].shape[1]), []),
    "a product of two activations, by ones": (lambda p, x: ((x @ p["w"]) * jnp.tanh(x @ p["w"])) @ jnp.ones(p["w"].shape[1]), []),
    "data, by ones": (lambda p, x: x @ jnp.ones((5, 5)) @ p["w"], []),
    "a product with unequal numbers": (lambda p, x: (x @ p["w"]) @ jnp.arange(float(p["w"].shape[1])), []),
    "a mean over two axes": (lambda p, x: jnp.tanh(x @ p["w"]).mean((1, 2)), [48]),
    "squares": (lambda p, x: ((x @ p["w"]) ** 2).sum(-1), [8]),
    "a product with itself": (lambda p, x: jnp.einsum("btn,btn->bt", x @ p["w"], x @ p["w"]), []),
    "a product of one activation": (lambda p, x: (lambda h: jnp.einsum("btn,btn->bt", h, h))(x @ p["w"]), [8]),
    "a weight's own axis": (lambda p, x: ((x @ p["w"]) * p["g"]).sum(-1), []),
    "a product of two activations": (lambda p, x: ((x @ p["w"]) * jnp.tanh(x @ p["w"])).sum(-1), []),
    "data": (lambda p, x: x.sum(-1, keepdims=True) * (x @ p["w"]), []),
    "an axis that einsum sums over first": (lambda p, x: jnp.einsum("btn,no->bo", x @ p["w"], p["g"][0].T), [6]),
}


def walked(apply, width, depth=1):
    shapes = {"w": (5, width), "g": (1, 1, width), "h": [(width, width)] * depth}
    params = jax.tree.map(lambda shape: jnp.ones(shape), shapes, is_leaf=lambda s: isinstance(s, tuple))
    leaves, tree = jax.tree.flatten(params)
    found = walk(prim.trace(lambda leaves, fixed, x: apply(jax.tree.unflatten(tree, leaves), x), leaves, [], X), len(leaves))
    return found, leaf_shapes(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("name", FOUND)
def test_what_is_a_sum_that_no_leaf_weighs(name):
    apply, sizes = FOUND[name]
    found, shapes = walked(apply, 8)
    assert [one.size for one in sums(found)] == sizes
    assert all(shapes[leaf].path == "['w']" for one in sums(found) for leaf in one.leaves)


def stack(p, x):
    h = x @ p["w"]
    for w in p["h"]:
        h = jnp.tanh(h @ w)
        h = h * jax.nn.sigmoid(h.sum(-1, keepdims=True) / 2) + h.mean(1, keepdims=True)
    return h


@pytest.mark.parametrize("depth", [1, 3])
def test_layers_may_differ_in_number(depth):
    ours, theirs = walked(stack, 16, 3), walked(stack, 8, depth)
    pairs = growing_sums(ours[0], theirs[0], ours[1], theirs[1])
    # One of each layer's two: positions do not grow.
    assert [(a.size, b.size) for a, b in pairs] == [(16, 8)] * 3
    assert [(base, exponent) for _, base, exponent in unscaled(ours[0], theirs[0], pairs)] == [(8, 0.0)] * 3
    assert growing_sums(ours[0], ours[0], ours[1], ours[1]) == ()
