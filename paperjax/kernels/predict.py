"""What training does to a network whose tangent kernel stays as it is: outputs at any time, on training and test inputs.

A kernel may be that of a finite network (then the prediction is that of its linearization at the parameters of the kernel, arXiv
1902.06720) or an infinite-width limit. All functions take the three layouts of `paperjax.ntk`: full ``(N, M, *out, *out)``,
``(N, M)`` shared over outputs, and diagonal ``(N, M, *out)``, where each output goes by itself. The trace kernel is a sum over
outputs: divide it by their number before it is used as a shared one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.kernels.matrix import Numbers, known, working
from paperjax.kernels.modes import Modes, Trajectory, decompose, flow_gain, moved, rate_of, read
from paperjax.kernels.ode import gradient_flow_ode
from paperjax.kernels.posterior import Gaussian, Posterior, Prior, Solution, ensemble_posterior, posterior, solve

__all__ = [
    "Gaussian", "Posterior", "Prior", "Solution", "Trajectory", "ensemble_posterior", "gradient_descent", "gradient_flow",
    "gradient_flow_ode", "posterior", "solve",
]  # fmt: skip


def gradient_flow(
    k_train: Numbers, y: Any, k_test: Numbers | None = None, *, loss: str = "mse", rtol: float | None = None
) -> Callable[..., Trajectory]:
    """Outputs under gradient flow of a squared loss, at any time, in closed form.

    ``f(t) = y + exp(-c Theta t) (f0 - y)`` on the training inputs and
    ``f(t) = f0 - Theta_test Theta^-1 (1 - exp(-c Theta t)) (f0 - y)`` on the test inputs, in the eigenbasis of Theta. The loss sets c:

    - ``"mse"``: ``L = (1 / (N O)) sum_no (f_no - y_no)²``, so ``c = 2 / (N O)`` with O outputs. It is the loss of
      `paperjax.Experiment`, whose SGD with full batches has ``t = learning_rate * steps`` for small steps.
    - ``"half_sum_of_squares"``: ``L = ½ sum_no (f_no - y_no)²``, so ``c = 1`` and ``df/dt = -Theta (f - y)``, as in the papers.

    Parameters
    ----------
    k_train
        Theta, ``(N, N, *out, *out)``, ``(N, N)`` shared over outputs, or ``(N, N, *out)``, each output by itself.
    y
        ``(N, *out)``, floating.
    k_test
        ``(M, N, ...)``, test inputs first.
    loss
        One of the two above.
    rtol
        Eigenvalues below `rtol` times the largest count as 0: what y has in those directions is never learned, and the test kernel's
        part there is left out. By default ``max(10, sqrt(n))`` rounding units, n rows: 1e-6 in float32 and 2e-15 in float64. An
        eigenvalue below that is rounding, and over long times a prediction from it would be rounding blown up. Kernels with a
        quickly falling spectrum have most of theirs there in float32: compute them, and this, with ``jax_enable_x64``.

    Returns
    -------
    Callable
        ``f(t, f0_train=None, f0_test=None) -> Trajectory(train, test)``. The time t is a number or an array, whose axes come
        first in the answer; infinity is allowed. The outputs before training are 0 by default, as those of a centred network.
        Computes in float64 if ``jax_enable_x64`` is on, else in float32; one eigendecomposition, then ``N²`` for each time.

    Raises
    ------
    ValueError
        If shapes do not fit one another, anything is NaN, the kernel is not symmetric or not positive semi-definite (beyond the root
        of the rounding unit), the loss has no closed form, or a time is negative.
    TypeError
        If `y` holds integers.

    References
    ----------
    Jacot, Gabriel and Hongler, arXiv 1806.07572; Lee et al., arXiv 1902.06720.

    Examples
    --------
    >>> f = gradient_flow(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 1.0]), jnp.array([[1.0, 1.0]]))
    >>> f(jnp.log(2.0)).train.tolist()  # c = 2 / 2: the residuals are 1/4 and 1/2
    [0.75, 0.5]
    >>> f(jnp.array([0.0, jnp.inf])).test.tolist()
    [[0.0], [1.5]]
    """
    inputs = read(k_train, y, k_test)
    rate = rate_of(loss, inputs.y)
    modes = decompose(inputs, rtol)

    def at(t: Any, f0_train: Any = None, f0_test: Any = None) -> Trajectory:
        return moved(modes, flow_gain(modes.values, _times(t), rate), f0_train, f0_test)

    return at


def gradient_descent(
    k_train: Numbers,
    y: Any,
    k_test: Numbers | None = None,
    *,
    learning_rate: Any,
    momentum: Any = 0.0,
    nesterov: bool = False,
    loss: str = "mse",
    rtol: float | None = None,
) -> Callable[..., Trajectory]:
    """Outputs after any number of steps of full-batch gradient descent, exactly, with momentum.

    The rule is that of ``optax.sgd(learning_rate, momentum, nesterov)``: ``m <- mu m + g``, then ``theta <- theta - lr m``, or
    ``theta - lr (mu m + g)`` with Nesterov's. In the eigenbasis of Theta it is one 2 by 2 matrix for each eigenvalue, acting on the
    residual and the trace; its powers are taken by repeated squaring, so a million steps cost twenty products.

    Parameters
    ----------
    k_train, y, k_test, loss, rtol
        As in `gradient_flow`, with the same c: 2 / (N O) for ``"mse"``.
    learning_rate
        The lr; at most ``2 (1 + mu) / (c lambda_max)``, or ``2 (1 + mu) / ((1 + 2 mu) c lambda_max)`` with Nesterov's.
    momentum
        The mu, in [0, 1).
    nesterov
        Whether the step looks ahead.

    Returns
    -------
    Callable
        ``f(steps, f0_train=None, f0_test=None) -> Trajectory(train, test)``, `steps` a whole number or an array of them, whose axes
        come first in the answer. The relative error grows as the logarithm of `steps`, also where an eigenvalue hardly moves in one.

    Raises
    ------
    ValueError
        As `gradient_flow`, and if the learning rate is beyond the edge of stability, where the outputs diverge; the message has the
        largest eigenvalue and the largest stable rate.

    References
    ----------
    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    Examples
    --------
    >>> f = gradient_descent(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 1.0]), learning_rate=0.25)
    >>> f(jnp.array([1, 2])).train.tolist()  # the residuals are multiplied by 1 - 0.25 lambda
    [[0.5, 0.25], [0.75, 0.4375]]
    """
    inputs = read(k_train, y, k_test)
    rate = rate_of(loss, inputs.y)
    modes = decompose(inputs, rtol)
    if known(momentum) and not 0 <= momentum < 1:
        raise ValueError(f"momentum = {momentum}: it must be in [0, 1).")
    if known(learning_rate) and not 0 < learning_rate < np.inf:
        raise ValueError(f"learning_rate = {learning_rate}: it must be positive and finite.")
    learning_rate, momentum = working(learning_rate), working(momentum)
    _check_stable(modes, rate, learning_rate, momentum, nesterov)

    def after(steps: Any, f0_train: Any = None, f0_test: Any = None) -> Trajectory:
        return moved(modes, _stepped(modes.values, _whole(steps), rate, learning_rate, momentum, nesterov), f0_train, f0_test)

    return after


def _check_stable(modes: Modes, rate: float, learning_rate: Any, momentum: Any, nesterov: bool) -> None:
    top = modes.values.max()
    if not known(top, learning_rate, momentum) or float(top) == 0:
        return
    # Both roots of the characteristic polynomial are inside the unit circle iff this holds (the criterion of Jury).
    mu = float(momentum)
    edge = 2 * (1 + mu) / (1 + 2 * mu if nesterov else 1) / (rate * float(top))
    if float(learning_rate) > edge * (1 + 1e-6):
        raise ValueError(
            f"learning_rate = {float(learning_rate):.4g} is beyond the edge of stability, {edge:.4g}: the largest eigenvalue of k_train is "
            f"{float(top):.4g}, the Hessian's is c = {rate:.3g} times that, and the outputs would diverge. Take a smaller rate."
        )


def _stepped(values: Array, steps: Array, rate: float, lr: Any, mu: Any, nesterov: bool) -> Array:
    """How far each unit residual has moved the weights, ``(*times, blocks, n)``.

    With ``M`` the matrix that takes (residual, trace) one step on, this holds ``D = 1 - M^s`` and never M^s: a small eigenvalue would be
    lost in 1 - (1 - lr c lambda). The first row of D is divided by the eigenvalue, so it is the wanted gain, also at 0.
    """
    ahead = mu if nesterov else 0.0
    # g = c r; m <- mu m + g; r <- r - lr lambda (m, or mu m + g).
    first = (lr * rate * (1 + ahead), lr * mu * (mu if nesterov else 1.0), -rate, 1 - mu)
    power = tuple(jnp.full(values.shape, entry, values.dtype) for entry in first)
    shape = (*steps.shape, *values.shape)
    total = tuple(jnp.zeros(shape, values.dtype) for _ in first)
    weight = jnp.broadcast_to(values, shape)

    def double(bit: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        total, power = state
        taken = jnp.broadcast_to(((steps >> bit) & 1)[..., None, None] == 1, shape)
        longer = _compose(weight, total, tuple(jnp.broadcast_to(entry, shape) for entry in power))
        return tuple(jnp.where(taken, new, old) for new, old in zip(longer, total)), _compose(values, power, power)

    if not known(steps):
        return jax.lax.fori_loop(
            0, jnp.iinfo(steps.dtype).bits - 1, lambda bit, state: double(bit.astype(steps.dtype), state), (total, power)
        )[0][0]
    for bit in range(int(steps.max()).bit_length()):
        total, power = double(bit, (total, power))
    return total[0]


def _compose(values: Array, one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, ...]:
    # 1 - (1 - D)(1 - E) = D + E - D E, with the first rows divided by the eigenvalue.
    a, b, c, d = one
    p, q, r, s = two
    return (
        a + p - (values * a * p + b * r),
        b + q - (values * a * q + b * s),
        c + r - (values * c * p + d * r),
        d + s - (values * c * q + d * s),
    )


def _times(t: Any) -> Array:
    times = working(t)
    if known(times) and not (np.asarray(times) >= 0).all():
        raise ValueError(f"t = {t}: times must be 0 or more, and not NaN.")
    return times


def _whole(steps: Any) -> Array:
    steps = jnp.asarray(steps)
    if not jnp.issubdtype(steps.dtype, jnp.integer) or (known(steps) and (not steps.size or (np.asarray(steps) < 0).any())):
        raise ValueError(f"steps = {steps}: whole numbers of 0 or more, at least one. For times that are none use gradient_flow.")
    return steps
