"""Which way the kernel of each leaf is computed, and what it costs: floating-point operations and bytes, read off shapes."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from paperjax.binding import nearest
from paperjax.kernels.factors import Term, Terms
from paperjax.trace import primitives as prim

ROUTES = ("gram", "gradients", "jacobian", "ntvp")
# A network with more of them between its products (norms, softmax, gelu) has chains of operations, for which XLA is asked for other loops.
LOOPS_PER_PRODUCT = 4.0


class Machine(NamedTuple):
    """What a device does in a second, roughly; only the quotient decides between routes.

    Examples
    --------
    >>> Machine.of("cpu").flops / Machine.of("cpu").bytes
    10.0
    """

    flops: float
    bytes: float

    @staticmethod
    def of(platform: str) -> "Machine":
        """Of a platform as JAX names it: two cores of a server, an accelerator's matrix units in single precision."""
        return Machine(1.5e11, 1.5e10) if platform == "cpu" else Machine(5e13, 2e12)


class Cost(NamedTuple):
    """Floating-point operations, bytes moved, bytes held at once."""

    flops: float
    moved: float
    held: float

    def seconds(self, machine: Machine) -> float:
        """Time if neither hides behind the other."""
        return self.flops / machine.flops + self.moved / machine.bytes


class Choice(NamedTuple):
    """The route of one leaf.

    Attributes
    ----------
    leaf
        Number of the leaf.
    route
        One of `ROUTES`.
    term
        Number of its term, for the first two routes; its bias shares the term.
    why
        Why it has no factors, if so.
    costs
        Of every route that could be taken.
    """

    leaf: int
    route: str
    term: int | None
    why: str
    costs: Mapping[str, Cost]


class Sizes(NamedTuple):
    """Examples of the two batches, outputs, bytes of a number, operations of one forward pass of one example (infinite if it cannot be
    differentiated so); are both batches one?
    """

    n: int
    m: int
    outputs: int
    itemsize: int
    forward: float
    same: bool = False

    @property
    def recorded(self) -> int:
        """Examples of which something is made."""
        return self.n if self.same else self.n + self.m


def forward_flops(jaxpr: jex.ClosedJaxpr) -> float:
    """Operations of the products in a trace; steps of scans are counted, branches by the dearest, loops of unknown length once."""
    total = 0.0
    for eqn in jaxpr.jaxpr.eqns:
        name, inner = eqn.primitive.name, prim.called(eqn)
        if inner is not None:
            total += forward_flops(inner)
        elif name == "scan":
            total += eqn.params["length"] * forward_flops(prim.closed(eqn.params["jaxpr"]))
        elif name == "while":
            total += forward_flops(prim.closed(eqn.params["body_jaxpr"]))
        elif name == "cond":
            total += max(forward_flops(prim.closed(branch)) for branch in eqn.params["branches"])
        elif name in ("dot_general", "conv_general_dilated"):
            total += 2.0 * eqn.outvars[0].aval.size * _summed(eqn)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            total += sum(getattr(var.aval, "size", 0) for var in eqn.outvars)
    return total


def has_forward(jaxpr: jex.ClosedJaxpr) -> bool:
    """Whether a trace has forward derivatives: no part of it has backward ones only, written by hand."""
    return all(
        not eqn.primitive.name.startswith("custom_vjp") and all(map(has_forward, prim.inner_jaxprs(eqn))) for eqn in jaxpr.jaxpr.eqns
    )


def held_forward(jaxpr: jex.ClosedJaxpr) -> float:
    """Bytes of all values that a trace computes; of all steps of its scans."""
    total = 0.0
    for eqn in jaxpr.jaxpr.eqns:
        total += sum(var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars if hasattr(var.aval, "size"))
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(held_forward, prim.inner_jaxprs(eqn)))
    return total


def largest_value(jaxpr: jex.ClosedJaxpr) -> int:
    """Bytes of the largest value that a trace computes; all steps of its scans together."""
    return max((times * aval.size * aval.dtype.itemsize for aval, times in _values(jaxpr)), default=0)


def widest(jaxpr: jex.ClosedJaxpr) -> int:
    """Bytes of a number of what a trace is given and computes, where it has the most: a network's outputs may have fewer."""
    made = (aval for aval, _ in _values(jaxpr))
    return max(itemsize(aval.dtype) for aval in (*jaxpr.in_avals, *made) if jnp.issubdtype(aval.dtype, jnp.inexact))


def _values(jaxpr: jex.ClosedJaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    for eqn in jaxpr.jaxpr.eqns:
        yield from ((var.aval, times) for var in eqn.outvars if hasattr(var.aval, "size"))
        for inside in prim.inner_jaxprs(eqn):
            yield from _values(inside, times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1))


@functools.lru_cache(maxsize=64)
def loops_per_product(jaxpr: jex.ClosedJaxpr) -> float:
    """Equations of a trace that compute something and are no products, for each that is."""
    counted = _counted(jaxpr)
    return counted[0] / max(counted[1], 1)


def _counted(jaxpr: jex.ClosedJaxpr) -> tuple[int, int]:
    loops = products = 0
    for eqn in jaxpr.jaxpr.eqns:
        inside = prim.inner_jaxprs(eqn)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            products += 1
        elif not inside:
            loops += eqn.primitive.name not in prim.MOVES
        for more, others in map(_counted, inside):
            loops, products = loops + more, products + others
    return loops, products


