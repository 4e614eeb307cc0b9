"""Products of two functions of one and the same field: a sum over one variable in place of two."""

from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from paperjax.limits.expectation import Phi, mean
from paperjax.limits.hermite import VARIANCES
from paperjax.limits.sampled import sampled, slope


def own(g: Phi, h: Phi, variance: float) -> Any:
    """``(k11, k12, k22) -> E g(u) h(u)``, ``u ~ N(0, k)``, where all three are k; derivatives are those of `gaussians.trained`.

    With respect to k12 that is ``E g'(u) h'(u)``. ``d/dk E g h = E g' h' + E (g'' h + g h'') / 2``, so what is left of it is of k11 and
    k22, which move alike, or g is h.

    Parameters
    ----------
    g, h
        Analytic.
    variance
        The largest there will be; NaN beyond four times that.

    Examples
    --------
    >>> own(jax.numpy.tanh, jax.numpy.tanh, 1.0)(*(jax.numpy.ones(()),) * 3).round(5)
    Array(0.39429, dtype=float32)
    """
    # Second derivatives, of which gradients in k are made, need a finer grid than values do.
    variance = max(variance, min(4 * variance, VARIANCES[-1]))
    slopes = slope(g), slope(h)
    plain = jax.jit(mean(sampled(lambda u: g(u) * h(u)), variance=variance).value)
    by_k12 = jax.jit(mean(sampled(lambda u: slopes[0](u) * slopes[1](u)), variance=variance).value)

    @jax.custom_jvp
    def value(k11: Array, k12: Array, k22: Array) -> Array:
        return plain(k12)

    def push(primals: Any, tangents: Any) -> Any:
        k = primals[1]
        d11, d12, d22 = (None if isinstance(d, SymbolicZero) else d for d in tangents)
        moved = [d for d in (d11, d22) if d is not None]
        if not moved:
            return plain(k), by_k12(k) * d12
        half = sum(moved) / 2
        out, tangent = jax.jvp(plain, (k,), (half,))
        return out, tangent + by_k12(k) * (-half if d12 is None else d12 - half)

    value.defjvp(push, symbolic_zeros=True)

    return value
