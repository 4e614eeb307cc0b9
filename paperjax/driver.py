"""Run an Experiment: compile each program once, train chunk after chunk, measure, save, resume."""

import contextlib
import dataclasses
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from paperjax import processes
from paperjax.cell import CellFunctions, cell_functions, is_dataset
from paperjax.checkpoint import Checkpoints, Place
from paperjax.compiling import Compiled, compile_cells
from paperjax.describe import describe
from paperjax.devices import device_budget
from paperjax.experiment import Axes, Experiment
from paperjax.explained import explain
from paperjax.interrupts import Preempted, interruptible, preemptible
from paperjax.layout import Layout, cells_sharding, choose_layout, mesh_of, spread, tree_bytes, work
from paperjax.progress import Progress, progress_bar
from paperjax.result import assemble, versions
from paperjax.resuming import apart, bits, on_lanes, unpack
from paperjax.sharding import Placement, first_rows, placement

if TYPE_CHECKING:
    import xarray

# Fields that change how a run is carried out, not what it computes: a run may be resumed with others.
FREE_FIELDS = ("checkpoint", "save_every", "max_bytes", "mesh", "sharding")
# A compiled call is asked to last about this long, so that Ctrl-C, the progress bar and checkpoints get their turn.
SECONDS_PER_CALL = 1.0
# Whether Ctrl-C was pressed, and whether SIGTERM came.
Asked = tuple[Callable[[], bool], Callable[[], bool]]


@dataclasses.dataclass(frozen=True)
class Program:
    """The cells of one combination of looped axes: their functions, layout, and what they cost."""

    static: Mapping[str, Any]
    functions: CellFunctions
    data: Any
    shared: bool
    layout: Layout
    flops: float
    place: Placement | None = None


class Prepared(NamedTuple):
    """A program that is being compiled, its shared data in place, and how its cells are put on the devices."""

    compiled: Compiled
    shared: Any
    put: Callable[[PyTree], PyTree]


@dataclasses.dataclass
class Position:
    """How far a run has come: program, chunk, measurements taken, steps taken."""

    program: int = 0
    chunk: int = 0
    point: int = 0
    step: int = 0


