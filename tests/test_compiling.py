"""Cells over several devices: what each program runs on, and that it changes no number."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.cell import CellFunctions
from paperjax.compiling import compile_cells
from paperjax.devices import compiler_options, known_options
from paperjax.layout import Layout, mesh_of, replicate, spread


def functions(measure):
    return CellFunctions(
        lambda axes, data: (data * axes["a"], axes["a"]),
        lambda axes, state, constants, data, first, n: state + n.astype(jnp.float32) * constants,
        lambda axes, state, constants, data, step: {"m": measure(state) + step.astype(jnp.float32)},
        lambda axes, data: (pj.models.mlp(2, 1), data),
    )


@pytest.mark.parametrize(
    ("measure", "devices"),
    [
        (jnp.sum, 2),
        (lambda a: jnp.linalg.svd(a, compute_uv=False).max(), 1),
        (lambda a: jnp.abs(jnp.fft.fft(a)).max(), 1),
        (lambda a: jax.jit(lambda a: jnp.linalg.eigvalsh(a @ a.T))(a).max(), 1),
    ],
    ids=["sum", "svd", "fft", "eigh inside jit"],
)
def test_programs_whose_devices_would_wait_for_each_other_have_one(measure, devices):
    layout = Layout(2, 2, 1)
    mesh = mesh_of(layout, jax.devices("cpu"))
    axes, data = spread({"a": np.arange(1.0, 5.0, dtype=np.float32)}, mesh), replicate(jnp.eye(3) + 1.0, mesh)
    with ThreadPoolExecutor(1) as pool:
        setup, advance, measured = compile_cells(functions(measure), layout, mesh, axes, data, pool).wait()
    state, constants = setup(axes, data)
    state = advance(axes, state, constants, data, np.int32(0), np.int32(3))
    found = measured(axes, state, constants, data, np.int32(7))
    expected = [measure((jnp.eye(3) + 1.0) * a + 3 * a) + 7 for a in (1.0, 2.0, 3.0, 4.0)]
    np.testing.assert_allclose(found["m"], expected, rtol=1e-5)
    assert len(found["m"].sharding.device_set) == 2, "results lie where those of other programs do"
    # A program over both devices is XLA's own; one on the first has its arguments carried there.
    assert isinstance(measured, jax.stages.Compiled) == (devices == 2)
    assert isinstance(advance, jax.stages.Compiled), "training has no decomposition, and keeps both devices"


def test_without_steps_no_training_loop_is_compiled():
    layout = Layout(1, 1, 2)
    mesh = mesh_of(layout, jax.devices("cpu"))
    made, axes = functions(jnp.sum), {"a": jnp.arange(1.0, 3.0)}
    made = made._replace(advance=lambda *args: pytest.fail("it was traced"))
    with ThreadPoolExecutor(1) as pool:
        setup, advance, measured = compile_cells(made, layout, mesh, axes, jnp.eye(3), pool, None, False, False).wait()
    assert advance is None
    np.testing.assert_allclose(measured(axes, *setup(axes, jnp.eye(3)), jnp.eye(3), np.int32(0))["m"], [3.0, 6.0])


def test_products_on_cpu_are_eigens_where_xla_has_others():
    assert known_options({"xla_no_such_option": True}) == {}
    options = compiler_options("cpu")
    a = jnp.ones((64, 64))
    assert "ynn" not in jax.jit(lambda a: a @ a, compiler_options=options).lower(a).compile().as_text()


def test_long_sums_on_cpu_are_in_pairs():
    # Over the first two axes a thousand numbers are added up one by one, and off by 1.5e-6, unless it is told otherwise.
    a = np.random.default_rng(0).uniform(size=(32, 32, 32, 32)).astype(np.float32)
    right = a.astype(np.float64).sum((0, 1))
    off = [
        abs(jax.jit(lambda a: a.sum((0, 1)), compiler_options=compiler_options("cpu", long))(a) / right - 1).max() for long in (True, False)
    ]
    assert off[0] < 3e-7 < off[1], "if XLA has learned it, compiler_options need not say so"
    a = a[0, 0]
    assert "ynn" not in jax.jit(lambda a: a @ a.T, compiler_options=compiler_options("cpu", True)).lower(a).compile().as_text()
