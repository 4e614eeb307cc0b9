"""Exact Learning of Permutations for Nonzero Binary Inputs with Logarithmic Training Size and Quadratic Ensemble Complexity.

Giapitzakis, Back de Luca, Fountoulakis, 2025, arXiv 2502.16763, version 1 (version 2 has more tasks and another title).

A wide two-layer ReLU network without biases is trained on the k basis vectors e_i with targets P e_i, P a permutation, and tried on all
binary x, scaled to length 1. With n ones in x, write t(u) for the NTK of two inputs with cosine u, c = t(0), 1 = t(1). The training
kernel is (1 - c) I + c 11^T, so over initializations an output is Gaussian with one of two means, and a variance the same for both:

    mu_1 where the permuted bit is 1, mu_0 where it is 0,    mu_1 - mu_0 = (t(n^-1/2) - c) / (1 - c),
    mu_0 <= 0 < mu_1 exactly if t(u) - c >= u^2 (1 - c) at u = n^-1/2 (for c > 0): so it is for ReLU, and not for |h|, whose t is even.

An average of N networks is rounded at a threshold, and is exact on an input if every output is on the right side of it. With
margin = distance of a mean to the threshold, N grows like the largest var / margin^2 (times the logarithm of what may go wrong).
At the midpoint of mu_0 and mu_1 the worst input is that of n = k ones, where

    var / margin^2 = 16 (1/2 - 1/2pi) (1 - 1/2pi)^2 k (1 + O(k^-1/2)),    log-log slope 1 + 1.21 k^-1/2 + O(1/k).

At 0 it is that of n = 2, where mu_0 = -O(1/k): slope 2. Hence k log k networks for one input, and k^2 for all 2^k.

Claims, expected numbers and tolerances
    share of (input, bit) whose mean has the wrong sign, all 2^k - 1 inputs, k to 12   0 exactly
    slope of var / margin^2, k = 16 to 512, midpoint, by the formula                   1; +-0.25: 1.21 k^-1/2 is 0.30 at k = 16
    the same of trained networks of width 512, k = 4 to 32, inputs with one 0          1.737 by the formula; +-0.15
    N = 47 networks, k = 5: share of ensembles exact on all 26 unseen inputs           at least 0.99; -0.04
    N/4 networks: share of output bits that are right on all of them                   0.83 by the Gaussian; +-0.05

N is the least for which the sum over inputs and bits of Phi(-sqrt(N) margin / std) is at most 0.01. The first two are formulas without
chance: their interval has length 0, and how far a slope over these k is from its limit is the tolerance's. The others have
intervals over groups of independent networks.

Controls: |h| in place of ReLU (even); rounding at 0, twice; and, twice, a first layer with weights of variance 1/k.

What did not hold as first proposed
    - O(k) is the size of var / margin^2 for weights w of variance 1, x of length 1. Kernels times q leave the mean alone and multiply
      the variance by q: in NTK parametrization with inputs as they are (preactivations w . x / sqrt k, q = 1/k) both slopes are one
      less, so that rounding at 0 needs O(k), and at the midpoint O(1). "Linearithmic" needs the normalization said with it.
    - Slope 1.0 to 1.25 is that of k >= 16: 1.16 over k = 16 to 512 (local slopes 1.31 to 1.07), and 1.74 over k = 4 to 32.
    - A mean <= 0 tells nothing on the basis vectors, where mu_0 is 0: ensembles are tried on the inputs with two ones or more.
      By the same sum of chances rounding at 0 takes 3576 networks at k = 5, where the midpoint takes 47.
The midpoint depends on n, which the input tells. The authors' public code rounds at 0.

Run time: quick 45 s on two CPU cores; full about 15 min (by its operations; not run)
Command:  paperjax run permutation-exact-learning
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from scipy.special import ndtr

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope
from paperjax.data import Dataset
from paperjax.estimates import half_width
from paperjax.kernels.posterior import Prior, ensemble_posterior

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

# K is the length of the inputs that ensembles are tried on, all of them; DELTA the chance that one of N networks fails somewhere.
K, DELTA, GROUPS = 5, 0.01, 16
CHUNK = 256


def permutation(k: int) -> np.ndarray:
    """One fixed permutation: output i is bit ``permutation(k)[i]``."""
    return np.random.default_rng(0).permutation(k)


def dataset(bits_IxK: np.ndarray) -> Dataset:
    """Train on the k basis vectors; test on these bits, scaled to length 1. Targets are the permuted bits."""
    k = bits_IxK.shape[1]
    basis, order, bits = np.eye(k, dtype=np.float32), permutation(k), bits_IxK.astype(np.float32)
    x_test = bits / np.linalg.norm(bits, axis=1, keepdims=True)
    return Dataset(basis, basis[:, order], x_test, bits[:, order], f"permutation of {k} bits", "generated")


def every_input(k: int) -> Dataset:
    """All ``2^k - 1`` inputs; the first basis vector is there twice, to make it ``2^k``."""
    numbers = np.maximum(np.arange(2**k), 1)
    return dataset(numbers[:, None] >> np.arange(k) & 1)


def unseen_inputs(k: int) -> Dataset:
    """All inputs with at least two ones."""
    data = every_input(k)
    unseen = data.y_test.sum(axis=1) > 1
    return data.replace(x_test=data.x_test[unseen], y_test=data.y_test[unseen])


def one_of_each(k: int) -> Dataset:
    """An input with n ones for every n up to 32, for 32 more between that and k, and for n = k - 1 and k."""
    ones = np.unique([*range(1, min(k, 32) + 1), *np.geomspace(1, k, 64).astype(int), k - 1, k])
    return dataset(np.arange(k) < ones[:, None])


def all_but_one(k: int) -> Dataset:
    """The k inputs with one 0."""
    return dataset(1 - np.eye(k))


def network(k: int, width: int, std_exponent: float = 0.0) -> pj.Model:
    """``f(x) = width^-1/2 sum_j a_j relu(w_j . x)`` with a ~ N(0, 1) and w ~ N(0, k^(-2 std_exponent)), one a_j for each output."""
    return pj.models.two_layer(width, k, weight_std=k**-std_exponent)


def descent(k: int, std_exponent: float) -> optax.GradientTransformation:
    """GD with the best constant rate: 2 over the sum of the limiting kernel's two eigenvalues on the basis vectors."""
    v = k ** (-2 * std_exponent)
    beside, on = v / (2 * math.pi), v / 2 + 1 / 2
    # The mean square over k examples and k outputs moves them by 2 / k^2 times the kernel.
    return optax.sgd(k**2 / 2 * 2 / (2 * (on - beside) + beside * k))


