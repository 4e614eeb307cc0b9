"""Portions of a leaf's axis that do not grow alike, written by hand for small functions at two widths, and what is none."""

import jax
import jax.numpy as jnp
import pytest

from paperjax.trace.portions import unlike_portions

B, T, FIXED = 2, 4, 3


def found(shapes, apply, data):
    """At width 8 and at width 4: ``{(leaf, axis, part): [(first, size, size at the smaller width), ...]}``."""

    def trace(n):
        arrays = [[jax.ShapeDtypeStruct(s, jnp.float32) for s in of(n)] for of in (shapes, data)]
        return jax.make_jaxpr(lambda p, x: apply(n, *p, *x))(*arrays), len(arrays[0])

    (here, count), (there, _) = trace(8), trace(4)
    return {
        (p.leaf, p.axis, p.part): [(int(r.start[0]), int(r.size[0]), int(r.size[1])) for r in p.ranges]
        for p in unlike_portions(here, there, count)
    }


def rows(n):
    return [(B, FIXED), (B, n)]


def tokens(n):
    return [(B, T, FIXED), (B, T, n)]


def both(n):
    return [(FIXED + n, n)]


def heads(n, z, kv):
    """Queries, keys and values of heads of size 3; n // 4 heads of queries."""
    return jnp.split(z, [n // 4 * 3, n // 4 * 3 + kv * 3], -1)


def rotated(n, w, x, h):
    q = h @ w
    first, second, rest = q[:, :2], q[:, 2:4], q[:, 4:] if n > 4 else q[:, 3:]
    return jnp.concatenate([-second, first, rest], -1)


def rotated_in_turn(n, w, x, h):
    """GPT-J's: pairs of neighbours at first, the others as they are."""
    q = h @ w
    first, rest = q[:, :4], q[:, 4:]
    even, odd = first[:, ::2], first[:, 1::2]
    return jnp.concatenate([jnp.stack([even - odd, odd + even], -1).reshape(B, -1), rest], -1)


def rotated_in_halves(n, w, x, h):
    first, rest = jnp.split(h @ w, [2], -1)
    a, b = jnp.split(first, 2, -1)
    return jnp.concatenate([jnp.concatenate([-b, a], -1), rest], -1)


INSIDE_1 = {(0, 1, "inside"): [(0, 3, 3), (3, 8, 4)]}
INSIDE = {(0, 0, "inside"): [(0, 3, 3), (3, 8, 4)]}

UNLIKE = {
    "data and features": (both, lambda n, w, x, h: jnp.concatenate([x, h], -1) @ w, rows, INSIDE),
    "a function on the way": (both, lambda n, w, x, h: jnp.tanh(2 * jnp.concatenate([x, h], -1)) @ w, rows, INSIDE),
    "in another layout": (
        lambda n: [(n, n + FIXED)], lambda n, w, x, h: jnp.einsum("oi,ti->to", w, jnp.concatenate([h, x], -1)), rows,
        {(0, 1, "inside"): [(0, 8, 4), (8, 3, 3)]},
    ),
    "pixels": (
        lambda n: [(3, FIXED + n, n)],
        lambda n, w, x, h: jax.lax.conv_general_dilated(
            jnp.concatenate([x, h], -1), w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        tokens, INSIDE_1,
    ),
    "pixels flattened with their channels": (
        lambda n: [(T * (FIXED + n), n)], lambda n, w, x, h: jnp.concatenate([x, h], -1).reshape(B, -1) @ w, tokens,
        {(0, 0, "inside"): [r for t in range(4) for r in ((11 * t, 3, 3), (11 * t + 3, 8, 4))]},
    ),
    "a constant coordinate": (
        lambda n: [(n + 1, n)], lambda n, w, x, h: jnp.concatenate([h, jnp.ones((B, 1))], -1) @ w, rows,
        {(0, 0, "inside"): [(0, 8, 4), (8, 1, 1)]},
    ),
    "rows taken apart": (
        both, lambda n, w, x, h: jnp.tanh(h @ w[:n]) + x @ w[n:], rows, {(0, 0, "inside"): [(0, 8, 4), (8, 3, 3)]}
    ),
    "steps of a loop": (
        both,
        lambda n, w, x, h: jax.lax.scan(
            lambda h, x: (jnp.tanh(jnp.concatenate([x, h], -1) @ w), None), jnp.zeros((B, n)), jnp.swapaxes(x, 0, 1)
        )[0],
        tokens, INSIDE,
    ),
    "layers of a loop": (
        lambda n: [(2, n + FIXED, n)],
        lambda n, w, x, h: jax.lax.scan(lambda h, w: (jnp.tanh(jnp.concatenate([x, h], -1) @ w), None), h, w)[0],
        rows, INSIDE_1,
    ),
    "heads flattened": (
        # Three of the data's and n that grow, each of two coordinates.
        lambda n: [((FIXED + n) * 2, n)],
        lambda n, w, x, h: jnp.concatenate([jnp.stack([x, x], -1), jnp.stack([h, h], -1)], 1).reshape(B, -1) @ w,
        rows, {(0, 0, "inside"): [(0, 6, 6), (6, 16, 8)]},
    ),
    "columns taken apart": (
        lambda n: [(n, n + 3)], lambda n, w, x, h: (jnp.tanh((h @ w)[:, :n]), (h @ w)[:, n:]), rows,
        {(0, 1, "out"): [(0, 8, 4), (8, 3, 3)]},
    ),
    "columns taken apart before the product": (
        lambda n: [(n, n + 3)], lambda n, w, x, h: (h @ w[:, :n], h @ w[:, n:]), rows, {(0, 1, "out"): [(0, 8, 4), (8, 3, 3)]},
    ),
    "queries and fewer keys": (
        lambda n: [(n, (n // 4 + 2) * 3)], lambda n, w, x, h: heads(n, jnp.tanh(h @ w), 1), rows,
        {(0, 1, "out"): [(0, 6, 3), (6, 3, 3), (9, 3, 3)]},
    ),
    "the same by heads": (
        lambda n: [(n, (n // 4 + 2) * 3)],
        lambda n, w, x, h: jnp.split((h @ w).reshape(B, -1, 3), [n // 4, n // 4 + 1], 1), rows,
        {(0, 1, "out"): [(0, 6, 3), (6, 3, 3), (9, 3, 3)]},
    ),
    "heads as an axis of the leaf": (
        lambda n: [(n, n // 4 + 2, 3)],
        lambda n, w, x, h: jnp.split((h @ w.reshape(n, -1)).reshape(B, -1, 3), [n // 4, n // 4 + 1], 1), rows,
        {(0, 1, "out"): [(0, 2, 1), (2, 1, 1), (3, 1, 1)]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_portions_that_do_not_grow_alike(name):
    shapes, apply, data, expected = UNLIKE[name]
    assert found(shapes, apply, data) == expected


def dense_net(n, w, x, h):
    for k in range(2):
        h = jnp.concatenate([h, jnp.tanh(h @ w[: n * (k + 1), :n])], -1)
    return h


ALIKE = {
    "all parts grow": (lambda n: [(3 * n, n)], lambda n, w, x, h: jnp.concatenate([h, jnp.tile(h, (1, 2))], -1) @ w, rows),
    "rows that grow": (lambda n: [(2 * n, n)], dense_net, rows),
    "a token for the class": (
        lambda n: [(1, n), (n, n)], lambda n, e, w, x, h: jnp.concatenate([jnp.broadcast_to(e, (B, 1, n)), h], 1) @ w, tokens,
    ),
    "features of the input": (lambda n: [(2 * FIXED, n)], lambda n, w, x, h: jnp.concatenate([jnp.sin(x), jnp.cos(x)], -1) @ w, rows),
    "padded with zeros": (lambda n: [(n, n)], lambda n, w, x, h: jnp.pad(x, ((0, 0), (0, n - FIXED))) @ w, rows),
    "features padded with zeros": (lambda n: [(n + 2, n)], lambda n, w, x, h: jnp.pad(h, ((0, 0), (1, 1))) @ w, rows),
    "zeros beside the data": (
        lambda n: [(n + FIXED, n)], lambda n, w, x, h: jnp.concatenate([x, jnp.zeros((B, n))], -1) @ w, rows,
    ),
    "a leaf for each": (
        lambda n: [(FIXED, n), (n, n)], lambda n, u, w, x, h: jnp.concatenate([x, h], -1) @ jnp.concatenate([u, w], 0), rows,
    ),
    "some positions rotated": (lambda n: [(n, n)], rotated, rows),
    "some neighbours rotated": (lambda n: [(n, 2 * n)], rotated_in_turn, rows),
    "some halves rotated": (lambda n: [(n, n)], rotated_in_halves, rows),
    "turned around": (lambda n: [(n, n)], lambda n, w, x, h: jnp.roll(h @ w, 1, -1), rows),
    "they go on as one vector": (
        lambda n: [(n, n), (n, n)],
        lambda n, u, w, x, h: (h + jnp.concatenate([(h @ u)[:, :2], jnp.tanh(h @ u)[:, 2:]], -1)) @ w, rows,
    ),
    "queries, keys and values": (lambda n: [(n, 3 * n)], lambda n, w, x, h: jnp.split(h @ w, 3, -1), rows),
    "parts of every head": (
        lambda n: [(n, 6 * n)], lambda n, w, x, h: jnp.split((h @ w).reshape(B, n, 6), [2], -1), rows,
    ),
    "one coordinate alone": (lambda n: [(n, n)], lambda n, w, x, h: (h @ w)[:, 0], rows),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_none(name):
    assert found(*ALIKE[name]) == {}


def test_other_wiring_is_not_followed():
    assert found(both, lambda n, w, x, h: jnp.concatenate([x, *jnp.split(h, n // 4, -1)], -1) @ w, rows) == {}
