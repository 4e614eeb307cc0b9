"""Tensor Programs VI: Feature Learning in Infinite-Depth Neural Networks.

Yang, Yu, Zhu, Hayou, 2023 (ICLR 2024), arXiv 2310.02244.

Blocks of one matrix, ``x^l = x^{l-1} + a L^-1/2 MS(phi(W^l x^{l-1}))``, MS the subtraction of the mean over the width (without it
relu adds the same direction in every block), ``f = V^T x^L``, Adam's learning rate for W^l times L^-1/2 (Table 1): among all powers of
L for multiplier and learning rate this alone learns features and keeps neighbouring layers different. Here the network is written
without any L, and `pj.depth_mup` puts both powers in, from the trace, relative to depth 8; U and V are fixed, as in Section 4.

Formulas. With W_ij ~ N(0, 2/n), a = 1 and phi = relu, at init a block adds ``2 (1/2 - 1/2pi) (1 - 1/n) / L`` of the stream's mean
square, independently of the others, at any width n: |x^L|² grows by ``(1 + (1 - 1/pi) (1 - 1/n) / L)^L``. The gradient of W^l is
``phi'(h^l) δx^l ⊗ x^{l-1}``, where δx and x hardly change in a block and h^l, h^{l+1} are independent: the cosine of neighbours is
``E[phi']² / E[phi'^2]``, 1/2 for relu, 0 for abs, 1 where the activation is before W. Adam moves W by L^-1/2, the multiplier makes that
1/L in the block's output, and L such moves add up; two matrices of one block move by L^-1/2 each, so the product of the two moves is
L^-1/2 of their sum.

Claims, expected numbers and tolerances, at width 32
    |x^L|² / |x^0|² at init, L = 64                                          1.929; +-0.2
    slope of log |x^{l + eps L} - x^l| on log eps, L = 128, trained          1/2; +-0.1, for 2 to 16 blocks
    cosine of gradients of neighbouring blocks, trained, relu                1/2; +-0.05
    the same, abs                                                            0; +-0.05
    slope of the log of the best learning rate on log L, L = 8 to 64         0; +-0.25
    slope of the log of dW2 dW1 over the change of a block, blocks of two    -1/2; +-0.15

Controls: relu without MS; multiplier 1/L with the learning rate kept (the ODE limit; twice); activation before the matrix; relu in
place of abs; the multiplier 1/sqrt(L) with Adam's learning rate kept.

What did not hold as first proposed (width 32, 5 seeds, 40 steps unless said)
    - The exponent for 1/L is above 0.9. At L = 128 it is 0.71 (0.50 at init): noise of L^-1 per block still hides the drift. In
      Fig. 17 the curve nears eps only at L of thousands.
    - The best learning rate of two-layer blocks drifts. Over L = 8 to 64 its slope is -0.02 +- 0.04. What Section 9.2 predicts with a
      number is the loss of interaction, so that is claimed.
    - abs ends lower than relu. At a = 1 it is worse (log2 of the best loss at L = 32: -6.2 against -7.0). Tuned over a = 1/4, 1/2, 1
      and the learning rate it is equal after 40 steps (-7.04 against -7.03) and lower after 200 (-11.09 against -10.83).
    - 1/L with the learning rate kept shifts the best learning rate (Fig. 11): its slope is 0.08 +- 0.02, like Depth-muP's 0.08.
Without any scaling with depth the slope is -0.65 +- 0.05, and the best loss at L = 64 is 13 times that of Depth-muP. The correlation
of what neighbouring blocks add after training falls as L^-0.46 +- 0.05 over L = 16 to 128, not as 1/L: drift grows with L, as in Fig. 18.

Run time: quick 55 s on two CPU cores (measured on busy ones); full about 10 h on them (by its operations; not run).
Command:  paperjax run tp6-depth-mup
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
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

BASE = 8
# Learning rates of blocks at depth 8.
LR, LR_TWO = 2.0**-5, 2.0**-7
RATES: dict[Size, list[float]] = {"quick": [2.0**k for k in range(-7, -1)], "full": [2.0**k for k in range(-10, -1)]}
WINDOWS = (1, 2, 4, 8, 16)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "abs": jnp.abs}
MULTIPLIER_ALONE = pj.mup.with_depth(0.5, "1/sqrt(L), learning rate kept", learning_rate=False)
ODE = pj.mup.with_depth(1.0, "1/L, learning rate kept")


def centred(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``MS(phi(h))``, Section 6.3: the mean over the width is subtracted."""

    def subtracted(h_BxN: Array) -> Array:
        y_BxN = activation(h_BxN)
        return y_BxN - jnp.mean(y_BxN, axis=-1, keepdims=True)

    return subtracted


