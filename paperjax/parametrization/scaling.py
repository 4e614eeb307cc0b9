"""Factors on activations: where in a trace each stands, and where it stands in the trace for another batch.

An equation is called by its number, and a batch of another dtype may shift the numbers: a cast of integers is an equation of its own. So a
plan keeps how the equations of its trace are wired, and what each place is: which use of which leaves. In a trace that is wired
otherwise the places are looked for anew, and where they are not found the batch is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paperjax.model import batch_form, split
from paperjax.trace.graph import Walk
from paperjax.trace.interactions import interactions
from paperjax.trace.interpret import Path, rescaled, wiring_of
from paperjax.trace.latents import walked
from paperjax.trace.streams import residual_adds
from paperjax.trace.traced import flat_apply

Leaves = tuple[tuple[str, ...], ...]
Place = tuple[Path, str, int | None]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A factor on one activation, where no factor of a leaf can stand for it: the output of a tied leaf, attention logits with the
    wrong power of the head's width, a residual branch that ends in a function without homogeneity.

    Attributes
    ----------
    path
        Which equation of the trace of ``apply``.
    op
        Its primitive.
    operand
        Which of its operands; ``None`` for its result.
    factor, why
        The number, and what it is for.
    sort, leaves, nth, of
        The place by what it is: a ``"use"`` of a leaf, a ``"product"`` of two activations or a residual ``"branch"``, of these leaves; the
        nth of so many.
    """

    path: tuple[int, ...]
    op: str
    operand: int | None
    factor: float
    why: str
    sort: str = "use"
    leaves: Leaves = ()
    nth: int = 0
    of: int = 0


def described(x: Any) -> str:
    """Dtypes and shapes of a batch, as a message writes them.

    Examples
    --------
    >>> described(jnp.zeros((2, 3), jnp.int8))
    'int8[2,3]'
    """
    return ", ".join(f"{jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]" for leaf in jax.tree.leaves(x))


def named(scalings: Sequence[Scaling], found: Walk, paths: Sequence[str]) -> tuple[Scaling, ...]:
    """The scalings with what their places are, in the walk in which they were found."""
    out, at = [], places(found, paths) if scalings else {}
    for s in scalings:
        for (sort, leaves), there in at.items():
            if sort == s.sort and (s.path, s.op, s.operand) in there:
                nth = there.index((s.path, s.op, s.operand))
                out.append(dataclasses.replace(s, leaves=leaves, nth=nth, of=len(there)))
                break
        else:
            raise AssertionError(f"{s} is a place of this walk")
    return tuple(out)


def places(found: Walk, paths: Sequence[str]) -> Mapping[tuple[str, Leaves], list[Place]]:
    """Every place of a walk at which a plan may put a factor, by what it is; places of one kind in the order of execution."""
    at: dict[tuple[str, Leaves], list[Place]] = {}
    for site in found.sites:
        at.setdefault(("use", ((paths[site.leaf],),)), []).append((site.path, site.op, None))
    for product in interactions(found):
        leaves = tuple(tuple(paths[leaf] for leaf in side) for side in product.leaves)
        at.setdefault(("product", leaves), []).append((product.path, product.op, None))
    for add in residual_adds(found):
        at.setdefault(("branch", (tuple(paths[leaf] for leaf in add.leaves),)), []).append((add.path, add.op, add.operand))
    return at


def scaled(apply: Callable[[Any, Any], Any], plan: Any) -> Callable[[Any, Any], Any]:
    """``apply`` with the plan's factors on activations.

    Raises
    ------
    ValueError
        When it is called, if its trace is not the one that the plan was made for and the places are not found in it.
    """

    def with_factors(params: Any, x: Any) -> Any:
        fn, args = flat_apply(apply, params, x)
        jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        here = plan.scalings
        if wiring_of(jaxpr) != plan.wiring:
            leaves = jax.tree_util.tree_leaves_with_path(split(params)[0])
            paths = [jax.tree_util.keystr(path) for path, _ in leaves]
            found = walked(jaxpr, len(leaves), batch_form(x), lambda x: jax.make_jaxpr(fn)(*args[:2], x))
            here = _found_again(plan, places(found, paths), x, [str(leaf.dtype) for _, leaf in leaves])
        return jax.tree.unflatten(jax.tree.structure(shape), rescaled(jaxpr, jax.tree.leaves(args), here))

    return with_factors


def _found_again(plan: Any, at: Mapping[tuple[str, Leaves], list[Place]], x: Any, dtypes: Sequence[str]) -> tuple[Scaling, ...]:
    found = []
    for s in plan.scalings:
        there = at.get((s.sort, s.leaves), [])
        if len(there) != s.of or there[s.nth][1] != s.op:
            batch = described(x)
            differs = [f"a batch {batch}, and the plan was made with {plan.batch}"] if batch != plan.batch else []
            differs += [f"{a.path} is {b}, and was {a.dtype}" for a, b in zip(plan.leaves, dtypes) if a.dtype != b][:1]
            raise ValueError(
                f"the plan has a factor of {s.factor:.4g} on an activation ({s.why}), and apply is another function here than it was "
                f"planned as: {'; '.join(differs) or 'the network or the version of JAX is another'}. Of the {s.of} places like that one "
                f"{len(there)} are left, so it is not known where the factor belongs. Pass what the plan was made with, or make a plan "
                "with x=... and a network as they are here."
            )
        path, op, operand = there[s.nth]
        found.append(dataclasses.replace(s, path=path, op=op, operand=operand))
    return tuple(found)
