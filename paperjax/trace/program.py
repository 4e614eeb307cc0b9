"""`read` a family: its leaves with their roles, its residual streams, its products of activations."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from paperjax.binding import nearest
from paperjax.model import Family, Model, batch_form, check_model, family, join, split
from paperjax.trace import primitives as prim
from paperjax.trace.alike import Network, kinds, paired, parts
from paperjax.trace.depth import Growth, growths, on_stream, stream_factors
from paperjax.trace.graph import Walk
from paperjax.trace.initial import Law, read_laws
from paperjax.trace.interactions import Interaction, interactions
from paperjax.trace.interpret import wiring_of
from paperjax.trace.leaf import Leaf, roles_of
from paperjax.trace.made import only_growing
from paperjax.trace.own import own_factors
from paperjax.trace.portions import Portions, unlike_portions
from paperjax.trace.probe import Probe, Shape, base_shapes, infinite_axes, leaf_shapes, pattern_of, shapes_at, sizes_key
from paperjax.trace.settle import Use, overridden, refuse_uncovered, refuse_unresolved
from paperjax.trace.streams import ResidualAdd, branch_factor, residual_adds
from paperjax.trace.sums import Pairs, Sum, growing_sums, unscaled
from paperjax.trace.walk import walk


@dataclasses.dataclass(frozen=True)
class Program:
    """What the trace of a family found between a base and a target size.

    Attributes
    ----------
    base, target
        The sizes.
    leaves
        In the order of the flattened parameters.
    adds, own_branch
        Residual adds of the target; the factor that the model itself multiplies each branch by after its last function, target over base.
    growths
        For each residual add, how the number of its kind grows.
    fading
        For each residual add, whether the stream is multiplied by a number from one to the next.
    interactions
        Products of activations, with how each is scaled: ``(interaction, base size, exponent)``, the exponent -1/2 for 1/sqrt(d).
    walk
        The walk itself, for what reads on (kernels, limits).
    copies
        Given leaves that start as the same numbers as trained ones (`paperjax.transforms.center` keeps the network as it started), with
        those: ``(path of the copy, path of the leaf)``.
    wiring
        How the equations of the target's trace are wired, see `paperjax.trace.interpret.wiring_of`.
    sums
        Sums of activations over coordinates that grow with a width and that no leaf weighs, with how each is scaled, as `interactions`.
    portions
        Axes of leaves some portions of which grow and others do not, so that no one role is theirs; but for leaves that `uses` names.
    on_stream
        Leaves that act on a residual stream itself between its adds, in more layers than at the base.
    """

    base: Mapping[str, Any]
    target: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    adds: tuple[ResidualAdd, ...]
    own_branch: tuple[float, ...]
    growths: tuple[Growth, ...]
    fading: tuple[bool, ...]
    interactions: tuple[tuple[Interaction, int, float], ...]
    walk: Walk
    copies: tuple[tuple[str, str], ...] = ()
    wiring: str = ""
    sums: tuple[tuple[Sum, int, float], ...] = ()
    portions: tuple[Portions, ...] = ()
    on_stream: tuple[int, ...] = ()


def walk_model(model: Model, x: Any) -> tuple[Walk, Any]:
    """Walk the trace of ``apply`` of one model; the shapes of its parameters come along."""
    x = batch_form(x)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return _walk(model, params, x)[0], params


def flat_apply(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``apply`` as a function of the trained leaves, the given ones and the batch, in the order in which they are walked; and those."""
    trained, given = split(params)
    leaves, tree = jax.tree.flatten(trained)
    fixed, fixed_tree = jax.tree.flatten(given)

    def flat(leaves: Any, fixed: Any, x: Any) -> Any:
        return apply(join(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(fixed_tree, fixed)), x)

    return flat, (leaves, fixed, x)


def _walk(model: Model, params: Any, x: jax.ShapeDtypeStruct) -> tuple[Walk, str, jex.ClosedJaxpr]:
    fn, args = flat_apply(model.apply, params, x)
    jaxpr = prim.trace(fn, *args)
    return walk(jaxpr, len(args[0])), wiring_of(jaxpr), jaxpr


class _Traced(NamedTuple):
    """One network: its leaves, their laws, its walk, how its trace is wired, that trace, copies of its leaves."""

    shapes: tuple[Shape, ...]
    laws: tuple[Law, ...]
    walk: Walk
    wiring: str
    jaxpr: jex.ClosedJaxpr
    copies: tuple[tuple[str, str], ...]


