"""Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.

Dang, Tran, Osher, Tran-The, Ho, Nguyen, ICML 2023, arXiv 2301.00437.

Features of a network that can fit anything are free variables: ``min |W_M ... W_1 H - Y|² / 2N + Σ λ_l |W_l|² / 2 + λ_H |H|² / 2`` for
N examples, n_k of class k, one-hot Y. Its global minimisers (`pj.limits.mse_minimiser`) have one feature vector a class; class means
and rows of W_M are orthogonal, or with a free bias and balanced classes a simplex; and every class has a singular value of its own,

    M = 1:  s_k = (n_k^½ - N (λ_W λ_H)^½)₊,    |w_k|² = s_k (λ_H / λ_W)^½,    so that it vanishes iff n_k <= N² λ_W λ_H,

while for M > 1 it jumps to 0 from ``(M - 1) n_k^½ / M`` (`pj.limits.collapse_threshold`), and past that a minimum that is not global is
left for some decay. With cross-entropy M = 1 has the simplex.

Here: gradient descent with momentum from random features and weights; the decay rises from 0 in the first half, so that at depth 3
training follows the minimum it is in (cross-entropy at depth 3: constant decay). Loss and decay as in the formulas, float32.

Claims, expected numbers and tolerances
    imbalanced, M = 1: farthest s_k / n_k^½ from the formula             0, at most 3e-3
    classes of 3, 4, 5, below the threshold of 5.5: s_k / n_k^½          0, at most 3e-3
    class of 6, above it: s_k / n_k^½                                    0.0426, +-3e-3
    |w_k|² over the formula, farthest of the classes that are left       1, +-0.01
    largest cosine of two rows of W_1 that are left                      0, at most 0.02
    balanced, M = 3: s / n^½                                             0.9784, +-3e-3
    largest cosine of class means, M = 3; with bias, from -1/(K - 1)     0, at most 0.02
    NC1, M = 3                                                           at most 1e-3, compared by its logarithm
    M = 3 at the critical decay: s / n^½, and loss over that of nothing  2/3 +-3e-3, 1 +-1e-3
    M = 3 at 1.38 times it: s / n^½ (the minimum is lost at 1.414)       at least 1/3
    cross-entropy, M = 1: cosines from -1/(K - 1)                        0, at most 0.02
    cross-entropy, M = 3: lowest loss over that of the simplex           0.918, +-1e-3
    ReLU perceptron on digits, squared error: NC1                        at most 0.03

Controls: no decay, for which s_k = n_k^½ and nothing collapses; less and more decay, which move the threshold to 2.5 and to 6.5; the
decays of weights and features exchanged; depth 1 for depth 3; no bias for bias; 0.95 times the critical decay; 1.45 times it.

What did not hold
    - With cross-entropy the paper has the simplex as the global minimiser at every depth. At M = 3, K = 4 it is not: pairs of opposite
      classes on orthogonal axes have a loss of 0.0787, the simplex of 0.0858; 9 of 16 random starts end at the former, the others at the
      latter. At equal margins they have less loss, and less decay for every even K with K 2^(-(M-1)/(M+1)) < K - 1, whatever λ is
      (`pj.limits.cross_entropy_frame`; that low rank beats collapse: Garrod and Keating, arXiv 2410.23169). The proposed claim of
      cosines -1/(K - 1) for cross-entropy is checked at M = 1.
    - Training finds the global minimiser from everywhere at M = 1 only: at M = 3 and 1.38 times the critical decay it stays at a loss of
      1.31 times that of having no features.
    - On digits 4,000 steps of cross-entropy take NC1 to 0.24 only (no decay: 0.32; one seed), so squared error is used.

Run time: quick about 45 s on two CPU cores
Command:  paperjax run neural-collapse-deep-linear
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, Scalar

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

IMBALANCED = (12, 8, 7, 6, 5, 4, 3)  # With the decay of UNEQUAL classes up to 5.5 vanish.
TOTAL = sum(IMBALANCED)
RATIO = 4.0  # feature_decay over weight_decay
UNEQUAL = 5.5**0.5 / TOTAL / RATIO**0.5
CLASSES, PER_CLASS = 4, 10
LITTLE = 3e-3
SIZES = np.array(IMBALANCED)
THEORY = pj.limits.mse_minimiser(IMBALANCED, weight_decay=UNEQUAL, feature_decay=RATIO * UNEQUAL)
DEEP = pj.limits.mse_minimiser([PER_CLASS] * CLASSES, 3, weight_decay=LITTLE, feature_decay=LITTLE).outputs[0, 0]  # s / n^½


def free(depth: int, width: int, classes: int, bias: bool) -> pj.Model:
    """``W_M ... W_1 h_i`` (+ b) for example i, whose one-hot row is the input; entries of variance 1 / width."""

    def init(key: Array, x: Array) -> PyTree:
        shapes = [(x.shape[0], width), *[(width, width)] * (depth - 1), (width, classes)]
        drawn = [width**-0.5 * jax.random.normal(k, shape, x.dtype) for k, shape in zip(jax.random.split(key, depth + 1), shapes)]
        return {"features": drawn[0], "layers": drawn[1:], **({"bias": jnp.zeros(classes, x.dtype)} if bias else {})}

    return pj.Model(init, lambda params, x: outputs(params, x @ params["features"]) + (params["bias"][None] if bias else 0))


def outputs(params: PyTree, features: Float[Array, "batch width"]) -> Float[Array, "batch classes"]:
    """Without a bias."""
    return functools.reduce(jnp.matmul, params["layers"], features)


def labels(sizes: Sequence[int]) -> pj.data.Dataset:
    """Examples that are nothing but their number, in classes of these sizes."""
    y = np.repeat(np.eye(len(sizes), dtype=np.float32), sizes, axis=0)
    x = np.eye(len(y), dtype=np.float32)
    return pj.data.Dataset(x, y, x[:0], y[:0], "free features", "generated")


def half_mse(f: Array, y: Any) -> Scalar:
    """``|f - y|² / 2N``."""
    return jnp.sum(jnp.square(f - y)) / (2 * y.shape[0])


def descent(
    learning_rate: Scalar | float, weight_decay: Scalar | float, ratio: Scalar | float, rise: Scalar | float
) -> optax.GradientTransformation:
    """Gradient descent with momentum under ``λ_W |W_l|² / 2`` for every l and ``ratio λ_W |H|² / 2``, which rise from 0 in `rise` steps."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now = weight_decay * jnp.minimum(1.0, state / rise)
        share = {"features": ratio, "layers": 1.0, "bias": 0.0}
        pulled = {k: jax.tree.map(lambda g, p, rate=share[k]: g + now * rate * p, updates[k], params[k]) for k in params}
        return pulled, state + 1

    decay = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    return optax.chain(decay, optax.sgd(learning_rate, 0.9, nesterov=True))


