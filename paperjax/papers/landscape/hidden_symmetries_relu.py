"""Hidden Symmetries of ReLU Networks.

Grigsby, Lindsey, Rolnick, ICML 2023, arXiv 2306.06179.

The functional dimension of a network at θ is the rank of d f(x_1, ..., x_m) / dθ over many inputs. Rescaling a ReLU neuron's weights
against those that leave it changes nothing, so with layers of n_0, n_1, ... neurons it is at most

    Σ_l n_l (n_{l-1} + 1) - number of hidden neurons,

and a network below that has hidden symmetries. The paper proves that where no layer is narrower than the input some θ have none, and
finds that at initialization the probability of having none falls to 0 with depth and rises to 1 with width and input dimension.

Here: L hidden layers of n neurons and one output; weights N(0, 2 / fan_in), biases N(0, 0.3²); m = 20 times the bound Gaussian inputs;
Jacobians and singular values in float64. Rank counts singular values over 1e-12 of the largest: in a sample of 360 networks those counted
were at least 2e-8 of it and the others at most 2e-16. (They are those of random combinations of the rows, ten a combination and each row
in two, which keep the rank: in that sample it was the rank of all rows.)

Derived here, and the prediction for the probability: what enters the second hidden layer and those above is not negative, so a neuron
whose weights and bias have all one sign is always off, or always on with a bias that the next layer's can undo. Either is a hidden
symmetry, and the n (L - 1) neurons avoid it with probability (1 - 2^-n)^(n (L - 1)), so

    P(full functional dimension) <= (1 - 2^-n)^(n (L - 1)).

Claims, expected numbers and tolerances
    largest rank of all draws, [5,5,1], [5,5,5,1], [5,5,5,5,1], [10,10,10,1]    31, 56, 81, 211 exactly
    share of full rank among networks with a neuron of one sign                 0 exactly
    P(full) over the bound above, depths 1 to 4 and widths 2 to 10, largest     at most 1, +0.02
    slope of log P(full) on depth, n_0 = n = 5, L = 1 to 4                      at most 5 log(1 - 2^-5) = -0.159
    P(full) from one depth to the next, least fall                              at least 0.01
    slope of P(full) on log n, n_0 = n = 2, 3, 5, 10, L = 2                     at least 0.25

Controls: tanh, which cannot be rescaled and has a rank of all parameters; leaky ReLU (slope 1/2), which can, and to whose inputs and
neurons signs mean nothing.

What did not hold, or is left
    - The bounds of the last two claims have no formula and were set after a first run (0.05 and 0.2 before it), so that these two show that
      ReLU differs from the control as the paper says, and no more. The others are predicted.
    - P(full) is well below the bound above: neurons of one sign are the least of its causes.
    - A region in which there is no input is not seen, so that P(full) is measured from below, the more so the more regions there are. At a
      fixed input dimension it then seems to fall with width: n_0 = 3, L = 2, n = 3, 4, 6, 8 have 0.37, 0.43, 0.37, 0.21, +- 0.04 (192
      networks each). With 200 times the bound inputs, three times as large, it is 0.62 +- 0.06 at n = 4 and 0.55 +- 0.11 at n = 8: no
      rise is seen there. Width is therefore raised together with the input dimension.
    - P(full) rises with input dimension alone, too (n = 6, L = 2, n_0 = 1, 2, 4, 6: slope on log n_0 0.40 +- 0.02), but that of leaky ReLU
      does so as well (0.28 +- 0.04), for the same reason, so no claim is made of it.
    - That P(full) tends to 1 with width, and to 0 with depth other than by the bound above, is beyond these sizes.

Measured (quick): 0, 0, 1.000, -1.42 +- 0.15, 0.119 +- 0.015, 0.292 +- 0.013.

Run time: quick about 20 s on two CPU cores (by its 37 s of CPU time on busy ones); full not measured
Command:  paperjax run hidden-symmetries-relu
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate
from paperjax.studies import untrained

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

SEEDS = 8
BIAS = 0.3
INPUTS_EACH, GROUP = 20, 10
TOLERANCE = 1e-12
SAME = 0  # As many inputs as neurons.
DEPTHS, WIDTHS = (1, 2, 3, 4), (2, 3, 5, 10)


def leaky(z: Array) -> Array:
    """Of slope 1/2 below 0."""
    return jnp.where(z > 0, z, 0.5 * z)


def bound(inputs: int, width: int, depth: int) -> int:
    """Parameters less hidden neurons, one output."""
    sizes = [inputs, *[width] * depth, 1]
    return sum(n * (m + 1) for m, n in itertools.pairwise(sizes)) - width * depth


def least_share(width: Any, depth: Any) -> np.ndarray:
    """The bound on the probability of full functional dimension."""
    width, depth = np.asarray(width, float), np.asarray(depth, float)
    return np.asarray((1 - 2**-width) ** (width * (depth - 1)))


def parameters(inputs: int, width: int, depth: int) -> int:
    """Their number."""
    return bound(inputs, width, depth) + width * depth


def network(drawn: Array, inputs: int, width: int, depth: int) -> PyTree:
    """Weights and biases of each layer, from as many normals."""
    sizes, layers = [inputs, *[width] * depth, 1], []
    for fan_in, fan_out in itertools.pairwise(sizes):
        w, b, drawn = jnp.split(drawn, [fan_in * fan_out, (fan_in + 1) * fan_out])
        layers.append({"w": (2 / fan_in) ** 0.5 * w.reshape(fan_in, fan_out), "b": BIAS * b})
    return layers


def output(phi: Any, layers: PyTree, x_D: Array) -> Float[Array, ""]:
    """Of one input."""
    for layer in layers[:-1]:
        x_D = phi(x_D @ layer["w"] + layer["b"])
    return (x_D @ layers[-1]["w"] + layers[-1]["b"])[0]


def jacobian(phi: Any, layers: PyTree, x_BxD: Array) -> Float[Array, "inputs params"]:
    """Of the outputs of all inputs in all parameters."""
    theta, unravel = jax.flatten_util.ravel_pytree(layers)
    return jax.vmap(lambda x: jax.grad(lambda t: output(phi, unravel(t), x))(theta))(x_BxD)


def one_sign(layers: PyTree) -> Bool[Array, ""]:
    """Whether weights and bias of any hidden neuron, from the second layer on, have all one sign."""
    found = jnp.array(False)
    for layer in layers[1:-1]:
        signs = jnp.sign(jnp.concatenate([layer["w"], layer["b"][None]]))
        found |= jnp.any(jnp.abs(signs.sum(axis=0)) == len(signs))
    return found


def rank(j_BxP: Array, weights_2xRxG: Array) -> Float[Array, ""]:
    """Of a tall matrix, from R random combinations of its R G rows, each row in two, which keep the rank."""
    s = jnp.linalg.svd(mixed(j_BxP, weights_2xRxG), compute_uv=False)
    return jnp.sum(s > TOLERANCE * s[0]).astype(jnp.float32)


def mixed(j_BxP: Array, weights_2xRxG: Array) -> Float[Array, "R P"]:
    """Sums over G neighbours, and over G that lie R apart."""
    near, apart = weights_2xRxG
    r, g = near.shape
    return jnp.einsum("rgp,rg->rp", j_BxP.reshape(r, g, -1), near) + jnp.einsum("grp,rg->rp", j_BxP.reshape(g, r, -1), apart)


def ranks(phi: Any, nets: int) -> Callable[..., Array]:
    """Functional dimension of networks drawn, and whether a neuron has one sign."""

    def measure(data: Any, key: Array, inputs: int, width: int, depth: int) -> Float[Array, "nets 2"]:
        inputs = width if inputs == SAME else inputs
        params, examples = parameters(inputs, width, depth), INPUTS_EACH * bound(inputs, width, depth)
        each = params + examples * inputs
        # One draw: to compile another takes longer than to run it.
        drawn = jax.random.normal(key, (nets * each + 2 * examples,), jnp.float32)
        weights_2xRxG = drawn[nets * each :].reshape(2, -1, GROUP)

        def one(drawn: Array) -> Array:
            layers, x_BxD = network(drawn[:params], inputs, width, depth), drawn[params:].reshape(examples, inputs)
            j_BxP = jacobian(phi, jax.tree.map(lambda w: w.astype(jnp.float64), layers), x_BxD.astype(jnp.float64))
            return jnp.stack([rank(j_BxP, weights_2xRxG.astype(jnp.float64)), one_sign(layers).astype(jnp.float32)])

        with jax.enable_x64(True):
            return jax.lax.map(one, drawn[: nets * each].reshape(nets, each))

    return measure


def drawn(phi: Any, nets: int, inputs: Sequence[int], width: Sequence[int], depth: Sequence[int]) -> pj.Experiment:
    """Networks as they are drawn; nothing is trained."""
    grid = pj.grid(inputs=list(inputs), width=list(width), depth=list(depth), lr=1.0, seed=SEEDS)
    return untrained(grid, {"ranks": ranks(phi, nets)})


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Over depth and width with ReLU and leaky ReLU; tanh."""
    nets, few = (60, 12) if size == "quick" else (1000, 100)
    return {
        "depth": drawn(jax.nn.relu, nets, [5], [5], DEPTHS),
        "depth-leaky": drawn(leaky, few, [5], [5], DEPTHS),
        "depth-tanh": drawn(jnp.tanh, 1, [5], [5], DEPTHS[:3]),
        "width": drawn(jax.nn.relu, nets, [SAME], WIDTHS, [2]),
        "width-leaky": drawn(leaky, few, [SAME], WIDTHS[::3], [2]),
    }


