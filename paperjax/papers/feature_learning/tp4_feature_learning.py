"""Feature Learning in Infinite-Width Neural Networks.

Yang, Hu, ICML 2021 (Tensor Programs IV), arXiv 2011.14522.

An abc parametrization of an L-hidden-layer perceptron is ``W^l = n^-a_l w^l``, ``w^l ~ n^-b_l N(0, 1)``, learning rate ``lr n^-c``. With

    r = min(a_{L+1} + b_{L+1}, 2 a_{L+1} + c) + c - 1 + min_{l <= L} [2 a_l + 1(l = 1)]

features of the last hidden layer move as ``n^-r``, and outputs as ``n^(1 - 2 a_{L+1} - c)`` by what the readout learns and as
``n^(1 - a_{L+1} - b_{L+1} - r)`` by what the layers before it learn (Section 3). A parametrization in which these and the start are stable
learns features (r = 0), is a kernel method (r > 0, the outputs move) or is trivial (they do not). For Adam, see `paperjax.classify`.

Here: tanh, L = 2, width 64 to 512, full-batch SGD and Adam on sixteen points. 19 rows of exponents, each run literally as written above
under both optimizers; exponents are least-squares slopes on log-log, for each seed. The two parts of the output's change are measured
apart (with the other layers put back to their start), since two powers in one sum need widths of thousands to be told apart. The table
is read after four steps that are small, so that changes add; the paper's own three schemes after thirty. The limit of the linear net is
`pj.limits.tp4_linear`.

Claims, expected numbers and tolerances
    relative change of the last features after 30 steps    muP 0, NTP -1/2, SP with learning rate 1/n -1/2; +-0.1
    the same with a readout that starts at 0               muP 0, NTP -1: the other branch of the minimum in r; +-0.1
    outputs' change after 30 steps, muP, NTP and SP        0, +-0.1
    all exponents of all stable rows, SGD and Adam         off by at most 1/4, half the distance of neighbours
    regime read off the measured exponents, SGD and Adam   the theorem's in every row
    one linear hidden layer: muP's outputs from the closed-form limit, NTP's from kernel gradient descent      -1/2, +-0.1

Controls: the same rows under the other optimizer, for which the same exponents mean another thing; for linear nets, muP and NTP exchanged.

What did not hold as first proposed
    - With y = sign(x1 x2) and n = width / 64 (lr 0.2, four steps, widths 64 to 512, five seeds) muP's slope was -0.25 +- 0.09 and SP's
      -0.63 +- 0.11: outputs at the start count in f - y, and they fall with width. So y = 16 sign(x1 x2); and n = width / 8, with which
      both hidden layers move features equally at n = 1. Exponents know nothing of either constant.
    - "Output change O(1)": as one sum it does not tell trivial rows from others at these widths (at n = width / 64 slopes of -0.2 to
      -0.3 where theory has 0, since the sum's other part falls as n^-1/2). Measured in its two parts it does.
    - SP with a learning rate of order 1 is unstable (outputs' slope after four steps 0.9), so "SP" is with 1/n.

Run time: quick 45 s on two CPU cores, mostly compilation; full about an hour (estimated by the cost of a step).
Command:  paperjax run tp4-feature-learning
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.data.draws import gaussian, labelled

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]


class Point(NamedTuple):
    """An abc parametrization as the paper writes it, layers 1, 2, 3; b_3 = inf is a readout that starts at 0."""

    name: str
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    c: float


HIDDEN_LAYERS = 2
BASE = 8
# The first row of every block is the paper's; then come larger and smaller learning rates, readouts and layers.
POINTS = (
    Point("muP", (-1 / 2, 0, 1 / 2), (1 / 2, 1 / 2, 1 / 2), 0),
    Point("muP, c = 1/2", (-1 / 2, 0, 1 / 2), (1 / 2, 1 / 2, 1 / 2), 1 / 2),
    Point("muP, c = -1/2", (-1 / 2, 0, 1 / 2), (1 / 2, 1 / 2, 1 / 2), -1 / 2),
    Point("muP, layer 1 slow", (1 / 2, 0, 1 / 2), (-1 / 2, 1 / 2, 1 / 2), 0),
    Point("muP, layer 2 slow", (-1 / 2, 1, 1 / 2), (1 / 2, -1 / 2, 1 / 2), 0),
    Point("muP, readout slow", (-1 / 2, 0, 1), (1 / 2, 1 / 2, 0), 0),
    Point("muP, readout 0", (-1 / 2, 0, 1 / 2), (1 / 2, 1 / 2, math.inf), 0),
    Point("NTP", (0, 1 / 2, 1 / 2), (0, 0, 0), 0),
    Point("NTP, c = 1/2", (0, 1 / 2, 1 / 2), (0, 0, 0), 1 / 2),
    Point("NTP, readout slow", (0, 1 / 2, 1), (0, 0, -1 / 2), 0),
    Point("NTP, readout 0", (0, 1 / 2, 1 / 2), (0, 0, math.inf), 0),
    Point("SP, c = 1", (0, 0, 0), (0, 1 / 2, 1 / 2), 1),
    Point("SP, c = 0", (0, 0, 0), (0, 1 / 2, 1 / 2), 0),
    Point("SP, c = 3/2", (0, 0, 0), (0, 1 / 2, 1 / 2), 3 / 2),
    Point("Adam's muP", (-1, 0, 0), (1, 1 / 2, 1), 1),
    Point("Adam's muP, layer 1 slow", (0, 0, 0), (0, 1 / 2, 1), 1),
    Point("Adam's muP, readout slow", (-1, 0, 1 / 2), (1, 1 / 2, 1 / 2), 1),
    Point("Adam's muP, c = 3/2", (-1, 0, 0), (1, 1 / 2, 1), 3 / 2),
    Point("Adam's kernel", (-1, 0, -1 / 2), (1, 1 / 2, 1), 3 / 2),
)
ROW = {point.name: i for i, point in enumerate(POINTS, start=1)}
TABLE = np.array([(*point.a, *point.b, point.c) for point in POINTS], np.float32)


RESOLUTION = 1 / 4  # half the distance of the nearest two exponents of the table


WIDTHS: dict[Size, tuple[int, ...]] = {"quick": (64, 128, 256, 512), "full": (64, 128, 256, 512, 1024, 2048)}
# Of the table under SGD, under Adam (whose slopes vary less), and of the linear nets.
SEEDS: dict[Size, tuple[int, int, int]] = {"quick": (16, 8, 400), "full": (24, 12, 1000)}


def parity(key: Array) -> pj.data.Dataset:
    """Gaussian inputs and ``y = 16 sign(x_1 x_2)``, in which the outputs at the start, of order 1 or less, hardly count."""
    return labelled(key, 16, 0, gaussian(4), lambda x: 16 * jnp.sign(x[:, 0] * x[:, 1]), "sign(x1 x2)", "generated")


def abc_network(inner: pj.Model, n: float, point: Any) -> pj.Model:
    """By definition: ``W^l = n^-a_l w^l`` and ``w^l ~ n^-b_l N(0, 1)``, up to constants; `inner` starts as n^0, n^-1/2, n^-1/2."""
    layers = ("first", "hidden", "readout")
    a, b = jnp.split(jnp.asarray(TABLE)[point - 1, :6], 2)

    def scaled(params: PyTree, factor: Array) -> PyTree:
        return {name: {"w": factor[layers.index(name)] * layer["w"]} for name, layer in params.items()}

    def init(key: Array, x: Array) -> PyTree:
        return scaled(inner.init(key, x), jnp.where(jnp.isinf(b), 0.0, n ** (jnp.array([0.0, 0.5, 0.5]) - b)))

    return pj.Model(init, lambda params, x: inner.apply(scaled(params, n**-a), x))


def tanh_net(width: int, point: Any, readout: Any) -> pj.Model:
    """Two hidden layers of tanh, one output, under a row of the table; n is the width over 8."""
    inner = pj.models.mlp(width, HIDDEN_LAYERS, 1, activation=jnp.tanh, bias=False, weight_variance=1.0, readout_variance=readout)
    return abc_network(inner, width / BASE, point)


def linear_net(width: int, point: Any) -> pj.Model:
    """One hidden layer, no activation, under a row of the table; n is the width."""
    return abc_network(pj.models.linear_net(width, 1, 1), float(width), point)


def sgd(learning_rate: Any, width: int, point: Any) -> optax.GradientTransformation:
    """SGD with learning rate ``lr n^-c``."""
    return optax.sgd(learning_rate * (width / BASE) ** -jnp.asarray(TABLE)[point - 1, 6])


def adam(learning_rate: Any, width: int, point: Any) -> optax.GradientTransformation:
    """Adam with learning rate ``lr n^-c``, and an eps below any gradient."""
    return optax.adam(learning_rate * (width / BASE) ** -jnp.asarray(TABLE)[point - 1, 6], eps=1e-15)


def change_by(readout: bool) -> Callable[..., Scalar]:
    """RMS change of the outputs if only the readout had been trained, or only what is before it."""

    def change(model: pj.Model, params: PyTree, params0: PyTree, data: Any) -> Scalar:
        mixed = {name: params[name] if (name == "readout") == readout else params0[name] for name in params}
        return pj.measures.output_change(model, mixed, params0, data)

    return change


PARTS = {
    "features": pj.measures.feature_change,
    "outputs": pj.measures.output_change,
    "by_readout": change_by(True),
    "by_features": change_by(False),
}


def mup_limit(model: pj.Model, params: PyTree, data: Any, loss: Any, step: Any, lr: Any) -> Scalar:
    """RMS distance of a linear net's outputs from the infinite-width muP limit, whose neurons are a basis of the initial weights."""
    x_BxD, y = data.x_train, data.y_train
    D, outputs = x_BxD.shape[1], y.shape[1]
    limit = pj.limits.tp4_linear(D, outputs, variances=(1 / D, 1.0))

    def update(_: Any, w: PyTree) -> PyTree:
        return jax.tree.map(lambda w, g: w - lr * g, w, jax.grad(lambda w: loss(limit.apply(w, x_BxD), y))(w))

    w = jax.lax.fori_loop(0, step, update, limit.init(jax.random.key(0), x_BxD))
    return jnp.sqrt(jnp.mean(jnp.square(model.apply(params, x_BxD) - limit.apply(w, x_BxD))))


