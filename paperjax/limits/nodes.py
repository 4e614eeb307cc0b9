"""Values of a network at infinite width: what the interpreter of `paperjax.limits.infinite` makes of each array of the trace.

An axis that grows with the width holds independent, identically distributed coordinates, so one coordinate stands for all of them: a
value is kept as its *representative*, an array in which such axes have size 1. It is either deterministic (`Det`), a function of one
example, or wide (`Wide`): a random coordinate, a function of Gaussian fields which are jointly distributed over the finite axes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Fn = Callable[..., Any]


class Atom(NamedTuple):
    """A part of an axis, its sizes at the two widths that are traced; `kind` is ``"pos"`` (finite, followed entry by entry) or ``"iid"``.

    `turn` is empty but where parts of independent coordinates have changed places: there, the place that it had.
    """

    kind: str
    size: int
    other: int
    turn: tuple[int, ...] = ()

    @property
    def grows(self) -> bool:
        """Whether it changes with the width."""
        return self.size != self.other


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def axis_of(size: int, other: int, kind: str = "pos") -> Axis:
    """An axis of one part; one of size 1 has none, and a growing one is of independent coordinates."""
    if size == other == 1:
        return ()
    return (Atom("iid" if size != other else kind, size, other),)


def rep_size(axis: Axis) -> int:
    """The size of an axis in a representative."""
    return math.prod(atom.size for atom in axis if atom.kind == "pos")


def full_size(axis: Axis) -> tuple[int, int]:
    """The size of an axis at both widths."""
    return math.prod(atom.size for atom in axis), math.prod(atom.other for atom in axis)


def coordinates(axis: Axis) -> int:
    """How many independent coordinates run along an axis."""
    return math.prod(atom.size for atom in axis if atom.kind == "iid")


def turned(axes: Axes, permutation: Sequence[int]) -> Axes:
    """Axes in another order. Coordinates that change places with each other remember where they were."""
    if _straight(axes):
        number = iter(range(sum(map(len, axes))))
        axes = tuple(tuple(a._replace(turn=(next(number),)) if a.kind == "iid" else a for a in axis) for axis in axes)
    after = tuple(axes[i] for i in permutation)
    return tuple(tuple(a._replace(turn=()) for a in axis) for axis in after) if _straight(after) else after


def _straight(axes: Axes) -> bool:
    turns = [a.turn for axis in axes for a in axis if a.kind == "iid"]
    return turns == sorted(turns)


def refuse_turned(one: Sequence[Axis], two: Sequence[Axis]) -> None:
    """Refuse axes along which one coordinate of a value would meet another one of the other.

    Raises
    ------
    NotImplementedError
        If independent coordinates lie in different orders.
    """
    both = [(a, b) for a, b in zip(one, two) if coordinates(a) > 1 and coordinates(b) > 1]
    parts = [[atom for pair in both for atom in pair[i] if atom.kind == "iid"] for i in (0, 1)]
    if any(atom.turn for atom in (*parts[0], *parts[1])) and parts[0] != parts[1]:
        raise NotImplementedError(
            "independent coordinates meet in two orders (heads or groups transposed and flattened: a channel shuffle, with a skip "
            "around it, or with weights, a bias or a gain of the other order). Which meets which is not followed. Give what follows a "
            "shuffle layers of its own."
        )


def rep_shape(axes: Axes) -> tuple[int, ...]:
    """The shape of a representative."""
    return tuple(rep_size(axis) for axis in axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value; `axes` describe the array it stands for."""

    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the representative."""
        return rep_shape(self.axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Det(Node):
    """A deterministic array: ``fn(*args)`` of other ones and of moments of wide ones; `const` if it is known here and now.

    `noise` is the size of what the law of large numbers neglects in it, itself a `Det`; it is looked at where the value is used.
    """

    fn: Fn | None = None
    args: tuple["Det | Moment", ...] = ()
    const: np.ndarray | None = None
    noise: "Det | None" = None

    @property
    def number(self) -> float | None:
        """The one number that all entries equal, if that is known."""
        if self.const is None or self.const.size == 0:
            return None
        first = self.const.flat[0]
        return first.item() if bool(np.all(self.const == first)) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """``fn`` of ``E[u v]`` over all pairs of positions, both at one example; of ``E[u]`` if `v` is ``None``."""

    u: "Wide"
    v: "Wide | None"
    fn: Fn


@dataclasses.dataclass(frozen=True, eq=False)
class Wide(Node):
    """A random coordinate."""


class Range(NamedTuple):
    """``start, start + step, ..., < stop`` of part number `part` of coordinates that are laid out as `layout`."""

    layout: tuple[int, ...]
    part: int
    start: int
    stop: int
    step: int

    def apart(self, other: "Range") -> bool | None:
        """Whether two ranges share no coordinate; ``None`` where they are laid out in two ways."""
        if (self.layout, self.part) != (other.layout, other.part):
            return None
        both = (range(r.start, r.stop, r.step) for r in (self, other))
        return not set(next(both)) & set(next(both))


Key = tuple[Any, ...]
"""Which independent random numbers a field is made of: the leaf, which of its entries, and which way it is multiplied."""


@dataclasses.dataclass(frozen=True, eq=False)
class Field(Wide):
    """``W u`` for a leaf W: Gaussian, of covariance ``scale scale' · variance · sum_taps sum_c tap(E[u u'])``.

    Each of `taps` takes the representative of `source` to an array ``(*shape, c)`` of whose last axis the trace is taken. Along the axes
    `alone` each position has a matrix of its own. `joint` is the sum over taps of both sides of ``E[u u']`` at once, if there is a
    faster way to it; it is told of a number 1.
    """

    key: Key
    source: Node
    taps: tuple[Fn, ...]
    scale: float
    gaussian: bool
    still: bool = False
    alone: tuple[int, ...] = ()
    joint: Fn | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Entries(Wide):
    """A leaf as an activation (bias, gain, position table), less its mean: independent over its finite axes and along its
    growing ones, and times `scale`.
    """

    key: Key
    scale: float
    gaussian: bool
    still: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Wide):
    """Rows of a leaf at indices that the data give: covariance ``scale scale' · variance · [i = j]``.

    An index below 0 is of no row of the table: what is there instead is 0, or NaN.
    """

    key: Key
    index: Det
    scale: float
    gaussian: bool
    still: bool = False
    beyond: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Const(Wide):
    """A deterministic number for every coordinate."""

    value: Det


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Wide):
    """A sum."""

    u: Wide
    v: Wide


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Wide):
    """A value times a deterministic one."""

    u: Wide
    by: Det


@dataclasses.dataclass(frozen=True, eq=False)
class Linear(Wide):
    """A linear function of the representative, ``fn(u, *dets)``; `selects` if each entry of it is an entry of `u`, or 0."""

    u: Wide
    fn: Fn
    dets: tuple[Det, ...]
    selects: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Wide):
    """Values side by side along a finite axis."""

    parts: tuple[Wide, ...]
    axis: int


@dataclasses.dataclass(frozen=True, eq=False)
class Func(Wide):
    """``fn(*fields, *dets)``, entry by entry, of Gaussian `fields`."""

    fn: Fn
    fields: tuple[Wide, ...]
    dets: tuple[Det, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Prod(Wide):
    """A product of values that depend on more than one field."""

    factors: tuple[Wide, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Paired(Wide):
    """``sum u v`` over finite axes of two values that have the growing axes in common: attention, head by head.

    `numbers` are those of ``dot_general`` of two representatives; besides, the sum is over `count` coordinates.
    """

    u: Wide
    v: Wide
    numbers: Any
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn(Wide):
    """``fn(*args)`` of whole representatives, a coordinate of the growing axes at a time: its moments are found by Monte Carlo."""

    fn: Fn
    args: tuple[Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Part(Wide):
    """Some of the coordinates of `u`, which are independent of all the others: a range of one of the parts of its growing axes."""

    u: Wide
    which: "Range"


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed(Wide):
    """Coordinates of several kinds side by side along the growing axis number `axis`: `sizes` of each of the `parts`, at both widths."""

    parts: tuple[Wide, ...]
    axis: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """Of all coordinates, the portion that are of each kind, at infinite width."""
        grown = [m - n for n, m in self.sizes]
        counts = grown if any(grown) else [n for n, _ in self.sizes]
        return tuple(n / sum(counts) for n in counts)

    def mapped(self, axes: Axes, make: Callable[[Wide, Axes], Node]) -> "Mixed":
        """What moves entries to `axes`, done to each part.

        Raises
        ------
        NotImplementedError
            If the joined axis is not there any more.
        """
        total = sum(n for n, _ in self.sizes), sum(m for _, m in self.sizes)
        there = [(i, j) for i, axis in enumerate(axes) for j, a in enumerate(axis) if a.kind == "iid" and (a.size, a.other) == total]
        if len(there) != 1:
            raise NotImplementedError(
                "joined channels are cut in heads or groups, so that those of one kind are not those of another. Do that before they are "
                "joined."
            )
        ((i, j),) = there
        parts = []
        for part, (n, m) in zip(self.parts, self.sizes):
            atoms = (*axes[i][:j], *((axes[i][j]._replace(size=n, other=m),) if (n, m) != (1, 1) else ()), *axes[i][j + 1 :])
            made = make(part, (*axes[:i], atoms, *axes[i + 1 :]))
            assert isinstance(made, Wide)
            parts.append(made)
        return Mixed(axes, tuple(parts), i, self.sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Carried(Wide):
    """What enters a step of a scan: Gaussian, or of known second moments only. `scan` names the scan, `slot` the carry."""

    scan: int
    slot: int
    gaussian: bool
    sources: frozenset[Key]


@dataclasses.dataclass(frozen=True, eq=False)
class Scanned(Wide):
    """What a scan ends with."""

    scan: Any
    slot: int
    gaussian: bool
    sources: frozenset[Key]


@contextlib.contextmanager
def usual(double: bool) -> Iterator[None]:
    """Double or single precision, JAX's usual promotion, and compiled, whatever the user's flags, which are about the user's code."""
    with jax.enable_x64(double), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.disable_jit(False):
        yield


def numbers() -> contextlib.AbstractContextManager[Any]:
    """Arrays that are known are numbers, in a function that is being traced too.

    Nothing is changed where none is traced: what JAX computes ahead is compiled one operation at a time, constants of a trace included,
    and one of the size of all pairs of positions would be made before it is seen that it does not fit.
    """
    return jax.ensure_compile_time_eval() if isinstance(jnp.zeros(()) + 1, Tracer) else contextlib.nullcontext()


def fold(fn: Fn, *consts: np.ndarray) -> np.ndarray:
    """A function of known arrays, here and now, in double precision."""
    with jax.ensure_compile_time_eval(), usual(True):
        return np.asarray(fn(*consts))
