"""A computation that stays in double precision, however it is transformed, where the user's flag is down."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from paperjax.limits import nodes as nd

double_p = jex.Primitive("in_double")
double_p.multiple_results = True


def in_double(fn: Callable[..., Sequence[Any]], *args: Any) -> tuple[Any, ...]:
    """``fn(*args)`` and its derivatives, forward and backward, in double precision where `jax_enable_x64` is off.

    JAX transposes a function when the gradient is taken, long after it was traced: under the flag as it then is, so that products of
    double numbers become single ones, and loops and scatters refuse the mixture. Here every rule holds the flag up for itself.

    Parameters
    ----------
    fn
        Of arrays, to a sequence of arrays. It is traced here.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> squared = lambda x: in_double(lambda x: (x.astype(jnp.float64) @ x.astype(jnp.float64),), x)[0].astype(jnp.float32)
    >>> jax.grad(squared)(jnp.array([1.0, 2.0])).tolist()
    [2.0, 4.0]
    """
    return _bound(fn, args)


def _bound(fn: Callable[..., Sequence[Any]], args: Sequence[Any]) -> tuple[Any, ...]:
    with nd.usual(True):
        return tuple(double_p.bind(*args, traced=jax.make_jaxpr(lambda *args: tuple(fn(*args)))(*args)))


@double_p.def_impl
def _impl(*args: Any, traced: Any) -> Any:
    with nd.usual(True):
        return jex.jaxpr_as_fun(traced)(*args)


@double_p.def_abstract_eval
def _abstract(*_: Any, traced: Any) -> Any:
    return traced.out_avals


def _lowered(context: Any, *args: Any, traced: Any) -> Any:
    with nd.usual(True):
        return mlir.lower_fun(jex.jaxpr_as_fun(traced), multiple_results=True)(context, *args)


def _filled(args: Sequence[Any], at: Sequence[int], values: Sequence[Any]) -> list[Any]:
    found = list(args)
    for i, value in zip(at, values):
        found[i] = value
    return found


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, traced: Any) -> Any:
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    n = len(primals)

    def change(*both: Any) -> Any:
        primals = both[:n]

        def of_moving(*some: Any) -> Any:
            return jex.jaxpr_as_fun(traced)(*_filled(primals, moving, some))

        return jax.jvp(of_moving, tuple(primals[i] for i in moving), tuple(both[n:]))[1]

    with nd.usual(True):
        out = double_p.bind(*primals, traced=traced)
    # By itself, so that values are known where only changes are not: when a function is linearized.
    return out, list(_bound(change, [*primals, *(tangents[i] for i in moving)]))


def _transposed(cotangents: Sequence[Any], *args: Any, traced: Any) -> list[Any]:
    moving = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]
    still = [i for i in range(len(args)) if i not in moving]
    forms = [jax.ShapeDtypeStruct(args[i].aval.shape, args[i].aval.dtype) for i in moving]

    def back(*both: Any) -> Any:
        known = _filled(args, still, both[: len(still)])
        return jax.linear_transpose(lambda *some: jex.jaxpr_as_fun(traced)(*_filled(known, moving, some)), *forms)(list(both[len(still) :]))

    with nd.usual(True):
        cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = _bound(back, [*(args[i] for i in still), *cotangents])
    return _filled([None] * len(args), moving, found)


def _batched(args: Sequence[Any], dims: Sequence[Any], *, traced: Any) -> Any:
    out = _bound(jax.vmap(jex.jaxpr_as_fun(traced), in_axes=tuple(dims)), args)
    return out, [0] * len(out)


mlir.register_lowering(double_p, _lowered)
ad.primitive_jvps[double_p] = _jvp
ad.primitive_transposes[double_p] = _transposed
batching.primitive_batchers[double_p] = _batched
