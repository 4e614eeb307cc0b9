"""Second moments by Monte Carlo, where the user opted in: of any function of Gaussian fields at all positions, for one coordinate.

Fields ``u`` at one example and ``v`` at another are drawn with their covariances ``C11, C12, C22``, v given u and u given v in equal parts,
so that the estimate is symmetric; at one and the same example both are the draws that its own moments are made of. The derivative in
the covariance between the two is ``E sum dF/du_p dG/dv_q dC12_pq`` (Price 1958), with derivatives almost everywhere, which is what training
sees, and is right where C is singular too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd
from paperjax.limits.eigen import eigh
from paperjax.limits.heads import plain
from paperjax.limits.nodes import Det, Node, Wide

CHUNK = 64
"""Draws that are evaluated at once."""
GROUPS = 8
"""Independent estimates, from whose spread the standard error is found."""
NULL = 1e-13
"""Eigenvalues of a covariance below this part of the largest are rounding, which a square root would make 1e-8 of noise of."""


class Draws(NamedTuple):
    """Random numbers: a key, or several for as many independent estimates, and how many draws from each."""

    key: Any
    samples: int

    def each(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn(draws, *args)`` for every key, along a first axis that `args` have too."""
        data, impl = jax.random.key_data(self.key), jax.random.key_impl(self.key)
        return jax.vmap(lambda k, *rest: fn(Draws(jax.random.wrap_key_data(k, impl=impl), self.samples), *rest))(data, *args)


@runtime_checkable
class Runs(Protocol):
    """What is needed of `paperjax.limits.moments.Run`."""

    @property
    def cache(self) -> dict[Any, Any]:
        """See there."""
        ...

    @property
    def draws(self) -> Draws | None:
        """See there."""
        ...

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> Array | None:
        """See there."""
        ...

    def det(self, node: Det, s: int) -> Array:
        """See there."""
        ...


class Parts(NamedTuple):
    """Gaussian values, by how many coordinates of each are drawn, and deterministic ones."""

    fields: dict[Wide, int]
    dets: dict[Det, None]


def parts_of(*nodes: Node) -> Parts:
    """What values are functions of.

    Raises
    ------
    NotImplementedError
        If they cannot be drawn.
    """
    found, seen, sums = Parts({}, {}), set[Any](), list[nd.Paired]()

    def walk(node: Node, copies: int) -> None:
        if (node, copies) in seen:
            return
        seen.add((node, copies))
        if isinstance(node, Det):
            found.dets.setdefault(node)
        elif isinstance(node, Wide) and fl.is_gaussian(node):
            if found.fields.setdefault(node, copies) != copies:
                raise NotImplementedError("a value that is used both head by head and by itself.")
        elif copies > 1 and isinstance(node, (nd.Paired, nd.Drawn)):
            raise NotImplementedError("a sum over some coordinates of products of values that are themselves shared by them.")
        else:
            if isinstance(node, nd.Paired) and node.count > 1:
                copies = node.count
                sums.append(node)
            for below in _below(node):
                walk(below, copies)

    for node in nodes:
        walk(node, 1)
    if len(sums) > 1 and not all(map(plain, sums)):
        raise NotImplementedError("sums over some coordinates of products of values, of which others are left.")
    return found


def _below(node: Node) -> Sequence[Node]:
    if isinstance(node, (nd.Add, nd.Paired)):
        return node.u, node.v
    if isinstance(node, nd.Scale):
        return node.u, node.by
    if isinstance(node, nd.Const):
        return (node.value,)
    if isinstance(node, nd.Linear):
        return node.u, *node.dets
    if isinstance(node, nd.Func):
        return *node.fields, *node.dets
    if isinstance(node, nd.Prod):
        return node.factors
    if isinstance(node, nd.Stacked):
        return node.parts
    if isinstance(node, nd.Drawn):
        return node.args
    names = {
        nd.Carried: "the carry of a scan",
        nd.Scanned: "the result of a scan",
        nd.Mixed: "joined channels",
        nd.Part: "some of the channels",
    }
    raise NotImplementedError(
        f"a nonlinear function of several positions of {names.get(type(node), 'values')}, which are not Gaussian there, cannot be drawn."
    )


Known = dict[Any, Any]


def evaluate(node: Node, known: Known) -> Any:
    """A value at one draw; `known` holds Gaussian values and deterministic ones, and what has been found."""
    if node in known:
        return known[node]
    if isinstance(node, nd.Paired):
        value = _pairing(node, known)
    else:
        below = [evaluate(part, known) for part in _below(node)]
        value = _applied(node, below)
    known[node] = value = jnp.broadcast_to(value, node.shape)
    return value


def _pairing(node: nd.Paired, known: Known) -> Any:
    def product(a: Any, b: Any) -> Any:
        return jax.lax.dot_general(a, b, node.numbers, preferred_element_type=a.dtype)

    if node.count == 1:
        return product(evaluate(node.u, known), evaluate(node.v, known))
    below = parts_of(node.u, node.v)
    fixed = {d: known[d] for d in below.dets}

    def one(*each: Any) -> Any:
        here = {**fixed, **dict(zip(below.fields, each))}
        return product(evaluate(node.u, here), evaluate(node.v, here))

    return jnp.sum(jax.vmap(one)(*(known[z] for z in below.fields)), 0)


