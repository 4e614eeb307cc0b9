"""A training problem in the eigenbasis of its kernel, where every linear rule of training acts on one number at a time."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.kernels.matrix import (
    Form,
    check_finite,
    check_symmetric,
    fold,
    fold_kernel,
    form_of,
    known,
    precision,
    unfold,
    working,
)  # fmt: skip

# The textbook's loss, half the sum of squares, under which df/dt = -Theta (f - y).
HALF_SUM_OF_SQUARES = "half_sum_of_squares"


class Trajectory(NamedTuple):
    """Outputs during training.

    Attributes
    ----------
    train
        ``(*times, N, *out)``.
    test
        ``(*times, M, *out)``, or `None` without a test kernel.
    """

    train: Array
    test: Array | None


class Inputs(NamedTuple):
    """Kernels and labels that fit one another.

    Attributes
    ----------
    form
        How the kernels treat the outputs.
    train
        ``(blocks, n, n)``, symmetric.
    test
        ``(blocks, m, n)`` or `None`.
    y
        ``(N, *out)``.
    eps
        Rounding unit of the training kernel.
    """

    form: Form
    train: Array
    test: Array | None
    y: Array
    eps: float


class Modes(NamedTuple):
    """Eigenvectors of a training kernel.

    Attributes
    ----------
    form
        How the kernels treat the outputs.
    values
        ``(blocks, n)``, ascending; 0 where not told from 0.
    vectors
        ``(blocks, n, n)``, columns.
    test
        ``(blocks, m, n)``, the test kernel times the vectors, 0 where the value is; or `None`.
    y
        ``(N, *out)``.
    """

    form: Form
    values: Array
    vectors: Array
    test: Array | None
    y: Array


def read(k_train: Any, y: Any, k_test: Any = None, *, outputs: tuple[int, ...] | None = None) -> Inputs:
    """Check kernels and labels against one another, and fold the kernels.

    Parameters
    ----------
    k_train, y, k_test
        As in `paperjax.kernels.predict.gradient_flow`.
    outputs
        Of the network, if not those of `y`.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or `k_train` is not symmetric.
    TypeError
        If a kernel is no array.

    Examples
    --------
    >>> read(jnp.eye(2), jnp.ones((2, 3))).form.kind
    'shared'
    """
    for name, k in (("k_train", k_train), ("k_test", k_test)):
        if k is not None and not hasattr(k, "dtype"):
            how = (
                "sum(k.values()) of the leaves'" if isinstance(k, Mapping) else "its .ntk or .nngp" if hasattr(k, "nngp") else "jnp.asarray"
            )
            raise TypeError(f"{name} is a {type(k).__name__}, and must be one kernel, an array: {how}.")
    eps = precision(k_train)
    kernel, y = working(k_train), y if outputs is not None else _targets(y)
    if not y.size or not y.ndim:
        raise ValueError(f"y has shape {y.shape}: it must be (N, *out), one row for each training input, and not empty.")
    out = y.shape[1:] if outputs is None else outputs
    form = form_of(kernel, out)
    check_finite("k_train", kernel)
    check_finite("y", y)
    train = fold_kernel(kernel, form)
    check_symmetric("k_train", train, eps)
    if y.shape[0] != kernel.shape[0]:
        raise ValueError(f"y has {y.shape[0]} examples and k_train {kernel.shape[0]}: they must be of the same inputs.")
    test = None if k_test is None else _cross(working(k_test), kernel.shape, form)
    return Inputs(form, (train + train.mT) / 2, test, y, eps)


def decompose(inputs: Inputs, rtol: float | None = None) -> Modes:
    """Eigenvalues and eigenvectors, with what cannot be told from 0 set to 0.

    Parameters
    ----------
    inputs
        From `read`.
    rtol
        Eigenvalues below `rtol` times the largest count as 0. By default ``max(10, sqrt(n))`` times the rounding unit.

    Raises
    ------
    ValueError
        If the kernel has an eigenvalue that is negative beyond rounding.

    Examples
    --------
    >>> decompose(read(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.ones(2))).values.tolist()
    [[0.0, 2.0]]
    """
    if rtol is None:
        rtol = max(10.0, inputs.train.shape[-1] ** 0.5) * inputs.eps
    every, values, vectors, test = _eigen(inputs.train, inputs.test, rtol)
    check_positive("k_train", every, inputs.eps)
    return Modes(inputs.form, values, vectors, test, inputs.y)


@jax.jit
def _eigen(train: Array, test: Array | None, rtol: Any) -> tuple[Array, Array, Array, Array | None]:
    every, vectors = jnp.linalg.eigh(train)
    # A kept direction needs a positive eigenvalue also where rtol is 0.
    kept = (every > rtol * every.max()) & (every > 0)
    if test is not None:
        test = jnp.where(kept[:, None, :], jnp.matmul(test, vectors, precision="highest"), 0.0)
    return every, jnp.where(kept, every, 0.0), vectors, test


def check_positive(name: str, values: Array, eps: float) -> None:
    """Refuse eigenvalues that are negative by more than the root of the rounding unit, relative to the largest.

    Raises
    ------
    ValueError
        If there is one. Traced values pass.

    Examples
    --------
    >>> check_positive("k_train", jnp.array([-1e-9, 1.0]), 1e-7)
    """
    if known(values):
        lowest, highest = float(np.min(values)), float(np.abs(values).max())
        if lowest < -(eps**0.5) * highest:
            raise ValueError(
                f"{name} is not positive semi-definite: its lowest eigenvalue is {lowest:.3g}, and the largest in size is {highest:.3g}. "
                "An NTK has no negative one. A difference of kernels, a centred prediction or a wrong order of axes has."
            )


def moved(modes: Modes, gain: Array, f0_train: Any, f0_test: Any) -> Trajectory:
    """Outputs when training has moved eigenvector i of the residual by ``-gain_i`` in weight space.

    ``f = f0 - K g(K) (f0 - y)`` and ``f_test = f0_test - K_test g(K) (f0 - y)`` with ``g(lambda_i) = gain_i``: the solution of
    every training rule that is linear in the residual, with a gain of its own.

    Parameters
    ----------
    modes
        From `decompose`.
    gain
        ``(*times, blocks, n)``, finite; where the eigenvalue is 0 it does not matter.
    f0_train, f0_test
        Outputs before training, ``(N, *out)`` and ``(M, *out)``; `None` is zero.

    Raises
    ------
    ValueError
        If one of the two is missing, or their shapes do not fit.

    Examples
    --------
    >>> modes = decompose(read(2 * jnp.eye(2), jnp.ones(2)))
    >>> moved(modes, 0.25 * jnp.ones((1, 2)), None, None).train
    Array([0.5, 0.5], dtype=float32)
    """
    start_train, start_test = starts(modes.form, modes.y.shape[0], modes.test, f0_train, f0_test)
    return _moved(modes.form, modes[1:], gain, start_train, start_test)


@partial(jax.jit, static_argnums=0)
def _moved(form: Form, modes: tuple[Any, ...], gain: Array, start_train: Array, start_test: Array | None) -> Trajectory:
    values, vectors, test, y = modes
    lead = (None,) * (gain.ndim - 2)
    residual = fold(start_train - y, form)
    weights = gain[..., None] * jnp.einsum("bij,biq->bjq", vectors, residual, precision="highest")[lead]

    def after(start: Array, maps: Array, weights: Array) -> Array:
        return start[lead] - unfold(jnp.einsum("bij,...bjq->...biq", maps, weights, precision="highest"), form)

    train = after(start_train, vectors, values[lead][..., None] * weights)
    return Trajectory(train, None if start_test is None else after(start_test, test, weights))


def starts(form: Form, examples: int, test: Array | None, f0_train: Any, f0_test: Any) -> tuple[Array, Array | None]:
    """Outputs before training, checked; zero where none are given.

    Examples
    --------
    >>> starts(Form("shared", (1,)), 2, None, None, None)[0].shape
    (2, 1)
    """
    if test is None and f0_test is not None:
        raise ValueError("f0_test is given, and no k_test: give k_test, the kernel (test, train), where the prediction is set up.")
    if test is not None and (f0_train is None) != (f0_test is None):
        have, lack = ("f0_train", "f0_test") if f0_test is None else ("f0_test", "f0_train")
        raise ValueError(f"{have} is given and {lack} is not: give the outputs before training on both, or neither, which is 0 on both.")
    tests = None if test is None else test.shape[1] // (prod(form.outputs) if form.kind == "full" else 1)

    def start(name: str, given: Any, n: int) -> Array:
        if given is None:
            return jnp.asarray(np.zeros((n, *form.outputs)), jnp.result_type(float))
        given = working(given)
        check_finite(name, given)
        if given.shape != (n, *form.outputs):
            raise ValueError(f"{name} has shape {given.shape}, and the kernel and y ask for {(n, *form.outputs)}.")
        return given

    return start("f0_train", f0_train, examples), None if tests is None else start("f0_test", f0_test, tests)


@jax.jit
def flow_gain(values: Array, times: Array, rate: Any) -> Array:
    """The gain of gradient flow, ``(1 - exp(-c lambda t)) / lambda``, and 0 at the eigenvalue 0.

    Examples
    --------
    >>> flow_gain(jnp.array([[0.0, 2.0]]), jnp.array(jnp.inf), 1.0).tolist()
    [[0.0, 0.5]]
    """
    kept = values > 0
    # Not 0 where nothing is kept: 0 times an infinite time is NaN.
    safe = jnp.where(kept, values, 1.0)
    lead = (None,) * times.ndim
    return jnp.where(kept[lead], -jnp.expm1(-rate * times[..., None, None] * safe[lead]) / safe[lead], 0.0)


def rate_of(loss: Any, y: Array) -> float:
    """The factor c in ``df/dt = -c Theta (f - y)``.

    Raises
    ------
    ValueError
        If the loss is not a squared one.

    Examples
    --------
    >>> rate_of("mse", jnp.ones((2, 2))), rate_of("half_sum_of_squares", jnp.ones((2, 2)))
    (0.5, 1.0)
    """
    rates = {"mse": 2.0 / y.size, HALF_SUM_OF_SQUARES: 1.0}
    if not isinstance(loss, str) or loss not in rates:
        raise ValueError(
            f"loss {loss!r} has no closed form: it must be 'mse', the mean of (f - y)² over examples and outputs, or "
            f"{HALF_SUM_OF_SQUARES!r}. For any other use paperjax.kernels.predict.gradient_flow_ode."
        )
    return rates[loss]


def _targets(y: Any) -> Array:
    if not hasattr(y, "dtype"):
        y = jnp.asarray(y)
    if jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == bool:
        raise TypeError(
            f"y is {y.dtype}{list(y.shape)}: class labels, it seems. A squared loss needs floating-point targets: paperjax.data.one_hot."
        )
    return working(y)


def _cross(kernel: Array, train: tuple[int, ...], form: Form) -> Array:
    if kernel.ndim != len(train) or kernel.shape[1:] != train[1:]:
        swapped = kernel.shape[:1] == train[1:2] and kernel.shape[2:] == train[2:]
        raise ValueError(
            f"k_test has shape {kernel.shape}, and k_train {train}: it must be (M, {', '.join(map(str, train[1:]))}), test inputs "
            f"first, as ntk(model, params, x_test, x_train) gives.{' This one is the other way round.' if swapped else ''}"
        )
    check_finite("k_test", kernel)
    return fold_kernel(kernel, form)
