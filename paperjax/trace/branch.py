"""What a residual branch is made of, and which of it is its own.

A loop inside a branch (a recurrence in time) is followed to what its steps leave in its carries. A loop around the add runs over layers, or
over time with all layers in each step; the add is of one step, and of earlier ones the branch has what they left for it alone.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

from paperjax.trace.graph import Graph

# Whether an activation is made of the stream, and whether through a parameter contraction.
APART, MADE_OF, CROSSED = 0, 1, 2

Onwards = Callable[[int], Sequence[int]]


def reach_of(graph: Graph, branch: int, add: int, stream: Set[int]) -> dict[int, int]:
    """All that a branch is made of, up to the stream, and how it is made of that: `APART`, `MADE_OF` or `CROSSED`.

    Nothing is from before the stream began, where a path could only lead away from it.
    """
    path, first = graph.nodes[add].path, min(stream)

    def onwards(node: int) -> tuple[int, ...]:
        return _made_of(graph, node, path)

    back = _back(branch, lambda node: node not in stream and node > first, onwards)
    return _reach(graph, back, stream, onwards)


def inside_of(graph: Graph, add: int, reach: Mapping[int, int], known: Set[int] = frozenset()) -> set[int]:
    """The branch's own activations: those between the stream and the add, and those that serve nothing but this branch.

    What also serves other parts (an encoder that every decoder layer looks at, an embedding of time) is no part of the branch. `known` are
    activations of the branch that were found before.
    """
    inside, before = set(reach) | known, -1
    carries = {here.next: node for node, here in enumerate(graph.nodes) if here.next in reach}
    while len(inside) != before:
        before = len(inside)
        for node in sorted(set(reach) - known, reverse=True):
            serves = (*graph.children[node], *((carries[node],) if node in carries else ()))
            if not reach[node] and (node in graph.outputs or any(child != add and child not in inside for child in serves)):
                inside.discard(node)
    return inside


class Before(NamedTuple):
    """What a branch is made of by way of the steps before of a loop around the add.

    Attributes
    ----------
    deep
        Whether the stream itself goes from step to step, layer after layer.
    reach
        As for `reach_of`.
    """

    deep: bool
    reach: dict[int, int]


def steps_before(
    graph: Graph, branch: int, add: int, stream: Set[int], later: Set[int], earlier: Callable[[int], Set[int]]
) -> tuple[Before, ...]:
    """For each loop around an add from which the branch has something that an earlier step left, what that was made of.

    Parameters
    ----------
    graph, branch, add
        The activations; the branch among them, and what the add makes of it.
    stream, later
        Points of the stream up to the add, and from it on.
    earlier
        For an activation, earlier points of the stream that runs through it.
    """
    path, first, found = graph.nodes[add].path, min(stream), []
    carries = [(node, here.path, here.next) for node, here in enumerate(graph.nodes) if here.next is not None and _around(here.path, path)]
    deep = {loop for carry, loop, left in carries if carry in stream and left in later}
    for loop in dict.fromkeys(loop for _, loop, _ in carries):
        left = {carry: left for carry, its, left in carries if its == loop and carry not in stream}
        # Of two streams side by side neither is in the other's branches.
        left = {carry: after for carry, after in left.items() if loop not in deep or carry not in earlier(after)}

        def among(node: int, left: Set[int] = frozenset(left)) -> bool:
            return node in left or (node not in stream and node not in later and node > first)

        def onwards(node: int, left: Mapping[int, int] = left) -> tuple[int, ...]:
            return (left[node],) if node in left else _made_of(graph, node, path)

        back = _back(branch, among, onwards) if left else set[int]()
        if back & set(left):
            found.append(Before(loop in deep, _reach(graph, back, stream | later if loop in deep else stream, onwards)))
    return tuple(found)


def _made_of(graph: Graph, node: int, path: tuple[int, ...]) -> tuple[int, ...]:
    """What an activation is made of: of a carry its first value and, if the loop is not around `path`, what its steps leave there."""
    here = graph.nodes[node]
    return here.parents if here.next is None or _around(here.path, path) else (*here.parents, here.next)


def in_a_loop(graph: Graph, node: int) -> bool:
    """Whether an activation is made in a loop that carries activations."""
    path = graph.nodes[node].path
    return any(here.next is not None and _around(here.path, path) for here in graph.nodes)


def _around(loop: tuple[int, ...], path: tuple[int, ...]) -> bool:
    """Whether an equation stands in a loop."""
    return path[: len(loop)] == loop


def _back(start: int, among: Callable[[int], bool], onwards: Onwards) -> set[int]:
    found, todo = set[int](), [start]
    while todo:
        node = todo.pop()
        if node not in found and among(node):
            found.add(node)
            todo.extend(onwards(node))
    return found


def _reach(graph: Graph, back: Set[int], stream: Set[int], onwards: Onwards) -> dict[int, int]:
    reach, before, order = dict[int, int](), None, sorted(back)
    # What a carry is made of comes after it: once more for each loop in a loop.
    while reach != before:
        before = dict(reach)
        for node in order:
            so_far = max((MADE_OF if parent in stream else reach.get(parent, APART) for parent in onwards(node)), default=APART)
            reach[node] = CROSSED if so_far and graph.contracts(node) else so_far
    return reach
