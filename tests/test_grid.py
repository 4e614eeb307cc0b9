import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj
from tests.zoo import blobs


def test_lists_are_axes_in_order_and_single_values_are_fixed():
    grid = pj.grid(width=[32, 64], lr=pj.logspace(-3, 1, 5), seed=2, alpha=0.5, optimizer="adam")
    assert grid.names == ("width", "lr", "seed", "alpha", "optimizer")
    assert grid.shape == (2, 5, 2)
    assert grid.axes["seed"] == (0, 1)
    assert grid.fixed == {"alpha": 0.5, "optimizer": "adam"}
    assert grid.values("alpha") == (0.5,)
    assert grid.values("width") == (32, 64)


def test_numpy_jax_ranges_and_generators_become_plain_python_values():
    grid = pj.grid(a=np.arange(2), b=jnp.array([0.5, 1.5]), c=range(3), d=(i / 4 for i in (1, 2)), e=np.float32(0.25), seed=np.int64(2))
    assert grid.axes == {"a": (0, 1), "b": (0.5, 1.5), "c": (0, 1, 2), "d": (0.25, 0.5), "seed": (0, 1)}
    assert all(type(v) in (int, float) for values in grid.axes.values() for v in values)
    assert type(grid.fixed["e"]) is float


def test_seed_as_a_list_is_those_seeds():
    assert pj.grid(seed=[5, 3]).axes["seed"] == (5, 3)


def test_an_axis_with_one_float_is_an_axis_of_floats():
    # So that momentum=[0, 0.9] reaches the program in one dtype.
    grid = pj.grid(momentum=[0, 0.9], depth=[1, 2], lr=[1, 10], bias=[True, False], batch=[None, 4])
    assert all(type(v) is float for name in ("momentum", "lr") for v in grid.axes[name])
    assert all(type(v) is int for v in grid.axes["depth"])
    assert grid.axes["bias"] == (True, False)
    assert grid.axes["batch"] == (None, 4)
    assert type(pj.grid(lr=1).fixed["lr"]) is float


def test_datasets_and_transformations_are_single_values():
    data, tx = blobs(), optax.sgd(0.1)
    assert pj.grid(data=data, optimizer=tx).fixed == {"data": data, "optimizer": tx}
    assert len(pj.grid(data=[data, blobs(seed=1)]).axes["data"]) == 2


def test_replace_keeps_the_order_and_the_rest():
    grid = pj.grid(width=[1, 2], lr=[0.1], seed=4, alpha=0.5).replace(seed=2, lr=[0.3])
    assert list(grid.axes) == ["width", "lr", "seed"]
    assert grid.axes == {"width": (1, 2), "lr": (0.3,), "seed": (0, 1)}
    assert grid.fixed == {"alpha": 0.5}


@given(st.floats(-4, 2), st.floats(-4, 2), st.integers(2, 20))
def test_logspace_and_linspace_have_their_ends_and_equal_ratios(start, stop, num):
    values = pj.logspace(start, stop, num)
    assert len(values) == num
    np.testing.assert_allclose(values[0], 10**start)
    np.testing.assert_allclose(values[-1], 10**stop)
    np.testing.assert_allclose(np.diff(np.log10(values)), (stop - start) / (num - 1), atol=1e-12)
    np.testing.assert_allclose(np.diff(pj.linspace(start, stop, num)), (stop - start) / (num - 1), atol=1e-12)
    assert all(type(v) is float for v in values)


@pytest.mark.parametrize("empty", [[], (), np.zeros(0), range(0)])
def test_an_empty_axis_is_refused(empty):
    with pytest.raises(ValueError, match=r"width=\[\].*no value"):
        pj.grid(width=empty)


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf, 0, "fast", None])
@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_a_learning_rate_that_is_not_positive_and_finite_is_refused(name, lr):
    for value in (lr, [0.1, lr]):
        with pytest.raises(ValueError, match=r"grid: (axis )?(lr|learning_rate)"):
            pj.grid(**{name: value})


@pytest.mark.parametrize("values", [[1, 1], [0.1, 0.2, 0.1], ["a", "a"], [1, 1.0], [optax.sgd, optax.sgd]])
def test_a_repeated_value_is_refused(values):
    with pytest.raises(ValueError, match=r"axis thing repeats .*seed"):
        pj.grid(thing=values)


def test_nan_in_any_axis_is_refused():
    with pytest.raises(ValueError, match="axis alpha has a NaN"):
        pj.grid(alpha=[1.0, math.nan])
    with pytest.raises(ValueError, match="axis alpha has a NaN"):
        pj.grid(alpha=np.nan)


@pytest.mark.parametrize("seed", [0, -1])
def test_no_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed is the number of seeds"):
        pj.grid(seed=seed)
