"""Networks of every library and kind, with what the papers' definitions make of each leaf, written by hand.

An axis is infinite if it grows from `base` to `target`. Tensor Programs V, appendix B (arXiv 2203.03466): a weight from infinite to
infinite is hidden, from finite to infinite input, from infinite to finite output; biases and gains of infinite size are vectors. Depthwise
kernels sum over no infinite axis and have one entry per channel and window position: vectors. Looked-up rows of infinite size are
embeddings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import paperjax as pj
from paperjax.model import Model


@dataclasses.dataclass(frozen=True)
class Case:
    """A family between two sizes, and what its trace must find.

    `roles` by leaf; `adds`: for each residual add, in order, its repeats and the leaves that write into it; `interactions`: for each
    product of two activations, in order, the coordinates it sums over and the exponent of its scale.
    """

    make: Callable[..., Any]
    base: Mapping[str, Any]
    target: Mapping[str, Any]
    x: Any
    roles: Mapping[str, str]
    adds: tuple[tuple[int, tuple[str, ...]], ...] = ()
    depth_ratio: float = 1.0
    interactions: tuple[tuple[int, float], ...] = ()

    @property
    def family(self) -> Any:
        return pj.family(self.make, x=self.x)


ROWS = jnp.zeros((2, 5))
TOKENS = jnp.zeros((2, 6), jnp.int32)
SEQUENCE = jnp.zeros((2, 6, 5))
IMAGES = jnp.zeros((2, 8, 8, 3))
WIDTH = ({"width": 8}, {"width": 16})


def deep(depth: int = 2, to: int = 6) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return {"width": 8, "depth": depth}, {"width": 16, "depth": to}


def under(prefix: str, roles: Mapping[str, str]) -> dict[str, str]:
    return {prefix + path: role for path, role in roles.items()}


# Perceptrons ------------------------------------------------------------------------------------------------------------


def linen_mlp(width: int) -> nn.Module:
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), jnp.tanh, nn.Dense(3)])


LINEN_MLP = {
    "['layers_0']['kernel']": "input", "['layers_0']['bias']": "vector",
    "['layers_2']['kernel']": "hidden", "['layers_2']['bias']": "vector",
    "['layers_4']['kernel']": "output", "['layers_4']['bias']": "finite",
}  # fmt: skip


def dict_mlp(width: int) -> Model:
    """As a paper's appendix writes it: (out, in) weights, a gain stored as 1 + g, a bias row, a number that scales the output."""

    def init(key: Any, x: Any) -> Any:
        k = jax.random.split(key, 4)
        n = jax.random.normal
        return {
            "U": n(k[0], (width, x.shape[1])) / x.shape[1] ** 0.5,
            "W": [n(k[1], (width, width)) / width**0.5, n(k[2], (width, width)) / width**0.5],
            "g": jnp.zeros((width,)),
            "b": jnp.zeros((1, width)),
            "V": n(k[3], (3, width)) / width,
            "scale": jnp.ones(()),
        }

    def apply(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["U"].T)
        for w in p["W"]:
            h = jnp.maximum(jnp.einsum("oi,bi->bo", w, h), 0.0)
        h = h * (1 + p["g"])[None] + p["b"]
        return p["scale"] * jnp.dot(p["V"], h.T).T

    return Model(init, apply)


DICT_MLP = {"['U']": "input", "['W'][0]": "hidden", "['W'][1]": "hidden", "['g']": "vector", "['b']": "vector", "['V']": "output",
            "['scale']": "finite"}  # fmt: skip


class EqxMLP(eqx.Module):
    """Equinox's (out, in) weights; middle layers vmapped into a stack and scanned over."""

    first: eqx.nn.Linear
    stack: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    last: eqx.nn.Linear

    def __init__(self, width: int, depth: int, key: Any):
        k = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(5, width, key=k[0])
        self.stack = jax.vmap(lambda key: eqx.nn.Linear(width, width, key=key))(jax.random.split(k[1], depth))
        self.norm = eqx.nn.LayerNorm(width)
        self.last = eqx.nn.Linear(width, 3, use_bias=False, key=k[2])

    def __call__(self, x: Any) -> Any:
        arrays, static = eqx.partition(self.stack, eqx.is_array)

        def step(h: Any, layer: Any) -> Any:
            return h + jax.nn.relu(eqx.combine(layer, static)(h)), None

        h, _ = jax.lax.scan(step, self.first(x), arrays)
        return self.last(self.norm(h))


