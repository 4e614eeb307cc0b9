"""What a kernel is made of, example by example: activations and cotangents at the products of leaves, gradients of the other leaves."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.kernels.crowding import spare
from paperjax.kernels.factors import Factor, Term, operands, results
from paperjax.kernels.routes import LOOPS_PER_PRODUCT, loops_per_product
from paperjax.kernels.strided import by_rows, in_blocks
from paperjax.trace.interpret import replayed


class Features(NamedTuple):
    """Of a batch of N examples and O outputs.

    Attributes
    ----------
    a
        For each term and each of its factors ``(N, k, t, i)``, or rows ``(N, k, t)`` of a lookup.
    b
        Likewise ``(N, O, k, t, j)``, with the number that the model multiplies the leaf by in it.
    formed
        For each term whose gradients are formed from its factors ``(N, k, O, j, i)``; those of its bias are one more `i`. One more `j`, and
        a last `i`, of zeros where rows without them would crowd a cache.
    gradients
        For each other leaf ``(N, O, *shape)``.
    """

    a: tuple[tuple[Any, ...], ...]
    b: tuple[tuple[Any, ...], ...]
    formed: tuple[Any, ...]
    gradients: tuple[Any, ...]


def features(
    jaxpr: jex.ClosedJaxpr,
    kept: Sequence[Term],
    formed: Sequence[Term],
    others: Sequence[int],
    arguments: Sequence[Any],
    n_leaves: int,
    x: Any,
    directions: Any,
) -> Features:
    """Record one batch: a forward pass and a backward pass for each direction of the outputs, and no gradient but of the `others`.

    Parameters
    ----------
    jaxpr
        Trace of ``(*leaves, *given, x) -> y`` for a batch of one example.
    kept, formed, others
        Terms whose factors are wanted, terms whose gradients are, and leaves without factors.
    arguments
        The leaves and what is given.
    n_leaves
        How many of them are leaves.
    x
        The batch.
    directions
        ``(O, *out)``: of each, the gradient of the sum of the outputs times it is taken.
    """
    factors = [factor for term in (*kept, *formed) for factor in term.factors]
    taps = sorted({factor.tap for factor in factors})
    places = {factor.product.path: factor for factor in factors}
    platform, rows = jax.default_backend(), x.shape[0] * directions.shape[0]
    found = {path: in_blocks(f.product.eqn, platform) or by_rows(f.product, rows, platform) for path, f in places.items()}
    instead = {path: compute for path, compute in found.items() if compute is not None}

    # A relu's derivative is no work, and a quotient is a tenth of a small MLP's time.
    chains = platform == "cpu" and loops_per_product(jaxpr) > LOOPS_PER_PRODUCT
    through = functools.partial(_written, one=_unknown_one((x, *arguments))) if chains else lambda y: y

    def one(x: Any) -> Features:
        zeros = {path: _zeros(factor) for path, factor in places.items()}

        def output(added: Any, chosen: Any) -> Any:
            leaves = list(arguments[:n_leaves])
            for leaf, value in zip(others, chosen):
                leaves[leaf] = value
            y, seen = replayed(jaxpr, [*leaves, *arguments[n_leaves:], x[None]], taps, added, instead, through)
            return y[0][0], seen

        y, pull, seen = jax.vjp(output, zeros, [arguments[leaf] for leaf in others], has_aux=True)
        cotangents, gradients = jax.vmap(pull)(directions.astype(y.dtype))

        def of(terms: Sequence[Term]) -> tuple[Any, Any]:
            a = tuple(tuple(operands(f.product, seen[f.tap]) for f in term.factors) for term in terms)
            return a, tuple(tuple(_scaled(f, cotangents[f.product.path]) for f in term.factors) for term in terms)

        # Formed here, once: blocks of a kernel share them.
        gathered = tuple(_gradients(term, a, b) for term, a, b in zip(formed, *of(formed)))
        return Features(*of(kept), gathered, tuple(gradients))

    return jax.vmap(one)(x)


@jax.custom_vjp
def _written(y: Any, one: Any) -> Any:
    """`y`, with its cotangent divided by 1.

    The cotangent is read here and on the way back, and XLA on CPU computes what is cheap again for each that reads it: all that is
    in the derivative of a norm or a gelu. A quotient by a number that it does not know is computed once.
    """
    del one
    return y


_written.defvjp(lambda y, one: (y, one), lambda one, y: (y / one.astype(y.dtype), jnp.zeros_like(one)))


def _unknown_one(values: Sequence[Any]) -> Any:
    """1, and XLA cannot tell."""
    numbers = [v for v in values if isinstance(v, jax.Array) and v.size and jnp.issubdtype(v.dtype, jnp.number)]
    # It could of a constant, what a program around this one has closed over, and of a sum of nothing.
    number = min(numbers, key=lambda v: (not isinstance(v, Tracer), v.size)).real.astype(jnp.float32).sum()
    return jnp.where(jnp.cos(number) > 2, 2.0, 1.0).astype(jnp.float32)


def _zeros(factor: Factor) -> Any:
    aval = factor.product.eqn.outvars[0].aval
    return jnp.zeros((*factor.product.lengths, *aval.shape), aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _scaled(factor: Factor, cotangents: Any) -> Any:
    found = jax.vmap(lambda b: results(factor.product, b))(cotangents)
    scale = factor.product.value.scale
    return found if scale == 1 else found * jnp.asarray(scale, found.dtype)


def _gradients(term: Term, a: Sequence[Any], b: Sequence[Any]) -> Any:
    """Gradients of one example from the factors of a plain term; its bias is one more column of `a`, the same at all places."""
    a_KTI, b_OKTJ = jnp.concatenate(a, 1) if len(a) > 1 else a[0], jnp.concatenate(b, 2) if len(b) > 1 else b[0]
    if term.factors[0].lookup:
        a_KTI = jax.nn.one_hot(a_KTI, term.factors[0].i, dtype=b_OKTJ.dtype)
    if term.bias is not None:
        scale = term.bias_scale / term.factors[0].product.value.scale
        a_KTI = jnp.concatenate([a_KTI, jnp.full((*a_KTI.shape[:2], 1), scale, a_KTI.dtype)], 2)
    o, k, t, j = b_OKTJ.shape
    more_j, more_i = spare(o, k, j, a_KTI.shape[2], b_OKTJ.dtype.itemsize)
    a_KTI, b_OKTJ = _padded(a_KTI, more_i), _padded(b_OKTJ, more_j)
    # Outputs and `j` side by side make one product for each example; rows of the result are those that its contraction needs.
    # Not yet side by side in the loop that writes them: it would divide the number of each entry by that of the `j`.
    b_KTOJ = lax.optimization_barrier(b_OKTJ.transpose(1, 2, 0, 3))
    return jnp.einsum("kti,ktx->kxi", a_KTI, b_KTOJ.reshape(k, t, -1)).reshape(k, o, j + more_j, -1)


def _padded(x: Any, more: int) -> Any:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x
