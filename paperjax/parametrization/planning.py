"""`plan`: resolve a parametrization against a family."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax

from paperjax.binding import nearest
from paperjax.model import Family, family, split
from paperjax.parametrization.abc import COLUMN_OF, Parametrization
from paperjax.parametrization.classify import classify
from paperjax.parametrization.factors import DECAY_MODES, Factors, column, depth_ratios, is_matrix, leaf_factors, rule_of, use_factor
from paperjax.parametrization.plan import Plan, PlannedLeaf
from paperjax.parametrization.scaling import Scaling, described, named
from paperjax.parametrization.unlike import refuse_on_stream, refuse_portions, refuse_unread
from paperjax.parametrization.unread import warn_of_numbers, warn_of_product, warn_of_sums
from paperjax.trace.graph import Site
from paperjax.trace.initial import Law
from paperjax.trace.leaf import Leaf, role_of
from paperjax.trace.program import Program, Use, read

READ = 1e-6
"""How near to 1 a factor is none: what the model itself multiplies by is read from a trace, in single precision."""


def plan(
    fam: Family | Any,
    scheme: Parametrization,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    optimizer: Any = "adam",
    x: Any = None,
    weight_decay: str = "coupled",
    uses: Mapping[str, Use] | None = None,
    init_std: Mapping[str, Callable[[int, int], float]] | None = None,
) -> Plan:
    """Resolve a parametrization against a family, from its trace; nothing of the model is annotated and nothing is allocated.

    For a leaf of a column with exponents (a, b, c), and n the ratio of its width at the target to that at the base,

        ``multiplier = n^-a``,  ``init_scale = n^-b · std_base / std_target``,  ``learning rate × n^-c``,

    where std is that of the model's own initialization, read from the trace of ``init``. So any sensible initialization comes out
    right, and at the base the plan is the model itself. What starts at one number for all entries keeps it, multiplier included:
    ``init_scale = n^a`` (gains of 1 are gains of 1 in every form of a parametrization), and zeros stay zeros.

    Parameters
    ----------
    fam
        A `Family` or what `paperjax.family` takes.
    scheme
        A `Parametrization`: ``pj.mup``, ``pj.depth_mup``, ``pj.completep``, ``pj.ntp``, ... or your own by ``pj.abc``.
    base, target
        Sizes by name. What differs between them goes to infinity. They may be equal: a grid of widths begins with the one that was tuned,
        and there the plan is the model itself, all factors 1.
    optimizer
        A name in optax or a factory; only its family matters: ``"sgd"`` (momentum and Nesterov too), Adam-like, or ``"muon"``, where hidden
        matrices follow Muon and the rest Adam.
    x
        An example batch, if the family has none.
    weight_decay
        How the optimizer decays: ``"coupled"`` (the learning rate multiplies the decay, as in optax's AdamW, Lion and Muon, and as
        L2 in the gradient under SGD: the product is kept, so the decay is times 1 / learning-rate factor) or ``"independent"`` (a step
        removes that fraction of the weight, whatever the learning rate: the decay is kept). No parametrization multiplies decay by more.
    uses
        Overrides for leaves that the trace cannot resolve, ``{path: Use(...)}``, or whose parts do not all grow and that are to be planned
        as one all the same.
    init_std
        ``{path: (fan_in, fan_out) -> std}`` for leaves whose initialization cannot be read, or is a constant that changes with the size.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        For a base that is larger, unknown sizes, an optimizer of unknown family, overrides of leaves that do not exist, a leaf
        that cannot be resolved, or that is several in one (parts of an axis that grow and parts that do not), or that starts at a constant
        which changes with the size; under a depth parametrization a depth that grows without residual branches, leaves of every layer
        that act on the residual stream itself, and sums over layers of what is no branch; a standard deviation that is no finite number of
        at least 0.
    TypeError
        If sizes or overrides have another form.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, paperjax as pj
    >>> family = pj.family(lambda width: pj.models.mlp(width, 2, 10), x=jnp.ones((1, 64)))
    >>> p = plan(family, pj.mup, base=dict(width=64), target=dict(width=256), optimizer="adam")
    >>> [(leaf.path, leaf.role, leaf.factors.learning_rate) for leaf in p.leaves if leaf.path.endswith("['w']")]
    [("['first']['w']", 'input', 1.0), ("['hidden']['w']", 'hidden', 0.25), ("['readout']['w']", 'output', 0.25)]
    """
    if not isinstance(scheme, Parametrization):
        raise TypeError(f"plan needs a Parametrization (pj.mup, pj.ntp, ..., or pj.abc(...)), not {scheme!r}.")
    if weight_decay not in DECAY_MODES:
        raise ValueError(f"weight_decay = {weight_decay!r} is no mode of decay. {nearest(str(weight_decay), DECAY_MODES)}")
    fam = fam if isinstance(fam, Family) else family(fam)
    rule = rule_of(optimizer)
    _refuse_muon(scheme, rule)
    program = read(fam, base, target, x, uses)
    program = _told(program, {} if init_std is None else init_std)
    if rule == "muon" or scheme.no_decay:
        program = _with_roles_at_the_base(program, fam, x, uses)
    _check_depth(program, scheme, fam, x)
    ratios = depth_ratios(program)
    factors = [leaf_factors(leaf, ratios.get(i), scheme, rule, weight_decay) for i, leaf in enumerate(program.leaves)]
    refuse_portions(program, factors)
    factors, scalings = _with_branches(program, scheme, factors)
    scalings += _attention(program, scheme) + _uses(program, scheme)
    _refuse_scaled_copies(program, scalings)
    rows = tuple(_row(leaf, f, rule) for leaf, f in zip(program.leaves, factors))
    sizes = tuple(base.items()), tuple(target.items())
    places = named(scalings, program.walk, [leaf.path for leaf in program.leaves])
    trace = (program.wiring, described(fam.x if x is None else x)) if scalings else ()
    return Plan(scheme.name, rule, weight_decay, *sizes, rows, places, program.copies, *trace, network=fam(**target))


def _row(leaf: Leaf, f: Factors, rule: str) -> PlannedLeaf:
    first = leaf.sites[leaf.deciding] if leaf.sites else None
    inside, out, stack = ((), (), ()) if first is None else (first.inside + first.window, first.out, first.stack)
    return PlannedLeaf(
        leaf.path,
        leaf.shape,
        str(leaf.dtype),
        leaf.role,
        tuple("+".join(sorted(names)) for names in leaf.infinite),
        inside,
        out,
        stack,
        "adam" if rule == "muon" and not is_matrix(leaf) else rule,
        leaf.law.std * f.init_scale,
        f,
    )


def _refuse_scaled_copies(program: Program, scalings: list[Scaling]) -> None:
    """A copy of the network follows the factors of its leaves; those on activations it would lack."""
    if program.copies and scalings:
        copy, leaf = program.copies[0]
        raise ValueError(
            f"the network carries a copy of itself as it started ({copy} is {leaf}; paperjax.transforms.center does that), and this plan "
            f"has factors on activations ({scalings[0].why}), which the copy would lack. Plan the network without its copy and centre "
            "what comes out: center(plan.model)."
        )


def _refuse_muon(scheme: Parametrization, rule: str) -> None:
    if rule != "muon":
        return
    found = classify(scheme, 2, "adam")
    if found.regime != "feature learning":
        raise ValueError(
            f"Muon's learning rates come from Adam's, as updates of the same spectral norm, and {scheme.name} is {found.regime} under Adam "
            f"({found.why}). Muon's own scaling is that of features that move: plan with pj.mup, pj.spectral, pj.depth_mup or pj.completep."
        )


def _with_roles_at_the_base(program: Program, fam: Family, x: Any, uses: Mapping[str, Use] | None) -> Program:
    """Where base and target are the same network nothing grows, and every leaf would be finite: let all sizes double for the roles.

    Every factor is 1 there, but Muon at the base must be the Muon of the target, and a column without decay has none.
    """
    if any(program.base[name] != value for name, value in program.target.items()):
        return program
    doubled = {k: 2 * v if isinstance(v, numbers.Integral) and not isinstance(v, bool) else v for k, v in program.target.items()}
    grown = {leaf.path: leaf for leaf in read(fam, program.base, doubled, x, uses).leaves}

    def known(leaf: Leaf) -> Leaf:
        like = grown.get(leaf.path, leaf)
        return dataclasses.replace(leaf, roles=like.roles, infinite=like.infinite, sites=like.sites)

    return dataclasses.replace(program, leaves=tuple(map(known, program.leaves)))


def _told(program: Program, init_std: Any) -> Program:
    """Replace laws by the standard deviations that the caller gives."""
    if not isinstance(init_std, Mapping):
        raise TypeError(f"init_std = {init_std!r}: give {{path: lambda fan_in, fan_out: std}}, with the paths that the plan prints.")
    paths = [leaf.path for leaf in program.leaves]
    for path in init_std:
        if path not in paths:
            raise ValueError(f"init_std names a leaf {path!r} that is not there. {nearest(path, paths)}")
    leaves = []
    for leaf in program.leaves:
        if leaf.path in init_std:
            ours, there = (Law("random", 0.0, _std(init_std[leaf.path], leaf, base)) for base in (False, True))
            leaf = dataclasses.replace(leaf, law=ours, base_law=there, narrow_law=there)
        leaves.append(leaf)
    return dataclasses.replace(program, leaves=tuple(leaves))


def _std(told: Any, leaf: Leaf, base: bool) -> float:
    if not callable(told):
        raise TypeError(
            f"init_std[{leaf.path!r}] is {told!r}, and must be a function of the fans, whose change with the width is what counts: "
            "lambda fan_in, fan_out: fan_in ** -0.5, say, or lambda fan_in, fan_out: 0.02."
        )
    fans = leaf.fans(base=base)
    std: Any = told(*fans)
    number = isinstance(std, numbers.Real) or (hasattr(std, "item") and getattr(std, "ndim", None) == 0)
    if not number or not math.isfinite(std) or std < 0:
        raise ValueError(
            f"init_std[{leaf.path!r}] gives {std!r} at fan_in = {fans[0]}, fan_out = {fans[1]}: a standard deviation is a finite number of "
            "at least 0. Look for a quotient, a logarithm or a sign in it."
        )
    return float(std)


def _check_depth(program: Program, scheme: Parametrization, fam: Family, x: Any) -> None:
    if scheme.depth is None:
        return
    for add, growth, fades in zip(program.adds, program.growths, program.fading):
        where = f"equation {add.path} of apply"
        # With a writer of its own each branch is a random map by itself, whatever else layers share.
        if growth.shared and (not add.writers or set(growth.shared) & set(add.writers)):
            raise ValueError(
                f"{', '.join(program.leaves[leaf].path for leaf in growth.shared)}: layers share it ({where}), and their number grows. "
                f"{scheme.name} is for layers that write into the stream with weights of their own: branches that share them add up. Use "
                "pj.mup, which does not scale with depth, or give each layer its own."
            )
        if growth.inside != 1 and add.late:
            raise ValueError(
                f"the loop over layers adds in each step what the step before it made ({where}), and in the first one what it begins with, "
                f"which is no branch. {scheme.name} multiplies branches: carry one stream, h + f(norm(h)), and not the last branch beside "
                "it, or write the layers out in a Python loop, or use pj.mup, which does not scale with depth."
            )
        # As many adds to a branch's own stream as at the base fade as they do there.
        if growth.inside != 1 and fades:
            raise ValueError(
                f"the residual stream is multiplied by a number at each add ({where}), so that early layers fade, or grow, exponentially "
                f"with the number of layers. {scheme.name} is for h + f(h): take the number out of the stream, or use pj.mup, which does "
                "not scale with depth."
            )
    refuse_on_stream(program, scheme)
    refuse_unread(program, scheme)
    if program.adds:
        return
    deeper = {n for leaf in program.leaves for site in leaf.sites for a in site.stack for n in leaf.infinite[a]}
    more = len(jax.tree.leaves(split(fam.shapes(x, **program.base))[0])) != len(program.leaves)
    if deeper or more:
        raise ValueError(
            f"{scheme.name} scales residual branches, and {', '.join(sorted(deeper)) or 'the number of layers'} grows, and the trace found "
            "no residual add (stream + branch with a weight between). Use pj.mup for a network without residual branches."
        )


def _with_branches(program: Program, scheme: Parametrization, factors: list[Factors]) -> tuple[list[Factors], list[Scaling]]:
    scalings: list[Scaling] = []
    if scheme.depth is None or all(growth.whole == 1 for growth in program.growths):
        return factors, scalings
    factors = list(factors)
    # A leaf that writes into two branches would be scaled twice.
    written = [leaf for add in program.adds for leaf in add.writers]
    for add, own, growth in zip(program.adds, program.own_branch, program.growths):
        wanted = scheme.depth.multiplier(growth.inside)
        m = wanted / own
        for leaf in add.beside:
            factors[leaf] = factors[leaf]._replace(multiplier=factors[leaf].multiplier * wanted)
        if add.writers and all(written.count(leaf) == 1 for leaf in add.writers):
            for leaf in add.writers:
                factors[leaf] = factors[leaf]._replace(multiplier=factors[leaf].multiplier * m)
        elif not math.isclose(m, 1.0, rel_tol=READ):
            scalings.append(Scaling(add.path, add.op, add.operand, m, "residual branch", "branch"))
    return factors, scalings


def _attention(program: Program, scheme: Parametrization) -> list[Scaling]:
    """Bring the power of a growing head's width in its logits to that of the parametrization."""
    if scheme.attention is None:
        return []
    warn_of_sums(program)
    warn_of_numbers(program)
    scalings = []
    for found, base_size, exponent in program.interactions:
        if found.size == base_size:
            continue
        if not all(found.leaves):
            warn_of_product(program, found, base_size, exponent)
            continue
        factor = (found.size / base_size) ** (-scheme.attention - exponent)
        if not math.isclose(factor, 1.0, rel_tol=READ):
            why = f"logits of d^{exponent:.3g} to d^{-scheme.attention:.3g}"
            scalings.append(Scaling(found.path, found.op, None, factor, why, "product"))
    return scalings


