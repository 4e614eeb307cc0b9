"""Losses as functions ``loss(f, y) -> scalar`` of outputs and labels, and the labels that each of them takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from paperjax.binding import nearest


def mse(f: Float[Array, "batch *outputs"], y: Any) -> Scalar:
    """Mean squared error, ``(1 / (B O)) sum_bo (f_bo - y_bo)^2``, over examples and outputs; no factor ½.

    Parameters
    ----------
    f, y
        Floating-point arrays of one shape, ``(batch, *outputs)``.

    Raises
    ------
    ValueError
        If the shapes differ: ``(B,)`` against ``(B, 1)`` would broadcast to ``(B, B)``.
    TypeError
        If `y` holds integers.

    Examples
    --------
    >>> mse(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]]))
    Array(2.5, dtype=float32)
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"loss 'mse' needs floating-point targets, and y is {y.dtype}{list(y.shape)}: class labels, it seems. "
            "Use paperjax.data.one_hot(data), or loss='cross_entropy'."
        )
    _same_shape("mse", f, y)
    return jnp.mean(jnp.square(f - y))


def cross_entropy(f: Float[Array, "batch *classes"], y: Any) -> Scalar:
    """Mean cross-entropy of softmax scores, ``-(1/B) sum_b sum_c y_bc log softmax(f_b)_c``, in nats.

    Parameters
    ----------
    f
        Scores, ``(*batch, classes)``.
    y
        Integer class labels ``(*batch,)``, or probabilities of the shape of `f`.

    Raises
    ------
    ValueError
        If `y` is neither, or there is one class only (use 'logistic').

    Examples
    --------
    >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])) == jnp.log(4.0)
    Array(True, dtype=bool)
    """
    if f.ndim < 2 or f.shape[-1] < 2:
        raise ValueError(
            f"loss 'cross_entropy' needs scores of at least two classes, and the model returns shape {f.shape}. "
            "For one output use 'logistic'."
        )
    log_p = jax.nn.log_softmax(f, axis=-1)
    if jnp.issubdtype(y.dtype, jnp.integer):
        if y.shape != f.shape[:-1]:
            raise ValueError(
                f"loss 'cross_entropy': integer labels of shape {y.shape} do not fit scores of shape {f.shape}; they "
                f"must be {f.shape[:-1]}."
            )
        # Not by a gather, on which XLA's partitioner ends the process where scores, cells and batches are all divided (jaxlib 0.10.2).
        chosen = y.astype(jnp.int32)[..., None] == jax.lax.broadcasted_iota(jnp.int32, f.shape, f.ndim - 1)
        picked = jnp.sum(jnp.where(chosen, log_p, 0.0), axis=-1)
        return -jnp.mean(jnp.where(chosen.any(-1), picked, jnp.nan))
    _same_shape("cross_entropy", f, y)
    return -jnp.mean(jnp.sum(y * log_p, axis=-1))


def logistic(f: Float[Array, "batch *outputs"], y: Any) -> Scalar:
    """Mean logistic loss, ``(1/B) sum_b log(1 + exp(-y_b f_b))``, for labels ±1.

    Parameters
    ----------
    f, y
        Floating-point arrays of one shape.

    Raises
    ------
    ValueError, TypeError
        As `mse` does.

    Examples
    --------
    >>> logistic(jnp.zeros(3), jnp.array([1.0, -1.0, 1.0])) == jnp.log(2.0)
    Array(True, dtype=bool)
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"loss 'logistic' needs floating-point labels ±1, and y is {y.dtype}{list(y.shape)}. Write 2.0 * y - 1.0.")
    _same_shape("logistic", f, y)
    return jnp.mean(jax.nn.softplus(-y * f))


def check_labels(loss: Callable[..., Any], y: np.ndarray, outputs: tuple[int, ...], what: str = "the labels") -> None:
    """Refuse label values that `cross_entropy` or `logistic` would take for others; shapes and dtypes they refuse themselves.

    Parameters
    ----------
    loss
        One of this module; any other takes what labels it likes.
    y
        The labels.
    outputs
        Shape of the network's output, classes last.
    what
        How the message calls them.

    Raises
    ------
    ValueError
        If integer classes do not lie in ``0..classes - 1``, or the labels of `logistic` are not ±1.

    Examples
    --------
    >>> check_labels(cross_entropy, np.array([0, 1]), (2, 2))
    """
    classes = outputs[-1]
    if loss is cross_entropy and np.issubdtype(y.dtype, np.integer) and y.size and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"loss 'cross_entropy': {what} lie in {y.min()}..{y.max()}, and {classes} outputs have the classes "
            f"0..{classes - 1}. Renumber the labels, or change the number of outputs."
        )
    if loss is logistic and not (np.abs(y) == 1).all():
        raise ValueError(f"loss 'logistic' needs labels ±1, and {what} hold {y[np.abs(y) != 1][0]}. From 0 and 1: 2.0 * y - 1.0.")


def _same_shape(name: str, f: Any, y: Any) -> None:
    if f.shape != y.shape:
        raise ValueError(
            f"loss {name!r}: the model returns shape {f.shape} and the labels have shape {y.shape}. They must be equal: "
            "reshape the labels, or change the number of outputs."
        )


NAMED: dict[str, Callable[..., Any]] = {"mse": mse, "cross_entropy": cross_entropy, "logistic": logistic}


def resolve_loss(loss: str | Callable[..., Any]) -> Callable[..., Any]:
    """A loss by its name, or the callable itself.

    Raises
    ------
    ValueError
        If the name is unknown; the message has the nearest.
    TypeError
        If `loss` is neither a name nor a callable.

    Examples
    --------
    >>> resolve_loss("mse") is mse
    True
    """
    if isinstance(loss, str):
        name = loss.replace("-", "_")
        if name not in NAMED:
            raise ValueError(f"unknown loss {loss!r}. {nearest(name, NAMED)} Or pass a callable loss(f, y) -> scalar.")
        return NAMED[name]
    if not callable(loss):
        raise TypeError(f"loss must be a name ({', '.join(NAMED)}) or a callable loss(f, y) -> scalar, not {loss!r}.")
    return loss