class Clock:
    """Seconds spent waiting for tracing and compilation, and seconds spent in compiled programs."""

    def __init__(self):
        self.compile = 0.0
        self.run = 0.0

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Add the time of the block to `compile` or `run`."""
        began = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - began)


def drive(experiment: Experiment, progress: bool | None, verbose: bool, title: str, axes: Axes | None = None) -> "xarray.Dataset":
    """Run every cell of an Experiment; see `Experiment.run`."""
    try:
        return _drive(experiment, progress if processes.first() else False, verbose, title, axes)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if processes.is_lost(error) or (processes.many() and not isinstance(error, ValueError)):
            raise processes.lost(error) from error
        raise


def _drive(experiment: Experiment, progress: bool | None, verbose: bool, title: str, axes: Axes | None) -> "xarray.Dataset":
    began = time.perf_counter()
    processes.check_same({**experiment.describe(), **versions()}, "Experiments")
    axes = experiment.check() if axes is None else axes
    run = _Run(experiment, axes, Clock())
    store = None if experiment.checkpoint is None else Checkpoints(experiment.checkpoint)
    try:
        if store is not None:
            run.resume(store)
        programs = run.programs()
        if verbose:
            explain(experiment, axes, programs, run.n_cells)
        with (
            progress_bar(title or "training", run.work_left(programs), progress) as bar,
            interruptible() as asked,
            # Of many processes, JAX tells all that one of them has got SIGTERM.
            preemptible(store is not None and not processes.many()) as preempted,
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        ):
            ahead: dict[int, Prepared] = {}
            for p in range(run.position.program, len(programs)):
                # The next program compiles while this one trains.
                for q in range(p, min(p + 2, len(programs))):
                    if q not in ahead:
                        with run.clock.on("compile"):
                            ahead[q] = run.prepare(programs[q], pool)
                run.train(p, programs[p], ahead.pop(p), store, bar, (asked, preempted))
    finally:
        if store is not None and not processes.is_lost(sys.exception()):
            store.close()
    attrs = {
        "wall_seconds": time.perf_counter() - began,
        "compile_seconds": run.clock.compile,
        "run_seconds": run.clock.run,
        "layout": "; ".join(sorted({str(p.layout) for p in programs})),
    }
    return assemble(experiment, axes, run.out, attrs)


class _Run:
    """The mutable middle of `drive`: position, measured values, and the layouts a resumed run must keep."""

    def __init__(self, experiment: Experiment, axes: Axes, clock: Clock):
        self.experiment, self.axes, self.clock = experiment, axes, clock
        # One for each share of the cells; a mesh may spread each over more.
        self.devices = jax.devices() if experiment.mesh is None else list(experiment.mesh.devices[:, 0, 0])
        everywhere = self.devices if experiment.mesh is None else list(experiment.mesh.devices.flat)
        self.here = processes.own(everywhere)
        # With fewer lanes than the mesh has, a process may be left without a device.
        self.lanes = len(self.devices) if processes.many() and len(everywhere) > len(self.devices) else None
        self.cells = axes.cells(experiment.grid)
        self.n_cells = max(1, math.prod(len(experiment.grid.axes[name]) for name in axes.scalar))
        self.points = experiment.points
        self.position = Position()
        self.out: dict[str, np.ndarray] = {}
        self.layouts: list[Layout] | None = None
        self.saved_state: list[np.ndarray] | None = None
        self.last_save = time.perf_counter()
        self.turns = 0

    # Programs -----------------------------------------------------------------------------------------------------

    def programs(self) -> list[Program]:
        combinations = self.axes.combinations(self.experiment.grid)
        return [self._program(i, {**self.experiment.grid.fixed, **c}) for i, c in enumerate(combinations)]

    def _program(self, index: int, static: dict[str, Any]) -> Program:
        functions = cell_functions(self.experiment, static)
        data = static.get("data", self.experiment.data)
        shared = is_dataset(data)
        data = jax.tree.map(jnp.asarray, data) if shared else None
        place = self._placement(functions, data, static)
        if place is not None:
            functions = cell_functions(self.experiment, static, place)
        one = {name: jax.ShapeDtypeStruct((), values.dtype) for name, values in self.cells.items()}
        state, constants = jax.eval_shape(functions.setup, one, data)
        step_flops, step_bytes = work(lambda *a: functions.advance(*a, 0, 1), one, state, constants, data)
        _, measure_bytes = work(lambda *a: functions.measure(*a, jnp.int32(0)), one, state, constants, data)
        if self.layouts is not None:
            layout = self.layouts[index]
        elif self.experiment.layout is not None:
            layout = self.experiment.layout
        else:
            budget = self.experiment.max_bytes or int(processes.texts(str(device_budget(self.here)))[0])
            kept = tree_bytes((state, constants))
            layout = choose_layout(self.n_cells, step_flops, kept, max(step_bytes, measure_bytes), budget, self.devices)
            # Every process has its share.
            lanes = self.lanes or -(-layout.lanes // jax.process_count()) * jax.process_count()
            layout = dataclasses.replace(layout, lanes=lanes)
        return Program(static, functions, data, shared, layout, step_flops, place)

    def _placement(self, functions: CellFunctions, data: Any, static: Mapping[str, Any]) -> Placement | None:
        mesh = self.experiment.mesh
        if mesh is None or mesh.devices.size == mesh.devices.shape[0]:
            return None
        model, x = functions.network({name: values[0] for name, values in self.cells.items()}, data)
        return placement(mesh, self.experiment.sharding, model, x, static.get("batch", self.experiment.batch))

    def mesh(self, program: Program) -> Mesh:
        """The devices of a program: one a lane, or as many as a cell is spread over."""
        if program.place is None:
            return self._mesh(program.layout)
        return first_rows(program.place.mesh, program.layout.lanes)

    def work_left(self, programs: list[Program]) -> float:
        """FLOPs from here to the last measurement of the last program."""
        at, last = self.position, self.points[-1]
        left = 0.0
        for i, p in enumerate(programs[at.program :]):
            done = at.chunk * last + at.step if i == 0 else 0
            left += (self.chunks(p) * last - done) * p.flops * p.layout.cells
        return left

    def chunks(self, program: Program) -> int:
        return math.ceil(self.n_cells / program.layout.cells)

    # Training -----------------------------------------------------------------------------------------------------

    def prepare(self, program: Program, pool: ThreadPoolExecutor) -> Prepared:
        mesh = self.mesh(program)
        place = program.place and program.place._replace(mesh=mesh)
        at = place.data(program.data) if place else NamedSharding(mesh, PartitionSpec())
        if processes.many():
            shared = processes.place(program.data, at)
            over = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
            put: Callable[[PyTree], PyTree] = lambda tree: processes.place(tree, over)  # noqa: E731
        elif mesh.devices.size > 1:
            shared = jax.device_put(program.data, at)
            put = lambda tree: spread(tree, mesh)  # noqa: E731
        else:
            shared = program.data
            put = lambda tree: jax.tree.map(jnp.asarray, tree)  # noqa: E731
        axes, alike, trains = put(self._chunk(program, 0)[1]), self.experiment.mesh is not None, self.points[-1] > 0
        return Prepared(compile_cells(program.functions, program.layout, mesh, axes, shared, pool, place, alike, trains), shared, put)

    def _mesh(self, layout: Layout) -> Mesh:
        return mesh_of(layout, processes.evenly(self.devices, layout.lanes))

    def _chunk(self, program: Program, chunk: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        first = chunk * program.layout.cells
        # The last chunk is filled up with copies of the last cell, so that one program serves all chunks.
        ids = np.minimum(np.arange(first, first + program.layout.cells), self.n_cells - 1)
        return ids, {name: values[ids] for name, values in self.cells.items()} or {"_cell": ids}

    def train(self, index: int, program: Program, prepared: Prepared, store: Checkpoints | None, bar: Progress, asked: Asked) -> None:
        with self.clock.on("compile"):
            setup, advance, measure = prepared.compiled.wait()
        shared, put = prepared.shared, prepared.put
        per_step = program.flops * program.layout.cells
        # First guess of a call's length: 10 GFLOP/s; then as measured.
        steps_per_call = max(1.0, SECONDS_PER_CALL * 1e10 / max(per_step, 1e5))

        def timed(fn: Callable[..., Any], *args: Any) -> Any:
            with self.clock.on("run"):
                return jax.block_until_ready(fn(*args))

        for chunk in range(self.position.chunk, self.chunks(program)):
            ids, host_axes = self._chunk(program, chunk)
            axes = put(host_axes)
            state, constants = timed(setup, axes, shared)
            if self.saved_state is not None:
                state = unpack(self.saved_state, state)
                self.saved_state = None
            at = self.position
            at.program, at.chunk = index, chunk
            while at.point < len(self.points):
                while at.step < self.points[at.point]:
                    n = min(self.points[at.point] - at.step, max(1, int(min(steps_per_call, 2**30))))
                    n = int(processes.everyone([n])[0, 0])
                    before = time.perf_counter()
                    state = timed(advance, axes, state, constants, shared, np.int32(at.step), np.int32(n))
                    seconds = time.perf_counter() - before
                    # A single quick step says little about the next thousand.
                    measured = SECONDS_PER_CALL * n / max(seconds, 1e-6) if n > 1 or seconds > 0.1 else math.inf
                    steps_per_call = min(4 * steps_per_call, measured)
                    at.step += n
                    bar.advance(n * per_step)
                    self._maybe_save(store, state, asked)
                self._record(timed(measure, axes, state, constants, shared, np.int32(at.step)), index, ids, program.static)
                at.point += 1
                self._maybe_save(store, state, asked)
            at.program, at.chunk, at.point, at.step = index, chunk + 1, 0, 0
            if chunk + 1 == self.chunks(program):
                at.program, at.chunk = index + 1, 0
            if store is not None:
                self._save(store, None)

    def _record(self, measured: Mapping[str, Any], index: int, ids: np.ndarray, static: Mapping[str, Any]) -> None:
        real = slice(0, min(len(ids), self.n_cells - int(ids[0])))
        for name, value in measured.items():
            host = processes.on_host(value)[real]
            n_programs = math.prod(len(self.experiment.grid.axes[n]) for n in self.axes.static)
            shape = (n_programs, self.n_cells, *(() if name == "_diverged_at" else (len(self.points),)), *host.shape[1:])
            if name not in self.out:
                self.out[name] = (
                    np.full(shape, np.nan, host.dtype) if np.issubdtype(host.dtype, np.inexact) else np.zeros(shape, host.dtype)
                )
            if self.out[name].shape != shape:
                there = self.out[name].shape[3:]
                raise ValueError(
                    f"measure {name!r} has shape {host.shape[1:]} at {dict(static)} and {there} before: a measure must have one shape over "
                    "the whole grid. Reduce it (mean, norm), or run one Experiment per size."
                )
            cells = ids[real]
            if name == "_diverged_at":
                self.out[name][index, cells] = host
            else:
                self.out[name][index, cells, self.position.point] = host

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _maybe_save(self, store: Checkpoints | None, state: PyTree, asked: Asked) -> None:
        self.turns += 1
        due = store is not None and time.perf_counter() - self.last_save >= self.experiment.save_every
        stop, preempted, due = processes.any_of(asked[0](), asked[1]() or processes.preempted(self.turns), due)
        if stop or preempted:
            if store is None:
                raise KeyboardInterrupt("stopped. Nothing was saved: with checkpoint=FOLDER (--checkpoint FOLDER) a run can be resumed.")
            self._save(store, state, wait=True)
            kind = Preempted if preempted else KeyboardInterrupt
            raise kind(f"stopped, and saved in {store.folder}. Run the same again with this checkpoint folder to go on from here.")
        if store is not None and due:
            self._save(store, state)

    def _save(self, store: Checkpoints, state: PyTree | None, wait: bool = False) -> None:
        arrays = {f"out/{name}": value for name, value in self.out.items()}
        leaves = [] if state is None else jax.tree.leaves(state)
        arrays |= {f"state/{i}": bits(leaf) for i, leaf in enumerate(leaves)}
        record = {
            "experiment": self._identity(),
            "versions": versions(),
            "position": dataclasses.asdict(self.position),
            "layouts": [dataclasses.asdict(p) for p in self._layouts()],
            "devices": len(self.devices),
            "state_leaves": len(leaves),
            "seconds": [self.clock.compile, self.clock.run],
        }
        store.save(arrays, record, wait)
        self.last_save = time.perf_counter()

    def _layouts(self) -> list[Layout]:
        if self.layouts is None:
            self.layouts = [p.layout for p in self.programs()]
        return self.layouts

    def _identity(self) -> dict[str, str]:
        fields = {name: text for name, text in self.experiment.describe().items() if name not in FREE_FIELDS}
        return {**fields, "x64": describe(bool(jax.config.jax_enable_x64))}  # pyright: ignore[reportAttributeAccessIssue]

    def resume(self, store: Checkpoints) -> None:
        found = store.newest(lambda record: self._accept(store, record))
        if found is None:
            return
        arrays, record = found
        changed = {n: v for n, v in record["versions"].items() if versions().get(n) != v}
        if changed:
            warnings.warn(f"resuming with other versions than {changed}: the last bits may differ from an uninterrupted run.", stacklevel=2)
        self.position = Position(**record["position"])
        self.layouts = [Layout(**layout) for layout in record["layouts"]]
        adapted = self._adapted(record)
        if adapted != self.layouts:
            before = max(layout.lanes for layout in self.layouts)
            warnings.warn(
                f"the saved run used {before} devices and there are {len(self.devices)} now: its cells are laid out on other lanes, and "
                "the last bits may differ from an uninterrupted run.",
                stacklevel=2,
            )
        self.layouts = adapted
        self.out = {name.removeprefix("out/"): np.array(value) for name, value in arrays.items() if name.startswith("out/")}
        self.clock.compile, self.clock.run = record["seconds"]
        n = record["state_leaves"]
        self.saved_state = [arrays[f"state/{i}"] for i in range(n)] if n else None

    def _accept(self, store: Checkpoints, record: Mapping[str, Any]) -> Place:
        """Refuse a checkpoint of another Experiment; else say where the cells of its state lie."""
        there, here = record["experiment"], self._identity()
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                was, now = apart(there.get(name, "absent"), here.get(name, "absent"))
                raise ValueError(
                    f"checkpoint {store.folder} is of another Experiment: {name} was {was} and is now {now}. "
                    "Undo the change, or name another checkpoint folder."
                )
        layouts = self._adapted(record)
        layout = layouts[min(record["position"]["program"], len(layouts) - 1)]
        # To the host where cells are divided over processes: one device may not hold a whole one.
        mesh = None if layout.lanes == 1 or self.lanes else self._mesh(layout)
        return lambda name, shape: None if mesh is None else cells_sharding(mesh, shape)

    def _adapted(self, record: Mapping[str, Any]) -> list[Layout]:
        # A run that had all devices gets all; a layout that was asked for is kept where it can be.
        had, now = record.get("devices"), len(self.devices)

        def lanes(layout: Layout) -> int:
            grows = self.experiment.layout is None and had == layout.lanes < now
            return self.lanes or (now if grows or layout.lanes > now else layout.lanes)

        owners = 1 if self.lanes else jax.process_count()
        return [on_lanes(Layout(**layout), lanes(Layout(**layout)), owners) for layout in record["layouts"]]
