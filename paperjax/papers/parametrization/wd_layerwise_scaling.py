"""Robust Layerwise Scaling Rules by Proper Weight Decay Tuning.

Fan, Liu, Zhao, Yuan, Gu, 2025, arXiv 2510.15262.

Under AdamW weights forget where they started and reach a steady state that the optimizer sets. The paper observes (abstract) that there
the singular values of a matrix scale in norm as sqrt(eta/lambda), that the top one goes as ``sigma_1 ~ sqrt(eta/lambda) d^0.75``, and
concludes, with muP's eta ~ 1/d for matrices, that lambda ~ sqrt(d) keeps sigma_1, and with it a sublayer's gain, independent of the
width; vectors keep eta = Theta(1) and lambda = 0. That rule is ``pj.wd_layerwise``; the plan that trains here is read from the trace.

What the optimizer does with gradients that are pure noise can be computed. ``w <- (1 - eta lambda) w - eta u``, u = m / sqrt(v).

    - With b1 = 0 the steps u are independent and of mean square 1, so RMS(w) = sqrt(eta / (lambda (2 - eta lambda))).
    - With momentum they are correlated, m = (1 - b1) sum_k b1^k g_k, and smaller, E m^2 = (1 - b1) / (1 + b1). Each gradient still moves
      w by eta in total, only later: w is an AR(2) process with roots r = 1 - eta lambda and b1, and
      RMS(w)^2 = eta^2 / (1 - r^2) x (1 - b1) (1 + r b1) / ((1 + b1) (1 - r b1)).
    - Both go to sqrt(eta / (2 lambda)) where the decay is slow beside the momentum, eta lambda << 1 - b1: at b1 = 0.9 and eta lambda = 0.01
      the correction is -4.2 %, at 0.00125 it is -0.6 %.
    - The entries are independent, so sigma_1 = 2 sqrt(d) RMS: d^0.5. If the gradient has a constant part q beside noise of size 1 - q, its
      rank-one mean is a spike theta = qbar d / lambda, qbar = q / sqrt(q^2 + (1 - q)^2), and sigma_1 = theta + d s^2 / theta above
      s sqrt(d), s the noise's RMS (Benaych-Georges and Nadakuditi, arXiv 1103.2221): an exponent that rises from 0.5 to 1 with d.

Claims, expected numbers and tolerances
    noise: RMS over sqrt(eta / (2 lambda))                          1, +-0.08 where it is worst (momentum takes 0.042)
    noise: RMS over the formula of the AR(2) process                1, +-0.02 (mean over decays; the worst one was unresolved)
    noise: log-log slope of the RMS against eta / lambda            0.5, +-0.03 (momentum adds 0.017)
    noise: log-log slope of sigma_1 against d = 12 ... 64           0.5, +-0.1 (finite d adds 0.03)
    noise with 2 % signal: slope of sigma_1                         the formula's, 0.71; +-0.06
    trained: log-log slope of RMS against d under the paper's rule  -0.75, +-0.07 (sqrt(eta/lambda) with eta ~ 1/d, lambda ~ sqrt(d))
    trained: slope of sigma_1 / sqrt(eta/lambda)                    at least 0.75: the noise's 0.5 is not enough
    trained: slope of sigma_1 with lambda ~ d (full only)           0, +-0.07: no drift, if sigma_1 is all signal (exponent 1)

Controls: a gradient that never changes (pure signal, w -> 1/lambda) or has a part that does not, for what is said of noise; noise for
what is said of signal; the same decay at every width for the trained networks.

What did not hold as first proposed (widths 16 to 96, six seeds, each with its own teacher; with the one teacher of quick 0.97 is 0.90):
    - The exponent 0.75. Here sigma_1 over sqrt(eta/lambda) grows as d^(0.97 +- 0.03) under the paper's rule, d^(0.87 +- 0.01) with the
      same decay at every width, d^(1.02 +- 0.02) with lambda ~ d: the gradient's signal, not its noise, sets sigma_1 of so small a network.
      By the formula the exponent is no constant: it depends on the share of the signal and grows with d.
    - sigma_1 the same at every width to 15 % with lambda ~ sqrt(d). It grows as d^(0.22 +- 0.03), by half from 16 to 96, and the gain of
      the first sublayer as d^(0.10 +- 0.03). That is less than with the same decay everywhere, 0.37 +- 0.01 and 0.36 +- 0.02. With
      lambda ~ d it does not grow. So the last two claims are what the formula says of signal, put down after a first look at trained
      networks.
    - At quick's sizes the last claim has 0.016 +- 0.017, and 0.37 with the same decay; quick has no time for it.
    - With the same decay everywhere the widest network, for which eta lambda is least, still remembers its start at the last step.

Run time: quick 45 s on two CPU cores; full not measured
Command:  paperjax run wd-layerwise-scaling
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

LR, B1 = 0.01, 0.9
DECAYS = (0.125, 0.25, 0.5, 1.0)
SIDES = (12, 20, 36, 64)
SHARE = 0.02
# Trained networks: learning rate and decay at the base width, the first of the widths.
TRAINED = dict(lr=0.02, weight_decay=2.0, b2=0.95)
# A trained network is measured several times in its steady state: a snapshot has the noise of one minibatch after another.
LATE = (0.8, 0.85, 0.9, 0.95, 1.0)
PROPORTIONAL = "proportional-decay"
RULES = {"paper-rule": 0.5, "constant-decay": 0.0, PROPORTIONAL: 1.0}


def with_decay(name: str, power: float) -> pj.Parametrization:
    """The paper's parametrization with lambda ~ d^power for matrices; its own power is 1/2."""
    decay = {column: pj.Exponent(fan_in=-power if column == "hidden" else 0.0) for column in pj.wd_layerwise.c["adam"]}
    return dataclasses.replace(pj.wd_layerwise, name=name, decay=decay)


