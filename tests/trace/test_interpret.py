"""A function run from its trace is the function; edits and taps act where they are said to, also inside loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.trace import primitives as prim
from paperjax.trace.interpret import Edit, edited, operand_of

X = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
W = jax.random.normal(jax.random.key(0), (4, 4))
WS = jax.random.normal(jax.random.key(1), (3, 4, 4))


def times(c):
    return lambda value: c * value


@jax.custom_jvp
def softcap(x):
    return jnp.tanh(x)


softcap.defjvp(lambda primals, tangents: (softcap(primals[0]), tangents[0]))


def layered(ws, x):
    """A scan with remat, jit inside, a cond and a function with a derivative of its own."""

    def block(h, w):
        z = jax.jit(lambda h, w: jnp.tanh(h @ w))(h, w)
        return h + jax.lax.cond(z.sum() > 0, jnp.sin, jnp.cos, softcap(z)), z.mean()

    h, means = jax.lax.scan(jax.checkpoint(block), x, ws)
    return {"h": h, "means": means, "n": 3}


def repeated(w, x):
    return jax.lax.while_loop(lambda s: s[1] < 3, lambda s: (jnp.tanh(s[0] @ w), s[1] + 1), (x, 0))[0]


def same(a, b):
    # One function compiled twice, in float32.
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=5e-6), a, b)


@pytest.mark.parametrize("fn", [lambda f: f, jax.jit, lambda f: jax.jit(jax.checkpoint(f))])
def test_without_edits_it_is_the_function(fn):
    plain, tapped = edited(layered, {}, ())
    same(fn(plain)(WS, X), layered(WS, X))
    same(tapped(WS, X), (layered(WS, X), {}))
    plain, _ = edited(repeated, {}, ())
    same(fn(plain)(W, X), repeated(W, X))


def test_its_derivatives_are_the_functions():
    """Also that of softcap, which is 1 by its own rule and not by its formula."""
    plain, _ = edited(layered, {}, ())
    same(jax.grad(lambda ws: plain(ws, X)["h"].sum())(WS), jax.grad(lambda ws: layered(ws, X)["h"].sum())(WS))
    same(jax.jvp(lambda x: plain(WS, x)["h"], (X,), (X,)), jax.jvp(lambda x: layered(WS, x)["h"], (X,), (X,)))


def test_it_maps_as_the_function_does():
    plain, _ = edited(layered, {}, ())
    many = jnp.stack([WS, 2 * WS])
    same(jax.vmap(plain, (0, None))(many, X), jax.vmap(layered, (0, None))(many, X))
    same(jax.lax.map(lambda ws: plain(ws, X), many), jax.lax.map(lambda ws: layered(ws, X), many))


def test_a_flax_network_with_scan_and_remat_is_itself():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return h + nn.Dense(4)(nn.gelu(nn.LayerNorm()(h))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
            return nn.Dense(2)(blocks()(x, None)[0])

    params = Net().init(jax.random.key(0), X)
    same(edited(Net().apply, {}, ())[0](params, X), Net().apply(params, X))


def path_to(fn, args, op, nth=0):
    """The path of the nth equation with this primitive, in the order of the walk's numbering."""

    def every(jaxpr, path):
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            if eqn.primitive.name == op:
                yield (*path, i)
            inner = prim.called(eqn)
            if inner is not None:
                yield from every(inner, (*path, i, 0))
            if eqn.primitive.name == "scan":
                yield from every(prim.closed(eqn.params["jaxpr"]), (*path, i, 0))
            if eqn.primitive.name == "while":
                yield from every(prim.closed(eqn.params["body_jaxpr"]), (*path, i, 1))
            for n, branch in enumerate(eqn.params.get("branches", ()) if eqn.primitive.name == "cond" else ()):
                yield from every(prim.closed(branch), (*path, i, n))

    return list(every(jax.make_jaxpr(fn)(*args), ()))[nth]


def test_edits_of_operand_and_result_inside_scan_remat_and_jit():
    path = path_to(layered, (WS, X), "dot_general")
    assert len(path) > 3
    by_weights = layered(2 * WS, X)
    for operand in (0, 1, None):
        plain, _ = edited(layered, {path: [Edit("dot_general", operand, times(2.0))]}, ())
        same(plain(WS, X), by_weights)
        same(jax.jit(plain)(WS, X), by_weights)
    grads = jax.grad(lambda ws: plain(ws, X)["h"].sum())(WS)
    same(grads, jax.grad(lambda ws: layered(2 * ws, X)["h"].sum())(WS))


