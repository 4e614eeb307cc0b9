"""Norms and ranks of matrices, to be read off inside a measure."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar


def spectral_norm(w: Float[Array, "n m"], iterations: int = 32) -> Scalar:
    """Largest singular value, by the Lanczos method on ``w^T w``: two products with a vector for each iteration, and no factorization.

    A lower bound that is exact once `iterations` reaches the rank. For a matrix of low rank with noise, as an update is, it is exact to
    rounding; for one of independent entries (no gap below the largest singular value) 32 iterations come within 1 %.

    Of order 1 in the width for a hidden layer of variance 1/fan_in, whose norm tends to ``1 + sqrt(fan_out / fan_in)``
    (A Spectral Condition for Feature Learning, arXiv 2310.17813).

    Parameters
    ----------
    w
        Shape (n, m), real.
    iterations
        Dimension of the Krylov space, static; at most min(n, m) are taken.

    Returns
    -------
    Array
        A number of at least 0, in the dtype of `w`.

    Examples
    --------
    >>> round(float(spectral_norm(jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))), 5)
    4.0
    """
    steps = min(iterations, *w.shape)
    limits = jnp.finfo(w.dtype)

    def unit(v: Array, least: Array | float = 0.0) -> Array:
        size = jnp.linalg.norm(v)
        return jnp.where(size > least, v / jnp.maximum(size, limits.tiny), 0.0)

    def step(i: Array, basis_KxM: Array) -> Array:
        v = image = w.T @ (w @ basis_KxM[i - 1])
        # Twice is enough to stay orthogonal in floating point.
        for _ in range(2):
            v = v - basis_KxM.T @ (basis_KxM @ v)
        # Rounding is all that is left once the space holds all it can: no direction, and not orthogonal.
        return basis_KxM.at[i].set(unit(v, 100 * limits.eps * jnp.linalg.norm(image)))

    start = unit(w.T @ (w @ jax.random.normal(jax.random.key(0), w.shape[1:], w.dtype)))
    basis_KxM = jax.lax.fori_loop(1, steps, step, jnp.zeros((steps, w.shape[1]), w.dtype).at[0].set(start))
    return jnp.linalg.norm(w @ basis_KxM.T, ord=2)


def stable_rank(w: Float[Array, "n m"], iterations: int = 32) -> Scalar:
    """``|w|_F² / |w|_2²``, between 1 and the rank; NaN for zeros.

    Of order 1 in the width for the update of a layer by a few examples, and of order n for independent entries,
    ``n m / (sqrt n + sqrt m)²``.

    Examples
    --------
    >>> round(float(stable_rank(jnp.eye(5))), 5)
    5.0
    """
    return jnp.square(jnp.linalg.norm(w) / spectral_norm(w, iterations))
