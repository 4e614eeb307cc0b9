"""The networks of `ntk_models.py` in PyTorch, and the two routes to a kernel of PyTorch's own tutorial on `torch.func`.

https://docs.pytorch.org/tutorials/intermediate/neural_tangent_kernels.html: contract Jacobians of all examples, or multiply the kernel by
every unit vector. As there, both are vmapped; batches whose Jacobians are over `HELD` bytes are taken in blocks, which the tutorial
leaves to its reader, and of symmetric blocks one is computed.
"""

import math

import torch  # pyright: ignore[reportMissingImports]  It lives in an environment of its own.
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from ntk_models import CNN, HEADS, MLP_SIZES, OUTPUTS, RESNET
from torch.func import jacrev, jvp, vjp, vmap  # pyright: ignore[reportMissingImports]

HELD = 2e9


def network(kind):
    """The network, ``f(params, x) -> (batch, 10)``, with weights as PyTorch keeps them (`torch_params`)."""

    def dense(params, name, x):
        return F.linear(x, params["w" + name], params["b" + name])

    def conv(params, name, x, stride=1):
        weight = params["w" + name]
        return F.conv2d(x, weight, params["b" + name], stride, weight.shape[-1] // 2)

    def norm(params, name, x):
        return F.layer_norm(x, x.shape[-1:], params["g" + name], params["b" + name])

    def mlp(params, x):
        for i in range(len(MLP_SIZES) - 1):
            x = dense(params, str(i), F.relu(x) if i else x)
        return x

    def cnn(params, x):
        for i, (_, stride) in enumerate(CNN):
            x = F.relu(conv(params, str(i), x, stride))
        return dense(params, "_out", x.mean((2, 3)))

    def resnet(params, x):
        x = F.relu(conv(params, "_stem", x))
        for i, (_, _, stride) in enumerate(RESNET):
            branch = conv(params, f"{i}b", F.relu(conv(params, f"{i}a", x, stride)))
            x = F.relu(branch + (conv(params, f"{i}s", x, stride) if stride > 1 else x))
        return dense(params, "_out", x.mean((2, 3)))

    def attention(params, i, h):
        n, t, d = h.shape
        q, k, v = (dense(params, f"{i}{name}", h).reshape(n, t, HEADS, d // HEADS).transpose(1, 2) for name in "qkv")
        weights = torch.softmax(q @ k.transpose(-1, -2) * (d // HEADS) ** -0.5, -1)
        return dense(params, f"{i}o", (weights @ v).transpose(1, 2).reshape(n, t, d))

    def transformer(params, x):
        h = F.embedding(x, params["tokens"]) + params["positions"]
        for i in range(2):
            h = h + attention(params, i, norm(params, f"{i}n", h))
            h = h + dense(params, f"{i}d", F.gelu(dense(params, f"{i}u", norm(params, f"{i}m", h)), approximate="tanh"))
        return dense(params, "_out", norm(params, "_n", h).mean(1))

    return {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer}[kind]


def torch_params(params):
    """Arrays of the other contenders in PyTorch's layout."""

    def one(name, array):
        array = torch.from_numpy(array)
        if array.ndim == 4:
            array = array.permute(3, 2, 0, 1)
        elif name.startswith("w"):
            array = array.T
        return array.contiguous()

    return {name: one(name, array) for name, array in params.items()}


def torch_inputs(kind, x):
    """A batch in PyTorch's layout."""
    x = torch.from_numpy(x)
    return x.long() if kind == "transformer" else x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def contraction(f, params, outputs):
    """``x -> kernel`` by Jacobians of all examples, contracted leaf by leaf."""
    equation = {"full": "naf,mbf->nmab", "trace": "naf,maf->nm"}[outputs]

    def jacobians(x):
        found = vmap(jacrev(lambda p, one: f(p, one[None])[0]), (None, 0))(params, x)
        return [j.flatten(2) for j in found.values()]

    def contract(first, second):
        return torch.stack([torch.einsum(equation, a, b) for a, b in zip(first, second)]).sum(0)

    def kernel(x):
        size = _block(params)
        if len(x) <= size:
            found = jacobians(x)
            return contract(found, found)
        starts = range(0, len(x), size)
        whole = torch.empty(len(x), len(x), *([OUTPUTS, OUTPUTS] if outputs == "full" else []))
        for i in starts:
            first = jacobians(x[i : i + size])
            for j in starts:
                if j >= i:
                    block = contract(first, first if j == i else jacobians(x[j : j + size]))
                    whole[i : i + size, j : j + size] = block
                    whole[j : j + size, i : i + size] = block.permute(1, 0, 3, 2) if outputs == "full" else block.T
        return whole

    return kernel


def products(f, params, outputs):
    """``x -> kernel`` by products of the kernel with unit vectors."""

    def one_pair(x1, x2):
        y, pull = vjp(lambda p: f(p, x1[None])[0], params)

        def product(vector):
            return jvp(lambda p: f(p, x2[None])[0], (params,), pull(vector))[1]

        return vmap(product)(torch.eye(len(y), dtype=y.dtype))

    def kernel(x):
        rows = vmap(vmap(one_pair, (None, 0)), (0, None), chunk_size=_block(params))
        whole = rows(x, x)
        return torch.einsum("nmaa->nm", whole) if outputs == "trace" else whole

    return kernel


def _block(params):
    return max(1, int(HELD / (4 * OUTPUTS * sum(math.prod(p.shape) for p in params.values()))))


ROUTES = {"contraction": contraction, "products": products}
