"""Meshes of devices, and which axis of which leaf lies on them, read off the trace's roles.

A mesh has three axes: ``sweep`` for cells of a grid, ``data`` for the batch, ``model`` for parameters. A rule is a plain function from
a leaf of the trace and the length of ``model`` to a `PartitionSpec`; two are here, and a user may write a third.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from paperjax.trace.leaf import Leaf
from paperjax.trace.program import Program

AXES = ("sweep", "data", "model")
Rule = Callable[[Leaf, int], PartitionSpec]


def mesh(sweep: int = 1, data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes ``("sweep", "data", "model")`` of the first ``sweep * data * model`` devices.

    Parameters
    ----------
    sweep, data, model
        Lengths; one of them may be -1: all devices that the others leave.
    devices
        By default ``jax.devices()``.

    Raises
    ------
    ValueError
        If a length is none, or the devices are too few or are not divided; the message names lengths that would do.

    Examples
    --------
    >>> dict(mesh(devices=jax.devices()[:1]).shape)
    {'sweep': 1, 'data': 1, 'model': 1}
    """
    there = list(jax.devices() if devices is None else devices)
    lengths: dict[str, int] = dict(zip(AXES, (sweep, data, model)))
    for name, n in lengths.items():
        if isinstance(n, bool) or not isinstance(n, int) or (n < 1 and n != -1):
            raise ValueError(f"mesh({name}={n!r}): a length is a whole number, at least 1, or -1 for all devices that are left.")
    free = [name for name, n in lengths.items() if n == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: {' and '.join(free)} are both -1; only one length can follow from the number of devices.")
    given = math.prod(n for n in lengths.values() if n != -1)
    if free:
        if len(there) % given:
            raise ValueError(
                f"mesh: the lengths given multiply to {given}, which does not divide the {len(there)} devices for {free[0]}=-1. "
                f"Products that would: {_listed(len(there))}."
            )
        lengths[free[0]] = len(there) // given
    needed = math.prod(lengths.values())
    if needed > len(there):
        raise ValueError(
            f"mesh({', '.join(f'{k}={n}' for k, n in lengths.items())}) needs {needed} devices, and there are {len(there)}. Lengths whose "
            f"product is one of {_listed(len(there))} use all of them; on CPU call pj.cpu_devices({needed}) before JAX starts."
        )
    return jax.make_mesh(tuple(lengths.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=there[:needed])


def parse_mesh(text: str) -> Mesh:
    """A mesh as it is written on the command line, ``sweep=4,data=2``.

    Raises
    ------
    ValueError
        If the text has another form, names no axis of a mesh or one twice, or as `mesh`.

    Examples
    --------
    >>> parse_mesh("sweep=1").axis_names
    ('sweep', 'data', 'model')
    """
    lengths: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in AXES or not equals or name in lengths or not value.removeprefix("-").isdecimal():
            raise ValueError(f"--mesh {text}: {part!r} is no length of a mesh. Write sweep, data, model once each: sweep=4,data=2.")
        lengths[name] = int(value)
    return mesh(lengths.get("sweep", 1), lengths.get("data", 1), lengths.get("model", 1))


def tensor_parallel(leaf: Leaf, size: int) -> PartitionSpec:
    """Split an infinite axis: the free one of the deciding use if it grows (input, hidden, embedding, vector), else the contracted one.

    Stacked axes (scanned layers) and leaves without an infinite axis are left whole.

    Raises
    ------
    ValueError
        If `size` divides no such axis; the message names the sizes that would.
    """
    if not leaf.sites:
        return PartitionSpec()
    site = leaf.sites[leaf.deciding]
    grow = [a for a in (*site.out, *site.inside) if leaf.infinite[a]]
    return _split(leaf, grow, size)


def fully_sharded(leaf: Leaf, size: int) -> PartitionSpec:
    """Split the longest axis that is divided, whatever its role, stacked axes left whole; finite leaves that none divides stay whole.

    Raises
    ------
    ValueError
        If the leaf has an infinite axis and `size` divides none of its axes; the message names the sizes that would.
    """
    stacked = {a for site in leaf.sites for a in site.stack}
    order = sorted((a for a in range(len(leaf.shape)) if a not in stacked), key=lambda a: -leaf.shape[a])
    if not any(leaf.infinite) and all(leaf.shape[a] % size for a in order):
        return PartitionSpec()
    return _split(leaf, order, size)


def parameter_shardings(params: PyTree, program: Program, mesh: Mesh, rule: Rule = tensor_parallel) -> PyTree:
    """Where each parameter lies: the rule's axis over ``model``, and what the trace does not know (frozen leaves) on every device."""
    leaves = {leaf.path: leaf for leaf in program.leaves}

    def place(path: Any, value: Any) -> NamedSharding:
        leaf = leaves.get(jax.tree_util.keystr(path))
        return NamedSharding(mesh, PartitionSpec() if leaf is None else rule(leaf, mesh.shape["model"]))

    return jax.tree_util.tree_map_with_path(place, params)


def optimizer_shardings(tx: optax.GradientTransformation, params: PyTree, shardings: PyTree) -> PyTree:
    """Where the optimizer's state lies: what has a parameter's place and shape follows it, and the rest is on every device."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def follow(state: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding if state.shape == param.shape else whole

    state = jax.eval_shape(tx.init, params)
    return optax.tree_utils.tree_map_params(tx, follow, state, params, shardings, transform_non_params=lambda _: whole)


def _split(leaf: Leaf, axes: Sequence[int], size: int) -> PartitionSpec:
    if size == 1 or not axes:
        return PartitionSpec()
    for a in axes:
        if leaf.shape[a] % size == 0:
            return PartitionSpec(*(None,) * a, "model")
    would = sorted({n for a in axes for n in _divisors(leaf.shape[a])})
    raise ValueError(
        f"leaf {leaf.path} of shape {leaf.shape}: model={size} divides none of its axes {tuple(axes)}. "
        f"Lengths that would: {', '.join(map(str, would))}; or give a rule of your own."
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(n: int) -> str:
    return ", ".join(map(str, _divisors(n)))