def _summed(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        shape = eqn.invars[0].aval.shape
        axes = prim.dot_axes(eqn, 0)
    else:
        shape = eqn.invars[1].aval.shape
        axes = prim.conv_axes(eqn)
    n = 1
    for axis in (*axes.contracted, *axes.window):
        n *= shape[axis]
    return n


def term_costs(term: Term, outputs: str, sizes: Sizes) -> dict[str, Cost]:
    """Costs of the routes that a term could take, besides recording it."""
    n, m, o, item = sizes.n, sizes.m, sizes.outputs, sizes.itemsize
    full = outputs == "full"
    k, i, j = (getattr(term.factors[0], name) for name in "kij")
    t = sum(f.t for f in term.factors)
    pairs = n * m * (o * o if full else 1 if outputs == "trace" else o)
    inner = 0 if term.factors[0].lookup else 2.0 * i
    wide = k * t * t * pairs
    held = t * t * pairs * item * (3 if t > 1 else 2)
    flops = k * n * m * t * t * (inner + 2.0 * j * (o * o if full else o)) + 3.0 * wide
    costs = {"gram": Cost(flops, 3.0 * wide * item + k * t * sizes.recorded * (i + o * j) * item, held)}
    if term.plain:
        size = sizes.recorded * o * k * i * j
        flops = 2.0 * t * size + 2.0 * n * m * k * i * j * (o * o if full else o)
        costs["gradients"] = Cost(flops, 4.0 * size * item + pairs * item, 2 * size * item)
    return costs


def other_costs(size: int, outputs: str, sizes: Sizes) -> dict[str, Cost]:
    """Costs of a leaf of that many entries without factors: by its gradients, or by products of the kernel with vectors."""
    n, m, o, item = sizes.n, sizes.m, sizes.outputs, sizes.itemsize
    full = outputs == "full"
    entries = sizes.recorded * o * size
    flops = 2.0 * n * m * size * (o * o if full else o) + 2.0 * entries
    jacobian = Cost(flops, 3.0 * entries * item, 2 * entries * item)
    # A forward derivative is about two forward passes, and one is needed for each example of one batch and each output of the other.
    ntvp = Cost(2.0 * sizes.forward * (n * m * o + 2 * m * o), 2.0 * n * m * o * size * item, 2 * (o * size + n * o) * item)
    return {"jacobian": jacobian, "ntvp": ntvp}


def choose(
    terms: Terms,
    paths: tuple[str, ...],
    sizes_of: tuple[int, ...],
    outputs: str,
    sizes: Sizes,
    route: str | Mapping[str, str],
    machine: Machine,
) -> tuple[Choice, ...]:
    """The route of every leaf that the model uses.

    Raises
    ------
    ValueError
        If `route` names a route or a leaf that is not there, or asks for factors of a leaf that has none.
    """
    asked = _asked(route, paths)
    found: list[Choice] = []
    for number, term in enumerate(terms.terms):
        costs = term_costs(term, outputs, sizes)
        choices = {**costs, **other_costs(sizes_of[term.leaf], outputs, sizes)}
        want = asked.get(term.leaf, "auto")
        if want in ("gram", "gradients") and want not in costs:
            raise ValueError(_no_factors(paths[term.leaf], want, "its uses are of two kinds"))
        best = min(costs, key=lambda name: costs[name].seconds(machine))
        chosen = best if want in ("auto", "factorised") else want
        kept = number if chosen in costs else None
        found.append(Choice(term.leaf, chosen, kept, "", choices))
        if term.bias is not None:
            alone = other_costs(sizes_of[term.bias], outputs, sizes)
            want_bias = asked.get(term.bias, "auto")
            shares = kept is not None and want_bias not in ("jacobian", "ntvp")
            name = chosen if shares else want_bias if want_bias in ("jacobian", "ntvp") else "jacobian"
            costs = {**alone, name: Cost(0.0, 0.0, 0.0)} if shares else alone
            found.append(Choice(term.bias, name, number if shares else None, "", costs))
    # A leaf with several terms (slices used apart) takes one route: its gradients cannot be had for one slice only.
    apart = {c.leaf for c in found if c.term is None}
    found = [c._replace(term=None, route=c.route if c.term is None else "jacobian") if c.leaf in apart else c for c in found]
    found = [c for n, c in enumerate(found) if c.term is not None or c.leaf not in {d.leaf for d in found[:n]}]
    for leaf, why in sorted(terms.others.items()):
        costs = other_costs(sizes_of[leaf], outputs, sizes)
        want = asked.get(leaf, "auto")
        if want in ("gram", "gradients"):
            raise ValueError(_no_factors(paths[leaf], want, f"it enters {why}"))
        best = min(costs, key=lambda name: costs[name].seconds(machine))
        found.append(Choice(leaf, best if want in ("auto", "factorised") else want, None, why, costs))
    return tuple(found)


def _no_factors(path: str, want: str, why: str) -> str:
    return f"leaf {path} cannot take the route {want!r}: {why}. Use 'jacobian', 'ntvp', or leave it to the engine ('auto')."


def _asked(route: str | Mapping[str, str], paths: tuple[str, ...]) -> dict[int, str]:
    known = ("auto", "factorised", *ROUTES)
    by_path = dict.fromkeys(paths, route) if isinstance(route, str) else dict(route)
    for path, name in by_path.items():
        if name not in known:
            raise ValueError(f"unknown route {name!r}. {nearest(str(name), known)}")
        if path not in paths:
            raise ValueError(f"route names a leaf {path!r} that is not trained here. {nearest(path, paths)}")
        if isinstance(route, str) and name in ("gram", "gradients"):
            raise ValueError(
                f"route {name!r} is for single leaves: route={{path: {name!r}}}. For all leaves: {', '.join(known[:2])}, jacobian, ntvp."
            )
    return {paths.index(path): name for path, name in by_path.items()}


def itemsize(dtype: Any) -> int:
    """Bytes of one number."""
    return jnp.dtype(dtype).itemsize