def found(result: "xarray.Dataset") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank and bound, ``(seed, size, net)``, and one_sign; size is the axis of more than one value."""
    axes = ("inputs", "width", "depth")
    values = result.ranks.isel(step=0).transpose("seed", *axes, "ranks_0", "ranks_1").values.astype(np.float64)
    shapes = itertools.product(*(result[axis].values for axis in axes))
    most = np.array([bound(int(w if i == SAME else i), int(w), int(d)) for i, w, d in shapes])
    values = values.reshape(len(values), -1, *values.shape[4:])
    return values[..., 0], np.broadcast_to(most.reshape(1, -1, 1), values.shape[:-1]), values[..., 1]


def full(result: "xarray.Dataset") -> np.ndarray:
    """Share of networks of full functional dimension, ``(seed, size)``."""
    rank, most, _ = found(result)
    return (rank == most).mean(axis=-1)


def largest_rank(results: Results) -> Estimate:
    """Over all draws less the bound: of four shapes the farthest from 0."""
    over = [(rank - most).max(axis=(0, 2)) for rank, most, _ in (found(results["depth"]), found(results["width"]))]
    every = np.concatenate([over[0][:3], over[1][-1:]])
    return Estimate(float(every[np.abs(every).argmax()]), 0.0)


def full_though_one_sign(results: Results) -> Estimate:
    """Share, of all networks of all depths that have such a neuron."""
    rank, most, one = found(results["depth"])
    return Estimate(float((rank == most)[one > 0].mean()), 0.0, int((one > 0).sum()))


def over_bound(results: Results) -> Estimate:
    """P(full) over its bound, largest of depths and widths."""
    each = np.concatenate(
        [full(results["depth"]) / least_share(5, DEPTHS), full(results["width"]) / least_share(WIDTHS, 2)],
        axis=1,
    )
    return max((estimate(ratio) for ratio in each.T), key=lambda e: e.interval[1])


def log_slope(results: Results) -> Estimate:
    """Of log P(full) on depth, P = (k + 1/2) / (N + 1) for k of N networks, by the jackknife over seeds, of which some have no such k."""
    rank, most, _ = found(results["depth"])
    count_SxL, nets = (rank == most).sum(axis=-1), rank.shape[-1]

    def slope(count_SxL: np.ndarray) -> float:
        p_L = (count_SxL.sum(axis=0) + 0.5) / (len(count_SxL) * nets + 1)
        return float(np.polyfit(DEPTHS, np.log(p_L), 1)[0])

    seeds = len(count_SxL)
    without = np.array([slope(np.delete(count_SxL, seed, axis=0)) for seed in range(seeds)])
    return estimate(seeds * slope(count_SxL) - (seeds - 1) * without)


def least_fall(results: Results) -> Estimate:
    """Of P(full) from one depth to the next."""
    return min((estimate(fall) for fall in -np.diff(full(results["depth"]), axis=1).T), key=lambda e: e.value)


def rise(results: Results) -> Estimate:
    """Slope of P(full), which may be 0, on the logarithm of width and input dimension; each seed its own."""
    return estimate(np.polyfit(np.log(results["width"].width.values), full(results["width"]).T, 1)[0])


LEAKY = "leaky ReLU, for which signs mean nothing"
CLAIMS = (
    Claim(
        "some draw attains the bound, and none exceeds it: largest rank less the bound, farthest of [5,5,1], [5,5,5,1], [5,5,5,5,1] and "
        "[10,10,10,1], whose bounds are 31, 56, 81, 211",
        "the paper's theorem: no hidden symmetries for some θ where no layer is narrower than the input", 0.0, largest_rank, 0.0,
        "a whole number; singular values leave a gap of six orders of magnitude",
        Control("tanh: nothing can be rescaled, and the rank is that of all parameters", {"depth": "depth-tanh"}),
    ),
    Claim(
        "a neuron of one sign, from the second hidden layer on, is a hidden symmetry: share of full rank among networks that have one",
        "derived in the docstring; the paper: stably unactivated neurons", 0.0, full_though_one_sign, 0.0, "exact: no such network is full",
        Control(LEAKY, {"depth": "depth-leaky"}),
    ),
    Claim(
        "P(full functional dimension) over (1 - 2^-n)^(n (L - 1)), largest of depths 1 to 4 and of widths 2 to 10",
        "derived in the docstring", 1.0, over_bound, 0.02, "exact for every depth and width; chance where P and its bound are both near 1",
        Control(LEAKY, {"depth": "depth-leaky"}), "<=",
    ),
    Claim(
        "P(full functional dimension) falls at least exponentially with depth: slope of its log, n_0 = n = 5, L = 1 to 4",
        "the paper's abstract: towards 0 with depth; the rate derived in the docstring", 5 * np.log1p(-(2.0**-5)), log_slope, 0.0,
        "a bound, which other symmetries make steeper", Control(LEAKY, {"depth": "depth-leaky"}), "<=",
    ),
    Claim(
        "P(full functional dimension) falls with depth: least fall from L to L + 1, L = 1 to 4",
        "the paper's abstract", 0.01, least_fall, 0.0, "no formula; set after a first run, above no fall and below what was seen",
        Control(LEAKY, {"depth": "depth-leaky"}), ">=",
    ),
    Claim(
        "P(full functional dimension) rises with width and input dimension: slope on log n, n = n_0 = 2, 3, 5, 10, L = 2",
        "the paper's abstract", 0.25, rise, 0.0, "no formula; set after a first run, between ReLU and its control",
        Control(LEAKY, {"width": "width-leaky"}), ">=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """P(full) over depth and width, and ranks less their bound."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(1, 3, (4.2, 3.4))
    by_depth, by_width, short = axes.reshape(-1)
    for ax, name, sizes, most, label in (
        (by_depth, "depth", DEPTHS, least_share(5, DEPTHS), "hidden layers L"),
        (by_width, "width", WIDTHS, least_share(WIDTHS, 2), "width n (neurons)"),
    ):
        points(ax, np.asarray(sizes), full(results[name]), "ReLU", marker="o")
        control = results[f"{name}-leaky"]
        points(ax, control[name].values, full(control), "control: leaky ReLU", marker="s")
        prediction(ax, np.asarray(sizes), most, "at most $(1 - 2^{-n})^{n(L-1)}$")
        ax.set(xlabel=label, ylabel="P(full functional dimension)", ylim=(-0.05, 1.1))
        ax.set_xticks(sorted({*sizes, *control[name].values}))
    by_depth.set_title("$n_0 = n = 5$")
    by_width.set_title("$n_0 = n$, L = 2")
    for name, label, marker in (("depth", "ReLU", "o"), ("depth-tanh", "control: tanh", "^")):
        rank, most, _ = found(results[name])
        points(short, results[name].depth.values, (rank - most).max(axis=-1), f"{label}, largest of a seed", marker=marker)
        if name == "depth":
            points(short, np.asarray(DEPTHS), (rank - most).mean(axis=-1), f"{label}, mean", marker="v")
    prediction(short, np.asarray(DEPTHS), 0.0, "no hidden symmetry")
    short.set(xlabel="hidden layers L", ylabel="rank less its bound", title="$n_0 = n = 5$")
    short.set_xticks(DEPTHS)
    for ax in axes.reshape(-1):
        ax.legend(fontsize=7)
    return fig


PAPER = Paper(
    slug="hidden-symmetries-relu",
    title="Hidden Symmetries of ReLU Networks",
    authors="J. Elisenda Grigsby, Kathryn Lindsey, David Rolnick",
    year=2023,
    arxiv="2306.06179",
    area="landscape",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 20 s on two CPU cores (by its CPU time)", "full": "not measured"},
    data="generated Gaussian inputs, 20 times the bound",
)
