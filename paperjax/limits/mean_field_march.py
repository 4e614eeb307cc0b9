"""The equations of `mean_field_dynamics`, solved forward in time: at a step, all that a field needs is known from the steps before.

Layer l is S coordinates. Its kernels are means over them, and a Gaussian field is drawn step by step, given its past: ``u(t)`` is a
combination of noises ``eps`` with the coefficients of a pivoted Cholesky factor ``Phi = R R^T``, so that steps which bring nothing
new bring no noise. By Stein's lemma ``E d phi(h^l) / d eps = E phi(h^l) eps^T``, and the response of layer l + 1 is

    gamma sum A^l g^{l+1} = E[phi(h^l) eps^T] (R^-1 g^{l+1}),       gamma sum B^l phi(h^l) = E[g^{l+1} eps^T] (R^-1 phi(h^l))

with the noises of r^l and the factor of G^{l+1}, of u^{l+1} and of Phi^l. R^-1 is read at the pivots only, where it is triangular;
the right factors have second moments I, so that a response has noise of order (number of pivots / S), however singular the kernels.

Draws satisfy in the sample what holds in the mean: noises are orthonormal, come as pairs ``(u, r)`` and ``(u, -r)``, and a new one is
orthogonal to what its field cannot have reached yet (of r^l: ``phi(h^l)``, of u^l: ``g^l``, until then). For linear layers this is all that
enters, and the answer is exact.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import get_lapack_funcs, qr, solve_triangular

_NEGLIGIBLE = 1e-3
"""Share of a field's variance that is left undrawn, and its kernel's error: below the noise of a thousand coordinates."""
_ROUNDING = 1e-12
"""The same for linear layers."""
_MOST_LEFT_OUT = 0.03
_FEW = 64
Order = tuple[Float[np.ndarray, "TP"], Float[np.ndarray, "L TP TP"], Float[np.ndarray, "L TP TP"]]


class _Field(NamedTuple):
    """A Gaussian field, as far as it has been drawn, on one half of the coordinates; the other half has `sign` times the noise.

    pivots: indices whose noise is new, ``(k,)``. factor: Cholesky factor of the kernel there. noise: ``(k, S/2)``, of mean square 1.
    taken: orthonormal rows that new noise avoids. dual: ``R^-1`` of what the kernel is the second moment of, on its own layer, ``(k, S)``.
    """

    sign: int
    pivots: np.ndarray
    factor: np.ndarray
    noise: np.ndarray
    taken: np.ndarray
    dual: np.ndarray


def _new_field(sign: int, half: int, exact: bool) -> _Field:
    # Without the mean in u, E u = 0 in the sample; r has it from the pairs.
    mean = np.full((1, half), half**-0.5) if sign > 0 and not exact else np.zeros((0, half))
    return _Field(sign, np.zeros(0, int), np.zeros((0, 0)), np.zeros((0, half)), mean, np.zeros((0, 2 * half)))


def _draw(field: _Field, count: int, rng: np.random.Generator | None) -> np.ndarray:
    """Orthonormal columns, ``(S/2, count)``; without a generator the next axes, for second moments are all that is asked."""
    half = field.noise.shape[1]
    if rng is None:
        return np.eye(half, count, -len(field.noise))
    new = rng.standard_normal((half, count))
    for _ in range(2):
        new = new - field.taken.T @ (field.taken @ new)
    return np.linalg.qr(new)[0]


def _reveal(field: _Field, kernel: np.ndarray, rng: np.random.Generator | None, negligible: float) -> tuple[_Field, np.ndarray, float]:
    """The field at the next step, from the rows ``(P, (t + 1) P)`` of its kernel: the field, its values, and the share left out."""
    p, half = len(kernel), field.noise.shape[1]
    start = kernel.shape[1] - p
    known = solve_triangular(field.factor, kernel[:, field.pivots].T, lower=True) if len(field.pivots) else np.zeros((0, p))
    rest = kernel[:, start:] - known.T @ known
    variance = float(np.mean(np.diagonal(kernel[:, start:])))
    (pivoted,) = get_lapack_funcs(("pstrf",), (rest,))
    packed, order, rank, _ = pivoted(rest, tol=negligible * variance, lower=1)
    # LAPACK finds one pivot in a matrix without any above the tolerance.
    rank = 0 if np.max(np.diagonal(rest)) <= negligible * variance else int(rank)
    room = half - (len(field.noise) if rng is None else len(field.taken))
    rank, order = min(rank, room), order - 1
    columns = np.zeros((p, rank))
    columns[order] = np.tril(packed)[:, :rank]
    left = rest - columns @ columns.T
    left_out = float(np.max(np.diagonal(left))) / variance if variance else 0.0
    values = known.T @ field.noise
    if rank:
        fresh = _draw(field, rank, rng).T
        values = values + half**0.5 * columns @ fresh
        at = order[:rank]
        factor = np.block([[field.factor, np.zeros((len(field.factor), rank))], [known[:, at].T, columns[at]]])
        field = field._replace(
            pivots=np.concatenate([field.pivots, start + at]),
            factor=factor,
            noise=np.concatenate([field.noise, half**0.5 * fresh]),
            taken=field.taken if rng is None else np.concatenate([field.taken, fresh]),
        )
    return field, np.concatenate([values, field.sign * values], axis=1), left_out


def _with_dual(field: _Field, values: np.ndarray) -> _Field:
    """`R^-1` of ``values`` at the pivots that have none yet."""
    k = len(field.dual)
    if k == len(field.pivots):
        return field
    rest = values[field.pivots[k:]] - field.factor[k:, :k] @ field.dual
    return field._replace(dual=np.concatenate([field.dual, solve_triangular(field.factor[k:, k:], rest, lower=True)]))


def _avoiding(field: _Field, rows: np.ndarray) -> _Field:
    """The field with new noise orthogonal to rows ``(m, S)``: to the part of them that has its sign."""
    half = field.noise.shape[1]
    part = (rows[:, :half] + field.sign * rows[:, half:]).T / 2
    size = np.abs(part).max(initial=0.0)
    for _ in range(2):
        part = part - field.taken.T @ (field.taken @ part)
    if not part.size or np.abs(part).max() <= 1e-6 * size or len(field.taken) >= half:
        return field
    factors: Any = qr(part, mode="economic", pivoting=True)
    q, diagonal = factors[0], np.abs(np.diagonal(factors[1]))
    kept = min(int(np.sum(diagonal > 1e-6 * diagonal[0])), half - len(field.taken))
    return field._replace(taken=np.concatenate([field.taken, q.T[:kept]]))


def _response(values: np.ndarray, field: _Field) -> np.ndarray:
    """``E[values eps^T] dual``, where values live with the noise, and the answer with the dual."""
    half = field.noise.shape[1]
    return ((values[:, :half] + field.sign * values[:, half:]) @ field.noise.T / (2 * half)) @ field.dual


def _value_and_slope(phi: Callable[[Array], Array], h: Array) -> tuple[Array, Array]:
    value, slope = jax.jvp(phi, (h,), (jnp.ones_like(h),))
    return value, slope


_activate = jax.jit(_value_and_slope, static_argnums=0)


def _activated(phi: Any, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if phi is None:
        return h, np.ones_like(h)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, slope = _activate(phi, jnp.asarray(h))
    found = np.asarray(value), np.asarray(slope)
    if np.isfinite(h).all() and not all(np.isfinite(v).all() for v in found):
        raise ValueError(
            f"mean_field_dynamics: phi or its derivative is not finite at a preactivation between {h.min():.3g} and {h.max():.3g}; "
            "preactivations are Gaussian at the start, so phi must be finite everywhere."
        )
    return found


def march(
    phi: Callable[[Array], Array] | None, kx: Float[np.ndarray, "P P"], y: Float[np.ndarray, "P"], *, depth: int, gamma: float, lr: float,
    steps: int, samples: int, rng: np.random.Generator,
) -> tuple[Order, float]:  # fmt: skip
    """Outputs ``(T P)``, kernels Phi and G ``(L, T P, T P)``, and the largest share of a field's variance that is left out.

    Raises
    ------
    ValueError
        If phi or its derivative is not finite at a preactivation.
    RuntimeError
        If something overflows, or `samples` are too few for the number of independent noises.
    """
    half = samples // 2
    if phi is None:
        # Kernels of linear networks have low rank, which is not known before.
        half, n = _FEW, steps * len(y)
        while half < n:
            answer, left_out = _march(None, kx, y, depth, gamma, lr, steps, half, None, _ROUNDING)
            if left_out <= _ROUNDING:
                return answer, left_out
            half *= 2
        return _march(None, kx, y, depth, gamma, lr, steps, n, None, _ROUNDING)
    answer, left_out = _march(phi, kx, y, depth, gamma, lr, steps, half, rng, _NEGLIGIBLE)
    if left_out > _MOST_LEFT_OUT:
        raise RuntimeError(
            f"mean_field_dynamics: {samples} samples have no room for all independent noises of {steps} steps and {len(y)} examples: "
            f"{left_out:.1%} of the variance of a field is left out. Raise samples, say to {2 * samples}, or take fewer steps."
        )
    return answer, left_out


def _march(
    phi: Any, kx: np.ndarray, y: np.ndarray, depth: int, gamma: float, lr: float, steps: int, half: int,
    rng: np.random.Generator | None, negligible: float,
) -> tuple[Order, float]:  # fmt: skip
    p, s = len(y), 2 * half
    n = steps * p
    forward = [_new_field(1, half, rng is None) for _ in range(depth)]
    backward = [_new_field(-1, half, rng is None) for _ in range(depth)]
    # Filled in place, a step at a time.
    values, gs = np.zeros((depth, n, s)), np.zeros((depth, n, s))
    phis, gammas = np.zeros((depth, n, n)), np.zeros((depth, n, n))
    f, error, left_out = np.zeros(n), np.zeros(n), 0.0
    for t in range(steps):
        now, past, until = slice(t * p, (t + 1) * p), slice(0, t * p), slice(0, (t + 1) * p)
        slopes = []
        with np.errstate(over="ignore", invalid="ignore"):
            for layer in range(depth):
                under = phis[layer - 1, now, until] if layer else np.tile(kx, (1, t + 1))
                _finite(under, t, lr)
                forward[layer], h, left = _reveal(forward[layer], under, rng, negligible)
                left_out = max(left_out, left)
                if t:
                    h = h + lr * gamma * (under[:, past] * error[past]) @ gs[layer, past]
                if layer:
                    below, k = backward[layer - 1], len(forward[layer].dual)
                    h = h + _response(values[layer - 1, now], below)
                    forward[layer] = _with_dual(forward[layer], values[layer - 1])
                    if rng is not None:
                        backward[layer - 1] = _avoiding(below, forward[layer].dual[k:])
                values[layer, now], slope = _activated(phi, h)
                slopes.append(slope)
                phis[layer, now, until] = values[layer, now] @ values[layer, until].T / s
                phis[layer, until, now] = phis[layer, now, until].T
            for layer in reversed(range(depth)):
                over = gammas[layer + 1, now, until] if layer + 1 < depth else np.ones((p, (t + 1) * p))
                _finite(over, t, lr)
                backward[layer], z, left = _reveal(backward[layer], over, rng, negligible)
                left_out = max(left_out, left)
                if t:
                    z = z + lr * gamma * (over[:, past] * error[past]) @ values[layer, past]
                if layer + 1 < depth:
                    above, k = forward[layer + 1], len(backward[layer].dual)
                    backward[layer] = _with_dual(backward[layer], gs[layer + 1])
                    z = z + _response(gs[layer + 1, now], above)
                    if rng is not None:
                        forward[layer + 1] = _avoiding(above, backward[layer].dual[k:])
                elif gamma:
                    f[now] = np.sum(z * values[layer, now], axis=1) / (s * gamma)
                gs[layer, now] = slopes[layer] * z
                gammas[layer, now, until] = gs[layer, now] @ gs[layer, until].T / s
                gammas[layer, until, now] = gammas[layer, now, until].T
                error[now] = y - f[now]
            if not gamma and t + 1 < steps:
                stack = zip([kx, *phis[:, now, now]], [*gammas[:, now, now], np.ones_like(kx)])
                f[(t + 1) * p : (t + 2) * p] = f[now] + lr * np.sum([a * b for a, b in stack], axis=0) @ error[now]
        _finite(f[now], t, lr)
    return (f, phis, gammas), left_out


def _finite(values: np.ndarray, t: int, lr: float) -> None:
    # A square beyond this would overflow on the way to the next kernel.
    if not np.abs(values).max() < 1e100:
        raise RuntimeError(
            f"mean_field_dynamics: step {t} overflowed: training diverges. Take a smaller learning_rate (now {lr:g}) or a smaller gamma."
        )
