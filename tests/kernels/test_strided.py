"""Convolutions in blocks against XLA's strided ones: results, and derivatives by image and kernel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from paperjax.kernels.strided import by_rows, in_blocks
from paperjax.trace.products import find_products

pytestmark = pytest.mark.usefixtures("x64")
CASES = [
    (size, window, stride, padding, groups)
    for size, window, stride, padding, groups in itertools.product((5, 6), (1, 2, 3), (2, 3), ((0, 0), (1, 1), (0, 2)), (1, 2))
    if (window, padding) not in ((1, (0, 2)), (2, (1, 1)))
]


def convolution(size, window, stride, padding, groups):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, size, 7, 4))), jnp.asarray(rng.normal(size=(window, 3, 4 // groups, 6)))

    def apply(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (stride, 2), (padding, (1, 1)), dimension_numbers=numbers, feature_group_count=groups)

    return apply, x, w


@pytest.mark.parametrize("case", CASES[::4] + CASES[1::5])
def test_blocks(case):
    apply, x, w = convolution(*case)
    compute = in_blocks(jax.make_jaxpr(apply)(x, w).eqns[0], "cpu")
    if compute is None:
        pytest.skip("blocks save no products here")
    (y, pull), (z, pull_blocks) = jax.vjp(apply, x, w), jax.vjp(lambda x, w: compute((x, w))[0], x, w)
    # Float64: sums of at most 100 products of order one.
    for one, other in zip((y, *pull(y)), (z, *pull_blocks(y)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def test_only_where_it_saves():
    apply, x, w = convolution(6, 3, 2, (1, 1), 1)
    strided = jax.make_jaxpr(apply)(x, w).eqns[0]
    assert in_blocks(strided, "cpu") is not None
    assert in_blocks(strided, "gpu") is None
    dense = jax.make_jaxpr(lambda x, w: lax.conv(x, w, (1, 1), "SAME"))(jnp.ones((1, 2, 4, 4)), jnp.ones((2, 2, 3, 3))).eqns[0]
    assert in_blocks(dense, "cpu") is None
    assert in_blocks(jax.make_jaxpr(jnp.sin)(1.0).eqns[0], "cpu") is None


@pytest.mark.parametrize(
    ("apply", "rows", "platform", "taken"),
    [
        (lambda w, x: x @ w, 256, "cpu", True),
        (lambda w, x: x @ w, 255, "cpu", False),
        (lambda w, x: x @ w, 256, "gpu", False),
        (lambda w, x: jnp.einsum("nk,jk->nj", x, w), 256, "cpu", False),
        (lambda w, x: jnp.einsum("kj,nk->jn", w, x), 256, "cpu", False),
        (lambda w, x: x @ w[:, :99], 256, "cpu", False),
    ],
    ids=["x W", "few rows", "accelerator", "transposed already", "W first", "small"],
)
def test_by_rows(apply, rows, platform, taken):
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.normal(size=shape)) for shape in ((256, 256), (1, 256), (1, 256)))
    product = find_products(jax.make_jaxpr(apply)(w, x), 1).products[0]
    compute = by_rows(product, rows, platform)
    assert (compute is not None) is taken
    if compute is not None:
        one, back = jax.vjp(lambda x, w: compute((x, w))[0], x, w)
        other, pull = jax.vjp(lambda x, w: x @ w, x, w)
        # Float64: sums of at most 256 products of order one.
        for ours, theirs in zip((one, *back(y)), (other, *pull(y)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)
        # Measures inside Experiments hold whatever their program names: the weights' derivative of each cotangent is not to be in it.
        by_x = jax.make_jaxpr(lambda x: jax.vmap(jax.vjp(lambda x: compute((x, w))[0], x)[1])(jnp.ones((9, 1, 256))))(x)
        assert max(out.aval.size for eqn in by_x.eqns for out in eqn.outvars) == w.size
