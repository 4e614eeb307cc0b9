"""All routes agree on the models of the parametrization zoo, and with Jacobians by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.kernels import ntk
from paperjax.model import join, split
from tests.trace.zoo_models import ZOO

# The others compile for a quarter of a minute each.
QUICK = ("linen mlp", "dict mlp", "scan rnn", "einsum attention")
# A recurrence that starts from float32 zeros stays there; batch statistics are tested by themselves.
SINGLE, COUPLED = ("flax rnn", "nnx gru"), ("resnet",)
# These routes differentiate the whole model and use nothing of its trace: a model of each library, and of each kind of loop and input.
DIFFERENTIATED = ("dict mlp", "equinox tokens", "cnn", "gpt, remat, scan axis 1", "nnx transformer", "moe", "flax rnn", "lru")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ZOO if n not in COUPLED]


@pytest.fixture(autouse=True)
def _as_users_promote(x64):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def network(name):
    """A model of the zoo at its base sizes, float64 where it allows, with parameters and two batches."""
    case = ZOO[name]
    model, x = case.family(**case.base), case.x
    dtype = jnp.float32 if name in SINGLE else jnp.float64
    if jnp.issubdtype(x.dtype, jnp.integer):
        x1 = jax.random.randint(jax.random.key(1), (3, *x.shape[1:]), 0, 3)
    else:
        x1 = jax.random.normal(jax.random.key(1), (3, *x.shape[1:]), dtype)
    params = model.init(jax.random.key(0), x1)
    params = jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, params)
    # Biases and gains that start at constants move away from them: no gradient vanishes by chance.
    trained, given = split(params)
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [a + jnp.asarray(0.1, a.dtype) * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys)]
    return model, join(jax.tree.unflatten(tree, leaves), given), x1, x1[1:]


def by_brute_force(model, params, x1, x2):
    """Jacobians of whole batches, leaf by leaf, ``{path: (N, M, O, O)}``."""
    trained, given = split(params)
    found = {}
    for x in (x1, x2):
        jacobian = jax.jit(jax.jacobian(lambda leaves, x=x: model.apply(join(leaves, given), x)))(trained)
        out = jax.eval_shape(model.apply, params, x).shape
        for path, j in jax.tree_util.tree_leaves_with_path(jacobian):
            found.setdefault(jax.tree_util.keystr(path), []).append(np.asarray(j).reshape(out[0], int(np.prod(out[1:])), -1))
    return {path: np.einsum("nop,mqp->nmoq", *pair) for path, pair in found.items()}


# Models that compute softmax or norms in float32 whatever comes in agree to its rounding only.
TOLERANCE = {"nnx transformer": 1e-6, "gqa": 1e-6, "mqa": 1e-6, "flax rnn": 1e-6, "nnx gru": 1e-6}


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_equals_brute_force(name):
    model, params, x1, x2 = network(name)
    exact = by_brute_force(model, params, x1, x2)
    found = ntk(model, params, x1, x2, per="leaf")
    largest = max(np.abs(k).max() for k in exact.values())
    assert set(found) == {path for path, k in exact.items() if path in found or np.abs(k).max() > 0}
    for path, kernel in found.items():
        got = np.asarray(kernel).reshape(exact[path].shape)
        np.testing.assert_allclose(got, exact[path], atol=TOLERANCE.get(name, 1e-10) * largest, rtol=0, err_msg=path)
    whole = sum(exact.values())
    found = np.asarray(ntk(model, params, x1, x2)).reshape(whole.shape)
    np.testing.assert_allclose(found, whole, atol=TOLERANCE.get(name, 1e-10) * np.abs(whole).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_routes_agree(name):
    model, params, x1, x2 = network(name)
    auto = ntk(model, params, x1, x2)
    for route in ("jacobian", "ntvp"):
        other = ntk(model, params, x1, x2, route=route)
        np.testing.assert_allclose(other, auto, atol=TOLERANCE.get(name, 1e-10) * float(jnp.abs(auto).max()), rtol=0, err_msg=route)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "gpt, tied, 1/d", "gpt, fused qkv", "nnx transformer"])
def test_single_precision(name):
    model, params, x1, x2 = network(name)
    half = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, (params, x1, x2))
    exact, found = ntk(model, params, x1, x2), ntk(model, *half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=1e-5 * float(jnp.abs(exact).max()), rtol=0)


def test_layers_of_a_scan_come_apart(x64):
    model, params, x1, x2 = network("equinox mlp")
    layers = ntk(model, params, x1, x2, per="layer", outputs="trace")
    assert {".stack, layer 0", ".stack, layer 1"} < set(layers)
    np.testing.assert_allclose(sum(layers.values()), ntk(model, params, x1, x2, outputs="trace"), rtol=1e-12)
    exact = by_brute_force(model, params, x1, x2)
    stack = sum(k for path, k in exact.items() if path.startswith(".stack"))
    np.testing.assert_allclose(layers[".stack, layer 0"] + layers[".stack, layer 1"], np.einsum("nmoo->nm", stack), rtol=1e-10)
