"""Independent copies of a network as one network."""

import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from paperjax.model import Model


def ensemble(model: Model, size: int, *, reduce: Literal["mean"] | None = "mean") -> Model:
    r"""Independent draws of a network, side by side: ``f(theta, x) = (1/k) sum_i f(theta_i, x)`` with k = size.

    Parameters
    ----------
    model
        The network.
    size
        Members k.
    reduce
        ``"mean"``: the output is the mean over members, (batch, \*out). ``None``: it is all of them, (batch, size, \*out).

    Returns
    -------
    Model
        Its parameters are those of `model` with a leading axis over members in every leaf, `Frozen` ones and integers too.
        Member i is drawn as ``model.init(jax.random.split(key, size)[i], x)``. Memory and time are k times those of `model`.

    Raises
    ------
    ValueError
        If `size` is no whole number of at least 1, or `reduce` is neither ``"mean"`` nor ``None``.

    Notes
    -----
    Training the mean is not training the members. Under a loss of the mean, every member sees the residual of the whole:
    ``d loss / d theta_i = (1/k) (d loss / d f) (d f_i / d theta_i)``. So the members are coupled, the gradient of each is smaller
    by the factor 1/k, and the NTK of the mean is the members' mean NTK over k: with k times the learning rate, the mean descends
    under the mean kernel.

    Members that train independently come from training each by itself and averaging after: ``jax.vmap`` over keys of `init` and
    ``paperjax.train`` of `model`, then `apply` of ``ensemble(model, k)`` on the stacked parameters. ``reduce=None`` against targets
    repeated along axis 1 gives the same under SGD with k times the learning rate, for a loss that is a mean over all outputs.

    A member by itself: ``jax.tree.map(lambda leaf: leaf[i], params)`` are parameters of `model`.

    A model whose init ignores its key (an Equinox or nnx instance, ``linearize(model, params)``) gives k equal members.

    Examples
    --------
    >>> from paperjax.models import mlp
    >>> model, x = mlp(8, 2, 1), jnp.ones((3, 4))
    >>> params = ensemble(model, 16).init(jax.random.key(0), x)
    >>> ensemble(model, 16).apply(params, x).shape, ensemble(model, 16, reduce=None).apply(params, x).shape
    ((3, 1), (3, 16, 1))
    >>> member = jax.tree.map(lambda leaf: leaf[5], params)
    >>> bool(jnp.allclose(model.apply(member, x), ensemble(model, 16, reduce=None).apply(params, x)[:, 5], atol=1e-5))
    True
    """
    try:
        members = operator.index(size)
    except TypeError:
        members = 0
    if members < 1 or isinstance(size, bool):
        raise ValueError(f"ensemble: size = {size!r}, but the number of members is a whole number of at least 1.")
    if reduce not in ("mean", None):
        raise ValueError(f"ensemble: reduce = {reduce!r}. Give 'mean', or None for the outputs of all members, (batch, size, ...).")

    def init(key: PRNGKeyArray, x: Any) -> PyTree:
        return jax.vmap(lambda key: model.init(key, x))(jax.random.split(key, members))

    def reduced(y_KxB: Array) -> Array:
        if y_KxB.shape[0] != members:
            raise ValueError(
                f"ensemble: the parameters hold {y_KxB.shape[0]} members, and the ensemble has size = {members}. "
                "Make the ensemble with the size of its parameters, or init it anew."
            )
        return jnp.mean(y_KxB, axis=0) if reduce == "mean" else jnp.moveaxis(y_KxB, 0, 1)

    def apply(params: PyTree, x: Any) -> PyTree:
        return jax.tree.map(reduced, jax.vmap(lambda member: model.apply(member, x))(params))

    return Model(init, apply)