def matrix(width: int, signal: Scalar | float) -> pj.Model:
    """One matrix W whose gradient at an example is ``(1 - signal) G + signal``, G Gaussian and the example's own: f = <W, gradient>.

    All ones stands for every rank-one pattern of signs: rows and columns of W are alike.
    """

    def init(key: Array, x_Bx1: Array) -> PyTree:
        return {"w": jnp.zeros((width, width), x_Bx1.dtype)}

    def apply(params: PyTree, x_Bx1: Array) -> Array:
        # An example is a number whose bits are the key of its noise: the noise itself, d^2 numbers an example, would not fit.
        bits = jax.lax.bitcast_convert_type(x_Bx1[:, 0], jnp.uint32)

        def one(bit: Array) -> Array:
            noise_DxD = jax.random.normal(jax.random.key(bit), (width, width), x_Bx1.dtype)
            return jnp.sum(params["w"] * ((1 - signal) * noise_DxD + signal))

        return jax.vmap(one)(bits)[:, None]

    return pj.Model(init, apply)


def keys(n: int) -> Callable[[Array], pj.data.Dataset]:
    """As many examples as there are steps, so that no noise comes twice."""

    def data(key: Array) -> pj.data.Dataset:
        x = jax.random.normal(key, (n, 1), jnp.float32)
        return pj.data.Dataset(x, jnp.zeros_like(x), x[:1], jnp.zeros_like(x[:1]), "noise", "generated")

    return data


def linear(f: Array, y: Array) -> Array:
    """The mean of the outputs: its gradient does not know W."""
    return jnp.mean(f)


def norm(h_BxD: Array, gain_D: Array) -> Array:
    """RMS norm with a gain."""
    return gain_D[None, :] * h_BxD * jax.lax.rsqrt(jnp.mean(h_BxD**2, axis=-1, keepdims=True) + 1e-6)


def network(width: int) -> pj.Model:
    """A pre-norm block of two layers: ``h = E x``, ``f = V N(h + W2 relu(W1 N(h)))``, N the RMS norm."""

    def init(key: Array, x: Array) -> PyTree:
        shapes = {"embed": (x.shape[1], width), "w1": (width, width), "w2": (width, width), "readout": (width, 1)}
        drawn = zip(jax.random.split(key, 4), shapes.items())
        weights = {name: jax.random.normal(k, shape, x.dtype) / math.sqrt(shape[0]) for k, (name, shape) in drawn}
        return {**weights, "gain1": jnp.ones(width, x.dtype), "gain2": jnp.ones(width, x.dtype)}

    def apply(p: PyTree, x_BxK: Array) -> Float[Array, "B 1"]:
        h_BxD = x_BxK @ p["embed"]
        h_BxD = h_BxD + jax.nn.relu(norm(h_BxD, p["gain1"]) @ p["w1"]) @ p["w2"]
        return norm(h_BxD, p["gain2"]) @ p["readout"]

    return pj.Model(init, apply)


