"""Residual streams, read from the graph of activations.

A residual add is an ``add`` one of whose operands (the stream) is an ancestor of the other (the branch) with a parameter contraction
between. A branch that starts from an earlier point of the same stream counts too (parallel attention and MLP).
"""

from collections.abc import Mapping, Set
from typing import NamedTuple

from paperjax.trace.blocks import kind_of, of_one_block
from paperjax.trace.branch import CROSSED, Before, in_a_loop, inside_of, reach_of, steps_before
from paperjax.trace.coupled import confined, coupled, goes_on, joins_arms, loops, moved_on
from paperjax.trace.graph import CONTRACTING as CONTRACTING
from paperjax.trace.graph import Graph, Walk, added


class ResidualAdd(NamedTuple):
    """One ``stream + branch``.

    Attributes
    ----------
    path, op, node
        Where the add stands, its primitive, and the activation that it makes.
    operand, branch
        Which operand is added to the stream, and which activation that is.
    repeats
        How often it runs in one call (the lengths of the scans around it).
    leaves
        Leaves used in the branch, and those that serve its block alone (a modulation of both sublayers).
    writers
        Leaves in which the branch is linear and that together scale it: multiply each by c, and the branch is multiplied by c. Empty
        where there are none (a branch that ends in tanh, a weight used elsewhere too).
    beside
        Leaves that are added to the stream right before or after the branch: ``(h + f(h)) + b`` is ``h + (f(h) + b)``.
    late
        Whether a step of a loop over layers adds what the step before it made.
    """

    path: tuple[int, ...]
    op: str
    operand: int
    node: int
    branch: int
    repeats: int
    leaves: tuple[int, ...]
    writers: tuple[int, ...]
    beside: tuple[int, ...] = ()
    late: bool = False


