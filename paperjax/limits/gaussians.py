"""Expectations of the functions of `paperjax.limits.functions` over the Gaussian fields that they are functions of."""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from paperjax.limits import draws
from paperjax.limits import fields as fl
from paperjax.limits import polynomials as pn
from paperjax.limits import scaled as sc
from paperjax.limits.closed_forms import Dual
from paperjax.limits.covariances import Moments, plus
from paperjax.limits.divergent import refuse_infinite, told
from paperjax.limits.expectation import analytic, closed, jumps, mean, ranged
from paperjax.limits.functions import Form, form_of, of_live
from paperjax.limits.joint import expect
from paperjax.limits.merged import LINES, POINTS, breaks_along, merged
from paperjax.limits.nodes import Det, Wide
from paperjax.limits.own import own
from paperjax.limits.sampled import sampled, slope


@runtime_checkable
class Moments2(Protocol):
    """What is asked of `paperjax.limits.moments.Run`."""

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> Moments:
        """See there."""
        ...

    def det(self, node: Det, s: int) -> Array:
        """See there."""
        ...

    @property
    def cache(self) -> dict[Any, Any]:
        """See there."""
        ...

    @property
    def largest(self) -> float:
        """See there."""
        ...

    @property
    def shift(self) -> Any:
        """See there."""
        ...

    @property
    def looks(self) -> bool:
        """See there."""
        ...

    @property
    def draws(self) -> draws.Draws | None:
        """See there."""
        ...


def _slope(form: Form, live: Sequence[int], at: int) -> Form:
    """The derivative of a form in a field that stays at 0."""

    def call(values: Sequence[Any], dets: Sequence[Any]) -> Any:
        def moved(z: Any) -> Any:
            return jnp.broadcast_to(form.fn([z if i == at else v for i, v in enumerate(values)], dets), z.shape)

        return jax.jvp(moved, (values[at],), (jnp.ones_like(values[at]),))[1]

    return Form(call, form.fields, form.dets)


def _refuse_arrays(form: Form) -> None:
    if form.dets:
        raise NotImplementedError(
            "a nonlinear function of a field and of numbers that depend on the data or on the position (a shift that "
            "is not the same for all "
            "of them, a norm of values that are not Gaussian followed by a function)."
        )


def expected_product(run: Moments2, u: Wide | None, v: Wide | None, s: int, t: int, diag: bool) -> Moments:
    """``E[u v]`` of two functions of fields; of one of them if the other is ``None``. Of more fields than a grid is for, it is drawn."""
    if u is None or v is None:
        there = u or v
        assert there is not None
        return mean_of(run, there, s if v is None else t)
    try:
        return _product(run, u, v, s, t, diag)
    except TooManyFieldsError:
        if run.draws is None:
            raise
        return draws.second(run, u, v, s, t, diag)


def _product(run: Moments2, u: Wide, v: Wide, s: int, t: int, diag: bool) -> Moments:
    forms = form_of(u), form_of(v)
    for form in forms:
        _refuse_arrays(form)
    live = [[i for i, z in enumerate(form.fields) if not fl.is_still(z)] for form in forms]
    one_each = len(live[0]) == len(live[1]) == 1
    together: Moments = None
    apart: list[tuple[int, int, Array]] = []
    # A leaf that starts as a constant moves nothing yet; what training it does is of first order in its covariance.
    for i, j in itertools.product(*(range(len(form.fields)) for form in forms)):
        a, b = forms[0].fields[i], forms[1].fields[j]
        if i in live[0] or j in live[1] or s == t or run.shift is None or fl.independent(a, b):
            continue
        moved = run.second(a, b, s, t, diag)
        if moved is None:
            continue
        rates = [_rate(run, *side) for side in zip((u, v), forms, live, (i, j))] if one_each else [None]
        if None in rates:
            apart.append((i, j, moved))
        else:
            # As a bias does that is added to a field: it moves the function as the field does, by Price's theorem.
            together = plus(together, moved * math.prod(rates))  # type: ignore[arg-type]
    total = _joint(run, forms, live, (u, v), s, t, diag, together)
    for i, j, moved in apart:
        slopes = _slope(forms[0], live[0], i), _slope(forms[1], live[1], j)
        by = _of_scales(run, forms, slopes, live, (u, v), s, t, diag)
        by = _joint(run, slopes, live, (u, v), s, t, diag) if by is None else by
        total = total if by is None else plus(total, by * moved)
    return total


