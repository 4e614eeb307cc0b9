"""What the first step should do: powers of the width of every activation, gradient and change, from the numbers of a plan.

Sizes are powers of the width n, to leading order at large n and small learning rate. A weight with entries of size ``mult · std`` and
``k`` growing fan-in axes takes x to ``h = W x`` with

    ``h_0 ~ mult std n^(k/2) x_0``,

a sum of independent terms. Its own first update has entries ``mult · lr`` (Adam: the sign of the gradient) or ``mult² lr dh x``
(SGD), where dh is the derivative of the loss; it is aligned with x, so all n terms have one sign:

    ``change_W h ~ n^k x · (mult lr  or  mult² lr dh x)``.

What changed below comes through the initial weight like a fresh vector into a layer that grows, and aligned into one that does not
(a readout: what moves x is that very readout):

    ``change_x h ~ mult std n^(k/2 or k) change x``.

The larger of the two counts. Products of two activations (attention logits) are a random sum at the start, and an aligned one of the
changes. This is Tensor Programs IV (arXiv 2011.14522, Section 4 and Appendix H) read off a trace instead of an MLP.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from paperjax.model import Family
from paperjax.studies.scaled import Scaled, exponent
from paperjax.trace.program import Program, read
from paperjax.trace.streams import CONTRACTING
from paperjax.trace.traced import walk_model
from paperjax.trace.walk import Node, Site, Walk

ZERO = -math.inf
UNKNOWN = math.nan
# What becomes of an argument that vanishes with width: the function vanishes in proportion, or goes to a constant.
_ODD = (
    "tanh",
    "sin",
    "erf",
    "atan",
    "expm1",
    "log1p",
    "sinh",
    "asinh",
    "sign",
    "max",
    "min",
    "reduce_max",
    "reduce_min",
    "integer_pow",
    "square",
    "sqrt",
)
_CONSTANT = ("exp", "exp2", "logistic", "cos", "cosh", "erfc")


class Response(NamedTuple):
    """Powers of the size for every node of the largest network's walk; NaN where the rules give none, -inf for zero.

    Attributes
    ----------
    value
        At the start.
    change
        By the first step.
    """

    value: tuple[float, ...]
    change: tuple[float, ...]


class _Weight(NamedTuple):
    mult: float
    size: float
    rate: float
    fan_in: float
    fan_out: float


def first_step(s: Scaled, x: Any, rule: str) -> Response:
    """Powers of the width at the first step of SGD (momentum or not) or of an Adam-like optimizer (eps negligible).

    Parameters
    ----------
    s
        Networks at several widths; the second and the last are compared.
    x
        A batch, or its ``jax.ShapeDtypeStruct``.
    rule
        ``"sgd"`` or ``"adam"``.

    Returns
    -------
    Response

    Raises
    ------
    ValueError
        If a leaf's use cannot be resolved, or the traces at the two sizes are not alike.
    """
    family = Family(s.network())
    # Not the first: at the base a plan's factors are 1 and leave no equation, so its trace has fewer.
    pair = s.sizes[1], s.sizes[-1]
    program = read(family, {s.axis: pair[0]}, {s.axis: pair[1]}, x)
    small = walk_model(s.networks[pair[0]], x)[0]
    if [node.op for node in small.nodes] != [node.op for node in program.walk.nodes]:
        raise ValueError(f"the traces at {s.axis} = {pair[0]} and {pair[1]} have different equations, so their sizes are not compared.")
    return _Rules(s, pair, program, small, rule).solve()


class _Rules:
    def __init__(self, s: Scaled, pair: tuple[int, int], program: Program, small: Walk, rule: str):
        self.rule, self.pair, self.log_n = rule, pair, math.log(pair[1] / pair[0])
        self.walk, self.small = program.walk, small
        self.weights = [self.weight(s, program, site) for site in program.walk.sites]
        self.sites: dict[int, list[tuple[Site, _Weight]]] = {}
        for site, weight in zip(program.walk.sites, self.weights):
            self.sites.setdefault(site.node, []).append((site, weight))
        # For each carry of a loop, the value that the step before left in it.
        self.loops = {i: self.nodes[node.next].parents for i, node in enumerate(self.nodes) if node.next is not None}

    @property
    def nodes(self) -> Sequence[Node]:
        return self.walk.nodes

    def weight(self, s: Scaled, program: Program, site: Site) -> _Weight:
        leaf = program.leaves[site.leaf]
        inside = () if site.kind in ("lookup", "elementwise") else site.inside + site.window

        def growth(axes: Sequence[int]) -> float:
            return sum(math.log(leaf.shape[a] / leaf.base_shape[a]) for a in axes) / self.log_n

        mult, rate = (exponent(lambda n, f=f: f(leaf.path, n), self.pair) for f in (s.multiplier, s.learning_rate))
        entries = dict(zip(self.pair, (math.hypot(law.mean, law.std) for law in (leaf.base_law, leaf.law))))
        size = mult + exponent(lambda n: entries[n], self.pair)
        # Laws are read in the network's float32, and a rounding error would grow with every turn of a loop.
        return _Weight(round(mult, 5), round(size, 5) if math.isfinite(size) else size, round(rate, 5), growth(inside), growth(site.out))

    def rows(self, node: int) -> float:
        """How many coordinates a node has, as a power of n."""
        ours, base = math.prod(self.nodes[node].shape), math.prod(self.small.nodes[node].shape)
        return math.log(ours / base) / self.log_n

    def factor(self, node: int) -> float:
        return (self.nodes[node].log_factor - self.small.nodes[node].log_factor) / self.log_n

    def summed(self, node: int) -> float:
        here = self.nodes[node]
        return sum(math.log(a / b) for a, b in zip(here.contracted, self.small.nodes[node].contracted)) / self.log_n

    def solve(self) -> Response:
        value = self.fixed_point(lambda v: [self.value(i, v) for i in range(len(self.nodes))])
        end = self.walk.outputs[0].node
        assert end is not None
        self.at_start = value
        gradient = self.fixed_point(lambda g: self.gradient(g, end))
        self.gradients = gradient
        return Response(tuple(value), tuple(self.fixed_point(lambda c: [self.change(i, c) for i in range(len(self.nodes))])))

    def fixed_point(self, step: Any) -> list[float]:
        # Each pass carries a power once around a loop over layers; one that grows with every layer has no limit, and no prediction.
        found = [ZERO] * len(self.nodes)
        for _ in range(8 + len(self.nodes)):
            found, before = step(list(found)), found
            if all(a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) < 1e-9 for a, b in zip(found, before)):
                return found
        return [UNKNOWN] * len(self.nodes)

    def parents(self, i: int) -> tuple[int, ...]:
        return (*self.nodes[i].parents, *self.loops.get(i, ()))

    # Forward ----------------------------------------------------------------------------------------------------------

    def value(self, i: int, v: list[float]) -> float:
        node, parents = self.nodes[i], [v[p] for p in self.parents(i)]
        v[i] = self.own_value(i, node, parents)
        return v[i]

    def own_value(self, i: int, node: Node, parents: list[float]) -> float:
        if node.op == "input":
            return 0.0
        for site, w in self.sites.get(i, ()):
            if site.kind in CONTRACTING:
                return _max(parents, 0.0) + w.size + w.fan_in / 2
            if site.op in ("mul", "div"):
                return _max(parents) + (w.size if site.op == "mul" else -w.size)
            return _max([*parents, w.size])
        if node.op == "dot_general" and node.how == "bilinear":
            a, b = parents if len(parents) == 2 else parents * 2
            return a + b + self.summed(i) / 2
        if node.op in ("mul", "div") and node.how in ("bilinear", "first"):
            a, b = parents if len(parents) == 2 else parents * 2
            return a + b if node.op == "mul" else a - b
        top = _max(parents, 0.0)
        if node.how != "nonlinear":
            # A sum over coordinates, taken as aligned: of squares it is, and of what is centred it only has to be small.
            gathered = self.rows(node.parents[0]) - self.rows(i) if node.op == "reduce_sum" else self.summed(i)
            return top + self.factor(i) + gathered
        return _nonlinear(node.op, top)

    # Backward ---------------------------------------------------------------------------------------------------------

    def gradient(self, g: list[float], end: int) -> list[float]:
        """Derivative of the loss by every node, per coordinate; by the outputs it is of their order, at least of order 1 (MSE)."""
        out = [ZERO] * len(self.nodes)
        out[end] = max(0.0, self.at_start[end])
        for i in reversed(range(len(self.nodes))):
            here = g[i] if out[i] == ZERO else out[i]
            for k, parent in enumerate(self.parents(i)):
                out[parent] = _max([out[parent], self.passed_down(i, k, parent, here)])
        return out

    def passed_down(self, i: int, k: int, parent: int, here: float) -> float:
        node, v = self.nodes[i], self.at_start
        if here == ZERO:
            return ZERO
        for site, w in self.sites.get(i, ()):
            if site.kind in CONTRACTING:
                return here + w.size + w.fan_out / 2
            return here + {"mul": w.size, "div": -w.size}.get(site.op, 0.0)
        if node.how in ("bilinear", "first") and node.op in ("dot_general", "mul", "div"):
            other = node.parents[1 - k] if len(node.parents) == 2 else parent
            if node.op == "dot_general":
                # How far dh and the other operand are aligned depends on training, not on exponents, wherever n of them are summed.
                known = self.summed(i) == 0 and self.rows(parent) >= self.rows(i)
                return here + v[other] if known else UNKNOWN
            return here + v[other] * (1 if node.op == "mul" else -1)
        spread = max(0.0, self.rows(i) - self.rows(parent)) if node.op == "broadcast_in_dim" else 0.0
        return here + self.factor(i) + spread

    # The first step ---------------------------------------------------------------------------------------------------

    def change(self, i: int, c: list[float]) -> float:
        node, v = self.nodes[i], self.at_start
        parents = [c[p] for p in self.parents(i)]
        c[i] = self.own_change(i, node, parents, [v[p] for p in self.parents(i)])
        return c[i]

    def own_change(self, i: int, node: Node, moved: list[float], at: list[float]) -> float:
        top, start = _max(moved), _max(at, 0.0)
        for site, w in self.sites.get(i, ()):
            x = start if site.kind in ("product", "convolution") or site.op == "mul" else 0.0
            if self.gradients[i] == ZERO:
                step = ZERO
            else:
                step = w.mult + w.rate + w.fan_in + x + (w.mult + self.gradients[i] + x if self.rule == "sgd" else 0.0)
            if site.kind in CONTRACTING:
                return _max([step, top + w.size + (w.fan_in / 2 if w.fan_out else w.fan_in)])
            through = {"mul": w.size, "div": -w.size}.get(site.op, 0.0)
            return _max([step, top + through])
        if node.how in ("bilinear", "first") and node.op in ("dot_general", "mul", "div"):
            (a, b), (da, db) = (pair if len(pair) == 2 else pair * 2 for pair in (at, moved))
            if node.op == "div":
                return _max([da - b, db + a - 2 * b])
            return _max([da + b, db + a]) + (self.summed(i) if node.op == "dot_general" else 0.0)
        if node.how == "nonlinear":
            return UNKNOWN if math.isnan(_nonlinear(node.op, start)) else top
        gathered = self.rows(node.parents[0]) - self.rows(i) if node.op == "reduce_sum" else self.summed(i)
        return top + self.factor(i) + gathered


def _nonlinear(op: str, argument: float) -> float:
    """A function of something of order 1 is of order 1; of what vanishes or explodes it depends on the function."""
    if abs(argument) < 1e-6:
        return 0.0
    powers = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}
    if op in powers:
        return powers[op] * argument if argument != ZERO else UNKNOWN
    if argument < 0:
        return argument if op in _ODD else 0.0 if op in _CONSTANT else UNKNOWN
    return argument if op in ("max", "min", "reduce_max", "reduce_min") else UNKNOWN


def _max(values: Sequence[float], empty: float = ZERO) -> float:
    """The largest; NaN if one is, for the larger of something and an unknown is unknown."""
    if any(math.isnan(v) for v in values):
        return UNKNOWN
    return max(values, default=empty)
