"""Depthwise Hyperparameter Transfer in Residual Networks: Dynamics and Scaling Limit.

Bordelon, Noci, Li, Hanin, Pehlevan, 2023 (ICLR 2024), arXiv 2309.16620.

``h^{l+1} = h^l + (beta / sqrt(L)) N^-1/2 W^l phi(h^l)``, ``f = (1 / (gamma_0 N)) w · phi(h^L)``, SGD with learning rate eta_0 gamma_0² N:
muP in the width with residual branches times 1/sqrt(depth). Best learning rates then transfer over width and depth, and training
converges as both grow. Here the network is written with neither factor (pre-activation, relu, W_ij ~ N(0, 1/N)), and `pj.depth_mup`
puts both in, from the trace, relative to width 16 and depth 4. gamma_0 = beta = 1.

Formulas. ``E |phi(h)|² = |h|²/2`` for a symmetric h, so at init |h^L|² grows by ``(1 + 1/2L)^L``, e^(1/2) in the limit, at any N; with
branches times 1/L it does not grow in the limit. At width N a kernel is a mean over N neurons, so its variance over seeds is of order 1/N.

Claims, expected numbers and tolerances, at width 16 and depth 4 where not said
    slope of the log of the best learning rate on log L, L = 4 to 64     0; +-1/4
    the same on log N, N = 16 to 128                                     0; +-1/3
    |h^L|² / |h^0|² at init, N = 64, L = 64                              1.646; +-0.1
    slope of the log of the kernel's variance on log N, trained          -1; +-0.3 (full only: quick has no time for it)

Controls: branches as they are (muP alone); the standard parametrization; branches times 1/L; a fixed layer of 4 units before the network,
whose kernel keeps the variance that those 4 bring.

What did not hold as first proposed, or says less than it seems
    - Transfer alone does not single out 1/sqrt(L): with 1/L and the learning rate kept the slope over L = 4 to 64 is 0.06 +- 0.04, and
      the loss is about the same here (log2 -6.0; 60 steps, width 32), not twice. What tells them apart is |h^L|² at init.
    - That the trained kernel nears its limit as L grows too is not claimed: at the sizes of a quick run the change with L is below the
      spread over seeds. The training losses at L = 4 to 64 agree within 4 % (width 32, 60 steps) at every stable learning rate up to 1/2.
    - The best learning rate is the last stable one of the grid, as the squared loss has it: transfer here is that of the edge of
      stability. Without scaling, that edge falls to about 2^-4.4 at L = 64, from 2^1.2 at L = 4.

Over N = 16 to 128 at quick's steps the last has -0.99 +- 0.06, and its control -0.22 +- 0.06.

Run time: quick 47 s on two CPU cores; full about 2 h (by its operations; not run).
Command:  paperjax run depthwise-hp-transfer
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.studies import best_learning_rates, residual_stream

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

DEPTH, WIDTH, NARROW = 4, 16, 4
RATES, LR = [2.0**k for k in range(-8, 4)], 1.0
# Finer for the width: in the squared loss the best learning rate is the last stable one, so it is only known to a grid step.
FINE: dict[Size, list[float]] = {"quick": [2.0 ** (k / 2) for k in range(-5, 7)], "full": [2.0 ** (k / 2) for k in range(-12, 7)]}
ODE = pj.mup.with_depth(1.0, "1/L, learning rate kept", learning_rate=False)


def network(width: int, depth: int) -> pj.Model:
    """``h + W phi(h)`` with no factor of width or depth but those of the base, and readout ``N(0, 1/N²)`` at width 16 (gamma_0 = 1)."""
    return pj.models.resmlp(
        width, depth, block="pre", branch_scale=DEPTH**-0.5, branch_exponent=0.0, weight_variance=1.0, readout_variance=1 / WIDTH
    )


def with_bottleneck(width: int, depth: int) -> pj.Model:
    """The network behind a fixed random layer of 4 units, which do not become more with the width."""
    model = network(width, depth)

    def init(key: Array, x: Any) -> PyTree:
        keys = jax.random.split(key)
        w_DxR = jax.random.normal(keys[0], (x.shape[1], NARROW), x.dtype) / x.shape[1] ** 0.5
        return {**model.init(keys[1], x @ w_DxR), "bottleneck": pj.Frozen(w_DxR)}

    def apply(params: PyTree, x: Any) -> Array:
        return model.apply({name: params[name] for name in ("first", "blocks", "readout")}, x @ params["bottleneck"].value)

    return pj.Model(init, apply)


def growth(model: pj.Model, params: PyTree, data: Any) -> Scalar:
    """``|h^L|² / |h^0|²``, mean over test inputs."""
    before_BxN, after_BxN = data.x_test @ params["first"]["w"], residual_stream(model, params, data.x_test)[-1]
    return jnp.mean(jnp.sum(after_BxN**2, axis=-1) / jnp.sum(before_BxN**2, axis=-1))


def kernel(model: pj.Model, params: PyTree, data: Any) -> Float[Array, "batch batch"]:
    """Feature kernel ``phi(h^L) · phi(h^L) / N`` of the test inputs."""
    phi_BxN = jax.nn.relu(residual_stream(model, params, data.x_test)[-1])
    return phi_BxN @ phi_BxN.T / phi_BxN.shape[1]


class Shape(NamedTuple):
    """Depths at the base width, widths at the base depth, steps, seeds of learning rates and of kernels, training examples."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    steps: int
    seeds: int
    many: int
    examples: int


