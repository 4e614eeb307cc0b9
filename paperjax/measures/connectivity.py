"""How a two-layer network loses by dropping neurons, and the loss along a path of straight pieces between two networks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from paperjax.model import Model


def keep(params: PyTree, kept_N: Bool[Array, "N"], rescaled: bool = True) -> PyTree:
    """The two-layer network of which only some neurons are kept: ``(N/M) sum_{i kept} a_i phi(w_i . x)`` for the sum over all N.

    Neurons drawn at random then give the network on average, and a mean square around it of

        E |f_kept(x) - f(x)|² = (1/M - 1/N) S²(x),    S² = 1/(N-1) sum_i |N s a_i phi(w_i . x) - f(x)|²,

    s being the factor before the sum (1/N for mean field): sampling without replacement, see `dropout_variance`.

    Parameters
    ----------
    params
        Of `paperjax.models.two_layer` with a trained readout: ``first/w`` (features, N) and ``readout/w`` (N, outputs).
    kept_N
        Which neurons, at least one.
    rescaled
        If false the factor N/M is left out.

    Returns
    -------
    PyTree
        With a_i = 0 for the others, whose w_i are as they were.

    Raises
    ------
    ValueError
        If the parameters are not those of a two-layer network, or the mask does not fit, or keeps none (a traced one cannot be looked at).

    Examples
    --------
    >>> params = {"first": {"w": jnp.ones((3, 4))}, "readout": {"w": jnp.ones((4, 1))}}
    >>> keep(params, jnp.array([True, False, False, True]))["readout"]["w"][:, 0].tolist()
    [2.0, 0.0, 0.0, 2.0]
    """
    _, a_NxO = _leaves("keep", params)
    if kept_N.shape != a_NxO.shape[:1]:
        raise ValueError(f"keep: kept_N has shape {kept_N.shape}, but readout/w has shape {a_NxO.shape}: one entry for each of its rows.")
    if not isinstance(kept_N, Tracer) and not np.any(kept_N):
        raise ValueError("keep: kept_N keeps no neuron, so there is nothing to make up for the others with.")
    share = jnp.mean(kept_N.astype(a_NxO.dtype)) if rescaled else jnp.ones((), a_NxO.dtype)
    return {**params, "readout": {"w": jnp.where(kept_N[:, None], a_NxO / share, 0)}}


def dropout_variance(model: Model, params: PyTree, x: Float[Array | np.ndarray, "batch features"]) -> Scalar:
    """``S²``, the variance over neurons of one neuron's part in the output, mean over examples and outputs.

    With M of N neurons kept at random, and the rest's part made up for, the mean square loss rises by exactly ``(1/M - 1/N) S²`` on
    average, at any parameters; see `keep`.

    Parameters
    ----------
    model, params
        `paperjax.models.two_layer` with two or more neurons and a trained readout.
    x
        The examples; ``N × batch × outputs`` numbers are held.

    Returns
    -------
    Array
        A scalar.

    Raises
    ------
    ValueError
        If the parameters are not those of a two-layer network of at least two neurons.

    Examples
    --------
    >>> import paperjax as pj
    >>> x = jax.random.normal(jax.random.key(0), (5, 3))
    >>> model = pj.models.two_layer(2, scaling=1.0)
    >>> params = model.init(jax.random.key(1), x)
    >>> both = [model.apply(keep(params, jnp.array(kept)), x) for kept in ([True, False], [False, True])]
    >>> bool(jnp.allclose(dropout_variance(model, params, x), jnp.mean((both[0] - both[1]) ** 2) / 2))
    True
    """
    x = jnp.asarray(x)
    w_DxN, a_NxO = _leaves("dropout_variance", params)
    N = a_NxO.shape[0]
    if N < 2:
        raise ValueError("dropout_variance: the network has one neuron, and a variance over neurons needs two.")

    # The factor before the sum is a closure of the model, so a network of one neuron with the wide one's factor is that neuron's part.
    def alone(w_D: Array, a_O: Array) -> Array:
        return N * model.apply({"first": {"w": w_D[:, None]}, "readout": {"w": a_O[None, :]}}, x)

    return jnp.mean(jnp.var(jax.vmap(alone, (1, 0))(w_DxN, a_NxO), axis=0, ddof=1))


def dropout_path(start: PyTree, end: PyTree, kept_N: Bool[Array, "N"], swap: bool = True) -> list[PyTree]:
    """Corners of the path between two two-layer networks along which the loss rises no more than by dropping neurons.

    With the first network's `kept_N` neurons A, the others B, and the second network's neurons primed,

        (a_A, a_B) -> (N/|A| a_A, 0) -> swap w_B for w'_B -> (0, N/|B| a'_B) -> swap w_A for w'_A -> (a'_A, a'_B).

    A swap is of neurons whose output is 0, so the network stays; elsewhere only readouts move, in which the network is linear and
    a convex loss convex. So the largest loss on the path is at a corner: that of an end, of A alone, or of B' alone.

    Parameters
    ----------
    start, end
        Parameters of `paperjax.models.two_layer` of one shape, with a trained readout.
    kept_N
        A: at least one neuron, and not all.
    swap
        If false the two corners after a swap are left out, so that hidden weights move while they are in use.

    Returns
    -------
    list of PyTree
        Six corners, or four. Give them to `losses_along`.

    Raises
    ------
    ValueError
        If the parameters are not those of two-layer networks of one shape.

    References
    ----------
    Shevchenko and Mondelli, arXiv 1912.10095, Theorem 1; Kuditipudi et al., arXiv 1906.06247.

    Examples
    --------
    >>> start = {"first": {"w": jnp.array([[1.0, 2.0]])}, "readout": {"w": jnp.array([[3.0], [4.0]])}}
    >>> end = {"first": {"w": jnp.array([[5.0, 6.0]])}, "readout": {"w": jnp.array([[7.0], [8.0]])}}
    >>> for at in dropout_path(start, end, jnp.array([True, False])):
    ...     print(at["first"]["w"][0].tolist(), at["readout"]["w"][:, 0].tolist())
    [1.0, 2.0] [3.0, 4.0]
    [1.0, 2.0] [6.0, 0.0]
    [1.0, 6.0] [6.0, 0.0]
    [1.0, 6.0] [0.0, 16.0]
    [5.0, 6.0] [0.0, 16.0]
    [5.0, 6.0] [7.0, 8.0]
    """
    (w_DxN, a_NxO), (w2_DxN, a2_NxO) = _leaves("dropout_path", start), _leaves("dropout_path", end)
    if w_DxN.shape != w2_DxN.shape or a_NxO.shape != a2_NxO.shape:
        raise ValueError(
            f"dropout_path: the networks differ in shape, first/w {w_DxN.shape} and {w2_DxN.shape}, "
            f"readout/w {a_NxO.shape} and {a2_NxO.shape}."
        )
    half, half2 = keep(start, kept_N), keep(end, ~kept_N)
    mixed = {"w": jnp.where(kept_N[None, :], w_DxN, w2_DxN)}
    if not swap:
        return [start, half, half2, end]
    return [start, half, {**half, "first": mixed}, {**half2, "first": mixed}, half2, end]


def losses_along(loss: Callable[[PyTree], Any], corners: Sequence[PyTree], per_piece: int = 10) -> Float[Array, "points"]:
    """The loss along straight pieces from corner to corner.

    Parameters
    ----------
    loss
        From parameters to a scalar.
    corners
        At least two pytrees of one structure; integers and keys are not interpolated, so there must be none.
    per_piece
        Steps in a piece, of equal length in parameters. The corners are always among the points.

    Returns
    -------
    Array
        ``(len(corners) - 1) * per_piece + 1`` losses, the first and the last those of the ends.

    Raises
    ------
    ValueError
        If there are fewer than two corners, or less than one step.

    Examples
    --------
    >>> losses_along(lambda x: x**2, [jnp.array(-1.0), jnp.array(1.0), jnp.array(2.0)], per_piece=2).tolist()
    [1.0, 0.0, 1.0, 2.25, 4.0]
    """
    if len(corners) < 2 or per_piece < 1:
        raise ValueError(
            f"losses_along: {len(corners)} corners and per_piece = {per_piece}; a path has two corners or more and a piece a step or more."
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *corners)

    def at(place: tuple[Array, Array]) -> Array:
        piece, t = place
        return loss(jax.tree.map(lambda leaf: (1 - t) * leaf[piece] + t * leaf[piece + 1], stacked))

    steps = jnp.arange((len(corners) - 1) * per_piece)
    inner = jax.lax.map(at, (steps // per_piece, (steps % per_piece) / per_piece))
    return jnp.concatenate([inner, jnp.asarray(loss(corners[-1]))[None]])


def barrier(losses: Float[Array, "points"]) -> Scalar:
    """Largest loss on a path over the larger of its two ends; 0 if no point is higher than an end.

    Examples
    --------
    >>> barrier(jnp.array([1.0, 3.5, 0.0, 2.0]))
    Array(1.5, dtype=float32)
    """
    if losses.ndim != 1 or losses.shape[0] < 2:
        raise ValueError(f"barrier: losses has shape {losses.shape}; it must be (points,), two or more, as from losses_along.")
    return jnp.max(losses) - jnp.maximum(losses[0], losses[-1])


def _leaves(name: str, params: PyTree) -> tuple[Array, Array]:
    try:
        w_DxN, a_NxO = params["first"]["w"], params["readout"]["w"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: needs the parameters of paperjax.models.two_layer, first/w and readout/w. A readout that is not trained is Frozen: "
            "give {**params, 'readout': params['readout'].value}."
        ) from error
    if w_DxN.ndim != 2 or a_NxO.ndim != 2 or w_DxN.shape[1] != a_NxO.shape[0]:
        raise ValueError(f"{name}: first/w has shape {w_DxN.shape} and readout/w {a_NxO.shape}; they must be (D, N) and (N, O).")
    return w_DxN, a_NxO
