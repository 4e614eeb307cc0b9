"""Known numbers that a model multiplies its leaves by, and that are its own spelling of an initialization."""

import math
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import NamedTuple

from paperjax.trace import primitives as prim
from paperjax.trace.graph import Graph, Walk
from paperjax.trace.interactions import multiplied
from paperjax.trace.origins import origin, own_size, summed_over
from paperjax.trace.probe import Shape, pattern_of

NONE: Mapping[int, int] = MappingProxyType({})


class Own(NamedTuple):
    """Known numbers of one site: logarithms of the leaf's own and of those that may be the logits' instead, and the steps they are of."""

    log: float
    logits: float
    behind: frozenset[int] = frozenset()
    ahead: frozenset[int] = frozenset()


class Behind(NamedTuple):
    """Numbers after a use: their logarithm, whether they lead into a product of two projections, the steps passed, the sum behind."""

    log: float = 0.0
    logits: bool = False
    passed: frozenset[int] = frozenset()
    last: int | None = None


def own_factors(walk: Walk, growing: Mapping[int, int] = NONE) -> tuple[Own, ...]:
    """For each site, the known numbers that the model multiplies it by.

    Counted are the leaf's before the use, and the result's after it, followed through steps that are linear or homogeneous in it, up to
    the next function, sum with what no leaf has made or product of activations; and what multiplies the data that goes in, if no earlier
    use has it. Numbers between a projection and its product with another one (queries over sqrt(d)) scale the logits, so they belong to
    the `Interaction`; they come apart, for `paperjax.trace.read` to judge. What makes a mean of one of the sums in `growing`, which
    has their sizes, is that sum's.
    """
    graph = Graph(walk)
    after, taken = behind_uses(graph, walk, growing)
    found = []
    for site, behind in zip(walk.sites, after):
        outside = site.told or site.effect != "times" or site.passes
        was, ahead = (0.0, frozenset()) if outside else before(graph, site.operand, taken)
        log = site.log_factor + was + (0.0 if behind.logits else behind.log)
        found.append(Own(log, behind.log if behind.logits else 0.0, behind.passed, ahead))
    return tuple(found)


def marked(walk: Walk, shapes: Sequence[Shape], grows: Set[str]) -> Walk:
    """The walk, with uses of leaves marked whose path is like none in `grows`."""
    finite = [pattern_of(shape.path) not in grows for shape in shapes]
    return walk._replace(sites=tuple(site._replace(finite=finite[site.leaf]) for site in walk.sites))


def behind_uses(graph: Graph, walk: Walk, growing: Mapping[int, int]) -> tuple[list[Behind], set[int]]:
    """For each site the numbers after it, and the steps that all of them are of.

    A number behind a sum is its terms' only if each of them has it: in ``(norm(x) * g + b) / n`` and ``(x + h @ w) / n`` it is the next
    use's.
    """
    ends: set[int] = set()
    while True:
        found, taken = _behind_uses(graph, walk, growing, ends)
        passed: dict[int, set[int]] = {}
        for k, behind in enumerate(found):
            for step in behind.passed:
                passed.setdefault(step, set()).add(k)
        at: dict[int, list[int]] = {}
        for k, site in enumerate(walk.sites):
            at.setdefault(site.node, []).append(k)
        halved = {i for i, by in passed.items() if graph.nodes[i].log_factor and not _of_all(graph, walk, at, i, by)}
        if not halved:
            return found, taken
        ends |= halved


def _of_all(graph: Graph, walk: Walk, at: Mapping[int, Sequence[int]], step: int, by: Set[int]) -> bool:
    """Whether each way to a step comes from a use that has its number."""
    todo, seen = list(graph.nodes[step].parents), set[int]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        uses = [k for k in at.get(node, ()) if k in by]
        if graph.contracts(node) or any(walk.sites[k].effect == "times" for k in uses):
            if not uses:
                return False
            continue
        here = graph.nodes[node]
        if here.how not in ("linear", "affine", "homogeneous") or not here.parents:
            return False
        todo.extend(here.parents)
    return True


def _behind_uses(graph: Graph, walk: Walk, growing: Mapping[int, int], ends: Set[int]) -> tuple[list[Behind], set[int]]:
    taken: set[int] = set()
    products = {multiplied(graph, i) for i in range(len(graph.nodes))} - {None}
    found: list[Behind] = []
    for site in walk.sites:
        # A number after ``x * exp(g)`` cannot be taken out of g: it belongs to the next use. One after a gain is of what the gain is on.
        gain = site.kind == "elementwise" and site.effect == "times"
        apart = site.told or site.effect == "other" or site.passes or (gain and site.node in taken)
        behind = Behind() if apart else _Ways(graph, products, growing, {site.leaf}, ends).behind(site.node)
        ahead = sum_before(graph, next(iter(graph.nodes[site.node].parents), None)) if site.effect == "times" else None
        totals = [total for total in (behind.last, ahead) if total is not None and total in growing]
        mean = [total for total in growing if math.isclose(behind.log, -math.log(growing[total]), rel_tol=1e-6)]
        # Each part may be over the number of parts that are added up later.
        parts = len(graph.children[site.node]) > 1 and any(graph.made_of(total, site.node) for total in mean)
        if parts or set(mean) & set(totals):
            behind = Behind()
        taken.update(behind.passed)
        found.append(behind)
    return found, taken


