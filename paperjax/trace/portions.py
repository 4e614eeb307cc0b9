"""Axes of a leaf of which some portions grow with the width and others do not: ``concatenate([x, h]) @ W``, a split of ``h @ W``.

Two traces of one family, at two widths, are followed equation by equation side by side. Of each axis of each value it is known into which
segments it falls, how large each is at both widths, and which entries of which leaf it runs over. A leaf one portion of which is summed
over with what grows and another with what does not is hidden and input at once, and no one law of initialization serves both.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jax.extend import core as jex

from paperjax.trace import primitives as prim
from paperjax.trace.interpret import wiring_of
from paperjax.trace.segments import (
    CONST,
    MADE,
    ZERO,
    Axis,
    Segment,
    Source,
    Val,
    concatenated,
    fresh,
    joined,
    reshaped,
    sliced,
    strided,
    together,
)  # fmt: skip
from paperjax.trace.values import known_number


class Range(NamedTuple):
    """Entries of a leaf's axis: the first, and how many, each at the larger and at the smaller width."""

    start: tuple[Fraction, Fraction]
    size: tuple[Fraction, Fraction]

    @property
    def grows(self) -> bool:
        """Whether they become more with the width."""
        return self.size[0] != self.size[1]

    def holds(self, other: "Range") -> bool:
        """Whether another is a proper part of it."""
        ends = [a.start[0] + a.size[0] for a in (self, other)]
        return self != other and self.start[0] <= other.start[0] and ends[1] <= ends[0]


class Portions(NamedTuple):
    """An axis of a leaf whose portions do not all grow, used as `part` (``"inside"`` or ``"out"``)."""

    leaf: int
    axis: int
    part: str
    ranges: tuple[Range, ...]


def unlike_portions(here: jex.ClosedJaxpr, there: jex.ClosedJaxpr, n_leaves: int) -> tuple[Portions, ...]:
    """Axes of leaves some portions of which grow from one trace to the other, and some do not.

    Parameters
    ----------
    here, there
        The traces of ``apply`` at the larger and at the smaller width.
    n_leaves
        How many of the inputs are leaves.

    Returns
    -------
    tuple
        Nothing where the traces are not wired alike: then it cannot be told.
    """
    if here is there or wiring_of(here) != wiring_of(there):
        return ()
    follower = _Follower()
    inputs = []
    for i, (a, b) in enumerate(zip(here.jaxpr.invars, there.jaxpr.invars)):
        shapes = tuple(zip(_shape(a), _shape(b)))
        if i >= n_leaves:
            inputs.append(fresh(shapes, MADE, True))
            continue
        axes = []
        for axis, (n, m) in enumerate(shapes):
            of = frozenset({Source(i, axis, (Fraction(0), Fraction(0)), (Fraction(1), Fraction(1)))} if n != m else ())
            axes.append((Segment(n, m, MADE, of),))
        inputs.append(Val(MADE, False, tuple(axes)))
    try:
        follower.jaxpr(here, there, inputs)
    except _UnlikeError:
        return ()
    found = []
    for (leaf, axis, part), ranges in sorted(follower.ranges.items()):
        if part == "out":
            # All of it is what there is to be cut.
            back = follower.rejoined.get((leaf, axis), set())
            ranges = {r for r in ranges if r.grows or not _covered(r, back)}
            ranges = {r for r in ranges if not any(r.holds(other) for other in ranges)}
        if any(r.grows for r in ranges) and not all(r.grows for r in ranges):
            found.append(Portions(leaf, axis, part, tuple(sorted(ranges))))
    return tuple(found)


class _UnlikeError(Exception):
    """The two traces are not alike after all."""


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _shapes(a: Any, b: Any) -> tuple[tuple[int, int], ...]:
    if len(_shape(a)) != len(_shape(b)):
        raise _UnlikeError
    return tuple(zip(_shape(a), _shape(b)))


