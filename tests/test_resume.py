import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from jax.experimental.compilation_cache import compilation_cache

import paperjax as pj
from paperjax import driver
from paperjax.checkpoint import Checkpoints
from paperjax.describe import describe
from paperjax.resuming import apart
from tests.test_checkpoint import damage
from tests.zoo import as_users_run_it, blobs, net


def noisy_sgd(learning_rate):
    """SGD with momentum whose rate is random at every step; its state holds a key."""

    def update(updates, key, params=None):
        key, now = jax.random.split(key)
        factor = jax.random.uniform(now)
        return jax.tree.map(lambda g: g * factor, updates), key

    noise = optax.GradientTransformation(lambda params: jax.random.key(5), update)
    return optax.chain(noise, optax.sgd(learning_rate, 0.9))


def outputs(model, params, data):
    return model.apply(params, data.x_test[:3])


def loss(f, y):
    return jnp.mean((f - y) ** 2)


def experiment(**fields):
    """Two programs of two chunks of two cells (the last one ragged), three measurements, minibatches."""
    usual = {
        "loss": loss,
        "optimizer": noisy_sgd,
        "grid": pj.grid(width=[2, 3], lr=[0.05, 1e30, 0.3]),
        "steps": 9,
        "batch": 5,
        "measure_at": [0, 2, 9],
        "measures": {"outputs": outputs, "n": lambda step: step},
        "layout": pj.Layout(1, 2, 1),
        "save_every": 1e6,
    }
    return pj.Experiment(net, blobs(), **{**usual, **fields})


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Every test here runs the same few programs: keep them, compiled, between runs."""
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in zip(options, (str(tmp_path_factory.mktemp("compiled")), 0.0, -1)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole():
    return experiment().run()


class KilledError(BaseException):
    """Stands for a kill: nothing catches it, and nothing is saved on the way out."""


def stop_at_save(monkeypatch, n, how):
    """Call `how` right after the n-th checkpoint is on disk."""
    original, count = Checkpoints.save, [0]

    def save(self, *args, **kwargs):
        original(self, *args, **kwargs)
        count[0] += 1
        if count[0] == n:
            how()

    monkeypatch.setattr(Checkpoints, "save", save)


def kill():
    raise KilledError


def killed_at(folder, n, **fields):
    with pytest.MonkeyPatch.context() as patch:
        stop_at_save(patch, n, kill)
        with pytest.raises(KilledError):
            experiment(checkpoint=str(folder), save_every=0, **fields).run()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed in the middle of the second program, to be copied."""
    folder = tmp_path_factory.mktemp("killed") / "checkpoints"
    killed_at(folder, 15)
    return folder


@pytest.fixture
def left(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "left")


# 6 saves a chunk: after each of 2 calls and 3 measurements, and when it is done.
@pytest.mark.parametrize("n", [2, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 5, 6, 7, 11, 13, 23, 24))])
def test_killed_after_any_save_it_ends_with_the_same_bits(whole, tmp_path, n):
    killed_at(tmp_path, n)
    position = Checkpoints(tmp_path).newest()[1]["position"]
    # What is done is not done again.
    assert (position["program"], position["chunk"]) == divmod(n // 6, 2)
    found = experiment(checkpoint=str(tmp_path)).run()
    xr.testing.assert_equal(found, whole)
    assert sorted(found.data_vars) == ["diverged_at", "n", "outputs", "train_loss"]


def test_killed_in_the_second_program(whole, left):
    xr.testing.assert_equal(experiment(checkpoint=left).run(), whole)


def test_a_finished_run_comes_back_without_training(whole, left, monkeypatch):
    exp = experiment(checkpoint=str(left))
    exp.run()
    monkeypatch.setattr(driver, "compile_cells", lambda *args: pytest.fail("compiled again"))
    xr.testing.assert_equal(exp.run(), whole)
    xr.testing.assert_equal(exp.replace(save_every=100.0, max_bytes=10**9).run(), whole)


@pytest.mark.slow
def test_two_lanes_resume_with_the_same_bits_and_one_lane_with_a_warning(tmp_path, monkeypatch):
    two = {"layout": pj.Layout(2, 1, 1), "grid": pj.grid(lr=[0.05, 0.1, 0.2], width=2)}
    whole = experiment(**two).run()
    killed_at(tmp_path / "a", 3, **two)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    xr.testing.assert_equal(experiment(checkpoint=tmp_path / "a", **two).run(), whole)
    one = jax.devices("cpu")[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: one)
    with pytest.warns(UserWarning, match=r"used 2 devices and there are 1 now.*may differ"):
        found = experiment(checkpoint=tmp_path / "b", **two).run()
    for name in whole.data_vars:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=1e-6)


# Ctrl-C ----------------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at_save(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=r"stopped, and saved in .*Run the same again with this checkpoint folder"):
            experiment(checkpoint=str(tmp_path), save_every=0).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpoints(tmp_path).newest()[1]["position"]["step"] == 2
    xr.testing.assert_equal(experiment(checkpoint=str(tmp_path)).run(), whole)


