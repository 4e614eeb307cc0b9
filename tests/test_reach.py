"""Dependence that is found in the trace, against what happens when a marked argument changes."""

import jax
import jax.numpy as jnp
import pytest

from paperjax.reach import reached

A, B = jnp.float32(0.5), jnp.float32(0.25)


def chain(a, b):
    """What b changes moves on by one place a step: it takes all of them to reach the first."""
    return jax.lax.fori_loop(0, 4, lambda i, c: (c[1] + 0.0, c[2] + 0.0, c[3] + 0.0, b), (a, a, a, a))


def scanned(a, b):
    (kept, summed), (rows, twice) = jax.lax.scan(lambda c, x: ((c[0], c[1] + x), (x, 2 * c[0])), (a, a), jnp.stack([b, b]))
    return kept, summed, rows, twice


@jax.custom_jvp
def custom(a, b):
    return a + 1, b + 1


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents))

FUNCTIONS = {
    "straight": (lambda a, b: (a + 1, a * b, b), [False, True, True]),
    "jit": (jax.jit(lambda a, b: (jnp.sin(a), jnp.tanh(b))), [False, True]),
    "remat": (jax.checkpoint(lambda a, b: (jnp.sin(a), jnp.tanh(b))), [False, True]),
    "custom derivative": (custom, [False, True]),
    "scan": (scanned, [False, True, True, False]),
    "slow loop": (chain, [True, True, True, True]),
    "while": (lambda a, b: jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] * b), (a, a)), [False, True]),
    "while, its end": (lambda a, b: jax.lax.while_loop(lambda c: c[0] < 4 * b, lambda c: (c[0] + 1, c[1] + 1), (a, a)), [True, True]),
    "cond": (lambda a, b: jax.lax.cond(a > 0, lambda: (a, b), lambda: (2 * a, a)), [False, True]),
    "cond, its choice": (lambda a, b: jax.lax.cond(b > 0, lambda: (a, b), lambda: (2 * a, a)), [True, True]),
    "constant": (lambda a, b: (jnp.ones(3), b), [False, True]),
}


@pytest.mark.parametrize(("fn", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_depends_on_the_second_argument(fn, expected):
    assert reached(jax.make_jaxpr(fn)(A, B), [False, True]) == expected
    assert reached(jax.make_jaxpr(fn)(A, B), [False, False]) == [False] * len(expected)
    # A result that moves when the argument does must have been found.
    moved = [bool(jnp.any(y != z)) for y, z in zip(jax.tree.leaves(fn(A, B)), jax.tree.leaves(fn(A, B - 1)))]
    assert all(found or not there for found, there in zip(expected, moved))


def test_a_value_that_leaves_through_a_reference_is_not_followed():
    def through_reference(a, b):
        ref = jax.new_ref(a)
        ref[...] = b
        return ref[...] + 0.0, a

    assert reached(jax.make_jaxpr(through_reference)(A, B), [False, True]) == [True, True]
    assert reached(jax.make_jaxpr(through_reference)(A, B), [True, False]) == [True, True]
