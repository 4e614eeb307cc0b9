"""One layer that is written as a list of leaves whose results are put together: heads, one by one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from paperjax.trace.graph import CONTRACTING, Graph, Site, Unresolved, Walk
from paperjax.trace.probe import Shape, pattern_of

LISTED = "it is one of a list whose number grows, and whose results are put together: heads, or copies?"


def growing_lists(found: Walk, shapes: Sequence[Shape], axes: Mapping[str, tuple[frozenset[str], ...]]) -> Iterator[Unresolved]:
    """Leaves of a list whose results are concatenated, and then summed over, where their number grows and not only their size.

    Such a leaf is part of a layer with one more axis. Alone it looks as if it led to finitely many coordinates: ``(d, 8)`` for one of d/8
    heads, which ``(heads, d, 8)`` does not.
    """
    graph = Graph(found)
    for site in found.sites:
        names = frozenset().union(*(axes[shapes[site.leaf].path][a] for a in site.inside))
        joined = None if site.operand is None or not names else graph.root(site.operand)
        if joined is None or graph.nodes[joined].op not in ("concatenate", "stack") or len(graph.nodes[joined].parents) < 2:
            continue
        for leaf, op, free in _elements(graph, joined, shapes):
            grown = {name for a in free for name in axes[shapes[leaf].path][a]}
            if grown != names:
                yield Unresolved(leaf, op, LISTED)


def summed_lists(found: Walk, shapes: Sequence[Shape], base_shapes: Sequence[Shape]) -> Iterator[Unresolved]:
    """Leaves of a list whose results are added up, where their number grows: ``sum_j head_j @ o_j`` has ``heads * d`` terms, and not d.

    What acts on what another of the list has acted on is no such list: the output may be a sum over layers.
    """
    graph = Graph(found)
    here, there = (Counter(pattern_of(shape.path) for shape in of) for of in (shapes, base_shapes))
    lists: dict[tuple[str, tuple[int, ...]], list[Site]] = {}
    for site in found.sites:
        pattern = pattern_of(shapes[site.leaf].path)
        if here[pattern] > there[pattern] > 0 and site.kind in CONTRACTING and site.out and site.operand is not None:
            lists.setdefault((pattern, shapes[site.leaf].shape), []).append(site)
    for sites in lists.values():
        at: dict[int, list[Site]] = {}
        for site in sites:
            for node in sums_behind(graph, site.node):
                at.setdefault(node, []).append(site)
        together = {a.leaf: a for members in at.values() for a in members if any(a.leaf != b.leaf and apart(graph, a, b) for b in members)}
        yield from (Unresolved(leaf, together[leaf].op, LISTED) for leaf in sorted(together))


def sums_behind(graph: Graph, node: int) -> list[int]:
    """Sums that an activation is a term of, as long as nothing else is made of it."""
    found: list[int] = []
    while len(graph.children[node]) == 1 and node not in graph.outputs:
        node = graph.children[node][0]
        op = graph.nodes[node].op
        if op in ("add", "add_any", "sub") or graph.adds_up(node):
            found.append(node)
        elif not (graph.moves(node) or op in ("concatenate", "stack")):
            break
    return found


def apart(graph: Graph, a: Site, b: Site) -> bool:
    """Whether two uses of leaves act on activations neither of which is made of the other."""
    if a.operand is None or b.operand is None:
        return False
    first, last = sorted((graph.root(a.operand), graph.root(b.operand)))
    return first == last or not graph.made_of(last, first)


def _elements(graph: Graph, joined: int, shapes: Sequence[Shape]) -> list[tuple[int, str, tuple[int, ...]]]:
    """Leaves that have a part to themselves and a like of their own name and shape in every other, with primitive and free axes."""
    behind = [graph.behind(part) for part in dict.fromkeys(graph.nodes[joined].parents)]
    used = [{site.leaf for node in nodes for site in graph.sites.get(node, ())} for nodes in behind]
    parts = []
    for i, nodes in enumerate(behind):
        # Slices of one leaf are no list.
        own = used[i].difference(*(other for k, other in enumerate(used) if k != i))
        found = [site for node in nodes for site in graph.sites.get(node, ())]
        parts.append([site for site in found if site.leaf in own and site.kind == "product" and site.out])
    kinds = [{(pattern_of(shapes[site.leaf].path), shapes[site.leaf].shape) for site in part} for part in parts]
    common = kinds[0].intersection(*kinds)
    alike = [s for part in parts for s in part if (pattern_of(shapes[s.leaf].path), shapes[s.leaf].shape) in common]
    return [(site.leaf, site.op, site.out) for site in sorted(alike, key=lambda site: site.leaf)]
