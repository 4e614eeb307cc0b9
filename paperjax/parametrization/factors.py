"""From exponents to numbers: the factors of one leaf, and those of single uses that a leaf's own factor cannot carry."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from paperjax.binding import nearest
from paperjax.parametrization.abc import COLUMN_OF, Exponent, Parametrization
from paperjax.trace.program import Leaf, Program

# Which rule an optimizer of optax follows: does its update scale with the gradient, or not?
RULES = {
    "sgd": ("sgd", "noisy_sgd"),
    "adam": (
        "adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "radam", "adabelief", "adan", "yogi", "lion", "rmsprop",
        "sign_sgd", "novograd", "optimistic_adam", "optimistic_adam_v2",
    ),
}  # fmt: skip
DECAY_MODES = ("coupled", "independent")


class Factors(NamedTuple):
    """Factors of one leaf, relative to the base: 1 everywhere means that the leaf is as at the base.

    Attributes
    ----------
    init_scale
        Times the model's own initialization.
    multiplier
        Times the leaf, in every call.
    learning_rate, eps, weight_decay
        Times those of the optimizer.
    """

    init_scale: float = 1.0
    multiplier: float = 1.0
    learning_rate: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


def rule_of(optimizer: Any) -> str:
    """``"sgd"`` or ``"adam"``: whether updates are proportional to gradients, or of a size of their own.

    Parameters
    ----------
    optimizer
        A name in optax or its factory (``"adamw"``, ``optax.adamw``).

    Raises
    ------
    ValueError
        If the optimizer is of neither family.

    Examples
    --------
    >>> rule_of("lion")
    'adam'
    """
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer))
    for rule, members in RULES.items():
        if name in members:
            return rule
    known = [n for members in RULES.values() for n in members]
    raise ValueError(
        f"optimizer {name!r} is of no family that a parametrization has rules for. {nearest(name, known)} An optimizer of your own: give the "
        "family it follows, optimizer='sgd' (updates proportional to gradients) or optimizer='adam' (updates of a size of their own)."
    )


def column(leaf: Leaf) -> str | None:
    """The column of the tables that a leaf follows; a tied leaf follows its first role, a finite one none."""
    columns = [COLUMN_OF[role] for role in leaf.roles if role in COLUMN_OF]
    if "input" in columns:
        return "input"
    return columns[0] if columns else None


def fan_ratios(leaf: Leaf) -> tuple[float, float]:
    """Fan-in and fan-out at the target over those at the base."""
    ours, base = leaf.fans(), leaf.fans(base=True)
    return ours[0] / base[0], ours[1] / base[1]


def leaf_factors(leaf: Leaf, in_branch: bool, scheme: Parametrization, rule: str, decay_mode: str, depth_ratio: float) -> Factors:
    """The factors of one leaf under a parametrization, before residual multipliers.

    Parameters
    ----------
    leaf
        As the trace found it.
    in_branch
        Whether it is used in a residual branch.
    scheme, rule, decay_mode
        Parametrization; ``"sgd"`` or ``"adam"``; what happens to weight decay, see `plan`.
    depth_ratio
        m, the number of residual branches over the base's.
    """
    which = column(leaf)
    lr = eps = 1.0
    decay: float | None = None
    init_scale = multiplier = 1.0
    if which is not None:
        fans = fan_ratios(leaf)

        def factor(table: Mapping[str, Exponent]) -> float:
            return table[which].factor(*fans)

        multiplier, lr, eps = factor(scheme.a), factor(scheme.c[rule]), factor(scheme.eps)
        init_scale = _init_scale(leaf, factor(scheme.b))
        if scheme.decay is not None:
            decay = 0.0 if which in scheme.no_decay else factor(scheme.decay)
    if in_branch and scheme.depth is not None:
        lr *= scheme.depth.learning_rate_factor(depth_ratio, rule)
        eps *= scheme.depth.eps_factor(depth_ratio)
    if decay is None:
        # The product learning rate × decay is what shrinks a weight, and stays as at the base.
        decay = 1.0 if decay_mode == "independent" else 1.0 / lr
    return Factors(init_scale, multiplier, lr, eps if rule == "adam" else 1.0, decay)


def _init_scale(leaf: Leaf, wanted: float) -> float:
    """Bring the model's own ratio of standard deviations, target over base, to the wanted one; constant leaves stay."""
    law, base = leaf.law, leaf.base_law
    if law.kind == "constant" or base.kind == "constant":
        return 1.0
    if law.kind != "random" or base.kind != "random":
        told = law if law.kind != "random" else base
        raise ValueError(
            f"leaf {leaf.path}: its initialization "
            + ("depends on the data (at " if told.kind == "data" else "could not be followed (at ")
            + f"{told.why}), so how it scales with width is not known. Say how: plan(..., init_std={{{leaf.path!r}: lambda fan_in, fan_out: ...}})."
        )
    if law.std == 0 or base.std == 0:
        return 1.0
    if abs(law.mean) > 0.1 * law.std and not math.isclose(law.mean, base.mean, rel_tol=1e-3):
        raise ValueError(f"leaf {leaf.path}: the mean of its initialization changes from {base.mean:.3g} to {law.mean:.3g} with its size.")
    return wanted * base.std / law.std


def tied_factor(leaf: Leaf, scheme: Parametrization) -> float:
    """The multiplier of the output use of a tied leaf: ``n^-((a + b)_output - (a + b)_input)``."""
    ours, base = leaf.shape, leaf.base_shape
    last = leaf.sites[[role for role in _roles_by_site(leaf)].index("output")]
    n = math.prod(ours[a] for a in last.inside) / math.prod(base[a] for a in last.inside)
    power = scheme.a["output"].total + scheme.b["output"].total - scheme.a["input"].total - scheme.b["input"].total
    return n**-power


def _roles_by_site(leaf: Leaf) -> list[str]:
    from paperjax.trace.program import role_of

    return [role_of(site, leaf.infinite) for site in leaf.sites]


def branch_leaves(program: Program) -> frozenset[int]:
    """Numbers of the leaves that are used in some residual branch."""
    return frozenset(leaf for add in program.adds for leaf in add.leaves)