EQX_MLP = {".first.weight": "input", ".first.bias": "vector", ".stack.weight": "hidden", ".stack.bias": "vector", ".norm.weight": "vector",
           ".norm.bias": "vector", ".last.weight": "output"}  # fmt: skip


class EqxTokens(eqx.Module):
    """Equinox's embedding takes one token, so a lookup under vmap; so does an expert chosen for each token."""

    embed: eqx.nn.Embedding
    experts: jax.Array
    last: eqx.nn.Linear

    def __init__(self, width: int, key: Any):
        k = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(11, width, key=k[0])
        self.experts = jax.random.normal(k[1], (3, width, width)) / width**0.5
        self.last = eqx.nn.Linear(width, 3, use_bias=False, key=k[2])

    def __call__(self, tokens: Any) -> Any:
        def one(token: Any) -> Any:
            return self.last(jnp.tanh(self.embed(token) @ self.experts[token % 3]))

        return jax.vmap(one)(tokens)


EQX_TOKENS = {".embed.weight": "embedding", ".experts": "hidden", ".last.weight": "output"}


class GatedBlock(nn.Module):
    """SwiGLU with RMSNorm; the activation is homogeneous of no degree, the last matrix writes."""

    width: int

    @nn.compact
    def __call__(self, h: Any) -> Any:
        z = nn.RMSNorm(name="norm")(h)
        gate, up = (nn.Dense(4 * self.width, use_bias=False, name=n)(z) for n in ("gate", "up"))
        return h + nn.Dense(self.width, use_bias=False, name="down")(jax.nn.silu(gate) * up)


class GatedMLP(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, name="embed")(x)
        for i in range(self.depth):
            h = GatedBlock(self.width, name=f"block_{i}")(h)
        return nn.Dense(3, name="head")(h)


GATED_BLOCK = {"['norm']['scale']": "vector", "['gate']['kernel']": "hidden", "['up']['kernel']": "hidden", "['down']['kernel']": "hidden"}
GATED_MLP = {
    "['embed']['kernel']": "input", "['embed']['bias']": "vector", "['head']['kernel']": "output", "['head']['bias']": "finite",
    **{path: role for i in range(6) for path, role in under(f"['block_{i}']", GATED_BLOCK).items()},
}  # fmt: skip


class Modulated(nn.Module):
    """Blocks of two sublayers whose shifts, scales and gates come from one projection of a condition, zero at first (arXiv 2212.09748)."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = lambda h: nn.LayerNorm(use_scale=False, use_bias=False)(h)  # noqa: E731
        condition = nn.silu(nn.Dense(self.width, name="condition")(x[:, :1]))
        h = nn.Dense(self.width, name="embed")(x)
        for i in range(self.depth):
            modulation = nn.Dense(6 * self.width, kernel_init=nn.initializers.zeros, name=f"block_{i}_modulation")(condition)
            shift, scale, gate, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
            h = h + gate * nn.Dense(self.width, name=f"block_{i}_mix")(nn.gelu(norm(h) * (1 + scale) + shift))
            z = nn.gelu(nn.Dense(2 * self.width, name=f"block_{i}_up")(norm(h) * (1 + scale_2) + shift_2))
            h = h + gate_2 * nn.Dense(self.width, name=f"block_{i}_down")(z)
        return nn.Dense(3, name="head")(norm(h))


MODULATED = {
    "['condition']['kernel']": "input", "['condition']['bias']": "vector", "['embed']['kernel']": "input", "['embed']['bias']": "vector",
    "['head']['kernel']": "output", "['head']['bias']": "finite",
    **{f"['block_{i}_{name}']['{kind}']": role for i in range(6) for name in ("modulation", "mix", "up", "down")
       for kind, role in (("kernel", "hidden"), ("bias", "vector"))},
}  # fmt: skip


# Convolutional ----------------------------------------------------------------------------------------------------------


class CNN(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Conv(self.width, (3, 3), name="stem")(x))
        h = nn.Conv(self.width, (3, 3), feature_group_count=self.width, name="depthwise")(h)
        h = nn.relu(nn.GroupNorm(num_groups=4, name="norm")(h))
        h = nn.avg_pool(nn.Conv(2 * self.width, (1, 1), name="pointwise")(h), (2, 2), (2, 2))
        h = nn.relu(nn.ConvTranspose(self.width, (2, 2), strides=(2, 2), name="up")(h))
        h = nn.max_pool(nn.Conv(self.width, (3, 3), feature_group_count=2, use_bias=False, name="grouped")(h), (2, 2))
        return nn.Dense(3, name="head")(h.mean((1, 2)))


CNN_ROLES = {
    "['stem']['kernel']": "input", "['stem']['bias']": "vector", "['depthwise']['kernel']": "vector", "['depthwise']['bias']": "vector",
    "['norm']['scale']": "vector", "['norm']['bias']": "vector", "['pointwise']['kernel']": "hidden", "['pointwise']['bias']": "vector",
    "['up']['kernel']": "hidden", "['up']['bias']": "vector", "['grouped']['kernel']": "hidden", "['head']['kernel']": "output",
    "['head']['bias']": "finite",
}  # fmt: skip


class ResNet(nn.Module):
    """Pre-activation blocks; the second stage begins with a projection shortcut, which by the design's definition is no residual add."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = lambda name: nn.BatchNorm(use_running_average=False, name=name)  # noqa: E731
        h = nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(x)
        for i in range(2):
            z = nn.Conv(self.width, (3, 3), use_bias=False, name=f"a_{i}")(nn.relu(norm(f"norm_a_{i}")(h)))
            h = h + nn.Conv(self.width, (3, 3), use_bias=False, name=f"b_{i}")(nn.relu(norm(f"norm_b_{i}")(z)))
        z = nn.relu(norm("norm_c")(h))
        h = nn.Conv(2 * self.width, (1, 1), strides=(2, 2), use_bias=False, name="shortcut")(z)
        h = h + nn.Conv(2 * self.width, (3, 3), strides=(2, 2), use_bias=False, name="c")(z)
        return nn.Dense(3, name="head")(h.reshape(h.shape[0], -1))