def kernels(x_train: Any, x_test: Any, activation: str) -> pj.limits.Kernels:
    """NNGP and NTK of the training and test inputs together, of w and a of variance 1."""
    x = jnp.concatenate([x_train, x_test])
    return pj.limits.mlp_kernels(jnp.matmul(x, x.T, precision="highest"), 1, getattr(pj.limits, activation))


def wrong_signs(data: Any, activation: str) -> Array:
    """Share of all (input, bit) for which the mean prediction is on the wrong side of 0."""
    k = data.x_train.shape[0]
    chunks = data.x_test.reshape(-1, min(CHUNK, 2**k), k)
    cross = jax.lax.map(lambda x: kernels(data.x_train, x, activation).ntk[k:, :k], chunks).reshape(-1, k)
    theta = kernels(data.x_train, data.x_test[:1], activation).ntk[:k, :k]
    mean = pj.predict.gradient_flow(theta, data.y_train, cross)(jnp.inf).test
    assert mean is not None
    # On the basis vectors the mean is 0 exactly, but for rounding; the least |mean| elsewhere is 0.008 at k = 12.
    return jnp.mean(((mean > 1e-4) != (data.y_test > 0.5)).astype(jnp.float32))


class Gaussian(NamedTuple):
    """Wide trained networks over initializations.

    ``mean`` (inputs, k) and ``covariance`` (inputs, inputs) of each output; ``high`` and ``low`` (inputs,): the mean where the permuted
    bit is 1 and where it is 0. The latter is also what a 0 would get in an input that has none.
    """

    mean: Array
    covariance: Array
    high: Array
    low: Array


def gaussian(data: Any) -> Gaussian:
    """Its means and covariance from the closed-form kernels."""
    k = data.x_train.shape[0]
    nngp, ntk = kernels(data.x_train, data.x_test, "relu")
    train, cross = ntk[:k, :k], ntk[k:, :k]
    mean, covariance = ensemble_posterior(train, data.y_train, cross, Prior(nngp[:k, :k], nngp[k:, :k], nngp[k:, k:]))
    high, low = jnp.max(mean, axis=1), jnp.min(mean, axis=1)
    # With no 0 to read it from: two bits differ by what their rows of the kernel do, over the training kernel's repeated eigenvalue.
    gap = (jnp.max(cross, axis=1) - train[0, 1]) / (train[0, 0] - train[0, 1])
    return Gaussian(mean, covariance, high, jnp.where(jnp.all(data.x_test > 0, axis=1), high - gap, low))


