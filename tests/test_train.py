import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj
from paperjax.losses import mse
from paperjax.model import Frozen, Model
from paperjax.train import advance, measurement_steps, optimizer_factory, resolve_optimizer, start
from tests.zoo import Data, as_users_run_it, blobs, classes, line, net

# Measurement steps -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(2, 30))
def test_evenly_spaced_steps(steps, n):
    points = measurement_steps(n, steps)
    assert points[0] == 0
    assert points[-1] == steps
    assert len(points) == min(n, steps + 1)
    assert np.all(np.diff(points) > 0)
    # Within one of an exactly even spacing.
    assert np.abs(np.asarray(points) - np.linspace(0, steps, len(points))).max() <= 0.5 + 1e-9


@given(st.integers(1, 10**6), st.integers(1, 40))
def test_log_steps(steps, n):
    points = pj.log_steps(steps, n)
    assert points[0] == 0
    assert points[1] == (1 if n > 1 else points[-1])
    assert points[-1] == steps or n == 1
    assert np.all(np.diff(points) > 0)
    assert len(points) <= n + 1


def test_listed_steps_are_sorted_and_may_be_any_sequence():
    assert measurement_steps([7, 0, 7, 3], 9) == (0, 3, 7)
    assert measurement_steps(range(0, 9, 4), 9) == (0, 4, 8)
    assert measurement_steps("log", 10)[-1] == 10
    assert measurement_steps("log", 0) == (0,)
    assert measurement_steps(5, 0) == (0,)
    assert measurement_steps(1, 30) == (30,)


@pytest.mark.parametrize(
    ("measure_at", "steps", "message"),
    [
        (5, -1, "steps = -1"),
        ("linear", 10, "'log'"),
        (0, 10, "at least one measurement"),
        ([], 10, "must lie in"),
        ([-1], 10, "must lie in"),
        ([11], 10, r"0\.\.10"),
        ([0, 2.5], 10, "whole number"),
    ],
)
def test_bad_measurement_steps(measure_at, steps, message):
    with as_users_run_it(), pytest.raises(ValueError, match=message):
        measurement_steps(measure_at, steps)


@pytest.mark.parametrize(("steps", "n"), [(0, 5), (10, 0), (-3, 2)])
def test_bad_log_steps(steps, n):
    with pytest.raises(ValueError, match="log_steps needs"):
        pj.log_steps(steps, n)


# Training --------------------------------------------------------------------------------------------------------------


def test_gradient_descent_on_least_squares_has_its_closed_form(x64):
    # d/dW (1/(n o)) |X W - Y|^2 = 2 X^T (X W - Y) / (n o), so W_t - W* = (I - 2 lr X^T X / (n o))^t (W_0 - W*).
    data = blobs(16, 3, 2, dtype=np.float64)
    w0, lr, points = np.random.default_rng(1).normal(size=(3, 2)), 0.3, (0, 1, 7, 40)
    out = pj.train(line(2), jnp.asarray(w0), data, optimizer=optax.sgd(lr), steps=40, measure_at=points, measures={"w": lambda w: w})
    star = np.linalg.lstsq(data.x_train, data.y_train)[0]
    one = np.eye(3) - 2 * lr * data.x_train.T @ data.x_train / data.y_train.size
    for t, measured, loss in zip(points, out.measures["w"], out.measures["train_loss"]):
        expected = star + np.linalg.matrix_power(one, t) @ (w0 - star)
        np.testing.assert_allclose(measured, expected, rtol=1e-12)
        np.testing.assert_allclose(loss, ((data.x_train @ expected - data.y_train) ** 2).mean(), rtol=1e-12)
    np.testing.assert_array_equal(out.params, out.measures["w"][-1])
    assert out.steps.tolist() == list(points)
    assert int(out.diverged_at) == -1


