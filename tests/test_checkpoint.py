import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401 Before a test puts something in the place of its paths.
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paperjax.checkpoint import Checkpoints


def damage(folder, how):
    """Truncate, or delete, what a checkpoint of one number holds."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    assert files
    for path in files:
        if how == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif how == "emptied":
            path.write_bytes(b"")
        else:
            path.unlink()


@pytest.fixture
def store(tmp_path):
    store = Checkpoints(tmp_path / "deep" / "folder")
    yield store
    store.close()


def test_an_empty_folder_has_none(store):
    assert store.newest() is None


def test_arrays_come_back_with_their_bits_shapes_and_dtypes(store):
    arrays = {
        "f32": np.array([[np.nan, -np.inf, -0.0, 1e-45, 0.1]], np.float32),
        "f64": np.array(np.pi),
        "int": np.arange(6, dtype=np.int32).reshape(2, 3),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "empty_int": np.zeros(0, np.int32),
        "bf16": np.asarray(jnp.array([1.5, -2.25], jnp.bfloat16)),
        "u32": np.array([2**32 - 1], np.uint32),
        "with/slash": np.ones(2),
    }
    record = {"t": 7, "text": "½ × λ", "nested": {"list": [1, 2.5, None]}}
    store.save(arrays, record)
    found, there = store.newest()
    assert there == record
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def test_no_array_at_all(store):
    store.save({}, {"t": 0})
    assert store.newest() == ({}, {"t": 0})


def test_the_newest_few_are_kept_and_the_newest_is_read(store):
    for t in range(5):
        store.save({"w": np.full(3, t)}, {"t": t})
    arrays, record = store.newest()
    assert record["t"] == 4
    assert arrays["w"].tolist() == [4, 4, 4]
    assert sorted(int(p.name) for p in store.folder.iterdir()) == [2, 3, 4]


def test_another_store_on_the_folder_goes_on(store):
    store.save({"w": np.zeros(2)}, {"t": 0})
    again = Checkpoints(store.folder)
    again.save({"w": np.ones(3), "new": np.ones(1)}, {"t": 1})
    again.close()
    third = Checkpoints(str(store.folder))
    arrays, record = third.newest()
    third.close()
    assert record == {"t": 1}
    assert arrays["w"].shape == (3,)
    assert set(arrays) == {"w", "new"}


@pytest.mark.parametrize("how", ["truncated", "emptied", "deleted"])
def test_a_damaged_newest_falls_back_with_a_warning_that_names_it(store, how):
    for t in range(3):
        store.save({"w": np.full(1000, float(t))}, {"t": t})
    damage(store.folder / "2", how)
    with pytest.warns(UserWarning, match=r"could not be read.*the one before, 1, is used: .*/2: "):
        arrays, record = store.newest()
    assert record == {"t": 1}
    assert (arrays["w"] == 1).all()
    store.save({"w": np.full(1000, 9.0)}, {"t": 9})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.newest()[1] == {"t": 9}


def test_every_damaged_checkpoint_is_named_when_none_can_be_read(store):
    for t in range(2):
        store.save({"w": np.full(1000, float(t))}, {"t": t})
        damage(store.folder / str(t), "truncated")
    with pytest.raises(OSError, match=r"no checkpoint in .* can be read") as error:
        store.newest()
    assert str(store.folder / "0") in str(error.value)
    assert str(store.folder / "1") in str(error.value)


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be made.*Name a folder that you can write to"):
        Checkpoints(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="cannot be made"):
        Checkpoints(tmp_path / "file")


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    # Root may write everywhere, so the system's answer is what is changed here.
    monkeypatch.setattr("os.access", lambda path, mode, **kwargs: False)
    with pytest.raises(OSError, match="cannot be written to"):
        Checkpoints(tmp_path)


def test_what_a_killed_writer_leaves_behind_is_passed_over(store):
    store.save({"w": np.zeros(2)}, {"t": 0})
    (store.folder / "1.orbax-checkpoint-tmp-123").mkdir()
    (store.folder / "notes.txt").write_text("mine")
    again = Checkpoints(store.folder)
    assert again.newest()[1] == {"t": 0}
    again.save({"w": np.zeros(2)}, {"t": 1})
    assert again.newest()[1] == {"t": 1}
    again.close()


# A disk that fills, and buckets ------------------------------------------------------------------------------------------

# A process that may write files of 64 KiB at most is what one whose disk is full sees: a write that fails in the middle of a file.
FILLS = """
import resource, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from paperjax.checkpoint import Checkpoints