def with_fixed_ends(model: pj.Model) -> pj.Model:
    """The network with only its blocks trained."""

    def init(key: Array, x: Any) -> PyTree:
        params = model.init(key, x)
        return {"blocks": params["blocks"], "ends": pj.Frozen({name: params[name] for name in ("first", "readout")})}

    def apply(params: PyTree, x: Any) -> Array:
        return model.apply({"blocks": params["blocks"], **params["ends"].value}, x)

    return pj.Model(init, apply)


def network(width: int, depth: int, activation: str = "relu", block: Any = "post", mean_subtraction: bool = True) -> pj.Model:
    """Section 6.3 with one matrix in a block, no scaling with depth written in it; entries of V are N(0, 1/n²) as in Table 2."""
    phi = ACTIVATIONS[activation]
    return with_fixed_ends(
        pj.models.resmlp(
            width,
            depth,
            block=block,
            branch_scale=BASE**-0.5,
            branch_exponent=0.0,
            activation=centred(phi) if mean_subtraction else phi,
            readout_variance=1 / width,
        )
    )


def two_layer_blocks(width: int, depth: int) -> pj.Model:
    """Blocks ``x + W2 relu(W1 x)`` of two matrices, Section 9."""
    ends = pj.models.resmlp(width, 1, readout_variance=1 / width)

    def init(key: Array, x: Any) -> PyTree:
        keys = jax.random.split(key, 3)
        blocks = {name: jax.random.normal(k, (depth, width, width), x.dtype) for name, k in zip(("w1", "w2"), keys)}
        return {**ends.init(keys[2], x), "blocks": {"w1": blocks["w1"] * (2 / width) ** 0.5, "w2": blocks["w2"] * (1 / width) ** 0.5}}

    def apply(params: PyTree, x: Any) -> Array:
        def block(x_BxN: Array, w: PyTree) -> tuple[Array, None]:
            return x_BxN + BASE**-0.5 * jax.nn.relu(x_BxN @ w["w1"]) @ w["w2"], None

        return jax.lax.scan(block, x @ params["first"]["w"], params["blocks"])[0] @ params["readout"]["w"]

    return with_fixed_ends(pj.Model(init, apply))


def stream(model: pj.Model, params: PyTree, x: Any) -> Float[Array, "layers batch width"]:
    """x^0, ..., x^L, the residual stream as the trace finds it."""
    return jnp.concatenate([(x @ params["ends"].value["first"]["w"])[None], residual_stream(model, params, x)])


def profile(model: pj.Model, params: PyTree, data: Any) -> Float[Array, " layers"]:
    """``|x^l|² / |x^0|²`` for l = 0, ..., L, mean over test inputs."""
    square_LxB = jnp.sum(stream(model, params, data.x_test) ** 2, axis=-1)
    return jnp.mean(square_LxB / square_LxB[:1], axis=1)


def increments(model: pj.Model, params: PyTree, data: Any) -> Float[Array, " windows"]:
    """Mean of ``|x^{l+k} - x^l|²`` over layers and test inputs, for each k of `WINDOWS`."""
    x_LxBxN = stream(model, params, data.x_test)
    return jnp.stack([jnp.mean(jnp.sum((x_LxBxN[k:] - x_LxBxN[:-k]) ** 2, axis=-1)) for k in WINDOWS])


def gradient_overlap(model: pj.Model, params: PyTree, data: Any) -> Scalar:
    """Cosine between the gradients of neighbouring blocks for one example, mean over blocks and test examples."""

    def one(x_D: Array, y_C: Array) -> Array:
        def loss(blocks: PyTree) -> Array:
            return jnp.sum((model.apply({**params, "blocks": blocks}, x_D[None]) - y_C[None]) ** 2)

        gradient_LxW = jax.grad(loss)(params["blocks"])["w"].reshape(params["blocks"]["w"].shape[0], -1)
        unit_LxW = gradient_LxW / jnp.linalg.norm(gradient_LxW, axis=1, keepdims=True)
        return jnp.mean(jnp.sum(unit_LxW[1:] * unit_LxW[:-1], axis=1))

    return jnp.mean(jax.vmap(one)(data.x_test, data.y_test))


