"""How the cells of a sweep are laid out on the devices: lanes × map × vmap.

A program runs ``lanes * map * vmap`` cells. ``lanes`` devices each take a share of them (`jax.shard_map`, no communication);
on each, ``lax.map`` walks over groups of ``vmap`` cells that run together. The layout changes the speed of a sweep and the
last bits of its numbers (batched products may be summed in another order), nothing else.

Which is fastest? An accelerator wants everything batched. On a CPU, XLA's batched products are slower than one product
after another as soon as a step is more than a few million floating-point operations, and below that the cost of a step is
the overhead of its instructions, which `vmap` shares. One device per core is worth up to the number of cores.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

# FLOPs of one training step that vmapped cells on one CPU lane should amount to together: below this XLA's overhead per
# instruction dominates, above it a batched product is slower than a loop of products. Measured with benchmarks/sweep.py.
CPU_FLOPS_PER_GROUP = 4e6
CPU_LARGEST_GROUP = 32
# FLOPs of one step of all cells of a lane in one call. A core does some 5e10 a second, so that a call of a second takes several
# steps: a cell keeps its parameters in the cache from one to the next, and a run can be followed and stopped.
CPU_FLOPS_PER_LANE = 1.2e10
# On CPU these may wait, on a thread of the one pool that all devices share, for other threads of it. Where every device's program does so
# at once, none is left to wait for. A larger pool has threads to spare, and splits every product for more threads than there are cores:
# 10 % of the time of a step.
WAIT_IN_POOL = frozenset(
    {
        "cholesky",
        "eig",
        "eigh",
        "fft",
        "geqrf",
        "geqp3",
        "hessenberg",
        "householder_product",
        "lu",
        "ormqr",
        "qr",
        "schur",
        "svd",
        "triangular_solve",
        "tridiagonal",
        "tridiagonal_solve",
        "ffi_call",
    }
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many devices (`lanes`), how many groups one after another (`map`), how many cells together (`vmap`).

    Examples
    --------
    >>> Layout(lanes=2, map=26, vmap=2).cells
    104
    """

    lanes: int = 1
    map: int = 1
    vmap: int = 1

    def __post_init__(self):
        for field in ("lanes", "map", "vmap"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Layout({field}={value!r}): each of lanes, map and vmap must be a whole number, at least 1.")

    @property
    def cells(self) -> int:
        """Cells that one call of the program runs."""
        return self.lanes * self.map * self.vmap

    def __str__(self) -> str:
        return f"{self.lanes} lane{'s' * (self.lanes > 1)} × map {self.map} × vmap {self.vmap}"


def choose_layout(
    n_cells: int,
    flops_per_step: float,
    bytes_per_cell: int,
    bytes_at_work: int,
    max_bytes: int,
    devices: Sequence[Any],
) -> Layout:
    """The layout that a cost model says is fastest within a memory budget.

    Parameters
    ----------
    n_cells
        Cells to run in all.
    flops_per_step
        Floating-point operations of one training step of one cell.
    bytes_per_cell
        What one cell keeps between calls: parameters, optimizer state, its own data.
    bytes_at_work
        What one cell needs besides while it runs: gradients, activations.
    max_bytes
        Budget, over all devices together on CPU and for each device elsewhere.
    devices
        The devices to spread over.

    Returns
    -------
    Layout
        With ``cells <= n_cells`` rounded up to fill it; fewer than `n_cells` means several calls, one chunk after another.

    Raises
    ------
    MemoryError
        If not even one cell fits; the message says how many bytes would do.

    Examples
    --------
    >>> import jax
    >>> choose_layout(104, 3e5, 10_000, 100_000, 10**9, jax.devices("cpu")[:1])
    Layout(lanes=1, map=8, vmap=13)
    >>> choose_layout(104, 1e9, 10_000, 100_000, 10**9, jax.devices("cpu")[:1])
    Layout(lanes=1, map=8, vmap=1)
    """
    # A call holds its inputs and outputs at once unless they are donated; two copies is what is safe to count on.
    kept, at_work = max(1, 2 * bytes_per_cell), max(1, bytes_at_work)
    if kept + at_work > max_bytes:
        raise MemoryError(
            f"one cell needs about {_mb(kept + at_work)} ({_mb(bytes_per_cell)} kept twice, {_mb(at_work)} at "
            f"work), and max_bytes is {_mb(max_bytes)}. "
            f"Give max_bytes={kept + at_work} or more, a smaller batch, or a smaller network."
        )
    on_cpu = devices[0].platform == "cpu"
    lanes = max(1, min(len(devices), n_cells))
    if on_cpu:
        while lanes > 1 and lanes * (kept + at_work) > max_bytes:
            lanes -= 1
        budget = max_bytes // lanes
        group = int(np.clip(CPU_FLOPS_PER_GROUP / max(flops_per_step, 1.0), 1, CPU_LARGEST_GROUP))
    else:
        budget = max_bytes
        group = n_cells
    share = math.ceil(n_cells / lanes)
    group = max(1, min(group, share, int(budget // (kept + at_work))))
    groups = math.ceil(share / group)
    # Even groups waste no padding: 52 cells in groups of at most 14 are 4 groups of 13.
    group = math.ceil(share / groups)
    fits = max(1, int((budget - group * at_work) // (kept * group)))
    if on_cpu:
        fits = min(fits, max(1, int(CPU_FLOPS_PER_LANE / max(flops_per_step * group, 1.0))))
    return Layout(lanes, _even(groups, fits), group)


def _even(groups: int, most: int) -> int:
    """Of the numbers up to `most`, not below half of it, the one that fills the last call best."""
    if groups <= most:
        return groups
    return min(range(most, max(1, most // 2) - 1, -1), key=lambda n: -groups % n)


def _mb(n: float) -> str:
    return f"{n / 2**20:.4g} MiB"


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves of a pytree of arrays or shapes.

    Examples
    --------
    >>> tree_bytes({"w": jax.ShapeDtypeStruct((1000, 10), jnp.float32)})
    40000
    """
    return sum(math.prod(leaf.shape) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _itemsize(dtype: Any) -> int:
    return dtype.itemsize if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def work(fn: Callable[..., Any], *args: Any) -> tuple[float, int]:
    """Floating-point operations and bytes of all intermediate values of ``fn(*args)``, from its trace; nothing is run.

    Products are counted (``2 m n k``), and every other result once per element; loops by their length where it is known.
    The bytes are those of the largest that could be alive if nothing were fused: an upper bound for one step.

    Examples
    --------
    >>> w, x = jax.ShapeDtypeStruct((10, 20), jnp.float32), jax.ShapeDtypeStruct((5, 10), jnp.float32)
    >>> work(lambda w, x: x @ w, w, x)  # 2 · 5 · 10 · 20, and 5 · 20 numbers of 4 bytes.
    (2000.0, 400)
    """
    flops, peak = _count(jax.make_jaxpr(fn)(*args).jaxpr)
    return flops, int(peak)


def _count(jaxpr: Any) -> tuple[float, float]:
    flops, size = 0.0, 0.0
    for eqn in jaxpr.eqns:
        out = sum(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        size += sum(math.prod(v.aval.shape) * _itemsize(v.aval.dtype) for v in eqn.outvars if hasattr(v.aval, "shape"))
        name = eqn.primitive.name
        inner = [_count(sub) for value in eqn.params.values() for sub in _jaxprs(value)]
        if name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            flops += 2.0 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            spatial = eqn.params["dimension_numbers"].rhs_spec
            flops += 2.0 * out * math.prod(kernel) / kernel[spatial[0]]
        elif not inner:
            flops += out
        times = eqn.params.get("length", 1) if name == "scan" else 1
        flops += times * sum(f for f, _ in inner)
        size += max((s for _, s in inner), default=0.0)
    return flops, size


def peak_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes of the intermediate values of ``fn(*args)`` that are alive at once, at most, if nothing is fused; nothing is run.

    Examples
    --------
    >>> x = jax.ShapeDtypeStruct((100,), jnp.float32)
    >>> peak_bytes(lambda x: jnp.sin(jnp.sin(jnp.sin(x))), x)  # A value and the next one.
    800
    """
    return int(_peak(jax.make_jaxpr(fn)(*args).jaxpr, {}, 1)[0])


NEITHER: frozenset[int] = frozenset()


def _peak(jaxpr: Any, sides: dict[Any, frozenset[int]], n: int) -> tuple[float, list[frozenset[int]]]:
    """With the sides of the results."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not hasattr(v, "val")}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not hasattr(v, "val")}
    sides = dict(sides)
    alive: dict[Any, float] = {}
    most = 0.0

    def of(v: Any) -> frozenset[int]:
        return NEITHER if hasattr(v, "val") else sides.get(v, NEITHER)

    for i, eqn in enumerate(jaxpr.eqns):
        given = [of(v) for v in eqn.invars]
        all_of = NEITHER.union(*given)
        inner = [_inside(eqn, sub, given, n) for value in eqn.params.values() for sub in _jaxprs(value)]
        made = [outs for _, outs in inner if len(outs) == len(eqn.outvars)]
        sides |= {v: NEITHER.union(*(outs[k] for outs in made)) if made else all_of for k, v in enumerate(eqn.outvars)}
        alive |= {v: math.prod(v.aval.shape) * _itemsize(v.aval.dtype) * float(n ** len(sides[v])) for v in eqn.outvars}
        most = max(most, sum(alive.values()) + max((peak for peak, _ in inner), default=0.0))
        alive = {v: size for v, size in alive.items() if last.get(v, -1) > i}
    return most, [of(v) for v in jaxpr.outvars]


def _inside(eqn: Any, sub: Any, given: list[frozenset[int]], n: int) -> tuple[float, list[frozenset[int]]]:
    """`_peak` of a function inside an equation, whose arguments are its last ones; what is carried on is of all that it comes to be of."""
    if eqn.primitive.name in ("while", "cond") or len(sub.invars) > len(given):
        whole = NEITHER.union(*given)
        peak, outs = _peak(sub, dict.fromkeys(sub.invars, whole), n)
        return peak, [whole] * len(outs)
    given = given[len(given) - len(sub.invars) :]
    while True:
        peak, outs = _peak(sub, dict(zip(sub.invars, given)), n)
        first, count = (eqn.params["num_consts"], eqn.params["num_carry"]) if eqn.primitive.name == "scan" else (0, 0)
        carried = [before | after for before, after in zip(given[first : first + count], outs)]
        if carried == given[first : first + count]:
            return peak, outs
        given = [*given[:first], *carried, *given[first + count :]]


def grid_bytes(jaxpr: Any, sides: Sequence[frozenset[int]], n: int) -> int:
    """`peak_bytes` of a program of two examples over all pairs of n and n, as `jax.vmap` makes it; it is not traced for that.

    Of each argument, `sides` are the examples that it is of: none, the first (0), the second (1). What is made of one is made n times,
    what is made of both n² times.

    Examples
    --------
    >>> both = jax.make_jaxpr(lambda a, b: jnp.sin(a) * jnp.sin(b))(1.0, 1.0)
    >>> grid_bytes(both.jaxpr, [frozenset({0}), frozenset({1})], 10)  # 10 and 10 sines, and 100 products
    480
    """
    return int(_peak(jaxpr, dict(zip(jaxpr.invars, sides)), n)[0])


def primitives(jaxpr: Any) -> frozenset[str]:
    """Names of all primitives of a jaxpr and of those inside it.

    Examples
    --------
    >>> sorted(primitives(jax.make_jaxpr(jax.jit(lambda x: jnp.sin(x) + 1.0))(1.0).jaxpr))
    ['add', 'jit', 'sin']
    """
    inner = (primitives(sub) for eqn in jaxpr.eqns for value in eqn.params.values() for sub in _jaxprs(value))
    return frozenset({eqn.primitive.name for eqn in jaxpr.eqns}).union(*inner)


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
        return [value.jaxpr]
    if hasattr(value, "eqns"):
        return [value]
    return [sub for item in value for sub in _jaxprs(item)] if isinstance(value, (tuple, list)) else []


def mesh_of(layout: Layout, devices: Sequence[Any]) -> Mesh:
    """The one-axis mesh ``("cells",)`` of the first ``layout.lanes`` devices.

    Raises
    ------
    ValueError
        If there are fewer devices than lanes.
    """
    if layout.lanes > len(devices):
        raise ValueError(
            f"the layout has {layout.lanes} lanes and JAX sees {len(devices)} device(s). Use lanes={len(devices)}, or on CPU call "
            f"pj.cpu_devices({layout.lanes}) before JAX starts."
        )
    return Mesh(np.array(devices[: layout.lanes]), ("cells",))


def spread(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put the leading axis of every leaf over the mesh."""
    return jax.tree.map(lambda a: jax.device_put(a, cells_sharding(mesh, a.shape)), tree)


def cells_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of that shape lies if its leading axis is the cells; JAX keeps arrays without elements on every device."""
    return NamedSharding(mesh, PartitionSpec() if 0 in shape else PartitionSpec(mesh.axis_names[0]))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put a copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def lay_out(fn: Callable[..., Any], layout: Layout, mesh: Mesh) -> Callable[..., Any]:
    """Turn a function of one cell into a function of all cells of a layout.

    Parameters
    ----------
    fn
        ``fn(cell, *shared)`` for one cell; `cell` is any pytree.
    layout, mesh
        Where the cells go.

    Returns
    -------
    callable
        ``run(cells, *shared)``, where every leaf of `cells` and of the result has a leading axis of ``layout.cells``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layout = Layout(lanes=1, map=2, vmap=3)
    >>> run = lay_out(lambda cell, shared: cell * shared, layout, mesh_of(layout, jax.devices("cpu")))
    >>> run(jnp.arange(6.0), jnp.float32(2))
    Array([ 0.,  2.,  4.,  6.,  8., 10.], dtype=float32)
    """

    def lane(cells: PyTree, *shared: Any) -> PyTree:
        def one(cell: PyTree) -> PyTree:
            return fn(cell, *shared)

        def group(cells: PyTree) -> PyTree:
            # A batch axis of one would turn every product into a batched one, which XLA runs slower on CPU.
            return jax.vmap(one)(cells) if layout.vmap > 1 else _add_axis(one(_first(cells)))

        if layout.map == 1:
            return group(cells)
        grouped = jax.tree.map(lambda a: a.reshape(layout.map, layout.vmap, *a.shape[1:]), cells)
        done = jax.lax.map(group, grouped)
        return jax.tree.map(lambda a: a.reshape(layout.map * layout.vmap, *a.shape[2:]), done)

    if layout.lanes == 1:
        return lane
    # Further axes of the mesh, over which a cell itself is spread, are left to XLA.
    cells_spec, shared_spec = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    own = frozenset(mesh.axis_names[:1])

    def run(cells: PyTree, *shared: Any) -> PyTree:
        specs = (cells_spec, *(shared_spec for _ in shared))
        # The lanes never talk to each other, so there is no replication for JAX to check.
        return jax.shard_map(lane, mesh=mesh, in_specs=specs, out_specs=cells_spec, axis_names=own, check_vma=False)(cells, *shared)

    return run


def _first(cells: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[0], cells)


def _add_axis(cell: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[None], cell)
