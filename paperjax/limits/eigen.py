"""Eigenvectors of symmetric matrices inside programs of many pairs of examples.

Of several matrices at once LAPACK's calls (jaxlib before 0.11) are spread over XLA's threads, and the one that began waits for them. Where
as many begin together as there are threads, in one program or in several tiles', nobody is left to wait for: so on CPU they are called
matrix by matrix, which is done where it is asked for.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

Both = tuple[Float[Array, "*batch n"], Float[Array, "*batch n n"]]


@custom_vmap
def _one(C: Array) -> tuple[Array, Array]:
    values, Q = jnp.linalg.eigh(C)
    return values, Q


@_one.def_vmap
def _several(size: int, batched: list[bool], C: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    def each(C: Array) -> tuple[Array, Array]:
        return jax.lax.map(_one, C)

    return jax.lax.platform_dependent(C, cpu=each, default=lambda C: tuple(jnp.linalg.eigh(C))), (True, True)


@jax.custom_jvp
def eigh(C: Float[Array, "*batch n n"]) -> Both:
    """Eigenvalues, in ascending order, and eigenvectors, of any number of matrices, as ``jnp.linalg.eigh``.

    Examples
    --------
    >>> values, Q = eigh(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
    >>> values.round(4).tolist()
    [1.0, 3.0]
    """
    values, Q = jax.vmap(_one)(C.reshape(-1, *C.shape[-2:])) if C.ndim > 2 else _one(C)
    return values.reshape(C.shape[:-1]), Q.reshape(C.shape)


@eigh.defjvp
def _moved(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Both, Both]:
    values, Q = eigh(*primals)
    turned = Q.mT @ (tangents[0] + tangents[0].mT) / 2 @ Q
    gaps = values[..., None, :] - values[..., None]
    # Infinite for eigenvectors of one eigenvalue, which have no derivative, as JAX's own.
    own = jnp.eye(gaps.shape[-1], dtype=bool)
    by = jnp.where(own, jnp.zeros_like(gaps), 1 / jnp.where(own, jnp.ones_like(gaps), gaps))
    return (values, Q), (jnp.diagonal(turned, axis1=-2, axis2=-1), Q @ (by * turned))
