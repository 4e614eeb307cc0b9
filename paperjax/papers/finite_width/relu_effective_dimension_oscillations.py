"""Some Theoretical Results on Layerwise Effective Dimension Oscillations in Finite Width ReLU Networks.

Makwana, 2025, arXiv 2507.07675.

A refutation. For m inputs and Gaussian weights the paper gives the expected rank of the m x n matrix of activations of layer l as

    E rank_l = m [1 - (1 - 2/π)^l],    0.637 m in layer 1, rising to m,

says that it has local maxima, "revivals", of height 0.79 m at depths (k + 1/2) π / log(1/ρ) (1.55, 4.66, 7.76 with ρ = 1 - 2/π), and that
with orthogonal weights or leaky ReLU the rank stays nearly full. The formula is monotone, so it contradicts the maxima; neither is seen.

What is seen, and derived here: the rank is full in layer 1 and then falls, since inputs align and a neuron comes to be off for all of
them at once. With c_l the correlation of two inputs at infinite width, c_0 = 0, c_{l+1} = (sqrt(1-c²) + c (π - arccos c)) / π,

    E rank_l = min(m, n p_l),    p_l = 1 - ∫ φ(t) Φ(-t (c_{l-1} / (1 - c_{l-1}))^(1/2))^m dt,

p_l being the probability that a neuron is on for at least one of m inputs, and the participation ratio of the squared singular values is
m / (1 + (m - 1) c_l²).

Here: m = 64 Gaussian inputs in n dimensions, weights of variance 2/n, 20 layers, 320 networks of n = 64, 80 of others, float64. Rank counts
singular values over 1e-10 of the largest; in 60 networks those kept were at least 4e-8 of it and those dropped at most
2e-16. Soft rank: over 1e-2.

Claims, expected numbers and tolerances
    mean rank in layer 1 over m                                                at least 0.98 (printed: 0.637)
    mean rank and mean soft rank from a layer to the next, largest rise        at most 0, +2
    mean rank over that of the formula derived here, farthest layer            1, +-0.06
    mean rank over the number of neurons on for some input, or m, farthest     1, +-0.02
    layer 10: mean rank over the formula, widths 48 to 128, farthest           1, +-0.08
    participation ratio over the formula, farthest layer                       1, +-0.2
    leaky ReLU of slope 1/2: mean rank in layer 20 over m                      at least 0.99 (as the paper says)
    orthogonal weights: mean rank in layer 20 over m                           at most 0.8 (printed: nearly full)

Controls: inputs in 41 dimensions and a linear first layer, which has the printed rank of layer 1 and a rank that rises; leaky ReLU; ReLU.

What did not hold
    - Everything but the leaky ReLU. Mean rank of m = n = 64 in layers 1, 2, 3, 4, 5, 8, 10, 15, 20, with its standard error at most 0.3:
          printed     40.7  55.6  60.9  62.9  63.6  64.0  64.0  64.0  64.0
          measured    64.0  63.9  62.9  61.5  59.1  54.6  51.4  47.0  44.3    (orthogonal weights: 51.9 in layer 10, 44.5 in layer 20)
          min(m, n p) 64.0  63.9  63.1  61.6  60.0  55.5  53.1  48.6  45.7
    - Single networks do revive: in 31 % of steps at n = 64, and 4 % at n = 96, the rank is above that of the layer before, since which
      neurons are off is drawn anew in each layer. So few networks show maxima that their mean does not have.

Measured (quick): 1.000, -0.2 +- 0.2, -0.8 +- 0.1, 0.963 +- 0.005, 0.995 +- 0.001, 0.955 +- 0.009, 0.845 +- 0.002, 1.000, 0.695 +- 0.010.

Run time: quick 44 s of CPU time, measured on busy cores, so about 30 s on two that are idle
Command:  paperjax run relu-effective-dimension-oscillations
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate
from paperjax.models.initializers import orthogonal
from paperjax.studies import untrained

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

SEEDS = 8
M, LAYERS = 64, 20
WIDTHS, AT = (48, 64, 96, 128), 10
PRINTED = 41  # The whole number nearest to 2 M / π.
RANK, LIVE, PARTICIPATION, SOFT, UP = range(5)
TOLERANCE = 1e-10


def leaky(z: Array) -> Array:
    """Of slope 1/2 below 0."""
    return jnp.where(z > 0, z, 0.5 * z)


def describe(z_MxN: Array, h_MxN: Array) -> Float[Array, "4"]:
    """Rank, neurons on for some input (M at most), participation ratio, soft rank."""
    s = jnp.linalg.svd(h_MxN, compute_uv=False)
    live = jnp.minimum(jnp.sum(jnp.any(z_MxN > 0, axis=0)), M)
    found = [jnp.sum(s > TOLERANCE * s[0]), live, jnp.sum(s**2) ** 2 / jnp.sum(s**4), jnp.sum(s > 1e-2 * s[0])]
    return jnp.stack([number.astype(jnp.float32) for number in found])


def activations(phi: Any, nets: int, haar: bool = False, linear_first: bool = False) -> Callable[..., Array]:
    """Means over networks, by layer, of what `describe` gives, and the share of networks whose rank is above that of the layer before."""
    matrix = orthogonal()

    def measure(data: Any, key: Array, width: int) -> Float[Array, "layers 5"]:
        def network(k: Array) -> Array:
            k_x, k_w = jax.random.split(k)
            with jax.enable_x64(False):
                x = jax.random.normal(k_x, (M, width))
                keys = jax.random.split(k_w, LAYERS)
            x = jnp.where(jnp.arange(width) < PRINTED, x, 0) if linear_first else x

            def layer(h_MxN: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
                k_l, number = step
                with jax.enable_x64(False):
                    w_NxN = matrix(k_l, (width, width), jnp.float32) if haar else jax.random.normal(k_l, (width, width)) / width**0.5
                z_MxN = 2**0.5 * h_MxN @ w_NxN.astype(jnp.float64)
                h_MxN = jnp.where((number == 0) & linear_first, z_MxN, phi(z_MxN))
                return h_MxN, describe(z_MxN, h_MxN)

            found_Lx4 = jax.lax.scan(layer, x.astype(jnp.float64), (keys, jnp.arange(LAYERS)))[1]
            rank_L = found_Lx4[:, RANK]
            up_L = jnp.concatenate([jnp.zeros(1, jnp.float32), (rank_L[1:] > rank_L[:-1]).astype(jnp.float32)])
            return jnp.concatenate([found_Lx4, up_L[:, None]], axis=1)

        with jax.enable_x64(True):
            return jnp.mean(jax.lax.map(network, jax.random.split(key, nets)), axis=0).astype(jnp.float32)

    return measure


def drawn(measure: Any, width: Sequence[int] = (M,)) -> pj.Experiment:
    """Networks as they are drawn; nothing is trained."""
    return untrained(pj.grid(width=list(width), lr=1.0, seed=SEEDS), {"found": measure})


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """ReLU with many networks, over widths, with orthogonal weights; leaky ReLU; a first layer that is linear."""
    nets = 40 if size == "quick" else 1000
    relu = jax.nn.relu
    return {
        "relu": drawn(activations(relu, nets)),
        "linear-first": drawn(activations(relu, nets // 8, linear_first=True)),
        "leaky": drawn(activations(leaky, nets // 4)),
        "orthogonal": drawn(activations(relu, nets // 4, haar=True)),
        "widths": drawn(activations(relu, nets // 4), WIDTHS),
        "widths-leaky": drawn(activations(leaky, nets // 8), WIDTHS),
    }


def printed() -> np.ndarray:
    """The paper's expected rank in layers 1 to `LAYERS`."""
    return M * (1 - (1 - 2 / np.pi) ** np.arange(1, LAYERS + 1))


