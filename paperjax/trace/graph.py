"""What a walk finds: uses of leaves, and the graph of activations."""

from collections.abc import Sequence, Set
from typing import NamedTuple

from paperjax.trace import primitives as prim
from paperjax.trace.values import Row, Value

CONTRACTING = ("product", "convolution", "lookup")
WEIGHTED = "copies that share one input, and whose results are then weighted and summed; or a kernel that the data make, which sums over it"


class Site(NamedTuple):
    """One use of a leaf by the data.

    Attributes
    ----------
    leaf
        Number of the leaf.
    kind
        ``"product"``, ``"convolution"``, ``"lookup"`` or ``"elementwise"``.
    op
        The primitive.
    inside, out, stack, window
        Axes of the leaf: contracted or looked up, free, run over one by one, and a convolution's window.
    groups
        Independent channel groups of a convolution.
    path
        Where in the jaxpr: equation numbers from the outside in, ``(3, 0, 7)`` is equation 7 of the first jaxpr inside equation 3.
    node, operand
        The activations that come out and go in.
    reused
        Whether a loop uses the leaf with the same numbers in every step.
    repeats
        How often the site runs in one call: the product of the lengths of the scans around it.
    effect
        What multiplying the leaf by c does to the use: ``"times"`` (multiplies the result), ``"plus"`` (multiplies a term of it) or
        ``"other"``.
    scans
        Paths of the scans that run over axes of the leaf: those axes come first in `stack`, in this order.
    log_factor
        Logarithm of the known numbers that multiply the leaf before the use.
    side
        Which operand of the equation the activation is; ``None`` where that is not one operand of a product.
    told
        Whether the caller said what the use is, because the trace could not tell; see `paperjax.trace.Use`.
    finite
        Whether no axis of the leaf grows.
    """

    leaf: int
    kind: str
    op: str
    inside: tuple[int, ...]
    out: tuple[int, ...]
    stack: tuple[int, ...]
    window: tuple[int, ...]
    groups: int
    path: tuple[int, ...]
    node: int
    operand: int | None
    reused: bool
    repeats: int
    effect: str = "other"
    scans: tuple[tuple[int, ...], ...] = ()
    log_factor: float = 0.0
    side: int | None = None
    told: bool = False
    finite: bool = False

    @property
    def passes(self) -> bool:
        """Whether it multiplies an activation by numbers that no size changes: what stands before and behind them is another leaf's."""
        return self.kind == "elementwise" and self.effect == "times" and (self.finite or not (self.inside or self.out or self.stack))


class Node(NamedTuple):
    """An activation: the primitive that made it, of what, and how it depends on it.

    Attributes
    ----------
    op, path, shape
        The primitive, where it stands, the result's shape.
    parents
        Activations that went in.
    how
        ``"linear"`` (in all parents together), ``"affine"`` (so up to a constant), ``"bilinear"``, ``"first"`` (linear in the first parent
        only), ``"homogeneous"`` (f(c x) = c f(x) for c > 0), ``"sign"`` (f(c x) = f(x)) or ``"nonlinear"``.
    log_factor
        Logarithm of the known number that it multiplies by.
    contracted
        Axes that a product of activations, a product with one number for all entries or partial sums run over, as sizes.
    repeats
        As for a `Site`.
    pair
        Of a sum of products that were made entry by entry, the activation that is those products, or the differences that it squares.
    next
        Of a carry, the activation that leaves the loop in its place: what the next step begins with.
    """

    op: str
    path: tuple[int, ...]
    shape: tuple[int, ...]
    parents: tuple[int, ...]
    how: str
    log_factor: float = 0.0
    contracted: tuple[int, ...] = ()
    repeats: int = 1
    pair: int | None = None
    next: int | None = None


class Part(NamedTuple):
    """One part of an axis that is split: its size (0 if it cannot be told), and whether it is ``"inside"``, ``"out"`` or ``"stack"``."""

    size: int
    kind: str


class Unresolved(NamedTuple):
    """A use of a leaf that the trace cannot classify: after which primitive, and why; `axis` where only that axis is in doubt.

    `parts` are those of an axis that is split in several, which are not used alike.
    """

    leaf: int
    op: str
    reason: str
    axis: int | None = None
    parts: tuple[Part, ...] = ()


class Walk(NamedTuple):
    """All that a walk found: sites in the order of execution, the graph of activations, what could not be resolved."""

    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    unresolved: tuple[Unresolved, ...]
    outputs: tuple[Value, ...]


class Late(NamedTuple):
    """A use of a leaf at `row.node` that turned out to be a product, at `site`: rows looked up and then contracted, ``sum(w * x)``."""

    row: Row
    site: Site
    last: int


