"""Residual streams that write into each other: ``x += f(y); y += g(x)``, as in RevNets (arXiv 1707.04585) or by cross attention.

Each of them gets a branch a layer, and what a branch takes from the other stream is where that branch begins.
"""

from collections.abc import Callable, Mapping, Sequence, Set

from paperjax.trace.branch import inside_of, reach_of
from paperjax.trace.graph import Graph


def coupled(
    graph: Graph, add: int, branch: int, stream: Set[int], inside: Set[int], found: Set[int], chain: Callable[[int], Set[int]]
) -> set[int]:
    """Points of other streams that a branch begins at: of those whose adds it is made of and that are seen beyond it.

    An add that only the branch sees is one of a stream within it (a residual group).

    Parameters
    ----------
    graph, add, branch, stream
        The activations; the add among them, what it adds, and the points of the stream that it adds to.
    inside
        The branch's own activations, up to its own stream.
    found
        The other residual adds.
    chain
        For an activation, earlier points of the stream that runs through it.
    """
    stops: set[int] = set()
    while True:
        beyond = {n for n in found if n in inside and _seen_beyond(graph, n, inside | {add})}
        more = {point for n in beyond for point in chain(n)} - stops
        if not more:
            return stops
        stops |= more
        inside = inside_of(graph, add, reach_of(graph, branch, add, stream | stops))


def confined(graph: Graph, add: int, around: Sequence[int], branches: Mapping[int, Set[int]]) -> bool:
    """Whether an add is seen by one branch alone, or only by branches (`around`) and is no sum that goes on from add to add."""
    if not around:
        return False
    if any(not _seen_beyond(graph, add, branches[n] | {n}) for n in around):
        return True
    everywhere = {node for n, nodes in branches.items() for node in (*nodes, n)}
    return not _seen_beyond(graph, add, everywhere) and not _goes_on(graph, add)


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
        moved = {child for child in onwards if graph.moves(child)}
        if here in graph.outputs or any(child not in inside for child in onwards if child not in moved):
            return True
        todo.extend(moved - seen)
        seen |= moved
    return False


def _goes_on(graph: Graph, add: int) -> bool:
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
            if graph.moves(node) and node not in seen:
                seen.add(node)
                todo.append((node, start))
            elif here.op in ("add", "add_any", "sub") and len(here.parents) == 2:
                others = [parent for parent in here.parents if graph.root(parent) != graph.root(before)]
                if any(graph.contracts(n) for parent in others for n in graph.behind(parent, start)):
                    return True
    return False