folder, kind, wait = sys.argv[1:]
store = Checkpoints(folder)
rng = np.random.default_rng(0)
def large():
    host = rng.normal(size=(2, 500_000))
    if kind == "host":
        return host
    return jax.device_put(host.astype(np.float32), NamedSharding(jax.make_mesh((2,), ("cells",)), PartitionSpec("cells")))
store.save({"w": large()}, {"t": 0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
try:
    store.save({"w": large()}, {"t": 1}, wait=wait == "wait")
    store.close()
except OSError as error:
    print(error)
    sys.exit(9)
"""


@pytest.mark.parametrize(
    ("kind", "wait"),
    [("spread", "later"), *(pytest.param(k, w, marks=pytest.mark.slow) for k, w in [("host", "wait"), ("spread", "wait")])],
)
def test_a_disk_that_fills_leaves_the_last_good_checkpoint_and_says_so(tmp_path, kind, wait):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", FILLS, str(tmp_path / "saved"), kind, wait]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    assert re.search(r"could not be written in .*saved \(.*\)\. Those before it are whole\. If the disk is full, make room", done.stdout)
    again = Checkpoints(tmp_path / "saved")
    arrays, record = again.newest()
    assert record == {"t": 0}
    expected = np.random.default_rng(0).normal(size=(2, 500_000))
    np.testing.assert_array_equal(arrays["w"], expected if kind == "host" else expected.astype(np.float32))
    # With room again it goes on, and what was left half is cleared away.
    again.save({"w": np.ones(3)}, {"t": 2})
    assert again.newest()[1] == {"t": 2}
    again.close()
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["0", "1"]


def over(n, tree):
    mesh = Mesh(np.array(jax.devices()[:n]), ("cells",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("cells")))


def test_what_two_devices_saved_comes_back_on_one_or_on_two_or_on_the_host(store):
    host = np.arange(12, dtype=np.float32).reshape(4, 3)
    store.save({"w": over(2, host), "n": np.int32(3)}, {"t": 0})
    for n in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:n]), ("cells",))
        at = NamedSharding(mesh, PartitionSpec("cells"))
        arrays, _ = store.newest(lambda record, at=at: lambda name, shape: at if name == "w" else None)
        assert arrays["w"].sharding == at
        np.testing.assert_array_equal(arrays["w"], host)
        assert arrays["n"] == 3
    found = store.newest()[0]["w"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, host)


def test_a_save_that_is_not_waited_for_has_the_values_of_then(store):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    host, w = np.zeros(300_000, np.float32), over(2, np.zeros(300_000, np.float32))
    alone = jnp.zeros(300_000)
    for t in range(3):
        store.save({"w": w, "host": host, "alone": alone}, {"t": t}, wait=False)
        w, alone = step(w), step(alone)
        host += 1
    arrays, record = store.newest()
    assert record == {"t": 2}
    for name in ("w", "host", "alone"):
        assert (np.asarray(arrays[name]) == 2).all(), name


def test_what_place_refuses_is_raised_and_not_taken_for_damage(store):
    store.save({"w": np.zeros(2)}, {"t": 0})

    def refuse(record):
        raise ValueError(f"not this one: {record}")

    with pytest.raises(ValueError, match="not this one"):
        store.newest(refuse)


class Bucket:
    """A bucket as its provider's library shows it to somebody without credentials."""

    def __init__(self, error):
        self.error = error

    def __truediv__(self, name):
        return self

    def mkdir(self, **given):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("401 Anonymous caller"), r"PermissionError: 401 Anonymous caller\).*credentials.*gcloud auth application-default"),
        (ImportError("Please install gcsfs"), r"Please install gcsfs: pip install 'paperjax\[buckets\]'"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_refused_at_once(monkeypatch, error, words):
    monkeypatch.setattr("etils.epath.Path", lambda url: Bucket(error))
    with pytest.raises(OSError, match=rf"checkpoint folder gs://bucket/run.*{words}"):
        Checkpoints("gs://bucket/run")


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(OSError, match=r"ftp:// is not known\. Buckets are gs://, s3://, az://"):
        Checkpoints("ftp://host/run")
