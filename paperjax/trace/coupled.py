"""Residual streams that write into each other: ``x += f(y); y += g(x)``, as in RevNets (arXiv 1707.04585) or by cross attention.

Each of them gets a branch a layer, and what a branch takes from the other stream is where that branch begins.
"""

from collections.abc import Callable, Mapping, Sequence, Set

from paperjax.trace.blocks import kind_of
from paperjax.trace.branch import inside_of, reach_of
from paperjax.trace.graph import Graph, added


def coupled(
    graph: Graph,
    add: int,
    branch: int,
    stream: Set[int],
    branches: Mapping[int, Set[int]],
    known: Set[int],
    chain: Callable[[int], Set[int]],
) -> set[int]:
    """Points of other streams that a branch begins at: of those whose adds it is made of and that are seen beyond it.

    An add that only the branch sees is one of a stream within it (a residual group), or the last of another stream, then of that one's
    kind.

    Parameters
    ----------
    graph, add, branch, stream
        The activations; the add among them, what it adds, and the points of the stream that it adds to.
    branches
        For each residual add, its branch's own activations.
    known
        Points of other streams that it begins at.
    chain
        For an activation, earlier points of the stream that runs through it.
    """

    def forked(point: int, one: int) -> bool:
        return any(m != one and point in chain(m) and one not in chain(m) and m not in chain(one) for m in branches)

    stops, inside = set(known), branches[add]
    if known:
        inside = inside_of(graph, add, reach_of(graph, branch, add, stream | moved_on(graph, stops)))
    while True:
        within = {n: chain(n) for n in branches if n != add and n in inside}
        beyond = {n for n in within if _seen_beyond(graph, n, inside | {add})}
        before = (beyond | stops) & branches.keys()
        last = {n for n, points in within.items() if any(_alike(graph, branches, n, k) for k in points & before if not forked(k, n))}
        last |= {n for n in within if loops(graph, n, graph.nodes[add].path)}
        more = {point for n in beyond | last for point in within[n]} - stops
        if not more:
            return moved_on(graph, stops)
        stops |= more
        inside = inside_of(graph, add, reach_of(graph, branch, add, stream | moved_on(graph, stops)))


def loops(graph: Graph, add: int, path: tuple[int, ...]) -> bool:
    """Whether an add leaves a loop, around an equation, in the place of what it adds to: the next step adds to the sum."""
    for parent in graph.nodes[add].parents:
        while graph.nodes[parent].op != "carry" and (graph.moves(parent) or added(graph, parent)):
            parent = graph.nodes[parent].parents[0]
        here = graph.nodes[parent]
        if here.op != "carry" or here.next is None or path[: len(here.path)] != here.path:
            continue
        left = graph.nodes[here.next].parents[0]
        while left != add and (graph.moves(left) or added(graph, left)) and graph.nodes[left].op != "carry":
            left = graph.nodes[left].parents[0]
        if left == add:
            return True
    return False


def moved_on(graph: Graph, points: Set[int]) -> set[int]:
    """Points of streams, and what they are moved to, or have leaves added to (a bias beside a branch)."""
    found = set(points)
    for node in range(min(found, default=len(graph.nodes)), len(graph.nodes)):
        if (graph.moves(node) or added(graph, node)) and graph.nodes[node].parents[0] in found:
            found.add(node)
    return found


def _alike(graph: Graph, branches: Mapping[int, Set[int]], one: int, other: int) -> bool:
    return one != other and kind_of(graph, branches[one]) == kind_of(graph, branches[other])


def confined(graph: Graph, add: int, around: Sequence[int], branches: Mapping[int, Set[int]]) -> bool:
    """Whether an add is seen by one branch alone, or only by branches (`around`) and is no sum that goes on from add to add."""
    if not around:
        return False
    # Far down a network a branch is made of all before it, until it is known where it begins.
    nearest = min(around, key=lambda n: len(branches[n]))
    if not _seen_beyond(graph, add, branches[nearest] | {nearest}):
        return True
    everywhere = {node for n, nodes in branches.items() for node in (*nodes, n)}
    return not _seen_beyond(graph, add, everywhere) and not goes_on(graph, add)


def joins_arms(branch: Set[int], stream: Set[int], found: Set[int]) -> bool:
    """Whether what is added is a stream itself, forked from the one that it is added to, which has moved on since: a sum of two arms."""
    shared = branch & stream
    return bool(shared) and any(n in found and n > max(shared) for n in stream)


def _seen_beyond(graph: Graph, node: int, inside: Set[int]) -> bool:
    """Whether something outside sees an activation, or what it is moved to, in this step of a loop or the next."""
    todo, seen = [node], set[int]()
    while todo:
        here = todo.pop()
        after = graph.entered.get(here)
        onwards = [*graph.children[here], *(() if after is None else graph.children[after])]
        moved = {child for child in onwards if graph.moves(child) or added(graph, child)}
        if here in graph.outputs or any(child not in inside for child in onwards if child not in moved):
            return True
        todo.extend(moved - seen)
        seen |= moved
    return False


def goes_on(graph: Graph, add: int) -> bool:
    """Whether another add, or that of the next step of a loop, adds a product with a leaf to the sum."""
    todo, seen = [(add, add)], set[int]()
    while todo:
        before, since = todo.pop()
        carry = graph.entered.get(before)
        for node, start in (
            *((n, since) for n in graph.children[before]),
            *(() if carry is None else ((n, carry) for n in graph.children[carry])),
        ):
            here = graph.nodes[node]
            if graph.moves(node) or added(graph, node):
                todo.extend([] if node in seen else [(node, start)])
                seen.add(node)
            elif here.op in ("add", "add_any", "sub") and len(here.parents) == 2:
                others = [parent for parent in here.parents if parent not in (before, carry)]
                if any(graph.contracts(n) for parent in others for n in graph.behind(parent, start)):
                    return True
    return False
