"""The Result of an Experiment: an `xarray.Dataset` with named axes, its provenance, and its standard errors."""

import datetime
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    import xarray

PACKAGES = ("paperjax", "jax", "jaxlib", "optax", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def provenance(experiment: Any) -> dict[str, str]:
    """Where a Result comes from: fields, versions, devices, git commit (if the working directory is in a repository)."""
    found = {
        "experiment": json.dumps(experiment.describe()),
        "versions": json.dumps(versions()),
        "python": platform.python_version(),
        "device": f"{len(jax.devices())} × {jax.devices()[0].device_kind} ({jax.devices()[0].platform})",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {**found, "git": f"unknown ({type(error).__name__})"}
    return {**found, "git": git.stdout.strip()} if git.returncode == 0 else found


def label(value: Any) -> Any:
    """A coordinate for a value of an axis: numbers and strings as they are, anything else by its name.

    Examples
    --------
    >>> label(0.1), label(functools.partial(max, 3))
    (0.1, 'max')
    """
    if isinstance(value, (bool, int, float, str)):
        return value
    value = value.func if isinstance(value, functools.partial) else value
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    if hasattr(value, "_fields"):  # An optax transformation: its text holds addresses.
        name = name or type(value).__name__
    return name if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _coordinate(values: tuple[Any, ...]) -> list[Any]:
    labels = [label(v) for v in values]
    if len({str(v) for v in labels}) < len(labels):
        labels = [f"{v} #{i}" for i, v in enumerate(labels)]
    return labels if all(isinstance(v, (bool, int, float)) for v in labels) else [str(v) for v in labels]


def assemble(experiment: Any, axes: Any, out: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> "xarray.Dataset":
    """Give the measured values their names: from ``(program, cell, point, ...)`` to the grid's axes and ``step``."""
    import xarray as xr

    grid = experiment.grid
    raw = [name for name in grid.axes if name in axes.static] + list(axes.scalar)
    lengths = [len(grid.axes[name]) for name in raw]
    names = list(grid.axes)
    coords: dict[str, Any] = {name: (name, _coordinate(values)) for name, values in grid.axes.items()}
    coords |= {name: label(value) for name, value in grid.fixed.items()}
    coords["step"] = ("step", np.asarray(experiment.points))
    variables = {}
    for name, value in out.items():
        if name == "_diverged_at":
            continue
        extra = [f"{name}_{i}" for i in range(value.ndim - 3)]
        array = xr.DataArray(value.reshape(*lengths, *value.shape[2:]), dims=[*raw, "step", *extra])
        variables[name] = array.transpose(*names, "step", *extra)
    diverged = xr.DataArray(out["_diverged_at"].reshape(lengths).astype(float), dims=raw).transpose(*names)
    diverged = diverged.where(diverged >= 0)
    # The loss of a step is taken before its update: what only the last update broke shows in the measured loss.
    bad = ~np.isfinite(variables["train_loss"])
    at = xr.DataArray(np.asarray(experiment.points, float), dims="step")
    variables["diverged_at"] = diverged.fillna(at.where(bad).min("step"))
    dataset = xr.Dataset(variables, coords, {**provenance(experiment), **attrs})
    dataset["diverged_at"].attrs["long_name"] = "first step at which the loss was not finite"
    return dataset


def sem(array: "xarray.DataArray", dim: str = "seed") -> "xarray.DataArray":
    """Standard error of the mean over a dimension, ``s / sqrt(n)`` with ``s² = sum (x - mean)² / (n - 1)``.

    A NaN (a diverged cell) makes the standard error NaN: it is not left out silently.

    Raises
    ------
    ValueError
        If the array has no such dimension, or fewer than two values along it.

    Examples
    --------
    >>> import xarray
    >>> float(sem(xarray.DataArray([1.0, 3.0], dims="seed")))
    1.0
    """
    if dim not in array.dims:
        raise ValueError(f"sem: the array has no dimension {dim!r}; it has {list(map(str, array.dims))}.")
    n = array.sizes[dim]
    if n < 2:
        raise ValueError(f"sem: one value along {dim!r} has no standard error; run at least two.")
    return array.std(dim, ddof=1, skipna=False) / np.sqrt(n)


def save(result: "xarray.Dataset", path: str | Path) -> Path:
    """Write a Result to one netCDF file, attributes and all.

    Raises
    ------
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, xarray
    >>> result = xarray.Dataset(dict(loss=(("lr", "step"), [[1.0, 0.5]])), dict(lr=[0.1], step=[0, 9]), dict(run_seconds=2.0))
    >>> path = save(result, tempfile.mkdtemp() + "/result.nc")
    >>> path.name, load(path).identical(result)
    ('result.nc', True)
    """
    path = Path(path)
    result.to_netcdf(path, engine="h5netcdf")
    return path


def load(path: str | Path) -> "xarray.Dataset":
    """Read a Result that `save` wrote; ``load(save(result, path))`` is identical to `result`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> import tempfile, xarray
    >>> found = load(save(xarray.Dataset(dict(loss=("step", [1.0, 0.5])), dict(step=[0, 9])), tempfile.mkdtemp() + "/result.nc"))
    >>> float(found.loss.sel(step=9))
    0.5
    """
    import xarray as xr

    if not Path(path).is_file():
        raise FileNotFoundError(f"no Result at {path}.")
    with xr.open_dataset(path, engine="h5netcdf") as opened:
        return opened.load()
