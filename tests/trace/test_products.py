"""Which uses of a leaf are products whose factors give its gradient, and which are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.trace.products import find_products

X, W, B = jnp.ones((2, 3)), jnp.arange(12.0).reshape(3, 4), jnp.ones(4)


def found(fn, *leaves, x=X):
    return find_products(jax.make_jaxpr(fn)(*leaves, x), len(leaves))


@jax.custom_vjp
def own(w, x):
    return x @ w


own.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


def over_layers(w, x):
    return jax.lax.scan(lambda h, row: (jnp.tanh(h @ row), None), x, w)[0]


def over_time(w, x):
    return jax.lax.scan(lambda h, row: (jnp.tanh(row[None] + h @ w), None), jnp.zeros((1, 3)), x)[0]


# Name: function, leaves, products as (leaf, primitive, scale, loops), leaves that have another use with its primitive.
CASES = {
    "plain": (lambda w, x: x @ w, [W], [(0, "dot_general", 1.0, ())], {}),
    "scaled": (lambda w, x: x @ (-w / jnp.sqrt(4.0)), [W], [(0, "dot_general", -0.5, ())], {}),
    "transposed, cast, reshaped": (
        lambda w, x: x @ w.T.reshape(2, 2, 3).astype(jnp.float32).reshape(4, 3).T,
        [W],
        [(0, "dot_general", 1.0, ())],
        {},
    ),
    "slices": (lambda w, x: (x @ w[:, :2]) * (x @ w[:, 2:]), [W], [(0, "dot_general", 1.0, ())] * 2, {}),
    "twice": (lambda w, x: (x @ w) @ w.T, [W], [(0, "dot_general", 1.0, ())] * 2, {}),
    "in jit and remat": (lambda w, x: jax.jit(jax.checkpoint(lambda v: x @ v))(w * 2.0), [W], [(0, "dot_general", 2.0, ())], {}),
    "layers": (over_layers, [jnp.ones((5, 3, 3))], [(0, "dot_general", 1.0, (True,))], {}),
    "time": (over_time, [jnp.ones((3, 3))], [(0, "dot_general", 1.0, (False,))], {}),
    "two leaves multiplied": (
        lambda a, b, x: x @ (a @ b),
        [W, jnp.ones((4, 2))],
        [(0, "dot_general", 1.0, ()), (1, "dot_general", 1.0, ())],
        {},
    ),
    "rows": (lambda w, x: w[x], [W], [(0, "gather", 1.0, ())], {}),
    "gain": (lambda g, x: x * g[None], [jnp.ones(3)], [], {0: "mul"}),
    "nonlinear in the leaf": (lambda w, x: x @ jnp.tanh(w), [W], [], {0: "tanh"}),
    "sum of leaves": (lambda w, v, x: x @ (w + v), [W, W], [], {0: "add", 1: "add"}),
    "both ways": (lambda w, x: (x @ w).sum() + jnp.sum(w**2), [W], [(0, "dot_general", 1.0, ())], {0: "integer_pow"}),
    "stopped": (lambda w, x: x @ jax.lax.stop_gradient(w), [W], [], {0: "stop_gradient"}),
    "own derivative": (own, [W], [], {0: "custom_vjp_call"}),
    # A scalar that an array of one number spreads: its gradient is a sum over the copies.
    "spread": (lambda s, x: x @ (s * jnp.full((3, 4), 2.0)), [jnp.ones(())], [], {0: "mul"}),
    "times 0": (lambda w, b, x: x @ (w * 0.0) + b[None], [W, B], [], {0: "mul", 1: "add"}),
    "branch": (lambda w, x: jax.lax.cond(x.sum() > 0, lambda v: x @ v, lambda v: -(x @ v), w), [W], [], {0: "cond"}),
    "copied": (lambda w, x: x @ jnp.broadcast_to(w[None], (2, 3, 4)).sum(0), [W], [], {0: "reduce_sum"}),
    "returned": (lambda w, x: w, [W], [], {0: "the output"}),
    "unused": (lambda w, x: x, [W], [], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_uses(name):
    fn, leaves, products, elsewhere = CASES[name]
    uses = found(fn, *leaves, x=jnp.zeros((2,), jnp.int32) if name == "rows" else X)
    assert [(p.value.leaf, p.eqn.primitive.name, p.value.scale, p.value.loops) for p in uses.products] == products
    assert uses.elsewhere == elsewhere


def test_entries_are_followed():
    uses = found(lambda w, x: x @ w[:, ::-1].T[1:3].T, W)
    entries = np.arange(12).reshape(3, 4)[:, ::-1].T[1:3].T
    np.testing.assert_array_equal(uses.products[0].value.entries(), entries)


def test_entries_of_a_scan_come_by_slices():
    w = jnp.ones((5, 3, 3))
    (product,) = found(lambda w, x: over_layers(w.transpose(0, 2, 1), x), w).products
    np.testing.assert_array_equal(product.value.entries(), np.arange(45).reshape(5, 3, 3).transpose(0, 2, 1))


def test_layers_are_slices_of_the_leaf_itself():
    w = jnp.ones((5, 3, 3))
    assert found(over_layers, w).layers == {0: 5}
    assert found(lambda w, x: over_layers(w[::-1], x), w).layers == {}
    assert found(lambda w, x: over_layers(w, x) @ w[0], w).layers == {}


@pytest.mark.parametrize("places", [(), (6,)])
def test_a_bias_belongs_to_its_product(places):
    x = jnp.ones((2, *places, 3))
    uses = find_products(jax.make_jaxpr(lambda w, b, x: jnp.tanh(x @ w + jnp.broadcast_to(b, (2, *places, 4))))(W, B, x), 2)
    (product,) = uses.products
    assert product.bias is not None
    assert product.bias.leaf == 1
    assert product.spread is not None
    np.testing.assert_array_equal(product.spread(), np.broadcast_to(np.arange(4), (2, *places, 4)))
    assert uses.elsewhere == {}


def test_a_bias_is_alone_where_the_product_has_another_reader():
    def net(w, b, x):
        y = x @ w
        return jnp.tanh(y + b[None]) + y

    uses = found(net, W, B)
    assert uses.products[0].bias is None
    assert uses.elsewhere == {1: "add"}
