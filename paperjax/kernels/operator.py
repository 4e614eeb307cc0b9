"""The kernel as a linear map, for kernels that no memory holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from paperjax.kernels.checks import batch as batch_of
from paperjax.kernels.checks import (
    check_apart,
    check_finite,
    check_finite_batch,
    check_kinds,
    check_one,
    check_placed,
    leaf_weights,
    outputs_of,
    trained_paths,
)
from paperjax.kernels.network import signature
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
        As `ntk`; if `batch` is below 1, the model returns several arrays, or a vector does not have the shape of the outputs. A model with
        derivatives written by hand for one way only (``jax.custom_vjp``) has no operator.

    Examples
    --------
    >>> from paperjax.model import Model
    >>> linear = Model(lambda key, x: jnp.ones(2), lambda w, x: x @ w)
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> operator(linear, jnp.ones(2), x)(jnp.array([1.0, 1.0]))
    Array([2., 6.], dtype=float32)
    """
    model = as_model(model)
    x1 = batch_of("x1", x1)
    x2 = x1 if x2 is None else batch_of("x2", x2)
    check_kinds(x1, x2)
    check_placed(params=params, x1=x1, x2=x2)
    trained_paths(params)
    check_finite(params)
    if batch < 1:
        raise ValueError(f"batch = {batch}: at least one example is worked on at a time.")
    arrays, _ = outputs_of(model, *signature((params, x2)))
    if len(arrays) != 1:
        raise ValueError(f"the model returns {len(arrays)} arrays, and an operator is of one: wrap it to return one of them.")
    check_apart(model, params, x1, "take ntk(..., coupled=True)")
    check_one(model, params, x2, 0, arrays[0])
    for name, x in (("x1", x1), ("x2", x2)):
        check_finite_batch(model, params, name, x)
    trained, given = split(params)
    scale = None if weights is None else leaf_weights(params, weights)
    out = arrays[0]

    def apply(leaves: Any, x: Any) -> Any:
        return jax.tree.leaves(model.apply(join(leaves, given), x))[0]

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
            leaves, tree = jax.tree.flatten(gradient)
            gradient = jax.tree.unflatten(tree, [g * jnp.asarray(w).astype(g.dtype) for g, w in zip(leaves, scale)])
        try:
            return lax.map(lambda x: jax.jvp(lambda leaves: apply(leaves, x[None])[0], (trained,), (gradient,))[1], x1, batch_size=batch)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise ValueError(
                f"the operator takes forward derivatives, and a part of the model has only backward ones: {error} Take ntk, which needs "
                "no others, or write that part with jax.custom_jvp."
            ) from error

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
