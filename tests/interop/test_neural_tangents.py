"""neural-tangents on this JAX: its kernels and predictions against ours and against NumPy, and a JAX that is left as it was."""

import importlib.metadata
import importlib.util
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax import limits
from paperjax.interop import neural_tangents as nt

RNG = np.random.default_rng(0)
X, X_TEST = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 6))
Y, F0, F0_TEST = RNG.normal(size=(4, 2)), RNG.normal(size=(4, 2)), RNG.normal(size=(3, 2))
GRAM = np.vstack([X, X_TEST]) @ np.vstack([X, X_TEST]).T / 6
IMAGES = RNG.normal(size=(2, 4, 4, 3))
PLACES = ("jax.util", "neural_tangents.experimental")


@pytest.fixture
def stax():
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip(f"neural-tangents is not installed: {nt.INSTALL}")
    # Its users have JAX's default promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield nt.stax


@pytest.fixture
def forgotten(monkeypatch):
    """As in a process that has not loaded the library; what was loaded comes back."""
    for name in of_the_library():
        monkeypatch.delitem(sys.modules, name)


def of_the_library():
    return {name for name in sys.modules if name.partition(".")[0] == "neural_tangents"}


def perceptron(stax, phi, depth, w, b):
    layers = [layer for _ in range(depth) for layer in (stax.Dense(8, w, b), phi)]
    return stax.serial(*layers, stax.Dense(2, w, b))


def is_(got, wanted, rtol=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=rtol, atol=rtol)


def test_jax_is_left_as_it_was(stax, forgotten):
    places = (jax, jax.core, jax.extend.core, jax.interpreters.ad, jax.numpy, jax.lax, jax.api_util)
    before, modules = [dict(vars(place)) for place in places], dict(sys.modules)
    library = nt.load()
    assert [dict(vars(place)) for place in places] == before
    assert {name: sys.modules[name] for name in set(sys.modules) - of_the_library()} == modules
    assert not set(PLACES) & (set(sys.modules) - set(modules))
    with pytest.raises(AttributeError):
        jax.core.JaxprEqn  # noqa: B018
    assert library is nt.load() is sys.modules["neural_tangents"]