def by_hand(model, params, data, tx, steps, batch, key):
    """The training loop as one would write it, without paperjax: params after every step, and the rows of every step."""
    grad = jax.jit(jax.grad(lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2)))
    update = jax.jit(tx.update)
    n, state, history, seen = len(data.x_train), tx.init(params), [params], []
    for t in range(steps):
        rows = np.arange(n)
        if batch is not None:
            epoch, position = divmod(t, n // batch)
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), n))
            rows = order[position * batch : (position + 1) * batch]
        seen.append(rows)
        updates, state = update(grad(params, data.x_train[rows], data.y_train[rows]), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, seen


@pytest.mark.parametrize("batch", [None, 5])
def test_equals_a_loop_written_by_hand(x64, batch):
    # 5 does not divide 16: three batches per epoch, one example left out of each.
    data, model, tx, key = blobs(dtype=np.float64), net(4), optax.sgd(0.05, momentum=0.9, nesterov=True), jax.random.key(3)
    params = model.init(jax.random.key(0), jnp.asarray(data.x_train))
    points = (0, 2, 3, 11)
    out = pj.train(model, params, data, optimizer=tx, steps=11, batch=batch, key=key, measure_at=points, measures={"v": lambda p: p["v"]})
    history, _ = by_hand(model, params, data, tx, 11, batch, key)
    for i, t in enumerate(points):
        np.testing.assert_allclose(out.measures["v"][i], history[t]["v"], rtol=1e-12)
        loss = float(np.mean((np.asarray(model.apply(history[t], data.x_train)) - data.y_train) ** 2))
        np.testing.assert_allclose(out.measures["train_loss"][i], loss, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), out.params, history[-1])


