"""Networks in NTK parametrization, each beside neural-tangents' layers for it."""

import math

import jax
import jax.numpy as jnp
from jax import lax

W, B = 1.3, 0.2


def pair(forward):
    """``(init, apply)`` of ``forward(draw, x)``, where ``draw(*shape)`` is the next leaf, standard normal."""

    def init(key, x):
        leaves = []

        def draw(*shape):
            leaves.append(
                jax.random.normal(jax.random.fold_in(key, len(leaves)), shape, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)
            )
            return leaves[-1]

        forward(draw, x)
        return leaves

    def apply(params, x):
        leaves = iter(params)
        return forward(lambda *shape: next(leaves), x)

    return init, apply


def dense(draw, h, n, w=W, b=B):
    out = (w / math.sqrt(h.shape[-1])) * (h @ draw(h.shape[-1], n))
    return out if b is None else out + b * draw(n)


def conv(draw, h, n, padding="SAME", stride=1, w=W, b=B, size=3):
    kernel = draw(size, size, h.shape[-1], n)
    fan_in = size * size * h.shape[-1]
    if padding == "CIRCULAR":
        h = jnp.pad(h, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)), mode="wrap")
    numbers = ("NHWC", "HWIO", "NHWC")
    out = (w / math.sqrt(fan_in)) * lax.conv_general_dilated(
        h, kernel, (stride, stride), "VALID" if padding == "CIRCULAR" else padding, dimension_numbers=numbers
    )
    return out if b is None else out + b * draw(n)


def layer_norm(h):
    centred = h - jnp.mean(h, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-12)


def flat(h):
    return h.reshape(h.shape[0], -1)


def average_pool(h, size=2, stride=2, padding="VALID"):
    total = lax.reduce_window(h, 0.0, lax.add, (1, size, size, 1), (1, stride, stride, 1), padding)
    return total / size**2
