"""The equations of `mean_field_dynamics`, iterated: fields from kernels and responses, then kernels and responses from fields.

A linear layer is solved exactly, ``h = (I - gamma^2 C D)^{-1} (u + gamma C r)``; any other by Monte Carlo, with pairs ``(u, r)`` and
``(u, -r)``, and responses by Stein's lemma: with ``r = R eps`` and a Cholesky factor R, ``gamma A = E[phi(h) eps^T] R^{-1}``, of which
the causal half is kept. Its noise is of order (steps P / samples), so it is for few steps: `march` has less.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import solve_triangular

Activation = Callable[[Array], Array]
_JITTER = 1e-5
"""White noise on Monte-Carlo fields, relative to their variance, so that kernels of rank below P steps have a Cholesky factor."""


class _State(NamedTuple):
    """Order parameters: f, ``(T P)``; Phi^1..L, G^1..L, A^1..L, B^1..L (``B^l`` of layer l's backward field), each ``(L, T P, T P)``."""

    f: np.ndarray
    phi: np.ndarray
    g: np.ndarray
    a: np.ndarray
    b: np.ndarray


def iterate(
    phi: Activation | None, kx: Float[np.ndarray, "P P"], y: Float[np.ndarray, "P"], *, depth: int, gamma: float, lr: float, steps: int,
    samples: int, rng: np.random.Generator, damping: float, rounds: int, tolerance: float,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int, float]:  # fmt: skip
    """Outputs ``(T P)`` and kernels Phi and G ``(L, T P, T P)``; rounds that were needed, and the change in the last.

    Raises
    ------
    RuntimeError
        If the iteration overflows, or does not converge.
    """
    p, half = y.size, samples // 2
    n = steps * p
    kx, y = np.kron(np.ones((steps, steps)), kx), np.tile(y, steps)
    noise = [] if phi is None else [(rng.standard_normal((n, half)), rng.standard_normal((n, half))) for _ in range(depth)]
    zeros = np.zeros((depth, n, n))
    state = _State(y.copy(), np.stack([kx] * depth), np.ones((depth, n, n)), zeros, zeros)
    residual = math.inf
    for i in range(1, rounds + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            new = _update(phi, state, kx, y, noise, gamma, lr, p)
        new = new._replace(f=_descent(new, state.f, kx, y, lr, p, gamma))
        before, residual = residual, max(_change(a, b) for a, b in zip(new[:3], state[:3]))
        if not math.isfinite(residual):
            raise RuntimeError(
                f"mean_field_dynamics: iteration {i} overflowed; the change before was {before:.3g} of the kernels' size. Training may "
                f"diverge: take a smaller learning_rate (now {lr:g}). If it does not, raise damping (now {damping:g}), say to 0.5."
            )
        state = new if i == 1 else _State(*(damping * a + (1 - damping) * b for a, b in zip(state, new)))
        if i > 2 and residual <= tolerance:
            return (state.f, state.phi, state.g), i, residual
    raise RuntimeError(
        f"mean_field_dynamics: not converged after {rounds} rounds: the last changed a kernel or the predictions by {residual:.3g} of "
        f"their size, and tolerance is {tolerance:g}. Raise damping (now {damping:g}), say to 0.5, or rounds, or take a smaller lr."
    )


def _change(new: np.ndarray, old: np.ndarray) -> float:
    if not np.isfinite(new).all():
        return math.inf
    size = np.abs(new).max()
    return float(np.abs(new - old).max() / size) if size else 0.0


def _descent(state: _State, before: np.ndarray, kx: np.ndarray, y: np.ndarray, lr: float, p: int, gamma: float) -> np.ndarray:
    """Outputs by the tangent kernel ``sum_l G^{l+1} Phi^l``, and what it lacks of ``E z phi(h) / gamma`` over a step, of order lr².

    At gamma = 0 it lacks nothing. Elsewhere the fixed point is that of ``E z phi(h) / gamma``, but the way there does not overshoot.
    """
    below, above = [kx, *state.phi], [*state.g, np.ones_like(kx)]
    kernel = np.sum([g * k for g, k in zip(above, below)], axis=0)
    f = np.zeros_like(y)
    for t in range(p, y.size, p):
        now, then = slice(t - p, t), slice(t, t + p)
        k = lr * kernel[now, now]
        lacking = state.f[then] - state.f[now] - k @ (y - before)[now] if gamma else 0.0
        f[then] = f[now] + k @ (y - f)[now] + lacking
    return f


def _update(phi: Activation | None, state: _State, kx: np.ndarray, y: np.ndarray, noise: list, gamma: float, lr: float, p: int) -> _State:
    depth, n = state.phi.shape[:2]
    time = np.arange(n) // p
    past = time[:, None] > time[None, :]
    error = lr * (y - state.f) * past
    ones = np.ones((n, n))
    phis, gs, a, b = state.phi.copy(), state.g.copy(), state.a.copy(), state.b.copy()
    f = state.f
    # Layers take the newest kernel from below; gradients come from above, of the iterate before.
    for layer in range(depth):
        under = phis[layer - 1] if layer else kx
        over = state.g[layer + 1] if layer + 1 < depth else ones
        c = error * under + (a[layer - 1] if layer else 0)
        d = error * over + (state.b[layer + 1] if layer + 1 < depth else 0)
        if phi is None:
            phis[layer], gs[layer], a[layer], b[layer], f = _linear(under, over, c, d, gamma)
        else:
            phis[layer], gs[layer], a[layer], b[layer], f = _sampled(phi, under, over, c, d, noise[layer], gamma, p)
    return _State(f, phis, gs, a, b)


def _linear(under: np.ndarray, over: np.ndarray, c: np.ndarray, d: np.ndarray, gamma: float) -> tuple[np.ndarray, ...]:
    """Kernels, responses and ``E h g / gamma`` of a linear layer, whose fields are jointly Gaussian."""
    eye = np.eye(len(c))
    lower = {"lower": True, "unit_diagonal": True, "check_finite": False}
    m = solve_triangular(eye - gamma**2 * c @ d, eye, **lower)
    a, b = m @ c, d + gamma**2 * d @ m @ c @ d
    # h = m u + gamma a r, and g = gamma b u + k r.
    k = eye + gamma**2 * d @ a
    mu, ar = m @ under, a @ over
    return (
        mu @ m.T + gamma**2 * ar @ a.T,
        gamma**2 * b @ under @ b.T + k @ over @ k.T,
        a,
        b,
        np.sum(mu * b, axis=1) + np.sum(ar * k, axis=1),
    )


def _sampled(
    phi: Activation, under: np.ndarray, over: np.ndarray, c: np.ndarray, d: np.ndarray, noise: tuple[np.ndarray, np.ndarray],
    gamma: float, p: int,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Kernels, responses and ``E z phi(h) / gamma`` of a layer, by means over coordinates."""
    root_u, root_r = _root(under), _root(over)
    # (u, r) and (u, -r): what is odd in r, and divided by gamma below, has no noise of order 1.
    unit_u, unit_r = np.hstack([noise[0]] * 2), np.hstack([noise[1], -noise[1]])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = _fields(phi, *(jnp.asarray(v) for v in (root_u @ unit_u, root_r @ unit_r, gamma * c, gamma * d)), p)
        value, z, g = (np.asarray(v) for v in found)
    samples = value.shape[1]
    kernels = value @ value.T / samples, g @ g.T / samples
    if not gamma:
        zeros = np.zeros_like(under)
        return *kernels, zeros, zeros, np.zeros(len(z))
    time = np.arange(len(z)) // p
    # What a field does to steps before it is noise, and would make the iteration run in circles.
    to_r = value @ unit_r.T * (time[:, None] > time)
    to_u = g @ unit_u.T * (time[:, None] >= time)
    a, b = (
        solve_triangular(root, mean.T, lower=True, trans=1, check_finite=False).T / (samples * gamma)
        for mean, root in ((to_r, root_r), (to_u, root_u))
    )
    return *kernels, a, b, np.sum(value * z, axis=1) / (samples * gamma)


def _root(k: np.ndarray) -> np.ndarray:
    """A Cholesky factor; lower triangular with time first, so a field of the past is made of noises of the past."""
    if not np.isfinite(k).all():
        return np.full_like(k, np.nan)
    return np.linalg.cholesky(k + _JITTER * np.mean(np.diagonal(k)) * np.eye(len(k)))


def _one_coordinate(phi: Activation, u: Array, r: Array, c: Array, d: Array, p: int) -> tuple[Array, Array, Array]:
    n, samples = u.shape
    steps = n // p

    def step(past: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        values, gs = past
        t, u_t, r_t, c_t, d_t = now
        h = u_t + c_t @ gs
        value, slope = jax.jvp(phi, (h,), (jnp.ones_like(h),))
        values = jax.lax.dynamic_update_slice(values, value, (t * p, jnp.zeros_like(t)))
        z = r_t + d_t @ values
        g = slope * z
        return (values, jax.lax.dynamic_update_slice(gs, g, (t * p, jnp.zeros_like(t)))), (value, z, g)

    rows = (jnp.arange(steps), *(v.reshape(steps, p, v.shape[1]) for v in (u, r, c, d)))
    start = jnp.zeros((n, samples)), jnp.zeros((n, samples))
    value, z, g = (v.reshape(n, samples) for v in jax.lax.scan(step, start, rows)[1])
    return value, z, g


_fields = jax.jit(_one_coordinate, static_argnums=(0, 5))
