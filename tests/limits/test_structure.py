"""Equations that are the same but for what they read, and those that only look it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits.roll import roll, rolled
from tests.limits.programs import EXACT, X, scans


def rule_per_layer(slope, x):
    """All layers the same function, with a derivative each."""
    for layer in range(8):
        own = jax.custom_jvp(lambda h: jnp.sin(h) + h)
        own.defjvp(functools.partial(lambda s, ps, ts: (jnp.sin(ps[0]) + ps[0], s * ts[0]), slope(layer)))
        x = own(jnp.tanh(x)) * 0.9
    return x


def powers(x):
    for layer in range(8):
        x = jnp.tanh(x + 0.1) + jax.lax.integer_pow(x, layer + 2) / 2
    return x


def branches(x):
    for layer in range(8):
        x = jax.jit(lambda h, number=float(layer): jnp.sin(h) + number * jnp.cos(h))(x) * 0.5 + 0.1
    return x


def growing(x):
    for _ in range(8):
        x = jnp.tanh(jnp.concatenate([x, x[:1]])) * 0.5 + 0.1
    return x


def from_all_before(x):
    seen = [x]
    for layer in range(8):
        seen.append(jnp.tanh(seen[-1]) + 0.1 * jnp.cos(seen[layer // 2]))
    return seen[-1]


def mixed_types(x):
    for layer in range(8):
        x = (x.astype(jnp.float32 if layer % 3 == 1 else jnp.float64) * 2).astype(jnp.float64) + jnp.sin(x)
    return x


@pytest.mark.parametrize("f", [powers, branches, growing, from_all_before, mixed_types, functools.partial(rule_per_layer, float)])
def test_layers_that_differ_are_left_alone(f, x64):
    jaxpr = jax.make_jaxpr(f)(X)
    assert roll(jaxpr) is jaxpr
    with jax.disable_jit():  # The same operations one by one.
        np.testing.assert_array_equal(rolled(f)(jnp.asarray(X)), f(jnp.asarray(X)))


def test_equal_derivative_rules_are_equal_whoever_made_them(x64):
    f = functools.partial(rule_per_layer, lambda layer: 0.7)
    assert scans(roll(jax.make_jaxpr(f)(X))) == 1
    slopes = jax.jacobian(rolled(f))(jnp.asarray(X))
    np.testing.assert_allclose(slopes, jax.jacobian(f)(jnp.asarray(X)), **EXACT)
    fewer = functools.partial(rule_per_layer, lambda layer: 0.7 if layer < 5 else 0.6)
    assert scans(roll(jax.make_jaxpr(fewer)(X), saved=4)) == 2
    np.testing.assert_allclose(jax.jacobian(rolled(fewer, saved=4))(jnp.asarray(X)), jax.jacobian(fewer)(jnp.asarray(X)), **EXACT)
