"""Follow every parameter through the jaxpr of ``apply`` to where it meets the data, and every activation to what it is made of.

What is known of a value on the way is in `values`. A parameter's sites are where a value made of parameters meets an activation.
"""

from collections.abc import Sequence, Set
from functools import reduce
from typing import Any

from jax.extend import core as jex

from paperjax.trace import primitives as prim
from paperjax.trace.graph import WEIGHTED, Late, Node, Site, Unresolved, Walk, settled
from paperjax.trace.made import PARTIAL, are_scores, beside_weights, over_copies, passed_on, rows_after, split_by_product, split_by_sum
from paperjax.trace.pairs import even_axes, pair_summed, paired
from paperjax.trace.values import (
    Piece,
    Row,
    Tangled,
    Value,
    as_root,
    dependence,
    effect_of,
    join,
    known_number,
    likely,
    log_of,
    multiplied,
    parameters,
    reuse,
    sliced,
    union,
    unsliced,
)  # fmt: skip


def walk(jaxpr: jex.ClosedJaxpr, n_leaves: int, latents: Set[tuple[int, ...]] = frozenset()) -> Walk:
    """Walk the jaxpr of a function whose first `n_leaves` inputs are parameters, data from the equations `latents` on; others are data."""
    shapes = [var.aval.shape for var in jaxpr.jaxpr.invars[:n_leaves]]  # pyright: ignore[reportAttributeAccessIssue]
    walker = _Walker(shapes, latents)
    inputs = [Value((Piece(i, tuple((axis,) for axis in range(len(shape)))),)) for i, shape in enumerate(shapes)]
    inputs += [Value(node=walker.node("input", (), var, (), "linear")) for var in jaxpr.jaxpr.invars[n_leaves:]]
    outputs = walker.jaxpr(jaxpr, inputs, ())
    for value in outputs:
        # A parameter that is an output, alone: a constant function.
        walker.unresolved += [Unresolved(leaf, "the output", "it is returned without meeting the data") for leaf in value.leaves()]
    kept = {value.node for value in outputs}
    return Walk(settled(walker.sites, walker.late, walker.nodes, kept), tuple(walker.nodes), tuple(walker.unresolved), tuple(outputs))