def kernel_limit(model: pj.Model, params: PyTree, params0: PyTree, data: Any, loss: Any, step: Any, lr: Any) -> Scalar:
    """RMS distance of a linear net's outputs from kernel gradient descent with the infinite-width kernel ``(1 + 1/D) x . x'``."""
    x_BxD, y = data.x_train, data.y_train
    K_BxB = (1 + 1 / x_BxD.shape[1]) * x_BxD @ x_BxD.T

    def update(_: Any, f: Array) -> Array:
        return f - lr * K_BxB @ jax.grad(lambda f: loss(f, y))(f)

    f = jax.lax.fori_loop(0, step, update, model.apply(params0, x_BxD))
    return jnp.sqrt(jnp.mean(jnp.square(model.apply(params, x_BxD) - f)))


def tanh_nets(optimizer: Any, widths: Sequence[int], seeds: int, lr: float, readout: float, steps: Sequence[int]) -> pj.Experiment:
    """Every row of the table at every width: one program a width, for exponents leave shapes alone."""
    grid = pj.grid(width=widths, point=list(ROW.values()), readout=readout, lr=lr, seed=seeds)
    return pj.Experiment(tanh_net, parity, optimizer=optimizer, grid=grid, steps=max(steps), measure_at=list(steps), measures=PARTS)


