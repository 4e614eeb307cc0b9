"""From exponents to numbers: the factors of one leaf, and those of single uses that a leaf's own factor cannot carry."""

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from paperjax.binding import nearest
from paperjax.parametrization.abc import COLUMN_OF, Exponent, Parametrization
from paperjax.trace.initial import Law
from paperjax.trace.leaf import Leaf, role_of
from paperjax.trace.program import Program
from paperjax.trace.settle import Use, written

# Which rule an optimizer of optax follows: updates proportional to the gradient; of a size of their own, entry by entry; or of a
# spectral norm of their own. Not here, because neither holds: novograd and lars (one norm for a leaf), yogi (an initial accumulator
# that it does not let be set), radam (its first steps follow the other rule), noisy_sgd (noise beside the gradient), optimistic_adam.
RULES = {
    "sgd": ("sgd",),
    "adam": (
        "adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "adabelief", "adan", "lion", "signum", "sign_sgd", "rmsprop",
        "adagrad", "optimistic_adam_v2",
    ),
    "muon": ("muon",),
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
    """``"sgd"``, ``"adam"`` or ``"muon"``: updates proportional to gradients, of a size of their own, or of a spectral norm of their own.

    Parameters
    ----------
    optimizer
        A name in optax or its factory (``"adamw"``, ``optax.adamw``).

    Raises
    ------
    ValueError
        If the optimizer is of none of the families.

    Examples
    --------
    >>> rule_of("lion")
    'adam'
    """
    name = name_of(optimizer)
    for rule, members in RULES.items():
        if name in members:
            return rule
    known = [n for members in RULES.values() for n in members]
    raise ValueError(
        f"optimizer {name!r} is of no family that a parametrization has rules for. {nearest(name, known)} An optimizer of your own: plan "
        "for the family it follows, optimizer='sgd' (updates proportional to gradients) or optimizer='adam' (updates of a size of their "
        "own), and build it with plan.optimizer(your_factory, ..., follows='adam')."
    )


def name_of(optimizer: Any) -> str:
    """The name that an optimizer's factory goes by; optax's nadam is a partial of its adam, and is called adam.

    Examples
    --------
    >>> import functools, optax
    >>> name_of(functools.partial(optax.adamw, b1=0.8)), name_of("lion")
    ('adamw', 'lion')
    """
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    return optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer))


def column(leaf: Leaf) -> str | None:
    """The column of the tables that a leaf follows; a tied leaf (input and output at once) follows the input's, a finite one none.

    Raises
    ------
    ValueError
        If its uses follow columns that no one set of factors serves.
    """
    columns = {COLUMN_OF[role] for role in leaf.roles if role in COLUMN_OF}
    if columns == {"input", "output"}:
        return "input"
    if len(columns) > 1:
        uses = dict.fromkeys(written(Use(site.inside, site.out, site.stack, site.kind)) for site in leaf.sites)
        raise ValueError(
            f"leaf {leaf.path} is used as {' and as '.join(leaf.roles)}, which scale differently: one leaf has one initialization and one "
            f"learning rate. Use two leaves, or say which use counts: "
            f"{', or '.join(f'uses={{{leaf.path!r}: pj.trace.{use}}}' for use in uses)}."
        )
    return next(iter(columns), None)


def is_matrix(leaf: Leaf) -> bool:
    """Whether Muon orthogonalizes the leaf's updates: both fans infinite, one use, no channel groups."""
    return leaf.roles == ("hidden",) and len({(s.inside, s.out, s.window) for s in leaf.sites}) == 1 and leaf.sites[0].groups == 1