def test_a_load_that_fails_leaves_nothing(stax, forgotten, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.example_libraries.stax", None)  # The import of `predict`, before it, succeeds.
    before, modules = [dict(vars(place)) for place in (jax.core, jax.interpreters.ad)], dict(sys.modules)
    with pytest.raises(ModuleNotFoundError, match=r"jax\.example_libraries\.stax"):
        nt.load()
    assert [dict(vars(place)) for place in (jax.core, jax.interpreters.ad)] == before
    assert sys.modules == modules


def test_relu_perceptron_of_depth_three(stax, x64):
    # Dense's W_std is the root of our weight_variance, and its last layer is not counted as hidden.
    _, _, kernel = perceptron(stax, stax.Relu(), 3, 1.3, 0.2)
    ours = limits.mlp_kernels(GRAM, 3, jax.nn.relu, weight_variance=1.3**2, bias_variance=0.2**2)
    theirs = kernel(jnp.asarray(X_TEST), jnp.asarray(X), ("nngp", "ntk"))
    assert theirs.ntk.dtype == jnp.float64
    for name in ("nngp", "ntk"):
        # Float64 rounding over four layers; none of the pairs is an input with itself.
        is_(getattr(theirs, name), getattr(ours, name)[4:, :4])


PHIS = {
    "Erf": (lambda stax: stax.Erf(), limits.erf),
    "Gelu": (lambda stax: stax.Gelu(), limits.gelu),
    "LeakyRelu": (lambda stax: stax.LeakyRelu(0.2), limits.leaky_relu(0.2)),
    "ABRelu": (lambda stax: stax.ABRelu(0.3, 1.1), limits.piecewise_linear(1.1, 0.3)),
    "Abs": (lambda stax: stax.Abs(), limits.absolute),
    "Sin": (lambda stax: stax.Sin(), limits.sin),
    "Cos": (lambda stax: stax.Cos(), limits.cos),
    "Exp": (lambda stax: stax.Exp(), limits.exp),
    "Sign": (lambda stax: stax.Sign(), limits.sign),
    "Polynomial": (lambda stax: stax.Polynomial([0.1, 0.5, 0.2]), limits.polynomial([0.1, 0.5, 0.2])),
    "Monomial": (lambda stax: stax.Monomial(3), limits.monomial(3)),
}


@pytest.mark.parametrize("name", PHIS)
def test_activations(name, stax, x64):
    phi, ours = PHIS[name]
    _, _, kernel = perceptron(stax, phi(stax), 1, 1.3, 0.2)
    wanted = limits.mlp_kernels(GRAM, 1, ours, weight_variance=1.3**2, bias_variance=0.2**2)
    is_(kernel(jnp.asarray(X_TEST), jnp.asarray(X), "ntk"), wanted.ntk[4:, :4])


@pytest.mark.parametrize(("padding", "stride"), [("SAME", 1), ("VALID", 2), ("CIRCULAR", 1)])
def test_convolution(padding, stride, stax, x64):
    _, _, kernel = stax.serial(stax.Conv(8, (3, 3), strides=(stride,) * 2, padding=padding, W_std=1.3), stax.Flatten(), stax.Dense(1))
    # Linear, so by hand: the mean product of patches, over positions; the layer above adds as much to the tangent kernel.
    mode = {"SAME": "constant", "CIRCULAR": "wrap"}.get(padding)
    padded = np.pad(IMAGES, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode) if mode else IMAGES
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    wanted = 1.3**2 * np.einsum("npqcij,mpqcij->nm", patches, patches) / math.prod(patches.shape[1:])
    got = kernel(jnp.asarray(IMAGES), None, ("nngp", "ntk"))
    is_(got.nngp, wanted)
    is_(got.ntk, 2 * wanted)


@pytest.mark.filterwarnings("ignore:Linear scaling attention used")
def test_attention(stax, x64):
    # Hron et al., arXiv 2006.10540: under linear scaling the logits of identity attention are the kernel of the tokens.
    sentences = RNG.normal(size=(2, 3, 5))
    layer = stax.GlobalSelfAttention(
        8, n_chan_key=8, n_chan_val=8, n_heads=4, linear_scaling=True, attention_mechanism="IDENTITY",
        W_query_std=1.1, W_key_std=0.9, W_value_std=1.2, W_out_std=0.8,
    )  # fmt: skip
    tokens = np.einsum("nic,mjc->nmij", sentences, sentences) / 5
    weights = np.stack([1.1 * 0.9 * tokens[n, n] for n in range(2)])
    wanted = (1.2 * 0.8) ** 2 * np.einsum("nip,nmpq,mjq->nmij", weights, tokens, weights)
    is_(layer[2](jnp.asarray(sentences), None, "nngp"), wanted)


@pytest.mark.filterwarnings("ignore:`FanIn` layers assume independent inputs")
def test_residual_and_normalized_blocks(stax, x64):
    branches = stax.parallel(stax.serial(stax.Erf(), stax.Dense(8, 1.2)), stax.Identity())
    _, _, kernel = stax.serial(stax.Dense(8), stax.FanOut(2), branches, stax.FanInSum(), stax.LayerNorm())
    got = kernel(jnp.asarray(X), None, "nngp")
    gram = GRAM[:4, :4]
    q = gram.diagonal()
    sums = gram + 1.2**2 * np.asarray(limits.erf.value(q[:, None], gram, q[None, :]))
    # LayerNorm adds 1e-12 to the variance.
    is_(got, sums / np.sqrt(np.outer(sums.diagonal(), sums.diagonal())))


@pytest.fixture(scope="module")
def network():
    model = pj.models.mlp(8, 2, outputs=2, bias_variance=0.1)
    return model, model.init(jax.random.key(0), jnp.asarray(X, jnp.float32))


@pytest.mark.parametrize("way", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"])
def test_empirical_kernels(way, stax, network):
    model, params = network
    x, x_test = jnp.asarray(X, jnp.float32), jnp.asarray(X_TEST, jnp.float32)
    implementation = nt.NtkImplementation[way]
    full = nt.empirical_ntk_fn(model.apply, trace_axes=(), vmap_axes=0, implementation=implementation)(x, x_test, params)
    ours = pj.ntk(model, params, x, x_test)
    # Float32, and entries that cancel.
    np.testing.assert_allclose(full, ours, rtol=1e-5, atol=1e-5 * float(jnp.abs(ours).max()))
    mean = nt.empirical_ntk_fn(model.apply, vmap_axes=0, implementation=implementation)(x, x_test, params)
    np.testing.assert_allclose(2 * mean, jnp.trace(ours, axis1=2, axis2=3), rtol=1e-5, atol=1e-5 * float(jnp.abs(ours).max()))


def kernels():
    """Of an erf perceptron: the NTK and the NNGP of training inputs, test against training, and test inputs."""
    pair = limits.mlp_kernels(GRAM, 1, limits.erf)
    return [tuple(jnp.asarray(k[at]) for at in (np.s_[:4, :4], np.s_[4:, :4], np.s_[4:, 4:])) for k in (pair.ntk, pair.nngp)]


def test_gradient_descent_on_the_squared_error(stax, x64):
    (train, cross, _), _ = kernels()
    # Their loss is half of ours, so their time 2t is our t.
    ours = pj.predict.gradient_flow(train, Y, cross, loss="mse")
    theirs = nt.predict.gradient_descent_mse(train, jnp.asarray(Y))
    for t in (3.0, math.inf):
        got = theirs(None if math.isinf(t) else 2 * t, jnp.asarray(F0), jnp.asarray(F0_TEST), cross)
        for their, our in zip(got, ours(t, F0, F0_TEST)):
            is_(their, our)

    @jax.jit
    def traced(kernel):
        return nt.predict.gradient_descent_mse(kernel, jnp.asarray(Y))(6.0, jnp.asarray(F0))

    is_(traced(train), ours(3.0, F0, F0_TEST).train)


@pytest.mark.parametrize("t", [3.0, math.inf])
def test_ensembles(t, stax, x64):
    _, _, kernel = perceptron(stax, stax.Erf(), 1, 1.0, None)
    predictor = nt.predict.gradient_descent_mse_ensemble(kernel, jnp.asarray(X), jnp.asarray(Y))
    theirs = predictor(None if math.isinf(t) else 2 * t, jnp.asarray(X_TEST), "ntk", compute_cov=True)
    (train, cross, _), nngp = kernels()
    ours = pj.predict.ensemble_posterior(train, Y, cross, pj.predict.Prior(*nngp), t=t)
    is_(theirs.mean, ours.mean)
    is_(theirs.covariance, ours.covariance)


def test_maximal_learning_rate(stax, x64):
    (train, _, _), _ = kernels()
    # 2 / (c lambda) with c = 1 / (N O).
    is_(nt.predict.max_learning_rate(train, y_train_size=8), 2 * 8 / np.linalg.eigvalsh(train)[-1])


def test_batches_and_draws(stax):
    init, apply, kernel = perceptron(stax, stax.Erf(), 1, 1.0, None)
    x = jnp.asarray(X, jnp.float32)
    # Float32.
    is_(nt.batch(kernel, batch_size=2, device_count=0)(x, None, "ntk"), kernel(x, None, "ntk"), rtol=1e-5)
    draw = nt.monte_carlo_kernel_fn(init, apply, jax.random.key(0), 1, vmap_axes=0)(x, None, "ntk")
    # The key of a draw is the second half of the one before it, and of that the first half is for parameters.
    params = init(jax.random.split(jax.random.split(jax.random.key(0))[1])[0], x.shape)[1]
    ours = pj.ntk(pj.Model(lambda key, x: init(key, x.shape)[1], apply), params, x, outputs="trace") / 2
    is_(draw, ours, rtol=1e-5)


@pytest.mark.parametrize("way", ["STRUCTURED_DERIVATIVES", "AUTO"])
@pytest.mark.parametrize("function", ["empirical_ntk_fn", "empirical_kernel_fn"])
def test_what_rests_on_lost_internals_is_refused(way, function, stax):
    way = nt.NtkImplementation[way]
    for implementation in (way, int(way)):
        with pytest.raises(NotImplementedError, match=rf"{way.name}.*{jax.__version__}.*JACOBIAN_CONTRACTION.*NTK_VECTOR.*paperjax\.ntk"):
            getattr(nt, function)(lambda w, x: x @ w, implementation=implementation)


def test_tensorflow_models_are_refused(stax):
    with pytest.raises(NotImplementedError, match="TensorFlow"):
        nt.load().experimental.empirical_ntk_fn_tf  # noqa: B018


def test_names(stax):
    assert set(nt.NAMES) <= set(dir(nt))
    assert all(getattr(nt, name) is getattr(nt.load(), name) for name in nt.NAMES)
    with pytest.raises(AttributeError, match=r"no attribute 'empirical_ntk'.*empirical_ntk_fn"):
        nt.empirical_ntk  # noqa: B018


@pytest.mark.parametrize("missing", ["neural_tangents", "frozendict"])
def test_absence_says_what_to_type(missing, forgotten, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else types.SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: nt.VERSION)
    with pytest.raises(ModuleNotFoundError, match=r"pip install frozendict && pip install --no-deps neural-tangents==0\.6\.5") as error:
        nt.stax  # noqa: B018
    assert error.value.name == missing


def test_another_version_is_refused(forgotten, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.2")
    with pytest.raises(ImportError, match=r"0\.6\.2 is installed.*0\.6\.5(.|\n)*pip install --no-deps neural-tangents==0\.6\.5"):
        nt.load()
    # Imported by other means, which pip may know nothing of.
    monkeypatch.setitem(sys.modules, "neural_tangents", types.SimpleNamespace(__version__="0.5.0"))
    with pytest.raises(ImportError, match=r"0\.5\.0 is installed"):
        nt.load()
