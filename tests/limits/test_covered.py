"""What is covered, item by item, where neural-tangents has no such layer: against networks of finite width, unrolled ones, by hand."""

import functools
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import IMAGES, SENTENCES, VECTORS, W, conv, dense, flat, layer_norm, plain

limit = functools.partial(pj.limit, progress=False)
NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolved(draw, h, n, groups=1, strides=(1, 1), dilation=(1, 1), padding="SAME", each=None):
    kernel = draw(3, 3, each or h.shape[-1] // groups, n)
    out = lax.conv_general_dilated(
        h, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=NUMBERS, feature_group_count=groups
    )
    return (W / math.sqrt(9 * kernel.shape[2])) * out


def dilated(draw, x, n):
    h = jax.nn.relu(conv(draw, x, n))
    return dense(draw, flat(jax.nn.relu(convolved(draw, h, n, dilation=(2, 1)))), 1, b=None)


def uneven_strides(draw, x, n):
    h = jax.nn.relu(convolved(draw, x, n, strides=(2, 1), padding=((1, 0), (0, 2))))
    return dense(draw, jnp.mean(jax.nn.relu(convolved(draw, h, n, strides=(1, 3))), (1, 2)), 1, b=None)


def two_groups(draw, x, n):
    h = jax.nn.relu(conv(draw, x, n))
    return dense(draw, jnp.mean(jax.nn.relu(convolved(draw, h, n, groups=2)), (1, 2)), 1, b=None)


def depthwise(draw, x, n):
    h = jax.nn.relu(conv(draw, x, n))
    h = convolved(draw, h, n, groups=n)
    return dense(draw, jnp.mean(h, (1, 2)), 1, b=None)


def group_norm(draw, x, n):
    h = conv(draw, x, n)
    grouped = h.reshape(*h.shape[:3], 2, n // 2)
    h = layer_norm(grouped, (1, 2, 4)).reshape(h.shape)
    return dense(draw, flat(jax.nn.relu(h)), 1, b=None)


def recurrent(draw, x, n):
    again, enter = draw(n, n), draw(5, n)
    h = jnp.zeros((x.shape[0], n), x.dtype)
    for t in range(3):
        h = jax.nn.relu(W / n**0.5 * (h @ again) + W / 5**0.5 * (x[:, t] @ enter))
    return dense(draw, h, 1, b=None)


def norms_of_heads(draw, x, n):
    h = layer_norm(dense(draw, x, n).reshape(x.shape[0], 2, n // 2))
    return dense(draw, jax.nn.relu(dense(draw, jnp.swapaxes(h, 1, 2).reshape(x.shape[0], n), n)), 1, b=None)


def divided_by_a_mean(draw, x, n):
    h = jax.nn.relu(dense(draw, x, n))
    return dense(draw, h / (1 + jnp.mean(h**2, 1, keepdims=True)), 1, b=None)


NETWORKS = {
    "dilation": (dilated, IMAGES), "uneven strides": (uneven_strides, IMAGES), "two groups": (two_groups, IMAGES),
    "norms of heads": (norms_of_heads, VECTORS), "a gain of a mean": (divided_by_a_mean, VECTORS),
    "depthwise": (depthwise, IMAGES), "GroupNorm": (group_norm, IMAGES), "recurrence with one matrix": (recurrent, SENTENCES),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_finite_widths(name):
    forward, x = NETWORKS[name]
    x = x[:2]
    ours = limit(plain(forward), x)
    width, seeds = 512, 24
    init, apply = plain(forward)(width)
    images = jnp.asarray(x, jnp.float32)

    @jax.jit
    def kernels(key):
        gradients = [g.reshape(2, -1) for g in jax.jacobian(lambda p: apply(p, images)[:, 0])(init(key, images))]
        # The readout's part is the covariance of the outputs given the features.
        return gradients[-1] @ gradients[-1].T, sum(g @ g.T for g in gradients)

    found = [np.stack(several) for several in zip(*(kernels(key) for key in jax.random.split(jax.random.key(0), seeds)))]
    for several, wanted in zip(found, (ours.nngp, ours.ntk)):
        error = several.std(0, ddof=1) / seeds**0.5
        # Five standard errors of 24 networks, and a bias of a few over the width.
        assert (np.abs(several.mean(0) - wanted) < 5 * error + 5 / width * np.max(wanted)).all()
        assert (error < 0.05 * np.max(wanted)).all()


def test_an_embedding_is_a_lookup():
    # Of tokens i and j the table's rows meet with probability [i = j]: W² (W² / T) of each pair that is the same, by hand.
    tokens = np.array([[0, 1, 2], [3, 1, 1]])

    def forward(draw, x, n):
        return dense(draw, flat(W * draw(7, n)[x]), 1, b=None)

    ours = limit(plain(forward), tokens)
    same = (tokens[:, None] == tokens[None]).sum(-1) / 3
    np.testing.assert_allclose(ours.nngp, W**4 * same, rtol=1e-12)
    # The table and the readout: each once.
    np.testing.assert_allclose(ours.ntk, 2 * W**4 * same, rtol=1e-12)


class Tied(nn.Module):
    """A table that is the readout too, with a layer between."""

    width: int

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(5, self.width, embedding_init=nn.initializers.normal(1.0))
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        h = nn.Dense(self.width, use_bias=False, kernel_init=normal)(jax.nn.relu(table(tokens)))
        return table.attend(h.mean(1)) / math.sqrt(self.width)


def test_a_table_that_is_the_readout_too():
    # By hand: relu's dual of correlations 1 and 0 is 1/2 and 1/(2 pi), and its derivative's 1/2 of rows that are the same.
    tokens = np.array([[0, 1, 2], [3, 1, 1]])
    ours = limit(lambda width: Tied(width), tokens, parametrization=pj.ntp, base={"width": 64}, per="leaf")
    same = tokens[:, None, :, None] == tokens[None, :, None]
    nngp = np.where(same, 1 / 2, 1 / (2 * np.pi)).mean((2, 3))
    np.testing.assert_allclose(ours.nngp, nngp, rtol=1e-6)
    np.testing.assert_allclose(ours.ntk["['Embed_0']['embedding']"], nngp + (same / 2).mean((2, 3)), rtol=1e-6)


def test_equinox_group_norm():
    # A variance of nothing is a NaN for each of the groups, which no group has.
    class Network(eqx.Module):
        layers: tuple

        def __init__(self, width, key):
            one, two = jax.random.split(key)
            enter, leave = eqx.nn.Linear(5, width, use_bias=False, key=one), eqx.nn.Linear(width, 1, use_bias=False, key=two)
            self.layers = (enter, eqx.nn.GroupNorm(2, width), jax.nn.relu, leave)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def same(draw, x, n):
        # Equinox draws uniformly up to 1 / sqrt(fan_in), and adds 1e-5 to a variance.
        h = x @ draw(5, n) / math.sqrt(15)
        h = h.reshape(x.shape[0], 2, -1)
        h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5)
        return jax.nn.relu(h.reshape(x.shape[0], -1)) @ draw(n, 1) / math.sqrt(3 * n)

    ours = limit(lambda width: lambda key: Network(width, key), VECTORS, gaussian=True, ntk=False)
    np.testing.assert_allclose(ours.nngp, limit(plain(same), VECTORS, ntk=False).nngp, rtol=1e-6)


def deep(width, length=7):
    """Pre-norm layers, stacked."""

    def init(key, x):
        first, hidden, last = jax.random.split(key, 3)
        hidden = jax.random.normal(hidden, (length, width, width))
        return {"first": jax.random.normal(first, (x.shape[1], width)), "hidden": hidden, "last": jax.random.normal(last, (width, 1))}

    def step(h, w):
        return h + (width * length) ** -0.5 * (jax.nn.relu(layer_norm(h)) @ w), None

    def apply(params, x):
        h, _ = lax.scan(step, x.shape[1] ** -0.5 * (x @ params["first"]), params["hidden"])
        return width**-0.5 * (h @ params["last"])

    return init, apply


@pytest.mark.slow
def test_a_scan_over_depth_with_norms():
    # By hand: k' = k + kappa(c) / L and t' = t + (kappa(c) + kappa'(c) t / sqrt(q q')) / L, c the correlation, kappa the relu's dual.
    ours = limit(lambda width: deep(width), VECTORS)
    k = VECTORS @ VECTORS.T / 5
    t = k
    for _ in range(7):
        scale = np.sqrt(np.outer(np.diag(k), np.diag(k)))
        c = np.clip(k / scale, -1, 1)
        kappa, slope = (np.sqrt(1 - c**2) + c * (np.pi - np.arccos(c))) / (2 * np.pi), (np.pi - np.arccos(c)) / (2 * np.pi)
        k, t = k + kappa / 7, t + (kappa + slope * t / scale) / 7
    # The norm adds 1e-12 to a variance; an arccosine at the diagonal by hand loses the root of rounding.
    np.testing.assert_allclose(ours.nngp, k, rtol=1e-7)
    np.testing.assert_allclose(ours.ntk, k + t, rtol=1e-7)


@pytest.mark.slow
def test_an_equinox_convolution():
    def network(width):
        def net(key):
            keys = jax.random.split(key, 3)
            relu, squeeze = eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(lambda h: jnp.mean(h, (1, 2)))
            first = eqx.nn.Conv2d(3, width, 3, stride=(2, 1), padding=1, use_bias=False, key=keys[0])
            second = eqx.nn.Conv2d(width, width, 2, dilation=(1, 2), use_bias=False, key=keys[1])
            readout = eqx.nn.Linear(width, 1, use_bias=False, key=keys[2])
            return eqx.nn.Sequential([first, relu, second, relu, squeeze, readout])

        return lambda key: net(key)

    def same(draw, x, n):
        # Equinox draws uniformly up to 1 / sqrt(fan_in), of variance 1 / (3 fan_in); channels come first.
        h = jnp.moveaxis(x, 1, -1)
        h = lax.conv_general_dilated(h, draw(3, 3, 3, n), (2, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS) / math.sqrt(3 * 27)
        h = jax.nn.relu(h)
        h = lax.conv_general_dilated(h, draw(2, 2, n, n), (1, 1), "VALID", rhs_dilation=(1, 2), dimension_numbers=NUMBERS)
        return jnp.mean(jax.nn.relu(h / math.sqrt(3 * 4 * n)), (1, 2)) @ draw(n, 1) / math.sqrt(3 * n)

    x = np.moveaxis(IMAGES, -1, 1)
    ours, wanted = limit(network, x, gaussian=True, ntk=False), limit(plain(same), x, ntk=False)
    # Equinox draws in float32.
    np.testing.assert_allclose(ours.nngp, wanted.nngp, rtol=1e-6)


def groups_of_four(draw, x, n):
    h = jax.nn.relu(conv(draw, x, n))
    return dense(draw, jnp.mean(convolved(draw, h, n, groups=n // 4), (1, 2)), 1, b=None)


def norm_of_four(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jax.nn.relu(layer_norm(h.reshape(x.shape[0], n // 4, 4)).reshape(h.shape)), 1)


@pytest.mark.parametrize(
    ("forward", "x", "message"),
    [
        (groups_of_four, IMAGES, "growing groups of more than one channel"),
        (norm_of_four, VECTORS, "4 independent coordinates, whose number"),
    ],
)
def test_groups_of_a_fixed_size_are_refused(forward, x, message):
    with pytest.raises(NotImplementedError, match=message):
        limit(plain(forward), x)