def test_ctrl_c_saves_although_no_checkpoint_is_due(tmp_path, monkeypatch):
    exp = experiment(checkpoint=str(tmp_path), grid=pj.grid(width=2, lr=[0.1]), layout=None)
    original = driver._Run._record

    def record(self, *args):
        original(self, *args)
        if self.position.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(driver._Run, "_record", record)
        with pytest.raises(KeyboardInterrupt, match="saved in"):
            exp.run()
        position = Checkpoints(tmp_path).newest()[1]["position"]
        assert (position["step"], position["point"]) == (2, 2)
        patch.undo()
        found = exp.run()
        xr.testing.assert_equal(found, exp.replace(checkpoint=None).run())
        # Without a folder it says that nothing was saved, and what would have.
        patch.setattr(driver._Run, "_record", record)
        with pytest.raises(KeyboardInterrupt, match=r"Nothing was saved: with checkpoint=FOLDER"):
            exp.replace(checkpoint=None).run()


# What does not fit, or cannot be read ----------------------------------------------------------------------------------


def other_loss(f, y):
    return jnp.mean((f - y) ** 4)


def with_closure(factor):
    return lambda learning_rate: optax.sgd(learning_rate * factor)


CHANGES = {
    "steps": {"steps": 10},
    "grid": {"grid": pj.grid(width=[2, 3], lr=[0.05, 1e30, 0.4])},
    "loss": {"loss": other_loss},
    "data": {"data": blobs()._replace(x_test=blobs().x_test * np.float32(1.0000001))},
    "family": {"family": lambda width: net(width, 2.0)},
    "optimizer": {"optimizer": with_closure(1.0)},
    "batch": {"batch": 4},
    "measures": {"measures": {"outputs": outputs}},
    "measure_at": {"measure_at": [0, 3, 9]},
    "layout": {"layout": None},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_experiment_is_refused_by_the_name_of_the_field(killed, field):
    exp = experiment(checkpoint=str(killed)).replace(**CHANGES[field])
    with pytest.raises(ValueError, match=rf"is of another Experiment: {field} was .* and is now .*\. Undo the change, or name another"):
        exp.run()


def test_what_an_optimizer_closes_over_is_part_of_it(tmp_path):
    small = {"grid": pj.grid(width=2, lr=[0.1]), "layout": None, "steps": 2, "measure_at": 2}
    exp = experiment(optimizer=with_closure(1.0), checkpoint=str(tmp_path), **small)
    exp.run()
    exp.replace(optimizer=with_closure(1.0)).run()
    with pytest.raises(ValueError, match=r"optimizer was .*factor=1\.0.*is now .*factor=2\.0"):
        exp.replace(optimizer=with_closure(2.0)).run()
    # Double precision is another experiment too, though all fields are the same.
    with as_users_run_it(), jax.enable_x64(True), pytest.raises(ValueError, match="x64 was False and is now True"):
        exp.run()


def test_what_differs_is_shown_however_long_the_rest():
    def many(last):
        numbers = {f"number_{i}": float(i) for i in range(100)} | {"last": last}
        return lambda learning_rate: optax.sgd(learning_rate * numbers["last"])

    was, now = (describe(many(last)) for last in (1.0, 2.0))
    assert was[:1000] == now[:1000]
    was, now = apart(was, now)
    assert was.endswith("last: 1.0}]")
    assert now.endswith("last: 2.0}]")
    assert len(was) < 210
    # What is added at the end or left out there, and what differs early.
    assert apart("x" * 300, "x" * 300 + "y") == ("..." + "x" * 60, "..." + "x" * 60 + "y")
    assert apart("a" + "x" * 300, "b" + "x" * 300) == ("a" + "x" * 199 + "...", "b" + "x" * 199 + "...")
    assert apart("absent", "3") == ("absent", "3")


def test_other_versions_are_said(left, monkeypatch):
    monkeypatch.setattr(driver, "versions", lambda: {"jax": "0.0.1"})
    with pytest.warns(UserWarning, match=r"resuming with other versions than .*'jax'"):
        experiment(checkpoint=str(left)).run()


def numbers(folder):
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def test_a_truncated_newest_checkpoint_falls_back_and_ends_with_the_same_bits(whole, left):
    newest = numbers(left)[-1]
    damage(newest, "truncated")
    with pytest.warns(UserWarning, match=rf"could not be read.*{re.escape(str(newest))}"):
        found = experiment(checkpoint=str(left)).run()
    xr.testing.assert_equal(found, whole)


def test_no_readable_checkpoint_is_an_error(left):
    for folder in numbers(left):
        damage(folder, "truncated")
    with pytest.raises(OSError, match=r"no checkpoint in .* can be read. Delete the folder to start again"):
        experiment(checkpoint=str(left)).run()


def test_a_folder_that_cannot_be_made_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(driver, "compile_cells", lambda *args: pytest.fail("trained first"))
    with pytest.raises(OSError, match="cannot be made"):
        experiment(checkpoint=str(tmp_path / "file" / "checkpoints")).run()


# A process that is killed ----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import paperjax as pj
from tests.test_resume import experiment

folder, out, save_every = sys.argv[1:]
many = dict(steps=200, measure_at=100)
pj.save(experiment(checkpoint=folder, save_every=float(save_every), **many).run(), out)
pj.save(experiment(**many).run(), out + ".whole")
"""


@pytest.mark.slow
def test_after_kill_9_a_rerun_ends_with_the_same_bits(tmp_path):
    folder, out = tmp_path / "checkpoints", tmp_path / "result.nc"
    command = [sys.executable, "-c", PROGRAM, str(folder), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def saved():
        return numbers(folder) if folder.is_dir() else []

    process = subprocess.Popen([*command, "0"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while len(saved()) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert len(saved()) >= 2
    assert not out.exists()
    done = subprocess.run([*command, "1000"], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found, whole = pj.load(out), pj.load(f"{out}.whole")
    xr.testing.assert_equal(found, whole)
    assert found.sizes["step"] == 100
