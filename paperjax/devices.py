"""How many devices JAX sees on a CPU (one call, before JAX starts), and how much memory there is."""

import os
from collections.abc import Sequence
from typing import Any

import jax


def cpu_devices(n: int | None = None) -> int:
    """Let JAX see `n` CPU devices, so that an Experiment can spread its cells over the cores.

    On CPU one device runs small networks on one core. Sweeps are up to twice as fast on two cores when each core is a
    device. The command line calls this by itself; a script or notebook calls it once, first thing::

        import paperjax as pj
        pj.cpu_devices()

    XLA gets one thread more than it would have (the environment variable ``PJRT_NPROC``, unless it is set): with none to spare,
    batched decompositions on several devices wait for each other.

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
        # A batched SVD or FFT runs on a thread of XLA's one pool and waits there for other threads of the pool. With as many threads as
        # devices all of them wait, for ever; one more works them off. A second one costs a few per cent where every core is busy.
        os.environ.setdefault("PJRT_NPROC", str(max(n, os.cpu_count() or 1) + 1))
    return n


def device_budget(devices: Sequence[Any]) -> int:
    """Half of the memory that the devices have: of the host on CPU, of one device elsewhere, in bytes."""
    stats = None if devices[0].platform == "cpu" else devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