def linear_nets(name: str, widths: Sequence[int], seeds: int) -> pj.Experiment:
    """Linear nets on ``y = x_1``, eight steps."""

    def line(key: Array) -> pj.data.Dataset:
        return pj.data.single_index(key, 32, 0, 8, lambda z: z)

    measures = {"from_mup": mup_limit, "from_kernel": kernel_limit}
    grid = pj.grid(width=widths, point=ROW[name], lr=0.2, seed=seeds)
    return pj.Experiment(linear_net, line, loss="mse", optimizer="sgd", grid=grid, steps=8, measure_at=[8], measures=measures)


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """The table under SGD and under Adam, and linear nets beside their limits."""
    widths, (seeds, adam_seeds, linear_seeds) = WIDTHS[size], SEEDS[size]
    return {
        "sgd": tanh_nets(sgd, widths, seeds, 0.00125, 1.0, (4, 30)),
        "adam": tanh_nets(adam, widths, adam_seeds, 0.002, 0.2, (4,)),
        "linear-mup": linear_nets("muP", widths, linear_seeds),
        "linear-ntp": linear_nets("NTP", widths, linear_seeds),
    }


def theory(row: int, rule: str) -> tuple[str, dict[str, float]]:
    """Regime of a row and the exponents of PARTS, from Section 3: ``-r``, ``1 - (2 a_3 + c)`` and ``1 - (a_3 + b_3 + r)``."""
    point = POINTS[row - 1]
    b = tuple(99.0 if math.isinf(value) else value for value in point.b)
    found = pj.classify((point.a, b, point.c), HIDDEN_LAYERS, rule)
    by_readout, by_features = (condition.bound - condition.value for condition in found.conditions[-2:])
    return found.regime, {"features": -found.r, "by_readout": by_readout, "by_features": by_features}


