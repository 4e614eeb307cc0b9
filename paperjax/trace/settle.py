"""What the trace cannot tell is refused, and the caller's `Use` settles it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from paperjax.binding import nearest
from paperjax.trace.graph import WEIGHTED, Graph, Site, Unresolved, Walk
from paperjax.trace.made import PARTIAL
from paperjax.trace.parts import LISTED, growing_lists, summed_lists
from paperjax.trace.probe import Shape

KINDS = ("product", "convolution", "lookup", "elementwise")


@dataclasses.dataclass(frozen=True)
class Use:
    """How a leaf is used, where the trace cannot tell: axes of the leaf, by number. Each that grows has a part.

    Numbers that multiply such a use are left as the model has them: attention of learned queries keeps its 1/sqrt(d), and under muP
    wants 1/d written in the model.

    Attributes
    ----------
    inside
        Axes that are summed over (fan-in).
    out
        Axes that are free (fan-out).
    stack
        Axes of independent copies.
    kind
        ``"product"``, ``"convolution"``, ``"lookup"`` or ``"elementwise"``.

    Examples
    --------
    >>> Use(inside=(0,), out=(1,))
    Use(inside=(0,), out=(1,), stack=(), kind='product')
    """

    inside: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    kind: str = "product"


Axes = Mapping[str, tuple[frozenset[str], ...]]


def overridden(found: Walk, shapes: Sequence[Shape], uses: Mapping[str, Use]) -> Walk:
    """The walk with the caller's uses in place of what was found of their leaves.

    Raises
    ------
    ValueError
        If an override names no leaf, an axis that the leaf lacks, one axis twice, or no kind.
    """
    for path, use in uses.items():
        _check(path, use, shapes)
    sites, unresolved = list(found.sites), list(found.unresolved)
    for i, shape in enumerate(shapes):
        use = uses.get(shape.path)
        if use is None:
            continue
        # A leaf that no data meets has no place in the graph: it stands at the first input.
        known = [site for site in sites if site.leaf == i] or [Site(i, "", "", (), (), (), (), 1, (), 0, None, False, 1)]
        told = {
            "kind": use.kind,
            "inside": use.inside,
            "out": use.out,
            "stack": use.stack,
            "window": (),
            "groups": 1,
            "scans": (),
            "told": True,
        }
        sites = [site for site in sites if site.leaf != i] + [site._replace(**told) for site in known]
        unresolved = [u for u in unresolved if u.leaf != i]
    return found._replace(sites=tuple(sites), unresolved=tuple(unresolved))


def _check(path: str, use: Use, shapes: Sequence[Shape]) -> None:
    paths = {shape.path: shape for shape in shapes}
    if path not in paths:
        raise ValueError(f"uses names a leaf {path!r} that is not there. {nearest(path, list(paths))}")
    if use.kind not in KINDS:
        raise ValueError(f"uses[{path!r}]: {use.kind!r} is no kind of use. {nearest(str(use.kind), KINDS)}")
    named, rank = (*use.inside, *use.out, *use.stack), len(paths[path].shape)
    wrong = [axis for axis in named if not 0 <= axis < rank]
    if wrong:
        raise ValueError(f"uses[{path!r}] names axis {wrong[0]}, and the leaf has shape {paths[path].shape}: axes are 0 to {rank - 1}.")
    if len(set(named)) < len(named):
        raise ValueError(f"uses[{path!r}] gives an axis two parts: {use}. Each axis is inside, out or stack.")


def refuse_uncovered(uses: Mapping[str, Use], axes: Axes) -> None:
    """Refuse overrides that do not say what a growing axis of their leaf is.

    Raises
    ------
    ValueError
        Naming the axes that are missing.
    """
    for path, use in uses.items():
        missing = [a for a, names in enumerate(axes[path]) if names and a not in (*use.inside, *use.out, *use.stack)]
        if missing:
            names = ", ".join(sorted({name for axis in missing for name in axes[path][axis]}))
            free = dataclasses.replace(use, out=tuple(sorted((*use.out, *missing))))
            raise ValueError(
                f"uses[{path!r}] = {use} leaves out axis {', '.join(map(str, missing))}, which grows with {names}: without it the leaf "
                f"would scale as if it did not. Say for every axis that grows whether it is inside, out or stack: pj.trace.{written(free)} "
                "if it is free."
            )


def refuse_unresolved(found: Walk, shapes: Sequence[Shape], base: Sequence[Shape], axes: Axes, settled: Mapping[str, Use]) -> None:
    """Raise one error that lists every use of a leaf with an infinite axis that cannot be told; `base` has the leaves of the base.

    Raises
    ------
    ValueError
        With one line for each: leaf, axes, primitive, reason and the override that settles it.
    """
    lines = []
    listed = (*growing_lists(found, shapes, axes), *summed_lists(found, shapes, base))
    lists = [u for u in listed if shapes[u.leaf].path not in settled]
    unclear = [*_problems(found, shapes, axes, settled), *_copies(found, shapes, axes, settled), *_partless(found, shapes, axes, settled)]
    for problem in dict.fromkeys((*found.unresolved, *unclear, *lists)):
        shape, infinite = shapes[problem.leaf], axes[shapes[problem.leaf].path]
        growing = [axis for axis, names in enumerate(infinite) if names and problem.axis in (None, axis)]
        if growing:
            names = ", ".join(sorted({name for axis in growing for name in infinite[axis]}))
            lines.append(
                f"  {shape.path} {shape.shape}, axis {', '.join(map(str, growing))} (grows with {names}): "
                f"at {problem.op}, {problem.reason}. "
                f"Settle it with {_example(problem, found, shapes, axes)}"
            )
    if lines:
        raise ValueError("the trace cannot tell how these leaves scale:\n" + "\n".join(dict.fromkeys(lines)))


def _example(problem: Unresolved, found: Walk, shapes: Sequence[Shape], axes: Axes) -> str:
    """The override that is meant, in numbers where the trace knows the axes and in words where only the caller does."""
    shape = shapes[problem.leaf]
    infinite = axes[shape.path]
    sites, axis = [site for site in found.sites if site.leaf == problem.leaf], problem.axis
    uses = list(dict.fromkeys(Use(site.inside, site.out, site.stack, site.kind) for site in sites))
    form = f"uses={{{shape.path!r}: pj.trace.%s}}"
    if problem.parts and axis is not None:
        return _split_example(problem, uses, shape, axis, form)
    if len(uses) == 1 and problem.reason == PARTIAL:
        return f"{form % written(uses[0])} if it is a gate, and the plan is to leave the sums to the model"
    if len(uses) == 1 and axis is not None:
        # The axis counts copies, or it is what the trace took it for, or a free axis that comes in parts (heads, one by one).
        inside, out, stack = (tuple(a for a in part if a != axis) for part in (uses[0].inside, uses[0].out, uses[0].stack))
        copies = Use(inside, out, (axis, *stack), uses[0].kind)
        if _covers(copies, shape):
            taken = axis in (*uses[0].inside, *uses[0].out)
            other = uses[0] if taken else Use(inside, tuple(sorted((axis, *out))), stack, uses[0].kind)
            counts = f"{form % written(copies)} if axis {axis} counts copies"
            if problem.reason != WEIGHTED or axis not in uses[0].out or not _made_into_kernel(found, sites):
                return f"{counts}, with {form % written(other)} if it does not"
            # H in sum_i h_i sum_k x_k H_kio is a matrix that acts on the products x_k h_i.
            kernel = f"{form % written(Use(tuple(sorted((axis, *inside))), out, stack, uses[0].kind))} if the data make a kernel with it"
            # The number of copies is no width: nothing else sums over it.
            widths = {n for s in found.sites if s.leaf != problem.leaf for a in s.inside for n in axes[shapes[s.leaf].path][a]}
            first = (kernel, counts) if infinite[axis] <= widths else (counts, kernel)
            return ", with ".join((*first, f"{form % written(other)} if neither"))
    if len(uses) == 1 and problem.reason == LISTED:
        return f"{form % written(uses[0])} if each is a copy by itself; heads belong in one leaf, with a first axis that counts them"
    known = problem in found.unresolved and all(site.effect == "other" for site in sites)
    if len(uses) == 1 and axis is None and known and _covers(uses[0], shape):
        use = uses[0]
        if use.kind == "elementwise" or (use.out and any(infinite[a] for a in use.inside)):
            return form % written(use)
    return _choices(len(shape.shape), form)


def _choices(rank: int, form: str) -> str:
    """Overrides of a leaf of whose axes the trace knows nothing, each with what it means."""
    every, last = tuple(range(rank)), rank - 1
    found = [(Use(every[:-1], (last,)), "the data sum over all of its axes but the last")] if rank > 1 else []
    if rank > 2:
        found += [(Use((0,), every[1:]), "they sum over the first alone"), (Use((1,), every[2:], (0,)), "the first counts copies")]
    found += [(Use((last,), every[:-1]), "they sum over the last")] if rank > 1 else [(Use((0,)), "the data sum over it")]
    found += [(Use(out=every, kind="elementwise"), "its entries are added or multiplied one by one")]
    return ", or with ".join(f"{form % written(use)} if {meaning}" for use, meaning in found)


def _split_example(problem: Unresolved, uses: Sequence[Use], shape: Shape, axis: int, form: str) -> str:
    """The leaf with an axis for each part, and its use; and the use of the axis as it is."""
    if len(uses) != 1 or not _covers(uses[0], shape) or math.prod(part.size for part in problem.parts) != shape.shape[axis]:
        apart = "a leaf that has an axis for each part, and a use of it with the part that is summed over inside and the other out,"
        return f"{apart} if the data make a kernel with it; or, if it is none, with {_choices(len(shape.shape), form)}"
    use, more = uses[0], len(problem.parts) - 1
    place = {a: a + more * (a > axis) for a in range(len(shape.shape))}
    split = {kind: [axis + i for i, part in enumerate(problem.parts) if part.kind == kind] for kind in ("inside", "out", "stack")}
    inside, out, stack = (tuple(sorted([place[a] for a in getattr(use, kind) if a != axis] + split[kind])) for kind in split)
    told = form % written(Use(inside, out, stack))
    parts = tuple(part.size for part in problem.parts)
    sizes = (*shape.shape[:axis], *parts, *shape.shape[axis + 1 :])
    return (
        f"a leaf of shape {sizes}, which has an axis for each part, and {told} if the data make a kernel with it; "
        f"or with {form % written(use)} if it is none, and the plan is to leave that sum to the model"
    )


def _made_into_kernel(found: Walk, sites: Sequence[Site]) -> bool:
    """Whether the results of some uses go into a product with other activations, with no function before it and no softmax after it."""
    graph, pairs = Graph(found), {node.pair for node in found.nodes}

    def after(nodes: set[int]) -> set[int]:
        """What is made of some activations, up to the first that is not linear in them, nor a product that is summed afterwards."""
        todo, seen = list(nodes), set()
        while todo:
            for child in set(graph.children[todo.pop()]) - seen:
                seen.add(child)
                if found.nodes[child].how in ("linear", "affine") or child in pairs:
                    todo.append(child)
        return seen

    made = {i: found.nodes[i] for i in after({site.node for site in sites})}
    products = {i for i, node in made.items() if node.contracted and (node.how == "bilinear" or node.pair is not None)}
    # Of queries and keys come scores, not a layer's result.
    return bool(products) and not any(found.nodes[i].op == "exp" for i in after(products))


def _covers(use: Use, shape: Shape) -> bool:
    """Whether each axis of the leaf has one part."""
    return sorted((*use.inside, *use.out, *use.stack)) == list(range(len(shape.shape)))


def written(use: Use) -> str:
    """An override as its caller writes it."""
    parts = [f"{name}={value}" for name in ("inside", "out", "stack") if (value := getattr(use, name))]
    return f"Use({', '.join(parts + [f'kind={use.kind!r}'] * (use.kind != 'product'))})"


def _problems(found: Walk, shapes: Sequence[Shape], axes: Axes, settled: Mapping[str, Use]) -> Iterator[Unresolved]:
    used = {site.leaf for site in found.sites} | {u.leaf for u in found.unresolved}
    for i in range(len(shapes)):
        if i not in used:
            yield Unresolved(i, "no primitive", "the output does not use it")
    for site in found.sites:
        path = shapes[site.leaf].path
        if path in settled or site.kind not in ("elementwise", "lookup"):
            continue
        names = [name for axis in site.out for name in axes[path][axis]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            reason = (
                f"it meets the data entry by entry, with several axes that grow with {twice[0]}: a matrix that is multiplied step by step?"
            )
            yield Unresolved(site.leaf, site.op, reason)


def _copies(found: Walk, shapes: Sequence[Shape], axes: Axes, settled: Mapping[str, Use]) -> Iterator[Unresolved]:
    """Axes of copies whose number grows, unless a scan goes through them one after the other: that is depth.

    A scan goes through layers if one of its leaves acts on what the step before made; then those that act on something else (a condition
    that is the same for all layers) are the layers', too.
    """
    layers = {scan for site in found.sites for scan in dict.fromkeys(site.scans) if _is_deep(found, site, scan)}
    doubtful = {u.leaf for u in found.unresolved if u.axis is None}
    count = {name for u in found.unresolved if u.axis is not None and not u.parts for name in axes[shapes[u.leaf].path][u.axis]}
    flagged: list[Unresolved] = []
    for site in found.sites:
        path = shapes[site.leaf].path
        for i, axis in enumerate(site.stack if site.leaf not in doubtful else ()):
            if axes[path][axis] and not (i < len(site.scans) and site.scans[i] in layers):
                count |= axes[path][axis]
                if path not in settled:
                    reason = "independent copies whose number grows (blocks side by side, as of heads, are none, but one width)"
                    flagged.append(Unresolved(site.leaf, site.op, reason, axis))
    yield from flagged
    # The copies' first layer may share one input, and then its axis of copies is free like any other. A size that is summed over is none.
    count -= {name for site in found.sites for axis in site.inside for name in axes[shapes[site.leaf].path][axis]}
    known = {(u.leaf, u.axis) for u in found.unresolved}
    for site in found.sites:
        path = shapes[site.leaf].path
        for axis in site.out if path not in settled and site.leaf not in doubtful else ():
            if axes[path][axis] and axes[path][axis] <= count and (site.leaf, axis) not in known:
                yield Unresolved(site.leaf, site.op, "copies that share one input, and whose number grows", axis)


def _partless(found: Walk, shapes: Sequence[Shape], axes: Axes, settled: Mapping[str, Use]) -> Iterator[Unresolved]:
    """Growing axes that no use gives a part to: taken at fixed places, unless those are layers, one after the other."""
    doubtful = {u.leaf for u in found.unresolved if u.axis is None}
    missing: dict[tuple[int, int], list[Site]] = {}
    for site in found.sites:
        named = {*site.inside, *site.out, *site.stack, *site.window}
        for axis, names in enumerate(axes[shapes[site.leaf].path]):
            if names and axis not in named and site.leaf not in doubtful and shapes[site.leaf].path not in settled:
                missing.setdefault((site.leaf, axis), []).append(site)
    deep = {
        name
        for (leaf, axis), sites in missing.items()
        if _in_sequence(found, {site.node for site in sites})
        for name in axes[shapes[leaf].path][axis]
    }
    for (leaf, axis), sites in missing.items():
        if not axes[shapes[leaf].path][axis] <= deep:
            yield Unresolved(leaf, sites[0].op, "it is taken at fixed places, side by side: copies, or parts of one layer?", axis)


def _in_sequence(found: Walk, nodes: set[int]) -> bool:
    """Whether one of some uses acts on what another one made, or on the step of a loop before."""
    todo, seen = [parent for node in nodes for parent in found.nodes[node].parents], set()
    while todo:
        node = todo.pop()
        if node in nodes or found.nodes[node].op == "carry":
            return True
        if node not in seen:
            seen.add(node)
            todo.extend(found.nodes[node].parents)
    return False


def _is_deep(found: Walk, site: Site, scan: tuple[int, ...]) -> bool:
    """Whether what a use acts on depends on the steps of the scan before."""
    todo, seen = list(found.nodes[site.node].parents), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        here = found.nodes[node]
        if here.op == "carry" and here.path == scan:
            return True
        if here.path[: len(scan)] == scan:
            todo.extend(here.parents)
    return False
