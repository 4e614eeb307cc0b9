"""A network's Taylor series in its parameters."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from paperjax.model import Frozen, Model, join, split


def linearize(model: Model, params: PyTree = None) -> Model:
    """The network linearised in its parameters: ``f_lin(theta, x) = f(theta_0, x) + J(theta_0, x) (theta - theta_0)``.

    theta_0 is the draw at init, or `params`. The NTK of f_lin is that of `model` at theta_0, whatever theta is, so gradient
    descent on f_lin is kernel regression with it (Lee et al., arXiv 1902.06720, eq. 4 and Section 2.2). In the NTK parametrization
    training of `model` stays within order ``width^-1/2`` of it (Theorem 2.1). It is ``taylor(model, 1)``.

    Parameters
    ----------
    model
        The network. What it holds as `Frozen`, and leaves that are not floating point, are those of theta_0.
    params
        Parameters to expand about; init then returns them whatever the key is, so every seed starts there.

    Returns
    -------
    Model
        Parameters ``trained``, theta, and ``origin``, theta_0, `Frozen`; init returns the same numbers in both. One call costs one
        ``jax.jvp``, about three forward passes.

    Raises
    ------
    ValueError
        If (at init) a leaf of `params` is missing, is none of the model's, or has another shape.
    TypeError
        From JAX, if the model uses ``jax.custom_vjp``, which has no forward derivative.

    Notes
    -----
    `paperjax.plan` reads how leaves are used, and here they meet their own origin first: plan the network, then linearise it,
    ``linearize(plan.model)``.

    Examples
    --------
    The cube of w about w = 1 is ``1 + 3 (w - 1)``:

    >>> cube = Model(lambda key, x: jnp.array(1.0), lambda w, x: w**3 * x)
    >>> model = linearize(cube)
    >>> params = model.init(jax.random.key(0), jnp.ones(1))
    >>> model.apply({**params, "trained": jnp.array(3.0)}, jnp.ones(1)).tolist()
    [7.0]
    """
    return taylor(model, 1, params)


def taylor(model: Model, order: int, params: PyTree = None) -> Model:
    """The network's Taylor polynomial in its parameters, of degree `order`: ``sum_k (1/k!) d^k/ds^k f(theta_0 + s (theta - theta_0), x)``.

    theta_0 is the draw at init, or `params`. Within the radius of convergence the error is of order ``|theta - theta_0|^(order + 1)``,
    and none where f is a polynomial of that degree in the parameters: a deep linear net with L hidden layers has degree L + 1.

    Parameters
    ----------
    model
        The network. What it holds as `Frozen`, and leaves that are not floating point, are those of theta_0.
    order
        Degree k. 0 is the network at theta_0, 1 is `linearize`, 2 the quadratic model (Bai and Lee, arXiv 1910.01619).
    params
        Parameters to expand about; init then returns them whatever the key is, so every seed starts there.

    Returns
    -------
    Model
        Parameters ``trained``, theta, and ``origin``, theta_0, `Frozen`; init returns the same numbers in both. Works for every
        primitive with a forward derivative, loops included: it is `order` nested ``jax.jvp`` along one direction. Tracing costs
        ``2^order``; XLA finds what the terms share, and runs an unrolled network in about ``order + 1`` times an order's work.

    Raises
    ------
    ValueError
        If `order` is no whole number of at least 0, or (at init) a leaf of `params` is missing, is none of the model's, or has
        another shape.
    TypeError
        From JAX, if the model uses ``jax.custom_vjp``, which has no forward derivative.

    Notes
    -----
    `paperjax.plan` reads how leaves are used, and here they meet their own origin first: plan the network, then expand it,
    ``taylor(plan.model, order)``.

    Derivatives are JAX's: a ReLU has second derivative 0 everywhere, so the series of a ReLU network is that of the polynomial of its
    present gates.

    Examples
    --------
    The cube of w about w = 1, at w = 3, by degree:

    >>> cube = Model(lambda key, x: jnp.array(1.0), lambda w, x: w**3 * x)
    >>> x = jnp.ones(1)
    >>> at_3 = {"trained": jnp.array(3.0), "origin": Frozen(jnp.array(1.0))}
    >>> [taylor(cube, k).apply(at_3, x).item() for k in range(5)]
    [1.0, 7.0, 19.0, 27.0, 27.0]
    """
    degree = _check_order(order)

    def init(key: PRNGKeyArray, x: Any) -> PyTree:
        if params is None:
            start = model.init(key, x)
        else:
            _check_params(params, jax.eval_shape(model.init, key, x))
            start = jax.tree.map(jnp.asarray, params)
        # A tree of its own, so that replacing a leaf of one does not replace it in the other.
        return {"trained": start, "origin": Frozen(jax.tree.map(lambda leaf: leaf, start))}

    def apply(params: PyTree, x: Any) -> PyTree:
        _check_pair(params)
        origin, given = split(params["origin"].value)
        direction = jax.tree.map(jnp.subtract, split(params["trained"])[0], origin)
        terms = _derivatives(lambda theta: model.apply(join(theta, given), x), direction, degree)(origin)
        return jax.tree.map(_summed, *terms)

    return Model(init, apply)


def _summed(*terms: Array) -> Array:
    # From the smallest term up.
    return sum((term / float(math.factorial(k)) for k, term in reversed(tuple(enumerate(terms[1:], 1)))), start=0.0) + terms[0]


def _derivatives(f: Callable[[PyTree], PyTree], direction: PyTree, order: int) -> Callable[[PyTree], tuple[PyTree, ...]]:
    """``theta -> (f, D f, ..., D^order f)``, D being the derivative along a fixed direction."""
    if order == 0:
        return lambda theta: (f(theta),)
    lower = _derivatives(f, direction, order - 1)

    def higher(theta: PyTree) -> tuple[PyTree, ...]:
        values, slopes = jax.jvp(lower, (theta,), (direction,))
        return (*values, slopes[-1])

    return higher


def _check_order(order: Any) -> int:
    try:
        whole = operator.index(order)
    except TypeError:
        whole = -1
    if whole < 0 or isinstance(order, bool):
        raise ValueError(f"taylor: order = {order!r}, but the degree of a polynomial is a whole number of at least 0; 1 is linearize.")
    return whole


def _check_pair(params: Any) -> None:
    if not isinstance(params, Mapping) or set(params) != {"trained", "origin"} or not isinstance(params["origin"], Frozen):
        keys = f" with keys {list(params)}" if isinstance(params, Mapping) else ""
        raise ValueError(
            "linearize or taylor: the parameters to apply must be {'trained': theta, 'origin': Frozen(theta_0)}, as the expanded model's "
            f"init returns them; got a {type(params).__name__}{keys}. For the network's own parameters: "
            "{**expanded.init(key, x), 'trained': theta}."
        )


def _check_params(params: PyTree, expected: PyTree) -> None:
    """A tree of other shapes would broadcast, or be missed where the model looks for it."""
    there, wanted = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, expected)
    )
    fix = "Give the parameters of the model itself: what its init returns, or a training of it."
    for path in wanted.keys() - there.keys():
        raise ValueError(f"linearize or taylor: the params to expand about lack the leaf {path} of the model, shape {wanted[path]}. {fix}")
    for path, shape in there.items():
        if path not in wanted:
            raise ValueError(f"linearize or taylor: the params to expand about have a leaf {path} that the model has not. {fix}")
        if shape != wanted[path]:
            raise ValueError(
                f"linearize or taylor: leaf {path} of the params to expand about has shape {shape}; the model's has {wanted[path]}. {fix}"
            )