def residual_adds(walk: Walk) -> tuple[ResidualAdd, ...]:
    """All residual adds, in the order of execution."""
    graph = Graph(walk)
    found: dict[int, tuple[ResidualAdd, int]] = {}
    branches: dict[int, set[int]] = {}

    def chain(node: int) -> set[int]:
        """Earlier points of the stream that runs through `node`, itself among them."""
        members = set()
        while True:
            members.add(node)
            if node in found:
                node = found[node][1]
            elif graph.moves(node) or added(graph, node):
                node = graph.nodes[node].parents[0]
            else:
                return members

    def onwards(add: int, members: Set[int]) -> set[int]:
        """Later points of the stream that an add writes into, itself among them."""
        points = {add, *(i for i in found if i not in members and chain(i) & members)}
        for i in range(min(points) + 1, len(graph.nodes)):
            on = graph.moves(i) or added(graph, i)
            before = found[i][1] if i in found else graph.nodes[i].parents[0] if on else None
            if before in points:
                points.add(i)
        return points

    def in_loops(add: int, members: Set[int], branch: int) -> tuple[Before, ...]:
        return steps_before(graph, branch, add, members, onwards(add, members), chain) if in_a_loop(graph, add) else ()

    def look(i: int, by_loops: bool) -> None:
        """Whether one of the two that an add adds is a stream, and the other its branch: of this step, or by way of the steps before."""
        for stream, branch in _ways(graph, i):
            members = chain(stream)
            if branch in members:
                continue
            reach, late = reach_of(graph, branch, i, members), False
            # What is added to another stream in every block (an embedding of time) is no stream itself.
            other = {n for n, r in reach.items() if r and n in found and found[n][1] not in members and not reach.get(found[n][1])}
            is_made = reach.get(branch) == CROSSED
            # A gate of a recurrent cell is a sum of what came in and of what the cell made of it before: a stream is one by other adds.
            if by_loops and not is_made and any(chain(found[k][1]) & (members | onwards(i, members)) for k in found):
                before = [one.deep for one in in_loops(i, members, branch) if one.reach.get(branch) == CROSSED]
                is_made, late = bool(before), any(before)
            if is_made and not other:
                keep(i, stream, branch, reach, late)
                return
            if is_made:
                foreign[i] = other

    def keep(i: int, stream: int, branch: int, reach: Mapping[int, int], late: bool = False) -> None:
        node = graph.nodes[i]
        branches[i] = inside_of(graph, i, reach)
        found[i] = ResidualAdd(node.path, node.op, node.parents.index(branch), i, branch, node.repeats, (), (), late=late), stream

    def origin(node: int) -> int:
        """Where a stream was last written into, or entered the step of a loop, or began."""
        while node not in found and graph.nodes[node].op != "carry" and (graph.moves(node) or added(graph, node)):
            node = graph.nodes[node].parents[0]
        return node

    def continues(i: int) -> bool:
        return loops(graph, i, graph.nodes[i].path) or any(origin(parent) in found for parent in graph.nodes[i].parents)

    def couple(i: int) -> None:
        """Whether an add is one of another stream, coupled with those found: ``x += f(y); y += g(x)``."""
        around = [n for n in found if i in branches[n]]
        shut = confined(graph, i, around, branches)
        # The last of a row of them may be seen by the last branch alone, or by what adds the streams up.
        if not (around or i in foreign) or (shut and not continues(i)):
            return
        for stream, branch in _ways(graph, i):
            members = chain(stream)
            others = {point for n in around for point in chain(found[n][1])}.union(*(chain(n) for n in foreign.get(i, ())))
            others = {point for point in moved_on(graph, others) if point < i}
            reach = reach_of(graph, branch, i, members | others)
            root = origin(stream)
            begins = root in found or not reach_of(graph, stream, i, others).get(stream)
            if graph.nodes[root].op == "carry":
                # A state over time is no stream beside one that begins anew in every step.
                begins = any(graph.nodes[o].op == "carry" and graph.nodes[o].path == graph.nodes[root].path for o in others)
            mine, theirs = inside_of(graph, i, reach), branches.get(root, set())
            like = not shut or graph.nodes[root].op == "carry" or (root in found and kind_of(graph, theirs) == kind_of(graph, mine))
            if begins and like and branch not in members and reach.get(branch) == CROSSED:
                keep(i, stream, branch, reach)
                begun[i] = others - members
                return

    begun: dict[int, set[int]] = {}
    foreign: dict[int, set[int]] = {}
    adds = [i for i, node in enumerate(graph.nodes) if node.op in ("add", "add_any", "sub") and len(node.parents) == 2]
    # A stream goes on. What does not (a condition that is added in every branch) is looked at when streams are known.
    on = {i: goes_on(graph, i) for i in adds}
    for some in ([i for i in adds if on[i]], adds):
        for i in some:
            if i not in found:
                look(i, by_loops=False)
        for first in (True, False):
            for i in some:
                if i not in found and (continues(i) or not first):
                    couple(i)
    for i in adds:
        if i not in found and in_a_loop(graph, i):
            look(i, by_loops=True)
    found = dict(sorted(found.items()))
    for i, (add, stream) in list(found.items()):
        members, known = chain(stream), found.keys() - {i}
        stops = coupled(graph, i, add.branch, members, branches, begun.get(i, set()), chain)
        if stops or joins_arms(chain(add.branch), members, known):
            reach, before = reach_of(graph, add.branch, i, members | stops), chain(add.branch)
            # A sum of two streams is no branch of one of them.
            if not add.late and (joins_arms(before, members, known) or before & stops or reach.get(add.branch) != CROSSED):
                del found[i], branches[i]
                continue
            branches[i] = inside_of(graph, i, reach)
        for one in in_loops(i, members | stops, add.branch):
            branches[i] = inside_of(graph, i, one.reach, branches[i])
    for i, (add, stream) in found.items():
        found[i] = add._replace(writers=_writers(graph, i, add.branch, branches[i])), stream
    shared = of_one_block(graph, branches)

    def leaves(add: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys(site.leaf for n in sorted(branches[add] | shared[add]) for site in graph.sites.get(n, ())))

    beside = {i: _beside(graph, i, stream) for i, (_, stream) in found.items()}
    return tuple(add._replace(leaves=tuple(dict.fromkeys((*leaves(i), *beside[i]))), beside=beside[i]) for i, (add, _) in found.items())


def _ways(graph: Graph, add: int) -> tuple[tuple[int, ...], ...]:
    """Stream and branch, either way round where nothing is subtracted."""
    parents = graph.nodes[add].parents
    return (parents, parents[::-1])[: 1 if graph.nodes[add].op == "sub" else 2]


def _beside(graph: Graph, add: int, stream: int) -> tuple[int, ...]:
    found: list[int] = []
    while len(graph.children[add]) == 1:
        add = graph.children[add][0]
        if not added(graph, add) and not (graph.moves(add) and graph.nodes[add].log_factor == 0):
            break
        found += added(graph, add)
    while len(graph.children[stream]) == 1 and added(graph, stream):
        found += added(graph, stream)
        stream = graph.nodes[stream].parents[0]
    return tuple(leaf for leaf in dict.fromkeys(found) if leaf in graph.used_once)


