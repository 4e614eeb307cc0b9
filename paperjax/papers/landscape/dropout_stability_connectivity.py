"""Landscape Connectivity and Dropout Stability of SGD Solutions for Over-parameterized Neural Networks.

Shevchenko, Mondelli, ICML 2020, arXiv 1912.10095.

A mean-field network ``f(x) = (1/N) sum_i a_i relu(w_i . x)`` is trained by SGD with a learning rate of order N. Theorem 1: keep M of its
neurons and multiply by N/M, and the loss rises by O(1/M), whatever N. Two solutions are therefore joined by a path of straight pieces,
each network falling back to one half of its neurons while the hidden weights of the other half are swapped, on which the loss rises
no more than that; on the straight line it does not get better with N.

Derived here, and exact for any parameters: over random sets of M neurons the square loss rises on average by

    (1/M - 1/N) S²,    S² = 1/(N-1) sum_i |a_i relu(w_i . x) - f(x)|²  (mean over examples and outputs),

since that is sampling without replacement, and f_kept - f has mean 0. With M = N/2 it is S²/N, and at fixed M it saturates at S²/M. On
the path the network is linear in what moves, or does not change, so the loss is largest at a corner: its barrier comes from two increases.

Here: scikit-learn's digits, pixels in [0, 1], ten outputs, targets one-hot, loss the mean over examples and outputs (0.1 for f = 0), of
360 test digits; w_i ~ N(0, I/64), a_i ~ N(0, 1); minibatches of 32, learning rate N/2. A cell trains two networks, on the same batches.

Claims, expected numbers and tolerances
    mean increase over (1/M - 1/N) S², M = N/2 and 32, farthest N                 1, +-0.15
    slope of the log of the mean increase at M = N/2 on log N                     -0.9, +-0.2 (set beforehand; derived: -1)
    slope of the log of the barrier on the path on log N                          the same
    slope of the log of the barrier on the straight line on log N                 0, +-0.15
    increase at M = 32, twice the width over once, at the widest                  (1 - 32/N) / (1 - 64/N), +-0.15

Controls: neurons dropped without the factor N/M; f scaled by N^-1/2, with a learning rate of order 1; hidden weights that move while in
use; the path for the straight line.

Measured (quick): 0.947 +- 0.032 (the farthest of ten), -0.948 +- 0.017, -0.940 +- 0.028, -0.052 +- 0.010, 0.991 +- 0.022. The controls
give 3.3, -0.11, -0.33, -0.94, 1.99.

Run time: quick 94 s of CPU time, measured on busy cores, so about 47 s on two that are idle; full not measured
Command:  paperjax run dropout-stability-connectivity
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.measures import barrier, dropout_path, dropout_variance, keep, losses_along

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

KEPT = 32
LR = 0.5
WIDTHS: dict[Size, tuple[int, ...]] = {"quick": (64, 128, 256, 512, 1024), "full": (64, 128, 256, 512, 1024, 2048)}
FEWER = (64, 128, 256, 512)


def pair(width: int, scaling: float) -> pj.Model:
    """Two networks with starts of their own, outputs side by side."""
    one = pj.models.two_layer(width, 10, scaling=scaling)

    def init(key: Array, x: Array) -> PyTree:
        first, second = jax.random.split(key)
        return {"one": one.init(first, x), "other": one.init(second, x)}

    return pj.Model(init, lambda params, x: jnp.concatenate([one.apply(params["one"], x), one.apply(params["other"], x)], axis=1))


def twice() -> pj.data.Dataset:
    """The digits, with targets for both networks."""
    digits = pj.data.one_hot(pj.data.digits())
    return digits.replace(y_train=np.tile(digits.y_train, 2), y_test=np.tile(digits.y_test, 2))


def halves(key: Array, width: int, kept: int, sets: int) -> Bool[Array, "sets N"]:
    """Random sets of neurons."""
    return jax.vmap(lambda k: jax.random.permutation(k, width) < kept)(jax.random.split(key, sets))


def describe(scaling: float, rescaled: bool, path: str, sets: int) -> dict[str, Callable[..., Any]]:
    """Losses of the first network, whole and with neurons dropped, S², and losses on a path to the second."""

    def loss_of(data: Any, width: int) -> tuple[pj.Model, Callable[[PyTree], Scalar]]:
        model = pj.models.two_layer(width, 10, scaling=scaling)
        return model, lambda params: jnp.mean(jnp.square(model.apply(params, data.x_test) - data.y_test[:, :10]))

    def increase(params: PyTree, data: Any, width: int, key: Array) -> Float[Array, "2"]:
        loss, one = loss_of(data, width)[1], params["one"]

        def mean(kept: int) -> Scalar:
            dropped = jax.lax.map(lambda kept_N: loss(keep(one, kept_N, rescaled)), halves(key, width, kept, sets))
            return jnp.mean(dropped) - loss(one)

        return jnp.stack([mean(width // 2), mean(KEPT)])

    def variance(params: PyTree, data: Any, width: int) -> Scalar:
        return dropout_variance(loss_of(data, width)[0], params["one"], data.x_test)

    def along(params: PyTree, data: Any, width: int, key: Array) -> Float[Array, "paths points"]:
        loss, one, other = loss_of(data, width)[1], params["one"], params["other"]
        if path == "straight":
            return losses_along(loss, [one, other], 20)[None]

        def losses(kept_N: Array) -> Array:
            return losses_along(loss, dropout_path(one, other, kept_N, swap=path == "piecewise"), 4)

        return jax.lax.map(losses, halves(key, width, width // 2, max(2, sets // 8)))

    dropped = {"increase": increase, "variance": variance}
    return {"straight": {"along": along}, "none": dropped}.get(path, {**dropped, "along": along})


def trained(size: Size, widths: Sequence[int], scaling: float = 1.0, rescaled: bool = True, path: str = "piecewise") -> pj.Experiment:
    """Pairs of networks over widths."""
    seeds, steps, sets = (5, 600, 32) if size == "quick" else (20, 5000, 64)

    def sgd(learning_rate: Any, width: int) -> optax.GradientTransformation:
        # The loss is a mean over two networks, hence the 2.
        return optax.sgd(2 * learning_rate * width ** (2 * scaling - 1))

    return pj.Experiment(
        lambda width: pair(width, scaling), twice(), loss="mse", optimizer=sgd, batch=32,
        grid=pj.grid(width=list(widths), lr=LR, seed=seeds), steps=steps, measure_at=[steps],
        measures=describe(scaling, rescaled, path, sets),
    )  # fmt: skip


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Mean-field networks joined by the path; by a straight line; what must not work."""
    return {
        "mean-field": trained(size, WIDTHS[size]),
        "straight": trained(size, FEWER, path="straight"),
        "broken": trained(size, FEWER, rescaled=False, path="no swap"),
        "kernel": trained(size, FEWER, scaling=0.5, path="none"),
    }


