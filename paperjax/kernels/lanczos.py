"""Largest eigenvalues of a kernel too large to hold, from its products with vectors."""

import warnings
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from paperjax.kernels.matrix import check_finite, precision


class Lanczos(NamedTuple):
    """Largest eigenvalues, and how far each is from being one.

    Attributes
    ----------
    eigenvalues
        ``(k,)``, descending.
    vectors
        ``(k, *shape)``, orthonormal; ``vectors[i]`` belongs to ``eigenvalues[i]``.
    residuals
        ``(k,)``, the norms of ``K v - lambda v``. Some eigenvalue of K is that close.
    converged
        ``(k,)``, whether the residual is at most `tol` times the largest eigenvalue.
    products
        How often the operator was applied.
    """

    eigenvalues: Array
    vectors: Array
    residuals: Array
    converged: Array
    products: int


def lanczos(
    operator: Callable[[Array], Array],
    shape: tuple[int, ...],
    k: int,
    *,
    key: PRNGKeyArray,
    steps: int | None = None,
    max_steps: int = 512,
    tol: float | None = None,
) -> Lanczos:
    """The k largest eigenvalues and eigenvectors of a symmetric operator, by Lanczos through matfree.

    One run finds an eigenvalue once, however often it occurs. A kernel shared over O outputs has each O times. So what has
    converged is projected out and the rest is run again from another start, until it has nothing larger than what was found: at least
    two runs. A run in which nothing converges is followed by one of twice the steps, up to `max_steps`.

    Parameters
    ----------
    operator
        ``v -> K v``, symmetric, on arrays of `shape`: for an NTK ``(N, *out)``.
    shape
        Of the arrays.
    k
        How many.
    key
        Of the random starts.
    steps
        Products in the first run; by default ``2 k + 20``. More are needed the closer eigenvalues lie.
    max_steps
        Of one run; it holds that many vectors.
    tol
        Relative residual that counts as converged; by default the rounding unit to the power 2/3, 2e-5 in float32.

    Returns
    -------
    Lanczos
        In the floating dtype of jax (float64 if ``jax_enable_x64`` is on). A warning tells if one has not converged. Not to be
        traced: how many runs there are depends on values.

    Raises
    ------
    ValueError
        If k is not between 1 and the dimension, the operator changes shape or dtype or returns NaN, or is clearly not symmetric.

    References
    ----------
    Golub and Van Loan, Matrix Computations, Chapter 10; matfree's ``decomp.hessenberg``, with full reorthogonalization.

    Examples
    --------
    >>> weights = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> [round(float(value), 3) for value in lanczos(lambda v: weights * v, (2, 2), 3, key=jax.random.key(0)).eigenvalues]
    [5.0, 5.0, 3.0]
    """
    dimension = prod(shape)
    dtype = jnp.result_type(float)
    if not 1 <= k <= dimension:
        raise ValueError(f"k = {k}: it must be from 1 to {dimension}, the product of shape {tuple(shape)}.")
    _check_operator(operator, tuple(shape), dtype)
    eps = precision(jnp.zeros((), dtype))
    tol = float(eps ** (2 / 3)) if tol is None else tol
    if not 0 < tol < 1:
        raise ValueError(f"tol = {tol}: it must be between 0 and 1.")
    key, probe = jax.random.split(key)
    _check_symmetric(operator, shape, probe, dtype, eps)

    def flat(v: Array) -> Array:
        return operator(v.reshape(shape)).reshape(-1)

    if (steps is not None and steps < 1) or max_steps < k:
        raise ValueError(f"steps = {steps} and max_steps = {max_steps}: at least 1, and at least k = {k}.")
    steps, most = min(dimension, max_steps, 2 * k + 20 if steps is None else steps), min(dimension, max_steps)
    # Compiled once, with rows of zeros where there is no vector: the operator may be a whole network, and is run from many starts.
    krylov: Callable[..., tuple[Array, Array]] = jax.jit(partial(_krylov, flat), static_argnames="steps")
    residuals_of: Callable[..., Array] = jax.jit(partial(_residuals, flat))
    locked, held = jnp.zeros((k, dimension), dtype), np.zeros(0)
    products, largest = 2, 0.0
    while True:
        key, start = jax.random.split(key)
        basis, hessenberg = krylov(jax.random.normal(start, (dimension,), dtype), locked, 2 * largest, steps=steps)
        values, rotation = _ritz(np.asarray(hessenberg), eps, k)
        vectors = _combined(jnp.asarray(rotation, dtype), basis)
        residuals = np.asarray(residuals_of(_filled(values, k, dtype), vectors))[: len(values)]
        products += steps + k
        largest = max(np.abs(values).max(), *np.abs(held[:1]), 0.0)
        # Of the new ones only those count that would be among the largest: the others would be found again.
        new = values > (held[-1] if len(held) == k else -np.inf) + tol * largest
        good = new & (residuals <= tol * largest)
        if not new.any():
            break
        if good.any() or steps == most:
            chosen = good if good.any() else np.ones(len(values), bool)
            candidates = np.concatenate([held, values[chosen]])
            rows = np.concatenate([np.arange(len(held)), k + np.flatnonzero(chosen)])
            order = np.argsort(-candidates)[:k]
            held, locked = candidates[order], _picked(locked, vectors, np.append(rows[order], np.full(k - len(order), 2 * k)))
            if not good.any():
                break
        else:
            steps = min(most, 2 * steps)
    # A new vector is orthogonal to the old ones only up to its residual.
    eigenvalues, eigenvectors, residuals = jax.jit(partial(_rayleigh, flat))(locked[: len(held)])
    converged = residuals <= tol * jnp.abs(eigenvalues).max()
    if not bool(converged.all()):
        warnings.warn(
            f"lanczos: {int((~converged).sum())} of {k} eigenpairs have not converged; the largest residual is "
            f"{float(residuals.max()):.3g}, for {tol * float(jnp.abs(eigenvalues).max()):.3g} asked. Give more max_steps (now {max_steps}) "
            "or a coarser tol.",
            stacklevel=2,
        )
    return Lanczos(eigenvalues, eigenvectors.reshape(-1, *shape), residuals, converged, products + k)


