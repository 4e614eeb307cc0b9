#!/usr/bin/env python3
"""What every host runs: joins the other hosts, then the command line of PaperJAX.

    worker_main.py [options] -- run SLUG --mesh sweep=4,data=4

On a TPU, under SLURM and in GKE the other processes are found from the environment; elsewhere ``--coordinator``, ``--num-processes`` and
``--process-id`` say where they are, and ``--num-processes 1`` that there are none. What comes after ``--`` is the business of `paperjax`,
and so is the exit status, but for two of them: 70 if it breaks with an exception, and 69 if the others cannot be reached.
"""

import argparse
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

# Of sysexits.h. The command line's own are 0, 1, 2, the status that asks to be started again, and 130.
UNREACHABLE, BROKEN = 69, 70


def options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the options of this script and the words for ``paperjax``.

    Examples
    --------
    >>> given, words = options(["--timeout", "60", "--", "run", "intrinsic-dimension"])
    >>> given.timeout, words
    (60, ['run', 'intrinsic-dimension'])
    """
    parser = argparse.ArgumentParser(description="Join the other hosts, then run PaperJAX.", usage="%(prog)s [options] -- run SLUG ...")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="process 0; by default from the environment")
    parser.add_argument("--num-processes", type=int, metavar="N", help="by default from the environment; 1 joins nothing")
    parser.add_argument("--process-id", type=int, metavar="I", help="by default from the environment")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="for finding each other")
    parser.add_argument("--profiler-port", type=int, default=0, metavar="PORT", help="of jax.profiler in this process; 0: none")
    parser.add_argument("--dry-run", action="store_true", help="print what would be called, and call nothing")
    separator = list(arguments).index("--") if "--" in arguments else len(arguments)
    given, words = parser.parse_args(arguments[:separator]), list(arguments[separator + 1 :])
    if not words:
        parser.error("nothing to run: what comes after -- is for paperjax, such as -- run intrinsic-dimension")
    explicit = (given.coordinator, given.num_processes, given.process_id)
    if given.num_processes != 1 and None in explicit and any(each is not None for each in explicit):
        parser.error("--coordinator, --num-processes and --process-id go together, or none of them (or --num-processes 1 alone)")
    if given.num_processes is not None and not 0 <= (given.process_id or 0) < given.num_processes:
        parser.error(f"--process-id {given.process_id} is not among 0 to {given.num_processes - 1} (--num-processes)")
    return given, words


def cluster(given: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of ``jax.distributed.initialize``, or ``None`` for a process alone.

    Examples
    --------
    >>> cluster(options(["--num-processes", "1", "--", "list"])[0]) is None
    True
    >>> cluster(options(["--", "list"])[0])
    {'initialization_timeout': 300}
    """
    if given.num_processes == 1:
        return None
    found = {"coordinator_address": given.coordinator, "num_processes": given.num_processes, "process_id": given.process_id}
    return {name: value for name, value in found.items() if value is not None} | {"initialization_timeout": given.timeout}


def join(given: argparse.Namespace) -> None:
    """Call ``jax.distributed.initialize``; it must come before any use of a device.

    Raises
    ------
    RuntimeError
        The other processes are not found, or not in time; the message says what to look at.
    ValueError
        The coordinator's address is none.
    """
    import jax

    from paperjax.processes import reach

    arguments = cluster(given)
    if arguments is None:
        return
    # jax.distributed.initialize aborts the process without a word of ours if nobody listens there.
    if given.coordinator and given.process_id != 0:
        reach(given.coordinator, given.timeout)
    print(
        f"worker_main.py: joining the other processes, for at most {given.timeout} s. If JAX aborts here with DEADLINE_EXCEEDED, one of "
        "them did not come: see the logs of all (logs.sh --worker all), and --timeout.",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise RuntimeError(
            f"no cluster is found in the environment ({error}). Off a TPU, SLURM or GKE give --coordinator, --num-processes and "
            "--process-id; for one process alone give --num-processes 1."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Join, then run; returns the exit status."""
    given, words = options(sys.argv[1:] if arguments is None else arguments)
    if given.dry_run:
        called = cluster(given)
        if called is not None:
            print(f"jax.distributed.initialize({', '.join(f'{name}={value!r}' for name, value in called.items())})")
        if given.profiler_port:
            print(f"jax.profiler.start_server({given.profiler_port})")
        print(shlex.join(["paperjax", *words]))
        return 0
    try:
        join(given)
    except (RuntimeError, ValueError) as error:
        print(f"worker_main.py: {error}", file=sys.stderr)
        return UNREACHABLE
    import jax

    if given.profiler_port:
        jax.profiler.start_server(given.profiler_port)
    from paperjax import cli

    try:
        return cli.main(words)
    except Exception:  # noqa: BLE001 Whatever it is, it is told apart from a claim that fails, whose status is Python's for exceptions.
        traceback.print_exc()
        return BROKEN


if __name__ == "__main__":
    sys.exit(main())
