"""Wide and Deep Neural Networks Achieve Optimality for Classification.

Radhakrishnan, Belkin, Uhler, 2022 (PNAS 2023), arXiv 2204.14126.

On the sphere the tangent kernel of L layers follows the dual activation ``kappa(xi) = sum_i a_i² xi^i``, a_i the Hermite coefficients:
``S' = kappa(S)``, ``T' = S' + kappa'(S) T`` from S = T = x.x'. With A = a_0, A'² = kappa'(0) and B' = kappa'(1) (and kappa(1) = 1) the
classifier of infinite depth, ``sign sum_i y_i K(x, x_i)``, is

    a majority vote     if A is not 0 and B' > 1: all pairs come to one kernel,
    1-nearest neighbour if A = A' = 0: the nearest one's kernel outweighs all others,
    a singular kernel   if A = 0, A' is not: K / (A'^2L (L + 1)) tends to ``R(|x - x'|) / |x - x'|^alpha``, alpha = -4 log A' / log B'.

(1 - xi grows by B' a layer until it is of order 1, after t = log(r^-2) / log B' layers; A'² a layer is what is lost from then on.) On the
sphere of dimension d, alpha = d makes it a Hilbert kernel, which is consistent. For ``sqrt(p) h_1 + sqrt(1 - p) h_3``, A'² = p and
B' = 3 - 2p, and alpha = 2 at p = 1/2. Here, on the part of the sphere of dimension 2 with positive coordinates
(kappa of -1 is -1, so opposite points are alike up to sign), the label says which of two coordinates is larger, flipped with probability
0.2; errors are those on labels flipped as well, so 0.2 is Bayes' and 2 x 0.2 x 0.8 = 0.32 the nearest neighbour's, far from the boundary.

Claims, expected numbers and tolerances
    largest relative difference of the recursion from `pj.limit` of the traced network, L = 12     0; +-1e-6
    slope of log K on log r, r from 0.1 to 0.8, plus alpha, farthest of p = 0.3, 0.5, 0.7          0; +-0.2
    error of the singular kernel with alpha = d, 4096 examples                                     at most 0.25
    slope of its error above Bayes' on n, 64 to 4096                                               at most -0.2
    error of the nearest neighbour, 4096 examples                                                  0.32; +-0.02
    agreement of regression with the kernel of depth 20 (its matrix inverted) with that classifier 1; +-0.02
    agreement of h_2's kernel, depth 14, with the nearest neighbour                                1; +-0.03
    agreement of the kernel of h_0 and h_4, depth 30, with the majority                            1; +-0.01

Controls: another p; h_5 in place of h_3; the nearest neighbour, twice; the singular kernel, thrice; depth 1.

Set after a first measurement, so weaker evidence than the others: the bounds 0.25 on the error and -0.2 on the excess error's slope.

Measured (quick): 1e-9, -0.118, 0.233 +- 0.002, -0.28 +- 0.02, 0.321 +- 0.004, 1, 0.999, 1.

What did not hold as first proposed: finite depth. There the kernel is r^-alpha (1 + O(r^-2 / L)), with the exponent alpha + 2 below
L^-1/2: no Hilbert kernel. With 4000 layers in place of the limit the error stays at 0.28 from 256 to 4096 examples; the limit's falls,
0.311, 0.270, 0.250, 0.233 from 64 to 4096. The limit of ``T / (L + 1)`` is that of S, of which 400 layers are enough.
`pj.limit` is used up to 12 layers: the variance 1 is an unstable fixed point of this activation, and rounding doubles in every layer. On
the sphere it does not vary, and the recursion is run without it.

Run time: quick 71 s on two slow CPU cores (42 s of them in its experiments); full not measured
Command:  paperjax run wide-deep-optimality
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.studies import untrained

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]
Powers = Mapping[int, float]

NOISE, DIM, TESTS = 0.2, 2, 512
DEEP, TRACED_DEPTH = 400, 12
SHARES = (0.3, 0.5, 0.7)
EXAMPLES: dict[Size, tuple[int, ...]] = {"quick": (64, 256, 1024, 4096), "full": (64, 256, 1024, 4096, 16384)}


def odd(p: float, other: int = 3) -> Powers:
    """The dual of ``sqrt(p) h_1 + sqrt(1 - p) h_3``."""
    return {1: p, other: 1 - p}


def alpha(p: float) -> float:
    """``-4 log A' / log B'``."""
    return -2 * math.log(p) / math.log(3 - 2 * p)


def kernels(xi: Array, powers: Powers, depth: int) -> tuple[Array, Array]:
    """S and T over ``kappa'(0)^L`` after L = depth layers (themselves where kappa'(0) = 0), at inner products xi; in the dtype of xi.

    With ``S = kappa'(0)^l s`` and T likewise no small number appears: ``s' = s kappa(S) / (kappa'(0) S)``.
    """
    linear = powers.get(1, 0.0)
    unit = linear or 1.0

    def layer(state: Any, _: None) -> Any:
        s, ratio, t = state
        big = s * ratio
        value = s / unit * sum(a * big ** (i - 1) for i, a in powers.items()) if linear else sum(a * big**i for i, a in powers.items())
        slope = sum(a * i * big ** (i - 1) for i, a in powers.items() if i) / unit
        return (value, ratio * unit, value + slope * t), None

    s, _, t = jax.lax.scan(layer, (xi, jnp.ones_like(xi), xi), length=depth)[0]
    return s, t


def tangent(xi: Array, powers: Powers, depth: int) -> Array:
    """T of `kernels`."""
    return kernels(xi, powers, depth)[1]


def singular(r: Any, p: float, other: int = 3) -> Array:
    """The limit of ``K / (A'^2L (L + 1))`` at distances r, which is that of ``S / A'^2L``: all layers but the first add the same."""
    with jax.enable_x64(True):
        r = jnp.asarray(r, jnp.float64)
        return kernels(1 - r**2 / 2, odd(p, other), DEEP)[0]


def network(p: float) -> Callable[..., pj.Model]:
    """The network itself in NTK parametrization: `depth` hidden layers of ``sqrt(p) h_1 + sqrt(1 - p) h_3``."""

    def phi(h: Array) -> Array:
        return p**0.5 * h + ((1 - p) / 6) ** 0.5 * (h**3 - 3 * h)

    def family(width: int, depth: int) -> pj.Model:
        def init(key: Array, x: Any) -> PyTree:
            k_u, k_w, k_v = jax.random.split(key, 3)
            shapes = (x.shape[1], width), (depth - 1, width, width), (width, 1)
            return [jax.random.normal(k, shape, x.dtype) for k, shape in zip((k_u, k_w, k_v), shapes)]

        def apply(params: PyTree, x: Any) -> Array:
            u, w, v = params
            h_BxN = jax.lax.scan(lambda h, w: (phi(h) @ w / width**0.5, None), x @ u, w)[0]
            return phi(h_BxN) @ v / width**0.5

        return pj.Model(init, apply)

    return family


def sphere(key: Array, n: int) -> pj.data.Dataset:
    """Points of the sphere with positive coordinates; the label says whether the first exceeds the second, flipped with chance 0.2."""
    k_x, k_flip = jax.random.split(key)
    x = jnp.abs(jax.random.normal(k_x, (n + TESTS, DIM + 1)))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    y = jnp.where(x[:, :1] > x[:, 1:2], 1.0, -1.0)
    flip = jax.random.bernoulli(k_flip, NOISE, (n, 1))
    return pj.data.Dataset(x[:n], jnp.where(flip, -y[:n], y[:n]), x[n:], y[n:], "halves with noise", "generated")


def products(data: Any) -> Array:
    """Inner products of test and training points, (tests, n)."""
    return jnp.clip(jnp.matmul(data.x_test, data.x_train.T, precision="highest"), -1.0, 1.0)


def smoother(p: float) -> Callable[[Any], Array]:
    """``sign sum_i y_i K(x, x_i)`` with the singular kernel, read from a table of 2000 distances."""

    def classify(data: Any) -> Array:
        with jax.ensure_compile_time_eval():
            table = np.geomspace(1e-5, 1.4, 2000)
            at, logs = (jnp.asarray(np.log(np.asarray(a)), jnp.float32) for a in (table, singular(table, p)))
        log_r = 0.5 * jnp.log(jnp.maximum(2 - 2 * products(data), 1e-10))
        kernel = jnp.exp(jnp.interp(log_r, at, logs) - jnp.max(logs) / 2)
        return jnp.sign(kernel @ data.y_train[:, 0])

    return classify


def nearest(data: Any) -> Array:
    """Label of the nearest training point."""
    return data.y_train[jnp.argmax(products(data), axis=1), 0]


def majority(data: Any) -> Array:
    """The more frequent label; a tie counts for neither."""
    return jnp.full((TESTS,), jnp.sign(jnp.sum(data.y_train)))


def deep(powers: Powers, depth: int, inverted: bool = False) -> Callable[[Any], Array]:
    """Kernel of finite depth, in float64; `inverted` for regression with it instead of the sum."""

    def classify(data: Any) -> Array:
        with jax.enable_x64(True):
            x, z = (a.astype(jnp.float64) for a in (data.x_train, data.x_test))
            x, z = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (x, z))
            weights = data.y_train[:, 0].astype(jnp.float64)
            if inverted:
                gram = jnp.where(jnp.eye(len(x), dtype=bool), 1.0, x @ x.T)
                weights = jnp.linalg.solve(tangent(gram, powers, depth), weights)
            return jnp.sign(tangent(z @ x.T, powers, depth) @ weights).astype(jnp.float32)

    return classify


def error(classify: Callable[[Any], Array]) -> Callable[..., Array]:
    """Probability of a wrong answer on labels that are flipped too."""
    return lambda data: NOISE + (1 - 2 * NOISE) * jnp.mean((classify(data) != data.y_test[:, 0]).astype(jnp.float32))


def agreement(one: Callable[[Any], Array], other: Callable[[Any], Array]) -> Callable[..., Array]:
    """Share of test points that two classifiers agree on."""
    return lambda data: jnp.mean((one(data) == other(data)).astype(jnp.float32))


def on_points(measure: Any, examples: Sequence[int], seeds: int) -> pj.Experiment:
    """Classifiers without training."""
    grid = pj.grid(n=list(examples), lr=1.0, seed=seeds)
    return untrained(grid, {"found": measure}, sphere)


def without_chance(found: Callable[[], Array]) -> pj.Experiment:
    """Formulas."""
    return untrained(pj.grid(lr=1.0), {"found": lambda data: found().astype(jnp.float32)}, functools.partial(sphere, n=4))


def traced_difference(p: float) -> Array:
    """Largest relative difference of the recursion with share p from `pj.limit` of the network with p = 1/2."""
    # No part of the program that is being traced around it: numbers.
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        angle = np.linspace(0.1, 1.4, 8)
        x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        limit = pj.limit(network(0.5), x, sizes=dict(depth=TRACED_DEPTH)).ntk
        mine = tangent(jnp.asarray(x @ x.T), odd(p), TRACED_DEPTH) * p**TRACED_DEPTH
        return jnp.max(jnp.abs(mine / limit - 1))


def slope(p: float, other: int = 3) -> Array:
    """Of log K on log r, over 64 distances."""
    with jax.enable_x64(True):
        r = jnp.geomspace(0.1, 0.8, 64)
        log_r, log_k = jnp.log(r), jnp.log(singular(r, p, other=other))
        centred = log_r - jnp.mean(log_r)
        return centred @ log_k / (centred @ centred)


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Kernels without chance; errors over n; agreements."""
    many, seeds = EXAMPLES[size], 12
    hilbert, h2, even = smoother(0.5), {2: 1.0}, {0: 0.2, 4: 0.8}
    found = {
        "exact-traced": without_chance(functools.partial(traced_difference, 0.5)),
        "exact-another-share": without_chance(functools.partial(traced_difference, 0.6)),
        "exact-slope-h5": without_chance(functools.partial(slope, 0.5, 5)),
        "singular": on_points(error(hilbert), many, seeds),
        "nearest": on_points(error(nearest), many, seeds),
        "machine": on_points(agreement(deep(odd(0.5), 20, True), deep(odd(0.5), 20)), [128], seeds),
        "machine-shallow": on_points(agreement(deep(odd(0.5), 1, True), deep(odd(0.5), 1)), [128], seeds),
        "h2": on_points(agreement(deep(h2, 14), nearest), [256], seeds),
        "singular-as-nearest": on_points(agreement(hilbert, nearest), [256], seeds),
        "even": on_points(agreement(deep(even, 30), majority), [255], seeds),
        "singular-as-majority": on_points(agreement(hilbert, majority), [255], seeds),
    }
    return found | {f"exact-slope-{p}": without_chance(functools.partial(slope, p)) for p in SHARES}


def number(result: "xarray.Dataset") -> float:
    """A result without axes."""
    return float(np.squeeze(result.found.values))


def slopes(results: Results) -> Estimate:
    """Slope plus alpha, of the p where it is farthest from 0."""
    return Estimate(max((number(results[f"exact-slope-{p}"]) + alpha(p) for p in SHARES), key=abs), 0.0)


def by_examples(result: "xarray.Dataset") -> np.ndarray:
    """``(seed, n)``."""
    return result.found.isel(step=0).transpose("seed", "n").values.astype(np.float64)


def at_most_examples(name: str) -> Callable[[Results], Estimate]:
    """Of the largest training set, mean over seeds."""
    return lambda results: estimate(by_examples(results[name])[:, -1])


def excess_slope(results: Results) -> Estimate:
    """Slope of the error above Bayes' on n."""
    return fit_slope(results["singular"].n.values, by_examples(results["singular"]) - NOISE)


CLAIMS = (
    Claim(
        "the recursion of the dual is the network's: largest relative difference from pj.limit, L = 12",
        "the recursion of the docstring", 0.0, lambda results: Estimate(number(results["exact-traced"]), 0.0), 1e-6,
        "rounding of the variance doubles in each of 12 layers",
        Control("p = 0.6 in the recursion", {"exact-traced": "exact-another-share"}),
    ),
    Claim(
        "the deep kernel is singular as r^-alpha: slope plus alpha, farthest p",
        "arXiv 2204.14126: the singular kernel's exponent", 0.0, slopes, 0.2, "as first proposed: R varies over the range",
        Control("h_5 for h_3", {"exact-slope-0.5": "exact-slope-h5"}),
    ),
    Claim(
        "with alpha = d its classifier comes near Bayes' error 0.2: error with the most examples",
        "arXiv 2204.14126: consistent where alpha = d",
        0.25, at_most_examples("singular"), 0.0, "less than half of the way from Bayes' 0.2 to the nearest neighbour's 0.32",
        Control("the nearest neighbour", {"singular": "nearest"}), relation="<=",
    ),
    Claim(
        "and goes on falling: slope of the error above Bayes' on n",
        "arXiv 2204.14126: consistent where alpha = d",
        -0.2, excess_slope, 0.0, "a bound: the rate is not a power of n, and the nearest neighbour's boundary gives it -0.06",
        Control("the nearest neighbour", {"singular": "nearest"}), relation="<=",
    ),
    Claim(
        "the nearest neighbour stays at 2 p (1 - p): error with the most examples",
        "Cover and Hart 1967: the nearest neighbour's risk",
        2 * NOISE * (1 - NOISE), at_most_examples("nearest"), 0.02, "the boundary's share falls as n^-1/2",
        Control("the singular kernel", {"nearest": "singular"}),
    ),
    Claim(
        "regression with the kernel of a deep network is that classifier: agreement of the two, depth 20, 128 examples",
        "arXiv 2204.14126: regression becomes the singular kernel's vote",
        1.0, at_most_examples("machine"), 0.02, "off the diagonal the matrix is below 4^-20 n r^-alpha of what is on it",
        Control("one hidden layer", {"machine": "machine-shallow"}),
    ),
    Claim(
        "without h_0 and h_1 it is the nearest neighbour: agreement of h_2, depth 14",
        "arXiv 2204.14126: the nearest neighbour where A = A' = 0",
        1.0, at_most_examples("h2"), 0.03, "two points may be nearly equally near",
        Control("h_1 and h_3", {"h2": "singular-as-nearest"}),
    ),
    Claim(
        "with h_0 it is the majority: agreement of h_0 and h_4, depth 30",
        "arXiv 2204.14126: the majority where A is not 0",
        1.0, at_most_examples("even"), 0.01, "all kernels are equal to 10^-3; near ties are rare",
        Control("h_1 and h_3", {"even": "singular-as-majority"}),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """The singular kernel and its power law; errors against the number of examples."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(1, 2)
    kernel, errors = axes.reshape(-1)
    r = np.geomspace(0.02, 1.3, 60)
    for p in SHARES:
        (line,) = kernel.plot(r, np.asarray(singular(r, p)), label=f"p = {p}", markevery=8)
        middle = float(np.asarray(singular([0.28], p))[0]) * 0.28 ** alpha(p)
        prediction(kernel, r, middle * r ** -alpha(p), f"$r^{{-{alpha(p):.2f}}}$", color=line.get_color())
    kernel.set(xscale="log", yscale="log", xlabel="distance r", ylabel="$K / (A'^{2L} (L + 1))$", title="infinite depth, $h_1$ and $h_3$")
    n = results["singular"].n.values
    points(errors, n, by_examples(results["singular"]), "singular kernel, $\\alpha = d$")
    points(errors, n, by_examples(results["nearest"]), "control: nearest neighbour")
    prediction(errors, n, NOISE, "Bayes")
    prediction(errors, n, 2 * NOISE * (1 - NOISE), "$2p(1-p)$", color="grey")
    errors.set(xscale="log", xlabel="training examples n", ylabel="error", title="20 % of labels flipped", ylim=(0.18, 0.42))
    for ax in (kernel, errors):
        ax.legend()
    return fig


PAPER = Paper(
    slug="wide-deep-optimality",
    title="Wide and Deep Neural Networks Achieve Optimality for Classification",
    authors="Adityanarayanan Radhakrishnan, Mikhail Belkin, Caroline Uhler",
    year=2022,
    arxiv="2204.14126",
    area="infinite-width",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "71 s on two slow CPU cores", "full": "not measured"},
    data="generated: points of the sphere in three dimensions with noisy labels",
)
