"""Maximal Initial Learning Rates in Deep ReLU Networks.

Iyer, Hanin, Rolnick, ICML 2023, arXiv 2212.07295. We had its abstract at hand, not its text: intervals and factors below are the
proposal's for this entry.

eta* is the largest constant learning rate at which SGD from the initialization reaches a threshold accuracy in a fixed budget. For L hidden
layers of n units, He's init, it is a power of L n where n >> L and the input layer is trained at a reduced rate; it is "closely though not
inversely related" to the sharpness lambda_1, the largest eigenvalue of the loss's Hessian, which has bounds in L n.

Formula. With every layer's variance 2 / fan_in, E |df_k/dtheta|² = (L n + r d) |x|²/d for each output k, at any n: each layer that reads n
units has n |x|²/d, the input layer, at r times the rate of the others, r |x|². So lambda_1 ~ L n, if r d << L n. What matters of the input
layer is r d: r = 1 with 3,072 inputs (CIFAR's) is, exactly, r = 48 with the 64 of digits, and run so.

Here: 256 digits, centred; n = 48, 96, 192, L = 3, 4, 6; cross-entropy, batches of 32, 16 updates, accuracy 0.2 (twice chance); r = 0.1.
Rates are a grid of half octaves in place of bisection. lambda_1 is that in the coordinates in which this SGD is plain, on 64 digits.

Claims, expected numbers and tolerances (measured; range over seven other sets of seeds)
    R² of log eta* on log(L n), networks of one seed            at least 0.85, less 0.15 for one draw's noise; 0.82 (0.80 to 0.85)
    slope of log eta* on log(L n)                               -1.1 to -0.4; -0.71 (-0.71 to -0.64)
    slope of log lambda_1 on log(L n)                           1, +-0.3; 1.00 (0.83 to 0.96)
    least eta* lambda_1 / 2 over the sizes                      at least 1.5; 10 (9.4 to 12)
    growth of eta* lambda_1 / 2 over the grid (full size only)  at least 1.5; 2.4 +- 0.2

Controls: the input layer at full rate with 3,072 inputs; only the input layer is trained; linearised networks with the squared loss, which
have eta* lambda_1 / 2 = 1.00 +- 0.02 and no growth.

What did not hold as first proposed, or says less than it seems
    - R² of at least 0.85: true of means over the seeds, 0.91 to 0.95, not of single networks. eta* of one varies by 0.28 octaves.
      Means are not what is claimed, since their R² does not tell the control apart: 0.71 at quick's size (8 seeds, jackknife +- 0.19), 0.78
      +- 0.08 at full's, whose slope of -0.11 is small and yet a line. R² of single networks does: 0.24 and 0.21.
    - R² falls with the input layer at full rate: not with 64 inputs (n = 64 to 256, means over eight seeds: 0.95, against 0.98 at r = 0.1),
      only the slope does, -0.55 against -0.70. With 784 inputs they are 0.81 and -0.23, with 3,072 0.24 and -0.03. R² falls as eta* stops
      changing with L n; the scatter about the line does not grow (0.06 octaves, against 0.14 to 0.18 at r = 0.1).
    - One power of the product is a summary. Fitted apart, eta* ~ n^-0.6 L^-1.0 (n^-0.66 L^-0.81 for n = 64 to 256), and nearer n^-1/2 at
      higher thresholds. n^-1/2 is the law of the cross-entropy (arXiv 2505.22491); with the squared loss eta* ~ n^-1 at L = 4
      (n = 64 to 256, 1,437 digits, 160 updates). L = 2 lies half an octave and more above the line, and is left out.
    - That eta* lambda_1 / 2 grows by 1.5 is undecided at quick's size: 1.5 to 1.9 +- 0.2, and 1.63 with interval 1.48 to 1.80 over 72 seeds
      (power 0.24 +- 0.02 of L n). That it is not 1 is plain.
    - Gaussian classes (ten, means of norm 6 in 64 dimensions) in place of digits: slope -0.72 +- 0.03, R² 0.95 of means over eight seeds.

Run time: quick 50 s on two CPU cores (by its 95 s of CPU time); full 5 min (by its 8 min of CPU time).
Full, n = 64, 128, 256 and L = 3, 4, 6, 8, has 0.84, -0.70, 0.98 and 8.8 for the others.
Command:  paperjax run maximal-initial-learning-rate
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

WIDTHS: dict[Size, tuple[int, ...]] = {"quick": (48, 96, 192), "full": (64, 128, 256)}
DEPTHS: dict[Size, tuple[int, ...]] = {"quick": (3, 4, 6), "full": (3, 4, 6, 8)}
# Of rates in training, and of sharpness, which varies more from one draw to the next.
SEEDS: dict[Size, int] = {"quick": 12, "full": 24}
DRAWS: dict[Size, int] = {"quick": 20, "full": 48}
STEPS, BATCH, TRAIN, THRESHOLD = 16, 32, 256, 0.2
REDUCED, DOMINANT = 0.1, 3072 / 64


def network(width: Any, depth: int, input_rate: Any, most: int) -> pj.Model:
    """Perceptron with He's init whose input layer has `input_rate` times the learning rate of the others; `width` of `most` units.

    The input layer is ``sqrt(r) w`` and w is drawn ``1 / sqrt(r)`` times as large: SGD with rate eta in w is SGD with rate r eta in the
    weights themselves, and the Hessian is that which this SGD meets. All widths are one program: unused units start at 0 and stay there,
    since every way on from them is through a ReLU, whose derivative at 0 is 0.
    """
    model = pj.models.mlp(most, depth, bias=False, readout_variance=2.0)

    def init(key: Array, x: Any) -> PyTree:
        params, used_N = model.init(key, x), (jnp.arange(most) < width).astype(x.dtype)
        first, wider = (jnp.sqrt(jnp.asarray(factor).astype(x.dtype)) for factor in (1 / input_rate, most / width))
        return {
            "first": {"w": first * used_N[None] * params["first"]["w"]},
            "hidden": {"w": wider * (used_N[:, None] * used_N[None])[None] * params["hidden"]["w"]},
            "readout": {"w": wider * used_N[:, None] * params["readout"]["w"]},
        }

    def apply(params: PyTree, x: Any) -> Array:
        factor = jnp.sqrt(jnp.asarray(input_rate).astype(x.dtype))
        return model.apply({**params, "first": {"w": factor * params["first"]["w"]}}, x)

    return pj.Model(init, apply)


def input_only(width: Any, depth: int, input_rate: Any, most: int) -> pj.Model:
    """The network with every layer held fixed but the first."""
    model = network(width, depth, input_rate, most)

    def init(key: Array, x: Any) -> PyTree:
        return {name: layer if name == "first" else pj.Frozen(layer) for name, layer in model.init(key, x).items()}

    def apply(params: PyTree, x: Any) -> Array:
        return model.apply({name: layer if name == "first" else layer.value for name, layer in params.items()}, x)

    return pj.Model(init, apply)


def linearised(width: Any, depth: int, input_rate: Any, most: int) -> pj.Model:
    """Its first Taylor polynomial in the parameters, with which the squared loss is quadratic."""
    return pj.transforms.linearize(network(width, depth, input_rate, most))


def sgd(learning_rate: Any, width: Any, depth: int) -> optax.GradientTransformation:
    """The axis is the learning rate times ``(L n)^(2/3)``, which only says where the grid of rates lies: at its edges is an error."""
    return optax.sgd(learning_rate / (width * depth) ** (2 / 3))


def sharpness(model: pj.Model, params: PyTree, data: Any, loss: Any) -> Scalar:
    """Of the loss on 64 training digits."""
    return pj.measures.sharpness(model, params, data, loss, iterations=10, examples=64)


def rates(low: float, high: float) -> list[float]:
    """``2^low`` to ``2^high`` by factors of sqrt 2."""
    return [2.0 ** (k / 2) for k in range(round(2 * low), round(2 * high) + 1)]


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Rates over widths and depths and the sharpness at init, each with its control."""
    digits = pj.data.subset(pj.data.digits(), train=TRAIN, test=8)
    digits = pj.data.standardise(pj.data.centre(digits), per="dataset")
    widths, depths, most = WIDTHS[size], DEPTHS[size], max(WIDTHS[size])
    more = 0.0 if size == "quick" else 1.0  # Octaves of rates to either side: more networks spread further.

    def training(low: float, high: float, input_rate: float, seeds: int) -> pj.Experiment:
        grid = pj.grid(width=widths, depth=depths, input_rate=input_rate, lr=rates(low, high), seed=seeds)
        return pj.Experiment(
            functools.partial(network, most=most), digits, loss="cross_entropy", optimizer=sgd, grid=grid, steps=STEPS, batch=BATCH,
            measure_at=[STEPS // 2, STEPS], measures={"accuracy": pj.measures.train_accuracy},
        )  # fmt: skip

    def start(family: Any, depths: Sequence[int], draws: int) -> pj.Experiment:
        grid = pj.grid(width=widths, depth=depths, input_rate=REDUCED, seed=draws)
        return pj.Experiment(
            functools.partial(family, most=most), digits, loss="cross_entropy", optimizer=optax.sgd(1.0), grid=grid, steps=0,
            measure_at=[0], measures={"sharpness": sharpness},
        )  # fmt: skip

    # A quadratic loss keeps its sharpness, so this may be measured at the end of training, on the way to the accuracy.
    grid = pj.grid(width=[widths[0], most], depth=[3, 4], input_rate=REDUCED, lr=rates(-0.5 - more, 3 + more), seed=SEEDS[size] // 3)
    quadratic = training(0, 0, REDUCED, 2).replace(
        family=functools.partial(linearised, most=most), data=pj.data.centre(pj.data.one_hot(digits), labels=True), loss="mse", grid=grid,
        steps=3 * STEPS, measure_at=[3 * STEPS], measures={"accuracy": pj.measures.train_accuracy, "sharpness": sharpness},
    )  # fmt: skip
    return {
        "reduced": training(3.5 - more, 6.5 + more, REDUCED, SEEDS[size]),
        "dominant": training(1 - more, 5 + more, DOMINANT, 2 * SEEDS[size] // 3),
        "start": start(network, depths, DRAWS[size]),
        "start-input-only": start(input_only, depths[:1] + depths[-1:], DRAWS[size] // 4),
        "quadratic": quadratic,
    }


def sizes(result: "xarray.Dataset") -> np.ndarray:
    """``L n`` of every width and depth, flat."""
    return (result.width.values[:, None] * result.depth.values[None]).reshape(-1).astype(float)


def maximal_rates(result: "xarray.Dataset") -> np.ndarray:
    """eta*, ``(seed, size)``: between the last rate that reaches the threshold at some measurement and the first above that does not.

    Raises
    ------
    ValueError
        If for some network no rate of the grid reaches it, or all do from there on: eta* lies outside.
    """
    reached = result.accuracy.max("step").transpose("seed", "width", "depth", "lr").values >= THRESHOLD
    ended = (np.cumsum(reached, axis=-1) > 0) & ~reached
    outside = ~ended.any(axis=-1)
    if outside.any():
        seed, width, depth = np.argwhere(outside)[0]
        raise ValueError(
            f"at width {result.width.values[width]}, depth {result.depth.values[depth]}, seed {result.seed.values[seed]} no rate of the "
            f"grid reaches accuracy {THRESHOLD}, or none above does not, so eta* is not known: move the grid."
        )
    first = ended.argmax(axis=-1)
    lr = result.lr.values
    found = np.sqrt(lr[first - 1] * lr[first]).reshape(len(first), -1)
    return found / sizes(result)[None] ** (2 / 3)


def at_init(result: "xarray.Dataset") -> np.ndarray:
    """lambda_1, ``(seed, size)``."""
    last = result.sharpness.isel(step=-1)
    last = last.isel(lr=0) if "lr" in last.dims else last
    return last.transpose("seed", "width", "depth").values.reshape(last.sizes["seed"], -1).astype(np.float64)


def explained(x: np.ndarray, y: np.ndarray) -> float:
    """R² of the line through ``log y`` against ``log x``."""
    return float(np.corrcoef(np.log(x), np.log(y))[0, 1] ** 2)


def fit_quality(results: Results) -> Estimate:
    """R² of the power law for the networks of one seed; mean over seeds."""
    x = sizes(results["reduced"])
    return estimate([explained(x, y) for y in maximal_rates(results["reduced"])])


def exponent(results: Results) -> Estimate:
    """Slope of log eta* on log(L n)."""
    return fit_slope(sizes(results["reduced"]), maximal_rates(results["reduced"]))


def sharpness_exponent(results: Results) -> Estimate:
    """Slope of log lambda_1 on log(L n)."""
    return fit_slope(sizes(results["start"]), at_init(results["start"]))


def ratios(rates_of: "xarray.Dataset", start: "xarray.Dataset") -> np.ndarray:
    """``eta* lambda_1 / 2``, ``(seed, size)``, of the same draws."""
    eta, sharp = maximal_rates(rates_of), at_init(start)
    both = min(len(eta), len(sharp))
    return eta[:both] * sharp[:both] / 2


def least_ratio(results: Results) -> Estimate:
    """Least ``eta* lambda_1 / 2`` over the sizes, for each seed."""
    return estimate(ratios(results["reduced"], results["start"]).min(axis=1))


def drift(results: Results) -> Estimate:
    """Factor by which ``eta* lambda_1 / 2`` grows over the grid, along its power law in L n."""
    found, x = ratios(results["reduced"], results["start"]), np.log(sizes(results["reduced"]))
    slope = np.log(found) @ (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    return estimate(np.exp(slope * (x.max() - x.min())))


CLAIMS = (
    Claim(
        "log eta* is linear in log(L n) where n >> L and the input layer's rate is reduced: R² of the networks of one seed",
        "abstract; the number is the proposal's", 0.85, fit_quality, 0.15,
        "0.85 is for means over runs; of one run's variance 0.39 octaves² is of the law, and 0.09 of its draw and of the half-octave grid",
        Control("the input layer at full rate with 3,072 inputs: it sets eta*, hardly changing with L n", {"reduced": "dominant"}),
        relation=">=",
    ),
    Claim(
        "eta* falls as a power of L n: slope of log eta* on log(L n)",
        "abstract; the interval is the proposal's", -0.75, exponent, 0.35,
        "the interval -1.1 to -0.4 of the proposal; it leaves out 0 and holds both -1/2 and -1, the laws for width of the two losses",
        Control("the input layer at full rate with 3,072 inputs", {"reduced": "dominant"}),
    ),
    Claim(
        "the sharpness at init grows as L n: slope of log lambda_1 on log(L n)",
        "formula of the docstring; the abstract has bounds in L n", 1.0, sharpness_exponent, 0.3,
        "lambda_1 of a draw varies by half an octave, by a factor exp(O(L/n)) on average; the proposal's lower end is 0.7",
        Control("only the input layer is trained: its part of the kernel does not grow with width or depth", {"start": "start-input-only"}),
    ),
    Claim(
        "eta* is not 2 / lambda_1: least eta* lambda_1 / 2 over widths and depths",
        "abstract: closely though not inversely related", 1.5, least_ratio, 0.0,
        "the proposal's factor; a grid of half octaves can make it 1.2 where it is 1",
        Control("linearised networks, squared loss: they diverge above 2 / lambda_1", {"reduced": "quadratic", "start": "quadratic"}),
        relation=">=",
    ),
    Claim(
        "nor is eta* any other multiple of 1 / lambda_1: factor by which eta* lambda_1 / 2 grows over the grid",
        "abstract: closely though not inversely related", 1.5, drift, 0.0,
        "the proposal's factor; at quick's size and seeds the interval, about 1.3 to 2.1, is too wide to tell",
        Control("linearised networks, squared loss: they diverge above 2 / lambda_1", {"reduced": "quadratic", "start": "quadratic"}),
        relation=">=",
        sizes=("full",),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """eta*, lambda_1 and eta* lambda_1 / 2 against L n, with their controls."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(1, 3)
    ticks = np.array([150, 300, 600, 1200, 2400])
    x_all = sizes(results["reduced"])
    for ax in axes.reshape(-1):
        ax.set(xscale="log", yscale="log", xlabel="depth times width, L n")
        ax.set_xticks(ticks[ticks < 1.3 * x_all.max()], [f"{tick}" for tick in ticks[ticks < 1.3 * x_all.max()]])
        ax.set_xticks([], minor=True)
    rate, sharp, ratio = axes.reshape(-1)

    def line(ax: Any, x: np.ndarray, y: np.ndarray, label: str, power: float, color: Any = "black") -> None:
        level = np.exp(np.log(y).mean() - power * np.log(x).mean())
        prediction(ax, np.sort(x), level * np.sort(x) ** power, label, color=color)

    found, result = maximal_rates(results["reduced"]), results["reduced"]
    for depth in result.depth.values:
        here = np.broadcast_to(result.depth.values == depth, (len(result.width), len(result.depth))).reshape(-1)
        points(rate, x_all[here], found[:, here], f"L = {depth}")
    line(rate, x_all, found, f"power {exponent(results).value:.2f}, fitted", exponent(results).value)
    wrong, x = maximal_rates(results["dominant"]), sizes(results["dominant"])
    colour = points(rate, x, wrong, "control: 3,072 inputs, full rate")
    line(rate, x, wrong, f"power {fit_slope(x, wrong).value:.2f}, fitted", fit_slope(x, wrong).value, colour)
    rate.set(ylabel="eta*", title="maximal initial learning rate", ylim=(None, 6 * found.max()))

    for name, label, power in (("start", "all layers", 1.0), ("start-input-only", "control: input layer only", 0.0)):
        x, y = sizes(results[name]), at_init(results[name])
        line(sharp, x, y, f"power {power:g}", power, points(sharp, x, y, label))
    sharp.set(ylabel="lambda_1 of the loss", title="sharpness at init")

    found = ratios(results["reduced"], results["start"])
    points(ratio, x_all, found, "networks, cross-entropy")
    points(ratio, sizes(results["quadratic"]), ratios(results["quadratic"], results["quadratic"]), "control: linearised, squared loss")
    prediction(ratio, np.sort(x_all), 1.0, "eta* = 2 / lambda_1", color="black")
    ratio.set(ylabel="eta* lambda_1 / 2", title="their product", ylim=(0.5, 300))
    for ax in axes.reshape(-1):
        ax.legend(loc="best", fontsize=7.5, ncols=2 if ax is rate else 1)
    return fig


PAPER = Paper(
    slug="maximal-initial-learning-rate",
    title="Maximal Initial Learning Rates in Deep ReLU Networks",
    authors="Gaurav Iyer, Boris Hanin, David Rolnick",
    year=2022,
    arxiv="2212.07295",
    area="optimization",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "50 s on two CPU cores (by its CPU time)", "full": "5 min on two CPU cores (by its CPU time)"},
    data="256 of scikit-learn's digits",
)
