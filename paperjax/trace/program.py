"""`read` a family: its leaves with their roles, its residual streams, its products of activations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paperjax.binding import nearest
from paperjax.model import Family, Model, family, split
from paperjax.trace import primitives as prim
from paperjax.trace.initial import Law, read_laws
from paperjax.trace.probe import Shape, base_shapes, infinite_axes, leaf_shapes, pattern_of
from paperjax.trace.streams import Interaction, ResidualAdd, interactions, residual_adds
from paperjax.trace.walk import Site, Unresolved, Walk, walk

ROLES = ("hidden", "input", "output", "vector", "embedding", "finite")


@dataclasses.dataclass(frozen=True)
class Use:
    """How a leaf is used, where the trace cannot tell: axes of the leaf, by number.

    Attributes
    ----------
    inside
        Axes that are summed over (fan-in).
    out
        Axes that are free (fan-out).
    stack
        Axes of independent copies.
    kind
        ``"product"``, ``"convolution"``, ``"lookup"`` or ``"elementwise"``.
    """

    inside: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    kind: str = "product"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A trained leaf of the target network: what its axes are, and what it was at the base size.

    Attributes
    ----------
    path, shape, dtype
        As in the target's parameters.
    base_shape
        Its shape at the base sizes.
    infinite
        For each axis, the sizes that change it.
    sites
        Its uses by the data, in order.
    roles
        One role for each distinct use; two for tied weights.
    law, base_law
        Its entries at initialization, at target and base.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    base_shape: tuple[int, ...]
    infinite: tuple[frozenset[str], ...]
    sites: tuple[Site, ...]
    roles: tuple[str, ...]
    law: Law
    base_law: Law

    @property
    def role(self) -> str:
        """The role, or both of a tied leaf joined by ``+``."""
        return "+".join(self.roles)

    def fans(self, base: bool = False) -> tuple[int, int]:
        """Fan-in and fan-out of its first use: products of the contracted and of the free axes.

        Of a lookup the fan-in is 1; of an elementwise use both are what its axes amount to, fan-in 1.
        """
        shape, site = (self.base_shape if base else self.shape), self.sites[0]
        inside = () if site.kind in ("lookup", "elementwise") else site.inside + site.window
        return math.prod(shape[a] for a in inside), math.prod(shape[a] for a in site.out)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the trace of a family found between a base and a target size.

    Attributes
    ----------
    base, target
        The sizes.
    leaves
        In the order of the flattened parameters.
    adds
        Residual adds of the target.
    depth_ratio
        Residual adds in one call of the target, over those of the base; 1 without any.
    interactions
        Products of activations, with how each is scaled: ``(interaction, base size, exponent)``, the exponent -1/2 for 1/sqrt(d).
    walk
        The walk itself, for what reads on (kernels, limits).
    """

    base: Mapping[str, Any]
    target: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    adds: tuple[ResidualAdd, ...]
    depth_ratio: float
    interactions: tuple[tuple[Interaction, int, float], ...]
    walk: Walk


def walk_model(model: Model, x: Any) -> tuple[Walk, Any]:
    """Walk the trace of ``apply`` of one model; the shapes of its parameters come along."""
    x = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    trained, given = split(params)
    leaves, tree = jax.tree.flatten(trained)
    fixed, fixed_tree = jax.tree.flatten(given)

    def apply(leaves: Any, fixed: Any, x: Any) -> Any:
        from paperjax.model import join

        return model.apply(join(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(fixed_tree, fixed)), x)

    return walk(prim.trace(apply, leaves, fixed, x), len(leaves)), params


def laws_of(model: Model, x: Any) -> list[Law]:
    """Laws of the trained leaves of one model, in the order of the flattened parameters."""
    x = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    jaxpr = prim.trace(lambda key, x: jax.tree.leaves(split(model.init(key, x))[0]), jax.eval_shape(lambda: jax.random.key(0)), x)
    return read_laws(jaxpr)


def read(
    fam: Family | Any,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    x: Any = None,
    uses: Mapping[str, Use] | None = None,
) -> Program:
    """Read a family from its traces at two sizes, without any annotation of the model.

    Parameters
    ----------
    fam
        A `Family`, or what `paperjax.family` takes.
    base, target
        Sizes by name. What differs between the two is what goes to infinity; a size named in one only is an error.
    x
        An example batch, if the family has none.
    uses
        ``{path: Use(...)}`` for leaves that the trace cannot resolve.

    Returns
    -------
    Program

    Raises
    ------
    ValueError
        If a use of a leaf with an infinite axis cannot be resolved (the message lists leaf, axes, primitive and the override), if an
        override names no leaf, or if the sizes do not fit the family.
    """
    fam = fam if isinstance(fam, Family) else family(fam)
    x = fam.x if x is None else jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    if x is None:
        raise ValueError("the family has no example batch: pass x=batch here, or build it as family(fn, x=batch).")
    _check_sizes(fam, base, target)
    probe = infinite_axes(fam, x, base, target)
    shapes, axes = probe.shapes, probe.axes
    pairs, whole = base_shapes(fam, x, base, target, probe), leaf_shapes(fam, x, base)
    found, _ = walk_model(fam(**target), x)
    found_base, _ = walk_model(fam(**base), x)
    laws, base_laws = laws_of(fam(**target), x), laws_of(fam(**base), x)
    uses = dict(uses or {})
    for path in uses:
        if path not in {shape.path for shape in shapes}:
            raise ValueError(f"uses names a leaf {path!r} that is not there. {nearest(path, [s.path for s in shapes])}")
    found = _overridden(found, shapes, uses)
    _refuse_unresolved(found, shapes, axes)
    leaves = []
    for i, shape in enumerate(shapes):
        narrow, part = pairs[i]
        sites = tuple(site for site in found.sites if site.leaf == i)
        infinite = axes[shape.path]
        roles = tuple(dict.fromkeys(role_of(site, infinite) for site in sites)) or ("finite",)
        leaves.append(
            Leaf(shape.path, shape.shape, shape.dtype, narrow.shape, infinite, sites, roles, laws[i], base_laws[whole.index(part)])
        )
    adds = residual_adds(found)
    n, n_base = (sum(add.repeats for add in a) for a in (adds, residual_adds(found_base)))
    return Program(
        dict(base), dict(target), tuple(leaves), adds, n / n_base if n_base else 1.0, _scaled(found, found_base, shapes, whole), found
    )


