"""Three and four fields: against moments in closed form, pairs, and Monte Carlo; Price's theorem; what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax import limits
from paperjax.limits import expect, isserlis, pair
from tests.limits.gaussian import adaptive

rng = np.random.default_rng(0)
A = rng.standard_normal((3, 3)) / 2
COV = A @ A.T
B = rng.standard_normal((4, 4)) / 2
COV_4 = B @ B.T
SINGULAR = np.array([[1.0, 1.0, -0.5], [1.0, 1.0, -0.5], [-0.5, -0.5, 0.25]])
STEP = 1e-5


def test_two_fields_are_a_pair(x64):
    cov = np.array([[[1.0, 0.3], [0.3, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [[0.0, 0.0], [0.0, 1.0]]])
    ours = expect(lambda u, v: jnp.tanh(u) * jax.nn.silu(v), cov)
    k = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
    np.testing.assert_allclose(ours.value, pair(jnp.tanh, jax.nn.silu).value(*(jnp.asarray(a) for a in k)), atol=1e-10)
    assert np.max(ours.error) < 1e-9


@pytest.mark.parametrize(
    ("cov", "f"),
    [(COV, lambda u, v, w: u * u * v * w), (SINGULAR, lambda u, v, w: u * u * v * w), (COV_4, lambda u, v, w, t: u * v * w * t)],
)
def test_moments_are_those_of_isserlis(cov, f, x64):
    rows = [0, 0, 1, 2] if len(cov) == 3 else range(4)
    np.testing.assert_allclose(expect(f, cov).value, isserlis(cov[np.ix_(rows, rows)]), rtol=1e-9, atol=1e-12)


def test_a_product_with_a_line_is_steins_lemma(x64):
    """``E tanh(u) tanh(v) w = C_uw E tanh'(u) tanh(v) + C_vw E tanh(u) tanh'(v)``."""
    cov = COV / 2
    slope = lambda h: 1 - np.tanh(h) ** 2  # noqa: E731
    k = cov[0, 0], cov[0, 1], cov[1, 1]
    # Both are zero by parity; with tanh², not.
    square = lambda h: np.tanh(h) ** 2  # noqa: E731
    wanted = cov[0, 2] * adaptive(lambda h: 2 * np.tanh(h) * slope(h), np.tanh, *k) + cov[1, 2] * adaptive(square, slope, *k)
    ours = expect(lambda u, v, w: jnp.tanh(u) ** 2 * jnp.tanh(v) * w, cov)
    np.testing.assert_allclose(ours.value, wanted, atol=2e-9)


@pytest.mark.parametrize("cov", [COV, SINGULAR])
def test_price(cov, x64):
    """Gradients against differences along which the covariance stays one; finite where it is singular."""
    f = lambda u, v, w: jnp.sin(u + v) * jnp.cos(w) * u  # noqa: E731
    gradient = jax.grad(lambda c: expect(f, c, points=48).value)(jnp.asarray(cov))
    assert np.all(np.isfinite(gradient))
    change = np.ones((3, 3)) + np.diag([1.0, 2.0, 3.0])
    ahead = [expect(f, cov + s * STEP * change, points=48).value for s in (0, 1, 2)]
    # One-sided, since on the other there is no covariance.
    slope = (-3 * ahead[0] + 4 * ahead[1] - ahead[2]) / (2 * STEP)
    np.testing.assert_allclose(np.sum(gradient * change), slope, rtol=1e-6, atol=1e-8)


def test_under_a_trace_and_in_float32():
    f = lambda u, v, w: jnp.sin(u) * jnp.sin(v) * jnp.cos(w)  # noqa: E731
    # E sin u sin v cos w = -Re sum over signs of exp(-Var(±u ± v ± w)/2) / 4.
    signs = [(1.0, s, t) for s, t in itertools.product((1.0, -1.0), repeat=2)]
    wanted = sum(-s * np.exp(-np.array([1, s, t]) @ COV @ np.array([1, s, t]) / 2) for _, s, t in signs) / 4
    cov = jnp.asarray(COV, jnp.float32)
    ours = expect(f, cov)
    assert ours.value.dtype == jnp.float32
    np.testing.assert_allclose(ours.value, wanted, atol=1e-5)
    traced = jax.jit(lambda c: expect(f, c))(jnp.stack([cov, cov]))
    np.testing.assert_allclose(traced.value, [wanted] * 2, atol=1e-5)


def test_monte_carlo_of_what_has_kinks(x64):
    """Three ReLUs of independent unit fields: (2 pi)^-3/2; gradients by first derivatives."""
    f = lambda u, v, w: jax.nn.relu(u) * jax.nn.relu(v) * jax.nn.relu(w)  # noqa: E731
    with pytest.raises(ValueError, match="opt in to Monte Carlo"):
        expect(f, COV)
    eye = jnp.eye(3)
    ours = expect(f, eye, key=jax.random.key(0), samples=40_000)
    assert abs(ours.value - (2 * np.pi) ** -1.5) < 4 * ours.error < 0.02
    gradient = jax.grad(lambda c: expect(f, c, key=jax.random.key(1), samples=40_000).value)(eye)
    # d/dC_12 with both entries: E step step relu = 1/4 · 1/sqrt(2 pi), half on each; d/dC_11 = value / 2.
    np.testing.assert_allclose(gradient[0, 1] + gradient[1, 0], 0.25 / np.sqrt(2 * np.pi), rtol=0.1)
    np.testing.assert_allclose(gradient[0, 0], (2 * np.pi) ** -1.5 / 2, rtol=0.15)
    singular = jax.grad(lambda c: expect(f, c, key=jax.random.key(1), samples=100).value)(jnp.asarray(SINGULAR))
    assert np.all(np.isfinite(singular))


def test_the_standard_error_is_that_of_the_draws(x64):
    f = lambda u, v, w: jnp.tanh(u + v) * w  # noqa: E731
    draws = [expect(f, COV, key=jax.random.key(seed), samples=200) for seed in range(100)]
    spread = np.std([d.value for d in draws])
    # Of 100 draws a standard deviation is off by 7 %.
    np.testing.assert_allclose(np.mean([d.error for d in draws]), spread, rtol=0.25)


@pytest.mark.parametrize(("k", "wanted"), [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0), (8, 105.0)])
def test_isserlis_of_one_field(k, wanted):
    assert isserlis(jnp.ones((2, k, k))).tolist() == [wanted, wanted]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: expect(jnp.sin, jnp.ones(3)), "cov"),
        (lambda: expect(lambda u, v: u * v, jnp.array([[1.0, 0.5], [0.2, 1.0]])), "off symmetry by 0.3"),
        (lambda: expect(lambda u, v: u * v, jnp.array([[1.0, 2.0], [2.0, 1.0]])), "eigenvalue of -1"),
        (lambda: expect(lambda u, v: u * v, jnp.full((2, 2), jnp.nan)), "NaN"),
        (lambda: expect(lambda *z: z[0], jnp.eye(5)), "5 fields are too many"),
        (lambda: expect(lambda u: u, jnp.eye(1), key=jax.random.key(0)), "both key= and samples="),
        (lambda: expect(lambda u: u, jnp.eye(1), key=jax.random.key(0), samples=1), "at least 2"),
        (lambda: expect(lambda u: u, jnp.eye(1), points=2), "points = 2"),
        (lambda: isserlis(jnp.ones((12, 12))), "pairings"),
    ],
)
def test_what_is_refused(act, message):
    with pytest.raises(Exception, match=message):
        act()


def test_it_is_public():
    assert limits.expect is expect
