"""The coordinate check: how far every stream and preactivation moves, against width or depth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paperjax.data.dataset import Dataset
from paperjax.estimates import Estimate, fit_slope, half_width
from paperjax.experiment import Experiment
from paperjax.grid import grid
from paperjax.parametrization import Parametrization
from paperjax.parametrization.factors import rule_of
from paperjax.studies.response import first_step
from paperjax.studies.scaled import Scaled, scaled
from paperjax.studies.show import coordinate_figure, coordinate_table
from paperjax.studies.taps import Quantity, Tap, find_taps, quantities, record, sizes_of

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

# A third of the 1/2 by which the tables' exponents differ, though not all wrong ones show in full (see the Notes of `coord_check`);
# corrections of relative order n^-1/2 at n = 64 bend a slope fitted over 64..512 by about 0.06.
TOLERANCE = 0.15
# What is smaller than a few roundings of the value itself is not the change.
ROUNDINGS = 4
# Changes beyond this part of the values are no linear response.
LINEAR = 0.1


class Row(NamedTuple):
    """One exponent: the power of the size that a quantity grows with.

    Attributes
    ----------
    quantity, kind, layer
        Which; see `Quantity`.
    what, step
        ``"value"`` at step 0, ``"change"`` after each step.
    exponent, low, high
        Least-squares slope on log-log, its mean over seeds and 95 % interval.
    expected
        By the formula of `paperjax.studies.response`, for step 0 and the first step; NaN elsewhere and where the formula says nothing.
    verdict
        ``"flat"``, ``"grows"``, ``"vanishes"``, ``"undecided"`` (the interval is wider than the tolerance: more seeds), ``"rounding"``
        (the change is of the order of rounding errors: a larger learning rate), or ``"unmoved"`` (exactly 0 at every size).
    """

    quantity: str
    kind: str
    layer: int | None
    what: str
    step: int
    exponent: float
    low: float
    high: float
    expected: float
    verdict: str


@dataclasses.dataclass(frozen=True, eq=False)
class CoordCheck:
    """What `coord_check` found.

    Attributes
    ----------
    axis, sizes
        ``"width"`` or ``"depth"``, and its values.
    parametrization, optimizer, learning_rate, steps
        What was checked; the parametrization is ``"as it is"`` for the model without one.
    quantities
        Preactivations, residual streams, attention logits, and the outputs (last), in the order of execution.
    data
        Root mean squares over coordinates and examples: ``value`` and ``change`` with dimensions (quantity, size, seed, step).
    predicted
        Per quantity, the exponents of the value at the start and of the change by the first step; NaN without prediction.
    note
        Why there is no prediction, where there is none; else empty.
    tolerance
        How far from 0 an exponent counts as flat.
    eps
        Rounding error of the outputs' dtype.
    """

    axis: str
    sizes: tuple[int, ...]
    parametrization: str
    optimizer: str
    learning_rate: float
    steps: int
    quantities: tuple[Quantity, ...]
    data: "xarray.Dataset"
    predicted: tuple[tuple[float, float], ...]
    note: str
    tolerance: float
    eps: float

    def samples(self, quantity: int, what: str, step: int) -> np.ndarray:
        """Root mean squares of one quantity, ``(seeds, sizes)``."""
        return self.data[what].isel(quantity=quantity).sel(step=step).transpose("seed", self.axis).to_numpy()

    def table(self) -> list[Row]:
        """All exponents, one row for every quantity and step: ``pandas.DataFrame(check.table())``."""
        rows = [self._row(i, "value", 0) for i in range(len(self.quantities))]
        return rows + [self._row(i, "change", step) for step in range(1, self.steps + 1) for i in range(len(self.quantities))]

    def _row(self, i: int, what: str, step: int) -> Row:
        q, y = self.quantities[i], self.samples(i, what, step)
        expected = self.predicted[i][("value", "change").index(what)] if step <= 1 else math.nan
        at_start = self.samples(i, "value", 0)
        verdict = None
        slope = Estimate(math.nan, math.nan)
        if (y == 0).all():
            verdict = "unmoved"
        elif (y == 0).any() or (what == "change" and (y <= ROUNDINGS * self.eps * at_start).any()):
            verdict = "rounding"
        else:
            slope = fit_slope(np.asarray(self.sizes, float), y)
        low, high = slope.interval
        return Row(q.name, q.kind, q.layer, what, step, slope.value, low, high, expected, verdict or self._verdict(slope))

    def _verdict(self, slope: Estimate) -> str:
        half = half_width(slope.samples) * slope.stderr
        if abs(slope.value) > self.tolerance + half:
            return "grows" if slope.value > 0 else "vanishes"
        return "flat" if half <= self.tolerance else "undecided"

    @property
    def passes(self) -> bool:
        """Whether every change after the last step is flat: the check of muP, which SP and NTP fail.

        Left out are: what did not move at all at any size (behind a readout that starts at 0, at the first step); against depth,
        what writes into a residual stream, for one branch of many is meant to become small. Attention logits only must not grow:
        the aligned part of their change is small beside the random one until the head is wider than the batch has positions.
        """
        rows = [row for row in self.table() if row.step == self.steps and row.verdict != "unmoved" and self._judged(row.kind)]
        fine = {"attention": ("flat", "vanishes")}
        return bool(rows) and all(row.verdict in fine.get(row.kind, ("flat",)) for row in rows)

    def _judged(self, kind: str) -> bool:
        return not (self.axis == "depth" and kind == "branch")

    @property
    def linear(self) -> float:
        """How far the first step goes: the largest ratio of change to value, over preactivations, streams and sizes."""
        inside = [i for i, q in enumerate(self.quantities) if q.kind in ("preactivation", "branch", "stream")]
        if not inside:
            return 0.0
        ratios = self.data["change"].isel(quantity=inside).sel(step=1) / self.data["value"].isel(quantity=inside).sel(step=0)
        return float(ratios.mean("seed").max())

    @property
    def as_predicted(self) -> bool:
        """Whether every exponent with a prediction agrees with it, to the tolerance plus the half-width of its interval.

        Only a small learning rate tells: if `linear` is above 0.1 the networks have left the linear response, and this is an error.

        Raises
        ------
        ValueError
            If there is no prediction, or changes are not small beside the values.
        """
        rows = [row for row in self.table() if math.isfinite(row.expected) and math.isfinite(row.exponent)]
        if not rows:
            raise ValueError(f"no exponent has a prediction to compare with: {self.note or 'nothing moved'}.")
        if self.linear > LINEAR:
            raise ValueError(
                f"changes by the first step reach {self.linear:.2g} of the values, and the prediction is for the linear response: use a "
                f"learning rate {self.linear / LINEAR:.0f} times smaller to compare with it."
            )
        return all(abs(r.exponent - r.expected) <= self.tolerance + (r.high - r.low) / 2 for r in rows)

    def plot(self) -> "Figure":
        """Sizes against width (or depth), log-log: at the start, after the first step and after the last; dashed lines are predictions."""
        return coordinate_figure(self)

    def __str__(self) -> str:
        return coordinate_table(self)


def coord_check(
    family: Any,
    parametrization: Parametrization | None,
    data: Any,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    optimizer: Any = "adam",
    steps: int = 3,
    learning_rate: float = 1e-3,
    seeds: int | Sequence[int] = 8,
    x: Any = None,
    loss: Any = "mse",
    base: Mapping[str, Any] | None = None,
    batch: int | None = 32,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **sizes: Any,
) -> CoordCheck:
    """Train networks of several widths (or depths) for a few steps and fit how far every activation moves.

    With ``Δ_t h = h_t - h_0`` on one fixed batch, the exponent of a quantity h is the slope of ``log rms(Δ_t h)`` on ``log width``. In
    muP every exponent is 0: nothing explodes and nothing stands still. What is looked at is found by the trace; the model has no hooks.

    Parameters
    ----------
    family
        A `Family` or what `paperjax.family` takes; Flax, Equinox and plain functions as they are.
    parametrization
        ``pj.mup``, ``pj.ntp``, ...; ``None`` checks the model as it is.
    data
        A `Dataset`, or a pair ``(x, y)``. Its first `batch` training examples are the batch of every step.
    widths, depths
        Values of the size that varies, one of the two; at least four, base first. Widths are passed as ``width=``, depths as ``depth=``.
    optimizer, settings
        A name in optax or a factory, and further arguments of it.
    steps, learning_rate
        Updates, and the learning rate at the base. Small: the first step's prediction is that of the linear response.
    seeds
        Number of initializations, or which; at least two.
    x
        Inputs on which sizes are taken; by default the batch.
    loss
        As in `Experiment`.
    base
        Sizes of the base network, over the first of `widths` or `depths` and the fixed sizes.
    batch
        Examples used; ``None`` for all.
    progress
        As in `Experiment.run`.
    **sizes
        Sizes that stay the same.

    Returns
    -------
    CoordCheck
        ``print`` shows the exponents, ``table()`` is the list of them, ``plot()`` a figure, ``passes`` the verdict.

    Raises
    ------
    ValueError
        If a size, the base, or the optimizer does not fit; if there are fewer than four sizes or two seeds.
    FloatingPointError
        If anything is not finite: which width, step and seed.

    Notes
    -----
    The prediction is a formula in the plan's numbers (`paperjax.studies.response`): for the first step of SGD, with momentum or
    without, or of an Adam-like optimizer whose eps is negligible, in the limit of small learning rate, against width. Exponents of
    attention logits' gradients are not predicted under SGD, nor anything against depth. Layers of a scan are rows of their own against
    width; against depth, layers of one kind are taken together (root mean square).

    Under SGD a change is proportional to the residual ``f - y``, which falls with width in muP until the outputs at the start are small
    beside the targets: targets of order 1 need wide networks, or exponents come out below 0.

    A change is flat if its exponent is within 0.15 of 0 beyond its 95 % interval, and that interval is narrower. `passes` asks it of
    every quantity after the last step.

    The check sees a wrong exponent only where it moves what is measured. It cannot see

    - a wrong learning rate of a leaf whose effect on every activation is masked by another's. The outputs move by what the readout
      learns and by what the features beneath it learn: with Adam, three hidden layers and widths 64 to 512, a readout whose learning
      rate falls with the power 1/2 or 3/2 of the width, not 1, passes: the features' part is flat and masks the readout's;
    - what few sizes or seeds leave open, and what has not converged yet. CompleteP with Adam over depths 4 to 32 does not pass though
      its exponents are the paper's (a stream's change falls with the power 0.18), nor does Depth-muP with SGD and 4 seeds (undecided).

    Whether the best learning rate is the same at every size is another question, and `paperjax.transfer` asks it: look there too before
    a parametrization of your own is trusted.

    References
    ----------
    Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1 and Figure 5; exponents from Tensor Programs IV, arXiv 2011.14522.

    Examples
    --------
    >>> import jax, paperjax as pj
    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> family = lambda width: pj.models.linear_net(width, depth=1, outputs=1)
    >>> check = coord_check(family, pj.mup, (x, 5 * x[:, :1]), widths=[32, 64, 128, 256], optimizer="sgd", steps=1, learning_rate=0.01)
    >>> check.passes, [row.verdict for row in check.table() if row.step == 1]
    (True, ['flat', 'flat'])
    """
    if steps < 1:
        raise ValueError(f"coord_check: steps = {steps}; the change after at least one step is what is checked.")
    chosen = grid(seed=seeds if isinstance(seeds, int) else list(seeds))
    if len(chosen.axes["seed"]) < 2:
        raise ValueError(f"coord_check: {len(chosen.axes['seed'])} seed; an exponent needs at least 2 for its interval.")
    examples = first_examples(data, batch)
    probe = examples.x_train if x is None else x
    s = scaled(family, parametrization, probe, widths, depths, optimizer, base, sizes, settings or {}, 4, "coord_check")
    # Against depth there are other layers at every size, so layers of one kind are taken together.
    per_layer = s.axis != "depth"
    rows = _common(s, probe, per_layer)

    def coordinates(model: Any, params: Any, params0: Any) -> Any:
        taps, _ = find_taps(model, probe)
        here = quantities(taps, per_layer)
        now, before = record(model, taps, params, probe), record(model, taps, params0, probe)
        moved = {tap: now[tap] - before[tap] for tap in taps}
        return jnp.stack([sizes_of(here, taps, now), sizes_of(here, taps, moved)])

    result = Experiment(
        s.network(),
        examples,
        loss=loss,
        optimizer=s.factory(),
        grid=grid(**{s.axis: list(s.sizes)}, learning_rate=learning_rate, seed=list(chosen.axes["seed"])),
        steps=steps,
        measure_at=range(steps + 1),
        measures=dict(coordinates=coordinates),
    ).run(progress=progress)
    found = _labelled(result, s, rows)
    _refuse_divergence(found, result, s, rows, learning_rate)
    predicted, note = _predicted(s, probe, rows)
    shape = jax.eval_shape(lambda: s.networks[s.sizes[0]].apply(s.networks[s.sizes[0]].init(jax.random.key(0), probe), probe))
    return CoordCheck(
        s.axis, s.sizes, s.parametrization, optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "optimizer"),
        learning_rate, steps, rows, found, predicted, note, TOLERANCE, float(jnp.finfo(shape.dtype).eps),
    )  # fmt: skip


def first_examples(data: Any, batch: int | None) -> Dataset:
    """The first training examples of a Dataset or of a pair ``(x, y)``, without test examples."""
    pair = (data.x_train, data.y_train) if hasattr(data, "x_train") else data
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(hasattr(part, "shape") for part in pair)):
        raise TypeError(f"data must be a Dataset or a pair of arrays (x, y), not a {type(data).__name__}.")
    x, y = pair
    n = x.shape[0] if batch is None else min(batch, x.shape[0])
    return Dataset(x[:n], y[:n], x[:0], y[:0], getattr(data, "name", "data"), getattr(data, "source", ""))


def _common(s: Scaled, x: Any, per_layer: bool) -> tuple[Quantity, ...]:
    """The quantities that the networks of all sizes share."""
    rows = quantities(find_taps(s.networks[s.sizes[0]], x)[0], per_layer)
    for size in s.sizes[1:]:
        others = quantities(find_taps(s.networks[size], x)[0], per_layer)
        if [(q.name, q.layer) for q in others] != [(q.name, q.layer) for q in rows]:
            differing = sorted({q.name for q in others} ^ {q.name for q in rows})
            raise ValueError(
                f"coord_check: the network of {s.axis} {size} has other activations than that of {s.axis} {s.sizes[0]}"
                + (f", such as {differing[0]}" if differing else "")
                + (". Start from a deeper one, which has layers of every kind." if not per_layer else ": its structure must stay the same.")
            )
    return rows


def _labelled(result: "xarray.Dataset", s: Scaled, rows: tuple[Quantity, ...]) -> "xarray.Dataset":
    import xarray as xr

    both = result["coordinates"].rename(coordinates_0="what", coordinates_1="quantity")
    names = [q.name if q.layer is None else f"{q.name} layer {q.layer}" for q in rows]
    both = both.assign_coords(quantity=names, kind=("quantity", [q.kind for q in rows]))
    parts = {name: both.isel(what=i).transpose("quantity", s.axis, "seed", "step") for i, name in enumerate(("value", "change"))}
    return xr.Dataset(parts, attrs=result.attrs)


def _refuse_divergence(found: "xarray.Dataset", result: "xarray.Dataset", s: Scaled, rows: tuple[Quantity, ...], lr: float) -> None:
    def finite(array: "xarray.DataArray") -> "xarray.DataArray":
        return array.copy(data=np.isfinite(array.to_numpy()))

    bad = ~(finite(found["value"]).all("quantity") & finite(found["change"]).all("quantity") & finite(result["train_loss"]))
    where = np.argwhere(bad.transpose("step", s.axis, "seed").to_numpy())
    if not len(where):
        return
    step, size, seed = where[0]
    here = found.isel({s.axis: size, "seed": seed, "step": step})
    broken = [rows[i].name for i in range(len(rows)) if not np.isfinite(here["value"].to_numpy()[i])]
    raise FloatingPointError(
        f"coord_check: at {s.axis}={s.sizes[size]}, step {int(found['step'][step])}, seed {int(found['seed'][seed])}, "
        + (f"{broken[0]} is not finite" if broken else "the loss is not finite")
        + f" (learning rate {lr:g} at the base, {s.parametrization}). "
        + ("It is so before any training: look at the model or the data." if step == 0 else "Use a smaller learning rate, or fewer steps.")
    )


def _predicted(s: Scaled, x: Any, rows: tuple[Quantity, ...]) -> tuple[tuple[tuple[float, float], ...], str]:
    none = tuple((math.nan, math.nan) for _ in rows)
    if s.axis != "width":
        return none, f"against {s.axis} there is no prediction but that of a depth parametrization: flat"
    try:
        response = first_step(s, x, rule_of(s.optimizer))
    except ValueError as error:
        # Without a plan nothing needs the leaves' roles but the prediction; the reason is printed with the table.
        if s.plans:
            raise
        return none, f"no prediction: {error}"
    taps: tuple[Tap, ...] = find_taps(s.networks[s.sizes[-1]], x)[0]
    nodes = [taps[q.members[0]].node for q in rows]
    return tuple((response.value[node], response.change[node]) for node in nodes), ""
