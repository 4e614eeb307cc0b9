"""Parameters that stand for data: learned queries and latents that are given to each example of a batch, and then take the data's way.

Norms, products with other weights and functions of them are no detours of a weight then, but what the network does with an input that it
learns. Such a parameter is the embedding of a token that every example has (Perceiver's latents, arXiv 2103.03206; DETR's queries,
arXiv 2005.12872), and scales as one.
"""

from collections.abc import Callable, Iterator

import jax
from jax.extend import core as jex

from paperjax.trace import primitives as prim
from paperjax.trace.graph import Walk
from paperjax.trace.walk import walk

Path = tuple[int, ...]
Sizes = tuple[int, ...]
Trace = Callable[[jax.ShapeDtypeStruct], jex.ClosedJaxpr]


def walked(jaxpr: jex.ClosedJaxpr, n_leaves: int, x: jax.ShapeDtypeStruct, trace: Trace) -> Walk:
    """`walk`, where a leaf that it cannot resolve is data from where it is spread over the batch on, if that resolves it.

    Parameters
    ----------
    jaxpr, n_leaves
        As for `walk`.
    x
        Shape and dtype of the batch; its first axis runs over the examples.
    trace
        The jaxpr for another batch: a spread over the examples is another there. It is traced only where that is in question.
    """
    found, here = walk(jaxpr, n_leaves), dict(_spreads(jaxpr))
    doubtful = _doubtful(found)
    if not doubtful or not here:
        return found
    try:
        # Twice as many examples: a model may want a number that something divides.
        there = dict(_spreads(trace(jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype))))
    except (TypeError, ValueError):
        # A model for one number of examples, of which it cannot be said what it spreads over them: its leaves stay unresolved.
        return found
    over_batch = {
        path
        for path, (before, after) in here.items()
        if path in there and after != there[path][1] and any(a == b != after for a, b in zip(before, there[path][0]))
    }
    spread: dict[Path, set[int]] = {}
    known = {(site.path, site.leaf) for site in found.sites}
    for site in walk(jaxpr, n_leaves, over_batch).sites:
        if site.path in over_batch and (site.path, site.leaf) not in known:
            spread.setdefault(site.path, set()).add(site.leaf)
    latents: frozenset[Path] = frozenset()
    for path, leaves in sorted(spread.items()):
        again = walk(jaxpr, n_leaves, latents | {path}) if leaves <= doubtful else found
        if _doubtful(again) < doubtful:
            found, doubtful, latents = again, _doubtful(again), latents | {path}
    return found


def _doubtful(found: Walk) -> frozenset[int]:
    return frozenset(u.leaf for u in found.unresolved)


def _spreads(jaxpr: jex.ClosedJaxpr, path: Path = ()) -> Iterator[tuple[Path, tuple[tuple[Sizes, ...], Sizes]]]:
    """Where arrays are broadcast or repeated, or meet a constant that is, by the paths of a walk, and shapes before and after."""
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        before, after = (tuple(atom.aval.shape for atom in atoms) for atoms in (eqn.invars, eqn.outvars))  # pyright: ignore[reportAttributeAccessIssue]
        if eqn.primitive.name in prim.SPREADING or (eqn.primitive.name in ("mul", *prim.ADDITIVE) and len(set(before)) > 1):
            yield (*path, i), (before, after[0])
        for k, inner in enumerate(prim.inner_jaxprs(eqn)):
            yield from _spreads(inner, (*path, i, k))
