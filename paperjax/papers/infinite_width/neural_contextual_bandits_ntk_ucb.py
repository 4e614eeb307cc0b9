"""Neural Contextual Bandits without Regret.

Kassraie and Krause, AISTATS 2022, arXiv 2107.03144.

A round shows the contexts of some arms; one is chosen, and its reward f(x) seen with noise of variance s. NTK-UCB takes the arm of the
largest mean + beta std of the Gaussian process whose kernel k is the NTK. Its regret is bounded by means of the maximum information gain,

    gamma_T = max over T points of 1/2 logdet(I + K_T / s) = O~(T^((d-1)/d))    for contexts on the sphere S^(d-1).

SupNTK, which learns from rounds in sets that do not look at rewards, has regret O~(sqrt(T gamma_T)) = O~(T^(1 - 1/2d)). NN-UCB has the
gradients of a network at its init as features, so the empirical kernel in place of the NTK, and follows NTK-UCB.

Here: two hidden layers of ReLU, no biases, k(x, x) = 1, s = 0.1; bandits with d = 3, 512 contexts, each round ten of them as arms,
rewards of RMS 1 that are sums of 32 kernels, beta = 1. Exact formulas on the sphere, with mu_k the kernel's eigenvalue of degree k (Funk
and Hecke), of order k^-d, and N_k, of order k^(d-2), its multiplicity:

    any points       gamma_T <= G(s),    G(r) = 1/2 sum_k N_k log(1 + T mu_k / r) + T/2 (log(r/s) + s/r - 1)
    random points    the minimum of G over r

The first: blocks of one degree have trace T mu_k N_k whatever the points, by the addition theorem; then Fischer and Jensen. The second is
the deterministic equivalent of K_T. Sorted, eigenvalue m is of order m^(-d/(d-1)), so both grow as T^((d-1)/d): the bound is tight.

Claims, expected numbers and tolerances
    slope of random points' gain less (d-1)/d, d = 2, 3, 4, 6      0, +-0.07: the formula's own slopes are 0.03 off at these T
    that gain over its formula, every d and T                      1, +-0.03
    gain of greedily chosen points over the bound                  at most 1, exactly
    slope of the regret, NTK-UCB and SupNTK                        at most 1 - 1/2d = 5/6
    regret per round of T/5 over that of T                         at least 2
    regret of NN-UCB, width 512, over that of NTK-UCB              1, +-0.2

Controls: the smoother NNGP kernel (T^((d-1)/(d+1))), twice; greedy points of a deeper kernel; beta = 10^6, so that exploration is all,
three times; gradients of a network of width 2.

What did not hold as first proposed
    - The slope depends on s: by the formula, T = 256 to 2048 and d = 6, it is 0.73, 0.81 and 0.89 at s = 1, 0.1, 0.01; where s is small
      nearly every point is news. s = 0.1 was chosen by the formula. A pilot had 0.85 for d = 6 and 0.80 for d = 4.
    - Choosing by the mean alone (beta = 0) is no control: contexts that change explore by themselves: regret 30 +- 3, UCB 32 +- 2.
    - NTK-UCB's own bound, gamma_T sqrt(T), is T^(7/6) at d = 3 and says nothing; that of SupNTK is sublinear. Measured, SupNTK has ten
      times the regret of NTK-UCB, whose slope is 0.52 +- 0.02. The factor 2 is no theory's number; the abstract's rate gives 1.31.
Not here: convolutional kernels; networks trained in each round, whose mean is taken from the gradients, as it is for wide ones.

Run time: quick 50 s on two CPU cores, mostly compilation; full about an hour (estimated, not run)
Command:  paperjax run neural-contextual-bandits-ntk-ucb
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from scipy.special import comb, roots_legendre

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]
Policy = Callable[[Array, Array, Any], tuple[Array, Any]]

DEPTH, NOISE, DIMS = 2, 0.1, (2, 3, 4, 6)
DIM, ARMS, CENTRES = 3, 10, 32  # Of the bandits: contexts on S^2, arms of a round, kernels that a reward is a sum of.
TIMES = 40  # How often a bandit's regret is recorded.
EXPLORE = 1e6  # beta of a bonus beside which the mean is nothing.
DEGREES, MANY = 400, 1e12  # Eigenvalues below 1/MANY are near the rounding of float64.


def diagonal(which: str, depth: int = DEPTH) -> float:
    """Of the kernels at inputs of length 1 and weights of variance 1."""
    return 2.0**-depth * (depth + 1 if which == "ntk" else 1)


def kernel(x_NxD: Array, which: str = "ntk", depth: int = DEPTH) -> Float[Array, "N N"]:
    """NTK or NNGP kernel of wide ReLU networks without biases, over its diagonal."""
    gram = jnp.matmul(x_NxD, x_NxD.T, precision="highest")
    return getattr(pj.limits.mlp_kernels(gram, depth, jax.nn.relu), which) / diagonal(which, depth)


def sphere(key: Array, number: int, d: Any, most: int = max(DIMS)) -> Float[Array, "number most"]:
    """Uniform points of S^(d-1): the coordinates from d on are 0, so that d sets no shape."""
    x = jnp.where(jnp.arange(most) < d, jax.random.normal(key, (number, most)), 0.0)
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def only_points(number: int, key: Array, d: Any) -> pj.data.Dataset:
    """Points of the sphere, without anything to learn."""
    x = sphere(key, number, d)
    return pj.data.Dataset(x, x[:, :1], x, x[:, :1], "points of the sphere", "generated")


def contexts(number: int, key: Array) -> pj.data.Dataset:
    """Points of the sphere with a reward each, of RMS 1: a sum of kernels at random centres, ``sum_j a_j k(c_j, x)``."""
    at, weights = jax.random.split(key)
    x = sphere(at, CENTRES + number, DIM, DIM)
    f = kernel(x)[CENTRES:, :CENTRES] @ jax.random.normal(weights, (CENTRES, 1))
    x, f = x[CENTRES:], f / jnp.sqrt(jnp.mean(f**2))
    return pj.data.Dataset(x, f, x, f, "points of the sphere, rewards from the kernel's space", "generated")


class Posterior(NamedTuple):
    """At N points, for S sets of observations: ``mean`` and ``variance`` (S, N); rounds' ``factor`` (T, N) and ``member`` of a set (T,)."""

    mean: Array
    variance: Array
    factor: Array
    member: Array


