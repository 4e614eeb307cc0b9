"""How many devices JAX sees on a CPU (one call, before JAX starts), and how much memory there is."""

import ctypes
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
# XLA splits products (the first) and elementwise loops (the second) of a program over the cores, where several programs that run at once
# are in each other's way: at 256x3 with 256 rows, two lanes on two cores are 6 % faster without the latter.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False, "xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
# LLVM takes half of a vector of 512 bits where a processor has them, as some slow down for a while: of long loops of arithmetic, the pairs
# of a limit, the whole of it takes a fifth less time (AMD EPYC, AVX-512). Only of `ARITHMETIC`: XLA calls functions of whole vectors for
# others, and at this width its arctangent is wrong in half of them (jaxlib 0.10.2).
WIDE = {"xla_cpu_prefer_vector_width": 512}
ARITHMETIC = frozenset(
    (
        "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "concatenate", "cond", "convert_element_type", "copy",
        "custom_jvp_call", "custom_vjp_call", "div", "dot_general", "dynamic_slice", "dynamic_update_slice", "eq", "expand_dims",
        "gather", "ge", "gt", "integer_pow", "iota", "jit", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pjit",
        "platform_index", "reduce_max", "reduce_min", "reduce_sum", "reduce_window_sum", "reshape", "rev", "rsqrt", "scan", "select_n",
        "sign", "slice", "sqrt", "square", "squeeze", "stop_gradient", "sub", "transpose", "while",
    )
)  # fmt: skip
"""Primitives that are instructions of a processor, or only move numbers."""


def cpu_devices(n: int | None = None) -> int:
    """Let JAX see `n` CPU devices, so that an Experiment can spread its cells over the cores.

    On CPU one device runs small networks on one core. Sweeps are up to twice as fast on two cores when each core is a
    device. The command line calls this by itself; a script or notebook calls it once, first thing::

        import paperjax as pj
        pj.cpu_devices()

    The C library keeps up to 1 GiB of memory that is freed, where it is glibc and the environment variable ``MALLOC_TRIM_THRESHOLD_`` is
    not set: devices of one process wait for each other where each step gives memory back.

    In programs of your own that run decompositions or FFTs on all devices at once (``shard_map``), XLA's threads may wait for each other
    for ever; the environment variable ``PJRT_NPROC``, set to more than there are devices before JAX starts, gives it threads to spare.
    An Experiment runs such cells one after another instead.

    Parameters
    ----------
    n
        Number of devices; by default the number of cores this process may use.

    Returns
    -------
    int
        The number of CPU devices there will be.

    Raises
    ------
    RuntimeError
        If JAX has already started with another number of devices: the call came too late.

    Examples
    --------
    >>> import jax
    >>> there = len(jax.devices("cpu"))
    >>> cpu_devices(there) == there
    True
    """
    if n is None:
        n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n < 1:
        raise ValueError(f"cpu_devices({n}): there must be at least one device.")
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError as error:
        there = len(jax.devices("cpu"))
        if there == n:
            return n
        raise RuntimeError(
            f"cpu_devices({n}) came too late: JAX has already started with {there} CPU device(s). Call it before the first JAX computation "
            "(jax.devices(), jax.random.key(...), any array)."
        ) from error
    if n > 1:
        keep_freed_memory()
    return n


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, up to 1 GiB; `cpu_devices` and kernels on CPU without `max_bytes` call this.

    A product of 256 by 256 matrices takes and frees scratch memory at every call. By default glibc gives the pages of threads' arenas back
    to the system at once, and the next call finds them missing: 160 page faults a training step, a sixth of its time on two devices, for
    which all threads of a process share one lock. A kernel's intermediate arrays are tens of MiB, mapped and unmapped one by one: a
    quarter of the time of a small CNN's. Elsewhere than under glibc, or where ``MALLOC_TRIM_THRESHOLD_`` is set, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        # The numbers of malloc.h. Without M_MMAP_MAX = 0 blocks of some sizes are mapped and unmapped one by one.
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        mallopt(trim_threshold, 2**30)
        mallopt(top_pad, 2**26)
        mallopt(mmap_max, 0)


def compiler_options(platform: str, long_sums: bool = False) -> dict[str, Any]:
    """What every program is compiled with on a platform (``"cpu"``, ``"gpu"``, ``"tpu"``), for ``jax.jit(..., compiler_options=)``.

    On CPU, matrix products are Eigen's. XLA's others (YNNPACK, jaxlib 0.10.2) are wrong by per cents in some batches of attention's
    backward pass, and splits those of each device over all cores, where two devices are in each other's way. Its sums, in pairs of pairs,
    are right: with `long_sums` they are kept, where a thousand numbers added up one by one in single precision are off by 1e-6.

    Examples
    --------
    >>> compiler_options("gpu")
    {}
    """
    return known_options({YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE" if long_sums else ""}) if platform == "cpu" else {}


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those compile options that this XLA knows: one that has none of YNNPACK's products, say, has no option for them.

    Examples
    --------
    >>> known_options({"xla_no_such_option": True, "xla_backend_optimization_level": 1})
    {'xla_backend_optimization_level': 1}
    """
    return dict(_known(tuple(options.items())))


@functools.cache
def _known(options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        named = [pair for pair in options if f"No such compile option: '{pair[0]}'" in str(error)]
        if not named:
            raise
        return _known(tuple(pair for pair in options if pair not in named))
    return options


def device_budget(devices: Sequence[Any]) -> int:
    """Half of the memory that the devices have: of the host on CPU, of one device elsewhere, in bytes."""
    stats = None if devices[0].platform == "cpu" else devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def check_mesh(mesh: Any) -> None:
    """Refuse what is no mesh of devices.

    Raises
    ------
    TypeError
        If it is no `jax.sharding.Mesh`.
    ValueError
        If it has no devices.
    """
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh = {mesh!r} is no jax.sharding.Mesh of devices. Make one: jax.make_mesh((jax.device_count(),), ('pairs',)).")
    if not mesh.devices.size:
        raise ValueError("mesh has no devices.")


def devices_of(mesh: Any, name: str, *arrays: Any) -> list[Any]:
    """The devices of a mesh, in its order; none if there is no mesh.

    Parameters
    ----------
    mesh
        A `jax.sharding.Mesh` or `None`.
    name
        Of the function that takes it, for its messages: `name(..., x1[mine], x2, mesh=...)`.
    arrays
        What is to be computed with on them.

    Raises
    ------
    TypeError
        If it is no `jax.sharding.Mesh` of devices.
    ValueError
        If some of them are another process's, or arrays are traced.

    Examples
    --------
    >>> devices_of(jax.make_mesh((1,), ("x",)), "limit") == jax.devices()[:1]
    True
    """
    if mesh is None:
        return []
    check_mesh(mesh)
    devices = list(mesh.devices.flat)
    others = [d for d in devices if d.process_index != jax.process_index()]
    if others:
        raise ValueError(
            f"mesh has {len(others)} of its {len(devices)} devices in other processes, {others[0]} first, and examples are arrays of this "
            f"one. Give a mesh of jax.local_devices(), and each process examples of its own: {name}(..., x1[mine], x2, mesh=...)."
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        raise ValueError(
            f"mesh is given in a function that is being traced: there JAX places arrays. Call {name} outside of it, or leave it out."
        )
    return devices