def slopes(result: "xarray.Dataset", row: int, part: str, step: int = 0) -> np.ndarray:
    """Log-log slope against width for each seed; -inf for what never moves, NaN for what diverged."""
    y = result[part].isel(step=step).sel(point=row).transpose("seed", "width").values.astype(np.float64)
    if (y == 0).all():
        return np.full(len(y), -np.inf)
    x = np.log(result.width.values) - np.log(result.width.values).mean()
    with np.errstate(all="ignore"):
        return np.log(y) @ x / (x @ x)


def last_slope(name: str, part: str) -> Callable[[Results], Estimate]:
    """Slope of one row after the last step."""
    return lambda results: estimate(slopes(results["sgd"], ROW[name], part, -1))


def limit_claim(says: str, source: str, name: str, measure: str, other: str, wrong: str) -> Claim:
    """The distance of a linear net's outputs from its limit falls as n^-1/2."""

    def measured(results: Results) -> Estimate:
        return fit_slope(results[name].width, results[name][measure].isel(step=-1).transpose("seed", "width"))

    why = "the central limit theorem over neurons; the next order is 1/n"
    return Claim(says, source, -0.5, measured, 0.1, why, Control(wrong, {name: other}))


def farthest(estimates: Sequence[Estimate]) -> Estimate:
    """Of several estimates the one that may be the farthest from 0."""
    return max(estimates, key=lambda e: max(map(abs, e.interval)))


def deviations(result: "xarray.Dataset", rule: str) -> list[Estimate]:
    """Measured minus predicted exponents of the stable rows, after four steps."""
    rows = [(row, predicted) for row in ROW.values() for regime, predicted in [theory(row, rule)] if regime != "unstable"]
    # A readout that starts at 0 makes the features' own share of the change 0: an exponent far below all others.
    return [estimate(slopes(result, row, part) - value) for row, predicted in rows for part, value in predicted.items() if value > -9]


def regime_of(features: float, by_readout: float, by_features: float) -> str:
    """The regime that measured exponents say, each told from its neighbours by RESOLUTION."""
    outputs = max(by_readout, by_features)
    if not max(features, outputs) <= RESOLUTION:
        return "unstable"
    if outputs < -RESOLUTION:
        return "trivial"
    return "feature learning" if features >= -RESOLUTION else "kernel"


def agreement(result: "xarray.Dataset", rule: str) -> Estimate:
    """Share of the rows whose regime is the theorem's, from slopes averaged over seeds; standard error by leaving one seed out."""
    by_row = {row: np.array([slopes(result, row, part) for part in ("features", "by_readout", "by_features")]) for row in ROW.values()}

    def share(seeds: np.ndarray) -> float:
        return float(np.mean([regime_of(*found[:, seeds].mean(axis=1)) == theory(row, rule)[0] for row, found in by_row.items()]))

    n = result.sizes["seed"]
    without = np.array([share(np.delete(np.arange(n), i)) for i in range(n)])
    return Estimate(share(np.arange(n)), math.sqrt((n - 1) * without.var()), n)


OTHER_RULE = Control("the same exponents under Adam, whose updates do not shrink with the gradient", {"sgd": "adam"})
WIDE = "corrections fall as n^-1/2 and bend a slope by 0.05 at these widths; the nearest other exponent is 1/2 away"


def r_claim(name: str, says: str) -> Claim:
    """The features of a row move as n^-r."""
    value = theory(ROW[name], "sgd")[1]["features"]
    return Claim(says, "Section 3, the exponent r", value, last_slope(name, "features"), 0.1, WIDE, OTHER_RULE)


