"""Rolled programs against the programs written out: the same numbers, and as many equations at any depth."""

import functools
import time

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits.roll import roll, rolled
from tests.limits.programs import CASES, CHAINS, EXACT, K11, K12, K22, X, arccos, equations, scans


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_and_as_many_equations_at_any_depth(name, x64):
    f, args = CASES[name]
    args = [jnp.asarray(a) for a in args]
    sizes = []
    for depth in (8, 11, 14):
        jaxpr = jax.make_jaxpr(functools.partial(f, depth))(*args)
        ours = roll(jaxpr)
        sizes.append(equations(ours))
        assert sizes[-1] < equations(jaxpr)
        assert [(v.shape, v.dtype) for v in ours.out_avals] == [(v.shape, v.dtype) for v in jaxpr.out_avals]
    assert sizes[0] == sizes[1] == sizes[2]
    unrolled = jax.jit(functools.partial(f, 8))(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), jax.jit(rolled(functools.partial(f, 8)))(*args), unrolled)


@pytest.mark.parametrize("name", ["residual", "custom", "tape", "weights", "inside", "compiled"])
def test_through_transformations(name, x64):
    f = functools.partial(CHAINS[name], 7)
    ours, x = rolled(f), jnp.asarray(X)
    assert scans(jax.make_jaxpr(ours)(x)) >= 1

    def total(f, x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(x)))

    def all_of(f):
        batch = jnp.stack([x, 2 * x])
        out = jax.grad(functools.partial(total, f))(x), jax.vmap(f)(batch), jax.vmap(jax.grad(functools.partial(total, f)))(batch)
        # A rule for one direction only, as swish has in "custom", has no other.
        return out if name == "custom" else (*out, jax.jvp(f, (x,), (x,)), jax.hessian(functools.partial(total, f))(x))

    theirs = jax.jit(lambda: all_of(f))()
    # Gradients sum in another order: several roundings of numbers up to 100.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), jax.jit(lambda: all_of(ours))(), theirs)


def self_pass(x):
    seen = []
    for _ in range(9):
        x = jnp.tanh(1.3 * x) + 0.2 * x**2
        seen.append(dict(mean=jnp.mean(x), var=jnp.var(x)))
    return seen


def cross_pass(y, seen):
    for at in seen:
        y = jnp.sin(y * at["mean"]) / jnp.sqrt(1 + at["var"]) + 0.1 * y
    return y


def test_one_tape_for_two_passes(x64):
    x = jnp.asarray(X)
    both = jax.make_jaxpr(lambda x: cross_pass(x[::-1], self_pass(x)))(x)
    ours = roll(both)
    names = [eqn.primitive.name for eqn in ours.eqns]
    # The tape goes from one scan to the other as it is: nothing is taken apart or put together.
    assert names.count("scan") == 2
    apart = {"slice", "dynamic_slice", "squeeze", "stack", "concatenate"}
    assert not apart & set(names[names.index("scan") :])
    apart = jax.jit(lambda x: rolled(cross_pass)(x[::-1], rolled(self_pass)(x)))(x)
    expected = jax.jit(lambda x: cross_pass(x[::-1], self_pass(x)))(x)
    np.testing.assert_allclose(apart, expected, **EXACT)
    np.testing.assert_allclose(jax.jit(jax.jit(rolled(lambda x: cross_pass(x[::-1], self_pass(x)))))(x), expected, **EXACT)
    assert scans(jax.make_jaxpr(rolled(cross_pass))(x, self_pass(x))) == 1


KINDS = dict(residual=1, two_kinds=1, two_runs=2, stages=3, tape=2, compiled=1)


@pytest.mark.parametrize("name", KINDS)
def test_one_scan_per_kind_of_layer(name, x64):
    assert scans(roll(jax.make_jaxpr(functools.partial(CHAINS[name], 9))(X))) == KINDS[name]