def increases(result: "xarray.Dataset", which: int) -> np.ndarray:
    """Mean increases, ``(seed, width)``, with half of the neurons (0) or `KEPT` (1)."""
    return result.increase.isel(step=-1, increase_0=which).transpose("seed", "width").values.astype(np.float64)


def formula(result: "xarray.Dataset", which: int) -> np.ndarray:
    """``(1/M - 1/N) S²``, ``(seed, width)``."""
    N = result.width.values.astype(np.float64)
    kept = N / 2 if which == 0 else np.full_like(N, KEPT)
    return (1 / kept - 1 / N) * result.variance.isel(step=-1).transpose("seed", "width").values.astype(np.float64)


def barriers(result: "xarray.Dataset") -> np.ndarray:
    """Barriers, ``(seed, width)``, mean over the paths of a seed."""
    along = result.along.isel(step=-1).transpose("seed", "width", "along_0", "along_1").values
    return np.asarray(jax.vmap(jax.vmap(jax.vmap(barrier)))(along), np.float64).mean(axis=-1)


def exact(results: Results) -> Estimate:
    """Increase over formula, of both M and all N the one that may be farthest from 1."""
    result = results["mean-field"]
    ratios = np.concatenate([increases(result, which) / formula(result, which) for which in (0, 1)], axis=1)
    return max((estimate(column) for column in ratios.T), key=lambda e: max(abs(end - 1) for end in e.interval))


def slope(name: str, samples: Callable[["xarray.Dataset"], np.ndarray]) -> Callable[[Results], Estimate]:
    """Log-log slope on the width."""
    return lambda results: fit_slope(results[name].width.values, samples(results[name]))


def saturation(results: Results) -> Estimate:
    """Increase with `KEPT` neurons, the widest network over the one of half its width."""
    found = increases(results["mean-field"], 1)
    return estimate(found[:, -1] / found[:, -2])


def predicted_saturation(results: Results) -> float:
    """``(1 - M/N) / (1 - 2 M/N)`` at the largest N."""
    share = KEPT / float(results["mean-field"].width[-1])
    return (1 - share) / (1 - 2 * share)


