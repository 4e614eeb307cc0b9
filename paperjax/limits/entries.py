"""What is known of the entries of an array in the jaxpr of ``init``: the law of each, and which draws they were made of."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from paperjax.limits.keys import Key, Sources, share


class Number(NamedTuple):
    """All entries equal one number."""

    value: float


class Given(NamedTuple):
    """Numbers without randomness that are not, or not known to be, equal; `array` computes them where they are few.

    `steps` are the scans in which they differ by the step.
    """

    id: int
    array: Callable[[], Any] | None = None
    steps: frozenset[int] = frozenset()


class Unread(NamedTuple):
    """Not followed: by which primitive, and why."""

    why: str


@dataclasses.dataclass(frozen=True)
class Bits:
    """Random bits on their way to a uniform number, followed for a few patterns."""

    points: np.ndarray
    variable: int
    sources: Sources
    repeated: bool = False


@dataclasses.dataclass(frozen=True)
class Draw:
    """Entries ``shift + scale · B``, B uniform on (0, 1), standard normal, or that cut at `low` and `high`."""

    base: str
    variable: int
    sources: Sources
    scale: float = 1.0
    shift: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    repeated: bool = False

    @property
    def grid(self) -> tuple[Any, ...]:
        """Of two functions of one variable: whether their nodes are the same."""
        return self.base, self.low, self.high

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of an entry."""
        mean, variance = base_moments(*self.grid)
        return self.shift + self.scale * mean, self.scale**2 * variance

    @property
    def support(self) -> tuple[float, float]:
        """Between what numbers the entries lie."""
        low, high = (0.0, 1.0) if self.base == "uniform" else (self.low, self.high)
        ends = (self.shift + self.scale * low, self.shift + self.scale * high)
        return min(ends), max(ends)

    def below(self, number: float) -> float:
        """The probability that an entry is below a number."""
        at = (number - self.shift) / self.scale
        if self.base == "uniform":
            under = min(max(at, 0.0), 1.0)
        else:
            at = min(max(at, self.low), self.high)
            under = float((special.ndtr(at) - special.ndtr(self.low)) / (special.ndtr(self.high) - special.ndtr(self.low)))
        return under if self.scale > 0 else 1 - under

    def __str__(self) -> str:
        mean, variance = self.moments
        low, high = self.support
        if self.base == "uniform":
            return f"uniform on ({low:.6g}, {high:.6g})"
        if self.base == "normal":
            return f"normal of variance {variance:.6g}" + (f" and mean {mean:.6g}" if mean else "")
        return f"normal of std {abs(self.scale):.6g} cut at {low:.6g} and {high:.6g}"


@dataclasses.dataclass(frozen=True)
class Function:
    """Entries that are a function of one variable: its values at nodes, and their weights."""

    values: np.ndarray
    weights: np.ndarray
    variable: int
    grid: tuple[Any, ...]
    sources: Sources
    repeated: bool = False

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of an entry."""
        values = np.asarray(self.values, np.float64)
        mean = float(self.weights @ values)
        return mean, float(self.weights @ (values - mean) ** 2)

    def __str__(self) -> str:
        if self.grid[0] == "two":
            atoms = sorted(zip(np.asarray(self.values, np.float64).tolist(), self.weights.tolist()))
            return "the values " + " and ".join(f"{value:.6g} (probability {weight:.6g})" for value, weight in atoms)
        return f"a function of a {self.grid[0].replace('_', ' ')} draw, moments by quadrature"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Independent entries of which moments are known: sums and products of draws, and arrays whose parts have laws of their own."""

    mean: float
    variance: float
    what: str
    sources: Sources
    repeated: bool = False

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of an entry."""
        return self.mean, self.variance

    def __str__(self) -> str:
        return self.what


@dataclasses.dataclass(frozen=True)
class Haar:
    """`gain` times matrices with orthonormal columns (or rows) and no preferred direction; `rows` is the longer side."""

    gain: float
    rows: int
    sources: Sources
    repeated: bool = False

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of an entry: the columns have norm `gain`."""
        return 0.0, self.gain**2 / self.rows

    def __str__(self) -> str:
        return f"orthogonal of gain {self.gain:.6g} and longer side {self.rows}"


class Triangle(NamedTuple):
    """What a QR decomposition returns besides Q, or its diagonal; the signs of that once `signs`."""

    signs: bool = False


