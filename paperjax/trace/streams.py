"""Residual streams and products of activations, read from the graph of activations.

A residual add is an ``add`` one of whose operands (the stream) is an ancestor of the other (the branch) with a parameter contraction
between. A branch that starts from an earlier point of the same stream counts too (parallel attention and MLP).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from paperjax.trace import primitives as prim
from paperjax.trace.walk import Node, Site, Walk

CONTRACTING = ("product", "convolution", "lookup")


class ResidualAdd(NamedTuple):
    """One ``stream + branch``.

    Attributes
    ----------
    path, op, node
        Where the add stands, its primitive, and the activation that it makes.
    operand, branch
        Which operand is added to the stream, and which activation that is.
    repeats
        How often it runs in one call (the lengths of the scans around it).
    leaves
        Leaves used in the branch.
    writers
        Leaves in which the branch is linear and that together scale it: multiply each by c, and the branch is multiplied by c. Empty
        where there are none (a branch that ends in tanh, a weight used elsewhere too).
    """

    path: tuple[int, ...]
    op: str
    operand: int
    node: int
    branch: int
    repeats: int
    leaves: tuple[int, ...]
    writers: tuple[int, ...]


class Interaction(NamedTuple):
    """A product of two activations, such as attention's queries with its keys.

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
    """

    path: tuple[int, ...]
    node: int
    size: int
    log_scale: float
    leaves: tuple[tuple[int, ...], tuple[int, ...]]


class Graph:
    """The graph of activations of a `Walk`, with the sites at each node."""

    def __init__(self, walk: Walk):
        self.nodes = walk.nodes
        self.sites: dict[int, list[Site]] = {}
        for site in walk.sites:
            self.sites.setdefault(site.node, []).append(site)
        self.children: list[list[int]] = [[] for _ in walk.nodes]
        for i, node in enumerate(walk.nodes):
            for parent in node.parents:
                self.children[parent].append(i)
        uses: dict[int, int] = {}
        for site in walk.sites:
            uses[site.leaf] = uses.get(site.leaf, 0) + 1
        self.used_once = {site.leaf for site in walk.sites if uses[site.leaf] == 1 and not site.reused}

    def contracts(self, node: int) -> bool:
        """Whether a parameter contraction makes this node."""
        return any(site.kind in CONTRACTING for site in self.sites.get(node, ()))

    def moves(self, node: Node) -> bool:
        """Whether a node only moves, casts or carries its one parent."""
        return len(node.parents) == 1 and node.op in (*prim.RESHAPING, *prim.KEEPING_AXES, "carry", "carried", "row", "rows", "cond")


def residual_adds(walk: Walk) -> tuple[ResidualAdd, ...]:
    """All residual adds, in the order of execution."""
    graph = Graph(walk)
    found: dict[int, tuple[ResidualAdd, int]] = {}

    def chain(node: int) -> set[int]:
        """Earlier points of the stream that runs through `node`, itself among them."""
        members = set()
        while True:
            members.add(node)
            if node in found:
                node = found[node][1]
            elif graph.moves(graph.nodes[node]):
                node = graph.nodes[node].parents[0]
            else:
                return members

    for i, node in enumerate(graph.nodes):
        if node.op not in ("add", "add_any") or len(node.parents) != 2:
            continue
        for stream, branch in (node.parents, node.parents[::-1]):
            members = chain(stream)
            if branch in members:
                continue
            inside, crossed = _between(graph, branch, members)
            if crossed:
                leaves = tuple(dict.fromkeys(site.leaf for n in sorted(inside) for site in graph.sites.get(n, ())))
                writers = _writers(graph, branch, members)
                once = writers is not None and all(leaf in graph.used_once for leaf in writers)
                found[i] = (
                    ResidualAdd(
                        node.path,
                        node.op,
                        node.parents.index(branch),
                        i,
                        branch,
                        node.repeats,
                        leaves,
                        tuple(sorted(writers)) if once and writers else (),
                    ),
                    stream,
                )
                break
    return tuple(add for add, _ in found.values())


def _between(graph: Graph, branch: int, stream: set[int]) -> tuple[set[int], bool]:
    """Nodes from the stream to the branch, and whether a parameter contraction lies on the way."""
    back: set[int] = set()
    front = [branch]
    reaches: set[tuple[int, bool]] = set()
    todo = [(branch, False)]
    while todo:
        node, crossed = todo.pop()
        if (node, crossed) in reaches:
            continue
        reaches.add((node, crossed))
        if node in stream:
            continue
        crossed = crossed or graph.contracts(node)
        todo.extend((parent, crossed) for parent in graph.nodes[node].parents)
    while front:
        node = front.pop()
        if node in back or node in stream:
            continue
        back.add(node)
        front.extend(graph.nodes[node].parents)
    return back, any(node in stream and crossed for node, crossed in reaches)


def _writers(graph: Graph, node: int, stream: set[int]) -> set[int] | None:
    """Leaves to multiply so that `node` is multiplied, one on each way that leads into it; `None` where a way has none."""
    if node in stream:
        return None
    sites, here = graph.sites.get(node, ()), graph.nodes[node]
    scaling = [site.leaf for site in sites if site.kind != "elementwise" or site.op in ("mul", "div")]
    if any(site.kind == "elementwise" and site.op not in ("mul", *prim.ADDITIVE) for site in sites):
        return None
    if scaling:
        return set(scaling)
    added = {site.leaf for site in sites}
    ways: Iterable[int]
    if here.how in ("bilinear", "first"):
        for parent in here.parents if here.how == "bilinear" else here.parents[:1]:
            found = _writers(graph, parent, stream)
            if found is not None:
                return found | added
        return None
    if here.op == "select_n" and here.how == "homogeneous":
        ways = [parent for parent in here.parents if graph.nodes[parent].how != "sign"]
    elif here.how in ("linear", "homogeneous"):
        ways = here.parents
    else:
        return None
    if not here.parents:
        return None
    found = [_writers(graph, parent, stream) for parent in ways]
    return None if any(f is None for f in found) else added.union(*(f for f in found if f is not None))


def interactions(walk: Walk) -> tuple[Interaction, ...]:
    """All products of two activations, in the order of execution."""
    graph = Graph(walk)
    found = []
    for i, node in enumerate(graph.nodes):
        if node.op != "dot_general" or node.how != "bilinear":
            continue
        operands = node.parents if len(node.parents) == 2 else node.parents * 2
        back = [_origin(graph, parent) for parent in operands]
        scale = sum(log for _, log in back) + node.log_factor + _after(graph, i)
        found.append(Interaction(node.path, i, math.prod(node.contracted), scale, (back[0][0], back[1][0])))
    return tuple(found)


def _origin(graph: Graph, node: int) -> tuple[tuple[int, ...], float]:
    """The leaves whose contraction made this node, through linear steps, and the known factors on the way."""
    log = 0.0
    while True:
        if graph.contracts(node):
            return tuple(dict.fromkeys(site.leaf for site in graph.sites[node] if site.kind in CONTRACTING)), log
        here = graph.nodes[node]
        if here.how != "linear" or not here.parents:
            return (), log
        log += here.log_factor
        node = here.parents[0]


def _after(graph: Graph, node: int) -> float:
    log = 0.0
    while True:
        children = [
            c
            for c in graph.children[node]
            if graph.nodes[c].how == "linear" and not graph.sites.get(c) and len(graph.nodes[c].parents) == 1
        ]
        # softmax subtracts the maximum: one linear child among nonlinear ones is followed, two different ones are not.
        if len(children) != 1:
            return log
        node = children[0]
        log += graph.nodes[node].log_factor
