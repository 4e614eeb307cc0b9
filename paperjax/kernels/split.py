"""The two kernels that a prediction needs."""

from typing import Any, NamedTuple

from jaxtyping import PyTree

from paperjax.kernels.ntk import ntk


class TrainTest(NamedTuple):
    """Kernels of the training examples with themselves and of the test examples with them.

    Attributes
    ----------
    train
        ``(N, N, ...)``.
    test
        ``(M, N, ...)``.
    """

    train: Any
    test: Any


def train_test(model: Any, params: PyTree, x_train: Any, x_test: Any, **options: Any) -> TrainTest:
    """The kernels ``K(x_train, x_train)`` and ``K(x_test, x_train)``, from which `paperjax.predict` says what training does.

    Parameters
    ----------
    model, params, options
        As for `ntk`.
    x_train, x_test
        Batches, ``(N, *features)`` and ``(M, *features)``.

    Returns
    -------
    TrainTest

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from paperjax.kernels import predict
    >>> from paperjax.model import Model
    >>> linear = Model(lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
    >>> k = train_test(linear, jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[1.0, 1.0]]))
    >>> bool(jnp.allclose(predict.gradient_flow(k.train, jnp.array([[3.0], [4.0]]), k.test)(jnp.inf).test, 7.0))
    True
    """
    return TrainTest(ntk(model, params, x_train, **options), ntk(model, params, x_test, x_train, **options))
