"""Per-leaf learning rates, eps and weight decay for any optax optimizer that acts on each leaf by itself."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from paperjax.model import split
from paperjax.parametrization.factors import RULES, name_of, rule_of
from paperjax.train import optimizer_factory

# Settings of optax's factories that are compared with gradients, and with which power of them.
_GRADIENT_POWERS = {"eps": 1, "eps_root": 2, "initial_accumulator_value": 2, "initial_scale": 2}


def planned_optimizer(plan: Any, factory: Any, learning_rate: Any, follows: str | None = None, **settings: Any) -> Any:
    """One optimizer of the factory for every distinct set of factors in the plan, each over its own leaves.

    ``learning_rate``, ``eps`` and ``weight_decay`` of a leaf are the given ones times the leaf's factors. A schedule is multiplied after
    it is evaluated, and decay never by more than its own factor. Other settings that are compared with the gradient or its square
    (``eps_root``, initial accumulators) go with eps.

    Parameters
    ----------
    plan
        A `Plan`.
    factory
        A name in optax or a factory (``optax.adamw``, ``optax.contrib.muon``); its rule must be the plan's.
    learning_rate
        A number, a traced scalar, or a schedule ``step -> learning rate``.
    follows
        The rule of a factory that is not optax's: ``"sgd"`` (updates proportional to gradients) or ``"adam"`` (updates of a size of their
        own). Its arguments ``eps`` and ``weight_decay``, if it has them, are scaled; decay is taken to be multiplied by the learning rate.
    settings
        Further arguments of the factory. ``weight_decay`` may be given with SGD too, which adds ``weight_decay * w`` to the gradient.

    Returns
    -------
    optax.GradientTransformation
        Leaves that are not trained (inside `Frozen`, or not floating point) get no update.

    Raises
    ------
    ValueError
        If the factory follows another rule (SGD, Adam) than the plan was made for, is of unknown family, takes no ``weight_decay``
        that is given, or the decay is independent and not given.

    Notes
    -----
    Under a plan of ``weight_decay="independent"`` the decay is the fraction of each weight that a step removes, whatever the learning
    rate; it may be a schedule. Optax has no such decay, so it is added here, after the optimizer's own update.

    With Muon, hidden matrices are orthogonalized along the axes that the trace found and the rest follows Adam with ``eps``,
    ``adam_learning_rate`` and ``adam_weight_decay``.

    What mixes leaves (clipping by the global norm) belongs outside: ``optax.chain(optax.clip_by_global_norm(1.0), plan.optimizer(...))``.

    Examples
    --------
    >>> import jax.numpy as jnp, paperjax as pj
    >>> family = pj.family(lambda width: pj.models.linear_net(width, 2, 1), x=jnp.ones((1, 3)))
    >>> plan = pj.plan(family, pj.mup, base=dict(width=4), target=dict(width=8), optimizer="adam")
    >>> tx = plan.optimizer(optax.lion, 0.1, weight_decay=0.0)
    >>> params = jax.tree.map(jnp.ones_like, plan.model.init(jax.random.key(0), jnp.ones((1, 3))))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> {name: round(float(leaf["w"].max()), 4) for name, leaf in updates.items()}
    {'first': -0.1, 'hidden': -0.05, 'readout': -0.05}
    """
    make = _muon() if factory == "muon" else _in_optax(factory)
    _refuse_rule(plan, make, follows)
    taken = inspect.signature(make).parameters
    defaults = {name: p.default for name, p in taken.items() if p.default is not inspect.Parameter.empty}
    muon = plan.rule == "muon"
    if muon:
        _refuse_muon_settings(settings)
    decay = _decay_of(plan, make, defaults, settings)
    groups: dict[Any, Any] = {"given": optax.set_to_zero()}
    labels = []
    for leaf in plan.leaves:
        f = leaf.factors
        label = f"{leaf.rule}: lr × {f.learning_rate:.12g}, eps × {f.eps:.12g}, wd × {f.weight_decay:.12g}"
        labels.append(label)
        if label in groups:
            continue
        arguments = dict(settings)
        for name, power in _GRADIENT_POWERS.items():
            if isinstance(defaults.get(name), (int, float)):
                squared = name == "eps" and _inside_root(make, {**defaults, **settings})
                arguments[name] = settings.get(name, defaults[name]) * f.eps ** (2 if squared else power)
        rates = {"learning_rate": _times(learning_rate, f.learning_rate)}
        if muon:
            rates["adam_learning_rate"] = _times(settings.get("adam_learning_rate", learning_rate), f.learning_rate)
            arguments["adam_weight_decay"] = _times(settings.get("adam_weight_decay", 0.0), f.weight_decay)
            arguments["muon_weight_dimension_numbers"] = plan.muon_dimension_numbers
        groups[label] = decay(make, {**arguments, **rates}, f.weight_decay)

    def label_of(params: Any) -> Any:
        plan.factors("learning_rate", params)
        trained = split(params)[0]
        named = jax.tree.unflatten(jax.tree.structure(trained), labels)
        return jax.tree.map(
            lambda label, leaf: jax.tree.map(lambda _: "given", leaf) if label is None else label,
            named, params, is_leaf=lambda node: node is None,
        )  # fmt: skip

    return optax.multi_transform(groups, label_of)


def _refuse_rule(plan: Any, make: Any, follows: str | None) -> None:
    if not callable(make):
        raise ValueError(
            f"plan.optimizer needs a factory, such as optax.adamw, not a ready {type(make).__name__}: each leaf gets its own learning rate."
        )
    if follows is not None and (follows not in RULES or follows == "muon"):
        raise ValueError(f"follows = {follows!r}: it must be 'sgd' or 'adam'.")
    name = name_of(make)
    if follows is None and name not in {n for members in RULES.values() for n in members} and name not in dir(optax):
        raise ValueError(
            f"{name} is no optimizer of optax, so its rule is not known: say plan.optimizer(..., follows={plan.rule!r}) if its updates are "
            + ("proportional to gradients." if plan.rule == "sgd" else "of a size of their own.")
        )
    rule = follows or rule_of(make)
    if rule != plan.rule:
        raise ValueError(
            f"the plan was made for optimizer={plan.rule!r}, and {name} follows the rule of {rule!r}: their learning rates scale "
            f"differently. Make the plan with optimizer={rule if follows else name!r}."
        )


def _decay_of(plan: Any, make: Any, defaults: dict[str, Any], settings: dict[str, Any]) -> Callable[[Any, dict[str, Any], float], Any]:
    """How the decay of a leaf enters: ``(make, arguments, factor) -> transformation``."""
    name = name_of(make)
    has = "weight_decay" in defaults
    given = settings.pop("weight_decay", None)
    if plan.decay_mode == "independent":
        if "adam_weight_decay" in settings:
            raise ValueError("adam_weight_decay: under weight_decay='independent' one weight_decay holds for all leaves.")
        if given is None and has and defaults["weight_decay"]:
            raise ValueError(
                f"the plan's decay is independent of the learning rate, and {name}'s default weight_decay={defaults['weight_decay']} is "
                "meant to be multiplied by it: give weight_decay=..., the fraction of each weight that a step removes."
            )
        mask = settings.pop("mask", settings.pop("weight_decay_mask", None))

        def independent(make: Any, arguments: dict[str, Any], factor: float) -> Any:
            own = make(**arguments, **({"weight_decay": 0.0} if has else {}))
            return own if given is None else optax.chain(own, optax.add_decayed_weights(_times(given, -factor), mask))

        return independent
    if given is not None and not has:
        if plan.rule != "sgd":
            raise ValueError(
                f"{name} takes no weight_decay: use optax.adamw or another that does. Decay inside the gradient of an Adam-like optimizer "
                "is a different thing, which no table here scales."
            )
        mask = settings.pop("mask", None)
        return lambda make, arguments, factor: optax.chain(optax.add_decayed_weights(_times(given, factor), mask), make(**arguments))
    if not has:
        return lambda make, arguments, factor: make(**arguments)
    wanted = defaults["weight_decay"] if given is None else given
    return lambda make, arguments, factor: make(**arguments, weight_decay=_times(wanted, factor))


def _inside_root(make: Any, settings: dict[str, Any]) -> bool:
    """Whether eps is added to the mean square, not to its root."""
    return name_of(make) == "adagrad" or bool(settings.get("eps_in_sqrt", False))


def _in_optax(factory: Any) -> Any:
    # Some of optax's optimizers (nadam) are partials of others, which say neither their name nor their module.
    known = isinstance(factory, str) and any(factory in members for members in RULES.values())
    return getattr(optax, factory) if known and hasattr(optax, factory) else optimizer_factory(factory)


def _muon() -> Any:
    from optax import contrib

    if not hasattr(contrib, "muon") or not hasattr(contrib, "MuonDimensionNumbers"):
        raise ValueError(f"optax {optax.__version__} has no Muon with dimension numbers: optax.contrib.MuonDimensionNumbers is needed.")
    return contrib.muon


def _refuse_muon_settings(settings: dict[str, Any]) -> None:
    _muon()
    reasons = {
        "muon_weight_dimension_numbers": "the plan gives them, from the trace",
        "consistent_rms": "the plan's learning rates are for updates of spectral norm sqrt(max(1, fan_out / fan_in)), optax's default",
        "adaptive": "it scales updates by their gradient, and the plan's learning rates are for updates of a norm of their own",
    }
    for name, reason in reasons.items():
        if settings.get(name) not in (None, False):
            raise ValueError(f"{name} cannot be given to plan.optimizer(optax.contrib.muon, ...): {reason}.")


def _times(value: Any, factor: float) -> Any:
    if callable(value):
        schedule: Callable[[Any], Any] = value
        return lambda step: schedule(step) * factor
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(f"plan.optimizer got {value!r} for a learning rate or a weight decay: give a number, or a schedule step -> number.")
    return value * factor
