"""Width and Depth Limits Commute in Residual Networks.

Hayou, Yang, ICML 2023, arXiv 2302.00453.

With branches scaled by ``L^-1/2``, ``h^{l+1} = h^l + L^-1/2 W^l relu(h^l)``, W ~ N(0, 2/n), the covariance of two inputs tends to the same
numbers however n and L go to infinity. With q the mean square and c the covariance,

    dq/dt = q,    dc/dt = q kappa_1(c / q),    kappa_1(r) = (sqrt(1 - r²) + r (pi - arccos r)) / pi,

so q(1) = e q(0), and from q = 1, c = 0.3 c(1) = 1.228. No activation is written into the prediction: `pj.limits.depth_limit` reads the
network's trace, at infinite width and three depths, and extrapolates; it also gives ``lim L (K_inf - K_L)``, for q ``e s⁴ / 8 = e / 2``
where the branch has variance s² = 2. Inputs are given n-vectors with these q and c.

Claims, expected numbers and tolerances, routes (n, L) = (16, 256), (64, 64), (256, 16)
    E q_L over the limit with its 1/L term, farthest route                    1; +-0.1
    E c_L over the limit with its 1/L term, farthest route                    1; +-0.1
    slope on n of the rms deviation of c / q, n = 16 to 128, L = 16 and 64    -1/2, the farther; +-0.1
    slope on L of the same, L = 8 to 64, n = 32                               0; +-0.1
    excess kurtosis of a pre-activation, n = 128, L = 32                      0; +-0.2
    q_L with branches scaled by 1/L, L = 64                                   (1 + 1/L²)^L = 1.016; +-0.05
    slope on L of |K_L - K_inf| at infinite width, by pj.limit, L = 8 to 512  -1; +-0.1

Controls: branches scaled by 1/L, thrice; n neurons that are copies of sixteen (a perceptron's correlation deviates by n^-1/2, too); a
perceptron without skips, twice; branches scaled by L^-1/2.

Set after a first measurement: the tolerances of q and c, first 0.03 and 0.04, for the 1/n term that they leave out (3 % of q at n = 16).

Measured (quick): 1.025 +- 0.009, 1.028 +- 0.025, -0.467 +- 0.026, 0.013 +- 0.026, 0.097 +- 0.023, 1.015 +- 0.002, -0.975.

What did not hold as first proposed
    - Means within two standard errors plus O(1/L) of the limit. There is a term of order 1/n too, 3 % at n = 16: E q_L is not (1 + 1/L)^L
      at a finite width, since a network with more positive coordinates adds more to itself, |relu(h)|² being |h|²/2 on average only.
    - The slope of the excess kurtosis on n is -0.9 +- 0.16 over n = 16 to 128, too uncertain to claim; its level at n = 128 is.
    - A printed "1/depth" for the scaling gives the trivial limit, as the claim on it shows.

Run time: quick 91 s on two slow CPU cores (55 s of them in its experiments); full not measured
Command:  paperjax run width-depth-commute
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.studies import untrained

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

COVARIANCE, VARIANCE = 0.3, 2.0
ROUTES = ((16, 256), (64, 64), (256, 16))
WIDTHS, DEPTHS = (16, 32, 64, 128), (8, 16, 32, 64)
INFINITE = (8, 32, 128, 512)


def stream(width: int, depth: int, power: float = 0.5) -> pj.Model:
    """The network with a linear first layer and readout, so that its output has the covariance of the stream."""

    def init(key: Array, x: Any) -> PyTree:
        k_u, k_w, k_v = jax.random.split(key, 3)
        w = (VARIANCE / width) ** 0.5 * jax.random.normal(k_w, (depth, width, width), x.dtype)
        u, v = jax.random.normal(k_u, (x.shape[1], width), x.dtype), jax.random.normal(k_v, (width, 1), x.dtype)
        return {"u": u / x.shape[1] ** 0.5, "w": w, "v": v / width**0.5}

    def apply(params: PyTree, x: Any) -> Array:
        def block(h_BxN: Array, w_NxN: Array) -> tuple[Array, None]:
            return h_BxN + depth**-power * jax.nn.relu(h_BxN) @ w_NxN, None

        return jax.lax.scan(block, x @ params["u"], params["w"])[0] @ params["v"]

    return pj.Model(init, apply)


def two_inputs(key: Array) -> pj.data.Dataset:
    """Two inputs of mean square 1 and covariance 0.3; the key turns them."""
    e = jnp.array([[1.0, 0.0], [COVARIANCE, (1 - COVARIANCE**2) ** 0.5]])
    x = 4**0.5 * e @ jnp.linalg.qr(jax.random.normal(key, (4, 2)))[0].T
    return pj.data.Dataset(x, x[:, :1], x, x[:, :1], "two inputs", "generated")


def covariances(networks: int, distinct: int | None = None) -> Callable[..., Array]:
    """Of networks drawn, from h^0 given: q, q', c and the mean fourth power in the last layer; `skip` is 1, or 0 for a perceptron.

    Neurons that are copies of some `distinct` ones have the moments of a network of those alone.
    """

    def measure(key: Array, width: int, depth: Any, power: Any, skip: Any) -> Float[Array, "networks 4"]:
        width = distinct or width
        e = jnp.array([[1.0, 0.0], [COVARIANCE, (1 - COVARIANCE**2) ** 0.5]])
        scale = (VARIANCE / width) ** 0.5 * jnp.asarray(depth, jnp.float32) ** -power

        def one(k: Array) -> Array:
            k_start, k_blocks = jax.random.split(k)
            u_N, v_N = jax.random.normal(k_start, (2, width))
            u_N = u_N / jnp.linalg.norm(u_N)
            v_N = v_N - (v_N @ u_N) * u_N
            h_BxN = width**0.5 * e @ jnp.stack([u_N, v_N / jnp.linalg.norm(v_N)])

            def block(number: Array, h_BxN: Array) -> Array:
                w_NxN = jax.random.normal(jax.random.fold_in(k_blocks, number), (width, width))
                return skip * h_BxN + scale * jax.nn.relu(h_BxN) @ w_NxN

            one, other = jax.lax.fori_loop(0, depth, block, h_BxN)
            return jnp.stack([jnp.mean(a) for a in (one**2, other**2, one * other, (one**4 + other**4) / 2)])

        return jax.lax.map(one, jax.random.split(key, networks))

    return measure


def drawn(
    widths: Sequence[int], depths: Sequence[int], networks: int, power: float = 0.5, skip: float = 1.0, distinct: int | None = None
) -> pj.Experiment:
    """Networks as they are drawn; nothing is trained."""
    grid = pj.grid(width=list(widths), depth=list(depths), power=power, skip=skip, lr=1.0, seed=8)
    # Cells one after another: side by side all would take as many steps as the deepest, and compile for longer.
    return dataclasses.replace(untrained(grid, {"moments": covariances(networks, distinct)}), layout=pj.Layout(map=8 * len(depths)))


@functools.cache
def kernels(power: float) -> Float[np.ndarray, "depths 2 2"]:
    """K_L by pj.limit, computed in float64; that of the two inputs, however they are turned."""
    with jax.ensure_compile_time_eval():
        x, family = np.asarray(two_inputs(jax.random.key(0)).x_train, np.float64), functools.partial(stream, power=power)
        found = [pj.limit(family, x, sizes=dict(depth=depth), wide=["width"], ntk=False).nngp for depth in INFINITE]
    return np.stack(found).astype(np.float32)


def at_infinite_width(power: float) -> pj.Experiment:
    """Nothing is drawn."""
    return untrained(pj.grid(lr=1.0, seed=2), {"kernels": lambda: jnp.asarray(kernels(power))})


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """A grid of widths and depths and the ends of a route, a perceptron, branches scaled by 1/L, and infinite width."""
    many = 48 if size == "quick" else 1024
    return {
        "residual": drawn(WIDTHS, DEPTHS, many),
        "route-16-256": drawn([16], [256], 4 * many),
        "route-256-16": drawn([256], [16], many // 2),
        "perceptron": drawn(WIDTHS, DEPTHS, many // 4, power=0.0, skip=0.0),
        "copies": drawn(WIDTHS, DEPTHS, many // 2, distinct=WIDTHS[0]),
        "one-over-depth": drawn([64], [64], many // 2, power=1.0),
        "infinite-width": at_infinite_width(0.5),
        "infinite-width-one-over-depth": at_infinite_width(1.0),
    }


@functools.cache
def limit() -> tuple[np.ndarray, np.ndarray]:
    """K at infinite width and depth, and ``lim L (K_inf - K_L)``, from the trace."""
    found = pj.limits.depth_limit(stream, np.asarray(two_inputs(jax.random.key(0)).x_train, np.float64), at=64, ntk=False)
    return np.asarray(found.nngp), np.asarray(found.nngp_error)


def values(result: "xarray.Dataset") -> np.ndarray:
    """q, q', c and fourth powers, ``(seed, width, depth, network, 4)``."""
    return result.moments.isel(step=0).transpose("seed", "width", "depth", "moments_0", "moments_1").values.astype(np.float64)


