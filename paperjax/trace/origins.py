"""What made an activation: the weights behind it, through linear steps and norms."""

import math

from paperjax.trace import primitives as prim
from paperjax.trace.graph import CONTRACTING, Graph


def origin(graph: Graph, node: int) -> tuple[tuple[int, ...], float]:
    """The leaves whose contraction made this node, through linear steps and norms, and the known factors on the way."""
    log, normed = 0.0, False
    while True:
        if graph.contracts(node):
            return tuple(dict.fromkeys(site.leaf for site in graph.sites[node] if site.kind in CONTRACTING)), log
        here = graph.nodes[node]
        onwards = here.parents[0] if here.parents else None
        if here.how in ("bilinear", "first") and here.op in ("mul", "div"):
            onwards, norm = normalized(graph, node)
            log += 0.0 if normed else norm
        elif here.how not in ("linear", "affine"):
            onwards = None
        if onwards is None:
            return (), log
        # A norm divides by whatever multiplies what it is taken of.
        normed = normed or here.how in ("bilinear", "first")
        log += 0.0 if normed else here.log_factor
        node = onwards


def normalized(graph: Graph, node: int) -> tuple[int | None, float]:
    """Of ``x / norm(x)`` the x, and the logarithm of what a norm makes of entries of order 1; `None` where it is no such quotient.

    ``x / sqrt(mean(x²))`` has entries of order 1, ``x / sqrt(sum(x²))`` over d coordinates of order d^-1/2.
    """
    here = graph.nodes[node]
    if len(here.parents) == 2:
        for x, other in (here.parents, here.parents[::-1])[: 2 if here.op == "mul" else 1]:
            log = _norm(graph, other, 1.0 if here.op == "mul" else -1.0)
            if log is not None:
                return x, log
    return None, 0.0


def _norm(graph: Graph, node: int, power: float) -> float | None:
    """Logarithm of a power of a norm of entries of order 1; `None` if `node` is none."""
    log = 0.0
    while not graph.contracts(node):
        here = graph.nodes[node]
        log += power * here.log_factor
        if here.op == "reduce_sum":
            (inside,) = here.parents
            squared = graph.nodes[inside]
            log += power * math.log(math.prod(squared.shape) / max(1, math.prod(here.shape)))
            # A norm is of degree 1 in what is summed as squares: 1/2 of the sum.
            square = squared.op in ("square", "integer_pow") or (squared.op == "mul" and len(set(squared.parents)) == 1)
            return log if square and abs(power) == 0.5 else None
        if here.op in prim.POWERS and len(here.parents) == 1:
            power *= prim.POWERS[here.op]
        elif not here.parents or here.how not in ("linear", "affine", "homogeneous"):
            return None
        # A variance is a mean of squares less a square of the mean.
        node = here.parents[0]
    return None
