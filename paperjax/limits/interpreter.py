"""The infinite-width interpreter: from the traces of a network at two widths to the values of `paperjax.limits.nodes`.

An axis grows if its sizes in the two traces differ. Each rule below says what a primitive does to representatives; what no rule covers
is an error that names the primitive.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from paperjax.limits import contractions as con
from paperjax.limits import nodes as nd
from paperjax.limits import moves as st
from paperjax.limits.loops import Loop
from paperjax.limits.elementwise import broadcasting, elementwise
from paperjax.limits.nodes import Axes, Det, Node, Wide, axis_of, coordinates
from paperjax.limits.views import View, whole
from paperjax.trace import primitives as prim


class Spread(NamedTuple):
    """A leaf repeated along new axes; `view` has axes of size 1 there."""

    view: View
    axes: Axes


Value = Any
"""A `Node`, a `View`, or a `Spread`."""

IN_PLACE = (*prim.IN_PLACE, "optimization_barrier", "device_put", "sharding_constraint")
SHORT, LONGEST = 6, 64
"""Steps of a scan that are unrolled where they might be a recursion, and where they must."""


class Unread(NamedTuple):
    """A value that nothing may use; `why` it is none."""

    why: str


def con_wide(node: Node, like: Node) -> Wide:
    """What a step ends with, with the axes of what it began with."""
    made = st.as_wide(node)
    if made.shape != like.shape:
        raise NotImplementedError(f"a scan over depth that carries a value of shape {like.shape} and leaves one of shape {made.shape}.")
    return made


class Interpreter:
    """One network.

    Parameters
    ----------
    laws
        Of each leaf, by number.
    """

    def __init__(self, laws: Sequence[con.LeafLaw]) -> None:
        self.laws = laws
        self.shared: set[int] = set()
        """Leaves that all coordinates share (a learned scalar): what training does to them stays random."""
        self.kept_alive: list[object] = []
        self.noises: list[tuple[str, Det]] = []
        """What the law of large numbers neglects, where it is used."""

    def network(self, jaxpr: jex.ClosedJaxpr, other: jex.ClosedJaxpr, leaves: int) -> list[Value]:
        """The results of ``apply`` of an example with a batch axis of size 1, its leaves first."""
        pairs = list(zip(jaxpr.jaxpr.invars, other.jaxpr.invars))
        inputs: list[Value] = [whole(i, a.aval.shape, b.aval.shape) for i, (a, b) in enumerate(pairs[:leaves])]
        (x, y) = pairs[-1]
        inputs.append(Det(tuple(axis_of(n, m) for n, m in zip(x.aval.shape, y.aval.shape))))
        return self.jaxpr(jaxpr, other, inputs)

    def jaxpr(self, jaxpr: jex.ClosedJaxpr, other: jex.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        one, two = jaxpr.jaxpr, other.jaxpr
        values: dict[Any, Value] = dict(zip(one.invars, inputs))
        for var, a, b in zip(one.constvars, jaxpr.consts, other.consts):
            values[var] = constant(a, np.shape(b))

        def read(atom: Any) -> Value:
            return constant(atom.val, np.shape(atom.val)) if isinstance(atom, jex.Literal) else values[atom]

        if [e.primitive.name for e in one.eqns] != [e.primitive.name for e in two.eqns]:
            raise NotImplementedError("the trace of the network changes with its width (a Python loop over a number that grows).")
        for eqn, twin in zip(one.eqns, two.eqns):
            try:
                outputs = self.equation(eqn, twin, [read(atom) for atom in eqn.invars])
            except NotImplementedError as error:
                if getattr(error, "primitive", None) is None:
                    error.primitive = eqn.primitive.name  # type: ignore[attr-defined]
                raise
            values.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in one.outvars]

    def equation(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        inner = prim.called(eqn)
        if inner is not None:
            called = prim.called(twin)
            assert called is not None
            return self.jaxpr(inner, called, operands)
        if name == "scan":
            return self.scan(eqn, twin, operands)
        if name in ("split",):
            return self.split(eqn, twin, operands[0])
        sizes, others = (tuple(e.outvars[0].aval.shape) for e in (eqn, twin))
        rule = getattr(self, f"do_{name.replace('-', '_')}", None)
        if name in IN_PLACE:
            return [self.converted(eqn, operands[0]) if name == "convert_element_type" else operands[0]]
        if rule is not None:
            return [rule(eqn, twin, operands, sizes, others)]
        if name in prim.ELEMENTWISE:
            return [self.elementwise(eqn, operands, sizes, others)]
        return self.known(eqn, twin, operands)

    # Leaves.

    def node(self, value: Value, like: Axes | None = None) -> Node:
        """A value that is no leaf any more."""
        if isinstance(value, Node):
            return value
        if isinstance(value, View):
            made = con.activated(value, self.laws[value.leaf], like)
            if isinstance(made, Det):
                self.shared.add(value.leaf)
            return made
        if isinstance(value, Unread):
            raise NotImplementedError(f"{value.why} is used.")
        made = self.node(value.view, like)
        axes = tuple(b if not a else a for a, b in zip(made.axes, like or value.axes))
        shape = nd.rep_shape(axes)
        return made if shape == made.shape and axes == made.axes else st.apply(made, st.Moved(axes, lambda a: jnp.broadcast_to(a, shape)))

    def nodes(self, values: Sequence[Value]) -> list[Node]:
        return [self.node(value) for value in values]

    def settled(self, node: Node, where: str) -> Node:
        """A value that is used as deterministic: what that neglects is to be looked at."""
        if isinstance(node, Det) and node.noise is not None:
            self.noises.append((where, node.noise))
            return dataclasses.replace(node, noise=None)
        return node

    # Entry by entry.

    def converted(self, eqn: Any, value: Value) -> Value:
        target = eqn.params["new_dtype"]
        if isinstance(value, (View, Spread)) or jnp.issubdtype(target, jnp.floating) == _floating(eqn.invars[0]):
            return value if isinstance(value, (View, Spread)) or jnp.issubdtype(target, jnp.floating) else self._cast(value, target)
        return self._cast(value, target)

    def _cast(self, node: Node, target: Any) -> Node:
        def cast(a: Any) -> Any:
            return jnp.asarray(a).astype(jnp.zeros(()).dtype if jnp.issubdtype(target, jnp.floating) else target)

        return elementwise("convert_element_type", cast, [node], node.axes)

    def elementwise(self, eqn: Any, operands: list[Value], sizes: tuple[int, ...], others: tuple[int, ...]) -> Value:
        name = eqn.primitive.name
        leaf = [i for i, value in enumerate(operands) if isinstance(value, (View, Spread))]
        if len(leaf) == 1 and name in ("mul", "div", "neg"):
            (i,) = leaf
            number = -1.0 if name == "neg" else _number(operands[1 - i])
            if number is not None and not (name == "div" and i == 1):
                factor = 1 / number if name == "div" else number
                view = operands[i]
                return view._replace(view=view.view.times(factor)) if isinstance(view, Spread) else view.times(factor)
        like = unified([value.axes for value in operands if len(value.axes) == len(sizes)], sizes, others)
        given = [self.node(value, like if len(value.axes) == len(sizes) else None) for value in operands]
        if name not in ("add", "add_any", "sub", "neg", "mul", "div") or (name == "div" and isinstance(given[1], Det)):
            given = [node if name == "div" and i == 0 else self.settled_unless_number(node, name) for i, node in enumerate(given)]
        made = elementwise(name, broadcasting(eqn), [aligned(node, like) for node in given], like)
        return made

    def settled_unless_number(self, node: Node, where: str) -> Node:
        return node if isinstance(node, Det) and node.const is not None and node.noise is None else self.settled(node, where)

    # Structure.

    def do_transpose(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        permutation = eqn.params["permutation"]
        if isinstance(operands[0], View):
            return operands[0].transposed(permutation)
        node = self.node(operands[0])
        return st.apply(node, st.transpose(node.axes, permutation))

    def do_reshape(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        if isinstance(operands[0], View):
            made = operands[0].reshaped(sizes, others)
            if made is not None:
                return made
        node = self.node(operands[0])
        return st.apply(node, st.reshape(node.axes, sizes, others))

    def do_broadcast_in_dim(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        places = eqn.params["broadcast_dimensions"]
        value = operands[0]
        if isinstance(value, View):
            view = value.with_axes([places.index(i) if i in places else None for i in range(len(sizes))])
            same = all(nd.full_size(axis) == (n, m) for axis, n, m in zip(view.axes, sizes, others))
            return view if same else Spread(view, tuple(axis_of(n, m) if not a else a for a, n, m in zip(view.axes, sizes, others)))
        node = self.node(value)
        return st.apply(node, st.broadcast(node.axes, sizes, others, places))

    def do_squeeze(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        gone = [d % len(operands[0].axes) for d in eqn.params["dimensions"]]
        return self.kept(operands[0], [i for i in range(len(operands[0].axes)) if i not in gone])

    def do_expand_dims(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        old = iter(range(len(operands[0].axes)))
        return self.kept(operands[0], [None if i in eqn.params["dimensions"] else next(old) for i in range(len(sizes))])

    def kept(self, value: Value, keep: list[int | None]) -> Value:
        if isinstance(value, View):
            return value.with_axes(keep)
        node = self.node(value)
        return st.apply(node, st.drop(node.axes, keep))

    def do_slice(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
        steps = eqn.params["strides"] or (1,) * len(starts)
        return self.cut(operands[0], starts, stops, steps, others)

    def cut(self, value: Value, starts: Any, stops: Any, steps: Any, others: Any) -> Value:
        if isinstance(value, View):
            view: View | None = value
            for i, (a, b, c, m) in enumerate(zip(starts, stops, steps, others)):
                if view is not None and len(range(a, b, c)) != nd.full_size(view.axes[i])[0]:
                    view = view.sliced(i, a, b, c, m)
            if view is not None:
                return view
        return st.cut(self.node(value), tuple(starts), tuple(stops), tuple(steps), tuple(others))

    def split(self, eqn: Any, twin: Any, value: Value) -> list[Value]:
        axis, parts, start = eqn.params["axis"], [], 0
        shape = tuple(nd.full_size(a)[0] for a in value.axes)
        for size, out, like in zip(eqn.params["sizes"], eqn.outvars, twin.outvars):
            starts = tuple(start if i == axis else 0 for i in range(len(shape)))
            stops = tuple(start + size if i == axis else n for i, n in enumerate(shape))
            parts.append(self.cut(value, starts, stops, (1,) * len(shape), tuple(like.aval.shape)))
            start += size
        return parts

    def do_dynamic_slice(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        numbers = [_number(index) for index in operands[1:]]
        if any(number is None for number in numbers):
            return self.known(eqn, twin, operands)[0]
        full = [nd.full_size(axis)[0] for axis in operands[0].axes]
        starts = [int(np.clip(int(a), 0, n - k)) for a, n, k in zip(numbers, full, sizes)]  # type: ignore[arg-type]
        return self.cut(operands[0], starts, [a + k for a, k in zip(starts, sizes)], (1,) * len(sizes), others)

    def do_concatenate(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        return st.concatenate([self.settled(self.node(value), "concatenate") for value in operands], eqn.params["dimension"])

    def do_pad(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        if _number(operands[1]) != 0:
            return self.known(eqn, twin, operands)[0]
        node = self.node(operands[0])
        return st.apply(node, st.pad(node.axes, eqn.params["padding_config"], sizes, others))

    def do_rev(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        node = self.node(operands[0])
        return st.apply(node, st.reverse(node.axes, eqn.params["dimensions"]))

    def do_iota(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        if eqn.params["shape"] != twin.params["shape"]:
            raise NotImplementedError("numbers that count along a growing axis (a table of frequencies): coordinates are not alike.")
        return self.known(eqn, twin, operands)[0]

    # Sums and products.

    def do_reduce_sum(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        return st.reduce_sum(self.node(operands[0]), eqn.params["axes"])

    def do_cumsum(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        node = self.node(operands[0])
        axis = eqn.params["axis"]
        if coordinates(node.axes[axis]) > 1:
            raise NotImplementedError("a running sum along a growing axis.")
        fn = broadcasting(eqn)
        return st.apply(node, st.Moved(node.axes, fn, False))

    def do_reduce_window_sum(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        node, window = self.node(operands[0]), eqn.params["window_dimensions"]
        if any(n > 1 and coordinates(axis) > 1 for n, axis in zip(window, node.axes)):
            raise NotImplementedError("pooling along a growing axis.")
        after = tuple(a if k == 1 else axis_of(n, m) for a, k, n, m in zip(node.axes, window, sizes, others))
        return st.apply(node, st.Moved(after, broadcasting(eqn), False))

    def do_dot_general(self, eqn: Any, twin: Any, operands: list[Value], *_: Any) -> Value:
        contracted, batch = eqn.params["dimension_numbers"]
        left, right = operands
        leaves = [isinstance(value, View) for value in operands]
        if all(leaves):
            raise NotImplementedError("a product of two leaves (a low-rank or a generated weight): its entries are not independent.")
        if any(leaves):
            node, view = (right, left) if leaves[0] else (left, right)
            numbers = (contracted[::-1], batch[::-1]) if leaves[0] else (contracted, batch)
            return con.dot_leaf(self.settled(self.node(node), "dot_general"), view, numbers, leaves[0], self.laws[view.leaf])
        u, v = self.nodes(operands)
        if isinstance(u, Wide) != isinstance(v, Wide):
            u, v = self.settled(u, "dot_general"), self.settled(v, "dot_general")
        return con.dot_values(u, v, (contracted, batch))

    def do_conv_general_dilated(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        if not isinstance(operands[1], View):
            raise NotImplementedError("a convolution with something that is no leaf.")
        view = operands[1]
        node = self.settled(self.node(operands[0]), "convolution")
        return con.conv(node, view, eqn.params, sizes, others, twin.params["feature_group_count"], self.laws[view.leaf])

    def do_gather(self, eqn: Any, twin: Any, operands: list[Value], sizes: Any, others: Any) -> Value:
        if isinstance(operands[0], View):
            index = self.settled(self.node(operands[1]), "gather")
            assert isinstance(index, Det)
            return con.lookup(operands[0], index, eqn, sizes, self.laws[operands[0].leaf])
        node, index = self.nodes(operands)
        taken, whole_sizes = eqn.params["slice_sizes"], [nd.full_size(axis)[0] for axis in node.axes]
        if not isinstance(index, Det) or any(k != n and coordinates(a) > 1 for k, n, a in zip(taken, whole_sizes, node.axes)):
            raise NotImplementedError("a gather along a growing axis.")
        here = tuple(1 if coordinates(a) > 1 else k for k, a in zip(taken, node.axes))
        numbers = eqn.params["dimension_numbers"]
        kept = iter([node.axes[i] for i in range(len(taken)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)])
        slices = {i: next(kept) for i in numbers.offset_dims}
        axes = tuple(
            slices[i] if i in slices and nd.full_size(slices[i]) == (n, m) else axis_of(n, m) for i, (n, m) in enumerate(zip(sizes, others))
        )
        fn = broadcasting(eqn, slice_sizes=here)
        if isinstance(node, Det):
            return st.det(axes, fn, node, index)
        return nd.Linear(axes, node, lambda a, i: fn(a, i), (index,), index.const is not None)

    # Everything else.

    def known(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
        """Any primitive of deterministic arrays without growing axes."""
        name = eqn.primitive.name
        given = [self.settled(node, name) for node in self.nodes(operands)]
        wide = [node for node in given if not isinstance(node, Det)]
        shapes = [(tuple(a.aval.shape), tuple(b.aval.shape)) for a, b in zip(eqn.outvars, twin.outvars)]
        along = any(coordinates(axis) > 1 for node in given for axis in node.axes)
        reducing = name in ("reduce_max", "reduce_min", "argmax", "argmin")
        if wide or (along and not (reducing and name.startswith("reduce"))) or any(n != m for n, m in shapes if not reducing):
            raise NotImplementedError(_about(name, bool(wide)))
        axes = [tuple(axis_of(n, m) for n, m in zip(*both)) for both in shapes]
        if reducing:
            left = [a for i, a in enumerate(given[0].axes) if i not in eqn.params["axes"]]
            axes = [tuple(left)]
        fn = broadcasting(eqn)
        dets = [node for node in given if isinstance(node, Det)]
        if not eqn.primitive.multiple_results:
            return [st.det(axes[0], fn, *dets) if dets else Det(axes[0], const=nd.fold(fn))]
        return [st.det(a, lambda *args, i=i: fn(*args)[i], *dets) for i, a in enumerate(axes)]

    def scan(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
        p = eqn.params
        n_consts, n_carry, length = p["num_consts"], p["num_carry"], p["length"]
        body, other = prim.closed(p["jaxpr"]), prim.closed(twin.params["jaxpr"])
        if twin.params["length"] != length:
            raise NotImplementedError("a scan whose number of steps grows with the width.")
        consts, carry, rows = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
        stacked_leaves = any(isinstance(row, View) for row in rows)
        shared_leaves = any(isinstance(c, (View, Spread)) and any(atom.grows for axis in c.axes for atom in axis) for c in consts)
        if length > SHORT and stacked_leaves and not shared_leaves:
            return self.loop(eqn, body, other, consts, carry, rows)
        if length > LONGEST:
            raise NotImplementedError(
                f"a scan of {length} steps that share their leaves, or have none: steps are then followed one by one, up to {LONGEST}."
            )
        made: list[list[Value]] = []
        order = range(length)[::-1] if p["reverse"] else range(length)
        for i in order:
            step = [self.row(row, i) for row in rows]
            outputs = self.jaxpr(body, other, [*consts, *carry, *step])
            carry = outputs[:n_carry]
            made.append(outputs[n_carry:])
        if p["reverse"]:
            made = made[::-1]
        stacked = [self.stacked([self.node(step[k]) for step in made]) for k in range(len(made[0]))] if made else []
        return [*carry, *stacked]

    def loop(self, eqn: Any, body: Any, other: Any, consts: list[Value], carry: list[Value], rows: list[Value]) -> list[Value]:
        """A scan over depth as a recursion of second moments."""
        starts = [self.settled(self.node(value), "scan") for value in carry]
        wide = [i for i, node in enumerate(starts) if isinstance(node, Wide)]
        outer = frozenset[Any]().union(*(nd.sources(c) for c in consts if isinstance(c, Wide)))
        if outer & frozenset[Any]().union(*(nd.sources(starts[i]) for i in wide)):  # type: ignore[arg-type]
            raise NotImplementedError("a scan over depth whose steps see a value that also starts it (a skip from the input to every layer).")
        steps: list[Value] = []
        dets: list[tuple[Det, Det]] = []
        for row in rows:
            if isinstance(row, View):
                steps.append(self.row(row, 0))
                continue
            node = self.settled(self.node(row), "scan")
            if not isinstance(node, Det) or node.const is None:
                raise NotImplementedError("a scan over depth whose steps read something of the data by number.")
            one = Det(node.axes[1:], lambda a: a, (Det((), const=np.zeros(())),))
            dets.append((one, Det(node.axes, const=node.const[::-1] if eqn.params["reverse"] else node.const)))
            steps.append(one)
        gaussian = {i: nd.is_gaussian(starts[i]) for i in wide}  # type: ignore[arg-type]
        while True:
            name = object()
            made = {i: nd.Carried(starts[i].axes, id(name), k, gaussian[i], frozenset({("scan", id(name), i)})) for k, i in enumerate(wide)}
            outputs = self.jaxpr(body, other, [*consts, *(made.get(i, node) for i, node in enumerate(starts)), *steps])
            ends = [self.node(value, starts[i].axes) for i, value in enumerate(outputs[: len(carry)])]
            wrong = [i for i in wide if gaussian[i] and not (isinstance(ends[i], Wide) and nd.is_gaussian(ends[i]))]  # type: ignore[arg-type]
            if not wrong:
                break
            gaussian |= dict.fromkeys(wrong, False)
        for i, (start, end) in enumerate(zip(starts, ends)):
            if isinstance(start, Det) and end is not start:
                raise NotImplementedError("a scan over depth that carries a deterministic value from step to step.")
        loop = Loop(
            tuple(made[i] for i in wide), tuple(starts[i] for i in wide),  # type: ignore[arg-type]
            tuple(con_wide(ends[i], made[i]) for i in wide), eqn.params["length"], tuple(dets),
        )  # fmt: skip
        self.kept_alive.append(name)
        own = frozenset[Any]().union(*(nd.sources(node) for node in (*loop.starts, *loop.ends)))
        results: list[Value] = [nd.Scanned(loop.carried[wide.index(i)].axes, loop, wide.index(i), gaussian[i], own) if i in wide else s
                                for i, s in enumerate(starts)]  # fmt: skip
        return [*results, *(Unread("what every step of a scan over depth returns by itself") for _ in outputs[len(carry) :])]

    def row(self, value: Value, i: int) -> Value:
        sizes = [nd.full_size(axis) for axis in value.axes]
        starts, stops = [0] * len(sizes), [n for n, _ in sizes]
        starts[0], stops[0] = i, i + 1
        one = self.cut(value, starts, stops, (1,) * len(sizes), (1, *(m for _, m in sizes[1:])))
        return self.kept(one, list(range(1, len(sizes))))

    def stacked(self, rows: list[Node]) -> Node:
        return st.concatenate([st.apply(row, st.drop(row.axes, [None, *range(len(row.axes))])) for row in rows], 0)


def constant(array: Any, other: tuple[int, ...]) -> Value:
    """A known array. What varies along a growing axis is not known to have a limit."""
    array = np.asarray(array)
    axes = tuple(axis_of(n, m) for n, m in zip(array.shape, other))
    growing = [i for i, axis in enumerate(axes) if any(atom.grows for atom in axis)]
    for i in growing:
        first = array.take([0], i)
        if not np.all(array == first):
            raise NotImplementedError(f"a table of numbers of shape {array.shape} that vary along a growing axis: coordinates are not alike.")
        array = first
    if array.dtype == np.float32 or array.dtype.kind == "V":
        array = array.astype(np.float64)
    return Det(axes, const=array)


def _number(value: Value) -> float | None:
    return value.number if isinstance(value, Det) else None


def _floating(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def unified(axes: Sequence[Axes], sizes: tuple[int, ...], others: tuple[int, ...]) -> Axes:
    """The axes of operands that meet entry by entry."""
    made = []
    for i, (n, m) in enumerate(zip(sizes, others)):
        options = [a[i] for a in axes if nd.full_size(a[i]) == (n, m)]
        # Independent coordinates stay so; of an axis of several parts the parts say more than their product.
        options.sort(key=lambda axis: (any(atom.kind == "iid" for atom in axis), len(axis)))
        made.append(options[-1] if options else axis_of(n, m))
    return tuple(made)


def aligned(node: Node, axes: Axes) -> Node:
    """A value whose axes are those of `axes` or scalars: entries that vary along an axis of independent coordinates are refused."""
    if len(node.axes) != len(axes) or node.axes == axes:
        return node
    shape = nd.rep_shape(axes)
    if isinstance(node, Det):
        if node.const is not None:
            array = node.const
            for i, (n, m) in enumerate(zip(array.shape, shape)):
                if n != m and m == 1:
                    first = array.take([0], i)
                    if not np.all(array == first):
                        raise NotImplementedError("numbers that differ from one independent coordinate (output, head) to the next.")
                    array = first
            if array.shape == shape or all(n in (1, m) for n, m in zip(array.shape, shape)):
                return Det(axes, const=np.broadcast_to(array, shape), noise=node.noise)
        if all(n in (1, m) for n, m in zip(node.shape, shape)):
            return st.same_shape(node, axes)
        raise NotImplementedError("numbers that differ from one independent coordinate (output, head) to the next.")
    if node.shape != shape:
        raise NotImplementedError("values that are followed entry by entry along an axis meet others that are independent along it.")
    return dataclasses.replace(node, axes=axes)


def _about(name: str, wide: bool) -> str:
    known = {
        "reduce_max": "the maximum over positions of wide values (max pooling) is an integral over as many fields as there are positions",
        "reduce_window_max": "max pooling is an integral over as many fields as there are positions of the window",
        "argmax": "a choice among wide values", "sort": "an ordering of wide values",
        "while": "a loop whose number of steps is known only when it runs", "cond": "a branch that the data choose",
        "random_bits": "numbers drawn in the network (dropout); switch it off",
    }  # fmt: skip
    return known.get(name, "what this primitive does at infinite width is not known here" + ("" if wide else ", along a growing axis"))

