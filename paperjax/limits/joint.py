"""Gaussian expectations of functions of up to four variables."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from paperjax.limits.eigen import eigh

Fields = Callable[..., Array]

REACH = 9.0
"""Standard deviations at which the sums are cut: the density there is 1e-18."""

LADDER = (16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST_NODES = 2**24
TRACED_POINTS = {1: 192, 2: 128, 3: 64, 4: 32}
"""Per axis where the covariance is traced and convergence cannot be looked at."""


class Expectation(NamedTuple):
    """A value, and an estimate of its absolute error: of a quadrature its change with fewer nodes, of Monte Carlo the standard error.

    Examples
    --------
    >>> expect(lambda u, v: u * v, jnp.array([[1.0, 0.5], [0.5, 1.0]])).value.round(5)
    Array(0.5, dtype=float32)
    """

    value: Float[Array, "..."]
    error: Float[Array, "..."]


def expect(
    f: Fields,
    cov: Float[Array | np.ndarray, "... k k"],
    *,
    tolerance: float = 1e-9,
    points: int | None = None,
    key: Key[Array, ""] | None = None,
    samples: int | None = None,
) -> Expectation:
    """``E f(z_1, ..., z_k)`` for ``z ~ N(0, cov)``, k at most 4, by a sum over a grid, or by Monte Carlo where asked for.

    With ``cov = Q Lambda Q'`` it is the trapezoidal rule with the Gaussian weight for x in ``z = Q sqrt(Lambda) x``, so a singular
    covariance, of equal or zero fields, is as good as any. For f analytic it converges exponentially; for f with kinks it does not,
    and is refused. Gradients are expectations, by Price's theorem: ``d/dcov_ij = E d_i d_j f / 2``, so finite at singular
    covariances. For one or two fields use `mean` and `pair`, which are faster and take kinks.

    Parameters
    ----------
    f
        Of k arrays of one shape, entry by entry.
    cov
        Covariances. Float64 is advised. A batch of B costs ``B · points^k`` evaluations, and memory a points-th of that.
    tolerance
        Largest error accepted, relative to ``sqrt(E f²)`` of the worst of the batch; at least 1e-6 in float32. Points are added until it
        is reached, up to 2^24 of them.
    points
        Per axis, if not found so. A traced `cov` cannot be looked at: there they are 192, 128, 64 and 32 for one to four fields, which
        reach variances of about 16, 4, 2 and 1 for tanh, and only ``error`` tells.
    key, samples
        Given both, Monte Carlo from this many draws, the same for all of the batch. For any f; its gradient is
        ``E (grad f)' dcov cov^-1 z / 2``, which for kinks needs no second derivative, and is 0 in null directions of `cov`.

    Returns
    -------
    Expectation

    Raises
    ------
    ValueError
        If `cov` is not symmetric, has a NaN or a negative eigenvalue, k exceeds 4, or it does not converge.

    Examples
    --------
    >>> cov = jnp.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.3], [0.2, 0.3, 1.0]])
    >>> float(expect(lambda u, v, w: jnp.sin(u) * jnp.tanh(v) * w**2, cov).value)
    0.2176...
    """
    cov = jnp.asarray(cov)
    k = cov.shape[-1] if cov.ndim >= 2 else 0
    if k == 0 or cov.shape[-2] != k:
        raise ValueError(f"expect: cov has shape {cov.shape}. Give covariances (..., k, k) of k fields.")
    _check(cov)
    if (key is None) != (samples is None):
        raise ValueError("expect: Monte Carlo needs both key= and samples=.")
    if key is not None and samples is not None:
        if samples < 2:
            raise ValueError(f"expect: samples = {samples}, but a standard error needs at least 2.")
        x = jax.random.normal(key, (samples, k), cov.dtype)
        mean, square = _monte_carlo(f, x, cov), _monte_carlo(lambda *z: f(*z) ** 2, x, jax.lax.stop_gradient(cov))
        variance = jnp.maximum(square - jax.lax.stop_gradient(mean) ** 2, jnp.zeros_like(mean))
        return Expectation(mean, jnp.sqrt(variance / (samples - 1)))
    if k > 4:
        raise ValueError(f"expect: {k} fields are too many for a grid. Opt in to Monte Carlo with key= and samples=.")
    if points is None and isinstance(cov, Tracer):
        points = TRACED_POINTS[k]
    if points is not None:
        if points < 4:
            raise ValueError(f"expect: points = {points} per axis. Give at least 4; 32 is enough for tanh at unit variance.")
        value = _tensor(f, points, cov)
        return Expectation(value, jax.lax.stop_gradient(jnp.abs(value - _tensor(f, 3 * points // 4, cov))))
    return _converged(f, cov, tolerance)


def _converged(f: Fields, cov: Array, tolerance: float) -> Expectation:
    k = cov.shape[-1]
    accepted = tolerance if cov.dtype == jnp.float64 else max(tolerance, 1e-6)
    ladder = [n for n in LADDER if n**k <= MOST_NODES]
    before, error, relative = _tensor(f, ladder[0], cov), jnp.zeros(()), math.inf
    for n in ladder[1:]:
        value, square = _tensor(f, n, cov), _tensor(lambda *z: f(*z) ** 2, n, cov)
        error = jnp.abs(value - before)
        scale = np.sqrt(np.abs(square))
        relative = float(np.max(np.where(error == 0, 0.0, error / np.where(scale > 0, scale, 1.0)), initial=0.0))
        if relative <= accepted:
            return Expectation(value, error)
        before = value
    raise ValueError(
        f"expect: off by {relative:.1e} of its size with {ladder[-1]} points on each of {k} axes, more than tolerance = {accepted:g}. Has "
        "f a kink, a jump, or a pole near the real line for these variances? Use pair for two fields, opt in to Monte Carlo with key= and "
        "samples=, or accept the error with tolerance=."
    )


def _check(cov: Array) -> None:
    if isinstance(cov, Tracer):
        return
    C = np.asarray(cov, np.float64)
    if not np.all(np.isfinite(C)):
        raise ValueError("expect: cov holds a NaN or an infinity. Inputs with missing values, or an overflow in a layer below?")
    room = float(jnp.finfo(cov.dtype).eps) ** 0.5 * np.max(np.abs(C), initial=0.0)
    excess = np.max(np.abs(C - np.swapaxes(C, -1, -2)), initial=0.0)
    if excess > room:
        raise ValueError(f"expect: cov is off symmetry by {excess:.3g}. Give a covariance matrix in the last two axes.")
    least = np.min(np.linalg.eigvalsh(C), initial=0.0)
    if least < -room:
        raise ValueError(f"expect: cov has an eigenvalue of {least:.3g}, so no Gaussian has it. Are its entries of the same fields?")


def _factor(cov: Array) -> tuple[Array, Array]:
    """``Q sqrt(Lambda)``, and ``Q Lambda^-1/2`` with 0 for null directions."""
    values, Q = eigh(cov)
    floor = cov.shape[-1] * float(jnp.finfo(cov.dtype).eps) * jnp.max(values, -1, keepdims=True, initial=0.0)
    present = values > floor
    root = jnp.sqrt(jnp.where(present, values, jnp.ones_like(values)))
    zero = jnp.zeros_like(values)
    scales = jnp.where(present, root, zero), jnp.where(present, 1 / root, zero)
    return Q * scales[0][..., None, :], Q * scales[1][..., None, :]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _tensor(f: Fields, points: int, cov: Array) -> Array:
    k = cov.shape[-1]
    nodes = np.linspace(-REACH, REACH, points)
    weights = np.exp(-(nodes**2) / 2) * (2 * REACH / (points - 1) / math.sqrt(2 * math.pi))
    z_J, w_J = (jnp.asarray(a, cov.dtype) for a in (nodes, weights))
    L = _factor(cov)[0]
    # All axes but the first at once: (points^(k-1), k - 1).
    rest = np.stack(np.meshgrid(*[nodes] * (k - 1), indexing="ij"), -1).reshape(-1, k - 1) if k > 1 else np.zeros((1, 0))
    rest_w = functools.reduce(np.multiply.outer, [weights] * (k - 1), np.ones(())).reshape(-1)
    x_R, w_R = jnp.asarray(rest, cov.dtype), jnp.asarray(rest_w, cov.dtype)
    across = jnp.einsum("...ia,ra->...ir", L[..., 1:], x_R, precision=jax.lax.Precision.HIGHEST)

    def row(total: Array, node: tuple[Array, Array]) -> tuple[Array, None]:
        x, w = node
        z = across + L[..., 0, None] * x
        value = f(*(z[..., i, :] for i in range(k)))
        return total + w * jnp.sum(value * w_R.reshape(*(1,) * (value.ndim - 1), -1), -1), None

    return jax.lax.scan(row, jnp.zeros(cov.shape[:-2], cov.dtype), (z_J, w_J))[0]


@_tensor.defjvp
def _tensor_jvp(f: Fields, points: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (cov,), (change,) = primals, tangents
    k = cov.shape[-1]
    total = jnp.zeros(cov.shape[:-2], cov.dtype)
    for i in range(k):
        for j in range(i + 1):
            both = change[..., i, j] if i == j else change[..., i, j] + change[..., j, i]
            total = total + _tensor(_partial(_partial(f, i), j), points, cov) * both / 2
    return _tensor(f, points, cov), total


def _partial(f: Fields, i: int) -> Fields:
    def derivative(*z: Array) -> Array:
        tangents = [jnp.ones_like(h) if j == i else jnp.zeros_like(h) for j, h in enumerate(z)]
        return jax.jvp(f, z, tuple(tangents))[1]

    return derivative


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _monte_carlo(f: Fields, x: Array, cov: Array) -> Array:
    return jnp.mean(f(*_drawn(x, _factor(cov)[0])), -1)


def _drawn(x: Array, L: Array) -> list[Array]:
    z = jnp.einsum("...ia,sa->...is", L, x, precision=jax.lax.Precision.HIGHEST)
    return [z[..., i, :] for i in range(L.shape[-1])]


@_monte_carlo.defjvp
def _monte_carlo_jvp(f: Fields, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, cov), (_, change) = primals, tangents
    L, inverse = (jax.lax.stop_gradient(part) for part in _factor(cov))
    z, whitened = _drawn(x, L), _drawn(x, inverse)
    slopes = jnp.stack([_partial(f, i)(*z) for i in range(len(z))], -2)
    outer = jnp.einsum("...is,...js->...ij", slopes, jnp.stack(whitened, -2), precision=jax.lax.Precision.HIGHEST) / x.shape[0]
    return _monte_carlo(f, x, cov), jnp.sum(outer * change, (-2, -1)) / 2


def isserlis(cov: Float[Array | np.ndarray, "... k k"]) -> Float[Array, "..."]:
    """``E z_1 z_2 ... z_k`` for ``z ~ N(0, cov)``: the sum over pairings of products of covariances, 0 for odd k (Isserlis 1918).

    A field that enters twice has two rows. There are (k - 1)!! terms, so k is at most 10.

    Raises
    ------
    ValueError
        If `cov` is not (..., k, k), or k exceeds 10.

    Examples
    --------
    The fourth moment:

    >>> isserlis(jnp.ones((4, 4)))
    Array(3., dtype=float32)
    """
    cov = jnp.asarray(cov)
    if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2] or cov.shape[-1] > 10:
        raise ValueError(f"isserlis: cov has shape {cov.shape}. Give covariances (..., k, k), k at most 10: there are (k - 1)!! pairings.")

    def product(fields: tuple[int, ...]) -> Array:
        if not fields:
            return jnp.ones(cov.shape[:-2], cov.dtype)
        if len(fields) % 2:
            return jnp.zeros(cov.shape[:-2], cov.dtype)
        first, *others = fields
        return sum((cov[..., first, j] * product(tuple(o for o in others if o != j)) for j in others), jnp.zeros((), cov.dtype))

    return product(tuple(range(cov.shape[-1])))
