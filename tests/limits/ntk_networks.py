"""Networks in NTK parametrization as plain functions, each beside neural-tangents' layers for it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

W, B = 1.3, 0.2
RNG = np.random.default_rng(0)
VECTORS, IMAGES, SENTENCES = RNG.normal(size=(3, 5)), RNG.normal(size=(3, 4, 4, 3)), RNG.normal(size=(3, 3, 5))


def plain(forward):
    """The family ``width -> (init, apply)`` of ``forward(draw, x, width)``, where ``draw(*shape)`` is the next leaf, standard normal."""

    def family(width):
        def init(key, x):
            leaves = []

            def draw(*shape):
                leaves.append(jax.random.normal(jax.random.fold_in(key, len(leaves)), shape))
                return leaves[-1].astype(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else leaves[-1].dtype)

            forward(draw, x, width)
            return leaves

        def apply(params, x):
            leaves = iter(params)
            return forward(lambda *shape: next(leaves), x, width)

        return init, apply

    return family


def biased(draw, h, b):
    return h if b is None else h + b * jnp.broadcast_to(draw(h.shape[-1]), h.shape)


def dense(draw, h, n, w=W, b=B):
    return biased(draw, (w / math.sqrt(h.shape[-1])) * (h @ draw(h.shape[-1], n)), b)


def conv(draw, h, n, padding="SAME", stride=1, size=3, b=B):
    kernel, window, strides = draw(size, size, h.shape[-1], n), (size, size), (stride, stride)
    if padding == "CIRCULAR":
        h, padding = jnp.pad(h, ((0, 0), *lax.padtype_to_pads(h.shape[1:3], window, strides, "SAME"), (0, 0)), mode="wrap"), "VALID"
    out = lax.conv_general_dilated(h, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return biased(draw, (W / math.sqrt(size * size * h.shape[-1])) * out, b)


def flat(h):
    return h.reshape(h.shape[0], -1)


def layer_norm(h, axes=(-1,)):
    h = h - jnp.mean(h, axes, keepdims=True)
    return h / jnp.sqrt(jnp.mean(h**2, axes, keepdims=True) + 1e-12)


def sum_pool(h, size, stride, padding):
    return lax.reduce_window(h, np.zeros((), h.dtype), lax.add, (1, size, size, 1), (1, stride, stride, 1), padding)


def attention(draw, h, n, mechanism, positions=0.0):
    """Logits over d with tied queries and keys, which is neural-tangents' linear scaling."""
    seen = h
    if positions:
        seen = h + positions * jnp.broadcast_to(draw(1, h.shape[1], n), h.shape)
    keys = seen @ draw(n, n)
    weights = mechanism((1.1 * 0.9 / n**2) * jnp.einsum("bid,bjd->bij", keys, keys))
    return (1.2 * 0.8 / n) * ((weights @ (h @ draw(n, n))) @ draw(n, n))


PHIS = {
    "relu": (jax.nn.relu, lambda stax: stax.Relu()),
    "erf": (lax.erf, lambda stax: stax.Erf()),
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), lambda stax: stax.Gelu()),
    "leaky relu": (lambda h: jnp.where(h > 0, h, 0.2 * h), lambda stax: stax.LeakyRelu(0.2)),
    "sin": (jnp.sin, lambda stax: stax.Sin()),
    "abs": (jnp.abs, lambda stax: stax.Abs()),
    "polynomial": (lambda h: 0.1 + 0.5 * h + 0.2 * h**2, lambda stax: stax.Polynomial([0.1, 0.5, 0.2])),
    "cos": (jnp.cos, lambda stax: stax.Cos()),
    "exp": (lambda h: jnp.exp(0.5 * h), lambda stax: stax.Exp(1, 0.5)),
    "sign": (jnp.sign, lambda stax: stax.Sign()),
    "gaussian": (lambda h: jnp.exp(-(h**2)), lambda stax: stax.Gaussian()),
    "gabor": (lambda h: jnp.exp(-(h**2)) * jnp.sin(h), lambda stax: stax.Gabor()),
    "rbf": (lambda h: 2**0.5 * jnp.sin(1.4**0.5 * h + math.pi / 4), lambda stax: stax.Rbf(0.7)),
    "sigmoid-like": (lambda h: 0.5 * lax.erf(h / 2.4020563531719796) + 0.5, lambda stax: stax.Sigmoid_like()),
    "abrelu": (lambda h: 0.3 * jnp.minimum(h, 0) + 1.1 * jnp.maximum(h, 0), lambda stax: stax.ABRelu(0.3, 1.1)),
    "monomial": (lambda h: h**3, lambda stax: stax.Monomial(3)),
}

