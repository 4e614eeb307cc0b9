"""Kernels over the devices of a mesh: those of one device, at half the work where they are symmetric, from one file whatever the mesh."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.kernels import conjugate_gradients, ntk, operator, spread
from paperjax.kernels.blocks import divided
from paperjax.kernels.spread import in_shares, line_of
from paperjax.model import Model

pytestmark = pytest.mark.usefixtures("x64")


def apply(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


MODEL = Model(lambda key, x: None, apply)
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 7)), "b": RNG.normal(size=7), "v": RNG.normal(size=(7, 2))}
X1, X2 = RNG.normal(size=(13, 3)), RNG.normal(size=(5, 3))
FORMS = {
    "full": {},
    "trace": {"outputs": "trace"},
    "diagonal in outputs": {"outputs": "diagonal"},
    "one output": {"outputs": 1},
    "by leaf": {"per": "leaf"},
    "by layer": {"per": "layer", "outputs": "trace"},
    "weighed": {"weights": {"w": 2.0, "b": 0.5, "v": 3.0}},
    "some leaves": {"leaves": ["['b']"]},
    "vectors": {"route": "ntvp"},
    "mixed routes": {"route": {"['w']": "jacobian", "['v']": "gradients"}},
    "examples with themselves": {"diagonal": True},
    "in double precision": {"accumulate": "float64"},
}
FEW = 9000
"""Bytes for which the examples of a block are cut, and go through the network in groups."""


def line(n=2):
    return jax.make_mesh((n,), ("rows",), devices=jax.devices()[:n])


def agrees(found, wanted):
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert [a.shape for a in found] == [a.shape for a in wanted]
    for a, b in zip(found, wanted):
        assert isinstance(a, np.ndarray)
        # Sums over hidden units, the network's and the kernel's, are taken in another order.
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13 * np.abs(b).max())


@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_those_of_one_device(form):
    second = None if form == "examples with themselves" else X2
    for x2, max_bytes in ((None, None), (second, FEW)):
        wanted = ntk(MODEL, PARAMS, X1, x2, **FORMS[form])
        agrees(ntk(MODEL, PARAMS, X1, x2, mesh=line(), max_bytes=max_bytes, **FORMS[form]), wanted)


def eight():
    """All forms over eight devices, some of which have no example; and a regression whose kernel no device holds as a whole."""
    with jax.enable_x64(True):
        for form, options in FORMS.items():
            for x2 in (None,) if form == "examples with themselves" else (None, X2):
                wanted = ntk(MODEL, PARAMS, X1, x2, **options)
                agrees(ntk(MODEL, PARAMS, X1, x2, mesh=pj.mesh(sweep=2, data=-1), max_bytes=FEW, **options), wanted)


@pytest.mark.slow
def test_eight_devices():
    told = "jax.config.update('jax_num_cpu_devices', 8); jax.config.update('jax_disable_most_optimizations', True)"
    code = f"import jax; {told}\nfrom tests.kernels.test_spread import eight\neight()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_several_outputs_and_parameters_that_lie_elsewhere():
    both = Model(MODEL.init, lambda p, x: {"y": apply(p, x), "first": apply(p, x)[:, 0]})
    wanted = ntk(both, PARAMS, X1)
    over_mesh = jax.device_put(PARAMS, jax.sharding.NamedSharding(line(), jax.sharding.PartitionSpec()))
    for params in (over_mesh, jax.device_put(PARAMS, jax.devices()[1])):
        agrees(ntk(both, params, jax.device_put(X1, jax.devices()[1]), mesh=line()), wanted)


@pytest.mark.parametrize("second", [None, X2], ids=["itself", "another"])
def test_each_device_has_its_columns_and_half_is_left_out(monkeypatch, second):
    made, pair = [], spread.pair_parts

    def counting(*args):
        found = pair(*args)
        made.append(found[""])
        return found

    monkeypatch.setattr(spread, "pair_parts", counting)
    x = RNG.normal(size=(64, 3))
    ntk(MODEL, PARAMS, x, second, outputs="trace", mesh=line(), max_bytes=FEW)
    high, broad = made[0].shape
    assert {shard.data.shape for block in made for shard in block.addressable_shards} == {(high, broad // 2)}
    columns = len(x if second is None else second)
    assert len(made) > 4
    # Half, and what blocks on the diagonal and at the ends have below and beyond.
    most = len(x) * columns if second is not None else len(x) * (columns + high + broad) / 2
    assert len(made) * high * broad <= most + high * columns + broad * len(x)


def test_half_of_a_kernel_that_would_fit_is_left_out():
    plan = divided(50_000, 50_000, True, lambda n, m, at_once: 8 * n * m, 100, 10**12, 10**10, 8)
    assert plan.block[1] % 8 == 0
    assert sum(block.height * block.width for block in plan.blocks) < 0.6 * 50_000**2
    # Of few examples nothing is: their blocks would be too small to be fast.
    assert len(divided(1000, 1000, True, lambda n, m, at_once: 8 * n * m, 100, 10**12, 10**10, 8).pairs) == 1


@pytest.mark.parametrize("meshes", [(2, None), (None, 2), (2, 2)], ids=["two to one", "one to two", "two to two"])
def test_a_file_is_taken_up_again_on_another_mesh(tmp_path, monkeypatch, meshes):
    from paperjax.kernels import programs

    wanted, path, calls = ntk(MODEL, PARAMS, X1), tmp_path / "kernel.npy", []
    meshes = [None if n is None else line(n) for n in meshes]

    def stopping(fn):
        def call(*args):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return fn(*args)

        return call

    with monkeypatch.context() as patch:
        # The programs of one device are part of those of several.
        for where, name in ((programs, "pair_program"),) if meshes[0] is None else ((spread, "pair_parts"),):
            patch.setattr(where, name, stopping(getattr(where, name)))
        with pytest.raises(KeyboardInterrupt):
            ntk(MODEL, PARAMS, X1, max_bytes=FEW, out=path, mesh=meshes[0])
    found = ntk(MODEL, PARAMS, X1, max_bytes=FEW, out=path, mesh=meshes[1])
    assert isinstance(found, np.memmap)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13 * np.abs(wanted).max())
    # With more memory, and all there: nothing is computed.
    for name in ("pair_parts", "record_parts"):
        monkeypatch.setattr(spread, name, None)
    again = ntk(MODEL, PARAMS, X1, max_bytes=10 * FEW, out=path, mesh=line())
    np.testing.assert_array_equal(again, found)


def test_decompositions_keep_to_one_device_of_a_cpu():
    def orthogonal(params, x):
        return x @ jnp.linalg.qr(params["w"].T)[0].T[:, :2]

    model = Model(MODEL.init, orthogonal)
    params = {"w": PARAMS["w"][:, :3]}
    agrees(ntk(model, params, X1, mesh=line()), ntk(model, params, X1))
    from paperjax.kernels.network import read

    assert line_of(jax.devices(), read(model, params, X1)).devices.size == 1
    assert line_of(jax.devices(), read(MODEL, PARAMS, X1)).devices.size == 2


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_shares_are_in_the_order_of_the_batch(n, at_once):
    x = np.arange(3.0 * n).reshape(n, 3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("pairs",))
    np.testing.assert_array_equal(np.asarray(in_shares(lambda x: 2 * x, x, at_once, mesh))[:n], 2 * x)


def test_regression_with_a_kernel_over_devices():
    kernel = ntk(MODEL, PARAMS, X1, outputs="trace", mesh=line())
    found = conjugate_gradients(kernel, X1[:, 0], ridge=0.1, tolerance=1e-10, mesh=line())
    np.testing.assert_allclose(found.x, np.linalg.solve(kernel + 0.1 * np.eye(13), X1[:, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ntk(MODEL, PARAMS, X1, mesh=line(), coupled=True), ValueError, "coupled=True.*mesh="),
        (lambda: jax.jit(lambda x: ntk(MODEL, PARAMS, x, mesh=line()))(X1), ValueError, "being traced: .* Call ntk outside"),
        (lambda: jax.jit(lambda p: ntk(MODEL, p, X1, mesh=line()))(PARAMS), ValueError, "being traced"),
        (lambda: ntk(MODEL, PARAMS, X1, mesh=line(), max_bytes=100), MemoryError, "Give max_bytes="),
    ],
    ids=["coupled", "traced examples", "traced parameters", "memory"],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_explicit_axes_are_refused_and_the_ways_out_work():
    few = X1[:4]
    wanted, mesh = np.asarray(ntk(MODEL, PARAMS, few)), line(2)
    place = jax.NamedSharding(mesh, jax.P("rows"))
    x, readout = jax.device_put(few, place), jax.device_put(RNG.normal(size=(8, 2)), place)
    refused = {
        "x1": [lambda: ntk(MODEL, PARAMS, x), lambda: jax.jit(lambda x: ntk(MODEL, PARAMS, x))(x), lambda: operator(MODEL, PARAMS, x)],
        "x2": [lambda: ntk(MODEL, PARAMS, few, x), lambda: operator(MODEL, PARAMS, few, x)],
        r"params\['v'\]": [lambda: ntk(MODEL, {**PARAMS, "v": readout}, few), lambda: ntk(MODEL, {**PARAMS, "v": readout}, few, mesh=mesh)],
    }
    for name, runs in refused.items():
        for run in runs:
            with pytest.raises(ValueError, match=f"{name} is divided over explicit mesh axes.*AxisType.Auto"):
                run()
    automatic = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    agrees(ntk(MODEL, PARAMS, jax.device_get(x), mesh=mesh), wanted)
    agrees(np.asarray(ntk(MODEL, PARAMS, jax.device_put(few, jax.NamedSharding(automatic, jax.P("rows"))))), wanted)
    agrees(np.asarray(ntk(MODEL, PARAMS, jax.device_put(few, jax.NamedSharding(mesh, jax.P())))), wanted)
