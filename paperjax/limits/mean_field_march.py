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
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from paperjax.limits.mean_field_noise import MOST_LEFT_OUT, NEGLIGIBLE, activated, avoiding, new_field, response, reveal, with_dual

_ROUNDING = 1e-12
"""Share of a field's variance that linear layers leave undrawn."""
_FEW = 64
Order = tuple[Float[np.ndarray, "TP"], Float[np.ndarray, "L TP TP"], Float[np.ndarray, "L TP TP"]]


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
    answer, left_out = _march(phi, kx, y, depth, gamma, lr, steps, half, rng, NEGLIGIBLE)
    if left_out > MOST_LEFT_OUT:
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
    forward = [new_field(1, half, rng is None) for _ in range(depth)]
    backward = [new_field(-1, half, rng is None) for _ in range(depth)]
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
                forward[layer], h, left = reveal(forward[layer], under, rng, negligible)
                left_out = max(left_out, left)
                if t:
                    h = h + lr * gamma * (under[:, past] * error[past]) @ gs[layer, past]
                if layer:
                    below, k = backward[layer - 1], len(forward[layer].dual)
                    h = h + response(values[layer - 1, now], below)
                    forward[layer] = with_dual(forward[layer], values[layer - 1])
                    if rng is not None:
                        backward[layer - 1] = avoiding(below, forward[layer].dual[k:])
                values[layer, now], slope = activated(phi, h)
                slopes.append(slope)
                phis[layer, now, until] = values[layer, now] @ values[layer, until].T / s
                phis[layer, until, now] = phis[layer, now, until].T
            for layer in reversed(range(depth)):
                over = gammas[layer + 1, now, until] if layer + 1 < depth else np.ones((p, (t + 1) * p))
                _finite(over, t, lr)
                backward[layer], z, left = reveal(backward[layer], over, rng, negligible)
                left_out = max(left_out, left)
                if t:
                    z = z + lr * gamma * (over[:, past] * error[past]) @ values[layer, past]
                if layer + 1 < depth:
                    above, k = forward[layer + 1], len(backward[layer].dual)
                    backward[layer] = with_dual(backward[layer], gs[layer + 1])
                    z = z + response(gs[layer + 1, now], above)
                    if rng is not None:
                        forward[layer + 1] = avoiding(above, backward[layer].dual[k:])
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