NORM = {"['scale']": "vector", "['bias']": "vector"}
RESNET = under("['params']", {
    "['stem']['kernel']": "input", **{f"['{name}']['kernel']": "hidden" for name in ("a_0", "b_0", "a_1", "b_1", "shortcut", "c")},
    **{path: role for name in ("a_0", "b_0", "a_1", "b_1", "c") for path, role in under(f"['norm_{name}']", NORM).items()},
    "['head']['kernel']": "output", "['head']['bias']": "finite",
})  # fmt: skip


class PatchViT(nn.Module):
    """Patches by a strided convolution, a class token, a table of positions, flax's own attention, post-norm blocks."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Conv(self.width, (4, 4), strides=(4, 4), name="patch")(x)
        h = h.reshape(h.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        h = jnp.concatenate([jnp.tile(token, (h.shape[0], 1, 1)), h], axis=1)
        h = h + self.param("position", nn.initializers.normal(0.02), (1, 8, self.width))[:, : h.shape[1]]
        for i in range(self.depth):
            z = nn.MultiHeadDotProductAttention(num_heads=2, name=f"attention_{i}")(h)
            h = nn.LayerNorm(name=f"norm_{i}")(h + z)
        return nn.Dense(3, name="head")(h[:, 0])


def _flax_attention() -> dict[str, str]:
    # Biases of the projections have shape (heads, head_dim), one axis of which grows.
    inner = {
        f"['{name}']['{kind}']": role for name in ("query", "key", "value") for kind, role in (("kernel", "hidden"), ("bias", "vector"))
    }
    return inner | {"['out']['kernel']": "hidden", "['out']['bias']": "vector"}


VIT = {
    "['patch']['kernel']": "input", "['patch']['bias']": "vector", "['token']": "vector", "['position']": "vector",
    "['head']['kernel']": "output", "['head']['bias']": "finite",
    **{path: role for i in range(2) for path, role in under(f"['attention_{i}']", _flax_attention()).items()},
    **{path: role for i in range(2) for path, role in under(f"['norm_{i}']", NORM).items()},
}  # fmt: skip


# Transformers -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and GELU perceptron; `power` is how logits are scaled; a `carry` for nn.scan."""

    width: int
    heads: int
    power: float = 0.5
    fused: bool = False

    @nn.compact
    def __call__(self, h: Any, _: Any = None) -> Any:
        units = self.width // self.heads
        z = nn.LayerNorm(name="norm_1")(h)
        if self.fused:
            q, k, v = jnp.split(nn.Dense(3 * self.width, name="qkv")(z), 3, axis=-1)
        else:
            q, k, v = (nn.Dense(self.width, use_bias=False, name=name)(z) for name in ("q", "k", "v"))
        q, k, v = (a.reshape(*a.shape[:-1], self.heads, units) for a in (q, k, v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.asarray(units**self.power, h.dtype)
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -1e9), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(h.shape)
        h = h + nn.Dense(self.width, name="out")(mixed)
        z = nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm_2")(h))
        return h + nn.Dense(self.width, name="down")(nn.gelu(z)), None


class GPT(nn.Module):
    width: int
    depth: int = 2
    heads: int = 2
    scan_axis: int | None = None
    tied: bool = False
    power: float = 0.5
    fused: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(11, self.width, name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (8, self.width))
        h = embed(tokens) + jnp.take(position, jnp.arange(tokens.shape[1]), axis=0)[None]
        options = {"width": self.width, "heads": self.heads, "power": self.power, "fused": self.fused}
        if self.scan_axis is None:
            for i in range(self.depth):
                h, _ = Block(**options, name=f"block_{i}")(h)
        else:
            blocks = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True},
                length=self.depth,
            )
            h, _ = blocks(**options, name="blocks")(h, None)
        h = nn.LayerNorm(name="norm")(h)
        return embed.attend(h) if self.tied else nn.Dense(11, use_bias=False, name="head")(h)