def objective(model: pj.Model, params: PyTree, data: Any, loss: Any, weight_decay: Scalar | float, ratio: Scalar | float) -> Scalar:
    """The loss with decay."""
    squares = {name: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    decay = weight_decay * (squares["layers"] + ratio * squares["features"])
    return loss(model.apply(params, data.x_train), data.y_train) + decay / 2


def singular_values(params: PyTree) -> Float[Array, " classes"]:
    """Of ``W_M ... W_1 H``."""
    return jnp.linalg.svd(outputs(params, params["features"]), compute_uv=False)


def classifier(params: PyTree) -> Float[Array, "classes classes"]:
    """Scalar products of the rows of ``W_M``."""
    return params["layers"][-1].T @ params["layers"][-1]


def cosines(params: PyTree, data: Any) -> Float[Array, "classes classes"]:
    """Between class means of H, as they are."""
    return pj.measures.class_cosines(params["features"], data.y_train, centred=False)


MEASURES = dict(objective=objective, s=singular_values, classifier=classifier, cosines=cosines, nc1=pj.measures.nc1)


def training(
    sizes: Sequence[int], depth: int, weight_decay: float, ratio: float = 1.0, *, lr: float, steps: int, seeds: int,
    loss: Any = half_mse, bias: bool = False, rise: float = 0.5,
) -> pj.Experiment:  # fmt: skip
    """Train free features and the layers above them."""
    classes = len(sizes)
    return pj.Experiment(
        lambda depth: free(depth, 2 * classes, classes, bias), labels(sizes), loss=loss, optimizer=descent,
        grid=pj.grid(depth=[depth], weight_decay=weight_decay, ratio=ratio, rise=max(1.0, rise * steps), lr=lr, seed=seeds), steps=steps,
        measure_at=[0, steps], measures=MEASURES,
    )  # fmt: skip


def digits(weight_decay: float, examples: int, steps: int, seeds: int) -> pj.Experiment:
    """A ReLU perceptron on digits, squared error, every leaf under decay."""

    def decayed(learning_rate: Scalar | float, weight_decay: Scalar | float) -> optax.GradientTransformation:
        return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, 0.9, nesterov=True))

    return pj.Experiment(
        lambda: pj.models.mlp(64, 2, 10), pj.data.one_hot(pj.data.centre(pj.data.subset(pj.data.digits(), examples))), optimizer=decayed,
        grid=pj.grid(weight_decay=weight_decay, lr=0.5, seed=seeds), steps=steps, measure_at=[0, 50, 200, steps // 4, steps // 2, steps],
        measures=dict(nc1=pj.measures.nc1, nc2=pj.measures.nc2, nc3=pj.measures.nc3),
    )  # fmt: skip


def critical_decay() -> float:
    """That at which the classes of a balanced network of depth 3 vanish; sizes grow as its power (M + 1) / M."""
    unit = pj.limits.collapse_threshold(CLASSES * PER_CLASS, 3, weight_decay=1.0, feature_decay=1.0).size
    return (PER_CLASS / unit) ** (3 / 4)


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Squared error at depth 1 and 3, at the thresholds and beside them, cross-entropy, and digits."""
    balanced = (PER_CLASS,) * CLASSES
    seeds, longer, examples = (8, 1, 500) if size == "quick" else (16, 4, 1437)
    imbalanced = functools.partial(training, IMBALANCED, 1, lr=2.0, steps=2500 * longer, seeds=seeds)
    deep = functools.partial(training, balanced, 3, lr=0.3, steps=3000 * longer, seeds=seeds)
    shallow = functools.partial(training, balanced, 1, LITTLE, lr=0.5, steps=5000 * longer, seeds=seeds)
    critical = critical_decay()
    return {
        "imbalanced": imbalanced(UNEQUAL, RATIO),
        "less-decay": imbalanced(UNEQUAL * (2.5 / 5.5) ** 0.5, RATIO),
        "more-decay": imbalanced(UNEQUAL * (6.5 / 5.5) ** 0.5, RATIO),
        "exchanged": imbalanced(UNEQUAL * RATIO, 1 / RATIO),
        "no-decay": imbalanced(0.0),
        "deep": deep(LITTLE),
        "deep-bias": deep(LITTLE, bias=True),
        "deep-no-decay": deep(0.0),
        "shallow": shallow(),
        "at-threshold": deep(critical),
        "below-threshold": deep(0.95 * critical),
        "metastable": deep(1.38 * critical),
        "past-metastable": deep(1.45 * critical),
        "softmax": shallow(loss="cross_entropy"),
        "softmax-deep": deep(LITTLE, loss="cross_entropy", seeds=2 * seeds, steps=8000 * longer, rise=0),
        "digits": digits(3e-4, examples, 2000 * longer, seeds // 2),
        "digits-no-decay": digits(0.0, examples, 2000 * longer, seeds // 2),
    }


def last(result: "xarray.Dataset", name: str) -> np.ndarray:
    """A measure at the end, ``(seed, ...)``."""
    return result[name].isel(step=-1, depth=0).values.astype(np.float64)


def share(results: Results) -> np.ndarray:
    """``s_k / n_k^½`` of imbalanced classes, ``(seed, class)``."""
    return last(results["imbalanced"], "s") / SIZES**0.5


def balanced_share(name: str, pick: Callable[[np.ndarray], np.ndarray] = lambda s: s.mean(axis=1)) -> Callable[[Results], Estimate]:
    """Of the classes of a balanced network."""
    return lambda results: estimate(pick(last(results[name], "s")) / PER_CLASS**0.5)


def rows(results: Results) -> np.ndarray:
    """Scalar products of the rows of W_1 of the classes that should be left, ``(seed, class, class)``."""
    left = THEORY.singular_values > 0
    return last(results["imbalanced"], "classifier")[:, left][:, :, left]


def row_norms(results: Results) -> Estimate:
    """Over the formula, of the class that is farthest from it."""
    ratio = np.diagonal(rows(results), axis1=1, axis2=2) / np.diag(THEORY.classifier_gram)[THEORY.singular_values > 0]
    return estimate(ratio[:, np.abs(ratio.mean(axis=0) - 1).argmax()])


def row_cosines(results: Results) -> Estimate:
    """The largest."""
    gram = rows(results)
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    return farthest(gram / (norms[:, :, None] * norms[:, None, :]), 0.0)


def farthest(cosines: np.ndarray, angle: float) -> Estimate:
    """Off-diagonal cosines ``(seed, class, class)`` from one number: the largest distance."""
    return estimate(np.abs(cosines[:, ~np.eye(cosines.shape[1], dtype=bool)] - angle).max(axis=1))


def angles(name: str, angle: float) -> Callable[[Results], Estimate]:
    """The farthest cosine of class means from what it should be."""
    return lambda results: farthest(last(results[name], "cosines"), angle)


def frame_loss(depth: int, frame: Any) -> float:
    """Of cross-entropy with decay, at the best size of a frame."""
    return pj.limits.cross_entropy_frame(CLASSES, PER_CLASS, depth, weight_decay=LITTLE, feature_decay=LITTLE, frame=frame).loss


def lowest_over_simplex(results: Results) -> Estimate:
    """That of the best seed: one is enough to be no minimiser."""
    result = results["softmax-deep"]
    return Estimate(float(last(result, "objective").min()) / frame_loss(int(result.depth[0]), "simplex"), 0.0)


SIMPLEX = -1 / (CLASSES - 1)
CLAIMS = (
    Claim(
        "imbalanced, one layer: s_k = (n_k^½ - N (λ_W λ_H)^½)₊, farthest of seven classes in units of n_k^½",
        "section 4, bias-free imbalanced", 0.0,
        lambda results: estimate(np.abs(share(results) - THEORY.singular_values / np.sqrt(SIZES)).max(axis=1)),
        3e-3, "the formula is exact; what is left is how far training is from its end, least near the threshold",
        Control("no decay: s_k = n_k^½", {"imbalanced": "no-decay"}), "<=",
    ),
    Claim(
        "imbalanced, one layer: classes of 3, 4 and 5, below N² λ_W λ_H = 5.5, vanish: largest s_k / n_k^½",
        "section 4, bias-free imbalanced", 0.0, lambda results: estimate(share(results)[:, SIZES <= 5].max(axis=1)), 3e-3,
        "exactly 0 in the end, which the class of 5 approaches slowest",
        Control("less decay, N² λ_W λ_H = 2.5: all are there", {"imbalanced": "less-decay"}), "<=",
    ),
    Claim(
        "imbalanced, one layer: the class of 6, above 5.5, is left: s_k / n_k^½ = 1 - (5.5 / 6)^½",
        "section 4, bias-free imbalanced", 1 - (5.5 / 6) ** 0.5, lambda r: estimate(share(r)[:, SIZES == 6][:, 0]), 3e-3,
        "the formula is exact; training is slowest near the threshold",
        Control("more decay, N² λ_W λ_H = 6.5: it vanishes", {"imbalanced": "more-decay"}),
    ),
    Claim(
        "imbalanced, one layer: |w_k|² = s_k (λ_H / λ_W)^½, farthest ratio of the classes that are left",
        "section 4, bias-free imbalanced", 1.0, row_norms, 0.01, "as s_k, which near the threshold is a small difference",
        Control("the decays of weights and features exchanged, for which s_k is the same", {"imbalanced": "exchanged"}),
    ),
    Claim(
        "imbalanced, one layer: rows of W are orthogonal: largest cosine of the classes that are left",
        "section 4: general orthogonal frame", 0.0, row_cosines, 0.02, "exactly 0 in the end; float32 leaves 1e-7",
        Control("no decay: what was random at the start stays", {"imbalanced": "no-decay"}), "<=",
    ),
    Claim(
        "balanced, three layers: s / n^½ of the closed form", "section 3, deep linear", DEEP, balanced_share("deep"), 3e-3,
        "the formula is exact; three times the distance would be depth 1", Control("one layer, the same decays", {"deep": "shallow"}),
    ),
    Claim(
        "balanced, three layers: class means are orthogonal: largest cosine", "section 3, bias-free", 0.0, angles("deep", 0.0), 0.02,
        "exactly 0 in the end; float32 leaves 1e-7", Control("no decay: angles stay random", {"deep": "deep-no-decay"}), "<=",
    ),
    Claim(
        "balanced, three layers: log10 of NC1 of the last features", "section 3", -3.0,
        lambda results: estimate(np.log10(last(results["deep"], "nc1"))), 0.0, "exactly 0 in the end, and in float32 1e-14",
        Control("no decay: NC1 of about 0.01 is left", {"deep": "deep-no-decay"}), "<=",
    ),
    Claim(
        "balanced, three layers and a bias: cosines of class means are -1/(K - 1), farthest", "section 3, last-layer bias", 0.0,
        angles("deep-bias", SIMPLEX), 0.02, "exact in the end, to float32", Control("no bias: orthogonal", {"deep-bias": "deep"}), "<=",
    ),
    Claim(
        "three layers at the critical decay: s / n^½ = (M - 1) / M", "pj.limits.collapse_threshold", 2 / 3, balanced_share("at-threshold"),
        3e-3, "exact in the end, to float32", Control("0.95 times that decay", {"at-threshold": "below-threshold"}),
    ),
    Claim(
        "three layers at the critical decay: no features at all lose as little: loss over 1/2", "section 3: condition on decay", 1.0,
        lambda r: estimate(last(r["at-threshold"], "objective") / 0.5), 1e-3, "of second order in what training leaves",
        Control("0.95 times that decay", {"at-threshold": "below-threshold"}),
    ),
    Claim(
        "three layers: past the critical decay training stays in a minimum with s / n^½ >= (M - 1) / 2M, up to 1.414 times it: at 1.38",
        "pj.limits.collapse_threshold, metastable", 1 / 3, balanced_share("metastable", lambda s: s.min(axis=1)), 3e-3,
        "the least that a minimum can have; at 1.38 it is 0.42",
        Control("1.45 times the critical decay: there is no such minimum", {"metastable": "past-metastable"}), ">=",
    ),
    Claim(
        "cross-entropy, one layer: cosines of class means are -1/(K - 1), farthest", "section on cross-entropy", 0.0,
        angles("softmax", SIMPLEX), 0.02, "exact in the end, to float32", Control("squared error, no bias", {"softmax": "deep"}), "<=",
    ),
    Claim(
        "cross-entropy, three layers, K = 4: the simplex is not the global minimiser: lowest loss of all seeds over its loss",
        "refutes the section on cross-entropy; pj.limits.cross_entropy_frame", frame_loss(3, "cross-polytope") / frame_loss(3, "simplex"),
        lowest_over_simplex, 1e-3, "the cross-polytope's loss is exact; float32 and what training leaves are of second order",
        Control("one layer, where the simplex is the best", {"softmax-deep": "softmax"}),
    ),
    Claim(
        "ReLU perceptron on digits, squared error, with decay: NC1", "section of experiments", 0.0,
        lambda results: estimate(results["digits"].nc1.isel(step=-1).values), 0.03, "features are not free there: it is small, no more",
        Control("no decay: NC1 stops falling", {"digits": "digits-no-decay"}), "<=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Singular values over class size and over decay, losses of cross-entropy, and NC1 on digits."""
    from paperjax.report.figure import curves, panels, points, prediction

    fig, axes = panels(2, 2)
    spectrum, decays, losses, practical = axes.reshape(-1)
    n = np.linspace(2.2, 12.5, 200)
    for name, threshold in (("less-decay", 2.5), ("imbalanced", 5.5), ("more-decay", 6.5)):
        colour = points(spectrum, SIZES, last(results[name], "s") / SIZES**0.5, f"N² λ_W λ_H = {threshold}")
        prediction(spectrum, n, np.maximum(1 - np.sqrt(threshold / n), 0), "", color=colour)
    spectrum.set(xlabel="examples of the class", ylabel="$s_k / n_k^{1/2}$", title="one layer: classes vanish at a threshold")

    x = np.linspace(1 / 3, 1, 300)
    # s^½ (n^½ - s) = N λ at depth 3.
    branch = PER_CLASS**0.75 * np.sqrt(x) * (1 - x) / (CLASSES * PER_CLASS * critical_decay())
    prediction(decays, branch[x >= 2 / 3], x[x >= 2 / 3], "global minimiser")
    prediction(decays, branch[x <= 2 / 3], x[x <= 2 / 3], "minimum, not global", linestyle=(0, (1, 1.5)))
    trained = ("deep", "below-threshold", "at-threshold", "metastable", "past-metastable")
    at = [float(results[name].weight_decay) / critical_decay() for name in trained]
    points(
        decays,
        at,
        np.stack([last(results[name], "s").mean(axis=1) for name in trained], axis=1) / PER_CLASS**0.5,
        "trained",
        linestyle="none",
    )
    decays.set(xlabel="decay over the critical one", ylabel="$s / n^{1/2}$", title="three layers: a jump, and a minimum past it")

    found = np.sort(last(results["softmax-deep"], "objective"))
    losses.plot(np.arange(1, found.size + 1), found, "o", color="#e76f51", label="trained")
    for frame, dash in (("simplex", (0, (5, 2))), ("cross-polytope", (0, (1, 1.5)))):
        prediction(losses, [1, found.size], frame_loss(3, frame), frame, linestyle=dash)
    losses.set(xlabel="seed, sorted", ylabel="loss with decay", title="cross-entropy, three layers, K = 4")

    for name, label in (("digits", "decay 3e-4"), ("digits-no-decay", "no decay")):
        result = results[name].isel(step=slice(1, None))
        curves(practical, result.step.values, result.nc1.transpose("seed", "step").values, label)
    practical.set(xscale="log", yscale="log", xlabel="step", ylabel="NC1", title="perceptron on digits, squared error")
    for ax in axes.reshape(-1):
        ax.legend(fontsize=7)
    return fig


PAPER = Paper(
    slug="neural-collapse-deep-linear",
    title="Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data",
    authors="Hien Dang, Tho Tran, Stanley Osher, Hung Tran-The, Nhat Ho, Tan Nguyen",
    year=2023,
    arxiv="2301.00437",
    area="dynamics",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 45 s on two CPU cores", "full": "not measured"},
    data="generated one-hot targets, the features being free; scikit-learn's digits",
)
