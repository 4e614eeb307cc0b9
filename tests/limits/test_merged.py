"""Functions of several fields that depend on one sum of them."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits.merged import one_sum

NORMAL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
X = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)


class Post(nn.Module):
    """A residual block as He et al. (arXiv 1512.03385) write it: the activation comes after the sum."""

    width: int
    scale: bool = True
    phi: Any = nn.relu
    rectified: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, kernel_init=NORMAL)(x)
        y = nn.LayerNorm(use_scale=self.scale)(nn.Dense(self.width, kernel_init=NORMAL)(h))
        return nn.Dense(1, kernel_init=NORMAL)(self.phi((nn.relu(h) if self.rectified else h) + y))


def limit(x: Any = X, options: Any = None, **block: Any) -> pj.limits.Limit:
    family = functools.partial(Post, **block)
    return pj.limit(lambda width: family(width), x, parametrization=pj.ntp, base=dict(width=64), progress=False, **(options or {}))


@pytest.mark.parametrize(
    ("fn", "weights"),
    [
        (lambda u, v: jax.nn.relu(u + v), [1.0, 1.0]),
        (lambda u, v: jnp.sin(0.25 * u - v), [-0.25, 1.0]),
        (lambda u, v, w: jnp.where(u + 2 * w > 0.5, 1.0, 0.0 * v) * (u + 2 * w), [0.5, 0.0, 1.0]),
        (lambda u, v: v * (u + v > 0), None),
        (lambda u, v: jax.nn.relu(u) + v, None),
        (lambda u, v: jnp.abs(u + v) + 1e-6 * v**2, None),
    ],
)
def test_what_is_a_function_of_one_sum(fn: Any, weights: list[float] | None) -> None:
    found = one_sum(fn, 3 if weights and len(weights) == 3 else 2)
    assert (found is None) == (weights is None)
    if weights is not None and found is not None:
        np.testing.assert_allclose(found, weights, rtol=1e-12, atol=1e-15)


def test_a_learned_scale_at_its_start_is_none() -> None:
    with_scale, without = (limit(scale=scale, options=dict(per="leaf")) for scale in (True, False))
    np.testing.assert_allclose(with_scale.nngp, without.nngp, rtol=1e-10, atol=1e-14)
    for path, part in without.ntk.items():
        np.testing.assert_allclose(with_scale.ntk[path], part, rtol=1e-10, atol=1e-14, err_msg=path)


def covariances(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of h, and of y behind its norm, which has epsilon 1e-6; both layers have weights of variance 2 / fan_in."""
    h = 2 / 5 * x @ x.T
    size = np.sqrt(2 * np.diag(h) + 1e-6)
    return h, 2 * h / np.outer(size, size)


def of_a_scale(slope: Any) -> float:
    """``2 E y y' f(a) f(a')``, a = h + y, by Gauss-Legendre sums over the four quadrants of (a, a') of what y and y' are given those."""
    h, r = covariances(X.astype(np.float64))
    total = h + r
    onto = r @ np.linalg.inv(total)
    left = (r - onto @ r)[0, 1]
    nodes, weights = np.polynomial.legendre.leggauss(400)
    found = 0.0
    for signs in itertools.product((-1, 1), repeat=2):
        a, b = (4.5 * sign * np.sqrt(total[i, i]) * (1 + nodes) for i, sign in enumerate(signs))
        w = 4.5**2 * np.sqrt(total[0, 0] * total[1, 1]) * np.outer(weights, weights)
        z = np.stack(np.meshgrid(a, b, indexing="ij"))
        density = np.exp(-np.einsum("i...,ij,j...->...", z, np.linalg.inv(total), z) / 2) / (2 * np.pi * np.sqrt(np.linalg.det(total)))
        y = np.einsum("ij,j...->i...", onto, z)
        found += float(np.sum(w * density * slope(z[0]) * slope(z[1]) * (y[0] * y[1] + left)))
    return 2 * found


def sigmoid(h: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-h))


SCALED = {
    "relu": (nn.relu, lambda a: (a > 0) * 1.0),
    "leaky relu": (functools.partial(nn.leaky_relu, negative_slope=0.1), lambda a: np.where(a > 0, 1.0, 0.1)),
    "abs": (jnp.abs, np.sign),
    "tanh": (jnp.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "silu": (nn.silu, lambda a: sigmoid(a) * (1 + a * (1 - sigmoid(a)))),
    "elu": (nn.elu, lambda a: np.where(a > 0, 1.0, np.exp(np.minimum(a, 0.0)))),
}
SCALE = "['LayerNorm_0']['scale']"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("tanh", "silu", "elu"))) for name in SCALED])
def test_the_tangent_kernel_of_a_learned_scale(name: str) -> None:
    phi, slope = SCALED[name]
    found = limit(phi=phi, options=dict(per="leaf")).ntk[SCALE]
    # The sums are off by 1e-13; a tanh's and a silu's limit has a bound of 1e-10.
    np.testing.assert_allclose(found[0, 1], of_a_scale(slope), rtol=1e-9)
    np.testing.assert_array_equal(found, found.T)


