"""`read` a family: its leaves with their roles, its residual streams, its products of activations."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Mapping
from typing import Any

from paperjax.binding import nearest
from paperjax.model import Family, batch_form, check_model, family
from paperjax.trace.alike import Network, kinds, paired, parts
from paperjax.trace.depth import Growth, growths, on_stream, stream_factors, unread
from paperjax.trace.graph import Graph, Walk
from paperjax.trace.interactions import Interaction, interactions
from paperjax.trace.leaf import Leaf, roles_of
from paperjax.trace.made import only_growing
from paperjax.trace.own import marked
from paperjax.trace.portions import Portions, unlike_portions
from paperjax.trace.probe import Probe, Shape, base_shapes, infinite_axes, pattern_of, shapes_at, sizes_key
from paperjax.trace.settle import Use, overridden, refuse_uncovered, refuse_unresolved
from paperjax.trace.streams import ResidualAdd, branch_factor, residual_adds
from paperjax.trace.sums import Sum, growing_sums, unscaled
from paperjax.trace.traced import Traced, own_numbers, traced, with_own_factors
from paperjax.trace.unclaimed import Number, unclaimed


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
    unclaimed
        Numbers that change with a width, and that no leaf, product or sum has for its own.
    portions
        Axes of leaves some portions of which grow and others do not, so that no one role is theirs; but for leaves that `uses` names.
    on_stream
        Leaves that act on a residual stream itself between its adds, in more layers than at the base.
    unread
        Equations that add to a sum that grows with the depth what is no residual branch.
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
    unclaimed: tuple[Number, ...] = ()
    portions: tuple[Portions, ...] = ()
    on_stream: tuple[int, ...] = ()
    unread: tuple[tuple[int, ...], ...] = ()


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
    there, small = traced(fam(**target), x), traced(fam(**base), x)
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
    like = [whole.index(part) for _, part, _ in pairs]
    found = only_growing(found, found_base, like)
    refuse_unresolved(found, shapes, whole, axes, uses)
    leaves = []
    for i, shape in enumerate(shapes):
        narrow, _, alike = pairs[i]
        sites = tuple(site for site in found.sites if site.leaf == i)
        infinite = axes[shape.path]
        laws = there.laws[i], small.laws[like[i]], there.laws[i]
        leaves.append(
            Leaf(shape.path, shape.shape, shape.dtype, narrow.shape, infinite, sites, roles_of(sites, infinite), *laws, alike=alike)
        )
    networks = (there, small, _narrow(fam, x, base, target, leaves, probe, there, small))
    grows = {pattern_of(path) for path, infinite in axes.items() if any(infinite)}
    settled = {id(t): t._replace(walk=marked(_overridden_base(t.walk, t.shapes, shapes, uses), t.shapes, grows)) for t in networks}
    there, small, narrow = (settled[id(t)] for t in networks)
    found, found_base = marked(found, shapes, grows), marked(found_base, whole, grows)
    wider = growing_sums(there.walk, narrow.walk, shapes, narrow.shapes)
    numbers_of = own_numbers(there, small, narrow, wider)
    leaves = with_own_factors(leaves, [part for _, part, _ in pairs], there, small, narrow, numbers_of)
    taken, base_taken = (frozenset[int]().union(*(own.behind for own in numbers_of[id(t)])) for t in (there, small))
    unweighed = unscaled(there.walk, narrow.walk, wider)
    streams, base_streams = stream_factors(found, big.adds, taken), stream_factors(found_base, little.adds, base_taken)
    graph, base_graph = Graph(found), Graph(found_base)
    own_base = [branch_factor(base_graph, add, base_taken) - log for add, (log, _) in zip(little.adds, base_streams)]
    logs = [branch_factor(graph, add, taken) - log for add, (log, _) in zip(big.adds, streams)]
    own = tuple(math.exp(log - own_base[k] if own_base else log) for log, k in zip(logs, paired(keys, base_keys)))
    grown = growths(big, little, keys, base_keys, like)
    scaled = _scaled(found, found_base, shapes, whole)
    _warn_of_fixed_heads(scaled, leaves)
    fading = tuple(f for _, f in streams)
    unlike = [p for p in unlike_portions(there.jaxpr, narrow.jaxpr, len(shapes)) if shapes[p.leaf].path not in uses]
    unseen = unclaimed(there.walk, narrow.walk, numbers_of[id(there)], {a.node for a, _ in wider})
    return Program(
        dict(base), dict(target), tuple(leaves), big.adds, own, grown, fading, scaled, found, there.copies, there.wiring, unweighed,
        unseen, tuple(unlike), on_stream(big, little), _unread(there, small, narrow, big, little),
    )  # fmt: skip


def _narrow(
    fam: Family,
    x: Any,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    leaves: list[Leaf],
    probe: Probe,
    there: Traced,
    small: Traced,
) -> Traced:
    """The network of the base's widths and the target's depth; a depth adds leaves or slices, and changes no other axis."""
    wide = {name for leaf in leaves for site in leaf.sites for a in (*site.inside, *site.out) for name in leaf.infinite[a]}
    adds = {name for leaf in leaves for site in leaf.sites for a in site.stack for name in leaf.infinite[a]} | set(probe.structural)
    deep = {name: target[name] for name in probe.growing if name in adds - wide}
    if not deep:
        return small
    return there if len(deep) == len(probe.growing) else traced(fam(**{**base, **deep}), x)


def _unread(there: Traced, small: Traced, narrow: Traced, big: Network, little: Network) -> tuple[tuple[int, ...], ...]:
    """Where a sum of no residual branches is longer than any at the base; at the base's widths, as heads are summed up, too."""
    adds = big.adds if narrow is there else little.adds if narrow is small else residual_adds(narrow.walk)
    base = unread(small.walk, little.adds)
    return tuple(path for n, path in sorted(unread(narrow.walk, adds).items()) if n not in base)


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
                none = "It names no size (**kwargs is none): write them out, lambda width, depth: net(width=width, depth=depth)."
                known = nearest(name, fam.sizes) if fam.sizes else none
                raise ValueError(f"{which} names a size {name!r} that the family does not take. {known}")
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