def leaf_factors(leaf: Leaf, depth_ratio: float | None, scheme: Parametrization, rule: str, decay_mode: str) -> Factors:
    """The factors of one leaf under a parametrization, before residual multipliers.

    Parameters
    ----------
    leaf
        As the trace found it.
    depth_ratio
        m, the number of residual branches such as it is used in over the base's; `None` outside of branches.
    scheme, rule, decay_mode
        Parametrization; the optimizer's rule; what happens to weight decay, see `plan`.
    """
    which = column(leaf)
    _refuse_unlike(leaf, scheme)
    lr = eps = init_scale = multiplier = 1.0
    decay: float | None = None
    base_law = leaf.narrow_law if scheme.depth is None else leaf.base_law
    _refuse_growing_constant(leaf, leaf.narrow_law)
    if scheme.depth is not None:
        _warn_of_constant(leaf, leaf.narrow_law, base_law)
    if which is None:
        init_scale = _finite_init_scale(leaf, base_law)
        # A number of the model's own that changes with the width would take a leaf away that no width should change.
        multiplier = 1.0 / leaf.own
    else:
        fans, base = leaf.fans(), leaf.fans(base=True)

        def factor(table: Mapping[str, Exponent]) -> float:
            return table[which].factor(fans, base)

        # What the model multiplies by itself (W / sqrt(n) x) is part of the multiplier that is wanted.
        own = leaf.own * (leaf.own_projection if scheme.attention is None else 1.0)
        multiplier, eps = factor(scheme.a) / own, factor(scheme.eps)
        lr = factor(scheme.c["sgd" if rule == "sgd" else "adam"])
        init_scale = _init_scale(leaf, factor(scheme.b), factor(scheme.a), base_law)
        if rule == "muon" and is_matrix(leaf):
            lr *= _spectral_norm_of_signs(fans, base)
            # Muon compares eps with the Frobenius norm of the gradient, Adam with one entry.
            eps *= math.sqrt(math.prod(fans) / math.prod(base))
        elif scheme.decay is not None and rule != "sgd":
            decay = factor(scheme.decay)
    if rule != "sgd" and _decayed_as(leaf) in scheme.no_decay:
        decay = 0.0
    if depth_ratio is not None and scheme.depth is not None:
        multiplier /= leaf.own_depth
        lr *= scheme.depth.learning_rate_factor(depth_ratio, rule)
        eps *= scheme.depth.eps_factor(depth_ratio)
    if decay_mode == "independent":
        # No learning rate multiplies it: what the parametrization wants of learning rate × decay, it wants of the decay alone.
        decay = 1.0 if decay is None else decay * lr
    elif decay is None:
        # The product learning rate × decay is what shrinks a weight, and stays as at the base.
        decay = 1.0 / lr
    return Factors(init_scale, multiplier, lr, 1.0 if rule == "sgd" else eps, decay)


def _refuse_unlike(leaf: Leaf, scheme: Parametrization) -> None:
    """Refuse a leaf that depth changes, as far as can be told, but that has no like at the base, so that it may be of another kind."""
    if scheme.depth is None or leaf.alike:
        return
    same = leaf.narrow_law.kind == leaf.base_law.kind and all(
        math.isclose(a, b, rel_tol=1e-3) or math.isnan(a) for a, b in zip(leaf.narrow_law[1:3], leaf.base_law[1:3])
    )
    if not same or not math.isclose(leaf.own_depth, 1.0, rel_tol=1e-6):
        differs = "starts at other numbers" if not same else "is multiplied by another number"
        told = "" if same else f"; or say how it starts: init_std={{{leaf.path!r}: lambda fan_in, fan_out: ...}}"
        raise ValueError(
            f"leaf {leaf.path}: no leaf of the base has its place in a branch of its kind, and what is numbered with it and has its shape "
            f"{differs}. {scheme.name} compares a leaf with the base's: choose a base that has a layer of each kind{told}."
        )


