"""A Spectral Condition for Feature Learning.

Yang, Simon, Bernstein, 2023, arXiv 2310.17813.

Features of a layer of n_l units are of order 1 per unit, and change by that much, if (Condition 1)

    |W_l|_2 = Theta(sqrt(n_l / n_{l-1})),    |dW_l|_2 = Theta(sqrt(n_l / n_{l-1})),

spectral norms, W_l at the start and dW_l its change. It holds for ``W_l ~ sigma_l N(0, 1)``, ``sigma_l = min(1, sqrt(n_l / n_{l-1})) /
sqrt(n_{l-1})`` and SGD learning rates proportional to ``n_l / n_{l-1}`` (Parametrization 1; equal to muP). Updates have low stable rank
``|dW|_F² / |dW|_2²``, so Frobenius norms tell another story: ``|dW|_F / |W|_F`` falls as n^-1/2 while features go on moving.

Here: tanh, three hidden layers, ten full-batch steps of SGD on 64 digits, widths 64 to 1024. Slopes are least squares on log-log, for
each seed. Spectral norms are Lanczos estimates (paperjax.measures.spectral_norm), within 1 %.

Claims, expected numbers and tolerances
    |dW|_2 in every layer, over sqrt(n_l / n_{l-1})      slope 0, +-0.1 (the farthest of four layers)
    |dW|_2 / |W|_2 of the hidden layers                  slope 0, +-0.15 (the farthest of two)
    relative change of the last features                 slope 0, +-0.1; under NTP -1/2, +-0.1
    |dW|_F / |W|_F of the hidden layers                  slope -1/2, +-0.12 (the farthest of two)
    stable rank of dW in the hidden layers               slope 0, +-0.2 (the farthest of two)

Controls: NTP with the same learning rate at width 64 (spectral for NTP's own claim), where features and ``|dW|_2 / |W|_2`` fall as n^-1/2
and ``|dW|_F / |W|_F`` as 1/n; for the stable rank, an update that weight decay alone makes, ``dW`` proportional to the random W, of
stable rank n/4.

What did not hold as first proposed
    - With mean squared error, one-hot targets and a readout of variance 1/n at width 64, the features' slope over 64 to 512 was -0.31
      +- 0.06: outputs at the start count in the residual, and fall with width. Hence cross-entropy, and sigma_l of the formula at
      width 64. (Learning rates are one at width 64, so the readout's constant is 6.4 times the formula's.)
    - |W|_2 of the first layer is (1 + sqrt(n / 64)) at its start, not yet sqrt(n / 64): slope 0.32 over 64 to 512. So all layers are
      claimed for updates, which are of the right order from the start on, and |dW|_2 / |W|_2 for hidden layers.

Run time: quick 45 s on two CPU cores; full about ten minutes (estimated by the cost of a step)
Command:  paperjax run spectral-condition
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

BASE, CLASSES, FEATURES = 64, 10, 64
LAYERS = ("first", "hidden 1", "hidden 2", "readout")
HIDDEN = (1, 2)
NORMS = ("|W|_2", "|dW|_2", "|W|_F", "|dW|_F")
WIDTHS: dict[Size, tuple[int, ...]] = {"quick": (64, 160, 400, 1024), "full": (64, 128, 256, 512, 1024, 2048)}
SEEDS: dict[Size, int] = {"quick": 5, "full": 12}


def network(width: int) -> pj.Model:
    """Three hidden layers of tanh; at width 64 all sigma_l are those of the formula."""
    readout = CLASSES / BASE
    return pj.models.mlp(width, 3, CLASSES, activation=jnp.tanh, bias=False, weight_variance=1.0, readout_variance=readout)


def weights(params: PyTree) -> tuple[Array, ...]:
    """The four matrices, fan-in first."""
    return params["first"]["w"], *params["hidden"]["w"], params["readout"]["w"]


def norms(params: PyTree, params0: PyTree) -> Float[Array, "4 4"]:
    """NORMS of every layer."""
    pairs = [(before, now - before) for now, before in zip(weights(params), weights(params0))]
    return jnp.stack([jnp.stack([norm(w) for norm in (pj.measures.spectral_norm, jnp.linalg.norm) for w in pair]) for pair in pairs])


def nothing(f: Float[Array, "batch outputs"], y: Any) -> Scalar:
    """A loss without gradient."""
    return 0 * jnp.mean(f)


def decay(learning_rate: Any) -> optax.GradientTransformation:
    """Weight decay and nothing else."""
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(learning_rate))


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """The spectral parametrization, NTP, and weight decay alone."""
    digits = pj.data.subset(pj.data.standardise(pj.data.digits(), per="dataset"), train=64)

    def training(steps: int = 10, **fields: Any) -> pj.Experiment:
        settings: dict[str, Any] = {"loss": "cross_entropy", "optimizer": "sgd", **fields}
        grid = pj.grid(width=WIDTHS[size], lr=0.05, seed=SEEDS[size])
        measures = {"norms": norms, "features": pj.measures.feature_change}
        return pj.Experiment(network, digits, grid=grid, steps=steps, measure_at=[steps], measures=measures, **settings)

    return {
        "spectral": training(parametrization=pj.spectral, base=dict(width=BASE)),
        "ntp": training(parametrization=pj.ntp, base=dict(width=BASE)),
        "decay": training(1, loss=nothing, optimizer=decay),
    }


def norm(result: "xarray.Dataset", layer: int, name: str) -> np.ndarray:
    """One of NORMS after the last step, ``(seed, width)``."""
    return result.norms.isel(step=-1, norms_0=layer, norms_1=NORMS.index(name)).transpose("seed", "width").values


def ratio(over: str, under: str, power: int = 1) -> Callable[["xarray.Dataset", int], np.ndarray]:
    """A quotient of two norms."""
    return lambda result, layer: (norm(result, layer, over) / norm(result, layer, under)) ** power


def over_aspect(result: "xarray.Dataset", layer: int) -> np.ndarray:
    """``|dW|_2 / sqrt(n_l / n_{l-1})``."""
    n = result.width.values
    fan_in, fan_out = ((FEATURES, n), (n, n), (n, n), (n, CLASSES))[layer]
    return norm(result, layer, "|dW|_2") / np.sqrt(fan_out / fan_in)


spectral_ratio, frobenius_ratio = ratio("|dW|_2", "|W|_2"), ratio("|dW|_F", "|W|_F")
stable_rank = ratio("|dW|_F", "|dW|_2", 2)


def farthest(quantity: Callable[..., np.ndarray], predicted: float = 0.0, layers: Sequence[int] = HIDDEN) -> Callable[[Results], Estimate]:
    """Of the layers' slopes the one that may be the farthest from the prediction."""

    def measured(results: Results) -> Estimate:
        found = [fit_slope(results["spectral"].width, quantity(results["spectral"], layer)) for layer in layers]
        return max(found, key=lambda e: max(abs(end - predicted) for end in e.interval))

    return measured


