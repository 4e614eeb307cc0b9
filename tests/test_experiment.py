import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import paperjax as pj
from paperjax.cell import Stream
from paperjax.model import Model
from tests.zoo import Data, blobs, line, net

# Float32 over ten steps: the last bits differ by layout, and training lets the difference grow a little.
TOLERANCE = 1e-5


def sgd(learning_rate, momentum=0.0):
    # optax.sgd leaves momentum out where it is None, so a traced zero would change its state.
    return optax.sgd(learning_rate, momentum)


def v_norm(params):
    return jnp.linalg.norm(params["v"])


def outputs(model, params, data):
    return model.apply(params, data.x_test[:5])


def moved(params, params0):
    return jnp.sum((params["v"] - params0["v"]) ** 2)


def at(step):
    return step


def rate(lr, width):
    return lr * width


MEASURES = {"v_norm": v_norm, "outputs": outputs, "moved": moved, "at": at, "rate": rate}


def experiment(**fields):
    usual = {
        "optimizer": sgd,
        "grid": pj.grid(lr=[0.05, 0.1], width=[2, 3], seed=2, momentum=[0, 0.9], scale=[1.0, 0.5]),
        "steps": 10,
        "batch": 5,
        "measure_at": [0, 1, 4, 10],
        "measures": MEASURES,
    }
    return pj.Experiment(net, blobs(), **{**usual, **fields})


@pytest.fixture(scope="module")
def result():
    return experiment().run()


@functools.cache
def alone(width):
    """`train` on one cell, compiled once per width."""
    data = jax.tree.map(jnp.asarray, blobs())

    def cell(lr, seed, momentum, scale):
        model, key = net(width, scale), jax.random.key(seed)
        params = model.init(jax.random.fold_in(key, Stream.INIT), data.x_train)
        return pj.train(
            model, params, data, optimizer=sgd(lr, momentum), steps=10, batch=5, key=jax.random.fold_in(key, Stream.ORDER),
            measure_at=[0, 1, 4, 10], measures={"v_norm": v_norm, "outputs": lambda p: outputs(model, p, data)},
        ).measures  # fmt: skip

    return jax.jit(cell)


# Cells and labels ------------------------------------------------------------------------------------------------------


def test_the_dimensions_are_the_grids_in_order_then_step(result):
    assert result.train_loss.dims == ("lr", "width", "seed", "momentum", "scale", "step")
    assert result.outputs.dims == (*result.train_loss.dims, "outputs_0", "outputs_1")
    assert result.outputs.shape == (2, 2, 2, 2, 2, 4, 5, 1)
    assert result.diverged_at.dims == ("lr", "width", "seed", "momentum", "scale")
    np.testing.assert_array_equal(result.lr, [0.05, 0.1])
    np.testing.assert_array_equal(result.width, [2, 3])
    np.testing.assert_array_equal(result.momentum, [0.0, 0.9])
    np.testing.assert_array_equal(result.step, [0, 1, 4, 10])
    assert np.isnan(result.diverged_at).all()


def test_every_cell_equals_train_run_alone_with_its_key(result):
    for width in (2, 3):
        for lr in (0.05, 0.1):
            for seed in (0, 1):
                for momentum in (0.0, 0.9):
                    for scale in (1.0, 0.5):
                        cell = result.sel(width=width, lr=lr, seed=seed, momentum=momentum, scale=scale)
                        expected = alone(width)(lr, seed, momentum, scale)
                        for name in ("train_loss", "v_norm", "outputs"):
                            np.testing.assert_allclose(cell[name], expected[name], rtol=TOLERANCE, atol=1e-6)


def test_all_cells_differ(result):
    final = result.train_loss.isel(step=-1).values.ravel()
    assert len(np.unique(final)) == final.size