BLOCK = {
    **under("['norm_1']", NORM), **under("['norm_2']", NORM), **{f"['{name}']['kernel']": "hidden" for name in ("q", "k", "v")},
    "['out']['kernel']": "hidden", "['out']['bias']": "vector", "['up']['kernel']": "hidden", "['up']['bias']": "vector",
    "['down']['kernel']": "hidden", "['down']['bias']": "vector",
}  # fmt: skip
FUSED_BLOCK = {path: role for path, role in BLOCK.items() if path[:5] not in ("['q']", "['k']", "['v']")} | {
    "['qkv']['kernel']": "hidden",
    "['qkv']['bias']": "vector",
}
AROUND = {"['embed']['embedding']": "embedding", "['position']": "embedding", **under("['norm']", NORM), "['head']['kernel']": "output"}
TIED_AROUND = {path: role for path, role in AROUND.items() if "head" not in path} | {"['embed']['embedding']": "embedding+output"}
SCANNED_WRITERS = (
    (6, ("['blocks']['out']['bias']", "['blocks']['out']['kernel']")),
    (6, ("['blocks']['down']['bias']", "['blocks']['down']['kernel']")),
)


def _looped(block: Mapping[str, str], n: int) -> dict[str, str]:
    return {path: role for i in range(n) for path, role in under(f"['block_{i}']", block).items()}


def _looped_writers(n: int) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return tuple(
        (1, (f"['block_{i}']['{name}']['bias']", f"['block_{i}']['{name}']['kernel']")) for i in range(n) for name in ("out", "down")
    )


