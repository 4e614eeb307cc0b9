import jax
import jax.numpy as jnp
import optax
import pytest
import xarray as xr
from jax.sharding import PartitionSpec as P

import paperjax as pj
from paperjax.sharding import fully_sharded, mesh, optimizer_shardings, parameter_shardings, parse_mesh, tensor_parallel
from tests.zoo import blobs, net

X = jnp.ones((4, 6))
FAMILY = pj.family(lambda width: pj.models.mlp(width, depth=2, outputs=3), x=X)


@pytest.fixture(scope="module")
def program():
    return pj.trace.read(FAMILY, base=dict(width=4), target=dict(width=8))


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (-1, 1, 1), (1, 1, -1)])
def test_a_mesh_has_the_lengths_asked_for(lengths):
    n = len(jax.devices())
    assert tuple(mesh(*lengths).shape.values()) == tuple(n if k == -1 else k for k in lengths)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        (dict(sweep=4, data=2), "needs 8 devices, and there are 2. Lengths whose product is one of 1, 2 "),
        (dict(sweep=3, data=-1), "multiply to 3.*Products that would: 1, 2"),
        (dict(sweep=-1, data=-1), "sweep and data are both -1"),
        (dict(model=0), "model=0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_would(lengths, match):
    with pytest.raises(ValueError, match=match):
        mesh(**lengths)


def test_tensor_parallel_splits_what_grows_and_leaves_the_rest(program):
    for leaf in program.leaves:
        spec = tensor_parallel(leaf, 2)
        split = [a for a, name in enumerate(spec) if name == "model"]
        assert len(split) == any(leaf.infinite)
        assert all(leaf.infinite[a] for a in split)
        if leaf.role == "hidden":
            assert split[0] in leaf.sites[leaf.deciding].out
        assert tensor_parallel(leaf, 1) == P()


@pytest.mark.parametrize("rule", [tensor_parallel, fully_sharded])
def test_an_axis_that_does_not_divide_is_refused_with_the_lengths_that_would(program, rule):
    hidden = next(leaf for leaf in program.leaves if leaf.role == "hidden")
    with pytest.raises(ValueError, match=r"model=5 divides none.*Lengths that would: 1, 2, 4, 8"):
        rule(hidden, 5)


@pytest.mark.parametrize("rule", [tensor_parallel, fully_sharded])
def test_the_optimizer_state_follows_its_leaf(program, rule):
    params = FAMILY(width=8).init(jax.random.key(0), X)
    where = parameter_shardings(params, program, mesh(model=2), rule)
    state = optimizer_shardings(optax.adam(0.1), params, where)[0]
    assert state.mu == where
    assert state.nu == where
    assert state.count.spec == P()
    placed = jax.device_put(params, where)
    split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.is_fully_replicated]
    assert split
    assert all(2 * leaf.addressable_shards[0].data.size == leaf.size for leaf in split)


def swept(**fields):
    grid = pj.grid(lr=[0.1, 0.2], seed=2)
    return pj.Experiment(net, blobs(), loss=lambda f, y: jnp.mean((f - y) ** 2), grid=grid, steps=3, measure_at=2, **fields)


def test_a_mesh_of_sweep_runs_on_its_devices_with_the_same_results():
    every, one, usual = swept(mesh=mesh(sweep=-1)).run(), swept(mesh=mesh(sweep=1)).run(), swept().run()
    assert (every.layout[:7], one.layout[:7]) == ("2 lanes", "1 lane ")
    # All devices are the default; on one, products of four cells may be summed otherwise than of two.
    xr.testing.assert_equal(every, usual)
    xr.testing.assert_allclose(one, usual, rtol=1e-5)


@pytest.mark.parametrize("lengths", [dict(data=2), dict(model=2)])
def test_an_experiment_refuses_what_it_does_not_spread(lengths):
    with pytest.raises(ValueError, match=r"an Experiment spreads.*pj.mesh\(sweep=2\)"):
        swept(mesh=mesh(**lengths)).check()


@pytest.mark.parametrize("text", ["", "sweep", "sweep=2,sweep=2", "lanes=2", "sweep=two"])
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="is no length of a mesh"):
        parse_mesh(text)
