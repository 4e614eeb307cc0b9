"""Products of two activations that are summed over coordinates, and the known numbers that multiply them."""

import math
from typing import NamedTuple

from paperjax.trace import primitives as prim
from paperjax.trace.graph import Graph, Walk
from paperjax.trace.origins import normalized, origin


class Interaction(NamedTuple):
    """A product of two activations, such as attention's queries with its keys, or a squared distance of the two.

    Attributes
    ----------
    path, node
        Where it stands, and what it makes.
    size
        Number of coordinates it sums over.
    log_scale
        Logarithm of the known factors that multiply it, before and after, up to the next nonlinear function.
    leaves
        Leaves that made the two operands.
    op
        The primitive that sums.
    operands
        The two activations; twice the same of a product with itself.
    """

    path: tuple[int, ...]
    node: int
    size: int
    log_scale: float
    leaves: tuple[tuple[int, ...], tuple[int, ...]]
    op: str
    operands: tuple[int, int]


def interactions(walk: Walk) -> tuple[Interaction, ...]:
    """All products of two activations that are summed over coordinates, in the order of execution."""
    graph = Graph(walk)
    found = []
    for i, node in enumerate(graph.nodes):
        made = multiplied(graph, i)
        if made is None:
            continue
        parents = graph.nodes[made].parents
        operands = (parents[0], parents[-1])
        back = [origin(graph, parent) for parent in operands]
        # What multiplies the products one by one, before they are summed; twice, if it is squared.
        steps = sorted(graph.between(made, i) - {i})
        square = next((n for n in steps if graph.nodes[n].how in ("nonlinear", "bilinear")), made)
        between = sum(graph.nodes[n].log_factor * (2 if n < square else 1) for n in steps)
        scale = sum(log for _, log in back) + between + node.log_factor + after(graph, i)
        found.append(Interaction(node.path, i, math.prod(node.contracted), scale, (back[0][0], back[1][0]), node.op, operands))
    return tuple(found)


def multiplied(graph: Graph, i: int) -> int | None:
    """Of a sum of products of two activations, the node whose parents they are; `None` of anything else."""
    node = graph.nodes[i]
    # Rows that the data look up of a weight and then multiply (experts) are a weight all the same.
    if graph.contracts(i):
        return None
    if node.op == "dot_general" and node.how == "bilinear":
        return i
    if node.pair is None or normalized(graph, node.pair)[0] is not None or _normalizes(graph, i):
        return None
    first, last = graph.nodes[node.pair].parents
    # Of an activation and its own mean the squared distance is a variance.
    related = graph.nodes[node.pair].op == "sub" and (graph.made_of(first, last) or graph.made_of(last, first))
    return None if related else node.pair


def _normalizes(graph: Graph, total: int) -> bool:
    """Whether a sum is taken off what it is a sum of, or divides it (a mean, a norm), or goes into a root."""
    root, todo, seen = graph.root(graph.nodes[total].parents[0]), [total], set()
    while todo:
        node = todo.pop()
        for child in graph.children[node]:
            here = graph.nodes[child]
            if here.op in prim.POWERS:
                return True
            if here.op in ("sub", "mul", "div") and any(graph.root(parent) == root for parent in here.parents if parent != node):
                return True
            if child not in seen and here.how in ("linear", "affine", "homogeneous") and not graph.contracts(child):
                seen.add(child)
                todo.append(child)
    return False


def after(graph: Graph, node: int) -> float:
    """Logarithm of the known numbers that multiply an activation, up to the next nonlinear function; 0 where ways differ."""
    return _after(graph, node)[0]


def after_steps(graph: Graph, node: int) -> frozenset[int]:
    """The steps that those numbers are of."""
    return _after(graph, node)[1]


def _after(graph: Graph, node: int) -> tuple[float, frozenset[int]]:
    ways = []
    for child in graph.children[node]:
        if graph.nodes[child].how in ("linear", "affine") and not graph.contracts(child):
            log, steps = _after(graph, child)
            ways.append((graph.nodes[child].log_factor + log, steps | {child}))
    # softmax subtracts the maximum: linear children among nonlinear ones are followed, where they do not differ.
    if not ways or not all(math.isclose(log, ways[0][0], abs_tol=1e-9) for log, _ in ways):
        return 0.0, frozenset()
    return ways[0][0], frozenset().union(*(steps for _, steps in ways))
