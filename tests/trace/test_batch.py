"""Where examples of a batch meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.trace.batch import coupling, size_read
from tests.trace.zoo_models import ZOO

X, W = jnp.ones((4, 6, 3)), jnp.ones((3, 5))


def running(w, x):
    return jax.lax.scan(lambda total, row: (total + row, total), jnp.zeros(x.shape[1:]), x)[1] @ w


MET = {
    "mean": lambda w, x: (x - x.mean(0, keepdims=True)) @ w,
    "merged with places": lambda w, x: (x.reshape(-1, 3) - x.reshape(-1, 3).max(0, keepdims=True)).reshape(x.shape) @ w,
    "Gram matrix": lambda w, x: jnp.einsum("ntd,mtd->nm", x, x) @ (x @ w)[:, 0],
    "roll": lambda w, x: jnp.roll(x, 1, 0) @ w,
    "softmax over examples": lambda w, x: jax.nn.softmax(x @ w, axis=0),
    "scan over examples": running,
    "sorted": lambda w, x: jnp.sort(x @ w, axis=0),
    "first example": lambda w, x: x @ w + (x[:1] @ w),
    "cumulative": lambda w, x: jnp.cumsum(x @ w, axis=0),
    "divided by their number": lambda w, x: x @ w / x.shape[0],
    "sum of segments": lambda w, x: x @ w + jax.ops.segment_sum(x @ w, jnp.zeros(x.shape[0], int), 1),
    "singular values": lambda w, x: x @ w * jnp.linalg.svd(x[:, 0], full_matrices=False)[1][0],
    "reduce": lambda w, x: x @ w + jax.lax.reduce(x @ w, jnp.float32(0), lambda a, b: a + b + a * b, (0,))[None],
    "taken apart": lambda w, x: x @ w + sum(jnp.split(x @ w, x.shape[0])),
    "numbered": lambda w, x: x @ w * jnp.arange(1.0, x.shape[0] + 1)[:, None, None],
    "numbered by numpy": lambda w, x: x @ w * np.arange(1.0, x.shape[0] + 1, dtype=np.float32)[:, None, None],
    "noise": lambda w, x: x @ w + jax.random.normal(jax.random.key(0), (*x.shape[:2], 5)),
    "a key for each": lambda w, x: jax.vmap(lambda k, x: x @ w + jax.random.normal(k, (5,))[None])(
        jax.random.split(jax.random.key(0), x.shape[0]), x
    ),
    "dealt out anew": lambda w, x: x[:, 0].T.reshape(x.shape[0], 3) @ w,
    "places for examples": lambda w, x: x.reshape(6, x.shape[0], 3).swapaxes(0, 1) @ w,
    "merged and parted the other way": lambda w, x: (x.reshape(-1, 3) @ w).reshape(6, x.shape[0], 5).sum(0),
    "two orders": lambda w, x: (x.reshape(-1, 3) + x.swapaxes(0, 1).reshape(-1, 3)).reshape(x.shape) @ w,
    "all of the top": lambda w, x: jax.lax.top_k(x, x.shape[0], axis=0)[0] @ w,
    "about all of the top": lambda w, x: jax.lax.approx_max_k(x, x.shape[0], reduction_dimension=0)[0] @ w,
    "in jit": lambda w, x: jax.jit(lambda h: h - h.sum(0, keepdims=True))(x @ w),
}
APART = {
    "product": lambda w, x: x @ w,
    "a mean that is only looked at": lambda w, x: (x @ w, x.mean())[0],
    "mean over places": lambda w, x: x.mean(1) @ w,
    "attention": lambda w, x: jax.nn.softmax(jnp.einsum("ntd,nsd->nts", x, x)) @ x @ w,
    "map over examples": lambda w, x: jax.lax.map(lambda row: row @ w, x),
    "merged and parted": lambda w, x: (x.reshape(-1, 3) @ w).reshape(*x.shape[:2], 5),
    "counted in a loop": lambda w, x: jax.lax.fori_loop(0, 2, lambda i, h: h + i.astype(h.dtype), x) @ w,
    "carried beside a number": lambda w, x: jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] * c[0]), None), (1.0, x), None, length=2)[0][1] @ w,
    "merged behind": lambda w, x: (x.swapaxes(0, 1).reshape(-1, 3) @ w).reshape(6, x.shape[0], 5).swapaxes(0, 1),
    "merged with both": lambda w, x: jnp.tanh(x.swapaxes(0, 1).reshape(2, -1, 3) @ w).reshape(2, 3, x.shape[0], 5).sum((0, 1)),
    "top of each": lambda w, x: jax.lax.top_k(x, 2)[0] @ w[:2] + jax.lax.approx_max_k(x, 2)[0] @ w[:2],
    "heads": lambda w, x: (x @ w).reshape(x.shape[0], 6, 1, 5).transpose(0, 2, 1, 3).reshape(-1, 6, 5).reshape(x.shape[0], 30),
    "rematerialized": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
    "constants": lambda w, x: (x + np.ones(x.shape, np.float32)) @ w / x.shape[1],
    "noise of one example": lambda w, x: x @ w + jax.random.normal(jax.random.key(0), (1, x.shape[1], 5)),
    "rows one by one": lambda w, x: jax.vmap(lambda row: row @ w + w[row[0, 0].astype(int)][None])(x),
    "solved": lambda w, x: jax.vmap(lambda row: jnp.linalg.solve(row[:3], row[3:]))(x) @ w,
    "empty": lambda w, x: jnp.concatenate([x[:, :0], x], 1) @ w + x[:, :0].sum((1, 2))[:, None, None],
    "moved": lambda w, x: jnp.moveaxis(jnp.moveaxis(x, 0, -1).sum(0), -1, 0) @ w,
    "a kernel for each": lambda w, x: jax.vmap(
        lambda row: jax.lax.conv_general_dilated(
            row[None], (row[:1, :, None] * w[None]), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0]
    )(x),
    "scan over places": lambda w, x: jax.lax.scan(lambda h, row: (h + row, None), jnp.zeros(x[:, 0].shape), x.swapaxes(0, 1))[0] @ w,
}


@pytest.mark.parametrize("name", MET)
def test_met(name):
    assert coupling(MET[name], W, X) is not None


@pytest.mark.parametrize("name", APART)
def test_apart(name):
    assert coupling(APART[name], W, X) is None


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        case = ZOO[name]
        model = case.family(**case.base)
        params = jax.eval_shape(model.init, jax.random.key(0), case.x)
        assert (coupling(model.apply, params, case.x) is None) == (name != "resnet")


SIZE_READ = {
    "a branch": lambda w, x: (jnp.tanh if x.shape[0] > 1 else jnp.sin)(x @ w),
    "a branch for large batches": lambda w, x: jnp.sin(x @ w) if x.shape[0] < 4 else 2 * jnp.sin(x @ w),
    "a number": lambda w, x: x @ w * (0.5 if x.shape[0] > 3 else 1.0),
}


@pytest.mark.parametrize("name", SIZE_READ)
def test_the_size_of_a_batch_is_read(name):
    assert size_read(SIZE_READ[name], W, X) is not None
    assert size_read(SIZE_READ[name], W, X[:1]) is None
    assert jax.jit(lambda x: x + float(size_read(SIZE_READ[name], W, X) is not None))(0.0) == 1


WIRED_OTHERWISE = {
    "repeated": lambda w, x: jnp.concatenate([w[:1, None] if x.shape[0] == 1 else jnp.tile(w[:1, None], (x.shape[0], 1, 1)), x @ w], 1),
    "two ways to one number": lambda w, x: x @ w if x.shape[0] == 1 else jnp.einsum("ntd,do->nto", x + 0.0, w),
    "not a number": lambda w, x: jnp.sqrt(x @ w) if x.shape[0] == 1 else jnp.sqrt(x @ w + 0.0),
}


@pytest.mark.parametrize("name", [*WIRED_OTHERWISE, *APART])
def test_one_example_is_one_of_the_batch(name):
    assert size_read({**WIRED_OTHERWISE, **APART}[name], W, X) is None


def test_integers_and_keys_for_the_size_of_a_batch():
    def model(params, x):
        table, key = params
        return table[x] if x.shape[0] == 1 else table[x + 0] * jax.random.uniform(key)

    assert size_read(model, (W, jax.random.key(0)), jnp.ones((4, 2), int)) is None
    assert size_read(lambda w, x: w[x] if x.shape[0] == 1 else w[x + 0], W, jnp.ones((4, 2), int)) is None
    assert size_read(lambda w, x: w[x] if x.shape[0] == 1 else w[x + 1], W, jnp.ones((4, 2), int)) == "a branch"
