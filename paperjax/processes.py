"""Several processes that run one Experiment: how they join, what they must agree on, and who prints and writes.

Every process runs the same program on its own devices (JAX's multi-controller runtime), so whatever decides what comes next must be the
same in all of them: the Experiment, the number of steps of a call, whether to save, whether to stop.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

# Of sysexits.h: the others cannot be reached; one of them was lost; saved, and asks to be started again.
UNREACHABLE, LOST, RESUME = 69, 70, 75


class ProcessLost(RuntimeError):  # noqa: N818 It says what happened.
    """A call in which all processes take part has failed, most likely since one of them is gone."""


class Unreachable(RuntimeError):  # noqa: N818 As above.
    """The other processes were not found, or not in time."""


def environment(variables: Mapping[str, str]) -> str | None:
    """What in the environment says that there are other processes; ``None`` if nothing does.

    A Cloud TPU of many hosts says so by its metadata server only: there, ``tpu_scripts/worker_main.py`` joins them.

    Examples
    --------
    >>> environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    'SLURM'
    >>> environment({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"})
    'TPU'
    >>> environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    True
    """
    if {"SLURM_JOB_ID", "SLURM_PROCID"} <= set(variables):
        tasks = variables.get("SLURM_STEP_NUM_TASKS", variables.get("SLURM_NTASKS", "1"))
        return "SLURM" if tasks.isdecimal() and int(tasks) > 1 else None
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"
    return "GKE" if "MEGASCALE_COORDINATOR_ADDRESS" in variables else None


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    heartbeat: int = 100,
) -> bool:
    """Join the other processes with ``jax.distributed.initialize``, if there are any; before any use of a device.

    Parameters
    ----------
    coordinator, num_processes, process_id
        ``HOST:PORT`` of process 0, how many there are and which this is; all or none. Without them the `environment` says.
    timeout
        Seconds for finding each other.
    heartbeat
        Seconds after which a process that says nothing is taken for dead, and the others end.

    Returns
    -------
    bool
        Whether there are others.

    Raises
    ------
    ValueError
        If the three do not fit together.
    Unreachable
        If the others are not found in time; the message says what to look at.

    Examples
    --------
    >>> join(num_processes=1)
    False
    """
    given = (coordinator, num_processes, process_id)
    if num_processes == 1 or (given == (None, None, None) and environment(os.environ) is None):
        return jax.process_count() > 1 if jax.distributed.is_initialized() else False
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if None in given and given != (None, None, None):
        raise ValueError("--coordinator HOST:PORT, --num-processes N and --process-id I go together, or none of them.")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise ValueError(f"--process-id {process_id} is not among 0 to {num_processes - 1} (--num-processes {num_processes}).")
    if coordinator is not None and process_id != 0:
        reach(coordinator, timeout)
    which = "the processes" if process_id is None else f"process {process_id} of {num_processes}"
    print(
        f"{which}: joining, for at most {timeout} s. If JAX aborts here with DEADLINE_EXCEEDED, another process did not come: see the logs "
        "of all, and --timeout.",
        file=sys.stderr,
        flush=True,
    )
    found = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    try:
        jax.distributed.initialize(
            **{name: value for name, value in found.items() if value is not None},
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise Unreachable(
            f"the other processes were not joined ({str(error).splitlines()[0]}). Do all of them run, with the same --coordinator and "
            "--num-processes and each with its own --process-id? For one process alone give --num-processes 1."
        ) from error
    return jax.process_count() > 1


def reach(address: str, timeout: float) -> None:
    """Wait until something listens at ``HOST:PORT``: ``jax.distributed.initialize`` would abort the process without a word of ours.

    Raises
    ------
    ValueError
        The address is none.
    Unreachable
        Nothing listens there within `timeout` seconds.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"--coordinator {address} is not of the form HOST:PORT.")
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, end - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() >= end:
                raise Unreachable(
                    f"--coordinator {address} was not reached within {timeout:g} s (--timeout): {error}. Is process 0 running, is that its "
                    "address as seen from here, and does a firewall close its port?"
                ) from error
        time.sleep(min(0.5, max(0.0, end - time.monotonic())))


def lost(error: Exception) -> ProcessLost:
    """What to raise when a call of all processes fails."""
    cause = next((line for line in str(error).splitlines() if line), type(error).__name__)
    return ProcessLost(
        f"process {jax.process_index()} of {jax.process_count()}: a call of all processes failed ({cause}). Most likely another one has "
        "died: see the ends of the other logs. Start all of them again; with a checkpoint they go on from there."
    )


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that another process is gone; JAX raises some of these as ValueError.

    Examples
    --------
    >>> is_lost(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))  # Alone, there is nobody to lose.
    False
    """
    while many() and error is not None:
        if any(word in str(error) for word in ("Gloo", "CoordinationService", "heartbeat", "Connection closed by peer", "NCCL")):
            return True
        error = error.__cause__
    return False


def many() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


# What all agree on -------------------------------------------------------------------------------------------------------


def everyone(numbers: Sequence[int]) -> np.ndarray:
    """The numbers (int32) of every process, one row each; all must call it.

    Examples
    --------
    >>> everyone([3, 1]).tolist()
    [[3, 1]]
    """
    row = np.asarray(numbers, np.int32)
    return np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), len(row)) if many() else row[None]


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is set in any process."""
    return tuple(map(bool, everyone([int(flag) for flag in flags]).max(axis=0)))


