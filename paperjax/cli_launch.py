"""``paperjax launch``: several processes of one run on this machine; and the options by which the processes of a run find each other."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from paperjax.processes import LOST, RESUME

# Runs main with the same papers, in a process of its own.
CHILD = "import pathlib, sys; from paperjax.cli import main; sys.exit(main(sys.argv[2:], pathlib.Path(sys.argv[1])))"


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How the processes of one run find each other; on a TPU, under SLURM and in GKE the environment says."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="(default: from the environment)")] = None
    """Process 0 of several that run this together."""
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: from the environment)")] = None
    """How many they are; 1 joins nothing."""
    process_id: Annotated[int | None, tyro.conf.arg(metavar="I", help_behavior_hint="(default: from the environment)")] = None
    """Which one this is, from 0."""
    timeout: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 300
    """For finding each other."""
    heartbeat: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 100
    """A process that is silent for so long is taken for dead, and the others end."""


@dataclasses.dataclass(frozen=True)
class LaunchCommand:
    """Run a paper in several processes on this machine, to try it out: paperjax launch --local 2 -- run SLUG ...

    Exits with the run's own status; with 75 if the state is saved and it asks to be started again, with 70 if a process was lost.
    """

    local: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Number of processes."""
    devices_per_process: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """CPU devices of each."""
    heartbeat: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 20
    """A process that is silent for so long is taken for dead, and the others end."""


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of ``launch ... -- WORDS`` both parts; of any other command line all, and nothing.

    Examples
    --------
    >>> split_words(["launch", "--local", "2", "--", "run", "a-paper"])
    (['launch', '--local', '2'], ['run', 'a-paper'])
    >>> split_words(["run", "a-paper"])
    (['run', 'a-paper'], [])
    """
    arguments = list(arguments)
    at = arguments.index("--") if arguments[:1] == ["launch"] and "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def launch(command: LaunchCommand, words: Sequence[str], papers_folder: Path) -> int:
    """Start the processes, wait for all of them, and return one exit status.

    Raises
    ------
    ValueError
        If there is nothing to run, or a number is below 1.
    """
    if not words or words[0] != "run":
        raise ValueError("launch: say after -- what to run: paperjax launch --local 2 -- run SLUG. `paperjax list` shows the papers.")
    for name in ("local", "devices_per_process", "heartbeat"):
        if getattr(command, name) < 1:
            raise ValueError(f"launch: --{name.replace('_', '-')} {getattr(command, name)}: give a whole number, at least 1.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(command.devices_per_process)}

    def start(process: int) -> "subprocess.Popen[bytes]":
        where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(command.local), "--process-id", str(process)]
        line = [sys.executable, "-c", CHILD, str(papers_folder), *words, *where, "--heartbeat", str(command.heartbeat)]
        return subprocess.Popen(line, env=environment)

    children = [start(process) for process in range(command.local)]

    def forward(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    # Ctrl-C on a terminal goes to all of its processes; what SIGTERM is sent to is this one only.
    before = signal.signal(signal.SIGTERM, forward), signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        statuses = _wait(children, 2 * command.heartbeat)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
        for child in children:
            if child.poll() is None:
                child.kill()
    for process, status in enumerate(statuses):
        if status < 0:
            print(f"process {process} was ended by {signal.Signals(-status).name}.", file=sys.stderr)
    return together(statuses)


def together(statuses: Sequence[int]) -> int:
    """One exit status for all: 70 if a process was lost, 75 if they saved, else the highest.

    Examples
    --------
    >>> together([0, 0]), together([1, 1]), together([75, 75]), together([70, -9])
    (0, 1, 75, 70)
    """
    if min(statuses) < 0 or LOST in statuses:
        return LOST
    return RESUME if RESUME in statuses else max(statuses)


def _wait(children: "Sequence[subprocess.Popen[bytes]]", grace: float) -> list[int]:
    broken = None
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        if broken is None and any(child.returncode not in (None, 0) for child in children):
            broken = time.monotonic()
        # They notice by themselves, and say why; if not, they are stopped.
        if broken is not None and time.monotonic() - broken > grace:
            for child in children:
                if child.poll() is None:
                    child.kill()
    return [child.wait() for child in children]