def observe(k: Array, now: Posterior, t: Any, at: Any, y: Any, member: Any) -> Posterior:
    """Round t observes y at a point: the next row of a Cholesky factor. Set number S is none."""
    mine = jnp.where(now.member == member, now.factor[:, at], 0.0)
    std = jnp.sqrt(now.variance[member, at] + NOISE)
    row = (k[at] - mine @ now.factor) / std
    mean = now.mean[member] + row * (y - now.mean[member, at]) / std
    variance = jnp.maximum(now.variance[member] - row**2, 0.0)
    return Posterior(
        now.mean.at[member].set(mean, mode="drop"), now.variance.at[member].set(variance, mode="drop"),
        now.factor.at[t].set(row), now.member.at[t].set(member),
    )  # fmt: skip


def ucb(mean_SxA: Array, std_SxA: Array, beta: Any) -> tuple[Array, Any]:
    """The arm of the largest upper confidence bound."""
    return jnp.argmax(mean_SxA[0] + beta * std_SxA[0]), 0


def sup(mean_SxA: Array, std_SxA: Array, beta: Any) -> tuple[Array, Any]:
    """SupNTK: set s, of S, takes an arm that is not known to 2^-s, else leaves out what is 2^(1-s) below the best; at 2^-S it exploits."""
    sets, arms = mean_SxA.shape
    alive, at, member = jnp.ones(arms, bool), jnp.array(-1), jnp.array(sets)
    for s in range(sets):
        width = jnp.where(alive, beta * std_SxA[s], -jnp.inf)
        upper = jnp.where(alive, mean_SxA[s] + width, -jnp.inf)
        known, unknown = jnp.max(width) <= 0.5**sets, jnp.max(width) > 0.5 ** (s + 1)
        here = (at < 0) & (known | unknown)
        at = jnp.where(here, jnp.where(known, jnp.argmax(upper), jnp.argmax(width)), at)
        member = jnp.where(here & ~known, s, member)
        alive = upper >= jnp.max(upper) - 2 * 0.5 ** (s + 1)
    return at, member


