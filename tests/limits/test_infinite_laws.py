"""What holds of any infinite-width kernel: it is a kernel, one of pairs, differentiable; and networks that are one have one limit."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from flax import nnx

import paperjax as pj
from tests.limits.ntk_networks import IMAGES, SENTENCES, VECTORS, attention, conv, dense, flat, layer_norm, plain

SPECIAL = np.stack([VECTORS[0], VECTORS[1], VECTORS[0], -VECTORS[0], 3 * VECTORS[0], np.zeros(5)])
"""Repeated, antipodal, parallel and zero."""


def mixed(draw, x, n):
    h = dense(draw, x, n)
    h = h + dense(draw, jax.nn.relu(h), n)
    return dense(draw, jnp.sin(layer_norm(h)), 1)


def images(draw, x, n):
    return dense(draw, flat(jax.nn.relu(conv(draw, x, n))), 1)


limit = functools.partial(pj.limit, progress=False)


@functools.cache
def of_special():
    return limit(plain(mixed), SPECIAL)


@pytest.mark.parametrize("name", ["nngp", "ntk"])
def test_it_is_a_kernel(name):
    k = np.asarray(getattr(of_special(), name))
    np.testing.assert_array_equal(k, k.T)
    # Float64 rounding; rows 0 and 2 are the same.
    assert np.linalg.eigvalsh(k).min() > -1e-12 * k.max()
    np.testing.assert_allclose(k[0], k[2], rtol=1e-12)


@pytest.mark.parametrize(("forward", "x"), [(mixed, SPECIAL), pytest.param(images, IMAGES, marks=pytest.mark.slow)])
def test_blocks_and_order(forward, x):
    whole, order = limit(plain(forward), x) if forward is images else of_special(), np.array([2, 0, 1])
    block, turned = limit(plain(forward), x[:2], x[1:]), limit(plain(forward), x[order])
    for name in ("nngp", "ntk"):
        k = np.asarray(getattr(whole, name))
        np.testing.assert_allclose(getattr(block, name), k[:2, 1:], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(getattr(turned, name), k[np.ix_(order, order)], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_parts_of_leaves_sum_to_the_whole():
    parts = limit(plain(mixed), SPECIAL, per="leaf")
    assert len(parts.ntk) == 6
    np.testing.assert_allclose(sum(np.asarray(k) for k in parts.ntk.values()), of_special().ntk, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(parts.nngp, of_special().nngp, rtol=1e-12, atol=1e-14)


def total(x):
    k = limit(plain(lambda draw, x, n: dense(draw, jax.nn.relu(dense(draw, x, n, b=None)), 1)), x)
    return jnp.sum(k.nngp) + jnp.sum(k.ntk)


def test_gradients_are_finite_everywhere():
    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(total)(jnp.asarray(SPECIAL)))
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_gradients_are_slopes():
    step, apart = 1e-5, np.array(VECTORS)
    moved = [apart.copy(), apart.copy()]
    moved[0][1, 2] += step
    moved[1][1, 2] -= step
    with jax.enable_x64(True):
        gradient = jax.grad(total)(jnp.asarray(apart))[1, 2]
        slope = (total(jnp.asarray(moved[0])) - total(jnp.asarray(moved[1]))) / (2 * step)
    # Central differences of step 1e-5.
    assert float(gradient) == pytest.approx(float(slope), rel=1e-7)


def deep(length, unrolled):
    """``x + L^-1/2 W relu(x)`` over L layers, as a scan or one by one."""

    def family(width):
        def init(key, x):
            first, hidden, last = jax.random.split(key, 3)
            hidden = jax.random.normal(hidden, (length, width, width))
            return {"first": jax.random.normal(first, (x.shape[1], width)), "hidden": hidden, "last": jax.random.normal(last, (width, 1))}

        def step(h, w):
            return h + (length * width) ** -0.5 * (jax.nn.relu(h) @ w), None

        def apply(params, x):
            h = x.shape[1] ** -0.5 * (x @ params["first"])
            if unrolled:
                for layer in range(length):
                    h, _ = step(h, params["hidden"][layer])
            else:
                h, _ = jax.lax.scan(step, h, params["hidden"])
            return width**-0.5 * (h @ params["last"])

        return init, apply

    return family


@pytest.mark.slow
def test_a_scan_is_the_layers_one_by_one():
    scanned, unrolled = (limit(deep(8, way), SPECIAL) for way in (False, True))
    for name in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(scanned, name), getattr(unrolled, name), rtol=1e-12, atol=1e-14)


def test_ten_thousand_residual_layers_are_an_ode():
    # q' = q / 2, c' = (kappa(c) - c) / 2, kappa the arc-cosine kernel; the error of L layers is q / (8 L) (Hayou and Yang, arXiv
    # 2302.00453, for the limit).
    length = 10_000
    k = np.asarray(limit(deep(length, False), VECTORS, ntk=False, at=dict(width=64)).nngp)
    gram = VECTORS @ VECTORS.T / 5
    q = gram.diagonal()
    np.testing.assert_allclose(k.diagonal(), q * (1 + 1 / (2 * length)) ** length, rtol=1e-10)
    np.testing.assert_allclose(length * (math.exp(0.5) * q - k.diagonal()), math.exp(0.5) * q / 8, rtol=1e-3)

    def slope(t, c):
        return ((np.sqrt(1 - c**2) + c * (np.pi - np.arccos(c))) / np.pi - c) / 2

    start = (gram / np.sqrt(np.outer(q, q)))[np.triu_indices(3, 1)]
    ends = scipy.integrate.solve_ivp(slope, (0, 1), start, rtol=1e-10, atol=1e-12).y[:, -1]
    found = (k / np.sqrt(np.outer(k.diagonal(), k.diagonal())))[np.triu_indices(3, 1)]
    # Of first order in 1 / L.
    np.testing.assert_allclose(found, ends, atol=1 / length)


def attentive(draw, x, n):
    return dense(draw, jnp.mean(attention(draw, dense(draw, x, n), n, lambda g: jax.nn.softmax(g, -1)), 1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("forward", [mixed, images, attentive])
def test_gradients_at_coincident_and_opposite_examples(forward):
    one = {mixed: VECTORS, images: IMAGES, attentive: SENTENCES}[forward][:1]
    x = np.concatenate([one, one, -one])

    def sums(x):
        k = limit(plain(forward), x)
        return jnp.sum(jnp.sin(k.nngp)) + jnp.sum(jnp.sin(k.ntk))

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(sums)(jnp.asarray(x)))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("way", ["norm", "rsqrt", "before"])
def test_a_unit_norm_is_an_rms_norm(way):
    # sum h^2 is n times its mean, up to a fraction n^-1/2 of it.
    def unit(draw, x, n):
        h = dense(draw, x, n)
        if way == "norm":
            h = h / jnp.linalg.norm(h, axis=1, keepdims=True) * n**0.5
        elif way == "rsqrt":
            h = h * jax.lax.rsqrt(jnp.sum(h**2, 1, keepdims=True)) * n**0.5
        else:
            h = h * (n**0.5 / jnp.sqrt(jnp.sum(h**2, 1, keepdims=True)))
        return dense(draw, jax.nn.relu(h), 1)

    def root_mean_square(draw, x, n):
        h = dense(draw, x, n)
        return dense(draw, jax.nn.relu(h / jnp.sqrt(jnp.mean(h**2, 1, keepdims=True))), 1)

    ours, wanted = (limit(plain(forward), VECTORS) for forward in (unit, root_mean_square))
    for name in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), rtol=1e-12)


def test_a_shuffle_alone_changes_nothing():
    def channels(shuffled):
        def forward(draw, x, n):
            h = jax.nn.relu(dense(draw, x, n))
            if shuffled:
                h = jnp.swapaxes(h.reshape(h.shape[0], 4, -1), 1, 2).reshape(h.shape)
            return dense(draw, jax.nn.relu(dense(draw, h, n)), 1)

        return plain(forward)

    ours, wanted = (limit(channels(shuffled), VECTORS) for shuffled in (True, False))
    for name in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), rtol=1e-12)


class Cell(nn.Module):
    """Flax's cell, which starts in single precision whatever it is given."""

    width: int

    @nn.compact
    def __call__(self, x):
        made = dict(
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"), recurrent_kernel_init=nn.initializers.orthogonal()
        )
        return nn.Dense(1, kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"))(
            nn.RNN(nn.SimpleCell(self.width, activation_fn=nn.relu, **made))(x)[:, -1]
        )


