"""Known numbers that change with a width, and that neither a leaf, nor logits, nor a sum, nor a norm has taken for its own.

What a model multiplies by is its spelling of an initialization or a learning rate, and a plan takes it into account where `own` and
`interactions` find whose it is: a leaf's whose result it multiplies, on all ways, or the next leaf's whose operand it multiplies. A number
that is left over changes the size of something, and no factor answers for it.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from paperjax.trace.graph import CONTRACTING, Graph, Walk
from paperjax.trace.interactions import after_steps, interactions
from paperjax.trace.origins import origin_steps, own_size
from paperjax.trace.own import Own, sum_before
from paperjax.trace.sums import reaches_on


class Number(NamedTuple):
    """A number that a model multiplies an activation by.

    Attributes
    ----------
    path, op
        Where it stands, and the primitive.
    ratio
        By how much it differs from that of the other width.
    """

    path: tuple[int, ...]
    op: str
    ratio: float


class _Ends(NamedTuple):
    """Numbers of the sites that a way leads from or to, whether it leads elsewhere, and the steps on it."""

    sites: frozenset[int]
    elsewhere: bool
    steps: frozenset[int]


def unclaimed(walk: Walk, other: Walk, own: Sequence[Own], sums: Set[int]) -> tuple[Number, ...]:
    """Numbers of a walk that differ from those of another width of the network, and that nothing has taken for its own.

    Those before and behind the `sums` that grow are judged with these.
    """
    if len(walk.nodes) != len(other.nodes) or any(a.op != b.op for a, b in zip(walk.nodes, other.nodes)):
        # Another structure: which number is which is not known.
        return ()
    differs = {
        i: a.log_factor - b.log_factor for i, (a, b) in enumerate(zip(walk.nodes, other.nodes)) if abs(a.log_factor - b.log_factor) > 1e-9
    }
    if not differs:
        return ()
    graph = Graph(walk)
    sites: dict[int, list[int]] = {}
    for k, site in enumerate(walk.sites):
        sites.setdefault(site.node, []).append(k)
    of_logits = _of_logits(graph, walk)
    found = []
    for i in differs:
        if i in of_logits or _of_a_sum(graph, i) or _undone(graph, i, differs):
            continue
        up, down = _upwards(graph, walk, sites, i, own), _downwards(graph, walk, sites, i, own)
        told = any(walk.sites[k].told for k in up.sites | down.sites)
        by_all = up.sites and not up.elsewhere and all(i in own[k].behind for k in up.sites)
        by_next = down.sites and not down.elsewhere and all(i in own[k].ahead for k in down.sites)
        uses = [walk.sites[k] for k in up.sites]
        ahead = {sum_before(graph, use.operand) for use in uses}
        # A product that is written entry by entry sums in steps of its own.
        ahead |= {step for use in uses if use.operand is not None for step in graph.between(use.operand, use.node)}
        of_sum = sums & (up.steps | down.steps | ahead)
        if not (told or by_all or by_next or of_sum) and _escapes(graph, i) and reaches_on(graph, i):
            here = walk.nodes[i]
            found.append(Number(here.path, here.op, math.exp(here.log_factor - other.nodes[i].log_factor)))
    return tuple(found)


def _of_logits(graph: Graph, walk: Walk) -> set[int]:
    """Steps whose numbers an `Interaction` has counted."""
    found: set[int] = set()
    for product in interactions(walk):
        found |= {product.node, *after_steps(graph, product.node)}
        for operand in product.operands:
            found |= {operand, *origin_steps(graph, operand), *graph.between(operand, product.node)}
    return found


def _undone(graph: Graph, i: int, differs: Mapping[int, float]) -> bool:
    """Whether other numbers before or behind it, with nothing but them and moves between, make up for it."""
    first = i
    while graph.moves(first) and len(graph.children[graph.nodes[first].parents[0]]) == 1:
        first = graph.nodes[first].parents[0]
    total, node = differs.get(first, 0.0), first
    while len(graph.children[node]) == 1 and graph.moves(graph.children[node][0]):
        node = graph.children[node][0]
        total += differs.get(node, 0.0)
    return abs(total) < 1e-9


def _of_a_sum(graph: Graph, i: int) -> bool:
    """Whether a number multiplies a sum that no leaf weighs: such sums are judged with the numbers after them."""
    node = i
    while len(graph.nodes[node].parents) == 1 and not graph.contracts(node):
        if graph.adds_up(node) or graph.nodes[node].op in ("reduce_max", "argmax"):
            return True
        if graph.nodes[node].how not in ("linear", "affine", "homogeneous"):
            return False
        node = graph.nodes[node].parents[0]
    return False


def _escapes(graph: Graph, i: int) -> bool:
    """Whether an output depends on an activation other than through quotients by norms, whose size is known whatever multiplies it."""
    todo, seen = [i], {i}
    while todo:
        node = todo.pop()
        if node in graph.outputs:
            return True
        onwards = [child for child in graph.children[node] if child not in seen and own_size(graph, child) is None]
        seen.update(onwards)
        todo.extend(onwards)
    return False


def _upwards(graph: Graph, walk: Walk, sites: dict[int, list[int]], i: int, own: Sequence[Own]) -> _Ends:
    """The uses whose results a number multiplies."""
    todo, seen, found, elsewhere = list(graph.nodes[i].parents), set(), set(), False
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        here = graph.nodes[node]
        at = [k for k in sites.get(node, ()) if not walk.sites[k].passes]
        found.update(k for k in at if walk.sites[k].effect == "plus" or walk.sites[k].kind in CONTRACTING)
        # What a gain has is of all that the gain is on.
        gains = [k for k in at if walk.sites[k].effect == "times" and i in own[k].behind]
        found.update(gains)
        if graph.contracts(node) or gains:
            continue
        if here.how not in ("linear", "affine", "homogeneous") or not here.parents or own_size(graph, node) is not None:
            elsewhere = True
        else:
            todo.extend(here.parents)
    return _Ends(frozenset(found), elsewhere, frozenset(seen))


def _downwards(graph: Graph, walk: Walk, sites: dict[int, list[int]], i: int, own: Sequence[Own]) -> _Ends:
    """The uses that act on what a number multiplies."""
    todo, seen, found, elsewhere = [i], {i}, set(), i in graph.outputs
    while todo:
        for child in graph.children[todo.pop()]:
            here = graph.nodes[child]
            at = [k for k in sites.get(child, ()) if walk.sites[k].effect == "times" and not walk.sites[k].passes]
            takes = [k for k in at if walk.sites[k].kind in CONTRACTING or i in own[k].ahead]
            found.update(takes)
            new = child not in seen
            seen.add(child)
            if takes or not new:
                continue
            if here.how in ("linear", "affine", "homogeneous") or (here.op in ("mul", "div") and len(here.parents) == 2):
                elsewhere = elsewhere or child in graph.outputs
                todo.append(child)
            else:
                elsewhere = True
    return _Ends(frozenset(found), elsewhere, frozenset(seen))
