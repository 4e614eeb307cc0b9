"""Networks as they are written, none of them for a limit: Flax linen and nnx, Equinox, plain functions."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def dense(n: int, **options: Any) -> nn.Dense:
    return nn.Dense(n, kernel_init=NORMAL, **options)


def conv(n: int, window: tuple[int, int], **options: Any) -> nn.Conv:
    return nn.Conv(n, window, kernel_init=NORMAL, **options)


class Attention(nn.Module):
    """Causal, two heads, logits over d."""

    width: int

    @nn.compact
    def __call__(self, h_BxTxD: Any) -> Any:
        b, t, _ = h_BxTxD.shape
        q, k, v = (dense(self.width)(h_BxTxD).reshape(b, t, 2, -1) for _ in range(3))
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1]
        weights = nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), logits, -1e9))
        return dense(self.width)(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(b, t, -1))


class Transformer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        h = nn.Embed(7, self.width, embedding_init=nn.initializers.normal(1.0))(tokens)
        h = h + self.param("positions", nn.initializers.normal(1.0), (1, tokens.shape[1], self.width))
        h = h + Attention(self.width)(nn.LayerNorm()(h))
        h = h + dense(self.width)(nn.relu(dense(2 * self.width)(nn.LayerNorm()(h))))
        return dense(1)(nn.LayerNorm()(h).mean(1))


class ResNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = conv(self.width, (3, 3))(x)
        y = conv(self.width, (3, 3), strides=(2, 2))(nn.relu(nn.GroupNorm(2)(h)))
        y = conv(self.width, (3, 3))(nn.relu(nn.GroupNorm(2)(y)))
        h = conv(self.width, (1, 1), strides=(2, 2))(h) + y
        return dense(1)(nn.relu(h).mean((1, 2)))


class Pooled(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.avg_pool(nn.relu(conv(self.width, (3, 3))(x)), (2, 2), (2, 2))
        return dense(1)(nn.relu(conv(self.width, (2, 2), padding="VALID")(h)).reshape(x.shape[0], -1))


class Separable(nn.Module):
    """A depthwise convolution and a grouped one."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(conv(self.width, (3, 3))(x))
        h = conv(self.width, (3, 3), feature_group_count=self.width)(h)
        h = nn.relu(conv(self.width, (1, 1), feature_group_count=2)(h))
        return dense(1)(h.mean((1, 2)))


class Gated(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = dense(self.width)(x)
        a, b = jnp.split(dense(4 * self.width)(nn.RMSNorm()(h)), 2, -1)
        return dense(1)(nn.RMSNorm()(h + dense(self.width)(jnp.tanh(a) * b)))


class Recurrent(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x_BxTxF: Any) -> Any:
        again = self.param("again", NORMAL, (self.width, self.width))
        enter = self.param("enter", NORMAL, (x_BxTxF.shape[-1], self.width))
        h = jnp.zeros((x_BxTxF.shape[0], self.width), x_BxTxF.dtype)
        h, _ = jax.lax.scan(lambda h, u: (jnp.tanh(h @ again + u @ enter), None), h, jnp.moveaxis(x_BxTxF, 1, 0))
        return dense(1)(h)


class Joined(nn.Module):
    """Channels of two layers side by side."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(dense(self.width)(x))
        h = jnp.concatenate([h, nn.relu(dense(2 * self.width)(h))], -1)
        return dense(1)(nn.relu(dense(self.width)(h)))


class PostNorm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = dense(self.width)(x)
        h = nn.LayerNorm()(h + dense(self.width)(nn.relu(dense(self.width)(h))))
        return dense(1)(nn.relu(dense(self.width)(h)))


class Nnx(nnx.Module):
    def __init__(self, width: int, features: int, rngs: nnx.Rngs) -> None:
        self.enter = nnx.Linear(features, width, kernel_init=NORMAL, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.within = nnx.Linear(width, width, kernel_init=NORMAL, rngs=rngs)
        self.leave = nnx.Linear(width, 1, kernel_init=NORMAL, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = self.enter(x)
        return self.leave(h + self.within(nnx.relu(self.norm(h))))


def equinox(width: int) -> Any:
    def net(key: Any) -> Any:
        a, b, c = jax.random.split(key, 3)
        relu = eqx.nn.Lambda(jax.nn.relu)
        layers = [eqx.nn.Linear(5, width, key=a), relu, eqx.nn.Linear(width, width, key=b), relu, eqx.nn.Linear(width, 1, key=c)]
        return eqx.nn.Sequential(layers)

    return lambda key: net(key)


def plain(width: int) -> Any:
    def init(key: Any, x: Any) -> Any:
        u, v, w = jax.random.split(key, 3)
        shapes = {"u": (u, (x.shape[1], width)), "w": (w, (width, width)), "v": (v, (width, 1))}
        return {name: jax.random.normal(k, shape, x.dtype) / shape[0] ** 0.5 for name, (k, shape) in shapes.items()}

    return init, lambda p, x: jnp.sin(jnp.maximum(x @ p["u"], 0) @ p["w"]) @ p["v"]


def scanned(width: int) -> Any:
    """Eight residual layers of stacked leaves under one scan."""

    def init(key: Any, x: Any) -> Any:
        u, v, w = jax.random.split(key, 3)
        shapes = {"u": (u, (x.shape[1], width)), "w": (w, (8, width, width)), "v": (v, (width, 1))}
        return {name: jax.random.normal(k, shape, x.dtype) / shape[-2] ** 0.5 for name, (k, shape) in shapes.items()}

    def apply(p: Any, x: Any) -> Any:
        h, _ = jax.lax.scan(lambda h, w: (h + jax.nn.relu(h) @ w / 8**0.5, None), x @ p["u"], p["w"])
        return h @ p["v"]

    return init, apply


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VECTORS, IMAGES, SERIES = _normal(0, 2, 5), _normal(1, 2, 4, 4, 3), _normal(2, 2, 3, 5)
TOKENS = np.array([[0, 1, 2], [3, 1, 1]])

NETWORKS: dict[str, tuple[Any, Any]] = {
    "plain": (plain, VECTORS),
    "scan over depth": (scanned, VECTORS),
    "gated, RMSNorm": (lambda width: Gated(width), VECTORS),
    "joined channels": (lambda width: Joined(width), VECTORS),
    "post-norm": (lambda width: PostNorm(width), VECTORS),
    "nnx, LayerNorm": (lambda width: lambda rngs: Nnx(width, 5, rngs), VECTORS),
    "Equinox": (equinox, VECTORS),
    "recurrent": (lambda width: Recurrent(width), SERIES),
    "pooled CNN": (lambda width: Pooled(width), IMAGES),
    "separable CNN": (lambda width: Separable(width), IMAGES),
    "ResNet, GroupNorm": (lambda width: ResNet(width), IMAGES),
    "transformer": (lambda width: Transformer(width), TOKENS),
}
