"""The formulas of the paper's file against direct simulation in NumPy, and its n + 3 coordinates against p of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.claims import judge
from paperjax.papers.dynamics import xor_benign_grokking as paper

N, P, MU, FLIP = 30, 200, 6.0, 0.2


class Setting:
    """Stands in for a Result: just the coordinates that the formulas read."""

    n, p, mean_norm, flip, width = N, P, MU, FLIP, 300

    def __getitem__(self, name):
        return getattr(self, name)


RESULTS = {"xor": Setting()}


def numpy_clusters(rng, n):
    """Inputs (n, P), clean labels and labels with flips, from the definition in Section 2."""
    y, sign = rng.choice([-1.0, 1.0], n), rng.choice([-1.0, 1.0], n)
    x = rng.standard_normal((n, P))
    x[np.arange(n), np.where(y > 0, 0, 1)] += MU * sign
    return x, y, y * np.where(rng.random(n) < FLIP, -1.0, 1.0)


@pytest.fixture(scope="module")
def both():
    """400 training sets each: drawn in p coordinates by NumPy, and by `span`."""
    rng = np.random.default_rng(0)
    direct = [(numpy_clusters(rng, N), numpy_clusters(rng, 5)) for _ in range(400)]
    direct = [(x, y, x_test, y_test) for (x, _, y), (x_test, y_test, _) in direct]
    draw = jax.vmap(lambda key, p: paper.span(key, N, 5, p, MU, FLIP), in_axes=(0, None))
    spanned = jax.jit(draw)(jax.random.split(jax.random.key(0), 400), jnp.float32(P))
    x, y, x_test, y_test = (np.asarray(a, np.float64) for a in (spanned.x_train, spanned.y_train, spanned.x_test, spanned.y_test))
    return direct, list(zip(x, y[..., 0], x_test, y_test[..., 0], strict=True))


# What GD can see: inner products, with labels. Means and mean squares of them, over 400 independent training sets.
SEEN = {
    "length of a training input": lambda x, y, x_test, y_test: (x**2).sum(1).mean(),
    "spread of lengths": lambda x, y, x_test, y_test: (x**2).sum(1).std(),
    "overlap of two training inputs": lambda x, y, x_test, y_test: ((x @ x.T)[np.triu_indices(N, 1)] ** 2).mean(),
    "fourth power of the overlap": lambda x, y, x_test, y_test: ((x @ x.T)[np.triu_indices(N, 1)] ** 4).mean(),
    "largest eigenvalue": lambda x, y, x_test, y_test: np.linalg.eigvalsh(x @ x.T)[-1],
    "smallest eigenvalue": lambda x, y, x_test, y_test: np.linalg.eigvalsh(x @ x.T)[0],
    "last input beyond the others": lambda x, y, x_test, y_test: np.linalg.lstsq(x[:-1].T, x[-1], rcond=None)[1].sum(),
    "length of a test input": lambda x, y, x_test, y_test: (x_test**2).sum(1).mean(),
    "overlap of training and test": lambda x, y, x_test, y_test: ((x_test @ x.T) ** 2).mean(),
    "square of the linear classifier": lambda x, y, x_test, y_test: ((x_test @ x.T @ y) ** 2).mean(),
    "labels and overlaps": lambda x, y, x_test, y_test: (y[:, None] * y[None, :] * (x @ x.T) ** 2).sum(),
}


@pytest.mark.parametrize("statistic", SEEN)
def test_n_plus_3_coordinates_have_the_law_of_p(both, statistic):
    a, b = (np.array([SEEN[statistic](*draw) for draw in draws]) for draws in both)
    stderr = np.hypot(a.std(ddof=1), b.std(ddof=1)) / np.sqrt(len(a))
    # 11 comparisons: 4 standard errors are exceeded by chance once in 1,400 runs of all of them.
    assert abs(a.mean() - b.mean()) < 4 * stderr


def test_a_test_input_reaches_beyond_the_span_of_the_training_set():
    data = jax.jit(lambda key: paper.span(key, N, 2000, P, MU, FLIP))(jax.random.key(1))
    assert data.x_train.shape == (N, N + 3)
    assert not np.asarray(data.x_train[:, -1]).any()
    beyond = np.asarray(data.x_test[:, -1], np.float64) ** 2
    # chi-square with P - 2 - N degrees of freedom: its mean, within 4 standard errors.
    freedom = P - 2 - N
    assert abs(beyond.mean() - freedom) < 4 * np.sqrt(2 * freedom / 2000)


@pytest.mark.parametrize(("p", "direct", "coordinates"), [(N - 5, False, N - 5), (P, True, P), (P, False, N + 3)])
def test_below_n_dimensions_inputs_are_drawn_as_they_are(p, direct, coordinates):
    shapes = jax.eval_shape(lambda key: paper.clusters(key, N, p, 3, MU, FLIP, direct), jax.random.key(0))
    assert shapes.x_train.shape == (N, coordinates)
    assert shapes.x_test.shape == (3, coordinates)


def test_probability_of_a_fit_is_that_of_the_averaging_classifier():
    rng = np.random.default_rng(1)
    fitted = []
    for _ in range(4000):
        x, _, y = numpy_clusters(rng, N)
        fitted.append((y * (x @ (x.T @ y)) > 0).mean())
    predicted = paper.predicted_fit(RESULTS)
    # Cluster counts are binomial where the formula has a Gaussian: skewness 1/sqrt(n) in a tail of 8 %.
    assert abs(np.mean(fitted) - predicted) < 0.01
    assert 0.85 < predicted < 0.99


def test_variances_after_one_step_are_those_of_random_neurons():
    rng = np.random.default_rng(2)
    linear, over_neurons = [], []
    for _ in range(300):
        (x, _, y), (x_test, _, _) = numpy_clusters(rng, N), numpy_clusters(rng, 4)
        active = (x @ rng.standard_normal((P, 400)) > 0).astype(np.float64)
        v = x_test @ x.T @ (y[:, None] * active)
        linear.append(((0.5 * x_test @ x.T @ y) ** 2).mean())
        over_neurons.append(v.var(axis=1, ddof=1).mean())
    expected_linear, expected_spread, width = paper.linear_variance(RESULTS)
    assert width == 300
    assert np.mean(linear) == pytest.approx(expected_linear, rel=0.12)
    # Sums over a cluster enter by their mean squares, whose relative error is of order 1/n, twice.
    assert np.mean(over_neurons) == pytest.approx(expected_spread, rel=0.12)


def step_once(width):
    """A Result's worth of one cell, by hand: the network of width `width` after one step, with its data."""
    data = jax.jit(lambda key: paper.span(key, N, 50, 2000, MU, FLIP))(jax.random.key(2))
    model = paper.network(width, paper.TINY)
    params = model.init(jax.random.key(3), data.x_train)
    frozen = params["readout"]
    lr = 0.05

    def loss(first):
        return jnp.mean(jax.nn.softplus(-data.y_train * model.apply({"first": first, "readout": frozen}, data.x_train)))

    first = jax.tree.map(lambda w, g: w - lr * g, params["first"], jax.grad(loss)(params["first"]))
    linear = lr / (8 * N) * np.asarray(data.x_test @ (data.x_train.T @ data.y_train), np.float64)
    return model, {"first": first, "readout": frozen}, data, linear


