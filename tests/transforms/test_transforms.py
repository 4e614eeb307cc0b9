"""One contract for every transform, Model -> Model: a new one is tested by adding a row."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paperjax.losses import mse
from paperjax.model import Model, as_model, check_model, count, join, split
from paperjax.models import mlp, resmlp
from paperjax.train import train
from paperjax.transforms import center, ensemble, linearize, mask, rescale, subspace, taylor

X = jax.random.normal(jax.random.key(0), (5, 3))
Y = jax.random.normal(jax.random.key(1), (5, 2))
KEY = jax.random.key(2)


def origin(base, params):
    return base.apply(params["origin"].value, X)


def zero(base, params):
    return jnp.zeros((5, 2))


def members(base, params, size):
    return sum(base.apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), X) for i in range(size)) / size


class Row(NamedTuple):
    """A transform, its outputs at init, and how many parameters it trains (None: `copies` times as many as before)."""

    transform: Any
    at_init: Any
    trained: int | None = None
    copies: int = 1


TRANSFORMS = {
    "center": Row(center, zero),
    "subspace dense": Row(lambda m: subspace(m, 4), origin, trained=4),
    "subspace sparse": Row(lambda m: subspace(m, 4, projection="sparse"), origin, trained=4),
    "subspace fastfood": Row(lambda m: subspace(m, 4, projection="fastfood"), origin, trained=4),
    "center of subspace": Row(lambda m: center(subspace(m, 4)), zero, trained=4),
    "subspace of center": Row(lambda m: subspace(center(m), 4), zero, trained=4),
    "linearize": Row(linearize, origin),
    "taylor": Row(lambda m: taylor(m, 2), origin),
    "mask of ones": Row(
        lambda m: mask(m, jax.tree.map(lambda w: jnp.ones(w.shape, bool), jax.eval_shape(m.init, KEY, X))),
        lambda base, params: base.apply(params, X),
    ),
    "rescale": Row(lambda m: rescale(m, 0.5), lambda base, params: 0.5 * base.apply(params, X)),
    "ensemble": Row(lambda m: ensemble(m, 3), lambda base, params: members(base, params, 3), copies=3),
    "ensemble of linearize of center": Row(lambda m: ensemble(linearize(center(m)), 3), zero, copies=3),
    "rescale of linearize of ensemble": Row(
        lambda m: rescale(linearize(ensemble(m, 2)), 0.5), lambda base, params: 0.5 * members(base, params["origin"].value, 2), copies=2
    ),
}
MODELS = {
    "mlp": mlp(4, 2, outputs=2),
    "resmlp": resmlp(4, 2, outputs=2),
    "linen": as_model(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])),
}


class Data(NamedTuple):
    """Just what `train` reads."""

    x_train: Any = X
    y_train: Any = Y


@pytest.fixture(params=TRANSFORMS, scope="module")
def row(request):
    return TRANSFORMS[request.param]


@pytest.fixture(params=MODELS, scope="module")
def base(request):
    return MODELS[request.param]


def test_contract(row, base):
    model = row.transform(base)
    _, y = check_model(model, X)
    assert y.shape == (5, 2)

    params = jax.jit(model.init)(KEY, X)
    again = jax.jit(model.init)(KEY, X)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again)))

    assert count(params) == (row.copies * count(jax.eval_shape(base.init, KEY, X)) if row.trained is None else row.trained)

    @jax.jit
    def measured(params):
        trained, given = split(params)
        out = train(model, params, Data(), optimizer=optax.sgd(0.05), steps=20, measure_at=2)
        gradient = jax.grad(lambda trained: mse(model.apply(join(trained, given), X), Y))(trained)
        return (
            model.apply(params, X),
            model.apply(params, X[2:3]),
            row.at_init(base, params),
            out,
            gradient,
        )

    at_init, third, expected, out, gradient = measured(params)
    np.testing.assert_allclose(at_init, expected, rtol=1e-6, atol=1e-6)
    # Batch-equivariant: the third row alone is the third row.
    np.testing.assert_allclose(third, at_init[2:3], atol=1e-5)

    given, still = split(params)[1], split(out.params)[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(still))), "what is Frozen has moved"
    assert out.measures["train_loss"][1] < out.measures["train_loss"][0]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert int(out.diverged_at) == -1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_outputs_may_be_a_pytree(name):
    """Transforms act on every array that a model returns as on one array."""
    base, transform = mlp(4, 2, 2), TRANSFORMS[name].transform

    def pair(params, x):
        y = base.apply(params, x)
        return {"first": y[:, 0], "both": (y,)}

    one, two = transform(base), transform(Model(base.init, pair))
    params = jax.jit(one.init)(KEY, X)
    trained, given = split(params)
    params = join(jax.tree.map(lambda leaf: leaf + 0.1, trained), given)
    y, found = jax.jit(one.apply)(params, X), jax.jit(two.apply)(params, X)
    np.testing.assert_allclose(found["both"][0], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["first"], y[:, 0], rtol=1e-5, atol=1e-6)