CLAIMS = (
    r_claim("muP", "muP: after 30 steps the features' relative change does not fall with width"),
    r_claim("NTP", "NTP: it falls as n^-1/2"),
    r_claim("SP, c = 1", "SP with learning rate 1/n: it falls as n^-1/2"),
    r_claim("muP, readout 0", "muP with a readout that starts at 0: it does not fall with width either"),
    r_claim("NTP, readout 0", "NTP with a readout that starts at 0: it falls as 1/n, for the readout's updates alone reach the features"),
    Claim(
        "muP, NTP, SP with 1/n: the outputs' change is of order 1 (the farthest of three slopes)",
        "Section 3, stability and nontriviality", 0.0,
        lambda results: farthest([last_slope(name, "outputs")(results) for name in ("muP", "NTP", "SP, c = 1")]), 0.1, WIDE, OTHER_RULE,
    ),
    *(
        claim
        for rule, other in (("sgd", "adam"), ("adam", "sgd"))
        for claim in (
            Claim(
                f"{rule}: all exponents of all stable points are the theory's (the farthest deviation)",
                "Section 3" if rule == "sgd" else "its counterpart for Adam, arXiv 2308.01814", 0.0,
                lambda results, rule=rule: farthest(deviations(results[rule], rule)), RESOLUTION,
                "half the distance of neighbouring exponents on the table, so that none is taken for another",
                Control(f"the same points trained by {other}, which follows another rule", {rule: other}),
            ),
            Claim(
                f"{rule}: unstable, trivial, kernel or feature learning, as the theorem says (share of the points)",
                "Section 3, the dynamical dichotomy" if rule == "sgd" else "its counterpart for Adam, arXiv 2308.01814", 1.0,
                lambda results, rule=rule: agreement(results[rule], rule), 0.0, "a theorem has no exceptions",
                Control(f"the same points trained by {other}, which follows another rule", {rule: other}),
            ),
        )
    ),
    limit_claim("muP, one linear hidden layer: the outputs approach the closed-form limit as n^-1/2",
                "the limit of the one-hidden-layer linear net", "linear-mup", "from_mup", "linear-ntp", "NTP has another limit"),
    limit_claim("NTP, one linear hidden layer: the outputs approach kernel gradient descent as n^-1/2",
                "Section 3, kernel regime", "linear-ntp", "from_kernel", "linear-mup", "muP has no kernel"),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Features against width; measured against predicted exponents for SGD and Adam; linear nets and their limits."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(2, 2, (4.6, 3.5))
    trained, by_sgd, by_adam, limits = axes.reshape(-1)
    result = results["sgd"]

    def level(y: np.ndarray) -> float:
        return float(np.exp(np.log(np.mean(y.reshape(-1, len(width)), axis=0)).mean()))

    width = result.width.values
    for name in ("muP", "NTP", "SP, c = 1", "NTP, readout 0"):
        y = result.features.isel(step=-1).sel(point=ROW[name]).transpose("seed", "width").values
        colour = points(trained, width, y, name)
        power = theory(ROW[name], "sgd")[1]["features"]
        prediction(trained, width, level(y) * (width / level(width)) ** power, "", color=colour)
    trained.set(ylabel="relative RMS change of the last features", title="30 steps of SGD; lines: $n^{-r}$, level fitted")

    for ax, rule, title in ((by_sgd, "sgd", "SGD"), (by_adam, "adam", "Adam")):
        labels = {"features": "features", "by_readout": "outputs, by readout", "by_features": "outputs, by features"}
        for i, (part, label) in enumerate(labels.items()):
            rows = [row for row in ROW.values() if theory(row, rule)[0] != "unstable" and theory(row, rule)[1][part] > -9]
            predicted = np.array([theory(row, rule)[1][part] for row in rows])
            points(ax, predicted + 0.04 * (i - 1), np.array([slopes(results[rule], row, part) for row in rows]).T, label)
        span = np.array([-1.1, 0.1])
        prediction(ax, span, span, "predicted")
        ax.set(xlabel="predicted exponent of n", ylabel="measured exponent of n", title=f"{title}, 4 steps: all stable points")
        ax.legend()

    pairs = (("mup", "mup", "muP from its limit"), ("ntp", "kernel", "NTP from kernel descent"),
             ("mup", "kernel", "muP from kernel descent"), ("ntp", "mup", "NTP from muP's limit"))  # fmt: skip
    for name, limit, label in pairs:
        y = results[f"linear-{name}"][f"from_{limit}"].isel(step=-1).transpose("seed", "width").values
        colour = points(limits, width, y, label)
        if (name, limit) in (("mup", "mup"), ("ntp", "kernel")):
            prediction(limits, width, level(y) * (width / level(width)) ** -0.5, "", color=colour)
    limits.set(ylabel="RMS distance of the outputs", title="one linear hidden layer; lines: $n^{-1/2}$, level fitted")
    for ax in (trained, limits):
        ax.set(xscale="log", yscale="log", xlabel="width (neurons)")
        ax.set_xticks(width, [str(n) for n in width])
        ax.set_xticks([], minor=True)
        ax.set_ylim(ax.get_ylim()[0] / 6, None)
        ax.legend(loc="lower left", ncols=2)
    return fig


PAPER = Paper(
    slug="tp4-feature-learning",
    title="Feature Learning in Infinite-Width Neural Networks",
    authors="Greg Yang, Edward J. Hu",
    year=2021,
    arxiv="2011.14522",
    area="feature-learning",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="45 s on two CPU cores", full="about an hour on two CPU cores (estimated)"),
    data="generated: Gaussian inputs, y = 16 sign(x1 x2); for linear nets y = x1",
)