SHAPES: dict[Size, Shape] = {
    "quick": Shape((4, 8, 16, 64), (16, 32, 64, 128), 30, 5, 32, 512),
    "full": Shape((4, 8, 16, 32, 64), (16, 32, 64, 128, 256, 512), 500, 8, 64, 1437),
}


def training(size: Size, scheme: pj.Parametrization, family: Any = network, measures: Mapping[str, Any] | None = None, **axes: Any) -> Any:
    """SGD on digits, squared loss, planned from width 16 and depth 4."""
    shape = SHAPES[size]
    few = pj.data.subset(pj.data.digits(), train=shape.examples, test=8)
    data = pj.data.standardise(pj.data.centre(pj.data.one_hot(few), labels=True))
    grid = pj.grid(**{"width": WIDTH, "depth": DEPTH, "lr": LR, "seed": shape.seeds, **axes})
    late = (shape.steps * k // 10 for k in (8, 9, 10))
    return pj.Experiment(
        family, data, loss="mse", parametrization=scheme, base=dict(width=WIDTH, depth=DEPTH), optimizer="sgd", grid=grid,
        steps=shape.steps, batch=64, measures=measures or {}, measure_at=[0, *late],
    )  # fmt: skip


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Learning rates over depth and over width, growth at init, kernels over width; each with its control."""
    shape = SHAPES[size]
    run = functools.partial(training, size)
    deep = {"depth": list(shape.depths), "lr": RATES}
    wide = {"width": list(shape.widths), "lr": FINE[size], "seed": 2 * shape.seeds}
    start = {"width": 64, "depth": 64, "seed": shape.many, "measures": {"growth": growth}}
    kernels = {"width": list(shape.widths), "seed": shape.many, "measures": {"kernel": kernel}}
    found = {
        "depth": run(pj.depth_mup, **deep),
        "depth-unscaled": run(pj.mup, **deep),
        "width": run(pj.depth_mup, **wide),
        "width-standard": run(pj.standard, **wide),
        "start": run(pj.depth_mup, **start),
        "start-one-over-depth": run(ODE, **start),
    }
    if size == "full":
        found["kernel"] = run(pj.depth_mup, **kernels)
        found["kernel-bottleneck"] = run(pj.depth_mup, with_bottleneck, **kernels)
    return found


def final_losses(result: "xarray.Dataset") -> "xarray.DataArray":
    """Training loss, averaged over the last measurements; infinite where training diverged."""
    late = result.train_loss.isel(step=slice(1, None)).mean("step", skipna=False)
    return late.where(np.isfinite(late), np.inf)


def best_rates(result: "xarray.Dataset", axis: str) -> np.ndarray:
    """Best learning rate, ``(seed, size)``."""
    return best_learning_rates(final_losses(result).transpose("seed", axis, "lr").values, result.lr.values)


def rate_slope(results: Results, axis: str) -> Estimate:
    """Slope of the log of the best learning rate on the log of depth or width."""
    return fit_slope(results[axis][axis].values, best_rates(results[axis], axis))


def deviation(result: "xarray.Dataset") -> np.ndarray:
    """Mean square, over entries, of a trained kernel minus the mean over seeds, relative to its mean diagonal; ``(seed, width)``."""
    kernels = result.kernel.isel(step=-1).transpose("seed", "width", "kernel_0", "kernel_1").values.astype(np.float64)
    mean = kernels.mean(axis=0, keepdims=True)
    level = np.trace(mean, axis1=2, axis2=3) / mean.shape[-1]
    return np.square(kernels - mean).mean(axis=(2, 3)) / level**2


def kernel_slope(results: Results) -> Estimate:
    """Slope of the log of `deviation` on log N."""
    return fit_slope(results["kernel"].width.values, deviation(results["kernel"]))


def predicted_growth(results: Results) -> float:
    """``(1 + 1/2L)^L``."""
    depth = int(results["start"].depth)
    return (1 + 1 / (2 * depth)) ** depth


def start_growth(results: Results) -> Estimate:
    """Growth of the stream at init."""
    return estimate(results["start"].growth.isel(step=0).values)


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Losses against the learning rate over depth, with and without 1/sqrt(L); best learning rates; growth and kernels."""
    from paperjax.report.figure import curves, panels, points, prediction

    fig, axes = panels(2, 3, (4.0, 3.2))
    (scaled, plain, deep), (over_width, wide, kernels) = axes
    shown = (
        (scaled, "depth", "depth", "branches times 1/sqrt(L)"),
        (plain, "depth-unscaled", "depth", "control: branches as they are"),
        (over_width, "width", "width", "muP, L = 4"),
    )
    for ax, name, axis, title in shown:
        losses = final_losses(results[name])
        for size in losses[axis].values:
            here = losses.sel({axis: size}).transpose("seed", "lr").values
            curves(ax, losses.lr.values, here, f"{'L' if axis == 'depth' else 'N'} = {size}", markevery=1)
        ax.set(xscale="log", yscale="log", xlabel="learning rate at the base", ylabel="training loss (mean square)", title=title)
        ax.set(ylim=(0.012, 0.4))
        if axis == "width":
            ticks = losses.lr.values[1::4]
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.set_xticks([], minor=True)

    for ax, axis, control, label, power in (
        (deep, "depth", "depth-unscaled", "branches as they are", None),
        (wide, "width", "width-standard", "standard parametrization", -1.0),
    ):
        sizes = results[axis][axis].values.astype(float)
        found, wrong = best_rates(results[axis], axis), best_rates(results[control], axis)
        colour = points(ax, sizes, found, "Depth-muP" if axis == "depth" else "muP")
        prediction(ax, sizes, float(np.exp(np.log(found).mean())), "power 0", color=colour)
        colour = points(ax, sizes, wrong, f"control: {label}")
        if power is not None:
            prediction(ax, sizes, float(np.exp(np.log(wrong[:, 0]).mean())) * (sizes / sizes[0]) ** power, f"power {power:g}", color=colour)
        ax.set(
            xscale="log",
            yscale="log",
            xlabel=f"{axis} {'L' if axis == 'depth' else 'N'}",
            ylabel="best learning rate",
            title=f"best learning rate over {axis}",
        )
        ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        ax.set_xticks([], minor=True)

    if "kernel" in results:
        sizes = results["kernel"].width.values.astype(float)
        for name, label, power in (("kernel", "trained", -1.0), ("kernel-bottleneck", "control: behind 4 units", 0.0)):
            found = deviation(results[name])
            colour = points(kernels, sizes, found, label)
            level = float(np.exp(np.log(found.mean(axis=0)).mean()))
            prediction(kernels, sizes, level * (sizes / np.exp(np.log(sizes).mean())) ** power, f"power {power:g}", color=colour)
        kernels.set(
            xscale="log", yscale="log", xlabel="width N", ylabel="relative variance over seeds", title="feature kernel after training"
        )
        kernels.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        kernels.set_xticks([], minor=True)
    else:
        both = np.stack([results[name].growth.isel(step=0).values for name in ("start", "start-one-over-depth")], axis=1)
        points(kernels, np.arange(2), both, "drawn")
        prediction(kernels, np.arange(2), predicted_growth(results), "formula for 1/sqrt(L)")
        kernels.set_xticks(range(2), ["1/sqrt(L)", "control: 1/L"])
        kernels.set(xlabel="scale of the branches", ylabel="|h^L|² / |h^0|²", title="stream at init, L = 64", xlim=(-0.5, 1.5))
    for ax in axes.reshape(-1):
        ax.legend(loc="best")
    return fig


CLAIMS = (
    Claim(
        "the best learning rate does not move with depth, L = 4 to 64: slope of its log on log L",
        "Section 3, Fig. 1", 0.0, lambda results: rate_slope(results, "depth"), 0.25,
        "one octave over the four octaves of depth, which is the grid's own spacing",
        Control("branches not scaled with depth (Fig. 1a): muP alone", {"depth": "depth-unscaled"}),
    ),
    Claim(
        "the best learning rate does not move with width, N = 16 to 128: slope of its log on log N",
        "Section 3, Fig. 1", 0.0, lambda results: rate_slope(results, "width"), 1 / 3,
        "one octave over the three octaves of width; the standard parametrization has -1 in the limit",
        Control("the standard parametrization: one learning rate for all, readout N(0, 1/N)", {"width": "width-standard"}),
    ),
    Claim(
        "at init |h^L|² / |h^0|² is that of a depth limit with noise of its own, e^(1/2)",
        "Section 4; formula of the docstring", predicted_growth, start_growth, 0.1,
        "the formula is exact at every N and L, so 0.1 is for sampling; the limit of 1/L branches is 1",
        Control("branches times 1/L: the initialization leaves no trace", {"start": "start-one-over-depth"}),
    ),
    Claim(
        "after training the feature kernel varies over seeds as 1/N: slope of the log of its variance on log N",
        "Section 4", -1.0, kernel_slope, 0.3,
        "corrections of relative order 1/N are largest at N = 16, where 64 inputs meet 16 units; a kernel without limit has 0",
        Control("a fixed layer of 4 units before the network: one width does not grow: no limit", {"kernel": "kernel-bottleneck"}),
        sizes=("full",),
    ),
)  # fmt: skip

PAPER = Paper(
    slug="depthwise-hp-transfer",
    title="Depthwise Hyperparameter Transfer in Residual Networks: Dynamics and Scaling Limit",
    authors="Blake Bordelon, Lorenzo Noci, Mufan (Bill) Li, Boris Hanin, Cengiz Pehlevan",
    year=2023,
    arxiv="2309.16620",
    area="parametrization",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "47 s on two CPU cores", "full": "about 2 h on two CPU cores (estimated, not run)"},
    data="digits from scikit-learn, in place of CIFAR-10 and ImageNet",
)
