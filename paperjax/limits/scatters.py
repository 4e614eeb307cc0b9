"""Entries added to or set at positions that an index says (``h.at[i].add``, ``h.at[i].set``, ``jax.ops.segment_sum``)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Axes, Det, Node, Wide, axis_of, coordinates
from paperjax.limits.positions import piece, put

Shape = tuple[int, ...]


INDEPENDENT = (
    "some coordinates of an axis of independent ones (channels, outputs) are set or added to. They would not be alike any more: take those "
    "that are left as they are, and those that are set, from layers of their own."
)


class Scatter(NamedTuple):
    """A scatter of representatives: the axes of what it makes, ``put(base, index, terms)`` and ``add``, and which axes of the terms it puts
    entry by entry.
    """

    axes: Axes
    put: Callable[[Any, Any, Any], Any]
    add: Callable[[Any, Any, Any], Any]
    rows: tuple[int, ...]


def scatter_of(eqn: Any, base: Node, terms: Node, sizes: Shape, others: Shape) -> Scatter:
    """What an equation does to representatives.

    Raises
    ------
    NotImplementedError
        If it goes along an axis of independent coordinates, of which one representative stands for all.
    """
    options = dict(eqn.params)
    numbers = options["dimension_numbers"]
    window = [i for i in range(len(sizes)) if i not in (*numbers.inserted_window_dims, *numbers.operand_batching_dims)]
    whole = {i: j for i, j in zip(window, numbers.update_window_dims) if nd.full_size(terms.axes[j]) == (sizes[i], others[i])}
    axes = tuple(terms.axes[whole[i]] if i in whole else axis_of(n, m) for i, (n, m) in enumerate(zip(sizes, others)))
    grown = any(i not in whole and n != m for i, (n, m) in enumerate(zip(sizes, others)))
    apart = any(coordinates(a) > 1 and j not in whole.values() for j, a in enumerate(terms.axes))
    if grown or apart or any(coordinates(a) > 1 and i not in whole for i, a in enumerate(base.axes)):
        raise NotImplementedError(INDEPENDENT)
    same = {name: options[name] for name in ("indices_are_sorted", "mode")}

    def of(combine: Callable[..., Any], unique: bool) -> Callable[[Any, Any, Any], Any]:
        return lambda base, index, terms: combine(base, index, terms, numbers, unique_indices=unique, **same)

    rows = tuple(j for j in range(len(terms.axes)) if j not in numbers.update_window_dims)
    return Scatter(axes, of(lax.scatter, options["unique_indices"]), of(lax.scatter_add, False), rows)


def by_index(axes: Axes, node: Wide, fn: Callable[[Any, Any], Any], index: Det, selects: bool = True) -> Wide:
    """A linear function of a value to which an index belongs, one of the value alone where the index is known."""
    if index.const is None:
        return nd.Linear(axes, node, fn, (index,), False)
    known = index.const
    made = st.apply(node, st.Moved(axes, lambda a: fn(a, known), selects))
    assert isinstance(made, Wide)
    return made


def added_at(scatter: Scatter, base: Wide | float, index: Det, terms: Wide) -> Wide:
    """Sums over positions that have the same index (messages over the edges of a graph): linear in them."""
    axes, shape = scatter.axes, nd.rep_shape(scatter.axes)

    def fn(a: Any, i: Any) -> Any:
        return scatter.add(jnp.zeros(shape, a.dtype), i, a)

    selects = index.const is not None and bool(np.all(nd.fold(lambda i: fn(jnp.ones(terms.shape), i), index.const) <= 1))
    added = by_index(axes, terms, fn, index, selects)
    if isinstance(base, Wide):
        return nd.Add(axes, st.same(base, axes), added)
    return added if base == 0 else nd.Add(axes, nd.Const(axes, Det(axes, const=np.full(shape, base))), added)


def set_at(scatter: Scatter, base: Node, index: np.ndarray, terms: Node) -> Node:
    """Entries written over: what is left of the one and what is put there of the other, side by side.

    Raises
    ------
    NotImplementedError
        If two are put in one place.
    """
    axes, shape = scatter.axes, nd.rep_shape(scatter.axes)
    base = st.same(base, axes) if isinstance(base, Wide) else st.same_shape(base, axes)  # type: ignore[arg-type]
    places = _places(scatter, shape, terms.shape, index)
    if _is_block(shape, places):
        return _put(base, terms, axes, shape, places)
    # Each row of the index puts a block.
    for row in np.ndindex(*(terms.shape[j] for j in scatter.rows)):
        one = terms
        for j, k in zip(scatter.rows, row):
            one = piece(one, j, k, k + 1)
        there = places[tuple(row[scatter.rows.index(j)] if j in scatter.rows else slice(None) for j in range(places.ndim))]
        if np.all(there >= 0):
            base = _put(base, one, axes, shape, there)
    return base


def _put(base: Node, terms: Node, axes: Axes, shape: Shape, places: np.ndarray) -> Node:
    low, high = _bounds(shape, places)
    size = tuple(b - a for a, b in zip(low, high))
    inside = tuple(axis if n == k else axis_of(k, k) for axis, n, k in zip(axes, shape, size))
    return put(base, st.apply(terms, st.Moved(inside, lambda a: jnp.reshape(a, size))), low)


def _places(scatter: Scatter, shape: Shape, terms: Shape, index: np.ndarray) -> np.ndarray:
    """Where each entry is put, a number in row-major order; -1 for one that is out of bounds and dropped."""
    landed = nd.fold(lambda: scatter.add(jnp.zeros(shape), jnp.asarray(index), jnp.ones(terms)))
    if np.any(landed > 1):
        raise NotImplementedError("entries that are set twice, of which the last one stays: which it is, XLA does not promise.")
    count = np.prod(terms, dtype=int)
    numbers = nd.fold(lambda: scatter.put(jnp.zeros(shape), jnp.asarray(index), jnp.arange(1.0, 1.0 + count).reshape(terms)))
    places = np.full(count, -1)
    places[numbers.ravel()[landed.ravel() == 1].astype(int) - 1] = np.flatnonzero(landed.ravel() == 1)
    return places.reshape(terms)


def _bounds(shape: Shape, places: np.ndarray) -> tuple[list[int], list[int]]:
    at = [np.asarray(i) for i in np.unravel_index(places, shape)] if shape else []
    return [int(i.min()) for i in at], [int(i.max()) + 1 for i in at]


def _is_block(shape: Shape, places: np.ndarray) -> bool:
    """Whether a block of entries is put, one after the other in row-major order."""
    if places.size == 0 or np.any(places < 0):
        return False
    low, high = _bounds(shape, places)
    block = np.arange(np.prod(shape, dtype=int)).reshape(shape)[tuple(slice(a, b) for a, b in zip(low, high))]
    return np.array_equal(block.ravel(), places.ravel())