def _of_scales(
    run: Moments2, forms: tuple[Form, Form], slopes: tuple[Form, Form], live: list[list[int]], nodes: tuple[Wide, Wide], s: int, t: int,
    diag: bool,
) -> Moments:  # fmt: skip
    """The expectation of two slopes in learned scales, where both are that; see `paperjax.limits.scaled`."""
    found = []
    for form, rate, which, node in zip(forms, slopes, live, nodes):
        fns = _remembered(run, node, form, which), _remembered(run, node, rate, which)
        found.append(sc.scaled(run.cache, *fns, [form.fields[i] for i in which]))
    one, two = found
    if one is None or two is None:
        return None
    u, v = nodes
    shape = u.shape if diag else u.shape + v.shape
    by = sc.second(run, one, two, s, t, diag, lambda g, h, a, b: _pair(run, g, h, a, b, s, t, diag, shape, None))
    return None if by is None else jnp.broadcast_to(by, shape)


def _rate(run: Moments2, node: Wide, form: Form, live: Sequence[int], at: int) -> float | None:
    """How fast a field that stays at 0 moves a function of one that varies, by how fast that one does; ``None`` if they do unlike."""
    key = ("rate", node, form.fn, tuple(live), at)
    if key not in run.cache:
        slopes = of_live(_slope(form, live, at), live), slope(_remembered(run, node, form, live))
        still, moving = (sampled(f).at(PROBES) for f in slopes)
        known = np.isfinite(still) & np.isfinite(moving)
        most = int(np.argmax(np.where(known, np.abs(moving), 0.0)))
        rate = still[most] / moving[most] if known[most] and moving[most] else math.nan
        alike = np.array_equal(np.isfinite(still), np.isfinite(moving)) and np.allclose(still[known], rate * moving[known], 1e-13, 0.0)
        run.cache[key] = float(rate) if alike else None
    return run.cache[key]


def _joint(
    run: Moments2, forms: tuple[Form, Form], live: list[list[int]], nodes: tuple[Wide, Wide], s: int, t: int, diag: bool,
    besides: Moments = None,
) -> Moments:  # fmt: skip
    """The expectation over live fields; `besides` is added to the covariance of two."""
    u, v = nodes
    shape = u.shape if diag else u.shape + v.shape
    left, right = ([form.fields[i] for i in which] for form, which in zip(forms, live))
    g, h = (_remembered(run, w, form, which) for w, form, which in zip(nodes, forms, live))
    (g, left), (h, right) = merged(run.cache, g, left), merged(run.cache, h, right)
    if not left or not right:
        both = [f() if not zs else _mean(run, f, zs, at) for f, zs, at in ((g, left, s), (h, right, t))]
        a, b = (jnp.broadcast_to(m, w.shape) for m, w in zip(both, nodes))
        return a * b if diag else a.reshape(*a.shape, *(1,) * b.ndim) * b
    if len(left) == len(right) == 1:
        return _pair(run, g, h, left[0], right[0], s, t, diag, shape, besides)
    both = [_covariances(run, zs, zs, at, at, True) for zs, at in ((left, s), (right, t))]
    across = _covariances(run, left, right, s, t, diag)
    if not diag:
        # Left as small as they are, as in `_pair`.
        both[0] = [[k if k is None else k.reshape(*k.shape, *(1,) * len(v.shape)) for k in row] for row in both[0]]
    known, found, said = pn.of_polynomials([pn.kept(run.cache, f, len(zs)) for f, zs in ((g, left), (h, right))], both[0], across, both[1])
    if known:
        return found if found is None else jnp.broadcast_to(jnp.asarray(found), shape)
    n, whole = len(left), [[*a, *c] for a, c in zip(both[0], across)]
    whole += [[*c, *b] for *c, b in zip(*across, both[1])]
    return _trusted(lambda *zs: g(*zs[:n]) * h(*zs[n:]), _stacked(whole, shape), said)


def _covariances(run: Moments2, us: Sequence[Wide], vs: Sequence[Wide], s: int, t: int, diag: bool) -> list[list[Moments]]:
    return [[run.second(a, b, s, t, diag) for b in vs] for a in us]


def _stacked(covariances: pn.Covariances, shape: tuple[int, ...]) -> Array:
    """One array, ``(*shape, k, k)``."""
    whole = [[jnp.broadcast_to(jnp.zeros(()) if k is None else k, shape) for k in row] for row in covariances]
    return jnp.stack([jnp.stack(row, -1) for row in whole], -2)