def _krylov(flat: Callable[[Array], Array], start: Array, locked: Array, sink: Any, *, steps: int) -> tuple[Array, Array]:
    """Krylov vectors, as rows, and Hessenberg matrix of the operator with the locked vectors projected out."""
    from matfree import decomp

    def inside(v: Array) -> Array:
        return jnp.matmul(jnp.matmul(locked, v, precision="highest"), locked, precision="highest")

    def rest(v: Array) -> Array:
        # What rounding leaves of the locked vectors must not pass for the eigenvalue 0, which is above negative ones.
        part = inside(v)
        image = flat(v - part)
        return image - inside(image) - sink * part

    basis, hessenberg, *_ = decomp.hessenberg(steps, reortho="full")(rest, start - inside(start))
    return jnp.asarray(basis), jnp.asarray(hessenberg)


def _ritz(hessenberg: np.ndarray, eps: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest Ritz values, descending, and their vectors in the basis, ``(k, steps)``, from the sound part of the Krylov space."""
    diagonal, below = np.diagonal(hessenberg), np.diagonal(hessenberg, -1)
    scale = np.maximum.accumulate(np.maximum(np.abs(diagonal[:-1]), below))
    # Where the next vector is rounding the space is exhausted, and what follows is not orthogonal to it. NaN is not greater either.
    whole = below > 100 * eps * scale
    size = len(diagonal) if whole.all() else int(whole.argmin()) + 1
    values, rotation = np.linalg.eigh(np.diag(diagonal[:size]) + np.diag(below[: size - 1], -1) + np.diag(below[: size - 1], 1))
    rows = rotation.T[::-1][:k]
    return values[::-1][:k], np.pad(rows, ((0, k - len(rows)), (0, len(diagonal) - size)))


@jax.jit
def _combined(rotation: Array, basis: Array) -> Array:
    # What follows the sound part may be NaN, which times 0 is NaN.
    return jnp.matmul(rotation, jnp.where((rotation != 0).any(axis=0)[:, None], basis, 0.0), precision="highest")


def _residuals(flat: Callable[[Array], Array], values: Array, vectors: Array) -> Array:
    return jnp.linalg.norm(jax.lax.map(flat, vectors) - values[:, None] * vectors, axis=1)


def _rayleigh(flat: Callable[[Array], Array], vectors: Array) -> tuple[Array, Array, Array]:
    """Rayleigh and Ritz's eigenvalues, descending, vectors and residuals in the space that these span."""
    basis = jnp.linalg.qr(vectors.T)[0].T
    moved = jax.lax.map(flat, basis)
    small = jnp.matmul(basis, moved.T, precision="highest")
    values, rotation = jnp.linalg.eigh((small + small.T) / 2)
    values, turn = values[::-1], rotation.T[::-1]
    best, moved = jnp.matmul(turn, basis, precision="highest"), jnp.matmul(turn, moved, precision="highest")
    return values, best, jnp.linalg.norm(moved - values[:, None] * best, axis=1)


@jax.jit
def _picked(one: Array, two: Array, rows: Any) -> Array:
    return jnp.concatenate([one, two, jnp.zeros_like(one[:1])])[rows]


def _filled(values: np.ndarray, k: int, dtype: Any) -> Array:
    return jnp.asarray(np.pad(values, (0, k - len(values))), dtype)


def _check_operator(operator: Callable[[Array], Array], shape: tuple[int, ...], dtype: Any) -> None:
    result = jax.eval_shape(operator, jax.ShapeDtypeStruct(shape, dtype))
    if getattr(result, "shape", None) != shape or result.dtype != dtype:
        raise ValueError(f"the operator takes arrays {dtype}{list(shape)} to {result}: it must keep shape and dtype.")


def _check_symmetric(operator: Callable[[Array], Array], shape: tuple[int, ...], key: PRNGKeyArray, dtype: Any, eps: float) -> None:
    u, v = jax.random.normal(key, (2, *shape), dtype)
    ku, kv = operator(u), operator(v)
    check_finite("what the operator returns", ku)
    one, two = jnp.vdot(u, kv), jnp.vdot(ku, v)
    size = jnp.linalg.norm(ku) * jnp.linalg.norm(v) + jnp.linalg.norm(u) * jnp.linalg.norm(kv)
    if bool(jnp.abs(one - two) > eps**0.5 * size):
        raise ValueError(f"the operator is not symmetric: <u, K v> = {float(one):.6g} and <K u, v> = {float(two):.6g} for random u and v.")
