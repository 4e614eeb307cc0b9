"""Learning-rate transfer: where the best learning rate lies, against width or depth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from paperjax.experiment import Experiment
from paperjax.grid import grid
from paperjax.parametrization import Parametrization
from paperjax.studies.coordinates import first_examples
from paperjax.studies.scaled import scaled
from paperjax.studies.show import transfer_figure, transfer_table

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

# The final loss is the mean over this many measurements, evenly spaced over the last tenth of training.
FINAL_POINTS = 5


class Optimum(NamedTuple):
    """The best learning rate of one size.

    Attributes
    ----------
    size
        Width or depth.
    log2_lr, low, high
        Interpolated argmin of the loss in log2 of the learning rate, and its 95 % bootstrap interval over seeds.
    loss
        Mean final loss at the grid's best learning rate.
    interpolated
        Whether a parabola was used: not where a neighbour in the grid diverged. The interval then covers half a grid step at least.
    """

    size: int
    log2_lr: float
    low: float
    high: float
    loss: float
    interpolated: bool


class EdgeError(ValueError):
    """The best learning rate of some size is the grid's first or last, so its argmin is not known; ``result`` keeps the losses."""

    def __init__(self, message: str, result: "xarray.Dataset"):
        super().__init__(message)
        self.result = result


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """What `transfer` found.

    Attributes
    ----------
    axis, parametrization, optimizer, learning_rates
        What was compared; learning rates are those of the base.
    losses
        Final training losses, dimensions (size, lr, seed); infinite where training diverged.
    optima
        By size.
    drift, drift_interval
        Least-squares slope of the optimum's log2 on the size's log2: by how many doublings the best learning rate moves when the size
        doubles (-1 is a best learning rate proportional to 1 / size), with its 95 % bootstrap interval over seeds.
    start_loss
        Mean loss before training, over sizes and seeds.
    result
        The Result of the Experiment.
    """

    axis: str
    parametrization: str
    optimizer: str
    learning_rates: tuple[float, ...]
    losses: "xarray.DataArray"
    optima: tuple[Optimum, ...]
    drift: float
    drift_interval: tuple[float, float]
    start_loss: float
    result: "xarray.Dataset"

    def table(self) -> list[Optimum]:
        """The optima, one row for each size: ``pandas.DataFrame(found.table())``."""
        return list(self.optima)

    def plot(self) -> "Figure":
        """Loss against learning rate, one curve for each size, the optimum marked with its interval."""
        return transfer_figure(self)

    def __str__(self) -> str:
        return transfer_table(self)