COMMON = ("relu", "erf", "gelu", "leaky relu", "sin", "abs", "polynomial")
"""Those that are compared at every depth."""


def perceptron(phi, depth, b):
    ours, theirs = PHIS[phi]

    def forward(draw, x, n):
        for _ in range(depth):
            x = ours(dense(draw, x, n, b=b))
        return dense(draw, x, 1, b=b)

    return forward, lambda stax: stax.serial(*(f for _ in range(depth) for f in (stax.Dense(8, W, b), theirs(stax))), stax.Dense(1, W, b))


def conv_layer(stax, padding="SAME", stride=1, size=3):
    return stax.Conv(8, (size, size), (stride, stride), padding, W, B)


def heads(stax):
    return dict(flatten=stax.Flatten, mean=stax.GlobalAvgPool, sum=stax.GlobalSumPool)


HEADS = dict(flatten=flat, mean=lambda h: jnp.mean(h, (1, 2)), sum=lambda h: jnp.sum(h, (1, 2)))


def convolutional(padding, stride, head):
    last = 2 if padding == "VALID" else 3

    def forward(draw, x, n):
        h = jax.nn.relu(conv(draw, x, n, padding))
        return dense(draw, HEADS[head](jax.nn.relu(conv(draw, h, n, padding, stride, last))), 1)

    def layers(stax):
        convs = conv_layer(stax, padding), stax.Relu(), conv_layer(stax, padding, stride, last), stax.Relu()
        return stax.serial(*convs, heads(stax)[head](), stax.Dense(1, W, B))

    return forward, layers


def pooled(pool, theirs, head):
    """A pooling between two convolutions."""

    def forward(draw, x, n):
        h = pool(lax.erf(conv(draw, x, n)))
        return dense(draw, HEADS[head](lax.erf(conv(draw, h, n))), 1)

    def layers(stax):
        convs = conv_layer(stax), stax.Erf(), theirs(stax), conv_layer(stax), stax.Erf()
        return stax.serial(*convs, heads(stax)[head](), stax.Dense(1, W, B))

    return forward, layers


def residual(draw, x, n):
    h = dense(draw, x, n)
    for _ in range(2):
        h = h + dense(draw, lax.erf(dense(draw, jax.nn.relu(h), n)), n)
    return dense(draw, jax.nn.relu(h), 1)


def residual_layers(stax):
    def block():
        branch = stax.serial(stax.Relu(), stax.Dense(8, W, B), stax.Erf(), stax.Dense(8, W, B))
        return stax.serial(stax.FanOut(2), stax.parallel(branch, stax.Identity()), stax.FanInSum())

    return stax.serial(stax.Dense(8, W, B), block(), block(), stax.Relu(), stax.Dense(1, W, B))


def normed(draw, x, n):
    h = x
    for _ in range(2):
        h = jax.nn.relu(layer_norm(dense(draw, h, n)))
    return dense(draw, h, 1)


def normed_layers(stax):
    return stax.serial(*(f for _ in range(2) for f in (stax.Dense(8, W, B), stax.LayerNorm(), stax.Relu())), stax.Dense(1, W, B))


def normed_images(axes):
    def forward(draw, x, n):
        return dense(draw, flat(jax.nn.relu(layer_norm(conv(draw, x, n), axes))), 1)

    return forward, lambda stax: stax.serial(conv_layer(stax), stax.LayerNorm(axes), stax.Relu(), stax.Flatten(), stax.Dense(1, W, B))


MECHANISMS = dict(SOFTMAX=lambda g: jax.nn.softmax(g, -1), IDENTITY=lambda g: g, ABS=jnp.abs, RELU=jax.nn.relu)


def attending(mechanism, positions=0.0):
    def forward(draw, x, n):
        h = attention(draw, dense(draw, x, n), n, MECHANISMS[mechanism], positions)
        return dense(draw, flat(jax.nn.relu(h)), 1)

    def layers(stax):
        more = dict(pos_emb_type="SUM", W_pos_emb_std=positions) if positions else {}
        layer = stax.GlobalSelfAttention(
            8, 8, 8, 4, linear_scaling=True, attention_mechanism=mechanism, b_std=None,
            W_query_std=1.1, W_key_std=0.9, W_value_std=1.2, W_out_std=0.8, **more,
        )  # fmt: skip
        return stax.serial(stax.Dense(8, W, B), layer, stax.Relu(), stax.Flatten(), stax.Dense(1, W, B))

    return forward, layers


