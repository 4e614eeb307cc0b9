"""Masks under training, and scores against closed forms and conservation laws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from paperjax.model import Model
from paperjax.train import train
from paperjax.transforms import grasp, keep_largest, mask, snip, synflow

X = jnp.abs(jax.random.normal(jax.random.key(0), (4, 5))) + 0.1
LINE = Model(lambda key, x: jax.random.normal(key, (5, 2)), lambda w, x: x @ w)


def test_masked_weights_stay_at_zero():
    """AdamW with weight decay, momentum and all; the others move."""
    data = pj.data.Dataset(np.asarray(X), np.ones((4, 2), np.float32), np.asarray(X), np.ones((4, 2), np.float32))
    kept = jnp.arange(10).reshape(5, 2) % 3 > 0
    model = mask(LINE, kept)
    start = model.init(jax.random.key(1), X)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer count.
        end = train(model, start, data, optimizer=optax.adamw(0.1, weight_decay=0.1), steps=3, measure_at=2).params
    np.testing.assert_array_equal(np.asarray(start)[~np.asarray(kept)], 0)
    np.testing.assert_array_equal(np.asarray(end)[~np.asarray(kept)], 0)
    assert (np.abs(np.asarray(end - start))[np.asarray(kept)] > 1e-3).all()


def test_a_mask_of_ones_is_the_model():
    w = LINE.init(jax.random.key(0), X)
    all_kept = mask(LINE, jnp.ones((5, 2), bool))
    np.testing.assert_array_equal(all_kept.init(jax.random.key(0), X), w)
    np.testing.assert_array_equal(all_kept.apply(w, X), LINE.apply(w, X))


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("together", [True, False])
def test_keep_largest_against_sorting(density, together):
    scores = {"a": jax.random.normal(jax.random.key(2), (4, 5)), "b": jax.random.normal(jax.random.key(3), (10,))}
    kept = keep_largest(scores, density, together)
    parts = [tuple(scores)] if together else [("a",), ("b",)]
    for names in parts:
        s, k = (np.concatenate([np.asarray(tree[n]).reshape(-1) for n in names]) for tree in (scores, kept))
        number = max(round(density * len(s)), 1)
        assert k.sum() == number
        assert s[k].min() == np.sort(s)[-number]
    traced = jax.jit(lambda d: keep_largest(scores, d, together))(jnp.float32(density))
    jax.tree.map(np.testing.assert_array_equal, traced, kept)


def test_of_equal_scores_the_first_are_kept():
    assert keep_largest(jnp.ones(4), 0.5).tolist() == [True, True, False, False]


def quadratic():
    """``theta' H theta / 2`` with H of both signs, in float64."""
    H = np.random.default_rng(0).normal(size=(6, 6))
    H, theta = H + H.T, np.random.default_rng(1).normal(size=6)
    return H, theta, lambda w: w @ jnp.asarray(H) @ w / 2


def test_snip_and_grasp_of_a_quadratic_form():
    H, theta, loss = quadratic()
    with jax.enable_x64(True):
        np.testing.assert_allclose(snip(loss, jnp.asarray(theta)), np.abs(theta * (H @ theta)), rtol=1e-12)
        np.testing.assert_allclose(grasp(loss, jnp.asarray(theta)), theta * (H @ H @ theta), rtol=1e-12)


def test_grasp_is_the_slope_of_the_squared_gradient():
    """Scaling weight i by 1 - t moves |g|² at the rate -2 theta_i (H g)_i; by differences, on a loss that is no quadratic form."""
    with jax.enable_x64(True):
        theta = jnp.asarray(np.random.default_rng(2).normal(size=4))

        def loss(w):
            return jnp.sum(jnp.cos(w)) + jnp.prod(w)

        def square(w):
            return jnp.sum(jax.grad(loss)(w) ** 2)

        for i, score in enumerate(grasp(loss, theta)):
            step = 1e-5 * theta[i]
            slope = (square(theta.at[i].add(-step)) - square(theta.at[i].add(step))) / 2e-5
            assert float(slope) == pytest.approx(-2 * float(score), rel=1e-6, abs=1e-8)


def test_synflow_does_not_empty_a_layer_where_one_cut_would():
    """Layers of 40 and 400 weights, one in 20 kept in all: many rounds leave a path (Theorem 3 of the paper), one cut need not."""
    deep = Model(lambda key, x: None, lambda w, x: jax.nn.relu(jax.nn.relu(x @ w["a"]) @ w["b"]) @ w["c"])
    shapes = {"a": (2, 20), "b": (20, 20), "c": (20, 2)}
    params = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    kept = jax.jit(lambda w: synflow(deep, w, jnp.ones((1, 2)), 0.05))(params)
    assert sum(int(k.sum()) for k in kept.values()) == 24  # 5 % of 480
    a, b, c = (np.asarray(kept[name], np.int64) for name in "abc")
    assert (a @ b @ c).sum() > 0


def test_synflow_scores_of_a_layer_add_up_to_the_flow():
    """The law the rounds rest on: in one round at density 1/2 on a net of two layers of one neuron the weaker path goes whole."""
    deep = Model(lambda key, x: None, lambda w, x: (x @ w["a"]) @ w["b"])
    params = {"a": jnp.array([[1.0, -3.0, 2.0]]), "b": jnp.array([[2.0], [4.0], [-1.0]])}
    kept = synflow(deep, params, jnp.ones((1, 1)), 1 / 3, rounds=1)
    assert kept["a"].tolist() == [[False, True, False]]
    assert kept["b"].tolist() == [[False], [True], [False]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_largest(jnp.ones(3), 0.0), "density = 0.0"),
        (lambda: keep_largest(jnp.ones(3), 1.5), "density = 1.5"),
        (lambda: mask(LINE, [jnp.ones((5, 2), bool)]).apply(jnp.ones((5, 2)), X), "the mask is"),
        (lambda: mask(LINE, jnp.ones((1, 2), bool)).apply(jnp.ones((5, 2)), X), r"has shape \(5, 2\), but its mask \(1, 2\)"),
        (lambda: synflow(LINE, jnp.ones((5, 2)), X, 0.5, rounds=0), "rounds = 0"),
        (lambda: synflow(LINE, jnp.ones((5, 2)), X, 0.0), "density = 0.0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