def task(key: Array) -> pj.data.Dataset:
    """A random teacher of 16 inputs, with noise of half its output's size on the labels: the gradient never dies.

    One for all seeds, which differ in the network and in the order of its examples: drawn in every program it is half of what compiles.
    """
    return pj.data.teacher_student(key, pj.models.mlp(16, 1, outputs=1, activation=jnp.tanh), 4096, 256, 16, noise=0.5)


def matrices(params: PyTree) -> list[Array]:
    """W, or W1 and W2."""
    return [params[name] for name in ("w", "w1", "w2") if name in params]


def rms(params: PyTree) -> Scalar:
    """Root mean square of the entries; geometric mean over the matrices."""
    return jnp.exp(jnp.mean(jnp.stack([0.5 * jnp.log(jnp.mean(jnp.square(w))) for w in matrices(params)])))


def largest(w_DxD: Array) -> Scalar:
    """Top singular value as the Schatten norm of order 2^13, by squaring ``w^T w`` twelve times: over by d^(2^-13), 0.06 % at d = 96."""
    # No factorization: two batched SVDs, run at once for two devices of one CPU, wait for each other for ever in its two threads.
    squarings = 12
    power_DxD, log_size = w_DxD.T @ w_DxD, jnp.zeros((), w_DxD.dtype)
    for i in range(squarings):
        size = jnp.linalg.norm(power_DxD)
        power_DxD = (power_DxD / size) @ (power_DxD / size)
        log_size = log_size + jnp.log(size) / 2**i
    return jnp.exp((log_size + jnp.log(jnp.trace(power_DxD)) / 2**squarings) / 2)


def top(params: PyTree) -> Scalar:
    """Top singular value; geometric mean over the matrices."""
    return jnp.exp(jnp.mean(jnp.stack([jnp.log(largest(w)) for w in matrices(params)])))


def gain(params: PyTree, data: Any) -> Scalar:
    """Gain of the first sublayer on test inputs: RMS of ``W1 N(h)`` over that of ``N(h)``."""
    h_BxD = norm(data.x_test @ params["embed"], params["gain1"])
    return jnp.sqrt(jnp.mean((h_BxD @ params["w1"]) ** 2) / jnp.mean(h_BxD**2))


def noise(steps: int, seeds: int, signal: float = 0.0, **axes: Any) -> pj.Experiment:
    """AdamW on gradients of noise, signal or both."""
    settings: dict[str, Any] = dict(width=32, lr=LR, weight_decay=1.0, b1=B1, signal=signal) | axes
    measures = dict(rms=rms, top=top, scale=lambda lr, weight_decay: jnp.sqrt(lr / weight_decay))
    return pj.Experiment(
        matrix, keys(steps), loss=linear, optimizer="adamw", grid=pj.grid(**settings, seed=seeds), steps=steps, batch=1,
        measure_at=[steps], measures=measures,
    )  # fmt: skip