class NnxBlock(nnx.Module):
    """Parallel attention and perceptron, one norm for both (GPT-J, PaLM)."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, use_bias=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        z = self.norm(h)
        return h + self.attention(z) + self.down(nnx.relu(self.up(z)))


class NnxTransformer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 11, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


NNX_BLOCK = {
    **under("['norm']", NORM), **{f"['attention']['{name}']['kernel']": "hidden" for name in ("query", "key", "value", "out")},
    "['up']['kernel']": "hidden", "['up']['bias']": "vector", "['down']['kernel']": "hidden", "['down']['bias']": "vector",
}  # fmt: skip
NNX = {
    "['embed']['embedding']": "embedding", "['head']['kernel']": "output", "['head']['bias']": "finite",
    **{path: role for i in range(2) for path, role in under(f"['blocks'][{i}]", NNX_BLOCK).items()},
}  # fmt: skip


def einsum_attention(width: int, heads: int, unscaled: bool = False) -> Model:
    """One attention layer in einsums with odd orders of axes; head size 4, so heads grow with the width."""
    units = 4

    def init(key: Any, x: Any) -> Any:
        k = jax.random.split(key, 6)
        n = jax.random.normal
        return {
            "in": n(k[0], (x.shape[-1], width)),
            "q": n(k[1], (heads, width, units)) / width**0.5,
            "kv": n(k[2], (2, units, width, heads)) / width**0.5,
            "o": n(k[3], (units, width, heads)) / (heads * units) ** 0.5,
            "out": n(k[4], (7, width)) / width,
        }

    def apply(p: Any, x: Any) -> Any:
        h = jnp.einsum("bti,id->tbd", x, p["in"])
        q = jnp.einsum("hdk,tbd->hbtk", p["q"], h)
        k, v = jnp.einsum("nkdh,tbd->nhbkt", p["kv"], h)
        logits = jnp.einsum("hbtk,hbks->bhts", q, k)
        logits = logits if unscaled else logits * units**-0.5
        mixed = jnp.einsum("bhts,hbks,kdh->tbd", jax.nn.softmax(logits), v, p["o"])
        return jnp.einsum("tbd,cd->btc", h + mixed, p["out"])

    return Model(init, apply)


EINSUM = {"['in']": "input", "['q']": "hidden", "['kv']": "hidden", "['o']": "hidden", "['out']": "output"}


def two_towers(width: int) -> Model:
    """Two embeddings, each through a matrix; their product is written entry by entry and summed."""

    def init(key: Any, x: Any) -> Any:
        k = jax.random.split(key, 4)
        tables = {name: jax.random.normal(k[i], (11, width)) for i, name in enumerate(("user", "item"))}
        return tables | {name: jax.random.normal(k[2 + i], (width, width)) / width**0.5 for i, name in enumerate(("a", "b"))}

    def apply(p: Any, x: Any) -> Any:
        a, b = jnp.tanh(p["user"][x[:, 0]]) @ p["a"], jnp.tanh(p["item"][x[:, 1]]) @ p["b"]
        return (a * b).sum(-1, keepdims=True)

    return Model(init, apply)


TWO_TOWERS = {"['user']": "embedding", "['item']": "embedding", "['a']": "hidden", "['b']": "hidden"}


class SharedKeys(nn.Module):
    """Grouped queries (arXiv 2305.13245): four query heads on two heads of keys and values; their size grows."""

    width: int
    style: str = "jax"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        units, kv_heads = self.width // 4, 1 if self.style == "one head" else 2
        h = nn.Dense(self.width, use_bias=False, name="embed")(x)
        q, k, v = (nn.DenseGeneral((n, units), use_bias=False, name=name)(h) for name, n in (("q", 4), ("k", kv_heads), ("v", kv_heads)))
        if self.style == "einsum":
            q = q.reshape(*q.shape[:2], kv_heads, 2, units)
            weights = jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", q, k) / jnp.sqrt(units))
            mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(*h.shape[:2], 4, units)
        elif self.style == "repeat":
            k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(units))
            mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        else:
            mixed = jax.nn.dot_product_attention(q, k, v)
        h = h + nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False, name="o")(mixed)
        return nn.Dense(3, use_bias=False, name="head")(h)


SHARED_KEYS = {"['embed']['kernel']": "input", **{f"['{name}']['kernel']": "hidden" for name in "qkvo"}, "['head']['kernel']": "output"}


class MoE(nn.Module):
    """Four experts, all run on all tokens and mixed by a router: the experts' axis is a stack of fixed size."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, name="embed")(x)
        gates = jax.nn.softmax(nn.Dense(4, use_bias=False, name="router")(h))
        up = self.param("up", nn.initializers.lecun_normal(batch_axis=0), (4, self.width, 2 * self.width))
        down = self.param("down", nn.initializers.lecun_normal(batch_axis=0), (4, 2 * self.width, self.width))
        bias = self.param("bias", nn.initializers.zeros, (4, self.width))
        z = nn.relu(jnp.einsum("btd,edf->ebtf", h, up))
        z = jnp.einsum("ebtf,efd->ebtd", z, down) + bias[:, None, None, :]
        h = h + jnp.einsum("bte,ebtd->btd", gates, z)
        return nn.Dense(3, name="head")(h)


MOE = {"['embed']['kernel']": "input", "['embed']['bias']": "vector", "['router']['kernel']": "output", "['up']": "hidden",
       "['down']": "hidden", "['bias']": "vector", "['head']['kernel']": "output", "['head']['bias']": "finite"}  # fmt: skip


# Recurrent --------------------------------------------------------------------------------------------------------------


