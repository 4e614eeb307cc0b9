"""The kernels of one pair of examples as a program, and the product of the examples in it."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array
from threadpoolctl import ThreadpoolController

from paperjax.limits.buffers import empty
from paperjax.limits.program import Program, as_tape


def pair_step(program: Program, asked: Sequence[Any], ntk: bool, leaves: bool) -> Callable[..., tuple[Array, ...]]:
    """``(x1, x2, tape1, tape2) -> (nngp,)`` or ``(nngp, ntk)`` of two examples, as arrays over the positions of the output."""
    shape = program.pair_shape
    n = len(program.paths)

    def step(x1: Array, x2: Array, tape1: Any, tape2: Any, unit: Array | None = None) -> tuple[Array, ...]:
        def kernel(shift: Array | None) -> Array:
            return program.pair(x1, x2, as_tape(asked, tape1), as_tape(asked, tape2), shift, unit).reshape(shape)

        zero = jnp.zeros(n)
        if not ntk:
            return (kernel(None),)
        if leaves:
            return kernel(zero), jnp.moveaxis(jax.jacfwd(kernel)(zero), -1, 0).reshape(-1, *program.shape * 2)
        return jax.jvp(kernel, (zero,), (jnp.ones(n),))

    return step


def as_double(x: Any) -> Any:
    """Floating-point numbers, or their form, in double precision; others as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.ShapeDtypeStruct(x.shape, jnp.float64) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.float64)


def as_single(x: Any) -> Any:
    """Floating-point numbers, or their form, in single precision; others as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.ShapeDtypeStruct(x.shape, jnp.float32) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.float32)


def grid(step: Callable[..., Any]) -> Callable[..., Any]:
    """A function ``(x1, x2, tape1, tape2, unit)`` of pairs, over all pairs."""
    return jax.vmap(jax.vmap(step, (None, 0, None, 0, None)), (0, None, 0, None, None))


def called(program: jex.ClosedJaxpr, cast: Callable[[Any], Any]) -> Callable[..., tuple[Array, ...]]:
    """A program as a function of trees, whose numbers are of the precision that it was traced with."""

    def call(*args: Any) -> tuple[Array, ...]:
        return tuple(jex.jaxpr_as_fun(program)(*map(cast, jax.tree.leaves(args))))

    return call


def without_product(program: jex.ClosedJaxpr) -> jex.ClosedJaxpr | None:
    """The program of ``(x1 @ x2, *others)`` that one of ``(x1, x2, *others)`` is, if two examples meet only there, entry by entry.

    So are networks that begin with a dense layer. The products of many examples are then one of matrices.
    """
    x1, x2, *others = program.jaxpr.invars
    entries: dict[Any, int | None] = {x1: 0, x2: 1}
    met, left = None, []
    for eqn in program.jaxpr.eqns:
        sides = [entries.get(v) if isinstance(v, jex.Var) else None for v in eqn.invars]
        if all(side is None for side in sides):
            left.append(eqn)
        elif _keeps_order(eqn):
            entries[eqn.outvars[0]] = sides[0]
        elif met is None and sorted(map(str, sides)) == ["0", "1"] and _of_all_entries(eqn):
            met = eqn.outvars[0]
        else:
            return None
    if met is None or any(isinstance(v, jex.Var) and v in entries for v in program.jaxpr.outvars):
        return None
    return jex.ClosedJaxpr(program.jaxpr.replace(invars=[met, *others], eqns=left), program.consts)


def _keeps_order(eqn: Any) -> bool:
    """Of the entries of an array, none of which is changed."""
    name, before, after = eqn.primitive.name, eqn.invars[0].aval, eqn.outvars[0].aval
    if len(eqn.invars) > 1 or before.size != after.size or before.dtype != after.dtype:
        return False
    order = {"transpose": "permutation", "reshape": "dimensions", "squeeze": None, "broadcast_in_dim": None}
    if name not in order:
        return False
    axes = (eqn.params[order[name]] if order[name] else None) or ()
    large = [axis for axis in axes if before.shape[axis] > 1]
    return large == sorted(large)


def _of_all_entries(eqn: Any) -> bool:
    """Whether this is ``sum_i x_i y_i`` over all entries of two arrays, each in the order it has."""
    if eqn.primitive.name != "dot_general" or eqn.outvars[0].aval.size != 1:
        return False
    (left, right), _ = eqn.params["dimension_numbers"]
    a, b = (v.aval for v in eqn.invars)
    axes = [(i, j) for i, j in zip(left, right) if a.shape[i] > 1]
    return a.dtype == b.dtype == eqn.outvars[0].aval.dtype and axes == list(zip(*map(sorted, zip(*axes))))


def product(x1: np.ndarray, x2: np.ndarray, dtype: Any) -> np.ndarray:
    """``x1 @ x2`` of all pairs of examples, ``(N, M)``, as XLA takes it over without a copy.

    By NumPy's BLAS: XLA's product splits each tile over all cores, which other tiles keep busy.
    """
    a, b = (np.asarray(x, dtype).reshape(len(x), -1) for x in (x1, x2))
    # Numbers that are too large are looked for in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.matmul(a, b.T, out=empty((len(a), len(b)), dtype))


_HELD = threading.Lock()
_holders: list[Any] = []


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """One thread for each of NumPy's products: tiles that are under way at once have all cores already.

    There is one limit for all of a process. Where several threads hold it, the last one to leave puts back what the first one found.
    """
    with _HELD:
        _holders.append(_blas().limit(limits=1) if not _holders else _holders[0])
    try:
        yield
    finally:
        with _HELD:
            limiter = _holders.pop()
            if not _holders:
                limiter.restore_original_limits()
