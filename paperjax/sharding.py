"""Meshes of devices, and where a network's arrays lie on them: rules of a leaf's axes, as the trace reads what each is for."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from paperjax.model import Model
from paperjax.trace.graph import CONTRACTING, Graph, added
from paperjax.trace.probe import leaf_shapes
from paperjax.trace.streams import residual_adds
from paperjax.trace.traced import walk_model
from paperjax.trace.walk import Walk

AXES = ("sweep", "data", "model")
"""Axes of a mesh: cells of a grid, examples of a batch, and parts of the network."""


class Uses(NamedTuple):
    """A leaf as rules see it.

    Attributes
    ----------
    path, shape
        As the parameters have it.
    inside
        Axes that some use contracts or looks up: fan-in.
    out
        Axes that some use leaves free: fan-out.
    stack
        Axes that uses run over one by one: scanned layers, experts.
    writes
        Whether what it makes is added up in a residual stream: the last matrix of a branch, or an embedding that the stream starts from.

    Examples
    --------
    >>> Uses("['w']", (3, 8), (0,), (1,), ()).out
    (1,)
    """

    path: str
    shape: tuple[int, ...]
    inside: tuple[int, ...]
    out: tuple[int, ...]
    stack: tuple[int, ...]
    writes: bool = False


Rule = Callable[[Uses, Mapping[str, int]], PartitionSpec]


def mesh(*, sweep: int = 1, data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices with the axes ``("sweep", "data", "model")``.

    Parameters
    ----------
    sweep, data, model
        Devices along each axis; one of them may be -1: as many as are left.
    devices
        All that JAX sees, by default. The first ``sweep * data * model`` are taken.

    Returns
    -------
    Mesh
        Of automatic axes (`jax.sharding.AxisType.Auto`).

    Raises
    ------
    ValueError
        If a size is not a positive whole number or -1, two are -1, or there are too few devices; the message has sizes that fit.

    Examples
    --------
    >>> mesh(sweep=-1).axis_names
    ('sweep', 'data', 'model')
    """
    found = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (sweep, data, model)))
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(f"mesh: {name} = {size!r} is no number of devices: at least 1, or -1 for as many as are left.")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: {free[0]} and {free[1]} are both -1, and only one can be what is left.")
    taken = math.prod(size for size in sizes.values() if size > 0)
    if taken > len(found):
        raise ValueError(
            f"mesh: {' * '.join(f'{name}={size}' for name, size in sizes.items() if size > 0)} takes {taken} devices, and there are "
            f"{len(found)}. {_fitting(sizes, len(found))} On CPU, pj.cpu_devices({taken}) before JAX starts makes as many."
        )
    if free:
        if len(found) % taken:
            raise ValueError(
                f"mesh: the sizes given multiply to {taken}, which does not divide the {len(found)} devices for {free[0]}=-1. "
                f"{_fitting(sizes, len(found))}"
            )
        sizes[free[0]] = len(found) // taken
    shape = tuple(sizes.values())
    return Mesh(np.array(found[: math.prod(shape)]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fitting(sizes: Mapping[str, int], devices: int) -> str:
    """Up to four meshes of all devices, no axis of which is longer than asked; or of the first axis alone."""
    most = [n if n > 0 else devices for n in sizes.values()]
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    fits = [fit for fit in itertools.product(divisors, repeat=3) if math.prod(fit) == devices and all(n <= m for n, m in zip(fit, most))]
    written = [", ".join(f"{name}={n}" for name, n in zip(AXES, fit) if n > 1) for fit in fits[:4] or [(devices, 1, 1)]]
    return f"These would fit: {'; '.join(written)}." if devices > 1 else "With one device leave the mesh out."


def first_rows(whole: Mesh, lanes: int) -> Mesh:
    """The devices of so many lanes: of a mesh's first indices along ``sweep``.

    Raises
    ------
    ValueError
        If the mesh has fewer, or they leave a process without a device.

    Examples
    --------
    >>> dict(first_rows(mesh(data=1), 1).shape)
    {'sweep': 1, 'data': 1, 'model': 1}
    """
    there = whole.devices.shape[0]
    if lanes > there:
        raise ValueError(f"the layout has {lanes} lanes, and the mesh sweep={there}. Use lanes={there}, or a mesh with sweep={lanes}.")
    left = {d.process_index for d in whole.devices.flat} - {d.process_index for d in whole.devices[:lanes].flat}
    if left:
        raise ValueError(
            f"the layout has {lanes} of the mesh's {there} lanes, which leaves process {min(left)} without a device. Use lanes={there}."
        )
    return Mesh(whole.devices[:lanes], whole.axis_names, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> Mesh:
    """A mesh as the command line has it.

    Raises
    ------
    ValueError
        If it is not ``axis=size,...`` of the three axes, or as `mesh`.

    Examples
    --------
    >>> dict(parse_mesh("sweep=1").shape)
    {'sweep': 1, 'data': 1, 'model': 1}
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().lstrip("-").isdigit() or name.strip() in found:
            raise ValueError(f"--mesh {text}: {part!r} is not one of sweep=N, data=N, model=N. For instance --mesh sweep=4,data=2.")
        found[name.strip()] = int(size)
    return mesh(**found)  # pyright: ignore[reportArgumentType]


def tensor_parallel(leaf: Uses, sizes: Mapping[str, int]) -> PartitionSpec:
    """A matrix's fan-out over ``model``, or its fan-in if it writes into a residual stream; biases, gains and positions on every device.

    A branch then ends in one all-reduce, as do its cotangents, and the stream is whole everywhere (Shoeybi et al., arXiv 1909.08053). Of
    several axes the first that divides: heads before a head's units. Where none divides it is the other of fan-out and fan-in.

    Examples
    --------
    >>> one = {"sweep": 1, "data": 1, "model": 4}
    >>> tensor_parallel(Uses("['up']", (4, 8), (0,), (1,), ()), one) == PartitionSpec(None, "model")
    True
    >>> tensor_parallel(Uses("['down']", (8, 4), (0,), (1,), (), writes=True), one) == PartitionSpec("model")
    True
    """
    if not leaf.inside:
        return PartitionSpec()
    choices = (leaf.inside, leaf.out) if leaf.writes else (leaf.out, leaf.inside)
    return _over(leaf, choices, sizes, ("model",))


def fully_sharded(leaf: Uses, sizes: Mapping[str, int]) -> PartitionSpec:
    """A leaf's largest axis that divides over ``data`` and ``model`` together (ZeRO, arXiv 1910.02054, stage 3; FSDP), whatever it is for.

    Each device keeps a part of every leaf and of its optimizer state; XLA gathers a leaf where it is used. Nothing divides products over
    ``model`` then, so batches go over both axes (see `Placement`).

    Examples
    --------
    >>> fully_sharded(Uses("['w']", (3, 8), (0,), (1,), ()), {"sweep": 1, "data": 2, "model": 2}) == PartitionSpec(None, ("data", "model"))
    True
    """
    largest_first = sorted(range(len(leaf.shape)), key=lambda a: -leaf.shape[a])
    return _over(leaf, (largest_first,), sizes, ("data", "model"))


def _over(leaf: Uses, choices: Sequence[Sequence[int]], sizes: Mapping[str, int], names: tuple[str, ...]) -> PartitionSpec:
    devices = math.prod(sizes[name] for name in names)
    for axes in choices:
        fits = [a for a in axes if leaf.shape[a] % devices == 0 and leaf.shape[a] >= devices]
        if fits and devices > 1:
            return PartitionSpec(*(None,) * fits[0], names if names[1:] else names[0])
    return PartitionSpec()


def uses_of(model: Model, x: Any) -> list[Uses]:
    """What the axes of every trained leaf are for, from the trace of the network; nothing is allocated.

    Parameters
    ----------
    model
        A `Model`.
    x
        An example batch, or its shape.

    Returns
    -------
    list
        In the order of the flattened trained parameters.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> net = Model(lambda key, x: {"w": jnp.ones((3, 8))}, lambda p, x: x @ p["w"])
    >>> uses_of(net, jnp.ones((2, 3)))[0]
    Uses(path="['w']", shape=(3, 8), inside=(0,), out=(1,), stack=(), writes=False)
    """
    walk, params = walk_model(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    writers, found = _writers(walk), []
    for number, leaf in enumerate(leaf_shapes(params)):
        sites = [site for site in walk.sites if site.leaf == number]
        inside, out, stack = (tuple(sorted({a for site in sites for a in getattr(site, kind)})) for kind in ("inside", "out", "stack"))
        found.append(Uses(leaf.path, tuple(leaf.shape), inside, out, stack, number in writers))
    return found


def _writers(walk: Walk) -> set[int]:
    """Leaves whose products residual branches end in, or streams start from."""
    graph, adds = Graph(walk), {add.node: add for add in residual_adds(walk)}
    found = {leaf for add in adds.values() for leaf in add.writers}
    for node in adds:
        # Down the stream, to what it starts from.
        while node in adds or graph.moves(node) or added(graph, node):
            parents = graph.nodes[node].parents
            node = next((p for p in parents if p != adds[node].branch), parents[0]) if node in adds else parents[0]
        found.update(site.leaf for site in graph.sites.get(node, ()) if site.kind in CONTRACTING)
    return found


class Placement(NamedTuple):
    """Where the arrays of one cell lie on the ``data`` and ``model`` axes of a mesh.

    Attributes
    ----------
    mesh
        The mesh.
    specs
        For each trained leaf, its path, its shape, and where its axes go.
    examples
        Axes of the mesh that the examples of a batch go over: ``data``, and ``model`` too where leaves are divided over both together
        and none over ``model`` alone, since each product would else be computed by all devices along ``model``.
    full
        Whether a step takes all examples there are.
    """

    mesh: Mesh
    specs: tuple[tuple[str, tuple[int, ...], PartitionSpec], ...]
    examples: tuple[str, ...] = ("data",)
    full: bool = False

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Of an array of the state: that of the leaf whose path its own ends with, as an optimizer's moments do; or nowhere divided."""
        return next((spec for name, of, spec in self.specs if path.endswith(name) and tuple(shape) == of), PartitionSpec())

    def state(self, state: PyTree) -> PyTree:
        """The state of a cell that is being traced, with every array where it lies."""
        return jax.tree_util.tree_map_with_path(lambda path, a: self._put(a, self.spec(jax.tree_util.keystr(path), a.shape)), state)

    def batch(self, tree: PyTree) -> PyTree:
        """Examples, first axis, over ``data`` (see `examples`)."""
        return jax.tree.map(lambda a: self._put(a, PartitionSpec(self.examples)), tree)

    def whole(self, data: PyTree) -> PyTree:
        """All examples there are, over the same axes; arrays whose first axis does not divide are on every device."""
        return jax.tree.map(lambda a: self._put(a, self._rows(a)), data)

    def data(self, data: PyTree) -> PyTree:
        """Shardings of a set of examples between steps: if a step takes all, each device has its own; minibatches are of any of them."""
        return jax.tree.map(lambda a: NamedSharding(self.mesh, self._rows(a) if self.full else PartitionSpec()), data)

    def _rows(self, a: Any) -> PartitionSpec:
        devices = math.prod(self.mesh.shape[name] for name in self.examples)
        divides = getattr(a, "ndim", 0) > 0 and a.size > 0 and a.shape[0] % devices == 0
        return PartitionSpec(self.examples) if divides else PartitionSpec()

    def cells(self, tree: PyTree, axis: str) -> PyTree:
        """Shardings of the states of several cells, whose first axis is the cells."""

        def of(path: Any, a: Any) -> NamedSharding:
            if 0 in a.shape:
                return NamedSharding(self.mesh, PartitionSpec())
            return NamedSharding(self.mesh, PartitionSpec(axis, *self.spec(jax.tree_util.keystr(path), a.shape[1:])))

        return jax.tree_util.tree_map_with_path(of, tree)

    def _put(self, a: Any, spec: PartitionSpec) -> Any:
        if not hasattr(a, "ndim") or not a.size or jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        # Inside `jax.shard_map` over the cells the mesh is that of the axes that are left.
        here = jax.sharding.get_abstract_mesh()
        return jax.lax.with_sharding_constraint(a, NamedSharding(self.mesh if here.empty else here, spec))


def placement(mesh: Mesh, rule: Rule, model: Model, x: Any, batch: int | None) -> Placement:
    """Where a network's leaves lie by a rule, and whether its batches divide.

    Parameters
    ----------
    mesh
        From `paperjax.mesh`.
    rule
        ``(Uses, sizes of the mesh) -> PartitionSpec``, such as `tensor_parallel`.
    model, x, batch
        The network, all training examples (or their shape), and the size of a batch, ``None`` for all.

    Raises
    ------
    ValueError
        If a batch or an axis that the rule names does not divide, or the rule names an axis that the mesh does not have.
    """
    sizes = dict(mesh.shape)
    found = []
    for leaf in uses_of(model, x):
        spec = rule(leaf, sizes)
        for axis, names in enumerate(list[Any](spec)):
            names = () if names is None else names if isinstance(names, tuple) else (names,)
            wrong = [name for name in names if name not in ("data", "model")]
            if wrong or axis >= len(leaf.shape):
                raise ValueError(
                    f"the sharding rule gives leaf {leaf.path} {leaf.shape} the specification {spec}: axes of a leaf go over 'data' and "
                    "'model'; 'sweep' is the cells'."
                )
            devices = math.prod(sizes[name] for name in names)
            if leaf.shape[axis] % devices:
                fits = [n for n in range(1, devices + 1) if leaf.shape[axis] % n == 0]
                raise ValueError(
                    f"the sharding rule divides axis {axis} of leaf {leaf.path} {leaf.shape} over {devices} devices ({', '.join(names)}), "
                    f"and {leaf.shape[axis]} does not divide: {fits[-1]} would, or leave the axis out."
                )
        found.append((leaf.path, leaf.shape, spec))
    parts = [{names} if isinstance(names, str) else set(names) for *_, spec in found for names in list[Any](spec) if names]
    axes = ("data", "model") if set(AXES[1:]) in parts and {"model"} not in parts else ("data",)
    n = x.shape[0]
    _check_batch(n if batch is None else batch, axes, sizes)
    # A leaf whose path ends as another's does is found first by the longer one.
    return Placement(mesh, tuple(sorted(found, key=lambda one: -len(one[0]))), axes, batch in (None, n))


def _check_batch(examples: int, axes: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    devices = math.prod(sizes[name] for name in axes)
    if examples % devices == 0:
        return
    over = " * ".join(f"{name}={sizes[name]}" for name in axes)
    most = max(n for n in range(1, devices + 1) if examples % n == 0)
    raise ValueError(
        f"mesh: a batch of {examples} examples does not divide over {over} devices. {' * '.join(axes)}={most} would, or a batch of "
        f"{max(1, examples // devices) * devices}."
    )
