"""Networks of infinite width in muP while they train: dynamical mean-field theory (Bordelon and Pehlevan, arXiv 2205.09653).

The network has L hidden layers of width N, weights N(0, 1), preactivations ``h^1 = W^0 x / sqrt(D)``, ``h^{l+1} = W^l phi(h^l) / sqrt(N)``
and the output ``f = w . phi(h^L) / (gamma N)``. Full-batch gradient descent on ``1/2 sum_mu (y_mu - f_mu)^2`` has the learning rate
``lr gamma^2 N``. At N = infinity a coordinate of layer l obeys, with ``Delta = y - f`` and ``g = phi'(h) z``,

    h_mu(t) = u_mu(t) + gamma sum_{s, nu} C_{mu nu}(t, s) g_nu(s),        C = A^{l-1} + lr Phi^{l-1} Delta(s) [s < t]
    z_mu(t) = r_mu(t) + gamma sum_{s, nu} D_{mu nu}(t, s) phi(h_nu(s)),   D = B^l + lr G^{l+1} Delta(s) [s < t]

with Gaussian u of covariance Phi^{l-1} and r of covariance G^{l+1}, and responses ``A^l = E d phi(h^l) / d r^l / gamma``,
``B^{l-1} = E d g^l / d u^l / gamma``. Time and sample are one index, time first, so that causal matrices are lower triangular.
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


class Dynamics(NamedTuple):
    """A network of infinite width at every step of its training; float64, NumPy.

    Attributes
    ----------
    predictions
        f, ``(steps, P)``.
    features
        ``Phi^l(t, s)``, ``(L, steps, P, steps, P)``: means of ``phi(h_mu(t)) phi(h_nu(s))``.
    gradients
        ``G^l(t, s)``, of the same shape: means of ``g_mu(t) g_nu(s)``.
    alignment
        Cosine of ``Phi^l(t, t)`` with ``y y^T``, ``(L, steps)``; 0 where the labels are 0.
    stderr
        Standard errors of predictions, features and gradients over replicas; zeros where nothing is sampled.
    rounds
        Iterations of the fixed point, of the slowest replica.
    residual
        The largest relative change of a kernel or the predictions in the last of them.

    Examples
    --------
    >>> answer = mean_field_dynamics(np.eye(2) * 2**0.5, np.array([1.0, -1.0]), depth=1, gamma=1.0, learning_rate=0.1, steps=3)
    >>> answer.predictions.shape, answer.features.shape
    ((3, 2), (1, 3, 2, 3, 2))
    """

    predictions: Float[np.ndarray, "T P"]
    features: Float[np.ndarray, "L T P T P"]
    gradients: Float[np.ndarray, "L T P T P"]
    alignment: Float[np.ndarray, "L T"]
    stderr: tuple[Float[np.ndarray, "T P"], Float[np.ndarray, "L T P T P"], Float[np.ndarray, "L T P T P"]]
    rounds: int
    residual: float


class _State(NamedTuple):
    """Order parameters: f, ``(T P)``; Phi^1..L, G^1..L, A^1..L, B^1..L (``B^l`` of layer l's backward field), each ``(L, T P, T P)``."""

    f: np.ndarray
    phi: np.ndarray
    g: np.ndarray
    a: np.ndarray
    b: np.ndarray


def mean_field_dynamics(
    x: Float[Array | np.ndarray, "P D"],
    y: Float[Array | np.ndarray, "P"],
    *,
    depth: int,
    gamma: float,
    learning_rate: float,
    steps: int,
    phi: Activation | None = None,
    samples: int = 1000,
    replicas: int = 4,
    damping: float = 0.0,
    rounds: int = 100,
    tolerance: float | None = None,
    key: Array | None = None,
) -> Dynamics:
    """Kernels and predictions of an infinitely wide muP network at steps 0 to ``steps - 1`` of full-batch gradient descent.

    The self-consistent equations of the module are iterated: fields from kernels and responses, then kernels and responses from fields.
    A linear layer is solved exactly, ``h = (I - gamma^2 C D)^{-1} (u + gamma C r)``; any other by Monte Carlo, with pairs ``(u, r)`` and
    ``(u, -r)``, whose mean starts at f = 0. Only one hidden layer can be sampled: there are no responses.

    Parameters
    ----------
    x, y
        Inputs ``(P, D)`` and labels ``(P,)``.
    depth
        L, the number of hidden layers, at least 1.
    gamma
        Richness, at least 0; at 0 training is that of the constant tangent kernel.
    learning_rate, steps
        Learning rate, and how many times are solved for. Gradient flow to time T is the limit ``T / steps`` of it to 0; the
        error is of its order.
    phi
        Activation, elementwise; ``None`` is linear, where nothing is sampled.
    samples, replicas
        Coordinates of each independent run (even), and runs; standard errors are over runs.
    damping
        Share of the old iterate that is kept, in [0, 1).
    rounds, tolerance
        The most iterations, and the relative change that ends them; by default 1e-9 if linear, else 1e-3.
    key
        Draws the Monte-Carlo fields; needed with an activation.

    Returns
    -------
    Dynamics

    Raises
    ------
    ValueError
        If gamma is negative, depth is 0, shapes do not fit, something is not finite, or an option is out of range.
    NotImplementedError
        If there is an activation and more than one hidden layer.
    RuntimeError
        If the iteration does not converge: says how far it is, and what to try.

    References
    ----------
    Bordelon and Pehlevan, arXiv 2205.09653.

    Examples
    --------
    >>> x, y = np.array([[1.0]]), np.array([1.0])
    >>> answer = mean_field_dynamics(x, y, depth=1, gamma=1.0, learning_rate=0.01, steps=300)
    >>> f = answer.predictions[-1, 0]  # Gradient flow of one sample keeps H = sqrt(1 + gamma^2 f^2).
    >>> bool(abs(answer.features[0, -1, 0, -1, 0] - (1 + f**2) ** 0.5) < 0.01)
    True
    """
    inputs, labels = _checked(x, y, depth, gamma, learning_rate, steps, damping)
    if rounds < 1 or replicas < 2 or samples < 2 or samples % 2:
        raise ValueError(
            f"mean_field_dynamics: rounds = {rounds}, replicas = {replicas}, samples = {samples}; all are positive, a standard error needs "
            "two replicas, and samples are even."
        )
    if phi is not None and key is None:
        raise ValueError("mean_field_dynamics: fields behind an activation are drawn: give key=jax.random.key(0), say.")
    if phi is not None and depth > 1:
        raise NotImplementedError(
            f"mean_field_dynamics: depth = {depth} with an activation, whose responses between layers are not solved for. Give depth=1, "
            "or phi=None for a linear network of any depth."
        )
    tolerance = (1e-9 if phi is None else 1e-3) if tolerance is None else tolerance
    if not tolerance > 0:
        raise ValueError(f"mean_field_dynamics: tolerance = {tolerance}: a relative change above 0.")
    n = steps * labels.size
    kx = np.kron(np.ones((steps, steps)), inputs @ inputs.T / inputs.shape[1])
    target = np.tile(labels, steps)
    found, most, worst = [], 0, 0.0
    for replica in range(1 if phi is None else replicas):
        rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)).ravel(), replica] if key is not None else replica)
        half = samples // 2
        noise = [] if phi is None else [(rng.standard_normal((n, half)), rng.standard_normal((n, half))) for _ in range(depth)]
        state, used, residual = _solve(phi, kx, target, noise, depth, gamma, learning_rate, labels.size, damping, rounds, tolerance)
        found.append(state)
        most, worst = max(most, used), max(worst, residual)
    return _dynamics(found, labels, steps, most, worst)