def features(name: str) -> Callable[[Results], Estimate]:
    """Slope of the features' relative change."""
    return lambda results: fit_slope(results[name].width, results[name].features.isel(step=-1).transpose("seed", "width"))


NTP = Control("NTP, whose hidden updates shrink against its weights", {"spectral": "ntp"})
WHY = "the nearest other exponents are 1/2 away; corrections of relative order n^-1/2 bend a slope over these widths by 0.05"

CLAIMS = (
    Claim("the update of every layer has a spectral norm of order sqrt(fan-out / fan-in)", "Condition 1", 0.0,
          farthest(over_aspect, layers=range(4)), 0.1, WHY, NTP),
    Claim("hidden layers: |dW|_2 / |W|_2 does not change with width", "Condition 1", 0.0, farthest(spectral_ratio), 0.15, WHY, NTP),
    Claim("the features' relative change does not fall with width", "Condition 1", 0.0, features("spectral"), 0.1, WHY, NTP),
    Claim("hidden layers: |dW|_F / |W|_F falls as n^-1/2 all the same", "low rank of updates", -0.5, farthest(frobenius_ratio, -0.5), 0.12,
          WHY, NTP),
    Claim("hidden layers: the stable rank of dW stays of order 1", "low rank of updates", 0.0, farthest(stable_rank), 0.2,
          "a rank can grow to its limit of 10 outputs and 64 examples, so a slope above 0 at small widths is no surprise; W's own is 1",
          Control("weight decay alone: dW is a multiple of the random W", {"spectral": "decay"})),
    Claim("NTP: the features' relative change falls as n^-1/2", "Introduction: NTP loses features", -0.5, features("ntp"), 0.1, WHY,
          Control("the spectral parametrization, in which it does not fall", {"ntp": "spectral"})),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Spectral and Frobenius ratios, features, and stable ranks against width."""
    from paperjax.report.figure import panels, points, prediction

    fig, ((norms_of, moved, ranks),) = panels(1, 3, (4.2, 3.6))
    width = results["spectral"].width.values

    def line(ax: Any, y: np.ndarray, power: float, colour: Any) -> None:
        level = np.exp(np.log(y.mean(0)).mean())
        prediction(ax, width, level * (width / np.exp(np.log(width).mean())) ** power, "", color=colour)

    for name, result in (("spectral", results["spectral"]), ("NTP", results["ntp"])):
        for label, quantity, power in (("2", spectral_ratio, 0.0), ("F", frobenius_ratio, -0.5)):
            y = quantity(result, 1)
            shift = -0.5 if name == "NTP" else 0.0
            line(norms_of, y, power + shift, points(norms_of, width, y, f"{name}: $|ΔW|_{label} / |W|_{label}$"))
        y = result.features.isel(step=-1).transpose("seed", "width").values
        line(moved, y, -0.5 if name == "NTP" else 0.0, points(moved, width, y, name))
    for name, result in (("spectral", results["spectral"]), ("NTP", results["ntp"]), ("weight decay alone", results["decay"])):
        y = stable_rank(result, 1)
        line(ranks, y, 1.0 if "decay" in name else 0.0, points(ranks, width, y, name))
    norms_of.set(ylabel="update over weights (first hidden matrix)", title="norms; lines: predicted exponents")
    moved.set(ylabel="relative RMS change of the last features", title="features")
    ranks.set(ylabel="stable rank of ΔW (first hidden matrix)", title="rank")
    for ax in (norms_of, moved, ranks):
        ax.set(xscale="log", yscale="log", xlabel="width (neurons)")
        ax.set_xticks(width, [str(n) for n in width])
        ax.set_xticks([], minor=True)
        ax.set_ylim(ax.get_ylim()[0] / 3, None)
        ax.legend(loc="lower left")
    ranks.legend(loc="upper left")
    return fig


PAPER = Paper(
    slug="spectral-condition",
    title="A Spectral Condition for Feature Learning",
    authors="Greg Yang, James B. Simon, Jeremy Bernstein",
    year=2023,
    arxiv="2310.17813",
    area="feature-learning",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="45 s on two CPU cores", full="ten minutes on two CPU cores (estimated)"),
    data="64 of scikit-learn's digits",
)
