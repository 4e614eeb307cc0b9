"""The infinite-width interpreter: from the traces of a network at two widths to the values of `paperjax.limits.nodes`.

An axis grows if its sizes in the two traces differ. Each rule below says what a primitive does to representatives; what no rule covers
is an error that names the primitive.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from paperjax.limits import contractions as con
from paperjax.limits import fields as fl
from paperjax.limits import joined
from paperjax.limits import maxima as mx
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.by_hand import other_derivative
from paperjax.limits.dependence import refuse_shared
from paperjax.limits.elementwise import FOLLOWED, JUMPS, at_jump, broadcasting, elementwise, relative
from paperjax.limits.loops import Loop
from paperjax.limits.nodes import Axes, Det, Node, axis_of, coordinates
from paperjax.limits.rounded import unrounded
from paperjax.limits.rules import RULES, split, unstack
from paperjax.limits.scans import scan
from paperjax.limits.structure import Numbers
from paperjax.limits.values import Joined, Spread, Unread, Value, number_of
from paperjax.limits.views import View, whole
from paperjax.trace import primitives as prim

ORDER = (
    "an ordering of wide values. Along a growing axis it makes order statistics, which are not independent coordinates any more (to keep "
    "the largest portion of them, compare with a threshold that is a number); along a finite one each is a function of as many fields at "
    "once as there are values. Two are ordered by jnp.minimum and jnp.maximum, which have a limit"
)
IN_PLACE = (*prim.IN_PLACE, "optimization_barrier", "device_put", "sharding_constraint")


class Interpreter:
    """One network.

    Parameters
    ----------
    laws
        Of each leaf, by number.
    draws
        Whether what has no exact rule is to be drawn by Monte Carlo.
    """

    def __init__(self, laws: Sequence[con.LeafLaw], draws: bool = False) -> None:
        self.laws, self.draws, self.rounded = laws, draws, False
        self.shared: set[int] = set()
        """Leaves that all coordinates share (a learned scalar): what training does to them stays random."""
        self.by_hand: dict[str | None, None] = {}
        """Functions of wide values, in turn, whose derivative was written by hand and is another than theirs."""
        self.stopped: set[int | None] = set()
        """Leaves at which a gradient is stopped; ``None`` for values made of them."""
        self.alike, self.derivatives = Numbers(), dict[int, str | None]()
        self.literals, self.computed = dict[int, Value](), dict[Any, tuple[list[Value], list[Value]]]()
        """What is the same is one value: two fields that are equal, or multiples, have no density."""
        self.entries: dict[Any, nd.Entries] = {}
        self.kept_alive: list[object] = []
        self.noises: list[tuple[str, Det, tuple[Loop, ...]]] = []
        """What the law of large numbers neglects, where it is used, and the scans that it is inside of, from the outermost."""

    def network(self, jaxpr: jex.ClosedJaxpr, other: jex.ClosedJaxpr, leaves: int) -> list[Value]:
        """The results of ``apply`` of an example with a batch axis of size 1, its leaves first."""
        pairs = list(zip(jaxpr.jaxpr.invars, other.jaxpr.invars))
        # Traced in single precision.
        self.rounded = any(aval.dtype == jnp.float32 for aval in jaxpr.in_avals)
        inputs: list[Value] = [self._leaf(i, a.aval, b.aval) for i, (a, b) in enumerate(pairs[:leaves])]
        (x, y) = pairs[-1]
        inputs.append(Det(tuple(axis_of(n, m) for n, m in zip(x.aval.shape, y.aval.shape))))
        return self.jaxpr(jaxpr, other, inputs)

    def jaxpr(self, jaxpr: jex.ClosedJaxpr, other: jex.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Values of the results of a function, given those of its arguments."""
        one, two = jaxpr.jaxpr, other.jaxpr
        values: dict[Any, Value] = dict(zip(one.invars, inputs))
        for var, a, b in zip(one.constvars, jaxpr.consts, other.consts):
            values[var] = constant(a, tuple(b.shape) if hasattr(b, "shape") else np.shape(b), self.rounded)

        def read(atom: Any) -> Value:
            if not isinstance(atom, jex.Literal):
                return values[atom]
            number = self.alike.literal(atom)
            if number not in self.literals:
                self.literals[number] = constant(atom.val, tuple(getattr(atom.val, "shape", ())), self.rounded)
            return self.literals[number]

        names = [[e.primitive.name for e in part.eqns] for part in (one, two)]
        if names[0] != names[1]:
            first, second = next(pair for pair in itertools.zip_longest(*names, fillvalue="nothing") if pair[0] != pair[1])
            raise NotImplementedError(
                "the trace of the network changes with its width (a Python loop over a number that grows, a branch on one): where there is "
                f"{first} at one width there is {second} at twice that."
            )
        for eqn, twin in zip(one.eqns, two.eqns):
            try:
                operands = [read(atom) for atom in eqn.invars]
                there = [self.alike.literal(atom) for atom in twin.invars if isinstance(atom, jex.Literal)]
                key = self.alike.equation(eqn), self.alike.equation(twin), tuple(map(id, operands)), tuple(there)
                if key not in self.computed:
                    # With the operands, so that no other value gets the id of one.
                    self.computed[key] = operands, self._equation(eqn, twin, operands)
                outputs = self.computed[key][1]
            except NotImplementedError as error:
                if getattr(error, "primitive", None) is None:
                    error.primitive = eqn.primitive.name  # type: ignore[attr-defined]
                raise
            values.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in one.outvars]

    def _equation(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        lost = next((value for value in operands if isinstance(value, Unread)), None)
        if lost is not None or any(jnp.issubdtype(var.aval.dtype, jax.dtypes.extended) for var in eqn.outvars):
            return [lost or Unread("a random key")] * len(eqn.outvars)
        inner = prim.called(eqn)
        if inner is not None:
            called = prim.called(twin)
            assert called is not None
            outputs = self.jaxpr(inner, called, operands)
            if any(not isinstance(value, Det) for value in operands):
                self._note_derivative(eqn)
            return outputs
        if name == "scan":
            return scan(self, eqn, twin, operands)
        if name == "cond":
            taken = self._branch(eqn, twin, operands)
            if taken is not None:
                return taken
        if name == "split":
            return split(self, eqn, twin, operands[0])
        if name == "unstack":
            return unstack(self, eqn, twin, operands[0])
        sizes, others = (tuple(e.outvars[0].aval.shape) for e in (eqn, twin))
        rule = RULES.get(name)
        if name in IN_PLACE:
            return [self._converted(eqn, operands[0]) if name == "convert_element_type" else operands[0]]
        if rule is not None:
            return [rule(self, eqn, twin, operands, sizes, others)]
        if name in prim.ELEMENTWISE:
            return [self._elementwise(eqn, operands, sizes, others)]
        return self.known(eqn, twin, operands)

    def _branch(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value] | None:
        """The branch that a number of the code takes; ``None`` where the data or a leaf choose."""
        chosen = operands[0]
        number = chosen.number if isinstance(chosen, Det) and chosen.noise is None else None
        if number is None:
            return None
        if isinstance(twin.invars[0], jex.Literal) and int(twin.invars[0].val) != int(number):
            raise NotImplementedError(
                f"the trace of the network changes with its width (a branch on one): branch {int(number)} is taken at one width, and "
                f"{int(twin.invars[0].val)} at twice that."
            )
        pairs = list(zip(eqn.params["branches"], twin.params["branches"]))
        one, two = pairs[min(max(int(number), 0), len(pairs) - 1)]
        return self.jaxpr(prim.closed(one), prim.closed(two), operands[1:])

    def _note_derivative(self, eqn: Any) -> None:
        # Each call of one function is an equation of its own: of equal ones one is looked at.
        number = self.alike.equation(eqn)
        if number not in self.derivatives:
            self.derivatives[number] = other_derivative(eqn)
        if self.derivatives[number] is not None:
            self.by_hand[self.derivatives[number]] = None

    # Leaves.

    def _leaf(self, i: int, aval: Any, other: Any) -> Value:
        if not jnp.issubdtype(aval.dtype, jnp.inexact) and math.isnan(self.laws[i].variance):
            return Unread(f"{self.laws[i].path}: a count of random keys, or other whole numbers that init does not tell: what they are")
        return whole(i, aval.shape, other.shape)

    def node(self, value: Value, like: Axes | None = None, last: bool = False) -> Node:
        """A value that is no leaf any more."""
        if isinstance(value, Node):
            return value
        if isinstance(value, View):
            made = con.activated(value, self.laws[value.leaf], like, last)
            if isinstance(made, Det):
                self.shared.add(value.leaf)
            if isinstance(made, nd.Entries):
                return self._once(made)
            if isinstance(made, nd.Add) and isinstance(made.v, nd.Entries):
                return dataclasses.replace(made, v=self._once(made.v))
            return made
        if isinstance(value, Joined):
            return joined.concatenate([self.node(view) for view in value.parts], value.axis)
        if isinstance(value, Unread):
            raise NotImplementedError(f"{value.why} is used.")
        made = self.node(value.view, like, last)
        axes = tuple(a if a else b for a, b in zip(made.axes, like or value.axes))
        shape = nd.rep_shape(axes)
        return made if shape == made.shape and axes == made.axes else st.apply(made, st.Moved(axes, lambda a: jnp.broadcast_to(a, shape)))

    def _once(self, entries: nd.Entries) -> nd.Wide:
        if not entries.scale:
            return entries
        first = self.entries.setdefault((entries.axes, entries.key), entries)
        return first if first.scale == entries.scale else fl.times(first, entries.scale / first.scale)

    def nodes(self, values: Sequence[Value]) -> list[Node]:
        """Values that are no leaves any more."""
        return [self.node(value) for value in values]

    def settled(self, node: Node, where: str) -> Node:
        """A value that is used as deterministic: what that neglects is to be looked at."""
        if isinstance(node, Det) and node.noise is not None:
            self.noises.append((where, node.noise, ()))
            return dataclasses.replace(node, noise=None)
        return node

    # Entry by entry.

    def _converted(self, eqn: Any, value: Value) -> Value:
        target = eqn.params["new_dtype"]
        if isinstance(value, (View, Spread, Joined)) or jnp.issubdtype(target, jnp.floating) == _floating(eqn.invars[0]):
            return value if isinstance(value, (View, Spread, Joined)) or jnp.issubdtype(target, jnp.floating) else self.cast(value, target)
        return self.cast(value, target)

    def cast(self, node: Node, target: Any) -> Node:
        """A value in another dtype; floating-point ones are those that the kernels are computed in."""

        def cast(a: Any) -> Any:
            return jnp.asarray(a).astype(jnp.zeros(()).dtype if jnp.issubdtype(target, jnp.floating) else target)

        return elementwise("convert_element_type", cast, [node], node.axes)

    def _elementwise(self, eqn: Any, operands: list[Value], sizes: tuple[int, ...], others: tuple[int, ...]) -> Value:
        name = eqn.primitive.name
        leaf = [i for i, value in enumerate(operands) if isinstance(value, (View, Spread))]
        if len(leaf) == 1 and name in ("mul", "div", "neg"):
            (i,) = leaf
            number = -1.0 if name == "neg" else number_of(operands[1 - i])
            if number is not None and not (name == "div" and i == 1):
                if name != "neg":
                    self.settled(relative(operands[1 - i], name), name)  # type: ignore[arg-type]
                factor = 1 / number if name == "div" else number
                view = operands[i]
                return view._replace(view=view.view.times(factor)) if isinstance(view, Spread) else view.times(factor)
        like = unified([value.axes for value in operands if len(value.axes) == len(sizes)], sizes, others)
        # Where nothing grows any more (a readout), each coordinate is by itself, and what is added to it is its own. A leaf that meets
        # numbers alone (a softmax of a learned table) is shared by what it will multiply.
        last = name in ("add", "add_any", "sub") and all(
            not isinstance(value, Node) or not any(atom.grows for axis in value.axes for atom in axis) for value in operands
        )
        last = last and not any(isinstance(value, Det) for value in operands)
        given = [self.node(value, like if len(value.axes) == len(sizes) else None, last) for value in operands]
        wide = next((node for node in given if isinstance(node, nd.Wide)), None)
        if wide is not None:
            given = [self._settled_unless_number(relative(node, name, wide), name) for node in given]
        elif name not in FOLLOWED:
            looked = [self._settled_unless_number(node, name) for node in at_jump(name, given)]
            # What a jump makes of noise that fades is none.
            given = looked if name in JUMPS else given
        return elementwise(name, broadcasting(eqn), [aligned(node, like) for node in given], like, self.draws)

    def _settled_unless_number(self, node: Node, where: str) -> Node:
        return node if isinstance(node, Det) and node.const is not None and node.noise is None else self.settled(node, where)

    # Everything else.

    def known(self, eqn: Any, twin: Any, operands: list[Value]) -> list[Value]:
        """Any primitive of deterministic arrays without growing axes."""
        name = eqn.primitive.name
        given = self.nodes(operands)
        if name in ("argmax", "argmin", "sort", "top_k") and any(isinstance(node, Det) and node.noise is not None for node in given):
            raise NotImplementedError("an order of numbers that are means over a growing axis: ties are broken by how they fluctuate.")
        # The largest of several moves by no more than they do.
        noise = given[0].noise if name in ("reduce_max", "reduce_min") and isinstance(given[0], Det) else None
        given = [self.settled(node, name) for node in given]
        wide = [node for node in given if not isinstance(node, Det)]
        shapes = [(tuple(a.aval.shape), tuple(b.aval.shape)) for a, b in zip(eqn.outvars, twin.outvars)]
        along = any(coordinates(axis) > 1 for node in given for axis in node.axes)
        reducing = name in ("reduce_max", "reduce_min", "argmax", "argmin")
        if wide and name in mx.EXTREMES:
            return [mx.extreme(self, eqn, twin, given[0])]
        if wide or (along and not (reducing and name.startswith("reduce"))) or any(n != m for n, m in shapes if not reducing):
            raise NotImplementedError(_about(name, bool(wide)))
        axes = [tuple(axis_of(n, m) for n, m in zip(*both)) for both in shapes]
        if reducing:
            left = [a for i, a in enumerate(given[0].axes) if i not in eqn.params["axes"]]
            axes = [tuple(left)]
        fn = broadcasting(eqn)
        if name in ("reduce_max", "reduce_min"):
            fn = mx.sloped(fn, name, eqn.params["axes"])
        dets = [node for node in given if isinstance(node, Det)]
        if not eqn.primitive.multiple_results:
            return [st.det(axes[0], fn, *dets, noise=noise) if dets else Det(axes[0], const=nd.fold(fn))]
        return [st.det(a, lambda *args, i=i: fn(*args)[i], *dets) for i, a in enumerate(axes)]


def constant(array: Any, other: tuple[int, ...], rounded: bool = False) -> Value:
    """A known array, a number read back from its rounding where all are `rounded`. What varies along a growing axis has no known limit."""
    if jnp.issubdtype(getattr(array, "dtype", np.dtype(float)), jax.dtypes.extended):
        return Unread("a random key")
    array = np.asarray(array)
    axes = tuple(axis_of(n, m) for n, m in zip(array.shape, other))
    growing = [i for i, axis in enumerate(axes) if any(atom.grows for atom in axis)]
    for i in growing:
        first = array.take([0], i)
        if not _alike(array, first):
            raise NotImplementedError(
                f"a table of numbers of shape {array.shape} that vary along a growing axis: coordinates are not alike."
            )
        array = first
    if array.dtype == np.float32 and rounded and array.size == 1:
        array = np.full(array.shape, unrounded(array.item(), array.dtype))
    if array.dtype == np.float32 or array.dtype.kind == "V":
        array = array.astype(np.float64)
    return Det(axes, const=array)


def _alike(array: np.ndarray, first: np.ndarray) -> bool:
    """Whether all entries along an axis are its first; a NaN is one too, as `jnp.var` keeps for a variance of nothing."""
    return bool(np.all((array == first) | ((array != array) & (first != first))))


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
                    if not _alike(array, first):
                        raise NotImplementedError(st.UNLIKE)
                    array = first
            if array.shape == shape or all(n in (1, m) for n, m in zip(array.shape, shape)):
                return Det(axes, const=np.broadcast_to(array, shape), noise=node.noise)
        if all(n in (1, m) for n, m in zip(node.shape, shape)):
            return st.same_shape(node, axes)
        raise NotImplementedError(st.UNLIKE)
    assert isinstance(node, nd.Wide)
    if all(not axis or n == m for axis, n, m in zip(node.axes, node.shape, shape)) and node.shape != shape:
        nd.refuse_turned(node.axes, axes)
        return st.same(node, axes)
    if node.shape != shape:
        raise NotImplementedError(st.FOLLOWED)
    refuse_shared(node, node.axes, axes)
    nd.refuse_turned(node.axes, axes)
    return fl.relabelled(node, axes)


def _about(name: str, wide: bool) -> str:
    known = {
        "argmax": "a choice among wide values", "sort": ORDER, "top_k": ORDER,
        "while": "a loop whose number of steps is known only when it runs. Of a fixed number write lax.fori_loop between numbers",
        "cond": "a branch that is chosen when it runs, by the data or by a leaf. One that the code chooses, by a number, is followed; of "
        "entries by themselves, jnp.where takes the one or the other",
        "random_bits": "numbers drawn in the network (dropout); switch it off",
    }  # fmt: skip
    return known.get(name, "what this primitive does at infinite width is not known here" + ("" if wide else ", along a growing axis"))
