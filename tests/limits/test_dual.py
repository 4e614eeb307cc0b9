"""Laws of the duals: against quadrature by another route, Price's theorem, definiteness, scaling; and what is refused."""

import functools
import math
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from paperjax import limits
from paperjax.limits import dual
from tests.limits.gaussian import expectation

ROOT_PI = math.sqrt(math.pi)


def bell(h):
    return np.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)


# Dual, phi, phi' in numpy.
CLOSED = {
    "identity": (limits.identity, lambda h: h, np.ones_like),
    "relu": (limits.relu, lambda h: np.maximum(h, 0), lambda h: 1.0 * (h > 0)),
    "leaky relu": (limits.leaky_relu(0.2), lambda h: np.where(h > 0, h, 0.2 * h), lambda h: np.where(h > 0, 1, 0.2)),
    "piecewise linear": (limits.piecewise_linear(2.0, 3.0), lambda h: np.where(h > 0, 2, 3) * h, lambda h: np.where(h > 0, 2.0, 3.0)),
    "absolute": (limits.absolute, np.abs, np.sign),
    "sign": (limits.sign, np.sign, np.zeros_like),
    "step": (limits.step, lambda h: np.heaviside(h, 0.5), np.zeros_like),
    "erf": (limits.erf, scipy.special.erf, lambda h: 2 / ROOT_PI * np.exp(-(h**2))),
    "gelu": (limits.gelu, lambda h: h * scipy.special.ndtr(h), lambda h: scipy.special.ndtr(h) + h * bell(h)),
    "sin": (limits.sin, np.sin, np.cos),
    "cos": (limits.cos, np.cos, lambda h: -np.sin(h)),
    "exp": (limits.exp, np.exp, np.exp),
    "constant": (limits.polynomial([2.0]), lambda h: 2 + 0 * h, np.zeros_like),
    "cubic": (limits.monomial(3), lambda h: h**3, lambda h: 3 * h**2),
    "quartic": (limits.polynomial([1.0, -2.0, 0.5, 0.0, 0.25]), lambda h: 1 - 2 * h + h**2 / 2 + h**4 / 4, lambda h: -2 + h + h**3),
}
C = math.sqrt(2 / math.pi), 0.044715


def tanh_gelu_slope(h):
    t = np.tanh(C[0] * (h + C[1] * h**3))
    return (1 + t) / 2 + h / 2 * (1 - t * t) * C[0] * (1 + 3 * C[1] * h**2)


expit = scipy.special.expit
WITHOUT_CLOSED_FORM = {
    "tanh": (jnp.tanh, np.tanh, lambda h: 4 * expit(2 * h) * expit(-2 * h)),
    "sigmoid": (jax.nn.sigmoid, expit, lambda h: expit(h) * expit(-h)),
    "softplus": (jax.nn.softplus, lambda h: np.logaddexp(h, 0), expit),
    "silu": (jax.nn.silu, lambda h: h * expit(h), lambda h: expit(h) * (1 + h * expit(-h))),
    "tanh gelu": (jax.nn.gelu, lambda h: h / 2 * (1 + np.tanh(C[0] * (h + C[1] * h**3))), tanh_gelu_slope),
}
SMOOTH = {
    "tanh": (jnp.tanh, np.tanh, lambda h: 1 / np.cosh(h) ** 2),
    "softplus": (jax.nn.softplus, lambda h: np.logaddexp(h, 0), scipy.special.expit),
}
# Roots of the singular ones are exact, or the correlation would be off by rounding and the arcsine by its root.
COVARIANCES = [(1.0, 0.3, 1.0), (0.5, -0.6, 2.0), (2.0, 0.0, 0.1), (2.25, 2.25, 2.25), (0.25, -0.25, 0.25), (0.04, 0.05, 1.0)]
SINGULAR = [(1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (2.0, 1.0, 0.5), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1 - 1e-16, 1.0)]
REGULAR = COVARIANCES[:3]
JUMPS = ("sign", "step")
STEP = 1e-5
LENGTH = 104


class Seen(NamedTuple):
    """A dual and its gradients at a list of covariances."""

    value: np.ndarray
    derivative: np.ndarray
    d_value: np.ndarray
    d_derivative: np.ndarray


@functools.cache
def found(name):
    return limits.quadrature(SMOOTH[name][0], points=96, tolerance=1e-7) if name in SMOOTH else CLOSED[name][0]


