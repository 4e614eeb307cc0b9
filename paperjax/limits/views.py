"""Leaves on their way to where they are used: transposed, reshaped, cut, multiplied by numbers."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from paperjax.limits.nodes import Atom, Axes, Axis
from paperjax.limits.subsets import ranges


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """Some entries of a leaf, each multiplied by `factor`.

    Attributes
    ----------
    leaf
        Its number.
    places
        Of each axis of the leaf, the entries that are left, as an array over the parts that it is split into.
    parts
        For each axis of the view, the parts that it is made of: ``(axis of the leaf, axis of that one's places)``, sizes at both widths.
    """

    leaf: int
    factor: float
    places: tuple[np.ndarray, ...]
    parts: tuple[tuple[tuple[int, int, Atom], ...], ...]

    @property
    def axes(self) -> Axes:
        """The axes of the view."""
        return tuple(tuple(atom for _, _, atom in axis) for axis in self.parts)

    @property
    def entries(self) -> tuple[Any, ...]:
        """Which entries of the leaf these are, in any order."""
        return tuple(ranges(places) for places in self.places)

    def times(self, factor: float) -> "View":
        """All entries multiplied by a number."""
        return dataclasses.replace(self, factor=self.factor * factor)

    def transposed(self, permutation: Any) -> "View":
        """Axes in another order."""
        return dataclasses.replace(self, parts=tuple(self.parts[i] for i in permutation))

    def reversed(self, dimensions: Any) -> "View | None":
        """Finite axes in the opposite order; ``None`` if one of them grows."""
        turned = [part for i in dimensions for part in self.parts[i]]
        if any(atom.grows for _, _, atom in turned):
            return None
        places = list(self.places)
        for k, j, _ in turned:
            places[k] = np.flip(places[k], j)
        return dataclasses.replace(self, places=tuple(places))

    @property
    def back(self) -> tuple[tuple[int, int], ...]:
        """Parts of axes along which entries lie in the opposite order to the leaf's."""
        every = [(k, j) for k, places in enumerate(self.places) for j in range(places.ndim)]
        return tuple((k, j) for k, j in every if np.any(np.diff(self.places[k], axis=j) < 0))

    def with_axes(self, keep: Any) -> "View":
        """Axes of size 1 taken out or put in: `keep` lists old axes, or ``None`` for a new one."""
        return dataclasses.replace(self, parts=tuple(() if i is None else self.parts[i] for i in keep))

    def reshaped(self, sizes: Any, others: Any) -> "View | None":
        """Row-major; ``None`` if an axis would have to be split in parts that do not divide it."""
        todo = [part for axis in self.parts for part in axis]
        places, after = list(self.places), []
        for size, other in zip(sizes, others):
            axis = []
            while size > 1 or other > 1:
                if not todo:
                    return None
                k, j, atom = todo.pop(0)
                if size % atom.size == 0 and other % atom.other == 0 and (size, other) >= (atom.size, atom.other):
                    axis.append((k, j, atom))
                    size, other = size // atom.size, other // atom.other
                elif atom.size % size == 0 and atom.other % other == 0:
                    rest = Atom("pos", atom.size // size, atom.other // other)
                    shape = places[k].shape
                    places[k] = places[k].reshape(*shape[:j], size, rest.size, *shape[j + 1 :])
                    todo = [(a, b + (a == k and b > j), part) for a, b, part in todo]
                    axis = [(a, b + (a == k and b > j), part) for a, b, part in axis]
                    after = [[(a, b + (a == k and b > j), part) for a, b, part in made] for made in after]
                    axis.append((k, j, _kind(Atom("pos", size, other))))
                    todo.insert(0, (k, j + 1, _kind(rest)))
                    size = other = 1
                else:
                    return None
            after.append(axis)
        return None if todo else View(self.leaf, self.factor, tuple(places), tuple(map(tuple, after)))

    def sliced(self, axis: int, start: int, stop: int, step: int, other: int) -> "View | None":
        """A range of an axis of one part; `other` is how many entries there are at the other width."""
        if len(self.parts[axis]) != 1:
            return None if self.parts[axis] else self
        ((k, j, _),) = self.parts[axis]
        places = list(self.places)
        places[k] = np.take(places[k], np.arange(start, stop, step), j)
        size = len(range(start, stop, step))
        atom = _kind(Atom("pos", size, other))
        parts = [((k, j, atom),) if i == axis else made for i, made in enumerate(self.parts)]
        if (size, other) == (1, 1):
            places[k] = places[k].squeeze(j)
            gone = lambda made: tuple((a, b - (a == k and b > j), part) for a, b, part in made)  # noqa: E731
            parts = [() if i == axis else gone(made) for i, made in enumerate(self.parts)]
        return dataclasses.replace(self, places=tuple(places), parts=tuple(parts))


def _kind(atom: Atom) -> Atom:
    return atom._replace(kind="iid" if atom.grows else "pos")


def whole(leaf: int, sizes: tuple[int, ...], others: tuple[int, ...]) -> View:
    """All of a leaf."""
    places, parts = [], []
    for k, (size, other) in enumerate(zip(sizes, others)):
        single = size == other == 1
        places.append(np.arange(size).reshape(() if single else (size,)))
        parts.append(() if single else ((k, 0, _kind(Atom("pos", size, other))),))
    return View(leaf, 1.0, tuple(places), tuple(parts))


def iid(axis: Axis) -> Axis:
    """A free axis of a leaf: its coordinates are independent, finite or not."""
    return tuple(atom._replace(kind="iid") for atom in axis)


Parts = tuple[tuple[int, int, Atom], ...]


def order_of(axes: Iterable[Parts]) -> tuple[tuple[int, int], ...]:
    """The order in which parts of a leaf lie, if it is not that of the leaf (heads of a matrix that are transposed and flattened)."""
    places = tuple((k, j) for axis in axes for k, j, _ in axis)
    return places if places != tuple(sorted(places)) else ()


def placed(axes: Sequence[Parts]) -> list[Axis]:
    """Free axes of a leaf, which remember another order than that of the leaf."""
    moved = bool(order_of(axes))
    return [tuple(atom._replace(kind="iid", turn=(k, j) if moved else ()) for k, j, atom in axis) for axis in axes]
