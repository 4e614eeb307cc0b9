"""Ridge regression in high dimension: its deterministic equivalent, which is its error up to the next order in 1/n."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import root_scalar

Matrix = Float[Array | np.ndarray, "_ _"]
Vector = Float[Array | np.ndarray, " _"]
Curve = Float[np.ndarray, " points"]

ROUNDING = 1e-10
"""Relative: eigenvalues below it are 0, and numbers that cannot be negative may be so by it."""


class RidgeEquivalent(NamedTuple):
    """Ridge regression by its equivalent, one entry for each number of samples and ridge.

    Attributes
    ----------
    error
        ``E (y - θ h)²`` on fresh points, the noise of their labels included.
    training
        The mean square on the training points.
    bias
        ``κ² βᵀ (Ω + κ)^-1 Ω (Ω + κ)^-1 β``.
    floor
        ``σ²``, the least error of any θ, which is what `error` tends to with many samples.
    kappa
        The effective ridge.
    df1, df2
        ``tr Ω (Ω + κ)^-1`` and ``tr Ω² (Ω + κ)^-2``.

    Examples
    --------
    >>> found = ridge_equivalent(np.eye(100), np.zeros(100), 1.0, 200, 0.0)  # 1 / (1 - p/n) of pure noise, and 1 - p/n of it on its points
    >>> found.error.round(6).tolist(), found.training.round(6).tolist()
    ([2.0], [0.5])
    """

    error: Curve
    training: Curve
    bias: Curve
    floor: Curve
    kappa: Curve
    df1: Curve
    df2: Curve


def ridge_equivalent(
    covariance: Matrix,
    cross: Vector,
    square: float,
    samples: int | Sequence[int] | np.ndarray,
    ridge: float | Sequence[float] | np.ndarray,
) -> RidgeEquivalent:
    """Test error of ridge regression, ``argmin_θ (1/n) Σ (y_i - θ·h_i)² + λ |θ|²``, by its deterministic equivalent.

    With ``Ω = E h hᵀ``, ``β = Ω^-1 E h y`` and ``σ² = E y² - βᵀ Ω β``::

        κ = λ + (κ/n) tr Ω (Ω + κ)^-1               error = (σ² + κ² βᵀ (Ω + κ)^-1 Ω (Ω + κ)^-1 β) / (1 - df2/n)
        df2 = tr Ω² (Ω + κ)^-2                      training = (1 - df1/n)² error

    At λ = 0, the limit from above: κ solves ``df1 = n`` where n is below the rank of Ω, and is 0 where it is above.

    Parameters
    ----------
    covariance
        Ω, ``(p, p)``: second moments, not about the mean, as there is no intercept.
    cross
        ``E h y``, ``(p,)``.
    square
        ``E y²``, the noise of labels included.
    samples, ridge
        n and λ: numbers, or vectors of one length.

    Returns
    -------
    RidgeEquivalent
        In float64.

    Raises
    ------
    ValueError
        If the covariance is none, shapes differ, n is below 1, λ is negative, ``square`` is less than the features explain, or λ is 0
        and n the rank of Ω, where the error is infinite.
    TypeError
        If n is no whole number.

    References
    ----------
    Dobriban and Wager, arXiv 1507.03003; Hastie et al., arXiv 1903.08560; for deep random features Schröder et al., arXiv 2302.00401.

    Examples
    --------
    >>> curve = ridge_equivalent(np.eye(100), np.full(100, 0.1), 1.25, [50, 90, 110, 200], 1e-3)  # |β| = 1, noise 1/4
    >>> curve.error.round(2).tolist()  # at ridge 0: 1 - n/p + σ² / (1 - n/p), and past n = p σ² / (1 - p/n)
    [1.0, 2.28, 2.3, 0.5]
    """
    where = "ridge_equivalent"
    omega = checked_covariance(covariance, where)
    g = np.asarray(cross, np.float64)
    if g.shape != omega.shape[:1] or not np.all(np.isfinite(g)):
        raise ValueError(
            f"{where}: cross has shape {g.shape}, or is not finite, and the covariance {omega.shape}. Give E h y of each feature."
        )
    n_K, ridge_K = _points(samples, ridge, where)
    eigenvalues, vectors = np.linalg.eigh(omega)
    g_P = vectors.T @ g
    seen = eigenvalues > ROUNDING * max(eigenvalues[-1], 0.0)
    s_P, explained = eigenvalues[seen], g_P[seen] ** 2 / eigenvalues[seen]
    unseen = float(np.sum(g_P[~seen] ** 2))
    floor = square - float(explained.sum())
    if not math.isfinite(square) or floor < -ROUNDING * abs(square) or unseen > ROUNDING * max(float(np.sum(g**2)), 1e-300):
        raise ValueError(
            f"{where}: square = {square:g}, of which features that correlate like cross explain {explained.sum():g}"
            f"{', and cross lies outside the range of the covariance' if unseen > 0 else ''}. "
            "No target has these moments: is square E y² with the noise, and is the mean in all three or in none?"
        )
    floor = max(floor, 0.0)
    return RidgeEquivalent(*np.array([_solve(s_P, explained, floor, n, ridge, where) for n, ridge in zip(n_K, ridge_K)]).T)


def _solve(s_P: np.ndarray, explained: np.ndarray, floor: float, n: int, ridge: float, where: str) -> tuple[float, ...]:
    """One point, in the basis of eigenvectors."""
    rank = len(s_P)

    def df1(kappa: float) -> float:
        return float(np.sum(s_P / (s_P + kappa)))

    if ridge == 0 and n == rank:
        raise ValueError(
            f"{where}: samples = {n} is the rank of the features, where the error is infinite with ridge = 0. Give ridge > 0, or skip it."
        )
    if (ridge == 0 and n > rank) or rank == 0:
        kappa = ridge
    else:
        # 1 - df1/n - λ/κ rises with κ, from below 0 to above it, if only by rounding.
        high = (ridge + float(s_P.sum()) / n) * (1 + 1e-9)
        low = ridge if ridge > 0 else float(s_P.min()) * 1e-12
        solved = root_scalar(lambda k: 1 - df1(k) / n - ridge / k, bracket=(low, high), method="brentq", xtol=1e-300, rtol=1e-14)
        kappa = float(solved.root)
    shrunk = s_P / (s_P + kappa)
    df2, bias = float(np.sum(shrunk**2)), float(np.sum(explained * (1 - shrunk) ** 2))
    error = (floor + bias) / (1 - df2 / n)
    left = 1 - df1(kappa) / n if ridge == 0 else ridge / kappa
    return error, left**2 * error, bias, floor, kappa, df1(kappa), df2


def _points(samples: object, ridge: object, where: str) -> tuple[list[int], list[float]]:
    n, each = np.atleast_1d(np.asarray(samples)), np.atleast_1d(np.asarray(ridge, np.float64))
    if not np.issubdtype(n.dtype, np.integer):
        raise TypeError(f"{where}: samples = {samples!r} is no whole number. Give how many points are trained on.")
    if n.ndim > 1 or each.ndim > 1 or (n.size != each.size and 1 not in (n.size, each.size)) or 0 in (n.size, each.size):
        raise ValueError(f"{where}: samples and ridge have shapes {n.shape} and {each.shape}. Give numbers, or vectors of one length.")
    if n.min() < 1:
        raise ValueError(f"{where}: samples = {n.min()}. Give at least 1 point to train on.")
    if not (np.all(np.isfinite(each)) and each.min() >= 0):
        raise ValueError(f"{where}: ridge = {each.min():g}, and it is finite and not negative: λ |θ|² is a penalty.")
    n, each = np.broadcast_arrays(n, each)
    return n.tolist(), each.tolist()


def checked_covariance(covariance: Matrix, where: str) -> np.ndarray:
    """In float64, symmetric.

    Raises
    ------
    ValueError
        If it is not square, of size 0, not finite, not symmetric or not positive.

    Examples
    --------
    >>> checked_covariance(np.eye(1), "example").tolist()
    [[1.0]]
    """
    found = np.asarray(covariance, np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or found.size == 0 or not np.all(np.isfinite(found)):
        raise ValueError(f"{where}: covariance has shape {found.shape}, or is not finite. Give a square matrix of a size above 0.")
    size = np.abs(found).max()
    if not np.allclose(found, found.T, rtol=0, atol=ROUNDING * size):
        raise ValueError(f"{where}: covariance is not symmetric, so it is the covariance of nothing.")
    least = float(np.linalg.eigvalsh(found)[0])
    if least < -ROUNDING * len(found) * size:
        raise ValueError(f"{where}: covariance has the eigenvalue {least:g}; a covariance has none below 0.")
    return (found + found.T) / 2
