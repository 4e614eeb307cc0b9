"""The axes of an Experiment: named lists of values, in order."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid:
    """Named axes in order, and names with one fixed value; see `grid`.

    Examples
    --------
    >>> g = grid(width=[64, 128], lr=0.1, seed=3)
    >>> g.names, g.shape, g.values("lr")
    (('width', 'seed', 'lr'), (2, 3), (0.1,))
    >>> g.replace(seed=2).shape
    (2, 2)
    """

    axes: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, axes first."""
        return (*self.axes, *self.fixed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of values along each axis."""
        return tuple(len(values) for values in self.axes.values())

    def values(self, name: str) -> tuple[Any, ...]:
        """The values of an axis; a fixed name has one."""
        return self.axes[name] if name in self.axes else (self.fixed[name],)

    def replace(self, **axes: Any) -> "Grid":
        """The grid with some of its names given other values, each as `grid` takes them; the order is kept."""
        return grid(**{**{name: list(values) for name, values in self.axes.items()}, **self.fixed, **axes})


def grid(**axes: Any) -> Grid:
    """Every combination of the values of named axes.

    Parameters
    ----------
    **axes
        A list, tuple or array is an axis, a dimension of the Result. ``seed=8`` is the axis of the seeds ``0, ..., 7``.
        Any other single value (a number, a name) is fixed: the Result has it as a coordinate without a dimension.

    Returns
    -------
    Grid

    Raises
    ------
    ValueError
        If an axis is empty, repeats a value or has a NaN; if a learning rate is not positive; if there are no seeds.

    Examples
    --------
    >>> grid(width=[64, 128], lr=0.1, seed=3).axes
    {'width': (64, 128), 'seed': (0, 1, 2)}
    """
    ranged: dict[str, tuple[Any, ...]] = {}
    fixed: dict[str, Any] = {}
    for name, value in axes.items():
        if name == "seed" and _is_integer(value):
            if value < 1:
                raise ValueError(
                    f"grid(seed={value}): seed is the number of seeds, at least 1. For one seed of your choice: seed=[{value}]."
                )
            ranged[name] = tuple(range(int(value)))
        elif isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray, Iterable)) or _is_one_value(value):
            (fixed[name],) = _floats(name, (_plain(value),))
        else:
            ranged[name] = _floats(name, tuple(_plain(v) for v in value))
            if not ranged[name]:
                raise ValueError(f"grid({name}=[]): the axis has no value, so there is nothing to run.")
            repeated = [v for i, v in enumerate(ranged[name]) if any(v is w or _equal(v, w) for w in ranged[name][:i])]
            if repeated:
                raise ValueError(f"grid: axis {name} repeats {repeated[0]!r}. To run a setting several times, use the seed axis.")
        for v in ranged.get(name, (fixed.get(name),)):
            if isinstance(v, float) and math.isnan(v):
                raise ValueError(f"grid: axis {name} has a NaN. Every value must be a number.")
            if name in ("lr", "learning_rate") and (isinstance(v, bool) or not isinstance(v, (int, float)) or v <= 0 or math.isinf(v)):
                raise ValueError(
                    f"grid: {name} = {v!r}. A learning rate must be positive and finite; pj.logspace(-3, 1, 13) gives 1e-3 ... 10."
                )
    return Grid(ranged, fixed)


def _floats(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    # [0, 0.9] is one axis of floats, so that its values have one dtype; a learning rate is a float though written as 1.
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    wanted = name in ("lr", "learning_rate") or any(isinstance(v, float) for v in values)
    return tuple(float(v) for v in values) if numbers and wanted else values


def _is_one_value(value: Any) -> bool:
    # A Dataset, an optax transformation (a NamedTuple) or a 0-d array is one value, though some of them can be iterated.
    return hasattr(value, "_fields") or hasattr(value, "x_train") or (hasattr(value, "ndim") and value.ndim == 0)


def _equal(a: Any, b: Any) -> bool:
    plain = (bool, int, float, str)
    return isinstance(a, plain) and isinstance(b, plain) and a == b


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (hasattr(value, "ndim") and value.ndim == 0 and hasattr(value, "item")):
        return value.item()
    return value


def logspace(start: float, stop: float, num: int) -> tuple[float, ...]:
    """`num` numbers from ``10**start`` to ``10**stop``, evenly spaced in their logarithm.

    Examples
    --------
    >>> logspace(-2, 0, 3)
    (0.01, 0.1, 1.0)
    """
    return tuple(float(v) for v in np.logspace(start, stop, num))


def linspace(start: float, stop: float, num: int) -> tuple[float, ...]:
    """`num` evenly spaced numbers from `start` to `stop`.

    Examples
    --------
    >>> linspace(0, 1, 3)
    (0.0, 0.5, 1.0)
    """
    return tuple(float(v) for v in np.linspace(start, stop, num))