def play(k: Array, f: Array, arms_TxA: Array, noise_T: Array, policy: Policy, beta: Any, sets: int = 1) -> tuple[Array, Array]:
    """Of every round the regret, and the information that its observation brings, ``log(1 + variance / noise) / 2``."""

    def one(now: Posterior, given: tuple[Array, Array, Array]) -> tuple[Posterior, tuple[Array, Array]]:
        t, arms, error = given
        arm, member = policy(now.mean[:, arms], jnp.sqrt(now.variance[:, arms]), beta)
        at = arms[arm]
        information = jnp.log1p(now.variance[member, at] / NOISE) / 2
        return observe(k, now, t, at, f[at] + error, member), (jnp.max(f[arms]) - f[at], information)

    rounds = len(noise_T)
    variance = jnp.broadcast_to(jnp.diagonal(k), (sets, len(k)))
    start = Posterior(jnp.zeros_like(variance), variance, jnp.zeros((rounds, len(k))), jnp.full(rounds, -1))
    return jax.lax.scan(one, start, (jnp.arange(rounds), arms_TxA, noise_T))[1]


def random_gains(data: Any, which: str, sizes: Sequence[int]) -> Array:
    """``1/2 logdet(I + K_T / noise)`` of the first T points, for all T from one Cholesky factor."""
    k = kernel(data.x_train, which)
    pivots = jnp.diagonal(jnp.linalg.cholesky(k / NOISE + jnp.eye(len(k))))
    return jnp.cumsum(jnp.log(pivots))[np.asarray(sizes) - 1]


def greedy_gains(data: Any, depth: int, sizes: Sequence[int]) -> Array:
    """The same of points chosen one after another for the largest variance, any of them again if that is the best."""
    k, rounds = kernel(data.x_train, depth=depth), max(sizes)
    _, each = play(k, jnp.zeros(len(k)), jnp.tile(jnp.arange(len(k)), (rounds, 1)), jnp.zeros(rounds), ucb, EXPLORE)
    return jnp.cumsum(each)[np.asarray(sizes) - 1]


def network(width: int) -> pj.Model:
    """ReLU networks; at width 1, which is the base, every weight has variance 1."""
    inner = pj.models.mlp(width, DEPTH, 1, bias=False, weight_variance=1.0)

    def init(key: Array, x: Array) -> PyTree:
        params = inner.init(key, x)
        return {**params, "first": {"w": x.shape[1] ** 0.5 * params["first"]["w"]}}

    return pj.Model(init, inner.apply)


def formula(measures: Mapping[str, Any], data: Any, **axes: Any) -> pj.Experiment:
    """Nothing is trained: the measures see data and axes only. Cells one after another, as their matrices are large."""
    grid = pj.grid(**axes, lr=0.1)
    layout = pj.Layout(map=math.prod(grid.shape))
    return pj.Experiment(lambda: pj.models.linear_net(1, 1, 1), data, grid=grid, steps=1, measure_at=[0], measures=measures, layout=layout)


def gain(measure: Callable[..., Array], how: Any, points: int, sizes: Sequence[int], d: Any, seeds: int) -> pj.Experiment:
    """Information gains at several numbers of points."""
    measures = {"gain": lambda data: measure(data, how, sizes), "points": lambda data: jnp.asarray(sizes)}
    return formula(measures, lambda key, d: only_points(points, key, d), d=d, seed=seeds)