class _Ways:
    """Ways from a use of some leaves to the next functions."""

    def __init__(self, graph: Graph, products: Set[int | None], growing: Mapping[int, int], leaves: Set[int], ends: Set[int]):
        self.graph, self.products, self.growing, self.leaves, self.ends = graph, products, growing, leaves, ends
        self.known: dict[int, Behind] = {}

    def behind(self, node: int) -> Behind:
        """Numbers after an activation on all ways; none where the ways differ."""
        if node not in self.known:
            ways = [self.through(child, node) for child in self.graph.children[node]]
            ways += [Behind()] if node in self.graph.outputs else []
            first = ways[0] if ways else Behind()
            alike = all(math.isclose(way.log, first.log, abs_tol=1e-9) and way.logits == first.logits for way in ways)
            last = first.last if len({way.last for way in ways}) == 1 else None
            passed = frozenset[int]().union(*(way.passed for way in ways))
            self.known[node] = Behind(first.log, first.logits, passed, last) if alike else Behind()
        return self.known[node]

    def through(self, node: int, of: int) -> Behind:
        """Numbers from a step on, which another activation goes into."""
        graph, here = self.graph, self.graph.nodes[node]
        if (here.op == "dot_general" and not graph.adds_up(node)) or node in self.products:
            # Queries with keys; attention weights with values are no product of two projections.
            return Behind(logits=node in self.products and all(origin(graph, parent)[0] for parent in here.parents))
        if node in self.ends or here.how not in ("linear", "affine", "homogeneous") or graph.contracts(node):
            return Behind()
        if any(parent != of and not _of_uses(graph, parent, self.leaves) for parent in here.parents):
            return Behind()
        # A mean over coordinates that grow is a number of its own, and no factor that waits to be taken out.
        if graph.adds_up(node) and node in self.growing:
            return Behind(last=node)
        rest = self.behind(node)
        size = math.log(summed_over(graph, node)) if graph.adds_up(node) else 0.0
        mean = size > 0 and any(math.isclose(graph.nodes[step].log_factor, -size, rel_tol=1e-6) for step in rest.passed)
        return rest._replace(log=here.log_factor + rest.log + (size if mean else 0.0), passed=rest.passed | {node})


def _of_uses(graph: Graph, node: int, but: Set[int]) -> bool:
    """Whether an activation is a sum of uses of other leaves, which take the numbers after it as well."""
    todo = [node]
    while todo:
        node = todo.pop()
        if graph.contracts(node):
            # One leaf's uses that are added up (heads that share a matrix) are a sum, which a number may make a mean of.
            if {site.leaf for site in graph.sites[node]} & but:
                return False
            continue
        here = graph.nodes[node]
        onwards = graph.moves(node) or here.op in prim.ADDITIVE or any(site.effect == "plus" for site in graph.sites.get(node, ()))
        if not onwards or not here.parents or len(graph.children[node]) > 1:
            return False
        todo.extend(here.parents)
    return True


def sum_before(graph: Graph, node: int | None) -> int | None:
    """The sum that a use acts on, through steps that move or multiply it."""
    while node is not None and graph.moves(node):
        node = graph.nodes[node].parents[0]
    return node if node is not None and graph.adds_up(node) else None


def before(graph: Graph, node: int | None, taken: Set[int]) -> tuple[float, frozenset[int]]:
    """Logarithm of the numbers that multiply an operand after its last function, and of the size that a norm gives its entries; the steps.

    A product of two activations is as large as both together.
    """
    log, summed, steps = 0.0, False, set()
    # What multiplies an earlier use (a gain) is that use's.
    while node is not None and node not in taken and all(site.passes for site in graph.sites.get(node, ())):
        here, size = graph.nodes[node], own_size(graph, node)
        steps.add(node)
        if size is not None:
            return log + size[0], frozenset(steps)
        if here.op in ("mul", "div") and len(here.parents) == 2 and not summed:
            (one, first), (two, second) = (before(graph, parent, taken) for parent in here.parents)
            return log + one + (two if here.op == "mul" else -two), frozenset(steps) | first | second
        if here.how not in ("linear", "homogeneous") or len(here.parents) != 1:
            break
        # Of what is summed (a mean over coordinates that grow) only the size of the entries is known.
        summed = summed or graph.adds_up(node)
        log = 0.0 if summed else log + here.log_factor
        node = here.parents[0]
    return log, frozenset(steps)
