"""What is traced in double precision stays so in every derivative and batch, whatever the user's flag."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from paperjax.limits.double import in_double
from tests.limits.ntk_networks import IMAGES, conv, dense, plain

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
Y = X[:2] + 1


def smooth(x, y):
    """Products, a loop, a scatter when transposed, a branch, and constants."""
    x, y = (a.astype(jnp.float64) for a in (x, y))
    table = jnp.linspace(0.1, 1.3, 3)

    def step(h, by):
        return jnp.tanh(h @ (y.T @ y) * 0.1 + by), None

    h, _ = lax.scan(step, x * table[None], jnp.stack([x, x[jnp.array([1, 0, 3, 2])]]))
    return lax.cond(jnp.sum(h) > 100.0, lambda: h @ h.T, lambda: 2 * (h @ h.T)), h[jnp.array([0, 0, 2])] @ y.T


def single(x, y):
    return in_double(smooth, x, y)[0].astype(jnp.float32)


def double(x, y):
    return smooth(x, y)[0]


def total(f):
    return lambda x, y: jnp.sum(f(x, y) * jnp.arange(16, dtype=jnp.float32).reshape(4, 4))


TRANSFORMED = {
    "value": lambda f: f,
    "gradient in both": lambda f: jax.grad(total(f), (0, 1)),
    "gradient in one": lambda f: lambda x, y: jax.grad(lambda y: total(f)(X, y))(y),
    "compiled gradient": lambda f: jax.jit(jax.grad(total(f))),
    "forward": lambda f: lambda x, y: jax.jvp(f, (x, y), (jnp.ones_like(x), jnp.cos(y)))[1],
    "Jacobian": lambda f: jax.jacrev(f),
    "batch": lambda f: lambda x, y: jax.vmap(lambda a: f(a, y))(jnp.stack([x, x + 1, -x])),
    "batch of gradients": lambda f: lambda x, y: jax.vmap(jax.grad(total(f), 1), (None, 0))(x, jnp.stack([y, 2 * y])),
    "second derivative": lambda f: jax.hessian(total(f), 1),
    "second derivative, backward twice": lambda f: jax.jacrev(jax.grad(total(f), 1)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed(name):
    x, y = jnp.asarray(X), jnp.asarray(Y)
    got = TRANSFORMED[name](single)(x, y)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wanted = TRANSFORMED[name](double)(x.astype(jnp.float64), y.astype(jnp.float64))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.float32
        # Double inside: what is left is the rounding of results to single.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7 * np.abs(other).max())


def pooled(draw, x, n):
    return dense(draw, jnp.mean(jax.nn.relu(conv(draw, x, n)), (1, 2)), 1)


def test_gradients_of_a_limit_where_the_flag_is_down():
    """A product of the backward pass was in single precision, with a warning, and a convolution failed."""
    program = pj.limit(plain(pooled), IMAGES[:2], progress=False).program

    def value(x):
        return pj.limit(program, x, progress=False).ntk[0, 1]

    x = IMAGES[:2].astype(np.float32)
    got = jax.jit(jax.grad(value))(jnp.asarray(x))
    assert got.dtype == jnp.float32
    with jax.enable_x64(True):
        wanted = jax.jit(jax.grad(value))(jnp.asarray(x, jnp.float64))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7 * np.abs(wanted).max())