def test_two_edits_of_one_equation_both_act():
    path = path_to(layered, (WS, X), "dot_general")
    plain, _ = edited(layered, {path: [Edit("dot_general", 0, times(2.0)), Edit("dot_general", None, times(3.0))]}, ())
    same(plain(WS, X), layered(6 * WS, X))


def test_one_operand_of_x_plus_x_alone():
    plain, _ = edited(lambda x: x + x, {(0,): [Edit("add", 1, times(5.0))]}, ())
    same(plain(X), 6 * X)


def test_an_operand_that_is_a_number_can_be_edited():
    plain, _ = edited(lambda x: 2.0 * x, {(0,): [Edit("mul", 0, times(3.0))]}, ())
    same(plain(X), 6 * X)


def test_edits_inside_a_while_loop_and_a_branch():
    path = path_to(repeated, (W, X), "dot_general")
    same(edited(repeated, {path: [Edit("dot_general", None, times(0.5))]}, ())[0](W, X), repeated(0.5 * W, X))

    def either(x):
        return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)

    path = path_to(either, (X,), "sin")
    plain, _ = edited(either, {path: [Edit("sin", None, times(2.0))]}, ())
    same(plain(X), 2 * jnp.sin(X))
    same(plain(-X), jnp.cos(X))


def test_taps_inside_a_scan_come_stacked():
    path = path_to(layered, (WS, X), "tanh")
    _, tapped = edited(layered, {}, [path, (0,)])
    result, seen = tapped(WS, X)
    same(result, layered(WS, X))
    assert seen[path].shape == (3, *X.shape)
    same(seen[path][0], jnp.tanh(X @ WS[0]))
    same(seen[path].mean((1, 2)), result["means"])
    # The gradient goes through taps too.
    total = jax.grad(lambda ws: tapped(ws, X)[1][path].sum())(WS)
    same(total, jax.grad(lambda ws: X.size * layered(ws, X)["means"].sum())(WS))


@pytest.mark.parametrize(
    ("path", "op", "message"),
    [
        (lambda: path_to(layered, (WS, X), "tanh"), "sin", "it is a tanh, where the plan found a sin"),
        (lambda: (99,), "add", r"\(99,\).*no such equation"),
        (lambda: (*path_to(layered, (WS, X), "dot_general")[:-1], 99), "add", "no such equation"),
        (lambda: (*path_to(layered, (WS, X), "dot_general"), 0, 0), "add", "inside a dot_general"),
        (lambda: (*path_to(layered, (WS, X), "custom_jvp_call"), 0, 0), "tanh", "derivative is written by hand"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(path, op, message):
    plain, _ = edited(layered, {path(): [Edit(op, None, times(2.0))]}, ())
    with pytest.raises(ValueError, match=message):
        plain(WS, X)


@pytest.mark.parametrize(
    ("fn", "args", "op"), [(repeated, (W, X), "tanh"), (lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), (X,), "sin")]
)
def test_taps_where_their_number_is_not_known_are_refused(fn, args, op):
    _, tapped = edited(fn, {}, [path_to(fn, args, op)])
    with pytest.raises(ValueError, match="cannot be recorded"):
        tapped(*args)


def test_operands_are_tapped_as_results_are():
    """The two operands of the product inside scan, remat and jit, and beside them the result: three keys of one scan."""
    path = path_to(layered, (WS, X), "dot_general")
    keys = [operand_of(path, 0), operand_of(path, 1), path]
    result, seen = edited(layered, {}, keys)[1](WS, X)
    same(result, layered(WS, X))
    assert set(seen) == set(keys)
    same(seen[keys[1]], WS)
    same(seen[keys[0]][0], X)
    same(jnp.einsum("lij,ljk->lik", seen[keys[0]], seen[keys[1]]), seen[path])
    with pytest.raises(ValueError, match="no such equation"):
        edited(layered, {}, [operand_of((99,), 0)])[1](WS, X)
    path = path_to(repeated, (W, X), "dot_general")
    with pytest.raises(ValueError, match="cannot be recorded"):
        edited(repeated, {}, [operand_of(path, 0)])[1](W, X)