def transposed(draw, x, n):
    h = jax.nn.relu(conv(draw, x, n))
    up = lax.conv_transpose(h, draw(3, 3, n, n), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return dense(draw, jnp.mean(jax.nn.relu(biased(draw, W / math.sqrt(9 * n) * up, B)), (1, 2)), 1)


def transposed_layers(stax):
    up = stax.ConvTranspose(8, (3, 3), (2, 2), "SAME", W, B)
    return stax.serial(conv_layer(stax), stax.Relu(), up, stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1, W, B))


def local(draw, x, n):
    h, numbers = jax.nn.relu(conv(draw, x, n)), ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated_local(h, draw(3, 3, 4 * n, n), (1, 1), "VALID", (2, 2), dimension_numbers=numbers)
    h = W / math.sqrt(4 * n) * h
    h = jax.nn.relu(h + B * jnp.broadcast_to(draw(3, 3, n), h.shape))
    return dense(draw, jnp.mean(h, (1, 2)), 1)


def local_layers(stax):
    layers = conv_layer(stax), stax.Relu(), stax.ConvLocal(8, (2, 2), (1, 1), "VALID", W, B), stax.Relu()
    return stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1, W, B))


def indexed(draw, x, n):
    return dense(draw, flat(jax.nn.relu(conv(draw, x, n))[:, 1:4:2, 2]), 1)


def indexed_layers(stax):
    return stax.serial(conv_layer(stax), stax.Relu(), stax.Index(stax.Slice[:, 1:4:2, 2]), stax.Flatten(), stax.Dense(1, W, B))


def multiplied(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, lax.erf(dense(draw, h, n)) * dense(draw, h, n), 1)


def joined(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jnp.concatenate([lax.erf(dense(draw, h, n)), jnp.sin(dense(draw, h, n))], -1), 1)


def two_branches(stax, second, meeting):
    branches = stax.parallel(stax.serial(stax.Dense(8, W, B), stax.Erf()), stax.serial(stax.Dense(8, W, B), second))
    return stax.serial(stax.Dense(8, W, B), stax.FanOut(2), branches, meeting, stax.Dense(1, W, B))


def average(padding):
    return lambda h: sum_pool(h, 2, 2, padding) / 4, lambda stax: stax.AvgPool((2, 2), (2, 2), padding)


QUICK = {
    "perceptron of relu, depth 10, bias": (*perceptron("relu", 10, B), VECTORS),
    "perceptron of gelu, depth 3, bias": (*perceptron("gelu", 3, B), VECTORS),
    "residual": (residual, residual_layers, VECTORS),
    "attention by SOFTMAX": (*attending("SOFTMAX"), SENTENCES),
}
SLOW = {
    **{
        f"perceptron of {phi}, depth {depth}{', bias' if b else ''}": (*perceptron(phi, depth, b), VECTORS)
        for phi, depth, b in [
            *((phi, depth, b) for phi in COMMON for depth in (1, 3, 10) for b in (None, B)),
            *((phi, 3, B) for phi in PHIS if phi not in COMMON), *((phi, 1, None) for phi in PHIS if phi not in COMMON),
        ]
    },
    **{
        f"convolution {padding}, stride {stride}, {head}": (*convolutional(padding, stride, head), IMAGES)
        for padding in ("SAME", "VALID", "CIRCULAR") for stride in (1, 2) for head in ("flatten", "mean")
    },
    **{
        f"average pooling {padding}, {head}": (*pooled(*average(padding), head), IMAGES)
        for padding in ("SAME", "VALID") for head in ("flatten", "mean")
    },
    "sum pooling": (*pooled(lambda h: sum_pool(h, 2, 1, "VALID"), lambda stax: stax.SumPool((2, 2), (1, 1), "VALID"), "sum"), IMAGES),
    **{f"attention by {mechanism}": (*attending(mechanism), SENTENCES) for mechanism in MECHANISMS},
    "attention with positions": (*attending("SOFTMAX", 0.7), SENTENCES),
    "layer norm": (normed, normed_layers, VECTORS),
    "layer norm over channels": (*normed_images((-1,)), IMAGES),
    "layer norm over all": (*normed_images((1, 2, 3)), IMAGES),
    "transposed convolution": (transposed, transposed_layers, IMAGES),
    "local convolution": (local, local_layers, IMAGES),
    "index": (indexed, indexed_layers, IMAGES),
    "product of branches": (multiplied, lambda stax: two_branches(stax, stax.Identity(), stax.FanInProd()), VECTORS),
    "joined branches": (joined, lambda stax: two_branches(stax, stax.Sin(), stax.FanInConcat()), VECTORS),
}  # fmt: skip