class _Follower:
    def __init__(self) -> None:
        self.ranges: dict[tuple[int, int, str], set[Range]] = {}
        self.rejoined: dict[tuple[int, int], set[Range]] = {}

    def record(self, axis: Axis, part: str) -> None:
        for segment in axis:
            for s in segment.sources if segment.kind != ZERO else ():
                self.ranges.setdefault((s.leaf, s.axis, part), set()).add(_range(segment, s))

    def jaxpr(self, here: jex.ClosedJaxpr, there: jex.ClosedJaxpr, inputs: Sequence[Val]) -> list[Val]:
        values: dict[Any, Val] = {}
        if len(here.jaxpr.eqns) != len(there.jaxpr.eqns) or len(here.jaxpr.constvars) != len(there.jaxpr.constvars):
            raise _UnlikeError
        for a, b, const in zip(here.jaxpr.constvars, there.jaxpr.constvars, here.consts):
            values[a] = fresh(_shapes(a, b), _kind(const), False)
        values.update(zip(here.jaxpr.invars, inputs))

        def read(atom: Any) -> Val:
            return fresh((), _kind(atom.val), False) if isinstance(atom, jex.Literal) else values[atom]

        for a, b in zip(here.jaxpr.eqns, there.jaxpr.eqns):
            values.update(zip(a.outvars, self.equation(a, b, [read(atom) for atom in a.invars])))
        return [read(atom) for atom in here.jaxpr.outvars]

    def equation(self, a: Any, b: Any, inputs: list[Val]) -> list[Val]:
        name = a.primitive.name
        shapes = [_shapes(x, y) for x, y in zip(a.outvars, b.outvars)]
        ours, theirs = prim.called(a), prim.called(b)
        if ours is not None and theirs is not None:
            return self.jaxpr(ours, theirs, inputs)
        special = {"scan": self.scan, "while": self.while_loop, "cond": self.cond, "dot_general": self.dot, "concatenate": self.concatenate,
                   "conv_general_dilated": self.convolution, "slice": self.slice, "split": self.split}.get(name)  # fmt: skip
        if special is not None:
            return special(a, b, inputs, shapes)
        kind, data = max((v.kind for v in inputs), default=CONST), any(v.data for v in inputs)
        out = shapes[0]
        if name == "transpose":
            axes = tuple(inputs[0].axes[axis] for axis in a.params["permutation"])
        elif name in ("broadcast_in_dim", "expand_dims", "squeeze", "reshape"):
            axes = reshaped(a, b, inputs[0], out)
        elif name == "stack":
            new = int(a.params["axis"]) % len(out)
            rest = together(inputs, [*out[:new], *out[new + 1 :]], False)
            axes = (*rest[:new], (Segment(*out[new], kind, frozenset()),), *rest[new:])
        elif name == "unstack":
            along = int(a.params["axis"]) % len(inputs[0].axes)
            return [Val(kind, data, (*inputs[0].axes[:along], *inputs[0].axes[along + 1 :])) for _ in shapes]
        elif name == "pad":
            axes = _padded(a, b, inputs, out)
        elif name == "gather":
            axes = tuple(_kept(inputs[0].axes, old, size, kind) for old, size in zip(prim.gather_output(a), out))
        elif name.startswith(("reduce_", "arg")) and "axes" in a.params and len(a.outvars) == 1:
            left = [axis for i, axis in enumerate(inputs[0].axes) if i not in set(map(int, a.params["axes"]))]
            axes = tuple(left) if len(left) == len(out) else fresh(out, kind, data).axes
        else:
            # Entry by entry, and along some axes perhaps not.
            mixed, whole = {axis for _, axis in prim.mixed_axes(a)}, [v for v in inputs if v.axes]
            found = [list(together(whole, size, name == "mul")) for size in shapes]
            for axes, size in zip(found, shapes):
                for axis in mixed & set(range(len(size))):
                    axes[axis] = (Segment(*size[axis], kind, frozenset()),)
            return [Val(kind, data, tuple(axes)) for axes in found]
        return [Val(kind, data, axes)]

    # Where axes are cut, put together and summed over -----------------------------------------------------------------

    def slice(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        axes = []
        strides = a.params["strides"] or (1,) * len(shapes[0])
        for i, axis in enumerate(inputs[0].axes):
            start = a.params["start_indices"][i], b.params["start_indices"][i]
            spread = strided(axis, shapes[0][i], strides[i]) if strides[i] > 1 else None
            axes.append(spread or self.part_of(axis, start, shapes[0][i], inputs[0], strides[i] == 1))
        return [inputs[0]._replace(axes=tuple(axes))]

    def split(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        along, start, found = int(a.params["axis"]), (0, 0), []
        for out in shapes:
            axis = self.part_of(inputs[0].axes[along], start, out[along], inputs[0], True)
            found.append(inputs[0]._replace(axes=(*inputs[0].axes[:along], axis, *inputs[0].axes[along + 1 :])))
            start = start[0] + out[along][0], start[1] + out[along][1]
        return found

    def part_of(self, axis: Axis, start: tuple[int, int], size: tuple[int, int], of: Val, dense: bool) -> Axis:
        if start == (0, 0) and size == (sum(s.n for s in axis), sum(s.m for s in axis)):
            return axis
        found = sliced(axis, start, size) if dense else None
        if found is None:
            return (Segment(*size, of.kind, frozenset()),)
        if of.data:
            self.record(found, "out")
        return found

    def concatenate(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        along = int(a.params["dimension"])
        axes = list(together(inputs, shapes[0], False, along))
        whole, rejoined = concatenated([v.axes[along] for v in inputs])
        for segment, source in rejoined:
            self.rejoined.setdefault((source.leaf, source.axis), set()).add(_range(segment, source))
        axes[along] = whole
        return [Val(max(v.kind for v in inputs), any(v.data for v in inputs), tuple(axes))]

    def dot(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        inside = a.params["dimension_numbers"][0]
        if inputs[0].data != inputs[1].data:
            weight = 1 if inputs[0].data else 0
            for i, k in zip(inside[weight], inside[1 - weight]):
                self.summed(inputs[weight].axes[i], inputs[1 - weight].axes[k])
            free = prim.dot_axes(a, weight).free
            self.record_free(inputs[weight], free)
        axes: dict[int, Axis] = {}
        for i, value in enumerate(inputs):
            for old, new in prim.dot_output(a, i).items():
                axes.setdefault(new, value.axes[old])
        keep = tuple(axes[i] for i in range(len(shapes[0])))
        data = any(v.data for v in inputs)
        return [Val(MADE, data, keep if data else fresh(shapes[0], MADE, False).axes)]

    def convolution(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        spec, groups = a.params["dimension_numbers"], a.params["feature_group_count"]
        image, kernel = inputs
        axes = list(fresh(shapes[0], MADE, True).axes)
        axes[spec.out_spec[0]] = image.axes[spec.lhs_spec[0]]
        out, entering = kernel.axes[spec.rhs_spec[0]], image.axes[spec.lhs_spec[1]]
        if image.data and not kernel.data:
            self.record_free(kernel, (spec.rhs_spec[0],))
            if groups == 1:
                self.summed(kernel.axes[spec.rhs_spec[1]], entering)
        each = groups > 1 and sum(s.n for s in entering) == groups == sum(s.n for s in out)
        size = (shapes[0][spec.out_spec[1]],)
        values = [Val(MADE, True, (axis,)) for axis in ((entering, out) if each else (out,))]
        axes[spec.out_spec[1]] = together(values, size, False)[0]
        return [Val(MADE, True, tuple(axes))]

    def record_free(self, weight: Val, free: Sequence[int]) -> None:
        """Free axes of a part of a leaf: columns that are taken out before the product."""
        for i in free:
            if len(weight.axes[i]) == 1:
                self.record(weight.axes[i], "out")

    def summed(self, weight: Axis, data: Axis) -> None:
        """Which entries of a leaf's axis meet which segment of the data."""
        size = sum(s.n for s in weight), sum(s.m for s in weight)
        # What is zero where the weight meets it is no portion.
        both = together([Val(MADE, False, (weight,)), Val(MADE, True, (_bare(data),))], (size,), True)[0]
        self.record(both, "inside")

    # Control flow -----------------------------------------------------------------------------------------------------

    def scan(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        n_consts, n_carry = a.params["num_consts"], a.params["num_carry"]
        bodies = prim.closed(a.params["jaxpr"]), prim.closed(b.params["jaxpr"])
        rows = [v._replace(axes=v.axes[1:]) for v in inputs[n_consts + n_carry :]]

        def step(carry: list[Val]) -> list[Val]:
            return self.jaxpr(*bodies, [*inputs[:n_consts], *carry, *rows])

        results = self.loop(step, inputs[n_consts : n_consts + n_carry])
        length = a.params["length"], b.params["length"]
        stacked = [v._replace(axes=((Segment(*length, v.kind, frozenset()),), *v.axes)) for v in results[n_carry:]]
        return [*results[:n_carry], *stacked]

    def while_loop(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        first, n = a.params["cond_nconsts"], a.params["body_nconsts"]
        bodies = prim.closed(a.params["body_jaxpr"]), prim.closed(b.params["body_jaxpr"])
        consts = inputs[first : first + n]
        return self.loop(lambda carry: self.jaxpr(*bodies, [*consts, *carry]), inputs[first + n :])

    def loop(self, step: Any, start: list[Val]) -> list[Val]:
        """The results of a step whose carry no longer changes; what was recorded on the way holds for the first steps."""
        carry, results = start, list[Val]()
        for _ in range(4):
            results = step(carry)
            after = [joined(x, y) for x, y in zip(carry, results)]
            if after == carry:
                break
            carry = after
        return results

    def cond(self, a: Any, b: Any, inputs: list[Val], shapes: list[Any]) -> list[Val]:
        branches = [self.jaxpr(prim.closed(x), prim.closed(y), inputs[1:]) for x, y in zip(a.params["branches"], b.params["branches"])]
        found = branches[0]
        for other in branches[1:]:
            found = [joined(x, y) for x, y in zip(found, other)]
        return found


def _range(segment: Segment, source: Source) -> Range:
    return Range(source.start, (segment.n * source.unit[0], segment.m * source.unit[1]))


def _covered(one: Range, ranges: set[Range]) -> bool:
    """Whether all entries of a range are in others."""
    at = one.start[0]
    for other in sorted(ranges):
        if other.start[0] <= at:
            at = max(at, other.start[0] + other.size[0])
    return at >= one.start[0] + one.size[0]


def _kind(const: Any) -> int:
    number = known_number(const)
    return ZERO if number is not None and not number else CONST


def _bare(axis: Axis) -> Axis:
    return tuple(segment._replace(sources=frozenset()) for segment in axis)


def _kept(axes: Sequence[Axis], old: Sequence[int], size: tuple[int, int], kind: int) -> Axis:
    """An axis that is one of the operand's, whole; else a new one."""
    if len(old) == 1 and (sum(s.n for s in axes[old[0]]), sum(s.m for s in axes[old[0]])) == size:
        return axes[old[0]]
    return (Segment(*size, kind, frozenset()),)


def _padded(here: Any, there: Any, inputs: list[Val], out: Sequence[tuple[int, int]]) -> tuple[Axis, ...]:
    axes = []
    for axis, size, ours, theirs in zip(inputs[0].axes, out, here.params["padding_config"], there.params["padding_config"]):
        if min(*ours[:2], *theirs[:2]) < 0 or any(n != 0 for n in (ours[2], theirs[2])):
            axes.append((Segment(*size, MADE, frozenset()),))
            continue
        low, high = ((Segment(int(ours[i]), int(theirs[i]), inputs[1].kind, frozenset()),) if ours[i] or theirs[i] else () for i in (0, 1))
        axes.append((*low, *axis, *high))
    return tuple(axes)
