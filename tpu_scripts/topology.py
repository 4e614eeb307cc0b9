#!/usr/bin/env python3
"""What an accelerator type is made of: hosts, chips, runtime version, GKE names, and a mesh to begin with.

The tables follow Google's pages, read on 2026-11-28:

- https://cloud.google.com/tpu/docs/v4, https://cloud.google.com/tpu/docs/types-topologies: ``AxBxC`` with each side at most 4 or a
  multiple of 4, at most 4,096 chips; the number in ``v4-N`` counts TensorCores, two a chip; by default the shape most like a cube.
- https://cloud.google.com/tpu/docs/v5e, https://cloud.google.com/tpu/docs/v6e: shapes 1x1 to 16x16, one TensorCore a chip, VMs with
  1, 4 or 8 chips; slices of more than 8 chips have VMs of 4. Those pages' "hosts" are machines of 8 chips: here a host is a VM, which
  is what a JAX process runs on.
- https://cloud.google.com/tpu/docs/v5p: 4 chips a VM, two TensorCores a chip, at most 6,144 chips in a slice.
- https://cloud.google.com/tpu/docs/tpu7x: at most 9,216 chips, 4 a VM, two TensorCores *and two JAX devices* a chip; "to use TPU7x, you
  must use Google Kubernetes Engine".
- https://cloud.google.com/tpu/docs/runtimes: runtime versions for JAX.

The VMs of each v5e, v6e and TPU7x shape and the machine types were compared with AI-Hypercomputer/xpk 1.16.0 and
GoogleCloudPlatform/applied-ai-engineering-samples. Which sizes a zone has in stock, only Google knows: ``--check`` asks.

    topology.py v5litepod-16            # a table
    topology.py v5litepod-16 --shell    # KEY=VALUE lines, for scripts
    topology.py v5litepod-16 --check --zone us-west4-a --project P [--dry-run]
"""

import argparse
import functools
import re
import shlex
import subprocess
import sys
from typing import NamedTuple


class Generation(NamedTuple):
    """What all sizes of a TPU generation share."""

    name: str
    prefix: str
    cores_per_chip: int
    devices_per_chip: int
    runtime_version: str
    gke_accelerator: str
    machine: str
    cubes: int


