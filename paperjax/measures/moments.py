"""How far a random coordinate is from a Gaussian one."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def excess_kurtosis(x: Float[Array, "..."], axis: Any = None) -> Array:
    """``mean x⁴ / (mean x²)² - 3`` of a coordinate of mean 0: 0 if it is Gaussian, 3 Var(v) / E[v]² if it is so with a random variance v.

    Of a pre-activation of a wide network it is the leading deviation from its Gaussian process, of order 1 / width. All units of a layer
    have one law, so take the means over them too; over D networks they are off by about the excess over D, downwards.

    Parameters
    ----------
    x
        Samples.
    axis
        Over which the means are; by default all.

    Returns
    -------
    Array
        Of the remaining axes; NaN where x is 0.

    Examples
    --------
    >>> excess_kurtosis(jnp.array([1.0, -1.0, 1.0, -1.0]))
    Array(-2., dtype=float32)
    """
    square = jnp.square(x)
    return jnp.mean(jnp.square(square), axis=axis) / jnp.square(jnp.mean(square, axis=axis)) - 3.0
