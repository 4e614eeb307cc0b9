"""What made an activation: the weights behind it, through linear steps and norms."""

import math

from paperjax.trace import primitives as prim
from paperjax.trace.graph import CONTRACTING, Graph


def origin(graph: Graph, node: int) -> tuple[tuple[int, ...], float]:
    """The leaves whose contraction made this node, through linear steps and norms, and the known factors on the way."""
    return _origin(graph, node)[:2]


def origin_steps(graph: Graph, node: int) -> frozenset[int]:
    """The steps that those factors are of."""
    return _origin(graph, node)[2]


def _origin(graph: Graph, node: int) -> tuple[tuple[int, ...], float, frozenset[int]]:
    log, normed, steps = 0.0, False, set()
    while True:
        if graph.contracts(node):
            leaves = tuple(dict.fromkeys(site.leaf for site in graph.sites[node] if site.kind in CONTRACTING))
            return leaves, log, frozenset(steps)
        here = graph.nodes[node]
        onwards = here.parents[0] if here.parents else None
        if here.how in ("bilinear", "first") and here.op in ("mul", "div"):
            onwards, norm = normalized(graph, node)
            log += 0.0 if normed else norm
        elif here.how not in ("linear", "affine"):
            onwards = None
        if onwards is None:
            return (), log, frozenset(steps)
        # A norm divides by whatever multiplies what it is taken of. What a gain is on is the gain's.
        gain = any(site.effect == "times" and not site.passes for site in graph.sites.get(node, ()))
        normed = normed or here.how in ("bilinear", "first") or gain
        log += 0.0 if normed else here.log_factor
        steps.update(() if normed else (node,))
        node = onwards


def makers(graph: Graph, node: int) -> tuple[int, ...]:
    """The leaves that made an activation: of the last contraction on each way to it, and what was added or multiplied since."""
    todo, seen, found = [node], {node}, set()
    while todo:
        here = todo.pop()
        found |= {site.leaf for site in graph.sites.get(here, ())}
        onwards = () if graph.contracts(here) else set(graph.nodes[here].parents) - seen
        seen.update(onwards)
        todo.extend(onwards)
    return tuple(sorted(found))


def normalized(graph: Graph, node: int) -> tuple[int | None, float]:
    """Of ``x / norm(x)`` the x, and the logarithm of what a norm makes of entries of order 1; `None` where it is no such quotient.

    ``x / sqrt(mean(x²))`` has entries of order 1, ``x / sqrt(sum(x²))`` over d coordinates of order d^-1/2.
    """
    x, log, _ = _quotient(graph, node)
    return x, log


def own_size(graph: Graph, node: int) -> tuple[float, int] | None:
    """Logarithm of the size of the entries of what is divided by a norm or a sum of its own, and that sum; `None` of anything else.

    Of a norm as for `normalized`; of ``x / sum(x)`` over d coordinates of one sign (softmax) d^-1.
    """
    x, log, total = _quotient(graph, node)
    if x is not None:
        root = graph.root(x)
        # What a mean is taken off is of the same size.
        of = (root, *(graph.root(p) for p in graph.nodes[root].parents if graph.nodes[root].op in prim.ADDITIVE))
        return (log, total) if any(graph.made_of(total, each) for each in of) else None
    here, log = graph.nodes[node], 0.0
    if here.op != "div" or len(here.parents) != 2:
        return None
    x, total = here.parents
    while not graph.adds_up(total):
        if graph.contracts(total) or (total := _handed_on(graph, total)) is None:
            return None
    (inside,) = graph.nodes[total].parents
    same = graph.nodes[graph.root(x)].op in prim.POSITIVE and _alike(graph, inside, x)
    return (-math.log(summed_over(graph, total)), total) if same else None


def _alike(graph: Graph, a: int, b: int) -> bool:
    """Whether two activations are one function of one thing but for a number, even if it was computed twice."""
    a, b = graph.root(a), graph.root(b)
    if a == b:
        return True
    ours, theirs = graph.nodes[a], graph.nodes[b]
    once = len(ours.parents) == len(theirs.parents) == 1 and not graph.sites.get(a) and not graph.sites.get(b)
    return once and ours.op == theirs.op and graph.root(ours.parents[0]) == graph.root(theirs.parents[0])


def _quotient(graph: Graph, node: int) -> tuple[int | None, float, int]:
    here = graph.nodes[node]
    if len(here.parents) == 2:
        for x, other in (here.parents, here.parents[::-1])[: 2 if here.op == "mul" else 1 if here.op == "div" else 0]:
            norm = _norm(graph, other, 1.0 if here.op == "mul" else -1.0)
            if norm is not None:
                return x, *norm
    return None, 0.0, node


def _norm(graph: Graph, node: int, power: float) -> tuple[float, int] | None:
    """Logarithm of a power of a norm of entries of order 1, and the sum in it; `None` if `node` is none."""
    log = 0.0
    while not graph.contracts(node):
        here = graph.nodes[node]
        log += power * here.log_factor
        product = here.op == "dot_general" and here.how == "bilinear"
        if graph.adds_up(node) or product:
            squared = graph.nodes[here.parents[0]]
            size = summed_over(graph, node)
            log += power * math.log(size)
            # A norm is of degree 1 in what is summed as squares: 1/2 of the sum.
            with_itself = len({graph.root(parent) for parent in (here if product else squared).parents}) == 1
            square = with_itself and (product or squared.op in ("square", "integer_pow", "mul"))
            # An unbiased variance divides by one less than their number.
            unbiased = size > 1 and math.isclose(log, power * math.log(size / (size - 1)))
            return (0.0 if unbiased else log, node) if square and abs(power) == 0.5 else None
        # A number over an activation is its power -1.
        inverse = here.op == "div" and here.how == "nonlinear"
        raised = len(here.parents) == 1 and (inverse or here.op in prim.POWERS)
        power *= prim.POWERS.get(here.op, -1.0) if raised else 1.0
        onwards = here.parents[0] if raised else _handed_on(graph, node)
        if onwards is None:
            return None
        node = onwards
    return None


def summed_over(graph: Graph, total: int) -> int:
    """How many entries a sum, or a product with itself, sums over."""
    here = graph.nodes[total]
    if here.op != "reduce_sum":
        return math.prod(here.contracted)
    return math.prod(graph.nodes[here.parents[0]].shape) // max(1, math.prod(here.shape))


def _handed_on(graph: Graph, node: int) -> int | None:
    """Of an activation plus a constant, at least a constant, or chosen where a condition holds: that activation; of a sum the first."""
    here = graph.nodes[node]
    values = [p for p in here.parents if here.op != "select_n" or graph.nodes[graph.root(p)].op not in prim.CHOICES]
    bounded = here.op in ("max", "min", "clamp", "select_n") and len(values) == 1
    # A variance is a mean of squares less a square of the mean.
    return values[0] if values and (bounded or here.how in ("linear", "affine", "homogeneous")) else None