def _check_sizes(fam: Family, base: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for which, sizes in (("base", base), ("target", target)):
        for name in sizes:
            if name not in fam.sizes:
                raise ValueError(f"{which} names a size {name!r} that the family does not take. {nearest(name, fam.sizes)}")
    if set(base) != set(target):
        missing = sorted(set(base) ^ set(target))
        raise ValueError(f"base and target must name the same sizes; {', '.join(missing)} is in one of them only.")
    for name, value in base.items():
        if isinstance(value, (int, float)) and value > target[name]:
            raise ValueError(
                f"base {name} = {value} is larger than the target's {target[name]}: exchange them, or choose a smaller base. "
                "A base is the small network that was tuned."
            )


def role_of(site: Site, infinite: tuple[frozenset[str], ...]) -> str:
    inside = any(infinite[a] for a in site.inside)
    out = any(infinite[a] for a in site.out)
    if site.kind == "elementwise":
        return "vector" if out else "finite"
    if site.kind == "lookup":
        return "embedding" if out else "finite"
    if site.kind == "convolution" and site.groups > 1 and not inside and out:
        return "vector"
    return {(True, True): "hidden", (False, True): "input", (True, False): "output", (False, False): "finite"}[inside, out]


def _overridden(found: Walk, shapes: tuple[Shape, ...], uses: Mapping[str, Use]) -> Walk:
    sites, unresolved = list(found.sites), list(found.unresolved)
    for i, shape in enumerate(shapes):
        use = uses.get(shape.path)
        if use is None:
            continue
        known = [site for site in sites if site.leaf == i]
        first = known[0] if known else Site(i, "", "", (), (), (), (), 1, (), 0, None, False, 1)
        sites = [site for site in sites if site.leaf != i]
        sites.append(first._replace(kind=use.kind, inside=use.inside, out=use.out, stack=use.stack, window=()))
        unresolved = [u for u in unresolved if u.leaf != i]
    return found._replace(sites=tuple(sites), unresolved=tuple(unresolved))


def _refuse_unresolved(found: Walk, shapes: tuple[Shape, ...], axes: Mapping[str, tuple[frozenset[str], ...]]) -> None:
    problems: list[Unresolved] = list(found.unresolved)
    used = {site.leaf for site in found.sites} | {u.leaf for u in problems}
    problems += [Unresolved(i, "nothing", "the output does not use it") for i in range(len(shapes)) if i not in used]
    lines = []
    for problem in dict.fromkeys(problems):
        path, infinite = shapes[problem.leaf].path, axes[shapes[problem.leaf].path]
        growing = [axis for axis, names in enumerate(infinite) if names]
        if growing:
            lines.append(
                f"  {path} {shapes[problem.leaf].shape}, axis {', '.join(map(str, growing))}: at {problem.op}, {problem.reason}. "
                f"Settle it with uses={{{path!r}: pj.trace.Use(inside=(...), out=(...))}}"
            )
    for site in found.sites:
        shape = shapes[site.leaf]
        growing = [axis for axis in site.stack if axes[shape.path][axis] and site.op != "scan" and not _is_depth(site, axis)]
        lines += [
            f"  {shape.path} {shape.shape}, axis {axis}: at {site.op}, independent copies whose number grows with "
            f"{', '.join(sorted(axes[shape.path][axis]))}. Settle it with uses={{{shape.path!r}: pj.trace.Use(...)}}"
            for axis in growing
        ]
    if lines:
        raise ValueError("the trace cannot tell how these leaves scale:\n" + "\n".join(dict.fromkeys(lines)))


def _is_depth(site: Site, axis: int) -> bool:
    return site.repeats > 1 and axis in site.stack


def _scaled(
    found: Walk, base: Walk, shapes: tuple[Shape, ...], base_shapes: tuple[Shape, ...]
) -> tuple[tuple[Interaction, int, float], ...]:
    there = interactions(base)
    scaled = []
    for a in interactions(found):
        # Layers may differ in number, not in kind: the base's like was made by leaves of the same names but for their numbers.
        like = [b for b in there if _names(b, base_shapes) == _names(a, shapes)]
        if not like:
            continue
        b = like[0]
        exponent = (a.log_scale - b.log_scale) / math.log(a.size / b.size) if a.size != b.size else 0.0
        scaled.append((a, b.size, exponent))
    return tuple(scaled)


def _names(interaction: Interaction, shapes: tuple[Shape, ...]) -> tuple[Any, ...]:
    return tuple(tuple(pattern_of(shapes[leaf].path) for leaf in leaves) for leaves in interaction.leaves)