def test_a_recurrent_cell_of_flax():
    def plainly(draw, x, n):
        again, enter = draw(n, n), draw(5, n)
        h = jnp.zeros((x.shape[0], n), x.dtype)
        for t in range(x.shape[1]):
            h = jax.nn.relu((h @ again) / n**0.5 + (x[:, t] @ enter) / 5**0.5)
        return dense(draw, h, 1, w=1.0, b=None)

    with jax.numpy_dtype_promotion("standard"):
        ours = limit(Cell, SENTENCES.astype(np.float32), ntk=False)
    # Flax draws and traces in float32.
    np.testing.assert_allclose(ours.nngp, limit(plain(plainly), SENTENCES, ntk=False).nngp, rtol=1e-5)


def test_a_recurrent_layer_of_nnx_that_holds_random_keys():
    """Its counts of keys are no leaves of a network: a first carry of zeros is made with them."""

    class Steps(nnx.Module):
        def __init__(self, width, whole, rngs):
            made = dict(kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
            self.cell = nnx.SimpleCell(5, width, rngs=rngs, **made)
            self.layer = nnx.RNN(self.cell, rngs=rngs) if whole else None
            self.leave = nnx.Linear(width, 1, rngs=rngs, **made)

        def __call__(self, x):
            if self.layer is not None:
                return self.leave(self.layer(x)[:, -1])
            h = jnp.zeros((len(x), self.cell.hidden_features), x.dtype)
            for t in range(x.shape[1]):
                h, _ = self.cell(h, x[:, t])
            return self.leave(h)

    x, options = SENTENCES.astype(np.float32), dict(parametrization=pj.ntp, base=dict(width=32))
    with jax.numpy_dtype_promotion("standard"):
        whole, steps = (limit(lambda width, on=on: lambda rngs: Steps(width, on, rngs), x, **options) for on in (True, False))
    np.testing.assert_allclose(whole.nngp, steps.nngp, rtol=1e-5)
    np.testing.assert_allclose(whole.ntk, steps.ntk, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_whole_numbers_of_a_dense_layer_are_those_numbers(dtype):
    """A product takes them as they are; those of 8 bits overflow where two of them are multiplied."""

    def net(draw, x, n):
        w = draw(5, n)
        h = jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=w.dtype)
        return dense(draw, jax.nn.relu(h), 1)

    x = (np.arange(15).reshape(3, 5) * 17).astype(dtype)
    floating = x.astype(np.float32)
    found, expected = limit(plain(net), x), limit(plain(net), floating)
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-12)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-12)
    beside = limit(expected.program, floating, x[:2])
    np.testing.assert_allclose(beside.ntk, expected.ntk[:, :2], rtol=1e-12)
    np.testing.assert_allclose(limit(plain(net), x[:2], floating, ntk=False).nngp, expected.nngp[:2], rtol=1e-12)


