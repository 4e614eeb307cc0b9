"""ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection.

Huang, Zhou, Yan, Lin, NeurIPS 2023, arXiv 2310.13545.

A U-Net of N levels is ``f_i(x) = b_{i+1}(kappa_{i+1} a_{i+1}(x) + f_{i+1}(a_{i+1}(x)))``, f_N its middle block (Section 3). The paper's
theorems on forward and backward propagation and on perturbed inputs bound features, gradients and errors by sums over the long skip
connections with kappa_j^2 in them: large for many unscaled skips. Its remedies are constant scaling (CS), ``kappa_i = kappa^(i-1)``, and
learned scaling (LS), ``kappa_i = sigmoid(V2 relu(V1 a_i))`` with one small network V for all skips, which starts at 1/2 (V2 = 0).

Here every block is ``W2 relu(W1 x)`` with ``W1 ~ N(0, 2/m)``, ``W2 ~ N(0, 1/m)``. A block keeps E|h|^2, and its output is of mean 0
whatever the input is; so what comes through a skip and what comes from below are uncorrelated, and at every width

    E|f(x)|^2 = |x|^2 (1 + sum_j kappa_j^2),    E|J delta|^2 = |delta|^2 (1 + sum_j kappa_j^2),   J the Jacobian, delta any direction:

N + 1 for an unscaled network, and below 1 + 1 / (1 - kappa^2) = 2.96 at every depth for kappa = 0.7. A weight's gradient is the energy
that passes it: summed over the 2 j blocks of the path through skip j, and the 2 N + 1 of the path through the middle, the tangent kernel is
as ``sum_j 2 j kappa_j^2 + 2 N + 1``, 89 against 24 for CS and 35 for LS at N = 8, so the largest stable rate of SGD should rise up to
3.6-fold (2^1.87; measured 2^(1.58 +- 0.24) at width 32) and 2.5-fold (2^1.35; measured 2^(1.63 +- 0.29)).

Claims, expected numbers and tolerances
    log-log slope of E|f(x)|^2 against N + 1, N = 2 ... 8      1, +-0.2 (a mean of heavy-tailed draws)
    the same of a perturbation, E|J delta|^2                   1, +-0.2
    E|f(x)|^2 / |x|^2 with kappa = 0.7 at the largest N        1 + sum_j kappa_j^2 = 2.95, +-25 %
    the same with learned scaling as it starts                 1 + N/4 = 3, +-25 %
    standard deviation of the gradient's norm over minibatches before the first step, CS over unscaled    at most 0.7
    log2 of the largest stable learning rate, CS over unscaled at least 1 (stable at twice the rate), less 0.25, half a step of the grid

Controls: kappa = 0.7 for the growth of the unscaled network, and no scaling for the level; kappa = 0.98 for the network that is trained.

What did not hold as first proposed:
    - CS cuts the oscillation of the gradient's norm by 30 % or more in training. It does so at the start only (0.33 +- 0.05, six seeds, 16
      minibatches). After 40 steps of SGD at rate 0.0025 the deviations are 0.35 and 0.42, with 2.1 and 2.6 as the norms: the same share.
      With Adam (three seeds, steps 120 to 240) they are 0.046 and 0.049 at rate 0.001, 0.039 and 0.034 at 0.004: no difference.
    - With Adam the unscaled network is not less stable at twice the rate: both die (no gradient is left) at 0.016.
    - The law needs blocks that end linearly. With a ReLU at their end skip and depth add coherently, and the slope is 1.44 +- 0.06
      (N = 2 to 12, `relu_last`).

Run time: quick 53 s on two CPU cores; full not measured
Command:  paperjax run scalelong
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

DEPTHS: dict[Size, tuple[int, ...]] = {"quick": (2, 4, 6, 8), "full": (2, 4, 6, 8, 10, 12)}
KAPPA, WEAK = 0.7, 0.98
# Levels and width of the network that is trained.
TRAINED = dict(depth=8, width=32)


def gaussian(key: PRNGKeyArray, shape: tuple[int, ...], variance: float) -> Float[Array, "*stack fan_in fan_out"]:
    """Independent draws from N(0, variance / fan_in)."""
    return (variance / shape[-2]) ** 0.5 * jax.random.normal(key, shape)


def unet(
    width: int,
    depth: int,
    kappa: Scalar | float | None,
    *,
    outputs: int | None = None,
    relu_last: bool = False,
) -> pj.Model:
    """The U-Net of N = depth levels, ``f_i(x) = b_{i+1}(kappa_{i+1} a_{i+1}(x) + f_{i+1}(a_{i+1}(x)))``, f_N the middle block;
    the recursion is run as two scans, down and up.

    Blocks are ``W2 relu(W1 x)`` with He's variances; ``kappa_i = kappa^(i-1)``, or learned where kappa is ``None``. With `outputs`,
    a matrix before f_0 and one after. `relu_last` ends every block with a ReLU.
    """

    def init(key: PRNGKeyArray, x: Array) -> PyTree:
        keys = iter(jax.random.split(key, 10))

        def blocks(number: int) -> dict[str, Array]:
            shape = (number, width, width)
            return {"in": gaussian(next(keys), shape, 2.0), "out": gaussian(next(keys), shape, 1.0 + relu_last)}

        params: dict[str, Any] = {"down": blocks(depth), "up": blocks(depth), "middle": jax.tree.map(lambda w: w[0], blocks(1))}
        if kappa is None:
            params["gate"] = {"in": gaussian(next(keys), (width, width // 4), 2.0), "out": jnp.zeros((width // 4, 1))}
        if outputs is not None:
            params["first"] = gaussian(next(keys), (x.shape[1], width), 1.0)
            params["last"] = gaussian(next(keys), (width, outputs), 1.0)
        return params

    def run(block: Mapping[str, Array], h_BxN: Array) -> Array:
        h_BxN = jax.nn.relu(h_BxN @ block["in"]) @ block["out"]
        return jax.nn.relu(h_BxN) if relu_last else h_BxN

    def apply(params: PyTree, x: Array) -> Array:
        def down(h_BxN: Array, block: Any) -> tuple[Array, Array]:
            a_BxN = run(block, h_BxN)
            return a_BxN, a_BxN

        def up(h_BxN: Array, level: tuple[Any, Array, Array]) -> tuple[Array, None]:
            block, a_BxN, kappa_i = level
            if kappa is None:
                kappa_i = jax.nn.sigmoid(jax.nn.relu(a_BxN @ params["gate"]["in"]) @ params["gate"]["out"])
            return run(block, kappa_i * a_BxN + h_BxN), None

        h_BxN = x if outputs is None else x @ params["first"]
        h_BxN, a_LxBxN = jax.lax.scan(down, h_BxN, params["down"])
        kappa_L = (jnp.asarray(1.0 if kappa is None else kappa) ** jnp.arange(depth)).astype(h_BxN.dtype)
        h_BxN = run(params["middle"], h_BxN)
        h_BxN, _ = jax.lax.scan(up, h_BxN, (params["up"], a_LxBxN, kappa_L), reverse=True)
        return h_BxN if outputs is None else h_BxN @ params["last"]

    return pj.Model(init, apply)


def law(depth: Any, kappa: float) -> np.ndarray:
    """``1 + sum_j kappa_j^2`` with ``kappa_j = kappa^(j-1)``, for each depth."""
    return np.array([1 + sum(kappa ** (2 * j) for j in range(int(n))) for n in np.atleast_1d(depth)])


def gaussian_inputs(width: int) -> Callable[[Array], pj.data.Dataset]:
    """Eight inputs from N(0, I)."""

    def data(key: Array) -> pj.data.Dataset:
        x = jax.random.normal(key, (8, width))
        return pj.data.Dataset(x, x, x[:1], x[:1], "Gaussian inputs", "generated")

    return data


def amplification(draws: int) -> Callable[..., Array]:
    """Mean squares, over `draws` networks, of the output and of its change along a random direction, for inputs of mean square 1."""

    def measure(model: pj.Model, data: Any, key: Array) -> Float[Array, "2"]:
        def one(k: Array) -> Array:
            k_init, k_direction = jax.random.split(k)
            params = model.init(k_init, data.x_train)
            direction = jax.random.normal(k_direction, data.x_train.shape)
            h, moved = jax.jvp(lambda x: model.apply(params, x), (data.x_train,), (direction,))
            return jnp.stack([jnp.mean(h**2), jnp.mean(moved**2)])

        return jnp.mean(jax.lax.map(one, jax.random.split(key, draws)), axis=0)

    return measure


def noisy_digits(examples: int) -> Callable[[Array], pj.data.Dataset]:
    """``x_t = cos(t) x_0 + sin(t) noise``, t uniform on [0, pi/2], with cos(t) and sin(t) beside it; the target is the noise."""
    x0 = 2 * np.asarray(pj.data.digits().x_train[:examples]) - 1

    def data(key: Array) -> pj.data.Dataset:
        k_time, k_noise = jax.random.split(key)
        t = jax.random.uniform(k_time, (examples, 1), maxval=jnp.pi / 2)
        noise = jax.random.normal(k_noise, x0.shape)
        x = jnp.concatenate([jnp.cos(t) * x0 + jnp.sin(t) * noise, jnp.cos(t), jnp.sin(t)], axis=1)
        return pj.data.Dataset(x, noise, x[:1], noise[:1], "noisy digits", "scikit-learn's load_digits")

    return data


def oscillation(model: pj.Model, params: PyTree, data: Any, loss: Any, key: Array) -> Float[Array, "2"]:
    """Standard deviation and mean of the norm of the gradient over 4 minibatches of 32."""

    def one(k: Array) -> Array:
        rows = jax.random.randint(k, (32,), 0, data.x_train.shape[0])
        return optax.tree.norm(jax.grad(lambda p: loss(model.apply(p, data.x_train[rows]), data.y_train[rows]))(params))

    norms = jax.lax.map(one, jax.random.split(key, 4))
    return jnp.stack([jnp.std(norms, ddof=1), jnp.mean(norms)])


def scaled_by(kappa: float | None, **options: Any) -> Any:
    """The family of U-Nets whose skips are scaled so; a number is an axis, and all of them share one program."""

    def constant(width: int, depth: int, kappa: Scalar | float) -> pj.Model:
        return unet(width, depth, kappa, **options)

    def learned(width: int, depth: int) -> pj.Model:
        return unet(width, depth, None, **options)

    return learned if kappa is None else constant


def axis(kappa: float | None) -> dict[str, float]:
    """The axis of a constant scaling."""
    return {} if kappa is None else {"kappa": kappa}


def at_init(kappa: float | None, depths: Sequence[int], draws: int, seeds: int, width: int = 80, **options: bool) -> pj.Experiment:
    """U-Nets of several depths as they are drawn; nothing is trained."""
    grid = pj.grid(width=width, depth=list(depths), **axis(kappa), lr=1.0, seed=seeds)
    return pj.Experiment(
        scaled_by(kappa, **options), gaussian_inputs(width), loss="mse", optimizer="sgd", grid=grid,
        steps=0, measure_at=[0], measures=dict(mean_square=amplification(draws)),
    )  # fmt: skip


def training(kappa: float | None, rates: Sequence[float], steps: int, seeds: int) -> pj.Experiment:
    """A U-Net that learns to tell noise from digits, at several learning rates."""
    grid = pj.grid(**TRAINED, **axis(kappa), lr=list(rates), seed=seeds)
    return pj.Experiment(
        scaled_by(kappa, outputs=64), noisy_digits(512), loss="mse", optimizer="sgd", grid=grid,
        steps=steps, batch=32, measure_at=[0, steps], measures=dict(gradient=oscillation),
    )  # fmt: skip


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Networks as drawn, with and without scaling; trained with scaling, with hardly any, and without."""
    quick, depths = size == "quick", DEPTHS[size]
    draws, seeds, many = (12, 16, 12) if quick else (64, 16, 16)
    rates, steps = ([0.005 * 2 ** (i / 2) for i in range(16)], 16) if quick else ([0.0025 * 2 ** (i / 4) for i in range(33)], 400)
    return {
        "unscaled-init": at_init(1.0, depths, draws, seeds),
        "scaled-init": at_init(KAPPA, depths, draws // 2, seeds // 2),
        "learned-init": at_init(None, depths[-1:], 4 * draws, seeds),
        "unscaled": training(1.0, rates, steps, many),
        "scaled": training(KAPPA, rates, steps, many),
        "learned": training(None, rates, steps, many),
        "weak": training(WEAK, rates, steps, many),
    }


def squares(result: "xarray.Dataset", what: int) -> np.ndarray:
    """Mean square of the output (0) or of its change (1), ``(seed, depth)``."""
    return result.mean_square.isel(step=0, mean_square_0=what).transpose("seed", "depth").values


def growth(what: int) -> Callable[[Results], Estimate]:
    """Log-log slope against N + 1, which is 1 + sum_j kappa_j^2 without scaling."""

    def measured(results: Results) -> Estimate:
        found = results["unscaled-init"]
        return fit_slope(found.depth.values + 1, squares(found, what))

    return measured


def level(name: str) -> Callable[[Results], Estimate]:
    """Mean square of the output at the greatest depth."""
    return lambda results: estimate(squares(results[name], 0)[:, -1])


def edge(result: "xarray.Dataset") -> np.ndarray:
    """Largest learning rate of the grid up to which no training diverged, for each seed.

    A network that never diverges (its units died) counts as stable at the last rate.
    """
    lr = result.lr.values
    diverged = np.isfinite(result.diverged_at.transpose("seed", "lr").values) | ~np.isfinite(
        result.train_loss.isel(step=-1).transpose("seed", "lr").values
    )
    if diverged[:, 0].any():
        raise ValueError(f"a training diverged at the smallest learning rate, {lr[0]:.3g}: begin the grid lower.")
    return np.where(diverged.any(axis=1), lr[np.maximum(diverged.argmax(axis=1) - 1, 0)], lr[-1])


def edge_ratio(results: Results) -> Estimate:
    """Base-2 logarithm of the largest stable learning rate with scaling over that without, the same seeds."""
    return estimate(np.log2(edge(results["scaled"]) / edge(results["unscaled"])))


def deviations(result: "xarray.Dataset") -> np.ndarray:
    """Standard deviation of the gradient's norm over minibatches before the first step, ``(seed,)``."""
    return result.gradient.isel(step=0, gradient_0=0, lr=0).values


def oscillation_ratio(results: Results) -> Estimate:
    """Standard deviation of the gradient's norm over minibatches at the start of training, with scaling over without."""
    return estimate(deviations(results["scaled"]) / deviations(results["unscaled"]))


CLAIMS = (
    Claim(
        "without scaling the output's mean square grows as N + 1", "Section 3 (forward propagation); formula of the docstring",
        1.0, growth(0), 0.2,
        "exact in expectation, but of heavy-tailed draws: 0.2 is a factor 1.25 in the ratio to N + 1 from N = 2 to 8",
        Control("kappa = 0.7, whose sum is bounded", {"unscaled-init": "scaled-init"}),
    ),
    Claim(
        "without scaling a perturbation of the input is amplified as N + 1", "Section 3 (robustness); formula of the docstring",
        1.0, growth(1), 0.2, "as for the output: exact in expectation, heavy-tailed draws",
        Control("kappa = 0.7, whose sum is bounded", {"unscaled-init": "scaled-init"}),
    ),
    Claim(
        f"with kappa = {KAPPA} the output's mean square stays below 3", "Section 4 (CS); formula of the docstring",
        lambda results: law(results["scaled-init"].depth.values[-1], KAPPA)[0], level("scaled-init"), 0.74,
        "25 %: the mean of a hundred heavy-tailed draws",
        Control("no scaling: kappa = 1", {"scaled-init": "unscaled-init"}),
    ),
    Claim(
        "learned scaling starts at kappa = 1/2: the output's mean square is 1 + N/4", "Section 4 (LS); formula of the docstring",
        lambda results: 1 + results["learned-init"].depth.values[-1] / 4, level("learned-init"), 0.75,
        "25 %, as for constant scaling",
        Control("no scaling: kappa = 1", {"learned-init": "unscaled-init"}),
    ),
    Claim(
        "CS cuts the oscillation of the gradient's norm at the start of training by 30 %", "Section 4 (CS); the number is ours",
        0.7, oscillation_ratio, 0.0, "the bound itself; no allowance",
        Control("kappa = 0.98 scales hardly anything", {"scaled": "weak"}), "<=",
    ),
    Claim(
        "CS is stable at twice the learning rate (log2 of the ratio of largest stable rates)", "Section 4 (CS); the number is ours",
        1.0, edge_ratio, 0.25, "rates are a factor sqrt(2) apart: half a step",
        Control("kappa = 0.98 scales hardly anything", {"scaled": "weak"}), ">=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Output and perturbation against depth; gradient norms and the share of stable trainings against the learning rate."""
    from paperjax.report.figure import panels, points, prediction

    fig, ((left, middle, right),) = panels(1, 3)
    for what, ax, name in ((0, left, "E|f(x)|² / |x|²"), (1, middle, "E|Jδ|² / |δ|²")):
        for result, kappa, label in ((results["unscaled-init"], 1.0, "unscaled"), (results["scaled-init"], KAPPA, f"κ = {KAPPA}")):
            n = result.depth.values
            colour = points(ax, n, squares(result, what), label)
            prediction(ax, n, law(n, kappa), "1 + Σ κ²" if kappa == 1.0 else "", color=colour)
        ax.set(xlabel="levels N", ylabel=name, title="as drawn", ylim=(0, None))
    for name, label in (("unscaled", "unscaled"), ("weak", f"κ = {WEAK}"), ("learned", "learned"), ("scaled", f"κ = {KAPPA}")):
        lr = results[name].lr.values
        points(right, lr, (edge(results[name])[:, None] >= lr).astype(float), label, linestyle="-")
    prediction(right, lr, 0.5, "half of the seeds")
    right.set(
        xscale="log", xlabel="learning rate of SGD", ylabel="share of stable trainings", title=f"N = {TRAINED['depth']}, noisy digits"
    )
    for ax in (left, middle, right):
        ax.legend(loc="best")
    return fig


PAPER = Paper(
    slug="scalelong",
    title="ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection",
    authors="Zhongzhan Huang, Pan Zhou, Shuicheng Yan, Liang Lin",
    year=2023,
    arxiv="2310.13545",
    area="parametrization",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time=dict(quick="53 s on two CPU cores", full="not measured"),
    data="Gaussian inputs; scikit-learn's digits with noise, for a perceptron in place of the paper's convolutional U-Net and U-ViT",
)
