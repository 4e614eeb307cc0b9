"""Two processes over gloo on loopback: the same numbers as one, whatever happens to one of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray as xr

import paperjax as pj
from paperjax import processes
from paperjax.cli import main
from paperjax.sharding import AXES, first_rows, fully_sharded, parse_mesh
from tests.test_resume import experiment

PAPERS = Path(__file__).parent / "cli_papers"
HEARTBEAT = 10
# A process of the tests: it joins, runs an Experiment, and process 0 saves the Result. What the command line does, without a paper.
PROGRAM = """
import json, sys
import jax
given = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", given["devices"])
from paperjax import processes
processes.join(*given["where"], timeout=60, heartbeat=given["heartbeat"])
import paperjax as pj
from paperjax.interrupts import Preempted
from tests.test_processes import long_experiment
try:
    result = long_experiment(**given["fields"]).run()
except Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(75)
except (ValueError, processes.ProcessLost) as error:
    print(error, file=sys.stderr)
    processes.leave(2 if isinstance(error, ValueError) else 70)
if processes.first():
    pj.save(result, given["out"])
"""


def long_experiment(**fields):
    """Eight cells in each of two programs, a hundred measurements, minibatches, momentum and noise in the state."""
    usual = {"layout": None, "grid": pj.grid(width=[2, 3], lr=[0.05, 1e30, 0.3, 0.1], seed=2), "steps": 40, "measure_at": 20}
    return experiment(**{**usual, **fields})


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Together:
    """Processes started together, their logs in files."""

    def __init__(self, folder, n, devices, fields=({}, {}), heartbeat=HEARTBEAT, program=PROGRAM):
        port, self.out = free_port(), folder / "result.nc"
        self.logs = [folder / f"log-{i}" for i in range(n)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("XLA_FLAGS", None)
        self.all = []
        for i in range(n):
            where = [f"127.0.0.1:{port}", n, i] if n > 1 else [None, 1, None]
            given = {"where": where, "devices": devices, "fields": fields[i], "out": str(self.out), "heartbeat": heartbeat}
            with self.logs[i].open("wb") as log:
                line = [sys.executable, "-c", program, json.dumps(given)]
                self.all.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log))

    def wait(self, seconds=200):
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(1.0, until - time.monotonic())) for process in self.all]
        finally:
            for process in self.all:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def result(self):
        assert self.wait() == [0] * len(self.all), [log.read_text()[-3000:] for log in self.logs]
        return pj.load(self.out)


def saved(folder):
    return [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def until_saved(together, folder, n):
    end = time.monotonic() + 150
    while len(saved(folder)) < n and time.monotonic() < end:
        assert all(process.poll() is None for process in together.all), [log.read_text()[-3000:] for log in together.logs]
        time.sleep(0.01)
    assert len(saved(folder)) >= n


def folder_of(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


# Same numbers ----------------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path):
    few = {"steps": 4, "measure_at": 3, "layout": None}
    found = Together(tmp_path, 2, 1, [few | {"checkpoint": str(tmp_path / "saved")}] * 2).result()
    # Here compiled with few optimizations, there with all: float32 rounding over four steps.
    with np.errstate(over="ignore"):
        whole = long_experiment(**few).run()
    assert found.attrs["layout"].startswith("2 lanes")
    for name in whole.data_vars:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=1e-6)
    # What two processes saved, one reads.
    xr.testing.assert_equal(long_experiment(**few, checkpoint=str(tmp_path / "saved")).run(), found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By one process with four devices."""
    return Together(tmp_path_factory.mktemp("whole"), 1, 4).result()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_kill_9_of_one_the_other_ends_with_a_reason_and_a_restart_ends_with_the_same_bits(whole, tmp_path, victim):
    folder = tmp_path / "saved"
    fields = [{"checkpoint": str(folder), "save_every": 0}] * 2
    first = folder_of(tmp_path, "first")
    together = Together(first, 2, 2, fields)
    until_saved(together, folder, 2)
    together.all[victim].kill()
    began = time.monotonic()
    statuses = together.wait(90)
    assert time.monotonic() - began < 5 * HEARTBEAT
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] != 0
    log = together.logs[1 - victim].read_text()
    assert "a call of all processes failed" in log or "heartbeat" in log or "distributed service detected fatal errors" in log
    assert not together.out.exists()
    again = Together(folder_of(tmp_path, "again"), 2, 2, fields)
    xr.testing.assert_equal(again.result(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_of_one_saves_in_both_with_the_status_that_asks_for_a_restart(whole, tmp_path, victim):
    folder = tmp_path / "saved"
    quick = [{"checkpoint": str(folder), "save_every": 0}] * 2
    together = Together(folder_of(tmp_path, "first"), 2, 2, quick)
    until_saved(together, folder, 1)
    together.all[victim].terminate()
    assert together.wait() == [processes.RESUME] * 2, [log.read_text()[-3000:] for log in together.logs]
    assert "stopped, and saved in" in together.logs[0].read_text()
    xr.testing.assert_equal(Together(folder_of(tmp_path, "again"), 2, 2, quick).result(), whole)


@pytest.mark.slow
def test_saved_on_four_devices_it_goes_on_on_two_and_on_eight_and_in_two_processes(whole, tmp_path):
    folder = tmp_path / "saved"
    fields = {"checkpoint": str(folder), "save_every": 0}
    together = Together(folder_of(tmp_path, "four"), 1, 4, [fields])
    until_saved(together, folder, 2)
    together.all[0].terminate()
    assert together.wait() == [processes.RESUME]
    for name, (n, devices) in {"two": (1, 2), "eight": (1, 8), "processes": (2, 2), "many": (2, 4)}.items():
        shutil.copytree(folder, tmp_path / f"saved-{name}")
        here = {**fields, "checkpoint": str(tmp_path / f"saved-{name}"), "save_every": 1e6}
        found = Together(folder_of(tmp_path, name), n, devices, [here] * n)
        result = found.result()
        # Other lanes compile to other programs: float32 rounding over forty steps.
        for variable in whole.data_vars:
            np.testing.assert_allclose(result[variable], whole[variable], rtol=1e-3, atol=1e-5)
        if n * devices == 4:
            xr.testing.assert_equal(result, whole)
        assert f"{max(n * devices, 2)} lanes" in result.attrs["layout"]
        assert ("laid out on other lanes" in found.logs[0].read_text()) == (n * devices != 4)


# Meshes over processes ----------------------------------------------------------------------------------------------------

# The cell of every mesh here lies on devices of both processes, but in the last one: that is the default of a TPU slice, hosts by chips.
ACROSS = ("data=4", "model=4", "data=2,model=2", "data=2,model=2 fully", "sweep=2,data=2")
MESHES = PROGRAM[: PROGRAM.index("import paperjax")] + "from tests.test_processes import over_meshes\nover_meshes(given['out'])\n"


def over_meshes(out):
    """Losses on every mesh, those of a run that is killed and goes on, and of one that goes on on another mesh."""
    from tests.test_resume import KilledError, kill, stop_at_save
    from tests.test_sharding import experiment, losses

    def begin(run):
        with pytest.MonkeyPatch.context() as patch:
            stop_at_save(patch, 2, kill)
            with pytest.raises(KilledError):
                losses(run)

    folder, found = Path(out).parent, {}
    for text in ACROSS if processes.many() else ACROSS[:1]:
        rule = {"sharding": fully_sharded} if "fully" in text else {}
        found[text] = losses(experiment("mlp", mesh=parse_mesh(text.split()[0]), **rule)).tolist()
    for text, other in ((ACROSS[2], ACROSS[2]), (ACROSS[4], ACROSS[0])) if processes.many() else ():
        begun = experiment("mlp", mesh=parse_mesh(text), checkpoint=folder / text, save_every=0)
        begin(begun)
        found[f"{text} to {other}"] = losses(begun.replace(mesh=parse_mesh(other))).tolist()
    if processes.first():
        Path(out).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_meshes_go_across_processes(tmp_path):
    found = []
    for n in (1, 2):
        # Machines that are busy with other things are slow, not dead.
        together = Together(folder_of(tmp_path, str(n)), n, 4 // n, heartbeat=100, program=MESHES)
        assert together.wait(280) == [0] * n, [log.read_text()[-3000:] for log in together.logs]
        found.append(json.loads(together.out.read_text()))
    one, two = found
    assert len(two) == len(ACROSS) + 2
    for values in two.values():
        # Sums are added up in another order, over devices by gloo: float32 rounding over four steps of Adam.
        np.testing.assert_allclose(values, one["data=4"], rtol=1e-5)
    assert two["data=2,model=2 to data=2,model=2"] == two["data=2,model=2"]


def test_a_mesh_that_leaves_a_process_without_a_device_is_refused(monkeypatch):
    class Device:
        platform = device_kind = "cpu"

        def __init__(self, number):
            self.id, self.process_index = number, number // 2

    devices = np.array([Device(i) for i in range(4)], dtype=object)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [device.id for device in processes.own(list(devices))] == [0, 1]
    with pytest.raises(ValueError, match=r"the mesh has 2 devices, none of process 1 of 2.*--mesh sweep=2,data=-1"):
        processes.own(list(devices[:2]))
    whole = jax.sharding.Mesh(devices.reshape(2, 2, 1), AXES)
    with pytest.raises(ValueError, match=r"1 of the mesh's 2 lanes, which leaves process 1 without a device\. Use lanes=2"):
        first_rows(whole, 1)
    with pytest.raises(ValueError, match=r"layout has 4 lanes, and the mesh sweep=2"):
        first_rows(whole, 4)


# What does not fit -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_different_experiments_are_refused_in_all_processes_by_the_names_of_the_fields(tmp_path):
    together = Together(tmp_path, 2, 1, [{"steps": 4, "measure_at": 2}, {"steps": 5, "measure_at": 2}])
    assert together.wait() == [2, 2]
    for log in together.logs:
        assert "different Experiments: steps (process 0: 4, process 1: 5)" in log.read_text()


def test_fields_that_differ_are_named_and_shown_where_they_part(monkeypatch):
    others = [{"a": "1", "b": "x" * 200 + "y", "c": "0"}, {"a": "1", "b": "x" * 200 + "z", "d": "0"}]
    monkeypatch.setattr(processes, "texts", lambda text: [json.dumps(other) for other in others])
    with pytest.raises(
        ValueError, match=r"different Experiments: b \(process 0: \.\.\.x{20}y, process 1: \.\.\.x{20}z\); c \(.*absent\)"
    ) as e:
        processes.check_same({}, "Experiments")
    assert "a (" not in str(e.value)


def test_a_coordinator_that_is_not_there_is_a_message_in_time():
    began = time.monotonic()
    with pytest.raises(processes.Unreachable, match=r"127\.0\.0\.1:\d+ was not reached within 1 s .*Is process 0 running"):
        processes.join(f"127.0.0.1:{free_port()}", 2, 1, timeout=1)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("host:1", 2, None), "go together"),
        ((None, 2, None), "go together"),
        (("host:1", 2, 2), "--process-id 2 is not among 0 to 1"),
        (("host", 2, 1), "not of the form HOST:PORT"),
        (("host:99999", 2, 1), "not of the form HOST:PORT"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        processes.join(*given, timeout=1)


def test_the_command_line_says_that_the_coordinator_is_not_there(capsys):
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "1", "--timeout", "1"]
    assert main(["run", "gradient-descent", *where], PAPERS) == processes.UNREACHABLE
    assert "was not reached within 1 s" in capsys.readouterr().err


def test_lanes_are_shared_evenly_or_refused(monkeypatch):
    devices = [SimpleNamespace(process_index=i // 3, name=i) for i in range(6)]
    assert processes.evenly(devices, 2) == devices
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [d.name for d in processes.evenly(devices, 4)] == [0, 1, 3, 4]
    for lanes in (3, 8):
        with pytest.raises(ValueError, match=rf"{lanes} lanes cannot be shared evenly by 2 processes with 6 devices"):
            processes.evenly(devices, lanes)
    with pytest.raises(ValueError, match="cannot be shared"):
        processes.evenly(devices[:3], 2)


# The command line ----------------------------------------------------------------------------------------------------------


def command_line(*words):
    program = "import pathlib, sys; from paperjax.cli import main; sys.exit(main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen([sys.executable, "-c", program, str(PAPERS), *words], env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_launch_runs_a_paper_and_only_process_0_prints_and_writes_it(tmp_path):
    out = tmp_path / "out"
    line = ["launch", "--local", "2", "--devices-per-process", "2", "--", "run", "gradient-descent", "--out", str(out)]
    process = command_line(*line, "--checkpoint", str(tmp_path / "saved"))
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert printed.count("✓ verified (quick)") == 1
    assert sorted(p.name for p in out.iterdir()) == ["claims.json", "figure.png", "figure.svg", "logs", "report.html", "result.nc"]
    logs = {p.name: p.read_text() for p in (out / "logs").iterdir()}
    assert sorted(logs) == ["process-0.log", "process-1.log"]
    assert "process 1 of 2" in logs["process-1.log"]
    assert "✓ verified (quick)" in logs["process-0.log"]
    assert "verified" not in logs["process-1.log"]


@pytest.mark.slow
def test_sigterm_to_a_run_alone_saves_and_asks_to_be_started_again(tmp_path):
    folder = tmp_path / "saved"
    line = ["run", "gradient-descent", "--out", str(tmp_path / "out"), "--checkpoint", str(folder), "--save-every", "0"]
    process = command_line(*line, "--steps", "2000000")
    end = time.monotonic() + 100
    while not saved(folder / "true") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == processes.RESUME, errors
    assert "stopped, and saved in" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say after -- what to run"),
        (("--", "list"), "say after -- what to run"),
        (("--local", "0", "--", "run", "gradient-descent"), "--local 0: give a whole number"),
        (("--devices-per-process", "0", "--", "run", "gradient-descent"), "--devices-per-process 0: give"),
    ],
)
def test_launch_refuses_what_cannot_be_started(words, message, capsys):
    assert main(["launch", *words], PAPERS) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1"), True),
        (TimeoutError("Timed out while waiting for async_write_complete barrier."), False),
        (ValueError("the networks do not fit"), False),
        (None, False),
    ],
)
def test_which_errors_mean_that_another_process_is_gone(monkeypatch, error, expected):
    assert not processes.is_lost(error)
    monkeypatch.setattr(processes, "many", lambda: True)
    assert processes.is_lost(error) is expected
    outer = OSError("not written")
    outer.__cause__ = error
    assert processes.is_lost(outer) is expected