def _refuse_growing_constant(leaf: Leaf, base: Law) -> None:
    """Refuse a constant that changes with the size: a number of the model's own, of which the trace cannot tell what it scales.

    A weight of 1 / fan_in alone is what it looks like, a mean of what it sums over.
    """
    law = leaf.law
    means = [value * leaf.fans(base=of)[0] for value, of in ((law.mean, False), (base.mean, True))]
    if _other_constant(law, base) and not math.isclose(*means, rel_tol=1e-4):
        raise ValueError(
            f"leaf {leaf.path}: all its entries start at {law.mean:.4g}, and at {base.mean:.4g} at the base. A constant that changes with "
            "the size (a temperature of head_dim**-0.5, a gain of sqrt(d)) is a number of the model's own, and in a leaf the trace cannot "
            "tell what it scales. Initialize the leaf at a value that does not change and multiply by the number in the model's code, "
            f"where it is read; or, if it is to start at {law.mean:.4g} whatever the parametrization makes of the rest, say so: "
            f"plan(..., init_std={{{leaf.path!r}: lambda fan_in, fan_out: 1.0}})."
        )


def _warn_of_constant(leaf: Leaf, narrow: Law, base: Law) -> None:
    """Warn of a constant that differs from that of the base's leaf in its place by depth alone: by the layer's number, or by how many."""
    if _other_constant(narrow, base):
        warnings.warn(
            f"leaf {leaf.path}: all its entries start at {narrow.mean:.4g}, and at {base.mean:.4g} in the layer of the base that it is "
            "compared with. If that is by the number of the layer (its place), all is well; if it is by how many layers there are "
            "(depth**-0.5), it is a number of the model's own that the plan does not count: initialize the leaf at a value that does not "
            "change and multiply by the number in the model's code, where it is read.",
            UserWarning,
            stacklevel=4,
        )


def _other_constant(law: Law, base: Law) -> bool:
    """Whether two laws are known constants that differ."""
    known = law.kind == base.kind == "constant" and not math.isnan(law.mean) and not math.isnan(base.mean)
    return known and not math.isclose(law.mean, base.mean, rel_tol=1e-4)


def _spectral_norm_of_signs(fans: tuple[int, int], base: tuple[int, int]) -> float:
    """Spectral norm of Adam's update over Muon's: both are aligned with the gradient, so Adam's entries of order 1 have norm
    ``sqrt(fan_in fan_out)``, and optax scales the orthogonal matrix to ``sqrt(max(1, fan_out / fan_in))``. Times Adam's ``1 / fan_in``
    of muP this is ``sqrt(fan_out / fan_in)``, the target of arXiv 2310.17813.
    """

    def ratio(fan_in: int, fan_out: int) -> float:
        return math.sqrt(fan_in * fan_out / max(1.0, fan_out / fan_in))

    return ratio(*fans) / ratio(*base)


def _decayed_as(leaf: Leaf) -> str | None:
    """The column whose rule of decay a leaf follows: its own, but a finite bias or gain is a vector like any other (arXiv 2510.15262)."""
    if not any(role in COLUMN_OF for role in leaf.roles) and leaf.sites and all(site.kind == "elementwise" for site in leaf.sites):
        return COLUMN_OF["vector"]
    return column(leaf)


def _finite_init_scale(leaf: Leaf, base: Law) -> float:
    """Give a leaf without a column the base's law: its exponents are 0, whatever fan-in the model's own initialization looks at."""
    law = leaf.law
    if law.kind != "random" or base.kind != "random" or law.std == 0 or base.std == 0:
        return 1.0
    scale = base.std / law.std
    mean = scale * law.mean
    if abs(mean - base.mean) > 0.1 * base.std and not math.isclose(mean, base.mean, rel_tol=1e-3):
        raise ValueError(
            f"leaf {leaf.path} is finite and starts at every size as at the base, but mean and standard deviation of its initialization "
            f"change from {base.mean:.3g} and {base.std:.3g} to {law.mean:.3g} and {law.std:.3g}, which no one factor undoes. "
            "Initialize it alike at all sizes."
        )
    return scale


