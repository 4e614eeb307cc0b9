"""One network, traced; and what the numbers it multiplies by are to its leaves."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from paperjax.model import Model, batch_form, join, split
from paperjax.trace import primitives as prim
from paperjax.trace.graph import Walk
from paperjax.trace.initial import Law, read_laws
from paperjax.trace.interactions import Interaction, interactions
from paperjax.trace.interpret import wiring_of
from paperjax.trace.latents import walked
from paperjax.trace.leaf import Leaf
from paperjax.trace.own import Own, own_factors
from paperjax.trace.probe import Shape, leaf_shapes
from paperjax.trace.sums import Pairs, growing_sums


class Traced(NamedTuple):
    """One network: its leaves, their laws, its walk, how its trace is wired, that trace, copies of its leaves."""

    shapes: tuple[Shape, ...]
    laws: tuple[Law, ...]
    walk: Walk
    wiring: str
    jaxpr: jex.ClosedJaxpr
    copies: tuple[tuple[str, str], ...]


def flat_apply(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``apply`` as a function of the trained leaves, the given ones and the batch, in the order in which they are walked; and those."""
    trained, given = split(params)
    leaves, tree = jax.tree.flatten(trained)
    fixed, fixed_tree = jax.tree.flatten(given)

    def flat(leaves: Any, fixed: Any, x: Any) -> Any:
        return apply(join(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(fixed_tree, fixed)), x)

    return flat, (leaves, fixed, x)


def walk_model(model: Model, x: Any) -> tuple[Walk, Any]:
    """Walk the trace of ``apply`` of one model; the shapes of its parameters come along."""
    x = batch_form(x)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return _walk(model, params, x)[0], params


def traced(model: Model, x: jax.ShapeDtypeStruct) -> Traced:
    """Trace ``init`` and ``apply``, once each: tracing a large network is what takes time here."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: Any, x: Any) -> Any:
        params = model.init(key, x)
        trained, given = split(params)
        return jax.tree.leaves(trained), jax.tree.leaves(given), params

    jaxpr, (leaves, _, params) = jax.make_jaxpr(init, return_shape=True)(key, x)
    shapes = leaf_shapes(params)
    drawn = dict(zip(map(id, jaxpr.jaxpr.outvars), shapes))
    given = jax.tree_util.tree_leaves_with_path(split(params)[1])
    copied = [(jax.tree_util.keystr(path), drawn.get(id(var))) for (path, _), var in zip(given, jaxpr.jaxpr.outvars[len(leaves) :])]
    copies = tuple((path, leaf.path) for path, leaf in copied if leaf is not None)
    return Traced(shapes, tuple(read_laws(jaxpr, len(leaves))), *_walk(model, params, x), copies)


def _walk(model: Model, params: Any, x: jax.ShapeDtypeStruct) -> tuple[Walk, str, jex.ClosedJaxpr]:
    fn, args = flat_apply(model.apply, params, x)
    jaxpr, (leaves, fixed, _) = prim.trace(fn, *args), args
    return walked(jaxpr, len(leaves), x, lambda x: prim.trace(fn, leaves, fixed, x)), wiring_of(jaxpr), jaxpr


def own_numbers(there: Traced, small: Traced, narrow: Traced, wider: Pairs) -> dict[int, tuple[Own, ...]]:
    """Of each trace, by its id, the known numbers of all sites."""
    growing = {id(there): {a.node: a.size for a, _ in wider}, id(narrow): {b.node: b.size for _, b in wider}}
    if wider and small is not narrow:
        growing[id(small)] = {b.node: b.size for _, b in growing_sums(there.walk, small.walk, there.shapes, small.shapes)}
    return {id(traced): own_factors(traced.walk, growing.get(id(traced), {})) for traced in (there, small, narrow)}


def with_own_factors(
    leaves: list[Leaf], parts: list[Shape], there: Traced, small: Traced, narrow: Traced, own: Mapping[int, tuple[Own, ...]]
) -> list[Leaf]:
    """The leaves, with what the model multiplies each use by over what the base does; `parts` are their likes there."""

    def logs(traced: Traced, leaf: int, of_logits: bool = False) -> list[float]:
        return [
            numbers.logits if of_logits else numbers.log for site, numbers in zip(traced.walk.sites, own[id(traced)]) if site.leaf == leaf
        ]

    at_small, at_narrow = ({shape.path: i for i, shape in enumerate(traced.shapes)} for traced in (small, narrow))
    found, logits = [], {}
    for i, (leaf, part) in enumerate(zip(leaves, parts)):
        # A size that sets widths and adds layers at once leaves no network in between: all of its change counts as the width's.
        between, k = (narrow, at_narrow[leaf.path]) if leaf.path in at_narrow else (small, at_small[part.path])
        ours, theirs, first = logs(there, i), logs(between, k), logs(small, at_small[part.path])
        if len(ours) != len(theirs) or not ours or not first:
            found.append(dataclasses.replace(leaf, narrow_law=between.laws[k], own_width=(1.0,) * len(leaf.sites)))
            continue
        leaf = dataclasses.replace(leaf, narrow_law=between.laws[k], own_width=tuple(math.exp(a - b) for a, b in zip(ours, theirs)))
        logits[i] = logs(there, i, True)[0] - logs(between, k, True)[0]
        # A leaf that layers share has more uses in a deeper network; the first of a kind is compared with the first.
        at = (leaf.deciding,) * 2
        if len(theirs) != len(first):
            like = leaf.kind_of(leaf.deciding)
            at = leaf.first_of(like), leaf.first_of(like, [site for site in small.walk.sites if site.leaf == at_small[part.path]])
        found.append(dataclasses.replace(leaf, own_depth=math.exp(theirs[at[0]] - first[at[1]])))
    return _with_own_projections(found, interactions(there.walk), logits)


def _with_own_projections(leaves: list[Leaf], products: tuple[Interaction, ...], logs: Mapping[int, float]) -> list[Leaf]:
    """Tell ``(x @ W) / sqrt(n)`` of both projections from a scale of the logits that is written on their operands.

    A scale of the logits stands on one side (queries over sqrt(d)) or is split over both (each over d^1/4). So a factor of n^-1/2 or
    smaller on both sides is the projections' own, one n^-1/2 each.
    """
    found = list(leaves)
    for sides in (product.leaves for product in products):
        made = [i for side in sides for i in side]
        if not all(sides) or any(len(leaves[i].sites) != 1 for i in made):
            continue
        wanted = {i: -math.log(leaves[i].fans()[0] / leaves[i].fans(base=True)[0]) / 2 for i in made}
        if all(wanted[i] < 0 and logs.get(i, 0.0) <= wanted[i] * (1 - 1e-6) for i in made):
            for i in made:
                found[i] = dataclasses.replace(leaves[i], own_projection=math.exp(wanted[i]))
    return found