def bandit(size: Size, policy: Policy = ucb, beta: Any = 1.0, sets: int = 1, width: int = 0) -> pj.Experiment:
    """A bandit with a kernel that is known; with a width, that of the gradients of a network at its init."""
    seeds, rounds, number = (32, 1000, 512) if size == "quick" else (64, 2000, 1024)

    def regret(model: pj.Model, params: PyTree, data: Any, key: Array, beta: Any) -> Array:
        x, (drawn, disturbed) = data.x_train, jax.random.split(key)
        k = pj.ntk(model, params, x, outputs="trace") / diagonal("ntk") if width else kernel(x)
        arms_TxA, noise_T = jax.random.randint(drawn, (rounds, ARMS), 0, number), NOISE**0.5 * jax.random.normal(disturbed, (rounds,))
        each, _ = play(k, data.y_train[:, 0], arms_TxA, noise_T, policy, beta, sets)
        return jnp.cumsum(each)[times - 1]

    times = rounds // TIMES * np.arange(1, TIMES + 1)
    measures = {"regret": regret, "rounds": lambda data: jnp.asarray(times)}
    found = formula(measures, lambda key: contexts(number, key), beta=beta, seed=seeds)
    planned = dict(family=network, parametrization=pj.ntp, base=dict(width=1), grid=found.grid.replace(width=width))
    return found.replace(**planned) if width else found


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Information gains of random and of chosen points, and bandits; of each what must fail."""
    quick = size == "quick"
    sizes, chosen = ((128, 256, 512, 1024), (64, 128, 256, 512)) if quick else ((256, 512, 1024, 2048), (128, 256, 512, 1024))
    sets = math.ceil(math.log2(1000 if quick else 2000) / 2)  # So that 2^-S is at most T^-1/2.
    found = {f"gain-{which}": gain(random_gains, which, max(sizes), sizes, DIMS, 5 if quick else 10) for which in ("ntk", "nngp")}
    found |= {f"greedy-{depth}": gain(greedy_gains, depth, 2 * max(chosen), chosen, DIM, 5) for depth in (DEPTH, 2 * DEPTH)}
    found |= {"ntk-ucb": bandit(size, beta=[0.0, 1.0]), "exploring": bandit(size, beta=EXPLORE), "sup-ntk": bandit(size, sup, sets=sets)}
    return {**found, "nn-ucb": bandit(size, width=512 if quick else 2048), "nn-ucb-narrow": bandit(size, width=2)}


@functools.cache
def modes(d: int, which: str = "ntk") -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues mu_k on S^(d-1) under the uniform measure, and multiplicities; what is left of the trace last, as modes without end.

    ``mu_k`` is the mean of ``k(u) P_k(u)`` over the cosine u of two random points, P_k being Gegenbauer's polynomial with P_k(1) = 1.
    """
    nodes, weights = roots_legendre(2 * DEGREES)
    u, measure = np.cos((nodes + 1) * math.pi / 2), weights * np.sin((nodes + 1) * math.pi / 2) ** (d - 2)
    with jax.enable_x64(True):
        pairs = jnp.asarray(np.moveaxis(np.array([[np.ones_like(u), u], [u, np.ones_like(u)]]), 2, 0))
        k_u = np.asarray(jax.vmap(lambda gram: getattr(pj.limits.mlp_kernels(gram, DEPTH, jax.nn.relu), which)[0, 1])(pairs))
    # Beyond this degree k^-d is rounding.
    k = np.arange(1, math.ceil(min(DEGREES, MANY ** (1 / d))))
    polynomials = [np.ones_like(u), u]
    for i in k[:-1]:
        polynomials.append(((2 * i + d - 2) * u * polynomials[i] - i * polynomials[i - 1]) / (i + d - 2))
    values = np.maximum(np.array(polynomials) @ (k_u * measure) / measure.sum() / diagonal(which), 0)
    times = np.append(1.0, (2 * k + d - 2) / k * comb(k + d - 3, k - 1))
    return np.append(values, (1 - values @ times) / MANY), np.append(times, MANY)


def gain_formula(points: float, d: int, r: float = NOISE) -> float:
    """G(r) of the docstring; at the noise it is the bound for any points."""
    values, times = modes(d)
    return float(times @ np.log1p(points * values / r) + points * (math.log(r / NOISE) + NOISE / r - 1)) / 2


def mean_gain(points: float, d: int) -> float:
    """The formula for random points; the grid is fine enough for 0.01 nats."""
    return min(gain_formula(points, d, r) for r in np.geomspace(NOISE, NOISE + 1, 500))


