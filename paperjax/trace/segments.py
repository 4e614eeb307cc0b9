"""Segments of an axis at two widths: their sizes, and the entries of leaves that they run over. See `paperjax.trace.portions`."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

# What a segment holds: zeros, other constants, or what parameters or data made.
ZERO, CONST, MADE = 0, 1, 2
# Pixels that are flattened with their channels: of so many it is followed which are which.
MANY = 256

Pair = tuple[Fraction, Fraction]


class Source(NamedTuple):
    """Entries of a leaf's axis that a segment runs over: the first, and how many there are to an entry of the segment, at both widths.

    Of an axis that was merged with one inside it, a fraction of an entry; of one that was split, several.
    """

    leaf: int
    axis: int
    start: Pair
    unit: Pair


class Segment(NamedTuple):
    """A part of an axis: its size at the larger width and at the smaller one, what it holds, and where in leaves it comes from."""

    n: int
    m: int
    kind: int
    sources: frozenset[Source]


Axis = tuple[Segment, ...]


class Val(NamedTuple):
    """A value: what it holds, whether data are in it, and the segments of its axes."""

    kind: int
    data: bool
    axes: tuple[Axis, ...]


Sizes = Sequence[tuple[int, int]]


def fresh(shapes: Sizes, kind: int, data: bool) -> Val:
    """A value of whose axes nothing is known but their sizes."""
    return Val(kind, data, tuple((Segment(n, m, kind, frozenset()),) for n, m in shapes))


def _cuts(axis: Axis) -> Iterator[tuple[int, int]]:
    n = m = 0
    for segment in axis:
        n, m = n + segment.n, m + segment.m
        yield n, m


def size_of(axis: Axis) -> tuple[int, int]:
    """The size of an axis at both widths."""
    return sum(s.n for s in axis), sum(s.m for s in axis)


def _within(segment: Segment, first: tuple[int, int], size: tuple[int, int]) -> Segment:
    """A part of a segment; `first` is its first entry in it."""
    moved = (
        s._replace(start=(s.start[0] + first[0] * s.unit[0], s.start[1] + first[1] * s.unit[1])) if any(first) else s
        for s in segment.sources
    )
    return Segment(*size, segment.kind, frozenset(moved))


def sliced(axis: Axis, start: tuple[int, int], size: tuple[int, int]) -> Axis | None:
    """The part of an axis from `start` on; `None` where it lies differently in the segments at the two widths."""
    end, at, found = (start[0] + size[0], start[1] + size[1]), (0, 0), []
    for segment in axis:
        until = at[0] + segment.n, at[1] + segment.m
        first = max(start[0], at[0]), max(start[1], at[1])
        last = min(end[0], until[0]), min(end[1], until[1])
        taken = last[0] - first[0], last[1] - first[1]
        if taken[0] > 0 and taken[1] > 0:
            found.append(_within(segment, (first[0] - at[0], first[1] - at[1]), taken))
        elif taken[0] > 0 or taken[1] > 0:
            return None
        at = until
    return tuple(found) if size_of(tuple(found)) == size else None


def strided(axis: Axis, size: tuple[int, int], stride: int) -> Axis | None:
    """Every so many entries of an axis that is not cut: they stand for those between them, which others take."""
    if len(axis) > 1 or size_of(axis) != (size[0] * stride, size[1] * stride):
        return None
    each = [[s._replace(unit=(s.unit[0] * stride, s.unit[1] * stride)) for s in segment.sources] for segment in axis]
    return tuple(Segment(*size, segment.kind, frozenset(sources)) for segment, sources in zip(axis, each))


def together(values: Sequence[Val], shapes: Sizes, product: bool, but: int | None = None) -> tuple[Axis, ...]:
    """The axes of values that are combined entry by entry, cut wherever one of them is; `but` is an axis to leave out."""
    found: list[Axis] = []
    for i, size in enumerate(shapes):
        own = [v.axes[i] for v in values if i != but and len(v.axes) == len(shapes) and size_of(v.axes[i]) == size]
        found.append(_refined(own, product) or (Segment(*size, max((v.kind for v in values), default=MADE), frozenset()),))
    return tuple(found)


def _refined(axes: Sequence[Axis], product: bool) -> Axis | None:
    if len(axes) == 1 or (axes and all(axis == axes[0] for axis in axes)):
        return axes[0]
    if not axes:
        return None
    found, before = [], (0, 0)
    for cut in sorted({cut for axis in axes for cut in _cuts(axis)}):
        size = cut[0] - before[0], cut[1] - before[1]
        parts = [sliced(axis, before, size) for axis in axes]
        if min(size) <= 0 or any(part is None or len(part) != 1 for part in parts):
            return None
        here = [part[0] for part in parts if part]
        kinds = [segment.kind for segment in here]
        kind = ZERO if product and ZERO in kinds else max(kinds)
        found.append(Segment(*size, kind, frozenset().union(*(segment.sources for segment in here))))
        before = cut
    return tuple(found)


def concatenated(axes: Sequence[Axis]) -> tuple[Axis, list[tuple[Segment, Source]]]:
    """The axis that several make one after the other, and the segments that come back to what they were cut from.

    Of a vector that grows, a fixed part is entries like the others once it stands beside them again (rotary positions of some of them).
    """
    whole = [segment for axis in axes for segment in axis]
    growing = {(s.leaf, s.axis) for segment in whole for s in segment.sources if _grows(segment, s)}
    rejoined = [(segment, s) for segment in whole for s in segment.sources if (s.leaf, s.axis) in growing and not _grows(segment, s)]
    back = {(s.leaf, s.axis) for _, s in rejoined}
    found: list[Segment] = []
    for segment in whole:
        last = found[-1] if found else None
        same = back & {(s.leaf, s.axis) for s in segment.sources}
        if last is None or not same & {(s.leaf, s.axis) for s in last.sources}:
            found.append(segment)
            continue
        # In another order they are entries of the leaf's axis still, but it is not known which.
        kept = frozenset(s for s in last.sources if any(_follows(last, s, t) for t in segment.sources)) or last.sources
        found[-1] = Segment(last.n + segment.n, last.m + segment.m, max(last.kind, segment.kind), kept)
    return tuple(found), rejoined


def _grows(segment: Segment, source: Source) -> bool:
    return segment.n * source.unit[0] != segment.m * source.unit[1]


def _follows(segment: Segment, source: Source, other: Source) -> bool:
    """Whether the entries of another source come right behind those of a segment."""
    ends = source.start[0] + segment.n * source.unit[0], source.start[1] + segment.m * source.unit[1]
    return (other.leaf, other.axis, other.unit, other.start) == (source.leaf, source.axis, source.unit, ends)


def joined(a: Val, b: Val) -> Val:
    """What covers two values that come to the same place: branches, steps of a loop."""
    kind, axes = max(a.kind, b.kind), []
    for x, y in zip(a.axes, b.axes):
        same = [(s.n, s.m) for s in x] == [(s.n, s.m) for s in y]
        if same:
            axes.append(tuple(s._replace(kind=max(s.kind, t.kind), sources=s.sources | t.sources) for s, t in zip(x, y)))
        else:
            axes.append((Segment(*size_of(x), kind, frozenset()),))
    return Val(kind, a.data or b.data, tuple(axes))


def reshaped(here: Any, there: Any, value: Val, out: Sizes) -> tuple[Axis, ...]:
    """The axes after a reshape, a broadcast, an axis of size 1 more or less.

    Segments of an axis stay with it, with the outermost of those that it is split in, and with what it is merged with inside it.
    """
    if here.primitive.name == "broadcast_in_dim":
        place = {new: old for old, new in enumerate(here.params["broadcast_dimensions"])}
        kept = {i: value.axes[k] for i, k in place.items() if size_of(value.axes[k]) == out[i]}
        return tuple(kept.get(i) or (Segment(*size, value.kind, frozenset()),) for i, size in enumerate(out))
    before = [size_of(axis) for axis in value.axes]
    found: list[Axis] = [(Segment(*size, value.kind, frozenset()),) for size in out]
    old = [i for i, size in enumerate(before) if size != (1, 1)]
    new = [i for i, size in enumerate(out) if size != (1, 1)]
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        a, b = before[left[0]], out[right[0]]
        while a != b and (old if a[0] < b[0] else new):
            if a[0] < b[0]:
                left.append(old.pop(0))
                a = a[0] * before[left[-1]][0], a[1] * before[left[-1]][1]
            else:
                right.append(new.pop(0))
                b = b[0] * out[right[-1]][0], b[1] * out[right[-1]][1]
        if a != b:
            return tuple(found)
        first = _scaled(value.axes[left[0]], _product([before[i] for i in left[1:]]), _product([out[i] for i in right[1:]]))
        if first and all(len(value.axes[i]) == 1 for i in left[1:]):
            found[right[0]] = first
        # Cut inside, the merged axis has its segments over and over.
        times = _product([before[i] for i in left[:-1]])
        if len(right) == 1 and len(value.axes[left[-1]]) > 1 and times[0] == times[1] <= MANY:
            found[right[0]] = tuple(s._replace(sources=frozenset()) for s in value.axes[left[-1]]) * times[0]
    return tuple(found)


def _product(sizes: Sizes) -> tuple[int, int]:
    n = m = 1
    for a, b in sizes:
        n, m = n * a, m * b
    return n, m


def _scaled(axis: Axis, merged: tuple[int, int], split: tuple[int, int]) -> Axis | None:
    """An axis whose entries become so many each, or so many of which become one."""
    found = []
    for s in axis:
        n, m = s.n * merged[0], s.m * merged[1]
        if n % split[0] or m % split[1]:
            return None
        by = Fraction(split[0], merged[0]), Fraction(split[1], merged[1])
        sources = (source._replace(unit=(source.unit[0] * by[0], source.unit[1] * by[1])) for source in s.sources)
        found.append(Segment(n // split[0], m // split[1], s.kind, frozenset(sources)))
    return tuple(found)