@functools.cache
def compiled(name):
    d = found(name)
    grads = (jax.vmap(jax.grad(f, argnums=(0, 1, 2))) for f in (d.value, d.derivative))
    d_value, d_derivative = grads
    return jax.jit(lambda *k: Seen(d.value(*k), d.derivative(*k), jnp.stack(d_value(*k), -1), jnp.stack(d_derivative(*k), -1)))


def see(name, covariances):
    """All from one compiled program for each dual, so of one length."""
    filled = np.array([*covariances, *[(1.0, 0.5, 1.0)] * (LENGTH - len(covariances))])
    with jax.enable_x64(True):
        return Seen(*(np.asarray(part)[: len(covariances)] for part in compiled(name)(*jnp.asarray(filled).T)))


@pytest.fixture(params=[*CLOSED, "tanh", pytest.param("softplus", marks=pytest.mark.slow)])
def name(request, x64):
    return request.param


def test_against_quadrature_in_polar_coordinates(name):
    _, phi, slope = {**CLOSED, **SMOOTH}[name]
    seen = see(name, COVARIANCES)
    np.testing.assert_allclose(seen.value, [expectation(phi, phi, *k) for k in COVARIANCES], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(seen.derivative, [expectation(slope, slope, *k) for k in COVARIANCES], rtol=1e-9, atol=1e-11)


def test_the_derivative_is_that_of_the_value_in_k12(name):
    """Price's theorem, by autodiff; at correlation ±1 too, where both have a finite limit. Jumps have delta functions for derivatives."""
    if name in JUMPS:
        wanted = [{"sign": 4.0, "step": 1.0}[name] / (2 * np.pi * np.sqrt(k11 * k22 - k12**2)) for k11, k12, k22 in REGULAR]
        np.testing.assert_allclose(see(name, REGULAR).d_value[:, 1], wanted, rtol=1e-9)
    else:
        seen = see(name, COVARIANCES)
        np.testing.assert_allclose(seen.d_value[:, 1], seen.derivative, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences(name):
    there = see(name, REGULAR)
    for axis in (0, 1, 2):
        up, down = (see(name, np.array(REGULAR) + sign * STEP * np.eye(3)[axis]) for sign in (1, -1))
        np.testing.assert_allclose(there.d_value[:, axis], (up.value - down.value) / (2 * STEP), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(there.d_derivative[:, axis], (up.derivative - down.derivative) / (2 * STEP), rtol=1e-5, atol=1e-8)


def test_finite_where_the_covariance_is_singular(name):
    for part in see(name, SINGULAR):
        assert np.all(np.isfinite(part))


def test_zero_variance_is_the_value_at_zero(name):
    phi = {**CLOSED, **SMOOTH}[name][1]
    at_0 = phi(np.zeros(1))[0]
    seen = see(name, [(0.0, 0.0, 0.0), (0.0, 0.0, 1.3), (1.3, 0.0, 0.0)]).value
    mean = expectation(phi, np.ones_like, 1.3, 0.0, 1.0)
    np.testing.assert_allclose(seen, [at_0**2, at_0 * mean, at_0 * mean], atol=1e-12)


@pytest.mark.parametrize("closed", CLOSED)
@hypothesis.given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 1.5))
def test_gram_matrices_are_positive_semidefinite_and_symmetric(closed, seed, scale):
    x = scale * np.random.default_rng(seed).standard_normal((6, 2))
    x = np.concatenate([x, x[:2], -x[:1], 0 * x[:1]])
    k = x @ x.T
    q = k.diagonal()
    table = [(q[i], k[i, j], q[j]) for i in range(10) for j in range(10)]
    seen = see(closed, table)
    for part in (seen.value, seen.derivative):
        K = part.reshape(10, 10)
        np.testing.assert_allclose(K, K.T, rtol=1e-12, atol=1e-14)
        # Of equal rows the correlation is 1 up to rounding, and the arcsine off by the root of that.
        assert np.linalg.eigvalsh(K).min() > -1e-7 * max(np.trace(K), 1.0)


@pytest.mark.parametrize(
    ("name", "degree"), [("relu", 1), ("leaky relu", 1), ("absolute", 1), ("identity", 1), ("cubic", 3), ("sign", 0), ("step", 0)]
)
def test_homogeneous_functions_scale(name, degree):
    """phi(a h) = a^p phi(h), so the value scales as (a b)^p and the derivative as (a b)^(p - 1)."""
    a, b = 1.7, 0.3
    plain, scaled = see(name, COVARIANCES), see(name, [(a * a * k11, a * b * k12, b * b * k22) for k11, k12, k22 in COVARIANCES])
    np.testing.assert_allclose(scaled.value, (a * b) ** degree * plain.value, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(scaled.derivative, (a * b) ** (degree - 1) * plain.derivative, rtol=1e-7, atol=1e-7)


def test_relu_is_the_arc_cosine_kernel(x64):
    """kappa_1 and kappa_0 as the NTK recursion has them, for a ReLU that keeps the second moment."""
    c = np.linspace(-1, 1, 41)
    d = limits.piecewise_linear(2**0.5, 0.0)
    ones = jnp.ones(41)
    np.testing.assert_allclose(d.value(ones, c, ones), (np.sqrt(1 - c**2) + c * (np.pi - np.arccos(c))) / np.pi, atol=1e-12)
    np.testing.assert_allclose(d.derivative(ones, c, ones), 1 - np.arccos(c) / np.pi, atol=1e-12)


@pytest.mark.parametrize("k", [1e-6, 0.3, 1.0, 7.0, 1e6])
def test_float32_is_exact_on_the_diagonal(k):
    d, k = limits.relu, jnp.float32(k)
    np.testing.assert_allclose(d.value(k, k, k), k / 2, rtol=3e-7)
    assert d.derivative(k, k, k) == 0.5
    assert d.derivative(k, -k, k) == 0.0


@pytest.mark.parametrize("k", [1e-6, 0.3, 1.0, 100.0])
def test_erf_on_the_diagonal_in_float32(k):
    np.testing.assert_allclose(limits.erf.value(*[jnp.float32(k)] * 3), 2 / np.pi * np.arcsin(2 * k / (1 + 2 * k)), rtol=1e-6)


def test_large_variances_do_not_overflow_to_nan():
    large = jnp.float32(1e12)
    for name in ("relu", "erf", "gelu", "sin", "cos"):
        for k12 in (large, -large, 0 * large):
            assert np.isfinite(found(name).value(large, k12, large)), name
            assert np.isfinite(found(name).derivative(large, k12, large)), name


@pytest.mark.parametrize(
    ("phi", "expected"),
    [
        (jax.nn.relu, limits.relu),
        (jax.nn.identity, limits.identity),
        (jnp.abs, limits.absolute),
        (jnp.sign, limits.sign),
        (jax.scipy.special.erf, limits.erf),
        (jax.lax.erf, limits.erf),
        (jnp.sin, limits.sin),
        (jnp.cos, limits.cos),
        (jnp.exp, limits.exp),
        (functools.partial(jax.nn.gelu, approximate=False), limits.gelu),
        (limits.step, limits.step),
    ],
)
def test_known_functions_have_their_closed_form(phi, expected):
    assert dual(phi) is expected


@pytest.mark.parametrize(("phi", "slope"), [(jax.nn.leaky_relu, 0.01), (functools.partial(jax.nn.leaky_relu, negative_slope=0.3), 0.3)])
def test_leaky_relu_with_its_slope(phi, slope):
    np.testing.assert_allclose(dual(phi).value(1.0, 1.0, 1.0), (1 + slope**2) / 2, rtol=1e-6)
    assert phi(jnp.array(-1.0)) == -jnp.float32(slope)


def test_square_is_the_second_monomial():
    np.testing.assert_allclose(dual(jnp.square).value(1.0, 0.5, 1.0), 1 + 2 * 0.5**2)


def test_slopes_and_coefficients_may_be_traced():
    gradient = jax.jit(jax.grad(lambda slope: limits.leaky_relu(slope).value(1.0, 1.0, 1.0)))(0.4)
    np.testing.assert_allclose(gradient, 0.4, rtol=1e-6)  # (1 + s²)/2
    np.testing.assert_allclose(jax.grad(lambda c: limits.polynomial(c).value(1.0, 1.0, 1.0))(jnp.array([1.0, 2.0])), [2.0, 4.0])


def test_quadrature_finds_closed_forms(x64):
    d = limits.quadrature(lambda h: jax.nn.gelu(h, approximate=False), points=64)
    seen = see("gelu", COVARIANCES)
    k = tuple(jnp.asarray(column) for column in zip(*COVARIANCES))
    np.testing.assert_allclose(d.value(*k), seen.value, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(d.derivative(*k), seen.derivative, rtol=1e-10, atol=1e-13)


def test_the_error_is_above_the_error(x64):
    """tanh where 20 points are not enough, against the truth from two hundred times as many on one axis: above it, and not far."""
    z = np.linspace(-12, 12, 4001)
    d = limits.quadrature(jnp.tanh, points=20, tolerance=1.0)
    for k in (1.0, 4.0):
        truth = np.sum(np.tanh(k**0.5 * z) ** 2 * bell(z)) * (z[1] - z[0])
        slope = np.sum(np.cosh(k**0.5 * z) ** -4.0 * bell(z)) * (z[1] - z[0])
        off = max(abs(d.value(k, k, k) - truth), abs(d.derivative(k, k, k) - slope))
        assert off > 1e-5
        assert 1 <= d.error(k, k, k) / off < 3
    assert found("tanh").error(1.0, 0.3, 1.0) < 1e-12
    assert limits.relu.error(jnp.ones((2, 1)), jnp.zeros((2, 3)), jnp.ones((1, 3))).tolist() == [[0.0] * 3] * 2


LARGE = [(100.0, 100 * r, 100.0) for r in (0.0, 0.5, -0.5, 0.999999, 1.0, -1.0)]
LARGE += [(60.0, 60.0, 60.0), (20.0, 10.0, 20.0), (100.0, 0.2, 0.01), (33.0, -20.0, 60.0), (1e-3, 5e-4, 1e-3), (1.0, 0.3, 100.0)]


def panel_by_panel(f, g, k11, k12, k22):
    """``E f(u) g(v)`` by 20 Gauss–Legendre nodes on each of 120 panels of either standard variable."""
    x, w = scipy.special.roots_legendre(20)
    ends = np.linspace(-11, 11, 121)
    z = ((ends[1:] + ends[:-1])[:, None] / 2 + (ends[1] - ends[0]) / 2 * x).ravel()
    w = np.tile(w, 120) * (ends[1] - ends[0]) / 2 * bell(z)
    rho = np.clip(k12 / (k11 * k22) ** 0.5, -1, 1)
    v = k22**0.5 * (rho * z[:, None] + ((1 - rho) * (1 + rho)) ** 0.5 * z)
    return float(w @ (f(k11**0.5 * z) * (g(v) @ w)))


@pytest.mark.parametrize("name", ["tanh", *(pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT_CLOSED_FORM if name != "tanh")])
def test_large_variances(name, x64):
    """1e-10 up to variance 100, of numbers and of traced ones, and the reported error says as much."""
    phi, f, slope = WITHOUT_CLOSED_FORM[name]
    d, k = dual(phi), tuple(jnp.asarray(column) for column in np.array(LARGE).T)
    value, derivative, error = jax.jit(lambda *k: (d.value(*k), d.derivative(*k), d.error(*k)))(*k)
    np.testing.assert_allclose(value, [panel_by_panel(f, f, *at) for at in LARGE], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(derivative, [panel_by_panel(slope, slope, *at) for at in LARGE], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(d.value(*k), value, rtol=1e-13)
    assert np.all(error <= 1e-10 * np.maximum(1, k[0] * k[2]) ** 0.5)


def test_beyond_what_is_known_the_error_is_infinite(x64):
    """Variances that the grid does not grow for; and functions that grow until their weight is beyond the grid, as sinh at 100."""
    assert found("tanh").error(1000.0, 100.0, 1000.0) < 1e-10
    assert found("tanh").error(1e4, 100.0, 1.0) == np.inf
    sinh = limits.quadrature(jnp.sinh)
    assert sinh.error(1.0, 0.5, 1.0) < 1e-10
    assert sinh.error(100.0, 50.0, 100.0) == np.inf


def test_tanh_gelu_is_not_the_exact_one():
    tanh, exact = dual(jax.nn.gelu), limits.gelu
    difference = abs(float(tanh.value(1.0, 1.0, 1.0) - exact.value(1.0, 1.0, 1.0)))
    assert 1e-6 < difference < 1e-3


def test_broadcasts_under_jit_and_keeps_the_dtype():
    q, k, p = jnp.ones((3, 1)), jnp.zeros((3, 2)), jnp.ones((1, 2))
    assert limits.relu.value(q, k, p).shape == found("tanh").value(q, k, p).shape == (3, 2)
    assert limits.relu.value(1, 0, 1).dtype == jnp.float32
    with jax.enable_x64(True):
        assert limits.gelu.value(jnp.float32(1), 0.5, 1).dtype == jnp.float32
        assert limits.gelu.value(1, 0.5, 1).dtype == jnp.float64


@pytest.mark.parametrize(
    ("phi", "error", "message"),
    [
        (jnp.log, ValueError, "log or its derivative is not finite"),
        (jax.nn.softmax, ValueError, "softmax does not act entry by entry"),
        (jnp.sum, ValueError, "entry by entry"),
        (lambda h: h > 0, TypeError, "not a floating-point array"),
        ("relu", TypeError, "relu"),
    ],
)
def test_functions_that_are_refused(phi, error, message):
    # beartype refuses what is no function before dual does.
    with pytest.raises(Exception, match=rf"(?s){message}") as found:
        dual(phi)
    assert isinstance(found.value, error) or phi == "relu"


@pytest.mark.parametrize(
    ("phi", "slope"),
    [
        (lambda h: jnp.where(h > 0, h, 0.1 * h), 0.1),
        (lambda h: jnp.maximum(h, 0.3 * h), 0.3),
        (lambda h: jax.nn.leaky_relu(h, 0.2), 0.2),
    ],
)
def test_another_spelling_has_the_closed_form(phi, slope, x64):
    for k in ((1.0, 0.3, 1.0), (0.7, -0.5, 2.0), (1.0, -1.0, 1.0)):
        for name in ("value", "derivative", "error"):
            found, exact = (getattr(d, name)(*k) for d in (dual(phi), limits.leaky_relu(slope)))
            np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phi", "f"), [(jax.nn.relu6, lambda h: np.clip(h, 0, 6)), (lambda h: jnp.tanh(2 * h), lambda h: np.tanh(2 * h))], ids=["relu6", "tanh"]
)
def test_where_a_grid_does_not_do_panels_or_a_series_do(phi, f, x64):
    """Kinks and a sharp bend, which the check of `quadrature` refuses; against Gauss–Legendre panels, whose kinks cost them 1e-6."""
    with pytest.raises(ValueError, match=r"pair.phi"):
        limits.quadrature(phi)
    np.testing.assert_allclose(dual(phi).value(0.7, -0.5, 2.0), panel_by_panel(f, f, 0.7, -0.5, 2.0), atol=2e-6)


def test_a_traced_value_inside_phi_is_refused():
    with pytest.raises(TypeError, match=r"closes over a traced value.*leaky_relu"):
        jax.jit(lambda a: dual(lambda h: jnp.tanh(a * h)).value(1.0, 1.0, 1.0))(2.0)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        ((-1.0, 0.0, 1.0), ValueError, r"k11 has an entry -1.*variance"),
        ((1.0, 0.0, -1e-3), ValueError, "k22"),
        ((1.0, 2.0, 1.0), ValueError, r"\|k12\| exceeds"),
        ((1.0, float("nan"), 1.0), ValueError, "k12 holds a NaN"),
        ((1.0, 0.5j, 1.0), TypeError, "complex|k12"),
    ],
)
def test_covariances_that_are_refused(k, error, message):
    with pytest.raises(Exception, match=message):
        limits.relu.value(*k)


def test_empty_polynomials_and_negative_degrees_are_refused():
    with pytest.raises(ValueError, match="no coefficients"):
        limits.polynomial([])
    with pytest.raises(ValueError, match="degree = -1"):
        limits.monomial(-1)
    with pytest.raises(ValueError, match="points = 2"):
        limits.quadrature(jnp.tanh, points=2)


@pytest.mark.parametrize("dual", [limits.identity, limits.polynomial([1.0, 0.5]), limits.monomial(3), limits.relu, limits.gelu, limits.exp])
def test_covariances_broadcast(dual):
    for of in (dual.value, dual.derivative):
        assert of(jnp.ones((3, 1)), jnp.asarray(0.5), jnp.ones((1, 4))).shape == (3, 4)
