"""Neural collapse: global minimisers of deep linear networks whose features are free, under weight decay."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Modes = Float[np.ndarray, " modes"]
Square = Float[np.ndarray, "classes classes"]
Decay = float | Sequence[float]


class Minimiser(NamedTuple):
    """A minimiser of the loss, up to a rotation of the hidden coordinates; all examples of a class have the same features.

    Modes are classes, in order, for the squared error without bias; otherwise singular directions, from the largest.

    Attributes
    ----------
    singular_values
        Of ``W_M ... W_1 H``, which has examples as columns.
    targets
        What they are without decay: those of the (centred) labels; infinite for cross-entropy.
    weights
        Singular values of each ``W_l``: ``(depth, modes)``.
    features
        Singular values of H.
    outputs
        Column k is what the network, without its bias, says of class k.
    means_gram
        Scalar products of the features of classes.
    classifier_gram
        Scalar products of the rows of ``W_M``.
    bias
        Of the outputs; 0 where there is none.
    loss
        With all decay.

    Examples
    --------
    >>> collapse = mse_minimiser([8, 8], weight_decay=0.05, feature_decay=0.05)
    >>> collapse.cosines.round(3)
    array([[1., 0.],
           [0., 1.]])
    """

    singular_values: Modes
    targets: Modes
    weights: Float[np.ndarray, "depth modes"]
    features: Modes
    outputs: Square
    means_gram: Square
    classifier_gram: Square
    bias: Float[np.ndarray, " classes"]
    loss: float

    @property
    def cosines(self) -> Square:
        """Between the features of classes; NaN for a class that vanishes, which has no direction."""
        norms = np.sqrt(np.diag(self.means_gram))
        size = np.where(norms > 1e-9 * max(1.0, norms.max()), norms, np.nan)
        return self.means_gram / np.outer(size, size)


def mse_minimiser(sizes: Sequence[int], depth: int = 1, *, weight_decay: Decay, feature_decay: float, bias: bool = False) -> Minimiser:
    """Global minimiser of ``|W_M ... W_1 H + b - Y|² / 2N + Σ λ_l |W_l|² / 2 + λ_H |H|² / 2``, Y one-hot, over all of W, H (and b).

    A matrix Z with singular values s costs ``(M + 1)/2 C Σ s^(2/(M+1))`` in factors, ``C = (λ_1 ... λ_M λ_H)^(1/(M+1))``, so each mode
    of the labels, with singular value a, is a problem of one number::

        minimise (s - a)² / 2N + (M + 1)/2 C s^(2/(M+1)),      λ_l σ(W_l)² = λ_H σ(H)² = C s^(2/(M+1)),

    whose solution is ``(a - N C)₊`` for M = 1, and for M > 1 jumps to 0 from ``s = (M - 1) a / M`` (`collapse_threshold`). Without bias
    modes are classes, a = n_k^½, and both means and rows of ``W_M`` are orthogonal. A free bias is ``n_k / N``, and what is left to fit
    has the Gram matrix ``diag(n) - n nᵀ / N``: with balanced classes K - 1 equal modes, a simplex.

    Parameters
    ----------
    sizes
        Examples n_k of each class; N in all.
    depth
        M, the number of weight matrices. Hidden layers are at least as wide as there are classes.
    weight_decay
        λ_l of ``W_1`` to ``W_M``, or one for all.
    feature_decay
        λ_H.
    bias
        Whether the outputs have one, which does not decay.

    Returns
    -------
    Minimiser
        In float64. At the threshold of a mode, where both are minimisers, that with 0.

    Raises
    ------
    ValueError
        If there are fewer than two classes, one is empty, depth is below 1, or a decay is not positive (without it no minimiser is special,
        and features need not collapse) or is not one number for each layer.
    TypeError
        If a size or depth is no whole number.

    References
    ----------
    Dang et al., arXiv 2301.00437, sections 3 and 4, for no bias or balanced classes; derived here in one line for all four.

    Examples
    --------
    Class 3 has n <= N² λ_W λ_H = 9, and vanishes:

    >>> mse_minimiser([64, 32, 4], weight_decay=0.03, feature_decay=0.03).singular_values.round(3)
    array([5.   , 2.657, 0.   ])
    """
    where = "mse_minimiser"
    n = class_sizes(sizes, where)
    decay = decays(depth, weight_decay, feature_decay, where)
    N, M = n.sum(), depth
    C = math.exp(np.log(decay).mean())
    if bias:
        U, a, Vt = np.linalg.svd((np.eye(len(n)) - n[:, None] / N) * np.sqrt(n))
        U, a, Vt = U[:, :-1], a[:-1], Vt[:-1]
    else:
        U, a, Vt = np.eye(len(n)), np.sqrt(n), np.eye(len(n))
    s = np.array([_shrunk(float(goal), N * C, M) for goal in a])
    loss = float(((s - a) ** 2).sum() / (2 * N) + (M + 1) / 2 * C * (s ** (2 / (M + 1))).sum())
    return assembled(U, s, Vt, a, n, decay, n / N * bias, loss)


class CollapseThreshold(NamedTuple):
    """Sizes of a class at which it vanishes from a network trained by squared error without bias.

    Attributes
    ----------
    size
        Up to this number of examples the global minimiser has nothing of the class. (With bias: up to this a² of a mode.)
    metastable
        Down to this number there is a minimum with something of it, which training may stay in; equal to size for depth 1.
    jump
        ``s_k / n_k^½`` right above size: ``(M - 1) / M``.

    Examples
    --------
    >>> collapse_threshold(100, 2, weight_decay=0.01, feature_decay=0.01).jump
    0.5
    """

    size: float
    metastable: float
    jump: float


def collapse_threshold(total: int, depth: int = 1, *, weight_decay: Decay, feature_decay: float) -> CollapseThreshold:
    """The size n_k at which a class vanishes from the minimiser of `mse_minimiser`: the same for all classes, given N.

    With ``P = λ_1 ... λ_M λ_H``, where the two minima have one loss, and where that with something is no minimum any more::

        n^M = N^(M+1) P M^(2M) / (M - 1)^(M-1)                           N² λ_W λ_H for M = 1
        n^M = N^(M+1) P (2M)^(2M) / ((M - 1)^(M-1) (M + 1)^(M+1))

    Parameters
    ----------
    total
        N, the examples of all classes.
    depth, weight_decay, feature_decay
        As in `mse_minimiser`.

    Raises
    ------
    ValueError, TypeError
        As `mse_minimiser` does.

    References
    ----------
    Dang et al., arXiv 2301.00437, sections 3 and 4; metastable is derived here.

    Examples
    --------
    >>> round(collapse_threshold(100, weight_decay=0.03, feature_decay=0.03).size, 6)
    9.0
    """
    where = "collapse_threshold"
    whole(total, where, "total")
    decay = decays(depth, weight_decay, feature_decay, where)
    M = depth
    lost = (M - 1) * math.log(M - 1) if M > 1 else 0.0
    base = (M + 1) * math.log(total) + float(np.log(decay).sum()) - lost
    size = math.exp((base + 2 * M * math.log(M)) / M)
    metastable = math.exp((base + 2 * M * math.log(2 * M) - (M + 1) * math.log(M + 1)) / M)
    return CollapseThreshold(size, metastable, (M - 1) / M)


def _shrunk(a: float, decay: float, M: int) -> float:
    """Minimiser of ``(s - a)² / 2 + (M + 1)/2 decay s^(2/(M+1))``: the largest root of ``s^p (a - s) = decay``, or 0."""
    from scipy.optimize import root_scalar

    p, least = (M - 1) / (M + 1), (M - 1) / M
    kappa = decay / a ** (1 + p)
    if kappa >= least**p * (1 - least):
        return 0.0
    if M == 1:
        return a * (1 - kappa)
    return a * root_scalar(lambda x: x**p * (1 - x) - kappa, bracket=(least, 1.0), xtol=1e-15, rtol=1e-14).root


def assembled(
    U: Float[np.ndarray, "classes modes"],
    s: Modes,
    Vt: Float[np.ndarray, "modes classes"],
    a: Modes,
    n: np.ndarray,
    decay: np.ndarray,
    bias: np.ndarray,
    loss: float,
) -> Minimiser:
    """Factors of ``U diag(s) Vt``, which is ``Z diag(n)^½``: every term of the decay has one share in a mode.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> assembled(one, np.array([4.0]), one, np.array([4.0]), np.ones(1), np.array([1.0, 1.0]), np.zeros(1), 0.0).features
    array([2.])
    """
    root, M = np.sqrt(n), len(decay) - 1
    share = math.exp(np.log(decay).mean()) * s ** (2 / (M + 1))
    v = Vt / root
    return Minimiser(
        singular_values=s,
        targets=a,
        weights=np.sqrt(share / decay[:-1, None]),
        features=np.sqrt(share / decay[-1]),
        outputs=(U * s) @ v,
        means_gram=(v.T * share / decay[-1]) @ v,
        classifier_gram=(U * share / decay[-2]) @ U.T,
        bias=bias,
        loss=loss,
    )


def whole(number: object, where: str, name: str, least: int = 1) -> None:
    """Refuse what is no whole number, or below the least.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> whole(3, "here", "depth")
    """
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
        raise TypeError(f"{where}: {name} = {number!r} is no whole number. Give one of at least {least}.")
    if number < least:
        raise ValueError(f"{where}: {name} = {number}. Give a whole number of at least {least}.")


def class_sizes(sizes: Sequence[int], where: str) -> np.ndarray:
    """Examples of each class, in float64.

    Raises
    ------
    ValueError, TypeError
        Naming the class at fault.

    Examples
    --------
    >>> class_sizes([3, 1], "here")
    array([3., 1.])
    """
    for k, size in enumerate(sizes):
        whole(size, where, f"the size of class {k}", least=0)
        if size == 0:
            raise ValueError(f"{where}: class {k} has no example (sizes = {list(sizes)}). Leave the class out.")
    if len(sizes) < 2:
        raise ValueError(f"{where}: {len(sizes)} class(es); geometry is between classes, so give the sizes of two or more.")
    return np.asarray(sizes, np.float64)


def decays(depth: int, weight_decay: Decay, feature_decay: float, where: str) -> np.ndarray:
    """λ_1 to λ_M and λ_H.

    Raises
    ------
    ValueError, TypeError
        Naming the decay at fault.

    Examples
    --------
    >>> decays(2, 0.1, 0.2, "here")
    array([0.1, 0.1, 0.2])
    """
    whole(depth, where, "depth")
    weights: list[float] = (np.full(depth, weight_decay) if np.ndim(weight_decay) == 0 else np.asarray(weight_decay)).tolist()
    if len(weights) != depth:
        raise ValueError(f"{where}: weight_decay has {len(weights)} numbers for depth = {depth}. Give one for each layer, or one for all.")
    names = [*(f"weight_decay of layer {i + 1}" for i in range(depth)), "feature_decay"]
    for name, number in zip(names, (*weights, feature_decay)):
        if not 0 < number < math.inf:
            raise ValueError(
                f"{where}: {name} = {number}. Give a positive, finite number: without decay everything is fitted by networks of any "
                "geometry, and features need not collapse."
            )
    return np.array([*weights, feature_decay], np.float64)
