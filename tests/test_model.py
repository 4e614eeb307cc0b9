"""Model, as_model over the libraries, check_model's refusals, Family, and the laws of split, join and count."""

import flax.errors
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paperjax.model import Frozen, Model, as_model, check_model, count, family, join, split

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def draws(model: Model) -> list:
    return [model.init(key, jnp.asarray(X)) for key in jax.random.split(KEY, 2)]


def numbers(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(split(params)[0])])


# as_model


def test_a_model_is_returned_as_it_is():
    model = Model(lambda key, x: (), lambda params, x: x)
    assert as_model(model) is model


def test_linen():
    module = nn.Dense(4)
    model = as_model(module)
    params, other = draws(model)
    check_model(model, X)
    np.testing.assert_allclose(model.apply(params, X), X @ params["kernel"] + params["bias"][None, :], rtol=1e-5)
    assert not np.array_equal(params["kernel"], other["kernel"])


def test_linen_without_parameters():
    model = as_model(nn.Sequential([jax.nn.relu, jnp.tanh]))
    params, y = check_model(model, X)
    assert (count(params), y.shape) == (0, (5, 3))


class LinenNorm(nn.Module):
    """BatchNorm on the batch's statistics, and a weight."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(x))


def test_linen_batch_norm_keeps_its_statistics_frozen():
    model = as_model(LinenNorm())
    params = model.init(KEY, X)
    assert set(params) == {"params", "state"}
    assert isinstance(params["state"], Frozen)
    # Scale and bias of three features, kernel (3, 2) and bias: the running mean and variance are not counted.
    assert count(params) == 3 + 3 + 6 + 2
    y = model.apply(params, X)
    dense = params["params"]["Dense_0"]
    normed = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    np.testing.assert_allclose(y, normed @ np.asarray(dense["kernel"]), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda trained: jnp.sum(model.apply(join(trained, split(params)[1]), X)))(split(params)[0])
    assert gradient["state"] is None


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(2)(x))


def test_linen_dropout_has_no_key_and_says_so():
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        check_model(as_model(LinenDropout()), X)


class NnxNet(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.norm(self.hidden(x))))


def test_nnx_constructor():
    model = as_model(lambda rngs: NnxNet(4, rngs=rngs))
    params, other = draws(model)
    assert count(params) == (3 * 4 + 4) + (4 + 4) + (4 * 2 + 2)
    assert not np.array_equal(numbers(params), numbers(other))
    check_model(model, X)
    np.testing.assert_allclose(model.apply(params, X), NnxNet(4, rngs=nnx.Rngs(jax.random.split(KEY, 2)[0]))(jnp.asarray(X)), rtol=1e-4)
    # A call moves nnx's running averages; here it must leave the parameters as they were, inside and outside jit.
    first, second = model.apply(params, X), jax.jit(model.apply)(params, X)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    stacked = jax.vmap(model.init, (0, None))(jax.random.split(KEY, 2), jnp.asarray(X))
    assert jax.vmap(model.apply, (0, None))(stacked, X).shape == (2, 5, 2)


def test_a_family_that_names_rngs_is_an_nnx_constructor():
    named, returned = family(lambda width, rngs: NnxNet(width, rngs=rngs), x=X), family(lambda width: lambda rngs: NnxNet(width, rngs=rngs))
    assert named.sizes == ("width",)
    params, other = draws(named(width=4))
    assert not np.array_equal(numbers(params), numbers(other))
    np.testing.assert_array_equal(numbers(params), numbers(draws(returned(width=4))[0]))
    np.testing.assert_array_equal(named(width=4).apply(params, X), returned(width=4).apply(params, X))
    assert count(named.shapes(width=16)) == (3 * 16 + 16) + 2 * 16 + (16 * 2 + 2)
    with pytest.raises(TypeError, match="the family needs 'width', which nothing provides"):
        named()
    with pytest.raises(TypeError, match="the family takes no size 'rngs'"):
        named(width=4, rngs=nnx.Rngs(0))


def test_a_family_that_names_key_must_be_given_one():
    eqx = pytest.importorskip("equinox")
    random = family(lambda width, key: eqx.nn.MLP(3, 2, width, 1, key=key), x=X)
    with pytest.raises(TypeError, match=r"fixed randomness.*give one, family\(..., key=.*lambda width: lambda key: Net\(width, key=key\)"):
        random(width=4)
    with pytest.raises(TypeError, match="fixed randomness"):
        random.shapes(width=4)
    assert check_model(random(width=4, key=KEY), X)[1].shape == (5, 2)
    drawn = family(lambda width: lambda key: eqx.nn.MLP(3, 2, width, 1, key=key))
    np.testing.assert_array_equal(numbers(drawn(width=4).init(KEY, X)), numbers(random(width=4, key=KEY).init(jax.random.key(1), X)))


def test_nnx_instance_is_the_same_for_every_key():
    network = nnx.Linear(3, 2, rngs=nnx.Rngs(7))
    model = as_model(network)
    params, other = draws(model)
    np.testing.assert_array_equal(numbers(params), numbers(other))
    np.testing.assert_allclose(model.apply(params, X), network(X), rtol=1e-6)
    halved = jax.tree.map(lambda leaf: leaf / 2, params)
    np.testing.assert_allclose(model.apply(halved, X), network(X) / 2, rtol=1e-5)
    np.testing.assert_allclose(model.apply(params, X), network(X), rtol=1e-6)


def test_equinox_constructor():
    eqx = pytest.importorskip("equinox")
    model = as_model(lambda key: eqx.nn.MLP(3, 2, 4, 1, key=key))
    params, other = draws(model)
    assert count(params) == (3 * 4 + 4) + (4 * 2 + 2)
    assert not np.array_equal(numbers(params), numbers(other))
    expected = jax.vmap(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.split(KEY, 2)[0]))(X)
    np.testing.assert_allclose(model.apply(params, X), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(model.apply)(params, X), expected, rtol=1e-4, atol=1e-6)
    check_model(model, X)


def test_equinox_instance_with_whole_number_arrays():
    eqx = pytest.importorskip("equinox")

    class Shuffled(eqx.Module):
        linear: eqx.nn.Linear
        order: jax.Array

        def __call__(self, x):
            return self.linear(x[self.order])

    network = Shuffled(eqx.nn.Linear(3, 2, key=KEY), jnp.array([2, 0, 1]))
    model = as_model(network)
    params, other = draws(model)
    np.testing.assert_array_equal(numbers(params), numbers(other))
    assert count(params) == 8
    np.testing.assert_allclose(model.apply(params, X), jax.vmap(network)(X), rtol=1e-6)
    gradient = jax.grad(lambda trained: jnp.sum(model.apply(join(trained, split(params)[1]), X)))(split(params)[0])
    assert np.any(numbers(gradient))


def test_bare_pair():
    model = as_model((lambda key, x: {"w": jax.random.normal(key, (x.shape[1], 2))}, lambda params, x: x @ params["w"]))
    assert check_model(model, X)[1].shape == (5, 2)


def test_haiku_like_pair_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"apply takes params, rng, x; it must be apply\(params, x\).*without_apply_rng"):
        as_model((lambda rng, x: {}, lambda params, rng, x: x))
    with pytest.raises(TypeError, match=r"init takes key; it must be init\(key, x\)"):
        as_model((lambda key: {}, lambda params, x: x))


@pytest.mark.parametrize("network", [3, "mlp", None, lambda x: x, (1, 2), (lambda key, x: {},), lambda: None])
def test_anything_else_is_refused_with_what_would_do(network):
    with pytest.raises(TypeError, match=r"as_model does not know what to do with.*Flax linen.*nnx.*Equinox.*pair"):
        as_model(network)


# check_model


def outputting(y) -> Model:
    return Model(lambda key, x: {"w": jnp.ones(2)}, lambda params, x: y(x))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (lambda x: [x, x], TypeError, "returns a list, not one array"),
        (lambda x: (x, {}), TypeError, r"returns a tuple.*\[0\]"),
        (lambda x: {"logits": x}, TypeError, "returns a dict"),
        (lambda x: None, TypeError, "returns a NoneType"),
        (lambda x: jnp.argmax(x, -1), TypeError, "returns int32.*scores"),
        (lambda x: x > 0, TypeError, "returns bool"),
        (lambda x: jnp.mean(x), ValueError, r"shape \(\) for a batch of 5"),
        (lambda x: x[:3], ValueError, r"shape \(3, 3\) for a batch of 5"),
        (lambda x: x.T, ValueError, r"shape \(3, 5\) for a batch of 5"),
    ],
)
def test_outputs_that_are_not_one_row_per_example_are_refused(y, error, message):
    with pytest.raises(error, match=f"my net: .*{message}"):
        check_model(outputting(y), X, "my net")


def test_leaf_of_size_zero_is_refused_by_name():
    model = Model(lambda key, x: {"layers": [{"w": jnp.ones((3, 0))}]}, lambda params, x: x)
    with pytest.raises(ValueError, match=r"\['layers'\]\[0\]\['w'\] has shape \(3, 0\)"):
        check_model(model, X)


def test_check_model_computes_nothing_and_takes_a_shape():
    huge = Model(lambda key, x: {"w": jnp.ones((10**6, 10**6))}, lambda params, x: x * params["w"].sum())
    params, y = check_model(huge, jax.ShapeDtypeStruct((7, 2), jnp.float32))
    assert params["w"].shape == (10**6, 10**6)
    assert y.shape == (7, 2)


# Family


def linear(width: int, gain: float = 1.0) -> Model:
    return Model(lambda key, x: {"w": jnp.ones((x.shape[1], width))}, lambda params, x: gain * (x @ params["w"]))


def test_family_of_sizes():
    networks = family(linear, x=X)
    assert networks.sizes == ("width", "gain")
    assert networks.shapes(width=6)["w"].shape == (3, 6)
    assert networks.shapes(np.ones((2, 9), np.float32), width=6)["w"].shape == (9, 6)
    assert family(networks) is networks
    params = networks(width=2).init(KEY, X)
    traced = jax.jit(lambda gain: networks(width=2, gain=gain).apply(params, X))(jnp.float32(3.0))
    np.testing.assert_allclose(traced, 3 * networks(width=2).apply(params, X), rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"widht": 3}, TypeError, "no size 'widht'. Did you mean 'width'"),
        ({"gain": 1.0}, TypeError, "the family needs 'width'"),
        ({"width": 0}, ValueError, "size width = 0.*at least 1"),
        ({"width": -2}, ValueError, "size width = -2"),
        ({"width": 2, "gain": float("nan")}, ValueError, "size gain is NaN"),
        ({"width": 2, "gain": np.float32("nan")}, ValueError, "size gain is NaN"),
        ({"width": np.int64(0)}, ValueError, "size width = 0"),
    ],
)
def test_bad_sizes_are_refused_by_name(sizes, error, message):
    with pytest.raises(error, match=message):
        family(linear)(**sizes)


def test_family_without_a_batch_says_how_to_give_one():
    with pytest.raises(ValueError, match=r"no example batch.*family\(fn, x=batch\)"):
        family(linear).shapes(width=2)


NO_BATCH = [
    ({"a": X, "b": X}, "x is a dict with 'a', 'b', and must be one array"),
    ({}, "x is a dict with nothing in it"),
    ((X, X), "x is a tuple of length 2, and must be"),
    ([[1.0, 2.0]], r"x is a list of length 1, .*np\.asarray"),
    ("mnist", "x is a str"),
    (3.0, "x is a float"),
    (np.float32(3), r"x has shape \(\), and must be one array, batch first"),
    (jax.ShapeDtypeStruct((), jnp.float32), r"x has shape \(\)"),
]


@pytest.mark.parametrize(("x", "message"), NO_BATCH)
def test_a_batch_that_is_not_one_array_is_refused(x, message):
    with pytest.raises(TypeError, match=message):
        family(linear, x=x)
    with pytest.raises(TypeError, match=message):
        family(linear).shapes(x, width=2)
    with pytest.raises(TypeError, match=message):
        check_model(linear(2), x)


@pytest.mark.parametrize("x", [X, jnp.asarray(X), jax.ShapeDtypeStruct(X.shape, X.dtype)])
def test_a_batch_is_an_array_or_its_shape(x):
    assert family(linear, x=x).x == jax.ShapeDtypeStruct((5, 3), jnp.float32)
    assert jax.jit(lambda x: jnp.zeros(family(linear, x=x).shapes(width=2)["w"].shape))(X).shape == (3, 2)


def test_family_names_itself_in_what_is_refused():
    with pytest.raises(TypeError, match=r"family\(width=3\): .*returns a list"):
        family(lambda width: outputting(lambda x: [x])).shapes(X, width=3)


@pytest.mark.parametrize("fn", [3, "mlp", nn.Dense(3).init(KEY, X)])
def test_family_of_what_is_not_callable_is_refused(fn):
    with pytest.raises(TypeError, match=r"(?i)callable"):
        family(fn)


# split, join, count


def trained_leaves():
    return st.one_of(
        st.lists(st.integers(1, 3), max_size=3).map(lambda shape: np.ones(shape, np.float32)),
        st.floats(-1, 1, width=32),
        st.just(np.ones(2, np.float16)),
    )


def given_leaves():
    whole = st.one_of(st.integers(0, 9), st.just(np.arange(4)), st.booleans(), st.just(None), st.just(jax.random.key(3)))
    return st.one_of(whole, trained_leaves().map(Frozen), st.just(Frozen({"a": np.ones(3), "b": None})), st.just(Frozen(None)))


def trees(leaves):
    names = st.sampled_from(["w", "b", "state", "params", "z"])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.dictionaries(names, inner, max_size=3), st.lists(inner, max_size=3), st.tuples(inner, inner)),
        max_leaves=8,
    )


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


anything = trees(st.one_of(trained_leaves(), given_leaves()))


@hypothesis.given(anything)
@hypothesis.settings(deadline=None)
def test_join_undoes_split(params):
    assert same(join(*split(params)), params)


@hypothesis.given(anything)
@hypothesis.settings(deadline=None)
def test_the_parts_are_trained_and_given(params):
    trained, given = split(params)
    assert all(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(trained))
    assert same(split(trained)[0], trained)
    assert same(split(given)[1], given)
    assert jax.tree.leaves(split(trained)[1]) == jax.tree.leaves(split(given)[0]) == []
    assert not any(isinstance(node, Frozen) for node in jax.tree.leaves(trained, is_leaf=lambda node: isinstance(node, Frozen)))


@hypothesis.given(anything, anything)
@hypothesis.settings(deadline=None)
def test_count_adds_and_ignores_what_is_given(a, b):
    assert count({"a": a, "b": b}) == count(a) + count(b)
    assert count(a) == sum(np.size(leaf) for leaf in jax.tree.leaves(split(a)[0]))
    assert count(Frozen(a)) == count(split(a)[1]) == 0


def test_frozen_passes_through_jit_and_vmap():
    params = {"w": jnp.ones(2), "sign": Frozen(jnp.array([1.0, -1.0]))}
    doubled = jax.jit(jax.vmap(lambda p: jax.tree.map(lambda leaf: 2 * leaf, p)))(params)
    assert isinstance(doubled["sign"], Frozen)
    np.testing.assert_array_equal(doubled["sign"].value, [2.0, -2.0])


@pytest.mark.parametrize("network", [nn.Dense(3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
def test_a_network_is_no_family(network):
    name = type(network).__name__
    with pytest.raises(TypeError, match=rf"a {name} is one network already.*lambda width: {name}\(width"):
        family(network)