def threshold(data: Any, share: Any) -> Array:
    """Where outputs are rounded, (inputs,): the midpoint of the two means for share 1, and 0 for share 0."""
    answer = gaussian(data)
    return share * (answer.high + answer.low) / 2


def models_needed(data: Any, share: Any) -> Array:
    """Largest ``var / margin^2`` over the unseen inputs and their bits: networks to average for a margin of one standard deviation."""
    answer, cut, k = gaussian(data), threshold(data, share), data.x_train.shape[0]
    ones = jnp.sum(data.y_test > 0.5, axis=1)
    above, below = answer.high - cut, jnp.where(ones < k, cut - answer.low, jnp.inf)
    need = jnp.diagonal(answer.covariance) / jnp.square(jnp.minimum(above, below))
    return jnp.max(jnp.where(ones > 1, need, 0.0))


def moments(model: pj.Model, params: Any, data: Any) -> Array:
    """Of one network on the test inputs: mean of the outputs whose bit is 1, whose bit is 0, and the two mean squares, (4,)."""
    f, one = model.apply(params, data.x_test), data.y_test > 0.5
    return jnp.stack([jnp.mean(f**power, where=bit) for power in (1, 2) for bit in (one, ~one)])


def outputs(model: pj.Model, params: Any, data: Any) -> Array:
    """All outputs on the test inputs, (inputs, k)."""
    return model.apply(params, data.x_test)


def exact(data: Callable[[int], Dataset], measures: Mapping[str, Callable[..., Array]], **axes: Any) -> pj.Experiment:
    """Formulas over a grid: nothing is trained, and the measures see the data and the axes only."""
    grid = pj.grid(**axes, lr=1.0)
    return pj.Experiment(lambda k: pj.models.two_layer(1, k), data, grid=grid, steps=1, measure_at=[0], measures=measures)


def trained(data: Callable[[int], Dataset], measures: Mapping[str, Any], exponent: float = 0.0, **axes: Any) -> pj.Experiment:
    """Networks trained on the k basis vectors, one for each seed."""
    grid = pj.grid(**axes, std_exponent=exponent)
    return pj.Experiment(network, data, loss="mse", optimizer=descent, grid=grid, steps=40, measure_at=[40], measures=measures)


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Formulas, by the name ``exact-...``; networks over k; and many networks of one k, to make ensembles of."""
    quick = size == "quick"
    lengths = {"relu": (3, 6, 9, 12) if quick else range(2, 13), "absolute": (3, 6) if quick else range(2, 13)}
    sizes, few, width = (16, 48, 160, 512) if quick else (16, 32, 64, 128, 256, 512, 1024), (4, 8, 16, 32), 512 if quick else 4096
    many = 4096 if quick else 16384
    found = {f"exact-signs-{name}": exact(every_input, {"wrong": wrong_signs}, k=list(k), activation=name) for name, k in lengths.items()}
    for name, share in (("midpoint", 1.0), ("zero", 0.0)):
        found[f"exact-models-{name}"] = exact(one_of_each, {"models": models_needed}, k=sizes, share=share)
        found[f"exact-threshold-{name}"] = exact(unseen_inputs, {"threshold": threshold}, k=K, share=share)
    parts = {
        "mean": lambda data: gaussian(data).mean,
        "covariance": lambda data: gaussian(data).covariance,
        "midpoint": lambda data: threshold(data, 1.0),
    }
    found["exact-gaussian"] = exact(unseen_inputs, parts, k=K)
    found["exact-models-all-but-one"] = exact(all_but_one, {"models": models_needed}, k=few, share=1.0)
    for name, exponent, part in (("networks", 0.0, 1), ("small-networks", 0.5, 4)):
        found[f"{name}-over-k"] = trained(all_but_one, {"moments": moments}, exponent, k=few, width=width, seed=many // 8 // part)
        found[name] = trained(unseen_inputs, {"outputs": outputs}, exponent, k=K, width=width, seed=many // part)
    return found


def most_wrong(results: Results) -> Estimate:
    """Largest share of wrong signs over k."""
    return Estimate(float(results["exact-signs-relu"].wrong.max()), 0.0)


def slope(result: "xarray.Dataset") -> float:
    """Log-log slope over k of the models needed, a number without chance."""
    assert result.sizes["k"] >= 4
    return float(np.polyfit(np.log(result.k.values), np.log(result.models.values.ravel().astype(float)), 1)[0])


def models_by_group(result: "xarray.Dataset") -> np.ndarray:
    """``var / margin^2`` of trained networks on the inputs with one 0, (groups, k), from the moments over the networks of a group."""
    moments_KxSx4 = result.moments.isel(step=-1).transpose("k", "seed", "moments_0").values.astype(np.float64)
    each = moments_KxSx4.shape[1] // GROUPS
    high, low, high2, low2 = moments_KxSx4[:, : each * GROUPS].reshape(-1, GROUPS, each, 4).mean(axis=2).transpose(2, 1, 0)
    k = result.k.values
    variance = ((k - 1) * (high2 - high**2) + low2 - low**2) / k * each / (each - 1)
    return variance / ((high - low) / 2) ** 2


def networks_slope(results: Results) -> Estimate:
    """Log-log slope over k of `models_by_group`."""
    result = results["networks-over-k"]
    return fit_slope(result.k.values, models_by_group(result))


def values(results: Results, name: str, variable: str) -> np.ndarray:
    """A result without coordinates, in float64."""
    return np.squeeze(results[name][variable].values).astype(np.float64)


def right(results: Results, size: int) -> np.ndarray:
    """Whether an output of an ensemble of `size` networks is right on every unseen input, (ensembles, k)."""
    f = values(results, "networks", "outputs")
    mean = f[: len(f) // size * size].reshape(-1, size, *f.shape[1:]).mean(axis=1)
    return ((mean > values(results, "exact-threshold-midpoint", "threshold")[:, None]) == (unseen_inputs(K).y_test > 0.5)).all(axis=1)


def margins(results: Results) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the Gaussian: distances to the midpoint on the right side (inputs, k), covariance, and +1 or -1 for the bits (inputs, k)."""
    mean, covariance, middle = (values(results, "exact-gaussian", name) for name in ("mean", "covariance", "midpoint"))
    signs = 2 * (unseen_inputs(K).y_test > 0.5) - 1.0
    return signs * (mean - middle[:, None]), covariance, signs