def of_route(results: Results, n: int, depth: int) -> np.ndarray:
    """q, q', c and fourth powers of one width and depth, ``(seed, network, 4)``."""
    result = results["residual" if n in WIDTHS and depth in DEPTHS else f"route-{n}-{depth}"]
    at = [list(result[axis].values).index(size) if result.sizes[axis] > 1 else 0 for axis, size in (("width", n), ("depth", depth))]
    return values(result)[:, at[0], at[1]]


def over_limit(row: int, column: int, which: Callable[[np.ndarray], np.ndarray]) -> Callable[[Results], Estimate]:
    """A mean over networks over the limit less error / L; farthest route."""

    def measured(results: Results) -> Estimate:
        end, error = (k[row, column] for k in limit())
        each = [estimate(which(of_route(results, n, depth)).mean(axis=1) / (end - error / depth)) for n, depth in ROUTES]
        return max(each, key=lambda e: max(abs(edge - 1) for edge in e.interval))

    return measured


def deviations(result: "xarray.Dataset") -> np.ndarray:
    """Root mean square deviation of c / sqrt(q q') from its mean over networks, ``(seed, width, depth)``."""
    v = values(result)
    return (v[..., 2] / np.sqrt(v[..., 0] * v[..., 1])).std(axis=-1, ddof=1)