def texts(text: str) -> list[str]:
    """The text of every process; all must call it."""
    if not many():
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = everyone([len(own)])[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]


def check_same(fields: Mapping[str, str], what: str) -> None:
    """Refuse processes whose fields differ.

    Raises
    ------
    ValueError
        In every process, naming the fields and the processes.
    """
    others = [json.loads(text) for text in texts(json.dumps(fields))]
    wrong = []
    for name in sorted(set().union(*others)):
        values = [other.get(name, "absent") for other in others]
        if len(set(values)) > 1:
            wrong.append(f"{name} ({', '.join(f'process {i}: {value}' for i, value in enumerate(_apart(values)))})")
    if wrong:
        raise ValueError(f"the processes have different {what}: {'; '.join(wrong)}. Start all with the same code and the same options.")


def _apart(values: Sequence[str], most: int = 80) -> list[str]:
    # Long descriptions begin alike: what is shown is where they part.
    same = next((i for i, letters in enumerate(zip(*values)) if len(set(letters)) > 1), min(map(len, values)))
    start = max(0, same - 20) if max(map(len, values)) > most else 0
    return [("..." if start else "") + value[start : start + most] + ("..." if len(value) > start + most else "") for value in values]


def preempted(turn: int) -> bool:
    """Whether SIGTERM came to any process and all are at the turn at which they can save together.

    All must call it once in each turn. Alone, a process has no such service, and this is false.
    """
    return many() and bool(multihost_utils.reached_preemption_sync_point(turn))


# Arrays over all processes -----------------------------------------------------------------------------------------------


def evenly(devices: Sequence[Any], lanes: int) -> list[Any]:
    """The first devices of each process, as many of each, `lanes` in all; alone, simply all devices.

    Raises
    ------
    ValueError
        If the processes cannot have equal shares.
    """
    owners = sorted({device.process_index for device in devices})
    if not many():
        return list(devices)
    share, rest = divmod(lanes, jax.process_count())
    own = [[device for device in devices if device.process_index == owner][:share] for owner in owners]
    if rest or len(owners) < jax.process_count() or min(map(len, own)) < share:
        raise ValueError(
            f"{lanes} lanes cannot be shared evenly by {jax.process_count()} processes with {len(devices)} devices: each must have its "
            f"share. Use lanes={len(devices)} (or a mesh of all devices), or another multiple of {jax.process_count()}."
        )
    return [device for each in own for device in each]


def own(devices: Sequence[Any]) -> list[Any]:
    """Those of the devices that are this process's.

    Raises
    ------
    ValueError
        In every process, if one of them has none.

    Examples
    --------
    >>> own(jax.devices()) == jax.devices()
    True
    """
    without = sorted(set(range(jax.process_count())) - {device.process_index for device in devices})
    if without:
        raise ValueError(
            f"the mesh has {len(devices)} devices, none of process {', '.join(map(str, without))} of {jax.process_count()}: each must have "
            f"its share. Give a mesh of all {jax.device_count()} devices, such as --mesh sweep={jax.process_count()},data=-1."
        )
    return [device for device in devices if device.process_index == jax.process_index()]


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Arrays that every process has on the host, as arrays over all processes; each copies only its own slices to its devices.

    `sharding` is one for all, or a tree of them.
    """

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        where = NamedSharding(sharding.mesh, PartitionSpec()) if 0 in host.shape else sharding
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree, jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, NamedSharding) else sharding)


def on_host(value: Any) -> np.ndarray:
    """All of an array, on the host of every process."""
    whole = not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated
    return np.asarray(value if whole else multihost_utils.process_allgather(value, tiled=True))


def local_devices(mesh: Mesh) -> int:
    """How many devices of the mesh are this process's."""
    return sum(device.process_index == jax.process_index() for device in mesh.devices.flat)


# Who prints --------------------------------------------------------------------------------------------------------------


class _Tee:
    # What is written goes to both; all else (isatty, encoding, fileno) is the first's.
    def __init__(self, stream: TextIO, file: TextIO):
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def log_to(folder: str | Path) -> Path:
    """From now on, write what this process prints to ``process-I.log`` in a folder; only process 0 prints it on the terminal too.

    In the others all output goes there, that of XLA and of a crash too.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path = Path(folder) / f"process-{jax.process_index()}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise OSError(f"the log {path} cannot be written ({error}). Name another folder with --out DIR.") from error
    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} process {jax.process_index()} of {jax.process_count()}\n")
    if first():
        sys.stdout, sys.stderr = _Tee(sys.stdout, file), _Tee(sys.stderr, file)  # pyright: ignore[reportAttributeAccessIssue]
        return path
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for fd in (1, 2):
        os.dup2(file.fileno(), fd)
    return path


def leave(status: int) -> NoReturn:
    """End this process at once: JAX's own way out waits for the others, who may wait for this one.

    The short pause lets the others say the same thing, if they have it to say.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    time.sleep(1.0)
    os._exit(status)
