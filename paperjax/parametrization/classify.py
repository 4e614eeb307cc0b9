"""Tensor Programs IV's classification: what a parametrization becomes as the width goes to infinity."""

import math
from typing import Any, NamedTuple

from paperjax.parametrization.abc import COLUMNS, Parametrization, abc
from paperjax.parametrization.factors import rule_of


class Condition(NamedTuple):
    """One line of the theorem: ``value`` against ``bound``, which is to be met with equality or from above."""

    name: str
    value: float
    bound: float
    equality: bool

    @property
    def holds(self) -> bool:
        """Whether the line is satisfied."""
        return self.tight if self.equality else self.value > self.bound or self.tight

    @property
    def tight(self) -> bool:
        """Whether value and bound are the same (exponents are sums of a few decimal numbers)."""
        return math.isclose(self.value, self.bound, abs_tol=1e-9)

    def __str__(self) -> str:
        return f"{self.name} = {self.value:g}, and it must be {'' if self.equality else 'at least '}{self.bound:g}"


class Classification(NamedTuple):
    """What the theorem says.

    Attributes
    ----------
    regime
        ``"unstable"`` (something diverges with the width), ``"trivial"`` (the function does not move), ``"kernel"`` (r > 0: it moves
        and the features do not) or ``"feature learning"`` (r = 0).
    r
        Features of the last hidden layer move by ``n^-r``.
    why
        The condition that decided.
    conditions
        All of them.
    faithful
        Adam: whether its eps is no larger than the gradient as n grows, so that updates keep a size of their own; ``None`` for SGD, and
        where no eps was given.
    """

    regime: str
    r: float
    why: str
    conditions: tuple[Condition, ...]
    faithful: bool | None


