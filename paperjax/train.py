"""Training as one compiled loop between measurement points: pure, and vmappable over learning rate, seed and any scalar.

`train` is the whole of it for one network; `Experiment` lays many of them out. Both go through `advance`, so a step is
written once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from paperjax.binding import argument_names, call_by_name, nearest
from paperjax.losses import resolve_loss
from paperjax.model import Model, join, split


class State(NamedTuple):
    """What training carries from step to step; every leaf is an array.

    Attributes
    ----------
    trained
        The trained part of the parameters (``split(params)[0]``).
    optimizer
        The optimizer's state.
    order
        This epoch's permutation of the training examples, int32 ``(n,)``; empty for full batches.
    diverged_at
        The first step at which the loss was not finite, int32; -1 while there is none.
    """

    trained: PyTree
    optimizer: PyTree
    order: Int[Array, " n"]
    diverged_at: Int[Array, ""]


class Trained(NamedTuple):
    """What `train` returns: final parameters, and measures stacked over the measurement steps."""

    params: PyTree
    steps: Int[np.ndarray, " measurements"]
    measures: dict[str, Array]
    diverged_at: Int[Array, ""]


def log_steps(steps: int, n: int = 20) -> tuple[int, ...]:
    """Measurement steps spaced evenly in ``log(step)``: 0, 1, ..., `steps`, at most ``n + 1`` of them, none twice.

    Raises
    ------
    ValueError
        If `steps` or `n` is below 1.

    Examples
    --------
    >>> log_steps(1000, 7)
    (0, 1, 3, 10, 32, 100, 316, 1000)
    """
    if steps < 1 or n < 1:
        raise ValueError(f"log_steps needs steps >= 1 and n >= 1, not steps={steps}, n={n}.")
    return (0, *sorted({round(float(s)) for s in np.geomspace(1, steps, n)}))


def measurement_steps(measure_at: int | str | Sequence[int], steps: int) -> tuple[int, ...]:
    """The steps at which measures are taken, increasing; step 0 is before the first update.

    Parameters
    ----------
    measure_at
        A number of evenly spaced steps (both ends counted), ``"log"`` (`log_steps`), or the steps themselves.
    steps
        Number of updates, at least 0.

    Raises
    ------
    ValueError
        If `steps` is negative, or a listed step is outside ``0..steps``.

    Examples
    --------
    >>> measurement_steps(5, 100)
    (0, 25, 50, 75, 100)
    >>> measurement_steps([100, 0], 100)
    (0, 100)
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ValueError(f"steps = {steps!r}: give a whole number of updates, 0 or more.")
    if isinstance(measure_at, str):
        if measure_at != "log":
            raise ValueError(
                f"measure_at = {measure_at!r}: the one word it takes is 'log'. Otherwise a number of points, or a list of steps."
            )
        return log_steps(steps) if steps else (0,)
    if isinstance(measure_at, (int, np.integer)):
        if measure_at < 1:
            raise ValueError(f"measure_at = {measure_at}: at least one measurement is needed, or nothing comes out.")
        points = [steps] if measure_at == 1 else np.rint(np.linspace(0, steps, measure_at)).astype(int).tolist()
        return tuple(sorted(set(points)))
    if not isinstance(measure_at, (Sequence, np.ndarray)):
        raise TypeError(f"measure_at = {measure_at!r}: give a number of points, 'log', or a list of steps.")
    if not all(float(step).is_integer() for step in measure_at):
        raise ValueError(f"measure_at = {tuple(measure_at)!r}: a step is a whole number.")
    listed = tuple(sorted({int(step) for step in measure_at}))
    if not listed or listed[0] < 0 or listed[-1] > steps:
        raise ValueError(f"measure_at = {tuple(measure_at)!r}: the steps must lie in 0..{steps} (steps = {steps}), and there must be one.")
    return listed