def _writers(graph: Graph, add: int, branch: int, inside: set[int]) -> tuple[int, ...]:
    """Leaves that, all multiplied by c > 0, multiply the branch by c and nothing else; none where there are no such leaves."""
    found = (leaves for leaves in _last_factors(graph, branch, inside, {}) if _scale_the_branch(graph, add, branch, inside, leaves))
    return tuple(sorted(next(found, ())))


def _scale_the_branch(graph: Graph, add: int, branch: int, inside: set[int], leaves: frozenset[int]) -> bool:
    if not leaves <= graph.used_once:
        return False
    power: dict[int, int | None] = {}
    for node in sorted(inside):
        power[node] = _power(graph, node, leaves, power)
        # What is multiplied must be seen by the branch alone.
        seen = node in graph.outputs or any(child != add and child not in inside for child in graph.children[node])
        if power[node] is None or (power[node] and seen):
            return False
    where = {site.node for node in inside for site in graph.sites.get(node, ()) if site.leaf in leaves}
    return power.get(branch) == 1 and all(graph.nodes[node].repeats == graph.nodes[add].repeats for node in where)


Ways = list[frozenset[int]]
# Gates multiply gates: so many ways to scale a branch are looked at.
MANY = 16


def _last_factors(graph: Graph, node: int, inside: set[int], known: dict[int, Ways]) -> Ways:
    """Sets of leaves, one of them the last to multiply something on each way that leads into `node`."""
    if node not in inside:
        return []
    if node not in known:
        known[node] = []
        known[node] = list(dict.fromkeys(_last_factors_of(graph, node, inside, known)))[:MANY]
    return known[node]


def _last_factors_of(graph: Graph, node: int, inside: set[int], known: dict[int, Ways]) -> Ways:
    sites, here = graph.sites.get(node, ()), graph.nodes[node]
    factors = frozenset(site.leaf for site in sites if site.effect == "times")
    if factors:
        return [factors]
    added = frozenset(site.leaf for site in sites if site.effect == "plus")
    ways = here.parents
    if here.op == "select_n" and here.how == "homogeneous":
        ways = tuple(parent for parent in ways if graph.nodes[parent].how != "sign")
    if here.how in ("bilinear", "first"):
        ways = here.parents if here.how == "bilinear" else here.parents[:1]
        return [found | added for way in ways for found in _last_factors(graph, way, inside, known)]
    if here.how not in ("linear", "homogeneous") or not ways:
        return []
    together: Ways = [added]
    for way in ways:
        together = [a | b for a in together for b in _last_factors(graph, way, inside, known)][:MANY]
    return together


def _power(graph: Graph, node: int, scaled: frozenset[int], power: Mapping[int, int | None]) -> int | None:
    """The power of c that multiplies `node` when the leaves in `scaled` are multiplied by c; `None` if it is not multiplied at all."""
    here, sites = graph.nodes[node], graph.sites.get(node, ())
    if any(site.leaf in scaled and site.effect == "other" for site in sites):
        return None
    times = {int(site.leaf in scaled) for site in sites if site.effect == "times"} or {0}
    parents = [power.get(parent, 0) for parent in here.parents]
    known = [p for p in parents if p is not None]
    if len(known) < len(parents) or len(times) > 1:
        return None
    if here.op in ("carry", "carried") or here.how in ("nonlinear", "affine"):
        result = None if any(known) else 0
    elif here.how == "bilinear":
        result = sum(known) * (1 if len(known) == 2 else 2)
    elif here.how == "first":
        result = None if any(known[1:]) else known[0]
    elif here.how == "sign":
        return 0
    else:
        signs = [graph.nodes[parent].how == "sign" for parent in here.parents]
        terms = {p for p, sign in zip(known, signs) if not (sign and here.op == "select_n")}
        terms |= {int(site.leaf in scaled) for site in sites if site.effect == "plus"}
        result = None if len(terms) > 1 else next(iter(terms), 0)
    return None if result is None else result + times.pop()


def branch_factor(graph: Graph, add: ResidualAdd, taken: Set[int]) -> float:
    """Logarithm of the known numbers that multiply a branch after its last function, without those that are its leaves' own (`taken`)."""
    node, log = add.branch, 0.0
    while not graph.contracts(node):
        here = graph.nodes[node]
        if here.how not in ("linear", "affine", "homogeneous") or len(here.parents) != 1:
            return log
        log += 0.0 if node in taken else here.log_factor
        node = here.parents[0]
    return log
