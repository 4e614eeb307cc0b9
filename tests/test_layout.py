from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj
from paperjax.devices import device_budget
from paperjax.layout import Layout, choose_layout, grid_bytes, lay_out, mesh_of, peak_bytes, replicate, spread, tree_bytes, work
from paperjax.resuming import on_lanes

GPU = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 1000})
CPU = SimpleNamespace(platform="cpu")


@given(
    n_cells=st.integers(1, 5000),
    flops=st.floats(0, 1e12),
    kept=st.integers(0, 10**7),
    at_work=st.integers(0, 10**8),
    budget=st.integers(1, 10**10),
    device=st.sampled_from([CPU, GPU]),
    n_devices=st.integers(1, 9),
)
def test_a_layout_runs_every_cell_within_its_budget_or_is_refused(n_cells, flops, kept, at_work, budget, device, n_devices):
    def choose(max_bytes):
        return choose_layout(n_cells, flops, kept, at_work, max_bytes, [device] * n_devices)

    one = max(1, 2 * kept) + max(1, at_work)
    if one > budget:
        with pytest.raises(MemoryError, match=f"Give max_bytes={one} or more"):
            choose(budget)
        choose(one)
        return
    layout = choose(budget)
    assert 1 <= layout.lanes <= min(n_devices, n_cells)
    # What runs at once, on all devices together (CPU: one memory) or on each.
    on_a_lane = layout.map * layout.vmap * max(1, 2 * kept) + layout.vmap * max(1, at_work)
    assert on_a_lane * (layout.lanes if device is CPU else 1) <= budget
    # Padding is less than one row of groups: no lane has a group more than it needs for its share.
    share = -(-n_cells // layout.lanes)
    assert layout.map * layout.vmap < share + layout.map
    if kept == at_work == 0 and budget > 10**5:
        assert layout.cells >= n_cells


def test_the_cpu_groups_cells_by_their_work():
    def choose(flops, devices=1):
        return choose_layout(104, flops, 0, 0, 10**12, [CPU] * devices)

    assert choose(1e9).vmap == 1
    assert choose(1e3).vmap > 10
    assert choose(1e8, 2) == Layout(2, 52, 1)
    # Large cells: no more of them in a call than take several steps a second, and no call half empty.
    assert choose(1e9, 2) == Layout(2, 9, 1)
    assert choose(1.56e9, 2) == Layout(2, 4, 1)
    assert choose(1e12, 2) == Layout(2, 1, 1)
    assert choose_layout(104, 1e9, 0, 0, 10**12, [GPU]) == Layout(1, 1, 104)


def test_a_small_budget_gives_up_lanes_before_it_fails():
    layout = choose_layout(8, 1e9, 100, 1000, 1300, [CPU] * 4)
    assert layout == Layout(1, 1, 1)


def test_the_budget_of_devices():
    assert device_budget([GPU]) == 500
    assert 2**28 < device_budget([CPU]) < 2**45


@pytest.mark.parametrize("field", ["lanes", "map", "vmap"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_layouts_are_refused(field, value):
    from tests.zoo import as_users_run_it

    with as_users_run_it(), pytest.raises(ValueError, match=f"Layout\\({field}="):
        Layout(**{field: value})


def test_more_lanes_than_devices_are_refused():
    with pytest.raises(ValueError, match=r"9 lanes and JAX sees 2 device.*cpu_devices\(9\)"):
        mesh_of(Layout(lanes=9), jax.devices("cpu"))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_a_resumed_run_with_fewer_devices_keeps_its_cells(lanes, rows, vmap, there):
    layout = Layout(lanes, rows, vmap)
    there = min(there, lanes)
    fewer = on_lanes(layout, there, 1)
    assert fewer.cells == layout.cells
    assert fewer.lanes <= there
    # Cells that ran together go on together, or in equal parts.
    assert vmap % fewer.vmap == 0


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 6), (1, 6, 1), (1, 2, 3), (2, 1, 1), (2, 1, 3), (2, 3, 1), (2, 2, 2)])
def test_laid_out_equals_vmap(layout):
    layout = Layout(*layout)
    mesh = mesh_of(layout, jax.devices("cpu"))
    rng = np.random.default_rng(0)
    cells = {"a": rng.normal(size=(layout.cells, 3)).astype(np.float32), "n": np.arange(layout.cells, dtype=np.int32)}
    shared = rng.normal(size=(3, 2)).astype(np.float32)

    def one(cell, shared):
        return {"y": jnp.sin(cell["a"]) @ shared, "n": cell["n"] + 1}

    run = jax.jit(lay_out(one, layout, mesh))
    many = layout.lanes > 1
    out = run(spread(cells, mesh), replicate(shared, mesh)) if many else run(cells, shared)
    expected = jax.vmap(one, (0, None))(cells, shared)
    np.testing.assert_allclose(out["y"], expected["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out["n"], expected["n"])
    assert len(out["y"].sharding.device_set) == layout.lanes


def test_bytes_of_a_tree():
    tree = {"a": jnp.ones((3, 2)), "b": jax.ShapeDtypeStruct((5,), jnp.int8), "c": jax.ShapeDtypeStruct((), jnp.float64)}
    assert tree_bytes(tree) == 24 + 5 + 8
    key = jax.random.key(0)
    assert tree_bytes(key) == jax.random.key_data(key).nbytes


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_products_and_scans_are_counted_exactly(m, k, n, b, length):
    a, w = jax.ShapeDtypeStruct((m, k), jnp.float32), jax.ShapeDtypeStruct((k, n), jnp.float32)
    assert work(jnp.matmul, a, w) == (2 * m * k * n, 4 * m * n)
    batched = jax.ShapeDtypeStruct((b, m, k), jnp.float32)
    assert work(lambda a, w: jnp.einsum("bmk,kn->bmn", a, w), batched, w)[0] == 2 * b * m * k * n
    square = jax.ShapeDtypeStruct((m, m), jnp.float32)

    def repeated(x, s):
        return jax.lax.scan(lambda x, _: (x @ s, None), x, None, length=length)[0]

    assert work(jax.jit(repeated), square, square)[0] == length * 2 * m**3


def test_convolutions_are_counted_exactly():
    x, w = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((5, 3, 3, 3), jnp.float32)
    flops, _ = work(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"), x, w)
    assert flops == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)


def test_the_work_of_a_training_step_is_near_three_forward_passes():
    model = pj.models.mlp(64, depth=3, outputs=10)
    x = jnp.ones((32, 20))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    forward, _ = work(model.apply, params, x)
    backward, bytes_at_work = work(jax.grad(lambda p: jnp.mean(model.apply(p, x))), params)
    products = 2 * 32 * (20 * 64 + 2 * 64 * 64 + 64 * 10)
    assert products <= forward <= 1.2 * products
    assert 2.5 * products < backward < 3.5 * products
    assert bytes_at_work >= 4 * 3 * 32 * 64


def test_the_peak_of_a_chain_is_two_of_its_values_and_of_a_sum_all():
    x = jax.ShapeDtypeStruct((50,), jnp.float32)
    assert peak_bytes(lambda x: jnp.cos(jnp.exp(jnp.sin(x))), x) == 2 * 200
    # Both factors are there until the product is.
    assert peak_bytes(lambda x: jnp.sin(x) * jnp.cos(x), x) == 3 * 200
    assert peak_bytes(jax.jit(lambda x: jnp.sin(jnp.sin(x))), x) >= 2 * 200


@pytest.mark.parametrize("n", [1, 3, 20])
def test_bytes_over_all_pairs_are_those_of_the_vectorized_program(n):
    """Of values of one side, of the other, of both and of neither, and of a carry that comes to be of both within a scan.

    Vectorizing moves axes besides, whose copies are an eighth of the whole here.
    """

    def pair(a, b):
        def step(carry, row):
            return carry * jnp.sin(b[0]) + row, carry

        once = jnp.cos(jnp.ones(7))
        last, rows = jax.lax.scan(step, jnp.zeros(5), jnp.sin(a)[:, None] * jnp.ones((1, 5)))
        return jnp.sum(rows) * jnp.sum(jnp.exp(b)) + jnp.sum(last) + jnp.sum(once)

    a, b = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    many = [jax.ShapeDtypeStruct((n, *x.shape), x.dtype) for x in (a, b)]
    found = grid_bytes(jax.make_jaxpr(pair)(a, b).jaxpr, [frozenset({0}), frozenset({1})], n)
    assert found == pytest.approx(peak_bytes(jax.vmap(jax.vmap(pair, (None, 0)), (0, None)), *many), rel=0.2)
