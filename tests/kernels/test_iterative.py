"""Conjugate gradients against factorizations, over files, functions and devices; what cannot be solved is refused or said."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.kernels import conjugate_gradients, ntk, operator
from paperjax.kernels.iterative import _nystrom
from paperjax.model import Model

RNG = np.random.default_rng(0)
N, RIDGE = 83, 1e-2
POINTS = RNG.normal(size=(N, 3))
KERNEL = np.exp(-np.sum((POINTS[:, None] - POINTS) ** 2, -1))
Y = RNG.normal(size=(N, 2))
SOLUTION = np.linalg.solve(KERNEL + RIDGE * np.eye(N), Y)


def solve(kernel=KERNEL, y=Y, **options):
    return conjugate_gradients(kernel, y, **{"ridge": RIDGE, "tolerance": 1e-9, **options})


@pytest.mark.parametrize("shape", [(N,), (N, 2), (N, 1, 2)])
@pytest.mark.parametrize("rank", [0, 20])
def test_solution(shape, rank):
    y, wanted = (a[:, 0] if shape == (N,) else a.reshape(shape) for a in (Y, SOLUTION))
    found = solve(y=y, rank=rank, key=jax.random.key(1))
    assert found.x.shape == shape
    assert found.residual.shape == found.error.shape == shape[1:]
    assert np.all(found.residual <= 1e-9)
    off = np.linalg.norm(found.x - wanted, axis=0) / np.linalg.norm(wanted, axis=0)
    # The bound holds, and is not empty: the condition number is about 3e3.
    assert np.all(off <= found.error)
    assert np.all(found.error < 1e-6)


def test_float64_without_x64_is_kept():
    assert jnp.ones(1).dtype == np.float32
    assert solve(tolerance=1e-12).residual.max() <= 1e-12


def test_preconditioned_takes_fewer_steps():
    plain = solve().steps
    ranks = [solve(rank=rank, key=jax.random.key(0)).steps for rank in (10, 40, N)]
    assert plain > 2 * ranks[1] > 2 * ranks[2]
    # With the whole kernel known, what is left is rounding.
    assert ranks[2] <= 3


def test_preconditioner_is_the_inverse_of_what_it_approximates():
    # A kernel of rank 5 is its own Nyström approximation: P^-1 (K + ridge) is λ_5 + ridge on its range, and P^-1 is 1 outside.
    factors = RNG.normal(size=(N, 5))
    kernel = factors @ factors.T
    apply = _nystrom(lambda v: kernel @ v, N, 5, jax.random.key(0), RIDGE, np.dtype(np.float64))
    values, vectors = np.linalg.eigh(kernel)
    inside = vectors[:, -5:]
    np.testing.assert_allclose(apply((kernel + RIDGE * np.eye(N)) @ inside), (values[-5] + RIDGE) * inside, atol=1e-9 * values[-1])
    np.testing.assert_allclose(apply(vectors[:, :-5]), vectors[:, :-5], atol=1e-9)


def test_pieces_of_a_file(tmp_path, monkeypatch):
    np.save(tmp_path / "kernel.npy", KERNEL.astype(np.float32))
    kernel = np.load(tmp_path / "kernel.npy", mmap_mode="r")
    monkeypatch.setattr("paperjax.kernels.iterative.PIECE_BYTES", 10 * N * 4)
    whole, pieces = (solve(kernel, tolerance=1e-5, max_bytes=most) for most in (None, 0))
    # Both are float32 products; at a residual of 1e-5 with a condition number of 3e3 they agree to its bound.
    np.testing.assert_allclose(pieces.x, whole.x, atol=2e-2)
    assert max(whole.residual.max(), pieces.residual.max()) <= 1e-5


@pytest.mark.parametrize("axes", [("rows",), ("a", "b")])
def test_rows_over_devices(axes):
    # 83 rows on two devices: the last one is filled up.
    assert len(jax.devices()) == 2
    mesh = jax.make_mesh((2,) if len(axes) == 1 else (1, 2), axes)
    one, two = solve(KERNEL.astype(np.float32), tolerance=1e-5), solve(KERNEL.astype(np.float32), tolerance=1e-5, mesh=mesh)
    assert two.residual.max() <= 1e-5
    # Rounding decides which step is the first below the tolerance: 115 and 116 on one machine, the same on another.
    assert abs(two.steps - one.steps) <= 2
    np.testing.assert_allclose(two.x, one.x, atol=2e-3)


def everywhere():
    """Every mesh of eight devices, each holding an eighth of the kernel, wherever that was; and fewer rows than devices."""
    made, make = [], jax.make_array_from_callback

    def watched(shape, sharding, rows):
        made.append(make(shape, sharding, rows))
        return made[-1]

    wanted, y = np.linalg.solve(KERNEL[:80, :80] + RIDGE * np.eye(80), Y[:80]), Y[:80]
    single = KERNEL[:80, :80].astype(np.float32)
    jax.make_array_from_callback = watched
    for mesh in (jax.make_mesh((8,), ("rows",)), jax.make_mesh((2, 4), ("a", "b"))):
        spread = jax.device_put(single, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names)))
        # Without jax_enable_x64 devices hold float64 numbers in single precision.
        for kernel in (single, jnp.asarray(single), spread, KERNEL[:80, :80]):
            made.clear()
            # Single precision: the condition number of 3e3 times a residual of 1e-4, at most.
            found = solve(kernel, y, tolerance=1e-4, rank=20, key=jax.random.key(0), mesh=mesh)
            np.testing.assert_allclose(found.x, wanted, atol=0.05 * np.abs(wanted).max())
            assert {shard.data.shape for shard in made[0].addressable_shards} == {(10, 80)}
        few = solve(single[:3, :3], y[:3], tolerance=1e-4, mesh=mesh)
        np.testing.assert_allclose(few.x, np.linalg.solve(KERNEL[:3, :3] + RIDGE * np.eye(3), Y[:3]), rtol=1e-3)


@pytest.mark.slow
def test_eight_devices_hold_an_eighth_each():
    told = "jax.config.update('jax_num_cpu_devices', 8); jax.config.update('jax_disable_most_optimizations', True)"
    code = f"import jax; {told}\nfrom tests.kernels.test_iterative import everywhere\neverywhere()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_function_and_matrix_agree(x64):
    model = Model(lambda key, x: None, lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])
    params = {"w": jnp.asarray(RNG.normal(size=(3, 7))), "v": jnp.asarray(RNG.normal(size=(7, 2)))}
    x = jnp.asarray(POINTS[:9])
    full = np.asarray(ntk(model, params, x)).transpose(0, 2, 1, 3).reshape(18, 18)
    wanted = np.linalg.solve(full + RIDGE * np.eye(18), Y[:9].reshape(-1))
    found = solve(operator(model, params, x), Y[:9])
    assert found.x.shape == (9, 2)
    assert found.residual.shape == ()
    np.testing.assert_allclose(found.x.reshape(-1), wanted, rtol=0, atol=float(found.error * np.linalg.norm(wanted)))


def test_zero_labels():
    found = solve(y=np.stack([Y[:, 0], np.zeros(N)], 1))
    assert found.residual[1] == found.error[1] == 0
    assert not found.x[:, 1].any()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kernel": KERNEL.astype(np.float32), "tolerance": 1e-12}, "precision of the kernel's numbers"),
        ({"steps": 2}, "2 steps"),
    ],
)
def test_says_how_far_it_came(options, why):
    with pytest.warns(UserWarning, match=f"relative residual of .*{why}.*larger ridge"):
        found = solve(**options)
    assert found.residual.max() > options.get("tolerance", 1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel": KERNEL[:, :-1]}, ValueError, r"shape \(83, 82\), and y 83"),
        ({"kernel": np.ones((N, N, 2, 2))}, ValueError, "as_matrix"),
        ({"kernel": np.tril(KERNEL)}, ValueError, "not symmetric"),
        ({"kernel": KERNEL - 2 * np.eye(N)}, ValueError, "not positive definite"),
        ({"kernel": np.where(np.eye(N) > 0, np.nan, KERNEL)}, ValueError, "NaN or infinite"),
        ({"kernel": np.eye(N, dtype=int)}, TypeError, "int64"),
        ({"y": np.where(np.arange(N) == 3, np.nan, 0.0)}, ValueError, "y holds nan"),
        ({"y": np.ones(())}, ValueError, "one value for each example"),
        ({"ridge": -1.0}, ValueError, r"ridge = -1\.0"),
        ({"steps": 0}, ValueError, "steps = 0"),
        ({"rank": 3}, ValueError, r"key=jax\.random\.key"),
        ({"kernel": lambda v: v, "mesh": jax.sharding.Mesh(jax.devices()[:1], ("a",))}, ValueError, "leave mesh out"),
    ],
    ids=[
        "shape",
        "outputs",
        "asymmetric",
        "indefinite",
        "NaN kernel",
        "integers",
        "NaN y",
        "no examples",
        "ridge",
        "steps",
        "no key",
        "mesh",
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        solve(**options)
