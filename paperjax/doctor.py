"""What an installation is and whether it computes: versions, devices, memory, caches, and one product checked against NumPy."""

import importlib.metadata
import importlib.util
import os
import platform
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

REQUIRED = (
    "paperjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "xarray",
    "h5netcdf",
    "numpy",
    "scipy",
    "matplotlib",
    "scikit-learn",
)
OPTIONAL = ("equinox", "neural-tangents")
# Of a 256 × 256 float32 product of standard normals, relative to its largest entry.
TOLERANCE = 1e-5


def examine() -> tuple[list[tuple[str, str]], bool]:
    """Look at versions, devices, memory and cache.

    Returns
    -------
    rows, healthy
        Pairs of what was looked at and what was found; whether everything required is there and the product is right.

    Examples
    --------
    >>> rows, healthy = examine()
    >>> healthy, rows[0][0]
    (True, 'python')
    """
    from paperjax.data.sources import cache_folder

    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    rows += [(name, versions[name] or "MISSING: pip install --force-reinstall paperjax") for name in REQUIRED]
    rows += [(f"{name} (optional)", versions[name] or "not installed") for name in OPTIONAL]
    rows += _devices()
    rows += [("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())), ("memory", _memory())]
    rows.append(("cache of data sets", describe_folder(Path(cache_folder()))))
    error = matmul_error()
    right = error < TOLERANCE
    rows.append(("matmul against NumPy", f"{'ok' if right else 'WRONG'}: largest relative error {error:.1e} (at most {TOLERANCE:.0e})"))
    return rows, right and all(versions[name] for name in REQUIRED)


def matmul_error() -> float:
    """Largest error of a 256 × 256 float32 product on the default device against NumPy in float64, relative to the largest entry."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 256, 256)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    # The highest precision, since a TPU or a recent GPU rounds the factors by default.
    found = np.asarray(jnp.matmul(a, b, precision="highest"), np.float64)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def describe_folder(folder: Path) -> str:
    """A folder's path with what is in it: number of files and their size in all."""
    if not folder.is_dir():
        return f"{folder} (not there yet)"
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted({path.relative_to(folder).parts[0] for path in files})
    return f"{folder}: {len(files)} files, {_bytes(sum(path.stat().st_size for path in files))}{': ' if names else ''}{', '.join(names)}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    rows = []
    devices = jax.devices()
    for (platform_name, kind), n in Counter((d.platform, d.device_kind) for d in devices).items():
        one = next(d for d in devices if (d.platform, d.device_kind) == (platform_name, kind))
        limit = (one.memory_stats() or {}).get("bytes_limit")
        rows.append(
            (f"devices ({platform_name})", f"{n} × {kind}, {_bytes(limit) + ' each' if limit else 'sharing the memory of the machine'}")
        )
    return rows


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return f"{_bytes(page * os.sysconf('SC_PHYS_PAGES'))}, of which {_bytes(page * os.sysconf('SC_AVPHYS_PAGES'))} free"
    except (ValueError, OSError, AttributeError) as error:
        return f"unknown ({type(error).__name__}: this system does not say)"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
