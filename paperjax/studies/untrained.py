"""Experiments in which nothing is trained: their measures draw the networks, or evaluate formulas."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paperjax.data import Dataset
from paperjax.experiment import Experiment
from paperjax.grid import Grid
from paperjax.model import Model


def untrained(grid: Grid, measures: Mapping[str, Any], data: Callable[..., Dataset] | None = None) -> Experiment:
    """An Experiment of no steps, for measures that draw networks by the thousand in one cell.

    Parameters
    ----------
    grid
        As of an Experiment; measures are given its axes by name, and a key that hangs on the seed.
    measures
        What is found in each cell, ``(data, key, **axes) -> array`` or with fewer arguments.
    data
        ``key -> Dataset`` with labels of shape ``(n, 1)``; by default one number that no measure needs to look at.

    Returns
    -------
    Experiment
        With ``steps=0``, measured once.

    Examples
    --------
    >>> import paperjax as pj
    >>> norm = lambda data, key, width: jnp.mean(jax.random.normal(key, (width,)) ** 2)
    >>> result = untrained(pj.grid(width=[4, 4096], lr=1.0, seed=2), {"norm": norm}).run(progress=False)
    >>> bool((abs(result["norm"].sel(width=4096) - 1) < 0.2).all())
    True
    """
    return Experiment(_nothing, data or _one, grid=grid, steps=0, measure_at=[0], measures=dict(measures))


def _nothing() -> Model:
    return Model(lambda key, x: jax.random.normal(key, (1,)), lambda params, x: jnp.broadcast_to(params, (x.shape[0], 1)))


def _one(key: jax.Array) -> Dataset:
    x = jax.random.normal(key, (1, 1))
    return Dataset(x, x, x, x, "one number", "generated")
