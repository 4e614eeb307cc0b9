"""Whether the examples of a batch depend on each other: batch statistics, sums over the batch."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.trace import primitives as prim
from paperjax.trace.interpret import wiring_of

# Their results belong to operands one by one.
ASIDE = ("scan", "optimization_barrier", *prim.IN_PLACE)


def coupling(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> str | None:
    """The primitive in which examples of a batch meet, or their number or places come in; `None` if none does. Nothing is computed.

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

    alone = traced(1)
    taken = {size for eqn in _equations(alone) for atom in (*eqn.invars, *eqn.outvars) for size in getattr(atom.aval, "shape", ())}
    taken |= {size for leaf in jax.tree.leaves(params) for size in jnp.shape(leaf)}
    batch = next(n for n in itertools.count(5, 2) if _is_prime(n) and not any(size % n == 0 for size in taken if size))
    together = traced(batch)
    if any(_belongs(jnp.shape(const), batch) and not _even(const) for const in together.consts):
        return "a constant"
    for eqn in _equations(together):
        name = eqn.primitive.name
        before, after = ([tuple(getattr(atom.aval, "shape", ())) for atom in atoms] for atoms in (eqn.invars, eqn.outvars))
        if any(axis < len(before[i]) and _belongs(before[i][axis : axis + 1], batch) for i, axis in prim.mixed_axes(eqn)):
            return name
        if name == "scan" and eqn.params["length"] % batch == 0 and eqn.params["num_carry"]:
            return name
        if any(_belongs(shape, batch) > 1 for shape in after):
            return name
        goes_in = any(_belongs(shape, batch) for shape in before)
        # Summed, factored or taken apart, in whatever way; a loop's counter and what stands beside it have no batch to begin with.
        if goes_in and name not in ASIDE and any(math.prod(shape) and not _belongs(shape, batch) for shape in after):
            return name
        if not goes_in and name.startswith(("random_", "rng_")) and any(_belongs(shape, batch) for shape in after):
            return name
        if name == "iota" and _belongs(after[0][eqn.params["dimension"] :][:1], batch):
            return name
    return _counted(alone, together)


def _counted(alone: jex.ClosedJaxpr, together: jex.ClosedJaxpr) -> str | None:
    """The primitive in which a number comes in that is another for another size of the batch."""
    if wiring_of(alone) != wiring_of(together):
        return None
    for one, other in zip(_equations(alone), _equations(together)):
        for a, b in zip(one.invars, other.invars):
            known = isinstance(a, jex.Literal) and isinstance(b, jex.Literal) and np.shape(a.val) == np.shape(b.val)
            if known and jnp.issubdtype(b.aval.dtype, jnp.floating) and not np.array_equal(a.val, b.val, equal_nan=True):  # pyright: ignore[reportAttributeAccessIssue]
                return other.primitive.name
    return None


def _even(const: Any) -> bool:
    """Whether all entries of a constant are known to be one number."""
    if isinstance(const, Tracer) or jnp.issubdtype(jnp.result_type(const), jax.dtypes.extended):
        return False
    return np.unique(np.asarray(const)).size == 1


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
        if prim.called(eqn) is None and eqn.primitive.name not in ("while", "cond"):
            yield eqn
        for inner in inside:
            yield from _equations(inner)