def transfer(
    family: Any,
    parametrization: Parametrization | None,
    data: Any,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    learning_rates: Sequence[float] = tuple(2.0**-k for k in range(12, 2, -1)),
    seeds: int | Sequence[int] = 4,
    steps: int = 100,
    optimizer: Any = "adam",
    loss: Any = "mse",
    batch: int | None = None,
    base: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    checkpoint: Any = None,
    **sizes: Any,
) -> Transfer:
    """Train networks of several widths (or depths) over a grid of learning rates and find how far the best one moves.

    The loss of a setting is the mean training loss (on all examples) over five measurements in the last tenth of training. The optimum
    of a size is the vertex of the parabola through the three points around the minimum of ``log(mean loss over seeds)`` against
    ``log2(learning rate)``; its interval and that of the drift are percentiles of 1,000 bootstrap samples of the seeds.

    Parameters
    ----------
    family, parametrization, optimizer, settings, loss, base, progress
        As in `coord_check`; ``parametrization=None`` is the model as it is.
    data
        A `Dataset` or a pair ``(x, y)``; all its training examples are used.
    widths, depths
        Values of the size that varies, one of the two; at least two.
    learning_rates
        At the base, evenly spaced in their logarithm; `pj.logspace`. All of them and all seeds of a size are one compiled program.
    seeds
        How many, or which; at least two. With fewer than about five a percentile interval is too narrow: read it as a hint.
    steps, batch
        Updates, and minibatch size; ``None`` for full batches.
    checkpoint
        Folder, to go on where a killed run stopped.
    **sizes
        Sizes that stay the same.

    Returns
    -------
    Transfer

    Raises
    ------
    EdgeError
        A ValueError: the best learning rate of a size is at the edge of the grid. Its message names size and edge, its ``result`` is
        the Result, so that nothing measured is lost.
    ValueError
        If a size, the base or the optimizer does not fit; if the grid has fewer than four learning rates; if a size diverged at all.

    Notes
    -----
    With full batches and SGD use MSE: with cross-entropy on an easy task every parametrization looks alike. A flat coordinate check
    does not prove transfer, nor the other way round.

    References
    ----------
    Yang et al., Tensor Programs V, arXiv 2203.03466, Figures 1 and 3.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, paperjax as pj
    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> family = lambda width: pj.models.linear_net(width, depth=1, outputs=1)
    >>> found = transfer(family, pj.mup, (x, x[:, :1]), widths=[8, 16], optimizer="sgd", learning_rates=pj.logspace(-3, 0, 4),
    ...                  seeds=2, steps=5)
    >>> [o.size for o in found.optima]
    [8, 16]
    """
    rates = tuple(sorted(float(r) for r in learning_rates))
    if len(rates) < 4:
        raise ValueError(f"transfer: {len(rates)} learning rates; a minimum needs points on both sides: give at least 4.")
    gaps = np.diff(np.log2(rates))
    if not np.allclose(gaps, gaps.mean(), rtol=1e-3):
        raise ValueError("transfer: learning_rates must be evenly spaced in their logarithm: pj.logspace(-4, 0, 9).")
    if steps < 1:
        raise ValueError(f"transfer: steps = {steps}; at least one update is needed.")
    chosen = grid(seed=seeds if isinstance(seeds, int) else list(seeds)).axes["seed"]
    if len(chosen) < 2:
        raise ValueError(f"transfer: {len(chosen)} seed; an interval over seeds needs at least 2.")
    examples = first_examples(data, None)
    s = scaled(family, parametrization, examples.x_train, widths, depths, optimizer, base, sizes, settings or {}, 2, "transfer")
    final = sorted({round(t) for t in np.linspace(steps - steps // 10, steps, FINAL_POINTS)})
    experiment = Experiment(
        s.network(),
        examples,
        loss=loss,
        optimizer=s.factory(),
        grid=grid(**{s.axis: list(s.sizes)}, learning_rate=list(rates), seed=list(chosen)),
        steps=steps,
        batch=batch,
        measure_at=sorted({0, *final}),
        checkpoint=checkpoint,
    )
    result = experiment.run(progress=progress).rename(learning_rate="lr")
    losses = result["train_loss"].sel(step=final).mean("step", skipna=False)
    losses = losses.where(np.isfinite(losses), np.inf)
    values = losses.transpose(s.axis, "lr", "seed").to_numpy().astype(np.float64)
    _refuse_edges(values, s.axis, s.sizes, rates, result)
    optima, drift, interval = optimum_drift(values, s.sizes, rates)
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "optimizer")
    start = float(result["train_loss"].sel(step=0).mean())
    return Transfer(s.axis, s.parametrization, name, rates, losses, optima, drift, interval, start, result)


def optimum_drift(
    losses: Float[np.ndarray, "sizes rates seeds"],
    sizes: Sequence[int],
    rates: Sequence[float] | Float[np.ndarray, " rates"],
    samples: int = 1000,
) -> tuple[tuple[Optimum, ...], float, tuple[float, float]]:
    """Optima by size, the drift of their log2 per doubling of the size, and its interval; float64.

    Parameters
    ----------
    losses
        Final losses, infinite where training diverged; ``(sizes, rates, seeds)``.
    sizes, rates
        Increasing; rates evenly spaced in their logarithm.
    samples
        Bootstrap samples of the seeds: the same seeds for all learning rates and sizes of a sample, for they share their keys.

    Examples
    --------
    >>> rates = 2.0 ** np.arange(-6, 1)
    >>> best = np.array([-2.0, -3.0])
    >>> losses = np.exp((np.log2(rates)[None, :, None] - best[:, None, None]) ** 2) * np.ones((1, 1, 3))
    >>> optima, drift, _ = optimum_drift(losses, [64, 128], rates)
    >>> [round(o.log2_lr, 6) for o in optima], round(drift, 6)
    ([-2.0, -3.0], -1.0)
    """
    at, n = np.log2(np.asarray(rates, float)), losses.shape[2]
    log_sizes = np.log2(np.asarray(sizes, float))
    centred = (log_sizes - log_sizes.mean()) / np.sum((log_sizes - log_sizes.mean()) ** 2)
    half = (at[1] - at[0]) / 2
    # The bootstrap's own randomness is fixed: the same losses have the same intervals.
    drawn = np.random.default_rng(0).integers(n, size=(samples, n))
    argmins = np.array([[_argmin(at, sample)[0] for sample in size[:, drawn].mean(axis=2).T] for size in losses])
    optima = []
    for size, value, resampled in zip(sizes, losses, argmins):
        best, exact = _argmin(at, value.mean(axis=1))
        low, high = (float(q) for q in np.quantile(resampled, (0.025, 0.975)))
        if not exact:
            low, high = min(low, best - half), max(high, best + half)
        optima.append(Optimum(size, best, min(low, best), max(high, best), float(value.mean(axis=1).min()), exact))
    drift = float(centred @ np.array([o.log2_lr for o in optima]))
    low, high = (float(q) for q in np.quantile(centred @ argmins, (0.025, 0.975)))
    return tuple(optima), drift, (min(low, drift), max(high, drift))


def best_learning_rates(
    losses: Float[np.ndarray, "seeds sizes rates"], rates: Sequence[float] | Float[np.ndarray, " rates"]
) -> Float[np.ndarray, "seeds sizes"]:
    """The best learning rate for each seed and size: the vertex of the parabola in log loss through the three points around the minimum.

    Parameters
    ----------
    losses
        Positive, infinite where training diverged; ``(seeds, sizes, rates)``.
    rates
        Increasing, evenly spaced in their logarithm.

    Returns
    -------
    array
        ``(seeds, sizes)``; NaN where the minimum is at the edge of the grid, since what lies beyond is not known.

    Examples
    --------
    >>> rates = 2.0 ** np.arange(-4, 1)
    >>> best_learning_rates(np.exp((np.log2(rates) + 1.8) ** 2)[None, None, :], rates).round(4).tolist(), round(2**-1.8, 4)
    ([[0.2872]], 0.2872)
    >>> best_learning_rates(rates[None, None, :], rates)
    array([[nan]])
    """
    at = np.log2(np.asarray(rates, float))

    def best(row: np.ndarray) -> float:
        return math.nan if int(np.argmin(row)) in (0, len(at) - 1) else 2.0 ** _argmin(at, row)[0]

    return np.array([[best(row) for row in seed] for seed in np.asarray(losses, float)])


def _argmin(at: np.ndarray, losses: np.ndarray) -> tuple[float, bool]:
    """The vertex of the parabola in log loss through the three points around the minimum; the point itself where there is none."""
    k = int(np.argmin(losses))
    if k in (0, len(at) - 1) or not np.isfinite(losses[k - 1 : k + 2]).all() or losses[k] <= 0:
        return float(at[k]), False
    left, middle, right = np.log(losses[k - 1 : k + 2])
    bend = left - 2 * middle + right
    return float(at[k] + (at[k + 1] - at[k]) * (0.5 * (left - right) / bend if bend > 0 else 0.0)), bool(bend > 0)


def _refuse_edges(values: np.ndarray, axis: str, sizes: Sequence[int], rates: Sequence[float], result: "xarray.Dataset") -> None:
    means = values.mean(axis=2)
    lost = [n for n, row in zip(sizes, means) if not np.isfinite(row).any()]
    if lost:
        raise ValueError(
            f"transfer: {axis} {', '.join(map(str, lost))} diverged for some seed at every learning rate, from {rates[0]:.3g} to "
            f"{rates[-1]:.3g}: use smaller ones."
        )
    best = means.argmin(axis=1)
    low = [str(n) for n, k in zip(sizes, best) if k == 0]
    high = [str(n) for n, k in zip(sizes, best) if k == len(rates) - 1]
    parts = [f"the lower edge {rates[0]:.3g} at {axis} {', '.join(low)}"] if low else []
    parts += [f"the upper edge {rates[-1]:.3g} at {axis} {', '.join(high)}"] if high else []
    if parts:
        where = " and ".join(parts)
        raise EdgeError(
            f"transfer: the best learning rate is on {where}, so where it lies is not known. Widen the grid on that side. "
            "What was measured is in this error's .result.",
            result,
        )
