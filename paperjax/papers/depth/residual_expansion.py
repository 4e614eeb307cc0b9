"""On residual network depth.

Dherin, Munn, 2025, arXiv 2510.03470.

A residual network ``h^l = h^{l-1} + λ F_l(h^{l-1})`` is a sum over paths (the Residual Expansion Theorem): with linear blocks

    h^L = Σ_k λ^k Σ_{i_1 < ... < i_k} F_{i_k} ... F_{i_1} h^0,    C(L, k) terms of order k,

with smooth ones its first orders are ``h + λ Σ_i F_i(h) + λ² Σ_{i<j} DF_j(h) F_i(h) + O(λ³)``. The number of paths makes the output
explode, and λ tames it: with independent blocks that keep norms on average, E|h^L|² / |h^0|² is (1 + λ²)^L, which is 2^L at λ = 1, tends
to e at λ = L^-1/2 and to 1 at λ = 1/L. The paper adds that λ controls the complexity of what is learned.

Here: Gaussian h^0; F = W h, W tanh(h), W ∈ N(0, 1/n), or W relu(h), N(0, 2/n). Paths are summed one by one, and the numbers of paths are
not put in but measured: paths of independent blocks are uncorrelated, so the term of order k has mean square C(L, k) |h^0|², at every
width. Expansions are in float64. Complexity is the mean of |df/dx|_F² over inputs, of ReLU networks trained on digits (cross-entropy,
Adam), interpolated at a train loss of 0.1, for λ = L^-a, a = 0, 1/4, ..., 1, L = 8.

Claims, expected numbers and tolerances
    linear blocks: sum of all paths less the forward pass, relative       0, at most 1e-10
    the same: mean square of order k over C(L, k), farthest k, L = 8      1, +-0.06
    tanh: slope on λ of what is left after order 1, order 2               2 and 3, +-0.1
    ReLU: slope on λ of what is left after order 2                        5/2, +-0.1 (not 3)
    λ = 1: log2 E|h^L|² / |h^0|² a layer, L = 4 to 32                     1, +-0.03
    λ = L^-1/2: E|h^L|² / |h^0|² over (1 + 1/L)^L, farthest L to 64       1, +-0.03
    λ = 1/L: slope on L of E|h^L|² / |h^0|² - 1                           -1.030, +-0.1
    digits: log of complexity from one λ to the next lower, least fall    at least 0.1
    digits: slope of complexity on λ                                      at least 0.5

Controls: blocks composed in the opposite order; one F for all blocks, whose paths add up in phase, to C(L, k)²; one block left out;
F_j(F_i(h)), right for linear blocks only; tanh for ReLU; other scalings; and for digits branches whose weights start 1/λ times as large,
so that all networks start as the function of λ = 1.

What did not hold
    - O(λ³) after order 2 needs a second derivative. With ReLU, λ of the neurons change sign, and each is then wrong by λ², so that the root
      mean square of what is left goes as (λ λ⁴)^1/2 (derived here). For a given network and λ small enough, no neuron changes sign.
    - "1, e" are limits: at L = 64, λ = 1/L the ratio is 1.0158, and at λ = L^-1/2 it is 2.697; the finite forms are compared with.
    - Complexity falls with λ at equal loss for cross-entropy. With squared error it does not at a low one: at a train loss of 0.01 it is
      15.6 +- 0.4, 15.9 +- 0.4, 19.5 +- 0.7 for λ = 0.35, 0.21, 0.125 (600 steps at a learning rate of 0.001, 8 seeds).

Measured (quick): 1.5e-15, 0.991 +- 0.009, 2.000 and 3.000, 2.534 +- 0.014, 1.001 +- 0.001, 0.999 +- 0.002, -1.037 +- 0.005,
0.176 +- 0.015, 0.856 +- 0.032.

Run time: quick 58 s of CPU time, measured on busy cores, so about 40 s on two that are idle
Command:  paperjax run residual-expansion
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.studies import untrained

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

SEEDS = 8
WIDTH, BLOCKS = 32, 8
SMALL = tuple(np.logspace(-2.75, -1.5, 6))  # λ of the truncations; the next order is λ L / 3 of the last.
DEPTHS = (4, 8, 16, 32, 64)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEVEL = 0.1


def blocks(key: Array, width: int, variance: float, shared: bool = False) -> tuple[Array, Array]:
    """An input, entries N(0, 1), and the weights of all blocks, entries N(0, variance / width); drawn in float32, used in float64."""
    k_h, k_w = jax.random.split(key)
    with jax.enable_x64(False):
        h_N = jax.random.normal(k_h, (width,))
        w_LxNxN = jax.random.normal(k_w, (1 if shared else BLOCKS, width, width)) * (variance / width) ** 0.5
    return h_N.astype(jnp.float64), jnp.broadcast_to(w_LxNxN.astype(jnp.float64), (BLOCKS, width, width))


def forward(phi: Any, h_N: Array, w_LxNxN: Array, scale: Scalar | float) -> Float[Array, " width"]:
    """The residual network."""
    return jax.lax.scan(lambda h, w: (h + scale * w @ phi(h), None), h_N, w_LxNxN)[0]


def orders(h_N: Array, w_LxNxN: Array) -> Float[Array, "orders width"]:
    """Terms of order 0 to L with linear blocks: each of the 2^L paths by itself, then added to those of its length."""
    masks_PxL = jnp.asarray((np.arange(2**BLOCKS)[:, None] >> np.arange(BLOCKS)) & 1)

    def path(mask_L: Array) -> Array:
        return jax.lax.scan(lambda h, step: (jnp.where(step[0], step[1] @ h, h), None), h_N, (mask_L, w_LxNxN))[0]

    return jax.ops.segment_sum(jax.vmap(path)(masks_PxL), masks_PxL.sum(axis=1), BLOCKS + 1)


def linear(nets: int, shared: bool = False, opposite: bool = False) -> dict[str, Any]:
    """Sum of paths against the forward pass, farthest network and λ, and mean squares of the orders over ``|h^0|²``."""

    def network(key: Array, width: int) -> tuple[Array, Array]:
        h_N, w_LxNxN = blocks(key, width, 1.0, shared)
        terms_KxN = orders(h_N, w_LxNxN[::-1] if opposite else w_LxNxN)
        left = []
        for scale in (1.0, BLOCKS**-0.5, 1 / BLOCKS):
            whole_N = forward(jax.nn.identity, h_N, w_LxNxN, scale)
            left.append(jnp.linalg.norm(scale ** jnp.arange(BLOCKS + 1.0) @ terms_KxN - whole_N) / jnp.linalg.norm(whole_N))
        return jnp.stack(left).max(), jnp.sum(terms_KxN**2, axis=1) / jnp.sum(h_N**2)

    def found(key: Array, width: int) -> tuple[Array, Array]:
        with jax.enable_x64(True):
            error_B, squares_BxK = jax.lax.map(lambda k: network(k, width), jax.random.split(key, nets))
            return error_B.max().astype(jnp.float32), squares_BxK.mean(axis=0).astype(jnp.float32)

    return dict(error=lambda data, key, width: found(key, width)[0], squares=lambda data, key, width: found(key, width)[1])


def truncations(phi: Any, variance: float, nets: int, wrong: bool = False) -> dict[str, Any]:
    """Root mean square over networks, for each λ, of what orders 1 and 2 leave; `wrong`: a block left out of 1, and 2 by composition."""

    def network(key: Array, width: int) -> Float[Array, "lambdas 2"]:
        h_N, w_LxNxN = blocks(key, width, variance)

        def add(state: tuple[Array, Array], w_NxN: Array) -> tuple[tuple[Array, Array], Array]:
            first_N, second_N = state
            value_N, moved_N = jax.jvp(lambda h: w_NxN @ phi(h), (h_N,), (first_N,))
            return (first_N + value_N, second_N + (w_NxN @ phi(first_N) if wrong else moved_N)), first_N

        (first_N, second_N), before_LxN = jax.lax.scan(add, (jnp.zeros_like(h_N), jnp.zeros_like(h_N)), w_LxNxN)

        def left(scale: Array) -> Array:
            moved_N = forward(phi, h_N, w_LxNxN, scale) - h_N
            kept = [before_LxN[-1] if wrong else first_N, first_N + scale * second_N]
            return jnp.stack([jnp.sum((moved_N - scale * terms_N) ** 2) for terms_N in kept])

        return jax.lax.map(left, jnp.asarray(SMALL, jnp.float64))

    def left(data: Any, key: Array, width: int) -> Float[Array, "lambdas 2"]:
        with jax.enable_x64(True):
            squares = jax.lax.map(lambda k: network(k, width), jax.random.split(key, nets), batch_size=50)
            return jnp.sqrt(squares.mean(axis=0)).astype(jnp.float32)

    return dict(left=left)


def growth(power: float, nets: int) -> pj.Experiment:
    """E|h^L|² / |h^0|² with linear blocks at λ = L^-power: given h, W h is |h| n^-1/2 times normal numbers, so no matrix is drawn."""

    def ratio(data: Any, key: Array, width: int, depth: int) -> Scalar:
        h_BxN = jnp.ones((nets, width))

        def block(number: Array, h_BxN: Array) -> Array:
            z_BxN = jax.random.normal(jax.random.fold_in(key, number), (nets, width))
            return h_BxN + depth**-power * jnp.sqrt(jnp.mean(h_BxN**2, axis=1, keepdims=True)) * z_BxN

        return jnp.mean(jax.lax.fori_loop(0, depth, block, h_BxN) ** 2)

    depths = DEPTHS[:-1] if power == 0 else DEPTHS
    return untrained(pj.grid(width=[WIDTH], depth=list(depths), lr=1.0, seed=SEEDS), {"ratio": ratio})


def residual(branch: Any, undone: Any) -> pj.Model:
    """ReLU blocks between a linear first layer and a readout; with `undone` = 1 their weights start 1/λ times as large."""

    def init(key: Array, x: Array) -> PyTree:
        k_u, k_w, k_v = jax.random.split(key, 3)
        w = (2 / WIDTH) ** 0.5 * jnp.asarray(branch, x.dtype) ** -undone * jax.random.normal(k_w, (BLOCKS, WIDTH, WIDTH), x.dtype)
        u, v = jax.random.normal(k_u, (x.shape[1], WIDTH), x.dtype), jax.random.normal(k_v, (WIDTH, 10), x.dtype)
        return {"u": u / x.shape[1] ** 0.5, "w": w, "v": v / WIDTH**0.5}

    def apply(params: PyTree, x: Array) -> Array:
        return jax.lax.scan(lambda h, w: (h + branch * jax.nn.relu(h) @ w, None), x @ params["u"], params["w"])[0] @ params["v"]

    return pj.Model(init, apply)


def complexity(model: pj.Model, params: PyTree, data: Any) -> Scalar:
    """Mean of |df/dx|_F² over 32 training inputs."""
    jacobians = jax.vmap(jax.jacrev(lambda x: model.apply(params, x[None])[0]))(data.x_train[:32])
    return jnp.mean(jnp.sum(jnp.square(jacobians), axis=(1, 2)))


def digits(undone: float, seeds: int, loss: str = "cross_entropy") -> pj.Experiment:
    """Residual networks of five λ."""
    scales = [BLOCKS**-power for power in POWERS]
    return pj.Experiment(
        residual, pj.data.one_hot(pj.data.centre(pj.data.subset(pj.data.digits(), 400))), loss=loss, optimizer="adam",
        grid=pj.grid(branch=scales, undone=undone, lr=2e-3, seed=seeds), steps=150, measure_at=16, measures=dict(complexity=complexity),
    )  # fmt: skip


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Linear blocks in three ways, truncations with two activations, three scalings, and digits twice."""
    more = 1 if size == "quick" else 8

    def drawn(measures: dict[str, Any]) -> pj.Experiment:
        return untrained(pj.grid(width=[WIDTH], lr=1.0, seed=SEEDS), measures)

    return {
        "linear": drawn(linear(400 * more)),
        "linear-shared": drawn(linear(100, shared=True)),
        "linear-opposite": drawn(linear(100, opposite=True)),
        "tanh": drawn(truncations(jnp.tanh, 1.0, 200 * more)),
        "tanh-wrong": drawn(truncations(jnp.tanh, 1.0, 200 * more, wrong=True)),
        "relu": drawn(truncations(jax.nn.relu, 2.0, 1000 * more)),
        "one": growth(0.0, 4000 * more),
        "root": growth(0.5, 4000 * more),
        "inverse": growth(1.0, 4000 * more),
        "digits": digits(0.0, 8 if size == "quick" else 32),
        "digits-undone": digits(1.0, 8 if size == "quick" else 32),
    }


