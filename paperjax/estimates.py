"""A measured number with its standard error over seeds."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def half_width(samples: int) -> float:
    """Half-width of the 95 % interval in standard errors: Student's t with ``samples - 1`` degrees of freedom.

    12.7 for 2 samples, 4.3 for 3, 2.4 for 8, 2.1 for 20, and 1.96 where their number is not known (0).

    Examples
    --------
    >>> round(half_width(8), 3), round(half_width(0), 3)
    (2.365, 1.96)
    """
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(samples - 1, 0.975) if samples else ndtri(0.975))


class Estimate(NamedTuple):
    """A measured value and its standard error over seeds (0 only for an exact quantity).

    Attributes
    ----------
    value, stderr
        Mean and standard error of the mean.
    samples
        How many independent samples the standard error is from; 0 if that is not known, or there are none.

    Examples
    --------
    >>> low, high = Estimate(2.0, 1.0, samples=2).interval
    >>> round(low, 2), round(high, 2)
    (-10.71, 14.71)
    """

    value: float
    stderr: float
    samples: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval ``value ± t stderr``, t as in `half_width`."""
        if math.isinf(self.stderr):
            return -math.inf, math.inf
        if self.stderr == 0 or math.isnan(self.stderr):
            return self.value, self.value
        half = half_width(self.samples) * self.stderr
        return self.value - half, self.value + half


def estimate(samples: ArrayLike) -> Estimate:
    """Mean of independent samples and its standard error, ``s / sqrt(n)`` with ``s² = sum (x - mean)² / (n - 1)``.

    Parameters
    ----------
    samples
        One number for each seed, shape ``(seeds,)``, at least two; computed in float64. A NaN makes the estimate NaN. If all
        are the same infinity (a threshold that is never reached), the estimate is that infinity, exactly; if only some are,
        its standard error is infinite and no claim about it is decided.

    Raises
    ------
    ValueError
        If there are fewer than two samples, or more than one dimension.

    Examples
    --------
    >>> estimate([1.0, 3.0])
    Estimate(value=2.0, stderr=1.0, samples=2)
    >>> estimate([float("inf"), float("inf")])
    Estimate(value=inf, stderr=0.0, samples=2)
    """
    x = np.asarray(samples, np.float64)
    if x.ndim != 1:
        raise ValueError(
            f"estimate: samples have shape {x.shape}; give one number for each seed: reduce or select along the other dimensions first."
        )
    if x.size < 2:
        raise ValueError(
            f"estimate: {x.size} sample(s) have no standard error; run two seeds or more. An exact quantity is Estimate(value, 0.0)."
        )
    if np.isnan(x).any():
        return Estimate(math.nan, math.nan)
    if np.isinf(x).any():
        some = sorted({float(v) for v in x[np.isinf(x)]})
        if len(some) > 1:
            return Estimate(math.nan, math.nan)
        return Estimate(some[0], 0.0 if np.isinf(x).all() else math.inf, x.size)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(x.size)), x.size)


def fit_slope(x: ArrayLike, y_samples: ArrayLike) -> Estimate:
    """Exponent of a power law: the least-squares slope of ``log y`` on ``log x``, fitted for each seed; mean and s.e. over seeds.

    Parameters
    ----------
    x
        At least four distinct positive sizes, shape ``(sizes,)``.
    y_samples
        Positive, shape ``(seeds, sizes)``, at least two seeds; for a Result, ``result.y.transpose("seed", "width")``. NaN or
        infinity in it makes the estimate NaN.

    Raises
    ------
    ValueError
        If there are too few sizes or seeds, shapes differ, or a number is not positive.

    Examples
    --------
    >>> width = np.array([64.0, 128.0, 256.0, 512.0])
    >>> slope = fit_slope(width, [3.0 / width, 5.0 / width])
    >>> round(slope.value, 6)
    -1.0
    """
    sizes, y = np.asarray(x, np.float64), np.asarray(y_samples, np.float64)
    if sizes.ndim != 1 or y.ndim != 2 or y.shape[1] != sizes.size:
        raise ValueError(f"fit_slope: x has shape {sizes.shape} and y {y.shape}; they must be (sizes,) and (seeds, sizes).")
    if len(np.unique(sizes)) < 4:
        raise ValueError(f"fit_slope: {len(np.unique(sizes))} distinct size(s); a law is fitted on at least 4.")
    if len(y) < 2:
        raise ValueError(f"fit_slope: {len(y)} seed(s); a slope needs at least 2 for its standard error.")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"fit_slope: x must be positive and finite to be fitted on a logarithmic scale, and is {sizes.tolist()}.")
    if (y <= 0).any():
        seed, size = np.argwhere(y <= 0)[0]
        raise ValueError(
            f"fit_slope: y = {y[seed, size]:g} for sample {seed} at x = {sizes[size]:g}; a power law is fitted to positive numbers. "
            "Leave that size out, or fit a quantity that stays positive."
        )
    if not np.isfinite(y).all():
        return Estimate(math.nan, math.nan)
    centred = np.log(sizes) - np.log(sizes).mean()
    return estimate(np.log(y) @ centred / (centred @ centred))
