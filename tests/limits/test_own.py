"""Two functions of one field, against fine sums in numpy; and a deep scan of a function without a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits.own import own

Z = np.linspace(-10, 10, 20001)
DENSITY = np.exp(-Z * Z / 2) * (Z[1] - Z[0]) / np.sqrt(2 * np.pi)


def silu(u):
    return u / (1 + np.exp(-u))


def silu_slope(u):
    s = 1 / (1 + np.exp(-u))
    return s * (1 + u * (1 - s))


def tanh_slope(u):
    return 1 / np.cosh(u) ** 2


def sums(k, f):
    """``E f(u)`` for each variance, by the trapezoidal rule, to rounding for functions analytic in a strip of 1."""
    return np.array([DENSITY @ f(np.sqrt(v) * Z) for v in k])


PAIRS = {
    "tanh, tanh": (jnp.tanh, jnp.tanh, np.tanh, np.tanh, tanh_slope, tanh_slope),
    "silu, tanh": (jax.nn.silu, jnp.tanh, silu, np.tanh, silu_slope, tanh_slope),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_derivatives(name, x64):
    g, h, f, f2, df, df2 = PAIRS[name]
    both, k = own(g, h, 4.0), jnp.array([0.0, 0.3, 1.0, 3.9])
    np.testing.assert_allclose(both(k, k, k), sums(k, lambda u: f(u) * f2(u)), rtol=1e-10, atol=1e-10)
    # What training moves.
    trained = jax.grad(lambda k12: both(k, k12, k).sum())(k)
    np.testing.assert_allclose(trained, sums(k, lambda u: df(u) * df2(u)), rtol=1e-10, atol=1e-10)
    # What an example moves: d/dk E f(u) f2(u) = E u (f f2)'(u) / (2 k).
    moved = jax.grad(lambda k: both(k, k, k).sum())(k)[1:]
    wanted = sums(k[1:], lambda u: u * (df(u) * f2(u) + f(u) * df2(u))) / (2 * np.asarray(k[1:]))
    np.testing.assert_allclose(moved, wanted, rtol=1e-9)


def test_beyond_its_range_it_is_no_number(x64):
    k = jnp.array([0.9, 4.1])
    assert np.isnan(jax.jit(own(jnp.tanh, jnp.tanh, 1.0))(k, k, k)).tolist() == [False, True]


def test_ten_thousand_layers_of_a_function_without_closed_form():
    """One example: q <- q + E tanh(u)² / L by a sum in numpy. By series for any variance each layer took 30 ms; the whole is seconds."""

    def family(width, depth):
        def init(key, x):
            keys = jax.random.split(key, 3)
            shapes = (x.shape[1], width), (depth, width, width), (width, 1)
            return tuple(jax.random.normal(k, shape, x.dtype) for k, shape in zip(keys, shapes))

        def apply(p, x):
            h = x @ p[0] / x.shape[1] ** 0.5
            block = lambda h, w: (h + jnp.tanh(h) @ w / (width * depth) ** 0.5, None)  # noqa: E731
            return jax.lax.scan(block, h, p[1])[0] @ p[2] / width**0.5

        return init, apply

    x, depth = np.array([[1.0, 0.3, -0.5]]), 10_000
    found = pj.limit(family, x, sizes=dict(depth=depth), ntk=False, progress=False)
    q, z, w = float(x[0] @ x[0]) / 3, Z[::50], 50 * DENSITY[::50]
    for _ in range(depth):
        q += w @ np.tanh(np.sqrt(q) * z) ** 2 / depth
    np.testing.assert_allclose(found.nngp, [[q]], rtol=1e-10)