SENDERS, RECEIVERS = np.array([0, 1, 1, 2, 2], np.int32), np.array([1, 0, 2, 1, 1], np.int32)


def over_edges(draw, x, n):
    h = dense(draw, x, n)
    h = h + jax.vmap(lambda h: jax.ops.segment_sum(jax.nn.relu(h)[SENDERS], RECEIVERS, 3))(h)
    h = dense(draw, h, n)
    return dense(draw, jax.nn.relu(h.at[:, RECEIVERS].add(h[:, SENDERS])).mean(1), 1)


def by_a_matrix(draw, x, n):
    edges = np.zeros((3, 3))
    np.add.at(edges, (RECEIVERS, SENDERS), 1.0)
    h = dense(draw, x, n)
    h = dense(draw, h + jnp.einsum("ts,bsn->btn", edges, jax.nn.relu(h)), n)
    return dense(draw, jax.nn.relu(h + jnp.einsum("ts,bsn->btn", edges, h)).mean(1), 1)


def picked_before(draw, x, n):
    return dense(draw, jnp.sin(jax.nn.relu(dense(draw, x, n))[:, np.array([2, 0])]).mean(1), 1)


def picked_after(draw, x, n):
    return dense(draw, jnp.sin(jax.nn.relu(dense(draw, x, n)))[:, np.array([2, 0])].mean(1), 1)


def with_a_start(h):
    return jnp.pad(h, ((0, 0), (1, 0), (0, 0)))


def padded_before(draw, x, n):
    return dense(draw, jnp.sin(with_a_start(jax.nn.relu(dense(draw, x, n)))).mean(1), 1)


def padded_after(draw, x, n):
    return dense(draw, with_a_start(jnp.sin(jax.nn.relu(dense(draw, x, n)))).mean(1), 1)


SAME = {
    "edges": (over_edges, by_a_matrix),
    "a choice of positions": (picked_before, picked_after),
    "padding": (padded_before, padded_after),
}


@pytest.mark.parametrize("name", SAME)
def test_what_moves_positions(name):
    one, other = (limit(plain(forward), SENTENCES) for forward in SAME[name])
    np.testing.assert_allclose(one.nngp, other.nngp, rtol=1e-10)
    np.testing.assert_allclose(one.ntk, other.ntk, rtol=1e-10)


@pytest.mark.parametrize("after", [lambda h, s: jnp.exp(s), lambda h, s: h * s])
def test_padding_is_zero_whatever_the_function_is_there(after):
    """A cosine is 1 where its field is 0, and what it is padded with is 0."""

    def net(draw, x, n):
        h = jnp.cos(dense(draw, x, n))
        return dense(draw, dense(draw, after(h, with_a_start(h)[:, :-1]), n).mean(1), 1)

    with pytest.raises(NotImplementedError, match="numbers that depend on the data or on the position"):
        limit(plain(net), SENTENCES)


@pytest.mark.parametrize("acts", [jnp.add, jnp.multiply, lambda h, a: h * jnp.exp(a)], ids=["positions", "gains", "decays"])
@pytest.mark.parametrize("along", [1, 2], ids=["positions", "channels"])
def test_entries_that_are_not_drawn_and_are_not_a_matrix_have_no_law(acts, along):
    def net(width):
        def init(key, x):
            counts = jax.lax.broadcasted_iota(jnp.float32, (1, x.shape[1], width), along) / width
            u, v = jax.random.split(key)
            return {"a": counts, "u": jax.random.normal(u, (x.shape[2], width)), "v": jax.random.normal(v, (width, 1)) / width**0.5}

        return init, lambda p, x: jnp.tanh(acts(x @ p["u"], p["a"])).mean(1) @ p["v"]

    for consent in (False, True):
        with pytest.raises(ValueError, match=r"\['a'\]: init does not draw this leaf, and its entries differ.*laws=\{\"\['a'\]\""):
            limit(net, SENTENCES, gaussian=consent)
