"""One contract, held by every row of a table of models; and the laws of each model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.models.numpy_models as reference
from paperjax.model import Model, check_model, count, family, split
from paperjax.models import cnn, linear_net, mlp, resmlp, transformer, two_layer
from paperjax.models.layers import UNROLLED, check_sizes

BATCH, FEATURES, OUTPUTS, TIME, VOCAB, CHANNELS = 4, 20, 3, 5, 7, 2
WIDTH, DEPTH = 16, 3


class Row(NamedTuple):
    """A model, and what is claimed of it."""

    make: Callable[..., Model]
    """Of the width n and the depth L."""
    inputs: str
    outputs: tuple[int, ...]
    count: Callable[[int, int], int]
    """Number of trained parameters, of n and L."""
    variance: dict[str, float]
    """Variance of each random leaf, at WIDTH and DEPTH."""
    numpy: Callable[..., np.ndarray]
    """The same network by loops in NumPy."""


D, N, K, V = FEATURES, WIDTH, OUTPUTS, VOCAB


def _transformer_variance(**kinds: float) -> dict[str, float]:
    blocks = {f"blocks/{name}": 1.5 / N for name in ("query", "key", "value", "out", "up")}
    return {**blocks, "blocks/down": 1.5 / (4 * N), "readout": 0.5 / N, **kinds}


def _transformer_count(embedding: int, readout: int) -> Callable[[int, int], int]:
    return lambda n, L: embedding * n + TIME * n + L * (4 * n * n + 8 * n * n + 2 * n) + n + n * readout


ROWS = {
    "mlp": Row(
        lambda width, depth: mlp(width, depth, K, bias_variance=0.3, readout_variance=0.5),
        "rows",
        (K,),
        lambda n, L: (D + 1) * n + (L - 1) * (n + 1) * n + (n + 1) * K,
        {"first/w": 2 / D, "first/b": 0.3, "hidden/w": 2 / N, "hidden/b": 0.3, "readout/w": 0.5 / N, "readout/b": 0.3},
        functools.partial(reference.mlp, phi=reference.relu),
    ),
    "mlp, tanh, no bias": Row(
        lambda width, depth: mlp(width, depth, K, activation=jnp.tanh, bias=False, weight_variance=1.7),
        "rows",
        (K,),
        lambda n, L: D * n + (L - 1) * n * n + n * K,
        {"first/w": 1.7 / D, "hidden/w": 1.7 / N, "readout/w": 1 / N},
        functools.partial(reference.mlp, phi=np.tanh),
    ),
    "linear_net": Row(
        lambda width, depth: linear_net(width, depth, K),
        "rows",
        (K,),
        lambda n, L: D * n + (L - 1) * n * n + n * K,
        {"first/w": 1 / D, "hidden/w": 1 / N, "readout/w": 1 / N},
        functools.partial(reference.mlp, phi=lambda h: h),
    ),
    "two_layer": Row(
        lambda width, depth: two_layer(width, K, output_scale=0.7, scaling=0.75, readout_std=0.4),
        "rows",
        (K,),
        lambda n, L: D * n + n * K,
        {"first/w": 1 / D, "readout/w": 0.16},
        lambda p, x: 0.7 * N**-0.75 * reference.relu(x @ p["first/w"]) @ p["readout/w"],
    ),
    "two_layer, frozen signs": Row(
        lambda width, depth: two_layer(width, K, readout="signs", train_readout=False, weight_std=0.01),
        "rows",
        (K,),
        lambda n, L: D * n,
        {"first/w": 1e-4, "readout/value/w": 1.0},
        lambda p, x: N**-0.5 * reference.relu(x @ p["first/w"]) @ p["readout/value/w"],
    ),
    "cnn": Row(
        lambda width, depth: cnn(width, depth, K, bias_variance=0.2),
        "images",
        (K,),
        lambda n, L: (9 * CHANNELS + 1) * n + (L - 1) * (9 * n + 1) * n + (n + 1) * K,
        {
            "first/w": 2 / (9 * CHANNELS),
            "first/b": 0.2,
            "hidden/w": 2 / (9 * N),
            "hidden/b": 0.2,
            "readout/w": 1 / N,
            "readout/b": 0.2,
        },
        reference.cnn,
    ),
    "resmlp, pre": Row(
        lambda width, depth: resmlp(width, depth, K, branch_scale=0.9, bias=True, bias_variance=0.1),
        "rows",
        (K,),
        lambda n, L: D * n + L * (n + 1) * n + (n + 1) * K,
        {"first/w": 1 / D, "blocks/w": 2 / N, "blocks/b": 0.1, "readout/w": 1 / N, "readout/b": 0.1},
        functools.partial(reference.resmlp, block="pre", s=lambda L: 0.9 / L**0.5),
    ),
    "resmlp, post": Row(
        lambda width, depth: resmlp(width, depth, K, block="post", branch_exponent=1.0, activation=jnp.tanh, input_variance=3.0),
        "rows",
        (K,),
        lambda n, L: D * n + L * n * n + n * K,
        {"first/w": 3 / D, "blocks/w": 2 / N, "readout/w": 1 / N},
        functools.partial(reference.resmlp, block="post", s=lambda L: 1 / L, phi=np.tanh),
    ),
    "transformer, tokens": Row(
        lambda width, depth: transformer(
            width, depth, 2, vocab=V, embedding_variance=0.8, weight_variance=1.5, readout_variance=0.5, activation=jnp.tanh
        ),
        "tokens",
        (TIME, V),
        _transformer_count(V, V),
        _transformer_variance(embedding=0.8, position=0.8),
        functools.partial(reference.transformer, causal=True, scale=(N / 2) ** -0.5, s=lambda L: 1.0, pool=None),
    ),
    "transformer, tokens, last": Row(
        lambda width, depth: transformer(
            width, depth, 4, vocab=V, outputs=K, weight_variance=1.5, readout_variance=0.5, activation=jnp.tanh, branch_exponent=1.0
        ),
        "tokens",
        (K,),
        _transformer_count(V, K),
        _transformer_variance(embedding=1.0, position=1.0),
        functools.partial(reference.transformer, causal=True, scale=(N / 4) ** -0.5, s=lambda L: 1 / L, pool="last"),
    ),
    "transformer, features": Row(
        lambda width, depth: transformer(
            width,
            depth,
            2,
            outputs=K,
            causal=False,
            weight_variance=1.5,
            readout_variance=0.5,
            activation=jnp.tanh,
            attention_exponent=1,
            branch_scale=0.6,
        ),
        "sequences",
        (K,),
        _transformer_count(D, K),
        _transformer_variance(embedding=1 / D, position=1.0),
        functools.partial(reference.transformer, causal=False, scale=2 / N, s=lambda L: 0.6, pool="mean"),
    ),
}


def batch(kind: str, dtype: Any = "float32") -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "tokens":
        return rng.integers(0, VOCAB, (BATCH, TIME), dtype=np.int32)
    shapes = {"rows": (FEATURES,), "images": (6, 4, CHANNELS), "sequences": (TIME, FEATURES)}
    return rng.standard_normal((BATCH, *shapes[kind])).astype(dtype)


def flat(params: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


class Drawn(NamedTuple):
    """What is compiled once for a row: four draws, two of them from the same key, and the output with its gradient."""

    model: Model
    x: np.ndarray
    init: Callable[..., Any]
    stacked: Any
    output_and_gradient: Callable[..., Any]


@pytest.fixture(params=ROWS, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture(scope="module")
def drawn(row: Row) -> Drawn:
    model, x = row.make(WIDTH, DEPTH), batch(row.inputs)

    def loss(params: Any, x: Any) -> Any:
        y = model.apply(params, x)
        return jnp.mean(y**2), y

    def output_and_gradient(params: Any, x: Any) -> Any:
        gradient, y = jax.grad(loss, has_aux=True)(params, x)
        return y, gradient

    # One key at a time: the same draws under vmap compile for four times as long.
    init = jax.jit(model.init)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[init(key, x) for key in keys()])
    return Drawn(model, x, init, stacked, jax.jit(output_and_gradient))


def keys() -> Any:
    return jax.random.split(jax.random.key(1), 4)[np.array([0, 1, 0, 2])]


def one_seed(stacked: Any, seed: int = 0) -> Any:
    return jax.tree.map(lambda leaf: leaf[seed], stacked)


def test_is_a_model(row, drawn):
    params, y = check_model(drawn.model, drawn.x)
    assert y.shape == (BATCH, *row.outputs)
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape[1:], drawn.stacked)


def test_init_is_a_function_of_the_key_alone(row, drawn):
    other_batch = flat(drawn.init(keys()[0], np.zeros_like(drawn.x)))
    for name, leaf in flat(drawn.stacked).items():
        np.testing.assert_array_equal(leaf[0], other_batch[name])
        np.testing.assert_array_equal(leaf[0], leaf[2])
        if name in row.variance:
            assert not np.array_equal(leaf[0], leaf[1]), f"{name} is the same for two keys"


def test_leaves_have_the_stated_variance(row, drawn):
    stacked = flat(drawn.stacked)
    assert set(row.variance) == {name for name in stacked if "gain" not in name}
    for name, variance in row.variance.items():
        w = stacked[name][:2].ravel() / variance**0.5
        # The sum of m squares of standard normals has mean m and variance 2m; five standard deviations.
        assert abs(np.mean(w**2) - 1) < 5 * (2 / w.size) ** 0.5, name
        assert abs(np.mean(w)) < 5 * w.size**-0.5, name
    for name in set(stacked) - set(row.variance):
        np.testing.assert_array_equal(stacked[name], 1.0)


def test_leaves_of_a_draw_are_independent(row, drawn):
    """No two leaves, and no two layers of a stack, are drawn from the same bits."""
    vectors = []
    for name, variance in row.variance.items():
        leaf = flat(drawn.stacked)[name][0] / variance**0.5
        vectors += [part.ravel() for part in leaf] if name.startswith(("hidden", "blocks")) else [leaf.ravel()]
    for i, a in enumerate(vectors):
        for b in vectors[:i]:
            m = min(a.size, b.size)
            assert not np.allclose(a[:m], b[:m], rtol=1e-4)


def test_rows_of_the_batch_do_not_see_each_other(drawn):
    x, params = drawn.x, one_seed(drawn.stacked)
    y = np.asarray(drawn.output_and_gradient(params, x)[0])
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(drawn.output_and_gradient(params, x[order])[0], y[order], rtol=1e-5, atol=1e-6)
    alone = np.zeros_like(x)
    alone[1] = x[1]
    np.testing.assert_allclose(drawn.output_and_gradient(params, alone)[0][1], y[1], rtol=1e-5, atol=1e-6)


def test_vmap_over_keys_is_one_key_at_a_time(drawn):
    stacked = jax.eval_shape(jax.vmap(drawn.model.init, (0, None)), keys(), drawn.x)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, drawn.stacked)
    y = jax.jit(jax.vmap(drawn.model.apply, (0, None)))(drawn.stacked, drawn.x)
    for seed in range(2):
        single, _ = drawn.output_and_gradient(one_seed(drawn.stacked, seed), drawn.x)
        np.testing.assert_allclose(y[seed], single, rtol=1e-4, atol=1e-5)


def test_every_trained_leaf_has_a_finite_gradient_that_is_not_zero(drawn):
    _, gradient = drawn.output_and_gradient(one_seed(drawn.stacked), drawn.x)
    for name, leaf in flat(split(gradient)[0]).items():
        assert np.all(np.isfinite(leaf)), name
        assert np.any(leaf != 0), name


def test_shapes_follow_width_and_depth(row):
    networks = family(row.make, x=batch(row.inputs))
    for n, L in ((WIDTH, DEPTH), (2 * WIDTH, DEPTH), (WIDTH, 2 * DEPTH), (WIDTH, 1)):
        assert count(networks.shapes(width=n, depth=L)) == row.count(n, L), (n, L)


@pytest.mark.parametrize(
    ("name", "depth"),
    [(name, depth) for name in ROWS for depth in (1, DEPTH, UNROLLED + 2) if depth == DEPTH or not name.startswith("two_layer")],
)
def test_float64_network_is_the_loop_in_numpy(name, depth):
    """Depth 3 runs unrolled, depth 10 as a loop, and depth 1 has no stack of hidden layers."""
    row = ROWS[name]
    with jax.enable_x64(True):
        model, x = row.make(WIDTH, depth), batch(row.inputs, "float64")
        params, y = some_params(model, x), check_model(model, x)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {y.dtype} == {jnp.dtype("float64")}
        np.testing.assert_allclose(jax.jit(model.apply)(params, x), row.numpy(flat(params), x), rtol=1e-9, atol=1e-12)


def test_draws_under_vmap_are_those_of_one_key_at_a_time():
    model, x = mlp(4, 1, 2, bias=False), np.ones((1, 3), np.float32)
    stacked, init = jax.jit(jax.vmap(model.init, (0, None)))(keys(), x), jax.jit(model.init)
    for seed, key in enumerate(keys()):
        for leaf, alone in zip(jax.tree.leaves(stacked), jax.tree.leaves(init(key, x))):
            np.testing.assert_allclose(leaf[seed], alone, rtol=1e-6)


def test_float64_draws_have_more_than_float32_bits():
    with jax.enable_x64(True):
        w = draw(mlp(4, 1, 2), np.ones((1, 3)))["first"]["w"]
        assert w.dtype == jnp.float64
        assert np.any(np.asarray(w) != np.asarray(w, np.float32))


def some_params(model: Model, x: Any) -> Any:
    """Numbers for the parameters of a law that holds for any: not those of init, whose draws take seconds to compile."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / WIDTH**0.5, leaf.dtype), check_model(model, x)[0])