def resolve_optimizer(optimizer: Any, axes: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build the optimizer of one cell from a name in optax, a factory, or a ready transformation.

    Parameters
    ----------
    optimizer
        A name in optax (``"adam"``), a factory (``optax.adam``, or a callable of your own) which is called with
        ``learning_rate`` and every other axis that it names, or an ``optax.GradientTransformation``.
    axes
        Scalars by name; ``lr`` is offered as ``learning_rate``.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If a factory needs what `axes` does not have, or returns something else than a transformation.

    Examples
    --------
    >>> tx = resolve_optimizer("sgd", dict(lr=0.1))
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> updates
    Array([-0.1, -0.1], dtype=float32)
    """
    factory = optimizer_factory(optimizer)
    if isinstance(factory, optax.GradientTransformation):
        return factory
    given = dict(axes)
    if "lr" in given:
        given.setdefault("learning_rate", given["lr"])
    if "learning_rate" in argument_names(factory)[0] and "learning_rate" not in given:
        raise TypeError(
            f"the optimizer {_name(factory)} needs a learning rate: add an axis lr to the grid, grid(lr=[...]) or grid(lr=0.1)."
        )
    built = call_by_name(factory, given, f"the optimizer {_name(factory)}")
    if not isinstance(built, optax.GradientTransformation):
        raise TypeError(f"the optimizer {_name(factory)} returned a {type(built).__name__}, not an optax.GradientTransformation.")
    return built


def optimizer_factory(optimizer: Any) -> Any:
    """The factory behind a name in optax; anything callable, or a ready transformation, is returned as it is.

    Examples
    --------
    >>> optimizer_factory("sgd") is optax.sgd
    True
    """
    if isinstance(optimizer, str):
        known = _aliases()
        if optimizer not in known:
            raise ValueError(f"unknown optimizer {optimizer!r}. {nearest(optimizer, known)} Or pass a factory such as optax.sgd.")
        return getattr(optax, optimizer)
    if isinstance(optimizer, optax.GradientTransformation) or callable(optimizer):
        return optimizer
    raise TypeError(f"optimizer must be a name in optax, a factory or a GradientTransformation, not {optimizer!r}.")


def _aliases() -> list[str]:
    return sorted(name for name in dir(optax) if _is_optimizer(name))


def _is_optimizer(name: str) -> bool:
    candidate = getattr(optax, name)
    # optax's nadam is a partial of its adam.
    module = getattr(getattr(candidate, "func", candidate), "__module__", "")
    return callable(candidate) and module.startswith("optax._src.alias") and "learning_rate" in argument_names(candidate)[0]


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", repr(fn))


def start(model: Model, params: PyTree, tx: optax.GradientTransformation, n_train: int, batch: int | None) -> State:
    """The state before the first step.

    Raises
    ------
    ValueError
        If `batch` is below 1 or above the number of training examples.

    Examples
    --------
    >>> model, params = Model(lambda key, x: None, lambda w, x: x * w), jnp.ones(())
    >>> start(model, params, optax.sgd(0.1), n_train=6, batch=2).order.shape  # A permutation to come.
    (6,)
    """
    if batch is not None and not 1 <= batch <= n_train:
        raise ValueError(
            f"batch = {batch} with {n_train} training examples: it must lie in 1..{n_train}, or be None (--batch full) for full batches."
        )
    trained = split(params)[0]
    order = jnp.zeros(0 if batch is None or batch == n_train else n_train, jnp.int32)
    return State(trained, tx.init(trained), order, jnp.array(-1, jnp.int32))


def advance(
    objective: Callable[[PyTree, Any, Any], Array],
    tx: optax.GradientTransformation,
    x: Any,
    y: Any,
    batch: int | None,
    key: PRNGKeyArray | None,
    state: State,
    first: Any,
    n_steps: Any,
) -> State:
    """Take the steps ``first, first + 1, ..., first + n_steps - 1``: the one loop that all training goes through.

    Parameters
    ----------
    objective
        ``(trained, x, y) -> loss``.
    tx
        The optimizer.
    x, y
        All training examples.
    batch
        Minibatch size, drawn without replacement: every epoch is a fresh permutation ``permutation(fold_in(key, epoch))``,
        and the ``n mod batch`` examples at its end are left out of that epoch. ``None`` is the full batch.
    key
        Randomness of the order of examples; the same at every call, so that a loop cut in two gives the same bits. ``None``
        will do for full batches.
    state, first, n_steps
        Where to start and how far to go. A Python integer `n_steps` gives a ``lax.scan`` (differentiable in reverse); a
        traced one gives the same loop with a length that is known only when it runs.

    Returns
    -------
    State
        With the trained parameters after the last step.

    Examples
    --------
    One weight under ``w²``: every step of rate 0.25 halves it.

    >>> model, tx = Model(lambda key, x: None, lambda w, x: x * w), optax.sgd(0.25)
    >>> state, x = start(model, jnp.ones(()), tx, n_train=1, batch=None), jnp.ones(1)
    >>> advance(lambda w, x, y: w**2, tx, x, x, None, None, state, 0, 3).trained
    Array(0.125, dtype=float32)
    """
    n_train = x.shape[0]
    full = batch is None or batch == n_train
    size = n_train if batch is None else batch
    per_epoch = n_train // size

    def step(state: State, t: Any) -> State:
        if full:
            order, x_b, y_b = state.order, x, y
        else:
            epoch, position = t // per_epoch, t % per_epoch

            def shuffled() -> Array:
                return jax.random.permutation(jax.random.fold_in(key, epoch), n_train).astype(jnp.int32)  # pyright: ignore[reportArgumentType]

            # The predicate is the same for all vmapped cells, so this stays a branch and is not a select.
            order = jax.lax.cond(position == 0, shuffled, lambda: state.order)
            rows = jax.lax.dynamic_slice_in_dim(order, position * size, size)
            x_b, y_b = (jnp.take(a, rows, axis=0, mode="clip") for a in (x, y))
        loss, gradient = jax.value_and_grad(objective)(state.trained, x_b, y_b)
        updates, optimizer = tx.update(gradient, state.optimizer, state.trained)
        newly = (state.diverged_at < 0) & ~jnp.isfinite(loss)
        diverged_at = jnp.where(newly, jnp.asarray(t, jnp.int32), state.diverged_at)
        return State(optax.apply_updates(state.trained, updates), optimizer, order, diverged_at)

    if isinstance(n_steps, int):
        return jax.lax.scan(lambda s, i: (step(s, first + i), None), state, jnp.arange(n_steps, dtype=jnp.int32))[0]
    return jax.lax.fori_loop(first, first + n_steps, lambda t, s: step(s, t), state)


def train(
    model: Model,
    params: PyTree,
    data: Any,
    *,
    optimizer: Any,
    steps: int,
    loss: str | Callable[..., Any] = "mse",
    batch: int | None = None,
    key: PRNGKeyArray | None = None,
    measure_at: int | str | Sequence[int] = 11,
    measures: Mapping[str, Callable[[PyTree], Any]] | None = None,
) -> Trained:
    """Train one network, measuring on the way; a pure function that may be jitted, vmapped and differentiated.

    Parameters
    ----------
    model, params
        The network and its parameters; `Frozen` and integer leaves are not trained.
    data
        Anything with ``x_train`` and ``y_train``; see `paperjax.data.Dataset`.
    optimizer
        An optax transformation, built by the caller: ``optax.sgd(lr)`` with `lr` traced, if it is swept.
    steps
        Number of updates.
    loss
        A name (``"mse"``, ``"cross_entropy"``, ``"logistic"``) or a callable ``loss(f, y) -> scalar``.
    batch
        Minibatch size, without replacement; ``None`` is the full batch.
    key
        Order of the examples; needed for minibatches.
    measure_at
        When to measure; see `measurement_steps`.
    measures
        Functions ``params -> array``. ``train_loss``, on all training examples, is always there.

    Returns
    -------
    Trained
        ``measures[name]`` has the measurement steps as its first axis. `diverged_at` is -1, or the first step whose loss
        was not finite.

    Raises
    ------
    ValueError
        If `steps` is negative, `batch` does not fit, or minibatches have no key.

    Notes
    -----
    Differentiable in reverse when the measurement steps are evenly spaced; otherwise in forward mode.

    Examples
    --------
    >>> from paperjax.model import Model
    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x_train=jnp.ones((4, 1)), y_train=jnp.ones((4, 1)))
    >>> model = Model(lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
    >>> out = train(model, jnp.zeros((1, 1)), data, optimizer=optax.sgd(0.25), steps=2, measure_at=3)
    >>> out.steps, out.measures["train_loss"]
    (array([0, 1, 2]), Array([1.    , 0.25  , 0.0625], dtype=float32))
    """
    loss_fn = resolve_loss(loss)
    points = measurement_steps(measure_at, steps)
    _, given = split(params)
    state = start(model, params, optimizer, data.x_train.shape[0], batch)
    if state.order.size and key is None:
        raise ValueError("train with minibatches needs a key for the order of the examples: train(..., key=jax.random.key(0)).")

    def objective(trained: PyTree, x: Any, y: Any) -> Array:
        return loss_fn(model.apply(join(trained, given), x), y)

    def go(state: State, first: Any, n: Any) -> State:
        return advance(objective, optimizer, data.x_train, data.y_train, batch, key, state, first, n)

    def read(state: State) -> dict[str, Array]:
        now = join(state.trained, given)
        extra = {name: jnp.asarray(fn(now)) for name, fn in (measures or {}).items()}
        return {"train_loss": objective(state.trained, data.x_train, data.y_train), **extra}

    gaps = np.diff((0, *points))
    even = len(set(gaps[gaps > 0].tolist())) <= 1

    def segment(state: State, span: tuple[Any, Any]) -> tuple[State, dict[str, Array]]:
        state = go(state, span[0], int(gaps.max()) if even else span[1])
        return state, read(state)

    history: list[dict[str, Array]] = []
    starts = np.asarray(points) - gaps
    if gaps[0] == 0:
        history.append(jax.tree.map(lambda a: a[None], read(state)))
        gaps, starts = gaps[1:], starts[1:]
    if len(gaps):
        state, rest = jax.lax.scan(segment, state, (jnp.asarray(starts, jnp.int32), jnp.asarray(gaps, jnp.int32)))
        history.append(rest)
    if points[-1] < steps:
        state = go(state, points[-1], steps - points[-1])
    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *history)
    return Trained(join(state.trained, given), np.asarray(points), stacked, state.diverged_at)
