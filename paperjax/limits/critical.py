"""The edge of chaos: where a wide network neither spreads small perturbations nor forgets them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits.closed_forms import Dual
from paperjax.limits.dual import dual


class Edge(NamedTuple):
    """A point of the edge of chaos.

    Attributes
    ----------
    weight_variance
        ``σ_w²``, times the fan-in.
    variance
        q, the variance of pre-activations that every layer keeps.

    Examples
    --------
    >>> Edge(2.0, 1.0).weight_variance
    2.0
    """

    weight_variance: float
    variance: float


def edge_of_chaos(phi: Callable[[Array], Array] | Dual, bias_variance: float, *, most: float = 1e4) -> Edge:
    """The weight variance at which ``chi_1 = σ_w² E phi'(u)² = 1``, u ~ N(0, q), at the fixed point ``q = σ_w² E phi(u)² + σ_b²``.

    Parameters
    ----------
    phi
        What `dual` takes.
    bias_variance
        ``σ_b²``, above 0. (At 0 the fixed point of tanh and its like is q = 0, and a ReLU has the edge σ_w² = 2 at every q.)
    most
        The largest q that is tried.

    Returns
    -------
    Edge
        The one of least q.

    Raises
    ------
    ValueError
        If the bias variance is not positive, or there is no such point up to `most`.

    References
    ----------
    Poole et al., arXiv 1606.05340; Schoenholz et al., arXiv 1611.01232, eqs. 3 and 5.

    Examples
    --------
    >>> edge = edge_of_chaos(jax.numpy.tanh, 0.05)
    >>> round(edge.weight_variance, 3), round(edge.variance, 3)
    (1.761, 0.57)
    """
    if not bias_variance > 0:
        raise ValueError(
            f"edge_of_chaos: bias_variance = {bias_variance}, and with it the fixed point is q = 0 or any q. Give one above 0."
        )
    expectations = dual(phi)

    @jax.jit
    def moments(q_N: Array) -> tuple[Array, Array]:
        return expectations.value(q_N, q_N, q_N), expectations.derivative(q_N, q_N, q_N)

    low, high = np.log(bias_variance), np.log(most)
    edge = None
    with jax.enable_x64(True):
        # Every round takes a 64th of the bracket, so that six leave 10^-10 of it; the chord of the last is as good as float64.
        for _ in range(6):
            tried = np.exp(np.linspace(low, high, 65))
            value, slope = (np.asarray(found) for found in moments(jnp.asarray(tried)))
            gaps = value / slope + bias_variance - tried
            (below,) = np.nonzero((gaps[:-1] > 0) & (gaps[1:] <= 0))
            if not below.size:
                break
            i = below[0]
            low, high = np.log(tried[i : i + 2])
            share = gaps[i] / (gaps[i] - gaps[i + 1])
            edge = Edge(float(1 / (slope[i] + share * (slope[i + 1] - slope[i]))), float(tried[i] + share * (tried[i + 1] - tried[i])))
    if edge is None:
        raise ValueError(
            f"edge_of_chaos: no variance up to {most:g} is a fixed point with chi_1 = 1 for a bias variance of {bias_variance}."
        )
    return edge
