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


def coupling(apply: Callable[[Any, Any], Any], params: Any, x: Any, alone: jex.ClosedJaxpr | None = None) -> str | None:
    """The primitive in which examples of a batch meet, or their number or places come in; `None` if none does. Nothing is computed.

    The function is traced for a batch whose size divides no other axis, so that every axis that belongs to the batch can be told.

    Parameters
    ----------
    apply
        ``(params, x) -> y``.
    params, x
        Arrays or their shapes; of `x` the first axis is the batch.
    alone
        The trace for a batch of one, if it is there.

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
        return prim.used(prim.trace(apply, params, jax.ShapeDtypeStruct((n, *jnp.shape(x)[1:]), jnp.result_type(x))))

    alone = traced(1) if alone is None else prim.used(alone)
    taken = {size for eqn in _equations(alone) for atom in (*eqn.invars, *eqn.outvars) for size in getattr(atom.aval, "shape", ())}
    taken |= {size for leaf in jax.tree.leaves(params) for size in jnp.shape(leaf)}
    batch = next(n for n in itertools.count(5, 2) if _is_prime(n) and not any(size % n == 0 for size in taken if size))
    together = traced(batch)
    if any(_belongs(jnp.shape(const), batch) and not _even(const) for const in together.consts):
        return "a constant"
    strides: dict[Any, int] = {}
    for eqn in _equations(together):
        name = eqn.primitive.name
        if not _keeps_rows(eqn, batch, strides):
            return name
        before, after = ([tuple(getattr(atom.aval, "shape", ())) for atom in atoms] for atoms in (eqn.invars, eqn.outvars))
        mixed = [(i, axis) for i, axis in prim.mixed_axes(eqn) if not _grouped(eqn, axis, batch)]
        if any(axis < len(before[i]) and _belongs(before[i][axis : axis + 1], batch) for i, axis in mixed):
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


def size_read(
    apply: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    alone: jex.ClosedJaxpr | None = None,
    together: jex.ClosedJaxpr | None = None,
) -> str | None:
    """What one example by itself meets otherwise than in the batch: a number, or a branch in Python; `None` if nothing.

    ``if x.shape[0] > 1`` leaves no equation in a trace. Where the traces of one example and of the batch are not wired alike, which
    broadcasting may do as well, both are run on random numbers.

    Parameters
    ----------
    apply, params, x
        As for `coupling`, with the batch as it is.
    alone, together
        The traces of one example and of all, if they are there.

    Examples
    --------
    >>> x, w = jax.ShapeDtypeStruct((4, 3), "float32"), jax.ShapeDtypeStruct((3, 2), "float32")
    >>> size_read(lambda w, x: (jnp.tanh if x.shape[0] > 1 else jnp.sin)(x @ w), w, x)
    'a branch'
    >>> size_read(lambda w, x: x @ w, w, x) is None
    True
    """

    def of(n: int) -> Any:
        return jax.ShapeDtypeStruct((n, *jnp.shape(x)[1:]), jnp.result_type(x))

    def traced(n: int) -> jex.ClosedJaxpr:
        return prim.used(prim.trace(apply, params, of(n)))

    n = jnp.shape(x)[0]
    if n == 1:
        return None
    alone, together = (traced(k) if given is None else prim.used(given) for k, given in ((1, alone), (n, together)))
    if wiring_of(alone) == wiring_of(together):
        return _counted(alone, together)
    pair = traced(2)
    n, together = (2, pair) if wiring_of(pair) == wiring_of(together) else (n, together)
    leaves = jax.tree.leaves((params, of(n)))
    # A key is not to be made up, nor a value of a trace around the model known.
    keys = any(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended) for leaf in leaves)
    if keys or any(isinstance(const, Tracer) for const in together.consts):
        return None
    numbers = [_some(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    # The model may be met inside of jit.
    with jax.ensure_compile_time_eval():
        one, both = (jax.jit(jex.jaxpr_as_fun(trace))(*numbers[:-1], numbers[-1][:k]) for trace, k in ((alone, 1), (together, n)))
        return None if all(map(_close, one, both)) else "a branch"


def _some(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Random numbers; zeros for integers, which may be places."""
    number = np.random.default_rng(0).normal(size=shape) if jnp.issubdtype(dtype, jnp.inexact) else np.zeros(shape)
    return number.astype(dtype)


def _close(one: Any, both: Any) -> bool:
    """Whether the first rows are one but for rounding."""
    first, second = (np.asarray(y[:1]) for y in (one, both))
    if first.shape != second.shape or not jnp.issubdtype(first.dtype, jnp.inexact):
        return first.shape == second.shape and bool((first == second).all())
    rounding = float(jnp.finfo(first.dtype).eps) ** 0.5
    wide = np.complex128 if jnp.issubdtype(first.dtype, jnp.complexfloating) else np.float64
    first, second = first.astype(wide), second.astype(wide)
    size = np.abs(first[np.isfinite(first)]).max(initial=0.0)
    return np.allclose(first, second, rtol=rounding, atol=rounding * size, equal_nan=True)


def _keeps_rows(eqn: Any, batch: int, strides: dict[Any, int]) -> bool:
    """Whether a reshape leaves each example its entries; ``x.T.reshape(x.shape)`` deals them out anew.

    Along an axis that the batch was merged into with others, `strides` says of a value how far an example is from the next, where known.
    """
    out = eqn.outvars[0]
    after = tuple(getattr(out.aval, "shape", ()))
    merged = {size for size in after if size % batch == 0}
    if len(merged) != 1 or _belongs(after, batch) != 1:
        return True
    sources = [var for var in eqn.invars if not isinstance(var, jex.Literal) and _belongs(getattr(var.aval, "shape", ()), batch) == 1]
    if eqn.primitive.name != "reshape":
        known = {strides[var] for var in sources if var in strides and merged & set(var.aval.shape)}
        if known:
            strides[out] = min(known)
        return len(known) <= 1
    for var in sources:
        order = eqn.params["dimensions"] or range(len(var.aval.shape))
        found = _strides(tuple(var.aval.shape[axis] for axis in order), batch, strides.get(var)) & _strides(after, batch, None)
        if len(found) == 1:
            strides[out] = found.pop() // _behind(after, batch)
        elif not found:
            return False
    return True


def _behind(shape: tuple[int, ...], batch: int) -> int:
    """Entries behind the axis that the batch is in."""
    axis = next(axis for axis, size in enumerate(shape) if size % batch == 0)
    return math.prod(shape[axis + 1 :])


def _strides(shape: tuple[int, ...], batch: int, known: int | None) -> set[int]:
    """How many entries one example may be from the next."""
    inner = next(size for size in shape if size % batch == 0) // batch
    return {step * _behind(shape, batch) for step in range(1, inner + 1) if inner % step == 0 and known in (None, step)}


def _grouped(eqn: Any, axis: int, batch: int) -> bool:
    """Whether an axis is that of the channels of a convolution in groups of examples, each with a kernel of its own, as vmap makes it."""
    if eqn.primitive.name != "conv_general_dilated" or axis != eqn.params["dimension_numbers"].lhs_spec[1]:
        return False
    return eqn.params["feature_group_count"] % batch == 0


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
