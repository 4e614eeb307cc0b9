"""The feature-learning limit of Tensor Programs IV (Yang and Hu, arXiv 2011.14522): muP at infinite width, under SGD, step by step."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from paperjax.limits.tp4_linear import Answer, Training, descend
from paperjax.limits.tp4_sampled import sample
from paperjax.losses import check_labels, resolve_loss

Phi = Callable[[Array], Array]
Loss = Callable[[Array, Array], Array]


class LimitReport(NamedTuple):
    """How a `FeatureLimit` was found.

    Attributes
    ----------
    exact
        Whether it is in closed coefficients, without sampling.
    basis
        Coefficients of a vector over neurons; of sampled networks the most independent Gaussians in a field.
    left_out
        The largest share of a Gaussian field's variance at a step that was too little to be drawn; 0 where nothing is sampled.
    loss
        Of each step's batch before the step, ``(T,)``; the mean over runs.

    Examples
    --------
    >>> LimitReport(True, 3, 0.0, np.zeros(2)).exact
    True
    """

    exact: bool
    basis: int
    left_out: float
    loss: Float[np.ndarray, " T"]


class FeatureLimit(NamedTuple):
    """An infinitely wide network in muP before each of T steps and after the last; float64, NumPy.

    Attributes
    ----------
    outputs
        f at x, ``(T + 1, P, O)``.
    test_outputs
        f at x_test, ``(T + 1, P', O)``.
    features
        ``Phi^l_t``, ``(L, T + 1, Q, Q)``: means over neurons of ``phi(h^l_t(a)) phi(h^l_t(b))``, at the points of x, then of x_test.
    stderr
        Standard errors of outputs, test_outputs and features over runs; zeros where nothing is sampled.
    report
        How it was found.

    Examples
    --------
    >>> found = tp4_limit(np.eye(2), np.array([[1.0], [-1.0]]), depth=1, learning_rate=0.1, steps=3)
    >>> found.outputs.shape, found.features.shape, found.report.exact
    ((4, 2, 1), (1, 4, 2, 2), True)
    """

    outputs: Float[np.ndarray, "T P O"]
    test_outputs: Float[np.ndarray, "T R O"]
    features: Float[np.ndarray, "L T Q Q"]
    stderr: tuple[Float[np.ndarray, "T P O"], Float[np.ndarray, "T R O"], Float[np.ndarray, "L T Q Q"]]
    report: LimitReport


def tp4_limit(
    x: Float[Array | np.ndarray, "P D"],
    y: Array | np.ndarray,
    *,
    depth: int,
    learning_rate: float | Sequence[float] | np.ndarray,
    steps: int,
    loss: str | Loss = "mse",
    phi: Phi | None = None,
    batches: Sequence[Any] | Array | np.ndarray | None = None,
    x_test: Float[Array | np.ndarray, "R _"] | None = None,
    outputs: int | None = None,
    rates: Sequence[float] | None = None,
    variances: Sequence[float] | None = None,
    samples: int = 2000,
    replicas: int = 4,
    key: Array | None = None,
) -> FeatureLimit:
    """Outputs and feature kernels of an infinitely wide muP network with one or two hidden layers at every step of SGD.

    The network of width n is ``f(x) = V^T phi(h^L) / n``, ``h^1 = U x``, ``h^2 = W phi(h^1)`` with independent Gaussian weights, U and V of
    variance 1, W of variance 1/n. A step is SGD on ``loss(f, y)`` of its batch with the rates ``n lr``, ``lr`` and ``lr / n`` of U, W and
    V / n: the paper's muP, whose factors sqrt(n) are written out. As n goes to infinity neurons become independent copies of random
    variables, f their mean; f is 0 at the start.

    Linear networks (``phi=None``) are exact, their vectors being coefficients in a basis of the initial weights (`tp4_linear`). Others
    are sampled by the paper's rules for ``Z`` (`tp4_sampled`); with two hidden layers time and memory grow with the examples of all batches
    together, and standard errors do not count the share of a variance that is left undrawn, below 1e-3 (``report.left_out``).

    Parameters
    ----------
    x, y
        Inputs ``(P, D)``; labels, ``(P, O)`` if of floating point, or integers ``(P, ...)`` as the loss takes them.
    depth
        L, hidden layers: 1 or 2.
    learning_rate
        lr: at least 0, one for all steps or one for each ``(T,)``.
    steps
        T, the number of updates.
    loss
        "mse", "cross_entropy", "logistic", or a function of outputs ``(B, O)`` and labels of a batch to a scalar.
    phi
        Activation, elementwise; ``None`` is linear.
    batches
        For each step the rows of x that it sees, T lists of indices, one or more; by default all of them.
    x_test
        Further inputs ``(P', D)`` at which the network is evaluated.
    outputs
        O; needed with integer labels.
    rates
        Factors of lr of each of the ``L + 1`` layers, first to readout, at least 0; by default 1, the paper's.
    variances
        Of U, of W (times n) and of V; by default 1, the paper's. The network of a `paperjax.plan` in `paperjax.mup` with base width b of
        `paperjax.models.mlp` with D inputs, no bias, ``weight_variance=s`` and ``readout_variance=r`` has variances ``(s / D, s, r b)``
        and rates ``(1 / b, 1, b)``. That of `mean_field_dynamics` has ``(1 / D, 1, 1 / gamma^2)`` and ``(gamma^2 / D, gamma^2, 1)``,
        with ``loss = 1/2 sum (f - y)^2``.
    samples, replicas
        Neurons of each layer in an independent run (even), and runs; standard errors are over runs. The mean of a run differs from infinite
        width by order 1 / samples.
    key
        Draws the runs; needed with an activation.

    Returns
    -------
    FeatureLimit

    Raises
    ------
    ValueError
        If depth is neither 1 nor 2, a rate or variance is negative, a batch is empty or names rows that are not there, labels do not fit,
        the loss is no scalar or not finite, phi is not elementwise or not finite, or an option is out of range.
    RuntimeError
        If training diverges (says at which step), or samples are too few for the independent Gaussians.

    References
    ----------
    Yang and Hu, arXiv 2011.14522: the maximal update limit.

    Examples
    --------
    One linear hidden layer and one example at a time:

    >>> x, y = np.eye(2), np.array([[1.0], [-1.0]])
    >>> found = tp4_limit(x, y, depth=1, learning_rate=0.2, steps=20, batches=[[t % 2] for t in range(20)])
    >>> found.outputs[[0, 2, -1], :, 0].round(3).tolist()
    [[0.0, 0.0], [0.8, -0.864], [1.0, -1.0]]

    Two hidden layers of tanh, and how well 4 runs of 200 neurons know the outputs:

    >>> options = dict(phi=jnp.tanh, samples=200, key=jax.random.key(0))
    >>> found = tp4_limit(x, y, depth=2, learning_rate=0.2, steps=5, **options)
    >>> bool(found.outputs[-1, 0, 0] > 0.3), bool(found.stderr[0].max() < 0.1)
    (True, True)
    """
    inputs, labels = np.asarray(x, np.float64), np.asarray(y)
    tests = np.zeros((0, *inputs.shape[1:])) if x_test is None else np.asarray(x_test, np.float64)
    _check_network(depth, phi, samples, replicas, key)
    _check_inputs(inputs, tests)
    rate = _rates(learning_rate, steps, rates, depth)
    variance = _per_layer("variances", variances, depth)
    if depth == 2 and not variance[1] > 0:
        raise ValueError("tp4_limit: variances[1] = 0: a hidden layer that starts at 0 passes nothing on. Give it a variance above 0.")
    rows = _batches(batches, steps, len(inputs))
    labels, count = _labels(labels, len(inputs), outputs)
    function = resolve_loss(loss)
    check_labels(function, labels, (len(inputs), count), "y")
    for b in {len(at): at for at in rows}.values():
        _check_loss(function, labels[b], count)
    # Gaussian weights are the same in every orthonormal basis, so D is at most the number of points.
    everything = np.concatenate([inputs, tests])
    if everything.shape[1] > len(everything):
        everything = np.linalg.qr(everything.T)[1].T
    words = np.asarray(jax.random.key_data(key)).ravel() if key is not None else ()

    def run(replica: int) -> tuple[Answer, int, float, np.ndarray]:
        losses = np.zeros(len(rows))

        def gradient(t: int, f: np.ndarray) -> np.ndarray:
            losses[t], chi = _slope(function, f, labels[rows[t]], t)
            return chi

        training = Training(everything, rows, rate, variance, gradient, count)
        if phi is None:
            return *descend(training, depth), 0.0, losses
        return *sample(training, phi, depth, samples, np.random.default_rng([*words, replica])), losses

    numbers = range(1 if phi is None else replicas)
    # Products are small: BLAS is faster as one thread, and runs take the others.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(len(numbers), os.cpu_count() or 1)) as pool:
        answers, bases, left_out, losses = zip(*pool.map(run, numbers))
    (f, f_error), (features, features_error) = (_over_runs([answer[i] for answer in answers]) for i in (0, 1))
    p = len(inputs)
    report = LimitReport(phi is None, max(bases), max(left_out), np.mean(losses, axis=0))
    return FeatureLimit(f[:, :p], f[:, p:], features, (f_error[:, :p], f_error[:, p:], features_error), report)


def _over_runs(found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    # One linear solution has no sampling error; one run of neurons has one that nothing tells.
    error = np.std(found, axis=0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.zeros_like(found[0])
    return np.mean(found, axis=0), error


def _value_and_gradient(loss: Loss, f: Array, y: Array) -> tuple[Array, Array]:
    return jax.value_and_grad(loss)(f, y)


_jitted = jax.jit(_value_and_gradient, static_argnums=0)


def _slope(loss: Loss, f: np.ndarray, y: np.ndarray, t: int) -> tuple[float, np.ndarray]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, chi = (np.asarray(v) for v in _jitted(loss, jnp.asarray(f), jnp.asarray(y)))
    if not (np.isfinite(value) and np.isfinite(chi).all()):
        raise ValueError(
            f"tp4_limit: the loss or its gradient is not finite at step {t}, at outputs between {f.min():.3g} and {f.max():.3g}; outputs "
            "start at 0, where the loss must be finite. If they have grown, training diverges: take smaller learning rates."
        )
    return float(value), chi


def _check_network(depth: int, phi: Phi | None, samples: int, replicas: int, key: Array | None) -> None:
    if isinstance(depth, bool) or depth not in (1, 2):
        raise ValueError(
            f"tp4_limit: depth = {depth!r}, but it has one or two hidden layers; without one it is linear regression, and deeper networks "
            "in full-batch descent are `mean_field_dynamics`."
        )
    if replicas < 2 or samples < 2 or samples % 2:
        raise ValueError(f"tp4_limit: samples = {samples}, replicas = {replicas}; a standard error needs two runs, and samples are even.")
    if phi is None:
        return
    if key is None:
        raise ValueError("tp4_limit: neurons with an activation are drawn: give key=jax.random.key(0), say.")
    if (shape := jax.eval_shape(phi, jax.ShapeDtypeStruct((2, 3), np.float32)).shape) != (2, 3):
        raise ValueError(f"tp4_limit: phi maps shape (2, 3) to {shape}; an activation is a function of each entry.")


def _check_inputs(inputs: np.ndarray, tests: np.ndarray) -> None:
    if inputs.ndim != 2 or not inputs.size or tests.ndim != 2 or tests.shape[1] != inputs.shape[1]:
        raise ValueError(f"tp4_limit: x has shape {inputs.shape} and x_test {tests.shape}. Give x (P, D) and x_test (P', D).")
    for name, array in (("x", inputs), ("x_test", tests)):
        if not np.isfinite(array).all():
            raise ValueError(f"tp4_limit: {name} has entries that are not finite. Leave those examples out.")


def _per_layer(name: str, given: Sequence[float] | None, depth: int) -> np.ndarray:
    values = np.ones(depth + 1) if given is None else np.asarray(given, np.float64)
    if values.shape != (depth + 1,) or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(
            f"tp4_limit: {name} = {given}: one for each of the {depth + 1} layers, first to readout, finite and at least 0 is needed."
        )
    return values


def _rates(learning_rate: Any, steps: int, rates: Sequence[float] | None, depth: int) -> np.ndarray:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"tp4_limit: steps = {steps!r}, but it is a whole number of at least 1.")
    lr = np.asarray(learning_rate, np.float64)
    if lr.shape not in ((), (steps,)):
        raise ValueError(f"tp4_limit: learning_rate has shape {lr.shape}. Give one number, or one for each of {steps} steps.")
    if not np.isfinite(lr).all() or lr.min() < 0:
        raise ValueError(f"tp4_limit: learning_rate = {lr.min() if math.isfinite(lr.min()) else lr}: it is finite and at least 0.")
    return np.broadcast_to(lr, (steps,))[:, None] * _per_layer("rates", rates, depth)


def _batches(batches: Any, steps: int, p: int) -> list[np.ndarray]:
    if batches is None:
        return [np.arange(p)] * steps
    if len(batches) != steps:
        raise ValueError(f"tp4_limit: {len(batches)} batches for {steps} steps. Give the rows of x for each step.")
    rows = [np.asarray(batch) for batch in batches]
    for t, batch in enumerate(rows):
        if batch.ndim != 1 or not batch.size:
            raise ValueError(f"tp4_limit: the batch of step {t} has shape {batch.shape}; it is a list of one or more rows of x.")
        if not np.issubdtype(batch.dtype, np.integer) or batch.min() < 0 or batch.max() >= p:
            raise ValueError(f"tp4_limit: the batch of step {t} is {batch}, but rows of x are whole numbers in 0..{p - 1}.")
    return rows


def _labels(labels: np.ndarray, p: int, outputs: int | None) -> tuple[np.ndarray, int]:
    if labels.ndim < 1 or len(labels) != p:
        raise ValueError(f"tp4_limit: y has shape {labels.shape}, and x has {p} rows. Give one label for each.")
    if np.issubdtype(labels.dtype, np.integer):
        if outputs is None:
            raise ValueError("tp4_limit: y holds integers, which do not say how many outputs there are: give outputs=10, say.")
    elif labels.ndim != 2 or labels.shape[1] != (labels.shape[1] if outputs is None else outputs):
        wanted = f"({p}, {'outputs' if outputs is None else outputs})"
        raise ValueError(f"tp4_limit: y has shape {labels.shape}; labels of floating point are {wanted}. For one output: y[:, None].")
    elif not np.isfinite(labels).all():
        raise ValueError("tp4_limit: y has entries that are not finite. Leave those examples out.")
    else:
        labels, outputs = labels.astype(np.float64), labels.shape[1]
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise ValueError(f"tp4_limit: outputs = {outputs!r}, but it is a whole number of at least 1.")
    return labels, outputs


def _check_loss(loss: Loss, y: np.ndarray, outputs: int) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = jax.eval_shape(loss, jax.ShapeDtypeStruct((len(y), outputs), np.float64), jax.ShapeDtypeStruct(y.shape, y.dtype))
    if getattr(found, "shape", None) != ():
        raise ValueError(f"tp4_limit: the loss returns {found} and not one number. Take the mean or the sum over the batch.")
