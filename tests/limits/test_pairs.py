"""Where two examples meet in one product of all their entries, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from threadpoolctl import threadpool_info

import paperjax as pj
from paperjax.limits.pairs import one_thread_each, product, without_product

X = np.random.default_rng(0).normal(size=(2, 6))
IMAGE = np.random.default_rng(1).normal(size=(2, 2, 3, 1))


def _met(fn, shape, *more):
    return without_product(jax.make_jaxpr(fn)(jnp.zeros(shape), jnp.zeros(shape), *more))


@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (lambda a, b, c: jnp.tanh(c * (a @ b)), X),
        (lambda a, b, c: jnp.tanh(c * (b @ a)), X),
        (lambda a, b, c: (c * (a[None] @ b[None].T), c), X),
        (lambda a, b, c: c + a.reshape(-1) @ b.reshape(-1), IMAGE),
        (lambda a, b, c: c + jnp.tensordot(a, b, 3), IMAGE),
        (lambda a, b, c: jnp.einsum("ijk,ijk->", a[None, :, :, 0], b[None, :, :, 0]) ** 2 + c, IMAGE),
    ],
)
def test_programs_of_one_product(fn, x):
    found = _met(fn, x.shape[1:], jnp.zeros(()))
    assert found is not None
    met, left = found.jaxpr.invars[0].aval, found.jaxpr.eqns
    assert met.size == 1
    assert not any(eqn.primitive.name == "dot_general" for eqn in left)
    alone = jex.jaxpr_as_fun(found)(jnp.asarray(product(x[:1], x[1:], met.dtype)).reshape(met.shape), jnp.asarray(0.7))
    for a, b in zip(alone, jax.tree.leaves(fn(jnp.asarray(x[0]), jnp.asarray(x[1]), 0.7))):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        (lambda a, b: (a @ b) * a.sum(), (6,)),
        (lambda a, b: a @ b + b @ a, (6,)),
        (lambda a, b: (a @ b, a), (6,)),
        (lambda a, b: (2 * a) @ b, (6,)),
        (lambda a, b: a @ a, (6,)),
        (lambda a, b: a[::-1] @ b, (6,)),
        (lambda a, b: jnp.exp(a) @ jnp.exp(b), (6,)),
        (lambda a, b: a @ b, (2, 2)),
        (lambda a, b: a.T.reshape(-1) @ b.reshape(-1), (2, 3)),
        # The entries meet in another order: x_ij y_ji.
        (lambda a, b: jnp.einsum("ij,ji->", a, b), (3, 3)),
        (lambda a, b: jax.lax.reshape(a, (6,), (1, 0)) @ b.reshape(-1), (2, 3)),
        (lambda a, b: a.astype(jnp.float16) @ b.astype(jnp.float16), (6,)),
        (lambda a, b: a.sum() + b.sum(), (6,)),
    ],
)
def test_any_other_program_is_left_as_it_is(fn, shape):
    assert _met(fn, shape) is None


def test_a_batch_with_itself_is_one_product_and_numbers_too_large_are_quiet(recwarn):
    x = np.random.default_rng(2).normal(size=(40, 3, 7))
    flat = x.reshape(40, 21)
    np.testing.assert_allclose(product(x, x, np.float64), flat @ flat.T, rtol=1e-13)
    np.testing.assert_allclose(product(x[:3], x, np.float32), flat[:3] @ flat.T, rtol=1e-5, atol=1e-5)
    assert product(x, x, np.float32).ctypes.data % 64 == 0
    assert np.isinf(product(1e30 * x, x * 1e30, np.float32)).any()
    assert not recwarn.list


def test_products_take_one_thread_each_and_have_theirs_back():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    assert before
    with one_thread_each():
        assert set(threads()) == {1}
    assert threads() == before


def dense(skip):
    def family(width):
        def init(key, x):
            a, b, c = jax.random.split(key, 3)
            shapes = [(a, (x[0].size, width)), (b, (width, 1)), (c, (x[0].size, 1))]
            return [jax.random.normal(k, shape) for k, shape in shapes[: 2 + skip]]

        def apply(params, x):
            flat = x.reshape(len(x), -1)
            h = jax.nn.relu(flat @ params[0]) @ params[1] / width**0.5
            return h + flat @ params[2] if skip else h

        return pj.Model(init, apply)

    return family


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("skip", [False, True])
def test_both_ways_are_the_arc_cosine_kernel(skip, dtype):
    # Cho & Saul (2009) at degree 1, with the skip's own product; inputs of two axes, which the network flattens.
    x = np.random.default_rng(3).normal(size=(300, 3, 4)).astype(np.float32)
    flat = x.reshape(len(x), -1).astype(np.float64)
    root = np.linalg.norm(flat, axis=1)
    cos = np.clip(flat @ flat.T / np.outer(root, root), -1, 1)
    expected = np.outer(root, root) / (2 * np.pi) * (np.sqrt(1 - cos**2) + (np.pi - np.arccos(cos)) * cos) + skip * flat @ flat.T
    found = pj.limit(dense(skip), x, dtype=dtype, progress=False).nngp
    np.testing.assert_allclose(np.asarray(found), expected, atol=(2e-6 if dtype == "float32" else 1e-7) * expected.max())


def test_threads_that_hold_one_thread_each_leave_what_they_found():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    first, second = one_thread_each(), one_thread_each()
    first.__enter__()
    second.__enter__()
    # Not the last in, first out: they are of two threads.
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before