PATHS = np.array([math.comb(BLOCKS, k) for k in range(BLOCKS + 1)])


def farthest(each: Sequence[Estimate], value: float) -> Estimate:
    """The one that may be farthest from a value."""
    return max(each, key=lambda e: max(abs(end - value) for end in e.interval))


def path_squares(result: "xarray.Dataset") -> np.ndarray:
    """Mean squares of the orders, ``(seed, order)``."""
    return result.squares.isel(step=0, width=0).transpose("seed", "squares_0").values.astype(np.float64)


def left_over(result: "xarray.Dataset", column: int) -> np.ndarray:
    """Of a truncation, ``(seed, λ)``."""
    return result.left.isel(step=0, width=0).transpose("seed", "left_0", "left_1").values.astype(np.float64)[..., column]


def ratios(result: "xarray.Dataset") -> np.ndarray:
    """E|h^L|² / |h^0|², ``(seed, depth)``."""
    return result.ratio.isel(step=0, width=0).transpose("seed", "depth").values.astype(np.float64)


def expected(depth: Any, power: float) -> np.ndarray:
    """``(1 + λ²)^L`` at λ = L^-power."""
    return np.asarray((1 + np.asarray(depth, float) ** (-2 * power)) ** np.asarray(depth, float))


def doubling(results: Results) -> Estimate:
    """Slope of log2 of the ratio on the layer, each seed its own."""
    found = results["one"]
    return estimate(np.polyfit(DEPTHS[:4], np.log2(ratios(found)[:, :4]).T, 1)[0])


