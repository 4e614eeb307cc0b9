"""Two routes to one limit: extrapolation of traced networks and the differential equation; and closed forms of both."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits import depth_limit, residual_flow

GRAM = np.array([[1.0, 0.3], [0.3, 2.0]])
X = np.linalg.cholesky(GRAM) * 2**0.5


def stream(phi=jax.nn.relu, variance=2.0, power=0.5, bias=0.0):
    """Residual blocks in NTK parametrization, first layer and readout linear; only the blocks are trained."""

    def family(width, depth):
        def init(key, x):
            keys = jax.random.split(key, 4)
            shapes = {"w": (depth, width, width), "b": (depth, width), "u": (x.shape[1], width), "v": (width, 1)}
            drawn = {name: jax.random.normal(k, shape, x.dtype) for k, (name, shape) in zip(keys, shapes.items())}
            return {"w": drawn["w"], "b": drawn["b"], "ends": pj.Frozen((drawn["u"], drawn["v"]))}

        def apply(p, x):
            u, v = p["ends"].value
            scale = depth**-power

            def block(h, layer):
                return h + scale * ((variance / width) ** 0.5 * phi(h) @ layer["w"] + bias**0.5 * layer["b"][None, :]), None

            h = jax.lax.scan(block, x @ u / x.shape[1] ** 0.5, {"w": p["w"], "b": p["b"]})[0]
            return h @ v / width**0.5

        return init, apply

    return family


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_relu_has_its_closed_form(variance):
    # q(1) = q0 exp(s²/2), L (q_inf - q_L) -> q_inf s⁴ / 8, for Θ of the blocks dΘ/dt = q s²/2 + Θ s²/2: Θ(1) = q(1) s²/2.
    flow, q = residual_flow(jax.nn.relu, GRAM, variance), np.diag(GRAM) * math.exp(variance / 2)
    np.testing.assert_allclose(np.diag(flow.nngp), q, rtol=1e-9)  # the solver's tolerance, over the whole path
    np.testing.assert_allclose(np.diag(flow.nngp_error), q * variance**2 / 8, rtol=1e-8)
    np.testing.assert_allclose(np.diag(flow.ntk), q * variance / 2, rtol=1e-8)


def test_correlation_follows_its_own_equation():
    # dc/dt = (s²/2)(kappa(c) - c), by 20,000 midpoint steps in numpy: off by 1e-9.
    def kappa(c):
        return (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi

    c, steps = 0.3, 20_000
    for _ in range(steps):
        middle = c + (kappa(c) - c) / (2 * steps)
        c += (kappa(middle) - middle) / steps
    flow = residual_flow(jax.nn.relu, np.array([[1.0, 0.3], [0.3, 1.0]]), 2.0)
    np.testing.assert_allclose(flow.nngp[0, 1] / flow.nngp[0, 0], c, rtol=1e-7)
    np.testing.assert_allclose(flow.nngp[0, 1], 1.228, atol=5e-4)


@pytest.mark.slow
def test_large_variances_of_a_function_without_closed_form():
    """One example: dq/dt = 4 E tanh², by midpoint steps and a fine sum in numpy, off by 1e-7; and under a trace."""
    z = np.linspace(-10, 10, 4001)
    w = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    q, steps = 60.0, 1000
    for _ in range(steps):
        middle = q + 4 * (w @ np.tanh(q**0.5 * z) ** 2) / (2 * steps)
        q += 4 * (w @ np.tanh(middle**0.5 * z) ** 2) / steps
    start = np.array([[60.0]])
    np.testing.assert_allclose(residual_flow(jnp.tanh, start, 4.0).nngp, [[q]], rtol=1e-8)
    assert np.isnan(jax.jit(lambda gram: residual_flow(jnp.tanh, gram).nngp)(200 * start)).all()


def test_identity_is_an_exponential():
    flow = residual_flow(jax.nn.identity, GRAM, 0.7, tangent=GRAM)
    np.testing.assert_allclose(flow.nngp, GRAM * math.exp(0.7), rtol=1e-8)
    np.testing.assert_allclose(flow.ntk, GRAM * math.exp(0.7) * (1 + 0.7), rtol=1e-8)
    # (1 + s²/L)^L = e^{s²} (1 - s⁴ / 2L)
    np.testing.assert_allclose(flow.nngp_error, GRAM * math.exp(0.7) * 0.7**2 / 2, rtol=1e-7)


@pytest.mark.parametrize(("phi", "bias"), [(jax.nn.relu, 0.0), (jax.scipy.special.erf, 0.1)])
def test_traced_networks_approach_the_flow(phi, bias):
    found = depth_limit(stream(phi, bias=bias), X, at=64)
    flow = residual_flow(phi, GRAM, 2.0, bias)
    for mine, other, rtol in zip((*found,), (flow.nngp, flow.ntk, flow.nngp_error, flow.ntk_error), (1e-5, 1e-5, 1e-3, 2e-3)):
        np.testing.assert_allclose(mine, other, rtol=rtol)  # what is left out is of order 64^-3 = 4e-6, and 64^-2 for the errors


def test_extrapolation_gains_three_orders():
    exact = math.e * 1.0
    errors = [abs(float(depth_limit(stream(), X[:1], at=at, ntk=False).nngp[0, 0]) - exact) for at in (8, 16, 32)]
    slopes = np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, -3, atol=0.35)  # the next order at depth 8


def test_in_x_there_is_a_gradient():
    slope = jax.grad(lambda x: depth_limit(stream(), x, at=16, ntk=False).nngp[0, 1])(jnp.asarray(X))
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0.1


def test_under_a_trace_without_the_flag_it_is_rounded_at_the_end():
    """What a finite depth lacks is the difference of two kernels times the depth: of single ones it was off by 1e-4."""
    x = X.astype(np.float32)
    wanted = depth_limit(stream(), x.astype(np.float64), at=32, ntk=False)
    with jax.enable_x64(False):
        value = lambda x: depth_limit(stream(), x, at=32, ntk=False)  # noqa: E731
        found = jax.jit(value)(jnp.asarray(x))
        slope = jax.jit(jax.grad(lambda x: value(x).nngp[0, 0]))(jnp.asarray(x))
    for got, exact in ((found.nngp, wanted.nngp), (found.nngp_error, wanted.nngp_error)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, rtol=3e-7)
    # q(1) = e q(0), and q(0) = |x|^2 / 2; the extrapolation is off by 1e-6 at this depth.
    np.testing.assert_allclose(slope[0], math.e * x[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: depth_limit(stream(power=0.0), X, at=16, ntk=False), "Scale the branches by 1 / sqrt"),
        (lambda: depth_limit(stream(power=0.25), X, at=16, ntk=False), "Scale the branches by 1 / sqrt"),
        (lambda: depth_limit(stream(), X, depth="layers"), "no size of the family"),
        (lambda: depth_limit(stream(), X, at=2), "at = 2"),
        (lambda: depth_limit(stream(), X, at=16, per="leaf"), "leaf of one block"),
        (lambda: residual_flow(jax.nn.relu, GRAM[:1]), "gram has shape"),
        (lambda: residual_flow(jax.nn.relu, GRAM, -1.0), "a variance is at least 0"),
        (lambda: residual_flow(jnp.tanh, 1e4 * GRAM[:1, :1]), "tanh are not found to 1e-06 at variance 1000[01].*Scale the inputs"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call()
