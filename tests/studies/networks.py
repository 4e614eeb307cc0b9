"""Networks and data of the studies' tests: plain, linen, scanned, a transformer of tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paperjax.model import Model
from paperjax.models import mlp


def examples(n: int = 16, features: int = 5, outputs: int = 4) -> tuple[Any, Any]:
    """Gaussian inputs, and targets larger than the outputs at the start, so that residuals hardly depend on the width."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, features)).astype(np.float32), 3 * rng.normal(size=(n, outputs)).astype(np.float32)


def tanh_mlp(width: int) -> Model:
    """``W3 tanh(W2 tanh(W1 x))``, every W with variance 1/fan_in; the hidden layer goes through a scan."""
    return mlp(width, 2, 4, activation=jnp.tanh, bias=False, weight_variance=1.0)


def one_hidden_linear(width: int) -> Model:
    """``f(x) = x U V``: all of its first step is known in closed form."""

    def init(key: Any, x: Any) -> Any:
        key_u, key_v = jax.random.split(key)
        return {"u": jax.random.normal(key_u, (x.shape[1], width)), "v": jax.random.normal(key_v, (width, 2)) / width**0.5}

    return Model(init, lambda params, x: (x @ params["u"]) @ params["v"])


class LinenMLP(nn.Module):
    """Two hidden layers with biases."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = jnp.tanh(nn.Dense(self.width, name="first")(x))
        return nn.Dense(4, name="readout")(jnp.tanh(nn.Dense(self.width, name="hidden")(h)))


class _Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, h: Any, _: Any = None) -> Any:
        z = nn.LayerNorm(name="norm")(h)
        h = h + nn.Dense(self.width, name="down")(nn.tanh(nn.Dense(self.width, name="up")(z)))
        return h, None


class Scanned(nn.Module):
    """Residual blocks by ``nn.scan``, rematerialized: one leaf holds all layers."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        blocks = nn.scan(nn.remat(_Block, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        h, _ = blocks(self.width, name="blocks")(nn.Dense(self.width, name="embed")(x), None)
        return nn.Dense(4, use_bias=False, name="readout")(h)


class Transformer(nn.Module):
    """One pre-norm block of tokens: attention of two heads, an MLP."""

    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        h = nn.Embed(7, self.width, name="embed")(tokens)
        z = nn.LayerNorm(name="norm_1")(h)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=self.width, name="attention")(z, z)
        z = nn.LayerNorm(name="norm_2")(h)
        h = h + nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(2 * self.width, name="up")(z)))
        return nn.Dense(7, use_bias=False, name="readout")(nn.LayerNorm(name="norm_3")(h))


def tokens(n: int = 4, length: int = 3) -> tuple[Any, Any]:
    """Random tokens and next tokens."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 7, (n, length)).astype(np.int32), rng.integers(0, 7, (n, length)).astype(np.int32)