def at_level(result: "xarray.Dataset") -> np.ndarray:
    """Logarithm of the complexity when the train loss first reaches `LEVEL`, interpolated in log loss, ``(seed, λ)``."""
    loss = np.log(result.train_loss.transpose("seed", "branch", "step").values.astype(np.float64))
    log_c = np.log(result.complexity.transpose("seed", "branch", "step").values.astype(np.float64))
    found = np.full(loss.shape[:2], np.nan)
    for seed, branch in np.ndindex(*found.shape):
        below = np.flatnonzero(loss[seed, branch] < np.log(LEVEL))
        if below.size and below[0]:
            at = slice(below[0] - 1, below[0] + 1)
            found[seed, branch] = np.interp(-np.log(LEVEL), -loss[seed, branch, at], log_c[seed, branch, at])
    return found


def least_fall(results: Results) -> Estimate:
    """Of the log complexity from one λ to the next lower: the pair with the lowest end of its interval."""
    return min((estimate(fall) for fall in -np.diff(at_level(results["digits"]), axis=1).T), key=lambda e: e.interval[0])


def scalings(result: "xarray.Dataset") -> np.ndarray:
    """The λ of trained networks."""
    return result.branch.values.astype(np.float64)


THEOREM = "the Residual Expansion Theorem"
UNDONE = Control("weights start 1/λ times as large: all λ start as the same function", {"digits": "digits-undone"})
CLAIMS = (
    Claim(
        "linear blocks: the sum over all 2^L paths is the forward pass: relative distance, farthest of networks and of λ = 1, L^-1/2, 1/L",
        THEOREM, 0.0, lambda results: estimate(results["linear"].error.isel(step=0, width=0).values), 1e-10,
        "exact: 256 paths of eight products round to 1e-15 each",
        Control("blocks in the opposite order", {"linear": "linear-opposite"}), "<=",
    ),
    Claim(
        "linear blocks: C(L, k) paths of order k: mean square of the term over C(L, k) |h^0|², farthest of k = 1 to 8",
        THEOREM, 1.0, lambda results: farthest([estimate(r) for r in (path_squares(results["linear"]) / PATHS)[:, 1:].T], 1.0), 0.06,
        "exact; chance is 1.5 % at k = 8, and this is the farthest of eight",
        Control("one F for all blocks: its paths are equal and add up to C(L, k)²", {"linear": "linear-shared"}),
    ),
    Claim(
        "tanh blocks: after order 1, Σ F_i, O(λ²) is left: slope on λ",
        THEOREM, 2.0, lambda results: fit_slope(np.asarray(SMALL), left_over(results["tanh"], 0)), 0.1,
        "of next order in λ L, which is 0.25 at the largest λ", Control("the last block is left out of the sum", {"tanh": "tanh-wrong"}),
    ),
    Claim(
        "tanh blocks: after order 2, Σ DF_j F_i, O(λ³) is left: slope on λ",
        THEOREM, 3.0, lambda results: fit_slope(np.asarray(SMALL), left_over(results["tanh"], 1)), 0.1,
        "of next order in λ L, which is 0.25 at the largest λ",
        Control("F_j(F_i(h)) for DF_j(h) F_i(h), as if blocks were linear", {"tanh": "tanh-wrong"}),
    ),
    Claim(
        "ReLU blocks: after order 2 λ^(5/2) is left, root mean square over networks: slope on λ",
        "refines the theorem, which needs smooth blocks; derived in the docstring", 2.5,
        lambda results: fit_slope(np.asarray(SMALL), left_over(results["relu"], 1)), 0.1,
        "λ³ is added, next order in (λ L)^1/2, and few networks with a change of sign at the smallest λ",
        Control("tanh, which is smooth", {"relu": "tanh"}),
    ),
    Claim(
        "λ = 1: E|h^L|² / |h^0|² = 2^L: slope of its log2 on L",
        "the paper's abstract: combinatorial explosion", 1.0, doubling, 0.03,
        "exact; chance, from 32,000 networks whose squares at L = 32 have a relative variance of 3",
        Control("λ = L^-1/2, which does not double", {"one": "root"}),
    ),
    Claim(
        "λ = L^-1/2: E|h^L|² / |h^0|² = (1 + 1/L)^L, which tends to e: ratio to it, farthest L = 4 to 64",
        "scaling of the blocks", 1.0,
        lambda results: farthest([estimate(r) for r in (ratios(results["root"]) / expected(DEPTHS, 0.5)).T], 1.0), 0.03,
        "exact; chance is 0.2 %", Control("λ = 1/L, which tends to 1", {"root": "inverse"}),
    ),
    Claim(
        "λ = 1/L: E|h^L|² / |h^0|² tends to 1 as 1/L: slope on L of what it is above 1",
        "scaling of the blocks", float(np.polyfit(np.log(DEPTHS), np.log(expected(DEPTHS, 1.0) - 1), 1)[0]),
        lambda results: fit_slope(np.asarray(DEPTHS), ratios(results["inverse"]) - 1), 0.1, "exact; chance in a small difference",
        Control("λ = L^-1/2, which tends to e", {"inverse": "root"}),
    ),
    Claim(
        f"digits: complexity falls with λ at a train loss of {LEVEL}: its log from one λ to the next lower, least fall",
        "the paper's abstract: λ controls capacity", 0.1, least_fall, 0.0, "a bound: there is no formula for it", UNDONE, ">=",
    ),
    Claim(
        f"digits: slope of complexity on λ at a train loss of {LEVEL}",
        "the paper's abstract: λ controls capacity", 0.5,
        lambda results: fit_slope(scalings(results["digits"]), np.exp(at_level(results["digits"]))), 0.0,
        "a bound: there is no formula for it", UNDONE, ">=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Numbers of paths, truncations, growth with depth, and complexity."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(2, 2)
    paths, truncated, grown, learned = axes.reshape(-1)
    k = np.arange(BLOCKS + 1)
    for name, label, marker in (("linear", "independent blocks", "o"), ("linear-shared", "control: one F", "s")):
        points(paths, k, path_squares(results[name]), label, marker=marker)
    prediction(paths, k, PATHS, "C(L, k)")
    paths.set(xlabel="order k", ylabel="mean square of the term / $|h^0|^2$", yscale="log", title=f"linear blocks, L = {BLOCKS}")

    x = np.array(SMALL)
    for name, column, power, label, marker in (
        ("tanh", 0, 2, "tanh, order 1", "o"), ("relu", 1, 2.5, "ReLU, order 2", "s"), ("tanh", 1, 3, "tanh, order 2", "^"),
    ):  # fmt: skip
        y = left_over(results[name], column)
        colour = points(truncated, x, y, label, marker=marker)
        prediction(truncated, x, np.exp(np.log(y).mean() + power * (np.log(x) - np.log(x).mean())), rf"$\lambda^{{{power}}}$", color=colour)
    points(truncated, x, left_over(results["tanh-wrong"], 1), "control: composition", marker="x")
    truncated.set(xscale="log", yscale="log", xlim=(1.2e-3, 0.4), title="truncated expansion")
    truncated.set(xlabel=r"$\lambda$", ylabel="rms of what is left")

    depth = np.arange(DEPTHS[0], DEPTHS[-1] + 1)
    for name, power, label, marker in (("one", 0.0, "1", "o"), ("root", 0.5, "$L^{-1/2}$", "s"), ("inverse", 1.0, "1/L", "^")):
        at = results[name].depth.values
        colour = points(grown, at, ratios(results[name]), rf"$\lambda$ = {label}", marker=marker)
        upto = depth[depth <= at.max()]
        prediction(grown, upto, expected(upto, power), "", color=colour)
    prediction(grown, depth, math.e, "e", linestyle=(0, (1, 1.5)))
    grown.set(xlabel="depth L (blocks)", ylabel="$E|h^L|^2 / |h^0|^2$", xscale="log", yscale="log", title=r"$(1 + \lambda^2)^L$")

    for name, label, marker in (("digits", "trained", "o"), ("digits-undone", r"control: weights times 1/$\lambda$", "s")):
        points(learned, scalings(results[name]), np.exp(at_level(results[name])), label, marker=marker)
    learned.set(xlabel=r"$\lambda$", ylabel="mean of $|df/dx|_F^2$", xscale="log", yscale="log", title=f"digits, train loss {LEVEL}")
    grown.set_xticks(DEPTHS, [str(n) for n in DEPTHS])
    learned.set_xticks(scalings(results["digits"]), [f"{scale:.2f}" for scale in scalings(results["digits"])])
    for ax in (grown, learned):
        ax.set_xticks([], minor=True)
    for ax, size in zip(axes.reshape(-1), (7, 6, 7, 7)):
        ax.legend(fontsize=size)
    return fig


PAPER = Paper(
    slug="residual-expansion",
    title="On residual network depth",
    authors="Benoit Dherin, Michael Munn",
    year=2025,
    arxiv="2510.03470",
    area="depth",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 40 s on two CPU cores (58 s of CPU time)", "full": "not measured"},
    data="generated Gaussian inputs; scikit-learn's digits",
)
