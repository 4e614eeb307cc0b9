"""Which axes of which leaf are infinite: those that change between two sizes of the family, under ``jax.eval_shape``."""

import functools
import numbers
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paperjax.model import Family, split


class Probe(NamedTuple):
    """What probing a family found.

    Attributes
    ----------
    shapes
        The target's trained leaves.
    axes
        For each leaf's path, one set of size names for each axis: those that change it.
    growing
        Sizes that differ between base and target.
    structural
        Those of them that add leaves (layers in a Python loop).
    """

    shapes: tuple["Shape", ...]
    axes: dict[str, tuple[frozenset[str], ...]]
    growing: tuple[str, ...]
    structural: tuple[str, ...]


class Shape(NamedTuple):
    """Where a trained leaf lies in the pytree, its shape and dtype."""

    path: str
    shape: tuple[int, ...]
    dtype: Any


Shapes = Callable[[Mapping[str, Any]], tuple[Shape, ...]]


def leaf_shapes(params: Any) -> tuple[Shape, ...]:
    """Paths, shapes and dtypes of the trained leaves of a pytree of parameters, or of their ``jax.ShapeDtypeStruct``."""
    leaves = jax.tree_util.tree_leaves_with_path(split(params)[0])
    return tuple(Shape(jax.tree_util.keystr(path), tuple(leaf.shape), leaf.dtype) for path, leaf in leaves)


def shapes_at(family: Family, x: Any, known: Mapping[tuple[Any, ...], tuple[Shape, ...]] | None = None) -> Shapes:
    """A function from sizes to the leaf shapes there; nothing is allocated, and no sizes are looked at twice.

    Parameters
    ----------
    family, x
        The family, and a batch or its ``jax.ShapeDtypeStruct``.
    known
        Shapes that are known already, by the sorted items of the sizes.
    """
    x = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    seen = dict(known or {})

    def at(sizes: Mapping[str, Any]) -> tuple[Shape, ...]:
        key = sizes_key(sizes)
        if key not in seen:
            seen[key] = leaf_shapes(jax.eval_shape(family(**sizes).init, jax.random.key(0), x))
        return seen[key]

    return at


