"""Known numbers that a model multiplies its leaves by, and that are its own spelling of an initialization."""

import math
from collections.abc import Set

from paperjax.trace.graph import Graph, Walk
from paperjax.trace.interactions import multiplied
from paperjax.trace.origins import origin, own_size, summed_over


def own_factors(walk: Walk, growing: Set[int] = frozenset()) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each site, the logarithm of the known numbers that the model multiplies it by; and of those that may be the logits' instead.

    Counted are the leaf's before the use, and the result's after it, followed through steps that are linear or homogeneous in it, up to
    the next function, sum with another activation or product of activations; and what multiplies the data that goes in, if no earlier
    use has it. Numbers between a projection and its product with another one (queries over sqrt(d)) scale the logits, so they belong to
    the `Interaction`; they come apart, for `paperjax.trace.read` to judge. What makes a mean of one of the sums in `growing` is that sum's.
    """
    graph = Graph(walk)
    after, taken = behind_uses(graph, walk, growing)
    ahead = [0.0 if site.told or site.effect != "times" else before(graph, site.operand, taken) for site in walk.sites]
    own = tuple(site.log_factor + was + (0.0 if logits else log) for site, was, (log, logits) in zip(walk.sites, ahead, after))
    return own, tuple(log if logits else 0.0 for log, logits in after)


def behind_uses(graph: Graph, walk: Walk, growing: Set[int]) -> tuple[list[tuple[float, bool]], set[int]]:
    """For each site, the logarithm of the numbers after it, and whether they may be the logits' instead; and the steps that they are of."""
    taken: set[int] = set()
    products = {multiplied(graph, i) for i in range(len(graph.nodes))} - {None}
    # A number after ``x * exp(g)`` cannot be taken out of g: it belongs to the next use.
    apart = [site.told or site.effect == "other" for site in walk.sites]
    found = []
    for site, no in zip(walk.sites, apart):
        log, logits, passed, last = (0.0, False, [], None) if no else _after(graph, site.node, products)
        ahead = _sum_before(graph, next(iter(graph.nodes[site.node].parents), None)) if site.effect == "times" else None
        totals = [total for total in (last, ahead) if total is not None and total in growing]
        if any(math.isclose(log, -math.log(summed_over(graph, total)), rel_tol=1e-6) for total in totals):
            log, passed = 0.0, []
        taken.update(passed)
        found.append((log, logits))
    return found, taken


def _after(graph: Graph, node: int, products: Set[int | None]) -> tuple[float, bool, list[int], int | None]:
    """Logarithm of the numbers after a use, whether they lead into a product of two projections, the steps passed, and the sum behind."""
    log, passed = 0.0, []
    while len(graph.children[node]) == 1:
        node = graph.children[node][0]
        here = graph.nodes[node]
        if (here.op == "dot_general" and not graph.adds_up(node)) or node in products:
            # Queries with keys; attention weights with values are no product of two projections.
            return log, node in products and all(origin(graph, parent)[0] for parent in here.parents), passed, None
        if here.how not in ("linear", "affine", "homogeneous") or len(here.parents) != 1 or graph.contracts(node):
            break
        # A mean over coordinates that grow is a number of its own, and no factor that waits to be taken out.
        if graph.adds_up(node):
            return log, False, passed, node
        log += here.log_factor
        passed.append(node)
    return log, False, passed, None


def _sum_before(graph: Graph, node: int | None) -> int | None:
    """The sum that a use acts on, through steps that move or multiply it."""
    while node is not None and graph.moves(node):
        node = graph.nodes[node].parents[0]
    return node if node is not None and graph.adds_up(node) else None


def before(graph: Graph, node: int | None, taken: Set[int]) -> float:
    """Logarithm of the numbers that multiply an operand after its last function, and of the size that a norm gives its entries."""
    log, summed = 0.0, False
    # What multiplies an earlier use (a gain) is that use's.
    while node is not None and node not in taken and not graph.sites.get(node):
        here, size = graph.nodes[node], own_size(graph, node)
        if size is not None:
            return log + size[0]
        if here.how not in ("linear", "homogeneous") or len(here.parents) != 1:
            break
        # Of what is summed (a mean over coordinates that grow) only the size of the entries is known.
        summed = summed or graph.adds_up(node)
        log = 0.0 if summed else log + here.log_factor
        node = here.parents[0]
    return log