def width_slope(results: Results) -> Estimate:
    """Of the deviations on n: of depths 16 and 64 the one that may be farther from -1/2."""
    each = [fit_slope(np.array(WIDTHS), deviations(results["residual"])[:, :, DEPTHS.index(depth)]) for depth in (16, 64)]
    return max(each, key=lambda e: max(abs(edge + 0.5) for edge in e.interval))


def kurtosis(result: "xarray.Dataset") -> np.ndarray:
    """Excess kurtosis of a pre-activation at L = 32, ``(seed, width)``."""
    v = values(result)[:, :, DEPTHS.index(32)]
    return v[..., 3].mean(axis=-1) / v[..., :2].mean(axis=(-2, -1)) ** 2 - 3


@functools.cache
def flow() -> np.ndarray:
    """K at infinite width and depth by the differential equation."""
    with jax.enable_x64(True):
        return np.asarray(pj.limits.residual_flow(jax.nn.relu, np.array([[1.0, COVARIANCE], [COVARIANCE, 1.0]]), VARIANCE).nngp)


def distances(result: "xarray.Dataset") -> np.ndarray:
    """``|K_L - K_inf|``, K_inf that of branches scaled by ``L^-1/2``, ``(seed, depth)``."""
    return np.linalg.norm(result.kernels.isel(step=0).transpose("seed", ...).values.reshape(-1, len(INFINITE), 2, 2) - flow(), axis=(2, 3))


PERCEPTRON = {"residual": "perceptron"}
TRIVIAL = "branches scaled by 1/L: nothing happens on the way"

