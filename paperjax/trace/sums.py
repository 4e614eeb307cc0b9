"""Sums of activations over coordinates that grow and that no leaf's axis runs over: a committee's vote, a squared distance to prototypes.

A leaf that has the axis is what brings such a sum to order 1; a sum that no leaf weighs is what the model makes of it, so a
parametrization cannot scale it. Products of two activations, which attention is made of, are in `interactions`.
"""

import math
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from paperjax.trace import primitives as prim
from paperjax.trace.graph import CONTRACTING, Graph, Walk
from paperjax.trace.interactions import after, multiplied
from paperjax.trace.origins import makers, own_size, summed_over
from paperjax.trace.own import before, behind_uses
from paperjax.trace.parts import apart, sums_behind
from paperjax.trace.probe import Shape, pattern_of


class Sum(NamedTuple):
    """A sum of an activation over some of its coordinates, or of its squares.

    Attributes
    ----------
    path, node
        Where it stands, and what it makes.
    size
        Number of coordinates it sums over.
    leaves
        Leaves that made what it sums.
    uses
        Uses of one leaf whose results are its terms, where they are added up one by one, ``sum(h @ w for h in heads)``.
    """

    path: tuple[int, ...]
    node: int
    size: int
    leaves: tuple[int, ...]
    uses: tuple[int, ...] = ()


Pairs = tuple[tuple[Sum, Sum], ...]


def sums(walk: Walk) -> tuple[Sum, ...]:
    """All sums of activations that no leaf weighs and leaves have made, in the order of execution."""
    graph = Graph(walk)
    found = [i for i in range(len(graph.nodes)) if _is_sum(graph, i)]
    made = [Sum(graph.nodes[i].path, i, summed_over(graph, i), makers(graph, i)) for i in found]
    lists = (one for one in _lists(graph, walk) if one.node not in found)
    return tuple(sorted((*(one for one in made if one.leaves), *lists), key=lambda one: one.node))


def _lists(graph: Graph, walk: Walk) -> Iterator[Sum]:
    """Sums of the results of several uses of one leaf, side by side."""
    uses: dict[int, dict[int, list[int]]] = {}
    for k, site in enumerate(walk.sites):
        if site.kind in CONTRACTING and site.operand is not None and not site.reused:
            at = uses.setdefault(site.leaf, {})
            for node in sums_behind(graph, site.node):
                at.setdefault(node, []).append(k)
    for leaf, at in uses.items():
        for found in dict.fromkeys(tuple(those) for those in at.values()):
            whole = not any(set(found) < set(those) for those in at.values())
            if len(found) > 1 and whole and apart(graph, *(walk.sites[k] for k in found[:2])):
                node = min(node for node, those in at.items() if tuple(those) == found)
                yield Sum(graph.nodes[node].path, node, len(found), (leaf,), found)


def _is_sum(graph: Graph, i: int) -> bool:
    """Whether a sum is neither a product with a leaf nor one of two activations."""
    node = graph.nodes[i]
    with_itself = node.op == "dot_general" and node.how == "bilinear" and len(node.parents) == 1
    return not graph.contracts(i) and (with_itself or (graph.adds_up(i) and multiplied(graph, i) is None))


def growing_sums(found: Walk, other: Walk, shapes: Sequence[Shape], others: Sequence[Shape]) -> Pairs:
    """Sums over more coordinates than another size of the network has, with their like there.

    Alike are those that leaves of the same names but for the numbers of their layers made, in the same place among those.
    """
    if found is other:
        return ()
    ours, theirs = _by_names(sums(found), shapes), _by_names(sums(other), others)
    # So many a layer; where there is no such number it cannot be said which is which.
    alike = [names for names, same in ours.items() if names in theirs and len(same) % len(theirs[names]) == 0]
    pairs = ((one, theirs[names][n % len(theirs[names])]) for names in alike for n, one in enumerate(ours[names]))
    return tuple((a, b) for a, b in pairs if a.size != b.size)


def _by_names(these: tuple[Sum, ...], of: Sequence[Shape]) -> dict[tuple[str, ...], list[Sum]]:
    found: dict[tuple[str, ...], list[Sum]] = {}
    for one in these:
        found.setdefault(tuple(sorted({pattern_of(of[leaf].path) for leaf in one.leaves})), []).append(one)
    return found