def test_measures_get_step_params0_and_axes(result):
    steps = xr.DataArray([0, 1, 4, 10], dims="step")
    assert (result["at"] == steps).all()
    assert result["at"].dtype == np.int32
    assert (result.moved.isel(step=0) == 0).all()
    assert (result.moved.isel(step=slice(1, None)) > 0).all()
    np.testing.assert_allclose(result.rate, (result.lr * result.width).broadcast_like(result.rate), rtol=1e-6)


def test_the_same_experiment_twice_gives_the_same_bits(result):
    again = experiment(grid=experiment().grid.replace(width=[3])).run()
    assert again.attrs["layout"] == result.attrs["layout"]
    xr.testing.assert_equal(result.sel(width=[3]), again)


def test_without_axes_there_is_one_cell_and_fixed_values_are_scalar_coordinates():
    found = experiment(grid=pj.grid(lr=0.1, width=3, scale=1.0, momentum=0.9, seed=[1]), measures={}).run()
    assert dict(found.sizes) == {"seed": 1, "step": 4}
    assert float(found.lr) == 0.1
    assert int(found.width) == 3
    np.testing.assert_allclose(found.train_loss[0], alone(3)(0.1, 1, 0.9, 1.0)["train_loss"], rtol=TOLERANCE)
    bare = pj.Experiment(net, blobs(), optimizer=optax.sgd(0.1), steps=2, measure_at=2).run()
    assert dict(bare.sizes) == {"step": 2}


def test_no_steps_measure_the_initialization():
    found = experiment(steps=0, measure_at=11, grid=pj.grid(lr=0.1, width=3, seed=2), measures={}).run()
    np.testing.assert_array_equal(found.step, [0])
    np.testing.assert_allclose(found.train_loss[:, 0], [alone(3)(0.1, seed, 0.0, 1.0)["train_loss"][0] for seed in (0, 1)], rtol=1e-5)


def test_in_double_precision_it_equals_train_to_twelve_digits(x64):
    data = blobs(dtype=np.float64)
    found = pj.Experiment(net, data, optimizer=optax.sgd, grid=pj.grid(lr=[0.1, 0.2]), steps=5, measure_at=3).run()
    assert found.train_loss.dtype == np.float64
    model = net()
    params = model.init(jax.random.fold_in(jax.random.key(0), Stream.INIT), jnp.asarray(data.x_train))
    for lr in (0.1, 0.2):
        one = pj.train(model, params, data, optimizer=optax.sgd(lr), steps=5, measure_at=3)
        np.testing.assert_allclose(found.train_loss.sel(lr=lr), one.measures["train_loss"], rtol=1e-12)


# Layouts and chunks ----------------------------------------------------------------------------------------------------

ONE_WIDTH = pj.grid(lr=[0.05, 0.1], width=3, seed=2, momentum=[0, 0.9], scale=[1.0, 0.5])


@pytest.mark.parametrize(
    "layout",
    [(1, 1, 16), (1, 2, 3), (2, 4, 2), *(pytest.param(it, marks=pytest.mark.slow) for it in ((1, 1, 1), (1, 16, 1), (2, 1, 5)))],
)
def test_layouts_and_chunks_change_nothing(result, layout):
    layout = pj.Layout(*layout)
    found = experiment(grid=ONE_WIDTH, layout=layout).run()
    assert found.attrs["layout"] == str(layout)
    for name in found.data_vars:
        np.testing.assert_allclose(found[name], result[name].sel(width=3), rtol=TOLERANCE, atol=1e-6, err_msg=str(name))


def test_a_memory_budget_makes_chunks_and_changes_nothing(result):
    few = experiment(grid=ONE_WIDTH.replace(scale=[1.0]))
    with pytest.raises(MemoryError, match=r"Give max_bytes=\d+ or more") as error:
        few.replace(max_bytes=1).run()
    one = int(re.search(r"max_bytes=(\d+)", str(error.value)).group(1))
    found = few.replace(max_bytes=4 * one).run()
    lanes, rows, vmap = map(int, re.findall(r"\d+", found.attrs["layout"]))
    cells = lanes * rows * vmap
    assert 1 < cells < 8
    if cells == 4:  # Then nothing is ragged: ask for three.
        found = few.replace(layout=pj.Layout(1, 1, 3)).run()
    xr.testing.assert_allclose(found.drop_attrs(), result.sel(width=3, scale=[1.0]).drop_attrs(), rtol=TOLERANCE, atol=1e-6)