def _pair(
    run: Moments2, g: Callable[..., Any], h: Callable[..., Any], a: Wide, b: Wide, s: int, t: int, diag: bool, shape: tuple[int, ...],
    besides: Moments,
) -> Array:  # fmt: skip
    k11, k12, k22 = run.second(a, a, s, s, True), plus(run.second(a, b, s, t, diag), besides), run.second(b, b, t, t, True)
    k11, k12, k22 = (jnp.zeros(()) if k is None else k for k in (k11, k12, k22))
    # Left as small as they are: what is made of one of the two fields alone is made once for all of the other's positions.
    if not diag and k11.ndim:
        k11 = k11.reshape(*k11.shape, *(1,) * len(b.shape))
    if not diag and k22.ndim:
        k22 = k22.reshape(*(1,) * len(a.shape), *k22.shape)
    names = _fingerprint(run, g), _fingerprint(run, h)
    if ("closed", *names) not in run.cache:
        run.cache["closed", *names] = closed(g, h)
        run.cache["jumps"] = run.cache.get("jumps", False) or jumps(g) or jumps(h)
    if not (exact := run.cache["closed", *names]):
        run.cache.setdefault("bounded", {}).update({a: None, b: None})
        for fn, name in ((g, names[0]), (h, names[1])):
            refuse_infinite(run, fn, name)
    if run.looks:
        return _mark(names, k11, jnp.broadcast_to(k12, shape), k22)
    same = a is b and s == t and diag and besides is None and not exact and analytic(g, h)
    key = ("own" if same else "pair", *names, None if exact else run.largest)
    with told():
        if key not in run.cache and same:
            run.cache[key] = own(g, h, run.largest)
        if key not in run.cache:
            if not exact and ("ranged", *names) not in run.cache:
                run.cache["ranged", *names] = ranged(g, h)
            run.cache[key] = trained(exact or run.cache["ranged", *names](run.largest))
        return run.cache[key](k11, jnp.broadcast_to(k12, shape), k22)


def _mark(names: Sequence[bytes], *covariances: Array) -> Array:
    """In place of an expectation, what is another for other functions and covariances, and homogeneous in none of them.

    Or else `paperjax.limits.alike` would take a tanh for linear, whose covariances change with the width and whose outputs change back.
    """
    digest = hashlib.sha256(b"".join(hashlib.sha256(name).digest() for name in names)).digest()
    total = sum(float(1 + n) * jnp.cos(k) for n, k in zip(np.frombuffer(digest, np.uint32), covariances))
    return jnp.asarray(total)


PROBES = np.concatenate([np.linspace(-6.3, 6.1, 41), [-1e-3, 0.0, 1e-3, 0.5, 20.0, -30.0]])


def _fingerprint(run: Moments2, fn: Callable[..., Any]) -> bytes:
    """The values of a function at fixed points: layers with one function share its expectations."""
    if fn not in run.cache:
        run.cache[fn] = sampled(fn).at(PROBES).tobytes()
    return run.cache[fn]


def _remembered(run: Moments2, node: Wide, form: Form, live: Sequence[int]) -> Callable[..., Any]:
    """One function object for each value, by which its expectations are remembered; a derivative's form is none of a value."""
    key = ("function", node, form.fn, tuple(live))
    if key not in run.cache:
        fn = of_live(form, live)
        run.cache[key] = sampled(fn) if len(live) == 1 else fn
    return run.cache[key]


def trained(both: Dual) -> Callable[[Array, Array, Array], Array]:
    """``E g(u) h(v)``, whose derivative in ``k12`` is ``E g'(u) h'(v)`` with derivatives almost everywhere, which is what training sees."""
    # Traced once, however many layers there are.
    plain, slopes = jax.jit(both.value), jax.jit(both.derivative)

    @jax.custom_jvp
    def value(k11: Array, k12: Array, k22: Array) -> Array:
        return plain(k11, k12, k22)

    def push(primals: Any, tangents: Any) -> Any:
        k11, k12, k22 = primals
        # Training moves k12 alone, and a product with 0 is not nothing to XLA.
        d11, d12, d22 = (None if isinstance(d, SymbolicZero) else d for d in tangents)
        if d11 is None and d22 is None:
            out, tangent = plain(k11, k12, k22), None
        else:
            moved = [jnp.zeros_like(k) if d is None else d for k, d in ((k11, d11), (k22, d22))]
            out, tangent = jax.jvp(lambda a, b: plain(a, k12, b), (k11, k22), tuple(moved))
        by = None if d12 is None else slopes(k11, k12, k22) * d12
        return out, by if tangent is None else tangent if by is None else tangent + by

    value.defjvp(push, symbolic_zeros=True)

    return value


