"""How well a network does: error, accuracy and loss on the training and on the test examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from paperjax.model import Model, split


def misclassified(f: Float[Array, "batch *outputs"], y: Any) -> Scalar:
    """Share of the examples that the outputs `f` put in another class than `y`.

    Parameters
    ----------
    f
        Scores ``(batch, classes)``: the class is their argmax. Or one output per example, ``(batch,)`` or ``(batch, 1)``: the
        class is its sign, and 0 is wrong.
    y
        Integer classes ``(batch,)``, one-hot or other targets ``(batch, classes)``, or labels ±1 of the shape of `f`.

    Returns
    -------
    Array
        In [0, 1]; NaN if an output is not finite.

    Raises
    ------
    ValueError
        If the labels do not fit the outputs.

    Examples
    --------
    >>> misclassified(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1]))
    Array(0.5, dtype=float32)
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        if f.ndim < 2 or f.shape[-1] < 2 or y.shape != f.shape[:-1]:
            raise ValueError(
                f"error: integer labels of shape {y.shape} do not fit outputs of shape {f.shape}, which must be (*labels' shape, classes)."
            )
        return _share(jnp.argmax(f, axis=-1) != y, f)
    if y.shape != f.shape:
        raise ValueError(
            f"error: labels of shape {y.shape} do not fit outputs of shape {f.shape}; they must be equal, or the labels integers."
        )
    if f.ndim == 1 or f.shape[-1] == 1:
        return _share(jnp.sign(f) != jnp.sign(y), f)
    return _share(jnp.argmax(f, axis=-1) != jnp.argmax(y, axis=-1), f)


def _share(wrong: Array, like: Array) -> Scalar:
    # The argmax of NaN is a class like any other: a diverged network would pass for one that guesses.
    return jnp.where(jnp.isfinite(like).all(), jnp.mean(wrong.astype(like.dtype)), jnp.nan)


def error(model: Model, params: PyTree, data: Any) -> Scalar:
    """Share of test examples put in the wrong class; see `misclassified`.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x_test=jnp.array([[1.0], [2.0], [4.0], [-3.0]]), y_test=jnp.array([[1.0], [1.0], [1.0], [1.0]]))
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> error(line, jnp.ones((1, 1)), data)  # The sign of -3 is wrong.
    Array(0.25, dtype=float32)
    """
    return misclassified(model.apply(params, data.x_test), data.y_test)


def accuracy(model: Model, params: PyTree, data: Any) -> Scalar:
    """Share of test examples put in the right class, ``1 - error``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x_test=jnp.array([[1.0], [2.0], [4.0], [-3.0]]), y_test=jnp.array([[1.0], [1.0], [1.0], [1.0]]))
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> accuracy(line, jnp.ones((1, 1)), data)
    Array(0.75, dtype=float32)
    """
    return 1 - error(model, params, data)


def train_error(model: Model, params: PyTree, data: Any) -> Scalar:
    """Share of training examples put in another class than their (possibly wrong) label; see `misclassified`.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0], [2.0], [4.0], [-3.0]]), y_train=jnp.array([[1.0], [1.0], [1.0], [1.0]]))
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> train_error(line, -jnp.ones((1, 1)), data)  # With the opposite sign the other three are wrong.
    Array(0.75, dtype=float32)
    """
    return misclassified(model.apply(params, data.x_train), data.y_train)


def train_accuracy(model: Model, params: PyTree, data: Any) -> Scalar:
    """Share of training examples put in the class of their label, ``1 - train_error``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0], [2.0], [4.0], [-3.0]]), y_train=jnp.array([[1.0], [1.0], [1.0], [1.0]]))
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> train_accuracy(line, -jnp.ones((1, 1)), data)
    Array(0.25, dtype=float32)
    """
    return 1 - train_error(model, params, data)


def test_loss(model: Model, params: PyTree, data: Any, loss: Callable[..., Any]) -> Scalar:
    """The Experiment's loss on all test examples.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x_test=jnp.array([[1.0], [2.0], [4.0], [-3.0]]), y_test=jnp.array([[1.0], [1.0], [1.0], [1.0]]))
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> from paperjax.losses import mse
    >>> test_loss(line, jnp.ones((1, 1)), data, mse)  # (0 + 1 + 9 + 16) / 4
    Array(6.5, dtype=float32)
    """
    return loss(model.apply(params, data.x_test), data.y_test)


def parameter_change(params: PyTree, params0: PyTree) -> Scalar:
    """Relative distance from the initialization, ``|theta - theta_0| / |theta_0|`` over the trained parameters.

    Of order 1 in width under muP and of order ``width^-1/2`` under NTP (Chizat et al., arXiv 1812.07956, call the second lazy).

    Examples
    --------
    >>> parameter_change({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([2.0, 0.0])})
    Array(0.5, dtype=float32)
    """

    def squared(tree: PyTree) -> Array:
        return jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]))

    now, before = split(params)[0], split(params0)[0]
    return jnp.sqrt(squared(jax.tree.map(lambda a, b: a - b, now, before)) / squared(before))
