"""One leaf in several orders, turned around, or beside others: the limit of the network that is written plainly, or none."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import IMAGES, SENTENCES, VECTORS, dense, flat, plain

limit = functools.partial(pj.limit, progress=False)
CORNER = IMAGES[:2, :2, :2]


def windowed(h, w):
    return lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) / (w[..., 0].size) ** 0.5


def channels_first(h):
    return flat(jnp.swapaxes(h, 1, 2))


def both(one, other):
    return lambda a: one(a) + other(a)


def kernels(*ways):
    """A layer whose window is summed in several ways."""

    def forward(draw, x, n):
        h, w = jax.nn.relu(windowed(x, draw(1, 1, 3, n))), draw(2, 2, n, n)
        return dense(draw, jnp.mean(jax.nn.relu(sum(windowed(h, way(w)) for way in ways)), (1, 2)), 1)

    return plain(forward)


def rows(*ways):
    """A layer of sentences that are flattened in several ways."""

    def forward(draw, x, n):
        h, w = jax.nn.relu(dense(draw, x, n)), draw(3 * n, n)
        return dense(draw, jax.nn.relu(sum(way(h) @ w for way in ways) / (3 * n) ** 0.5), 1)

    return plain(forward)


def two_biases(draw, x, n):
    h, b = dense(draw, x, n), draw(3, n)
    b, c = (jnp.broadcast_to(w, h.shape) for w in (b, b[::-1]))
    return dense(draw, flat(jax.nn.relu(h + b + c)), 1)


def as_it_is(w):
    return w


def transposed(w):
    return jnp.swapaxes(w, 0, 1)


def turned(w):
    return w[::-1, ::-1]


REFUSED = {
    "a window and its transpose": (kernels(as_it_is, transposed), CORNER, r"\[1\]"),
    "a window and the one turned around": (kernels(as_it_is, turned), CORNER, r"\[1\]"),
    # Rows p n + c and c P + p of one matrix: taken for the same, its NNGP was 4 E[h h'] in place of 2 E[h h'] + 2 E[h] E[h'].
    "positions before channels, and after": (rows(flat, channels_first), SENTENCES, r"\[2\]"),
    "a bias of positions and the one turned around": (plain(two_biases), SENTENCES, r"\[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_leaf_in_two_orders(name):
    family, x, leaf = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"{leaf}: this leaf is used both ways round.*its rows or its window in another order"):
        limit(family, x)


@functools.cache
def as_written(times):
    return limit(kernels(*[as_it_is] * times), CORNER, ntk=False).nngp


@pytest.mark.parametrize(
    "ways", [(transposed,), pytest.param((turned,), marks=pytest.mark.slow), pytest.param((transposed, transposed), marks=pytest.mark.slow)]
)
def test_a_window_in_another_order(ways):
    np.testing.assert_allclose(limit(kernels(*ways), CORNER, ntk=False).nngp, as_written(len(ways)), rtol=1e-12)


def test_channels_before_positions():
    ours, wanted = (limit(rows(way), SENTENCES[:2], ntk=False) for way in (channels_first, flat))
    np.testing.assert_allclose(ours.nngp, wanted.nngp, rtol=1e-12)


def fused(joined):
    """A gate of two layers whose weights lie side by side."""

    def forward(draw, x, n):
        h = jax.nn.relu(dense(draw, x, n))
        one, two = (draw(n, n), draw(n)), (draw(n, n), draw(n))
        if joined:
            w, b = (jnp.concatenate(pair, -1) for pair in zip(one, two))
            h = h @ w / math.sqrt(n)
            h, g = jnp.split(h + jnp.broadcast_to(b, h.shape), 2, -1)
        else:
            h, g = (h @ w / math.sqrt(n) + jnp.broadcast_to(b, h.shape) for w, b in (one, two))
        return dense(draw, jax.nn.relu(h) * g, 1)

    return plain(forward)


def test_matrices_side_by_side_are_layers():
    ours, wanted = (limit(fused(joined), VECTORS) for joined in (True, False))
    for name in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), rtol=1e-12)


def test_matrices_one_above_the_other_are_refused():
    def forward(draw, x, n):
        h = jax.nn.relu(dense(draw, x, 2 * n))
        return dense(draw, h @ jnp.concatenate([draw(n, n), draw(n, n)]) / math.sqrt(2 * n), 1)

    with pytest.raises(NotImplementedError, match=r"several layers are joined along the axis that is summed over.*add what they make"):
        limit(plain(forward), VECTORS)


def test_learned_queries_are_multiplied():
    # By hand: W W' of positions that are drawn is the identity between them, as a bias for each position is.
    def forward(draw, x, n, queries):
        h = dense(draw, x, n, b=None)
        seen = draw(3, n) @ draw(n, n) / math.sqrt(n) if queries else draw(3, n)
        return dense(draw, flat(jax.nn.relu(h + jnp.broadcast_to(seen, h.shape))), 1)

    ours, wanted = (limit(plain(functools.partial(forward, queries=q)), SENTENCES[:2], per="leaf") for q in (True, False))
    np.testing.assert_allclose(ours.nngp, wanted.nngp, rtol=1e-12)
    for path, other in {"[0]": "[0]", "[1]": "[1]", "[2]": "[1]", "[3]": "[2]", "[4]": "[3]"}.items():
        np.testing.assert_allclose(ours.ntk[path], wanted.ntk[other], rtol=1e-12)


class Up(nn.Module):
    """A transposed convolution as PyTorch and Keras have it, whose window is turned around."""

    width: int
    turned: bool

    @nn.compact
    def __call__(self, x):
        # Turned, the kernel has its outputs where others have their inputs.
        init = nn.initializers.variance_scaling(1.0, "fan_out" if self.turned else "fan_in", "normal")
        h = nn.relu(nn.Conv(self.width, (1, 1), kernel_init=nn.initializers.normal(1.0))(x))
        h = nn.relu(nn.ConvTranspose(self.width, (3, 3), (2, 2), kernel_init=init, transpose_kernel=self.turned)(h))
        return nn.Dense(1, kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"))(h[:, ::2, 1::2].mean((1, 2)))


@pytest.mark.slow
def test_a_transposed_convolution_that_is_turned_around():
    x = CORNER.astype(np.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        read = functools.partial(limit, parametrization=pj.ntp, base=dict(width=64))
        ours = read(lambda width: Up(width, True), x)
        # Turned around by hand, a kernel that is drawn independently.
        wanted = read(lambda width: Up(width, False), x)
    for name in ("nngp", "ntk"):
        # Flax draws in float32.
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), rtol=1e-6)
