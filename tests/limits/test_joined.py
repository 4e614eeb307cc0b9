"""Channels that are joined, against the same network written without a join."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.limits.ntk_networks import SENTENCES, VECTORS, plain

limit = functools.partial(pj.limit, progress=False)
relu = jax.nn.relu


def dense(draw, h, n, count=None):
    return h @ draw(h.shape[-1], n) / math.sqrt(count or h.shape[-1])


def two(draw, x, n):
    """Layers of two sizes and sorts."""
    return relu(dense(draw, x, n)), 3 * jnp.tanh(dense(draw, x, 2 * n))


def join(*parts):
    return jnp.concatenate(parts, -1)


def a_part(draw, x, n):
    return dense(draw, join(*two(draw, x, n))[:, n:], 1)


def only_it(draw, x, n):
    return dense(draw, two(draw, x, n)[1], 1)


def cut_across(draw, x, n):
    return dense(draw, join(*two(draw, x, n))[:, n // 2 : 2 * n : 2], 1)


def cut_before(draw, x, n):
    h, g = two(draw, x, n)
    return dense(draw, join(h[:, : n // 4], g[:, : n // 2]), 1)


def entrywise(draw, x, n):
    h, g = two(draw, x, n)
    joined = jnp.tanh(join(join(h, g), h))
    return dense(draw, joined, 1)


def part_by_part(draw, x, n):
    h, g = two(draw, x, n)
    h, g = jnp.tanh(h), jnp.tanh(g)
    return (math.sqrt(0.5) * (h + h) @ draw(n, 1) + g @ draw(2 * n, 1)) / math.sqrt(4 * n)


def gated(draw, x, n):
    gate = dense(draw, x, 2 * n)
    h, g = jnp.split(join(relu(dense(draw, x, n)), dense(draw, x, n) ** 2) * (1 + gate), 2, -1)
    return dense(draw, relu(dense(draw, h + g, n)), 1)


def gated_apart(draw, x, n):
    one, other = dense(draw, x, n), dense(draw, x, n)
    h, g = relu(dense(draw, x, n)) * (1 + one), dense(draw, x, n) ** 2 * (1 + other)
    return dense(draw, relu(dense(draw, h + g, n)), 1)


def normed(draw, x, n):
    h = join(*two(draw, x, n))
    h = h - jnp.mean(h, -1, keepdims=True)
    h = h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True))
    return dense(draw, jnp.sin(dense(draw, h, n)), 1)


def normed_apart(draw, x, n):
    h, g = two(draw, x, n)
    mean = (jnp.mean(h, -1, keepdims=True) + 2 * jnp.mean(g, -1, keepdims=True)) / 3
    h, g = h - mean, g - mean
    size = jnp.sqrt((jnp.mean(h * h, -1, keepdims=True) + 2 * jnp.mean(g * g, -1, keepdims=True)) / 3)
    h = (h / size @ draw(n, n) + g / size @ draw(2 * n, n)) / math.sqrt(3 * n)
    return dense(draw, jnp.sin(h), 1)


def dense_net(draw, x, n):
    h = dense(draw, x, n)
    for _ in range(2):
        h = join(h, dense(draw, relu(h), n))
    return dense(draw, relu(h), 1)


def dense_net_apart(draw, x, n):
    parts = [dense(draw, x, n)]
    for _ in range(2):
        parts.append(sum(dense(draw, relu(h), n, len(parts) * n) for h in parts))
    return sum(dense(draw, relu(h), 1, 3 * n) for h in parts)


def vanishing(draw, x, n):
    # Four coordinates among n do not count.
    return dense(draw, join(relu(dense(draw, x, n)), dense(draw, x, 4)), 1)


def vanished(draw, x, n):
    h, _ = relu(dense(draw, x, n)), draw(5, 4)
    return dense(draw, h, 1)


NETWORKS = {
    "a part": (a_part, only_it), "a slice across parts": (cut_across, cut_before), "a function": (entrywise, part_by_part),
    "a gate, split": (gated, gated_apart), "a norm": (normed, normed_apart), "DenseNet": (dense_net, dense_net_apart),
    "a part that does not grow": (vanishing, vanished),
}  # fmt: skip


# Half a minute each: functions of two kinds, whose pairs are integrated.
SLOW = {"a function", "a norm"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS])
def test_joined_channels_are_their_parts(name):
    one, other = (limit(plain(forward), VECTORS) for forward in NETWORKS[name])
    np.testing.assert_allclose(one.nngp, other.nngp, rtol=1e-9)
    np.testing.assert_allclose(one.ntk, other.ntk, rtol=1e-9)


def test_stacked_positions_are_joined_ones():
    def stacked(draw, x, n):
        v = draw(5, n)
        h = jnp.stack([relu(x[:, t] @ v) for t in range(3)], 1)
        first, *_, last = jnp.unstack(h, axis=1)
        return dense(draw, jnp.concatenate([jnp.mean(h, 1), first - last], -1)[:, :n], 1)

    def at_once(draw, x, n):
        return dense(draw, jnp.mean(relu(x @ draw(5, n)), 1), 1)

    one, other = (limit(plain(forward), SENTENCES) for forward in (stacked, at_once))
    np.testing.assert_allclose(one.nngp, other.nngp, rtol=1e-12)
    np.testing.assert_allclose(one.ntk, other.ntk, rtol=1e-12)


HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Sides(nn.Module):
    """One layer, or two side by side that are as wide together, and a norm with a learned gain of them joined, or of each."""

    width: int
    parts: tuple[int, ...]
    groups: bool = False

    @nn.compact
    def __call__(self, x):
        made = [nn.Dense(k * self.width, kernel_init=HE)(x) for k in self.parts]
        h = join(*(nn.GroupNorm(2)(y) for y in made)) if self.groups else nn.LayerNorm()(join(*made))
        return nn.Dense(1, kernel_init=HE)(relu(h))


@pytest.mark.parametrize("groups", [False, True])
def test_a_norm_with_a_gain_of_layers_side_by_side(groups):
    """Channels of one law are one layer's, and groups that grow have the statistics of all."""
    families = [functools.partial(Sides, parts=(3,)), functools.partial(Sides, parts=(1, 2), groups=groups)]
    options = dict(parametrization=pj.ntp, base=dict(width=32))
    one, other = (limit(lambda width, made=made: made(width), VECTORS, **options) for made in families)
    np.testing.assert_allclose(one.nngp, other.nngp, rtol=1e-9)
    np.testing.assert_allclose(one.ntk, other.ntk, rtol=1e-9)


def in_groups(draw, x, n):
    h = join(relu(dense(draw, x, n)), dense(draw, x, n)).reshape(len(x), 2, n)
    return dense(draw, (h - jnp.mean(h, -1, keepdims=True)).reshape(len(x), -1), 1)


def outputs(draw, x, n):
    h = relu(dense(draw, x, n))
    return join(dense(draw, h, 2), 3 * dense(draw, h, 3))


@pytest.mark.parametrize(("forward", "message"), [(in_groups, "cut in heads or groups"), (outputs, "outputs of several layers")])
def test_what_is_made_of_several_kinds_is_refused(forward, message):
    with pytest.raises(NotImplementedError, match=message):
        limit(plain(forward), VECTORS)
