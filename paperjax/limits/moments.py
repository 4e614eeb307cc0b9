"""Second moments of the values of `paperjax.limits.nodes` at two examples, by recursion over the graph of values.

``E[u_p(x) v_q(x')]`` over a coordinate, for all positions p and q (``full``), or for p = q (``diag``). What concerns one example alone
(variances, statistics of norms, attention weights) is computed once for it, the *tape*; what concerns two is computed for each pair from
both tapes. The neural tangent kernel is the derivative of the second part with respect to the variances of the leaves, tapes held fixed:
in ``K' = (s² + e · lr) E[phi phi'] + ...`` that is ``lr E[phi phi'] + s² E[phi' phi''] dK/de``, the recursion of Jacot, Gabriel and
Hongler (arXiv 1806.07572, Theorem 1) with gradients independent of the forward pass (Yang, arXiv 2006.14548).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paperjax.limits import covariances as cov
from paperjax.limits import draws, heads, loops
from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd
from paperjax.limits.contractions import product
from paperjax.limits.functions import is_polynomial
from paperjax.limits.gaussians import expected_product, is_of_several, mean_of
from paperjax.limits.nodes import Det, Moment, Wide
from paperjax.limits.stages import kept

LARGEST = 100.0
"""Unless more is known."""


class Run:
    """cov.Moments at one or two examples.

    Parameters
    ----------
    xs
        The example, or the two, with a batch axis of size 1.
    variance
        The variance of each leaf's entries, by the first part of a key.
    shift
        What is added to it between the two examples, see above.
    unit
        The number 1, if XLA is not to know it. It computes a cheap value again for each of its uses, and a whole layer is cheap to it, so
        that a layer takes as long as all those below it; but a quotient is computed once.
    largest
        The largest variance for which expectations without a closed form are made; they are NaN beyond.
    looks
        Whether only what is asked, and of what, is to be seen: expectations are not made, and marks take their places.
    """

    def __init__(
        self,
        xs: tuple[Any, ...],
        variance: Callable[[Any], Any],
        shift: Callable[[Any], Any] | None = None,
        tapes: tuple[Any, ...] = (),
        cache: dict[Any, Any] | None = None,
        state: Callable[..., Any] | None = None,
        rows: Mapping[Det, Any] | None = None,
        unit: Any = None,
        drawn: draws.Draws | None = None,
        largest: float = LARGEST,
        looks: bool = False,
    ) -> None:
        self.xs, self.variance, self.shift, self.draws = xs, variance, shift, drawn
        self.state, self.rows = state, dict(rows or {})
        self.cache = {} if cache is None else cache
        self.known: dict[Any, Any] = {}
        self.open = 0
        self.asked: dict[Any, None] = {}
        self.tapes, self.unit, self.largest, self.looks = tapes, unit, largest, looks

    # Deterministic values.

    def det(self, node: Det, s: int) -> Array:
        """A deterministic array at an example."""
        if node.const is not None:
            # Within a scan JAX keeps the precision of an array of NumPy.
            return jnp.asarray(node.const.astype(jax.dtypes.canonicalize_dtype(node.const.dtype)))
        if node in self.rows:
            return self.rows[node]
        if node.fn is None:
            return jnp.asarray(self.xs[s])
        key = ("det", node, s)
        return kept(self, key, lambda: self._taped(key, s) if self.tapes else self._det(node, s))

    def _det(self, node: Det, s: int) -> Array:
        assert node.fn is not None
        return node.fn(*(self.moment(arg, s) if isinstance(arg, Moment) else self.det(arg, s) for arg in node.args))

    def moment(self, asked: Moment, s: int) -> Array:
        """A moment that a deterministic array is made of."""
        found = self.mean(asked.u, s) if asked.v is None else self.second(asked.u, asked.v, s, s)
        return asked.fn(jnp.zeros(asked.u.shape + (asked.v.shape if asked.v else ())) if found is None else found)

    def _taped(self, key: Any, s: int) -> Any:
        """Something of one example that its tape holds; on a dry run, something to be put there."""
        wanted = (key[0], *key[1:-1])
        self.asked[wanted] = None
        return self.tapes[s][wanted]

    def read(self, key: Any, s: int) -> Any:
        """What a tape holds, of a run of one example."""
        kind, *rest = key
        if kind == "det":
            return self.det(rest[0], s)
        if kind == "mean":
            return self.mean(rest[0], s)
        if kind == "loop":
            loop, asked = rest
            return loops.tape(self, loop, asked, s)
        u, v, diag = rest
        return self.second(u, v, s, s, diag)

    def inner(self, which: Sequence[int], tapes: tuple[Any, ...], state: Callable[..., Any], rows: Mapping[Det, Any]) -> "Run":
        """A run of a step of a loop."""
        xs = tuple(self.xs[s] for s in which)
        rows = {**self.rows, **rows}
        return Run(xs, self.variance, self.shift, tapes, self.cache, state, rows, self.unit, self.draws, self.largest, self.looks)

    # Means and second moments.

    def mean(self, u: Wide, s: int) -> cov.Moments:
        """``E u`` over a coordinate; ``None`` for 0."""
        if fl.centred(u):
            return None
        key = ("mean", u, s)
        return kept(self, key, lambda: self._taped(key, s) if self.tapes else self._mean(u, s))

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> cov.Moments:
        """``(*u.shape, *v.shape)``, or ``u.shape`` if `diag`; ``None`` for 0."""
        if (s == t or self.shift is None) and (fl.is_still(u) or fl.is_still(v)):
            return None
        taped = s == t and bool(self.tapes)
        return kept(
            self, ("second", u, v, diag, s, t),
            lambda: self._taped(("second", u, v, diag, s), s) if taped else self._second(u, v, s, t, diag),
        )  # fmt: skip

    def _mean(self, u: Wide, s: int) -> cov.Moments:
        if isinstance(u, nd.Const):
            return self.det(u.value, s)
        if isinstance(u, nd.Add):
            return cov.plus(self.mean(u.u, s), self.mean(u.v, s))
        if isinstance(u, nd.Scale):
            return cov.times(self.mean(u.u, s), self.det(u.by, s))
        if isinstance(u, nd.Linear):
            below = self.mean(u.u, s)
            return None if below is None else u.fn(below, *(self.det(d, s) for d in u.dets))
        if isinstance(u, nd.Part):
            return self.mean(u.u, s)
        if isinstance(u, nd.Stacked):
            parts = [self.mean(part, s) for part in u.parts]
            return jnp.concatenate([jnp.zeros(p.shape) if m is None else m for p, m in zip(u.parts, parts)], u.axis)
        if isinstance(u, nd.Mixed):
            terms = [cov.times(self.mean(part, s), weight) for part, weight in zip(u.parts, u.weights)]
            return cov.total_of(terms)
        if isinstance(u, nd.Func):
            return mean_of(self, u, s)
        if isinstance(u, nd.Drawn):
            return draws.mean(self, u, s)
        if isinstance(u, nd.Paired):
            return heads.mean(self, u, s)
        if isinstance(u, nd.Prod):
            return self._of_products(u.factors, (), s, s, True)
        if isinstance(u, nd.Carried) and self.state is not None:
            return self.state(u.slot, loops.MEAN, True, True)
        if isinstance(u, nd.Scanned):
            return loops.after(self, u.scan, (u.slot, loops.MEAN, True), s)
        raise NotImplementedError(f"the mean of {type(u).__name__} at infinite width is not known.")

    def _second(self, u: Wide, v: Wide, s: int, t: int, diag: bool) -> cov.Moments:
        if fl.independent(u, v):
            if fl.centred(u) or fl.centred(v):
                return None
            a, b = self.mean(u, s), self.mean(v, t)
            return None if a is None or b is None else (a * b if diag else cov.outer(a, b))
        if s == t and ("second", v, u, diag, s, s) in self.known:
            return cov.swapped(self.known["second", v, u, diag, s, s], v, diag)
        if isinstance(u, nd.Add):
            return cov.plus(self.second(u.u, v, s, t, diag), self.second(u.v, v, s, t, diag))
        if isinstance(v, nd.Add):
            return cov.plus(self.second(u, v.u, s, t, diag), self.second(u, v.v, s, t, diag))
        if isinstance(u, nd.Mixed) and isinstance(v, nd.Mixed) and u.sizes == v.sizes:
            return cov.total_of([cov.times(self.second(a, b, s, t, diag), w) for a, b, w in zip(u.parts, v.parts, u.weights)])
        for left in (True, False):
            here, other = (u, v) if left else (v, u)
            at = s if left else t
            if isinstance(here, nd.Scale):
                below = self.second(here.u, other, s, t, diag) if left else self.second(other, here.u, s, t, diag)
                by = self.det(here.by, at)
                if below is None:
                    return None
                by = jnp.broadcast_to(by, here.shape) if by.ndim else by
                return below * (by if diag or not left or not by.ndim else by.reshape(*here.shape, *(1,) * len(other.shape)))
        if isinstance(u, nd.Linear) and isinstance(v, nd.Linear) and diag and u.fn is v.fn and u.selects and not (u.dets or v.dets):
            below = self.second(u.u, v.u, s, t, True)
            return None if below is None else u.fn(below)
        if diag and any(isinstance(w, (nd.Linear, nd.Stacked)) for w in (u, v)):
            if isinstance(u, nd.Stacked) and isinstance(v, nd.Stacked) and u.axis == v.axis and _alike(u, v):
                parts = [self.second(a, b, s, t, True) for a, b in zip(u.parts, v.parts)]
                return jnp.concatenate([jnp.zeros(p.shape) if m is None else m for p, m in zip(u.parts, parts)], u.axis)
            return cov.diagonal(self.second(u, v, s, t), u)
        if isinstance(u, nd.Linear):
            below, dets = self.second(u.u, v, s, t), [self.det(d, s) for d in u.dets]
            return None if below is None else cov.on_left(lambda k: u.fn(k, *dets), below, len(u.u.shape))
        if isinstance(v, nd.Linear):
            below, dets = self.second(u, v.u, s, t), [self.det(d, t) for d in v.dets]
            return None if below is None else cov.on_right(lambda k: v.fn(k, *dets), below, len(u.shape))
        if isinstance(u, nd.Stacked):
            parts = [self.second(part, v, s, t) for part in u.parts]
            return jnp.concatenate([jnp.zeros(p.shape + v.shape) if m is None else m for p, m in zip(u.parts, parts)], u.axis)
        if isinstance(v, nd.Stacked):
            parts = [self.second(u, part, s, t) for part in v.parts]
            whole = [jnp.zeros(u.shape + p.shape) if m is None else m for p, m in zip(v.parts, parts)]
            return jnp.concatenate(whole, len(u.shape) + v.axis)
        if isinstance(u, nd.Part) and isinstance(v, nd.Part):
            return self.second(u.u, v.u, s, t, diag)
        return self._at_the_bottom(u, v, s, t, diag)

    def _at_the_bottom(self, u: Wide, v: Wide, s: int, t: int, diag: bool) -> cov.Moments:
        if isinstance(u, nd.Field) and isinstance(v, nd.Field):
            return self._of_fields(u, v, s, t, diag)
        if isinstance(u, nd.Entries) and isinstance(v, nd.Entries):
            there = self._variance(u.key, s, t) * (u.scale * v.scale)
            whole = jnp.broadcast_to(there, u.shape)
            return whole if diag else jnp.diag(whole.reshape(-1)).reshape(u.shape + v.shape)
        if isinstance(u, nd.Lookup) and isinstance(v, nd.Lookup):
            i, j = self.det(u.index, s), self.det(v.index, t)
            same = i == j if diag else i.reshape(*i.shape, *(1,) * j.ndim) == j.reshape(*(1,) * i.ndim, *j.shape)
            there = 1.0
            for w, at, others in ((u, i, () if diag else (1,) * j.ndim), (v, j, ())):
                if w.beyond is not None:
                    there = there * jnp.where(at < 0, w.beyond, 1.0).reshape(*at.shape, *others)
            return same * there * (self._variance(u.key, s, t) * (u.scale * v.scale))
        if any(map(fl.joins_positions, (u, v))) and not any(isinstance(w, nd.Prod) for w in (u, v)):
            exact = self.draws is None or heads.exact(u, v)
            return (heads if exact else draws).second(self, u, v, s, t, diag)
        if isinstance(u, (nd.Func, nd.Prod)) or isinstance(v, (nd.Func, nd.Prod)):
            factors = [w.factors if isinstance(w, nd.Prod) else (w,) for w in (u, v)]
            if isinstance(u, nd.Prod) or isinstance(v, nd.Prod):
                return self._of_products(factors[0], factors[1], s, t, diag)
            found = expected_product(self, u, v, s, t, diag)
            return found if found is None or diag or self.unit is None else found / self.unit
        if isinstance(u, nd.Carried) and isinstance(v, nd.Carried) and self.state is not None:
            return self.state(u.slot, v.slot, diag, s == t)
        if isinstance(u, nd.Scanned) and isinstance(v, nd.Scanned) and u.scan is v.scan:
            asked = (u.slot, v.slot, diag)
            if s == t:
                return loops.after(self, u.scan, asked, s)
            held = [self._taped(("loop", u.scan, asked, at), at) for at in (s, t)]
            return loops.between(self, u.scan, asked, s, t, (held[0], held[1]))
        raise NotImplementedError(f"the second moment of {type(u).__name__} and {type(v).__name__} at infinite width is not known.")

    def _variance(self, key: nd.Key, s: int, t: int) -> Any:
        there = self.variance(key[0])
        return there if s == t or self.shift is None else there + self.shift(key[0])

    def _of_fields(self, u: nd.Field, v: nd.Field, s: int, t: int, diag: bool) -> cov.Moments:
        variance = self._variance(u.key, s, t) * (u.scale * v.scale)
        if isinstance(u.source, Det) or isinstance(v.source, Det):
            if not (isinstance(u.source, Det) and isinstance(v.source, Det)):
                return None
            a, b = self.det(u.source, s), self.det(v.source, t)
            left, right = (jnp.concatenate([f(x) for f in w.taps], -1) for w, x in ((u, a), (v, b)))
            total = cov.contracted(left, right, diag)
            if s != t and u is v:
                total = self._met(total, u, s, t, diag, left.shape[-1])
                if self.unit is not None:
                    total = total / self.unit
            return cov.own_matrices(variance * total, u, diag)
        assert isinstance(u.source, Wide)
        assert isinstance(v.source, Wide)
        # Where nothing is left but the trace, or each position is a sum over taps of itself, positions only meet themselves.
        alone = diag or (math.prod(u.shape) == 1 and math.prod(v.shape) == 1)
        below = self.second(u.source, v.source, s, t, alone)
        if below is None:
            return None
        if alone:
            total = cov.total_of([f(below).sum(-1) for f in u.taps])
            total = total if diag else total.reshape(u.shape + v.shape)
        elif u is v and u.joint is not None:
            total = u.joint(below, self.unit)
        else:
            n = len(u.source.shape)
            total = cov.total_of(
                [cov.trace(cov.on_right(g, cov.on_left(f, below, n), len(u.shape) + 1), len(u.shape)) for f, g in zip(u.taps, v.taps)]
            )
        if self.unit is not None:
            total = total / self.unit
        return cov.own_matrices(variance * total, u, diag)

    def _met(self, total: Array, u: nd.Field, s: int, t: int, diag: bool, terms: int) -> Array:
        """Products of equal or opposite examples as their squares are, summed in another order: a kink makes the root of rounding."""
        own = self.variance(u.key[0]) * u.scale**2
        a, b = (self.second(u, u, at, at, True) for at in (s, t))
        if a is None or b is None or not own:
            return total
        if not diag:
            a, b = a.reshape(*a.shape, *(1,) * b.ndim), b
        equal = jax.lax.stop_gradient((a + b) / (2 * own))
        room = max(4.0, 2 * math.sqrt(terms)) * float(jnp.finfo(total.dtype).eps)
        # The gradient is that of the product, whose mixed second derivative is not that of the squares.
        off = equal - jax.lax.stop_gradient(jnp.abs(total))
        return total + jnp.where(off <= room * equal, jnp.sign(jax.lax.stop_gradient(total)) * off, jnp.zeros_like(off))

    def _of_products(self, left: tuple[Wide, ...], right: tuple[Wide, ...], s: int, t: int, diag: bool) -> cov.Moments:
        """The expectation of a product: that of each group of factors that depend on each other, by itself."""
        groups: list[list[tuple[int, Wide]]] = []
        for item in [(0, w) for w in left] + [(1, w) for w in right]:
            touching = [g for g in groups if any(not fl.independent(item[1], w) for _, w in g)]
            groups = [g for g in groups if g not in touching] + [[*(x for g in touching for x in g), item]]
        shape_u, shape_v = (left or right)[0].shape, (right or left)[0].shape
        total: cov.Moments = jnp.ones(())
        for group in groups:
            a, b = [w for side, w in group if side == 0], [w for side, w in group if side == 1]
            if len(a) == len(b) == 1:
                found = self.second(a[0], b[0], s, t, diag)
            elif len(group) == 1:
                found = cov.placed(self.mean(group[0][1], t if b else s), not b, shape_u, shape_v, diag)
            elif not (a and b) and len(group) == 2:
                (_, one), (_, other) = group
                at = t if b else s
                found = cov.placed(self.second(one, other, at, at, True), not b, shape_u, shape_v, diag)
            elif self.draws is not None and any(fl.joins_positions(w) for _, w in group):
                left_one, right_one = (product_of(side) or _ones(other[0]) for side, other in ((a, b), (b, a)))
                found = draws.second(self, left_one, right_one, s, t, diag)
            else:
                found = self._together(a, b, s, t, diag)
                found = found if a and b else cov.placed(found, not b, shape_u, shape_v, diag)
            total = None if total is None or found is None else total * found
        return total if total is None else jnp.broadcast_to(total, shape_u if diag else shape_u + shape_v)

    def _together(self, a: list[Wide], b: list[Wide], s: int, t: int, diag: bool) -> cov.Moments:
        """Of factors that depend on each other. Sums are multiplied out, whose terms are of fewer fields (gates behind gates)."""
        for one, other, swapped in ((a, b, False), (b, a, True)):
            if len(one) == 1 and len(other) > 1 and isinstance(one[0], nd.Scale):
                # What the data give as a factor (the norm of a product) is no part of a function of fields.
                rest = product_of(other)
                assert rest is not None
                return self.second(*((rest, one[0]) if swapped else (one[0], rest)), s, t, diag)
        for factors, other in ((a, b), (b, a)):
            terms = multiplied_out(factors) if _of_many_fields(self, a, b) else ()
            if terms and other:
                one = product_of(other)
                assert one is not None
                return cov.total_of([self.second(*((x, one) if factors is a else (one, x)), s, t, diag) for x in terms])
            if terms:
                return cov.total_of([self.mean(x, s if factors is a else t) for x in terms])
        return expected_product(self, product_of(a), product_of(b), s, t, diag)


def _of_many_fields(run: Run, *sides: list[Wide]) -> bool:
    """Whether a product is a function of more than one field, and no polynomial: of what only a grid is an integral."""
    nodes = [node for node in map(product_of, filter(None, sides)) if node is not None]
    try:
        several = any(is_of_several(run, node) for node in nodes)
    except NotImplementedError:
        return True
    return several and not all(map(is_polynomial, nodes))


def multiplied_out(factors: Sequence[Wide]) -> tuple[Wide, ...]:
    """The two terms of a product one of whose factors is a sum that is not Gaussian; the same nodes whoever asks. Nothing if none is."""
    at = next((i for i, w in enumerate(factors) if isinstance(w, nd.Add) and not fl.is_gaussian(w)), None)
    if at is None:
        return ()
    total, rest = factors[at], (*factors[:at], *factors[at + 1 :])
    assert isinstance(total, nd.Add)
    made = total.__dict__.setdefault("_multiplied_out", {})
    if rest not in made:
        made[rest] = tuple(product([term, *rest], total.axes) for term in (total.u, total.v))
    return made[rest]


def product_of(factors: Sequence[Wide]) -> Wide | None:
    """One value for several factors, the same node whoever asks."""
    if not factors:
        return None
    first, *rest = factors
    made = first.__dict__.setdefault("_products", {(): first})
    if tuple(rest) not in made:
        made[tuple(rest)] = nd.Prod(first.axes, tuple(factors))
    return made[tuple(rest)]


def _ones(like: Wide) -> Wide:
    return nd.Const(like.axes, Det(like.axes, const=np.ones(like.shape)))


def _alike(u: nd.Stacked, v: nd.Stacked) -> bool:
    return [p.shape for p in u.parts] == [p.shape for p in v.parts]