def test_verbose_names_the_kind_of_every_axis_and_the_layout(capsys):
    experiment(grid=pj.grid(width=[2], lr=[0.1]), measures={}, steps=1, measure_at=1, layout=pj.Layout(2, 1, 1)).run(verbose=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "axis lr (1): together in one program" in err
    assert "axis width (1): one program each, since its value sets a shape or is used by Python (TypeError when traced)" in err
    assert "2 lanes × map 1 × vmap 1" in err


def test_quiet_unless_asked(capsys):
    experiment(grid=pj.grid(width=2, lr=[0.1]), measures={}, steps=1, measure_at=1).run()
    assert capsys.readouterr() == ("", "")


# Kinds of axes ---------------------------------------------------------------------------------------------------------


def test_kinds_are_found_by_tracing():
    def family(width, scale, gain, activation):
        return net(width, scale * (2.0 if gain > 1 else 1.0))

    grid = pj.grid(
        lr=[0.1, 0.2], width=[2, 3], scale=[1.0, 2.0], gain=[0.5, 1.5], seed=2, activation=["tanh"], batch=[4], optimizer=[sgd, optax.sgd]
    )
    kinds = experiment(grid=grid, batch=None).replace(family=family).check()
    assert kinds.scalar == ("lr", "scale", "seed")
    assert set(kinds.static) == {"width", "gain", "activation", "batch", "optimizer"}
    assert "TracerBoolConversionError" in kinds.static["gain"]
    assert "TypeError when traced" in kinds.static["width"]
    assert kinds.static["activation"] == "its values are not numbers"
    assert "field" in kinds.static["batch"]
    assert "field" in kinds.static["optimizer"]


def test_a_looped_number_gives_the_same_as_a_traced_one():
    def looped(scale):
        return net(3, float(scale))

    exp = experiment(grid=pj.grid(scale=[0.5], lr=[0.1], seed=2), measures={}).replace(family=looped)
    assert "scale" in exp.check().static
    for seed, losses in enumerate(exp.run().train_loss[0, 0]):
        np.testing.assert_allclose(losses, alone(3)(0.1, seed, 0.0, 0.5)["train_loss"], rtol=TOLERANCE)


def test_a_looped_seed_axis_reaches_every_stream():
    def family(seed):
        return net(3 + int(seed) % 1)

    # Nothing is left to trace here.
    exp = experiment(grid=pj.grid(seed=[1, 2], lr=0.1), measures={}).replace(family=family)
    assert "seed" in exp.check().static
    for seed, losses in zip((1, 2), exp.run().train_loss):
        np.testing.assert_allclose(losses, alone(3)(0.1, seed, 0.0, 1.0)["train_loss"], rtol=TOLERANCE)


def test_whole_numbers_among_the_learning_rates():
    data = blobs()
    for together in ([1, 10], [0.5, 1]):
        found = pj.Experiment(line, data, optimizer=optax.sgd, grid=pj.grid(lr=together), steps=1, measure_at=1).run()
        for lr in together:
            w = lr * 2 * data.x_train.T @ data.y_train / data.y_train.size
            expected = np.mean((data.x_train @ w - data.y_train) ** 2)
            np.testing.assert_allclose(found.train_loss.sel(lr=lr), [expected], rtol=TOLERANCE)


# Divergence ------------------------------------------------------------------------------------------------------------


def first_diverged(lr, steps):
    """The first step whose full-batch loss is not finite, in a NumPy loop; step `steps` is after the last update."""
    data, w = blobs(), np.zeros((3, 1), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps + 1):
            r = data.x_train @ w - data.y_train
            if not np.isfinite(np.mean(r * r)):
                return t
            w = w - np.float32(lr) * (2 * data.x_train.T @ r / np.float32(r.size))
    return np.nan


def test_diverged_cells_are_marked_and_leave_the_others_alone():
    rates = [0.05, 1e8, 0.1, 1e30]
    exp = pj.Experiment(line, blobs(), optimizer=optax.sgd, grid=pj.grid(lr=rates), steps=10, measure_at=[0, 1, 7, 10])
    healthy = exp.replace(grid=pj.grid(lr=[0.05, 0.1]))
    mapped, mapped_alone = exp.replace(layout=pj.Layout(1, 4, 1)).run(), healthy.replace(layout=pj.Layout(1, 2, 1)).run()
    np.testing.assert_array_equal(mapped.train_loss.sel(lr=[0.05, 0.1]), mapped_alone.train_loss)
    vmapped, vmapped_alone = exp.replace(layout=pj.Layout(1, 1, 4)).run(), healthy.replace(layout=pj.Layout(1, 1, 2)).run()
    np.testing.assert_allclose(vmapped.train_loss.sel(lr=[0.05, 0.1]), vmapped_alone.train_loss, rtol=TOLERANCE)
    expected = [first_diverged(lr, 10) for lr in rates]
    assert expected[0] != expected[0]
    assert expected[1] == 3  # Between two measurement steps: the float32 range is 1e38, and the loss grows 1e16 times a step.
    for found in (mapped, vmapped):
        np.testing.assert_array_equal(found.diverged_at, expected)
        assert not np.isfinite(found.train_loss.sel(lr=[1e8, 1e30]).isel(step=-1)).any()


def test_a_divergence_by_the_last_update_is_found_too():
    exp = pj.Experiment(line, blobs(), optimizer=optax.sgd, grid=pj.grid(lr=[1e8]), steps=3, measure_at=2)
    assert first_diverged(1e8, 3) == 3
    np.testing.assert_array_equal(exp.run().diverged_at, [3])
    np.testing.assert_array_equal(exp.replace(steps=2).run().diverged_at, [np.nan])


# What every part may name ----------------------------------------------------------------------------------------------


def teacher(key, noise, features=3):
    key_x, key_e = jax.random.split(key)
    x = jax.random.normal(key_x, (24, features))
    y = x[:, :1] + noise * jax.random.normal(key_e, (24, 1))
    return Data(x[:16], y[:16], x[16:], y[16:])


def test_data_may_name_key_and_axes():
    exp = pj.Experiment(
        lambda: net(3), teacher, optimizer=optax.sgd, grid=pj.grid(lr=0.1, noise=[0.0, 0.5], seed=2), steps=3, measure_at=2, batch=4,
        measures={"x": lambda data: data.x_train, "y": lambda data: data.y_train},
    )  # fmt: skip
    found = exp.run()
    for seed in (0, 1):
        for noise in (0.0, 0.5):
            data = teacher(jax.random.fold_in(jax.random.key(seed), Stream.DATA), noise)
            cell = found.sel(seed=seed, noise=noise)
            for step in (0, 3):
                np.testing.assert_allclose(cell.x.sel(step=step), data.x_train, rtol=1e-6)
                np.testing.assert_allclose(cell.y.sel(step=step), data.y_train, rtol=1e-5, atol=1e-6)
    # And they are trained on: the last cell by hand.
    key = jax.random.key(1)
    params = net(3).init(jax.random.fold_in(key, Stream.INIT), data.x_train)
    order = jax.random.fold_in(key, Stream.ORDER)
    one = pj.train(net(3), params, data, optimizer=optax.sgd(0.1), steps=3, measure_at=2, batch=4, key=order)
    np.testing.assert_allclose(cell.train_loss, one.measures["train_loss"], rtol=TOLERANCE)


def test_data_whose_shape_is_an_axis_are_looped_over():
    exp = pj.Experiment(
        lambda: net(3), teacher, optimizer=optax.sgd, grid=pj.grid(lr=0.1, noise=0.5, features=[2, 4]), steps=1, measure_at=1,
        measures={"d": lambda data: jnp.float32(data.x_train.shape[1])},
    )  # fmt: skip
    assert "features" in exp.check().static
    np.testing.assert_array_equal(exp.run().d, [[2], [4]])


def test_the_family_may_name_key_for_fixed_randomness():
    def family(key):
        projection = jax.random.normal(key, (3, 5))
        return Model(lambda key, x: jnp.ones((5, 1)), lambda w, x: (x @ projection) @ w)

    exp = pj.Experiment(
        family, blobs(), optimizer=optax.sgd, grid=pj.grid(lr=[0.01, 0.02], seed=2), steps=2, measure_at=3,
        measures={"f": lambda model, params, data: model.apply(params, data.x_train)},
    )  # fmt: skip
    found = exp.run()
    for seed in (0, 1):
        projection = jax.random.normal(jax.random.fold_in(jax.random.key(seed), Stream.FAMILY), (3, 5))
        expected = blobs().x_train @ np.asarray(projection) @ np.ones((5, 1))
        for lr in (0.01, 0.02):
            np.testing.assert_allclose(found.f.sel(seed=seed, lr=lr, step=0), expected, rtol=1e-4, atol=1e-5)
    # The projection stays while it trains: the loss goes down.
    assert (found.train_loss.isel(step=2) < found.train_loss.isel(step=0)).all()


def test_the_loss_may_name_axes_and_measures_get_it():
    def power(f, y, p):
        return jnp.mean(jnp.abs(f - y) ** p)

    exp = pj.Experiment(
        line, blobs(), loss=power, optimizer=optax.sgd, grid=pj.grid(lr=0.01, p=[1.0, 2.0]), steps=1, measure_at=2,
        measures={"held_out": lambda model, params, data, loss: loss(model.apply(params, data.x_test), data.y_test)},
    )  # fmt: skip
    found = exp.run()
    data = blobs()
    for p in (1.0, 2.0):
        np.testing.assert_allclose(found.train_loss.sel(p=p, step=0), np.mean(np.abs(data.y_train) ** p), rtol=1e-5)
        np.testing.assert_allclose(found.held_out.sel(p=p, step=0), np.mean(np.abs(data.y_test) ** p), rtol=1e-5)


def test_measures_may_draw_with_their_own_key():
    exp = pj.Experiment(
        line, blobs(), optimizer=optax.sgd, grid=pj.grid(lr=[0.1, 0.2], seed=2), steps=1, measure_at=2, batch=4,
        measures={"u": lambda key: jax.random.uniform(key)},
    )  # fmt: skip
    found = exp.run()
    for seed in (0, 1):
        expected = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), Stream.MEASURE))
        assert (found.u.sel(seed=seed) == float(expected)).all()


