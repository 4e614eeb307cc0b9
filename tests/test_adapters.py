"""An nnx module that draws random numbers when it is called: refused where its output depends on them, and only there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paperjax.model import as_model

X = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)


class Recurrent(nnx.Module):
    """A tick of the counter for each first carry, which is zeros."""

    def __init__(self, cell, rngs, carry_init=None):
        self.rnn = nnx.RNN(cell(3, 5, rngs=rngs), rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)
        self.carry_init = carry_init

    def __call__(self, x):
        first = None if self.carry_init is None else self.rnn.cell.initialize_carry((*x.shape[:1], 3), self.rnn.rngs, self.carry_init)
        y: Any = self.rnn(x, initial_carry=first)
        return self.out(y[:, -1])


class BothWays(nnx.Module):
    def __init__(self, rngs):
        there, back = (nnx.RNN(nnx.LSTMCell(3, 5, rngs=rngs)) for _ in range(2))
        self.rnn = nnx.Bidirectional(there, back)

    def __call__(self, x):
        return self.rnn(x)


class Dropped(nnx.Module):
    def __init__(self, rate, rngs, deterministic=False, where="outside"):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.dropout = nnx.Dropout(rate, deterministic=deterministic, rngs=rngs)
        self.where = where

    def __call__(self, x):
        h = self.linear(x)
        if self.where == "remat":
            return nnx.remat(lambda module, h: module.dropout(h))(self, h)
        if self.where == "jit":
            return nnx.jit(lambda module, h: module.dropout(h))(self, h)
        if self.where == "unused":
            self.dropout(h)
            return h
        return self.dropout(h)


RECURRENT = {
    "gru": lambda rngs: Recurrent(nnx.GRUCell, rngs),
    "lstm": lambda rngs: Recurrent(nnx.OptimizedLSTMCell, rngs),
    "simple": lambda rngs: Recurrent(nnx.SimpleCell, rngs),
    "both ways": lambda rngs: BothWays(rngs),
    "a result that is thrown away": lambda rngs: Dropped(0.5, rngs, where="unused"),
}


@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
def test_a_module_that_ticks_a_counter_and_uses_no_random_number_is_a_model(make):
    model = as_model(make)
    params = model.init(jax.random.key(0), X)
    np.testing.assert_array_equal(model.apply(params, X), make(nnx.Rngs(jax.random.key(0)))(X))


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: Dropped(0.5, rngs),
        lambda rngs: Dropped(0.5, rngs, where="remat"),
        lambda rngs: Dropped(0.5, rngs, where="jit"),
        lambda rngs: Recurrent(nnx.GRUCell, rngs, carry_init=nnx.initializers.normal(1.0)),
        lambda rngs: nnx.Sequential(Recurrent(nnx.GRUCell, rngs), nnx.Dropout(0.1, rngs=rngs)),
    ],
    ids=["dropout", "dropout, rematerialized", "dropout, jitted", "random first carry", "dropout after a GRU"],
)
def test_an_output_that_depends_on_random_numbers_is_refused(make):
    model = as_model(make)
    params = model.init(jax.random.key(0), X)
    message = "draws random numbers when it is called .* and its output depends on them"
    with pytest.raises(TypeError, match=message):
        model.apply(params, X)
    with pytest.raises(TypeError, match=message):
        jax.jit(model.apply)(params, X)
    instance = as_model(make(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=message):
        instance.apply(instance.init(jax.random.key(0), X), X)


@pytest.mark.parametrize("make", [lambda rngs: Dropped(0.0, rngs), lambda rngs: Dropped(0.5, rngs, deterministic=True)])
def test_dropout_that_drops_nothing_is_a_model(make):
    model = as_model(make)
    assert model.apply(model.init(jax.random.key(0), X), X).shape == X.shape


def test_a_recurrent_module_goes_through_every_transform():
    model = as_model(RECURRENT["gru"])
    params = model.init(jax.random.key(0), X)
    trained = params["params"]
    y = model.apply(params, X)
    np.testing.assert_allclose(jax.jit(model.apply)(params, X), y, rtol=1e-5, atol=1e-6)
    each = jax.vmap(lambda x: model.apply(params, x[None])[0])(X)
    np.testing.assert_allclose(each, y, rtol=1e-5, atol=1e-6)
    stacked = jax.vmap(model.init, (0, None))(jax.random.split(jax.random.key(0), 2), X)
    assert jax.jit(jax.vmap(model.apply, (0, None)))(stacked, X).shape == (2, 2, 2)

    def loss(trained):
        return jnp.sum(model.apply({**params, "params": trained}, X) ** 2)

    gradient = jax.grad(loss)(trained)
    moved = jax.tree.map(lambda w, g: w + 1e-3 * g, trained, gradient)
    slope = (loss(moved) - loss(trained)) / 1e-3
    np.testing.assert_allclose(slope, sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)), rtol=0.05)
    _, rows = jax.lax.scan(lambda carry, x: (carry, model.apply(params, x[None])[0]), None, jnp.asarray(X))
    np.testing.assert_allclose(rows, y, rtol=1e-5, atol=1e-6)


def test_the_dependence_is_looked_for_once_for_each_form_of_the_arguments():
    calls = []

    class Counted(Recurrent):
        def __call__(self, x):
            calls.append(x.shape)
            return super().__call__(x)

    model = as_model(lambda rngs: Counted(nnx.GRUCell, rngs))
    params = model.init(jax.random.key(0), X)
    for x in (X, 2 * X, X[:1], X):
        model.apply(params, x)
    assert calls == [X.shape, X.shape, X.shape, (1, 4, 3), (1, 4, 3), X.shape]
