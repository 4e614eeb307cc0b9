"""Limits against networks of finite width, which approach them as n^-1/2."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.model import split
from tests.limits.wide_networks import NETWORKS

SEEDS = {64: 640, 160: 320, 400: 160, 1024: 64}
"""Networks of each width: many where they are cheap, as the slope of a line is known through all of them."""
FEWER = {64: 320, 160: 160, 400: 64, 1024: 24}
"""Of images, sequences and sentences, which cost more."""
BASE = dict(width=64)


def tangent_kernels(family: Any, x: Any, width: int, seeds: int) -> np.ndarray:
    """Kernels of single networks under NTK parametrization, by their gradients, ``(seeds, leaves, N, N)``."""
    planned = pj.plan(family, pj.ntp, base=BASE, target=dict(width=width), optimizer="sgd")
    model = planned.model

    def kernels(key: Any) -> Any:
        params = model.init(key, x)
        trained, fixed = split(params)

        def gradient(example: Any) -> Any:
            return jax.grad(lambda p: model.apply(pj.model.join(p, fixed), example[None])[0, 0])(trained)

        def kernel(g: Any, rate: Any) -> Any:
            return rate * (g.reshape(len(x), -1) @ g.reshape(len(x), -1).T)

        return jnp.stack(jax.tree.leaves(jax.tree.map(kernel, jax.lax.map(gradient, x), planned.factors("learning_rate", params))))

    keys = jax.random.split(jax.random.key(width), seeds)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(kernels, keys))(keys), np.float64)


def slope_of(errors: list[np.ndarray]) -> tuple[float, float]:
    """Of log RMS against log width, with its standard error: that of a mean of squares over seeds, carried through the fit."""
    x, n = np.log(list(SEEDS)), np.array([len(e) for e in errors])
    logs = [np.log(e.mean()) / 2 for e in errors]
    noise = np.array([e.std(ddof=1) / e.mean() / 2 / len(e) ** 0.5 for e in errors])
    # What is known of a point goes with its seeds.
    centred = x - np.average(x, weights=n)
    take = n * centred / np.sum(n * centred**2)
    return float(take @ logs), float(np.sqrt(np.sum((take * noise) ** 2)))


def at_infinity(found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean kernels carried to 1/n = 0 along a line, and the standard errors."""
    x, n = 1 / np.array(list(SEEDS)), np.array([len(k) for k in found])
    centred = x - np.average(x, weights=n)
    take = n / n.sum() - np.average(x, weights=n) * n * centred / np.sum(n * centred**2)
    noise = np.stack([k.std(0, ddof=1) / len(k) ** 0.5 for k in found])
    return np.tensordot(take, np.stack([k.mean(0) for k in found]), 1), np.sqrt(np.tensordot(take**2, noise**2, 1))


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    """Flax's pooling divides floats by an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_approach_their_limit_as_the_root_of_the_width(name: str) -> None:
    """The tangent kernel of one network differs from its limit by n^-1/2, and on average by 1/n, leaf by leaf."""
    fn, x = NETWORKS[name]
    family = pj.family(fn, x=x)
    limit = pj.limit(family, x, parametrization=pj.ntp, base=BASE, gaussian=name == "Equinox", per="leaf", progress=False)
    leaves = np.stack([np.asarray(part) for part in limit.ntk.values()])
    scale = np.abs(leaves.sum(0)).max()
    seeds = SEEDS if x.shape == (2, 5) else FEWER
    found = [tangent_kernels(family, jnp.asarray(x), width, n) for width, n in seeds.items()]
    errors = [np.mean((k.sum(1) - leaves.sum(0)) ** 2, (1, 2)) for k in found]
    slope, error = slope_of(errors)
    print(f"\n{name}: slope {slope:.3f} ± {error:.3f}, RMS {[float(np.sqrt(e.mean()) / scale) for e in errors]}")
    assert error < 0.05
    assert slope == pytest.approx(-0.5, abs=0.1)
    mean, spread = at_infinity(found)
    # Five standard errors, of a few hundred numbers. Queries' and keys' parts are 0 in the limit, and what is left of theirs is the second
    # order in 1/n; a readout's bias does not fluctuate, and is rounded to float32.
    room = 5 * spread + 5e-5 * scale
    assert (np.abs(mean - leaves) < room).all(), dict(zip(limit.ntk, (np.abs(mean - leaves) / room).max((1, 2))))
    # Such an error of the whole would be seen.
    assert at_infinity([k.sum(1) for k in found])[1].max() < 0.02 * scale