@pytest.mark.slow
def test_one_step_gives_the_averaging_classifier():
    model, params, data, linear = step_once(40_000)
    f = np.asarray(model.apply(params, data.x_test), np.float64)
    # Relative error 2/sqrt(m) = 1 % with the paper's formula for the spread over neurons.
    assert np.sqrt(((f - linear) ** 2).mean() / (linear**2).mean()) < 0.03
    even, odd = np.asarray(paper.parts(model, params, data), np.float64)
    assert even / odd < 1e-3
    assert odd == pytest.approx((linear**2).mean(), rel=0.03)
    assert float(paper.agreement(model, params, data)) >= 0.96


def test_parts_of_a_function_known():
    model = pj.Model(lambda key, x: {}, lambda params, x: 3.0 * x[:, :1] + 2.0 * x[:, 1:] ** 2)
    x, y = np.array([[1.0, 2.0], [-1.0, 1.0]], np.float32), np.ones((2, 1), np.float32)
    data = pj.data.Dataset(x, y, x, y)
    even, odd = np.asarray(paper.parts(model, {}, data))
    assert even == pytest.approx((8.0**2 + 2.0**2) / 2)
    assert odd == pytest.approx(9.0)


def test_flipped_accuracy_counts_flipped_labels_only():
    x = jnp.array([[9.0, 1.0], [-9.0, 0.0], [1.0, 8.0], [0.0, -8.0]])  # clean labels + + - -
    y = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])  # the second and the third are flipped
    data = pj.data.Dataset(x, y, x, y)
    says_plus = pj.Model(lambda key, x: {}, lambda params, x: jnp.ones_like(x[:, :1]))
    assert float(paper.flipped_accuracy(says_plus, {}, data)) == 0.5
    repeats = pj.Model(lambda key, x: {}, lambda params, x: y)
    assert float(paper.flipped_accuracy(repeats, {}, data)) == 1.0