def classify(scheme: Parametrization | Any, hidden_layers: int, optimizer: Any = "sgd") -> Classification:
    """Classify an abc parametrization of a multilayer perceptron: unstable, trivial, kernel, or feature learning.

    With L hidden layers, ``W^l = n^-a_l w^l``, ``w^l ~ N(0, n^-2b_l)`` and learning rate ``n^-c_l`` of layer l, the features move by
    ``n^-r``, where for SGD

        ``r = min(a_{L+1} + b_{L+1}, 2 a_{L+1} + c_{L+1}) - 1 + min_{l <= L} [2 a_l + c_l + 1(l = 1)]``.

    Stable iff ``a_1 + b_1 = 0``, ``a_l + b_l = 1/2`` (2 <= l <= L), ``a_{L+1} + b_{L+1} >= 1/2``, ``r >= 0``,
    ``2 a_{L+1} + c_{L+1} >= 1`` and ``a_{L+1} + b_{L+1} + r >= 1``. Nontrivial iff one of the last two is an equality. Feature learning
    iff ``r = 0``, kernel iff ``r > 0``.

    Parameters
    ----------
    scheme
        A `Parametrization`, or three entries ``(a, b, c)``, each of the first two a triple (input, hidden, output) and c a triple or
        one number for all layers, for the optimizer asked for.
    hidden_layers
        L, at least 1. With L = 1 no matrix is hidden, and the hidden column plays no part.
    optimizer
        What `plan` takes: SGD's rule, or Adam's (and Muon's, whose plan is the translation of Adam's).

    Returns
    -------
    Classification

    Raises
    ------
    ValueError
        If there is no hidden layer, or the optimizer is of unknown family.

    Notes
    -----
    The paper's theorem has one c. A c of each layer's own is the same theorem: ``(a_l, b_l, c_l) -> (a_l + t, b_l - t, c_l - 2t)``
    keeps the trajectory, so ``t = (c_l - c) / 2`` in every layer brings all to a common c; the theorem then reads as above, because it
    speaks of ``a_l + b_l`` and ``2 a_l + c_l`` alone, which no shift changes.

    For Adam-like optimizers the entries of an update are of order 1 whatever the gradient, so a layer's features move by
    ``n^-(a_l + c_l)`` times the fan-in: ``r = min_{l <= L} [a_l + c_l + 1(l = 1)] - 1``, and ``2 a_{L+1} + c_{L+1}`` becomes
    ``a_{L+1} + c_{L+1}``; all else stays. This is derived from the scaling of the updates and agrees with the dichotomy of Tensor
    Programs IVb (arXiv 2308.01814); it holds for a faithful eps.

    References
    ----------
    Tensor Programs IV, arXiv 2011.14522, Section 3: r, stability, nontriviality and the dynamical dichotomy.

    Examples
    --------
    >>> import paperjax as pj
    >>> sp = ((0, 0, 0), (0, 0.5, 0.5))
    >>> classify((*sp, 0), 2).regime
    'unstable'
    >>> classify((*sp, 1), 2)[:2], classify(pj.ntp, 2)[:2]
    (('kernel', 0.5), ('kernel', 0.5))
    >>> classify(pj.mup, 2)[:2], classify(pj.mup, 5, "adam")[:2]
    (('feature learning', 0.0), ('feature learning', 0.0))
    >>> mean_field = ((0, 0, 1), (0, 0, 0), -1)
    >>> classify(mean_field, 1).regime
    'feature learning'
    >>> classify(pj.standard_full_align, 3).why
    'a + b of the output + r = 0.5, and it must be at least 1'
    """
    if not isinstance(hidden_layers, int) or hidden_layers < 1:
        raise ValueError(f"hidden_layers = {hidden_layers!r}: the theorem needs at least one hidden layer; it counts layers, not matrices.")
    rule = "sgd" if rule_of(optimizer) == "sgd" else "adam"
    if not isinstance(scheme, Parametrization):
        a, b, c = scheme
        c = (c, c, c) if isinstance(c, (int, float)) else tuple(c)
        scheme, told_eps = abc("abc", a, b, c, c), False
    else:
        told_eps = True
    a, b, c, eps = (
        {column: table[column].power(column) for column in COLUMNS} for table in (scheme.a, scheme.b, scheme.c[rule], scheme.eps)
    )
    inner = ("input", "hidden")[: min(hidden_layers, 2)]
    times_a = 2 if rule == "sgd" else 1
    start = a["output"] + b["output"]
    moved = times_a * a["output"] + c["output"]
    # The gradient at the last features is the readout: what it starts with, or what its updates add up to.
    gradient = min(start, moved)
    r = min(times_a * a[k] + c[k] + (k == "input") for k in inner) - 1 + (gradient if rule == "sgd" else 0.0) + 0.0
    term = "2a + c" if rule == "sgd" else "a + c"
    conditions = (
        *(Condition(f"a + b of the {k}", a[k] + b[k], 0.0 if k == "input" else 0.5, True) for k in inner),
        Condition("a + b of the output", start, 0.5, False),
        Condition("r", r, 0.0, False),
        Condition(f"{term} of the output", moved, 1.0, False),
        Condition("a + b of the output + r", start + r, 1.0, False),
    )
    faithful = None
    if rule == "adam" and told_eps:
        sizes = {k: a[k] + gradient for k in inner} | {"output": a["output"]}
        faithful = all(eps[k] > size - 1e-9 for k, size in sizes.items())
    broken = [condition for condition in conditions if not condition.holds]
    if broken:
        return Classification("unstable", r, str(broken[0]), conditions, faithful)
    if not any(condition.tight for condition in conditions[-2:]):
        why = f"{term} of the output = {moved:g} and a + b of the output + r = {start + r:g} are both above 1"
        return Classification("trivial", r, why, conditions, faithful)
    if Condition("r", r, 0.0, True).holds:
        return Classification("feature learning", 0.0, "r = 0", conditions, faithful)
    return Classification("kernel", r, f"r = {r:g}, above 0", conditions, faithful)
