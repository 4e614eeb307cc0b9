import subprocess
import sys

import jax
import numpy as np
import pytest

import paperjax as pj
from paperjax.devices import devices_of


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_number_there_already_is_is_accepted():
    there = len(jax.devices("cpu"))
    assert pj.cpu_devices(there) == there


def test_another_number_after_jax_has_started_is_refused_and_changes_nothing():
    there = len(jax.devices("cpu"))
    with pytest.raises(RuntimeError, match=f"came too late: JAX has already started with {there} CPU device"):
        pj.cpu_devices(there + 1)
    assert len(jax.devices("cpu")) == there


@pytest.mark.parametrize("n", [0, -1])
def test_no_devices_are_refused(n):
    with pytest.raises(ValueError, match="at least one device"):
        pj.cpu_devices(n)


def test_before_jax_starts_the_number_is_set_and_importing_sets_nothing():
    done = python(
        "import jax; before = jax.config.jax_num_cpu_devices\n"
        "import paperjax as pj\n"
        "assert jax.config.jax_num_cpu_devices == before\n"
        "assert pj.cpu_devices(3) == 3\n"
        "assert len(jax.devices()) == 3\n"
    )
    assert done.returncode == 0, done.stderr


DECOMPOSITIONS = """
import jax.numpy as jnp, paperjax as pj
pj.cpu_devices(2)

def largest(model, params):
    return jnp.linalg.svd(params["hidden"]["w"], compute_uv=False).max()

exp = pj.Experiment(
    lambda: pj.models.mlp(64, 6, 10), pj.data.one_hot(pj.data.subset(pj.data.digits(), train=64, test=8)), loss="mse", optimizer="sgd",
    grid=pj.grid(lr=pj.logspace(-3, -1, 8), seed=4), steps=25, measure_at=26, measures={"largest": largest}, layout=pj.Layout(2, 16, 1))
assert exp.run().largest.notnull().all()
"""


@pytest.mark.slow
def test_batched_decompositions_on_all_devices_end():
    """With as many threads as devices, XLA's pool waits for itself here."""
    done = python(DECOMPOSITIONS)
    assert done.returncode == 0, done.stderr


HEAVY = ("matplotlib", "xarray", "sklearn", "orbax.checkpoint", "tyro")


def test_importing_paperjax_imports_nothing_heavy():
    done = python(
        "import sys, jax, flax, optax\nbefore = set(sys.modules)\nimport paperjax\nprint('\\n'.join(sorted(set(sys.modules) - before)))\n"
    )
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "paperjax.experiment" in found
    for name in HEAVY:
        assert not {m for m in found if m == name or m.startswith(name + ".")}, name


STEPS_AND_FAULTS = """
import resource
import numpy as np, paperjax as pj
pj.cpu_devices(2)
x = np.ones((256, 64), np.float32)
data = pj.data.Dataset(x, x[:, :10], x[:1], x[:1, :10], "ones", "made here")
e = pj.Experiment(lambda: pj.models.mlp(256, 3, 10), data, grid=pj.grid(lr=[0.01, 0.02], seed=2), steps=200, measure_at=1)
e.run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
e.run()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (4 * 200))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_training_on_two_devices_gives_no_memory_back_at_every_step():
    """A gradient of 256 by 256 is 64 pages: a step that gives its scratch memory back faults on them anew."""
    done = python(STEPS_AND_FAULTS)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32


def test_meshes_that_no_kernel_can_be_spread_over(monkeypatch):
    with pytest.raises(TypeError, match=r"mesh = 2 is no jax\.sharding\.Mesh.*make_mesh"):
        devices_of(2, "ntk")
    two = jax.make_mesh((2,), ("pairs",))
    assert devices_of(two, "ntk", {"w": np.ones(2)}) == jax.devices()[:2]
    with pytest.raises(TypeError, match="AbstractMesh"):
        devices_of(two.abstract_mesh, "ntk")
    with pytest.raises(ValueError, match="no devices"):
        devices_of(jax.sharding.Mesh(np.array([], dtype=object), ("pairs",)), "ntk")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"2 of its 2 devices in other processes.*jax\.local_devices.*ntk\(\.\.\., x1\[mine\]"):
        devices_of(two, "ntk")
