"""Functions of several fields that are functions of one sum of them: ``relu(h + y)``, where y went through a norm with a learned scale."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paperjax.limits import fields as fl
from paperjax.limits.expectation import analytic
from paperjax.limits.nodes import Wide
from paperjax.limits.panels import breaks
from paperjax.limits.sampled import Sampled, sampled

PROBES = np.concatenate([np.linspace(-3.1, 2.9, 23), [-20.0, -1e-3, 1e-3, 30.0]])
"""Where functions are looked at."""
LINES = np.array([[0.71, -0.43, 0.87, 0.29], [-0.37, 0.83, 0.53, -0.61], [0.19, 0.97, -0.59, 0.41]])
POINTS = np.array([[0.41, 0.23, 0.31, 0.17], [-0.13, -0.29, -0.37, -0.07], [0.67, -0.19, -1.13, 0.59]])
"""Directions, and points on the lines, that no function here is made for."""


def merged(cache: dict[Any, Any], fn: Callable[..., Any], fields: Sequence[Wide]) -> tuple[Callable[..., Any], list[Wide]]:
    """A function of several fields as one of a single Gaussian field, their sum with weights, where it is that; else as it is.

    A joint integral over the fields of two examples has twice as many axes; over the sums it has two.
    """
    if not 1 < len(fields) <= POINTS.shape[1]:
        return fn, list(fields)
    key = ("merged", fn, tuple(fields))
    if key not in cache:
        weights = one_sum(fn, len(fields))
        cache[key] = fn, list(fields)
        if weights is not None and all(map(fl.is_gaussian, fields)):
            field, number = fl.multiple({z: float(a) for z, a in zip(fields, weights) if a})
            back = [float(by) for by in number * weights / (weights @ weights)]
            cache[key] = sampled(lambda z: fn(*(by * z for by in back))), [field]
    return cache[key]


def one_sum(fn: Callable[..., Any], fields: int) -> np.ndarray | None:
    """The weights a with ``fn(z) = fn(a (a . z) / a . a)`` for all z, the largest 1, or ``None`` if there are none.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> one_sum(lambda u, v: jnp.tanh(u - 0.5 * v), 2).tolist()
    [1.0, -0.5]
    >>> one_sum(lambda u, v: jnp.tanh(u) * v, 2) is None
    True
    """
    weights = None
    for point in POINTS[:, :fields]:
        slopes = np.array([on_line(fn, axis, point).slope.at(np.zeros(1))[0] for axis in np.eye(fields)])
        if np.isfinite(slopes).all() and np.abs(slopes).max() > 1e-6:
            weights = slopes / slopes[np.argmax(np.abs(slopes))]
            break
    if weights is None:
        return None
    back = weights / (weights @ weights)
    for way, point in zip(LINES[:, :fields], POINTS[:, :fields]):
        found, same = on_line(fn, way, point).at(PROBES), on_line(fn, back * (way @ weights), back * (point @ weights)).at(PROBES)
        if not np.allclose(found, same, rtol=1e-11, atol=1e-11 * np.abs(found).max(), equal_nan=True):
            return None
    return weights


def on_line(fn: Callable[..., Any], way: np.ndarray, point: np.ndarray) -> Sampled:
    """A function of several fields on a line through a point.

    Examples
    --------
    >>> on_line(lambda u, v: u * v, np.array([1.0, 0.0]), np.array([0.0, 2.0])).at(np.ones(1)).tolist()
    [2.0]
    """
    return sampled(lambda h: fn(*(float(by) * h + float(at) for by, at in zip(way, point))))


def breaks_along(fn: Callable[..., Any], way: np.ndarray, point: np.ndarray) -> bool:
    """Whether a function of several fields has a kink or a jump on a line.

    Examples
    --------
    >>> breaks_along(lambda u, v: abs(u) * v, np.ones(2), np.array([0.5, 2.0]))
    True
    """
    along = on_line(fn, way, point)
    return not analytic(along) and bool(breaks(along))
