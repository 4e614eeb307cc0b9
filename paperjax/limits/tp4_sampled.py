"""Networks of infinite width in muP, nonlinear: a layer is S sampled coordinates, and matrices act by their Tensor-Program rules.

With ``U`` the first layer's weights and ``v`` the readout as random vectors over neurons, a step on a batch with ``chi = d loss / d f`` is

    U <- U - lr sum_i g^1_i x_i^T,      v <- v - lr sum_i chi_i phi(h^L_i),      g^l_i = phi'(h^l_i) z^l_i,      z^L_i = v chi_i

At two hidden layers W's initial value makes of a vector a Gaussian of its own and a response to the Gaussians of its transpose (the hat and
the dot part of Z in the paper), and what W has learned is of low rank:

    h^2_t(x) = u + sum_s E[d phi(h^1_t(x)) / d r_s] g^2_s - lr sum_s E[phi(h^1_s) phi(h^1_t(x))] g^2_s,    u of covariance E phi phi
    z^1_t    = r + sum_s E[d g^2_t / d u_s] phi(h^1_s)    - lr sum_s E[g^2_s g^2_t] phi(h^1_s),            r of covariance E g g

over earlier batches s. Points outside of the batch of a step never reach another step: their Gaussians are drawn and forgotten.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from paperjax.limits.mean_field_noise import (
    MOST_LEFT_OUT,
    NEGLIGIBLE,
    Field,
    activated,
    avoiding,
    beyond,
    draw,
    new_field,
    response,
    reveal,
    with_dual,
)
from paperjax.limits.tp4_linear import Answer, Training, finite

Phi = Callable[[Array], Array]


class _Hidden(NamedTuple):
    """The second layer's weights W: the fields of W and of its transpose, and rows ``(n, S)`` of what they have met.

    values: ``sqrt(variance) phi(h^1)`` of the batches. gradients: ``g^2``. learned: the rate of each row over the variance, ``(n,)``.
    """

    forward: Field
    backward: Field
    values: np.ndarray
    gradients: np.ndarray
    learned: np.ndarray
    left_out: float


def sample(training: Training, phi: Phi, depth: int, samples: int, rng: np.random.Generator) -> tuple[Answer, int, float]:
    """Outputs and kernels at steps 0 to T, the most independent noises in a field, and the largest share of a variance left out.

    Raises
    ------
    ValueError
        If phi or its derivative is not finite at a preactivation.
    RuntimeError
        If something overflows, or `samples` are too few for the number of independent noises.
    """
    half, s = samples // 2, 2 * (samples // 2)
    (q, d), o, steps = training.inputs.shape, training.outputs, len(training.batches)
    x, deviations = training.inputs, np.sqrt(training.variances)
    if max(d + 1, o) > half:
        raise RuntimeError(_too_few(samples, f"the {max(d, o)} independent weights that a neuron has for inputs or outputs"))
    # Columns of U are the same on both halves, those of v minus each other.
    u = deviations[0] * half**0.5 * np.tile(draw(new_field(1, half), d, rng), 2)
    v = deviations[-1] * half**0.5 * np.kron([1, -1], draw(new_field(-1, half), o, rng))
    none = np.zeros((0, s))
    hidden = _Hidden(new_field(1, half), new_field(-1, half), none, none, np.zeros(0), 0.0)
    f, kernels = np.zeros((steps + 1, q, o)), np.zeros((depth, steps + 1, q, q))
    for t in range(steps + 1):
        at = training.batches[t] if t < steps else np.zeros(0, int)
        with np.errstate(over="ignore", invalid="ignore"):
            h = x @ u
            finite(h, t)
            below, below_slope = activated(phi, h)
            top, slope = below, below_slope
            if depth == 2:
                hidden, h = _through(hidden, deviations[1] * below, at, v, rng)
                finite(h, t)
                top, slope = activated(phi, h)
            f[t] = top @ v.T / s
            kernels[0, t], kernels[-1, t] = below @ below.T / s, top @ top.T / s
            finite(f[t], t)
            if t == steps:
                break
            chi = training.gradient(t, f[t, at])
            rates = training.rates[t]
            g = slope[at] * (chi @ v)
            if depth == 2:
                hidden, z = _back(hidden, g, rates[1], deviations[1], rng)
                g = below_slope[at] * z
            u, v = u - rates[0] * x[at].T @ g, v - rates[-1] * chi.T @ top[at]
    if hidden.left_out > MOST_LEFT_OUT:
        left = f"all independent noises of {steps} steps: {hidden.left_out:.1%} of the variance of a field is left out"
        raise RuntimeError(_too_few(samples, left))
    noises = max(d, len(hidden.forward.pivots), len(hidden.backward.pivots))
    return (f, kernels), noises, hidden.left_out


def _too_few(samples: int, what: str) -> str:
    return f"tp4_limit: {samples} samples have no room for {what}. Raise samples, say to {2 * samples}, or take fewer steps or points."


def _through(hidden: _Hidden, values: np.ndarray, at: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> tuple[_Hidden, np.ndarray]:
    """``W values`` at all points ``(Q, S)``, of which the batch's enter the history."""
    q, s = values.shape
    rest = np.setdiff1d(np.arange(q), at)
    h = np.zeros_like(values)
    rows = np.concatenate([hidden.values, values[at]])
    # New noise knows nothing of v.
    forward, left_out = hidden.forward, hidden.left_out
    if at.size:
        forward, h[at], left = reveal(forward, values[at] @ rows.T / s, rng, NEGLIGIBLE, v)
        left_out = max(left_out, left)
    if rest.size:
        across = values[rest] @ rows[forward.pivots].T / s
        h[rest], left = beyond(avoiding(forward, v), across, values[rest] @ values[rest].T / s, rng, NEGLIGIBLE)
        left_out = max(left_out, left)
    h += response(values, hidden.backward) - (values @ hidden.values.T / s * hidden.learned) @ hidden.gradients
    known = len(forward.dual)
    forward = with_dual(forward, rows)
    backward = avoiding(hidden.backward, forward.dual[known:])
    return hidden._replace(forward=forward, backward=backward, values=rows, left_out=left_out), h


def _back(hidden: _Hidden, g: np.ndarray, rate: float, deviation: float, rng: np.random.Generator) -> tuple[_Hidden, np.ndarray]:
    """``W^T g`` for the rows ``(B, S)`` of the batch whose values are the last of the history; then W learns from them."""
    s, before = g.shape[1], len(hidden.gradients)
    rows = np.concatenate([hidden.gradients, g])
    kernel = g @ rows.T / s
    backward, z, left = reveal(hidden.backward, kernel, rng, NEGLIGIBLE)
    z = z + response(g, hidden.forward) - (kernel[:, :before] * hidden.learned) @ hidden.values[:before]
    known = len(backward.dual)
    backward = with_dual(backward, rows)
    forward = avoiding(hidden.forward, backward.dual[known:])
    learned = np.concatenate([hidden.learned, np.full(len(g), rate / deviation**2 if deviation else 0.0)])
    hidden = hidden._replace(forward=forward, backward=backward, gradients=rows, learned=learned, left_out=max(hidden.left_out, left))
    return hidden, deviation * z
