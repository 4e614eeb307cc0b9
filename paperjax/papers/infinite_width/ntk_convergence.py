"""Neural Tangent Kernel: Convergence and Generalization in Neural Networks.

Jacot, Gabriel, Hongler, NeurIPS 2018, arXiv 1806.07572.

In NTK parametrization, every weight N(0, 1) and every layer divided by the root of its fan-in, the tangent kernel Theta_n of a perceptron
of width n tends to a kernel Theta, given by a recursion over layers (Theorem 1), and stays there while the network trains (Theorem 2). So
for a squared loss the residual along each eigenvector of Theta decays as ``exp(-eta lambda_i t)`` (Section 5), eta being 2/N for the mean
of N squares; and that ends at 0, since on the sphere Theta is positive definite unless the activation is a polynomial (Proposition 2).

Here: two hidden layers, no biases, 16 points of the sphere in four dimensions (for Theorem 1 as in the paper, x is sqrt(4) times them),
networks minus their own output at init, labels with equal parts along the four leading modes of Theta, full-batch gradient descent.
The networks are mlp's with `pj.ntp` from a base of width 1, where all variances are 1. Erf is smooth, ReLU is not, and both have duals in
closed form. 40 points in three dimensions and biases of variance 0.01 (the paper's beta = 0.1) for the last two claims, in float64.

Claims, expected numbers and tolerances
    slope of |Theta_n - Theta| / |Theta| against n, erf and ReLU           -1/2, +-0.1
    slope of |Theta_n(T) - Theta_n(0)| / |Theta_n(0)|, erf, trained        -1, +-1/8
    the same for ReLU, labels of size 1/10                                 -3/4, +-1/8
    decay rate over eta lambda_i, mode farthest from it, erf, n = 512      1, +-0.1 (at n = 2048, full size only, +-0.05)
    least over largest eigenvalue of Theta, ReLU, 40 points                at least 40 x 2^-52, the rounding
    rank of Theta, polynomial of degree 2 twice, 40 points                 25, exactly: polynomials of degree 4 on the sphere, (4 + 1)^2

The paper has no rates in n. -1/2 is the central limit theorem over neurons. The two of training are derived: pre-activations move by
``n^-1/2``, with signs that do not depend on the neuron's part in the kernel, so what is smooth in them changes means over neurons by
``n^-1/2 n^-1/2``, and their squares as much. A kink is met by ``n^1/2`` of the neurons, whose gates flip, each a change of 1/n of random
sign: ``n^1/4 n^-1``. In the size s of the labels the former is linear and the latter goes as its root.

Controls: standard parametrization, whose kernel is of order n; muP, whose kernel starts as NTP's does (so it is no control for the first
claim) and moves as much at every width; erf for ReLU's -3/4; the NNGP kernel in place of the NTK; a polynomial for ReLU and ReLU for a
polynomial.

What did not hold as first proposed
    - One range for the drift, [-1.1, -0.4]. The law depends on the activation and on the labels: erf -1.02 +- 0.03; ReLU with labels
      of size 1, where its smooth part still counts, -0.92 +- 0.04 (widths 64 to 1024, twelve seeds), of size 1/10 -0.77 +- 0.03, of size
      1/100, where hardly a gate flips and some networks have none, -0.4 +- 0.1.
    - Residuals within 5 % at n = 2048: they do, for erf: 1.025 +- 0.009, 1.019 +- 0.010, 1.004 +- 0.012, 1.007 +- 0.009 for the four
      modes (sixteen seeds; one seed is off by 3 to 5 %). At n = 512 they do not quite: 1.03 +- 0.014 for the first.

Run time: quick 55 s on two CPU cores, mostly compilation; full about half an hour (estimated by the cost of a step).
Command:  paperjax run ntk-convergence
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

erf, relu = jax.scipy.special.erf, jax.nn.relu
HIDDEN_LAYERS = 2
DIM = 4
POINTS = 16
MODES = 4
SMALL_STEP = 0.04
BIAS_VARIANCE = 0.01  # The paper's beta = 0.1, for the kernels on the sphere.
MANY = 40
DEGREE = 2
ROUNDING = MANY * float(np.finfo(np.float64).eps)

WIDTHS: dict[Size, tuple[int, ...]] = {"quick": (32, 80, 200, 512), "full": (32, 64, 128, 256, 512, 1024, 2048)}


def network(phi: Any) -> Callable[[int], pj.Model]:
    """MLPs minus their own output at init: at width 1, which is the base, every weight has variance 1."""

    def family(width: int) -> pj.Model:
        inner = pj.models.mlp(width, HIDDEN_LAYERS, 1, activation=phi, bias=False, weight_variance=1.0)

        def init(key: Array, x: Array) -> PyTree:
            params = inner.init(key, x)
            return {**params, "first": {"w": x.shape[1] ** 0.5 * params["first"]["w"]}}

        return pj.transforms.center(pj.Model(init, inner.apply))

    return family


def on_sphere(key: Array, number: int, dim: int) -> Float[Array, "number dim"]:
    """Uniform points of the unit sphere."""
    x = jax.random.normal(key, (number, dim))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def limit(x_BxD: Array, phi: Any) -> Any:
    """NNGP and NTK of the infinitely wide network without biases."""
    return pj.limits.mlp_kernels(x_BxD @ x_BxD.T, HIDDEN_LAYERS, phi)


def modes(kernel_BxB: Array) -> Float[Array, "points modes"]:
    """The leading eigenvectors."""
    return pj.kernels.eigenvalues(kernel_BxB).vectors[:MODES].T


def task(phi: Any, size: float) -> Callable[[Array], pj.data.Dataset]:
    """Points of the sphere, and labels of RMS `size` with equal parts along the leading modes of the limit kernel."""

    def data(key: Array) -> pj.data.Dataset:
        x = on_sphere(key, POINTS, DIM)
        y = size * (POINTS / MODES) ** 0.5 * jnp.sum(modes(limit(x, phi).ntk), axis=1, keepdims=True)
        return pj.data.Dataset(x, y, x, y, "leading modes", "generated")

    return data


def tangent_kernel(model: pj.Model, params: PyTree, data: Any) -> Array:
    """Theta_n on the training points."""
    return pj.ntk(model, params, data.x_train, outputs="trace")


def points(data: Any) -> Array:
    """The training points, for the limit in float64."""
    return data.x_train


def along_modes(phi: Any, which: str) -> dict[str, Callable[..., Array]]:
    """What is left of the residual along each leading mode of a limit kernel: of the network's, and by its gradient flow."""

    def left(f: Array, data: Any) -> Array:
        kernel = getattr(limit(data.x_train, phi), which)
        v_BxM = modes(kernel)
        return (v_BxM.T @ (f - data.y_train) / (v_BxM.T @ -data.y_train))[:, 0]

    def trained(model: pj.Model, params: PyTree, data: Any) -> Array:
        return left(model.apply(params, data.x_train), data)

    def flow(data: Any, step: Any, lr: Any) -> Array:
        kernel = getattr(limit(data.x_train, phi), which)
        return left(pj.predict.gradient_flow(kernel, data.y_train)(lr * step).train, data)

    return {"trained": trained, "flow": flow}