def interaction(model: pj.Model, params: PyTree, params0: PyTree, data: Any) -> Scalar:
    """``|dW2 (relu(W1 x) - relu(W1_0 x))|`` over the whole change of a block's output at the same x, root mean squares over blocks."""
    x_LxBxN = stream(model, params, data.x_test)[:-1]
    w, w0 = params["blocks"], params0["blocks"]
    now, before = jax.nn.relu(x_LxBxN @ w["w1"]), jax.nn.relu(x_LxBxN @ w0["w1"])
    both, change = (now - before) @ (w["w2"] - w0["w2"]), now @ w["w2"] - before @ w0["w2"]
    return jnp.sqrt(jnp.sum(both**2) / jnp.sum(change**2))


class Shape(NamedTuple):
    """Width, depth where it does not vary and where it does, steps of a training, seeds, and training examples."""

    width: int
    depth: int
    depths: tuple[int, ...]
    steps: int
    seeds: int
    examples: int


SHAPES: dict[Size, Shape] = {
    "quick": Shape(32, 128, (8, 16, 32, 64), 40, 5, 512),
    "full": Shape(256, 1024, (8, 16, 32, 64, 128, 256), 1000, 5, 1437),
}


def training(size: Size, scheme: pj.Parametrization, family: Any, measures: Mapping[str, Any], **axes: Any) -> pj.Experiment:
    """Adam on digits; every depth is planned from depth 8."""
    shape = SHAPES[size]
    few = pj.data.subset(pj.data.digits(), train=shape.examples, test=16)
    data = pj.data.standardise(pj.data.centre(pj.data.one_hot(few), labels=True))
    steps = axes.pop("steps", shape.steps)
    grid = pj.grid(**{"width": shape.width, "depth": shape.depth, "lr": LR, "seed": shape.seeds, **axes})
    late = sorted({0, *(steps * k // 20 for k in (18, 19, 20))})
    return pj.Experiment(
        family, data, loss="mse", parametrization=scheme, base=dict(depth=BASE), optimizer="adam", grid=grid, steps=max(steps, 1),
        batch=64, measures=measures, measure_at=late,
    )  # fmt: skip


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Depth-muP, 1/L, the multiplier alone, other activations and two-layer blocks."""
    shape = SHAPES[size]
    run = functools.partial(training, size)
    start = {"measures": {"profile": profile}, "depth": 64, "seed": 32, "steps": 0}
    overlap = {"measures": {"overlap": gradient_overlap}, "depth": 64}
    rates = {"measures": {}, "family": network, "depth": list(shape.depths), "lr": RATES[size]}
    many = {"depth": list(shape.depths), "lr": LR_TWO, "steps": shape.steps // 2}
    two = {"family": two_layer_blocks, "measures": {"interaction": interaction}, **many}
    return {
        "start": run(pj.depth_mup, network, **start),
        "start-with-the-mean": run(pj.depth_mup, functools.partial(network, mean_subtraction=False), **start),
        "depth-mup": run(pj.depth_mup, network, {"increments": increments, "overlap": gradient_overlap}),
        "one-over-depth": run(ODE, network, {"increments": increments}),
        "abs": run(pj.depth_mup, functools.partial(network, activation="abs"), **overlap),
        "pre-activation": run(pj.depth_mup, functools.partial(network, block="pre"), **overlap),
        "rates": run(pj.depth_mup, **rates),
        "rates-multiplier-alone": run(MULTIPLIER_ALONE, **rates),
        "two-layer": run(pj.depth_mup, **two),
        "two-layer-one-over-depth": run(ODE, **two),
    }


def formula(depth: int, n: int, layers: np.ndarray | int) -> Any:
    """``(1 + (1 - 1/pi) (1 - 1/n) / L)^l``: a block adds ``2 (1/2 - 1/2pi) (1 - 1/n) / L`` of the square."""
    return (1 + (1 - 1 / math.pi) * (1 - 1 / n) / depth) ** layers


def predicted_growth(results: Results) -> float:
    """The formula at the last layer."""
    depth = int(results["start"].depth)
    return float(formula(depth, int(results["start"].width), depth))


def growth(results: Results) -> Estimate:
    """Growth of the square of the stream at init."""
    return estimate(results["start"].profile.isel(step=0, profile_0=-1).values)


def roots(result: "xarray.Dataset") -> np.ndarray:
    """Root mean squares of increments after training, ``(seed, window)``."""
    return np.sqrt(result.increments.isel(step=-1).transpose("seed", "increments_0").values.astype(np.float64))


def diversity(results: Results) -> Estimate:
    """Slope of log rms increment on log eps, over 2, 4, 8, 16 blocks."""
    result = results["depth-mup"]
    return fit_slope(np.array(WINDOWS[1:]) / int(result.depth), roots(result)[:, 1:])


def overlap(name: str) -> Callable[[Results], Estimate]:
    """`gradient_overlap` after training."""
    return lambda results: estimate(results[name].overlap.isel(step=-1).values)


def final_losses(result: "xarray.Dataset") -> "xarray.DataArray":
    """Training loss, averaged over the last measurements; infinite where training diverged."""
    late = result.train_loss.isel(step=slice(1, None)).mean("step", skipna=False)
    return late.where(np.isfinite(late), np.inf)


def best_rates(result: "xarray.Dataset") -> np.ndarray:
    """Best learning rate, ``(seed, depth)``."""
    return best_learning_rates(final_losses(result).transpose("seed", "depth", "lr").values, result.lr.values)


def rate_slope(results: Results) -> Estimate:
    """Slope of the log of the best learning rate on log L."""
    return fit_slope(results["rates"].depth.values, best_rates(results["rates"]))


def interaction_slope(results: Results) -> Estimate:
    """Slope of the log of `interaction` after training on log L."""
    return fit_slope(results["two-layer"].depth.values, results["two-layer"].interaction.isel(step=-1).transpose("seed", "depth").values)


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Growth, increments, correlations and overlaps; losses against the learning rate, best learning rates, interactions."""
    from paperjax.report.figure import curves, panels, points, prediction

    fig, axes = panels(2, 3, (4.0, 3.2))
    (grow, increase, overlaps), (planned, best, interact) = axes
    start, depths = results["start"], results["rates"].depth.values.astype(float)
    layers = np.arange(1, start.sizes["profile_0"])
    for name, label in (("start", "MS(relu)"), ("start-with-the-mean", "control: relu")):
        samples = results[name].profile.isel(step=0).transpose("seed", "profile_0").values[:, 1:]
        points(grow, layers[3::6], samples[:, 3::6], label)
    prediction(grow, layers, formula(int(start.depth), int(start.width), layers), "formula")
    grow.set(yscale="log", xlabel=f"layer l of {int(start.depth)}", ylabel="|x^l|² / |x^0|²", title="stream at init")

    depth = int(results["depth-mup"].depth)
    eps = np.array(WINDOWS) / depth
    for name, label, power in (("depth-mup", "1/sqrt(L)", 0.5), ("one-over-depth", "control: 1/L", 1.0)):
        rms = roots(results[name])
        colour = points(increase, eps, rms / rms[:, :1], label)
        prediction(increase, eps, (eps / eps[0]) ** power, f"power {power:g}", color=colour)
    increase.set(
        xscale="log", yscale="log", xlabel="eps = blocks / L", ylabel="increment / that of one block", title=f"trained, L = {depth}"
    )

    kinds = {"pre-activation": 1.0, "depth-mup": 0.5, "abs": 0.0}
    overlaps.plot(range(3), list(kinds.values()), "k_", markersize=28, linestyle="none", label="Section 8")
    points(overlaps, np.arange(3), np.stack([results[name].overlap.isel(step=-1).values.reshape(-1) for name in kinds], axis=1), "trained")
    overlaps.set_xticks(range(3), ["relu, before W", "relu", "abs"])
    overlaps.set(xlabel="activation of the blocks", ylabel="cosine", title="gradients of neighbouring blocks", xlim=(-0.5, 2.5))

    result = results["rates"]
    for size in result.depth.values:
        curves(planned, result.lr.values, final_losses(result).sel(depth=size).transpose("seed", "lr").values, f"L = {size}", markevery=1)
    planned.set(
        xscale="log",
        yscale="log",
        xlabel="learning rate at L = 8",
        ylabel="training loss (mean square)",
        title="Depth-muP",
        ylim=(3e-3, 0.3),
    )

    for name, label, power in (("rates", "Depth-muP", 0.0), ("rates-multiplier-alone", "control: multiplier alone", -0.5)):
        found = best_rates(results[name])
        colour = points(best, depths, found, label)
        level = float(np.exp(np.log(found[:, 0]).mean()))
        prediction(best, depths, level * (depths / depths[0]) ** power, f"power {power:g}", color=colour)
    best.set(xscale="log", yscale="log", xlabel="depth L", ylabel="best learning rate", title="best learning rate over depth")

    for name, label, power in (("two-layer", "1/sqrt(L)", -0.5), ("two-layer-one-over-depth", "control: 1/L", 0.0)):
        found = results[name].interaction.isel(step=-1).transpose("seed", "depth").values
        colour = points(interact, depths, found, label)
        level = float(np.exp(np.log(found[:, 0]).mean()))
        prediction(interact, depths, level * (depths / depths[0]) ** power, f"power {power:g}", color=colour)
    interact.set(xscale="log", yscale="log", xlabel="blocks L", ylabel="dW2 dW1 / change of block", title="blocks of two layers")
    for ax in (best, interact):
        ax.set_xticks(depths, [f"{size:.0f}" for size in depths])
        ax.set_xticks([], minor=True)
    for ax in axes.reshape(-1):
        ax.legend(loc="best")
    return fig


AT_LENGTH = Control(
    "branches times 1/L, learning rate kept: what blocks add is mostly what training gave them in common", {"depth-mup": "one-over-depth"}
)

CLAIMS = (
    Claim(
        "at init the stream has the same size at every depth: |x^L|² / |x^0|² is that of independent blocks",
        "Claim 7.1, Section 6.3; formula of the docstring", predicted_growth, growth, 0.2,
        "the formula is exact at every width, so 0.2, a tenth, is for sampling; at infinite depth it is 1.98, with the mean exp(sqrt(L))",
        Control("the mean of relu is not subtracted", {"start": "start-with-the-mean"}),
    ),
    Claim(
        "after training x^{l + eps L} - x^l grows as eps^(1/2): feature diversity exponent 1/2",
        "Definition 7.6, Claim 7.5, Fig. 17", 0.5, diversity, 0.1,
        "the limit is eps -> 0; at eps <= 1/8 the drift that blocks share, of order eps, adds up to a tenth; 1/L has 1",
        AT_LENGTH,
    ),
    Claim(
        "gradients of neighbouring relu blocks have cosine 1/2",
        "Section 8.3", 0.5, overlap("depth-mup"), 0.05,
        "at width n and depth L it is 1/2 (1 - 3/4n - O(1/L)): -0.015 here; activation before the matrix has 1, abs 0",
        Control("activation before the matrix (pre-nonlin, Section 8.2)", {"depth-mup": "pre-activation"}),
    ),
    Claim(
        "gradients of neighbouring abs blocks have cosine 0: abs maximises diversity",
        "Section 8.3", 0.0, overlap("abs"), 0.05,
        "signs of independent preactivations are independent at every width; 0.05 is a tenth of relu's",
        Control("relu in place of abs", {"abs": "depth-mup"}),
    ),
    Claim(
        "Depth-muP: the best learning rate does not move with depth; slope of its log on log L, L = 8 to 64",
        "Section 10.2, Fig. 10, top", 0.0, rate_slope, 0.25,
        "half-way to -1/2, where the multiplier alone would have it; 3/4 of an octave over three octaves of depth",
        Control("multiplier 1/sqrt(L), Adam's learning rate kept (Fig. 10, middle): slope -1/2", {"rates": "rates-multiplier-alone"}),
    ),
    Claim(
        "in blocks of two layers their updates interact less with depth, as L^(-1/2)",
        "Section 9.2", -0.5, interaction_slope, 0.15,
        "the next order is the ratio itself, at most 0.15 here; 1/L with the learning rate kept has slope 0",
        Control("branches times 1/L, learning rate kept: interactions stay", {"two-layer": "two-layer-one-over-depth"}),
    ),
)  # fmt: skip

PAPER = Paper(
    slug="tp6-depth-mup",
    title="Tensor Programs VI: Feature Learning in Infinite-Depth Neural Networks",
    authors="Greg Yang, Dingli Yu, Chen Zhu, Soufiane Hayou",
    year=2023,
    arxiv="2310.02244",
    area="parametrization",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "55 s on two CPU cores", "full": "about 10 h on two CPU cores (estimated, not run)"},
    data="digits from scikit-learn, in place of CIFAR-10",
)
