"""Leaves that no one role is true of, so that no one set of factors serves them: refused, with what to write instead."""

import math
from collections.abc import Sequence

from paperjax.parametrization.abc import Parametrization
from paperjax.parametrization.factors import Factors
from paperjax.trace.graph import Site
from paperjax.trace.leaf import Leaf, role_of
from paperjax.trace.portions import Range
from paperjax.trace.program import Program
from paperjax.trace.settle import Use, written

# What a portion that grows is, and one that does not; by whether the axis is summed over, and whether the leaf's other side grows.
ROLES = {
    ("inside", True): ("hidden", "input"), ("inside", False): ("output", "finite"),
    ("out", True): ("hidden", "output"), ("out", False): ("input", "finite"),
}  # fmt: skip
INSTEAD = {
    "inside": "Use a leaf for each part: x @ W_x + h @ W_h is the same function as concatenate([x, h]) @ W",
    "out": "Use a leaf for each part: h @ W_1 and h @ W_2 are the parts of split(h @ W)",
}
DOES = {"inside": "summed over", "out": "free"}


def refuse_portions(program: Program, factors: Sequence[Factors]) -> None:
    """Refuse leaves an axis of which has parts that grow and parts that do not, unless the plan leaves them as the model has them.

    Raises
    ------
    ValueError
        With a line for each: leaf, axis, the parts and the override that takes it as it is.
    """
    lines, instead = [], dict[str, None]()
    for found in program.portions:
        leaf = program.leaves[found.leaf]
        sites = [site for site in leaf.sites if found.axis in getattr(site, found.part)]
        others = {axis for site in sites for axis in getattr(site, found.part) if axis != found.axis}
        # Of an axis beside one that grows, every part grows.
        as_it_is = all(math.isclose(factor, 1.0, rel_tol=1e-3) for factor in factors[found.leaf][:3])
        if not sites or any(leaf.infinite[axis] for axis in others) or as_it_is:
            continue
        site = leaf.sites[leaf.deciding]
        axes = site.inside if found.part == "out" else site.out
        growing, fixed = ROLES[found.part, any(leaf.infinite[axis] for axis in axes)]
        if site.kind not in ("product", "convolution") or leaf.role == "vector":
            growing, fixed = leaf.role, "finite"
        said = [_said(r, growing if r.grows else fixed) for r in _merged(found.ranges)]
        parts = ", ".join(said[:4]) + (", and so on" if len(said) > 4 else "")
        told = written(_as_it_is(leaf, site))
        lines.append(
            f"  {leaf.path} {leaf.shape}, axis {found.axis} ({DOES[found.part]}): {parts}. "
            f"To plan it as {leaf.role} all the same: uses={{{leaf.path!r}: pj.trace.{told}}}"
        )
        instead[INSTEAD[found.part]] = None
    if lines:
        raise ValueError(
            "some entries of these leaves meet, or make, what grows with the width, and others what does not. They scale differently, and "
            f"a leaf has one initialization and one learning rate. {'. '.join(instead)}.\n" + "\n".join(dict.fromkeys(lines))
        )


def refuse_on_stream(program: Program, scheme: Parametrization) -> None:
    """Refuse leaves of every layer that no branch multiplier reaches, because they act on the residual stream itself.

    Raises
    ------
    ValueError
        Naming the leaves.
    """
    if program.on_stream:
        paths = [program.leaves[leaf].path for leaf in program.on_stream]
        named = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        raise ValueError(
            f"{named}: each multiplies the residual stream itself, or adds onto it, between the residual adds (the gain and bias of a "
            f"post-norm layer, h = norm(h + f(h)) * g + b), and their number grows. {scheme.name} scales branches, h + f(h), and not what "
            "acts on the stream: what these learn adds up over the layers. Norm the input of the branch instead, h + f(norm(h)), or leave "
            "such a norm without gain and bias, or use pj.mup, which does not scale with depth."
        )


def refuse_unread(program: Program, scheme: Parametrization) -> None:
    """Refuse a sum over layers of what is no residual branch: nothing would keep it from growing with the depth.

    Raises
    ------
    ValueError
        Naming where it is added, or the branch that has no like at the base.
    """
    if program.unread:
        raise ValueError(
            f"equation {program.unread[-1]} of apply adds to a sum over layers, whose number grows, what is no residual branch: it is not "
            "made of the stream that it is added to (a condition of each layer, h + f(h) + g(c); another stream; an output of each layer, "
            f"skips + g(h)). {scheme.name} scales branches, h + f(h). Make it a part of the branch, h + (f(h) + g(c)), which is the same "
            "function, or use pj.mup, which does not scale with depth."
        )
    for add, growth in zip(program.adds, program.growths):
        if math.isinf(growth.whole):
            base = ", ".join(f"{name}={size}" for name, size in program.base.items())
            named = ", ".join(program.leaves[leaf].path for leaf in add.leaves[:4])
            raise ValueError(
                f"the residual branch with {named} (equation {add.path} of apply) has no like at the base, {base}: "
                f"{scheme.name} scales with how many there are over how many at the base. Choose a base with a layer of each kind, or two: "
                "in one layer of a network of several streams it may not be seen which is which."
            )


def _as_it_is(leaf: Leaf, site: Site) -> Use:
    """What the trace took a use for. A depthwise kernel has an entry for each channel and place: as a convolution it would be a matrix."""
    if site.kind == "convolution" and role_of(site, leaf.infinite) == "vector":
        return Use(out=tuple(range(len(leaf.shape))), kind="elementwise")
    return Use(site.inside, site.out, site.stack, site.kind)


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """Those one after the other that grow, or do not, as one."""
    found: list[Range] = []
    for one in ranges:
        last = found[-1] if found else None
        if last is not None and last.grows == one.grows and all(a + n == b for a, n, b in zip(last.start, last.size, one.start)):
            found[-1] = last._replace(size=(last.size[0] + one.size[0], last.size[1] + one.size[1]))
        else:
            found.append(one)
    return found


def _said(part: Range, role: str) -> str:
    first, size, base = int(part.start[0]), int(part.size[0]), int(part.size[1])
    grown = f", and {base} of them at the base" if part.grows else ""
    return f"{size} {'entries' if size > 1 else 'entry'} from {first} on{grown} ({role})"