def _init_scale(leaf: Leaf, wanted: float, multiplier: float, base: Law) -> float:
    """Bring the model's own ratio of standard deviations, target over base, to the wanted one.

    A constant has no standard deviation to scale: what the table multiplies it by is taken out, so that gains of 1 are 1 in every form.
    """
    law = leaf.law
    if "given" in (law.kind, base.kind) or (math.isnan(law.mean) and law.kind == "constant" and column(leaf) != "input"):
        raise ValueError(_undrawn(leaf))
    if law.kind == "constant" or base.kind == "constant":
        return 1.0 if law.mean == 0 else 1.0 / multiplier
    if law.kind != "random" or base.kind != "random":
        told = law if law.kind != "random" else base
        raise ValueError(
            f"leaf {leaf.path}: its initialization "
            + ("depends on the data (at " if told.kind == "data" else "could not be followed (at ")
            + f"{told.why}), so how it scales with width is not known. "
            f"Say how: plan(..., init_std={{{leaf.path!r}: lambda fan_in, fan_out: ...}})."
        )
    if law.std == 0 or base.std == 0:
        return 1.0 if law.mean == 0 else 1.0 / multiplier
    if abs(law.mean) > 0.1 * law.std and not math.isclose(law.mean, base.mean, rel_tol=1e-3):
        raise ValueError(f"leaf {leaf.path}: the mean of its initialization changes from {base.mean:.3g} to {law.mean:.3g} with its size.")
    return wanted * base.std / law.std


def _undrawn(leaf: Leaf) -> str:
    told = f"init_std={{{leaf.path!r}: lambda fan_in, fan_out: ...}}, the standard deviation of its entries"
    if "given" in (leaf.law.kind, leaf.base_law.kind, leaf.narrow_law.kind):
        return (
            f"leaf {leaf.path}: it starts at unequal numbers that init does not draw, so how they scale with width is not known, and every "
            "key starts there. The family gives a network that has its parameters already (an nnx or Equinox instance), or init takes them "
            "from NumPy. Give the constructor instead, lambda width: lambda key: Net(width, key=key) (rngs=rngs in nnx), or draw them from "
            f"the key; or say how they scale: plan(..., {told})."
        )
    return (
        f"leaf {leaf.path}: it starts at numbers that do not depend on the key and are not all one (an identity, say), and as {leaf.role} "
        f"it should change with the width in a way that they do not tell. Say how they scale: plan(..., {told}). Of an identity that is "
        "fan_in ** -0.5."
    )


def use_factor(leaf: Leaf, site: int, scheme: Parametrization) -> float:
    """What the result of one use of a leaf lacks, where the leaf's own factors serve the use that decides.

    The model may multiply this use by something else; and the output use of a tied leaf wants ``n^-((a + b)_output - (a + b)_input)``.
    """
    # The leaf's own multiplier has already taken out what the model multiplies the deciding use by.
    factor = leaf.own / leaf.own_width[site] if leaf.own_width else 1.0
    if role_of(leaf.sites[site], leaf.infinite) != "output" or column(leaf) == "output":
        return factor
    last = leaf.sites[site]
    n = math.prod(leaf.shape[a] for a in last.inside) / math.prod(leaf.base_shape[a] for a in last.inside)
    start = {column: scheme.a[column].power(column) + scheme.b[column].power(column) for column in ("input", "output")}
    return n ** -(start["output"] - start["input"]) * factor


def depth_ratios(program: Program) -> dict[int, float]:
    """For each leaf that is used in a residual branch, m, the number of such branches over the base's; of nested ones the innermost's.

    A leaf that layers share (a table of relative positions, an embedding of positions that is added in each of them) is none of one
    branch: its gradient is a sum over layers of m^-alpha, through weights of their own, and as large as one outside of the branches.
    """
    ratios: dict[int, float] = {}
    for add, growth in sorted(zip(program.adds, program.growths), key=lambda pair: -len(pair[0].leaves)):
        ratios |= dict.fromkeys(add.leaves, growth.whole)
    shared = {leaf for growth in program.growths for leaf in growth.shared}
    return {leaf: ratio for leaf, ratio in ratios.items() if leaf not in shared}