# `cubes`: the largest slice in cubes of 4x4x4 chips; 0 for the flat generations.
GENERATIONS = (
    Generation("v4", "v4", 2, 1, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu", 64),
    Generation("v5e", "v5litepod", 1, 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu", 0),
    Generation("v5p", "v5p", 2, 1, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu", 96),
    Generation("v6e", "v6e", 1, 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard", 0),
    Generation("TPU7x", "tpu7x", 2, 2, "", "tpu7x", "tpu7x-standard", 144),
)
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
BELOW_A_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}
CUBE, LONGEST = 64, 64  # chips in a cube; the most cubes in a row


class Topology(NamedTuple):
    """One accelerator type; ``mesh`` is what ``paperjax run --mesh`` begins with."""

    accelerator_type: str
    generation: str
    chips: int
    hosts: int
    chips_per_host: int
    devices: int
    shape: str
    runtime_version: str
    machine_type: str
    gke_accelerator: str
    gke_only: bool
    mesh: str


def topology(accelerator_type: str) -> Topology:
    """Look up an accelerator type.

    Parameters
    ----------
    accelerator_type
        Google's name, such as ``v4-8``, ``v5litepod-16``, ``v5p-128``, ``v6e-8`` or ``tpu7x-8``. The number counts chips for v5e and
        v6e, and TensorCores, of which there are two a chip, for v4, v5p and TPU7x.

    Returns
    -------
    Topology
        Grid cells spread over hosts, which then need not talk to each other, and the batch over the chips of a host.

    Raises
    ------
    ValueError
        There is no such generation, or no slice of that size; the message names the nearest ones.

    Examples
    --------
    >>> found = topology("v5p-128")
    >>> found.hosts, found.chips_per_host, found.shape, found.mesh
    (16, 4, '4x4x4', 'sweep=16,data=4')
    >>> topology("v5litepod-12")
    Traceback (most recent call last):
    ValueError: v5litepod-12: a v5e slice has no 12 chips. Nearest: v5litepod-8 (8 chips), v5litepod-16 (16 chips).
    """
    match = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", accelerator_type)
    generation = match and next((each for each in GENERATIONS if each.prefix == match[1]), None)
    if not match or not generation:
        raise ValueError(f"{accelerator_type!r} is no accelerator type that is known here. {_meant(accelerator_type)}")
    size = int(match[2])
    shapes = _shapes(generation.cubes)
    chips, odd = divmod(size, generation.cores_per_chip)
    if odd or chips not in shapes:
        raise ValueError(f"{accelerator_type}: {_impossible(generation, size, sorted(shapes))}")
    chips_per_host = chips if generation.cubes == 0 and chips <= 8 else 4
    hosts = chips // chips_per_host
    return Topology(
        accelerator_type,
        generation.name,
        chips,
        hosts,
        chips_per_host,
        chips * generation.devices_per_chip,
        shapes[chips],
        generation.runtime_version,
        f"{generation.machine}-{chips_per_host}t",
        generation.gke_accelerator,
        not generation.runtime_version,
        f"sweep={hosts},data={chips_per_host * generation.devices_per_chip}",
    )


@functools.cache
def _shapes(cubes: int) -> dict[int, str]:
    if cubes == 0:
        return FLAT
    boxes = {CUBE * n: box for n in range(1, cubes + 1) if (box := _box(n))}
    return BELOW_A_CUBE | boxes


def _box(cubes: int) -> str | None:
    # The box of so many cubes that is most like a cube: the smallest sum of sides.
    boxes = [
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1)
        for b in range(a, cubes // a + 1)
        if cubes % (a * b) == 0 and b <= cubes // (a * b) <= LONGEST
    ]
    return "x".join(str(4 * side) for side in min(boxes, key=sum)) if boxes else None


def _impossible(generation: Generation, size: int, possible: list[int]) -> str:
    unit = generation.cores_per_chip
    near = [max((c for c in possible if c * unit < size), default=None), min((c for c in possible if c * unit > size), default=None)]
    names = ", ".join(f"{generation.prefix}-{c * unit} ({c} chips)" for c in near if c)
    what = f"{size} chips" if unit == 1 else f"{size} TensorCores (which is what its number counts, {unit} a chip)"
    return f"a {generation.name} slice has no {what}. Nearest: {names}."


def _meant(accelerator_type: str) -> str:
    aliases = {"v5e": "v5litepod", "v5lite": "v5litepod", "v7x": "tpu7x", "v7": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
    word, _, size = accelerator_type.lower().partition("-")
    prefix = aliases.get(word, word)
    if size.isdecimal() and any(each.prefix == prefix for each in GENERATIONS):
        return f"Did you mean {prefix}-{size}?"
    return "Known: " + ", ".join(f"{each.prefix}-N ({each.name})" for each in GENERATIONS) + "; https://cloud.google.com/tpu/docs/runtimes."


def shell(found: Topology) -> str:
    """The fields as ``KEY=VALUE`` lines; a truth is ``yes`` or ``no``.

    Examples
    --------
    >>> shell(topology("v6e-4")).splitlines()[2:5]
    ['TOPOLOGY_CHIPS=4', 'TOPOLOGY_HOSTS=1', 'TOPOLOGY_CHIPS_PER_HOST=4']
    """
    words = {True: "yes", False: "no"}
    return "\n".join(
        f"TOPOLOGY_{name.upper()}={words[value] if isinstance(value, bool) else value}" for name, value in found._asdict().items()
    )


def check_command(found: Topology, zone: str, project: str) -> list[str]:
    """The command that asks Google whether a zone has this type."""
    command = ["gcloud", "compute", "tpus", "accelerator-types", "describe", found.accelerator_type]
    return [*command, f"--zone={zone}", f"--project={project}", "--quiet"]


def main(arguments: list[str] | None = None) -> int:
    """Print a topology; exit with 2 if there is none such."""
    parser = argparse.ArgumentParser(description="What an accelerator type is made of.")
    parser.add_argument("accelerator_type", help="such as v4-8, v5litepod-16, v5p-128, v6e-8, tpu7x-8")
    parser.add_argument("--shell", action="store_true", help="print KEY=VALUE lines")
    parser.add_argument("--check", action="store_true", help="ask Google whether --zone has this type")
    parser.add_argument("--zone", default="", help="for --check")
    parser.add_argument("--project", default="", help="for --check")
    parser.add_argument("--dry-run", action="store_true", help="print the command of --check, and run nothing")
    given = parser.parse_args(arguments)
    try:
        found = topology(given.accelerator_type)
    except ValueError as error:
        print(f"topology.py: {error}", file=sys.stderr)
        return 2
    if not given.check:
        print(shell(found) if given.shell else "\n".join(f"{name:18}{value}" for name, value in found._asdict().items()))
        return 0
    if found.gke_only or not (given.zone and given.project):
        why = f"{found.generation} is not a type of the Cloud TPU API" if found.gke_only else "--check needs --zone and --project"
        print(f"topology.py: {why}.", file=sys.stderr)
        return 2
    command = check_command(found, given.zone, given.project)
    if given.dry_run:
        print(shlex.join(command))
        return 0
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
