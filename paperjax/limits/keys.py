"""Random keys in the jaxpr of ``init``: which of them are one key, however they were made, and which parts of one draw overlap.

A key is told by how it comes from the key of ``init``: its parent and its number among the children. ``split(key, 2)[1]``,
``split(key, 3)[1]`` and ``fold_in(key, 1)`` are one key (JAX's default, partitionable threefry).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# Sets of more keys than this are not followed one by one.
MANY = 4096
Intern = Callable[..., int]


class Key(NamedTuple):
    """A random key, or an array of them.

    Attributes
    ----------
    id
        Equal for what is made in one way.
    steps
        The scans in which it differs by the step.
    repeated
        Whether one key is in it twice.
    table
        The key at each place, ``None`` where that is not known.
    covers
        All keys that it may be.
    """

    id: int
    steps: frozenset[int] = frozenset()
    repeated: bool = False
    table: np.ndarray | None = None
    covers: frozenset[int] = frozenset()

    @property
    def whole(self) -> frozenset[int]:
        """All keys that it may be, itself if nothing else is known."""
        return self.covers or frozenset([self.id])


def one_key(number: int) -> Key:
    """A single key."""
    return Key(number, table=np.array(number), covers=frozenset([number]))


def of_table(table: np.ndarray, made: int) -> Key:
    """Keys of which each is known."""
    return Key(int(table) if table.ndim == 0 else made, repeated=_twice(table), table=table, covers=frozenset(table.ravel().tolist()))


class Box(NamedTuple):
    """The part of an array that a slice keeps: a start, a stop and a stride for each axis."""

    ranges: tuple[tuple[int, int, int], ...]


class Source(NamedTuple):
    """One drawing of bits, or a part of it.

    Attributes
    ----------
    root
        The key that draws.
    path
        What was done to the array since: a `Box` for a slice, a token for anything else that moves entries.
    steps
        The scans in which it differs by the step.
    """

    root: int
    path: tuple[Any, ...] = ()
    steps: frozenset[int] = frozenset()

    def moved(self, by: Any) -> "Source":
        """After one more move."""
        return self._replace(path=(*self.path, by))


Sources = frozenset[Source]


def share(one: Iterable[Source], other: Iterable[Source]) -> bool:
    """Whether two arrays may hold an entry of one draw: not where slices of it that were cut in one place lie apart."""
    by: dict[int, list[Source]] = {}
    for source in one:
        by.setdefault(source.root, []).append(source)
    return any(not _apart(source.path, mine.path) for source in other for mine in by.get(source.root, ()))


def _apart(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    for s, t in zip(one, other):
        if s != t:
            return isinstance(s, Box) and isinstance(t, Box) and any(_no_number_in_both(a, b) for a, b in zip(s.ranges, t.ranges))
    return False


def _no_number_in_both(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    (a, b, step), (c, d, stride) = one, other
    return b <= c or d <= a or (a - c) % math.gcd(step, stride) != 0


def box(eqn: Any, part: int, starts: Sequence[float | None]) -> Box | None:
    """What part of its operand an equation picks; `starts` are the numbers of a dynamic slice, as far as they are known."""
    p, shape = eqn.params, eqn.invars[0].aval.shape
    full = [(0, n, 1) for n in shape]
    name = eqn.primitive.name
    if name == "slice":
        strides = p["strides"] or (1,) * len(shape)
        return Box(tuple((a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], strides)))
    if name == "split":
        start = int(sum(p["sizes"][:part]))
        full[p["axis"]] = (start, start + int(p["sizes"][part]), 1)
        return Box(tuple(full))
    if name == "unstack":
        full[p["axis"]] = (part, part + 1, 1)
        return Box(tuple(full))
    if name == "dynamic_slice" and all(start is not None for start in starts):
        at = [min(max(int(s), 0), n - m) for s, n, m in zip(starts, shape, p["slice_sizes"]) if s is not None]
        return Box(tuple((a, a + m, 1) for a, m in zip(at, p["slice_sizes"])))
    return None


def children(eqn: Any, key: Key, which: np.ndarray | None, steps: frozenset[int], intern: Intern, made: int) -> Key:
    """Of a split, or of `which` numbers that are folded in (``None``: not known), the keys."""
    table, covers = None, frozenset([made])
    split = eqn.primitive.name == "random_split"
    numbers = np.arange(math.prod(eqn.params["shape"])) if split else which
    if numbers is not None and len(key.whole) * numbers.size <= MANY:
        of = {(parent, int(i)): intern("child", parent, int(i)) for parent in key.whole for i in numbers.ravel()}
        covers = frozenset(of.values())
        if key.table is not None:
            shape = eqn.outvars[0].aval.shape
            parents = key.table.reshape(*key.table.shape, *(1,) * (len(shape) - key.table.ndim)) if split else key.table
            numbers = numbers.reshape(eqn.params["shape"]) if split else numbers
            parents, numbers = np.broadcast_to(parents, shape), np.broadcast_to(numbers, shape)
            table = np.array([of[int(parent), int(i)] for parent, i in zip(parents.ravel(), numbers.ravel())]).reshape(shape)
    made = int(table) if table is not None and table.ndim == 0 else made
    # Numbers that are not known are taken to differ.
    repeated = (key.repeated and (split or which is not None)) if table is None else _twice(table)
    return Key(made, steps, repeated, table, covers)


def moved(eqn: Any, keys: Sequence[Key], arrays: Sequence[Any], part: int, made: int) -> Key:
    """Keys that are picked, joined or given another shape; `arrays` are the other operands, where they are known."""
    steps, covers = (frozenset[int]().union(*sets) for sets in zip(*((key.steps, key.whole) for key in keys)))
    table = None
    if all(key.table is not None for key in keys) and all(array is not None for array in arrays):
        with jax.ensure_compile_time_eval():
            found = eqn.primitive.bind(*(np.asarray(key.table, np.int32) for key in keys), *arrays, **eqn.params)
        table = np.asarray(found[part] if eqn.primitive.multiple_results else found)
        covers = frozenset(table.ravel().tolist())
    if table is not None and len(covers) == 1 and table.size > 0:
        made = next(iter(covers))
    return Key(made, steps, any(key.repeated for key in keys) if table is None else _twice(table), table, covers)


def words(key: Key, n: int, intern: Intern, made: int) -> Key:
    """The numbers that a key consists of."""
    covers = frozenset(intern("word", of, i) for of in key.whole for i in range(n))
    table = None
    if key.table is not None:
        table = np.array([intern("word", int(of), i) for of in key.table.ravel() for i in range(n)]).reshape(*key.table.shape, n)
    return Key(made, key.steps, key.repeated, table, covers)


def of_words(key: Key, known: Mapping[int, int], made: int) -> Key:
    """The key that consists of numbers; `known` tells of which key each is."""
    table = None
    if key.table is not None:
        of = np.vectorize(lambda word: known.get(int(word), -1), otypes=[np.int64])(key.table)
        table = of[..., 0] if of.size and np.all(of == of[..., :1]) and np.all(of >= 0) else None
    covers = frozenset(known.get(word, word) for word in key.whole) if table is None else frozenset(table.ravel().tolist())
    made = int(table) if table is not None and table.ndim == 0 else made
    return Key(made, key.steps, key.repeated if table is None else _twice(table), table, covers)


def _twice(table: np.ndarray | None) -> bool:
    return table is not None and len(np.unique(table)) < table.size
