"""Random matrices with structure, in the form of `jax.nn.initializers`: ``init(key, shape, dtype)``, fan-in before fan-out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, PRNGKeyArray


def orthogonal(variance: float = 1.0) -> Initializer:
    """Orthonormal columns, uniform over them (Haar), times ``sqrt(variance)``: an entry has variance ``variance / fan_in``.

    The law is that of `jax.nn.initializers.orthogonal`, by Householder reflections (Stewart, SIAM J. Numer. Anal. 17, 1980), multiplied out
    in matrix products, without a loop over columns.

    Parameters
    ----------
    variance
        Of an entry, times the fan-in.

    Returns
    -------
    Initializer
        Of matrices (fan_in, fan_out), fan_out at most fan_in.

    Raises
    ------
    ValueError
        If the shape is no matrix, or wider than it is tall.

    Examples
    --------
    >>> w = orthogonal(2.0)(jax.random.key(0), (6, 3))
    >>> bool(jnp.allclose(w.T @ w, 2 * jnp.eye(3), atol=1e-6))
    True
    """

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        fan_in, fan_out = _matrix("orthogonal", shape)
        if fan_out > fan_in:
            raise ValueError(f"orthogonal: shape {tuple(shape)} has more columns than rows, which cannot be orthonormal. Transpose it.")
        below = jnp.triu(jax.random.normal(key, (fan_out, fan_in), dtype))
        signs = jnp.where(jnp.diagonal(below) >= 0, 1, -1).astype(dtype)
        v = below + jnp.eye(fan_out, fan_in, dtype=dtype) * (signs * jnp.linalg.norm(below, axis=1))[:, None]
        # H_1 H_2 ... = I - v' t v, 1 / t being v v' above its diagonal and half of it on that (Joffrain et al., ACM TOMS 32, 2006).
        inner = v @ v.T
        t_inverse = jnp.triu(inner, 1) + jnp.diag(jnp.diagonal(inner) / 2)
        product = jnp.eye(fan_in, fan_out, dtype=dtype) - v.T @ jax.scipy.linalg.solve_triangular(t_inverse, v[:, :fan_out], lower=False)
        return jnp.asarray(variance, dtype) ** 0.5 * product * -signs[None, :]

    return init


def low_rank(rank: int, variance: float = 1.0) -> Initializer:
    """``W = P C`` with P (fan_in, rank) of orthonormal columns, uniform over them, and C of independent normal entries.

    An entry has variance ``variance / fan_in``: the entries of C have ``variance / rank``. Rows of W (the weights of one input) depend
    on each other; columns, given P, do not, and any rotation of the inputs gives the same law. So wide layers are Gaussian as long as
    the rank grows with the width (arXiv 2310.16597, Section 2).

    Parameters
    ----------
    rank
        At least 1, at most the fan-in.
    variance
        Of an entry, times the fan-in.

    Returns
    -------
    Initializer
        Of matrices (fan_in, fan_out).

    Raises
    ------
    ValueError
        If the shape is no matrix, or the rank is not between 1 and the fan-in.

    Examples
    --------
    >>> w = low_rank(2)(jax.random.key(0), (6, 5))
    >>> w.shape, int(jnp.linalg.matrix_rank(w))
    ((6, 5), 2)
    """

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        fan_in, fan_out = _matrix("low_rank", shape)
        if not 1 <= rank <= fan_in:
            raise ValueError(f"low_rank: rank = {rank}, but it is between 1 and the fan-in, {fan_in}.")
        key_p, key_c = jax.random.split(key)
        return (variance / rank) ** 0.5 * orthogonal()(key_p, (fan_in, rank), dtype) @ jax.random.normal(key_c, (rank, fan_out), dtype)

    return init


def block_sparse(blocks: int, variance: float = 1.0) -> Initializer:
    """A block-diagonal matrix with independent normal entries in its blocks, rows and columns permuted at random.

    An entry has variance ``variance / fan_in`` over blocks and permutations: within a block it has `blocks` times that. Every output
    sums over ``fan_in / blocks`` inputs (arXiv 2310.16597, Section 2).

    Parameters
    ----------
    blocks
        How many; both sizes must be multiples of it.
    variance
        Of an entry, times the fan-in.

    Returns
    -------
    Initializer
        Of matrices (fan_in, fan_out).

    Raises
    ------
    ValueError
        If the shape is no matrix, or the sizes are not multiples of `blocks`.

    Examples
    --------
    >>> w = block_sparse(4)(jax.random.key(0), (8, 12))
    >>> (w != 0).sum(axis=0).tolist()  # inputs of each output
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        fan_in, fan_out = _matrix("block_sparse", shape)
        if blocks < 1 or fan_in % blocks or fan_out % blocks:
            raise ValueError(f"block_sparse: blocks = {blocks}, but both sizes, {fan_in} and {fan_out}, are multiples of it.")
        key_w, key_in, key_out = jax.random.split(key, 3)
        columns = jax.random.normal(key_w, (fan_in, fan_out // blocks), dtype)
        mask = jnp.arange(fan_in)[:, None] // (fan_in // blocks) == jnp.arange(blocks)[None, :]
        w = (columns[:, None, :] * mask[:, :, None].astype(dtype)).reshape(fan_in, fan_out)
        w = w[jax.random.permutation(key_in, fan_in)][:, jax.random.permutation(key_out, fan_out)]
        return (variance * blocks / fan_in) ** 0.5 * w

    return init


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"{name}: shape {tuple(shape)} is no matrix. Give (fan_in, fan_out), and reshape a kernel of a convolution.")
    return shape[0], shape[1]
