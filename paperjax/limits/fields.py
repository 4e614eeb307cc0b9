"""What is known of the values of `paperjax.limits.nodes` before anything is computed: which are Gaussian, centred, independent."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paperjax.limits.nodes import (
    Add,
    Axes,
    Carried,
    Const,
    Det,
    Drawn,
    Entries,
    Field,
    Func,
    Key,
    Linear,
    Lookup,
    Mixed,
    Paired,
    Part,
    Prod,
    Scale,
    Scanned,
    Stacked,
    Wide,
)  # fmt: skip
from paperjax.limits.subsets import apart


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
    if isinstance(node, Paired):
        return (centred(node.u) or centred(node.v)) and independent(node.u, node.v)
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
    if isinstance(node, Paired):
        return sources(node.u) | sources(node.v)
    if isinstance(node, Drawn):
        return frozenset().union(*(sources(arg) for arg in node.args if isinstance(arg, Wide)))
    parts = {Func: "fields", Prod: "factors", Stacked: "parts", Mixed: "parts"}[type(node)]
    return frozenset().union(*(sources(part) for part in getattr(node, parts)))


@memoized
def joins_positions(node: Wide) -> bool:
    """Whether a value is a function of several positions, or of several coordinates, that is not linear: a `Paired` or `Drawn` is in it."""
    return isinstance(node, (Paired, Drawn)) or any(map(joins_positions, _parts(node)))


@memoized
def is_drawn(node: Wide) -> bool:
    """Whether moments of a value are found by Monte Carlo."""
    return isinstance(node, Drawn) or any(map(is_drawn, _parts(node)))


@memoized
def is_bent(node: Wide) -> bool:
    """Whether the slopes of a value in the leaves next to it are random: a nonlinear function of something that varies is in it."""
    if isinstance(node, (Func, Prod)):
        return not all(map(is_still, node.fields if isinstance(node, Func) else node.factors))
    return isinstance(node, (Paired, Drawn)) or any(map(is_bent, _parts(node)))


@memoized
def is_joined(node: Wide) -> bool:
    """Whether coordinates of a value are of several kinds: a `Mixed` is in it."""
    return isinstance(node, Mixed) or any(map(is_joined, _parts(node)))


def _parts(node: Wide) -> tuple[Wide, ...]:
    """What a value is made of at a coordinate."""
    if isinstance(node, (Add, Paired)):
        return node.u, node.v
    if isinstance(node, (Scale, Linear, Part)):
        return (node.u,)
    if isinstance(node, (Stacked, Mixed)):
        return node.parts
    if isinstance(node, Drawn):
        return tuple(arg for arg in node.args if isinstance(arg, Wide))
    return node.factors if isinstance(node, Prod) else node.fields if isinstance(node, Func) else ()


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


def times(u: Wide, number: float) -> Scale:
    """One node for a value times a known number."""
    made = u.__dict__.setdefault("_times", {})
    if number not in made:
        made[number] = Scale(u.axes, u, Det((), const=np.asarray(number)))
    return made[number]


def total(terms: Sequence[Wide]) -> Wide:
    """One node for a sum, whoever asks for it."""
    first, *rest = first_order(terms)
    made = first.__dict__.setdefault("_sums", {})
    if tuple(rest) not in made:
        node = first
        for term in rest:
            node = Add(node.axes, node, term)
        made[tuple(rest)] = node
    return made[tuple(rest)]


def first_order(terms: Sequence[Wide]) -> tuple[Wide, ...]:
    """Values in the order in which they were met first, whoever asks: one that is the same in every process, unlike their addresses'."""
    together = frozenset(collections.Counter(terms).items())
    for term in terms:
        known = term.__dict__.get("_orders", {}).get(together)
        if known:
            return known
    terms[0].__dict__.setdefault("_orders", {})[together] = tuple(terms)
    return tuple(terms)


def multiple(terms: Mapping[Wide, float]) -> tuple[Wide, float]:
    """A sum of values times numbers, as a number times one node for all its multiples: the first of them that was asked for.

    Fields that are multiples of each other must be one, for their joint covariance is singular.
    """
    order = first_order(list(terms))
    unit = terms[order[0]]
    made = order[0].__dict__.setdefault("_multiples", {})
    key = tuple((z, float(f"{terms[z] / unit:.12g}")) for z in order)
    if key not in made:
        made[key] = total([z if terms[z] == 1 else times(z, terms[z]) for z in order]), unit
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
    return key[: 2 if key[0] == "scan" else 1]


@memoized
def origins(node: Wide) -> frozenset[Key]:
    """Leaves that a value depends on at a given coordinate."""
    return frozenset(map(_origin, sources(node)))


def _share(a: Key, b: Key) -> bool:
    """Keys are ``(leaf, entries, way, *ranges)``, or ``("scan", which, *ranges)`` for all that a scan carries."""
    if a == b:
        return True
    if _origin(a) != _origin(b):
        return False
    if a[0] == "scan":
        return _meet(a[2:], b[2:], "what a scan carries")
    separate = apart(a[1], b[1])
    if separate:
        return False
    if separate is None:
        raise NotImplementedError(f"{a[0]}: two uses of this leaf share some of its entries, and not all of them.")
    if a[2] != b[2]:
        raise NotImplementedError(
            f"{a[0]}: this leaf is used both ways round (as W and as its transpose, as a table and as a matrix, before and after a "
            "shuffle, with its rows or its window in another order), and what is made of both meets. At infinite width the two are not "
            "independent, and no Gaussian limit of it is known here."
        )
    return _meet(a[3:], b[3:], f"{a[0]}: what this leaf makes")


def _meet(one: Key, other: Key, what: str) -> bool:
    """Whether two ranges of coordinates of the same random numbers, which differ, have some in common."""
    if next((a.apart(b) for a, b in zip(one, other) if a != b), None):
        return False
    raise NotImplementedError(
        f"{what}: its coordinates overlap, or are cut in two ways ({one} and {other}). Cut a fused layer the same way everywhere, or write "
        "it as layers of their own."
    )
