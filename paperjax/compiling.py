"""Compile the set-up, the training loop and the measures of a group of cells, at once and ahead of time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from paperjax import processes
from paperjax.cell import CellFunctions
from paperjax.devices import ONE_THREAD, compiler_options
from paperjax.layout import WAIT_IN_POOL, Layout, cells_sharding, lay_out, primitives, spread, tree_bytes
from paperjax.sharding import Placement

# Random number generation is most of a set-up, and LLVM takes seconds to optimize it on CPU for a program that runs once. Not
# optimized at all it runs about ten times slower, which is nothing for small cells: 4 MiB of normals take 60 ms.
SETUP_LEVELS = {"small": 0, "large": 1}
SMALL_BYTES = 2**22


class Compiled(NamedTuple):
    """Three programs on their way; ``result()`` of each waits for it.

    Attributes
    ----------
    setup
        ``(axes, data) -> (state, constants)``.
    advance
        ``(axes, state, constants, data, first, n_steps) -> state``; the old state's memory is given away. `None` where no step is taken.
    measure
        ``(axes, state, constants, data, step) -> {name: values}``.
    """

    setup: "Future[Any]"
    advance: "Future[Any]"
    measure: "Future[Any]"

    def wait(self) -> tuple[Any, Any, Any]:
        """All three, compiled."""
        return self.setup.result(), self.advance.result(), self.measure.result()


def compile_cells(
    functions: CellFunctions,
    layout: Layout,
    mesh: Mesh,
    axes: PyTree,
    data: Any,
    pool: ThreadPoolExecutor,
    place: Placement | None = None,
    alike: bool = False,
    trains: bool = True,
) -> Compiled:
    """Trace here, compile in the pool's threads.

    Parameters
    ----------
    functions
        Of one cell.
    layout, mesh
        How many cells there are and where.
    axes
        Values of the scalar axes, each with a leading axis of ``layout.cells``.
    data
        The shared Dataset, where the programs will have it; or `None`.
    pool
        XLA compiles outside Python's lock, so as many threads as there are cores are of use. Tracing stays in the caller's
        thread: JAX's settings (x64, promotion) are per thread.
    place
        Where the arrays of a cell lie, if each is spread over devices itself.
    alike
        Whether one device is to compute as each of several does: on CPU it would split products over the cores, and add up otherwise.
    trains
        Whether any step is taken; if not, there is no training loop to compile.

    Returns
    -------
    Compiled
    """
    device = mesh.devices.flat[0]
    on_cpu, many = device.platform == "cpu", mesh.devices.size > 1
    common = compiler_options(device.platform)

    def lies(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: cells_sharding(mesh, a.shape), tree) if place is None else place.cells(tree, mesh.axis_names[0])

    def over_mesh(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, lies(tree)) if many else tree

    def program(
        fn: Callable[..., Any], per_cell: int, options: dict[str, Any], *args: Any, donate: tuple[int, ...] = (), out: Any = None
    ) -> "Future[Any]":
        # XLA would divide what comes out as it likes, and the next program takes it in as it is said here.
        placed = {} if out is None or place is None else {"out_shardings": lies(out)}

        def over(layout: Layout) -> Any:
            run = lay_out(lambda cell, *shared: fn(*cell, *shared), layout, mesh)
            return jax.jit(lambda *args: run(args[:per_cell], *args[per_cell:]), donate_argnums=donate, **placed)

        traced = over(layout).trace(*args)
        waiting = (
            primitives(traced.jaxpr.jaxpr) & WAIT_IN_POOL
            if on_cpu and layout.lanes > 1 and place is None and processes.local_devices(mesh) > 1
            else ()
        )
        if waiting and processes.many():
            raise NotImplementedError(
                f"{', '.join(sorted(waiting))} on {processes.local_devices(mesh)} CPU devices of each of {jax.process_count()} processes: "
                "XLA's threads would wait for each other. Give each process one device (--devices-per-process 1)."
            )
        if waiting:
            here = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
            single = over(Layout(1, layout.lanes * layout.map, layout.vmap)).lower(*here)
            return pool.submit(lambda: _on_first(single.compile(compiler_options={**options, **common}), mesh))
        lowered = traced.lower()
        return pool.submit(lambda: lowered.compile(compiler_options={**options, **common}))

    setup_all = lay_out(lambda axes, data: functions.setup(axes, data), layout, mesh)
    state, constants = over_mesh(jax.eval_shape(setup_all, axes, data))
    zero = np.int32(0) if many else jax.ShapeDtypeStruct((), jnp.int32)
    small = tree_bytes((state, constants)) <= SMALL_BYTES
    level = {"xla_backend_optimization_level": SETUP_LEVELS["small" if small else "large"]} if on_cpu else {}
    # One lane per core: a lane that splits its own loops over all cores is in the others' way.
    busy = ONE_THREAD if on_cpu and (many or alike) else {}
    untrained: Future[Any] = Future()
    untrained.set_result(None)
    return Compiled(
        program(functions.setup, 1, level, axes, data, out=(state, constants)),
        program(functions.advance, 3, busy, axes, state, constants, data, zero, zero, donate=(1,), out=state) if trains else untrained,
        program(functions.measure, 3, busy, axes, state, constants, data, zero),
    )


def _on_first(compiled: Any, mesh: Mesh) -> Callable[..., Any]:
    """All lanes' cells on the first device, one after another."""
    return lambda *args: spread(compiled(*jax.device_put(args, mesh.devices.flat[0])), mesh)
