"""Gaussian fields on sampled coordinates, drawn step by step given their past, and responses to them by Stein's lemma.

A field of covariance K is ``R eps`` with the pivoted Cholesky factor R of K and noises eps on S coordinates, which come as pairs: forward
fields are the same on both halves of the coordinates, backward fields are minus each other. What a matrix ``W`` does to a vector is
such a field, ``W v``, and the response to the field of its transpose: ``E[v eps^T] (R^-1 w)``, where eps and R are those of the field
``W^T w``, of covariance ``E w w^T``. `mean_field_march` says why.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.linalg import get_lapack_funcs, qr, solve_triangular

NEGLIGIBLE = 1e-3
"""Share of a field's variance that is left undrawn, and its kernel's error: below the noise of a thousand coordinates."""
MOST_LEFT_OUT = 0.03


class Field(NamedTuple):
    """A Gaussian field, as far as it has been drawn, on one half of the coordinates; the other half has `sign` times the noise.

    pivots: indices whose noise is new, ``(k,)``. factor: Cholesky factor of the kernel there. noise: ``(k, S/2)``, of mean square 1.
    taken: orthonormal rows that new noise avoids. dual: ``R^-1`` of what the kernel is the second moment of, on its own layer, ``(k, S)``.
    """

    sign: int
    pivots: np.ndarray
    factor: np.ndarray
    noise: np.ndarray
    taken: np.ndarray
    dual: np.ndarray


def new_field(sign: int, half: int, exact: bool = False) -> Field:
    """A field of which nothing is drawn yet."""
    # Without the mean in u, E u = 0 in the sample; r has it from the pairs.
    mean = np.full((1, half), half**-0.5) if sign > 0 and not exact else np.zeros((0, half))
    return Field(sign, np.zeros(0, int), np.zeros((0, 0)), np.zeros((0, half)), mean, np.zeros((0, 2 * half)))


def draw(field: Field, count: int, rng: np.random.Generator | None) -> np.ndarray:
    """Orthonormal rows ``(count, S/2)`` that avoid what is taken; without a generator the next axes, enough for second moments."""
    half = field.noise.shape[1]
    if rng is None:
        return np.eye(half, count, -len(field.noise)).T
    new = rng.standard_normal((half, count))
    for _ in range(2):
        new = new - field.taken.T @ (field.taken @ new)
    return np.linalg.qr(new)[0].T


def _factor(rest: np.ndarray, variance: float, negligible: float, room: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Columns ``(P, k)`` of a pivoted Cholesky factor of what is not known of a kernel, the pivots ``(k,)``, and the share left out."""
    (pivoted,) = get_lapack_funcs(("pstrf",), (rest,))
    packed, order, rank, _ = pivoted(rest, tol=negligible * variance, lower=1)
    # LAPACK finds one pivot in a matrix without any above the tolerance.
    rank = 0 if np.max(np.diagonal(rest)) <= negligible * variance else int(rank)
    rank, order = min(rank, room), order - 1
    columns = np.zeros((len(rest), rank))
    columns[order] = np.tril(packed)[:, :rank]
    left_out = float(np.max(np.diagonal(rest - columns @ columns.T))) / variance if variance else 0.0
    return columns, order[:rank], left_out


def _room(field: Field, rng: np.random.Generator | None) -> int:
    return field.noise.shape[1] - (len(field.noise) if rng is None else len(field.taken))


def reveal(
    field: Field, kernel: np.ndarray, rng: np.random.Generator | None, negligible: float, aside: np.ndarray | None = None
) -> tuple[Field, np.ndarray, float]:
    """The field at the next step, from the rows ``(P, all so far + P)`` of its kernel: the field, its values, and the share left out.

    aside: rows ``(m, S)`` that the noise of this step avoids, beside what is taken.
    """
    half, start = field.noise.shape[1], kernel.shape[1] - len(kernel)
    own = kernel[:, start:]
    known = _known(field, kernel[:, field.pivots])
    spare = field if aside is None else avoiding(field, aside)
    columns, at, left_out = _factor(own - known.T @ known, float(np.mean(np.diagonal(own))), negligible, _room(spare, rng))
    values = known.T @ field.noise
    if rank := len(at):
        fresh = draw(spare, rank, rng)
        values = values + half**0.5 * columns @ fresh
        field = field._replace(
            pivots=np.concatenate([field.pivots, start + at]),
            factor=np.block([[field.factor, np.zeros((len(field.factor), rank))], [known[:, at].T, columns[at]]]),
            noise=np.concatenate([field.noise, half**0.5 * fresh]),
            taken=field.taken if rng is None else np.concatenate([field.taken, fresh]),
        )
    return field, np.concatenate([values, field.sign * values], axis=1), left_out