def test_what_is_closed_over_is_differentiated(x64):
    def loss(rolling, w):
        def network(x):
            for layer in range(6):
                x = jnp.tanh(w[layer] * x) + jnp.mean(w) * x
            return jnp.sum(x)

        return rolling(network)(jnp.asarray(X))

    w = jnp.linspace(0.5, 1.5, 6)
    ours, theirs = (jax.grad(functools.partial(loss, rolling))(w) for rolling in (rolled, lambda f: f))
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    assert scans(jax.make_jaxpr(functools.partial(loss, rolled))(w)) == 1


def test_keys(x64):
    def draws(key, x):
        for _ in range(6):
            key, now = jax.random.split(key)
            x = x + 0.1 * jax.random.normal(now, x.shape) * jnp.sin(x)
        return key, x

    key = jax.random.key(3)
    jaxpr = roll(jax.make_jaxpr(draws)(key, X))
    assert scans(jaxpr) == 1
    ours, theirs = jax.jit(rolled(draws))(key, X), jax.jit(draws)(key, X)
    np.testing.assert_allclose(ours[1], theirs[1], **EXACT)
    assert jax.random.key_data(ours[0]).tolist() == jax.random.key_data(theirs[0]).tolist()


def test_on_several_devices(x64):
    def network(x):
        y = jnp.zeros(x.shape)
        for _ in range(6):
            y = jnp.tanh(y + x)
            slope = jnp.cos(y) + y
            y = 0.5 * slope + y
        return y, slope

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    x = jnp.linspace(-1, 1, 8)
    assert scans(jax.make_jaxpr(rolled(network))(x)) == 1
    ours, theirs = jax.jit(spread(rolled(network)))(x), jax.jit(spread(network))(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), ours, theirs)


def test_effects_happen_once_and_in_place(x64):
    def network(x, told):
        for layer in range(16):
            x = jnp.tanh(2 * x) + x / 3
            if layer == 7:
                jax.debug.callback(lambda x: told.append(float(x)), x[0])
        return x

    ours, theirs = [], []
    jaxpr = roll(jax.make_jaxpr(lambda x: network(x, ours))(X))
    assert [eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name in ("scan", "debug_callback")] == [
        "scan",
        "debug_callback",
        "scan",
    ]
    np.testing.assert_allclose(rolled(lambda x: network(x, ours))(X), network(jnp.asarray(X), theirs), **EXACT)
    jax.effects_barrier()
    np.testing.assert_allclose(ours, theirs, **EXACT)


def test_one_program_for_arguments_of_any_kind():
    def network(x, *, scale):
        for _ in range(6):
            x = dict(a=jnp.sin(x["a"] * scale) + 1, b=x["b"] @ x["b"] / 4 + jnp.outer(x["a"], x["a"]))
        return x, 3.0

    x = dict(a=X.astype(np.float32), b=np.eye(3, dtype=np.float32))
    ours, three = rolled(network)(x, scale=1.5)
    np.testing.assert_allclose(ours["b"], network(x, scale=1.5)[0]["b"], rtol=1e-5)
    assert float(three) == 3.0
    assert jax.tree.structure(ours) == jax.tree.structure(x)


@pytest.mark.parametrize("options", [dict(fewest=2), dict(saved=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match="at least 3 blocks and saves at least 1 equation"):
        rolled(jnp.sin, **options)


@pytest.mark.slow
def test_a_thousand_layers_cost_as_much_as_the_tracing(x64):
    ks = [jnp.asarray(k) for k in (K11, K12, K22)]
    jaxpr = jax.make_jaxpr(functools.partial(arccos, 1000))(*ks)
    assert len(jaxpr.eqns) > 20_000
    start = time.perf_counter()
    compiled = jax.jit(jax.extend.core.jaxpr_as_fun(roll(jaxpr))).lower(*ks).compile()
    # 0.4 s on two cores when nothing else runs.
    assert time.perf_counter() - start < 10
    sigma, theta = compiled(*ks)
    assert np.all(np.isfinite(sigma))
    assert np.all(np.isfinite(theta))