def _applied(node: Node, below: Sequence[Any]) -> Any:
    if isinstance(node, nd.Add):
        return below[0] + below[1]
    if isinstance(node, nd.Scale):
        by = jnp.asarray(below[1], below[0].dtype)
        return jnp.where(by == 0, jnp.zeros_like(below[0]), below[0] * by)
    if isinstance(node, nd.Const):
        return below[0]
    if isinstance(node, (nd.Linear, nd.Func, nd.Drawn)):
        assert node.fn is not None
        return node.fn(*below)
    if isinstance(node, nd.Stacked):
        return jnp.concatenate(below, node.axis)
    total = below[0]
    for factor in below[1:]:
        total = total * factor
    return total


def _square_root(C: Array, of: Array | None = None) -> tuple[Array, Array]:
    """Symmetric, and the inverse of C; both 0 in null directions. `of` is what C is left of: a rounding of that is nothing."""
    values, Q = eigh(C)
    largest = jnp.max(values, initial=0.0) if of is None else jnp.max(jnp.diagonal(of), initial=0.0)
    present = values > NULL * C.shape[-1] * largest
    safe = jnp.where(present, values, jnp.ones_like(values))
    zero = jnp.zeros_like(values)
    root, inverse = (jnp.where(present, x, zero) for x in (jnp.sqrt(safe), 1 / safe))
    return (Q * root) @ Q.T, (Q * inverse) @ Q.T


Blocks = list[Array]
Values = Callable[[list[Array], Any], Array]