def is_of_several(run: Moments2, node: Wide) -> bool:
    """Whether a value is a function of several fields, and not of one sum of them."""
    form = form_of(node)
    _refuse_arrays(form)
    live = [i for i, z in enumerate(form.fields) if not fl.is_still(z)]
    return len(live) > 1 and len(merged(run.cache, _remembered(run, node, form, live), [form.fields[i] for i in live])[1]) > 1


def mean_of(run: Moments2, u: Wide, s: int) -> Moments:
    """``E`` of a function of fields; see `expected_product`."""
    form = form_of(u)
    _refuse_arrays(form)
    live = [i for i, z in enumerate(form.fields) if not fl.is_still(z)]
    fn = _remembered(run, u, form, live)
    try:
        return jnp.broadcast_to(_mean(run, fn, [form.fields[i] for i in live], s) if live else fn(), u.shape)
    except TooManyFieldsError:
        if run.draws is None:
            raise
        return draws.mean(run, u, s)


def _mean(run: Moments2, fn: Callable[..., Any], fields: Sequence[Wide], s: int) -> Array:
    fn, fields = merged(run.cache, fn, fields)
    if len(fields) == 1:
        k = run.second(fields[0], fields[0], s, s, True)
        k = jnp.zeros(fields[0].shape) if k is None else k
        key = ("mean", _fingerprint(run, fn), run.largest)
        if run.looks:
            return _mark(key[1:2], k)
        with told():
            if key not in run.cache:
                run.cache[key] = mean(fn, variance=run.largest)
            return run.cache[key].value(k)
    covariances = _covariances(run, fields, fields, s, s, True)
    one = pn.Polynomial({(): 1.0}, 0)
    known, found, said = pn.of_polynomials([pn.kept(run.cache, fn, len(fields)), one], covariances, [[] for _ in fields], [])
    if known:
        return jnp.broadcast_to(jnp.asarray(0.0 if found is None else found), fields[0].shape)
    return _trusted(fn, _stacked(covariances, fields[0].shape), said)


class TooManyFieldsError(NotImplementedError):
    """An expectation over more fields than a grid is made for."""


TRUSTED = {np.dtype("float64"): 1e-7, np.dtype("float32"): 1e-4}
"""Errors accepted of an integral over several fields, relative to its root mean square: a grid that resolves nothing is off by 1e-2."""


def _trusted(fn: Callable[..., Any], covariances: Array, said: str) -> Array:
    """An expectation over several fields, NaN where its grid is too coarse for it."""
    if covariances.shape[-1] > 4:
        raise TooManyFieldsError(
            f"{said}an expectation over {covariances.shape[-1]} fields at once (of a nonlinear function of a depthwise convolution, of a "
            "state that is gated again and again, as in an LSTM or a GRU, or of a product of sums), which no integral here is made for. "
            "Let a layer with weights that sum over channels follow a depthwise convolution, or a gate, before the next function. Or opt "
            "in to Monte Carlo with key=jax.random.key(0), samples=4096."
        )
    if any(breaks_along(fn, *line) for line in zip(*(a[:, : covariances.shape[-1]] for a in (LINES, POINTS)))):
        raise TooManyFieldsError(
            f"{said}an expectation over {covariances.shape[-1]} fields at once of a function with kinks or jumps, which no grid resolves: "
            "of a rectified sum of what is rectified already and of a field, relu(relu(u) + v), say (a residual block whose activation "
            "comes after its sum, on a skip without weights), or of a rectified gate. Let a layer of weights stand before the function (on "
            "the skip; or the activation before the block's first layer). Or opt in "
            "to Monte Carlo with key=jax.random.key(0), samples=4096."
        )
    found = expect(fn, covariances)
    square = expect(lambda *zs: fn(*zs) ** 2, jax.lax.stop_gradient(covariances), points=16).value
    fine = found.error <= TRUSTED[np.dtype(found.value.dtype)] * jnp.sqrt(jnp.abs(square))
    return jnp.where(fine, found.value, jnp.full_like(found.value, jnp.nan))
