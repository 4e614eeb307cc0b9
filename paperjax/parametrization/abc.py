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
    """A power of the fans: ``fan_in^-self.fan_in · fan_out^-self.fan_out · max(1, fan_in / fan_out)^-self.aspect``, over the base's.

    The first two count what grows alone, as ratios to the base; the aspect compares the two fans of one matrix, so it takes them
    whole (arXiv 2310.17813 writes ``min(1, sqrt(fan_out / fan_in))``, which is ``aspect=0.5``).

    Examples
    --------
    >>> Exponent(fan_in=1.0).factor((4, 2), base=(1, 1))
    0.25
    >>> Exponent(fan_in=1.0, fan_out=-1.0).factor((32, 64), base=(8, 16))
    1.0
    >>> Exponent(aspect=0.5).factor((64, 16), base=(16, 16))
    0.5
    """

    fan_in: float = 0.0
    fan_out: float = 0.0
    aspect: float = 0.0

    def factor(self, fans: tuple[float, float], base: tuple[float, float]) -> float:
        """The factor of a leaf of these fans (in, out), over that of the base's."""
        aspects = max(1.0, fans[0] / fans[1]) / max(1.0, base[0] / base[1])
        return (fans[0] / base[0]) ** -self.fan_in * (fans[1] / base[1]) ** -self.fan_out * aspects**-self.aspect

    def power(self, column: str) -> float:
        """The power of n in a column: the fan-out alone grows in the input column, the fan-in alone in the output column."""
        if column == "hidden":
            return self.fan_in + self.fan_out
        return self.fan_out if column == "input" else self.fan_in + self.aspect

    def plus(self, other: "Exponent", times: float = 1.0) -> "Exponent":
        """The exponent of the product with the other's factor to the power `times`."""
        return Exponent(*(a + times * b for a, b in zip(self, other)))


Power = int | float | Exponent
Triple = Sequence[Power]


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
        """``m^(2 alpha - 1)`` for SGD, ``m^(alpha - 1)`` for optimizers whose updates have a size of their own (Adam, Muon)."""
        if not self.learning_rate:
            return 1.0
        return depth_ratio ** (2 * self.alpha - 1 if rule == "sgd" else self.alpha - 1)

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
        Exponents of the weight decay itself under Adam-like optimizers, where the parametrization has a rule of its own; ``None`` keeps
        learning rate × decay.
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

    def shifted(self, theta: Sequence[int | float], name: str | None = None) -> "Parametrization":
        """Another form of the same parametrization: multipliers times ``n^-theta`` and the initialization times ``n^theta``.

        The function and its trajectory stay with ``(a, b, c) -> (a + theta, b - theta, c - 2 theta)`` for SGD and ``c - theta`` for
        Adam, whose eps goes with ``n^-theta``, and whose decay too where the parametrization has a rule of its own. Each optimizer's
        exponents are shifted by its own rule; one optimizer's rule breaks the other's trajectory.

        Parameters
        ----------
        theta
            Three numbers: input, hidden, output.
        name
            Of the result.

        Examples
        --------
        >>> ntp = abc("NTP", (0, 0.5, 0.5), (0, 0, 0), (0, 0, 0), (0, 0.5, 0.5))
        >>> moved = ntp.shifted((0, -0.5, -0.5))
        >>> [table["hidden"].power("hidden") for table in (moved.a, moved.b, moved.c["sgd"], moved.c["adam"])]
        [0.0, 0.5, 1.0, 1.0]
        """
        # A shift is a power of the column's own width: fan_out for the input column, fan_in for the others.
        moves = _column_wise(theta, "theta")

        def moved(table: Mapping[str, Exponent], times: float) -> dict[str, Exponent]:
            return {column: exponent.plus(moves[column], times) for column, exponent in table.items()}

        return dataclasses.replace(
            self,
            name=name or f"{self.name}, shifted by {tuple(theta)}",
            a=moved(self.a, 1),
            b=moved(self.b, -1),
            c={"sgd": moved(self.c["sgd"], -2), "adam": moved(self.c["adam"], -1)},
            eps=moved(self.eps, 1),
            decay=None if self.decay is None else moved(self.decay, 1),
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
    >>> ours.b["output"].factor((16, 10), base=(1, 10))
    0.125
    """
    tables = {key: _column_wise(value, key) for key, value in (("a", a), ("b", b), ("c_sgd", c_sgd), ("c_adam", c_adam))}
    if eps is None:
        a_input, a_hidden, a_output = (tables["a"][column] for column in COLUMNS)
        eps = (a_input.plus(Exponent(fan_out=1.0)), a_hidden.plus(Exponent(fan_out=1.0)), a_output)
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
