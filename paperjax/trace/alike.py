"""Which residual branch and which leaf of a deeper network plays the part of which at the base.

Names tell it where they are written out (``attention_3``). Where layers are numbered in one row (Flax's ``Dense_7``), the same name may be
another layer at another depth, so branches of one name are told apart by what they are made of and by the stream that they write into,
and leaves by their place in the branch.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from paperjax.trace.graph import Graph, Walk, added
from paperjax.trace.probe import Shape, aligned, numbers_of, pattern_of
from paperjax.trace.streams import ResidualAdd


class Network(NamedTuple):
    """One network: its walk, its residual adds, the shapes of its leaves."""

    walk: Walk
    adds: tuple[ResidualAdd, ...]
    shapes: tuple[Shape, ...]


Keys = list[Hashable]


def kinds(here: Network, there: Network) -> tuple[Keys, Keys]:
    """For each residual add of two networks a key; adds with the same key are of one kind.

    They have leaves of the same names but for the numbers of layers that grow: the layers of an encoder are not those of its decoder, nor
    is a long skip over all of them one of them. Those of the same names are told apart further by how often their leaves have a name and
    how they are used, and by the stream, wherever that makes as many kinds of them in both networks.
    """
    named = without_growing_numbers([s.path for s in here.shapes], [s.path for s in there.shapes])
    both = here, there
    keys: list[Keys] = [[frozenset(named(of.shapes[leaf].path) for leaf in add.leaves) for add in of.adds] for of in both]
    keys = _refined(keys, [_structures(of, named) for of in both])
    keys = _refined(keys, [_ranks(_streams(of), mine) for of, mine in zip(both, keys)])
    number = {key: n for n, key in enumerate(dict.fromkeys((*keys[0], *keys[1])))}
    return [number[key] for key in keys[0]], [number[key] for key in keys[1]]


def _refined(keys: list[Keys], finer: list[Keys]) -> list[Keys]:
    """The keys of two networks with finer ones beside them, where a group has the same finer ones in both."""
    groups: list[dict[Hashable, set[Hashable]]] = [{}, {}]
    for group, of, more in zip(groups, keys, finer):
        for key, one in zip(of, more):
            group.setdefault(key, set()).add(one)
    same = {key for key, found in groups[0].items() if groups[1].get(key) == found}
    return [[(key, one) if key in same else key for key, one in zip(of, more)] for of, more in zip(keys, finer)]


def _structures(of: Network, named: Callable[[str], str]) -> Keys:
    uses: dict[int, set[Hashable]] = {}
    for s in of.walk.sites:
        uses.setdefault(s.leaf, set()).add((s.kind, s.inside, s.out, s.stack, s.window))
    used = {leaf: repr((named(of.shapes[leaf].path), sorted(how, key=repr))) for leaf, how in uses.items()}
    return [tuple(sorted(used[leaf] for leaf in add.leaves)) for add in of.adds]


def _streams(of: Network) -> list[int]:
    """For each residual add, where the stream that it writes into begins."""
    graph, before = Graph(of.walk), dict[int, int]()

    def start(node: int) -> int:
        while node not in before and (graph.moves(node) or added(graph, node)):
            node = graph.nodes[node].parents[0]
        return before.get(node, node)

    for add in of.adds:
        before[add.node] = start(graph.nodes[add.node].parents[1 - add.operand])
    return [before[add.node] for add in of.adds]


def _ranks(of: Sequence[int], keys: Keys) -> Keys:
    """The streams, numbered within each kind."""
    seen: dict[Hashable, dict[int, int]] = {}
    for key, stream in zip(keys, of):
        mine = seen.setdefault(key, {})
        mine.setdefault(stream, len(mine))
    return [seen[key][stream] for key, stream in zip(keys, of)]


def paired(keys: Keys, base_keys: Keys) -> list[int]:
    """For each residual add, the one of its kind at the base with its number, or the last; where there is none of its kind, of all."""
    found, seen = [], dict[Hashable, int]()
    for i, key in enumerate(keys):
        like = [k for k, other in enumerate(base_keys) if other == key]
        n = seen[key] = seen.get(key, -1) + 1
        found.append(like[min(n, len(like) - 1)] if like else min(i, len(base_keys) - 1))
    return found


def parts(
    here: Network, there: Network, keys: Keys, base_keys: Keys, pairs: Sequence[tuple[Shape, Shape]]
) -> tuple[tuple[Shape, Shape, bool], ...]:
    """For each leaf the leaf of the base that plays its part, and whether it is sure that there is one.

    `pairs` are its shape at the base's widths, and the leaf that it is by name and shape.
    """
    ours, theirs = _places(here, keys), _places(there, base_keys)
    mine = [(pattern_of(shape.path), narrow.shape, ours[i]) for i, (shape, (narrow, _)) in enumerate(zip(here.shapes, pairs))]
    base = [(pattern_of(shape.path), shape.shape, theirs[k]) for k, shape in enumerate(there.shapes)]
    found, places = [], dict[Hashable, set[Hashable]]()
    for *named, place in mine:
        places.setdefault(tuple(named), set()).add(place)
    rows, likes = _grouped(mine, here.shapes), _grouped(base, there.shapes)
    for one, (narrow, part), shape in zip(mine, pairs, here.shapes):
        row, like = rows[one], likes.get(one, [])
        # As many as at the base are the same ones, in turn.
        in_turn = like[row.index(shape)] if len(row) == len(like) else None
        # Where all of a name and shape have one place, the name says which is meant.
        found.append((narrow, in_turn or aligned(shape.path, like) or part, bool(like) or len(places[one[:2]]) == 1))
    return tuple(found)


def _grouped(keys: Sequence[Hashable], shapes: Sequence[Shape]) -> dict[Hashable, list[Shape]]:
    """Leaves by key, in the order of their numbers."""
    found: dict[Hashable, list[Shape]] = {}
    for key, shape in sorted(zip(keys, shapes), key=lambda pair: numbers_of(pair[1].path)):
        found.setdefault(key, []).append(shape)
    return found


OUTSIDE = "outside of all branches"


def _places(of: Network, keys: Keys) -> list[Hashable]:
    """For each leaf the kind of the innermost branch that it is used in, and its place among the leaves of that alone."""
    inner: dict[int, int] = {}
    for k in sorted(range(len(of.adds)), key=lambda k: len(of.adds[k].leaves), reverse=True):
        inner |= dict.fromkeys(of.adds[k].leaves, k)
    place: dict[int, Hashable] = {}
    for k, add in enumerate(of.adds):
        own = [leaf for leaf in add.leaves if inner[leaf] == k]
        place |= {leaf: (keys[k], n) for n, leaf in enumerate(own)}
    return [place.get(leaf, OUTSIDE) for leaf in range(len(of.shapes))]


def without_growing_numbers(paths: Sequence[str], base_paths: Sequence[str]) -> Callable[[str], str]:
    """A function that leaves out of a path those of its numbers that count layers whose number grows."""
    values: dict[str, list[tuple[set[int], set[int]]]] = {}
    for which, among in enumerate((paths, base_paths)):
        for path in among:
            numbers = numbers_of(path)
            seen = values.setdefault(pattern_of(path), [(set(), set()) for _ in numbers])
            for place, number in zip(seen, numbers):
                place[which].add(number)

    def named(path: str) -> str:
        kept = [str(n) if here == there else "#" for n, (here, there) in zip(numbers_of(path), values[pattern_of(path)])]
        return f"{pattern_of(path)} {' '.join(kept)}"

    return named
