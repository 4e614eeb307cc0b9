"""``worker_main.py``: joining first, then the command line, and an exit status for each way to end."""

import argparse
import concurrent.futures
import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from paperjax import processes


@pytest.fixture
def worker(modules, monkeypatch):
    """worker_main with a JAX and a command line that write down what is called, in order."""
    called = []
    jax, paperjax = ModuleType("jax"), ModuleType("paperjax")
    jax.distributed, jax.profiler, cli = ModuleType("distributed"), ModuleType("profiler"), ModuleType("cli")
    jax.distributed.initialize = lambda **given: called.append(("initialize", given))
    jax.profiler.start_server = lambda port: called.append(("profiler", port))
    cli.main = lambda words: called.append(("paperjax", words)) or 0
    paperjax.cli = cli
    for name, module in (("jax", jax), ("paperjax", paperjax), ("paperjax.cli", cli), ("paperjax.processes", processes)):
        monkeypatch.setitem(sys.modules, name, module)
    return modules.worker_main, called, jax, cli


def test_hosts_are_joined_before_anything_else(worker):
    worker_main, called, _, _ = worker
    assert worker_main.main(["--timeout", "60", "--profiler-port", "9012", "--", "run", "a-paper", "--mesh", "sweep=4,data=2"]) == 0
    assert called == [
        ("initialize", {"initialization_timeout": 60}),
        ("profiler", 9012),
        ("paperjax", ["run", "a-paper", "--mesh", "sweep=4,data=2"]),
    ]


def test_a_process_alone_joins_nobody(worker):
    worker_main, called, _, _ = worker
    assert worker_main.main(["--num-processes", "1", "--", "list"]) == 0
    assert called == [("paperjax", ["list"])]


def test_explicit_processes(worker):
    worker_main, called, _, _ = worker
    worker_main.main(["--coordinator", "h:1", "--num-processes", "2", "--process-id", "0", "--", "list"])
    assert called[0] == ("initialize", {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0, "initialization_timeout": 300})


@pytest.mark.parametrize("status", [0, 1, 2, 75, 130])
def test_the_command_lines_status_is_handed_on(worker, status):
    worker_main, _, _, cli = worker
    cli.main = lambda words: status
    assert worker_main.main(["--num-processes", "1", "--", "list"]) == status


def test_a_crash_is_told_apart_from_a_claim_that_fails(worker, capsys):
    worker_main, _, _, cli = worker

    def breaks(words):
        raise RuntimeError("a peer is gone")

    cli.main = breaks
    assert worker_main.main(["--num-processes", "1", "--", "list"]) == 70
    assert "a peer is gone" in capsys.readouterr().err


def test_a_cluster_that_is_not_found_is_said(worker, capsys):
    worker_main, called, jax, _ = worker

    def fails(**given):
        raise ValueError("coordinator_address should be defined.")

    jax.distributed.initialize = fails
    assert worker_main.main(["--", "list"]) == 69
    said = capsys.readouterr().err
    assert "coordinator_address should be defined." in said
    assert "--num-processes 1" in said
    assert not called


def test_a_coordinator_that_is_not_there_ends_in_time_with_its_name(worker, capsys):
    worker_main, called, _, _ = worker
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    assert worker_main.main(["--coordinator", address, "--num-processes", "2", "--process-id", "1", "--timeout", "1", "--", "list"]) == 69
    assert time.monotonic() - begin < 10
    said = capsys.readouterr().err
    assert f"{address} was not reached within 1 s (--timeout)" in said
    assert not called


@pytest.mark.parametrize("address", ["h", "h:", ":1", "h:port", "h:99999"])
def test_an_address_that_is_none_is_refused(worker, capsys, address):
    worker_main, called, _, _ = worker
    assert worker_main.main(["--coordinator", address, "--num-processes", "2", "--process-id", "1", "--timeout", "0", "--", "list"]) == 69
    assert f"--coordinator {address}" in capsys.readouterr().err
    assert not called


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to run"),
        (["--"], "nothing to run"),
        (["--coordinator", "h:1", "--", "list"], "go together"),
        (["--process-id", "0", "--", "list"], "go together"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2", "--", "list"], "--process-id 2 is not among 0 to 1"),
        (["--coordinator", "h:1", "--num-processes", "0", "--process-id", "0", "--", "list"], "--num-processes"),
        (["run", "a-paper"], "unrecognized arguments"),
    ],
)
def test_wrong_options_are_refused(modules, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        modules.worker_main.main([*options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_what_comes_after_the_dashes_is_not_read_here(modules):
    given, words = modules.worker_main.options(["--", "run", "a-paper", "--timeout", "1", "--", "x"])
    assert isinstance(given, argparse.Namespace)
    assert given.timeout == 300
    assert words == ["run", "a-paper", "--timeout", "1", "--", "x"]


@pytest.mark.slow
def test_two_processes_find_each_other_and_run(script):
    """The real JAX and the real command line; both processes list the papers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["--coordinator", address, "--num-processes", "2", "--timeout", "120"]

    def process(number):
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        return script("worker_main.py", *words, "--process-id", number, "--", "list", JAX_PLATFORMS="cpu", PYTHONPATH=path)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in pool.map(process, (0, 1)):
            assert done.returncode == 0, done.stderr
            assert "tp6-depth-mup" in done.stdout