def draw(model: Model, x: Any) -> Any:
    return jax.jit(model.init)(jax.random.key(3), x)


def test_parameter_counts_of_the_intrinsic_dimension_paper():
    # MNIST FC of arXiv 1804.08838, section 3: 784-200-200-10, D = 199,210.
    assert count(family(mlp, x=jnp.ones((1, 784))).shapes(width=200, depth=2)) == 199210


def test_linear_net_is_the_product_of_its_matrices():
    x = batch("rows")
    model = linear_net(WIDTH, 4, K)
    params = some_params(model, x)
    product = np.linalg.multi_dot([params["first"]["w"], *params["hidden"]["w"], params["readout"]["w"]])
    np.testing.assert_allclose(model.apply(params, x), x @ product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "inputs"), [(mlp, "rows"), (cnn, "images")])
def test_relu_nets_without_bias_are_homogeneous(make, inputs):
    model, x = make(WIDTH, 2, K, bias=False), batch(inputs)
    params = some_params(model, x)
    y = model.apply(params, x)
    np.testing.assert_allclose(model.apply(params, 4.0 * x), 4.0 * y, rtol=1e-5)
    # Two hidden layers and the readout: degree 3 in the weights.
    np.testing.assert_allclose(model.apply(jax.tree.map(lambda w: 2.0 * w, params), x), 8.0 * y, rtol=1e-5)