def unscaled(found: Walk, other: Walk, pairs: Pairs) -> tuple[tuple[Sum, int, float], ...]:
    """Growing sums that an output depends on, as ``(sum, coordinates of the other, exponent of the known factors)``.

    Those factors stand before it and after it, up to the next function or leaf. Left out is what goes on only as a norm, or as a choice.
    """
    graph = Graph(found)
    on = [(a, b) for a, b in pairs if not _normalizes(graph, a.node) and reaches_on(graph, a.node)]
    logs = _log_scales(found, [a for a, _ in on]), _log_scales(other, [b for _, b in on])
    return tuple((a, b.size, (x - y) / math.log(a.size / b.size)) for (a, b), x, y in zip(on, *logs))


def _log_scales(walk: Walk, these: list[Sum]) -> list[float]:
    if not these:
        return []
    graph = Graph(walk)
    # What is a leaf's own, the plan takes for an initialization.
    _, taken = behind_uses(graph, walk, {one.node: one.size for one in these})
    nodes = [graph.nodes[one.node] for one in these]
    ahead = [
        _before_list(graph, walk, one, taken)
        if one.uses
        else before(graph, node.parents[0], taken)[0] * (2 if node.how == "bilinear" else 1)
        for one, node in zip(these, nodes)
    ]
    return [log + node.log_factor + _after(graph, one, taken) for log, node, one in zip(ahead, nodes, these)]


def _before_list(graph: Graph, walk: Walk, total: Sum, taken: Set[int]) -> float:
    """Logarithm of the numbers that multiply a term, before and behind the use of the leaf that they share."""
    site = walk.sites[total.uses[0]]
    log, node = site.log_factor + before(graph, site.operand, taken)[0], graph.children[site.node][0]
    while node < total.node:
        log += graph.nodes[node].log_factor
        node = graph.children[node][0]
    return log


def _after(graph: Graph, total: Sum, taken: set[int]) -> float:
    """Logarithm of the numbers after a sum; behind the next leaf only what makes a mean of it."""
    log = after(graph, total.node)
    child = next((c for c in graph.children[total.node] if graph.contracts(c)), None)
    behind = 0.0 if child is None else after(graph, child)
    free = child is not None and not set(graph.children[child]) & taken
    return behind if free and math.isclose(behind, -math.log(total.size), rel_tol=1e-6) else log


def _normalizes(graph: Graph, total: int) -> bool:
    """Whether a sum divides something, or only its logarithm goes on."""
    todo, seen = [(total, False)], {total}
    while todo:
        node, rooted = todo.pop()
        for child in graph.children[node]:
            here = graph.nodes[child]
            below = here.op == "div" and here.parents[-1] == node and (len(here.parents) == 2 or here.how == "nonlinear")
            if below or here.op in ("rsqrt", "log", "log1p", "pow"):
                return True
            # Of two lengths that are multiplied (a cosine's) the product divides.
            onwards = here.how in ("linear", "affine", "homogeneous") or here.op in ("sqrt", "max", "min", "clamp", "select_n")
            onwards = onwards or (rooted and here.op == "mul")
            if child not in seen and onwards and not graph.contracts(child):
                seen.add(child)
                todo.append((child, rooted or here.op == "sqrt"))
    return False


def reaches_on(graph: Graph, total: int) -> bool:
    """Whether an output depends on how large a sum is: not where it only decides, and not through a norm of its multiples."""
    # What is multiplied by c when the sum is, and all that depends on how large it is.
    scaled, reached = {total}, {total}
    for node in range(total + 1, len(graph.nodes)):
        here = graph.nodes[node]
        if not any(parent in reached for parent in here.parents) or here.op in prim.CHOICES:
            continue
        size = own_size(graph, node)
        if size is not None and any(parent in scaled for parent in here.parents):
            continue
        reached.add(node)
        added = any(site.effect != "times" for site in graph.sites.get(node, ()))
        if here.how in ("linear", "homogeneous") and not added and all(parent in scaled for parent in here.parents):
            scaled.add(node)
    return bool(reached & graph.outputs)