def test_the_streams_of_a_cell_differ():
    # Changing a number would change every result ever saved.
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == dict(INIT=0, ORDER=1, DATA=2, FAMILY=3, MEASURE=4)
    keys = [tuple(jax.random.key_data(jax.random.fold_in(jax.random.key(0), s)).tolist()) for s in Stream]
    assert len({*keys, tuple(jax.random.key_data(jax.random.key(0)).tolist())}) == len(Stream) + 1


def test_measures_may_return_numpy_constants_and_python_numbers():
    measures = {"a": lambda step: np.arange(2.0, dtype=np.float32), "b": lambda step: 3.5, "c": lambda step: np.float32(2)}
    found = pj.Experiment(line, blobs(), optimizer=optax.sgd(0.1), steps=1, measure_at=2, measures=measures).run()
    np.testing.assert_array_equal(found.a, [[0, 1], [0, 1]])
    np.testing.assert_array_equal(found.b, [3.5, 3.5])


# Fields as axes --------------------------------------------------------------------------------------------------------


def halved(learning_rate):
    return optax.sgd(learning_rate / 2)


def test_batch_and_optimizer_as_axes():
    grid = pj.grid(optimizer=[optax.sgd, halved], batch=[8, None], lr=[0.1, 0.2])
    exp = pj.Experiment(lambda: net(3), blobs(), grid=grid, steps=4, measure_at=2, measures={"b": lambda lr, batch=None: float(batch or 0)})
    found = exp.run()
    assert found.train_loss.dims == ("optimizer", "batch", "lr", "step")
    assert found.optimizer.values.tolist() == ["sgd", "halved"]
    assert found.batch.values.tolist() == ["8", "None"]
    np.testing.assert_array_equal(found.b.isel(optimizer=0, lr=0, step=0), [8, 0])
    np.testing.assert_allclose(
        found.train_loss.sel(optimizer="sgd", lr=0.1), found.train_loss.sel(optimizer="halved", lr=0.2), rtol=TOLERANCE
    )
    data, key = blobs(), jax.random.key(0)
    params = net(3).init(jax.random.fold_in(key, Stream.INIT), jnp.asarray(data.x_train))
    one = pj.train(
        net(3), params, data, optimizer=optax.sgd(0.2), steps=4, measure_at=2, batch=8, key=jax.random.fold_in(key, Stream.ORDER)
    )
    np.testing.assert_allclose(found.train_loss.sel(optimizer="sgd", lr=0.2, batch="8"), one.measures["train_loss"], rtol=TOLERANCE)