def correlations() -> np.ndarray:
    """c_0 to c_LAYERS."""
    c = [0.0]
    for _ in range(LAYERS):
        c.append((np.sqrt(1 - c[-1] ** 2) + c[-1] * (np.pi - np.arccos(c[-1]))) / np.pi)
    return np.array(c)


def live_share() -> np.ndarray:
    """p_1 to p_LAYERS, the probability that a neuron is on for at least one of M inputs."""
    from scipy.special import ndtr

    t = np.linspace(-9, 9, 4001)
    weight = np.exp(-(t**2) / 2)
    ratio = np.sqrt(correlations()[:-1] / (1 - correlations()[:-1]))
    return 1 - (weight * ndtr(-ratio[:, None] * t) ** M).sum(axis=1) / weight.sum()


def expected(width: int) -> np.ndarray:
    """Mean rank in layers 1 to `LAYERS` as derived in the docstring."""
    return np.minimum(M, width * live_share())


def by_layer(result: "xarray.Dataset", column: int) -> np.ndarray:
    """A mean over networks, ``(seed, width, layer)``, or ``(seed, layer)`` if there is one width."""
    found = result.found.isel(step=0).transpose("seed", "width", "found_0", "found_1").values.astype(np.float64)[..., column]
    return found[:, 0] if found.shape[1] == 1 else found


