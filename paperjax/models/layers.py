"""What the models share: checks of sizes, Gaussian draws, and the way through repeated layers."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Inexact, PRNGKeyArray, PyTree, Real

Scalar = Real[ArrayLike, ""]
"""A Python number, or a traced scalar: a size that leaves shapes alone."""

Activation = Callable[[Array], Array]

Input = Array | np.ndarray

UNROLLED = 8
"""Up to this many layers the scan is unrolled: on a CPU the loop itself would cost up to a fifth of a training step."""


def check_sizes(model: str, **sizes: Any) -> None:
    """Refuse sizes that are not whole numbers of at least 1.

    Raises
    ------
    ValueError
        Naming the size.

    Examples
    --------
    >>> check_sizes("mlp", width=0)
    Traceback (most recent call last):
        ...
    ValueError: mlp: width = 0, but a size of the network is a whole number of at least 1. Likely a grid that starts at 0, ...
    """
    for name, value in sizes.items():
        if isinstance(value, Tracer):
            raise ValueError(
                f"{model}: {name} is a traced value, but it fixes shapes, so each value needs its own compiled program. "
                f"Pass {name} as a Python int, outside jit and vmap."
            )
        try:
            whole = operator.index(value)
        except TypeError:
            whole = 0
        if whole < 1 or isinstance(value, bool):
            raise ValueError(
                f"{model}: {name} = {value!r}, but a size of the network is a whole number of at least 1. "
                f"Likely a grid that starts at 0, or a quotient such as n / 2: give {name} >= 1 as an int (n // 2)."
            )


def check_scalars(model: str, signed: tuple[str, ...] = (), **scalars: Any) -> None:
    """Refuse variances and scales that are negative, infinite or NaN; traced values cannot be looked at and pass.

    Raises
    ------
    ValueError
        Naming the argument. Those in `signed` may be negative.
    """
    for name, value in scalars.items():
        if isinstance(value, Tracer):
            continue
        number = float(value)
        if not math.isfinite(number) or (number < 0 and name not in signed):
            wanted = "a finite number" if name in signed else "a finite number of at least 0"
            raise ValueError(f"{model}: {name} = {value}, but it must be {wanted}. A variance is the square of a standard deviation.")


def check_batch(model: str, x: Any, axes: tuple[str, ...], fix: str) -> None:
    """Refuse a batch that has other axes than the model takes, or is not floating point.

    Raises
    ------
    ValueError
        If the number of axes is not that of `axes`.
    TypeError
        If `x` is not floating point.
    """
    shape = jnp.shape(x)
    if len(shape) != len(axes):
        raise ValueError(f"{model}: x has shape {shape}, {len(shape)} axes, but the model takes ({', '.join(axes)}). {fix}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"{model}: x has dtype {jnp.result_type(x)}, but parameters take their dtype from x, which must be floating point. "
            "Labels passed as inputs, or raw bytes? Use x.astype('float32')."
        )


def constant(value: Scalar, dtype: Any) -> Float[Array, ""]:
    """A scalar in the network's own dtype, so that a traced float32 scale does not change it."""
    return jnp.asarray(value).astype(dtype)


def gaussian(key: PRNGKeyArray, shape: tuple[int, ...], variance: Scalar, dtype: Any) -> Inexact[Array, "..."]:
    """Independent draws from N(0, variance); zeros where the variance is known to be 0, which saves compiling the draw."""
    if isinstance(variance, int | float) and variance == 0:
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(constant(variance, dtype))


def dense(
    key: PRNGKeyArray,
    fan_in: int,
    fan_out: int,
    dtype: Any,
    *,
    variance: Scalar,
    bias: bool = False,
    bias_variance: Scalar = 0.0,
    stack: tuple[int, ...] = (),
) -> dict[str, Array]:
    """Draw ``w ~ N(0, variance / fan_in)`` with leading axes `stack`, and ``b ~ N(0, bias_variance)`` if there is one.

    Examples
    --------
    >>> layer = dense(jax.random.key(0), 4, 3, jnp.float32, variance=1.0, bias=True, stack=(2,))
    >>> jax.tree.map(jnp.shape, layer), float(layer["b"].sum())
    ({'b': (2, 3), 'w': (2, 4, 3)}, 0.0)
    """
    key_w, key_b = jax.random.split(key)
    # In this order a traced variance is divided in the network's dtype too.
    params = {"w": gaussian(key_w, (*stack, fan_in, fan_out), constant(variance, dtype) / fan_in, dtype)}
    if bias:
        params["b"] = gaussian(key_b, (*stack, fan_out), bias_variance, dtype)
    return params


def affine(layer: PyTree, x_BxD: Input) -> Array:
    """``x w + b``, the bias where there is one.

    Examples
    --------
    >>> affine({"w": jnp.ones((2, 1)), "b": jnp.array([0.5])}, jnp.array([[1.0, 2.0]]))
    Array([[3.5]], dtype=float32)
    """
    h_BxN = x_BxD @ layer["w"]
    return h_BxN + layer["b"][None, :] if "b" in layer else h_BxN


def through(block: Callable[[Array, PyTree], Array], h: Array, layers: PyTree) -> Array:
    """Apply ``h = block(h, layer)`` for each layer of a stack, whose leading axis is depth.

    A `jax.lax.scan`, so that compile time does not grow with depth; short stacks are unrolled (`UNROLLED`).

    Examples
    --------
    >>> through(lambda h, layer: 2 * h + layer, jnp.array(1.0), jnp.array([0.0, 1.0, 0.0]))  # 1, 2, 5, 10
    Array(10., dtype=float32)
    """
    depth = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(lambda h, layer: (block(h, layer), None), h, layers, unroll=depth if depth <= UNROLLED else 1)[0]
