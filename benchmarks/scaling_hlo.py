"""Collectives and products of one step of training, read off the text of a compiled program.

The text is XLA's own (``compiled.as_text()``): computations of one instruction a line, calling each other. A step is the body of the loop
whose length only the call knows; loops inside it run as often as ``known_trip_count`` says, and of the branches of a conditional the one
that moves most is counted.
"""

import itertools
import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Others that move data between devices, and would go uncounted.
UNKNOWN = ("ragged-all-to-all", "collective-broadcast", "send", "recv")
BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4}
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Program(NamedTuple):
    """Computations by name, and the one that is called from outside."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Collective(NamedTuple):
    """One instruction that talks to other devices.

    Attributes
    ----------
    kind
        One of `KINDS`.
    axes
        Axes of the mesh along which those that talk to each other differ.
    size
        How many of them there are, k.
    bytes
        Of the whole array, N: what one device has of it before an all-reduce, after an all-gather, before a reduce-scatter; what one
        device gives away in an all-to-all or a permutation.
    times
        How often a step runs it.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    bytes: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step: 2 N (k - 1) / k around a ring for an all-reduce, N for a permutation, else N (k - 1) / k."""
        share = (self.size - 1) / self.size
        return self.times * self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def parse(text: str) -> Program:
    """The computations of a compiled program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        # A computation begins in the first column, its instructions do not.
        begins = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if begins:
            body = computations[begins[2]] = {}
            entry = begins[2] if begins[1] else entry
        elif body is not None and " = " in line:
            made = _instruction(line)
            body[made.name] = made
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program (compiled.as_text()).")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    left, right = line.strip().removeprefix("ROOT ").split(" = ", 1)
    shape, rest = (right[: _closed(right, 0)], right[_closed(right, 0) :]) if right[0] == "(" else right.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    ends = _closed("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[: ends - 1])) if "%" in rest[: ends - 1] else _bare(rest[: ends - 1])
    return Instruction(left.removeprefix("%"), shape, opcode, operands, rest[ends:])


def _bare(operands: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?:^|[ ,])([A-Za-z_][\w.\-]*)(?=,|$)", operands))


def _closed(text: str, begins: int) -> int:
    """Where the bracket that opens at `begins` has closed."""
    depth = 0
    for at in range(begins, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError(f"a bracket that does not close: {text[:80]}")


def bytes_of(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple.

    Examples
    --------
    >>> bytes_of("(f32[8,32]{1,0}, bf16[4], pred[])")
    1033
    """
    return sum(math.ceil(_bits(kind) * math.prod(dimensions(f"[{sizes}]")) / 8) for kind, sizes in SHAPE.findall(shape))


def _bits(kind: str) -> int:
    found = re.match(r"(?:bf|[fsuc])(\d+)", kind)
    if kind not in BITS and not found:
        raise ValueError(f"a number of type {kind!r}: how many bits has it?")
    return BITS[kind] if kind in BITS else int(found[1])  # pyright: ignore[reportOptionalSubscript]


def dimensions(shape: str) -> tuple[int, ...]:
    """Sizes of the axes of an array."""
    found = re.search(r"\[([\d,<=]*)\]", shape)
    return tuple(int(size.removeprefix("<=")) for size in found[1].split(",") if size) if found else ()


def step_body(program: Program) -> str:
    """The computation that is one step: the body of the one loop, outside all others of its kind, whose length is not known.

    Raises
    ------
    ValueError
        If there is none or more than one.
    """
    found: list[str] = []

    def look(name: str) -> None:
        for made in program.computations[name].values():
            if made.opcode == "while" and _trips(made) is None:
                found.append(_called(made, "body")[0])
            else:
                for other in _inside(made):
                    look(other)

    look(program.entry)
    if len(found) != 1:
        raise ValueError(f"{len(found)} loops of unknown length, of which one should be the training's: {', '.join(found) or 'none'}.")
    return found[0]


def collectives(program: Program, name: str, mesh: dict[str, int], times: int = 1) -> list[Collective]:
    """Of a computation and all that it calls.

    Parameters
    ----------
    program
        From `parse`.
    name
        Of the computation, as from `step_body`.
    mesh
        Sizes of the axes; device i of the program is the i-th of the mesh, row by row.
    times
        How often it is run.

    Raises
    ------
    ValueError
        If a loop's length is not known, groups of devices are written otherwise than known here, or data are moved in another way.
    """
    found: list[Collective] = []
    for made in program.computations[name].values():
        kind = made.opcode.removesuffix("-start")
        if kind in KINDS:
            found.append(_collective(program.computations[name], made, kind, mesh, times))
        elif kind in UNKNOWN:
            raise ValueError(f"{name} has a {made.opcode}, which is not counted here.")
        elif made.opcode == "conditional":
            branches = [collectives(program, branch, mesh, times) for branch in _inside(made)]
            found += max(branches, key=lambda branch: sum(one.sent for one in branch))
        else:
            for other in _inside(made):
                found += collectives(program, other, mesh, times * _turns(made))
    return found


def product_flops(program: Program, name: str) -> float:
    """Operations of the matrix products of a computation and all that it calls, 2 m n k each, on one device."""
    total = 0.0
    for made in program.computations[name].values():
        if made.opcode == "dot":
            left = dimensions(program.computations[name][made.operands[0]].shape)
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", made.attributes)
            total += 2.0 * math.prod(dimensions(made.shape)) * math.prod(left[int(i)] for i in summed[1].split(",") if i) if summed else 0.0
        elif made.opcode in ("convolution", "custom-call") and "callback" not in made.attributes:
            if made.opcode == "convolution" or re.search(r"matmul|gemm|dot", made.attributes.split("metadata=")[0]):
                raise ValueError(f"{made.name} of {name} is a product written as {made.opcode}, which is not counted here.")
        elif made.opcode == "conditional":
            total += max(product_flops(program, branch) for branch in _inside(made))
        for other in () if made.opcode == "conditional" else _inside(made):
            total += _turns(made) * product_flops(program, other)
    return total


def _collective(body: dict[str, Instruction], made: Instruction, kind: str, mesh: dict[str, int], times: int) -> Collective:
    given = sum(bytes_of(body[name].shape) for name in made.operands)
    devices = math.prod(mesh.values())
    if kind == "collective-permute":
        written = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", made.attributes)
        pairs = re.findall(r"(\d+),(\d+)", written[1] if written else "")
        groups = [(int(here), int(there)) for here, there in pairs if here != there]
    else:
        groups = replica_groups(made.attributes, devices)
    sizes = {len(group) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"{made.name}: groups of {sorted(sizes)} devices, which no axis of a mesh makes.")
    size = sizes.pop() if sizes else 1
    return Collective(kind, axes_of(groups, mesh), size, given * size if kind == "all-gather" else given, times)


def replica_groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices that a collective joins, however they are written.

    As a list, ``{{0,1},{2,3}}`` (``{}`` is all); as an array of all devices with its axes moved, ``[2,4]<=[2,2,2]T(0,2,1)``; or by the
    axes of a mesh, ``mesh['a'=2,'b'=4] {'b'}``, whose devices may be such an array themselves.

    Examples
    --------
    >>> replica_groups("replica_groups=[4,2]<=[2,2,2]T(0,2,1), to_apply=%add", 8)
    [(0, 2), (1, 3), (4, 6), (5, 7)]
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=4] {'a'}", 8)
    [(0, 4), (1, 5), (2, 6), (3, 7)]
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 8)
    [(0, 1), (2, 3), (4, 5), (6, 7)]
    """
    written = attributes.split("replica_groups=", 1)[1]
    if listed := re.match(r"\{((?:\{[\d,]*\},?)*)\}", written):
        groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [tuple(range(devices))]
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", written):
        shape, of = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else tuple(range(len(of)))
        return _grouped(_moved(of, order), math.prod(shape[1:]))
    if named := re.match(r"mesh\[((?:'[^']+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'[^']+',?)*)\}", written):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        joined, names = re.findall(r"'([^']+)'", named[4]), list(sizes)
        order = (*(i for i, name in enumerate(names) if name not in joined), *(names.index(name) for name in joined))
        of = _numbers(named[2]) if named[2] else (devices,)
        laid = _moved(of, _numbers(named[3]) if named[3] else tuple(range(len(of))))
        return _grouped([laid[at] for at in _moved(tuple(sizes.values()), order)], math.prod(sizes[name] for name in joined))
    raise ValueError(f"groups of devices are written in a way that is not known here: replica_groups={written[:80]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _moved(shape: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """0, 1, 2, ... in an array of this shape, read off with its axes in that order."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return [sum(strides[i] * at for i, at in zip(order, where)) for where in itertools.product(*(range(shape[i]) for i in order))]


def _grouped(devices: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(devices[i : i + size]) for i in range(0, len(devices), size)]


def axes_of(groups: list[tuple[int, ...]], mesh: dict[str, int]) -> tuple[str, ...]:
    """Axes of a mesh along which some group's devices differ.

    Examples
    --------
    >>> axes_of([(0, 1), (2, 3)], {"data": 2, "model": 2})
    ('model',)
    """
    strides = {name: math.prod(list(mesh.values())[i + 1 :]) for i, name in enumerate(mesh)}

    def differ(group: tuple[int, ...], name: str) -> bool:
        return len({device // strides[name] % mesh[name] for device in group}) > 1

    return tuple(name for name in mesh if any(differ(group, name) for group in groups))


def _trips(made: Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', made.attributes)
    return int(found[1]) if found else None


def _turns(made: Instruction) -> int:
    if made.opcode != "while":
        return 1
    trips = _trips(made)
    if trips is None:
        raise ValueError(f"the loop {made.name} is as long as only a run knows, and what it does cannot be counted.")
    return trips


def _called(made: Instruction, *attributes: str) -> list[str]:
    found = []
    for name in attributes:
        for one, several in re.findall(rf"\b{name}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", made.attributes):
            found += [one] if one else [each.strip().removeprefix("%") for each in several.split(",")]
    return found


def _inside(made: Instruction) -> list[str]:
    """Computations that an instruction runs; what a reduction or a sort does to two numbers is not looked into."""
    if made.opcode in ("call", "fusion", "async-start"):
        return _called(made, "calls", "to_apply")
    if made.opcode == "conditional":
        return _called(made, "branch_computations", "true_computation", "false_computation")
    return _called(made, "body") if made.opcode == "while" else []
