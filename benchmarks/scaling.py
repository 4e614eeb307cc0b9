"""Scaling on paper: collectives and products of one training step, counted in the compiled program, and what they predict for two machines.

    python benchmarks/scaling.py                # prints the tables: under ten minutes on two cores; nothing is trained
    python benchmarks/scaling.py --write        # writes them to benchmarks/scaling.md
    python benchmarks/scaling.py --small        # toy sizes on 8 devices

An Experiment with a mesh of 8 and of 256 CPU devices, which JAX is told to pretend, is compiled as `Experiment.run` compiles it, up to the
program that takes the steps, which is read (see `scaling_hlo.py`) and never run. Counts of which a closed form is known are
compared with it, and the run ends with an error where they differ. Predictions are arithmetic on the counts and the makers' numbers.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import scaling_hlo as hlo

SIZES = {
    "mlp": {"width": 4096, "depth": 4, "features": 128, "outputs": 16, "examples": 2048},
    "transformer": {"width": 2048, "depth": 4, "heads": 16, "vocab": 8192, "time": 512, "examples": 512},
}
SMALL = {
    "mlp": {"width": 64, "depth": 3, "features": 8, "outputs": 8, "examples": 64},
    "transformer": {"width": 32, "depth": 2, "heads": 8, "vocab": 16, "time": 16, "examples": 64},
}
TENSOR, FULLY = "tensor_parallel", "fully_sharded"
# Mesh (sweep, data, model) and rule. Without a model axis tensor_parallel leaves every leaf whole: plain data parallelism.
MESHES = {
    8: [
        ((8, 1, 1), TENSOR), ((1, 8, 1), TENSOR), ((1, 8, 1), FULLY), ((1, 1, 8), TENSOR),
        ((1, 2, 4), TENSOR), ((1, 2, 4), FULLY), ((2, 4, 1), TENSOR), ((2, 1, 4), TENSOR), ((2, 2, 2), TENSOR),
    ],
    256: [
        ((256, 1, 1), TENSOR), ((16, 16, 1), TENSOR), ((1, 256, 1), TENSOR), ((1, 256, 1), FULLY),
        ((16, 1, 16), TENSOR), ((1, 16, 16), TENSOR), ((1, 16, 16), FULLY),
    ],
}  # fmt: skip
AXES: tuple[str, ...] = ("sweep", "data", "model")
ITEM = 4  # float32


class Chip(NamedTuple):
    """A machine: chips, and for one chip operations and bytes of memory a second, bytes of memory, and ``link(k)``.

    ``link(k)`` is what a chip sends in a second to others of a group of k.
    """

    name: str
    chips: int
    flops: float
    memory: float
    held: float
    link: Any
    sources: str


def v5e_link(k: int) -> float:
    """4 links of 50 GB/s each way on a torus of 16 x 16: a group of 256 uses all, a ring of 16 two, a shorter line is as slow as one."""
    return 50e9 * (4 if k == 256 else 2 if k >= 16 else 1)


MACHINES = (
    Chip(
        "TPU v5e, 256 chips",
        256,
        197e12,
        819e9,
        16e9,
        v5e_link,
        """197 TFLOP/s bfloat16, 16 GB at 819 GB/s, ICI 400 GB/s a chip, both directions together (1,600 Gbit/s in older versions),
over 4 ports, pods of 256 as a 2D torus: Google Cloud documentation, "TPU v5e", tables of chip and pod (looked up November 2026; the page is
undated). So 50 GB/s a port and direction, 4 of them for a group of 256, 2 for one of 16 to 255 (a ring), 1 for fewer (a line). "How to
Scale Your Model" (Google DeepMind, part "TPUs", February 2025; looked up) has 45 GB/s, and wraps axes of 16 only.""",
    ),
    Chip(
        "8 x H200",
        8,
        989e12,
        4.8e12,
        141e9,
        lambda k: 450e9,
        """NVLink 900 GB/s, both directions together, and 141 GB HBM3e: NVIDIA's description of the system "H200-SXM-141GBx8" in MLCommons'
Inference v4.1 results (2024; looked up). 4.8 TB/s: NVIDIA's announcement in TensorRT-LLM, docs/source/blogs/H200launch.md (2023; looked
up). 989 TFLOP/s bfloat16 without sparsity: half the 1,979 with it, as NVIDIA's NeMo-RL has it for "NVIDIA H200"
(tests/unit/utils/test_flops_tracker.py, 2025; looked up); NVIDIA's data sheet itself was not at hand. So 450 GB/s each way to any of 8
through the switch.""",
    ),
)