TABLE = "an interval set beforehand: S² grows with N while N is small, so the slope is flatter than -1"
FORMULA = "derived in the docstring"
KERNEL = "f scaled by N^-1/2 with a learning rate of order 1: a neuron's part does not fall as 1/N"
CLAIMS = (
    Claim(
        "mean loss increase over (1/M - 1/N) S², half of the neurons or 32 kept, farthest of all N",
        FORMULA, 1.0, exact, 0.15, "exact on average over sets; 32 sets of 5 networks each leave some 0.03, and it is the worst of ten",
        Control("neurons dropped without the factor N/M: the mean is then not f", {"mean-field": "broken"}),
    ),
    Claim(
        "loss increase with half of the neurons falls as 1/N: slope of its log on log N",
        "abstract and Theorem 1", -0.9, slope("mean-field", lambda result: increases(result, 0)), 0.2, TABLE,
        Control(KERNEL, {"mean-field": "kernel"}),
    ),
    Claim(
        "the barrier on the piecewise path falls as 1/N: slope of its log on log N",
        "abstract and Theorem 1", -0.9, slope("mean-field", barriers), 0.2, TABLE,
        Control("hidden weights move while they are in use, with no swap", {"mean-field": "broken"}),
    ),
    Claim(
        "the barrier on the straight line does not fall: slope of its log on log N",
        "abstract: the path is piecewise", 0.0, slope("straight", barriers), 0.15,
        "set beforehand; midpoints of independent neurons have a law of their own as N grows, met up to 1/N",
        Control("the piecewise path", {"straight": "mean-field"}),
    ),
    Claim(
        "at fixed M = 32 the increase saturates: at the largest N over half of it",
        "Theorem 1: the bound depends on M, not on N", predicted_saturation, saturation, 0.15,
        "S² at the two widths differs by a few per cent; with half of the neurons the ratio would be 1/2",
        Control(KERNEL, {"mean-field": "kernel"}),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Increases and barriers over the width, and the loss along the two paths."""
    from paperjax.report.figure import curves, panels, points, prediction

    fig, axes = panels(2, 2)
    half, fixed, height, way = axes.reshape(-1)
    main, straight, broken, kernel = (results[name] for name in ("mean-field", "straight", "broken", "kernel"))
    N = main.width.values
    for ax, which, title in ((half, 0, "half of the neurons kept"), (fixed, 1, f"{KEPT} neurons kept")):
        wide = N > KEPT
        points(ax, N[wide], increases(main, which)[:, wide], "mean field")
        prediction(ax, N[wide], formula(main, which).mean(axis=0)[wide], "$(1/M - 1/N)\\,S^2$")
        points(ax, kernel.width.values, increases(kernel, which), "control: $N^{-1/2}$", marker="s")
        points(ax, broken.width.values, increases(broken, which), "control: no factor N/M", marker="^")
        ax.set(ylabel="increase of the test loss (square)", title=title)
    points(height, N, barriers(main), "piecewise path")
    prediction(height, N, barriers(main).mean(axis=0)[0] * N[0] / N, "slope −1")
    for result, label, marker in ((broken, "control: no swap", "^"), (straight, "straight line", "D")):
        points(height, result.width.values, barriers(result), label, marker=marker)
    height.set(ylabel="barrier of the test loss (square)", title="between two trained networks")
    for ax in (half, fixed, height):
        ax.set(xscale="log", yscale="log", xlabel="width N (neurons)")
        ax.set_xticks(N, [str(n) for n in N])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7)
    for n, (result, label) in [(n, pair) for n in FEWER[::3] for pair in ((main, "path"), (straight, "straight"))]:
        along = result.along.isel(step=-1).sel(width=n).transpose("seed", "along_0", "along_1").values.mean(axis=1)
        curves(way, np.linspace(0, 1, along.shape[1]), along, f"{label}, N = {n}")
    way.set(xlabel="share of the way", ylabel="test loss (square)", title="along the way: corners at fifths of the path")
    way.margins(y=0.25)
    way.legend(fontsize=7, ncols=2, loc="upper center")
    return fig


PAPER = Paper(
    slug="dropout-stability-connectivity",
    title="Landscape Connectivity and Dropout Stability of SGD Solutions for Over-parameterized Neural Networks",
    authors="Alexander Shevchenko, Marco Mondelli",
    year=2020,
    arxiv="1912.10095",
    area="landscape",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 47 s on two CPU cores", "full": "not measured"},
    data="scikit-learn's digits, 1,437 to train on and 360 to test; the paper has MNIST and CIFAR-10",
)
