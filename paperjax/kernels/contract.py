"""Contract what was recorded of two batches to a kernel, by the route chosen for each term.

Kernels in here are ``(N, O, M, O)`` for all pairs of outputs, ``(N, M)`` for their trace, ``(N, O, M)`` for each output by itself.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paperjax.kernels.crowding import LINE, crowded
from paperjax.kernels.factors import Factor, Term

# How the outputs of the two batches and the axes of the kernel are written in an einsum; a capital letter is an axis of the second batch.
OUTPUTS = {"full": ("o", "O", "noNO"), "trace": ("o", "o", "nN"), "diagonal": ("o", "o", "noN")}
Pair = tuple[Any, Any]
# Rows and columns from which on a product of a matrix with itself is cut in two; below, the cuts cost as much as they save.
CUT_ROWS, CUT_COLUMNS = 128, 128


def gram(term: Term, a: Pair, b: Pair, outputs: str) -> list[Any]:
    """``sum_kts (a_kt . a_ks) (b_kto . b_ksp)`` over all pairs of the term's factors: of its leaf, and of its bias if it has one.

    Parameters
    ----------
    term
        The term.
    a, b
        Of the first and the second batch, what was recorded of each factor; see `paperjax.kernels.features.Features`.
    outputs
        One of `OUTPUTS`.
    """
    if not term.plain:
        numbered = list(enumerate(term.factors))
        return [sum(_gram_of_two((f, g), (a[0][m], a[1][n]), (b[0][m], b[1][n]), outputs) for m, f in numbered for n, g in numbered)]
    (a1, a2), (b1, b2) = (_both(functools.partial(_stacked, axis=axis), pair) for pair, axis in ((a, 2), (b, 3)))
    lookup, biased = term.factors[0].lookup, term.bias is not None

    def one(parts: Any) -> list[Any]:
        a1, a2, b1, b2 = parts
        return _gram_of_one(a1, a2, b1, b2, outputs, lookup, biased)

    found = _summed_over_k(one, (a1, a2), (b1, b2))
    if biased:
        found[1] = found[1] * jnp.asarray((term.bias_scale / term.factors[0].product.value.scale) ** 2, found[1].dtype)
    return found


def gradients_product(gradients: Sequence[Pair], outputs: str) -> Any:
    """``sum_p J_nop J_mqp`` over the entries p of all gradients ``(N, O, *shape)``; for the trace O may be any axis but the first."""
    if outputs == "diagonal":
        return sum(paired(*_both(lambda g: g.reshape(*g.shape[:2], -1), pair), outputs) for pair in gradients)
    kept = 1 if outputs == "trace" else 2
    first, second = gradients[0]
    # Of a batch with itself products are summed half by half, and put together once.
    found = _matrix_product([_both(lambda g: g.reshape(math.prod(g.shape[:kept]), -1), pair) for pair in gradients])
    return found.reshape(*first.shape[:kept], *second.shape[:kept])


def outputs_first(gradients: Pair, outputs: str) -> Pair:
    """Gradients ``(N, k, O, j, i)`` as the function above takes them."""
    return gradients if outputs == "trace" else _both(lambda g: g.swapaxes(1, 2), gradients)


def paired(first: Any, second: Any, outputs: str) -> Any:
    """``sum_x u_nox v_mpx`` of ``(N, O, x)`` and ``(M, O, x)``, for the pairs of outputs that are wanted."""
    if outputs == "diagonal":
        return jnp.einsum("nox,Nox->noN", first, second)
    return rows_product(first, second, 1 if outputs == "full" else 2)


def rows_product(first: Any, second: Any, summed: int) -> Any:
    """Sum over so many last axes; free axes of the first, then of the second. Of an array with itself only about half is computed."""
    # As matrices: with more axes XLA copies the second operand to transpose it, on CPU.
    free = first.shape[: first.ndim - summed], second.shape[: second.ndim - summed]
    pair = _both(lambda array: array.reshape(math.prod(array.shape[: array.ndim - summed]), -1), (first, second))
    return _matrix_product([pair]).reshape(*free[0], *free[1])


def _matrix_product(pairs: Sequence[Pair]) -> Any:
    """``sum x y^T``."""
    pairs = [_apart(pair) for pair in pairs]
    if all(x is y for x, y in pairs):
        return _times_itself([x for x, _ in pairs])
    return sum(_times(x, y) for x, y in pairs)


def _apart(pair: Pair) -> Pair:
    """Copies with one more line of zeros between rows, of both where those of one would crowd the cache."""
    if not any(crowded(x.shape[0], x.shape[1], x.dtype.itemsize) for x in pair):
        return pair
    return _both(lambda x: lax.optimization_barrier(jnp.pad(x, ((0, 0), (0, LINE // x.dtype.itemsize)))), pair)


def _times(x: Any, y: Any) -> Any:
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())))


def _times_itself(parts: Sequence[Any]) -> Any:
    """``sum x x^T``: the right half and the upper left quarter. Halves of halves take as long to compile as they save."""
    n = parts[0].shape[0]
    if n < CUT_ROWS or max(x.shape[1] for x in parts) < CUT_COLUMNS:
        return sum(_times(x, x) for x in parts)
    cut = n // 2
    right = functools.reduce(operator.add, (_times(x, x[cut:]) for x in parts))
    corner = functools.reduce(operator.add, (_times(x[:cut], x[:cut]) for x in parts))
    left = jnp.concatenate([corner, right[:cut].T])
    return jnp.concatenate([left, right], 1)


def _both(fn: Callable[[Any], Any], pair: Pair) -> Pair:
    """A function of both; the same array twice stays the same array."""
    first = fn(pair[0])
    return first, first if pair[1] is pair[0] else fn(pair[1])


def by_layers(fn: Callable[..., list[Any]], layers: int, parts: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    """Apply a function of recordings to each slice of the leaf by itself, given where `k` is in them; slices come first in the results."""

    def apart(tree: Any, axis: int) -> Any:
        def one(x: Any) -> Any:
            x = x.reshape(*x.shape[:axis], layers, x.shape[axis] // layers, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        return jax.tree.map(one, tree)

    return lax.map(lambda parts: fn(*parts), tuple(apart(part, axis) for part, axis in zip(parts, axes)))


def _stacked(parts: Sequence[Any], axis: int) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _summed_over_k(one: Callable[..., list[Any]], a: Pair, b: Pair) -> list[Any]:
    if a[0].shape[1] == 1:
        return one((*_both(lambda x: x[:, 0], a), *_both(lambda x: x[:, :, 0], b)))
    parts = (*(jnp.moveaxis(x, 1, 0) for x in a), *(jnp.moveaxis(x, 2, 0) for x in b))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zero = [jnp.zeros(s.shape, s.dtype) for s in shapes]
    # One k at a time: their Gram matrices together would not fit.
    return lax.scan(lambda total, part: ([u + v for u, v in zip(total, one(part))], None), zero, parts)[0]


def _gram_of_one(a1: Any, a2: Any, b1: Any, b2: Any, outputs: str, lookup: bool, biased: bool) -> list[Any]:
    _, _, out = OUTPUTS[outputs]
    inner = _equal(a1, a2, b1.dtype) if lookup else rows_product(a1, a2, 1)
    if inner.shape[1] == inner.shape[3] == 1:
        wide = paired(*_both(lambda b: b[:, :, 0], (b1, b2)), outputs)
        found = _placed(inner[:, 0, :, 0], "nN", out) * wide
        return [found, wide] if biased else [found]
    kept = {"full": "notNOT", "trace": "ntNT", "diagonal": "ntoNT"}[outputs]
    if outputs == "full":
        wide = rows_product(b1, b2, 1)
    elif outputs == "trace":
        wide = rows_product(*_both(lambda b: b.swapaxes(1, 2), (b1, b2)), 2)
    else:
        wide = jnp.einsum(f"notj,NoTj->{kept}", b1, b2)
    over = tuple(axis for axis, name in enumerate(kept) if name in "tT")
    found = (_placed(inner, "ntNT", kept) * wide).sum(over)
    # The sum over places first: it is cheaper, and what cancels in it cancels exactly (attention's key biases).
    return [found, paired(*_both(lambda b: b.sum(2), (b1, b2)), outputs)] if biased else [found]


def _equal(first: Any, second: Any, dtype: Any) -> Any:
    """Whether two places look up the same row, ``(n, t, N, T)``."""
    one, two = first[:, :, None, None], second[None, None]
    return ((one == two) & (one >= 0)).astype(dtype)


def _gram_of_two(factors: Sequence[Factor], a: Pair, b: Pair, outputs: str) -> Any:
    """Two uses of a leaf: where `i` and `j` have changed places, `b` stands on the other side."""
    o, p, _ = OUTPUTS[outputs]
    kept = "ktnoNOT" if outputs == "full" else "ktnoNT"
    both = []
    for swap in (False, True):
        # Of each factor what stands on this side, whether that is a table's rows, and how its outputs are written if it has any.
        parts = [(x, f.lookup, "") if f.swapped is swap else (y, False, letter) for f, x, y, letter in zip(factors, a, b, (o, p))]
        both.append(_inner(parts[0], parts[1], kept, b[0].dtype))
    over = [kept.index(name) for name in ("kto" + "T" if outputs == "trace" else "ktT")]
    return (both[0] * both[1]).sum(tuple(over))


def _inner(first: tuple[Any, bool, str], second: tuple[Any, bool, str], kept: str, dtype: Any) -> Any:
    """``x_t . y_s`` of vectors, or of rows of a table in place of one or both, with its axes in the order of `kept`."""
    (x, rows, o), (y, rows_too, p) = first, second
    if rows and rows_too:
        return _placed(jax.vmap(lambda r, q: _equal(r, q, dtype), (1, 1))(x, y), "kntNT", kept)
    if rows:
        return _placed(jax.vmap(_coordinates, (2 if p else 1, 1))(y, x), f"kN{p}Tnt", kept)
    if rows_too:
        return _placed(jax.vmap(_coordinates, (2 if o else 1, 1))(x, y), f"kn{o}tNT", kept)
    names = f"ktn{o}N{p if p != o else ''}T"
    return _placed(jnp.einsum(f"n{o}kti,N{p}kTi->{names}", x, y), names, kept)


def _coordinates(vectors: Any, rows: Any) -> Any:
    """Of each vector the coordinate that a row names; 0 for a row outside of the table."""
    found = jnp.take(vectors, jnp.maximum(rows, 0), axis=-1)
    there = (rows >= 0).reshape((1,) * (found.ndim - rows.ndim) + rows.shape)
    return jnp.where(there, found, jnp.zeros((), vectors.dtype))


def _placed(x: Any, names: str, kept: str) -> Any:
    """Axes of `x` in the order of `kept`, with size 1 where it has none."""
    x = x.transpose([names.index(name) for name in kept if name in names])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if name in names else 1 for name in kept])
