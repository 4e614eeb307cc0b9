"""How the number of residual branches grows, whether the stream carries what they write unchanged, and what else is added to it."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence, Set
from typing import NamedTuple

from paperjax.trace.alike import Keys, Network, without_growing_numbers
from paperjax.trace.graph import Graph, Walk, added
from paperjax.trace.probe import Shape, pattern_of
from paperjax.trace.streams import ResidualAdd

ROUNDING = 1e-9


class Growth(NamedTuple):
    """How many branches of one kind there are, over how many at the base.

    Attributes
    ----------
    whole
        In all of the network: what the learning rate of a leaf in the branch follows.
    inside
        For each branch that it is a part of itself (the inner adds of a residual group): what the multiplier follows.
    shared
        Leaves that more of the branches use than at the base: weights that layers share.
    """

    whole: float = 1.0
    inside: float = 1.0
    shared: tuple[int, ...] = ()


def growths(here: Network, there: Network, keys: Keys, base_keys: Keys, like: Sequence[int]) -> tuple[Growth, ...]:
    """For each residual add, how the number of its kind grows.

    The kinds of a network and its base are `paperjax.trace.alike.kinds`; `like` says which leaf of the base each leaf is compared with.
    """
    walk, adds, shapes = here

    def count(kind: Hashable, kinds: Keys, among: Sequence[ResidualAdd]) -> int:
        return sum(add.repeats for add, its in zip(among, kinds) if kind is None or its == kind)

    # A layer whose like the base has not by name (names of its own, written out) is counted with all.
    kinds = [key if key in base_keys else None for key in keys]
    whole = [count(kind, keys, adds) / count(kind, base_keys, there.adds) if there.adds else math.inf for kind in kinds]
    for i in _read_otherwise(here, there, keys, base_keys):
        whole[i] = math.inf
    leaves = [frozenset(add.leaves) for add in adds]
    looped = {site.leaf for site in walk.sites if site.reused}
    uses = Counter(leaf for add in adds for leaf in add.leaves)
    base_uses = Counter(leaf for add in there.adds for leaf in add.leaves)
    sites, base_sites = (Counter(site.leaf for site in of.walk.sites) for of in (here, there))
    steps, base_steps = (_steps(of.walk) for of in (here, there))

    def more(leaf: int) -> bool:
        # With one block at the base, what serves both of its sublayers is not yet known for a part of it.
        ours, base = (uses[leaf], base_uses[like[leaf]]) if base_uses[like[leaf]] else (sites[leaf], base_sites[like[leaf]])
        return ours > base > 0

    graph = Graph(walk)

    def within(i: int, k: int) -> bool:
        """Whether a branch is a part of another, by its leaves, or, where those are all of the other's, by what that is made of."""
        if leaves[i] != leaves[k] or i >= k:
            return leaves[i] < leaves[k]
        stream = graph.nodes[adds[k].node].parents[1 - adds[k].operand]
        return graph.made_of(adds[k].branch, adds[i].node) and not graph.made_of(stream, adds[i].node)

    found = []
    for i, mine in enumerate(leaves):
        around = [k for k in range(len(leaves)) if within(i, k)]
        outer = min(around, key=lambda k: len(leaves[k]), default=None)
        # A loop over time uses its leaves as often at the base.
        again = [leaf for leaf in mine if leaf in looped and adds[i].repeats > 1 and steps[leaf] > base_steps[like[leaf]]]
        shared = [leaf for leaf in mine if more(leaf) or leaf in again]
        shared = [leaf for leaf in shared if not _holds_layers(walk, leaf, shapes[leaf], there.shapes)]
        found.append(Growth(whole[i], whole[i] / (1.0 if outer is None else whole[outer]), tuple(sorted(shared)) if whole[i] != 1 else ()))
    return tuple(found)


def _read_otherwise(here: Network, there: Network, keys: Keys, base_keys: Keys) -> list[int]:
    """Branches whose leaves are at the base in branches of other leaves, and of more kinds or fewer: one layer says less than two."""
    named = without_growing_numbers([s.path for s in here.shapes], [s.path for s in there.shapes])
    ours, theirs = ([{named(of.shapes[leaf].path) for leaf in add.leaves} for add in of.adds] for of in (here, there))
    new, old = ([i for i, key in enumerate(mine) if key not in others] for mine, others in ((keys, base_keys), (base_keys, keys)))
    unlike = [i for i in new if any(ours[i] & theirs[k] and ours[i] != theirs[k] for k in old)]
    kinds = {keys[i] for i in unlike}
    return unlike if len(kinds) != len({base_keys[k] for k in old if any(ours[i] & theirs[k] for i in unlike)}) else []


def _steps(walk: Walk) -> Counter[int]:
    """How often each leaf is used in one call."""
    found = Counter[int]()
    for site in walk.sites:
        found[site.leaf] += site.repeats
    return found


def _holds_layers(walk: Walk, leaf: int, shape: Shape, base_shapes: Sequence[Shape]) -> bool:
    """Whether a leaf has an axis that grows and that no use sums over or leaves free: one of layers, taken one by one."""
    sizes = next((like.shape for like in base_shapes if like.path == shape.path), shape.shape)
    named = {axis for site in walk.sites if site.leaf == leaf for axis in (*site.inside, *site.out, *site.window)}
    return any(a != b and axis not in named for axis, (a, b) in enumerate(zip(shape.shape, sizes)))


