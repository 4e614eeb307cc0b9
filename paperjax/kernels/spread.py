"""A kernel over the devices of a mesh: each records its share of a batch, and contracts all rows of a block with its columns."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paperjax.kernels import programs
from paperjax.kernels.blocks import filled
from paperjax.kernels.network import Network, Spec
from paperjax.layout import WAIT_IN_POOL, primitives
from paperjax.model import Model

PAIRS = "pairs"
SHARED, EXAMPLES, COLUMNS = PartitionSpec(), PartitionSpec(PAIRS), PartitionSpec(None, PAIRS)


def line_of(devices: Sequence[Any], network: Network) -> Mesh:
    """The devices in one line; of the CPU's only the first, where XLA's threads would wait for each other (`WAIT_IN_POOL`).

    Examples
    --------
    >>> from paperjax.kernels.network import read
    >>> line_of(jax.devices(), read(Model(None, lambda w, x: x @ w), jnp.ones(3), jnp.ones((2, 3)))).axis_names
    ('pairs',)
    """
    waiting = devices[0].platform == "cpu" and primitives(network.jaxpr.jaxpr) & WAIT_IN_POOL
    return Mesh(np.array(devices[:1] if waiting else devices), (PAIRS,), axis_types=(AxisType.Auto,))


def _on_each(x: Any, mesh: Mesh, n: int, m: int | None = None) -> programs.Rows:
    """Examples of a batch on each device, for blocks of ``n`` by ``m`` of them, or by its share of the batch."""
    share = x.shape[0] // mesh.devices.size
    return programs.Rows(max(share, n), n, share if m is None else m)


@programs.program(lambda *args: (args[3], _on_each(args[3], args[5], *args[4])), "model", "spec", "shape", "mesh")
def record_parts(model: Model, spec: Spec, params: Any, x: Any, shape: tuple[int, int], mesh: Mesh) -> Any:
    """What blocks of that shape need of one batch, each device's share of it on that device."""

    def part(params: Any, x: Any) -> Any:
        return programs.record_program(model, spec, params, x, shape)

    return jax.shard_map(part, mesh=mesh, in_specs=(SHARED, EXAMPLES), out_specs=EXAMPLES, check_vma=False)(params, x)


@programs.program(lambda *args: (args[4][1], _on_each(args[5][1], args[6], len(args[4][1]))), "model", "spec", "mesh")
def pair_parts(model: Model, spec: Spec, params: Any, weights: Any, rows: Any, columns: Any, mesh: Mesh) -> dict[str, Any]:
    """The kernel between rows that every device has and each device's columns."""

    def part(params: Any, weights: Any, rows: Any, columns: Any) -> dict[str, Any]:
        return programs.pair_program(model, spec, params, weights, rows, columns)

    specs = (SHARED, SHARED, SHARED, EXAMPLES)
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=COLUMNS, check_vma=False)(params, weights, rows, columns)


@programs.program(lambda *args: (args[3], _on_each(args[3], args[5], 1, 1)), "model", "spec", "mesh")
def diagonal_parts(model: Model, spec: Spec, params: Any, x: Any, weights: Any, mesh: Mesh) -> dict[str, Any]:
    """The kernel of every example with itself, each device's share on that device."""

    def part(params: Any, weights: Any, x: Any) -> dict[str, Any]:
        return programs.diagonal_program(model, spec, params, weights, x)

    return jax.shard_map(part, mesh=mesh, in_specs=(SHARED, SHARED, EXAMPLES), out_specs=EXAMPLES, check_vma=False)(params, weights, x)


def in_shares(compute: Callable[[Any], Any], x: Any, at_once: int, mesh: Mesh) -> Any:
    """What `compute` gives of a batch on the host, filled up so that all devices have as many examples; so many at a time on each.

    Examples
    --------
    >>> line = Mesh(np.array(jax.devices()), (PAIRS,))
    >>> np.asarray(in_shares(lambda x: 2 * x, np.arange(5.0), 1, line))[:5]
    array([0., 2., 4., 6., 8.], dtype=float32)
    """
    devices = mesh.devices.size
    each = math.ceil(x.shape[0] / devices)
    groups = math.ceil(each / at_once)
    size = math.ceil(each / groups)
    shares = filled(x, 0, each * devices).reshape(devices, each, *x.shape[1:])
    parts = []
    for start in range(0, each, size):
        group = shares[:, np.minimum(np.arange(start, start + size), each - 1)].reshape(devices * size, *x.shape[1:])
        parts.append(compute(jax.device_put(group, NamedSharding(mesh, EXAMPLES))))
    return parts[0] if len(parts) == 1 else _joined(parts, each, mesh)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _joined(parts: list[Any], each: int, mesh: Mesh) -> Any:
    def join(parts: list[Any]) -> Any:
        return jax.tree.map(lambda *some: jnp.concatenate(some)[:each], *parts)

    return jax.shard_map(join, mesh=mesh, in_specs=EXAMPLES, out_specs=EXAMPLES, check_vma=False)(parts)


@functools.partial(jax.jit, static_argnums=(1, 2))
def everywhere(recorded: Any, n: int, mesh: Mesh) -> Any:
    """What was recorded of a batch of `n` examples, all of it on every device."""
    whole = NamedSharding(mesh, SHARED)
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a[:n], whole), recorded)
