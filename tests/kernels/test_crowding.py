"""Rows of gradients kept apart by zeros, cotangents written once, intermediate arrays in parts: kernels stay what they are."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.kernels import network as networks
from paperjax.kernels import ntk, programs
from paperjax.kernels.crowding import PERIOD, crowded, spare
from paperjax.model import Model

N, PLACES, WIDTH, OUT = 3, 4, 16, 2


def normed(params, x):
    """A residual stream with a norm, a gelu and a bias: gradients of ``w`` and ``v`` are formed, with rows of 1 KiB."""
    h = x @ params["w"] + params["b"][None, None]
    h = h + jax.nn.gelu(h - h.mean(-1, keepdims=True)) @ params["v"]
    return h.mean(1) @ params["u"]


@pytest.fixture
def params():
    def draw(key, *shape):
        return jax.random.normal(jax.random.key(key), shape)

    return {"w": draw(0, WIDTH, WIDTH), "b": draw(1, WIDTH), "v": draw(2, WIDTH, WIDTH), "u": draw(3, WIDTH, OUT)}


@pytest.mark.parametrize("per", [None, "leaf"])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_zeros_between_rows_change_nothing(params, monkeypatch, outputs, per):
    x = jax.random.normal(jax.random.key(4), (N, PLACES, WIDTH))
    formed = {f"['{name}']": "gradients" for name in "wv"}

    def kernel(route):
        return ntk(Model(lambda key, x: params, lambda p, x: normed(p, x)), params, x, outputs=outputs, per=per, route=route)

    plain, brute = kernel(formed), kernel("jacobian")
    monkeypatch.setattr("paperjax.kernels.crowding.WORTH", 1)
    monkeypatch.setattr("paperjax.kernels.crowding.ROWS", 1)
    assert spare(OUT, 1, WIDTH, WIDTH, 4) != (0, 0)
    padded = kernel(formed)
    for one, other, exact in zip(*map(jax.tree.leaves, (padded, plain, brute)), strict=True):
        # Single precision; sums of some hundred products.
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-4)
        np.testing.assert_allclose(one, exact, rtol=1e-4, atol=1e-3)


def test_spare_rows_are_apart():
    for outputs, j, i in ((10, 256, 65), (1, 1024, 1024), (10, 512, 128)):
        more_j, more_i = spare(outputs, 1, j, i, 4)
        for columns in ((j + more_j) * (i + more_i), outputs * (j + more_j) * (i + more_i)):
            assert not crowded(64 * outputs, columns, 4)
            # Of 64 rows at most eight, a cache's ways, begin at the same place.
            assert 64 * math.gcd(4 * columns, PERIOD) / PERIOD <= 8
    assert spare(10, 1, 256, 65, 4) == (1, 0)
    # Too few entries to be worth it.
    assert spare(1, 1, 32, 32, 4) == (0, 0)


def test_batches_of_two_sizes(params, monkeypatch):
    monkeypatch.setattr("paperjax.kernels.crowding.WORTH", 1)
    x = jax.random.normal(jax.random.key(4), (70, PLACES, WIDTH))
    model, formed = Model(lambda key, x: params, lambda p, x: normed(p, x)), {f"['{name}']": "gradients" for name in "wv"}
    np.testing.assert_allclose(
        ntk(model, params, x, x[:2], outputs="trace", route=formed),
        ntk(model, params, x, outputs="trace", route=formed)[:, :2],
        rtol=2e-5,
        atol=1e-4,
    )


def test_a_large_batch_against_a_small_one():
    """Only the rows of the large one crowd the cache, and both are copied with as many zeros."""
    draw = np.random.default_rng(0).normal
    params = {"a": jnp.asarray(draw(size=(8, 1024)) / 3, jnp.float32), "b": jnp.asarray(draw(size=(1024, 8)) / 32, jnp.float32)}
    assert crowded(64, 8 * 1024, 4)
    assert not crowded(2, 8 * 1024, 4)
    model, x = Model(lambda key, x: params, lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]), jnp.asarray(draw(size=(64, 8)), jnp.float32)
    whole, part = ntk(model, params, x, outputs="trace"), ntk(model, params, x, x[:2], outputs="trace")
    np.testing.assert_allclose(part, whole[:, :2], rtol=2e-5, atol=2e-5 * float(abs(whole).max()))


def test_derivatives_pass_a_cotangent_written_once(params):
    x = jax.random.normal(jax.random.key(4), (N, PLACES, WIDTH))
    model = Model(lambda key, x: params, normed)

    def total(scale, route):
        return ntk(model, params, scale * x, outputs="trace", route=route).sum()

    for derivative in (jax.grad, jax.jacfwd):
        one, other = (derivative(total)(1.0, route) for route in ("auto", "jacobian"))
        np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize(("outputs", "n"), [("full", 6), ("trace", 40), ("diagonal", 6)])
def test_no_array_of_a_program_is_larger_than_said(params, outputs, n):
    x = jnp.ones((n, PLACES, WIDTH))
    model, spec = Model(lambda key, x: params, normed), networks.Spec(outputs=outputs)
    read = networks.read(model, params, x)
    most = programs.largest_array(read, spec, programs.Rows(n, n, n, same=True))
    # The program as XLA compiles it, in the program around it.
    compiled = jax.jit(lambda params, x: programs.kernel_program(model, spec, params, None, x, x, True)).lower(params, x).compile()
    found = [4 * math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or "")]
    assert most / 4 <= max(found) <= most


def test_a_network_may_compute_in_more_bytes_than_it_returns(params):
    """XLA warns of arrays that are larger than a part; the largest here is a cotangent of the gelu's."""

    def most(dtype):
        model = Model(lambda key, x: params, lambda p, x: normed(p, x).astype(dtype))
        return programs.largest_array(networks.read(model, params, jnp.ones((3, PLACES, WIDTH))), networks.Spec(), programs.Rows(3, 3, 3))

    assert most(jnp.bfloat16) == most(jnp.float32)


@pytest.mark.parametrize("known", ["w", "x"])
def test_cotangents_are_written_once_inside_of_another_program(params, known):
    """Whatever that has closed over: XLA finds out of constants that they make a 1, and the cosine is gone."""
    x, model = jax.random.normal(jax.random.key(4), (N, PLACES, WIDTH)), Model(lambda key, x: params, normed)

    def kernel(w, x):
        return ntk(model, params | {"w": w, "empty": jnp.zeros(0)}, x, outputs="trace")

    program = jax.jit(lambda x: kernel(params["w"], x)).lower(x) if known == "w" else jax.jit(lambda w: kernel(w, x)).lower(params["w"])
    assert "cosine" in str(program.compile().as_text())


def test_parts_only_where_every_array_is_one(params):
    model, spec = Model(lambda key, x: params, normed), networks.Spec()
    read = networks.read(model, params, jnp.ones((2, PLACES, WIDTH)))
    few, many = (programs.options("cpu", read, spec, programs.Rows(n, n, n, same=True)) for n in (8, 8000))
    assert programs.IN_PARTS.items() <= few.items()
    assert not programs.IN_PARTS.keys() & many.keys()
    assert not programs.IN_PARTS.keys() & programs.options("gpu", read, spec, programs.Rows(8, 8, 8)).keys()
