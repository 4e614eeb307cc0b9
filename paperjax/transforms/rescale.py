"""A network times a number: the scale that sets how lazily it trains."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, PyTree, Real

from paperjax.model import Model


def rescale(model: Model, alpha: Real[ArrayLike, ""]) -> Model:
    """The network times a number: ``alpha f(theta, x)``.

    Gradients scale as alpha and the NTK as alpha². With the loss over alpha², or the learning rate times alpha^-2, the
    time scale is the same for every alpha, and training is lazy as alpha grows: relative changes of parameters and kernel fall as
    1 / alpha (Chizat, Oyallon and Bach, arXiv 1812.07956, Section 2). That holds for a network that is 0 at init:
    ``rescale(center(model), alpha)``.

    Parameters
    ----------
    model
        The network.
    alpha
        Any finite number. May be a traced scalar, so that a sweep over it is one compiled program; it is cast to the
        dtype of the output.

    Returns
    -------
    Model
        With the parameters of `model`.

    Raises
    ------
    ValueError
        If alpha is infinite or NaN. A traced alpha cannot be looked at.

    Examples
    --------
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> rescale(line, 10.0).apply(jnp.ones((1, 1)), jnp.array([[0.5]])).tolist()
    [[5.0]]
    """
    if not isinstance(alpha, Tracer) and not np.isfinite(np.asarray(alpha)):
        raise ValueError(f"rescale: alpha = {alpha}, but the scale of a network is a finite number. A division by 0 in a sweep?")

    def apply(params: PyTree, x: Any) -> PyTree:
        return jax.tree.map(lambda y: jnp.asarray(alpha).astype(y.dtype) * y, model.apply(params, x))

    return Model(model.init, apply)
