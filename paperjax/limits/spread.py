"""Tiles of pairs over the devices of a mesh: each device computes some of them, and none needs what another does."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.core import Tracer

Tile = tuple[range, range]


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


def enough(side: int, tiles: Callable[[int], list[Tile]], devices: Sequence[Any]) -> int:
    """The side of a tile, made smaller until there is one for each device."""
    while side > 1 and len(tiles(side)) < len(devices):
        side = max(1, side // 2)
    return side


def computed(
    run: Callable[..., Any], parts: Callable[[Tile], Any], tiles: Sequence[Tile], devices: Sequence[Any]
) -> Iterator[tuple[Tile, Any]]:
    """Each tile with what `run` makes of its part; as many at a time as there are devices."""
    if not devices:
        for tile in tiles:
            yield tile, run(*parts(tile))
        return
    for start in range(0, len(tiles), len(devices)):
        some = tiles[start : start + len(devices)]
        # All are under way before the first is waited for.
        made = [run(*jax.device_put(parts(tile), device)) for tile, device in zip(some, devices)]
        yield from zip(some, made)
