"""What lies outside the residual streams and serves the branches of one block: a modulation of both of its sublayers (adaLN)."""

from collections.abc import Mapping, Set

from paperjax.trace.graph import Graph


def of_one_block(graph: Graph, inside: Mapping[int, Set[int]]) -> dict[int, set[int]]:
    """For each residual add, the weighted activations outside all branches that are part of its block.

    Such an activation feeds nothing but branches. It is a block's if those are one branch; if it is made in a loop over blocks, of weights
    of each; or if its like serves others, as one projection to each block does. What serves the branches of all blocks (an embedding of
    time, an encoder that every decoder layer looks at) has no like, and is no block's.

    Parameters
    ----------
    graph
        The activations.
    inside
        For each residual add (by its node), the branch's own activations.

    Returns
    -------
    dict
        For each residual add, a set of nodes.
    """
    serves = _serves(graph, inside)
    shared = {node: adds for node, adds in serves.items() if adds and graph.sites.get(node)}
    like: dict[object, set[frozenset[int]]] = {}
    for node, adds in shared.items():
        like.setdefault(_look(graph, node, adds), set()).add(adds)
    found: dict[int, set[int]] = {add: set() for add in inside}
    for node, adds in shared.items():
        others = [served for served in like[_look(graph, node, adds)] if not served & adds]
        kinds = {kind_of(graph, inside[add]) for add in adds}
        # Stages of several blocks have a like, too: fewer stages than a stage has blocks of one kind.
        repeated = bool(others) and (len(kinds) == len(adds) or len(others) + 1 >= len(adds))
        if len(adds) == 1 or repeated or _in_a_loop_over_blocks(graph, node, adds):
            for add in adds:
                found[add].add(node)
    return found


def _serves(graph: Graph, inside: Mapping[int, Set[int]]) -> dict[int, frozenset[int]]:
    """For activations outside all branches, the adds whose branches they feed; none where they feed anything else."""
    branches: dict[int, set[int]] = {}
    for add, nodes in inside.items():
        for node in nodes:
            branches.setdefault(node, set()).add(add)
    serves: dict[int, frozenset[int]] = {}
    for node in reversed(range(len(graph.nodes))):
        if node in inside or node in branches:
            continue
        fed = [branches.get(child) or serves.get(child, frozenset()) for child in graph.children[node]]
        serves[node] = frozenset().union(*fed) if all(fed) and node not in graph.outputs else frozenset()
    return serves


def _look(graph: Graph, node: int, adds: frozenset[int]) -> object:
    here = graph.nodes[node]
    return here.op, here.shape, tuple(sorted(site.kind for site in graph.sites[node])), len(adds)


def kind_of(graph: Graph, branch: Set[int]) -> object:
    """What a branch is made of."""
    return tuple(sorted((site.kind, site.op, graph.nodes[node].shape) for node in branch for site in graph.sites.get(node, ())))


def _in_a_loop_over_blocks(graph: Graph, node: int, adds: frozenset[int]) -> bool:
    here = graph.nodes[node]
    together = all(graph.nodes[add].repeats == here.repeats for add in adds)
    return here.repeats > 1 and together and not any(site.reused for site in graph.sites[node])