def gains(result: "xarray.Dataset", d: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of points, and information gains, ``(seed, points)``."""
    here = result.isel(step=0)
    here = here.sel(d=d) if "d" in here.dims else here
    return here.points.transpose("seed", ...).values[0].astype(np.float64), here.gain.transpose("seed", ...).values.astype(np.float64)


def farthest(estimates: Sequence[Estimate], number: float) -> Estimate:
    """Of several estimates the one that may be the farthest from a number."""
    return max(estimates, key=lambda e: max(abs(end - number) for end in e.interval))


def growth(results: Results) -> Estimate:
    """Slope of the gain over T less (d - 1) / d: of all d the farthest from 0."""
    slopes = [fit_slope(*gains(results["gain-ntk"], d)) for d in DIMS]
    return farthest([Estimate(slope.value - (d - 1) / d, slope.stderr, slope.samples) for slope, d in zip(slopes, DIMS)], 0.0)


def over_formula(results: Results) -> Estimate:
    """Gain over the formula's: of all d and T the farthest from 1."""
    measured = [(d, t, gain) for d in DIMS for t, gain in zip(*(a.T for a in gains(results["gain-ntk"], d)))]
    return farthest([estimate(gain / mean_gain(t, d)) for d, t, gain in measured], 1.0)


def over_bound(results: Results) -> Estimate:
    """Gain of the chosen points over the bound: the largest over T."""
    points, gain = gains(results[f"greedy-{DEPTH}"], DIM)
    return estimate((gain / [gain_formula(t, DIM) for t in points]).max(axis=1))


def regrets(result: "xarray.Dataset", beta: float = 1.0) -> np.ndarray:
    """Cumulative regret, ``(seed, times)``."""
    here = result.regret.isel(step=0)
    here = here.sel(beta=beta) if "beta" in here.dims else here
    return here.transpose("seed", ...).values.astype(np.float64)


def exponent(name: str) -> Callable[[Results], Estimate]:
    """Slope of the cumulative regret over an eighth, a quarter, half and all of the rounds."""
    at = np.array([TIMES // 8, TIMES // 4, TIMES // 2, TIMES])
    return lambda results: fit_slope(at, regrets(results[name])[:, at - 1])


def quotient(above: str, at: int) -> Callable[[Results], Estimate]:
    """Regret per round of a bandit after some of the 40 times over that of NTK-UCB at the end, of the same contexts, arms and noise."""
    return lambda results: estimate(TIMES / at * regrets(results[above])[:, at - 1] / regrets(results["ntk-ucb"])[:, -1])


RATE, LOGS = 1 - 1 / (2 * DIM), "an upper bound, so without tolerance; its logarithms would only raise it"
CHANCE = "exploration alone, a bonus of scale 10^6: as bad as chance"
CLAIMS = (
    Claim(
        "the information gain of random points grows as T^((d-1)/d): slope less that, d = 2, 3, 4, 6, farthest",
        "Section 3: bound on gamma_T", 0.0, growth, 0.07, "as proposed; the formula's slopes at these T are 0.03 off their limits",
        Control("the NNGP kernel: T^((d-1)/(d+1))", {"gain-ntk": "gain-nngp"}),
    ),
    Claim(
        "the gain of random points is that of the formula: measured over formula, all d and T, farthest",
        "formula of the docstring", 1.0, over_formula, 0.03, "what follows the deterministic equivalent is of order 1, of gains from 35 on",
        Control("the NNGP kernel's gain", {"gain-ntk": "gain-nngp"}),
    ),
    Claim(
        "no points gain more than 1/2 sum N_k log(1 + T mu_k / s): points chosen greedily, d = 3, over that, largest",
        "formula of the docstring", 1.0, over_bound, 0.0, "an inequality for any points, so without tolerance",
        Control("greedy points of the kernel of four hidden layers, whose eigenvalues are larger", {"greedy-2": "greedy-4"}), relation="<=",
    ),
    Claim(
        "NTK-UCB's regret is sublinear, at most T^(1 - 1/2d): slope, d = 3", "abstract: rate T^(-1/2d)", RATE, exponent("ntk-ucb"), 0.0,
        LOGS, Control(CHANCE, {"ntk-ucb": "exploring"}), relation="<=",
    ),
    Claim(
        "the same of SupNTK", "abstract: rate T^(-1/2d)", RATE, exponent("sup-ntk"), 0.0, LOGS,
        Control(CHANCE, {"sup-ntk": "exploring"}), relation="<=",
    ),
    Claim(
        "NTK-UCB's regret per round falls to half or less from T/5 to T: quotient", "as proposed", 2.0, quotient("ntk-ucb", 8), 0.0,
        "a lower bound, so without tolerance; the abstract's rate would give 5^(1/6) = 1.31",
        Control(CHANCE, {"ntk-ucb": "exploring"}), relation=">=",
    ),
    Claim(
        "NN-UCB, by gradients at init, has the regret of NTK-UCB: quotient", "abstract: its regret closely tracks that of NTK-UCB",
        1.0, quotient("nn-ucb", TIMES), 0.2, "as proposed; at n = 512 entries of the kernel are off by some n^-1/2 = 4 % each",
        Control("width 2, whose gradients are too few", {"nn-ucb": "nn-ucb-narrow"}),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Gains of random and of chosen points over their number; regret per round."""
    from paperjax.report.figure import panels, points, prediction

    fig, ((random, chosen, regret),) = panels(1, 3)
    n, _ = gains(results["gain-ntk"], DIM)
    for d in DIMS:
        colour = points(random, n, gains(results["gain-ntk"], d)[1], f"d = {d}")
        prediction(random, n, [mean_gain(t, d) for t in n], "", color=colour)
    random.set(xlabel="points T", ylabel="information gain (nats)", title="random points (lines: formula)", yscale="log")

    for name, label in ((f"greedy-{DEPTH}", "chosen greedily"), ("gain-ntk", "random")):
        t, gain = gains(results[name], DIM)
        points(chosen, t, gain / [gain_formula(i, DIM) for i in t], label)
    prediction(chosen, n, [mean_gain(i, DIM) / gain_formula(i, DIM) for i in n], "formula, random")
    ticks = sorted({*n, *gains(results[f"greedy-{DEPTH}"], DIM)[0]})
    prediction(chosen, ticks, 1.0, "bound, any points", linestyle="-")
    chosen.set(xlabel="points T", ylabel="information gain / bound", title="d = 3", ylim=(None, 1.1))

    at = np.array([1, 3, 7, 15, 23, 31, 39])
    rounds = results["ntk-ucb"].rounds.values.reshape(-1, TIMES)[0][at]
    labels = {"ntk-ucb": "NTK-UCB", "nn-ucb": "NN-UCB", "sup-ntk": "SupNTK"}
    labels |= {"nn-ucb-narrow": "control: width 2", "exploring": "control: explores only"}
    for i, (name, label) in enumerate(labels.items()):
        points(regret, rounds * (1 + 0.03 * (i - 2)), regrets(results[name])[:, at] / rounds, label)
    points(regret, rounds, regrets(results["ntk-ucb"], 0.0)[:, at] / rounds, "mean alone", marker="x", color="black")
    level = regrets(results["sup-ntk"])[:, at[2]].mean()
    prediction(regret, rounds, level * (rounds / rounds[2]) ** RATE / rounds, "$T^{-1/2d}$, level of SupNTK")
    regret.set(xlabel="rounds T", ylabel="regret / T (RMS of the reward)", title="bandits, d = 3", yscale="log", ylim=(1e-3, 2))
    for ax, shown in ((random, n), (chosen, ticks), (regret, rounds[[0, 1, 2, 3, 6]])):
        ax.set(xscale="log")
        ax.set_xticks(shown, [str(t) for t in shown])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7, ncols=1 + (ax is regret))
    return fig


PAPER = Paper(
    slug="neural-contextual-bandits-ntk-ucb",
    title="Neural Contextual Bandits without Regret",
    authors="Parnian Kassraie, Andreas Krause",
    year=2021,
    arxiv="2107.03144",
    area="infinite-width",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="50 s on two CPU cores", full="about an hour on two CPU cores (estimated, not run)"),
    data="generated: points of the sphere, rewards from the space of the kernel",
)