def training(name: str, widths: Sequence[int], steps: int, seeds: int) -> pj.Experiment:
    """The network over widths, its matrices under AdamW with eta ~ 1/d and lambda ~ d^power."""
    power = RULES[name]

    def scale(lr: Any, weight_decay: Any, params: PyTree) -> Scalar:
        d = params["w1"].shape[0] / widths[0]
        return jnp.sqrt(lr / d / (weight_decay * d**power))

    return pj.Experiment(
        network, task(jax.random.key(0)), loss="mse", optimizer="adamw",
        parametrization=with_decay(name, power), base=dict(width=widths[0]),
        grid=pj.grid(width=list(widths), **TRAINED, seed=seeds), steps=steps, batch=32, measure_at=[round(f * steps) for f in LATE],
        measures=dict(rms=rms, top=top, scale=scale, gain=gain),
    )  # fmt: skip


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Gradients of noise and of signal, over lambda and over d; networks under three rules for the decay."""
    quick = size == "quick"
    sides, seeds, many = (SIDES, 10, 16) if quick else ((32, 64, 128, 256), 16, 16)
    # The slowest decay, eta lambda = 0.00125 (over d: 0.01), has forgotten its start but for exp(-3) of it.
    slow, fast = 2400, 300
    widths, steps = ((16, 32, 64, 96), 400) if quick else ((32, 64, 128, 256), 1000)
    over_d = {
        "noise-over-d": noise(fast, many, width=list(sides)),
        "mixed-over-d": noise(fast, many, SHARE, width=list(sides)),
    }
    return {
        "noise": noise(slow, seeds, weight_decay=list(DECAYS)),
        "signal": noise(slow, 2, 1.0, weight_decay=list(DECAYS)),
        **over_d,
        **{name: training(name, widths, steps, 6 if quick else 8) for name in RULES if not (quick and name == PROPORTIONAL)},
    }


def steady_rms(lr: Any, decay: Any, b1: float) -> Any:
    """RMS of the weights under gradients of noise, from the AR(2) process of the docstring."""
    r = 1 - lr * decay
    return lr * np.sqrt((1 - b1) * (1 + r * b1) / ((1 - r**2) * (1 + b1) * (1 - r * b1)))


def mixed_top(d: Any, share: float, lr: float, decay: float, b1: float) -> Any:
    """sigma_1 of a constant part of the gradient on noise, from the formula of the docstring."""
    size = math.hypot(share, 1 - share)
    theta, s = share / size * np.asarray(d) / decay, (1 - share) / size * steady_rms(lr, decay, b1)
    edge = s * np.sqrt(d)
    return np.where(theta > edge, theta + edge**2 / np.maximum(theta, edge), 2 * edge)


def samples(result: "xarray.Dataset", name: str, axis: str) -> np.ndarray:
    """A measure in the steady state, ``(seed, axis)``: its mean over the steps of the Result."""
    return result[name].mean("step").transpose("seed", axis).values.astype(np.float64)


def worst_level(results: Results) -> Estimate:
    """RMS over sqrt(eta / (2 lambda)), at the lambda where its mean over seeds is furthest from 1."""
    over = samples(results["noise"], "rms", "weight_decay") / np.sqrt(LR / results["noise"].weight_decay.values / 2)
    return estimate(over[:, np.abs(over.mean(axis=0) - 1).argmax()])


def mean_level(results: Results) -> Estimate:
    """RMS over the formula of the AR(2) process, on average over lambda."""
    over = samples(results["noise"], "rms", "weight_decay") / steady_rms(LR, results["noise"].weight_decay.values, B1)
    return estimate(over.mean(axis=1))


def slope(name: str, measure: str, divide: str = "") -> Callable[[Results], Estimate]:
    """Log-log slope of a measure, or of a quotient of two, against the width."""

    def measured(results: Results) -> Estimate:
        y = samples(results[name], measure, "width") / (samples(results[name], divide, "width") if divide else 1.0)
        return fit_slope(results[name].width.values, y)

    return measured


def decay_slope(results: Results) -> Estimate:
    """Log-log slope of the RMS against eta / lambda, eta fixed."""
    found = results["noise"]
    return fit_slope(LR / found.weight_decay.values, samples(found, "rms", "weight_decay"))


def predicted_mixed(results: Results) -> float:
    """The slope that the formula of sigma_1 has over the widths of the run."""
    d = results["mixed-over-d"].width.values
    top_of_d = mixed_top(d, SHARE, LR, 1.0, B1)
    return fit_slope(d, [top_of_d, top_of_d]).value


PURE_SIGNAL = Control("a gradient that never changes: w goes to 1 / lambda, whatever eta is", {"noise": "signal"})
CONSTANT = "the same decay at every width"

CLAIMS = (
    Claim(
        "AdamW on noise: the RMS of the weights is sqrt(eta / (2 lambda))",
        "abstract (norm as sqrt(eta/lambda)); the factor by the docstring", 1.0, worst_level, 0.08,
        "momentum takes 4.2 % at the largest eta lambda, by the formula; the tolerance is twice that", PURE_SIGNAL,
    ),
    Claim(
        "AdamW on noise, momentum included: the RMS is that of the AR(2) process",
        "formula of the docstring", 1.0, mean_level, 0.02,
        "the start is forgotten to 0.2 %; v is a mean of some 1000 squares, so its root is off by less than 1 %", PURE_SIGNAL,
    ),
    Claim(
        "AdamW on noise: the RMS grows as (eta / lambda)^0.5", "abstract", 0.5, decay_slope, 0.03,
        "momentum's correction changes by 3.7 % over the eightfold range, which is 0.017 in the slope", PURE_SIGNAL,
    ),
    Claim(
        "AdamW on noise: the top singular value grows as d^0.5", "formula of the docstring", 0.5, slope("noise-over-d", "top"), 0.1,
        "Tracy and Widom's edge, 1 - 0.38 d^(-2/3), adds 0.03; the paper's 0.75 is well outside",
        Control(f"{100 * SHARE:.0f} % of the gradient never changes", {"noise-over-d": "mixed-over-d"}),
    ),
    Claim(
        f"noise with {100 * SHARE:.0f} % signal: the exponent of the top singular value is between those of noise and signal",
        "formula of the docstring", predicted_mixed, slope("mixed-over-d", "top"), 0.06,
        "the formula is for d to infinity: at the least d the spike is at the edge of the noise, where sigma_1 is off by 5 to 10 %",
        Control("no signal: noise alone", {"mixed-over-d": "noise-over-d"}),
    ),
    Claim(
        "trained under the paper's rule: the RMS of matrices goes as sqrt(eta / lambda), d^-0.75",
        "abstract", -0.75, slope("paper-rule", "rms"), 0.07, "13 % over the sixfold range of widths",
        Control(CONSTANT, {"paper-rule": "constant-decay"}),
    ),
    Claim(
        "trained: the top singular value over sqrt(eta / lambda) grows at least as d^0.75",
        "abstract (as d^0.75)", 0.75, slope("paper-rule", "top", "scale"), 0.0, "half way between noise, 0.5, and signal, 1; no allowance",
        Control("gradients of noise", {"paper-rule": "noise-over-d"}), ">=",
    ),
    Claim(
        "trained with lambda ~ d: the top singular value does not change with the width",
        "formula of the docstring, all signal", 0.0, slope(PROPORTIONAL, "top"), 0.07, "13 % over the sixfold range of widths",
        Control(CONSTANT, {PROPORTIONAL: "constant-decay"}), sizes=("full",),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """RMS against eta / lambda; sigma_1 of noise, signal and both against d; RMS and sigma_1 of trained networks against d."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(2, 2)
    left, right, below, last = axes.reshape(-1)
    ratio = LR / results["noise"].weight_decay.values
    fine = np.geomspace(ratio.min(), ratio.max(), 50)
    for name in ("noise", "signal"):
        points(left, ratio, samples(results[name], "rms", "weight_decay"), f"gradients of {name}")
    prediction(left, fine, np.sqrt(fine / 2), "√(η / 2λ)")
    prediction(left, fine, fine / LR, "1 / λ", linestyle=":")
    left.set(xlabel="η / λ", ylabel="RMS of the weights", title=f"AdamW, η = {LR}, λ varied")

    d = results["noise-over-d"].width.values
    for name, share, label in (("noise", 0.0, "noise"), ("mixed", SHARE, f"{100 * SHARE:.0f} % signal")):
        colour = points(right, d, samples(results[f"{name}-over-d"], "top", "width"), label)
        formula = mixed_top(d, share, LR, 1.0, B1)
        prediction(right, d, formula, "formulas" if name == "noise" else "", color=colour)
    right.set(xlabel="side d of the matrix", ylabel="top singular value σ₁", title="AdamW on noise and signal, λ = 1")

    labels = {"paper-rule": "λ ∝ √d (the paper)", "constant-decay": "λ constant", PROPORTIONAL: "λ ∝ d"}
    for name in [name for name in labels if name in results]:
        label = labels[name]
        result = results[name]
        d = result.width.values
        y = samples(result, "rms", "width")
        colour = points(below, d, y, label)
        scale = samples(result, "scale", "width")[0]
        prediction(below, d, np.exp(np.log(y).mean()) * scale / np.exp(np.log(scale).mean()), "", color=colour)
        points(last, d, samples(result, "top", "width"), label)
    below.set(xlabel="width d", ylabel="RMS of W1 and W2", title="trained; dashed: ∝ √(η/λ), level fitted")
    level = float(np.exp(np.log(samples(results["paper-rule"], "top", "width")[:, 0]).mean()))
    prediction(last, d, level, "no change with d")
    last.set(xlabel="width d", ylabel="σ₁ of W1 and W2", title="trained")
    for ax in (left, right, below, last):
        ax.set(xscale="log", yscale="log")
        ax.legend(loc="best")
    sides = results["noise-over-d"].width.values
    for ax, ticks in ((left, ratio), (right, sides), (below, d), (last, d)):
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    return fig


PAPER = Paper(
    slug="wd-layerwise-scaling",
    title="Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
    authors="Fan, Liu, Zhao, Yuan, Gu",
    year=2025,
    arxiv="2510.15262",
    area="parametrization",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="45 s on two CPU cores", full="not measured"),
    data="generated noise; a noisy random teacher for a pre-norm block of two layers, where the paper trains LLaMA-style models",
)