def farthest(samples: np.ndarray, value: float = 1.0) -> Estimate:
    """Of ``(seed, n)``, the one that may be farthest from a value."""
    return max((estimate(column) for column in samples.T), key=lambda e: max(abs(end - value) for end in e.interval))


def largest_rise(column: int) -> Callable[[Results], Estimate]:
    """Of a mean from one layer to the next."""
    return lambda results: max((estimate(r) for r in np.diff(by_layer(results["relu"], column), axis=1).T), key=lambda e: e.interval[1])


LINEAR = {"relu": "linear-first"}
RISE = "chance: three standard errors of 0.4, which is also the largest of 19 steps; the printed formula rises by 15 at once"
CLAIMS = (
    Claim(
        "refuted: E rank = m [1 - (1 - 2/π)^l], so 0.637 m in layer 1: the mean rank there over m is 1",
        "the paper's abstract, expected rank", 0.98, lambda results: estimate(by_layer(results["relu"], RANK)[:, 0] / M), 0.0,
        "a bound: a Gaussian matrix through a ReLU has full rank but for a probability that is exponentially small in m",
        Control("inputs in 41 dimensions and a linear layer: the printed rank, which the measurement sees", LINEAR), ">=",
    ),
    Claim(
        "refuted: maxima at depths (k + 1/2) π / log(1/ρ): the mean rank never rises, largest rise from a layer to the next, 2 to 20",
        "the paper's abstract, revival depths", 0.0, largest_rise(RANK), 2.0, RISE,
        Control("a linear first layer of 41 dimensions: the rank then rises", LINEAR), "<=",
    ),
    Claim(
        "nor does the number of singular values over 1e-2 of the largest: largest rise of its mean from a layer to the next, 2 to 20",
        "the paper's abstract, revival depths", 0.0, largest_rise(SOFT), 2.0, RISE,
        Control("a linear first layer of 41 dimensions: the rank then rises", LINEAR), "<=",
    ),
    Claim(
        "instead: mean rank over min(m, n p_l), n = 64, farthest of layers 1 to 20",
        "derived in the docstring", 1.0, lambda results: farthest(by_layer(results["relu"], RANK) / expected(M)), 0.06,
        "c_l is that of infinite width: of order l/n, 4 % in layer 20", Control("leaky ReLU: no neuron loses its rank", {"relu": "leaky"}),
    ),
    Claim(
        "for a neuron off for all inputs is a column of zeros: mean rank over number of neurons on for some input, or m, farthest layer",
        "derived in the docstring", 1.0, lambda results: farthest(by_layer(results["relu"], RANK) / by_layer(results["relu"], LIVE)), 0.02,
        "a layer cannot make up for a rank lost before, which costs little", Control("a linear first layer of 41 dimensions", LINEAR),
    ),
    Claim(
        f"layer {AT}: mean rank over min(m, n p_l), farthest of n = 48, 64, 96, 128",
        "derived in the docstring", 1.0,
        lambda results: farthest(by_layer(results["widths"], RANK)[:, :, AT - 1] / [expected(n)[AT - 1] for n in WIDTHS]), 0.08,
        "of order l/n, 4 % at n = 48, and chance of 80 networks",
        Control("leaky ReLU: full rank at every width", {"widths": "widths-leaky"}),
    ),
    Claim(
        "participation ratio over m / (1 + (m - 1) c_l²), farthest of layers 1 to 20",
        "derived in the docstring", 1.0,
        lambda results: farthest(by_layer(results["relu"], PARTICIPATION) * (1 + (M - 1) * correlations()[1:] ** 2) / M), 0.2,
        "of order m/n in the first layers, where inputs are not quite orthogonal: 0.85 in layer 1",
        Control("leaky ReLU, whose inputs align slowly", {"relu": "leaky"}),
    ),
    Claim(
        "as the paper says: leaky ReLU of slope 1/2 keeps full rank: mean rank in layer 20 over m",
        "the paper's abstract, leaky ReLU", 0.99, lambda results: estimate(by_layer(results["leaky"], RANK)[:, -1] / M), 0.0,
        "a bound: it is 1 in every draw", Control("ReLU, whose neurons go off", {"leaky": "relu"}), ">=",
    ),
    Claim(
        "refuted: orthogonal weights keep nearly full rank: mean rank in layer 20 over m",
        "the paper's abstract, orthogonal weights", 0.8, lambda results: estimate(by_layer(results["orthogonal"], RANK)[:, -1] / M), 0.0,
        "a bound: it falls almost as with Gaussian weights", Control("leaky ReLU, as above", {"orthogonal": "leaky"}), "<=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Mean rank by layer against both formulas, controls, widths, and the participation ratio."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(2, 2)
    rank, kinds, widths, ratio = axes.reshape(-1)
    layers = np.arange(1, LAYERS + 1)
    points(rank, layers, by_layer(results["relu"], RANK), "measured, n = m = 64")
    prediction(rank, layers, expected(M), "min(m, n $p_l$)")
    prediction(rank, layers, printed(), "printed", linestyle=(0, (1, 1.5)))
    rank.plot(np.array([1.55, 4.66, 7.76]), np.full(3, 0.79 * M), "kx", label="printed revivals")
    for name, label, marker in (
        ("leaky", "leaky ReLU", "s"), ("orthogonal", "orthogonal weights", "^"), ("linear-first", "control: linear first", "v"),
    ):  # fmt: skip
        points(kinds, layers, by_layer(results[name], RANK), label, marker=marker)
    prediction(kinds, layers, M, "full rank")
    for i, (n, marker) in enumerate(zip(WIDTHS, "os^v")):
        colour = points(widths, layers, by_layer(results["widths"], RANK)[:, i], f"n = {n}", marker=marker)
        prediction(widths, layers, expected(n), "", color=colour)
    points(ratio, layers, by_layer(results["relu"], PARTICIPATION), "ReLU", marker="o")
    points(ratio, layers, by_layer(results["leaky"], PARTICIPATION), "control: leaky ReLU", marker="s")
    prediction(ratio, layers, M / (1 + (M - 1) * correlations()[1:] ** 2), "$m / (1 + (m - 1) c_l^2)$")
    ratio.set(yscale="log", ylabel="participation ratio", title="n = m = 64")
    for ax, title in ((rank, "ReLU, Gaussian weights"), (kinds, "n = m = 64"), (widths, "ReLU, lines: min(m, n $p_l$)")):
        ax.set(ylabel="mean rank of 64 x n activations", title=title)
    for ax in axes.reshape(-1):
        ax.set_xlabel("layer l")
        ax.set_xticks(layers[::2])
        ax.legend(fontsize=7)
    return fig


PAPER = Paper(
    slug="relu-effective-dimension-oscillations",
    title="Some Theoretical Results on Layerwise Effective Dimension Oscillations in Finite Width ReLU Networks",
    authors="Darshan Makwana",
    year=2025,
    arxiv="2507.07675",
    area="finite-width",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 30 s on two CPU cores (44 s of CPU time)", "full": "not measured"},
    data="generated Gaussian inputs",
)
