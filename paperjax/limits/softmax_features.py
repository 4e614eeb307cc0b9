"""Neural collapse under cross-entropy: networks whose features are free, by convex optimisation at depth 1 and by geometry at any."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from paperjax.limits.unconstrained_features import Decay, Minimiser, Square, assembled, class_sizes, decays, whole


def cross_entropy_minimiser(sizes: Sequence[int], *, weight_decay: float, feature_decay: float, bias: bool = False) -> Minimiser:
    """Global minimiser of ``Σ CE(W h_i + b, y_i) / N + λ_W |W|² / 2 + λ_H |H|² / 2``, over all of W, H (and b).

    Over ``Z = W H`` it is convex, ``Σ_k (n_k / N) CE(z_k, k) + (λ_W λ_H)^½ |Z|_*``, and is solved by proximal gradients with momentum. With
    balanced classes means and rows of W are a simplex, at the margin ``log(1 / (n λ_W λ_H)^½ - K + 1)``, and vanish where ``n λ_W λ_H >=
    1 / K²``; with others neither angles nor lengths are equal. Deeper networks: `cross_entropy_frame`.

    Parameters
    ----------
    sizes, weight_decay, feature_decay, bias
        As in `mse_minimiser`, with depth 1. For balanced classes the bias is a constant, and is 0 here.

    Returns
    -------
    Minimiser
        In float64, to a relative 1e-9 of the condition that the gradient vanishes.

    Raises
    ------
    ValueError, TypeError
        As `mse_minimiser` does.
    RuntimeError
        If the solver does not get there.

    References
    ----------
    Hong and Ling, arXiv 2309.09725.

    Examples
    --------
    >>> collapse = cross_entropy_minimiser([10, 10, 10, 10], weight_decay=0.01, feature_decay=0.01)
    >>> collapse.cosines[0].round(3)
    array([ 1.   , -0.333, -0.333, -0.333])
    """
    where = "cross_entropy_minimiser"
    n = class_sizes(sizes, where)
    decay = decays(1, weight_decay, feature_decay, where)
    scaled, beta = _nuclear_norm_fit(n, math.sqrt(decay.prod()), bias, where)
    U, s, Vt = np.linalg.svd(scaled)
    s = np.where(s > 1e-12 * max(1.0, s[0]), s, 0.0)
    z = scaled / np.sqrt(n) + beta[:, None]
    loss = float(n @ (_logsumexp(z) - np.diag(z)) / n.sum() + math.sqrt(decay.prod()) * s.sum())
    return assembled(U, s, Vt, np.full(len(s), np.inf), n, decay, beta - beta.mean(), loss)


class Frame(NamedTuple):
    """A deep linear network whose classes lie at the corners of a regular figure, at the best size under weight decay.

    Attributes
    ----------
    margin
        The output for the class less that for the nearest other; 0 if the best is to have no features.
    cosines
        Between the features of classes.
    rank
        Number of modes, all equal: K - 1 for the simplex, K/2 for the cross-polytope.
    singular_value, weights, features
        Of the outputs, of each ``W_l`` ``(depth,)``, and of H.
    loss
        With all decay.

    Examples
    --------
    >>> cross_entropy_frame(4, 10, 2, weight_decay=0.01, feature_decay=0.01).rank
    3
    """

    margin: float
    cosines: Square
    rank: int
    singular_value: float
    weights: Float[np.ndarray, " depth"]
    features: float
    loss: float


def cross_entropy_frame(
    classes: int,
    per_class: int,
    depth: int,
    *,
    weight_decay: Decay,
    feature_decay: float,
    frame: Literal["simplex", "cross-polytope"] = "simplex",
) -> Frame:
    """The best size of a regular figure for K balanced classes: ``Σ CE / N + Σ λ_l |W_l|² / 2 + λ_H |H|² / 2`` at outputs that are a frame.

    Outputs ``α (1 - 1/K)`` for the class and ``-α/K`` for others (simplex), or α for the class, -α for its opposite and 0 for others
    (cross-polytope); with the C of `mse_minimiser` and n examples in each class::

        simplex           minimise log(1 + (K - 1) e^-α)             + (M + 1)/2 C (K - 1) (n^½ α)^(2/(M+1))
        cross-polytope    minimise log(1 + (K - 2) e^-α + e^(-2α))   + (M + 1)/2 C (K / 2) (2 n^½ α)^(2/(M+1))

    For M = 1 the simplex is the global minimiser. For M > 1, K even and ``K 2^(-(M-1)/(M+1)) < K - 1`` (K >= 6 for M = 2, K >= 4 for
    M >= 3) it never is, whatever the decay, unless all vanishes: at every margin the cross-polytope has less of both terms. So arXiv
    2301.00437, whose section on cross-entropy has the simplex as the global minimiser at every depth, does not hold there. The simplex
    can still be where training ends.

    Parameters
    ----------
    classes, per_class
        K, and examples n of each.
    depth, weight_decay, feature_decay
        As in `mse_minimiser`. A bias adds nothing.
    frame
        ``"simplex"``, or ``"cross-polytope"`` for an even number of classes: pairs of opposite points on orthogonal axes.

    Returns
    -------
    Frame
        In float64.

    Raises
    ------
    ValueError, TypeError
        As `mse_minimiser` does; and if frame is another word, or a cross-polytope has an odd number of classes.

    References
    ----------
    Garrod and Keating, arXiv 2410.23169, on low rank beating collapse; the inequality is derived here.

    Examples
    --------
    >>> given = dict(weight_decay=3e-3, feature_decay=3e-3)
    >>> [round(cross_entropy_frame(4, 10, 3, frame=frame, **given).loss, 4) for frame in ("simplex", "cross-polytope")]
    [0.0858, 0.0787]
    """
    where = "cross_entropy_frame"
    whole(classes, where, "classes")
    n = class_sizes([per_class] * classes, where)
    decay = decays(depth, weight_decay, feature_decay, where)
    K, M, C = classes, depth, math.exp(np.log(decay).mean())
    if frame == "simplex":
        rank, stretch, opposite, cosines = K - 1, 1.0, 0.0, (K * np.eye(K) - 1) / (K - 1)
    elif frame != "cross-polytope":
        raise ValueError(f"{where}: frame = {frame!r} is neither 'simplex' nor 'cross-polytope'.")
    elif K % 2:
        raise ValueError(f"{where}: a cross-polytope has pairs of opposite corners, and classes = {K} is odd. Give an even number.")
    else:
        rank, stretch, opposite = K // 2, 2.0, 1.0
        cosines = np.kron(np.eye(K // 2), [[1.0, -1.0], [-1.0, 1.0]])
    others = K - 1 - opposite
    scale = stretch * math.sqrt(n[0])

    def loss(alpha: float) -> float:
        return math.log1p(others * math.exp(-alpha) + opposite * math.exp(-2 * alpha)) + (M + 1) / 2 * C * rank * (scale * alpha) ** (
            2 / (M + 1)
        )

    def pull(alpha: float) -> float:
        """What the gradients of both terms have in the ratio of, in logarithms: 0 at a stationary size."""
        e = math.exp(-alpha)
        gain = e * (others + 2 * opposite * e) / (1 + others * e + opposite * e * e)
        return math.log(gain) + (M - 1) / (M + 1) * math.log(alpha) - math.log(C * rank * scale ** (2 / (M + 1)))

    alpha = _largest_root(pull)
    best = alpha if alpha and loss(alpha) < loss(0.0) else 0.0
    s = scale * best
    share = C * s ** (2 / (M + 1))
    return Frame(best, cosines, rank, s, np.sqrt(share / decay[:-1]), math.sqrt(share / decay[-1]), loss(best))


def _largest_root(f: Callable[[float], float]) -> float | None:
    """Of a function of a positive number that rises, if at all, to one top, and then falls for ever."""
    from scipy.optimize import minimize_scalar, root_scalar

    # By the logarithm, in which the rise is a straight line; for depth 1 there is none, and the top is at the left end.
    found: Any = minimize_scalar(lambda t: -f(math.exp(t)), bounds=(-40.0, 6.0), method="bounded", options=dict(xatol=1e-9))
    top = math.exp(found.x)
    return None if f(top) <= 0 else root_scalar(f, bracket=(top, 700.0), xtol=1e-15, rtol=1e-14).root


def _logsumexp(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=0)
    return top + np.log(np.exp(z - top).sum(axis=0))


def _nuclear_norm_fit(n: np.ndarray, tau: float, bias: bool, where: str) -> tuple[Square, np.ndarray]:
    """``Z diag(n)^½`` and b by FISTA with restarts, whose gradient is Lipschitz with 1/N in ``(Z diag(n)^½, N^½ b)``."""
    K, N, root = len(n), n.sum(), np.sqrt(n)

    def step(at: np.ndarray) -> np.ndarray:
        z = at[:, :-1] / root + at[:, -1:] / math.sqrt(N)
        off = np.exp(z - _logsumexp(z)) - np.eye(K)
        moved = at - np.c_[off * root, bias * (off @ n) / math.sqrt(N)]
        U, s, Vt = np.linalg.svd(moved[:, :-1])
        moved[:, :-1] = (U * np.maximum(s - N * tau, 0)) @ Vt
        return moved

    x = y = np.zeros((K, K + 1))
    t, left = 1.0, math.inf
    for _ in range(10_000):
        new = step(y)
        left = float(np.linalg.norm(new - y)) / (N * tau)
        if left < 1e-9:
            return new[:, :-1], new[:, -1] / math.sqrt(N)
        t = 1.0 if ((y - new) * (new - x)).sum() > 0 else t
        after = (1 + math.sqrt(1 + 4 * t * t)) / 2
        x, y, t = new, new + (t - 1) / after * (new - x), after
    raise RuntimeError(
        f"{where}: after 10,000 steps the gradient is {left:.1e} of the decay's, and 1e-9 is asked for. With so little decay "
        f"((weight_decay * feature_decay)^½ = {tau:.1e}) the margins are very large: raise it."
    )
