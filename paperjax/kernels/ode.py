"""Gradient flow of any loss under a constant kernel, integrated numerically."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Scalar

from paperjax.kernels.matrix import Numbers, fold, known, precision, unfold, working
from paperjax.kernels.modes import HALF_SUM_OF_SQUARES, Inputs, Trajectory, check_positive, read, starts
from paperjax.losses import check_labels, resolve_loss


def gradient_flow_ode(
    k_train: Numbers,
    y: Any,
    k_test: Numbers | None = None,
    *,
    loss: str | Callable[..., Any],
    outputs: tuple[int, ...] | None = None,
    friction: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 16384,
    solver: Any = None,
) -> Callable[..., Trajectory]:
    """Outputs under gradient flow of any loss, with or without inertia, by an adaptive solver of diffrax.

    ``df/dt = -Theta grad_f L(f, y)`` on the training inputs and ``df/dt = -Theta_test grad_f L(f, y)`` on the test inputs. With
    friction γ it is heavy-ball flow, ``f'' + γ f' = -Theta grad_f L``: the limit of small steps of SGD with momentum
    ``1 - γ sqrt(learning_rate)`` at ``t = sqrt(learning_rate) * steps``; at rest at the start.

    Parameters
    ----------
    k_train, k_test
        As in `paperjax.kernels.predict.gradient_flow`, in any of the three layouts.
    y
        Labels, as the loss takes them: ``(N, *out)``, or integer classes ``(N,)`` for ``"cross_entropy"``.
    loss
        Name of a loss of paperjax (``"mse"``, ``"cross_entropy"``, ``"logistic"``), ``"half_sum_of_squares"``, or a function
        ``loss(f, y) -> scalar`` of outputs ``(N, *out)``.
    outputs
        ``out``. By default it is read off `y`, and for integer classes off a full kernel.
    friction
        The γ; `None` is flow without inertia.
    rtol, atol
        Of the outputs, for one step of the solver; 1e-8 in float64 and 1e-5 in float32 by default.
    max_steps
        The solver gives up after that many.
    solver
        Of diffrax; ``Tsit5()`` by default. An explicit solver takes about ``t`` times the largest eigenvalue of
        ``Theta Hessian(L)``, over 3, steps. An implicit one (``Kvaerno5()``) takes few, each with N O linear equations to solve.

    Returns
    -------
    Callable
        ``f(t, f0_train=None, f0_test=None) -> Trajectory(train, test)`` as of `gradient_flow`; times are finite, in any order.
        Computes in float64 if ``jax_enable_x64`` is on, else in float32. Compiles at every call.

    Raises
    ------
    ValueError
        As `gradient_flow`, and if the loss is not a number, a tolerance is finer than the precision, or integer classes do not fit.
    RuntimeError
        When called, if the solver did not reach the last time.

    Examples
    --------
    >>> f = gradient_flow_ode(jnp.eye(2), jnp.array([1, 0]), loss="cross_entropy", outputs=(2,))
    >>> bool((f(10.0).train.argmax(-1) == jnp.array([1, 0])).all())
    True
    """
    y = jnp.asarray(y)
    y = y if jnp.issubdtype(y.dtype, jnp.integer) else working(y)
    inputs = read(k_train, y, k_test, outputs=_outputs(k_train, y, outputs))
    loss_fn = _half_sum_of_squares if loss == HALF_SUM_OF_SQUARES else resolve_loss(loss)
    _check_loss(loss_fn, inputs)
    if known(inputs.train):
        check_positive("k_train", jnp.linalg.eigvalsh(inputs.train), inputs.eps)
    if known(friction) and friction is not None and not 0 <= friction < np.inf:
        raise ValueError(f"friction = {friction}: it must be 0 or more and finite, or None for flow without inertia.")
    usual = 1e-8 if jnp.result_type(float) == jnp.float64 else 1e-5
    tolerances = _tolerance("rtol", rtol, usual), _tolerance("atol", atol, usual)

    def at(t: Any, f0_train: Any = None, f0_test: Any = None) -> Trajectory:
        start = starts(inputs.form, inputs.y.shape[0], inputs.test, f0_train, f0_test)
        return _integrate(inputs, loss_fn, start, _finite_times(t), friction, tolerances, max_steps, solver)

    return at


def _integrate(
    inputs: Inputs,
    loss: Callable[..., Any],
    start: tuple[Array, Array | None],
    times: Array,
    friction: Any,
    tolerances: tuple[float, float],
    max_steps: int,
    solver: Any,
) -> Trajectory:
    import diffrax  # Slow to import, and most users of paperjax never need it.

    gradient = jax.grad(loss)

    def force(f: Array) -> tuple[Array, Array | None]:
        slope = fold(gradient(f, inputs.y), inputs.form)

        def push(kernel: Array) -> Array:
            return -unfold(jnp.matmul(kernel, slope, precision="highest"), inputs.form)

        return push(inputs.train), None if inputs.test is None else push(inputs.test)

    def field(t: Any, state: Any, args: Any) -> Any:
        del t, args
        if friction is None:
            return force(state[0])
        f, speed = state
        return speed, jax.tree.map(lambda v, push: push - friction * v, speed, force(f[0]))

    state = start if friction is None else (start, jax.tree.map(jnp.zeros_like, start))
    order = jnp.argsort(times.reshape(-1))
    wanted = times.reshape(-1)[order]
    concrete = known(wanted, *jax.tree.leaves((inputs, start)))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5() if solver is None else solver,
        jnp.zeros((), times.dtype),
        wanted[-1],
        None,
        state,
        saveat=diffrax.SaveAt(ts=wanted),
        stepsize_controller=diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1]),
        max_steps=max_steps,
        # Traced, diffrax raises when the program runs; else the message below says more.
        throw=not concrete,
    )
    if concrete and not bool(solution.result == diffrax.RESULTS.successful):
        raise RuntimeError(
            f"gradient_flow_ode did not reach t = {float(wanted[-1]):.4g}: {int(solution.stats['num_steps'])} steps, of which "
            f"{int(solution.stats['num_accepted_steps'])} were accepted, with rtol {tolerances[0]:.1e} and max_steps {max_steps}. "
            f"{diffrax.RESULTS[solution.result]} A stiff kernel (a wide spectrum and a long time) wants more max_steps or "
            "solver=diffrax.Kvaerno5(); a loss that is not smooth or has no minimum wants a coarser rtol or an earlier time."
        )
    assert solution.ys is not None
    train, test = solution.ys if friction is None else solution.ys[0]
    back = jnp.argsort(order)

    def as_asked(f: Array) -> Array:
        return f[back].reshape(*times.shape, *f.shape[1:])

    return Trajectory(as_asked(train), None if test is None else as_asked(test))


def _outputs(k_train: Any, y: Any, outputs: tuple[int, ...] | None) -> tuple[int, ...]:
    if outputs is not None:
        return tuple(outputs)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        return tuple(y.shape[1:])
    rest = tuple(k_train.shape[2:])
    if not rest or rest[: len(rest) // 2] != rest[len(rest) // 2 :]:
        raise ValueError(
            f"y is {y.dtype}{list(y.shape)} and k_train has shape {tuple(k_train.shape)}: how many outputs the network has is not said. "
            "Give outputs=(classes,), or labels of shape (N, classes)."
        )
    return rest[: len(rest) // 2]


def _check_loss(loss: Callable[..., Any], inputs: Inputs) -> None:
    shape = (inputs.y.shape[0], *inputs.form.outputs)
    if known(inputs.y):
        check_labels(loss, np.asarray(inputs.y), shape)
    value = jax.eval_shape(loss, jax.ShapeDtypeStruct(shape, jnp.result_type(float)), inputs.y)
    if getattr(value, "shape", None) != ():
        raise ValueError(f"the loss must be one number, and it is {value}: take the mean or the sum over examples.")


def _half_sum_of_squares(f: Array, y: Array) -> Scalar:
    return jnp.sum(jnp.square(f - y)) / 2


def _tolerance(name: str, given: float | None, usual: float) -> float:
    if given is None:
        return usual
    least = 10 * precision(jnp.zeros((), jnp.result_type(float)))
    if not least <= given < 1:
        raise ValueError(
            f"{name} = {given}: it must be from {least:.1e}, ten rounding units of {jnp.result_type(float)}, to 1. "
            "Finer ones need jax.config.update('jax_enable_x64', True)."
        )
    return given


def _finite_times(t: Any) -> Array:
    times = working(t)
    if not times.size or (known(times) and not bool(((times >= 0) & jnp.isfinite(times)).all())):
        raise ValueError(f"t = {t}: times must be 0 or more and finite, at least one. The limit of a squared loss is gradient_flow's.")
    return times
