"""The networks of `ntk.py` as plain functions ``f(params, x)`` on batches, which old and new JAX both run; parameters from numpy.

Parameters are a flat dict from names to arrays, so that every contender reads the same ``.npz``. Their PyTorch twins are in
`ntk_torch.py`. Standard deviations are those of He's initialization; biases and gains are drawn too, so that none is a special value.
"""

import itertools

import numpy as np

HEADS, VOCABULARY, OUTPUTS = 4, 128, 10
MLP_SIZES = (784, 1024, 1024, 1024, OUTPUTS)
CNN = ((3, 1), (32, 2), (32, 1), (32, 2))  # Channels in and stride of each convolution; 32 channels out.
RESNET = ((16, 16, 1), (16, 32, 2), (32, 64, 2))  # Channels in and out and stride of each stage.


def draw(kind, n, length):
    """Parameters of a network and a batch of `n` examples (tokens of `length` for a transformer)."""
    rng = np.random.default_rng(0)
    params = {}

    def dense(name, fan_in, fan_out, gain=2.0):
        params["w" + name] = rng.normal(0, np.sqrt(gain / fan_in), (fan_in, fan_out))
        params["b" + name] = rng.normal(0, 0.1, fan_out)

    def conv(name, size, channels_in, channels_out):
        params["w" + name] = rng.normal(0, np.sqrt(2 / (size * size * channels_in)), (size, size, channels_in, channels_out))
        params["b" + name] = rng.normal(0, 0.1, channels_out)

    def norm(name, width):
        params["g" + name] = rng.normal(1, 0.1, width)
        params["b" + name] = rng.normal(0, 0.1, width)

    x = rng.normal(size=(n, 32, 32, 3))
    if kind == "mlp":
        x = rng.normal(size=(n, MLP_SIZES[0]))
        for i, sizes in enumerate(itertools.pairwise(MLP_SIZES)):
            dense(str(i), *sizes)
    elif kind == "cnn":
        for i, (channels, _) in enumerate(CNN):
            conv(str(i), 3, channels, 32)
        dense("_out", 32, OUTPUTS)
    elif kind == "resnet":
        conv("_stem", 3, 3, RESNET[0][0])
        for i, (before, after, stride) in enumerate(RESNET):
            conv(f"{i}a", 3, before, after)
            conv(f"{i}b", 3, after, after)
            if stride > 1:
                conv(f"{i}s", 1, before, after)
        dense("_out", RESNET[-1][1], OUTPUTS)
    else:
        d = 64
        x = rng.integers(0, VOCABULARY, (n, length))
        params["tokens"] = rng.normal(size=(VOCABULARY, d))
        params["positions"] = rng.normal(size=(length, d))
        for i in range(2):
            norm(f"{i}n", d)
            norm(f"{i}m", d)
            for name in "qkvo":
                dense(f"{i}{name}", d, d, 1.0)
            dense(f"{i}u", d, 4 * d)
            dense(f"{i}d", 4 * d, d, 1.0)
        norm("_n", d)
        dense("_out", d, OUTPUTS, 1.0)
    return {name: p.astype(np.float32) for name, p in params.items()}, x.astype(np.int32 if kind == "transformer" else np.float32)


def network(kind):
    """The network in JAX, ``f(params, x) -> (batch, 10)``."""
    # PyTorch's environment draws no network in JAX and has none.
    import jax
    import jax.numpy as jnp
    from jax import lax

    def conv(params, name, x, stride=1):
        pad = params["w" + name].shape[0] // 2
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, params["w" + name], (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=dimensions)
        return y + params["b" + name][None, None, None, :]

    def dense(params, name, x):
        bias = params["b" + name]
        return x @ params["w" + name] + bias.reshape((1,) * (x.ndim - 1) + bias.shape)

    def norm(params, name, x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * params["g" + name][None, None] + params["b" + name][None, None]

    def mlp(params, x):
        for i in range(len(MLP_SIZES) - 1):
            x = dense(params, str(i), jax.nn.relu(x) if i else x)
        return x

    def cnn(params, x):
        for i, (_, stride) in enumerate(CNN):
            x = jax.nn.relu(conv(params, str(i), x, stride))
        return dense(params, "_out", x.mean((1, 2)))

    def resnet(params, x):
        x = jax.nn.relu(conv(params, "_stem", x))
        for i, (_, _, stride) in enumerate(RESNET):
            branch = conv(params, f"{i}b", jax.nn.relu(conv(params, f"{i}a", x, stride)))
            x = jax.nn.relu(branch + (conv(params, f"{i}s", x, stride) if stride > 1 else x))
        return dense(params, "_out", x.mean((1, 2)))

    def attention(params, i, h):
        q, k, v = (dense(params, f"{i}{name}", h).reshape(*h.shape[:2], HEADS, h.shape[2] // HEADS) for name in "qkv")
        scores = jnp.einsum("nthd,nshd->nhts", q, k) * (q.shape[-1] ** -0.5)
        mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1), v)
        return dense(params, f"{i}o", mixed.reshape(h.shape))

    def transformer(params, x):
        h = params["tokens"][x] + params["positions"][None]
        for i in range(2):
            h = h + attention(params, i, norm(params, f"{i}n", h))
            h = h + dense(params, f"{i}d", jax.nn.gelu(dense(params, f"{i}u", norm(params, f"{i}m", h))))
        return dense(params, "_out", norm(params, "_n", h).mean(1))

    return {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer}[kind]