@pytest.mark.parametrize(("n", "batch"), [(16, 4), (16, 5), (7, 1), (6, 6)])
def test_every_epoch_is_a_permutation_without_replacement(n, batch):
    # The loss is w . mean(x_b) with x the identity: a step of SGD with rate 1 subtracts 1/batch from just the rows it saw.
    data = Data(np.eye(n, dtype=np.float32), np.zeros(n, np.float32), None, None)
    model = Model(lambda key, x: jnp.zeros(x.shape[1]), lambda w, x: x @ w)
    steps = 3 * (n // batch)
    out = pj.train(
        model, jnp.zeros(n), data, optimizer=optax.sgd(1.0), loss=lambda f, y: jnp.mean(f), steps=steps, batch=batch,
        key=jax.random.key(1), measure_at=range(steps + 1), measures={"w": lambda w: w},
    )  # fmt: skip
    seen = -np.diff(np.asarray(out.measures["w"]), axis=0) * batch
    np.testing.assert_allclose(seen.sum(1), batch, rtol=1e-5)
    np.testing.assert_allclose(np.sort(seen, axis=1)[:, -batch:], 1.0, rtol=1e-4)
    epochs = seen.reshape(3, n // batch, n).sum(1)
    assert epochs.max() < 1.001  # Nothing is seen twice in an epoch,
    assert (epochs > 0.5).sum() == 3 * (n // batch) * batch  # and all but n mod batch of the examples are.
    if batch < n:
        assert not np.array_equal(seen[: n // batch], seen[n // batch : 2 * (n // batch)])  # Epochs differ.


@pytest.fixture(scope="module")
def minibatch_setting():
    data, model, key = jax.tree.map(jnp.asarray, blobs()), net(4), jax.random.key(2)
    params = model.init(jax.random.key(0), data.x_train)
    tx = optax.sgd(0.05, momentum=0.9)

    def objective(p, x, y):
        return mse(model.apply(p, x), y)

    begin = start(model, params, tx, 16, 5)
    go = jax.jit(lambda state, first, n: advance(objective, tx, data.x_train, data.y_train, 5, key, state, first, n))
    return begin, go


@given(st.lists(st.integers(0, 14), max_size=4))
def test_a_loop_cut_anywhere_gives_the_same_bits(minibatch_setting, cuts):
    begin, go = minibatch_setting
    whole = go(begin, jnp.int32(0), jnp.int32(14))
    state, at = begin, 0
    for cut in (*sorted(cuts), 14):
        state = go(state, jnp.int32(at), jnp.int32(cut - at))
        at = cut
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state)):
        np.testing.assert_array_equal(a, b)


def test_vmapped_over_learning_rate_and_seed_equals_one_by_one():
    data, model = jax.tree.map(jnp.asarray, blobs()), net(4)

    @jax.jit
    def cell(lr, seed):
        key = jax.random.key(seed)
        params = model.init(jax.random.fold_in(key, 0), data.x_train)
        out = pj.train(model, params, data, optimizer=optax.sgd(lr), steps=6, batch=4, key=key, measure_at=4)
        return out.measures["train_loss"], out.diverged_at

    lrs, seeds = jnp.array([0.1, 0.2, 1e30]), jnp.array([0, 5, 1])
    losses, diverged = jax.jit(jax.vmap(cell))(lrs, seeds)
    for i in range(3):
        alone, when = cell(lrs[i], seeds[i])
        np.testing.assert_allclose(losses[i], alone, rtol=1e-5)
        assert int(diverged[i]) == int(when)
    assert int(diverged[2]) > 0
    assert np.isfinite(np.asarray(losses[:2])).all()


@pytest.mark.parametrize("measure_at", [3, 1])
def test_differentiable_in_the_learning_rate(x64, measure_at):
    data, model = jax.tree.map(jnp.asarray, blobs(dtype=np.float64)), net(4)
    params = model.init(jax.random.key(0), data.x_train)

    @jax.jit
    def final(lr):
        out = pj.train(model, params, data, optimizer=optax.sgd(lr), steps=10, measure_at=measure_at)
        return out.measures["train_loss"][-1]

    lr, h = 0.1, 1e-5
    numerical = (final(lr + h) - final(lr - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(final)(lr), numerical, rtol=1e-7)
    np.testing.assert_allclose(jax.jvp(final, (lr,), (1.0,))[1], numerical, rtol=1e-7)


def test_unevenly_spaced_is_differentiable_forwards():
    data = jax.tree.map(jnp.asarray, blobs())

    def final(lr):
        return pj.train(line(), jnp.zeros((3, 1)), data, optimizer=optax.sgd(lr), steps=5, measure_at=[0, 1, 5]).measures["train_loss"][-1]

    def even(lr):
        return pj.train(line(), jnp.zeros((3, 1)), data, optimizer=optax.sgd(lr), steps=5, measure_at=2).measures["train_loss"][-1]

    np.testing.assert_allclose(jax.jvp(final, (0.1,), (1.0,))[1], jax.grad(even)(0.1), rtol=1e-4)


def test_all_steps_are_taken_also_after_the_last_measurement():
    data = jax.tree.map(jnp.asarray, blobs())

    def run(points):
        return pj.train(line(), jnp.zeros((3, 1)), data, optimizer=optax.sgd(0.1), steps=9, measure_at=points)

    early, late = run([0, 2]), run([0, 2, 9])
    assert early.steps.tolist() == [0, 2]
    np.testing.assert_allclose(early.params, late.params, rtol=1e-6)
    assert not np.allclose(early.params, run([0, 9]).params * 0.5)


def test_no_step_at_all():
    data = blobs()
    out = pj.train(line(), jnp.ones((3, 1)), data, optimizer=optax.sgd(0.1), steps=0)
    np.testing.assert_array_equal(out.params, np.ones((3, 1)))
    np.testing.assert_allclose(out.measures["train_loss"], [((data.x_train @ np.ones((3, 1)) - data.y_train) ** 2).mean()], rtol=1e-6)


def test_the_first_diverged_step_is_found():
    data, lr, w = blobs(), np.float32(1e8), np.zeros((3, 1), np.float32)
    first = None
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(20):
            r = data.x_train @ w - data.y_train
            if not np.isfinite(np.mean(r * r)):
                first = t
                break
            w = w - lr * (2 * data.x_train.T @ r / np.float32(r.size))
    out = pj.train(line(), jnp.zeros((3, 1)), data, optimizer=optax.sgd(1e8), steps=20)
    assert first is not None
    assert 0 < first < 19
    assert int(out.diverged_at) == first


def test_frozen_and_integer_leaves_stay_as_they_are():
    data = jax.tree.map(jnp.asarray, blobs())
    params = {"w": jnp.zeros((3, 1)), "fixed": Frozen(jnp.ones((3, 1))), "rows": jnp.arange(3)}
    model = Model(lambda key, x: params, lambda p, x: x[:, p["rows"]] @ (p["w"] + p["fixed"].value))
    with as_users_run_it():
        out = pj.train(model, params, data, optimizer=optax.adamw(0.1, weight_decay=1.0), steps=3)
    np.testing.assert_array_equal(out.params["fixed"].value, params["fixed"].value)
    np.testing.assert_array_equal(out.params["rows"], params["rows"])
    assert out.params["rows"].dtype == params["rows"].dtype
    assert np.abs(out.params["w"]).min() > 0


def test_integer_labels_with_cross_entropy_and_minibatches():
    data, model = classes(), net(4, outputs=3)
    params = model.init(jax.random.key(0), jnp.asarray(data.x_train))
    out = pj.train(
        model, params, data, optimizer=optax.sgd(0.5), loss="cross-entropy", steps=40, batch=8, key=jax.random.key(0), measure_at=2
    )
    assert float(out.measures["train_loss"][1]) < 0.8 * float(out.measures["train_loss"][0])


@pytest.mark.parametrize("batch", [0, -1, 17])
def test_a_batch_that_does_not_fit_is_refused(batch):
    with pytest.raises(ValueError, match=rf"batch = {batch} with 16 training examples"):
        pj.train(line(), jnp.zeros((3, 1)), blobs(), optimizer=optax.sgd(0.1), steps=2, batch=batch, key=jax.random.key(0))


def test_minibatches_without_a_key_are_refused():
    with pytest.raises(ValueError, match="needs a key"):
        pj.train(line(), jnp.zeros((3, 1)), blobs(), optimizer=optax.sgd(0.1), steps=2, batch=4)
    pj.train(line(), jnp.zeros((3, 1)), blobs(), optimizer=optax.sgd(0.1), steps=0, batch=16)


def test_labels_of_another_shape_are_refused():
    data = blobs()
    with pytest.raises(ValueError, match=r"\(16, 1\).*\(16,\)"):
        pj.train(line(), jnp.zeros((3, 1)), data._replace(y_train=data.y_train[:, 0]), optimizer=optax.sgd(0.1), steps=2)


# Optimizers ------------------------------------------------------------------------------------------------------------


def update_of(tx, gradient=2.0, param=3.0):
    params = jnp.array([param])
    updates, _ = tx.update(jnp.array([gradient]), tx.init(params), params)
    return float(updates[0])


def test_optimizer_by_name_factory_and_ready():
    for optimizer in ("sgd", optax.sgd, optax.sgd(0.5), lambda learning_rate: optax.sgd(learning_rate), lambda lr: optax.sgd(lr)):
        assert update_of(resolve_optimizer(optimizer, {"lr": 0.5, "width": 3})) == -1.0


def test_other_axes_reach_the_factory():
    # adamw's first step is -lr (sign(g) + weight_decay * param).
    with as_users_run_it():
        adamw = update_of(resolve_optimizer("adamw", {"lr": 0.1, "weight_decay": 0.5}))
    assert adamw == pytest.approx(-0.1 * (1 + 0.5 * 3), rel=1e-4)
    assert update_of(resolve_optimizer(lambda lr, alpha: optax.sgd(lr * alpha), {"lr": 0.1, "alpha": 3.0})) == pytest.approx(-0.6)
    assert update_of(resolve_optimizer(optax.sgd, {"learning_rate": 0.25})) == -0.5


def test_all_named_optimizers_of_optax_can_be_built():
    for name in ("sgd", "adam", "adamw", "nadam", "nadamw", "rmsprop", "lion", "adagrad"):
        assert callable(resolve_optimizer(name, {"lr": 0.1}).update)


def test_bad_optimizers():
    with pytest.raises(ValueError, match=r"unknown optimizer 'adma'\. Did you mean .*'adam'"):
        resolve_optimizer("adma", {"lr": 0.1})
    with pytest.raises(ValueError, match="unknown optimizer 'apply_updates'"):
        resolve_optimizer("apply_updates", {"lr": 0.1})
    with pytest.raises(TypeError, match="must be a name in optax"):
        optimizer_factory(3)
    with pytest.raises(TypeError, match="sgd needs a learning rate: add an axis lr"):
        resolve_optimizer(optax.sgd, {})
    with pytest.raises(TypeError, match="returned a float, not an optax"):
        resolve_optimizer(lambda lr: 1.0, {"lr": 0.1})
    with pytest.raises(TypeError, match="needs 'beta', which nothing provides"):
        resolve_optimizer(lambda learning_rate, beta: optax.sgd(learning_rate), {"lr": 0.1})
