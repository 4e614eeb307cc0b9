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
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from paperjax.limits.layer_moments import activation
from paperjax.limits.mean_field_iteration import iterate
from paperjax.limits.mean_field_march import march
from paperjax.limits.sampled import double

Activation = Callable[[Array], Array]
Order = tuple[np.ndarray, np.ndarray, np.ndarray]


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
        Iterations of the fixed point, of the slowest replica; 1 for ``solver="march"``.
    residual
        Their report: the largest relative change of a kernel or the predictions in the last of them; of a march, the largest share of a
        Gaussian field's variance at a step that was too little to be drawn.

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


def mean_field_dynamics(
    x: Float[Array | np.ndarray, "P D"],
    y: Float[Array | np.ndarray, "P"],
    *,
    depth: int,
    gamma: float,
    learning_rate: float,
    steps: int,
    phi: Activation | None = None,
    solver: str = "march",
    samples: int = 2000,
    replicas: int = 4,
    damping: float = 0.0,
    rounds: int = 100,
    tolerance: float | None = None,
    key: Array | None = None,
) -> Dynamics:
    """Kernels and predictions of an infinitely wide muP network at steps 0 to ``steps - 1`` of full-batch gradient descent.

    ``"march"`` goes forward in time with the coordinates of each layer, of which each step's fields and responses are means over what is
    known (`mean_field_march`): exact in the learning rate, no iteration. ``"iterate"`` is the paper's fixed point, damped, over whole
    trajectories (`mean_field_iteration`): a second route, whose noise and cost grow with ``steps P``. Linear layers are exact in both.

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
    solver
        ``"march"`` or ``"iterate"``, above.
    samples, replicas
        Coordinates of each layer in an independent run (even), and runs; standard errors are over runs. A run differs from infinite
        width by what a network of about that width does: its mean by 1 / samples, its noise by the root of it.
    damping
        Of ``"iterate"``: share of the old iterate that is kept, in [0, 1).
    rounds, tolerance
        Of ``"iterate"``: the most iterations, and the relative change that ends them; by default 1e-9 if linear, else 1e-3.
    key
        Draws the Monte-Carlo fields; needed with an activation.

    Returns
    -------
    Dynamics

    Raises
    ------
    ValueError
        If gamma is negative, depth is 0, shapes do not fit, something is complex or not finite (phi at a field among it), phi is not
        elementwise, jumps, or has no finite ``E phi²`` or ``E phi'²`` in a layer at the start, or an option is out of range.
    TypeError
        If phi is no function.
    RuntimeError
        If training overflows, samples are too few for the noises of a march, or the iteration does not converge: says how far it is, and
        what to try.

    Notes
    -----
    A network of width N differs from this by chance of order ``N^-1/2``, and its mean over seeds by ``1/N``: compare means. Measured for
    gamma = 1.5 and 8 steps (three examples, two or three layers): one network of width 2048 is off by 3 to 4 % in Phi and G with tanh and
    by 5 to 7 % with relu, the mean over 16 by 1 to 3 %.

    References
    ----------
    Bordelon and Pehlevan, arXiv 2205.09653: gradient flow; here are the steps of gradient descent, by the same argument.

    Examples
    --------
    >>> x, y = np.array([[1.0]]), np.array([1.0])
    >>> answer = mean_field_dynamics(x, y, depth=1, gamma=1.0, learning_rate=0.01, steps=300)
    >>> f = answer.predictions[-1, 0]  # Gradient flow of one sample keeps H = sqrt(1 + gamma^2 f^2).
    >>> bool(abs(answer.features[0, -1, 0, -1, 0] - (1 + f**2) ** 0.5) < 0.01)
    True

    Two hidden layers of tanh, and how well 4 runs of 200 coordinates know the kernels:

    >>> options = dict(phi=jax.numpy.tanh, samples=200, key=jax.random.key(0))
    >>> answer = mean_field_dynamics(x, y, depth=2, gamma=1.0, learning_rate=0.1, steps=5, **options)
    >>> bool(np.all(np.diff(answer.predictions[:, 0]) > 0)), bool(answer.stderr[1].max() < 0.1)
    (True, True)
    """
    inputs, labels = _checked(x, y, gamma, learning_rate, damping)
    _check_whole(depth=depth, steps=steps, rounds=rounds, replicas=replicas, samples=samples)
    if rounds < 1 or replicas < 2 or samples < 2 or samples % 2:
        raise ValueError(
            f"mean_field_dynamics: rounds = {rounds}, replicas = {replicas}, samples = {samples}; all are positive, a standard error needs "
            "two replicas, and samples are even."
        )
    if phi is not None and key is None:
        raise ValueError("mean_field_dynamics: fields behind an activation are drawn: give key=jax.random.key(0), say.")
    if solver not in ("march", "iterate"):
        raise ValueError(f'mean_field_dynamics: solver = {solver!r}; it is "march" or "iterate".')
    tolerance = (1e-9 if phi is None else 1e-3) if tolerance is None else tolerance
    if not tolerance > 0:
        raise ValueError(f"mean_field_dynamics: tolerance = {tolerance}: a relative change above 0.")
    kx = inputs @ inputs.T / inputs.shape[1]
    if phi is not None:
        _check_activation(phi, float(np.diagonal(kx).max()), depth)
    network = {"depth": depth, "gamma": gamma, "lr": learning_rate, "steps": steps, "samples": samples}
    words = np.asarray(jax.random.key_data(key)).ravel() if key is not None else ()

    def run(replica: int) -> tuple[Order, int, float]:
        rng = np.random.default_rng([*words, replica])
        if solver == "iterate":
            return iterate(phi, kx, labels, **network, rng=rng, damping=damping, rounds=rounds, tolerance=tolerance)
        found, left_out = march(phi, kx, labels, **network, rng=rng)
        return found, 1, left_out

    numbers = range(1 if phi is None else replicas)
    if solver == "iterate":
        runs = [run(replica) for replica in numbers]
    else:
        # Products of a march are small: BLAS is faster as one thread, and replicas take the others.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(len(numbers), os.cpu_count() or 1)) as pool:
            runs = list(pool.map(run, numbers))
    return _dynamics([found for found, _, _ in runs], labels, steps, max(used for _, used, _ in runs), max(left for _, _, left in runs))