class Row(NamedTuple):
    """What was counted for a network on a mesh: per device and step."""

    network: str
    mesh: tuple[int, int, int]
    rule: str
    flops: float
    found: list[hlo.Collective]
    state: int
    temporary: int

    @property
    def chips(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh)

    @property
    def where(self) -> str:
        """The mesh and the rule, in words."""
        shape = " × ".join(f"{name} {size}" for name, size in zip(AXES, self.mesh) if size > 1) or "one device"
        return f"{shape}, {'replicated' if self.rule == TENSOR and self.mesh[2] == 1 else self.rule}"

    def bytes(self, kind: str, *axes: str) -> int:
        """Of whole arrays that go through one kind of collective, over these axes of the mesh or any."""
        return sum(one.bytes * one.times for one in self.found if one.kind == kind and (not axes or one.axes == axes))

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(one.sent for one in self.found)


class Caught(Exception):
    """The program of the steps, on its way."""


class Later(NamedTuple):
    """Compiled when asked for."""

    result: Any


class Pool:
    """In the place of a pool of threads: of three programs only the one that is asked for is compiled."""

    def submit(self, fn: Any) -> Later:
        """Nothing yet."""
        return Later(fn)


def experiment(network: str, sizes: dict[str, int], mesh: Any, rule: str) -> Any:
    """A muP network under Adam with the whole set as batch, one cell for each share of ``sweep``."""
    import numpy as np
    import optax

    import paperjax as pj
    from paperjax import sharding

    rng, n = np.random.default_rng(0), sizes["examples"]
    if network == "mlp":
        x, y = rng.normal(size=(n, sizes["features"])).astype(np.float32), rng.integers(0, sizes["outputs"], n).astype(np.int32)

        def family(width):
            return pj.models.mlp(width, depth=sizes["depth"], outputs=sizes["outputs"])
    else:
        x, y = rng.integers(0, sizes["vocab"], (2, n, sizes["time"])).astype(np.int32)

        def family(width):
            return pj.models.transformer(width, depth=sizes["depth"], heads=sizes["heads"], vocab=sizes["vocab"], attention_exponent=1.0)

    cells = mesh.shape["sweep"]
    return pj.Experiment(
        family, pj.data.Dataset(x, y, x[:1], y[:1]), loss="cross_entropy", optimizer=optax.adam, parametrization=pj.mup,
        base={"width": sizes["width"] // 4}, grid=pj.grid(width=[sizes["width"]], lr=[1e-3], seed=cells), steps=1, measure_at=1,
        mesh=mesh, sharding=getattr(sharding, rule), layout=pj.Layout(cells, 1, 1),
    )  # fmt: skip


def steps_program(made: Any) -> Any:
    """What an Experiment compiles for its steps, as its driver asks for it; the Experiment goes no further."""
    from paperjax import driver

    original = driver.compile_cells

    def caught(functions, layout, mesh, axes, data, pool, place=None, alike=False, trains=True):
        raise Caught(original(functions, layout, mesh, axes, data, Pool(), place, alike, trains).advance)  # pyright: ignore[reportArgumentType]

    with mock.patch.object(driver, "compile_cells", caught):
        try:
            made.run(progress=False)
        except Caught as program:
            return program.args[0].result()
    raise RuntimeError("the Experiment ended without compiling its steps.")


def count(network: str, sizes: dict[str, int], shape: tuple[int, int, int], rule: str) -> Row:
    """Compile and read."""
    import paperjax as pj

    mesh = pj.mesh(sweep=shape[0], data=shape[1], model=shape[2])
    compiled = steps_program(experiment(network, sizes, mesh, rule))
    program, memory = hlo.parse(compiled.as_text()), compiled.memory_analysis()
    step = hlo.step_body(program)
    found = hlo.collectives(program, step, dict(zip(AXES, shape)))
    return Row(network, shape, rule, hlo.product_flops(program, step), found, memory.alias_size_in_bytes, memory.temp_size_in_bytes)


def leaves(network: str, sizes: dict[str, int], shape: tuple[int, int, int], rule: str) -> dict[str, tuple[int, int]]:
    """Entries of every leaf by its path, and parts that the rule divides it into."""
    import paperjax as pj
    from paperjax import sharding

    made = experiment(network, sizes, pj.mesh(), rule)
    model, axes = made.family(sizes["width"]), dict(zip(AXES, shape))
    found = {}
    for leaf in sharding.uses_of(model, made.data.x_train):
        spec = list[Any](getattr(sharding, rule)(leaf, axes))
        names = [name for part in spec if part for name in ((part,) if isinstance(part, str) else part)]
        found[leaf.path] = math.prod(leaf.shape), math.prod(axes[name] for name in names)
    return found


def closed_forms(row: Row, one: Row, sizes: dict[str, int]) -> list[tuple[str, float, float, float]]:
    """What is known of a row beforehand: in words, the least and the most it can be, and what was counted."""
    sweep, data, model = row.mesh
    parts = leaves(row.network, sizes, row.mesh, row.rule)
    total = sum(n for n, _ in parts.values())
    known: list[tuple[str, float, float, float]] = []
    if data * model == 1:
        known.append(("a sweep alone: collectives in the step = 0", 0, 0, len(row.found)))
    useful = one.flops * sweep / row.chips
    if row.rule == TENSOR:
        if data > 1:
            # Inside the shard_map of a sweep XLA gathers the cotangents of all tokens, and each device makes the table's gradient.
            gathers = row.network == "transformer" and sweep > 1
            summed = [(n // k, n if k > 1 else 0) for path, (n, k) in parts.items() if not (gathers and path == "['embedding']")]
            whole = sum(n for n, matrix in summed if not matrix)
            reduced = sum(n for n, _ in summed)
            what = "all-reduce over data = 4 (Σ leaf / parts + 1): gradient and loss" + ", without the embedding" * gathers
            what += "; less where XLA adds up a bias in parts" * (model > 1)
            least = reduced - whole * (1 - 1 / model)
            known.append((what, ITEM * (least + 1), ITEM * (reduced + 1), row.bytes("all-reduce", "data")))
            if gathers and model == 1:
                tokens = ITEM * sizes["examples"] * sizes["time"] * sizes["width"]
                known.append(
                    ("all-gather over data = 4 × tokens × width: of the embedding", tokens, tokens, row.bytes("all-gather", "data"))
                )
        known.append(("products a device = F₁ sweep / chips, within 5 %", 0.95 * useful, 1.05 * useful, row.flops))
    else:
        # One axis to the rule, whatever the mesh calls it.
        axes = tuple(name for name, size in zip(AXES[1:], row.mesh[1:]) if size > 1)
        over, least = " × ".join(axes) if len(axes) == 1 else f"({' × '.join(axes)})", one.state * sweep / row.chips
        whole = sum(n for n, k in parts.values() if k == 1)
        what = f"state a device = state / {over} (and leaves that do not divide)"
        known.append((what, least, least + 3 * ITEM * whole + 64, row.state))
        known.append(("products a device = F₁ sweep / chips, within 5 %", 0.95 * useful, 1.05 * useful, row.flops))
        if row.network == "transformer":
            reduced, gathered = ITEM * (total + 1), row.bytes("all-gather", *axes)
            known.append((f"all-reduce over {over} = 4 (P + 1): gradient and loss", reduced, reduced, row.bytes("all-reduce", *axes)))
            known.append(
                (f"all-gather over {over}: 4 P (each leaf once) to 8 P (again, backward)", ITEM * total, 2 * ITEM * total, gathered)
            )
    return known


def check(row: Row, one: Row, sizes: dict[str, int]) -> list[tuple[str, float, float, float]]:
    """The closed forms, of which none is off.

    Raises
    ------
    ValueError
        If one is.
    """
    known = closed_forms(row, one, sizes)
    for what, least, most, counted in known:
        if not least <= counted <= most:
            raise ValueError(f"{row.network}, {row.where}: {what}. That is {least:g} to {most:g}, and {counted:g} was counted.")
    return known


class Prediction(NamedTuple):
    """Seconds of a step's products, of reading and writing the state, and of sending; shares of peak without overlap and with all of it."""

    products: float
    state: float
    sending: float
    apart: float
    hidden: float


def predict(row: Row, one: Row, chip: Chip) -> Prediction:
    """See `FORMULAS`."""
    products, state = row.flops / chip.flops, 2 * row.state / chip.memory
    sending = sum(each.sent / chip.link(each.size) for each in row.found)
    useful = row.mesh[0] * one.flops / (row.chips * chip.flops)
    return Prediction(products, state, sending, useful / (max(products, state) + sending), useful / max(products, state, sending))


def main() -> None:
    """Count, check, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes, 8 devices")
    parser.add_argument("--chips", type=int, nargs="+", choices=sorted(MESHES), help="which meshes (default: all; with --small 8)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/scaling.md")
    args = parser.parse_args()
    chips = args.chips or ([8] if args.small else sorted(MESHES))
    if args.write and (args.small or chips != sorted(MESHES)):
        parser.error("--write is for all of it: leave --small and --chips out.")

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(chips))
    import scaling_tables

    sizes = SMALL if args.small else SIZES
    ones = {network: count(network, sizes[network], (1, 1, 1), TENSOR) for network in sizes}
    rows = []
    for network in sizes:
        for n in chips:
            for shape, rule in MESHES[n][:: 2 if args.small else 1]:
                rows.append(count(network, sizes[network], shape, rule))
                if not args.small:
                    print(f"compiled: {network}, {rows[-1].where}", flush=True)
    text = scaling_tables.report(sizes, rows, ones)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
