"""Demystifying the Neural Tangent Kernel from a Practical Perspective: Can it be trusted for Neural Architecture Search without training?

Mok, Na, Kim, Han, Yoon, CVPR 2022, arXiv 2203.14577.

Numbers read off the tangent kernel Theta at init (mean, Frobenius norm, condition number) have been proposed to rank architectures without
training. The kernels of modern architectures move, so the paper trains a little and then ranks by label-gradient alignment,

    LGA = <Theta - mean(Theta), L - mean(L)> / (|Theta - mean(Theta)| |L - mean(L)|),    L_nm = y_n . y_m,

means over all entries. Accuracy after training and a metric are compared by Kendall's tau over architectures.

Here: the cell of NAS-Bench-201, four nodes, each of six edges one of none, skip, mean pooling, convolution over one or over three (after a
ReLU, and normalised), on the eight rows of a digit with twelve channels; a mean over rows and a linear readout. Which operation is on an
edge is data, so all architectures are one program. 256 digits to train on, 900 to test on; SGD with momentum 0.9, batches of 16, accuracy
after sixteen epochs. LGA is read after four, 64 updates; the paper's one epoch has 49 (its code: CIFAR in batches of 1,024). Kernels are
traced over outputs, on 32 training digits. 32 random architectures (100 at full size), metrics and accuracies means over 4 (8) seeds;
intervals leave out one architecture at a time (jackknife), and are wide: +-0.15 to 0.25 for a tau.

Claims, expected numbers and tolerances
    -tau of the condition number at init                          at least 0.4, the number that was proposed as a bound from above
    tau of LGA after four epochs, less that of LGA at init        at least 0.2
    |Theta_T - Theta_0| / |Theta_0|, mean over architectures      at least 0.5
    its slope against width, rates over width (full size)         -1/2, +-1/4: half the distance to a kernel that moves at any width
    LGA of linearised networks                                    changes by at most 0.01 of its size

Controls: other architectures' kernels; linearised networks, whose kernel stays; one learning rate for all widths; the networks themselves.

What did not hold as first proposed (48 architectures, four seeds, kernels on 48 digits, +- standard error)
    - |tau| at init at most 0.4: not for the condition number, -0.66 +- 0.05. (Counting convolutions over three rows gives 0.59 +- 0.06.)
      For trace, Frobenius norm and mean it is 0.24, 0.32 and 0.33 +- 0.1, which leaves the bound undecided.
    - LGA after training beats all of those by 0.2: after four epochs it has 0.66 +- 0.06, against -0.06 +- 0.10 for itself at init. That is
      0.42, 0.34 and 0.33 +- 0.12 more than the other three, which is undecided, and no more than the condition number at init. Nor is it
      LGA alone: the trace's tau after four epochs is 0.57 +- 0.08.
    - After one to two epochs: LGA has 0.27 +- 0.07 after two, of 16 updates each, so that the gain, 0.32 +- 0.13, is undecided. It needs
      several seeds: the LGA of two seeds agrees over architectures by a tau of 0.10 at init, 0.04 after two epochs, 0.28 after four and
      0.54 after sixteen.
    - "Shrinks with width" is measured over widths 8 to 64, four architectures, five seeds: slope -0.35 +- 0.02, with one rate for all
      widths 0.01 +- 0.03. It is shallower than n^-1/2, and flattens (-0.44, -0.32, -0.29), so a limit is not reached at these widths.

Run time: quick 40 s on two CPU cores; full about ten minutes (estimated)
Command:  paperjax run ntk-nas-lga
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

OPERATIONS = ("none", "skip", "pool", "convolution over 1 row", "convolution over 3 rows")
EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# Which of three rows, the one above, itself and the one below, an operation's convolution sees.
TAPS = ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 1, 1))
ROWS, CLASSES, CHANNELS = 8, 10, 12
RATE, BATCH, TRAIN, EXAMPLES = 0.1, 16, 256, 32
EPOCH = TRAIN // BATCH
EARLY, FINAL = 4 * EPOCH, 16 * EPOCH
ARCHITECTURES: dict[Size, int] = {"quick": 32, "full": 100}
SEEDS: dict[Size, int] = {"quick": 4, "full": 8}
WIDTHS = (8, 16, 32, 64)
METRICS = ("trace", "Frobenius norm", "condition number", "mean", "LGA")


def operations(arch: Any) -> list[Any]:
    """Which of OPERATIONS is on each edge: the digits of the architecture's number to the base five."""
    return [arch // len(OPERATIONS) ** e % len(OPERATIONS) for e in range(len(EDGES))]


def connected(arch: int) -> bool:
    """Whether the input reaches the last node."""
    reached = {0}
    for (start, end), operation in zip(EDGES, operations(arch)):
        if start in reached and operation:
            reached.add(end)
    return 3 in reached


def draw(number: int, first: int = 0) -> list[int]:
    """Distinct connected architectures of a fixed random order of all 5^6."""
    order = np.random.default_rng(0).permutation(len(OPERATIONS) ** len(EDGES))
    return [int(arch) for arch in order if connected(int(arch))][first : first + number]


def network(arch: Any, width: Any, channels: int = CHANNELS) -> pj.Model:
    """A digit's eight rows of pixels, one cell with the architecture's operations, the mean over rows and a linear readout.

    All architectures are one program: `arch` and `width`, how many of the channels are used, may be traced. Unused channels start at 0
    and stay there, since every way on from them is through a ReLU, whose derivative at 0 is 0.
    """

    def normalised(h: Array) -> Array:
        # Over rows and channels of each example: no batch statistics, so that a kernel is between examples.
        return h * jax.lax.rsqrt(jnp.sum(h**2, axis=(1, -1), keepdims=True) / (ROWS * width) + 1e-5)

    def init(key: Array, x: Array) -> PyTree:
        keys, used = jax.random.split(key, 3), (jnp.arange(channels) < width).astype(x.dtype)
        return {
            "stem": ROWS**-0.5 * used[None] * jax.random.normal(keys[0], (ROWS, channels)),
            "cell": width**-0.5 * used[None, None, None] * jax.random.normal(keys[1], (len(EDGES), 3, channels, channels)),
            "readout": width**-0.5 * used[:, None] * jax.random.normal(keys[2], (channels, CLASSES)),
        }

    def apply(params: PyTree, x: Array) -> Float[Array, "batch classes"]:
        batch, chosen = x.shape[0], jnp.stack(operations(arch))
        skip_E, pool_E = ((chosen == k).astype(x.dtype) for k in (1, 2))
        w_ExTxNxN = jnp.asarray(TAPS, x.dtype)[chosen][:, :, None, None] * params["cell"]
        h_BxRxN = x.reshape(batch, ROWS, ROWS) @ params["stem"]
        nodes_BxRxKxN = jnp.zeros((batch, ROWS, 3, channels), x.dtype)
        for edges in (slice(0, 3), slice(3, 5), slice(5, 6)):
            padded = jnp.pad(h_BxRxN, ((0, 0), (1, 1), (0, 0)))
            near_BxRxTN = jnp.concatenate([padded[:, :-2], h_BxRxN, padded[:, 2:]], axis=2)
            w_TNxKN = w_ExTxNxN[edges].transpose(1, 2, 0, 3).reshape(3 * channels, -1)
            nodes_BxRxKxN = (
                nodes_BxRxKxN
                + normalised((jax.nn.relu(near_BxRxTN) @ w_TNxKN).reshape(nodes_BxRxKxN.shape))
                + skip_E[None, None, edges, None] * h_BxRxN[:, :, None]
                + pool_E[None, None, edges, None] * near_BxRxTN.reshape(batch, ROWS, 3, channels).mean(axis=2)[:, :, None]
            )
            h_BxRxN, nodes_BxRxKxN = nodes_BxRxKxN[:, :, 0], nodes_BxRxKxN[:, :, 1:]
        return normalised(jax.nn.relu(h_BxRxN)).mean(axis=1) @ params["readout"]

    return pj.Model(init, apply)


def few_digits() -> pj.data.Dataset:
    """256 digits to train on, as many of each class, and 900 to test on; one-hot labels."""
    digits = pj.data.standardise(pj.data.digits(test=900), per="dataset")
    return pj.data.one_hot(pj.data.subset(digits, train=TRAIN, key=jax.random.key(0), balanced=True))


def sgd(learning_rate: Any) -> optax.GradientTransformation:
    """With the momentum of the paper's code."""
    return optax.sgd(learning_rate, momentum=0.9)


def sgd_over_width(learning_rate: Any, width: Any) -> optax.GradientTransformation:
    """In standard parametrization the kernel grows with the width; its product with the rate does not."""
    return sgd(learning_rate * CHANNELS / width)


def kernel(model: pj.Model, params: PyTree, data: Any) -> Float[Array, "examples examples"]:
    """The tangent kernel of the first training digits, traced over outputs."""
    return pj.ntk(model, params, data.x_train[:EXAMPLES], outputs="trace")


def labels(data: Any) -> Float[Array, "examples classes"]:
    """Theirs."""
    return jnp.asarray(data.y_train[:EXAMPLES])


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """The architectures for four epochs and for sixteen; linearised; others in their place; a few at several widths."""
    number, digits = ARCHITECTURES[size], few_digits()
    cell = functools.partial(network, width=CHANNELS)

    def training(family: Any, steps: int, at: Sequence[int], archs: Sequence[int], measures: Mapping[str, Any]) -> pj.Experiment:
        return pj.Experiment(
            family, digits, loss="cross_entropy", optimizer=sgd, batch=BATCH, grid=pj.grid(arch=archs, lr=RATE, seed=SEEDS[size]),
            steps=steps, measure_at=at, measures=measures,
        )  # fmt: skip

    read = {"kernel": kernel, "labels": labels}
    found = {
        "cells": training(cell, EARLY, [0, EARLY], draw(number), read),
        "trained": training(cell, FINAL, [FINAL], draw(number), {**read, "accuracy": pj.measures.accuracy}),
        "linear": training(lambda arch: pj.transforms.linearize(cell(arch)), EARLY, [0, EARLY], draw(number), read),
        "others": training(cell, 1, [0], draw(number, number), read),
    }
    if size == "quick":
        return found
    over_width = training(functools.partial(network, channels=max(WIDTHS)), EARLY, [0, EARLY], draw(4), read)
    over_width = over_width.replace(grid=pj.grid(width=WIDTHS, arch=draw(4), lr=RATE, seed=5))
    return {**found, "widths": over_width.replace(optimizer=sgd_over_width), "widths-one-rate": over_width}


def kernels(result: "xarray.Dataset", step: int) -> np.ndarray:
    """``(seed, arch, examples, examples)`` at the given measurement."""
    return result.kernel.isel(step=step).transpose("seed", "arch", ...).values.astype(np.float64)


def metric(result: "xarray.Dataset", step: int, name: str) -> np.ndarray:
    """One of METRICS of the kernel, mean over seeds (the geometric one for the condition number), ``(arch,)``."""
    found, y = kernels(result, step), result.labels.values.reshape(-1, EXAMPLES, CLASSES)[0]
    if name == "trace":
        return np.trace(found, axis1=2, axis2=3).mean(axis=0)
    if name == "Frobenius norm":
        return np.linalg.norm(found, axis=(2, 3)).mean(axis=0)
    if name == "mean":
        return found.mean(axis=(0, 2, 3))
    if name == "condition number":
        values = np.linalg.eigvalsh((found + found.swapaxes(2, 3)) / 2)
        # Kernels are float32, so that smaller eigenvalues are rounding.
        return np.log(values[..., -1] / np.maximum(values[..., 0], 1e-7 * values[..., -1])).mean(axis=0)
    return np.array(alignments(found, y)).mean(axis=0)


def alignments(kernels_SxAxMxM: np.ndarray, y: np.ndarray) -> np.ndarray:
    """LGA of each kernel, ``(seed, arch)``."""
    lga = jax.vmap(jax.vmap(lambda k: pj.kernels.label_gradient_alignment(k, jnp.asarray(y))))
    return np.asarray(lga(jnp.asarray(kernels_SxAxMxM, jnp.float32)))


def tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's rank correlation tau-b."""
    from scipy.stats import kendalltau

    return float(np.asarray(kendalltau(x, y))[0])


def jackknife(statistic: Callable[..., float], *samples: np.ndarray) -> Estimate:
    """A statistic of architectures, and its standard error from leaving each of them out."""
    n = len(samples[0])
    without = np.array([statistic(*(np.delete(x, i) for x in samples)) for i in range(n)])
    return Estimate(statistic(*samples), float(np.sqrt((n - 1) / n * np.sum((without - without.mean()) ** 2))), n)


def accuracy(results: Results) -> np.ndarray:
    """Of every architecture after training, mean over seeds."""
    return results["trained"].accuracy.isel(step=-1).mean("seed").values.astype(np.float64)


def condition(results: Results) -> Estimate:
    """How well the condition number at init ranks architectures by accuracy: minus tau."""
    return jackknife(lambda x, y: -tau(x, y), metric(results["cells"], 0, "condition number"), accuracy(results))


def gain(results: Results) -> Estimate:
    """How much better than at init LGA ranks them after four epochs: difference of taus."""
    before, after = (metric(results["cells"], step, "LGA") for step in (0, -1))
    return jackknife(lambda a, b, y: tau(a, y) - tau(b, y), after, before, accuracy(results))


def relative(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """``|Theta_T - Theta_0| / |Theta_0|``."""
    return np.linalg.norm(now - before, axis=(-2, -1)) / np.linalg.norm(before, axis=(-2, -1))


def change(results: Results) -> Estimate:
    """Relative change of the kernel by training, mean over architectures."""
    return estimate(relative(kernels(results["trained"], -1), kernels(results["cells"], 0)).mean(axis=0))


def drift(results: Results) -> Estimate:
    """Slope of the relative change against width, geometric mean over architectures, interval over seeds."""
    result = results["widths"]
    return fit_slope(result.width, changes(result))


def changes(result: "xarray.Dataset") -> np.ndarray:
    """Relative changes of the kernel, geometric mean over architectures, ``(seed, width)``."""
    first, last = (result.kernel.isel(step=s).transpose("seed", "width", "arch", ...).values.astype(np.float64) for s in (0, -1))
    return np.exp(np.log(relative(last, first)).mean(axis=2))


def alignment_change(results: Results) -> Estimate:
    """Largest change of LGA over architectures, relative to its mean size at init; mean over seeds."""
    result = results["linear"]
    y = result.labels.values.reshape(-1, EXAMPLES, CLASSES)[0]
    before, after = (alignments(kernels(result, step), y) for step in (0, -1))
    return estimate(np.abs(after - before).max(axis=1) / np.abs(before).mean(axis=1))


CLAIMS = (
    Claim(
        "at init the condition number ranks architectures all the same: minus Kendall's tau with accuracy",
        "against the proposal; TE-NAS, arXiv 2102.11535, ranks by it", 0.4, condition, 0.0,
        "the number of the proposal, which says that |tau| of every metric at init is at most 0.4; the interval is over architectures",
        Control("condition numbers of other architectures, drawn alike", {"cells": "others"}), relation=">=",
    ),
    Claim(
        "LGA after four epochs ranks better than LGA at init: tau less tau",
        "abstract: with minimal amount of training LGA obtains a meaningful rank correlation", 0.2, gain, 0.0,
        "the number of the proposal; a paired jackknife over architectures gives the interval",
        Control("linearised networks trained as long: their kernel is still that at init", {"cells": "linear"}), relation=">=",
    ),
    Claim(
        "the kernel of these networks changes by more than half of its norm while they train: mean over architectures",
        "abstract: highly non-linear characteristics", 0.5, change, 0.0,
        "the number of the proposal; the interval is over architectures",
        Control("linearised networks, whose kernel does not move", {"trained": "linear"}), relation=">=",
    ),
    Claim(
        "the relative change of the kernel shrinks with width: log-log slope at learning rates over width",
        "Lee et al., arXiv 1902.06720, Theorem 2.1: n^-1/2", -0.5, drift, 0.25,
        "half the distance between the two laws, -1/2 and the 0 of networks that go on learning features; widths are below the examples",
        Control("one learning rate for all widths: the kernel grows with the width, and with it what training does to it",
                {"widths": "widths-one-rate"}),
        sizes=("full",),
    ),
    Claim(
        "LGA of linearised networks stays: largest change over architectures after four epochs, over its mean size at init",
        "definition of the linearised network", 0.0, alignment_change, 0.01,
        "the proposal's 1 %; the kernel of a linearised network is exactly that at init, so that only rounding is left",
        Control("the networks themselves", {"linear": "cells"}), relation="<=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Rank correlations over training, LGA against accuracy, the kernel's change for each architecture and against width."""
    from paperjax.estimates import half_width
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(2, 2) if "widths" in results else panels(1, 3)
    ranks, scatter, moved, *rest = axes.reshape(-1)
    reached, y = accuracy(results), np.arange(len(METRICS))
    for shift, (label, result, step) in zip(
        (0.25, 0.0, -0.25), (("at init", "cells", 0), (f"{EARLY} updates", "cells", -1), (f"{FINAL} updates", "trained", -1))
    ):
        found = [jackknife(tau, metric(results[result], step, name), reached) for name in METRICS]
        bars = [half_width(e.samples) * e.stderr for e in found]
        ranks.errorbar([e.value for e in found], y + shift, xerr=bars, linestyle="none", capsize=2.5, label=label)
    for bound in (-0.4, 0.4):
        ranks.axvline(bound, color="black", linewidth=1.2, linestyle=(0, (3, 2)), label="proposed bound at init" if bound > 0 else None)
    ranks.set_yticks(y, METRICS)
    ranks.set_xticks([-1, -0.5, 0, 0.5, 1])
    ranks.set(xlim=(-1, 1), ylim=(-0.5, len(METRICS) + 1.3), xlabel="Kendall's tau with accuracy after training", title="rank correlation")
    ranks.legend(ncols=2, loc="upper center", fontsize=7.5, columnspacing=0.8)

    for label, step in (("at init", 0), (f"after {EARLY} updates", -1)):
        scatter.plot(metric(results["cells"], step, "LGA"), reached, linestyle="none", label=label)
    scatter.set(xlabel="LGA, mean over seeds", ylabel=f"test accuracy after {FINAL} updates", title="one point for each architecture")
    scatter.set_ylim(None, scatter.get_ylim()[1] + 0.04)
    scatter.legend(ncols=2, loc="upper center")

    start = kernels(results["cells"], 0)
    number = np.arange(1, len(reached) + 1)
    order = np.argsort(relative(kernels(results["trained"], -1), start).mean(axis=0))
    for label, name in ((f"{FINAL} updates", "trained"), (f"{EARLY} updates", "cells"), ("linearised", "linear")):
        points(moved, number, relative(kernels(results[name], -1), start)[:, order], label, capsize=0, elinewidth=0.7)
    prediction(moved, number, 0.5, "at least, on average", zorder=3)
    moved.set(xlabel="architectures, in order", ylabel="$|\\Theta_T - \\Theta_0| / |\\Theta_0|$", title="change of the kernel")
    moved.set_ylim(None, moved.get_ylim()[1] * 1.3)
    moved.legend(ncols=2, loc="upper left", fontsize=7.5, columnspacing=0.8)

    for widths in rest:
        for name, label, slope in (("widths", "rate over width", -0.5), ("widths-one-rate", "control: one rate", 0.0)):
            width, found = results[name].width.values.astype(float), changes(results[name])
            colour = points(widths, width, found, label)
            level = np.exp(np.log(found.mean(axis=0)).mean() - slope * np.log(width).mean())
            prediction(widths, width, level * width**slope, f"slope {slope:g}", color=colour)
        widths.set(xscale="log", yscale="log", xlabel="width (channels)", ylabel="$|\\Theta_T - \\Theta_0| / |\\Theta_0|$")
        widths.set(title=f"change of the kernel in {EARLY} updates")
        widths.set_xticks(width, [f"{n:g}" for n in width])
        widths.set_xticks([], minor=True)
        widths.legend(loc="lower left")
    return fig


PAPER = Paper(
    slug="ntk-nas-lga",
    title=(
        "Demystifying the Neural Tangent Kernel from a Practical Perspective: "
        "Can it be trusted for Neural Architecture Search without training?"
    ),
    authors="Jisoo Mok, Byunggook Na, Ji-Hoon Kim, Dongyoon Han, Sungroh Yoon",
    year=2022,
    arxiv="2203.14577",
    area="hyper-meta",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="40 s on two CPU cores", full="about ten minutes on two CPU cores (estimated)"),
    data="256 of scikit-learn's digits, where the paper has CIFAR and NAS-Bench-101 and 201",
)
