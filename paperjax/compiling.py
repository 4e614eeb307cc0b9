"""Compile the set-up, the training loop and the measures of a group of cells, at once and ahead of time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from paperjax.cell import CellFunctions
from paperjax.layout import Layout, cells_sharding, lay_out, tree_bytes

# Random number generation is most of a set-up, and LLVM takes seconds to optimize it on CPU for a program that runs once. Not
# optimized at all it runs about ten times slower, which is nothing for small cells: 4 MiB of normals take 60 ms.
SETUP_LEVELS = {"small": 0, "large": 1}
SMALL_BYTES = 2**22
# XLA splits products (the first) and elementwise loops (the second) of a program over the cores. At 256x3 with 256 rows, two lanes on two
# cores are 6 % faster without the latter.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False, "xla_disable_hlo_passes": "cpu-parallel-task-assigner"}


class Compiled(NamedTuple):
    """Three programs on their way; ``result()`` of each waits for it.

    Attributes
    ----------
    setup
        ``(axes, data) -> (state, constants)``.
    advance
        ``(state, axes, constants, data, first, n_steps) -> state``; the old state's memory is given away.
    measure
        ``(axes, state, constants, data, step) -> {name: values}``.
    """

    setup: "Future[Any]"
    advance: "Future[Any]"
    measure: "Future[Any]"

    def wait(self) -> tuple[Any, Any, Any]:
        """All three, compiled."""
        return self.setup.result(), self.advance.result(), self.measure.result()


def compile_cells(functions: CellFunctions, layout: Layout, mesh: Mesh, axes: PyTree, data: Any, pool: ThreadPoolExecutor) -> Compiled:
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

    Returns
    -------
    Compiled
    """

    def over_mesh(tree: PyTree) -> PyTree:
        if layout.lanes == 1:
            return tree
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=cells_sharding(mesh, a.shape)), tree)

    def lower(fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        return jax.jit(fn, donate_argnums=donate).lower(*args)

    setup_all = lay_out(functions.setup, layout, mesh)
    advance_all = lay_out(lambda cell, data, first, n: functions.advance(*cell, data, first, n), layout, mesh)
    measure_all = lay_out(lambda cell, data, step: functions.measure(*cell, data, step), layout, mesh)

    def advance(state: Any, axes: Any, constants: Any, data: Any, first: Any, n: Any) -> Any:
        return advance_all((axes, state, constants), data, first, n)

    def measure(axes: Any, state: Any, constants: Any, data: Any, step: Any) -> Any:
        return measure_all((axes, state, constants), data, step)

    on_cpu = mesh.devices.flat[0].platform == "cpu"
    state, constants = over_mesh(jax.eval_shape(setup_all, axes, data))
    level = SETUP_LEVELS["small" if tree_bytes((state, constants)) <= SMALL_BYTES else "large"]
    setup_options: dict[str, Any] | None = {"xla_backend_optimization_level": level} if on_cpu else None
    # One lane per core: a lane that splits its own loops over all cores is in the others' way.
    options: dict[str, Any] | None = dict(ONE_THREAD) if on_cpu and layout.lanes > 1 else None
    zero = jax.ShapeDtypeStruct((), jnp.int32) if layout.lanes == 1 else np.int32(0)
    lowered = (
        (lower(setup_all, axes, data), setup_options),
        (lower(advance, state, axes, constants, data, zero, zero, donate=(0,)), options),
        (lower(measure, axes, state, constants, data, zero), options),
    )
    return Compiled(*(pool.submit(program.compile, compiler_options=chosen) for program, chosen in lowered))