def limit_float64(x_BxD: Array, phi: Any, bias_variance: float = 0.0) -> Float[Array, "points points"]:
    """The limit kernel, in double precision."""
    with jax.enable_x64(True):
        x_BxD = jnp.asarray(x_BxD).astype(jnp.float64)
        return pj.limits.mlp_kernels(x_BxD @ x_BxD.T, HIDDEN_LAYERS, phi, bias_variance=bias_variance).ntk


def spectrum(phi: Any) -> Callable[..., Array]:
    """Eigenvalues of the limit kernel with biases on the points of the sphere, over the largest; in float64."""

    def eigenvalues(data: Any) -> Array:
        with jax.enable_x64(True):
            values = jnp.linalg.eigvalsh(limit_float64(data.x_train, phi, BIAS_VARIANCE))[::-1]
            return (values / values[0]).astype(jnp.float32)

    return eigenvalues


def training(phi: Any, scheme: Any, widths: Sequence[int], seeds: int, lr: float, size: float = 1.0) -> pj.Experiment:
    """Networks trained to a small loss, and their kernels before and after."""
    return pj.Experiment(
        network(phi), task(phi, size), parametrization=scheme, base=dict(width=1), grid=pj.grid(width=widths, lr=lr, seed=seeds),
        steps=30, measure_at=[0, 30], measures={"kernel": tangent_kernel, "points": points},
    )  # fmt: skip


