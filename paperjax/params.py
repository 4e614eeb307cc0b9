"""What of a parameter pytree is trained and what is given."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Marks a part of a parameter pytree as given, not trained.

    Training, counting and decay leave everything under `value` alone; ``apply`` unwraps it. It is how a model carries
    what is random but fixed: a random projection, a frozen readout, batch statistics.

    Examples
    --------
    >>> trained, given = split({"sign": Frozen(2.0), "w": 1.0})
    >>> trained
    {'sign': None, 'w': 1.0}
    >>> join(trained, given)
    {'sign': Frozen(value=2.0), 'w': 1.0}
    """

    value: Any


def _is_frozen(node: Any) -> bool:
    return isinstance(node, Frozen)


def _is_trained(leaf: Any) -> bool:
    # JAX takes ten times as long to find the type of its own arrays.
    return not _is_frozen(leaf) and jnp.issubdtype(leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf), jnp.inexact)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Part a parameter pytree into what is trained and what is given; ``join`` puts it together again.

    Returns
    -------
    trained, given
        Two pytrees of the shape of `params`, each with ``None`` where the other has the leaf. `given` holds the
        `Frozen` nodes and every leaf that is not floating point (integers, keys).

    Examples
    --------
    >>> split({"w": 1.0, "n": 3})
    ({'n': None, 'w': 1.0}, {'n': 3, 'w': None})
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_frozen)
    trained = [_is_trained(leaf) for leaf in leaves]
    first = jax.tree.unflatten(tree, [leaf if its else None for leaf, its in zip(leaves, trained)])
    return first, jax.tree.unflatten(tree, [None if its else leaf for leaf, its in zip(leaves, trained)])


def join(trained: PyTree, given: PyTree) -> PyTree:
    """Undo `split`: ``join(*split(params))`` is `params`.

    Examples
    --------
    >>> join({"w": 1.0, "n": None}, {"w": None, "n": 3})
    {'n': 3, 'w': 1.0}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trained, given, is_leaf=lambda node: node is None or _is_frozen(node))


def count(params: PyTree) -> int:
    """Number of trained parameters, ``D = sum over trained leaves of the product of the leaf's shape``.

    Examples
    --------
    >>> count({"w": jnp.ones((3, 2)), "b": Frozen(jnp.ones(2))})
    6
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(split(params)[0]))
