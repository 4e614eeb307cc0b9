"""Infinite-width kernels of the multilayer perceptron, layer by layer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Real

from paperjax.limits.closed_forms import Dual, check_covariances
from paperjax.limits.dual import dual


class Kernels(NamedTuple):
    """Covariance of the outputs at init, and the neural tangent kernel; both (N, N).

    Examples
    --------
    >>> mlp_kernels(jnp.eye(2), 1, jax.nn.relu).ntk.diagonal().tolist()
    [1.0, 1.0]
    """

    nngp: Float[Array, "..."]
    ntk: Float[Array, "..."]


def mlp_kernels(
    gram: Float[Array | np.ndarray, "N N"],
    depth: int,
    phi: Callable[[Array], Array] | Dual,
    weight_variance: Real[ArrayLike, ""] = 1.0,
    bias_variance: Real[ArrayLike, ""] = 0.0,
) -> Kernels:
    """NNGP and NTK of an infinitely wide MLP with `depth` hidden layers, in NTK parametrization.

    The network is ``h^1 = sqrt(weight_variance / d) W^1 x + sqrt(bias_variance) b^1``, ``h^{l+1} = sqrt(weight_variance / n) W^{l+1}
    phi(h^l) + sqrt(bias_variance) b^{l+1}`` with output ``h^{depth + 1}``, every W and b standard normal and trained. Then

        ``Sigma^1 = Theta^1 = weight_variance · gram + bias_variance``,
        ``Sigma^{l+1} = weight_variance · E phi phi + bias_variance``,
        ``Theta^{l+1} = Sigma^{l+1} + weight_variance · E phi' phi' · Theta^l``,

    expectations over ``N(0, Sigma^l)`` (Jacot, Gabriel and Hongler, arXiv 1806.07572, Proposition 1 and Theorem 1).

    Parameters
    ----------
    gram
        ``x x' / d`` for inputs x (N, d). For a kernel between two sets, take its block of the Gram of both together. Float64 is advised:
        for a ReLU in float32, nearly equal inputs are off by 1e-4 per layer; the diagonal is not.
    depth
        Hidden layers L, at least 1.
    phi
        What `dual` takes.
    weight_variance, bias_variance
        Of every layer; they may be traced. 2 keeps a ReLU's second moment.

    Returns
    -------
    Kernels
        Of one output; different outputs are independent. In the dtype of `gram`. The layers run in one `jax.lax.scan`.

    Raises
    ------
    ValueError
        If `gram` is not symmetric, has a NaN or is no Gram matrix, `depth` is below 1, or a variance is negative; or if variances grow too
        large for an expectation without a closed form (under a trace kernels are NaN then).
    TypeError
        If `gram` is not floating point.

    Examples
    --------
    For ReLU with weight variance 2 and ``|x|² = d``, the diagonal of the NTK is 2 (L + 1):

    >>> mlp_kernels(jnp.eye(3), 4, jax.nn.relu, weight_variance=2.0).ntk.diagonal().tolist()
    [10.0, 10.0, 10.0]
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"mlp_kernels: depth = {depth!r}, but the number of hidden layers is a whole number of at least 1.")
    for name, variance in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        if not isinstance(variance, Tracer) and not np.asarray(variance) >= 0:
            raise ValueError(f"mlp_kernels: {name} = {variance}, but a variance is at least 0.")
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"mlp_kernels: gram has shape {gram.shape}. Give x @ x.T / x.shape[1], (N, N), for inputs x (N, d).")
    if not jnp.issubdtype(gram.dtype, jnp.floating):
        raise TypeError(f"mlp_kernels: gram has dtype {gram.dtype}. Give real floating-point numbers, best float64.")
    _check_gram(gram)
    expectations = dual(phi)
    w, b = (jnp.asarray(variance).astype(gram.dtype) for variance in (weight_variance, bias_variance))

    # One triangle: half the work, and exactly symmetric.
    rows, columns = np.triu_indices(gram.shape[0])
    (diagonal,) = np.nonzero(rows == columns)

    room = 1e-6 if gram.dtype == jnp.float64 else 1e-3

    def layer(triangles: Kernels, _: None) -> tuple[Kernels, None]:
        q = triangles.nngp[diagonal]
        covariances = q[rows], triangles.nngp, q[columns]
        # Nodes of a quadrature grow with the variances only so far.
        fine = jnp.max(expectations.error(q, q, q)) <= room * jnp.max(jnp.abs(expectations.value(q, q, q)))
        nngp = jnp.where(fine, w * expectations.value(*covariances) + b, jnp.nan)
        return Kernels(nngp, nngp + w * expectations.derivative(*covariances) * triangles.ntk), None

    first = w * gram[rows, columns] + b
    last, _ = jax.lax.scan(layer, Kernels(first, first), length=depth)
    if not isinstance(last.nngp, Tracer) and not bool(jnp.all(jnp.isfinite(last.nngp))):
        raise ValueError(
            f"mlp_kernels: expectations of {expectations.name} are not found to {room:g} at the variances that the layers reach, the first "
            f"of which is {float(jnp.max(first)):g}. Too large for a function without a closed form? Scale the inputs, or use pj.limit."
        )
    return Kernels(*(jnp.zeros_like(gram).at[rows, columns].set(k).at[columns, rows].set(k) for k in last))


def _check_gram(gram: Array) -> None:
    if isinstance(gram, Tracer):
        return
    q = jnp.diagonal(gram)
    check_covariances(q[:, None], gram, q[None, :])
    excess = float(np.max(np.abs(gram - gram.T), initial=0.0))
    if excess > float(jnp.finfo(gram.dtype).eps) ** 0.5 * float(np.max(np.abs(gram), initial=0.0)):
        raise ValueError(f"mlp_kernels: gram is off symmetry by {excess:.3g}. Give x @ x.T / x.shape[1], of one set of inputs.")