def enough(results: Results) -> int:
    """Least N for which the chances of a wrong output, summed over inputs and bits, are at most DELTA."""
    margin, covariance, _ = margins(results)
    in_stds = margin / np.sqrt(np.diagonal(covariance))[:, None]
    return next(size for size in range(1, 10_000) if ndtr(-math.sqrt(size) * in_stds).sum() <= DELTA)


def chance(results: Results, size: int) -> float:
    """Probability under the Gaussian that an output of an average of `size` networks is right on every unseen input; mean over outputs."""
    margin, covariance, signs = margins(results)
    noise = np.random.default_rng(1).multivariate_normal(np.zeros(len(covariance)), covariance / size, 100_000)
    return float(np.mean([(margin[:, j] + signs[:, j] * noise > 0).all(axis=1).mean() for j in range(K)]))


def exact_ensembles(results: Results) -> Estimate:
    """Share of ensembles of N that are right everywhere."""
    return estimate(right(results, enough(results)).all(axis=1))


def right_outputs(results: Results) -> Estimate:
    """Share of outputs of ensembles of N/4 that are right on every unseen input: mean over outputs, interval over ensembles."""
    return estimate(right(results, enough(results) // 4).mean(axis=1))


CLAIMS = (
    Claim(
        "the mean of wide networks has the sign of the permuted bit on every nonzero input: wrong signs, worst k",
        "abstract: the mean captures the permutation by sign-based features", 0.0, most_wrong, 0.0,
        "exact: a formula on all 2^k - 1 inputs, in float32, where the least mean is 100 times the rounding allowed for",
        Control("|h| in place of ReLU: t is even, so mu_0 > 0 at two ones and a 0", {"exact-signs-relu": "exact-signs-absolute"}),
    ),
    Claim(
        "var / margin^2 grows linearly in k when rounding at the midpoint: log-log slope of the formula",
        "abstract: linearithmic for a single input", 1.0, lambda results: Estimate(slope(results["exact-models-midpoint"]), 0.0), 0.25,
        "a formula, so without interval; the next order adds 1.21 k^-1/2 to the slope: 0.30 at k = 16, 0.05 at 512, 0.15 fitted",
        Control("rounding at 0: mu_0 is of order 1/k, so the slope tends to 2", {"exact-models-midpoint": "exact-models-zero"}),
    ),
    Claim(
        "trained networks need as many as the formula says: log-log slope over k = 4 to 32, inputs with one 0",
        "formula of the docstring", lambda results: slope(results["exact-models-all-but-one"]), networks_slope, 0.15,
        "width 512 moves var / margin^2 by a few per cent, and 10 % at one end of k would be 0.05; statistical errors as much",
        Control("first layer of variance 1/k: less and less noise from the start as k grows", {"networks-over-k": "small-networks-over-k"}),
    ),
    Claim(
        "an ensemble of N is exact on all unseen inputs of 5 bits", "abstract: exact on all inputs with high probability",
        1 - DELTA, exact_ensembles, 0.04, "N is where the sum of all chances of error is 0.01; 87 ensembles tell it to a few hundredths",
        Control("the same ensembles rounded at 0, which needs 76 times as many", {"exact-threshold-midpoint": "exact-threshold-zero"}),
        relation=">=",
    ),
    Claim(
        "N/4 networks leave as many outputs right on all unseen inputs as the Gaussian says", "formula of the docstring",
        lambda results: chance(results, enough(results) // 4), right_outputs, 0.05,
        "width 512 moves the std by 1 % and means by 0.01, a sixteenth of the least margin: 0.02; the rest is the interval",
        Control("first layer of variance 1/k: a fifth of the variance", {"networks": "small-networks"}),
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """The two means, var / margin^2 over k by formula and by networks, and how many networks make an ensemble right."""
    from paperjax.report.figure import panels, points, prediction

    fig, ((means, law), (few, ensembles)) = panels(2, 2)
    bits, f = unseen_inputs(K).y_test > 0.5, values(results, "networks", "outputs")
    groups = f[: len(f) // GROUPS * GROUPS].reshape(GROUPS, -1, *f.shape[1:]).mean(axis=1)
    mean, middle, ones = values(results, "exact-gaussian", "mean"), values(results, "exact-gaussian", "midpoint"), bits.sum(axis=1)
    for label, kind in (("permuted bit 1", bits), ("permuted bit 0", ~bits)):
        n = [n for n in range(2, K + 1) if kind[ones == n].any()]
        where = [kind & (ones == i)[:, None] for i in n]
        colour = points(means, n, np.stack([groups[:, w].mean(axis=1) for w in where], axis=1), label)
        prediction(means, n, [mean[w].mean() for w in where], "", color=colour)
    prediction(means, range(2, K + 1), [middle[ones == n].mean() for n in range(2, K + 1)], "midpoint", linestyle=(0, (1, 1)))
    means.axhline(0, color="black", linewidth=0.6)
    means.set(xlabel="ones in the input, n", ylabel="mean output", title="trained networks (lines: theory), k = 5", xticks=range(2, K + 1))

    for name, label, power in (("zero", "rounding at 0", 2), ("midpoint", "rounding at the midpoint", 1)):
        result = results[f"exact-models-{name}"]
        k, models = result.k.values, result.models.values.ravel()
        colour = points(law, k, models[None], label)
        prediction(law, k, models[-1] * (k / k[-1]) ** power, f"slope {power}", color=colour)
    law.set(xlabel="length of the input, k", ylabel="largest var / margin²", title="by the formula", xscale="log", yscale="log")

    for name, label in (("networks-over-k", "trained networks"), ("small-networks-over-k", "control: first layer 1/k")):
        points(few, results[name].k.values, models_by_group(results[name]), label)
    theory = results["exact-models-all-but-one"]
    prediction(few, theory.k.values, theory.models.values.ravel(), "formula")
    few.set(xlabel="length of the input, k", ylabel="var / margin²", title="inputs with one 0", xscale="log", yscale="log")

    most = enough(results)
    sizes = sorted({round(float(size)) for size in np.geomspace(1, most, 7)})
    for name, label in (("midpoint", "rounding at the midpoint"), ("zero", "rounding at 0")):
        given = {**results, "exact-threshold-midpoint": results[f"exact-threshold-{name}"]}
        shares = [estimate(right(given, size).mean(axis=1)) for size in sizes]
        bars = [half_width(share.samples) * share.stderr for share in shares]
        ensembles.errorbar(sizes, [share.value for share in shares], bars, linestyle="none", capsize=2.5, label=label)
    prediction(ensembles, sizes, [chance(results, size) for size in sizes], "Gaussian")
    ensembles.axvline(most, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    ensembles.set(xlabel="networks averaged (dotted: N)", ylabel="outputs right on all inputs", title="k = 5", xscale="log")
    for ax in (means, law, few, ensembles):
        ax.legend(fontsize=7)
    for ax, ticks in ((law, results["exact-models-zero"].k.values), (few, theory.k.values), (ensembles, sizes)):
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    return fig


PAPER = Paper(
    slug="permutation-exact-learning",
    title=("Exact Learning of Permutations for Nonzero Binary Inputs with Logarithmic Training Size and Quadratic Ensemble Complexity"),
    authors="George Giapitzakis, Artur Back de Luca, Kimon Fountoulakis",
    year=2025,
    arxiv="2502.16763",
    area="infinite-width",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="45 s on two CPU cores", full="about 15 min on two CPU cores (estimated, not run)"),
    data="generated: binary vectors",
)
