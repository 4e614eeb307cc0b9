"""The kernel as a linear map, for kernels that no memory holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from paperjax.model import as_model, join, split


def operator(
    model: Any, params: PyTree, x1: Any, x2: Any = None, *, batch: int = 256, weights: PyTree | None = None
) -> Callable[[Any], Float[Array, "n *out"]]:
    """The map ``v -> K v``, ``(K v)_no = sum_mp K[n, m, o, p] v_mp``, by one backward and one forward derivative; K is never formed.

    Parameters
    ----------
    model, params, x1, x2, weights
        As for `ntk`. The examples of a batch may not depend on each other.
    batch
        Examples that are worked on together; memory grows with it. Work does not.

    Returns
    -------
    callable
        From ``(M, *out)`` to ``(N, *out)``. Symmetric and positive semi-definite without `x2`. Not jitted: the caller decides.

    Raises
    ------
    ValueError
        If a vector does not have the shape of the outputs.

    Examples
    --------
    >>> from paperjax.model import Model
    >>> linear = Model(lambda key, x: jnp.ones(2), lambda w, x: x @ w)
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> operator(linear, jnp.ones(2), x)(jnp.array([1.0, 1.0]))
    Array([2., 6.], dtype=float32)
    """
    model = as_model(model)
    x2 = x1 if x2 is None else x2
    trained, given = split(params)
    scale = None if weights is None else jax.tree.map(lambda leaf, weight: weight, params, weights)
    out = jax.eval_shape(model.apply, params, x2)

    def apply(leaves: Any, x: Any) -> Any:
        return model.apply(join(leaves, given), x)

    def product(v: Any) -> Any:
        v = jnp.asarray(v)
        if v.shape != out.shape:
            raise ValueError(f"the kernel acts on vectors of the shape of the outputs, {out.shape}, and this one has {v.shape}.")

        def add(total: Any, part: Any) -> Any:
            x, cotangent = part
            _, pull = jax.vjp(lambda leaves: apply(leaves, x), trained)
            return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

        gradient = _over_batches(add, jax.tree.map(jnp.zeros_like, trained), (x2, v.astype(out.dtype)), batch)
        if scale is not None:
            gradient = jax.tree.map(lambda g, w: g * jnp.asarray(w).astype(g.dtype), gradient, split(scale)[0])
        return lax.map(lambda x: jax.jvp(lambda leaves: apply(leaves, x[None])[0], (trained,), (gradient,))[1], x1, batch_size=batch)

    return product


def _over_batches(add: Callable[[Any, Any], Any], total: Any, rows: Any, batch: int) -> Any:
    """Fold over batches of the rows, and over what is left."""
    n = jax.tree.leaves(rows)[0].shape[0]
    whole = n // batch * batch
    if whole:
        head = jax.tree.map(lambda a: a[:whole].reshape(-1, batch, *a.shape[1:]), rows)
        total, _ = lax.scan(add, total, head)
    if whole < n:
        total, _ = add(total, jax.tree.map(lambda a: a[whole:], rows))
    return total
