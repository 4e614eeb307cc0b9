"""The network and the optimizer of an Experiment's cells under a parametrization: one plan for every combination of shapes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from paperjax.binding import argument_names, nearest
from paperjax.model import Family, Model
from paperjax.parametrization import Parametrization, Plan, plan
from paperjax.train import optimizer_factory


def planner(
    scheme: Parametrization, base: Mapping[str, Any], optimizer: Any, first: Mapping[str, Any]
) -> Callable[[Family, Mapping[str, Any], Any], Plan]:
    """A function from a family and the sizes of a cell to the plan of its shapes, which it remembers.

    Parameters
    ----------
    scheme, optimizer
        As in `paperjax.plan`.
    base
        Sizes of the base; those that it does not name are the cell's own.
    first
        Numbers that stand in for traced sizes (an output scale, a variance): they leave shapes alone and cancel in the plan's ratios.

    Returns
    -------
    callable
        ``(family, sizes, x) -> Plan``.

    Raises
    ------
    TypeError
        If the optimizer is already built, so that no leaf can have a learning rate of its own.
    """
    if isinstance(optimizer_factory(optimizer), tuple):
        raise TypeError(
            "a parametrization gives every leaf a learning rate of its own, and the optimizer is already built: pass its factory "
            "(optax.sgd) and the learning rate as an axis, grid(lr=...)."
        )
    known: dict[Any, Plan] = {}

    def plan_of(family: Family, sizes: Mapping[str, Any], x: Any) -> Plan:
        concrete = {name: first[name] if isinstance(value, Tracer) else value for name, value in sizes.items() if name != "key"}
        missing = [name for name in base if name not in concrete]
        if missing:
            raise ValueError(
                f"base names {missing[0]!r}, which is no size of this Experiment's cells ({', '.join(concrete) or 'it has none'}). "
                f"{nearest(missing[0], concrete)} A size that does not vary is given as grid({missing[0]}=VALUE)."
            )
        key = (repr(sorted(concrete.items())), tuple(jnp.shape(x)), str(jnp.result_type(x)))
        if key not in known:
            fixed = {"key": jax.random.key(0)} if "key" in sizes else {}
            alone = Family(functools.partial(family.make, **fixed) if fixed else family.make)
            batch = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
            known[key] = plan(alone, scheme, {**concrete, **base}, concrete, optimizer, x=batch)
        return known[key]

    return plan_of


def planned_cell(found: Plan, network: Model, optimizer: Any, axes: Mapping[str, Any]) -> tuple[Model, optax.GradientTransformation]:
    """The network under the plan, and the optimizer with the plan's factors."""
    factory = optimizer_factory(optimizer)
    named = sum(argument_names(factory), ())
    settings = {name: value for name, value in axes.items() if name in named and name not in ("lr", "learning_rate")}
    learning_rate = axes["lr"] if "lr" in axes else axes["learning_rate"]
    return found.bind(network).model, found.optimizer(factory, learning_rate, **settings)