def test_examples_that_coincide() -> None:
    x = np.stack([X[0], X[1], X[0], X[0] * (1 + 1e-9), X[0] + 1e-5 * X[1], -X[0]]).astype(np.float64)
    found = np.asarray(limit(x, options=dict(per="leaf")).ntk[SCALE])
    assert np.isfinite(found).all()
    # Half of E y² = 1, twice; of what is opposite nothing: (a > 0)(-a > 0).
    np.testing.assert_allclose(found[0, [0, 2, 3]], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found[0, 4], 1.0, rtol=1e-4)
    np.testing.assert_allclose(found[0, 5], 0.0, atol=1e-7)
    assert np.linalg.eigvalsh(found).min() > -1e-7


class Twice(nn.Module):
    """A post-norm block whose stream left a norm with a learned gain, too."""

    width: int
    learned: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = functools.partial(nn.LayerNorm, use_scale=self.learned, use_bias=self.learned)
        h = norm()(nn.Dense(self.width, kernel_init=NORMAL)(x))
        h = norm()(h + nn.Dense(self.width, kernel_init=NORMAL)(nn.relu(h)))
        return nn.Dense(1, kernel_init=NORMAL)(nn.relu(h))


def test_a_norm_behind_a_norm() -> None:
    options = dict(parametrization=pj.ntp, base=dict(width=64), per="leaf", progress=False)
    learned, plain = (pj.limit(lambda width, on=on: Twice(width, on), X, **options) for on in (True, False))
    np.testing.assert_allclose(learned.nngp, plain.nngp, rtol=1e-10, atol=1e-14)
    for path, part in plain.ntk.items():
        np.testing.assert_allclose(learned.ntk[path], part, rtol=1e-10, atol=1e-14, err_msg=path)
    # At an example with itself, half of E (h + y)^2 = 1 of each readout's square, twice, and of a shift half of 1, twice.
    gain, shift = (np.asarray(learned.ntk[f"['LayerNorm_1']['{leaf}']"]) for leaf in ("scale", "bias"))
    np.testing.assert_allclose([np.diag(gain), np.diag(shift)], 1.0, rtol=1e-5)
    # The first norm's reach the output through the stream, a half of the variance, and through the block.
    assert np.diag(learned.ntk["['LayerNorm_0']['scale']"]).min() > 1 / 2


class Scaled(nn.Module):
    """Residual blocks times learned vectors that start at 0 (ReZero, channel by channel), with a bias inside."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, kernel_init=NORMAL, use_bias=False)(x)
        for i in range(2):
            gain = self.param(f"gain_{i}", nn.initializers.zeros, (1, self.width))
            h = h + gain * nn.Dense(self.width, kernel_init=NORMAL)(nn.relu(h))
        return nn.Dense(1, kernel_init=NORMAL)(nn.relu(h))


def test_branches_that_start_at_nothing() -> None:
    found = pj.limit(lambda width: Scaled(width), X, parametrization=pj.ntp, base=dict(width=64), per="leaf", progress=False)
    h = covariances(X.astype(np.float64))[0]
    size = np.sqrt(np.outer(np.diag(h), np.diag(h)))
    angle = np.arccos(np.clip(h / size, -1, 1))
    # 2 E relu relu' and 2 E relu' relu'', of h at both examples (Cho and Saul, arXiv 1112.3712).
    y, slopes = size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi, (np.pi - angle) / np.pi
    np.testing.assert_allclose(found.nngp, y, rtol=1e-9)
    for i in range(2):
        np.testing.assert_allclose(found.ntk[f"['gain_{i}']"], y * slopes, rtol=1e-9)
        np.testing.assert_array_equal(found.ntk[f"['Dense_{1 + i}']['bias']"], 0.0)


def test_kinks_of_several_fields_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"(?s)4 fields at once of a function with kinks.*relu\(relu\(u\) \+ v\).*samples="):
        limit(rectified=True, options=dict(ntk=False))


@pytest.mark.slow
def test_they_are_drawn_if_that_is_asked_for() -> None:
    drawn = limit(rectified=True, options=dict(key=jax.random.key(0), samples=4096, ntk=False))
    rng = np.random.default_rng(1)
    h, y = (np.linalg.cholesky(k) @ rng.normal(size=(2, 1_000_000)) for k in covariances(X.astype(np.float64)))
    a = np.maximum(np.maximum(h, 0) + y, 0)
    wanted = 2 * np.einsum("is,js->ij", a, a) / a.shape[1]
    # Five standard errors; those of a million draws are a fifteenth of those of 4,096.
    assert (np.abs(drawn.nngp - wanted) <= 5 * np.asarray(drawn.error[0])).all()
