"""Breaks of functions, and integrals between them: against closed forms, and of jumps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from paperjax import limits
from paperjax.limits.panels import ORDERS, Pieces, breaks, double_panels, jumps, single
from paperjax.limits.sampled import slope

COVARIANCES = [
    (1.0, 0.3, 1.0),
    (0.5, -0.6, 2.0),
    (1.0, 1.0, 1.0),
    (2.0, -1.0, 0.5),
    (100.0, 99.0, 100.0),
    (1e-4, 1e-3, 1.0),
    (0.0, 0.0, 1.0),
]
RELU = Pieces(jax.nn.relu, (0.0,))


def columns(covariances):
    return tuple(jnp.asarray(column) for column in np.array(covariances).T)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (jax.nn.relu, (0.0,)),
        (jax.nn.relu6, (0.0, 6.0)),
        (jax.nn.hard_swish, (-3.0, 3.0)),
        (jax.nn.elu, (0.0,)),
        (jax.nn.soft_sign, (0.0,)),
        (lambda h: jnp.maximum(h, h * h), (0.0, 1.0)),
        (lambda h: jnp.clip(h, -20, 20.25), (-20.0, 20.25)),
        (lambda h: jnp.maximum(h - 1 / 3, 0) ** 3, (1 / 3,)),
        (jnp.sign, (0.0,)),
        (jnp.tanh, ()),
        (jax.nn.gelu, ()),
        (lambda h: jnp.sin(15 * h), ()),
        (lambda h: jnp.tanh(h.astype(jnp.float32)).astype(h.dtype), ()),
    ],
)
def test_breaks(f, expected):
    np.testing.assert_allclose(breaks(f), expected, atol=1e-12)
    assert len(breaks(f)) == len(expected)


def test_jumps():
    assert jumps(Pieces(jnp.sign, (0.0,))) == (2.0,)
    assert jumps(Pieces(jax.nn.relu6, (0.0, 6.0))) == (0.0, 0.0)
    np.testing.assert_allclose(jumps(Pieces(slope(jax.nn.relu6), (0.0, 6.0))), (1.0, -1.0), atol=1e-11)


@pytest.mark.parametrize("order", ORDERS[2:])
def test_a_relu_has_its_closed_form(order, x64):
    k = columns(COVARIANCES)
    ours = jax.jit(lambda *k: double_panels(RELU, RELU, order, *k))(*k)
    np.testing.assert_allclose(ours, limits.relu.value(*k), rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_gradients_of_a_relu_and_of_its_derivative(x64):
    """Of the derivative they come from the jumps alone."""
    k = columns(COVARIANCES[:2] + COVARIANCES[4:6])
    step = RELU._replace(f=slope(jax.nn.relu))
    for f, closed in ((RELU, limits.relu.value), (step, limits.relu.derivative)):
        ours = jax.jit(jax.grad(lambda *k, f=f: jnp.sum(double_panels(f, f, ORDERS[2], *k)), argnums=(0, 1, 2)))(*k)
        for axis in (0, 1, 2):
            # Divided by a variance of 1e-4.
            np.testing.assert_allclose(ours[axis], jax.vmap(jax.grad(closed, argnums=axis))(*k), rtol=1e-7, atol=1e-10)


def test_one_dimension(x64):
    """``E max(m + s z, 0) = m Phi(m/s) + s phi(m/s)``, and its gradients; the limit s = 0."""
    m, s = np.array([0.7, -1.2, 0.5]), np.array([1.3, 0.4, 0.0])
    ratio = m[:2] / s[:2]
    wanted = m[:2] * scipy.special.ndtr(ratio) + s[:2] * np.exp(-(ratio**2) / 2) / np.sqrt(2 * np.pi)
    ours = single(RELU, ORDERS[2], jnp.asarray(m), jnp.asarray(s**2))
    np.testing.assert_allclose(ours, [*wanted, 0.5], rtol=1e-12)
    gradient = jax.grad(lambda m: jnp.sum(single(RELU, ORDERS[2], m, jnp.asarray(s**2))))(jnp.asarray(m))
    np.testing.assert_allclose(gradient, [*scipy.special.ndtr(ratio), 1.0], rtol=1e-9)