class FlaxRNN(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.RNN(nn.OptimizedLSTMCell(self.width), name="lstm")(x)
        return nn.Dense(3, name="head")(nn.RNN(nn.SimpleCell(self.width), name="simple")(h)[:, -1])


LSTM = {f"['i{gate}']['kernel']": "input" for gate in "ifgo"} | {
    f"['h{gate}']['{kind}']": role for gate in "ifgo" for kind, role in (("kernel", "hidden"), ("bias", "vector"))
}
FLAX_RNN = {
    **under("['OptimizedLSTMCell_0']", LSTM), "['head']['kernel']": "output", "['head']['bias']": "finite",
    "['SimpleCell_0']['i']['kernel']": "hidden", "['SimpleCell_0']['i']['bias']": "vector", "['SimpleCell_0']['h']['kernel']": "hidden",
}  # fmt: skip


class NnxGRU(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(5, width, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.rnn(x)[:, -1])


# Three gates in one kernel.
NNX_GRU = under("['params']", {
    "['rnn']['cell']['dense_i']['kernel']": "input", "['rnn']['cell']['dense_i']['bias']": "vector",
    "['rnn']['cell']['dense_h']['kernel']": "hidden", "['head']['kernel']": "output", "['head']['bias']": "finite",
})  # fmt: skip


def scan_rnn(width: int) -> Model:
    """A tanh RNN by lax.scan, with a learned first state."""

    def init(key: Any, x: Any) -> Any:
        k = jax.random.split(key, 3)
        n = jax.random.normal
        return {
            "start": jnp.zeros((width,)),
            "u": n(k[0], (x.shape[-1], width)),
            "w": n(k[1], (width, width)) / width**0.5,
            "b": jnp.zeros((width,)),
            "v": n(k[2], (width, 3)) / width,
        }

    def apply(p: Any, x: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(x @ p["u"] + h @ p["w"] + p["b"][None])
            return h, h

        h, _ = jax.lax.scan(step, jnp.tile(p["start"][None], (x.shape[0], 1)), x.transpose(1, 0, 2))
        return h @ p["v"]

    return Model(init, apply)


SCAN_RNN = {"['start']": "vector", "['u']": "input", "['w']": "hidden", "['b']": "vector", "['v']": "output"}


def lru(width: int, depth: int) -> Model:
    """Linear recurrent units (arXiv 2303.06349, eqs. 1-7): complex diagonal recurrences, complex matrices in real and imaginary parts."""

    def init(key: Any, x: Any) -> Any:
        k = jax.random.split(key, 10)
        matrices = {name: jax.random.normal(k[i], (depth, width, width)) / width**0.5 for i, name in enumerate(("br", "bi", "cr", "ci"))}
        vectors = {name: 0.5 * jax.random.normal(k[4 + i], (depth, width)) for i, name in enumerate(("nu", "theta", "d"))}
        return {
            "block": matrices | vectors,
            "embed": jax.random.normal(k[8], (x.shape[-1], width)),
            "head": jax.random.normal(k[9], (width, 3)) / width,
        }

    def apply(p: Any, x: Any) -> Any:
        def after(a: Any, b: Any) -> Any:
            return a[0] * b[0], b[0] * a[1] + b[1]

        def block(h: Any, w: Any) -> Any:
            rate = jnp.exp(-jnp.exp(w["nu"]) + 1j * jnp.exp(w["theta"]))[None, None]
            u = (h.astype(complex) @ (w["br"] + 1j * w["bi"])) * jnp.sqrt(1 - jnp.abs(rate) ** 2)
            _, states = jax.lax.associative_scan(after, (jnp.broadcast_to(rate, u.shape), u), axis=1)
            return h + jax.nn.gelu((states @ (w["cr"] + 1j * w["ci"])).real + h * w["d"][None, None]), None

        h, _ = jax.lax.scan(block, x @ p["embed"], p["block"])
        return h.mean(1) @ p["head"]

    return Model(init, apply)


LRU = {"['embed']": "input", "['head']": "output", **{f"['block']['{name}']": "hidden" for name in ("br", "bi", "cr", "ci")},
       **{f"['block']['{name}']": "vector" for name in ("nu", "theta", "d")}}  # fmt: skip


# The zoo ----------------------------------------------------------------------------------------------------------------


def _gpt(**options: Any) -> Callable[..., Any]:
    return lambda width, depth: GPT(width, depth, **options)


# Streams that write into each other ----------------------------------------------------------------------------------------


def rev_block(streams: Any, p: Any) -> Any:
    """RevNet's (arXiv 1707.04585, eq. 6): each stream gets one branch a block, made of the other."""
    x, y = streams
    x = x + jax.nn.relu(y @ p["a"]) @ p["b"]
    return x, y + jax.nn.relu(x @ p["c"]) @ p["d"]


def rev_net(width: int, depth: int) -> Model:
    """Halves of one array, a Python loop."""
    shapes = {"u": (5, 2 * width), "v": (2 * width, 3)} | {f"block_{i}": dict.fromkeys("abcd", (width, width)) for i in range(depth)}

    def apply(p: Any, x: Any) -> Any:
        streams = tuple(jnp.split(x @ p["u"], 2, -1))
        for i in range(depth):
            streams = rev_block(streams, p[f"block_{i}"])
        return jnp.concatenate(streams, -1) @ p["v"]

    return drawn(shapes, apply)


def rev_scan(width: int, depth: int) -> Model:
    """Two stems, a scan, and a readout of the first stream."""
    shapes = {"u": (5, width), "t": (5, width), "v": (width, 3), "blocks": dict.fromkeys("abcd", (depth, width, width))}

    def apply(p: Any, x: Any) -> Any:
        streams, _ = jax.lax.scan(lambda s, layer: (rev_block(s, layer), None), (x @ p["u"], x @ p["t"]), p["blocks"])
        return streams[0] @ p["v"]

    return drawn(shapes, apply)


def drawn(shapes: Any, apply: Any) -> Model:
    """Normal leaves of variance 1/fan_in."""

    def init(key: Any, x: Any) -> Any:
        flat, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
        keys = jax.random.split(key, len(flat))
        return jax.tree.unflatten(tree, [jax.random.normal(k, s) * s[-2] ** -0.5 for k, s in zip(keys, flat)])

    return Model(init, apply)


def rev_roles(blocks: list[str]) -> dict[str, str]:
    return {"['u']": "input", "['v']": "output", **{f"{block}['{name}']": "hidden" for block in blocks for name in "abcd"}}


ZOO: dict[str, Case] = {
    "linen mlp": Case(linen_mlp, *WIDTH, ROWS, LINEN_MLP),
    "dict mlp": Case(dict_mlp, *WIDTH, ROWS, DICT_MLP),
    "equinox mlp": Case(
        lambda width, depth: lambda key: EqxMLP(width, depth, key),
        *deep(),
        ROWS,
        EQX_MLP,
        adds=((6, (".stack.bias", ".stack.weight")),),
        depth_ratio=3.0,
    ),
    "equinox tokens": Case(lambda width: lambda key: EqxTokens(width, key), *WIDTH, TOKENS, EQX_TOKENS),
    "gated mlp": Case(
        GatedMLP, *deep(), ROWS, GATED_MLP, tuple((1, (f"['block_{i}']['down']['kernel']",)) for i in range(6)), depth_ratio=3.0
    ),
    "modulated mlp": Case(
        Modulated,
        *deep(),
        ROWS,
        MODULATED,
        tuple((1, tuple(f"['block_{i}_{n}']['{k}']" for k in ("bias", "kernel"))) for i in range(6) for n in ("mix", "down")),
        depth_ratio=3.0,
    ),
    "revnet": Case(
        rev_net,
        *deep(),
        ROWS,
        rev_roles([f"['block_{i}']" for i in range(6)]),
        tuple((1, (f"['block_{i}']['{name}']",)) for i in range(6) for name in "bd"),
        3.0,
    ),
    "revnet, scan, two stems": Case(
        rev_scan,
        *deep(),
        ROWS,
        rev_roles(["['blocks']"]) | {"['t']": "input"},
        tuple((6, (f"['blocks']['{name}']",)) for name in "bd"),
        3.0,
    ),
    "cnn": Case(CNN, *WIDTH, IMAGES, CNN_ROLES),
    "resnet": Case(ResNet, *WIDTH, IMAGES, RESNET, adds=((1, ("['params']['b_0']['kernel']",)), (1, ("['params']['b_1']['kernel']",)))),
    "vit": Case(
        lambda width: PatchViT(width, 2),
        *WIDTH,
        IMAGES,
        VIT,
        adds=tuple((1, (f"['attention_{i}']['out']['bias']", f"['attention_{i}']['out']['kernel']")) for i in range(2)),
        # q·k sums over the head's 8 coordinates; values over the 5 positions.
        interactions=((8, -0.5), (5, 0.0)) * 2,
    ),
    "gpt, unrolled": Case(
        _gpt(), *deep(), TOKENS, {**AROUND, **_looped(BLOCK, 6)}, _looped_writers(6), 3.0, interactions=((8, -0.5), (6, 0.0)) * 6
    ),
    "gpt, remat, scan axis 0": Case(
        _gpt(scan_axis=0), *deep(), TOKENS, {**AROUND, **under("['blocks']", BLOCK)}, SCANNED_WRITERS, 3.0, ((8, -0.5), (6, 0.0))
    ),
    "gpt, remat, scan axis 1": Case(
        _gpt(scan_axis=1), *deep(), TOKENS, {**AROUND, **under("['blocks']", BLOCK)}, SCANNED_WRITERS, 3.0, ((8, -0.5), (6, 0.0))
    ),
    "gpt, tied, 1/d": Case(
        _gpt(tied=True, scan_axis=0, power=1.0),
        *deep(),
        TOKENS,
        {**TIED_AROUND, **under("['blocks']", BLOCK)},
        SCANNED_WRITERS,
        3.0,
        ((8, -1.0), (6, 0.0)),
    ),
    "gpt, tied, heads grow": Case(
        lambda width, heads: GPT(width, 6, heads=heads, tied=True, scan_axis=0),
        {"width": 8, "heads": 2},
        {"width": 16, "heads": 4},
        TOKENS,
        {**TIED_AROUND, **under("['blocks']", BLOCK)},
        SCANNED_WRITERS,
        # A head keeps its 4 coordinates, so there is no exponent to read.
        interactions=((4, 0.0), (6, 0.0)),
    ),
    "gpt, fused qkv": Case(
        _gpt(fused=True), *deep(), TOKENS, {**AROUND, **_looped(FUSED_BLOCK, 6)}, _looped_writers(6), 3.0, ((8, -0.5), (6, 0.0)) * 6
    ),
    "gpt, unscaled logits": Case(
        _gpt(power=0.0, scan_axis=0), *deep(), TOKENS, {**AROUND, **under("['blocks']", BLOCK)}, SCANNED_WRITERS, 3.0, ((8, 0.0), (6, 0.0))
    ),
    "nnx transformer": Case(
        lambda width: lambda rngs: NnxTransformer(width, rngs),
        *WIDTH,
        TOKENS,
        NNX,
        adds=tuple(
            add
            for i in range(2)
            for add in (
                (1, (f"['blocks'][{i}]['attention']['out']['kernel']",)),
                (1, (f"['blocks'][{i}]['down']['bias']", f"['blocks'][{i}]['down']['kernel']")),
            )
        ),
        interactions=((8, -0.5), (6, 0.0)) * 2,
    ),
    "einsum attention": Case(
        einsum_attention,
        {"width": 8, "heads": 2},
        {"width": 16, "heads": 4},
        SEQUENCE,
        EINSUM,
        ((1, ("['o']",)),),
        # The heads' number grows, their size does not.
        interactions=((4, 0.0), (6, 0.0)),
    ),
    **{
        name: Case(
            lambda width, style=style: SharedKeys(width, style),
            *WIDTH,
            SEQUENCE,
            SHARED_KEYS,
            ((1, ("['o']['kernel']",)),),
            interactions=((4, -0.5), (6, 0.0)),
        )
        for name, style in (("gqa", "jax"), ("gqa, einsum", "einsum"), ("gqa, repeated keys", "repeat"), ("mqa", "one head"))
    },
    "two towers": Case(two_towers, *WIDTH, TOKENS, TWO_TOWERS, interactions=((16, 0.0),)),
    "moe": Case(MoE, *WIDTH, SEQUENCE, MOE, adds=((1, ("['bias']", "['down']")),), interactions=((4, 0.0),)),
    "flax rnn": Case(FlaxRNN, *WIDTH, SEQUENCE, FLAX_RNN),
    "nnx gru": Case(lambda width: lambda rngs: NnxGRU(width, rngs), *WIDTH, SEQUENCE, NNX_GRU),
    # The branch ends in a GELU, which no weight of it scales.
    "lru": Case(lru, *deep(), SEQUENCE, LRU, ((6, ()),), 3.0),
    "scan rnn": Case(scan_rnn, *WIDTH, SEQUENCE, SCAN_RNN),
}