def _checked(x: object, y: object, depth: int, gamma: float, lr: float, steps: int, damping: float) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1] or not inputs.size:
        raise ValueError(f"mean_field_dynamics: x has shape {inputs.shape} and y {labels.shape}. Give x (P, D) and y (P,).")
    for name, array in (("x", inputs), ("y", labels)):
        if not np.isfinite(array).all():
            raise ValueError(f"mean_field_dynamics: {name} has entries that are not finite. Leave those examples out.")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"mean_field_dynamics: depth = {depth!r} hidden layers, but at least 1 is needed; 0 is linear regression.")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"mean_field_dynamics: gamma = {gamma}, but the richness is finite and at least 0 (0 is lazy).")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"mean_field_dynamics: learning_rate = {lr}, but a learning rate is finite and above 0.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"mean_field_dynamics: steps = {steps!r}, but it is a whole number of at least 1.")
    if not 0 <= damping < 1:
        raise ValueError(f"mean_field_dynamics: damping = {damping}, but the share of the old iterate is in [0, 1).")
    return inputs, labels


def _solve(
    phi: Activation | None, kx: np.ndarray, y: np.ndarray, noise: list, depth: int, gamma: float, lr: float, p: int, damping: float,
    rounds: int, tolerance: float,
) -> tuple[_State, int, float]:  # fmt: skip
    n = y.size
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
            return state, i, residual
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
            phis[layer], gs[layer], f = _sampled(phi, under, over, c, d, noise[layer], gamma, p)
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
    """Kernels and ``E z phi(h) / gamma`` of the only hidden layer, which meets no responses, by means over coordinates."""
    root_u, root_r = _root(under), _root(over)
    # (u, r) and (u, -r): what is odd in r, and divided by gamma below, has no noise of order 1.
    unit_u, unit_r = np.hstack([noise[0]] * 2), np.hstack([noise[1], -noise[1]])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = _fields(phi, *(jnp.asarray(v) for v in (root_u @ unit_u, root_r @ unit_r, gamma * c, gamma * d)), p)
        value, z, g = (np.asarray(v) for v in found)
    samples = value.shape[1]
    both = np.sum(value * z, axis=1) / (samples * gamma) if gamma else np.zeros(len(z))
    return value @ value.T / samples, g @ g.T / samples, both


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


def _dynamics(found: list[_State], labels: np.ndarray, steps: int, rounds: int, residual: float) -> Dynamics:
    depth, p, runs = len(found[0].phi), labels.size, len(found)
    shape = (depth, steps, p, steps, p)

    def over_runs(values: list[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        stacked = np.stack(values).reshape(runs, *shape)
        # One linear solution has no sampling error; one Monte-Carlo run has one that nothing tells.
        error = stacked.std(axis=0, ddof=1) / runs**0.5 if runs > 1 else np.zeros(shape)
        return stacked.mean(axis=0), error

    f, f_error = over_runs([s.f for s in found], (steps, p))
    phi, phi_error = over_runs([s.phi for s in found], shape)
    g, g_error = over_runs([s.g for s in found], shape)
    equal = np.einsum("ltatb->ltab", phi)
    scale = np.linalg.norm(equal, axis=(2, 3)) * (labels @ labels)
    along = np.einsum("a,ltab,b->lt", labels, equal, labels)
    alignment = np.divide(along, scale, out=np.zeros_like(along), where=scale > 0)
    return Dynamics(f, phi, g, alignment, (f_error, phi_error, g_error), rounds, residual)
