"""What is asked of a kernel, and the network it is asked of, read from its trace."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.kernels.factors import Terms, find_terms
from paperjax.kernels.routes import Choice, Machine, Sizes, choose, forward_flops, has_forward, itemsize
from paperjax.model import Model, join, split
from paperjax.trace import primitives as prim
from paperjax.trace.products import find_products

SQUEEZED = "Does the model squeeze() all axes of size 1, or ask for the batch's size? Name the axes: x.squeeze((1, 2))."


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


def under_trace(model: Model, params: Any, x: Any, spec: Spec) -> bool:
    """Whether the model holds values of a trace that is going on around it: a network made inside of jit, grad or vmap."""
    network = read(model, params, x, spec.which[0], jnp.shape(x)[0] if spec.coupled else 1)
    return any(isinstance(const, Tracer) for const in network.jaxpr.consts)


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
    structure, shapes = signature(params)
    one = ((batch, *jnp.shape(x)[1:]), jnp.result_type(x))
    return _read(model, structure, shapes, one, which, settings())


def settings() -> tuple[Any, ...]:
    """What a trace is made under, besides its arguments."""
    return (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]


# Tracing takes longer than small kernels: a network is read once, for its plan and for its programs.
@functools.lru_cache(maxsize=64)
def _read(model: Model, structure: Any, shapes: tuple[Any, ...], x: Any, which: int, context: Any) -> Network:
    leaves, fixed, paths, whole = flat(abstract(structure, shapes))
    n = len(leaves)

    def apply(*arguments: Any) -> Any:
        y = model.apply(whole(list(arguments[:n]), list(arguments[n:-1])), arguments[-1])
        return jax.tree.leaves(y)[which]

    jaxpr = prim.trace(apply, *leaves, *fixed, jax.ShapeDtypeStruct(*x))
    y = jaxpr.jaxpr.outvars[0].aval
    shape, n_examples = tuple(y.shape), x[0][0]  # pyright: ignore[reportAttributeAccessIssue]
    if shape[:1] != (n_examples,):
        raise ValueError(f"a batch of {n_examples} gives an output of shape {shape}, without the batch as first axis. {SQUEEZED}")
    terms = find_terms(find_products(jaxpr, n))
    return Network(jaxpr, paths, tuple(jnp.shape(leaf) for leaf in leaves), terms, shape[1:], y.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def signature(tree: Any) -> tuple[Any, tuple[Any, ...]]:
    """Structure, shapes and dtypes of a pytree: what traces depend on."""
    leaves, structure = jax.tree.flatten(tree)
    # JAX takes ten times as long to find the type of its own arrays.
    return structure, tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves
    )


def abstract(structure: Any, shapes: tuple[Any, ...]) -> Any:
    """The pytree of shapes with a `signature`."""
    return jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])


def shaped(leaf: Any) -> Any:
    """Shape and dtype of a leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def n_outputs(network: Network, spec: Spec) -> int:
    """How many outputs of an example the kernel is between."""
    return 1 if spec.which[1] is not None else math.prod(network.out)


def sizes_of(network: Network, spec: Spec, n: int, m: int, same: bool = False) -> Sizes:
    """What the cost of a kernel of that many examples depends on."""
    size = 8 if spec.wide else itemsize(network.dtype)
    forward = forward_flops(network.jaxpr) if has_forward(network.jaxpr) else math.inf
    return Sizes(n, m, n_outputs(network, spec), size, forward, same)


def routes(network: Network, spec: Spec, n: int, m: int, machine: Machine | None = None, same: bool = False) -> tuple[Choice, ...]:
    """The route of each leaf for a block of ``n`` by ``m`` examples, or of ``n`` with themselves."""
    machine = machine or Machine.of(jax.default_backend())
    route: str | Mapping[str, str] = spec.route if isinstance(spec.route, str) else dict(spec.route)
    sizes = tuple(math.prod(shape) for shape in network.shapes)
    found = choose(network.terms, network.paths, sizes, spec.outputs, sizes_of(network, spec, n, m, same), route, machine)
    return tuple(c for c in found if spec.only is None or network.paths[c.leaf] in spec.only)


def directions(network: Network, spec: Spec) -> Any:
    """The outputs as unit vectors, ``(O, *out)``."""
    size = math.prod(network.out)
    unit = np.eye(size, dtype=np.float32) if spec.which[1] is None else np.eye(1, size, spec.which[1], dtype=np.float32)
    return jnp.asarray(unit).reshape(-1, *network.out)


def result_shape(network: Network, spec: Spec, n: int, m: int) -> Any:
    """Shape and dtype of a kernel of ``n`` by ``m`` examples."""
    out = () if spec.which[1] is not None else network.out
    more = {"full": (*out, *out), "trace": (), "diagonal": out}[spec.outputs]
    return jax.ShapeDtypeStruct((n, m, *more), jnp.float64 if spec.wide else network.dtype)