def settled(sites: Sequence[Site], late: Sequence[Late], nodes: Sequence[Node], outputs: Set[int | None]) -> tuple[Site, ...]:
    """The sites, with products in place of the steps that they were written in, where nothing else uses those."""
    children: dict[int, list[int]] = {}
    for i in sorted(_alive(nodes, outputs)) if late else ():
        for parent in nodes[i].parents:
            children.setdefault(parent, []).append(i)
    found = list(sites)
    for use in late:
        node, alone = use.row.node, True
        while node != use.last and alone:
            after = children.get(node, [])
            alone = len(after) == 1 and node not in outputs
            node = after[0] if alone else node
        old = [s for s in found if s.leaf == use.row.piece.leaf and s.node == use.row.node]
        if alone and old:
            found[found.index(old[0])] = use.site
            found = [s for s in found if s not in old[1:]]
        elif use.row.kind == "lookup":
            found.append(use.site)
    return tuple(found)


def _alive(nodes: Sequence[Node], outputs: Set[int | None]) -> set[int]:
    """Activations that an output depends on, or the next step of a loop: what a function computes and drops is not seen by anything."""
    todo = [i for i, node in enumerate(nodes) if i in outputs or node.op == "carried"]
    found = set(todo)
    while todo:
        onwards = set(nodes[todo.pop()].parents) - found
        found |= onwards
        todo.extend(onwards)
    return found


class Graph:
    """The graph of activations of a `Walk`, with the sites at each node."""

    def __init__(self, walk: Walk):
        self.nodes = walk.nodes
        self.sites: dict[int, list[Site]] = {}
        for site in walk.sites:
            self.sites.setdefault(site.node, []).append(site)
        self.children: list[list[int]] = [[] for _ in walk.nodes]
        self.outputs = {value.node for value in walk.outputs}
        self.entered = {node.next: i for i, node in enumerate(walk.nodes) if node.next is not None}
        for i in sorted(_alive(walk.nodes, self.outputs)):
            for parent in walk.nodes[i].parents:
                self.children[parent].append(i)
        uses: dict[int, int] = {}
        for site in walk.sites:
            uses[site.leaf] = uses.get(site.leaf, 0) + 1
        doubtful = {u.leaf for u in walk.unresolved if u.axis is None}
        self.used_once = {s.leaf for s in walk.sites if uses[s.leaf] == 1 and not s.reused and s.leaf not in doubtful}

    def contracts(self, node: int) -> bool:
        """Whether a parameter contraction makes this node."""
        return any(site.kind in CONTRACTING and site.effect != "plus" for site in self.sites.get(node, ()))

    def adds_up(self, i: int) -> bool:
        """Whether a node sums its one parent over axes and no leaf weighs it: a sum, partial sums, a product with one number."""
        node = self.nodes[i]
        return node.op in prim.SUMS or (node.op == "dot_general" and node.how == "linear" and bool(node.contracted))

    def moves(self, i: int) -> bool:
        """Whether a node only moves, casts, carries or multiplies by a number its one parent."""
        node = self.nodes[i]
        scaled = node.op in ("mul", "div") and node.how == "linear" and not self.sites.get(i)
        moved = node.op in (*prim.RESHAPING, *prim.KEEPING_AXES, "carry", "carried", "row", "rows", "cond")
        return len(node.parents) == 1 and (moved or scaled)

    def root(self, node: int) -> int:
        """What an activation was before it was moved and multiplied by numbers."""
        while self.moves(node):
            node = self.nodes[node].parents[0]
        return node

    def made_of(self, node: int, of: int) -> bool:
        """Whether one activation is made of another."""
        return of == node or node in self.between(of, node)

    def behind(self, node: int, after: int = -1) -> set[int]:
        """All that an activation is made of, itself among it, but for what is not later than another."""
        todo, found = [node], set()
        while todo:
            here = todo.pop()
            if here > after and here not in found:
                found.add(here)
                todo.extend(self.nodes[here].parents)
        return found

    def between(self, first: int, last: int) -> set[int]:
        """Activations that are made of `first` and that `last` is made of, without `first` and with `last` if it is made of `first`."""
        found: set[int] = set()
        for node in sorted(self.behind(last, first)):
            if any(parent == first or parent in found for parent in self.nodes[node].parents):
                found.add(node)
        return found


def added(graph: Graph, node: int) -> tuple[int, ...]:
    """Leaves that an activation adds to its one parent, if that is all it does."""
    here, sites = graph.nodes[node], graph.sites.get(node, ())
    alone = len(here.parents) == 1 and here.op in ("add", "add_any", "sub") and sites and all(site.effect == "plus" for site in sites)
    return tuple(site.leaf for site in sites) if alone else ()