def test_cnn_moves_with_its_images():
    """A cyclic shift that keeps a margin of zeros moves the features and leaves their mean."""
    x = np.zeros((1, 12, 12, CHANNELS), np.float32)
    x[:, 4:7, 4:7] = batch("images")[:1, :3, :3]
    model = cnn(WIDTH, 3, K, bias=False)
    params = some_params(model, x)
    np.testing.assert_allclose(model.apply(params, np.roll(x, (1, -1), (1, 2))), model.apply(params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", ["pre", "post"])
def test_residual_net_with_zero_branch_is_the_stream_alone(block):
    x = batch("rows")
    model = resmlp(WIDTH, 9, K, block=block, branch_scale=0.0)
    params = some_params(model, x)
    stream = x @ params["first"]["w"]
    np.testing.assert_allclose(
        model.apply(params, x), (jax.nn.relu(stream) if block == "pre" else stream) @ params["readout"]["w"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_residual_stream_follows_its_infinite_depth_limit():
    """E|h^L|^2 = (1 + sigma^2 / 2L)^L |h^0|^2 for pre-activation ReLU blocks, by E relu(z)^2 = E z^2 / 2; sigma^2 = 2."""
    n, L = 128, 16
    x = batch("rows")[:1]
    model = resmlp(n, L, n, weight_variance=2.0)
    init = jax.jit(lambda keys, x: jax.lax.map(lambda key: model.init(key, x), keys))
    params = init(jax.random.split(jax.random.key(0), 48), x)
    stream0 = jnp.einsum("bd,sdn->sn", x, params["first"]["w"])
    # With the identity as readout what comes out is relu(h^L), of half the second moment.
    params["readout"]["w"] = jnp.tile(jnp.eye(n)[None], (48, 1, 1))
    relu_h = jax.jit(jax.vmap(model.apply, (0, None)))(params, x)[:, 0]
    ratio = np.log(2 * np.sum(np.square(relu_h), -1) / np.sum(np.square(stream0), -1))
    # The log of the ratio fluctuates by about (5/n)^1/2 a network, and its mean lies half that variance below.
    assert abs(np.mean(ratio) - L * np.log(1 + 1 / L)) < 5 * np.std(ratio) / 48**0.5 + 5 / (2 * n)


def test_two_layer_polynomial_net_depends_on_its_two_statistics():
    """Kumar et al. (arXiv 2310.06110): f = alpha (mean(w) . x + eps/2 x' M x), with M the mean of w w'."""
    alpha, eps, x = 3.0, 0.5, batch("rows")

    def make(alpha: Any) -> Model:
        return two_layer(
            50,
            activation=lambda h: h + eps / 2 * h**2,
            output_scale=alpha,
            scaling=1.0,
            readout="ones",
            train_readout=False,
            weight_std=1.0,
        )

    params = draw(make(alpha), x)
    w = np.asarray(params["first"]["w"])
    expected = alpha * (x @ w.mean(1) + eps / 2 * np.einsum("bi,ij,bj->b", x, w @ w.T / 50, x))
    np.testing.assert_allclose(make(alpha).apply(params, x)[:, 0], expected, rtol=1e-4)
    traced = jax.jit(lambda alpha: make(alpha).apply(params, x))(jnp.float32(alpha))
    np.testing.assert_allclose(traced[:, 0], expected, rtol=1e-4)


def test_two_layer_xor_net_is_the_sum_over_signs():
    """Xu et al. (arXiv 2310.02541): f = sum_j a_j relu(w_j . x), a_j = +-m^-1/2 frozen."""
    x, m, omega = batch("rows"), 60, 1e-3
    model = two_layer(m, readout="signs", train_readout=False, weight_std=omega)
    params = draw(model, x)
    a = np.asarray(params["readout"].value["w"])[:, 0]
    assert set(a) == {-1.0, 1.0}
    assert count(params) == m * FEATURES
    expected = np.maximum(x @ np.asarray(params["first"]["w"]), 0) @ (a / m**0.5)
    np.testing.assert_allclose(model.apply(params, x)[:, 0], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_looks_back_and_only_back(causal):
    model = transformer(8, 2, 2, vocab=V, causal=causal)
    x = batch("tokens")[:1]
    params = some_params(model, x)
    # A position's embedding stands for its input: d f[t] / d position[s].
    jacobian = jax.jit(jax.jacrev(lambda position: model.apply({**params, "position": position}, x)[0].sum(-1)))(params["position"])
    reaches = np.any(np.asarray(jacobian) != 0, axis=-1)
    np.testing.assert_array_equal(reaches, np.tril(np.ones((TIME, TIME), bool)) if causal else np.ones((TIME, TIME), bool))


def test_causal_transformer_gives_a_prefix_the_same_scores():
    model = transformer(8, 2, 2, vocab=V)
    x = batch("tokens")
    params = some_params(model, x)
    np.testing.assert_allclose(model.apply(params, x[:, :3]), model.apply(params, x)[:, :3], rtol=1e-5, atol=1e-6)


def test_transformer_without_positions_or_mask_does_not_see_order():
    model = transformer(8, 2, 2, outputs=K, causal=False)
    x = batch("sequences")
    params = some_params(model, x)
    params["position"] = jnp.zeros_like(params["position"])
    np.testing.assert_allclose(model.apply(params, x[:, ::-1]), model.apply(params, x), rtol=1e-5, atol=1e-5)


def test_unknown_token_inside_a_compiled_program_shows():
    model = transformer(8, 1, 2, vocab=V, outputs=K)
    x = batch("tokens")
    params = some_params(model, x)
    x[1, 2] = V
    y = np.asarray(jax.jit(model.apply)(params, x))
    assert np.all(np.isnan(y[1]))
    assert np.all(np.isfinite(np.delete(y, 1, axis=0)))


ROWS_X, TOKENS_X = jnp.ones((2, 3)), jnp.zeros((2, 4), int)

BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "width 0": (lambda: mlp(0, 2), ValueError, "mlp: width = 0.*at least 1"),
    "depth 0": (lambda: linear_net(4, 0), ValueError, "linear_net: depth = 0"),
    "outputs -1": (lambda: cnn(4, 2, -1), ValueError, "cnn: outputs = -1"),
    "width True": (lambda: two_layer(True), ValueError, "two_layer: width = True"),
    "heads 0": (lambda: transformer(8, 1, 0, vocab=3), ValueError, "transformer: heads = 0"),
    "vocab 0": (lambda: transformer(8, 1, 2, vocab=0), ValueError, "transformer: vocab = 0"),
    "heads": (lambda: transformer(8, 1, 3, vocab=3), ValueError, "heads = 3 does not divide width = 8"),
    "no output size": (lambda: transformer(8, 1, 2), ValueError, "neither vocab nor outputs"),
    "traced width": (lambda: jax.jit(lambda n: check_sizes("mlp", width=n))(4), ValueError, "mlp: width is a traced value"),
    "variance": (lambda: mlp(4, 2, weight_variance=-1.0), ValueError, "mlp: weight_variance = -1.0"),
    "NaN variance": (lambda: resmlp(4, 2, readout_variance=float("nan")), ValueError, "resmlp: readout_variance = nan"),
    "NaN scale": (lambda: two_layer(4, output_scale=float("nan")), ValueError, "two_layer: output_scale = nan"),
    "infinite exponent": (lambda: resmlp(4, 2, branch_exponent=float("inf")), ValueError, "resmlp: branch_exponent = inf"),
    "std": (lambda: two_layer(4, weight_std=-0.1), ValueError, "two_layer: weight_std = -0.1"),
    "images to mlp": (lambda: draw(mlp(4, 2), jnp.ones((2, 8, 8))), ValueError, r"mlp: x has shape \(2, 8, 8\).*data.flatten"),
    "images to mlp, later": (lambda: mlp(4, 2).apply(some_params(mlp(4, 2), ROWS_X), ROWS_X[None]), ValueError, "data.flatten"),
    "one row": (lambda: draw(resmlp(4, 2), jnp.ones(3)), ValueError, r"resmlp: x has shape \(3,\).*x\[None, :\]"),
    "rows to two_layer": (lambda: draw(two_layer(4), jnp.ones(3)), ValueError, "two_layer: x has shape"),
    "grey images": (lambda: draw(cnn(4, 2), jnp.ones((2, 8, 8))), ValueError, r"cnn: x has shape.*x\[..., None\]"),
    "bytes": (lambda: draw(mlp(4, 2), jnp.ones((2, 3), "uint8")), TypeError, "mlp: x has dtype uint8.*astype"),
    "tokens without vocab": (lambda: draw(transformer(8, 1, 2, outputs=3), TOKENS_X), ValueError, "vocab=..."),
    "sequence for tokens": (lambda: draw(transformer(8, 1, 2, vocab=3), jnp.ones((2, 4, 3))), ValueError, r"tokens are \(batch, time\)"),
    "floats for tokens": (lambda: draw(transformer(8, 1, 2, vocab=3), jnp.ones((2, 4))), TypeError, "must be integer tokens"),
    "token too large": (
        lambda: transformer(8, 1, 2, vocab=3).init(jax.random.key(0), TOKENS_X + 5),
        ValueError,
        "tokens from 0 to 5, but vocab = 3.*vocab=6",
    ),
    "token below 0": (lambda: transformer(8, 1, 2, vocab=3).init(jax.random.key(0), TOKENS_X - 1), ValueError, "tokens from -1 to 0"),
    "too long": (
        lambda: transformer(8, 1, 2, vocab=3).apply(some_params(transformer(8, 1, 2, vocab=3), TOKENS_X[:, :2]), TOKENS_X),
        ValueError,
        "4 positions, but the network was initialised for 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_reason(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("call", [lambda: two_layer(4, readout="sign"), lambda: resmlp(4, 2, block="both")])
def test_unknown_options_are_refused(call):
    # The import hook of the tests refuses them first, by the Literal in the signature.
    with pytest.raises(Exception, match=r"readout|block"):
        call()