def sizes_key(sizes: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sizes as something that can be looked up; of those that cannot, the name of the type and what they print."""
    return tuple(sorted((name, value if isinstance(value, (int, float, str, tuple)) else repr(value)) for name, value in sizes.items()))


def aligned(path: str, among: Sequence[Shape]) -> Shape | None:
    """The leaf of the same path; where a loop over layers has fewer of them, the one whose integer components come nearest.

    Examples
    --------
    >>> few = [Shape("['layer_0']['w']", (8, 8), float), Shape("['layer_1']['w']", (8, 4), float)]
    >>> aligned("['layer_5']['w']", few).path
    "['layer_1']['w']"
    """
    for shape in among:
        if shape.path == path:
            return shape
    pattern, numbers_here = pattern_of(path), numbers_of(path)
    same = [(shape, numbers_of(shape.path)) for shape in among if pattern_of(shape.path) == pattern]
    if not same:
        return None
    # The components further out decide first: a stage before a block within it.
    return min(same, key=lambda item: tuple(abs(a - b) for a, b in zip(numbers_here, item[1])))[0]


def like(leaf: Shape, among: Sequence[Shape]) -> Shape | None:
    """The leaf that plays the same part at another depth: of the same shape if there is one, else as much wider on each axis that changes.

    A loop over layers may number layers of several kinds in one row (``Dense_0``, ..., the last of them the readout), so that the same
    path is another layer at another depth. Where there is none like it, it is the nearest by number.

    Examples
    --------
    >>> few = [Shape("Dense_0", (8, 8), float), Shape("Dense_1", (8, 8), float), Shape("Dense_2", (8, 3), float)]
    >>> like(Shape("Dense_2", (8, 8), float), few).path, like(Shape("Dense_9", (8, 3), float), few).path
    ('Dense_1', 'Dense_2')
    >>> like(Shape("Dense_2", (32, 32), float), few).path, like(Shape("Dense_9", (32, 3), float), few).path
    ('Dense_1', 'Dense_2')
    """
    row = [shape for shape in among if pattern_of(shape.path) == pattern_of(leaf.path) and len(shape.shape) == len(leaf.shape)]
    same = [shape for shape in row if shape.shape == leaf.shape]
    alike = [shape for shape in row if len({b / a for a, b in zip(shape.shape, leaf.shape) if a != b and a}) == 1]
    return aligned(leaf.path, same) or aligned(leaf.path, alike) or aligned(leaf.path, among)


@functools.cache
def pattern_of(path: str) -> str:
    """A path with its numbers left out: what layers of one kind have in common."""
    return re.sub(r"\d+", "#", path)


@functools.cache
def numbers_of(path: str) -> tuple[int, ...]:
    """The numbers in a path, from the outside in."""
    return tuple(int(n) for n in re.findall(r"\d+", path))


def infinite_axes(at: Shapes, base: Mapping[str, Any], target: Mapping[str, Any]) -> Probe:
    """For each leaf of the target, the sizes that change each of its axes.

    Parameters
    ----------
    at
        Leaf shapes of the family at given sizes, see `shapes_at`.
    base, target
        Two sets of sizes. A size that they share is finite.

    Returns
    -------
    Probe

    Raises
    ------
    ValueError
        If a size cannot be changed by itself, nor on a multiple of the base's; the message says which constraint of the model failed. If
        a leaf of one network has no like in the other: layers may become more, by number, but none may appear or vanish.
    """
    full = at(target)
    growing = tuple(name for name in target if base.get(name) != target[name])
    _refuse_vanished(at(base), full, {name: (base[name], target[name]) for name in growing})
    axes: dict[str, list[set[str]]] = {leaf.path: [set() for _ in leaf.shape] for leaf in full}
    structural = []
    for name in growing:
        parts: dict[str, Shape] = {}
        probe = _probe(at, name, base[name], target)
        if {leaf.path for leaf in probe} != {leaf.path for leaf in full}:
            structural.append(name)
        for leaf in full:
            other = like(leaf, probe) if name in structural else aligned(leaf.path, probe)
            if other is None:
                raise ValueError(
                    f"leaf {leaf.path} is there at {name}={target[name]} and has no like at {name}={base[name]}: the structure "
                    f"of the parameters changes with {name} beyond a numbered layer. "
                    "Name layers by numbers (layers_0, layers_1, ...), or stack them."
                )
            if name in structural and other.shape != leaf.shape and _all_kept(leaf, probe, full):
                raise ValueError(
                    f"leaf {leaf.path} of shape {leaf.shape} is there at {name}={target[name]}, and at {name}={base[name]} no leaf that is "
                    f"numbered with it has that shape, while those that are there keep theirs: {name} adds layers of a kind that the "
                    "smaller network has none of. Choose a base that has one of each kind."
                )
            # Layers that one size both widens and adds.
            twin = parts.setdefault(other.path, leaf) if name in structural else leaf
            if twin.shape != leaf.shape:
                raise ValueError(
                    f"leaves {twin.path} of shape {twin.shape} and {leaf.path} of shape {leaf.shape} are there at {name}={target[name]}, "
                    f"and of those at {name}={base[name]} the only one like either is {other.path} of shape {other.shape}: {name} adds "
                    "layers of a kind that the smaller network has none of, or one name is that of several kinds. Choose a base that has "
                    "one of each kind, or two sizes, one that widens layers and one that adds them."
                )
            if len(other.shape) != len(leaf.shape):
                raise ValueError(
                    f"leaf {leaf.path} has shape {leaf.shape} at {name}={target[name]} and {other.shape} at {name}={base[name]}: "
                    "its number of axes changes, so its axes cannot be told apart. Keep the structure the same at all sizes."
                )
            for axis, (a, b) in enumerate(zip(leaf.shape, other.shape)):
                if a != b:
                    axes[leaf.path][axis].add(name)
    return Probe(full, {path: tuple(map(frozenset, found)) for path, found in axes.items()}, growing, tuple(structural))


def _all_kept(leaf: Shape, probe: Sequence[Shape], full: Sequence[Shape]) -> bool:
    """Whether all leaves that are numbered with one have shapes at one size that there are at the other, too."""
    there, here = ({s.shape for s in among if pattern_of(s.path) == pattern_of(leaf.path)} for among in (probe, full))
    return there <= here


def _refuse_vanished(small: tuple[Shape, ...], full: tuple[Shape, ...], growing: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a leaf of the base that the target has none like: a longer row of numbered layers has at least as many of every kind."""
    there = {leaf.path for leaf in full}
    count = Counter(pattern_of(leaf.path) for leaf in full)
    for pattern, n in Counter(pattern_of(leaf.path) for leaf in small).items():
        if n > count[pattern]:
            lost = next(leaf for leaf in small if pattern_of(leaf.path) == pattern and leaf.path not in there)
            before, after = (", ".join(f"{name}={pair[i]}" for name, pair in growing.items()) for i in (0, 1))
            raise ValueError(
                f"leaf {lost.path} is there at the base ({before}) and has no like at the target ({after}): the structure of the "
                f"parameters changes with {', '.join(growing)} beyond a numbered layer. Keep the same kinds of layers at all sizes."
            )


def base_shapes(at: Shapes, base: Mapping[str, Any], target: Mapping[str, Any], probe: Probe) -> tuple[tuple[Shape, Shape], ...]:
    """For each leaf of the target its shape at the base's sizes, and the leaf of the base network that plays its part.

    Where a size only adds layers, a leaf's shape at the base is that in a network of the target's layers and the base's other sizes.
    """
    whole = at(base)
    exact = {shape.path: shape for shape in whole}
    if not probe.structural:
        return tuple((exact[leaf.path], exact[leaf.path]) for leaf in probe.shapes)
    narrow = {shape.path: shape for shape in at({**base, **{name: target[name] for name in probe.structural}})}
    pairs = []
    for leaf in probe.shapes:
        by_structure = any(name in axis for axis in probe.axes[leaf.path] for name in probe.structural)
        shape = like(leaf, whole) if by_structure else narrow[leaf.path]
        part = None if shape is None else like(shape, whole)
        assert shape is not None
        assert part is not None
        pairs.append((shape, part))
    return tuple(pairs)


def _probe(at: Shapes, name: str, base: Any, target: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Leaf shapes with one size of the target replaced by the base's, or the least multiple of it that the model accepts."""
    whole = isinstance(base, numbers.Integral)
    multiples = [base * k for k in range(1, 17) if base * k != target[name]] if whole else [base]
    first: Exception | None = None
    for value in multiples:
        try:
            return at({**target, name: value})
        except (ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
            first = first or error
    others = ", ".join(f"{k}={v}" for k, v in target.items() if k != name)
    raise ValueError(
        f"size {name} could not be probed by itself: with {others or 'nothing else'}, none of {name} = {multiples[0]}, ..., "
        f"{multiples[-1]} builds a model. The constraint that failed at {name} = {multiples[0]}: {'' if first is None else cause(first)}. "
        "Choose base sizes that divide the target's."
    ) from first


def refuse_unbuildable(family: Family, sizes: Mapping[str, Any], x: Any) -> None:
    """Try a family at some sizes, under ``jax.eval_shape``, and say at which it fails and how.

    Raises
    ------
    ValueError
        If building the network, its ``init`` or its ``apply`` raises anything: the sizes, and the family's own error.

    Examples
    --------
    >>> def net(width):
    ...     assert width % 4 == 0, "four heads share the width"
    ...     return lambda key, x: jnp.ones((x.shape[1], width)), lambda w, x: x @ w
    >>> refuse_unbuildable(Family(net), dict(width=8), jnp.ones((2, 3)))
    >>> refuse_unbuildable(Family(net), dict(width=6), jnp.ones((2, 3)))
    Traceback (most recent call last):
    ...
    ValueError: the family fails at width=6: AssertionError: four heads share the width. Choose sizes that it can be built at.
    """
    x = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    try:
        model = family(**sizes)
        jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)
    except Exception as error:
        named = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(f"the family fails at {named}: {cause(error)}. Choose sizes that it can be built at.") from error


def cause(error: Exception) -> str:
    """An error in one line: its type and message, or, for a bare ``assert``, what it asserts.

    Examples
    --------
    >>> cause(ValueError("four heads share the width."))
    'ValueError: four heads share the width'
    """
    said = " ".join(str(error).split()).rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {said or (frames[-1].line if frames else '') or 'no message'}"
