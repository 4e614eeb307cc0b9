"""Where the coordinate check looks: preactivations, residual streams, attention logits and outputs, found by the trace."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from paperjax.model import Model, split
from paperjax.trace import primitives as prim
from paperjax.trace.graph import CONTRACTING
from paperjax.trace.interactions import interactions
from paperjax.trace.interpret import edited
from paperjax.trace.probe import pattern_of
from paperjax.trace.streams import residual_adds
from paperjax.trace.traced import walk_model
from paperjax.trace.walk import Site, Walk


class Tap(NamedTuple):
    """One value inside a network.

    Attributes
    ----------
    name
        The leaf whose product it is (`preactivation`, or `branch` if it writes into a residual stream); the last leaf of the branch that
        was added (`stream`); the leaves of the two operands (`attention`); ``"outputs"``.
    kind
        ``"preactivation"``, ``"branch"``, ``"stream"``, ``"attention"`` or ``"output"``.
    path, rank
        The equation of the trace that makes it, and its number of axes there; no path for the outputs.
    layers
        Over how many rows a scan stacks it, one row a layer; 1 outside of scans over layers.
    node
        Its node in the walk.
    shape
        Shape of the leaf without the axes that a scan runs over, which tells layers of one kind.
    """

    name: str
    kind: str
    path: tuple[int, ...]
    rank: int
    layers: int
    node: int
    shape: tuple[int, ...] = ()


def find_taps(model: Model, x: Any) -> tuple[tuple[Tap, ...], Walk]:
    """All taps of a network in the order of execution, and the walk that found them; nothing is computed.

    Raises
    ------
    ValueError
        If the trace sees no product of a parameter with the data, so that there is nothing to look at but the outputs.
    """
    walk, params = walk_model(model, x)
    leaves = jax.tree_util.tree_leaves_with_path(split(params)[0])
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    shapes = [tuple(leaf.shape) for _, leaf in leaves]
    end, onwards = walk.outputs[0].node, _Onwards(walk)
    taps: dict[int, Tap] = {}
    adds = {add.node: add for add in residual_adds(walk)}
    writers = {leaf for add in adds.values() for leaf in add.writers}
    seen: dict[int, int] = {}
    for site in walk.sites:
        node = onwards(site.node)
        if site.kind not in CONTRACTING or node in taps or _is_output(walk, node, end):
            continue
        seen[site.leaf] = seen.get(site.leaf, 0) + 1
        name = paths[site.leaf] + (f", use {seen[site.leaf]}" if seen[site.leaf] > 1 else "")
        taps[node] = _tap(walk, name, "branch" if site.leaf in writers else "preactivation", node, site, shapes)
    for node, add in adds.items():
        inside = [site for site in walk.sites if site.leaf in add.leaves and site.kind in CONTRACTING]
        last = max(inside, key=lambda site: site.node if site.node <= node else -1)
        if not _is_output(walk, node, end):
            taps[node] = _tap(walk, f"stream + {paths[last.leaf]}", "stream", node, last, shapes)
    for found in interactions(walk):
        if all(found.leaves):
            of = [next(site for site in walk.sites if site.leaf == leaves[0]) for leaves in found.leaves]
            node = onwards(found.node)
            name = " · ".join(paths[leaves[0]] for leaves in found.leaves)
            taps[node] = _tap(walk, name, "attention", node, of[0], shapes)
    if not any(site.kind in CONTRACTING for site in walk.sites):
        raise ValueError("the trace finds no product of a parameter with the data, so there is nothing whose size could be checked.")
    assert end is not None
    outputs = Tap("outputs", "output", (), len(walk.nodes[end].shape), 1, end)
    return (*(taps[node] for node in sorted(taps)), outputs), walk


def _tap(walk: Walk, name: str, kind: str, node: int, site: Site, shapes: list[tuple[int, ...]]) -> Tap:
    shape = tuple(n for axis, n in enumerate(shapes[site.leaf]) if axis not in site.stack)
    return Tap(name, kind, walk.nodes[node].path, len(walk.nodes[node].shape), _layers(site, shapes), node, shape)


def _layers(site: Site, shapes: list[tuple[int, ...]]) -> int:
    # A loop that uses the same numbers in every step runs over time, not over layers.
    rows = int(np.prod([shapes[site.leaf][axis] for axis in site.stack], dtype=int)) if site.stack else 1
    return rows if rows == site.repeats and not site.reused else 1


def _is_output(walk: Walk, node: int, end: int | None) -> bool:
    used = {site.node for site in walk.sites}
    while end is not None and end != node:
        here = walk.nodes[end]
        moved = here.op in (*prim.RESHAPING, *prim.KEEPING_AXES) and end not in used
        end = here.parents[0] if moved and len(here.parents) == 1 else None
    return end == node


class _Onwards:
    """Past the constant factors that come after a product: 1/sqrt(n) may stand before or behind it."""

    def __init__(self, walk: Walk):
        self.nodes, self.used = walk.nodes, {site.node for site in walk.sites}
        self.children: dict[int, list[int]] = {}
        for i, node in enumerate(walk.nodes):
            for parent in node.parents:
                self.children.setdefault(parent, []).append(i)

    def __call__(self, node: int) -> int:
        while True:
            after = self.children.get(node, [])
            if len(after) != 1 or after[0] in self.used:
                return node
            here = self.nodes[after[0]]
            scaled = here.op in ("mul", "div") and here.how == "linear" and len(here.parents) == 1
            if not scaled or here.path[:-1] != self.nodes[node].path[:-1]:
                return node
            node = after[0]


def record(model: Model, taps: tuple[Tap, ...], params: PyTree, x: Any) -> Mapping[Tap, Float[Array, "layers entries"]]:
    """The values at the taps, one row a layer."""
    outputs, seen = edited(model.apply, {}, [tap.path for tap in taps if tap.path])[1](params, x)
    values = {}
    for tap in taps:
        value = seen[tap.path] if tap.path else outputs
        if value.ndim < tap.rank:
            raise ValueError(f"the value of {tap.name} has shape {value.shape}, fewer axes than the {tap.rank} that the trace found.")
        values[tap] = jnp.reshape(value, (tap.layers, -1))
    return values


def residual_stream(model: Model, params: PyTree, x: Any) -> Float[Array, "layers *rest"]:
    """The residual stream after every block, of a network whose blocks are the steps of one scan.

    Parameters
    ----------
    model, params, x
        The network, its parameters and a batch.

    Returns
    -------
    Array
        ``h^1, ..., h^L``, ``(layers, batch, ...)``, in the dtype of the activations.

    Raises
    ------
    ValueError
        If the trace finds no residual add, or blocks that are written one by one.

    Examples
    --------
    >>> import paperjax as pj
    >>> model, x = pj.models.resmlp(4, 3, 1), jnp.ones((2, 5))
    >>> residual_stream(model, model.init(jax.random.key(0), x), x).shape
    (3, 2, 4)
    """
    taps, walk = find_taps(model, x)
    found = [tap for tap in taps if tap.kind == "stream"]
    if len(found) != 1:
        raise ValueError(
            f"residual_stream needs a network whose blocks are one residual add in one scan, and the trace finds {len(found)} such adds: "
            "scan over the blocks, or record each of them by find_taps and record."
        )
    return record(model, (found[0],), params, x)[found[0]].reshape(-1, *walk.nodes[found[0].node].shape)


class Quantity(NamedTuple):
    """One row of a coordinate check: a tap, or one layer of it, or (against depth) all layers of one kind together.

    Attributes
    ----------
    name, kind, layer
        See `Tap`; `layer` is the row of a scan, ``None`` where there is one row or all are taken together.
    members
        Numbers of the taps that it is made of.
    """

    name: str
    kind: str
    layer: int | None
    members: tuple[int, ...]


def quantities(taps: tuple[Tap, ...], per_layer: bool) -> tuple[Quantity, ...]:
    """What is reported of a network: every layer by itself, or layers of one kind (numbers in names aside, equal shapes) together."""
    found: dict[Any, list[int]] = {}
    for i, tap in enumerate(taps):
        if per_layer:
            for layer in range(tap.layers):
                found[tap.name, tap.kind, layer if tap.layers > 1 else None, i] = [i]
        else:
            found.setdefault((pattern_of(tap.name), tap.kind, None, tap.shape), []).append(i)
    names = [key[0] for key in found]
    out = []
    for (name, kind, layer, extra), members in found.items():
        several = not per_layer and names.count(name) > 1
        out.append(Quantity(f"{name} {'×'.join(map(str, extra))}" if several else name, kind, layer, tuple(members)))
    return tuple(out)


def sizes_of(
    what: tuple[Quantity, ...], taps: tuple[Tap, ...], values: Mapping[Tap, Float[Array, "layers entries"]]
) -> Float[Array, " quantities"]:
    """Root mean square over coordinates and examples (and, where taken together, layers) of every quantity, ``(quantities,)``."""
    sizes = []
    for q in what:
        rows = [values[taps[i]] if q.layer is None else values[taps[i]][q.layer : q.layer + 1] for i in q.members]
        squares = jnp.stack([jnp.mean(jnp.square(row.astype(jnp.promote_types(row.dtype, jnp.float32))), axis=1).mean() for row in rows])
        counts = jnp.asarray([row.shape[0] for row in rows], squares.dtype)
        sizes.append(jnp.sqrt(jnp.sum(squares * counts) / jnp.sum(counts)))
    return jnp.stack(sizes)
