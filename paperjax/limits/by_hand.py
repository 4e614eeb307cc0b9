"""Derivatives written by hand (``jax.custom_jvp``, ``jax.custom_vjp``) that are not those of the function they belong to."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from paperjax.limits import nodes as nd
from paperjax.trace import primitives as prim

SPREAD = 2.0
"""Standard deviation of the numbers at which derivatives are compared: of a thousand entries the largest is beyond 6."""


MOST = 1 << 22
"""Entries up to which numbers are made: a trace itself allocates nothing, however large its images and widths."""


def other_derivative(eqn: Any) -> str | None:
    """The name of a function whose derivative was written by hand and differs from that of what it computes; ``None`` for all else.

    A straight-through estimator or a reversed gradient trains another network than the one that is evaluated. Both derivatives are taken
    of random numbers and compared where both are finite; the kinks of a relu, where a derivative may be chosen, are hit with
    probability 0.
    """
    inner = prim.called(eqn)
    if inner is None or not eqn.primitive.name.startswith("custom_"):
        return None
    if max((var.aval.size for var in (*eqn.invars, *eqn.outvars)), default=0) > MOST:
        return None if _is_relu(inner) else f"{_name(inner)} (of too many entries to compare: trace fewer, at=dict(width=...), or it)"
    rng = np.random.default_rng(0)
    given = [_numbers(rng, var.aval) for var in eqn.invars]
    real = [i for i, var in enumerate(eqn.invars) if jnp.issubdtype(var.aval.dtype, jnp.floating)]
    results = [i for i, var in enumerate(eqn.outvars) if jnp.issubdtype(var.aval.dtype, jnp.floating)]
    if not real or not results:
        return None
    pulls = [rng.normal(size=eqn.outvars[i].aval.shape).astype(eqn.outvars[i].aval.dtype) for i in results]
    double = any(var.aval.dtype == np.float64 for var in (*eqn.invars, *eqn.outvars))
    with nd.usual(double), nd.numbers():

        def gradient(whole: Any, given: list[Any], pulls: list[Any]) -> Sequence[Any]:
            def some(*varied: Any) -> list[Any]:
                arrays = [*given]
                for i, a in zip(real, varied):
                    arrays[i] = a
                found = whole(*arrays)
                return [found[i] for i in results]

            return jax.vjp(some, *(given[i] for i in real))[1](pulls)

        # One program: every operation by itself would be one more to compile. Numbers are its arguments: of constants XLA would compute
        # the whole of it while it compiles.
        functions = jex.jaxpr_as_fun(_alone(eqn, inner.jaxpr)), jex.jaxpr_as_fun(inner)
        both = jax.jit(lambda given, pulls: [gradient(whole, given, pulls) for whole in functions])(given, pulls)
        own, plain = ([np.asarray(g) for g in gradients] for gradients in both)
    return None if all(map(_agree, own, plain)) else _name(inner)


def _alone(eqn: Any, inner: jex.Jaxpr) -> jex.ClosedJaxpr:
    """An equation as a function of all that it reads, which is also what the function inside reads."""
    read, made = [jex.Var(v.aval) for v in eqn.invars], [jex.Var(v.aval) for v in eqn.outvars]
    return jex.ClosedJaxpr(inner.replace(constvars=[], invars=read, outvars=made, eqns=[eqn.replace(invars=read, outvars=made)]), ())


def _numbers(rng: np.random.Generator, aval: Any) -> np.ndarray:
    if jnp.issubdtype(aval.dtype, jnp.floating):
        return (SPREAD * rng.normal(size=aval.shape)).astype(aval.dtype)
    return np.ones(aval.shape, aval.dtype)


def _agree(own: np.ndarray, plain: np.ndarray) -> bool:
    both = np.isfinite(own) & np.isfinite(plain)
    a, b = own[both].astype(np.float64), plain[both].astype(np.float64)
    # An accurate derivative of a series or an iteration is still that of the function.
    return bool(np.all(np.abs(a - b) <= 1e-4 * (1 + np.abs(b))))


def _is_relu(inner: jex.ClosedJaxpr) -> bool:
    """Whether it is JAX's own, by where it is written; a function that someone made of it has it inside."""
    written = str(getattr(getattr(inner.jaxpr, "debug_info", None), "func_src_info", ""))
    alone = not any(eqn.primitive.name.startswith("custom_") for eqn in inner.jaxpr.eqns)
    return alone and written.startswith("relu at ") and "jax/_src/nn/functions.py" in written.replace("\\", "/")


def _name(inner: jex.ClosedJaxpr) -> str:
    info = getattr(inner.jaxpr, "debug_info", None)
    return str(getattr(info, "func_src_info", None) or "a function").split(" at ")[0]