@pytest.mark.slow
def test_half_plane_keeps_inputs_and_flips_and_is_linearly_separable():
    arguments = (jax.random.key(5), 200, 1000, 200, 20.0, FLIP, False)
    xor, plane = paper.clusters(*arguments), paper.half_plane(*arguments)
    np.testing.assert_array_equal(xor.x_train, plane.x_train)
    clean = np.sign(np.asarray(plane.x_train[:, :1] + plane.x_train[:, 1:2]))
    np.testing.assert_array_equal(plane.y_train != clean, xor.y_train != paper.xor_label(xor.x_train))
    np.testing.assert_array_equal(plane.y_test, np.sign(np.asarray(plane.x_test[:, :1] + plane.x_test[:, 1:2])))


def test_the_two_scalings_keep_what_they_say_and_meet_in_the_middle():
    ratio = np.array(paper.RATIOS)
    assert (paper.fourth_power(128.0, ratio) ** 4 / ratio).tolist() == pytest.approx([128.0] * 4)
    squared = paper.second_power(128.0, ratio) ** 2 / ratio
    assert squared.tolist() == pytest.approx([squared[0]] * 4)
    middle = np.sqrt(ratio[0] * ratio[-1])
    assert paper.second_power(128.0, middle) == pytest.approx(paper.fourth_power(128.0, middle))


@pytest.mark.slow
def test_both_ways_of_drawing_inputs_train_alike():
    def late(direct):
        fields = dict(n=100, p=1500, mean_norm=14.0, width=60, lr=0.5 * 100 / 1500, direct=direct, n_test=100)
        result = paper.training(paper.clusters, "quick", 24, (0, 1, 10), **fields).run()
        return {name: result[name].transpose("seed", "step").values for name in ("train_accuracy", "test_accuracy", "flipped_accuracy")}

    spanned, direct = late(False), late(True)
    for name, a in spanned.items():
        b = direct[name]
        stderr = np.sqrt((a.var(axis=0, ddof=1) + b.var(axis=0, ddof=1)) / len(a))
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 4 * stderr + 1e-6).all(), name


@pytest.mark.slow
def test_claims_hold_for_other_seeds():
    results = {}
    for name, experiment in paper.PAPER.plan("quick").items():
        seeds = experiment.grid.axes["seed"]
        results[name] = experiment.replace(grid=experiment.grid.replace(seed=[1000 + s for s in seeds])).run()
    assert {c.says: judge(c, results).status for c in paper.CLAIMS} == {c.says: "verified" for c in paper.CLAIMS}
