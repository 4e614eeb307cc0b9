"""One cell of an Experiment as three pure functions of its axes: set it up, train it, measure it.

Randomness: a cell's key is ``key(seed)``, folded with 0 for the initialization, 1 for the order of examples, 2 for generated
data, 3 for a family that names `key`, 4 for measures that name it. So no stream depends on another, and a cell's numbers do
not depend on which other cells run.
"""

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from paperjax.binding import argument_names, call_by_name
from paperjax.losses import resolve_loss
from paperjax.model import Family, Model, check_model, join, split
from paperjax.planned import planned_cell, planner
from paperjax.sharding import Placement
from paperjax.train import State, advance, optimizer_factory, resolve_optimizer, start


class Stream(enum.IntEnum):
    """What a cell's key is folded with, per use."""

    INIT = 0
    ORDER = 1
    DATA = 2
    FAMILY = 3
    MEASURE = 4


# What a measure may name besides the axes.
MEASURE_NAMES = ("model", "params", "data", "params0", "step", "loss", "key")
# Fields of the Experiment that may be an axis: each value is compiled by itself.
FIELD_AXES = ("data", "loss", "optimizer", "batch", "parametrization")


class Constants(NamedTuple):
    """What a cell keeps unchanged while it trains; `None` where it has nothing of its own."""

    given: PyTree
    data: Any
    params0: PyTree


class CellFunctions(NamedTuple):
    """The functions of a cell; `axes` maps names to traced scalars, `shared` is the common Dataset or None."""

    setup: Callable[[Mapping[str, Array], Any], tuple[State, Constants]]
    advance: Callable[..., State]
    measure: Callable[..., dict[str, Array]]
    network: Callable[..., tuple[Model, Any]]


def is_dataset(data: Any) -> bool:
    """Whether `data` is the arrays themselves, not a function that makes them."""
    return hasattr(data, "x_train") and hasattr(data, "y_train")


def takers(experiment: Any) -> dict[str, list[str]]:
    """Which parts of an Experiment take which names from its grid: ``{"width": ["family"], "lr": ["optimizer"], ...}``."""
    found: dict[str, list[str]] = {"seed": ["experiment"]}

    def add(part: str, fn: Any, skip: tuple[str, ...] = (), drop: int = 0) -> None:
        required, optional = argument_names(fn)
        for name in (*required, *optional)[drop:]:
            if name not in skip:
                found.setdefault(name, []).append(part)

    values = {name: experiment.grid.values(name) if name in experiment.grid.names else (getattr(experiment, name),) for name in FIELD_AXES}
    for name in FIELD_AXES:
        found.setdefault(name, []).append("experiment")
    add("family", experiment.family.make if isinstance(experiment.family, Family) else experiment.family, ("key", "rngs"))
    for data in values["data"]:
        if not is_dataset(data):
            add("data", data, ("key",))
    for loss in values["loss"]:
        add("loss", resolve_loss(loss), drop=2)
    for optimizer in values["optimizer"]:
        factory = optimizer_factory(optimizer)
        # An optax transformation is a NamedTuple of functions: already built, it takes nothing.
        if not isinstance(factory, tuple):
            add("optimizer", factory, ("learning_rate",))
            if "learning_rate" in sum(argument_names(factory), ()):
                found.setdefault("lr", []).append("optimizer")
                found.setdefault("learning_rate", []).append("optimizer")
    for name, measure in experiment.measures.items():
        add(f"measure {name}", measure, MEASURE_NAMES)
    return found


