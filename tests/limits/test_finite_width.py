"""Limits against networks of finite width, which approach them as n^-1/2."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.model import split
from tests.limits.wide_networks import NETWORKS

WIDTHS = (64, 160, 400, 1024)
SEEDS = 16
BASE = dict(width=64)
# Those whose sixteen networks at four widths take a minute or two.
SHORT = ("plain", "scan over depth", "gated, RMSNorm", "post-norm")


def tangent_kernels(family: Any, x: Any, width: int, seeds: int) -> np.ndarray:
    """Kernels of single networks under NTK parametrization, by their gradients."""
    planned = pj.plan(family, pj.ntp, base=BASE, target=dict(width=width), optimizer="sgd")
    model = planned.model

    @jax.jit
    def kernel(key: Any) -> Any:
        params = model.init(key, x)
        trained, fixed = split(params)
        rates = planned.factors("learning_rate", params)
        gradients = jax.vmap(jax.grad(lambda p, one: model.apply(pj.model.join(p, fixed), one[None])[0, 0]), (None, 0))(trained, x)
        terms = jax.tree.map(lambda g, rate: rate * (g.reshape(len(x), -1) @ g.reshape(len(x), -1).T), gradients, rates)
        return sum(jax.tree.leaves(terms))

    return np.stack([kernel(jax.random.key(seed)) for seed in range(seeds)])


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", SHORT)
def test_networks_approach_their_limit_as_the_root_of_the_width(name: str) -> None:
    """The tangent kernel of one network differs from its limit by n^-1/2; its readout's part is the covariance of the outputs.

    A root mean square over 16 networks and three entries is known to about an eighth, so a slope over a sixteenfold width to about 0.06.
    """
    fn, x = NETWORKS[name]
    family = pj.family(fn, x=x)
    limit = pj.limit(family, x, parametrization=pj.ntp, base=BASE, gaussian=name == "Equinox")
    ntk = np.asarray(limit.ntk)
    errors = []
    for width in WIDTHS:
        found = tangent_kernels(family, jnp.asarray(x), width, SEEDS)
        errors.append(np.sqrt(np.mean((found - ntk) ** 2)) / np.abs(ntk).max())
    slope = np.polyfit(np.log(WIDTHS), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1), errors
    assert errors[-1] < 0.1