class Drawing(NamedTuple):
    """``E F(u) G(v)``: the two functions of groups of drawn numbers, ``(copies, P)`` each, and whether they meet entry by entry."""

    f: Values
    g: Values
    copies: tuple[int, ...]
    draws: Draws
    diag: bool

    def _met(self, f: Array, g: Array) -> Array:
        return jnp.einsum("si,si->i" if self.diag else "si,sj->ij", f, g, precision=jax.lax.Precision.HIGHEST)

    def over(self, sizes: Sequence[int], visit: Callable[[list[Array], list[Array]], tuple[Array, ...]]) -> tuple[Array, ...]:
        """A mean over draws of independent standard normal numbers, two for each field."""
        chunk = min(CHUNK, self.draws.samples)
        steps = -(-self.draws.samples // chunk)

        def numbers(key: Any) -> list[Array]:
            keys = jax.random.split(key, len(sizes))
            return [jax.random.normal(k, (chunk, c, n)) for k, c, n in zip(keys, self.copies, sizes)]

        def step(total: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
            one, two = jax.random.split(jax.random.fold_in(self.draws.key, i))
            return tuple(t + a / (steps * chunk) for t, a in zip(total, visit(numbers(one), numbers(two)))), None

        shapes = jax.eval_shape(lambda: visit(numbers(self.draws.key), numbers(self.draws.key)))
        return jax.lax.scan(step, tuple(jnp.zeros(a.shape, a.dtype) for a in shapes), jnp.arange(steps))[0]

    def alone(self, C: Blocks, dets: Any) -> Array:
        """Both functions of one example."""
        roots = [_square_root(c)[0] for c in C]

        def visit(one: list[Array], two: list[Array]) -> tuple[Array, ...]:
            u = [e @ root for e, root in zip(one, roots)]
            return (self._met(*(jax.vmap(h, (0, None))(u, dets) for h in (self.f, self.g))),)

        return self.over([c.shape[-1] for c in C], visit)[0]

    def between(self, C11: Blocks, C12: Blocks, C22: Blocks, dets: Any, change: Blocks | None = None) -> tuple[Array, ...]:
        """One function of each of two examples; and the derivative as C12 moves by `change`."""
        first, second = _given(C11, C12, C22), _given(C22, [k.T for k in C12], C11)

        def visit(one: list[Array], two: list[Array]) -> tuple[Array, ...]:
            (u, v), (w, z) = first(one, two), second(one, two)
            both = [jnp.concatenate([a, b]) for a, b in zip(u, z)], [jnp.concatenate([a, b]) for a, b in zip(v, w)]
            f, g = (jax.vmap(h, (0, None))(each, known) for h, each, known in zip((self.f, self.g), both, dets))
            if change is None:
                return (self._met(f, g) / 2,)
            total: Any = 0.0
            slopes = [jax.vmap(jax.jacfwd(h), (0, None))(each, known) for h, each, known in zip((self.f, self.g), both, dets)]
            for df, dg, d in zip(*slopes, change):
                moved = jnp.einsum("sicp,pq->sicq", df, d, precision=jax.lax.Precision.HIGHEST)
                form = "sicq,sicq->i" if self.diag else "sicq,sjcq->ij"
                total = total + jnp.einsum(form, moved, dg, precision=jax.lax.Precision.HIGHEST) / 2
            return self._met(f, g) / 2, total

        return self.over([c.shape[-1] for c in C11], visit)


def _given(C11: Blocks, C12: Blocks, C22: Blocks) -> Callable[[list[Array], list[Array]], tuple[list[Array], list[Array]]]:
    """Draws of u, and of v given u, from standard normal numbers."""
    made = []
    for here, k, there in zip(C11, C12, C22):
        root, inverse = _square_root(here)
        onto = inverse @ k
        made.append((root, onto, _square_root(there - k.T @ onto, there)[0]))

    def draw(one: list[Array], two: list[Array]) -> tuple[list[Array], list[Array]]:
        u = [e @ root for e, (root, _, _) in zip(one, made)]
        return u, [z @ onto + e @ left for z, e, (_, onto, left) in zip(u, two, made)]

    return draw


def second(run: Runs, u: Wide, v: Wide, s: int, t: int, diag: bool) -> Array:
    """``E`` of the product of two values, of which one is to be drawn; ``(*u.shape, *v.shape)``, or ``u.shape`` if `diag`."""
    drawing, groups, dets = _drawing(run, u, v, diag)
    blocks = [_covariances(run, group, *at) for at in ((s, s), (s, t), (t, t)) for group in groups]
    n = len(groups)
    known = [{d: run.det(d, at) for d in dets} for at in (s, t)]
    if s == t:
        found = _no_gradient(drawing.alone)(blocks[:n], [known[0][d] for d in dets])
    else:
        found = _between(drawing)(blocks[:n], blocks[n : 2 * n], blocks[2 * n :], [[one[d] for d in dets] for one in known])
    return found.reshape(u.shape if diag else u.shape + v.shape)


def mean(run: Runs, u: Wide, s: int) -> Array:
    """``E`` of a value that is to be drawn."""
    one = nd.Const(u.axes, Det(u.axes, const=nd.fold(lambda: jnp.ones(u.shape))))
    return second(run, u, one, s, s, True)


def _drawing(run: Runs, u: Wide, v: Wide, diag: bool) -> tuple[Drawing, list[list[Wide]], list[Det]]:
    assert run.draws is not None
    parts = parts_of(u, v)
    # In one order for all pairs of values.
    seen = run.cache.setdefault("drawn", {})
    fields = sorted(parts.fields, key=lambda z: seen.setdefault(z, len(seen)))
    copies = tuple(sorted(set(parts.fields.values())))
    groups = [[z for z in fields if parts.fields[z] == c] for c in copies]
    for i, group in enumerate(groups):
        if any(not fl.independent(z, other) for z in group for later in groups[i + 1 :] for other in later):
            raise NotImplementedError("a value that is used both head by head and by itself.")
    dets = list(parts.dets)

    def function(node: Wide) -> Values:
        def call(drawn: list[Array], known: Sequence[Array]) -> Array:
            env: Known = dict(zip(dets, known))
            for c, group, z in zip(copies, groups, drawn):
                at = 0
                for field in group:
                    size = z.shape[-1] if len(group) == 1 else _size(field)
                    here = z[:, at : at + size].reshape(c, *field.shape)
                    env[field] = here if c > 1 else here[0]
                    at += size
            return evaluate(node, env).reshape(-1)

        return call

    return Drawing(function(u), function(v), copies, run.draws, diag), groups, dets


def _size(node: Wide) -> int:
    total = 1
    for n in node.shape:
        total *= n
    return total


def _covariances(run: Runs, group: Sequence[Wide], s: int, t: int) -> Array:
    rows = []
    for a in group:
        row = []
        for b in group:
            k = run.second(a, b, s, t)
            row.append(jnp.zeros((_size(a), _size(b))) if k is None else k.reshape(_size(a), _size(b)))
        rows.append(jnp.concatenate(row, 1))
    return jnp.concatenate(rows, 0)


NO_GRADIENT = "pj.limit: kernels that are drawn by Monte Carlo have no gradients with respect to examples."


def _no_gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    call = jax.custom_jvp(fn)

    def refuse(primals: Any, tangents: Any) -> Any:
        if _moves(tangents):
            raise NotImplementedError(NO_GRADIENT)
        out = fn(*primals)
        return out, jax.tree.map(jnp.zeros_like, out)

    call.defjvp(refuse, symbolic_zeros=True)
    return call


def _moves(tangents: Any) -> bool:
    still = jax.custom_derivatives.SymbolicZero
    return any(not isinstance(leaf, still) for leaf in jax.tree.leaves(tangents, is_leaf=lambda x: isinstance(x, still)))


def _between(drawing: Drawing) -> Callable[..., Array]:
    value, moved = jax.custom_jvp(lambda *args: drawing.between(*args)[0]), _no_gradient(drawing.between)

    def rule(primals: Any, tangents: Any) -> Any:
        if _moves((tangents[0], tangents[2], tangents[3])):
            raise NotImplementedError(NO_GRADIENT)
        change = [d if _moves([d]) else jnp.zeros_like(k) for k, d in zip(primals[1], tangents[1])]
        return moved(*primals, change)

    value.defjvp(rule, symbolic_zeros=True)
    return value
