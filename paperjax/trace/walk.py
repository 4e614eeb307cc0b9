"""Follow every parameter through the jaxpr of ``apply`` to where it meets the data, and every activation to what it is made of.

A value is one of four: known without parameters and data (constant); made of parameters alone by moving, adding and scaling them
(`Value.pieces`: which leaf, and which of its axes each axis of the value runs over); made of parameters alone in any other way
(`Value.tangled`); or dependent on the data (`Value.node`, a node of the graph of activations). A parameter's sites are where a value
of the second kind meets one of the fourth.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.trace import primitives as prim


class Piece(NamedTuple):
    """A parameter inside a value; the value is linear in it unless `linear` says otherwise.

    Attributes
    ----------
    leaf
        Number of the leaf.
    axes
        For each axis of the value, the axes of the leaf that it runs over; none for a broadcast axis.
    stack
        Axes of the leaf that a scan runs over, one slice a step.
    linear
        Whether only moves, sums and constant factors came before.
    reused
        Whether a loop uses the same numbers in every step.
    """

    leaf: int
    axes: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()
    linear: bool = True
    reused: bool = False


class Value(NamedTuple):
    """What is known of a value in the jaxpr; see the module. `scalar` is the number itself where it is a known one."""

    pieces: tuple[Piece, ...] = ()
    node: int | None = None
    tangled: tuple[tuple[int, str], ...] = ()
    scalar: Any = None

    @property
    def is_constant(self) -> bool:
        """Whether neither parameters nor data are in it."""
        return self.node is None and not self.pieces and not self.tangled

    def leaves(self) -> tuple[int, ...]:
        """The parameters in it."""
        return tuple(dict.fromkeys([p.leaf for p in self.pieces] + [leaf for leaf, _ in self.tangled]))


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


class Node(NamedTuple):
    """An activation: the primitive that made it, of what, and how it depends on it.

    Attributes
    ----------
    op, path, shape
        The primitive, where it stands, the result's shape.
    parents
        Activations that went in.
    how
        ``"linear"`` (in all parents together), ``"bilinear"``, ``"first"`` (linear in the first parent only), ``"homogeneous"`` or
        ``"nonlinear"``.
    log_factor
        Logarithm of the known number that it multiplies by.
    contracted
        Axes of the two parents that a product of activations sums over, as sizes.
    repeats
        As for a `Site`.
    """

    op: str
    path: tuple[int, ...]
    shape: tuple[int, ...]
    parents: tuple[int, ...]
    how: str
    log_factor: float = 0.0
    contracted: tuple[int, ...] = ()
    repeats: int = 1


class Unresolved(NamedTuple):
    """A use of a leaf that the trace cannot classify: after which primitive, and why."""

    leaf: int
    op: str
    reason: str


class Walk(NamedTuple):
    """All that a walk found: sites in the order of execution, the graph of activations, what could not be resolved."""

    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    unresolved: tuple[Unresolved, ...]
    outputs: tuple[Value, ...]


def walk(jaxpr: jex.ClosedJaxpr, n_leaves: int) -> Walk:
    """Walk the jaxpr of a function whose first `n_leaves` inputs are parameters and whose others are data."""
    walker = _Walker()
    inputs = []
    for i, var in enumerate(jaxpr.jaxpr.invars):
        rank = len(var.aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
        if i < n_leaves:
            inputs.append(Value(pieces=(Piece(i, tuple((axis,) for axis in range(rank))),)))
        else:
            inputs.append(Value(node=walker.node("input", (), var, (), "linear")))
    outputs = walker.jaxpr(jaxpr, inputs, ())
    return Walk(tuple(walker.sites), tuple(walker.nodes), tuple(walker.unresolved), tuple(outputs))


class _Walker:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.sites: list[Site] = []
        self.unresolved: list[Unresolved] = []
        self.repeats = 1

    # The graph ------------------------------------------------------------------------------------------------------

    def node(self, op: str, path: tuple[int, ...], var: Any, parents: Sequence[int], how: str, **more: Any) -> int:
        self.nodes.append(Node(op, path, tuple(var.aval.shape), tuple(parents), how, repeats=self.repeats, **more))
        return len(self.nodes) - 1

    def site(
        self, piece: Piece, kind: str, eqn: Any, path: tuple[int, ...], node: int, operand: int | None, axes: prim.Contraction
    ) -> None:
        def of(which: Sequence[int]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(leaf_axis for axis in which for leaf_axis in piece.axes[axis]))

        inside, out, stack, window = map(of, axes[:4])
        several = (set(inside) & set(out)) | (set(inside) & set(stack + piece.stack)) | (set(out) & set(stack + piece.stack))
        if several:
            self.tangle([piece.leaf], eqn, f"axis {min(several)} plays two parts in one {eqn.primitive.name}")
        if kind != "elementwise" and not piece.linear:
            self.tangle([piece.leaf], eqn, "an elementwise function is applied to it first")
        self.sites.append(
            Site(
                piece.leaf,
                kind,
                eqn.primitive.name,
                inside,
                out,
                piece.stack + stack,
                window,
                axes.groups,
                path,
                node,
                operand,
                piece.reused,
                self.repeats,
            )  # fmt: skip
        )

    def elementwise_site(self, value: Value, eqn: Any, path: tuple[int, ...], node: int, operand: int | None) -> None:
        for piece in value.pieces:
            every = prim.Contraction((), tuple(range(len(piece.axes))), ())
            self.site(piece, "elementwise", eqn, path, node, operand, every)
        for leaf, reason in value.tangled:
            self.tangle([leaf], eqn, reason)

    def tangle(self, leaves: Sequence[int], eqn: Any, reason: str) -> None:
        self.unresolved.extend(Unresolved(leaf, eqn.primitive.name, reason) for leaf in leaves)

    # Jaxprs ---------------------------------------------------------------------------------------------------------

    def jaxpr(self, jaxpr: jex.ClosedJaxpr, inputs: Sequence[Value], path: tuple[int, ...]) -> list[Value]:
        values: dict[Any, Value] = {}
        for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts):
            values[var] = Value(scalar=const if np.shape(const) == () and not _is_traced(const) else None)
        values.update(zip(jaxpr.jaxpr.invars, inputs))

        def read(atom: Any) -> Value:
            return Value(scalar=atom.val if np.shape(atom.val) == () else None) if isinstance(atom, jex.Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars], (*path, i))
            values.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        name = eqn.primitive.name
        if all(value.is_constant for value in inputs):
            scalar = prim.fold_scalar(eqn, [value.scalar for value in inputs])
            return [Value(scalar=scalar) for _ in eqn.outvars]
        inner = prim.called(eqn)
        if inner is not None:
            return self.jaxpr(inner, inputs, (*path, 0))
        special = {"scan": self.scan, "while": self.while_loop, "cond": self.cond, "dot_general": self.dot,
                   "conv_general_dilated": self.convolution, "gather": self.gather}.get(name)  # fmt: skip
        if special is not None:
            return special(eqn, inputs, path)
        if any(value.node is not None for value in inputs):
            return self.activation(eqn, inputs, path)
        return [self.parameters(eqn, inputs)] * len(eqn.outvars)

    # Parameters alone -----------------------------------------------------------------------------------------------

    def parameters(self, eqn: Any, inputs: list[Value]) -> Value:
        name = eqn.primitive.name
        involved = [value for value in inputs if not value.is_constant]
        first = inputs[0]
        tangled = tuple(t for value in involved for t in value.tangled)
        if tangled:
            return Value(
                tangled=tuple(dict.fromkeys((*tangled, *((p.leaf, f"it enters {name} with others") for v in involved for p in v.pieces))))
            )
        if name in prim.RESHAPING and len(involved) == 1:
            moved = prim.moved_axes(eqn)
            return Value(tuple(p._replace(axes=tuple(_union(p.axes[a] for a in old) for old in moved)) for p in first.pieces))
        if name in prim.KEEPING_AXES and first.pieces:
            return first
        if name in ("concatenate", "select_n", *prim.ADDITIVE) and all(v.is_constant or v.pieces for v in inputs):
            predicate = inputs[0] if name == "select_n" else Value()
            if predicate.is_constant:
                return Value(tuple(dict.fromkeys(p for value in involved for p in value.pieces)))
        if name == "neg" or (name in ("mul", "div") and len(involved) == 1 and (name == "mul" or not first.is_constant)):
            return involved[0]
        if name in prim.ELEMENTWISE and len(involved) == 1:
            return Value(tuple(p._replace(linear=False) for p in involved[0].pieces))
        leaves = [leaf for value in involved for leaf in value.leaves()]
        if len(set(leaves)) > 1:
            reason = f"it is combined with another parameter by {name} before it meets the data"
        else:
            reason = f"it goes through {name} before it meets the data"
        return Value(tangled=tuple((leaf, reason) for leaf in dict.fromkeys(leaves)))

    # Data in it -----------------------------------------------------------------------------------------------------

    def activation(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        name = eqn.primitive.name
        parents = tuple(dict.fromkeys(value.node for value in inputs if value.node is not None))
        how, log_factor = self.dependence(eqn, inputs)
        outputs = [self.node(name, path, var, parents, how, log_factor=log_factor) for var in eqn.outvars]
        opaque = name not in (*prim.ELEMENTWISE, *prim.RESHAPING, *prim.KEEPING_AXES, *prim.LINEAR, "dynamic_update_slice", "scatter")
        for value in inputs:
            if value.node is None and value.leaves():
                if opaque:
                    self.tangle(value.leaves(), eqn, f"{name} is opaque: what it does to the leaf's axes is not known")
                else:
                    self.elementwise_site(value, eqn, path, outputs[0], parents[0])
        return [Value(node=node) for node in outputs]

    def dependence(self, eqn: Any, inputs: list[Value]) -> tuple[str, float]:
        """How the result depends on the activations that go in, and the logarithm of the known factor."""
        name = eqn.primitive.name
        data = [value.node is not None for value in inputs]
        if name in prim.ADDITIVE or name in prim.LINEAR or name in prim.RESHAPING or name in prim.KEEPING_AXES:
            return "linear", 0.0
        if name in ("mul", "div"):
            if all(data):
                return ("bilinear" if name == "mul" else "first"), 0.0
            other = inputs[1] if data[0] else inputs[0]
            if name == "div" and not data[0]:
                return "nonlinear", 0.0
            size = 0.0 if other.scalar is None or not abs(other.scalar) > 0 else math.log(abs(float(other.scalar)))
            return "linear", size if name == "mul" else -size
        if name in prim.HOMOGENEOUS or (name in ("max", "min") and any(v.scalar is not None and v.scalar == 0 for v in inputs)):
            return "homogeneous", 0.0
        if name in ("gt", "ge", "lt", "le") and any(v.scalar is not None and v.scalar == 0 for v in inputs):
            return "sign", 0.0
        if name == "select_n":
            if not data[0]:
                return "linear", 0.0
            node = inputs[0].node
            assert node is not None
            return ("homogeneous" if self.nodes[node].how == "sign" else "nonlinear"), 0.0
        return "nonlinear", 0.0

    def product(self, eqn: Any, inputs: list[Value], path: tuple[int, ...], kind: str, axes: Sequence[prim.Contraction]) -> list[Value]:
        var = eqn.outvars[0]
        for value in inputs:
            if value.tangled:
                other = next(v for v in inputs if v is not value)
                for leaf, reason in value.tangled:
                    self.tangle([leaf], eqn, reason)
                parents = () if other.node is None else (other.node,)
                return [Value(node=self.node(eqn.primitive.name, path, var, parents, "linear"))]
        weights = [i for i, value in enumerate(inputs) if value.pieces]
        if len(weights) == 2:
            reason = "it is multiplied with another parameter before it meets the data"
            return [Value(tangled=tuple((leaf, reason) for leaf in dict.fromkeys(inputs[0].leaves() + inputs[1].leaves())))]
        if not weights:
            parents = tuple(value.node for value in inputs if value.node is not None)
            data = [i for i, value in enumerate(inputs) if value.node is not None]
            sizes = tuple(eqn.invars[data[0]].aval.shape[a] for a in axes[data[0]].contracted)
            how = "bilinear" if len(data) == 2 else "linear"
            return [Value(node=self.node(eqn.primitive.name, path, var, parents, how, contracted=sizes if len(data) == 2 else ()))]
        weight, operand = weights[0], inputs[1 - weights[0]].node
        # A constant that meets a weight is data all the same: fixed positions, say.
        node = self.node(eqn.primitive.name, path, var, () if operand is None else (operand,), "linear")
        for piece in inputs[weight].pieces:
            self.site(piece, kind, eqn, path, node, operand, axes[weight])
        return [Value(node=node)]

    def dot(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        return self.product(eqn, inputs, path, "product", (prim.dot_axes(eqn, 0), prim.dot_axes(eqn, 1)))

    def convolution(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        if inputs[0].leaves():
            self.tangle(inputs[0].leaves(), eqn, "it is the image of a convolution, not its kernel")
            return [Value(node=self.node(eqn.primitive.name, path, eqn.outvars[0], (), "nonlinear"))]
        axes = prim.conv_axes(eqn)
        return self.product(eqn, inputs, path, "convolution", (prim.Contraction((), (), ()), axes))

    def gather(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        table, indices = inputs[0], inputs[1]
        if not table.pieces:
            return (
                self.activation(eqn, inputs, path) if table.node is not None or indices.node is not None else [self.parameters(eqn, inputs)]
            )
        if indices.leaves():
            self.tangle(indices.leaves(), eqn, "it is an index")
        parents = () if indices.node is None else (indices.node,)
        node = self.node("gather", path, eqn.outvars[0], parents, "linear")
        for piece in table.pieces:
            self.site(piece, "lookup", eqn, path, node, indices.node, prim.gather_axes(eqn))
        return [Value(node=node)]

    # Control flow ---------------------------------------------------------------------------------------------------

    def scan(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        n_consts, n_carry, body = eqn.params["num_consts"], eqn.params["num_carry"], prim.closed(eqn.params["jaxpr"])
        consts = [_reuse(value) for value in inputs[:n_consts]]
        rows = [
            self.slice_of(value, eqn, var, path)
            for value, var in zip(inputs[n_consts + n_carry :], body.jaxpr.invars[n_consts + n_carry :])
        ]

        def step(carry: list[Value]) -> list[Value]:
            return self.jaxpr(body, [*consts, *carry, *rows], (*path, 0))

        outside, self.repeats = self.repeats, self.repeats * eqn.params["length"]
        carry_vars = body.jaxpr.invars[n_consts : n_consts + n_carry]
        _, results = self.fixed_point(step, inputs[n_consts : n_consts + n_carry], carry_vars, eqn, path)
        self.repeats = outside
        stacked = [self.stacked(value, eqn, var, path) for value, var in zip(results[n_carry:], eqn.outvars[n_carry:])]
        return [self.after(value, eqn, var, path) for value, var in zip(results[:n_carry], eqn.outvars[:n_carry])] + stacked

    def while_loop(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        n_cond, n_body, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"], prim.closed(eqn.params["body_jaxpr"])
        consts = [_reuse(value) for value in inputs[n_cond : n_cond + n_body]]

        def step(carry: list[Value]) -> list[Value]:
            return self.jaxpr(body, [*consts, *carry], (*path, 1))

        _, results = self.fixed_point(step, inputs[n_cond + n_body :], body.jaxpr.invars[n_body:], eqn, path)
        return [self.after(value, eqn, var, path) for value, var in zip(results, eqn.outvars)]

    def fixed_point(self, step: Any, start: list[Value], variables: Sequence[Any], eqn: Any, path: tuple[int, ...]) -> Any:
        """The carry of a loop whose kinds no longer change from one step to the next, and the results of that step."""
        carry = [_reuse(value) for value in start]
        for _ in range(2 + len(start)):
            marks = len(self.nodes), len(self.sites), len(self.unresolved)
            entering = [self.entering(value, eqn, var, path) for value, var in zip(carry, variables)]
            results = step(entering)
            joined = [_join(a, b) for a, b in zip(carry, results)]
            if joined == carry:
                return entering, results
            del self.nodes[marks[0] :], self.sites[marks[1] :], self.unresolved[marks[2] :]
            # A parameter that becomes an activation in the loop (a learned first state) meets the data where the loop begins.
            for before, after in zip(carry, joined):
                if before.leaves() and after.node is not None:
                    node = self.node(eqn.primitive.name, path, eqn.outvars[0], (), "linear")
                    self.elementwise_site(before, eqn, path, node, None)
            carry = joined
        raise AssertionError("the kinds of a loop's carry only ever grow, and did not settle")

    def entering(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        if value.node is None:
            return _reuse(value) if value.leaves() else Value()
        return Value(node=self.node("carry", path, var, () if value.node < 0 else (value.node,), "linear"))

    def after(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        return value if value.node is None else Value(node=self.node("carried", path, var, (value.node,), "linear"))

    def slice_of(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        if value.node is not None:
            return Value(node=self.node("row", path, var, (value.node,), "linear"))
        if value.pieces:
            return Value(tuple(p._replace(axes=p.axes[1:], stack=p.stack + p.axes[0]) for p in value.pieces))
        return Value(tangled=value.tangled)

    def stacked(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        if value.node is not None:
            return Value(node=self.node("rows", path, var, (value.node,), "linear"))
        if value.pieces:
            return Value(tuple(p._replace(axes=(p.stack[-1:], *p.axes), stack=p.stack[:-1]) for p in value.pieces))
        return Value(tangled=value.tangled)

    def cond(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        branches = [self.jaxpr(prim.closed(b), inputs[1:], (*path, i)) for i, b in enumerate(eqn.params["branches"])]
        results = []
        for values, var in zip(zip(*branches), eqn.outvars):
            joined = values[0]
            for value in values[1:]:
                joined = _join(joined, value)
            nodes = tuple(dict.fromkeys(value.node for value in values if value.node is not None))
            if nodes or inputs[0].node is not None:
                node = self.node("cond", path, var, nodes, "linear")
                for value in values:
                    if value.node is None and value.leaves():
                        self.elementwise_site(value, eqn, path, node, None)
                joined = Value(node=node)
            results.append(joined)
        return results


# A carry that is an activation before the loop has run at all: its node is not known yet.
_SOME_NODE = -1


def _join(a: Value, b: Value) -> Value:
    """The kind that covers both; an activation covers all."""
    if a.node is not None:
        return a
    if b.node is not None:
        return Value(node=_SOME_NODE)
    if a.tangled or b.tangled:
        return Value(
            tangled=tuple(dict.fromkeys((*a.tangled, *b.tangled, *((p.leaf, "it changes in a loop") for p in (*a.pieces, *b.pieces)))))
        )
    if set(a.pieces) == set(b.pieces):
        return Value(a.pieces, scalar=None)
    return Value(tuple(dict.fromkeys((*a.pieces, *b.pieces))))


def _reuse(value: Value) -> Value:
    return value._replace(pieces=tuple(dict.fromkeys(p._replace(reused=True) for p in value.pieces)))


def _union(parts: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(axis for part in parts for axis in part))


def _is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)
