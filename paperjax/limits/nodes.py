"""Values of a network at infinite width: what the interpreter of `paperjax.limits.infinite` makes of each array of the trace.

An axis that grows with the width holds independent, identically distributed coordinates, so one coordinate stands for all of them: a
value is kept as its *representative*, an array in which such axes have size 1. It is either deterministic (`Det`), a function of one
example, or wide (`Wide`): a random coordinate, a function of Gaussian fields which are jointly distributed over the finite axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from paperjax.limits.subsets import apart

Fn = Callable[..., Any]


class Atom(NamedTuple):
    """A part of an axis, its sizes at the two widths that are traced; `kind` is ``"pos"`` (finite, followed entry by "
    "entry) or ``"iid"``.
    """

    kind: str
    size: int
    other: int

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

    Each of `taps` takes the representative of `source` to an array ``(*shape, c)`` of whose last axis the trace is taken.
    """

    key: Key
    source: Node
    taps: tuple[Fn, ...]
    scale: float
    gaussian: bool
    still: bool = False


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
    """Rows of a leaf at indices that the data give: covariance ``scale scale' · variance · [i = j]``."""

    key: Key
    index: Det
    scale: float
    gaussian: bool
    still: bool = False


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
class Part(Wide):
    """Some of the coordinates of `u`, which are independent of all the others: a range of one of the parts of its growing axes."""

    u: Wide
    which: "Range"


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed(Wide):
    """Coordinates of several kinds along one growing axis: a random one of them is of kind i with probability ``weights[i]``."""

    parts: tuple[Wide, ...]
    weights: tuple[float, ...]


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


def memoized(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Remember a property of a node on the node itself."""
    name = f"_memo_{fn.__name__}"

    @functools.wraps(fn)
    def call(node: Any) -> Any:
        if name not in node.__dict__:
            object.__setattr__(node, name, fn(node))
        return node.__dict__[name]

    return call


@memoized
def is_gaussian(node: Wide) -> bool:
    """Whether a value is jointly Gaussian with the fields, with mean 0."""
    if isinstance(node, (Field, Entries, Lookup, Carried, Scanned)):
        return node.gaussian
    if isinstance(node, Add):
        return is_gaussian(node.u) and is_gaussian(node.v)
    if isinstance(node, (Scale, Linear, Part)):
        return is_gaussian(node.u)
    return isinstance(node, Stacked) and all(map(is_gaussian, node.parts))


@memoized
def centred(node: Wide) -> bool:
    """Whether the mean of a value is 0 whatever the data."""
    if isinstance(node, (Field, Entries, Lookup)):
        return True
    if isinstance(node, (Carried, Scanned)):
        return node.gaussian
    if isinstance(node, Add):
        return centred(node.u) and centred(node.v)
    if isinstance(node, (Scale, Linear, Part)):
        return centred(node.u)
    if isinstance(node, (Stacked, Mixed)):
        return all(map(centred, node.parts))
    return isinstance(node, Prod) and any(
        centred(f) and all(j == i or independent(f, g) for j, g in enumerate(node.factors)) for i, f in enumerate(node.factors)
    )


@memoized
def sources(node: Wide) -> frozenset[Key]:
    """The random numbers that a value depends on at a given coordinate; those below a `Field` do not count, whose leaf mixes them."""
    if isinstance(node, (Field, Entries, Lookup)):
        return frozenset((node.key,))
    if isinstance(node, Const):
        return frozenset()
    if isinstance(node, Add):
        return sources(node.u) | sources(node.v)
    if isinstance(node, (Scale, Linear)):
        return sources(node.u)
    if isinstance(node, Part):
        return frozenset((*key, node.which) for key in sources(node.u))
    if isinstance(node, (Carried, Scanned)):
        return node.sources
    parts = {Func: "fields", Prod: "factors", Stacked: "parts", Mixed: "parts"}[type(node)]
    return frozenset().union(*(sources(part) for part in getattr(node, parts)))


def scale(u: Wide, by: Det, axes: Axes) -> Scale:
    """One node for a value times a number, whoever asks for it: so fields are known to be the same."""
    made = u.__dict__.setdefault("_scaled", {})
    if (by, axes) not in made:
        made[by, axes] = Scale(axes, u, by)
    return made[by, axes]


def relabelled(node: Any, axes: Axes) -> Any:
    """One node for a value with other names for its axes, of the same representative."""
    if node.axes == axes:
        return node
    made = node.__dict__.setdefault("_relabelled", {})
    if axes not in made:
        made[axes] = dataclasses.replace(node, axes=axes)
    return made[axes]


def repeated(node: Node, before: Axes, after: Axes) -> None:
    """Refuse a random value that would be the same for all coordinates of a growing axis.

    Raises
    ------
    NotImplementedError
        If it is random, and an axis of size 1 (or none) becomes one that grows.
    """
    grows = any(atom.grows for new, old in zip(after, before) if not old for atom in new)
    if grows and isinstance(node, Wide) and sources(node):
        raise NotImplementedError(
            "one random number (a gate with a single output, a readout that is fed back) is repeated along a growing axis, so that all "
            "coordinates share it: what they make is Gaussian given that number, and a mixture without it. Let the gate have an output "
            "for each coordinate."
        )


def times(u: Wide, number: float) -> Scale:
    """One node for a value times a known number."""
    made = u.__dict__.setdefault("_times", {})
    if number not in made:
        made[number] = Scale(u.axes, u, Det((), const=np.asarray(number)))
    return made[number]


def total(terms: Sequence[Wide]) -> Wide:
    """One node for a sum, whoever asks for it."""
    terms = sorted(terms, key=id)
    made = terms[0].__dict__.setdefault("_sums", {})
    rest = tuple(terms[1:])
    if rest not in made:
        node = terms[0]
        for term in rest:
            node = Add(node.axes, node, term)
        made[rest] = node
    return made[rest]


def multiple(terms: Mapping[Wide, float]) -> tuple[Wide, float]:
    """A sum of values times numbers, as a number times one node for all its multiples: the first of them that was asked for.

    Fields that are multiples of each other must be one, for their joint covariance is singular.
    """
    order = sorted(terms, key=id)
    unit = terms[order[0]]
    made = order[0].__dict__.setdefault("_multiples", {})
    key = tuple((z, float(f"{terms[z] / unit:.12g}")) for z in order)
    if key not in made:
        made[key] = total([z if n == 1 else times(z, n) for z, n in terms.items()]), unit
    field, first = made[key]
    return field, unit / first


@memoized
def is_still(node: Wide) -> bool:
    """Whether a Gaussian value has no variance until it is trained: leaves that start as a constant."""
    if isinstance(node, (Field, Entries, Lookup)):
        return node.still
    if isinstance(node, Add):
        return is_still(node.u) and is_still(node.v)
    if isinstance(node, (Scale, Linear, Part)):
        return is_still(node.u)
    return isinstance(node, Stacked) and all(map(is_still, node.parts))


@memoized
def moving_and_still(node: Wide) -> tuple[tuple[Wide, ...], tuple[Wide, ...]]:
    """The terms of a Gaussian value that vary, and those that do not yet."""
    if is_still(node):
        return (), (node,)
    if isinstance(node, Add):
        parts = [moving_and_still(u) for u in (node.u, node.v)]
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    if isinstance(node, Scale):
        moving, still = moving_and_still(node.u)
        if not still and len(moving) == 1:
            return (node,), ()
        return tuple(scale(u, node.by, node.axes) for u in moving), tuple(scale(u, node.by, node.axes) for u in still)
    if isinstance(node, (Linear, Part)):
        moving, still = moving_and_still(node.u)
        if not still:
            return (node,), ()
        return tuple(dataclasses.replace(node, u=u) for u in moving), tuple(dataclasses.replace(node, u=u) for u in still)
    return (node,), ()


def fold(fn: Fn, *consts: np.ndarray) -> np.ndarray:
    """A function of known arrays, here and now, in double precision."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.asarray(fn(*consts))


def independent(u: Wide, v: Wide) -> bool:
    """Whether two values share no random number.

    Raises
    ------
    NotImplementedError
        If they use coordinates of one field in two ways that cannot be told apart.
    """
    if u is v:
        return not sources(u)
    common = origins(u) & origins(v)
    if not common:
        return True
    return not any(_share(a, b) for a in sources(u) if _origin(a) in common for b in sources(v) if a[0] == b[0])


def _origin(key: Key) -> Key:
    return key if key[0] == "scan" else key[:1]


@memoized
def origins(node: Wide) -> frozenset[Key]:
    """Leaves that a value depends on at a given coordinate."""
    return frozenset(map(_origin, sources(node)))


def _share(a: Key, b: Key) -> bool:
    """Keys are ``(leaf, entries, way, *ranges)``, or ``("scan", ...)`` for what a scan carries."""
    if a == b:
        return True
    if a[0] != b[0] or a[0] == "scan":
        return False
    separate = apart(a[1], b[1])
    if separate:
        return False
    if separate is None:
        raise NotImplementedError(f"{a[0]}: two uses of this leaf share some of its entries, and not all of them.")
    if a[2] != b[2]:
        raise NotImplementedError(
            f"{a[0]}: this leaf is used both ways round (as W and as its transpose, or as a table and as a matrix), and "
            f"what is made of both "
            "meets. At infinite width the two are not independent, and no Gaussian limit of it is known here."
        )
    for one, two in zip(a[3:], b[3:]):
        if one != two:
            between = one.apart(two)
            if between:
                return False
            break
    raise NotImplementedError(
        f"{a[0]}: coordinates of what this leaf makes overlap, or are cut in two ways ({a[3:]} and {b[3:]}). Cut a "
        f"fused layer the same way "
        "everywhere, or write it as layers of their own."
    )
