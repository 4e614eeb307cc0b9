"""Gaussian predictions: regression with a Gaussian process, and the ensemble of networks that gradient flow trains."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.kernels.matrix import (
    Form,
    Numbers,
    check_finite,
    check_symmetric,
    fold,
    fold_kernel,
    form_of,
    known,
    precision,
    unfold,
    unfold_kernel,
    working,
)  # fmt: skip
from paperjax.kernels.modes import Inputs, decompose, flow_gain, rate_of, read


class Solution(NamedTuple):
    """Of a regularised linear system.

    Attributes
    ----------
    x
        ``(N, *out)``.
    jitter
        What was added to the diagonal besides the ridge, to make the matrix positive definite in the precision at hand.
    """

    x: Array
    jitter: Array


class Gaussian(NamedTuple):
    """A Gaussian of the outputs on the test inputs.

    Attributes
    ----------
    mean
        ``(M, *out)``.
    covariance
        In the kernels' layout: ``(M, M)``, of every output apart, ``(M, M, *out)`` or ``(M, M, *out, *out)``.
    """

    mean: Array
    covariance: Array


class Posterior(NamedTuple):
    """A Gaussian of the outputs on the test inputs, and how it was computed.

    Attributes
    ----------
    mean, covariance
        As in `Gaussian`.
    jitter
        What was added to the training kernel's diagonal besides the noise.
    """

    mean: Array
    covariance: Array
    jitter: Array


class Prior(NamedTuple):
    """Covariances of the outputs before training: the NNGP kernel, in any layout of the NTK it goes with, or shared over outputs.

    Attributes
    ----------
    train
        ``(N, N, ...)``.
    cross
        ``(M, N, ...)``, test inputs first.
    test
        ``(M, M, ...)``.
    """

    train: Numbers
    cross: Numbers
    test: Numbers


def solve(kernel: Numbers, rhs: Any, *, ridge: Any = 0.0) -> Solution:
    """Solve ``(K + ridge + jitter) x = rhs`` by Cholesky, with the least jitter that works.

    The jitter is 0, or else 10 rounding units of the mean diagonal times the least power of 10 with which every pivot stands clear
    of rounding (n rounding units of the largest diagonal entry).

    Parameters
    ----------
    kernel
        ``(N, N)``, ``(N, N, *out)`` or ``(N, N, *out, *out)``.
    rhs
        ``(N, *out)``, floating.
    ridge
        Added to the diagonal, 0 or more.

    Returns
    -------
    Solution
        With the jitter, of which a warning tells if it is not 0; another tells of a condition number beyond ``UNSURE`` over the
        rounding unit. Float64 if ``jax_enable_x64`` is on, else float32.

    Raises
    ------
    ValueError
        As `paperjax.kernels.predict.gradient_flow`, or if a jitter of ``10 n`` roots of the rounding unit does not suffice: the kernel
        is not positive semi-definite.

    Examples
    --------
    >>> solve(jnp.array([[1.0, 0.0], [0.0, 4.0]]), jnp.array([2.0, 2.0])).x.tolist()
    [2.0, 0.5]
    """
    inputs = read(kernel, rhs)
    factor, jitter = _factor(inputs, ridge, "solve")
    x = jax.scipy.linalg.cho_solve((factor, True), fold(inputs.y, inputs.form))
    return Solution(unfold(x, inputs.form), jitter)


def posterior(k_train: Numbers, y: Any, k_test: Numbers, k_test_test: Numbers, *, noise: Any = 0.0) -> Posterior:
    """Gaussian-process regression with a given kernel: mean and covariance of the function on the test inputs.

    ``mean = K_* (K + σ²)^-1 y`` and ``cov = K_** - K_* (K + σ²)^-1 K_*ᵀ``. With the NNGP kernel it is Bayesian inference in a wide
    network; with the NTK its mean, at σ² = 0, is that of gradient flow at infinite time, and its covariance is not
    (`ensemble_posterior` has that).

    Parameters
    ----------
    k_train, y, k_test
        As in `paperjax.kernels.predict.gradient_flow`.
    k_test_test
        ``(M, M, ...)`` in the layout of `k_train`.
    noise
        σ², the variance of the labels around the function. The covariance is the function's: labels to come have σ² more.

    Returns
    -------
    Posterior
        Mean, covariance and the jitter, as in `solve`. Float64 if ``jax_enable_x64`` is on, else float32, where a covariance below
        about 1e-6 of the prior's is rounding and may be negative.

    Raises
    ------
    ValueError
        As `solve`.

    References
    ----------
    Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, eqs. 2.25 and 2.26.

    Examples
    --------
    >>> answer = posterior(jnp.eye(1), jnp.array([4.0]), jnp.array([[1.0]]), jnp.array([[2.0]]), noise=3.0)
    >>> answer.mean.tolist(), answer.covariance.tolist(), float(answer.jitter)
    ([1.0], [[1.75]], 0.0)
    """
    inputs = read(k_train, y, k_test)
    prior = _square("k_test_test", k_test_test, inputs.form)
    cross = _present(inputs)
    _same_tests("k_test_test", prior.shape[1], cross.shape[1])
    factor, jitter = _factor(inputs, noise, "posterior")
    whitened = jax.scipy.linalg.solve_triangular(factor, cross.mT, lower=True)
    targets = jax.scipy.linalg.solve_triangular(factor, fold(inputs.y, inputs.form), lower=True)
    mean = jnp.matmul(whitened.mT, targets, precision="highest")
    covariance = prior - jnp.matmul(whitened.mT, whitened, precision="highest")
    return Posterior(unfold(mean, inputs.form), unfold_kernel(covariance, inputs.form), jitter)


def ensemble_posterior(
    k_train: Numbers, y: Any, k_test: Numbers, nngp: Prior, *, t: Any = np.inf, loss: str = "mse", rtol: float | None = None
) -> Gaussian:
    """Outputs on the test inputs, over random initializations, of wide networks after gradient flow.

    The network starts as a Gaussian process with the NNGP kernel 𝒦, and each one flows under the NTK Θ. With
    ``A = Θ_* Θ^-1 (1 - exp(-c Θ t))``,

    ``mean = A y`` and ``cov = 𝒦_** - A 𝒦_*ᵀ - 𝒦_* Aᵀ + A 𝒦 Aᵀ``.

    Parameters
    ----------
    k_train, y, k_test, loss, rtol
        As in `paperjax.kernels.predict.gradient_flow`; the kernels are the NTK.
    nngp
        `Prior` of the three NNGP kernels, each in the layout of `k_train` or shared over outputs.
    t
        Time of training, a number; by default until convergence.

    Returns
    -------
    Gaussian
        Mean and covariance; float64 if ``jax_enable_x64`` is on, else float32. Directions in which Θ cannot be told from 0 stay as they
        began (see `rtol`), so nothing need be added to Θ.

    Raises
    ------
    ValueError
        As `gradient_flow`, and if the NNGP kernels do not fit the NTK.

    References
    ----------
    Lee et al., arXiv 1902.06720, Section 2.3, where c = 1.

    Examples
    --------
    >>> ntk, nngp = jnp.array([[2.0]]), Prior(jnp.array([[1.0]]), jnp.array([[0.5]]), jnp.array([[1.0]]))
    >>> answer = ensemble_posterior(ntk, jnp.array([3.0]), jnp.array([[1.0]]), nngp)
    >>> answer.mean.tolist(), answer.covariance.tolist()  # A = 1/2: 1 - 2/4 + 1/4
    ([1.5], [[0.75]])
    """
    inputs = read(k_train, y, k_test)
    rate = rate_of(loss, inputs.y)
    time = working(t)
    if time.ndim or (known(time) and not bool(time >= 0)):
        raise ValueError(f"t = {t}: one time, 0 or more.")
    cross = _present(inputs)
    start = _square("nngp.train", nngp.train, inputs.form)
    _same_tests("nngp.train", start.shape[1], inputs.train.shape[1])
    before = _square("nngp.test", nngp.test, inputs.form)
    _same_tests("nngp.test", before.shape[1], cross.shape[1])
    between = _expand("nngp.cross", nngp.cross, inputs.form)
    if between.shape != cross.shape:
        raise ValueError(
            f"nngp.cross is {between.shape[1:]} as a matrix, and k_test {cross.shape[1:]}: both are (test, train), of the same inputs."
        )
    modes = decompose(inputs, rtol)
    assert modes.test is not None
    gains = flow_gain(modes.values, time, rate)
    carry = jnp.matmul(modes.test * gains[:, None, :], modes.vectors.mT, precision="highest")
    mixed = jnp.matmul(carry, between.mT, precision="highest")
    spread = jnp.matmul(jnp.matmul(carry, start, precision="highest"), carry.mT, precision="highest")
    mean = jnp.matmul(carry, fold(inputs.y, inputs.form), precision="highest")
    return Gaussian(unfold(mean, inputs.form), unfold_kernel(before - mixed - mixed.mT + (spread + spread.mT) / 2, inputs.form))


def _factor(inputs: Inputs, ridge: Any, name: str) -> tuple[Array, Array]:
    """Lower Cholesky factor with as much jitter as it takes, and the jitter."""
    ridge = working(ridge)
    if ridge.ndim or (known(ridge) and not 0 <= float(ridge) < np.inf):
        raise ValueError(f"{name}: the noise or ridge is {ridge}; it must be one number of 0 or more.")
    system = inputs.train + (ridge * jnp.eye(inputs.train.shape[-1], dtype=inputs.train.dtype))[None]
    jitter, clear = jax.lax.stop_gradient(_jitter(jax.lax.stop_gradient(system), inputs.eps))
    if known(jitter):
        if not bool(clear):
            if not bool(system.any()):
                raise ValueError(
                    f"{name}: k_train is 0 everywhere, and nothing can be divided by it. Give a noise or ridge, or leaves that count."
                )
            lowest = float(jnp.linalg.eigvalsh(inputs.train).min())
            raise ValueError(
                f"{name}: k_train is not positive semi-definite; its lowest eigenvalue is {lowest:.3g}, and adding {float(jitter):.3g} to "
                "its diagonal does not help. Is it the kernel of one set of inputs with itself? Else give a larger noise or ridge."
            )
        if float(jitter) > 0:
            finer = "jax_enable_x64, " if inputs.train.dtype == jnp.float32 else ""
            warnings.warn(
                f"{name}: k_train is singular in {inputs.train.dtype}, and {float(jitter):.3g} was added to its diagonal (mean "
                f"{float(jnp.trace(system[0])) / system.shape[1]:.3g}). Use {finer}a noise, or leave out repeated inputs.",
                stacklevel=3,
            )
    factor = _cholesky(system, jitter)
    if known(jitter) and float(jitter) == 0:
        worst = float(_condition(system, factor))
        if worst * inputs.eps > UNSURE:
            finer = "jax_enable_x64, " if inputs.train.dtype == jnp.float32 else ""
            warnings.warn(
                f"{name}: k_train has a condition number of about {worst:.1g}, and numbers in {inputs.train.dtype} are to a relative "
                f"{inputs.eps:.1g}: a solution need not have a digit right. Use {finer}a noise, or leave out inputs that are almost equal.",
                stacklevel=3,
            )
    return factor, jitter


UNSURE = 0.1
"""Condition number times rounding unit beyond which there is a warning: errors of a solution may be of about that size."""


@jax.jit
def _condition(system: Array, factor: Array) -> Array:
    """The condition number, or somewhat less, by ten steps of the power method for either end of the spectrum."""
    # Of no symmetry that an eigenvector might have.
    start = jnp.broadcast_to(
        jnp.cos(jnp.square(jnp.arange(1.0, system.shape[-1] + 1, dtype=system.dtype)))[:, None], (*system.shape[:2], 1)
    )

    def largest(product: Callable[[Array], Array]) -> Array:
        def step(v: Array, _: None) -> tuple[Array, Array]:
            found = product(v / jnp.linalg.norm(v, axis=1, keepdims=True))
            return found, jnp.linalg.norm(found, axis=(1, 2))

        return jax.lax.scan(step, start, None, length=10)[1][-1]

    return jnp.max(largest(lambda v: system @ v) * largest(lambda v: jax.scipy.linalg.cho_solve((factor, True), v)))


@partial(jax.jit, static_argnames="eps")
def _jitter(system: Array, eps: float) -> tuple[Array, Array]:
    """The least jitter with which the pivots are clear of rounding, and whether they are."""
    diagonal = jnp.abs(jnp.diagonal(system, axis1=1, axis2=2))
    n, size, least = system.shape[-1], diagonal.mean(), system.shape[-1] * eps * diagonal.max()

    def fails(jitter: Array) -> Array:
        # NaN, which a failed factorization holds, is not greater either.
        return ~(jnp.square(jnp.diagonal(_cholesky(system, jitter), axis1=1, axis2=2)) > least).all()

    def more(jitter: Array) -> Array:
        return jnp.where(jitter == 0, 10 * eps * size, 10 * jitter)

    most = 10 * n * eps**0.5 * size
    jitter = jax.lax.while_loop(lambda jitter: fails(jitter) & (jitter < most), more, jnp.zeros((), system.dtype))
    return jitter, ~fails(jitter)


def _cholesky(system: Array, jitter: Array) -> Array:
    return jnp.linalg.cholesky(system + (jitter * jnp.eye(system.shape[-1], dtype=system.dtype))[None], symmetrize_input=False)


def _expand(name: str, kernel: Any, form: Form) -> Array:
    """Blocks of a kernel in `form`, or of one shared over outputs brought into it."""
    kernel = working(kernel)
    check_finite(name, kernel)
    own = form_of(kernel, form.outputs, name)
    if own.kind not in (form.kind, "shared"):
        raise ValueError(
            f"{name} is of the kind {own.kind!r} and k_train {form.kind!r}: give one of the same layout, or one shared over outputs."
        )
    if own.kind == form.kind:
        return fold_kernel(kernel, form)
    size = int(np.prod(form.outputs))
    if form.kind == "diagonal":
        return jnp.broadcast_to(kernel[None], (size, *kernel.shape))
    return jnp.kron(kernel, jnp.eye(size, dtype=kernel.dtype))[None]


def _square(name: str, kernel: Any, form: Form) -> Array:
    blocks = _expand(name, kernel, form)
    check_symmetric(name, blocks, precision(kernel))
    return blocks


def _present(inputs: Inputs) -> Array:
    if inputs.test is None:
        raise ValueError("k_test is None: give the kernel (test, train).")
    return inputs.test


def _same_tests(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name} has {got} rows as a matrix, and the NTK or k_test asks for {wanted}: they must be of the same inputs.")
