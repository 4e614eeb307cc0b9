"""Values as functions of Gaussian fields, entry by entry: what nonlinear primitives act on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from paperjax.limits import fields as fl
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Det, Func, Node, Wide
from paperjax.limits.polynomials import polynomial


class NotGaussianError(NotImplementedError):
    """A nonlinear function of a leaf whose law is not Gaussian, nor made so by a sum."""

    def __init__(self, leaf: int) -> None:
        super().__init__(f"{leaf}: its entries are not Gaussian, and a nonlinear function acts on them.")
        self.leaf = leaf


class Form(NamedTuple):
    """``fn(fields, dets)``, two lists of arrays."""

    fn: Callable[[Sequence[Any], Sequence[Any]], Any]
    fields: tuple[Wide, ...]
    dets: tuple[Det, ...]


@fl.memoized
def form_of(node: Node) -> Form:
    """A value as a function of Gaussian fields.

    Raises
    ------
    NotImplementedError
        If it mixes positions after a nonlinear function, so that it is none.
    """
    if isinstance(node, Det):
        number = node.number
        if number is not None:
            return Form(lambda fields, dets: number, (), ())
        return Form(lambda fields, dets: dets[0], (), (node,))
    assert isinstance(node, Wide)
    if fl.is_gaussian(node):
        return _of_gaussians([node])
    if isinstance(node, nd.Const):
        return form_of(node.value)
    if isinstance(node, Func):
        n = len(node.fields)
        return Form(lambda fields, dets: node.fn(*fields[:n], *dets), node.fields, node.dets)
    if isinstance(node, nd.Add):
        terms = list(_terms(node))
        gaussian = [u for u in terms if fl.is_gaussian(u)]
        others = [u for u in terms if not fl.is_gaussian(u)]
        return _joined(
            [*([_of_gaussians(gaussian)] if gaussian else []), *map(form_of, others)], lambda *parts: sum(parts[1:], start=parts[0])
        )
    if isinstance(node, nd.Scale):
        inside = _inside(node)
        return combined(lambda a, b: a * b, [node.u, node.by]) if inside is None else form_of(inside)
    if isinstance(node, nd.Prod):
        return combined(_product, node.factors)
    if isinstance(node, nd.Linear) and node.selects and not node.dets:
        below = form_of(node.u)
        moved = tuple(nd.Linear(node.axes, z, node.fn, (), True) for z in below.fields)
        whole = [nd.Det(node.u.axes, lambda a, shape=node.u.shape: jnp.broadcast_to(a, shape), (d,)) for d in below.dets]
        dets = tuple(nd.Det(node.axes, node.fn, (d,)) for d in whole)
        # Where no entry goes (padding) fields are 0, and a function of them need not be.
        at_zero = nd.fold(lambda: jnp.asarray(below.fn([jnp.zeros(())] * len(moved), [jnp.zeros(())] * len(dets))))
        there = None if np.all(at_zero == 0) else nd.fold(node.fn, np.ones(node.u.shape))
        if there is None or there.all():
            return Form(below.fn, moved, dets)
        return Form(lambda fields, given: below.fn(fields, given[:-1]) * given[-1], moved, (*dets, nd.Det(node.axes, const=there)))
    if isinstance(node, nd.Part):
        below = form_of(node.u)
        return Form(below.fn, tuple(nd.Part(node.axes, z, node.which) for z in below.fields), below.dets)
    if isinstance(node, (nd.Field, nd.Entries, nd.Lookup)):
        raise NotGaussianError(node.key[0])
    raise NotImplementedError(
        f"a nonlinear function acts on a sum over positions of a nonlinear function ({_named(node)}), which is not "
        f"Gaussian: its expectations "
        "at infinite width are integrals over as many fields as there are positions."
    )


def _inside(node: nd.Scale) -> Wide | None:
    """What the data give as a factor, of sums and of products with a gain, as one of a Gaussian value: of the form it is no part then."""
    u, axes = node.u, node.axes
    if node.by.number is not None:
        return None
    if isinstance(u, nd.Add):
        return nd.Add(axes, *(fl.scale(st.same(part, axes), node.by, axes) for part in (u.u, u.v)))
    if not isinstance(u, nd.Prod):
        return None
    at = next((i for i, f in enumerate(u.factors) if fl.is_gaussian(f) and not fl.is_still(f)), None)
    if at is None:
        return None
    factors = [st.same(factor, axes) for factor in u.factors]
    factors[at] = fl.scale(factors[at], node.by, axes)
    return nd.Prod(axes, tuple(factors))


def _named(node: Node) -> str:
    names = {nd.Linear: "a mean, a pooling or a mixing of positions", nd.Carried: "the carry of a scan, not Gaussian there",
             nd.Scanned: "the result of a scan, not Gaussian there", nd.Mixed: "joined channels",
             nd.Stacked: "joined positions"}  # fmt: skip
    return names.get(type(node), type(node).__name__)


def _terms(node: Wide) -> list[Wide]:
    return [*_terms(node.u), *_terms(node.v)] if isinstance(node, nd.Add) and not fl.is_gaussian(node) else [node]


def _of_gaussians(terms: Sequence[Wide]) -> Form:
    """A sum of Gaussian values: a number times one field that varies, and what does not vary yet by itself."""
    parts = [fl.moving_and_still(term) for term in terms]
    moving, still = (_collected(tuple(z for part in parts for z in part[i])) for i in (0, 1))
    fields, times = list(still), list(still.values())
    if moving:
        field, number = fl.multiple(moving)
        fields.insert(0, field)
        times.insert(0, number)
    return Form(lambda values, dets: sum((n * z for n, z in zip(times[1:], values[1:])), start=times[0] * values[0]), tuple(fields), ())


def _collected(terms: Sequence[Wide]) -> dict[Wide, float]:
    """Numbers by which values are multiplied taken out; ``h - h`` is 0 times h."""
    found: dict[Wide, float] = {}
    for term in terms:
        z, by = term, 1.0
        while isinstance(z, nd.Scale) and z.by.number is not None and z.u.shape == z.shape:
            z, by = z.u, by * z.by.number
        found[z] = found.get(z, 0.0) + by
    left = {z: n for z, n in found.items() if n}
    return left or dict(list(found.items())[:1])


def _product(*parts: Any) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total * part
    return total


def combined(fn: Callable[..., Any], operands: Sequence[Node]) -> Form:
    """``fn`` of several values, each field and each deterministic array taken once."""
    return _joined([form_of(operand) for operand in operands], fn)


def _joined(forms: Sequence[Form], fn: Callable[..., Any]) -> Form:
    fields = tuple(dict.fromkeys(z for form in forms for z in form.fields))
    dets = tuple(dict.fromkeys(d for form in forms for d in form.dets))
    where = [([fields.index(z) for z in form.fields], [dets.index(d) for d in form.dets]) for form in forms]

    def call(values: Sequence[Any], known: Sequence[Any]) -> Any:
        return fn(*(f.fn([values[i] for i in zs], [known[i] for i in ds]) for f, (zs, ds) in zip(forms, where)))

    return Form(call, fields, dets)


def of_live(form: Form, live: Sequence[int]) -> Callable[..., Any]:
    """A form as a function of its live fields; the others are at 0, where they start."""

    def call(*zs: Any) -> Any:
        values: list[Any] = [jnp.zeros_like(zs[0]) if zs else jnp.zeros(())] * len(form.fields)
        for i, z in zip(live, zs):
            values[i] = z
        out = jnp.asarray(form.fn(values, ()))
        return jnp.broadcast_to(out, zs[0].shape).astype(zs[0].dtype) if zs else out

    return call


def is_polynomial(node: Node) -> bool:
    """Whether a value is a polynomial of Gaussian fields, of which expectations are exact."""
    try:
        form = form_of(node)
    except NotImplementedError:
        return False
    live = [i for i, z in enumerate(form.fields) if not fl.is_still(z)]
    found = None if form.dets or not live else polynomial(of_live(form, live), len(live))
    return found is not None and found.terms is not None


def function(fn: Callable[..., Any], operands: Sequence[Node], axes: nd.Axes) -> Func:
    """The value ``fn(*operands)``; entries of `operands` along other axes than `axes` are repeated."""
    form = combined(fn, [st.same(u, axes) if isinstance(u, Wide) else u for u in operands])
    n = len(form.fields)
    return Func(axes, lambda *values: form.fn(values[:n], values[n:]), form.fields, form.dets)