def descent(phi: Any, which: str, width: int, seeds: int) -> pj.Experiment:
    """Small steps, and the residual along the modes of a limit kernel (``"ntk"`` or ``"nngp"``) as they are taken."""
    return pj.Experiment(
        network(phi), task(phi, 1.0), parametrization=pj.ntp, base=dict(width=1), grid=pj.grid(width=width, lr=SMALL_STEP, seed=seeds),
        steps=160, measure_at=21, measures=along_modes(phi, which),
    )  # fmt: skip


def some_points(key: Array, number: int = POINTS, dim: int = DIM) -> pj.data.Dataset:
    """Points of the sphere, where nothing is to be learned."""
    x = on_sphere(key, number, dim)
    return pj.data.Dataset(x, x[:, :1], x, x[:, :1], "points of the sphere", "generated")


def sphere(phi: Any, seeds: int) -> pj.Experiment:
    """The limit kernel of an activation at 40 points of the sphere in three dimensions; nothing is trained."""
    data, measures = functools.partial(some_points, number=MANY, dim=3), {"eigenvalues": spectrum(phi)}
    return pj.Experiment(
        lambda: pj.models.linear_net(1, 1, 1), data, grid=pj.grid(lr=0.1, seed=seeds), steps=1, measure_at=[0], measures=measures
    )


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Smooth and kinked activations under NTP, and what must fail: muP, standard parametrization, a wrong kernel, a polynomial."""
    widths, quick = WIDTHS[size], size == "quick"
    seeds, few, at = (48, 8, 24) if quick else (64, 16, 48)
    found = {
        "erf": training(erf, pj.ntp, widths, seeds, lr=1.0),
        "relu": training(relu, pj.ntp, widths, seeds, lr=2.0, size=0.1),
        "erf-mup": training(erf, pj.mup_table9, widths, few, lr=1.0),
        "relu-standard": training(relu, None, widths, few, lr=1.0).replace(data=some_points, base=None, steps=1, measure_at=[0]),
        "modes": descent(erf, "ntk", 512, at),
        "modes-nngp": descent(erf, "nngp", 512, few),
        "sphere-relu": sphere(relu, few),
        "sphere-polynomial": sphere(pj.limits.polynomial([1.0] * (DEGREE + 1)), few),
    }
    return found if quick else {**found, "modes-wide": descent(erf, "ntk", 2048, few), "modes-wide-nngp": descent(erf, "nngp", 2048, few)}


def kernels(result: "xarray.Dataset", step: int) -> np.ndarray:
    """Theta_n, ``(seed, width, points, points)``."""
    return result.kernel.isel(step=step).transpose("seed", "width", ...).values.astype(np.float64)


def relative(difference: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Quotient of Frobenius norms."""
    return np.linalg.norm(difference, axis=(2, 3)) / np.linalg.norm(kernel, axis=(2, 3))


def distance(result: "xarray.Dataset", phi: Any) -> np.ndarray:
    """``|Theta_n - Theta| / |Theta|`` at the start, ``(seed, width)``."""
    x_SxBxD = result.points.isel(step=0, width=0).transpose("seed", ...).values
    limits = np.asarray(jax.vmap(lambda x_BxD: limit_float64(x_BxD, phi))(x_SxBxD))[:, None]
    return relative(kernels(result, 0) - limits, limits)


def change(result: "xarray.Dataset") -> np.ndarray:
    """``|Theta_n(T) - Theta_n(0)| / |Theta_n(0)|``, ``(seed, width)``."""
    return relative(kernels(result, -1) - kernels(result, 0), kernels(result, 0))


def convergence(results: Results) -> Estimate:
    """Slope of the distance from the limit at the start: of the two activations', the one that may be farther from -1/2."""
    return farthest([fit_slope(results[name].width, distance(results[name], phi)) for name, phi in (("erf", erf), ("relu", relu))], -0.5)


def farthest(estimates: Sequence[Estimate], number: float) -> Estimate:
    """Of several estimates the one that may be the farthest from a number."""
    return max(estimates, key=lambda e: max(abs(end - number) for end in e.interval))