Random = Draw | Function | Mixed | Haar
Value = Key | Number | Given | Unread | Bits | Draw | Function | Mixed | Haar | Triangle


def base_moments(base: str, low: float, high: float) -> tuple[float, float]:
    """Mean and variance of the base of a `Draw`.

    With ``Z = Phi(b) - Phi(a)`` those of a standard normal cut at a and b are ``m = (phi(a) - phi(b)) / Z`` and
    ``1 + (a phi(a) - b phi(b)) / Z - m²``.

    Examples
    --------
    >>> base_moments("uniform", 0.0, 1.0)
    (0.5, 0.08333333333333333)
    """
    if base == "uniform":
        return 0.5, 1 / 12
    if base == "normal":
        return 0.0, 1.0
    mass = float(special.ndtr(high) - special.ndtr(low))

    def density(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    def edge(z: float) -> float:
        return 0.0 if math.isinf(z) else z * density(z)

    mean = (density(low) - density(high)) / mass
    return mean, 1 + (edge(low) - edge(high)) / mass - mean**2


@functools.lru_cache(64)
def nodes(base: str, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes of the base of a `Draw`, panel by panel, and their probabilities; a uniform's panels narrow to its ends.

    Examples
    --------
    >>> z, weights = nodes("normal", -np.inf, np.inf)
    >>> round(float(weights @ z**4), 10)
    3.0
    """
    if base == "uniform":
        towards = 2.0 ** -np.arange(40.0, 0.0, -1.0)
        edges = np.unique(np.concatenate([np.linspace(0.0, 1.0, 1025), towards, 1 - towards]))
    else:
        edges = np.linspace(max(low, -10.0), min(high, 10.0), 1601)
    at, weight = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges)[:, None] / 2
    points = (edges[:-1, None] + half + half * at[None, :]).ravel()
    weights = (half * weight[None, :]).ravel()
    if base != "uniform":
        weights = weights * np.exp(-(points**2) / 2)
    return points, weights / weights.sum()


def function_of(value: Draw | Function) -> Function:
    """A draw as values on the nodes of its base."""
    if isinstance(value, Function):
        return value
    points, weights = nodes(*value.grid)
    return Function(value.shift + value.scale * points, weights, value.variable, value.grid, value.sources, value.repeated)


def mixture(parts: Sequence[tuple[Value, int]], new: Callable[[], int], name: str) -> Value | None:
    """An array in parts of so many entries each, one of them random; `None` if none is."""
    parts = [part for part in parts if part[1] > 0]
    values = [value for value, _ in parts]
    if not any(isinstance(value, Random) for value in values):
        return None
    wrong = next((value for value in values if not isinstance(value, Random | Number)), None)
    if wrong is not None:
        return wrong if isinstance(wrong, Unread) else Unread(f"{name} of random and unequal given numbers")
    sources: Sources = frozenset()
    twice, here = False, ("in an array", new())
    for value in values:
        if isinstance(value, Random):
            twice = twice or value.repeated or share(sources, value.sources)
            sources |= value.sources
    sources = frozenset(source.moved(here) for source in sources)
    if alike(values):
        first = values[0]
        if isinstance(first, Draw):
            return dataclasses.replace(first, variable=new(), sources=sources, repeated=twice)
        if isinstance(first, Haar):
            return dataclasses.replace(first, sources=sources, repeated=twice)
        if isinstance(first, Random):
            return Mixed(*first.moments, str(first), sources, twice)
    sizes = np.array([size for _, size in parts], np.float64)
    moments = np.array(
        [(value.value, 0.0) if isinstance(value, Number) else value.moments for value in values if isinstance(value, Random | Number)]
    )
    weights = sizes / sizes.sum()
    mean = float(weights @ moments[:, 0])
    variance = float(weights @ (moments[:, 1] + (moments[:, 0] - mean) ** 2))
    told = dict.fromkeys(f"{value.value:.6g}" if isinstance(value, Number) else str(value) for value in values)
    return Mixed(mean, variance, f"parts with laws of their own: {'; '.join(told)}", sources, twice)


def alike(values: Sequence[Value]) -> bool:
    """Whether all have one law."""
    first = values[0]
    return all(
        type(value) is type(first)
        and str(value) == str(first)
        and isinstance(value, Random)
        and isinstance(first, Random)
        and np.allclose(value.moments, first.moments, rtol=1e-12, atol=0.0)
        for value in values
    )