def _checked(x: object, y: object, gamma: float, lr: float, damping: float) -> tuple[np.ndarray, np.ndarray]:
    for name, array in (("x", x), ("y", y)):
        if np.iscomplexobj(np.asarray(array)):
            raise ValueError(f"mean_field_dynamics: {name} is complex; inputs and labels are real numbers.")
    inputs, labels = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1] or not inputs.size:
        raise ValueError(f"mean_field_dynamics: x has shape {inputs.shape} and y {labels.shape}. Give x (P, D) and y (P,).")
    for name, array in (("x", inputs), ("y", labels)):
        if not np.isfinite(array).all():
            raise ValueError(f"mean_field_dynamics: {name} has entries that are not finite. Leave those examples out.")
    for name, number in (("gamma", gamma), ("learning_rate", lr), ("damping", damping)):
        if np.ndim(number):
            raise ValueError(f"mean_field_dynamics: {name} has shape {np.shape(number)}; give one number, and call once for each.")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"mean_field_dynamics: gamma = {gamma}, but the richness is finite and at least 0 (0 is lazy).")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"mean_field_dynamics: learning_rate = {lr}, but a learning rate is finite and above 0.")
    if not 0 <= damping < 1:
        raise ValueError(f"mean_field_dynamics: damping = {damping}, but the share of the old iterate is in [0, 1).")
    return inputs, labels


def _check_whole(**numbers: object) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ValueError(f"mean_field_dynamics: {name} = {number!r}, but it is a whole number.")
        if name == "depth" and number < 1:
            raise ValueError(f"mean_field_dynamics: depth = {number} hidden layers, but at least 1 is needed; 0 is linear regression.")
        if name == "steps" and number < 1:
            raise ValueError(f"mean_field_dynamics: steps = {number}, but at least 1 is needed.")


def _check_activation(phi: Activation, K: float, depth: int) -> None:
    """Sampled fields would hide it if ``E phi²`` or ``E phi'²`` is infinite in a layer."""
    act = activation(phi, "mean_field_dynamics")
    for layer in range(1, depth + 1):
        if K == 0:
            return
        with double():
            moments = float(act.square(np.array(K))), float(act.slope_square(np.array(K)))
        if not all(math.isfinite(moment) for moment in moments):
            raise ValueError(
                f"mean_field_dynamics: in layer {layer}, where preactivations have variance {K:.3g}, E phi^2 or E phi'^2 of {act.name} is "
                "not finite, or cannot be found by quadrature, and the kernels Phi and G are these means. Does it grow like exp(h²), or "
                "has its derivative a pole? Give an activation whose square and whose derivative's square have a mean."
            )
        K = moments[0]


def _dynamics(found: list[Order], labels: np.ndarray, steps: int, rounds: int, residual: float) -> Dynamics:
    depth, p, runs = len(found[0][1]), labels.size, len(found)
    shape = (depth, steps, p, steps, p)

    def over_runs(values: list[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        stacked = np.stack(values).reshape(runs, *shape)
        # One linear solution has no sampling error; one Monte-Carlo run has one that nothing tells.
        error = stacked.std(axis=0, ddof=1) / runs**0.5 if runs > 1 else np.zeros(shape)
        return stacked.mean(axis=0), error

    f, f_error = over_runs([f for f, _, _ in found], (steps, p))
    phi, phi_error = over_runs([phi for _, phi, _ in found], shape)
    g, g_error = over_runs([g for _, _, g in found], shape)
    equal = np.einsum("ltatb->ltab", phi)
    scale = np.linalg.norm(equal, axis=(2, 3)) * (labels @ labels)
    along = np.einsum("a,ltab,b->lt", labels, equal, labels)
    alignment = np.divide(along, scale, out=np.zeros_like(along), where=scale > 0)
    return Dynamics(f, phi, g, alignment, (f_error, phi_error, g_error), rounds, residual)