def drift(name: str) -> Callable[[Results], Estimate]:
    """Slope of the kernel's change over training."""
    return lambda results: fit_slope(results[name].width, change(results[name]))


def residuals(result: "xarray.Dataset", name: str) -> np.ndarray:
    """What is left along the modes, ``(seed, step, mode)``."""
    return result[name].transpose("seed", "step", ...).values.astype(np.float64)


def rates(result: "xarray.Dataset") -> np.ndarray:
    """Decay rate along each mode over that of the flow, ``(seed, mode)``: log on log, through the start, until the flow is at 1/e."""
    trained, flow = (np.log(np.abs(residuals(result, name))) for name in ("trained", "flow"))
    fitted = flow >= -1
    return (fitted * trained * flow).sum(axis=1) / (fitted * flow**2).sum(axis=1)


def decay(name: str) -> Callable[[Results], Estimate]:
    """The rate, over eta lambda, of the mode that may be the farthest from it."""
    return lambda results: farthest([estimate(rate) for rate in rates(results[name]).T], 1.0)


def eigenvalues(results: Results, name: str) -> np.ndarray:
    """Over the largest, ``(seed, points)``."""
    return results[name].eigenvalues.isel(step=0).transpose("seed", ...).values.astype(np.float64)


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Distance from the limit and change over training against width; residuals over time; spectra on the sphere."""
    from paperjax.report.figure import panels, prediction
    from paperjax.report.figure import points as draw

    fig, axes = panels(2, 2)
    start, trained, decaying, spectra = axes.reshape(-1)
    labels = {"erf": "erf, NTP", "relu": "ReLU, NTP", "erf-mup": "erf, muP", "relu-standard": "ReLU, SP"}
    width = results["erf"].width.values
    lines = (start, {"erf": -1 / 2, "relu": -1 / 2, "relu-standard": 1}), (trained, {"erf": -1, "relu": -3 / 4, "erf-mup": 0})
    for ax, slopes in lines:
        for name, slope in slopes.items():
            y = change(results[name]) if ax is trained else distance(results[name], erf if name == "erf" else relu)
            colour = draw(ax, width, y, labels[name])
            level = float(np.exp(np.log(y.mean(axis=0)).mean() - slope * np.log(width).mean()))
            power = {-1 / 2: "$n^{-1/2}$", 1: "$n$", -1: "$n^{-1}$", -3 / 4: "$n^{-3/4}$", 0: "$n^0$"}[slope]
            prediction(ax, width, level * width.astype(float) ** slope, power, color=colour)
        ax.set(xscale="log", yscale="log", xlabel="width n (neurons)")
        ax.set_xticks(width, [str(n) for n in width])
        ax.set_xticks([], minor=True)
        ax.set_ylim(ax.get_ylim()[0] / 30, None)
        ax.legend(ncols=2, loc="lower left")
    start.set(ylabel="$|\\Theta_n - \\Theta| / |\\Theta|$", title="at init; levels of lines fitted")
    trained.set(ylabel="$|\\Theta_n(T) - \\Theta_n(0)| / |\\Theta_n(0)|$", title="change by training; levels of lines fitted")

    result = results["modes"]
    time = SMALL_STEP * result.step.values
    for i in range(MODES):
        y, flow = residuals(result, "trained")[:, :, i], residuals(result, "flow")[:, :, i].mean(axis=0)
        colour = draw(decaying, time, y, f"mode {i + 1}")
        prediction(decaying, time, flow, "$\\exp(-\\eta \\lambda_i t)$" if not i else "", color=colour)
    wrong = residuals(results["modes-nngp"], "flow").mean(axis=0)[:, 0]
    decaying.plot(time, wrong, color="grey", linestyle="dotted", marker="none", label="mode 1 of the NNGP")
    decaying.set(xlabel="time (steps × learning rate)", ylabel="residual left along the mode", title="erf, n = 512, while it trains")
    decaying.set_ylim(0, None)
    decaying.legend()

    number = np.arange(1, MANY + 1)
    for name, label in (("sphere-relu", "ReLU"), ("sphere-polynomial", "polynomial")):
        draw(spectra, number, np.abs(eigenvalues(results, name)), label)
    prediction(spectra, number, ROUNDING, "rounding")
    spectra.axvline((DEGREE**HIDDEN_LAYERS + 1) ** 2 + 0.5, color="grey", linewidth=1, label="rank predicted, 25")
    spectra.set(
        yscale="log", xlabel="number of the eigenvalue", ylabel="|eigenvalue| / largest", title="$\\Theta$ on 40 points of the sphere"
    )
    spectra.legend(loc="center left")
    return fig


def rate_claim(says: str, name: str, tolerance: float, why: str, sizes: Sequence[Size]) -> Claim:
    """The residual along every mode decays at the rate of its eigenvalue."""
    control = Control("the NNGP kernel in place of the NTK: other eigenvalues", {name: f"{name}-nngp"})
    return Claim(says, "Section 5", 1.0, decay(name), tolerance, why, control, sizes=sizes)


WHY_DRIFT = "half the distance between the two laws, -1 and -3/4"

PAPER = Paper(
    slug="ntk-convergence",
    title="Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    authors="Arthur Jacot, Franck Gabriel, Clément Hongler",
    year=2018,
    arxiv="1806.07572",
    area="infinite-width",
    tier="T",
    claims=(
        Claim(
            "the kernel at init comes as near its limit as n^-1/2, for erf and ReLU: slope, the farther of the two",
            "Theorem 1; the rate is the central limit theorem's",
            -0.5,
            convergence,
            0.1,
            "as first proposed: the next order is 1/n, which steepens the slope where widths are small",
            Control("standard parametrization: the kernel is of order n, and its diagonal wrong by orders", {"relu": "relu-standard"}),
        ),
        Claim(
            "the kernel of a smooth activation moves by 1/n while it trains: slope, erf",
            "Theorem 2; the rate is derived above, and in arXiv 1909.08156",
            -1.0,
            drift("erf"),
            0.125,
            WHY_DRIFT,
            Control("muP, which learns features: its kernel moves as much at every width", {"erf": "erf-mup"}),
        ),
        Claim(
            "the kernel of a ReLU moves by n^-3/4, by its gates that flip: slope, small labels",
            "derived above",
            -0.75,
            drift("relu"),
            0.125,
            WHY_DRIFT,
            Control("erf, which has no gates", {"relu": "erf"}),
        ),
        rate_claim(
            "the residual along every leading mode decays at the rate of its eigenvalue, n = 512: rate over eta lambda_i, farthest",
            "modes",
            0.1,
            "5 % at n = 2048 as first proposed, and what falls as n^-1/2 is twice that at 512; steps of 0.04 add 2 % at most",
            ("quick", "full"),
        ),
        rate_claim(
            "the same, n = 2048",
            "modes-wide",
            0.05,
            "as first proposed: deviations fall as n^-1/2, one seed's being 4 % there; steps of 0.04 add 2 % at most",
            ("full",),
        ),
        Claim(
            "Theta of a ReLU network is positive definite on the sphere: least eigenvalue over the largest, 40 points, is above rounding",
            "Proposition 2",
            ROUNDING,
            lambda results: estimate(eigenvalues(results, "sphere-relu")[:, -1]),
            0.0,
            "a lower bound: 40 units of rounding of float64, below which an eigenvalue cannot be told from 0",
            Control("a polynomial of degree 2 in place of the ReLU", {"sphere-relu": "sphere-polynomial"}),
            relation=">=",
        ),
        Claim(
            "Theta of a network with polynomial activations is a polynomial: rank on 40 points of the sphere in three dimensions",
            "Proposition 2 excludes polynomials; the rank is the dimension of polynomials of degree 4 on that sphere",
            (DEGREE**HIDDEN_LAYERS + 1) ** 2,
            lambda results: estimate((eigenvalues(results, "sphere-polynomial") > ROUNDING).sum(axis=1)),
            0.0,
            "an integer, the same for all points in general position",
            Control("ReLU: full rank", {"sphere-polynomial": "sphere-relu"}),
        ),
    ),
    experiments=experiments,
    figure=figure,
    run_time={"quick": "55 s on two CPU cores", "full": "about half an hour on two CPU cores (estimated)"},
    data="generated: points of the unit sphere, labels along the leading modes of the limit kernel",
)