def _traced(model: Model, x: jax.ShapeDtypeStruct) -> _Traced:
    """Trace ``init`` and ``apply``, once each: tracing a large network is what takes time here."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: Any, x: Any) -> Any:
        params = model.init(key, x)
        trained, given = split(params)
        return jax.tree.leaves(trained), jax.tree.leaves(given), params

    jaxpr, (leaves, _, params) = jax.make_jaxpr(init, return_shape=True)(key, x)
    shapes = leaf_shapes(params)
    drawn = dict(zip(map(id, jaxpr.jaxpr.outvars), shapes))
    given = jax.tree_util.tree_leaves_with_path(split(params)[1])
    copied = [(jax.tree_util.keystr(path), drawn.get(id(var))) for (path, _), var in zip(given, jaxpr.jaxpr.outvars[len(leaves) :])]
    copies = tuple((path, leaf.path) for path, leaf in copied if leaf is not None)
    return _Traced(shapes, tuple(read_laws(jaxpr, len(leaves))), *_walk(model, params, x), copies)


def read(
    fam: Family | Any,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    x: Any = None,
    uses: Mapping[str, Use] | None = None,
) -> Program:
    """Read a family from its traces at two sizes, without any annotation of the model.

    Parameters
    ----------
    fam
        A `Family`, or what `paperjax.family` takes.
    base, target
        Sizes by name. What differs between the two is what goes to infinity; a size named in one only is an error.
    x
        An example batch, if the family has none.
    uses
        ``{path: Use(...)}`` for leaves that the trace cannot resolve.

    Returns
    -------
    Program

    Raises
    ------
    ValueError
        If a use of a leaf with an infinite axis cannot be resolved (the message lists leaf, axes, primitive and the override), if an
        override names no leaf, or if the sizes do not fit the family.
    TypeError
        If sizes or overrides have another form, or `x` is not one array.

    Warns
    -----
    UserWarning
        If neither the number of heads nor their size grows with the width: queries and keys are then of output type.

    Notes
    -----
    An axis is infinite if it changes between `base` and `target`. Roles are those of Tensor Programs V (arXiv 2203.03466, appendix B):
    hidden (from infinite to infinite), input (finite to infinite), output (infinite to finite), vector (biases, gains, depthwise kernels),
    embedding (looked up). Nothing is allocated, whatever the sizes.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> def mlp(width):
    ...     sizes = {"u": (2, width), "w": (width, width), "b": (1, width), "v": (width, 1)}
    ...     init = lambda key, x: {name: jnp.zeros(size) for name, size in sizes.items()}
    ...     return init, lambda p, x: jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"] + p["b"]) @ p["v"]
    >>> program = read(mlp, base=dict(width=64), target=dict(width=2**20), x=jnp.ones((3, 2)))
    >>> {leaf.path: leaf.role for leaf in program.leaves}
    {"['b']": 'vector', "['u']": 'input', "['v']": 'output', "['w']": 'hidden'}
    >>> program.leaves[3].shape, program.leaves[3].fans(), program.leaves[3].sites[0].op
    ((1048576, 1048576), (1048576, 1048576), 'dot_general')
    """
    _check_forms({"base": base, "target": target}, uses)
    fam = fam if isinstance(fam, Family) else family(fam)
    x = fam.x if x is None else batch_form(x)
    if x is None:
        raise ValueError("the family has no example batch: pass x=batch here, or build it as family(fn, x=batch).")
    _check_sizes(fam, base, target)
    check_model(fam(**base), x, f"family({', '.join(f'{k}={v}' for k, v in base.items())})")
    there, small = _traced(fam(**target), x), _traced(fam(**base), x)
    at = shapes_at(fam, x, {sizes_key(target): there.shapes, sizes_key(base): small.shapes})
    probe = infinite_axes(at, base, target)
    shapes, axes, whole = probe.shapes, probe.axes, small.shapes
    pairs, found, found_base = base_shapes(at, base, target, probe), there.walk, small.walk
    uses = dict(uses or {})
    found, found_base = overridden(found, shapes, uses), _overridden_base(found_base, whole, shapes, uses)
    big, little = Network(found, residual_adds(found), shapes), Network(found_base, residual_adds(found_base), whole)
    refuse_uncovered(uses, axes)
    keys, base_keys = kinds(big, little)
    pairs = parts(big, little, keys, base_keys, pairs)
    found = only_growing(found, found_base, [whole.index(part) for _, part, _ in pairs])
    refuse_unresolved(found, shapes, whole, axes, uses)
    leaves = []
    for i, shape in enumerate(shapes):
        narrow, part, alike = pairs[i]
        sites = tuple(site for site in found.sites if site.leaf == i)
        infinite = axes[shape.path]
        laws = there.laws[i], small.laws[whole.index(part)], there.laws[i]
        leaves.append(
            Leaf(shape.path, shape.shape, shape.dtype, narrow.shape, infinite, sites, roles_of(sites, infinite), *laws, alike=alike)
        )
    traced = (there, small, _narrow(fam, x, base, target, leaves, probe, there, small))
    settled = {id(t): t._replace(walk=_overridden_base(t.walk, t.shapes, shapes, uses)) for t in traced}
    there, small, narrow = (settled[id(t)] for t in traced)
    wider = growing_sums(there.walk, narrow.walk, shapes, narrow.shapes)
    leaves = _with_own_factors(leaves, [part for _, part, _ in pairs], there, small, narrow, wider)
    unweighed = unscaled(there.walk, narrow.walk, wider)
    streams, base_streams = stream_factors(found, big.adds), stream_factors(found_base, little.adds)
    own_base = [branch_factor(found_base, add) - log for add, (log, _) in zip(little.adds, base_streams)]
    logs = [branch_factor(found, add) - log for add, (log, _) in zip(big.adds, streams)]
    own = tuple(math.exp(log - own_base[k] if own_base else log) for log, k in zip(logs, paired(keys, base_keys)))
    grown = growths(big, little, keys, base_keys)
    scaled = _scaled(found, found_base, shapes, whole)
    _warn_of_fixed_heads(scaled, leaves)
    fading = tuple(f for _, f in streams)
    unlike = [p for p in unlike_portions(there.jaxpr, narrow.jaxpr, len(shapes)) if shapes[p.leaf].path not in uses]
    return Program(
        dict(base), dict(target), tuple(leaves), big.adds, own, grown, fading, scaled, found, there.copies, there.wiring, unweighed,
        tuple(unlike), on_stream(big, little),
    )  # fmt: skip


def _narrow(
    fam: Family,
    x: Any,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    leaves: list[Leaf],
    probe: Probe,
    there: _Traced,
    small: _Traced,
) -> _Traced:
    """The network of the base's widths and the target's depth; a depth adds leaves or slices, and changes no other axis."""
    wide = {name for leaf in leaves for site in leaf.sites for a in (*site.inside, *site.out) for name in leaf.infinite[a]}
    adds = {name for leaf in leaves for site in leaf.sites for a in site.stack for name in leaf.infinite[a]} | set(probe.structural)
    deep = {name: target[name] for name in probe.growing if name in adds - wide}
    if not deep:
        return small
    return there if len(deep) == len(probe.growing) else _traced(fam(**{**base, **deep}), x)


def _with_own_factors(leaves: list[Leaf], parts: list[Shape], there: _Traced, small: _Traced, narrow: _Traced, wider: Pairs) -> list[Leaf]:
    def logs(traced: _Traced, leaf: int, which: int = 0) -> list[float]:
        return [log for site, log in zip(traced.walk.sites, own[id(traced)][which]) if site.leaf == leaf]

    growing = {id(there): {a.node for a, _ in wider}, id(narrow): {b.node for _, b in wider}}
    if wider and small is not narrow:
        growing[id(small)] = {b.node for _, b in growing_sums(there.walk, small.walk, there.shapes, small.shapes)}
    own = {id(traced): own_factors(traced.walk, growing.get(id(traced), frozenset())) for traced in (there, small, narrow)}
    at_small, at_narrow = ({shape.path: i for i, shape in enumerate(traced.shapes)} for traced in (small, narrow))
    found, logits = [], {}
    for i, (leaf, part) in enumerate(zip(leaves, parts)):
        # A size that sets widths and adds layers at once leaves no network in between: all of its change counts as the width's.
        between, k = (narrow, at_narrow[leaf.path]) if leaf.path in at_narrow else (small, at_small[part.path])
        ours, theirs, first = logs(there, i), logs(between, k), logs(small, at_small[part.path])
        if len(ours) != len(theirs) or not ours or not first:
            found.append(dataclasses.replace(leaf, narrow_law=between.laws[k], own_width=(1.0,) * len(leaf.sites)))
            continue
        leaf = dataclasses.replace(leaf, narrow_law=between.laws[k], own_width=tuple(math.exp(a - b) for a, b in zip(ours, theirs)))
        logits[i] = logs(there, i, 1)[0] - logs(between, k, 1)[0]
        # A leaf that layers share has more uses in a deeper network; the first of a kind is compared with the first.
        at = (leaf.deciding,) * 2
        if len(theirs) != len(first):
            like = leaf.kind_of(leaf.deciding)
            at = leaf.first_of(like), leaf.first_of(like, [site for site in small.walk.sites if site.leaf == at_small[part.path]])
        found.append(dataclasses.replace(leaf, own_depth=math.exp(theirs[at[0]] - first[at[1]])))
    return _with_own_projections(found, interactions(there.walk), logits)


def _with_own_projections(leaves: list[Leaf], products: tuple[Interaction, ...], logs: Mapping[int, float]) -> list[Leaf]:
    """Tell ``(x @ W) / sqrt(n)`` of both projections from a scale of the logits that is written on their operands.

    A scale of the logits stands on one side (queries over sqrt(d)) or is split over both (each over d^1/4). So a factor of n^-1/2 or
    smaller on both sides is the projections' own, one n^-1/2 each.
    """
    found = list(leaves)
    for sides in (product.leaves for product in products):
        made = [i for side in sides for i in side]
        if not all(sides) or any(len(leaves[i].sites) != 1 for i in made):
            continue
        wanted = {i: -math.log(leaves[i].fans()[0] / leaves[i].fans(base=True)[0]) / 2 for i in made}
        if all(wanted[i] < 0 and logs.get(i, 0.0) <= wanted[i] * (1 - 1e-6) for i in made):
            for i in made:
                found[i] = dataclasses.replace(leaves[i], own_projection=math.exp(wanted[i]))
    return found


def _overridden_base(found: Walk, base_shapes: tuple[Shape, ...], shapes: tuple[Shape, ...], uses: Mapping[str, Use]) -> Walk:
    """The same overrides at the base, whose loop over layers may be shorter."""
    patterns = {pattern_of(path): use for path, use in uses.items()}
    there = {shape.path: patterns[pattern_of(shape.path)] for shape in base_shapes if pattern_of(shape.path) in patterns}
    return overridden(found, base_shapes, there)


def _warn_of_fixed_heads(scaled: tuple[tuple[Interaction, int, float], ...], leaves: list[Leaf]) -> None:
    for found, base_size, _ in scaled:
        made = [leaves[i] for side in found.leaves for i in side]
        if found.size == base_size and all(found.leaves) and all(leaf.roles == ("output",) for leaf in made):
            warnings.warn(
                f"{', '.join(leaf.path for leaf in made)}: their products sum over {found.size} coordinates that do not grow, and no axis "
                "of heads grows, while the width does. So they are of output type (infinite to finite) and follow the output's "
                "rules. Let the heads or their size grow with the width if they should be hidden.",
                UserWarning,
                stacklevel=3,
            )
            return


def _check_forms(sizes: Mapping[str, Any], uses: Any) -> None:
    for which, given in sizes.items():
        if not isinstance(given, Mapping):
            raise TypeError(f"{which} = {given!r}: sizes are given by name, {which}=dict(width={given if isinstance(given, int) else 64}).")
    if uses is not None and not isinstance(uses, Mapping):
        raise TypeError(f"uses = {uses!r}: give {{path: pj.trace.Use(...)}}, with the paths that the plan prints.")
    for path, use in (uses or {}).items():
        if not isinstance(use, Use):
            raise TypeError(
                f"uses[{path!r}] is {use!r}, and must say what is done with each axis of the leaf: "
                "pj.trace.Use(inside=(0,), out=(1,)) if axis 0 is summed over and axis 1 is free; its role follows from which of them grow."
            )


def _check_sizes(fam: Family, base: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for which, sizes in (("base", base), ("target", target)):
        for name in sizes:
            if name not in fam.sizes:
                raise ValueError(f"{which} names a size {name!r} that the family does not take. {nearest(name, fam.sizes)}")
    if set(base) != set(target):
        missing = sorted(set(base) ^ set(target))
        raise ValueError(f"base and target must name the same sizes; {', '.join(missing)} is in one of them only.")

    def larger(small: Any, large: Any) -> bool:
        if isinstance(small, tuple | list) and isinstance(large, tuple | list):
            return any(larger(a, b) for a, b in zip(small, large))
        # NumPy's numbers are registered as such.
        return isinstance(small, numbers.Real) and isinstance(large, numbers.Real) and bool(small > large)

    for name, value in base.items():
        if larger(value, target[name]):
            raise ValueError(
                f"base {name} = {value} is larger than the target's {target[name]}: exchange them, or choose a smaller base. "
                "A base is the small network that was tuned."
            )


def _scaled(
    found: Walk, base: Walk, shapes: tuple[Shape, ...], base_shapes: tuple[Shape, ...]
) -> tuple[tuple[Interaction, int, float], ...]:
    there = interactions(base)
    scaled = []
    seen: dict[tuple[Any, ...], int] = {}
    for a in interactions(found):
        # Layers may differ in number, not in kind: the base's like was made by leaves of the same names but for their numbers.
        like = [b for b in there if _names(b, base_shapes) == _names(a, shapes)]
        if not like:
            continue
        # Layers repeat: so many products a layer, at the base as here.
        n = seen.get(_names(a, shapes), 0)
        seen[_names(a, shapes)] = n + 1
        b = like[n % len(like)]
        exponent = (a.log_scale - b.log_scale) / math.log(a.size / b.size) if a.size != b.size else 0.0
        scaled.append((a, b.size, exponent))
    return tuple(scaled)


def _names(interaction: Interaction, shapes: tuple[Shape, ...]) -> tuple[Any, ...]:
    return tuple(tuple(pattern_of(shapes[leaf].path) for leaf in leaves) for leaves in interaction.leaves)