def _uses(program: Program, scheme: Parametrization) -> list[Scaling]:
    """Factors on the results of single uses of a leaf: of the output use of tied weights, and against what the model multiplies one by."""
    scalings: dict[tuple[int, ...], Scaling] = {}
    for number, leaf in enumerate(program.leaves):
        if len(leaf.sites) < 2 or column(leaf) is None:
            continue
        for k, site in enumerate(leaf.sites):
            factor, role = use_factor(leaf, k, scheme), role_of(leaf.sites[k], leaf.infinite)
            if role not in COLUMN_OF or math.isclose(factor, 1.0, rel_tol=READ):
                continue
            _refuse_shared_result(program, number, site)
            why = f"{role} use of tied {leaf.path}" if len(leaf.roles) > 1 else f"one use of {leaf.path}, which others share"
            scalings[site.path] = Scaling(site.path, site.op, None, factor, why)
    return list(scalings.values())


def _refuse_shared_result(program: Program, number: int, site: Site) -> None:
    """A factor on the result of one use is a factor on the leaf there only if the leaf multiplies all of that result."""
    path = program.leaves[number].path
    others = [program.leaves[s.leaf].path for s in program.walk.sites if s.path == site.path and s.leaf != number]
    if site.effect == "times" and not others:
        return
    what = f"joined with {others[0]}" if others else "added, or goes through a function of its own"
    raise ValueError(
        f"leaf {path} is used in several places that want different factors, and at one of them ({site.op}, equation {site.path} of apply) "
        f"it is {what}, so no factor on the result stands for one on the leaf. Use two leaves, or multiply them apart from each other."
    )