def stream_factors(walk: Walk, adds: Sequence[ResidualAdd], taken: Set[int]) -> tuple[tuple[float, bool], ...]:
    """For each residual add, the logarithm of the known number on the stream's side, and whether the stream fades or grows by it.

    Numbers in `taken` are a leaf's own (an embedding's over the root of the width).

    It does where nothing but the number stands between one add and the next: ``(h + f(h)) / sqrt(2)``, layer after layer. After a norm
    it is only a number for the branch to be compared with, ``norm(a h + f(h)) = norm(h + f(h) / a)``.
    """
    graph, by_node = Graph(walk), {add.node: add for add in adds}

    def behind(node: int) -> tuple[int, float]:
        """What an activation was before it was moved and multiplied by numbers, or the step of its loop began; and those numbers."""
        log = 0.0
        while graph.moves(node) and graph.nodes[node].op not in ("carry", "carried"):
            log += 0.0 if node in taken else graph.nodes[node].log_factor
            node = graph.nodes[node].parents[0]
        return node, log

    before = {add.node: behind(graph.nodes[add.node].parents[1 - add.operand]) for add in adds}
    fading = {node for node, (root, log) in before.items() if root in by_node and abs(log) > ROUNDING}
    for end, here in enumerate(graph.nodes):
        if here.op != "carried":
            continue
        node, total = behind(here.parents[0])
        passed = []
        while node in by_node:
            passed.append(node)
            node, log = before[node]
            total += log
        if graph.nodes[node].op == "carry" and graph.nodes[node].path == graph.nodes[end].path and abs(total) > ROUNDING:
            fading.update(passed)
    return tuple((before[add.node][1], add.node in fading) for add in adds)


def on_stream(here: Network, there: Network) -> tuple[int, ...]:
    """Leaves that multiply a residual stream, or add onto it, between one of its adds and the next, more often than at the base.

    Such are the gains and biases of post-norm layers, ``h = norm(h + f(h)) * g + b``. The last norm, after all blocks, is none, nor is one
    between two stacks.
    """
    uses = [{(leaf, pattern_of(of.shapes[leaf].path)): n for leaf, n in _uses_between(of).items()} for of in (here, there)]
    now, before = ({name: sum(n for (_, other), n in found.items() if other == name) for _, name in found} for found in uses)
    return tuple(sorted(leaf for leaf, name in uses[0] if now[name] > before.get(name, 0)))


def _uses_between(of: Network) -> Counter[int]:
    """How often leaves act on the stream between two adds, or an add and the step of a loop after it, with no contraction on the way."""
    graph, found = Graph(of.walk), Counter[int]()
    adds, branches = {add.node for add in of.adds}, {leaf for add in of.adds for leaf in add.leaves}
    loops = {graph.nodes[node].path[: len(end.path)] for node in adds for end in graph.nodes if end.op == "carried"}
    ends = [graph.nodes[add.node].parents[1 - add.operand] for add in of.adds]
    ends += [end.parents[0] for end in graph.nodes if end.op == "carried" and end.path in loops]
    seen: set[int] = set()
    for end in ends:
        seen |= _between_adds(graph, end, adds)
    for node in seen:
        for site in graph.sites.get(node, ()):
            if site.leaf not in branches:
                found[site.leaf] += site.repeats
    return found


def _between_adds(graph: Graph, end: int, adds: set[int]) -> set[int]:
    """What an activation is made of since the last add on each way to it, but for what a leaf's product is on the way of."""
    todo, back, starts = [end], set[int](), set[int]()
    while todo:
        node = todo.pop()
        if node in adds or graph.nodes[node].op == "carry":
            starts.add(node)
        elif node not in back and not graph.contracts(node):
            back.add(node)
            todo.extend(graph.nodes[node].parents)
    reached: set[int] = set()
    for node in sorted(back):
        if any(parent in starts or parent in reached for parent in graph.nodes[node].parents):
            reached.add(node)
    return reached


def unread(walk: Walk, adds: Sequence[ResidualAdd]) -> dict[int, tuple[int, ...]]:
    """Sums in a row that are no residual adds: their number, and the equation of the last.

    ``h + f(h) + g(c)`` in each layer, ``skips + g(h)`` beside the stream, ``x + v`` of two streams. A stream less what is made of it alone
    (its mean) is none.
    """
    graph = Graph(walk)
    streams = {add.node: graph.nodes[add.node].parents[1 - add.operand] for add in adds}
    row, found, entering = [0] * len(graph.nodes), dict[int, tuple[int, ...]](), dict[tuple[int, ...], list[int]]()
    seen = _seen(graph)
    for i, here in enumerate(graph.nodes):
        if here.op == "carry":
            entering.setdefault(here.path, []).append(i)
        if here.op == "carried":
            carries = entering[here.path]
            before = max(row[k] for k in carries)
            steps = graph.nodes[carries[0]].repeats // here.repeats
            row[i] = before + max(row[here.parents[0]] - before, 0) * steps
        elif i in streams or ((graph.moves(i) or added(graph, i)) and here.parents):
            row[i] = row[streams.get(i, here.parents[0])]
        elif here.op in ("add", "add_any", "sub") and len(here.parents) == 2:
            first, second = here.parents
            row[i] = max(row[first], row[second]) + (here.op != "sub" or not graph.made_of(second, graph.root(first)))
        if i in seen and row[i] > 1:
            found.setdefault(row[i], here.path)
    return found


def _seen(graph: Graph) -> set[int]:
    """What an output is made of, the steps of loops among it."""
    todo, found = list(graph.outputs), set[int]()
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            after = graph.nodes[node].next
            todo.extend((*graph.nodes[node].parents, *(() if after is None else (after,))))
    return found
