"""A two-layer quadratic network on a quadratic target: gradient descent in closed form, at any width, on points or on the population.

The network is ``f(x) = (α/N) Σ_i φ(w_i·x)``, ``φ(h) = h + (ε/2) h²``, usually minus itself at the start; the target ``y = (β·x)²/2``,
x ~ N(0, I/D), the loss the mean of ``(f - y)²``. f depends on the weights by two statistics,

    w̄ = mean w_i,    M = mean w_i w_iᵀ,    f(x) = α (w̄ - w̄_0)·x + (αε/2) xᵀ (M - M_0) x,

and the gradient of a neuron is ``(b + C w_i) / N`` with one vector b and one symmetric matrix C for all neurons, so a step
``w ← w - (lr N/α²) ∂loss/∂w`` is one affine map of all, under which w̄ and M are closed: no neuron need be simulated, and N = ∞ is a start
at w̄_0 = 0, M_0 = I.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

Losses = Float[np.ndarray, " steps"]


class Statistics(NamedTuple):
    """What a network with quadratic activation is.

    Attributes
    ----------
    mean
        w̄, ``(D,)``.
    second
        ``M``, ``(D, D)``.

    Examples
    --------
    >>> Statistics(np.zeros(2), np.eye(2)).second.tolist()  # of infinitely many neurons, w ~ N(0, I)
    [[1.0, 0.0], [0.0, 1.0]]
    """

    mean: Float[Array | np.ndarray, " D"]
    second: Float[Array | np.ndarray, "D D"]


class Descent(NamedTuple):
    """Gradient descent, at steps 0 to ``steps``; float64, NumPy.

    Attributes
    ----------
    time
        ``lr × step``.
    test_loss
        Of the population, exactly.
    train_loss
        Of the points; without points that of the population.
    alignment
        ``βᵀ M β / (|β|² |M|_F)``, 1 when every w is along β.
    last
        w̄ and M at the end.

    Examples
    --------
    >>> run = high_dim_gd(np.ones(4), alpha=0.5, eps=1.0, learning_rate=0.1, steps=2)
    >>> run.test_loss.shape, float(run.test_loss[0])
    ((3,), 0.75)
    """

    time: Losses
    test_loss: Losses
    train_loss: Losses
    alignment: Losses
    last: Statistics


class PopulationLimit(NamedTuple):
    """Training on the population in high dimension.

    Attributes
    ----------
    loss
        The test loss.
    overlap
        μ, by which M has grown along β: ``βᵀ M β / |β|² = 1 + μ``.

    Examples
    --------
    >>> population_limit(np.array([0.0]), alpha=0.1, eps=1.0).loss.tolist()
    [0.5]
    """

    loss: Float[np.ndarray, " times"]
    overlap: Float[np.ndarray, " times"]


def quadratic_test_loss(
    shift: Float[Array | np.ndarray, " D"],
    drift: Float[Array | np.ndarray, "D D"],
    beta: Float[Array | np.ndarray, " D"],
    *,
    alpha: Array | float,
    eps: float,
) -> Array | np.floating:
    """The test loss from ``w̄ - w̄_0`` and ``M - M_0``: ``α² |w̄ - w̄_0|² / D + (tr(A)² + 2 |A|_F²) / (4 D²)``, ``A = αε (M - M_0) - β βᵀ``.

    Exact, for Gaussian x: ``f - y = α (w̄ - w̄_0)·x + xᵀ A x / 2``.

    Parameters
    ----------
    shift, drift, beta
        ``w̄ - w̄_0``, ``M - M_0`` and β, of JAX or NumPy, traced or not; computed in their dtype. Of a network that is not centred w̄ and M.
    alpha, eps
        α, a number or a JAX scalar, and ε.

    References
    ----------
    Kumar, Bordelon, Gershman and Pehlevan, arXiv 2310.06110, section 5.

    Examples
    --------
    >>> beta = np.ones(4)
    >>> float(quadratic_test_loss(np.zeros(4), np.zeros((4, 4)), beta, alpha=1.0, eps=1.0))  # E y² = 3/4
    0.75
    """
    D = shift.shape[0]
    A = alpha * eps * drift - beta[:, None] * beta[None, :]
    return alpha**2 * (shift**2).sum() / D + (A.trace() ** 2 + 2 * (A**2).sum()) / (4 * D**2)


def high_dim_gd(
    beta: Float[Array | np.ndarray, " D"],
    *,
    alpha: float,
    eps: float,
    learning_rate: float,
    steps: int,
    x: Float[Array | np.ndarray, "P D"] | None = None,
    start: Statistics | None = None,
    centred: bool = True,
) -> Descent:
    """Full-batch gradient descent in w̄ and M, with ``r = f - y`` at the points, or ``A`` as in `quadratic_test_loss` on the population::

        b = 2α mean(r x)                      C = 2αε mean(r x xᵀ)                  on points
        b = 2α² (w̄ - w̄_0) / D                 C = αε (tr(A) I + 2A) / D²            on the population
        S = I - (lr/α²) C                     s = (lr/α²) b
        w̄ ← S w̄ - s                           M ← S M S - S w̄ sᵀ - s w̄ᵀ S + s sᵀ

    Exact at any width, for the map is that of every neuron. Networks of width N whose start is theirs are this to rounding; the start of
    N = ∞ is left of theirs by ``(D/N)^1/2``.

    Parameters
    ----------
    beta
        β, ``(D,)``.
    alpha, eps
        α and ε, above 0.
    learning_rate
        lr: a weight moves by ``lr N/α²`` times its gradient of the mean of ``(f - y)²``.
    steps
        Of gradient descent.
    x
        The points of training, ``(P, D)``; the population if left out.
    start
        w̄_0 and M_0; left out, those of N = ∞: 0 and I.
    centred
        Whether the network is minus itself at the start.

    Returns
    -------
    Descent
        At steps 0 to ``steps``.

    Raises
    ------
    ValueError
        If a size is 0, shapes differ, α, ε or lr is not positive, steps is negative, or something is not finite.
    FloatingPointError
        If descent diverges: the learning rate is too large.

    References
    ----------
    Kumar, Bordelon, Gershman and Pehlevan, arXiv 2310.06110, for the model and its statistics; their closed recursion is derived here.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((200, 8)) / 8**0.5
    >>> run = high_dim_gd(np.ones(8), alpha=0.4, eps=1.0, learning_rate=0.3, steps=400, x=x)
    >>> bool(run.test_loss[-1] < 0.01), bool(run.alignment[-1] > 0.9)
    (True, True)
    """
    beta_D, x_PxD, (mean, second) = _checked(beta, alpha, eps, learning_rate, steps, x, start)
    D = len(beta_D)
    mean_0, second_0 = (mean, second) if centred else (np.zeros(D), np.zeros((D, D)))
    target = None if x_PxD is None else (x_PxD @ beta_D) ** 2 / 2
    rate, rows = learning_rate / alpha**2, []
    for step in range(steps + 1):
        shift, drift = mean - mean_0, second - second_0
        test = float(quadratic_test_loss(shift, drift, beta_D, alpha=alpha, eps=eps))
        if x_PxD is None or target is None:
            train = test
            A = alpha * eps * drift - np.outer(beta_D, beta_D)
            b, C = 2 * alpha**2 * shift / D, alpha * eps * (np.trace(A) * np.eye(D) + 2 * A) / D**2
        else:
            r_P = alpha * (x_PxD @ shift) + alpha * eps / 2 * np.sum((x_PxD @ drift) * x_PxD, axis=1) - target
            train = float(np.mean(r_P**2))
            weighted_PxD = r_P[:, None] * x_PxD / len(r_P)
            b, C = 2 * alpha * weighted_PxD.sum(axis=0), 2 * alpha * eps * (weighted_PxD.T @ x_PxD)
        # A loss that a step multiplies by 10^6 of its start does not come back.
        if not (test < 1e6 and train < 1e6 * (1 + beta_D @ beta_D)):
            raise FloatingPointError(
                f"high_dim_gd: the loss is {test:g} at step {step}, so descent diverges. Lower learning_rate = {learning_rate:g}; "
                "the largest stable one grows with D, and is of order 1 for α of order 1."
            )
        rows.append((learning_rate * step, test, train, beta_D @ second @ beta_D / (beta_D @ beta_D * np.linalg.norm(second))))
        if step < steps:
            S, s = np.eye(D) - rate * C, rate * b
            across = np.outer(S @ mean, s)
            mean, second = S @ mean - s, S @ second @ S - across - across.T + np.outer(s, s)
    time, test_loss, train_loss, alignment = np.array(rows).T
    return Descent(time, test_loss, train_loss, alignment, Statistics(mean, second))


def population_limit(time: Float[np.ndarray, " times"], *, alpha: float, eps: float) -> PopulationLimit:
    """Gradient flow of a network of infinite width on the population as D → ∞, with ``|β|² = D`` and laziness ``a = α/D`` fixed.

    In time ``t = lr × step`` the trace of A is gone by t of order D, which takes the loss from 3/4 to 1/2. Of order D², with
    ``k = aε`` and ``τ = t/D²``, M grows along β alone, by a logistic law, here derived from that of `high_dim_gd`::

        dμ/dτ = (4ε/a) (1 - kμ) (1 + μ)          μ = (E - 1) / (1 + kE),  E = exp(4ε (1 + k) τ / a)
        loss  = (1 - kμ)² / 2                      = ((1 + k) / (1 + kE))² / 2

    Lazy, k → ∞: ``exp(-8ε² τ) / 2``, with features fixed. Rich, k → 0: a plateau until ``E = 1/k``. Training on P points at fixed P/D²,
    which has no such closed form, is not covered.

    Parameters
    ----------
    time
        τ, ``lr × step / D²``.
    alpha
        a, ``α/D``, above 0.
    eps
        ε, above 0.

    Raises
    ------
    ValueError
        If α or ε is not positive, or a time is negative.

    Examples
    --------
    >>> population_limit(np.array([0.0, 0.5, 1.0]), alpha=100.0, eps=1.0).loss.round(4).tolist()  # exp(-8 τ) / 2, nearly
    [0.5, 0.009, 0.0002]
    """
    _check_positive("population_limit", alpha=alpha, eps=eps)
    tau = np.asarray(time, np.float64)
    if not (np.all(np.isfinite(tau)) and np.all(tau >= 0)):
        raise ValueError("population_limit: a time is negative or not finite. Give lr × step / D² of each.")
    k = alpha * eps
    # By 1/E, which does not overflow.
    shrunk = np.exp(-4 * eps * (1 + k) * tau / alpha)
    return PopulationLimit(((1 + k) * shrunk / (shrunk + k)) ** 2 / 2, (1 - shrunk) / (shrunk + k))


def _check_positive(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{where}: {name} = {number}. Give a finite number above 0.")


def _checked(
    beta: object, alpha: float, eps: float, learning_rate: float, steps: int, x: object, start: Statistics | None
) -> tuple[np.ndarray, np.ndarray | None, Statistics]:
    where = "high_dim_gd"
    _check_positive(where, alpha=alpha, eps=eps, learning_rate=learning_rate)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"{where}: steps = {steps!r} is no whole number.")
    if steps < 0:
        raise ValueError(f"{where}: steps = {steps}. Give 0 or more.")
    for name, array in (("beta", beta), ("x", x)):
        if np.iscomplexobj(np.asarray(array)):
            raise ValueError(f"{where}: {name} is complex; targets and points are real.")
    beta_D = np.asarray(beta, np.float64)
    if beta_D.ndim != 1:
        raise ValueError(f"{where}: beta has shape {beta_D.shape}. Give a vector, (D,).")
    if beta_D.size == 0 or not np.any(beta_D) or not np.all(np.isfinite(beta_D)):
        raise ValueError(f"{where}: beta is empty, 0 or not finite, so there is no target. Give a vector of the dimension of x.")
    D = len(beta_D)
    x_PxD = None if x is None else np.asarray(x, np.float64)
    if x_PxD is not None and (x_PxD.ndim != 2 or 0 in x_PxD.shape or x_PxD.shape[1] != D or not np.all(np.isfinite(x_PxD))):
        raise ValueError(
            f"{where}: x has shape {x_PxD.shape}, or is not finite, and beta {D} entries. Give (points, {D}), at least one point."
        )
    if start is None:
        return beta_D, x_PxD, Statistics(np.zeros(D), np.eye(D))
    mean, second = np.asarray(start.mean, np.float64), np.asarray(start.second, np.float64)
    if mean.shape != (D,) or second.shape != (D, D) or not (np.all(np.isfinite(mean)) and np.all(np.isfinite(second))):
        raise ValueError(f"{where}: start has shapes {mean.shape} and {second.shape}, or is not finite, and beta {D} entries.")
    if np.linalg.eigvalsh(second - np.outer(mean, mean))[0] < -1e-6 * np.abs(second).max():
        raise ValueError(f"{where}: start.second - mean meanᵀ has an eigenvalue below 0, so no weights have these moments.")
    return beta_D, x_PxD, Statistics(mean, second)
