"""Networks with some weights fixed at 0, and the scores by which those are chosen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from paperjax.model import Model

Loss = Callable[[PyTree], Any]


def mask(model: Model, kept: PyTree) -> Model:
    """The network with its weights times a mask: ``f(kept * theta, x)``.

    Masked weights start at 0 and have gradient 0, so they stay there under any optimizer that moves a weight by its gradient and decays
    it towards 0.

    Parameters
    ----------
    model
        The network; its parameters are arrays, none `Frozen`.
    kept
        A pytree like its parameters, of booleans: true where a weight is kept. See `keep_largest`.

    Returns
    -------
    Model
        With parameters of the same shapes; those of ``init(key, x)`` are the model's own for that key where they are kept.

    Raises
    ------
    ValueError
        If the mask is not a pytree like the parameters, or a leaf has another shape.

    Examples
    --------
    >>> line = Model(lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w)
    >>> mask(line, jnp.array([[True], [False]])).apply(jnp.ones((2, 1)), jnp.array([[3.0, 5.0]])).tolist()
    [[3.0]]
    """

    def init(key: Array, x: Any) -> PyTree:
        return _times(kept, model.init(key, x))

    return Model(init, lambda params, x: model.apply(_times(kept, params), x))


def keep_largest(scores: PyTree, density: Any, together: bool = False) -> PyTree:
    """The mask that keeps the given share of the weights, those of the largest score.

    Parameters
    ----------
    scores
        A pytree of arrays, larger where a weight matters more: ``jax.tree.map(jnp.abs, params)`` for magnitude, or of `snip`, `grasp`,
        `synflow`, or random numbers.
    density
        Share to keep, in (0, 1]; may be a traced scalar. Of n weights ``round(density n)`` are kept, one at least; of equal
        scores the first ones.
    together
        Rank all leaves as one; otherwise each leaf keeps that share.

    Returns
    -------
    PyTree
        Of booleans.

    Raises
    ------
    ValueError
        If the density is not in (0, 1]; a traced one cannot be looked at.

    Examples
    --------
    >>> keep_largest({"w": jnp.array([0.1, 3.0, 2.0, 0.5])}, 0.5)["w"].tolist()
    [False, True, True, False]
    >>> keep_largest([jnp.array([0.1, 3.0]), jnp.array([2.0, 0.5])], 0.25, together=True)[0].tolist()
    [False, True]
    """
    if not isinstance(density, Tracer) and not 0 < float(density) <= 1:
        raise ValueError(f"keep_largest: density = {density}, but the share of the weights to keep lies in (0, 1].")

    def largest(flat: Array) -> Array:
        # The rank of each: a stable sort, so that of equal scores the first ones are kept.
        rank = jnp.argsort(jnp.argsort(-flat, stable=True))
        return rank < jnp.maximum(jnp.round(jnp.asarray(density * flat.size)).astype(rank.dtype), 1)

    if together:
        flat, unravel = jax.flatten_util.ravel_pytree(scores)
        return jax.tree.map(lambda leaf: leaf > 0, unravel(largest(flat).astype(flat.dtype)))
    return jax.tree.map(lambda leaf: largest(leaf.reshape(-1)).reshape(leaf.shape), scores)


def snip(loss: Loss, params: PyTree) -> PyTree:
    """SNIP's score, the change of the loss when a weight is removed, to first order: ``|theta dL/dtheta|``.

    Parameters
    ----------
    loss
        From parameters to a scalar, on a batch.
    params
        At which it is taken, as a rule at init.

    Returns
    -------
    PyTree
        Like the parameters.

    References
    ----------
    Lee, Ajanthan and Torr, arXiv 1810.02340.

    Examples
    --------
    >>> snip(lambda w: jnp.sum(w**2) / 2, jnp.array([1.0, -2.0])).tolist()
    [1.0, 4.0]
    """
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss)(params))


def grasp(loss: Loss, params: PyTree) -> PyTree:
    """GraSP's score, by how much removing a weight lowers the squared norm of the gradient, to first order: ``theta (H g)``.

    To first order ``|g(theta - delta)|² = |g|² - 2 delta . H g``, so the weights of the largest ``theta (H g)`` are those that gradient
    flow can least do without. The paper's own score has the opposite sign, and it removes the largest. H g is one forward-over-reverse
    product.

    Parameters
    ----------
    loss, params
        As for `snip`.

    Returns
    -------
    PyTree
        Like the parameters; of either sign.

    References
    ----------
    Wang, Zhang and Grosse, arXiv 2002.07376.

    Examples
    --------
    >>> grasp(lambda w: jnp.sum(jnp.array([1.0, 3.0]) * w**2) / 2, jnp.array([1.0, 1.0])).tolist()  # theta H² theta
    [1.0, 9.0]
    """
    gradient = jax.grad(loss)
    g = gradient(params)
    return jax.tree.map(jnp.multiply, params, jax.jvp(gradient, (params,), (g,))[1])


def synflow(model: Model, params: PyTree, x: Any, density: float, rounds: int = 100) -> PyTree:
    """SynFlow's mask: ``|theta| dR/d|theta|`` with R the sum of the outputs of ``f(|theta|, x)``, weights removed little by little.

    In round k of K the share ``density^(k/K)`` of all weights is kept, by the score of the network as it is masked by then. For a network
    that is homogeneous in each layer the scores of a layer add up to R, so that no layer is emptied as long as the rounds are many.

    Parameters
    ----------
    model, params
        The network, and the weights at init.
    x
        One example of ones, ``(1, *features)``: no data.
    density
        Share of all weights to keep, in (0, 1].
    rounds
        K, 100 in the paper.

    Returns
    -------
    PyTree
        Of booleans, like the parameters.

    Raises
    ------
    ValueError
        If the density is not in (0, 1], or rounds is below 1.

    References
    ----------
    Tanaka, Kunin, Yamins and Ganguli, arXiv 2006.05467, Algorithm 1.

    Examples
    --------
    >>> deep = Model(lambda key, x: None, lambda w, x: x @ w["a"] @ w["b"])
    >>> weights = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.array([[2.0], [4.0]])}
    >>> synflow(deep, weights, jnp.ones((1, 1)), 0.5, rounds=2)["b"].tolist()
    [[False], [True]]
    """
    if rounds < 1 or not 0 < density <= 1:
        raise ValueError(f"synflow: density = {density} and rounds = {rounds}; the share to keep lies in (0, 1], and rounds is 1 or more.")
    size = jax.tree.map(jnp.abs, params)

    def flow(w: PyTree) -> Array:
        return jnp.sum(model.apply(w, x))

    def prune(kept: PyTree, share: Array) -> tuple[PyTree, None]:
        now = _times(kept, size)
        scores = jax.tree.map(jnp.multiply, now, jax.grad(flow)(now))
        # A weight that was removed has score 0, and stays behind those that were not.
        scores = jax.tree.map(lambda k, s: jnp.where(k, s, -1), kept, scores)
        return keep_largest(scores, share, together=True), None

    everything = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    shares = jnp.asarray(density ** (np.arange(1, rounds + 1) / rounds), jnp.float32)
    return jax.lax.scan(prune, everything, shares)[0]


def _times(kept: PyTree, params: PyTree) -> PyTree:
    if jax.tree.structure(kept) != jax.tree.structure(params):
        raise ValueError(f"mask: the mask is {jax.tree.structure(kept)}, but the parameters are {jax.tree.structure(params)}.")
    for (path, k), w in zip(jax.tree.leaves_with_path(kept), jax.tree.leaves(params)):
        if k.shape != w.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"mask: {name} has shape {w.shape}, but its mask {k.shape}. Make the mask from these parameters.")
    return jax.tree.map(lambda k, w: jnp.where(k, w, jnp.zeros((), w.dtype)), kept, params)