CLAIMS = (
    Claim(
        "E q_L tends to e along every route: over the limit with its 1/L term, farthest",
        "arXiv 2302.00453: one covariance however the limits are taken", 1.0, over_limit(0, 0, lambda v: v[..., :2].mean(axis=-1)), 0.1,
        "of order 1/n, and 16 is the least n: one over it is 0.06; in depth the next order is 11 / (24 L²), 0.002 at L = 16",
        Control(TRIVIAL, {"route-16-256": "one-over-depth"}),
    ),
    Claim(
        "E c_L tends to 1.228 along every route: over the limit with its 1/L term, farthest",
        "arXiv 2302.00453: one covariance however the limits are taken", 1.0, over_limit(0, 1, lambda v: v[..., 2]), 0.1,
        "of order 1/n, and 16 is the least n: one over it is 0.06",
        Control(TRIVIAL, {"route-16-256": "one-over-depth"}),
    ),
    Claim(
        "the correlation deviates by n^-1/2: slope of its rms on n, L = 16 and 64, the farther",
        "arXiv 2302.00453: one covariance however the limits are taken", -0.5, width_slope, 0.1, "as first proposed: the next order is 1/n",
        Control("neurons that are copies of sixteen, however wide: no larger numbers, no law of them", {"residual": "copies"}),
    ),
    Claim(
        "at every depth alike: slope of its rms on L, n = 32",
        "arXiv 2302.00453: one covariance however the limits are taken",
        0.0, lambda results: fit_slope(np.array(DEPTHS), deviations(results["residual"])[:, WIDTHS.index(32)]), 0.1,
        "the same as for n: 1 - 1/L at L = 8 tilts it by 0.03",
        Control("a perceptron without skips", PERCEPTRON),
    ),
    Claim(
        "pre-activations become Gaussian: their excess kurtosis, n = 128, L = 32",
        "arXiv 2302.00453: Gaussian pre-activations", 0.0, lambda results: estimate(kurtosis(results["residual"])[:, -1]), 0.2,
        "3 Var(q) / E[q]² is about 12 / n, 0.09", Control("a perceptron without skips, where it is 3 (1 + 5/n)^L - 3 = 7", PERCEPTRON),
    ),
    Claim(
        "scaled by 1/L nothing happens: q_L at L = 64",
        "the recursion of the mean square, exact at infinite width", (1 + 1 / 64**2) ** 64,
        lambda results: estimate(values(results["one-over-depth"])[:, 0, 0, :, :2].mean(axis=(1, 2))), 0.05,
        "exact; a mean over few networks", Control("scaled by L^-1/2", {"one-over-depth": "route-16-256"}),
    ),
    Claim(
        "at infinite width depth is off by 1/L: slope of |K_L - K_inf|",
        "the 1/L term of the docstring", -1.0,
        lambda results: fit_slope(np.array(INFINITE), distances(results["infinite-width"])), 0.1,
        "the next order at L = 8 tilts it by 0.02", Control(TRIVIAL, {"infinite-width": "infinite-width-one-over-depth"}),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Means along the routes; deviations against width and depth; kurtosis; infinite width."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(2, 2)
    means, deviate, tails, infinite = axes.reshape(-1)
    at = np.arange(len(ROUTES))
    end, error = limit()
    for name, pick, entry in (("q", lambda v: v[..., :2].mean(axis=-1), (0, 0)), ("c", lambda v: v[..., 2], (0, 1))):
        y = np.stack([pick(of_route(results, n, depth)).mean(axis=1) for n, depth in ROUTES], axis=1)
        colour = points(means, at, y, f"{name}, networks")
        prediction(means, at, end[entry], f"{name}, limit", color=colour)
        finite = [end[entry] - error[entry] / depth for _, depth in ROUTES]
        means.plot(at, finite, color=colour, linestyle="none", marker="_", markersize=18, label=f"{name}, limit with 1/L")
    y = values(results["one-over-depth"])[:, 0, 0, :, :2].mean(axis=(1, 2))
    points(means, [1], y[:, None], "control: q, 1/L")
    means.set_xticks(at, [f"({n}, {depth})" for n, depth in ROUTES])
    means.set(xlabel="(n, L)", ylabel="mean over networks", title="three routes", ylim=(0.8, 4.4))
    means.legend(ncols=2, fontsize=7.5)
    width = np.array(WIDTHS, float)
    for name, depth, label in (("residual", 16, "L = 16"), ("residual", 64, "L = 64"), ("perceptron", 64, "control: no skips, L = 64")):
        points(deviate, width, deviations(results[name])[:, :, DEPTHS.index(depth)], label)
    level = np.exp(np.log(deviations(results["residual"])[:, :, -1]).mean() + 0.5 * np.log(width).mean())
    prediction(deviate, width, level * width**-0.5, "$n^{-1/2}$")
    deviate.set(xscale="log", yscale="log", ylabel="rms deviation", title="correlation of two inputs", ylim=(2e-3, 2))
    for name, label in (("residual", "residual, L = 32"), ("perceptron", "control: no skips, L = 32")):
        points(tails, width, kurtosis(results[name]), label)
    level = np.exp(np.log(kurtosis(results["residual"]).mean(axis=0)).mean() + np.log(width).mean())
    prediction(tails, width, level / width, "1/n")
    tails.set(xscale="log", yscale="log", ylabel="excess kurtosis", title="pre-activations")
    for ax in (deviate, tails):
        ax.set_xlabel("width n (neurons)")
        ax.set_xticks(width, [str(n) for n in WIDTHS])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7.5)
    depth = np.array(INFINITE, float)
    for name, label in (("infinite-width", "$L^{-1/2}$"), ("infinite-width-one-over-depth", "control: 1/L")):
        points(infinite, depth, distances(results[name]), label)
    prediction(infinite, depth, math.sqrt((error**2).sum()) / depth, "$|E| / L$")
    infinite.set(xscale="log", yscale="log", xlabel="depth L", ylabel="$|K_L - K_\\infty|$", title="infinite width, pj.limit")
    infinite.legend()
    return fig


PAPER = Paper(
    slug="width-depth-commute",
    title="Width and Depth Limits Commute in Residual Networks",
    authors="Soufiane Hayou, Greg Yang",
    year=2023,
    arxiv="2302.00453",
    area="depth",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "91 s on two slow CPU cores", "full": "not measured"},
    data="generated: pairs of inputs of mean square 1 and covariance 0.3",
)
