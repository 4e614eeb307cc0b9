"""The devices of a mesh, over which tiles of pairs are spread: each computes some, and none needs what another does."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def devices_of(mesh: Any, *examples: Any) -> list[Any]:
    """The devices of a mesh, in its order; none if there is no mesh.

    Raises
    ------
    TypeError
        If it is no `jax.sharding.Mesh` of devices.
    ValueError
        If some of them are another process's, or examples are traced.

    Examples
    --------
    >>> devices_of(jax.make_mesh((1,), ("x",))) == jax.devices()[:1]
    True
    """
    if mesh is None:
        return []
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh = {mesh!r} is no jax.sharding.Mesh of devices. Make one: jax.make_mesh((jax.device_count(),), ('pairs',)).")
    devices = list(mesh.devices.flat)
    others = [d for d in devices if d.process_index != jax.process_index()]
    if others:
        raise ValueError(
            f"mesh has {len(others)} of its {len(devices)} devices in other processes, {others[0]} first, and examples are arrays of this "
            "one. Give a mesh of jax.local_devices(), and each process examples of its own: limit(fam, x1[mine], x2, mesh=...)."
        )
    if not devices:
        raise ValueError("mesh has no devices.")
    if any(isinstance(x, Tracer) for x in examples):
        raise ValueError(
            "mesh is given in a function that is being traced: there JAX places arrays. Call limit outside of it, or leave it out."
        )
    return devices


def enough(side: int, tiles: Callable[[int], int], devices: int) -> int:
    """The side of a tile, made smaller until there are as many tiles as devices.

    Examples
    --------
    >>> import math
    >>> enough(256, lambda side: math.ceil(300 / side) ** 2, 8)
    128
    """
    while side > 1 and tiles(side) < devices:
        side = max(1, side // 2)
    return side
