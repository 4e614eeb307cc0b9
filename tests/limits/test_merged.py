"""Functions of several fields that depend on one sum of them."""

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
    scale: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(self.width, kernel_init=NORMAL)(x)
        y = nn.Dense(self.width, kernel_init=NORMAL)(h)
        return nn.Dense(1, kernel_init=NORMAL)(nn.relu(h + nn.LayerNorm(use_scale=self.scale)(y)))


def limit(scale: bool, **options: Any) -> pj.limits.Limit:
    return pj.limit(lambda width: Post(width, scale), X, parametrization=pj.ntp, base=dict(width=64), progress=False, **options)


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
    np.testing.assert_allclose(limit(True, ntk=False).nngp, limit(False, ntk=False).nngp, rtol=1e-10, atol=1e-14)


def test_kinks_of_several_fields_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"(?s)4 fields at once of a function with kinks.*use_scale=False.*samples="):
        limit(True)


@pytest.mark.slow
def test_they_are_drawn_if_that_is_asked_for() -> None:
    """The whole by Monte Carlo, within five of its standard errors of what has no learned scale, which only adds a part of its own."""
    drawn, exact = (limit(scale, per="leaf", **draws) for scale, draws in ((True, dict(key=jax.random.key(0), samples=4096)), (False, {})))
    for path, part in exact.ntk.items():
        assert (np.abs(drawn.ntk[path] - part) <= 5 * np.asarray(drawn.error[1][path]) + 1e-5).all(), path
    assert (np.diag(drawn.ntk["['LayerNorm_0']['scale']"]) > 0).all()
