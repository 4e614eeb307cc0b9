"""Residual networks of infinite width and depth: the covariance and the tangent kernel follow an ordinary differential equation."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Real

from paperjax.limits.closed_forms import Dual
from paperjax.limits.double import in_double
from paperjax.limits.dual import dual
from paperjax.limits.infinite import limit
from paperjax.model import Family, family


class DepthLimit(NamedTuple):
    """Kernels at infinite width and depth, and what a finite depth lacks.

    Attributes
    ----------
    nngp, ntk
        As in `paperjax.limits.Limit`; `ntk` may be ``None``.
    nngp_error, ntk_error
        ``lim L (K_inf - K_L)``: at depth L the kernel is about ``K_inf - error / L``.

    Examples
    --------
    >>> DepthLimit(jnp.eye(1), None, jnp.eye(1), None).nngp.shape
    (1, 1)
    """

    nngp: Float[Array, "..."]
    ntk: Any
    nngp_error: Float[Array, "..."]
    ntk_error: Any


def depth_limit(
    fam: Family | Any,
    x1: Any,
    x2: Any = None,
    *,
    depth: str = "depth",
    at: int = 256,
    sizes: Mapping[str, Any] | None = None,
    **options: Any,
) -> DepthLimit:
    """Limit of a traced residual family whose branches are scaled by ``L^-1/2``, width first and then depth.

    A block takes the kernels K of the stream to ``K + F(K) / L``, whatever it is made of: an Euler step of ``dK/dt = F(K)``. So
    ``K_L = K(1) - E / L + O(1 / L²)``, and `paperjax.limit` at three depths, each a compiled loop if the network is one, gives both by
    Richardson's extrapolation. That width and depth limits commute is Theorem 3.1 of Hayou and Yang, arXiv 2302.00453.

    Parameters
    ----------
    fam
        A family of residual networks, run through by a `jax.lax.scan` over blocks or not.
    x1, x2
        As in `paperjax.limit`.
    depth
        The size that is the number of blocks.
    at
        The least of the depths ``at, 2 at, 4 at``; the kernels are off by ``O(at^-3)``.
    sizes, **options
        Other finite sizes, and whatever else `paperjax.limit` takes.

    Returns
    -------
    DepthLimit
        In float64; under a trace, without ``jax_enable_x64``, rounded to single at the end.

    Raises
    ------
    ValueError
        If kernels do not approach a limit as 1 / L: the branches are scaled otherwise, or not at all. As `paperjax.limit` besides.

    Examples
    --------
    >>> def net(width, depth):
    ...     def init(key, x):
    ...         shapes = (2, width), (depth, width, width), (width, 1)
    ...         u, w, v = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shapes))
    ...         return {"u": u, "w": w, "v": v}
    ...     def apply(p, x):
    ...         h = x @ p["u"] / 2**0.5
    ...         block = lambda h, w: (h + (2 / (width * depth)) ** 0.5 * jax.nn.relu(h) @ w, None)
    ...         return jax.lax.scan(block, h, p["w"])[0] @ p["v"] / width**0.5
    ...     return init, apply
    >>> answer = depth_limit(net, jnp.array([[1.0, 1.0]]), at=64, ntk=False)
    >>> round(float(answer.nngp[0, 0]), 3), round(float(answer.nngp_error[0, 0]), 2)  # e and e / 2
    (2.718, 1.36)
    """
    fam = fam if isinstance(fam, Family) else family(fam)
    if isinstance(at, bool) or not isinstance(at, int) or at < 4:
        raise ValueError(f"depth_limit: at = {at!r}, but the least depth is a whole number of at least 4.")
    if depth not in fam.sizes:
        raise ValueError(f"depth_limit: depth = {depth!r} is no size of the family, which takes {', '.join(fam.sizes)}.")
    if any(isinstance(x, Tracer) for x in (x1, x2)) and not jax.config.read("jax_enable_x64"):
        return _in_double(lambda *xs: depth_limit(fam, *xs, depth=depth, at=at, sizes=sizes, **options), x1, x2)
    found = [limit(fam, x1, x2, sizes={**(sizes or {}), depth: at * k}, **options) for k in (1, 2, 4)]
    nngp, nngp_error = _extrapolated("NNGP", [k.nngp for k in found], at)
    if found[0].ntk is None:
        return DepthLimit(nngp, None, nngp_error, None)
    if isinstance(found[0].ntk, Mapping):
        raise ValueError('depth_limit: per="leaf" has no limit, since a leaf of one block counts for 1 / L. Leave it out.')
    ntk, ntk_error = _extrapolated("NTK", [k.ntk for k in found], at)
    return DepthLimit(nngp, ntk, nngp_error, ntk_error)


def _in_double(of: Callable[..., DepthLimit], x1: Any, x2: Any) -> DepthLimit:
    """Kernels of traced examples, rounded at the end alone: differences of them are multiplied by the depth."""
    form: list[Any] = []

    def leaves(*xs: Any) -> list[Any]:
        found, tree = jax.tree.flatten(of(*xs))
        form.append(tree)
        return found

    found = in_double(leaves, *((x1,) if x2 is None else (x1, x2)))
    return jax.tree.unflatten(form[0], [k.astype(jnp.float32) for k in found])


def _extrapolated(name: str, kernels: list[Any], at: int) -> tuple[Any, Any]:
    with jax.enable_x64(True):
        one, two, four = kernels
        if not isinstance(four, Tracer):
            _check_order(name, np.asarray(one), np.asarray(two), np.asarray(four), at)
        end = (4 * (2 * four - two) - (2 * two - one)) / 3
        return end, 2 * (2 * at) * (end - two) - at * (end - one)


def _check_order(name: str, one: np.ndarray, two: np.ndarray, four: np.ndarray, at: int) -> None:
    first, second, size = (float(np.abs(k).max()) for k in (two - one, four - two, four))
    if not math.isfinite(size):
        raise ValueError(f"depth_limit: the {name} is not finite at depth {4 * at}. Scale the branches by 1 / sqrt(depth).")
    if first < 1e-11 * size:
        return
    power = math.log2(second / first) if second else -math.inf
    if not -3.5 < power < -0.8:
        raise ValueError(
            f"depth_limit: from depth {at} to {2 * at} to {4 * at} the {name} changes by {first:.3g} and then {second:.3g}, as "
            f"L^{power:.2f}; on the way to a limit it is as 1 / L. Scale the branches by 1 / sqrt(depth), or begin deeper, at=...."
        )


class Flow(NamedTuple):
    """Kernels of the stream along depth; those of the network if its readout is linear, of variance 1 / width.

    Attributes
    ----------
    nngp, ntk
        ``(N, N)`` at the end; the tangent kernel of the blocks' weights and biases and of what comes before them.
    nngp_error, ntk_error
        ``lim L (K_inf - K_L)``.

    Examples
    --------
    >>> Flow(jnp.eye(1), jnp.eye(1), jnp.eye(1), jnp.eye(1)).ntk.shape
    (1, 1)
    """

    nngp: Float[Array, "N N"]
    ntk: Float[Array, "N N"]
    nngp_error: Float[Array, "N N"]
    ntk_error: Float[Array, "N N"]


def residual_flow(
    phi: Callable[[Array], Array] | Dual,
    gram: Float[Array | np.ndarray, "..."],
    weight_variance: Real[Array, ""] | float = 1.0,
    bias_variance: Real[Array, ""] | float = 0.0,
    *,
    tangent: Float[Array | np.ndarray, "N N"] | None = None,
    time: float = 1.0,
) -> Flow:
    """The differential equation of blocks ``h' = h + sqrt(σ_w² / (n L)) W phi(h) + sqrt(σ_b² / L) b``, W and b standard normal.

    ``dK/dt = σ_w² E phi phi' + σ_b²`` and ``dΘ/dt = σ_w² E phi phi' + σ_b² + σ_w² E phi_dot phi_dot' Θ``, expectations over N(0, K) by the
    `dual` of the activation. With the right side F and the two kernels as one state, the error of L Euler steps is E / L,

        ``dE/dt = DF E + DF F / 2``,

    solved along with them. For a ReLU of variance σ_w², ``q(1) = q0 exp(σ_w² / 2)`` and ``E = q(1) σ_w⁴ / 8``.

    Parameters
    ----------
    phi
        What `dual` takes.
    gram
        K at the start, ``(N, N)``.
    weight_variance, bias_variance
        Of every block.
    tangent
        Θ at the start; 0 by default: only the blocks are trained.
    time
        Where to stop; 1 is the whole network.

    Returns
    -------
    Flow
        In the dtype of `gram`; float64 is advised. To a relative 1e-9 in float64 (Tsit5, from diffrax), besides `Dual.error`. NaN under a
        trace where a variance outgrows what a function without a closed form is known for.

    Raises
    ------
    ValueError
        If `gram` is no square matrix, a variance is negative, or `Dual.error` exceeds 1e-6 of the value (1e-3 in float32) at the largest
        variance there will be.

    References
    ----------
    Hayou and Yang, arXiv 2302.00453, eq. 4; Hayou, arXiv 2210.00688.

    Examples
    --------
    >>> with jax.enable_x64(True):
    ...     flow = residual_flow(jax.nn.relu, jnp.array([[1.0, 0.3], [0.3, 1.0]]), weight_variance=2.0)
    >>> flow.nngp.round(3).tolist(), flow.nngp_error[0, 0].round(3).tolist()
    ([[2.718, 1.228], [1.228, 2.718]], 1.359)
    """
    import diffrax

    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"residual_flow: gram has shape {gram.shape}. Give x @ x.T / x.shape[1], (N, N), for inputs x (N, d).")
    for name, variance in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        if not isinstance(variance, Tracer) and not np.asarray(variance) >= 0:
            raise ValueError(f"residual_flow: {name} = {variance}, but a variance is at least 0.")
    expectations = dual(phi)
    w, b = (jnp.asarray(variance).astype(gram.dtype) for variance in (weight_variance, bias_variance))

    def rate(state: Any) -> Any:
        k_NxN, theta_NxN = state
        q_N = jnp.diagonal(k_NxN)
        covariances = jnp.broadcast_arrays(q_N[:, None], k_NxN, q_N[None, :])
        grows = w * expectations.value(*covariances) + b
        return grows, grows + w * expectations.derivative(*covariances) * theta_NxN

    def with_error(t: Any, both: Any, _: Any) -> Any:
        state, error = both
        speed = rate(state)
        half = jax.tree.map(lambda e, f: e + f / 2, error, speed)
        return speed, jax.jvp(rate, (state,), (half,))[1]

    theta = jnp.zeros_like(gram) if tangent is None else jnp.asarray(tangent).astype(gram.dtype)
    zeros = (jnp.zeros_like(gram), jnp.zeros_like(gram))
    rtol = 1e-10 if gram.dtype == jnp.float64 else 1e-6
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(with_error), diffrax.Tsit5(), 0.0, time, None, ((gram, theta), zeros),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol), max_steps=16384,
    )  # fmt: skip
    assert solution.ys is not None
    (k, theta), (k_error, theta_error) = jax.tree.map(lambda a: a[0], solution.ys)
    # Variances only grow with the depth, so the last are the largest.
    q, room = jnp.diagonal(k), 1e-6 if gram.dtype == jnp.float64 else 1e-3
    known = jnp.max(expectations.error(q, q, q)) <= room * jnp.max(jnp.abs(expectations.value(q, q, q)))
    if not isinstance(known, Tracer) and not bool(known):
        raise ValueError(
            f"residual_flow: expectations of {expectations.name} are not found to {room:g} at variance {float(jnp.max(q)):g}, which it "
            "reaches. Too large for a function without a closed form? Scale the inputs or the weights."
        )
    return Flow(*(jnp.where(known, part, jnp.nan) for part in (k, theta, k_error, theta_error)))