def beyond(field: Field, across: np.ndarray, own: np.ndarray, rng: np.random.Generator, negligible: float) -> tuple[np.ndarray, float]:
    """Values ``(P, S)`` of the field at further points, with noise that nothing else will ever see, and the share left out.

    across: kernel with the pivots, ``(P, k)``. own: among the points, ``(P, P)``.
    """
    known = _known(field, across)
    columns, _, left_out = _factor(own - known.T @ known, float(np.mean(np.diagonal(own))), negligible, _room(field, rng))
    values = known.T @ field.noise + field.noise.shape[1] ** 0.5 * columns @ draw(field, columns.shape[1], rng)
    return np.concatenate([values, field.sign * values], axis=1), left_out


def _known(field: Field, across: np.ndarray) -> np.ndarray:
    return solve_triangular(field.factor, across.T, lower=True) if len(field.pivots) else np.zeros((0, len(across)))


def with_dual(field: Field, values: np.ndarray) -> Field:
    """`R^-1` of ``values`` at the pivots that have none yet."""
    k = len(field.dual)
    if k == len(field.pivots):
        return field
    rest = values[field.pivots[k:]] - field.factor[k:, :k] @ field.dual
    return field._replace(dual=np.concatenate([field.dual, solve_triangular(field.factor[k:, k:], rest, lower=True)]))


def avoiding(field: Field, rows: np.ndarray) -> Field:
    """The field with new noise orthogonal to rows ``(m, S)``: to the part of them that has its sign."""
    half = field.noise.shape[1]
    part = (rows[:, :half] + field.sign * rows[:, half:]).T / 2
    size = np.abs(part).max(initial=0.0)
    for _ in range(2):
        part = part - field.taken.T @ (field.taken @ part)
    if not part.size or np.abs(part).max() <= 1e-6 * size or len(field.taken) >= half:
        return field
    factors: Any = qr(part, mode="economic", pivoting=True)
    q, diagonal = factors[0], np.abs(np.diagonal(factors[1]))
    kept = min(int(np.sum(diagonal > 1e-6 * diagonal[0])), half - len(field.taken))
    return field._replace(taken=np.concatenate([field.taken, q.T[:kept]]))


def response(values: np.ndarray, field: Field) -> np.ndarray:
    """``E[values eps^T] dual``, where values live with the noise, and the answer with the dual."""
    half = field.noise.shape[1]
    return ((values[:, :half] + field.sign * values[:, half:]) @ field.noise.T / (2 * half)) @ field.dual


def _value_and_slope(phi: Callable[[Array], Array], h: Array) -> tuple[Array, Array]:
    value, slope = jax.jvp(phi, (h,), (jnp.ones_like(h),))
    return value, slope


_activate = jax.jit(_value_and_slope, static_argnums=0)


def activated(phi: Any, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``phi(h)`` and its derivative; None is linear.

    Raises
    ------
    ValueError
        If they are not finite where h is.
    """
    if phi is None:
        return h, np.ones_like(h)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, slope = _activate(phi, jnp.asarray(h))
    found = np.asarray(value), np.asarray(slope)
    if np.isfinite(h).all() and not all(np.isfinite(v).all() for v in found):
        raise ValueError(
            f"phi or its derivative is not finite at a preactivation between {h.min():.3g} and {h.max():.3g}; "
            "preactivations are Gaussian at the start, so phi must be finite everywhere."
        )
    return found
