"""Programs with layers written out, and what is in a program."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from paperjax import limits

# The same operations in the same order; XLA may fuse and contract them otherwise, to a few last bits per layer.
EXACT = dict(rtol=1e-14, atol=1e-14)
K11, K12, K22 = np.array([[1.3], [0.7]]), np.array([[0.4, -0.2, 0.1], [0.3, 0.6, 0.0]]), np.array([[1.1, 0.8, 0.5]])
X = np.array([0.3, -0.8, 1.2])


def arccos_layer(k11, k12, k22):
    s = jnp.sqrt(k11 * k22)
    rho = jnp.where(s > 0, k12 / jnp.where(s > 0, s, jnp.ones_like(s)), jnp.zeros_like(k12))
    within = jnp.where(jnp.abs(rho) < 1, rho, jnp.zeros_like(rho))
    root, angle = jnp.sqrt(1 - within**2), math.pi / 2 + jnp.arcsin(within)
    return s / math.pi * (root + rho * angle), angle / math.pi


def arccos(depth, k11, k12, k22):
    theta = k12
    for _ in range(depth):
        k12, slope = arccos_layer(k11, k12, k22)
        theta = k12 + slope * theta
    return k12, theta


def three_carries(dual, depth, k11, k12, k22):
    for _ in range(depth):
        k11, k12, k22 = (1.5 * dual.value(*ks) + 0.1 for ks in ((k11, k11, k11), (k11, k12, k22), (k22, k22, k22)))
    return k11, k12, k22


def residual(depth, x):
    first = x
    for _ in range(depth):
        x = x + 0.1 * jnp.tanh(x) * jnp.cos(x) + 0.01 * first
    return jnp.sum(x * first)


@jax.custom_jvp
def soft(x):
    return jnp.log1p(jnp.exp(x))


@soft.defjvp
def _(primals, tangents):
    # Not the derivative of the formula, so that a lost rule is noticed.
    return soft(*primals), 3 * jax.nn.sigmoid(primals[0]) * tangents[0]


@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defvjp(lambda x: (swish(x), x), lambda x, ct: (2.0 * ct * jnp.cos(x),))


def custom(depth, x):
    for _ in range(depth):
        own = jax.custom_jvp(lambda h: jnp.sin(h))
        own.defjvps(lambda t, out, h: 5.0 * t * jnp.cos(h))
        x = soft(x) - jax.nn.relu(0.3 * x) + swish(0.1 * x) + 0.01 * own(x)
    return x


def two_kinds(depth, x):
    for _ in range(depth):
        scores = jax.nn.softmax(x[:, None] * x[None, :], axis=1)
        x = x + scores @ x
        x = x / jnp.sqrt(jnp.mean(x**2) + 1e-3)
        x = x + 0.5 * jnp.tanh(x)
    return x


def inside(depth, x):
    layer = jax.jit(lambda h: 1.01 * jnp.sin(h) + h)
    for _ in range(depth):
        x = layer(x)
        x = jax.lax.scan(lambda h, w: (h + w * jnp.cos(h), None), x, jnp.arange(3.0) / 30)[0]
        x = jax.jit(lambda h: h * jnp.exp(-h))(x)
    return x


def two_runs(depth, x):
    x = jnp.exp(-(x**2))
    for _ in range(depth):
        x = jnp.tanh(2 * x) + x / 3
    x = jnp.cumsum(x)
    for _ in range(depth):
        x = jnp.sin(x) * jnp.cos(x) + jnp.max(x) / 7
    return jnp.sum(jnp.log(1 + x**2))


def numbers(depth, x):
    for layer in range(depth):
        x = jnp.tanh(x * (1 + layer / 7)) + 0.1 / (layer + 1)
    return x


def weights(depth, x):
    w = jnp.linspace(0.5, 1.5, depth * 3).reshape(depth, 3)
    for layer in range(depth):
        x = jnp.tanh(w[layer] * x) + w[layer, 0]
    return x


def backwards_weights(depth, x):
    w = jnp.linspace(0.5, 1.5, depth * 3).reshape(3, depth) * x[0]
    for layer in reversed(range(depth)):
        x = jnp.tanh(w[:, layer] * x) + jnp.sin(x)
    return x


def tape(depth, x):
    seen = []
    for _ in range(depth):
        x = jnp.tanh(1.3 * x) + 0.2 * x**2
        seen.append(jnp.sum(x**2))
    y = jnp.ones_like(x)
    for q in seen:
        y = jnp.sin(y * q) + y / jnp.sqrt(1 + q)
    return jnp.stack(seen), y


def stages(depth, x):
    for width in (3, 6, 12):
        x = jnp.concatenate([x, x])[:width]
        for _ in range(depth):
            x = x + 0.1 * jnp.tanh(x - jnp.mean(x)) / jnp.sqrt(1 + jnp.var(x))
    return x


def gradients(depth, x):
    return jax.value_and_grad(lambda h: residual(depth, h))(x)


def tangents(depth, x):
    def f(h):
        for _ in range(depth):
            h = soft(h) - jax.nn.relu(0.3 * h)
        return h

    return jax.jvp(lambda h: (residual(depth, h), f(h)), (x,), (jnp.cos(x),))


def compiled(depth, x):
    return jax.jit(functools.partial(numbers, depth))(x) + 1


def kernel_tangents(depth, *ks):
    return jax.jvp(functools.partial(arccos, depth), ks, tuple(jnp.ones_like(k) for k in ks))


def lagged(depth, x):
    before = x
    for _ in range(depth):
        x, before = jnp.tanh(x) + 0.5 * before, x
    return x


def interleaved(depth, x):
    chains, scales = [x, 2 * x], jnp.linspace(0.5, 1.0, depth) * jnp.sum(x)
    todo = [0] * depth + [1] * depth
    np.random.default_rng(0).shuffle(todo)
    done = [0, 0]
    for which in todo:
        chains[which] = jnp.tanh(chains[which]) + scales[done[which]] * jnp.cos(chains[which])
        done[which] += 1
    return chains


TANH = limits.quadrature(jnp.tanh, points=16, tolerance=1.0)
KERNELS = dict(
    arccos=arccos,
    kernel_tangents=kernel_tangents,
    relu=functools.partial(three_carries, limits.relu),
    gelu=functools.partial(three_carries, limits.gelu),
    quadrature=functools.partial(three_carries, TANH),
)
CHAINS = dict(
    residual=residual, custom=custom, two_kinds=two_kinds, inside=inside, two_runs=two_runs, numbers=numbers, weights=weights,
    backwards_weights=backwards_weights, tape=tape, stages=stages, gradients=gradients, tangents=tangents, compiled=compiled,
    lagged=lagged, interleaved=interleaved,
)  # fmt: skip
CASES = {name: (f, (K11, K12, K22)) for name, f in KERNELS.items()} | {name: (f, (X,)) for name, f in CHAINS.items()}


def equations(jaxpr):
    """All equations, those of compiled functions and of loops' bodies too."""
    jaxprs = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values())) if hasattr(p, "eqns")]
    return len(jaxpr.eqns) + sum(equations(inner) for inner in jaxprs)


def scans(jaxpr):
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    return names.count("scan") + sum(scans(eqn.params["jaxpr"]) for eqn in jaxpr.eqns if eqn.primitive.name in ("jit", "pjit"))