def absolute(f, y):
    return jnp.mean(jnp.abs(f - y))


def test_loss_and_data_as_axes():
    grid = pj.grid(lr=0.1, data=[blobs(), blobs(n=12, seed=1)], loss=["mse", absolute])
    found = pj.Experiment(line, blobs(), grid=grid, optimizer=optax.sgd, steps=1, measure_at=2).run()
    assert found.loss.values.tolist() == ["mse", "absolute"]
    assert len(set(found.data.values.tolist())) == 2
    for i, data in enumerate((blobs(), blobs(n=12, seed=1))):
        np.testing.assert_allclose(found.train_loss[i, 0, 0], np.mean(data.y_train**2), rtol=1e-5)
        np.testing.assert_allclose(found.train_loss[i, 1, 0], np.mean(np.abs(data.y_train)), rtol=1e-5)


# Seeds -----------------------------------------------------------------------------------------------------------------


def zeros():
    return line()


@pytest.mark.parametrize("batch", [None, 16])
def test_seeds_that_change_nothing_are_refused(batch):
    exp = pj.Experiment(zeros, blobs(), optimizer=optax.sgd, grid=pj.grid(lr=0.1, seed=2), batch=batch)
    with pytest.raises(ValueError, match="the seeds change nothing"):
        exp.check()
    exp.replace(grid=pj.grid(lr=0.1, seed=1)).check()


def test_seeds_that_change_something_are_not():
    exp = pj.Experiment(zeros, blobs(), optimizer=optax.sgd, grid=pj.grid(lr=0.1, seed=2))
    exp.replace(batch=8).check()
    exp.replace(family=net).check()
    exp.replace(data=lambda key: teacher(key, 0.1)).check()
    exp.replace(measures={"noise": lambda key: jax.random.normal(key)}).check()
    exp.replace(measures={"seed_twice": lambda seed: 2 * seed}).check()
    exp.replace(loss=lambda f, y, seed: jnp.mean((f - y) ** 2) * (1.0 + seed)).check()
    exp.replace(optimizer=lambda learning_rate, seed: optax.sgd(learning_rate / (1.0 + seed))).check()

    def in_apply_only(key):
        projection = jax.random.normal(key, (3, 5))
        return Model(lambda key, x: jnp.ones((5, 1)), lambda w, x: (x @ projection) @ w)

    exp.replace(family=in_apply_only).check()