def cell_functions(experiment: Any, static: Mapping[str, Any], place: Placement | None = None) -> CellFunctions:
    """The functions of the cells that share the values `static`.

    Parameters
    ----------
    experiment
        An `Experiment`.
    static
        Values of the axes that are fixed in the compiled program: shapes, names, callables.
    place
        Where a cell's arrays lie, if it is spread over devices itself.

    Returns
    -------
    CellFunctions
    """
    field = {name: static.get(name, getattr(experiment, name)) for name in FIELD_AXES}
    loss = resolve_loss(field["loss"])
    batch = field["batch"]
    first = {name: experiment.grid.values(name)[0] for name in experiment.grid.names}
    scheme = field["parametrization"]
    plan_of = None if scheme is None else planner(scheme, experiment.base or {}, field["optimizer"], first)
    needs_params0 = any("params0" in sum(argument_names(m), ()) for m in experiment.measures.values())

    def streams(axes: Mapping[str, Any]) -> Callable[[Stream], Array]:
        key = jax.random.key(axes.get("seed", static.get("seed", 0)))
        return lambda stream: jax.random.fold_in(key, int(stream))

    def named(axes: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: value for name, value in static.items() if name == "batch" or name not in FIELD_AXES}
        return {**values, **axes}

    def build(axes: Mapping[str, Any], shared: Any, constants: Constants | None) -> tuple[Model, Any, Callable[..., Array], Any, Any]:
        names, key = named(axes), streams(axes)
        if shared is not None:
            data = shared
        elif constants is not None:
            data = constants.data
        else:
            data = call_by_name(field["data"], {**names, "key": key(Stream.DATA)}, "data")
            if not is_dataset(data):
                raise TypeError(f"the data function returned a {type(data).__name__}, not a Dataset with x_train and y_train.")
        make = experiment.family if isinstance(experiment.family, Family) else Family(experiment.family)
        sizes = {name: names[name] for name in make.sizes if name in names}
        if "key" in make.sizes:
            sizes["key"] = key(Stream.FAMILY)
        extra = {name: names[name] for name in sum(argument_names(loss), ())[2:] if name in names}

        def loss_fn(f: Array, y: Any) -> Array:
            value = jnp.asarray(loss(f, y, **extra))
            if value.shape != ():
                raise ValueError(
                    f"the loss must be one number, and it has shape {value.shape} for outputs {f.shape}: take its mean over the batch."
                )
            return value

        network, tx = make(**sizes), resolve_optimizer(field["optimizer"], names)
        if plan_of is not None:
            network, tx = planned_cell(plan_of(make, sizes, data.x_train), network, field["optimizer"], names)
        return network, data, loss_fn, tx, key

    def setup(axes: Mapping[str, Any], shared: Any) -> tuple[State, Constants]:
        model, data, _, tx, key = build(axes, shared, None)
        check_model(model, data.x_train, "the family's network")
        params = model.init(key(Stream.INIT), data.x_train)
        trained, given = split(params)
        if not jax.tree.leaves(trained):
            raise ValueError("the network has no parameter to train: every leaf is Frozen or not floating point.")
        state = start(model, params, tx, data.x_train.shape[0], batch)
        state = state if place is None else place.state(state)
        return state, Constants(given, None if shared is not None else data, trained if needs_params0 else None)

    def take_steps(axes: Mapping[str, Any], state: State, constants: Constants, shared: Any, first: Any, n_steps: Any) -> State:
        model, data, loss_fn, tx, key = build(axes, shared, constants)

        def objective(trained: PyTree, x: Any, y: Any) -> Array:
            x, y = (x, y) if place is None else place.batch((x, y))
            return loss_fn(model.apply(join(trained, constants.given), x), y)

        state = state if place is None else place.state(state)
        return advance(objective, tx, data.x_train, data.y_train, batch, key(Stream.ORDER), state, first, n_steps)

    def network(axes: Mapping[str, Any], shared: Any) -> tuple[Model, Any]:
        model, data, *_ = build(axes, shared, None)
        return model, data.x_train

    def measure(axes: Mapping[str, Any], state: State, constants: Constants, shared: Any, step: Any) -> dict[str, Array]:
        model, data, loss_fn, _, key = build(axes, shared, constants)
        data = data if place is None else place.whole(data)
        params = join(state.trained, constants.given)
        params0 = join(constants.params0, constants.given) if needs_params0 else None
        offered = {
            **named(axes),
            **dict(model=model, params=params, data=data, params0=params0, step=step, loss=loss_fn, key=key(Stream.MEASURE)),
        }
        values = {"train_loss": loss_fn(model.apply(params, data.x_train), data.y_train)}
        for name, fn in experiment.measures.items():
            value = call_by_name(fn, offered, f"measure {name!r}")
            if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float)):
                raise TypeError(
                    f"measure {name!r} returns a {type(value).__name__}, not a number or an array. Return one array, or "
                    "make it two measures."
                )
            values[name] = jnp.asarray(value)
        return {**values, "_diverged_at": state.diverged_at}

    return CellFunctions(setup, take_steps, measure, network)
