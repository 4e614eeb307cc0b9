"""Subtract from a network its own output at initialization."""

import operator
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from paperjax.model import Frozen, Model


def center(model: Model) -> Model:
    """The network minus itself at initialization: ``f(theta, x) - f(theta_0, x)``, which starts at 0 (up to rounding of f) everywhere.

    The gradients are those of `model`. The first loss then depends on the labels alone: with an output scale alpha, alpha sets
    how lazily the network trains and nothing else (Chizat, Oyallon and Bach, arXiv 1812.07956, Section 1.2).

    Parameters
    ----------
    model
        The network.

    Returns
    -------
    Model
        Parameters ``trained``, those of `model`, and ``origin``, the same numbers at init, `Frozen`. The key is passed on as
        it is, so both are ``model.init(key, x)``. Costs a second forward pass.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from paperjax.models import mlp
    >>> model = center(mlp(8, 2, 1))
    >>> x = jnp.ones((3, 4))
    >>> model.apply(model.init(jax.random.key(0), x), x).tolist()
    [[0.0], [0.0], [0.0]]
    """

    def init(key: PRNGKeyArray, x: Any) -> PyTree:
        params = model.init(key, x)
        # A tree of its own, so that replacing a leaf of one does not replace it in the other.
        return {"trained": params, "origin": Frozen(jax.tree.map(lambda leaf: leaf, params))}

    def apply(params: PyTree, x: Any) -> PyTree:
        return jax.tree.map(operator.sub, model.apply(params["trained"], x), model.apply(params["origin"].value, x))

    return Model(init, apply)