class _Walker:
    def __init__(self, shapes: Sequence[tuple[int, ...]], latents: Set[tuple[int, ...]]) -> None:
        self.shapes, self.latents = shapes, latents
        self.nodes: list[Node] = []
        self.sites: list[Site] = []
        self.unresolved: list[Unresolved] = []
        self.late: list[Late] = []
        self.repeats = 1

    # The graph ------------------------------------------------------------------------------------------------------

    def node(self, op: str, path: tuple[int, ...], var: Any, parents: Sequence[int], how: str, **more: Any) -> int:
        self.nodes.append(Node(op, path, tuple(var.aval.shape), tuple(parents), how, repeats=self.repeats, **more))
        return len(self.nodes) - 1

    def total(self, of: int, shape: tuple[int, ...] | None, path: tuple[int, ...]) -> int:
        """The sum, of some shape, of an activation that an equation makes on the way; the activation where it makes none."""
        if shape is None:
            return of
        self.nodes.append(Node("reduce_sum", path, shape, (of,), "linear", repeats=self.repeats))
        return len(self.nodes) - 1

    def site(
        self, piece: Piece, kind: str, eqn: Any, path: tuple[int, ...], node: int, operand: int | None, axes: prim.Contraction, effect: str
    ) -> Site:
        inside, out, stack, window = (union(piece.axes[axis] for axis in which) for which in axes[:4])
        # Rows looked up twice over (relative positions): neither way is an axis of its own.
        out = tuple(axis for axis in out if not (axis in piece.looked and axis in stack))
        several = (set(inside) & set(out)) | (set(inside) & set(stack + piece.stack)) | (set(out) & set(stack + piece.stack))
        if several:
            self.tangle([piece.leaf], eqn, f"axis {min(several)} plays two parts in one {eqn.primitive.name}")
        if kind != "elementwise" and not piece.linear:
            self.tangle([piece.leaf], eqn, piece.reason)
        effect = effect if piece.scales and piece.linear else "other"
        return Site(
            piece.leaf, kind, eqn.primitive.name, inside, out, piece.stack + stack, window, axes.groups, path, node, operand, piece.reused,
            self.repeats, effect, piece.scans, piece.log_factor,
        )  # fmt: skip

    def elementwise_site(self, value: Value, eqn: Any, path: tuple[int, ...], node: int, operand: int | None, effect: str) -> None:
        for piece in value.pieces:
            looked = tuple(a for a, axes in enumerate(piece.axes) if piece.looked and set(axes) <= set(piece.looked) and axes)
            rest = tuple(a for a in range(len(piece.axes)) if a not in looked)
            kind = "lookup" if looked and piece.linear else "elementwise"
            self.sites.append(self.site(piece, kind, eqn, path, node, operand, prim.Contraction(looked, rest, ()), effect))
        self.unknown_site(value.tangled, "elementwise", eqn, path, node, operand)

    def learned(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        node = self.node(eqn.primitive.name, path, var, (), "linear")
        self.elementwise_site(value, eqn, path, node, None, "plus")
        return Value(node=node)

    def unknown_site(
        self,
        tangled: Sequence[Tangled],
        kind: str,
        eqn: Any,
        path: tuple[int, ...],
        node: int,
        operand: int | None,
        side: int | None = None,
        met: prim.Contraction | None = None,
    ) -> None:
        """A use whose axes are not known, or at most likely: the caller may say."""
        for t in tangled:
            self.tangle([t.leaf], eqn, t.reason)
            name = eqn.primitive.name
            what, inside, out = likely(t, met) or (kind, (), ())
            self.sites.append(Site(t.leaf, what, name, inside, out, (), (), 1, path, node, operand, False, self.repeats, side=side))

    def tangle(self, leaves: Sequence[int], eqn: Any, reason: str, axis: int | None = None) -> None:
        self.unresolved.extend(Unresolved(leaf, eqn.primitive.name, reason, axis) for leaf in leaves)

    # Jaxprs ---------------------------------------------------------------------------------------------------------

    def jaxpr(self, jaxpr: jex.ClosedJaxpr, inputs: Sequence[Value], path: tuple[int, ...]) -> list[Value]:
        values: dict[Any, Value] = {}
        for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts):
            values[var] = Value(scalar=known_number(const))
        values.update(zip(jaxpr.jaxpr.invars, inputs))

        def read(atom: Any) -> Value:
            return Value(scalar=known_number(atom.val)) if isinstance(atom, jex.Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars], (*path, i))
            values.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        name = eqn.primitive.name
        inner = prim.called(eqn)
        if inner is not None:
            return self.jaxpr(inner, inputs, (*path, 0))
        if all(value.is_constant for value in inputs):
            scalar = prim.fold_scalar(eqn, [value.scalar for value in inputs])
            return [Value(scalar=scalar) for _ in eqn.outvars]
        if name == "optimization_barrier":
            return inputs
        special = {"scan": self.scan, "while": self.while_loop, "cond": self.cond, "dot_general": self.dot,
                   "conv_general_dilated": self.convolution, "gather": self.gather}.get(name)  # fmt: skip
        if special is not None:
            return special(eqn, inputs, path)
        if any(value.node is not None for value in inputs):
            return self.activation(eqn, inputs, path)
        made = parameters(eqn, inputs)
        return [self.learned(made, eqn, eqn.outvars[0], path)] if path in self.latents else [made] * len(eqn.outvars)

    # Data in it -----------------------------------------------------------------------------------------------------

    def activation(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        name = eqn.primitive.name
        if name == "dynamic_slice" and inputs[0].pieces:
            return self.looked_up(eqn, inputs, path, prim.slice_axes(eqn), [(a,) for a in range(len(eqn.outvars[0].aval.shape))])
        parents = tuple(dict.fromkeys(value.node for value in inputs if value.node is not None))
        if name == "reduce_sum":
            parents = (self.total(parents[0], beside_weights(eqn, inputs[0]), path),)
        signs = [value.node is not None and self.nodes[value.node].how == "sign" for value in inputs]
        how, log_factor = dependence(eqn, inputs, signs)
        more = pair_summed(inputs[0].pair, eqn.invars[0].aval.shape, prim.summed_axes(eqn)) if name == "reduce_sum" else {}
        if name == "cumsum":
            more = {"contracted": tuple(eqn.invars[0].aval.shape[a] for a in prim.summed_axes(eqn))}
        outputs = [self.node(as_root(name, inputs), path, var, parents, how, log_factor=log_factor, **more) for var in eqn.outvars]
        opaque = name not in (*prim.ELEMENTWISE, *prim.RESHAPING, *prim.KEEPING_AXES, *prim.LINEAR, "dynamic_update_slice", "scatter")
        rows = rows_after(eqn, inputs)
        if name in prim.SUMS:
            self.summed(eqn, inputs[0], path, outputs[0], prim.summed_axes(eqn))
        for i, value in enumerate(inputs):
            if value.node is None and value.leaves():
                if opaque:
                    reason = f"{name} is opaque: what it does to the leaf's axes is not known"
                    self.unknown_site([Tangled(leaf, reason) for leaf in value.leaves()], "product", eqn, path, outputs[0], parents[0])
                else:
                    self.elementwise_site(value, eqn, path, outputs[0], parents[0], effect_of(name, i))
                    if name == "mul" or name in prim.ADDITIVE:
                        rank, kind = len(eqn.outvars[0].aval.shape), "times" if name == "mul" else "added"
                        rows += tuple(Row(p, kind, outputs[0]) for p in value.pieces if p.linear and len(p.axes) == rank)
        even, pair = even_axes(eqn, inputs), paired(eqn, inputs, outputs[0], how)
        return [Value(node=node, rows=rows, even=even, pair=pair) for node in outputs]

    def summed(self, eqn: Any, value: Value, path: tuple[int, ...], node: int, over: tuple[int, ...]) -> None:
        """``sum(w * x)`` over axes of w is a product."""
        self.unresolved += split_by_sum(eqn, value, over)
        for row in value.rows:
            if row.kind == "times" and any(row.piece.axes[a] for a in over):
                if eqn.primitive.name == "cumsum":
                    self.tangle([row.piece.leaf], eqn, PARTIAL, next(a for i in over for a in row.piece.axes[i]))
                    continue
                rest = tuple(a for a in range(len(row.piece.axes)) if a not in over)
                operand = self.nodes[row.node].parents[0]
                site = self.site(row.piece, "product", eqn, path, node, operand, prim.Contraction(over, rest, ()), "times")
                self.late.append(Late(row, site, node))

    def product(self, eqn: Any, inputs: list[Value], path: tuple[int, ...], kind: str, axes: Sequence[prim.Contraction]) -> list[Value]:
        var = eqn.outvars[0]
        for i, value in enumerate(inputs):
            if value.tangled:
                other = inputs[1 - i]
                if other.node is None and other.leaves():
                    return [multiplied(inputs, eqn, kind)]
                parents = () if other.node is None else (other.node,)
                node = self.node(eqn.primitive.name, path, var, parents, "linear")
                self.unknown_site(value.tangled, kind, eqn, path, node, other.node, 1 - i, axes[i])
                return [Value(node=node)]
        weights = [i for i, value in enumerate(inputs) if value.pieces]
        if len(weights) == 2:
            return [multiplied(inputs, eqn, kind)]
        if not weights:
            return [Value(node=self.without_weights(eqn, inputs, path, axes))]
        weight, operand = weights[0], inputs[1 - weights[0]].node
        if kind == "product" and operand is not None:
            operand = self.total(operand, over_copies(eqn, inputs[weight], weight, axes, self.shapes), path)
        # A constant that meets a weight is data all the same: fixed positions, say.
        node = self.node(eqn.primitive.name, path, var, () if operand is None else (operand,), "linear")
        rows = []
        part = axes[weight]
        if kind == "product" and part.stack and not part.contracted:
            # One number for each of the data's own coordinates, as in a depthwise convolution.
            kind, part = "elementwise", prim.Contraction((), (*part.stack, *part.free), ())
        for piece in inputs[weight].pieces:
            self.sites.append(self.site(piece, kind, eqn, path, node, operand, part, "times")._replace(side=1 - weight))
            if kind == "product":
                place = {new: old for old, new in prim.dot_output(eqn, weight).items()}
                found = tuple(piece.axes[place[a]] if a in place else () for a in range(len(var.aval.shape)))
                rows.append(Row(piece._replace(axes=found), "made" if operand is not None else "constant", node))
        return [Value(node=node, rows=tuple(rows))]

    def without_weights(self, eqn: Any, inputs: list[Value], path: tuple[int, ...], axes: Sequence[prim.Contraction]) -> int:
        """The activation that a product of two activations makes, or of one with a constant."""
        name, var, data = eqn.primitive.name, eqn.outvars[0], [i for i, value in enumerate(inputs) if value.node is not None]
        parents = tuple(dict.fromkeys(value.node for value in inputs if value.node is not None))
        over, shape, constant = axes[data[0]].contracted, eqn.invars[data[0]].aval.shape, inputs[1 - data[0]]
        sizes = tuple(shape[a] for a in over)
        if len(data) == 2:
            node = self.node(name, path, var, parents, "bilinear", contracted=sizes)
            self.contracted_rows(eqn, inputs, path, node, axes)
            return node
        if constant.scalar is None:
            return self.node(name, path, var, parents, "linear")
        # With one number for all entries, ``h @ ones(n)``, it is a sum.
        more = {"contracted": sizes} | pair_summed(inputs[data[0]].pair, shape, over)
        node = self.node(name, path, var, parents, "linear", log_factor=log_of(constant), **more)
        self.summed(eqn, inputs[data[0]], path, node, over)
        return node

    def contracted_rows(self, eqn: Any, inputs: list[Value], path: tuple[int, ...], node: int, axes: Sequence[prim.Contraction]) -> None:
        """What a product of two activations says of parameters whose axes it sums over."""
        scores = are_scores(inputs, axes)
        self.unresolved += split_by_product(eqn, inputs, axes)
        for i, value in enumerate(inputs):
            for row in value.rows:
                over = union(row.piece.axes[a] for a in axes[i].contracted)
                free = union(row.piece.axes[a] for a in axes[i].free)
                other = inputs[1 - i]
                # Of two vectors that are looked up neither is the other's weight; a matrix is a vector's.
                left = union(o.piece.axes[a] for o in other.rows if o.kind != "added" for a in axes[1 - i].free)
                both = row.kind == "lookup" and set(free) - set(over) and not left
                if not over or any(o.kind == "constant" or (o.kind == "lookup" and not both) for o in other.rows):
                    continue
                if row.kind == "lookup":
                    operand = other.node
                    piece = row.piece._replace(stack=row.piece.stack + tuple(a for a in row.piece.looked if a not in row.piece.stack))
                    site = self.site(piece, "product", eqn, path, node, operand, axes[i], "times")
                    self.late.append(Late(row, site, node))
                elif row.kind == "constant":
                    self.tangle([row.piece.leaf], eqn, "it is multiplied with a constant before it meets the data")
                elif row.kind == "made" and set(free) - set(over) and not scores:
                    for axis in over:
                        self.tangle([row.piece.leaf], eqn, WEIGHTED, axis)

    def dot(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        return self.product(eqn, inputs, path, "product", (prim.dot_axes(eqn, 0), prim.dot_axes(eqn, 1)))

    def convolution(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        if inputs[0].leaves():
            self.tangle(inputs[0].leaves(), eqn, "it is the image of a convolution, not its kernel")
            if inputs[1].leaves():
                self.tangle(inputs[1].leaves(), eqn, "it meets another parameter, the image of the convolution")
            return [Value(node=self.node(eqn.primitive.name, path, eqn.outvars[0], (), "nonlinear"))]
        axes = prim.conv_axes(eqn)
        return self.product(eqn, inputs, path, "convolution", (prim.Contraction((), (), ()), axes))

    def gather(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        table, indices = inputs[0], inputs[1]
        if indices.leaves():
            self.tangle(indices.leaves(), eqn, "it is an index")
        if not table.pieces or indices.node is None:
            data = table.node is not None or indices.node is not None
            return self.activation(eqn, inputs, path) if data else [parameters(eqn, inputs)]
        return self.looked_up(eqn, inputs, path, prim.gather_axes(eqn), prim.gather_output(eqn))

    def looked_up(
        self, eqn: Any, inputs: list[Value], path: tuple[int, ...], axes: prim.Contraction, places: Sequence[tuple[int, ...]]
    ) -> list[Value]:
        """Rows of a parameter that the data choose; `places` are the axes of the table for each axis of the result."""
        chosen = tuple(dict.fromkeys(value.node for value in inputs if value.node is not None))
        node = self.node(eqn.primitive.name, path, eqn.outvars[0], chosen, "linear")
        rows = []
        for piece in inputs[0].pieces:
            self.sites.append(self.site(piece, "lookup", eqn, path, node, chosen[0], axes, "times"))
            kept = tuple(union(piece.axes[a] for a in old if a not in axes.contracted) for old in places)
            rows.append(Row(piece._replace(axes=kept, looked=union(piece.axes[a] for a in axes.contracted)), "lookup", node))
        return [Value(node=node, rows=tuple(rows))]

    # Control flow ---------------------------------------------------------------------------------------------------

    def scan(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        n_consts, n_carry, body = eqn.params["num_consts"], eqn.params["num_carry"], prim.closed(eqn.params["jaxpr"])
        consts = [reuse(value)._replace(scalar=value.scalar, rows=passed_on(value, False)) for value in inputs[:n_consts]]
        rows = [self.slice_of(v, eqn, var, path) for v, var in zip(inputs[n_consts + n_carry :], body.jaxpr.invars[n_consts + n_carry :])]

        def step(carry: list[Value]) -> list[Value]:
            return self.jaxpr(body, [*consts, *carry, *rows], (*path, 0))

        outside, self.repeats = self.repeats, self.repeats * eqn.params["length"]
        entering, results = self.fixed_point(step, inputs[n_consts : n_consts + n_carry], body.jaxpr.invars[n_consts:], eqn, path)
        self.repeats = outside
        stacked = [self.stacked(value, eqn, var, path) for value, var in zip(results[n_carry:], eqn.outvars[n_carry:])]
        return self.after(entering, results[:n_carry], eqn, path) + stacked

    def while_loop(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        n_cond, n_body, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"], prim.closed(eqn.params["body_jaxpr"])
        consts = [reuse(v)._replace(scalar=v.scalar, rows=passed_on(v, False)) for v in inputs[n_cond : n_cond + n_body]]

        def step(carry: list[Value]) -> list[Value]:
            return self.jaxpr(body, [*consts, *carry], (*path, 1))

        entering, results = self.fixed_point(step, inputs[n_cond + n_body :], body.jaxpr.invars[n_body:], eqn, path)
        return self.after(entering, results, eqn, path)

    def fixed_point(self, step: Any, start: list[Value], variables: Sequence[Any], eqn: Any, path: tuple[int, ...]) -> Any:
        """The carry of a loop whose kinds no longer change from one step to the next, and the results of that step."""
        carry = [reuse(value) for value in start]
        for _ in range(2 + len(start)):
            marks = len(self.nodes), len(self.sites), len(self.unresolved), len(self.late)
            entering = [self.entering(value, eqn, var, path) for value, var in zip(carry, variables)]
            results = step(entering)
            joined = [join(a, b) for a, b in zip(carry, results)]
            if joined == carry:
                return entering, results
            del self.nodes[marks[0] :], self.sites[marks[1] :], self.unresolved[marks[2] :], self.late[marks[3] :]
            # A parameter that becomes an activation in the loop (a learned first state) meets the data where the loop begins.
            for i, (before, var) in enumerate(zip(carry, variables)):
                if before.leaves() and joined[i].node is not None:
                    joined[i] = self.learned(before, eqn, var, path)
            carry = joined
        raise AssertionError("the kinds of a loop's carry only ever grow, and did not settle")

    def entering(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        if value.node is None:
            return reuse(value) if value.leaves() else Value()
        return Value(node=self.node("carry", path, var, () if value.node < 0 else (value.node,), "linear"))

    def after(self, entering: list[Value], results: list[Value], eqn: Any, path: tuple[int, ...]) -> list[Value]:
        left = list(results)
        for i, (before, value) in enumerate(zip(entering, results)):
            if before.node is not None and value.node is not None:
                left[i] = Value(node=self.node("carried", path, eqn.outvars[i], (value.node,), "linear"))
                self.nodes[before.node] = self.nodes[before.node]._replace(next=left[i].node)
        return left

    def slice_of(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        if value.node is not None:
            return Value(node=self.node("row", path, var, (value.node,), "linear"), rows=passed_on(value, True))
        return sliced(value, path)

    def stacked(self, value: Value, eqn: Any, var: Any, path: tuple[int, ...]) -> Value:
        if value.node is not None:
            return Value(node=self.node("rows", path, var, (value.node,), "linear"))
        return unsliced(value, path)

    def cond(self, eqn: Any, inputs: list[Value], path: tuple[int, ...]) -> list[Value]:
        self.tangle(inputs[0].leaves(), eqn, "it decides which branch runs")
        branches = [self.jaxpr(prim.closed(b), inputs[1:], (*path, i)) for i, b in enumerate(eqn.params["branches"])]
        chosen = inputs[0].node
        results = []
        for values, var in zip(zip(*branches), eqn.outvars):
            joined = reduce(join, values)
            nodes = tuple(dict.fromkeys(value.node for value in values if value.node is not None))
            if nodes or chosen is not None:
                constant = any(value.is_constant and not value.is_zero for value in values)
                how = "nonlinear" if chosen is not None else "affine" if constant else "linear"
                node = self.node("cond", path, var, nodes if chosen is None else (*nodes, chosen), how)
                for value in values:
                    if value.node is None and value.leaves():
                        self.elementwise_site(value, eqn, path, node, None, "plus")
                joined = Value(node=node)
            results.append(joined)
        return results
