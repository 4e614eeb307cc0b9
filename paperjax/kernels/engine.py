"""The kernel of two batches as one program: trace, record, contract."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from paperjax.kernels import contract
from paperjax.kernels.factors import Term, Terms, find_terms
from paperjax.kernels.features import Features, features
from paperjax.kernels.routes import Choice, Machine, Sizes, choose, forward_flops, itemsize
from paperjax.model import Model, join, split
from paperjax.trace import primitives as prim
from paperjax.trace.products import find_products


class Spec(NamedTuple):
    """What is asked of a kernel; hashable, so that a program is compiled once for each.

    Attributes
    ----------
    outputs
        ``"full"``, ``"trace"`` or ``"diagonal"``.
    which
        Number of the array among the model's outputs, and flat number of the one output wanted, if only one is.
    per
        ``None``, ``"leaf"`` or ``"layer"``.
    route
        As `paperjax.kernels.ntk` takes it, sorted pairs in place of a dict.
    only
        Paths of the leaves that count; ``None`` for all.
    wide
        Whether to contract in float64.
    coupled
        Whether the examples of a batch may depend on each other.
    """

    outputs: str = "full"
    which: tuple[int, int | None] = (0, None)
    per: str | None = None
    route: str | tuple[tuple[str, str], ...] = "auto"
    only: tuple[str, ...] | None = None
    wide: bool = False
    coupled: bool = False


class Network(NamedTuple):
    """A model with its parameters taken apart: trained leaves, what is given, and the trace of a batch of one example.

    Attributes
    ----------
    jaxpr
        ``(*leaves, *given, x) -> y``.
    paths, shapes
        Of the trained leaves.
    terms
        Leaves in factors and others.
    out
        Shape of the output of one example.
    dtype
        Of the output.
    """

    jaxpr: jex.ClosedJaxpr
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    terms: Terms
    out: tuple[int, ...]
    dtype: Any


def flat(params: Any) -> tuple[list[Any], list[Any], tuple[str, ...], Any]:
    """Trained leaves, given leaves, paths of the trained ones, and how to put them together."""
    trained, given = split(params)
    leaves, tree = jax.tree.flatten(trained)
    fixed, fixed_tree = jax.tree.flatten(given)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained))

    def whole(leaves: Any, fixed: Any) -> Any:
        return join(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(fixed_tree, fixed))

    return leaves, fixed, paths, whole


def read(model: Model, params: Any, x: Any, which: int = 0, batch: int = 1) -> Network:
    """Trace a model for a batch of one example and find its products; nothing is computed.

    Parameters
    ----------
    model, params
        The model and its parameters, or their shapes.
    x
        A batch, or its shape.
    which
        Number of the array among the model's outputs.
    batch
        Examples in the traced batch.
    """
    leaves, fixed, paths, whole = flat(params)
    n = len(leaves)

    def apply(*arguments: Any) -> Any:
        y = model.apply(whole(list(arguments[:n]), list(arguments[n:-1])), arguments[-1])
        return jax.tree.leaves(y)[which]

    one = jax.ShapeDtypeStruct((batch, *jnp.shape(x)[1:]), jnp.result_type(x))
    jaxpr = prim.trace(apply, *map(_shaped, leaves), *map(_shaped, fixed), one)
    y = jaxpr.jaxpr.outvars[0].aval
    terms = find_terms(find_products(jaxpr, n))
    return Network(jaxpr, paths, tuple(jnp.shape(leaf) for leaf in leaves), terms, tuple(y.shape[1:]), y.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _shaped(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def n_outputs(network: Network, spec: Spec) -> int:
    """How many outputs of an example the kernel is between."""
    return 1 if spec.which[1] is not None else math.prod(network.out)


def sizes_of(network: Network, spec: Spec, n: int, m: int) -> Sizes:
    """What the cost of a kernel of that many examples depends on."""
    size = 8 if spec.wide else itemsize(network.dtype)
    return Sizes(n, m, n_outputs(network, spec), size, forward_flops(network.jaxpr))


def routes(network: Network, spec: Spec, n: int, m: int, machine: Machine | None = None) -> tuple[Choice, ...]:
    """The route of each leaf for a block of ``n`` by ``m`` examples."""
    machine = machine or Machine.of(jax.default_backend())
    route: str | Mapping[str, str] = spec.route if isinstance(spec.route, str) else dict(spec.route)
    sizes = tuple(math.prod(shape) for shape in network.shapes)
    found = choose(network.terms, network.paths, sizes, spec.outputs, sizes_of(network, spec, n, m), route, machine)
    return tuple(c for c in found if spec.only is None or network.paths[c.leaf] in spec.only)


def directions(network: Network, spec: Spec) -> Any:
    """The outputs as unit vectors, ``(O, *out)``."""
    size = math.prod(network.out)
    unit = np.eye(size, dtype=np.float32) if spec.which[1] is None else np.eye(1, size, spec.which[1], dtype=np.float32)
    return jnp.asarray(unit).reshape(-1, *network.out)


def recorded(choices: tuple[Choice, ...], network: Network) -> tuple[list[Term], list[int], list[int]]:
    """Terms that are recorded (by number), leaves whose gradients are taken, leaves by products with vectors."""
    numbers = sorted({c.term for c in choices if c.term is not None})
    gradients = sorted({c.leaf for c in choices if c.term is None and c.route == "jacobian"})
    by_vectors = sorted({c.leaf for c in choices if c.term is None and c.route == "ntvp"})
    return [network.terms.terms[n] for n in numbers], gradients, by_vectors


def record(network: Network, spec: Spec, choices: tuple[Choice, ...], arguments: Any, x: Any) -> Features:
    """What the routes need of one batch."""
    terms, gradients, _ = recorded(choices, network)
    found = features(network.jaxpr, terms, gradients, arguments, len(network.shapes), x, directions(network, spec))
    if spec.wide:
        found = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, found)
    return found


class Scale(NamedTuple):
    """Factors that weigh the leaves, one number each, or none."""

    of: tuple[Any, ...] | None

    def __call__(self, leaf: int, kernel: Any) -> Any:
        """The kernel of a leaf, weighed."""
        return kernel if self.of is None else kernel * jnp.asarray(self.of[leaf]).astype(kernel.dtype)


def pairs(
    network: Network,
    spec: Spec,
    choices: tuple[Choice, ...],
    weigh: Scale,
    first: Features,
    second: Features,
    vectors: Any = None,
) -> dict[str, Any]:
    """The kernel between two recorded batches: ``{"": whole}``, or one for each leaf or layer.

    ``vectors(leaf numbers)`` gives the kernel of leaves that go by products with vectors.
    """
    terms, gradients, by_vectors = recorded(choices, network)
    numbers = sorted({c.term for c in choices if c.term is not None})
    total: dict[str, Any] = {}

    def add(leaf: int, kernel: Any, layers: int) -> None:
        kernel = weigh(leaf, kernel)
        if layers:
            for n in range(layers):
                _into(total, f"{_parent(network.paths[leaf])}, layer {n}", kernel[n])
        else:
            _into(total, {None: "", "leaf": network.paths[leaf], "layer": _parent(network.paths[leaf])}[spec.per], kernel)

    for n, (number, term) in enumerate(zip(numbers, terms)):
        wanted = {c.leaf: c.route for c in choices if c.term == number}
        route = wanted.get(term.leaf, "gram")
        layers = network.terms.layers.get(term.leaf, 0) if spec.per == "layer" else 0

        def one(a: Any, b: Any, term: Term = term, route: str = route) -> list[Any]:
            if route == "gram":
                return contract.gram(term, a, b, spec.outputs)
            found = [contract.jacobians(term, x, y) for x, y in zip(a, b)]
            return [contract.jacobian_contraction(pair, spec.outputs) for pair in zip(*found)]

        a, b = (first.a[n], second.a[n]), (first.b[n], second.b[n])
        kernels = contract.by_layers(one, layers, a, b) if layers else one(a, b)
        for leaf, kernel in zip((term.leaf, term.bias), kernels):
            if leaf in wanted:
                add(leaf, kernel, layers)
    for n, leaf in enumerate(gradients):
        layers = network.terms.layers.get(leaf, 0) if spec.per == "layer" else 0
        pair = (first.gradients[n], second.gradients[n])
        if layers:
            kernel = jnp.stack([contract.jacobian_contraction((pair[0][:, :, i], pair[1][:, :, i]), spec.outputs) for i in range(layers)])
        else:
            kernel = contract.jacobian_contraction(pair, spec.outputs)
        add(leaf, kernel, layers)
    for leaf in by_vectors:
        add(leaf, vectors(leaf), 0)
    return total


def _into(total: dict[str, Any], name: str, kernel: Any) -> None:
    total[name] = total[name] + kernel if name in total else kernel


def _parent(path: str) -> str:
    """The path of the module that a leaf belongs to: all but its last key."""
    keys = [i for i, c in enumerate(path) if c in "[."]
    return path[: keys[-1]] if len(keys) > 1 else path


def by_vectors(network: Network, spec: Spec, arguments: Any, leaf: int, x1: Any, x2: Any) -> Any:
    """Kernel of one leaf by products with vectors, ``J_1 (J_2^T e)`` for every output ``e`` of every example of the second batch."""
    unit = directions(network, spec)

    def output(value: Any, x: Any) -> Any:
        changed = [value if n == leaf else argument for n, argument in enumerate(arguments)]
        y = jex.jaxpr_as_fun(network.jaxpr)(*changed, x[None])[0][0]
        return jnp.tensordot(unit.astype(y.dtype), y, len(network.out))

    def column(x: Any) -> Any:
        y, pull = jax.vjp(lambda value: output(value, x), arguments[leaf])

        def against(tangent: Any) -> Any:
            return jax.vmap(lambda z: jax.jvp(lambda value: output(value, z), (arguments[leaf],), (tangent,))[1])(x1)

        return jax.vmap(lambda e: against(pull(e)[0]))(jnp.eye(y.size, dtype=y.dtype))

    found = lax.map(column, x2)
    kernel = found.transpose(2, 3, 0, 1)
    kernel = kernel.astype(jnp.float64) if spec.wide else kernel
    if spec.outputs == "full":
        return kernel
    return jnp.einsum("nomo->nm" if spec.outputs == "trace" else "nomo->nom", kernel)


def coupled_kernel(model: Model, spec: Spec, weigh: Scale, params: Any, x1: Any, x2: Any) -> dict[str, Any]:
    """By the gradients of whole batches, whose examples may depend on each other."""
    networks = [read(model, params, x, spec.which[0], batch=x.shape[0]) for x in (x1, x2)]
    leaves, fixed, _, _ = flat(params)
    total: dict[str, Any] = {}
    unit = directions(networks[0], spec)

    def outputs(network: Network, leaf: int, x: Any, value: Any) -> Any:
        changed = [value if n == leaf else argument for n, argument in enumerate(leaves)]
        y = jex.jaxpr_as_fun(network.jaxpr)(*changed, *fixed, x)[0]
        return jnp.tensordot(y, unit.astype(y.dtype), [tuple(range(1, y.ndim)), tuple(range(1, unit.ndim))])

    for leaf, path in enumerate(networks[0].paths):
        if spec.only is not None and path not in spec.only:
            continue
        found = [
            jax.jacrev(lambda v, net=net, x=x, leaf=leaf: outputs(net, v, leaf, x))(leaves[leaf]) for net, x in zip(networks, (x1, x2))
        ]
        if spec.wide:
            found = [g.astype(jnp.float64) for g in found]
        name = {None: "", "leaf": path, "layer": _parent(path)}[spec.per]
        _into(total, name, weigh(leaf, contract.jacobian_contraction((found[0], found[1]), spec.outputs)))
    return total


def finished(spec: Spec, out: tuple[int, ...], kernels: dict[str, Any], alone: bool = False) -> dict[str, Any]:
    """Kernels as they are handed out: ``(N, M, *out, *out)``, ``(N, M)`` or ``(N, M, *out)``; without M for examples with themselves."""

    def one(kernel: Any) -> Any:
        shape = () if spec.which[1] is not None else out
        if spec.outputs == "trace":
            return kernel[:, 0] if alone else kernel
        order = (0, 2, 1, 3) if spec.outputs == "full" else (0, 2, 1)
        kernel = kernel.transpose(order)
        examples = kernel.shape[:2]
        kernel = kernel.reshape(*examples, *shape, *(shape if spec.outputs == "full" else ()))
        return kernel[:, 0] if alone else kernel

    return {name: one(kernel) for name, kernel in kernels.items()}


class Task(NamedTuple):
    """A kernel as a program sees it: the network, the routes, the numbers."""

    network: Network
    spec: Spec
    choices: tuple[Choice, ...]
    arguments: list[Any]
    weigh: Scale

    def record(self, x: Any) -> Features:
        """One batch."""
        return record(self.network, self.spec, self.choices, self.arguments, x)

    def pairs(self, first: Features, second: Features, x1: Any, x2: Any) -> dict[str, Any]:
        """The kernel between two batches."""

        def vectors(leaf: int) -> Any:
            return by_vectors(self.network, self.spec, self.arguments, leaf, x1, x2)

        return pairs(self.network, self.spec, self.choices, self.weigh, first, second, vectors)


def task(model: Model, spec: Spec, params: Any, weights: Any, x: Any, n: int, m: int) -> Task:
    """What the programs below share, for blocks of ``n`` by ``m`` examples."""
    network = read(model, params, x, spec.which[0])
    leaves, fixed, _, _ = flat(params)
    weigh = Scale(None if weights is None else tuple(weights))
    return Task(network, spec, routes(network, spec, n, m), [*map(jnp.asarray, leaves), *fixed], weigh)


@functools.partial(jax.jit, static_argnames=("model", "spec", "same"))
def kernel_program(model: Model, spec: Spec, params: Any, weights: Any, x1: Any, x2: Any, same: bool) -> dict[str, Any]:
    """The kernel of two batches that fit in memory together."""
    if spec.coupled:
        weigh = Scale(None if weights is None else tuple(weights))
        return finished(spec, read(model, params, x1, spec.which[0]).out, coupled_kernel(model, spec, weigh, params, x1, x2))
    this = task(model, spec, params, weights, x1, x1.shape[0], x2.shape[0])
    first = this.record(x1)
    second = first if same else this.record(x2)
    return finished(spec, this.network.out, this.pairs(first, second, x1, x2))


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def diagonal_program(model: Model, spec: Spec, params: Any, weights: Any, x: Any) -> dict[str, Any]:
    """The kernel of every example with itself."""
    this = task(model, spec, params, weights, x, 1, 1)

    def one(row: Features, x: Any) -> dict[str, Any]:
        row = jax.tree.map(lambda a: a[None], row)
        kernels = finished(spec, this.network.out, this.pairs(row, row, x[None], x[None]), alone=True)
        return {name: kernel[0] for name, kernel in kernels.items()}

    return jax.vmap(one)(this.record(x), x)


@functools.partial(jax.jit, static_argnames=("model", "spec", "shape"))
def record_program(model: Model, spec: Spec, params: Any, x: Any, shape: tuple[int, int]) -> tuple[Features, Any]:
    """What blocks of that shape need of one batch, and the batch."""
    return task(model, spec, params, None, x, *shape).record(x), x


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def pair_program(model: Model, spec: Spec, params: Any, weights: Any, first: Any, second: Any) -> dict[str, Any]:
    """The kernel between two recorded batches."""
    (one, x1), (two, x2) = first, second
    this = task(model, spec, params, weights, x1, x1.shape[0], x2.shape[0])
    return finished(spec, this.network.out, this.pairs(one, two, x1, x2))


def result_shape(network: Network, spec: Spec, n: int, m: int) -> Any:
    """Shape and dtype of a kernel of ``n`` by ``m`` examples."""
    out = () if spec.which[1] is not None else network.out
    more = {"full": (*out, *out), "trace": (), "diagonal": out}[spec.outputs]
    return jax.ShapeDtypeStruct((n, m, *more), jnp.float64 if spec.wide else network.dtype)


def bytes_of(network: Network, spec: Spec, params: Any, x: Any, n: int, m: int) -> int:
    """About how much memory a block of ``n`` by ``m`` examples needs while it is computed."""
    one = jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x))
    choices = routes(network, spec, n, m)
    leaves, fixed, _, _ = flat(jax.tree.map(_shaped, params))
    held = jax.eval_shape(lambda arguments, x: record(network, spec, choices, arguments, x), [*leaves, *fixed], one)
    example = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    at_work = max((c.costs[c.route].held for c in choices), default=0.0)
    result = result_shape(network, spec, n, m)
    # Recording holds the activations and the cotangents twice: as they come and as they are kept.
    return int(2 * example * max(n, m) + example * (n + m) + at_work + 3 * math.prod(result.shape) * result.dtype.itemsize)
