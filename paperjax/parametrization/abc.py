"""The abc algebra of Tensor Programs IV (arXiv 2011.14522): a parametrization is exponents of the width, as data.

A weight is ``W = n^-a w`` with ``w ~ N(0, n^-2b)`` at the start and the learning rate ``lr n^-c``, one triple of numbers for each
column: input, hidden, output. Everything is relative to a base width: n is width over base width, so that at the base every factor is 1.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLUMNS = ("input", "hidden", "output")
# Biases, gains and embeddings follow the input column; a leaf without an infinite axis follows none.
COLUMN_OF = {"input": "input", "vector": "input", "embedding": "input", "hidden": "hidden", "output": "output"}


class Exponent(NamedTuple):
    """A power of the fans: the factor is ``fan_in^-fan_in_power · fan_out^-fan_out_power``, the fans as ratios to the base's.

    Examples
    --------
    >>> Exponent(fan_in=1.0).factor(4.0, 2.0)
    0.25
    >>> Exponent(fan_in=1.0, fan_out=-1.0).factor(4.0, 4.0)
    1.0
    """

    fan_in: float = 0.0
    fan_out: float = 0.0

    def factor(self, fan_in: float, fan_out: float) -> float:
        """``fan_in^-self.fan_in · fan_out^-self.fan_out``."""
        return fan_in**-self.fan_in * fan_out**-self.fan_out

    @property
    def total(self) -> float:
        """The power of n where both fans grow as n."""
        return self.fan_in + self.fan_out

    def __neg__(self) -> "Exponent":
        return Exponent(-self.fan_in, -self.fan_out)


Power = int | float | Exponent
Triple = tuple[Power, Power, Power]


@dataclasses.dataclass(frozen=True)
class Depth:
    """How a residual network scales with its depth: ``x + m^-alpha f(x)``, m the ratio of depths.

    In the branch the learning rate is times ``m^(alpha - 1)`` for Adam-like optimizers and ``m^(2 alpha - 1)`` for SGD, and Adam's eps
    times ``m^-alpha``; the initialization knows no depth.

    Attributes
    ----------
    alpha
        1/2 for Depth-muP (arXiv 2310.02244), 1 for CompleteP (arXiv 2505.01618).
    learning_rate
        Whether the learning rate is scaled too; `False` for a multiplier alone.
    """

    alpha: float
    learning_rate: bool = True

    def multiplier(self, depth_ratio: float) -> float:
        """``m^-alpha``."""
        return depth_ratio**-self.alpha

    def learning_rate_factor(self, depth_ratio: float, rule: str) -> float:
        """``m^(alpha - 1)`` for Adam, ``m^(2 alpha - 1)`` for SGD."""
        if not self.learning_rate:
            return 1.0
        return depth_ratio ** (self.alpha - 1 if rule == "adam" else 2 * self.alpha - 1)

    def eps_factor(self, depth_ratio: float) -> float:
        """``m^-alpha``."""
        return depth_ratio**-self.alpha


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """Exponents of width for every column, and of depth; build one with `abc`.

    Attributes
    ----------
    name
        What tables and plans call it.
    a, b
        Multiplier and initialization, ``{column: Exponent}``.
    c
        Learning rate, ``{"sgd": {column: Exponent}, "adam": {column: Exponent}}``.
    eps
        Adam's eps, as the size of a gradient: ``{column: Exponent}``.
    decay
        Exponents of the weight decay itself, where the parametrization has a rule of its own; ``None`` keeps learning rate × decay.
    no_decay
        Columns that are not decayed at all.
    depth
        Residual branches; ``None`` leaves them alone.
    attention
        Power of the width of a head that logits are divided by, where it grows; ``None`` leaves the model's own.
    source
        Paper and table.
    """

    name: str
    a: Mapping[str, Exponent]
    b: Mapping[str, Exponent]
    c: Mapping[str, Mapping[str, Exponent]]
    eps: Mapping[str, Exponent]
    decay: Mapping[str, Exponent] | None = None
    no_decay: tuple[str, ...] = ()
    depth: Depth | None = None
    attention: float | None = None
    source: str = ""

    def __hash__(self) -> int:
        return hash(repr(self))

    def with_depth(self, alpha: float, name: str | None = None, learning_rate: bool = True, source: str = "") -> "Parametrization":
        """The same in width, with residual branches times ``m^-alpha``; see `Depth`."""
        return dataclasses.replace(self, name=name or self.name, depth=Depth(alpha, learning_rate), source=source or self.source)

    def shifted(self, theta: Sequence[int | float], rule: str, name: str | None = None) -> "Parametrization":
        """Another form of the same parametrization: multipliers times ``n^-theta`` and the initialization times ``n^theta``.

        The function and its trajectory stay if ``(a, b, c) -> (a + theta, b - theta, c - 2 theta)`` for SGD and ``c - theta`` for Adam
        (eps times ``n^-theta``); one optimizer's rule breaks the other's, so `rule` says for which the result holds. The other's
        exponents are shifted by their own rule.

        Examples
        --------
        >>> ntp = abc("NTP", (0, 0.5, 0.5), (0, 0, 0), (0, 0, 0), (0, 0.5, 0.5))
        >>> moved = ntp.shifted((0, -0.5, -0.5), "sgd")
        >>> [moved.a["hidden"].total, moved.b["hidden"].total, moved.c["sgd"]["hidden"].total, moved.c["adam"]["hidden"].total]
        [0.0, 0.5, 1.0, 1.0]
        """
        if rule not in self.c:
            raise ValueError(f"rule = {rule!r}: it must be 'sgd' or 'adam'.")
        # A shift is a power of the column's own width: fan_out for the input column, fan_in for the others.
        moves = {column: _exponent(t, column) for column, t in zip(COLUMNS, theta)}

        def plus(table: Mapping[str, Exponent], times: float) -> dict[str, Exponent]:
            return {k: Exponent(v.fan_in + times * moves[k].fan_in, v.fan_out + times * moves[k].fan_out) for k, v in table.items()}

        return dataclasses.replace(
            self,
            name=name or f"{self.name}, shifted by {tuple(theta)}",
            a=plus(self.a, 1),
            b=plus(self.b, -1),
            c={"sgd": plus(self.c["sgd"], -2), "adam": plus(self.c["adam"], -1)},
            eps=plus(self.eps, 1),
        )


def _exponent(value: Power, column: str) -> Exponent:
    if isinstance(value, Exponent):
        return value
    return Exponent(fan_out=float(value)) if column == "input" else Exponent(fan_in=float(value))


def _column_wise(triple: Any, name: str) -> dict[str, Exponent]:
    if len(triple) != 3:
        raise ValueError(f"{name} = {triple!r}: three exponents are needed, for input, hidden and output.")
    for value in triple:
        if not all(math.isfinite(v) for v in (value if isinstance(value, Exponent) else (value,))):
            raise ValueError(f"{name} = {triple!r}: exponents must be finite numbers.")
    return {column: _exponent(value, column) for column, value in zip(COLUMNS, triple)}


def abc(
    name: str,
    a: Triple,
    b: Triple,
    c_sgd: Triple,
    c_adam: Triple,
    eps: Triple | None = None,
    decay: Triple | None = None,
    no_decay: tuple[str, ...] = (),
    depth: Depth | None = None,
    attention: float | None = None,
    source: str = "",
) -> Parametrization:
    """Build a parametrization from its exponents, each a triple (input, hidden, output).

    ``W = n^-a w``, ``std of w = n^-b``, learning rate ``n^-c``. For the input column n is the fan-out, for the others the fan-in; an
    `Exponent` names the powers of both.

    Parameters
    ----------
    name
        What tables call it.
    a, b, c_sgd, c_adam
        The exponents.
    eps
        Adam's eps is times ``n^-eps``. By default that of the gradient in a network whose outputs' gradients are of order 1/n (muP).
    decay, no_decay, depth, attention, source
        See `Parametrization`.

    Returns
    -------
    Parametrization

    Raises
    ------
    ValueError
        If a triple has another length, or a number is not finite.

    Examples
    --------
    >>> ours = abc("half way", a=(0, 0, 0), b=(0, 0.5, 0.75), c_sgd=(-0.5, 0, 0.5), c_adam=(0, 0.75, 0.75))
    >>> ours.b["output"].factor(16.0, 1.0)
    0.125
    """
    tables = {key: _column_wise(value, key) for key, value in (("a", a), ("b", b), ("c_sgd", c_sgd), ("c_adam", c_adam))}
    if eps is None:
        eps = (1 + tables["a"]["input"].total, Exponent(fan_in=tables["a"]["hidden"].total, fan_out=1), tables["a"]["output"].total)
    return Parametrization(
        name,
        tables["a"],
        tables["b"],
        {"sgd": tables["c_sgd"], "adam": tables["c_adam"]},
        _column_wise(eps, "eps"),
        None if decay is None else _column_wise(decay, "decay"),
        tuple(no_decay),
        depth,
        attention,
        source,
    )
