"""Whether the examples of a batch depend on each other: batch statistics, sums over the batch."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from paperjax.trace import primitives as prim


def coupling(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> str | None:
    """The primitive in which examples of a batch meet, or `None` if none does; nothing is computed.

    The function is traced for a batch whose size divides no other axis, so that every axis that belongs to the batch can be told.

    Parameters
    ----------
    apply
        ``(params, x) -> y``.
    params, x
        Arrays or their shapes; of `x` the first axis is the batch.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((4, 3))
    >>> coupling(lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 2)), x) is None
    True
    >>> coupling(lambda w, x: (x - x.mean(0)) @ w, jnp.ones((3, 2)), x)
    'reduce_sum'
    """

    def traced(n: int) -> jex.ClosedJaxpr:
        return prim.trace(apply, params, jax.ShapeDtypeStruct((n, *jnp.shape(x)[1:]), jnp.result_type(x)))

    taken = {size for eqn in _equations(traced(1)) for atom in (*eqn.invars, *eqn.outvars) for size in getattr(atom.aval, "shape", ())}
    taken |= {size for leaf in jax.tree.leaves(params) for size in jnp.shape(leaf)}
    batch = next(n for n in itertools.count(5, 2) if _is_prime(n) and not any(size % n == 0 for size in taken if size))
    for eqn in _equations(traced(batch)):
        name = eqn.primitive.name
        shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in eqn.invars]
        if any(axis < len(shapes[i]) and shapes[i][axis] % batch == 0 for i, axis in prim.mixed_axes(eqn)):
            return name
        if name == "scan" and eqn.params["length"] % batch == 0 and eqn.params["num_carry"]:
            return name
        if any(_belongs(shape, batch) > 1 for shape in (tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars)):
            return name
    return None


def _is_prime(n: int) -> bool:
    return all(n % d for d in range(2, math.isqrt(n) + 1))


def _belongs(shape: tuple[int, ...], batch: int) -> int:
    """How many times the batch size divides the sizes of a shape."""
    count = 0
    for size in shape:
        while size and size % batch == 0:
            size, count = size // batch, count + 1
    return count


def _equations(jaxpr: jex.ClosedJaxpr) -> Iterator[Any]:
    for eqn in jaxpr.jaxpr.eqns:
        inside = prim.inner_jaxprs(eqn)
        if not inside or eqn.primitive.name == "scan":
            yield eqn
        for inner in inside:
            yield from _equations(inner)
