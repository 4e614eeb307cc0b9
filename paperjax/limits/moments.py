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

from paperjax.limits import draws, heads, loops
from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd
from paperjax.limits.gaussians import expected_product, mean_of
from paperjax.limits.nodes import Det, Moment, Node, Wide

LARGEST = 100.0
"""Unless more is known."""

# A moment that is 0 whatever the data is not computed.
Moments = Array | None


class Run:
    """Moments at one or two examples.

    Parameters
    ----------
    xs
        The example, or the two, with a batch axis of size 1.
    variance
        The variance of each leaf's entries, by the first part of a key.
    shift
        What is added to it between the two examples, see above.
    largest
        The largest variance for which expectations without a closed form are made; they are NaN beyond.
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
        drawn: draws.Draws | None = None,
        largest: float = LARGEST,
    ) -> None:
        self.xs, self.variance, self.shift, self.draws = xs, variance, shift, drawn
        self.state, self.rows = state, dict(rows or {})
        self.cache = {} if cache is None else cache
        self.known: dict[Any, Any] = {}
        self.asked: dict[Any, None] = {}
        self.tapes, self.largest = tapes, largest

    # Deterministic values.

    def det(self, node: Det, s: int) -> Array:
        """A deterministic array at an example."""
        if node.const is not None:
            return jnp.asarray(node.const)
        if node in self.rows:
            return self.rows[node]
        key = ("det", node, s)
        if key not in self.known:
            self.known[key] = self._taped(key, s) if self.tapes else self._det(node, s)
        return self.known[key]

    def _det(self, node: Det, s: int) -> Array:
        if node.fn is None:
            return jnp.asarray(self.xs[s])
        return node.fn(*(self.moment(arg, s) if isinstance(arg, Moment) else self.det(arg, s) for arg in node.args))

    def moment(self, asked: Moment, s: int) -> Array:
        """A moment that a deterministic array is made of."""
        found = self.mean(asked.u, s) if asked.v is None else self.second(asked.u, asked.v, s, s)
        shape = asked.u.shape if asked.v is None else asked.u.shape + asked.v.shape
        return asked.fn(jnp.zeros(shape) if found is None else found)

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
        return Run(xs, self.variance, self.shift, tapes, self.cache, state, {**self.rows, **rows}, self.draws, self.largest)

    # Means and second moments.

    def mean(self, u: Wide, s: int) -> Moments:
        """``E u`` over a coordinate; ``None`` for 0."""
        if fl.centred(u):
            return None
        key = ("mean", u, s)
        if key not in self.known:
            self.known[key] = self._taped(key, s) if self.tapes else self._mean(u, s)
        return self.known[key]

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> Moments:
        """``(*u.shape, *v.shape)``, or ``u.shape`` if `diag`; ``None`` for 0."""
        if (s == t or self.shift is None) and (fl.is_still(u) or fl.is_still(v)):
            return None
        key = ("second", u, v, diag, s, t)
        if key not in self.known:
            if s == t and self.tapes:
                taped = ("second", u, v, diag, s)
                self.known[key] = self._taped(taped, s)
            else:
                self.known[key] = self._second(u, v, s, t, diag)
        return self.known[key]

    def _mean(self, u: Wide, s: int) -> Moments:
        if isinstance(u, nd.Const):
            return self.det(u.value, s)
        if isinstance(u, nd.Add):
            return _plus(self.mean(u.u, s), self.mean(u.v, s))
        if isinstance(u, nd.Scale):
            return _times(self.mean(u.u, s), self.det(u.by, s))
        if isinstance(u, nd.Linear):
            below = self.mean(u.u, s)
            return None if below is None else u.fn(below, *(self.det(d, s) for d in u.dets))
        if isinstance(u, nd.Part):
            return self.mean(u.u, s)
        if isinstance(u, nd.Stacked):
            parts = [self.mean(part, s) for part in u.parts]
            return jnp.concatenate([jnp.zeros(p.shape) if m is None else m for p, m in zip(u.parts, parts)], u.axis)
        if isinstance(u, nd.Mixed):
            terms = [_times(self.mean(part, s), weight) for part, weight in zip(u.parts, u.weights)]
            return _sum(terms)
        if isinstance(u, nd.Func):
            return mean_of(self, u, s)
        if isinstance(u, nd.Drawn):
            return draws.mean(self, u, s)
        if isinstance(u, nd.Paired):
            return heads.mean(self, u, s)
        if isinstance(u, nd.Prod):
            return self._of_products(u.factors, (), s, s, True)
        raise NotImplementedError(f"the mean of {type(u).__name__} at infinite width is not known.")

    def _second(self, u: Wide, v: Wide, s: int, t: int, diag: bool) -> Moments:
        if fl.independent(u, v):
            if fl.centred(u) or fl.centred(v):
                return None
            a, b = self.mean(u, s), self.mean(v, t)
            return None if a is None or b is None else (a * b if diag else _outer(a, b))
        if s == t and ("second", v, u, diag, s, s) in self.known:
            return _swapped(self.known["second", v, u, diag, s, s], v, diag)
        if isinstance(u, nd.Add):
            return _plus(self.second(u.u, v, s, t, diag), self.second(u.v, v, s, t, diag))
        if isinstance(v, nd.Add):
            return _plus(self.second(u, v.u, s, t, diag), self.second(u, v.v, s, t, diag))
        if isinstance(u, nd.Mixed) and isinstance(v, nd.Mixed) and u.weights == v.weights:
            return _sum([_times(self.second(a, b, s, t, diag), w) for a, b, w in zip(u.parts, v.parts, u.weights)])
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
            return _diagonal(self.second(u, v, s, t), u)
        if isinstance(u, nd.Linear):
            below, dets = self.second(u.u, v, s, t), [self.det(d, s) for d in u.dets]
            return None if below is None else on_left(lambda k: u.fn(k, *dets), below, len(u.u.shape))
        if isinstance(v, nd.Linear):
            below, dets = self.second(u, v.u, s, t), [self.det(d, t) for d in v.dets]
            return None if below is None else on_right(lambda k: v.fn(k, *dets), below, len(u.shape))
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

    def _at_the_bottom(self, u: Wide, v: Wide, s: int, t: int, diag: bool) -> Moments:
        if isinstance(u, nd.Field) and isinstance(v, nd.Field):
            return self._of_fields(u, v, s, t, diag)
        if isinstance(u, nd.Entries) and isinstance(v, nd.Entries):
            there = self._variance(u.key, s, t) * (u.scale * v.scale)
            whole = jnp.broadcast_to(there, u.shape)
            return whole if diag else jnp.diag(whole.reshape(-1)).reshape(u.shape + v.shape)
        if isinstance(u, nd.Lookup) and isinstance(v, nd.Lookup):
            i, j = self.det(u.index, s), self.det(v.index, t)
            same = i == j if diag else i.reshape(*i.shape, *(1,) * j.ndim) == j.reshape(*(1,) * i.ndim, *j.shape)
            return same * (self._variance(u.key, s, t) * (u.scale * v.scale))
        if any(map(fl.joins_positions, (u, v))) and not any(isinstance(w, nd.Prod) for w in (u, v)):
            exact = self.draws is None or heads.exact(u, v)
            return (heads if exact else draws).second(self, u, v, s, t, diag)
        if isinstance(u, (nd.Func, nd.Prod)) or isinstance(v, (nd.Func, nd.Prod)):
            factors = [w.factors if isinstance(w, nd.Prod) else (w,) for w in (u, v)]
            if isinstance(u, nd.Prod) or isinstance(v, nd.Prod):
                return self._of_products(factors[0], factors[1], s, t, diag)
            return expected_product(self, u, v, s, t, diag)
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

    def _of_fields(self, u: nd.Field, v: nd.Field, s: int, t: int, diag: bool) -> Moments:
        variance = self._variance(u.key, s, t) * (u.scale * v.scale)
        if isinstance(u.source, Det) or isinstance(v.source, Det):
            if not (isinstance(u.source, Det) and isinstance(v.source, Det)):
                return None
            a, b = self.det(u.source, s), self.det(v.source, t)
            terms = [_contracted(f(a), g(b), diag) for f, g in zip(u.taps, v.taps)]
            return _own_matrices(variance * _sum(terms), u, diag)
        assert isinstance(u.source, Wide)
        assert isinstance(v.source, Wide)
        # Where nothing is left but the trace, or each position is a sum over taps of itself, positions only meet themselves.
        alone = diag or (math.prod(u.shape) == 1 and math.prod(v.shape) == 1)
        below = self.second(u.source, v.source, s, t, alone)
        if below is None:
            return None
        if alone:
            total = _sum([f(below).sum(-1) for f in u.taps])
            total = total if diag else total.reshape(u.shape + v.shape)
        else:
            n = len(u.source.shape)
            total = _sum([_trace(on_right(g, on_left(f, below, n), len(u.shape) + 1), len(u.shape)) for f, g in zip(u.taps, v.taps)])
        return _own_matrices(variance * total, u, diag)

    def _of_products(self, left: tuple[Wide, ...], right: tuple[Wide, ...], s: int, t: int, diag: bool) -> Moments:
        """The expectation of a product: that of each group of factors that depend on each other, by itself."""
        groups: list[list[tuple[int, Wide]]] = []
        for item in [(0, w) for w in left] + [(1, w) for w in right]:
            touching = [g for g in groups if any(not fl.independent(item[1], w) for _, w in g)]
            groups = [g for g in groups if g not in touching] + [[*(x for g in touching for x in g), item]]
        shape_u, shape_v = (left or right)[0].shape, (right or left)[0].shape
        total: Moments = jnp.ones(())
        for group in groups:
            a, b = [w for side, w in group if side == 0], [w for side, w in group if side == 1]
            if len(a) == len(b) == 1:
                found = self.second(a[0], b[0], s, t, diag)
            elif len(group) == 1:
                found = _placed(self.mean(group[0][1], t if b else s), not b, shape_u, shape_v, diag)
            elif not (a and b) and len(group) == 2:
                (_, one), (_, other) = group
                at = t if b else s
                found = _placed(self.second(one, other, at, at, True), not b, shape_u, shape_v, diag)
            elif self.draws is not None and any(fl.joins_positions(w) for _, w in group):
                left_one, right_one = (product_of(side) or _ones(other[0]) for side, other in ((a, b), (b, a)))
                found = draws.second(self, left_one, right_one, s, t, diag)
            else:
                found = expected_product(self, product_of(a), product_of(b), s, t, diag)
            total = None if total is None or found is None else total * found
        return total if total is None else jnp.broadcast_to(total, shape_u if diag else shape_u + shape_v)


def product_of(factors: list[Wide]) -> Wide | None:
    """One value for several factors."""
    return None if not factors else factors[0] if len(factors) == 1 else nd.Prod(factors[0].axes, tuple(factors))


def _ones(like: Wide) -> Wide:
    return nd.Const(like.axes, Det(like.axes, const=np.ones(like.shape)))


def _placed(moment: Moments, left: bool, shape_u: tuple[int, ...], shape_v: tuple[int, ...], diag: bool) -> Moments:
    """A moment of one side, in the shape of moments of two."""
    if moment is None or diag:
        return moment
    return moment.reshape(*shape_u, *(1,) * len(shape_v)) if left else moment.reshape(*(1,) * len(shape_u), *shape_v)


def _alike(u: nd.Stacked, v: nd.Stacked) -> bool:
    return [p.shape for p in u.parts] == [p.shape for p in v.parts]


def _swapped(moment: Moments, v: Node, diag: bool) -> Moments:
    if moment is None or diag:
        return moment
    n = len(v.shape)
    return moment.transpose(*range(n, moment.ndim), *range(n))


def _outer(a: Array, b: Array) -> Array:
    return a.reshape(*a.shape, *(1,) * b.ndim) * b


def _plus(a: Moments, b: Moments) -> Moments:
    return b if a is None else a if b is None else a + b


def _times(a: Moments, b: Any) -> Moments:
    return None if a is None else a * b


def _sum(terms: Sequence[Moments]) -> Any:
    total = None
    for term in terms:
        total = _plus(total, term)
    return total


def _own_matrices(k: Any, u: nd.Field, diag: bool) -> Any:
    """No covariance between positions with different matrices."""
    n = len(u.shape)
    for axis in () if diag else u.alone:
        same = jnp.eye(u.shape[axis], dtype=k.dtype)
        k = k * jnp.expand_dims(same, [i for i in range(2 * n) if i not in (axis, n + axis)])
    return k


def _diagonal(full: Moments, u: Node) -> Moments:
    if full is None:
        return None
    n = math.prod(u.shape)
    return jnp.diagonal(full.reshape(n, n)).reshape(u.shape)


def _contracted(a: Array, b: Array, diag: bool) -> Array:
    """``sum_c a[..., c] b[..., c]`` over the last axes."""
    if diag:
        return (a * b).sum(-1)
    flat = a.reshape(-1, a.shape[-1]) @ b.reshape(-1, b.shape[-1]).T
    return flat.reshape(a.shape[:-1] + b.shape[:-1])


def _trace(k: Array, n: int) -> Array:
    """Of ``(*u, c, *v, c)`` over both c."""
    return jnp.trace(k, axis1=n, axis2=k.ndim - 1) if k.shape[-1] > 1 else k[(*(slice(None),) * n, 0)][..., 0]


def on_left(fn: nd.Fn, k: Array, n: int) -> Array:
    """A function of the first `n` axes, for every entry along the others."""
    rest = k.shape[n:]
    size = math.prod(rest)
    if size == 1:
        out = fn(k.reshape(k.shape[:n]))
        return out.reshape(out.shape + rest)
    out = jax.vmap(fn, in_axes=n, out_axes=-1)(k.reshape(*k.shape[:n], size))
    return out.reshape(out.shape[:-1] + rest)


def on_right(fn: nd.Fn, k: Array, n: int) -> Array:
    """A function of the axes after the first `n`, for every entry along those."""
    rest = k.shape[:n]
    size = math.prod(rest)
    if size == 1:
        out = fn(k.reshape(k.shape[n:]))
        return out.reshape(rest + out.shape)
    out = jax.vmap(fn)(k.reshape(size, *k.shape[n:]))
    return out.reshape(rest + out.shape[1:])
