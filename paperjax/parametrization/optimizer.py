"""Per-leaf learning rates, eps and weight decay for any optax optimizer that acts on each leaf by itself."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from paperjax.parametrization.factors import rule_of
from paperjax.train import optimizer_factory


def planned_optimizer(plan: Any, factory: Any, learning_rate: Any, **settings: Any) -> optax.GradientTransformation:
    """One optimizer of the factory for every distinct triple of factors in the plan, each over its own leaves.

    ``learning_rate``, ``eps`` and ``weight_decay`` of a leaf are the given ones times the leaf's factors. A schedule is multiplied after
    it is evaluated. Decay is never scaled by more than its own factor: under optax's AdamW the product learning rate × decay is what
    the plan's decay mode says.

    Parameters
    ----------
    plan
        A `Plan`.
    factory
        A name in optax or a factory (``optax.adamw``); its rule must be the plan's.
    learning_rate
        A number, a traced scalar, or a schedule ``step -> learning rate``.
    settings
        Further arguments of the factory.

    Returns
    -------
    optax.GradientTransformation

    Raises
    ------
    ValueError
        If the factory follows another rule (SGD, Adam) than the plan was made for, or is of unknown family.

    Notes
    -----
    What mixes leaves (clipping by the global norm) belongs outside: ``optax.chain(optax.clip_by_global_norm(1.0), plan.optimizer(...))``.
    """
    make = optimizer_factory(factory)
    if rule_of(factory) != plan.rule:
        raise ValueError(
            f"the plan was made for optimizer={plan.rule!r}, and {getattr(make, '__name__', make)} follows the rule of {rule_of(factory)!r}: their "
            f"learning rates scale differently. Make the plan with optimizer={getattr(make, '__name__', 'adam')!r}."
        )
    defaults = {name: p.default for name, p in inspect.signature(make).parameters.items() if p.default is not inspect.Parameter.empty}
    groups: dict[Any, Any] = {}
    labels = []
    for leaf in plan.leaves:
        f = leaf.factors
        label = f"lr × {f.learning_rate:.12g}, eps × {f.eps:.12g}, wd × {f.weight_decay:.12g}"
        labels.append(label)
        if label in groups:
            continue
        arguments = dict(settings)
        for name, factor in (("eps", f.eps), ("weight_decay", f.weight_decay)):
            if name in defaults:
                arguments[name] = settings.get(name, defaults[name]) * factor
        groups[label] = make(learning_rate=_times(learning_rate, f.learning_rate), **arguments)

    def label_of(params: Any) -> Any:
        # Updates and parameters of the same tree, whatever stands in the leaves (optax initializes with masked trees too).
        plan.factors("learning_rate", params)
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    return optax.multi_transform(groups, label_of)


def _times(learning_rate: Any, factor: float) -> Any:
    if callable(learning_rate):
        schedule: Callable[[Any], Any] = learning_rate
        return lambda step: schedule(step) * factor
    return learning_rate * factor
