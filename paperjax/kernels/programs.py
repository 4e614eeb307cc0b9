"""The compiled programs: a kernel at once, by blocks, of examples with themselves."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from paperjax.devices import compiler_options, known_options
from paperjax.kernels.blocks import filled
from paperjax.kernels.engine import Scale, by_vectors, coupled_kernel, pairs, record
from paperjax.kernels.features import Features
from paperjax.kernels.network import (
    Network,
    Spec,
    abstract,
    flat,
    read,
    result_shape,
    routes,
    settings,
    shaped,
    signature,
    sizes_of,
    under_trace,
)
from paperjax.kernels.routes import LOOPS_PER_PRODUCT, Choice, held_forward, largest_value, loops_per_product, widest
from paperjax.kernels.strided import large
from paperjax.layout import peak_bytes, tree_bytes
from paperjax.model import Model

# Products and convolutions are Eigen's whatever LLVM does, and loops around them run as fast at its first level. Modules that are compiled
# side by side cost more than two cores save from the third on.
LIGHT = {"xla_backend_optimization_level": 1, "xla_cpu_parallel_codegen_split_count": 2}
# XLA's newer way to write loops takes twice as long to compile. In the older one a value with many uses is written out at each, so that
# chains of operations between products (softmax, norms) grow out of hand, and large matrices are transposed slowly.
PLAIN_LOOPS = {"xla_cpu_use_fusion_emitters": False}
# XLA takes the memory of all intermediate arrays as one block. From 64 MiB on glibc's malloc maps such a block and unmaps it at every call,
# in threads other than the first, and finding its pages missing is a fifth of the time of some kernels: in parts below that it is kept.
PART = 56 * 2**20
IN_PARTS = {"xla_multiheap_size_constraint_per_heap": PART}


def finished(spec: Spec, network: Network, kernels: dict[str, Any], alone: bool = False) -> dict[str, Any]:
    """Kernels as they are handed out: ``(N, M, *out, *out)``, ``(N, M)`` or ``(N, M, *out)``; without M for examples with themselves."""
    dtype = result_shape(network, spec, 1, 1).dtype

    def one(kernel: Any) -> Any:
        kernel, shape = kernel.astype(dtype), () if spec.which[1] is not None else network.out
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

        return pairs(self.network, self.spec, self.choices, self.weigh, first, second, (x1.shape[0], x2.shape[0]), vectors)


def task(model: Model, spec: Spec, params: Any, weights: Any, x: Any, n: int, m: int, same: bool = False) -> Task:
    """What the programs below share, for blocks of ``n`` by ``m`` examples."""
    network = read(model, params, x, spec.which[0])
    leaves, fixed, _, _ = flat(params)
    weigh = Scale(None if weights is None else tuple(weights))
    return Task(network, spec, routes(network, spec, n, m, same=same), [*map(jnp.asarray, leaves), *fixed], weigh)


class Rows(NamedTuple):
    """Examples that go through a network together, and the block of the kernel that they are for."""

    at_once: int
    n: int
    m: int
    same: bool = False


def options(platform: str, network: Network | None, spec: Spec, rows: Rows) -> dict[str, Any]:
    """What the programs of a network are compiled with."""
    if platform != "cpu":
        return compiler_options(platform)
    chosen: dict[str, Any] = dict(LIGHT)
    if network is not None:
        if loops_per_product(network.jaxpr) <= LOOPS_PER_PRODUCT and not any(map(large, network.shapes)):
            chosen |= PLAIN_LOOPS
        # XLA warns of an array that is no part.
        if largest_array(network, spec, rows) <= PART:
            chosen |= IN_PARTS
    return compiler_options(platform) | known_options(chosen)


def largest_array(network: Network, spec: Spec, rows: Rows) -> int:
    """At least the bytes of the largest array that a program of so many examples makes."""
    choices = routes(network, spec, rows.n, rows.m, same=rows.same)
    sizes = sizes_of(network, spec, rows.n, rows.m, rows.same)
    pairs = math.prod(result_shape(network, spec, rows.n, rows.m).shape)
    each, together = 0, pairs
    for choice in choices:
        if choice.term is None or choice.route == "gradients":
            # One more of each fan, for a bias and to keep rows apart.
            each = max(each, math.prod(size + 2 for size in network.shapes[choice.leaf]))
        if choice.term is not None:
            factors = network.terms.terms[choice.term].factors
            each = max(each, sum(f.k * f.t * max(1 if f.lookup else f.i + 1, f.j + 1) for f in factors))
        if choice.route == "gram" and choice.term is not None:
            together = max(together, pairs * sum(f.t for f in network.terms.terms[choice.term].factors) ** 2)
    item, through = max(sizes.itemsize, widest(network.jaxpr)), rows.at_once * sizes.outputs
    return max(through * largest_value(network.jaxpr), item * through * each, item * together)


@functools.lru_cache(maxsize=64)
def _options(platform: str, model: Model, spec: Spec, params: Any, x: Any, rows: Rows, context: Any) -> tuple[tuple[str, Any], ...]:
    network = None if spec.coupled else read(model, abstract(*params), jax.ShapeDtypeStruct(*x), spec.which[0])
    return tuple(options(platform, network, spec, rows).items())


def program(batch: Callable[..., tuple[Any, Rows]], *static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function of ``(model, spec, params, ...)``, with what its platform needs; inside of another program it is part of that.

    Parameters
    ----------
    batch
        Of its arguments, examples, and how many there are.
    static
        Names of arguments that the program is made for.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def compiled(chosen: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
            return jax.jit(fn, static_argnames=static, compiler_options=dict(chosen))

        @functools.wraps(fn)
        def call(*args: Any) -> Any:
            if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)):
                return fn(*args)
            model, spec, params = args[:3]
            x, rows = batch(*args)
            if under_trace(model, params, x, spec):
                return fn(*args)
            one = (1, *jnp.shape(x)[1:]), jnp.result_type(x)
            return compiled(_options(jax.default_backend(), model, spec, signature(params), one, rows, settings()))(*args)

        return call

    return decorate


def _of_two(*args: Any) -> tuple[Any, Rows]:
    x1, x2, same = args[4:7]
    return x1, Rows(max(x1.shape[0], x2.shape[0]), x1.shape[0], x2.shape[0], same)


def _of_pairs(*args: Any) -> tuple[Any, Rows]:
    x1, x2 = args[4][1], args[5][1]
    return x1, Rows(max(x1.shape[0], x2.shape[0]), x1.shape[0], x2.shape[0])


@program(_of_two, "model", "spec", "same")
def kernel_program(model: Model, spec: Spec, params: Any, weights: Any, x1: Any, x2: Any, same: bool) -> dict[str, Any]:
    """The kernel of two batches that fit in memory together."""
    if spec.coupled:
        weigh = Scale(None if weights is None else tuple(weights))
        return finished(spec, read(model, params, x1, spec.which[0], x1.shape[0]), coupled_kernel(model, spec, weigh, params, x1, x2))
    this = task(model, spec, params, weights, x1, x1.shape[0], x2.shape[0], same)
    first = this.record(x1)
    second = first if same else this.record(x2)
    return finished(spec, this.network, this.pairs(first, second, x1, x2))


@program(lambda *args: (args[4], Rows(args[4].shape[0], 1, 1)), "model", "spec")
def diagonal_program(model: Model, spec: Spec, params: Any, weights: Any, x: Any) -> dict[str, Any]:
    """The kernel of every example with itself."""
    this = task(model, spec, params, weights, x, 1, 1)

    def one(row: Features, x: Any) -> dict[str, Any]:
        row = jax.tree.map(lambda a: a[None], row)
        kernels = finished(spec, this.network, this.pairs(row, row, x[None], x[None]), alone=True)
        return {name: kernel[0] for name, kernel in kernels.items()}

    return jax.vmap(one)(this.record(x), x)


@program(lambda *args: (args[3], Rows(args[3].shape[0], *args[4])), "model", "spec", "shape")
def record_program(model: Model, spec: Spec, params: Any, x: Any, shape: tuple[int, int]) -> tuple[Features, Any]:
    """What blocks of that shape need of one batch, and the batch."""
    return task(model, spec, params, None, x, *shape).record(x), x


@program(_of_pairs, "model", "spec")
def pair_program(model: Model, spec: Spec, params: Any, weights: Any, first: Any, second: Any) -> dict[str, Any]:
    """The kernel between two recorded batches."""
    (one, x1), (two, x2) = first, second
    this = task(model, spec, params, weights, x1, x1.shape[0], x2.shape[0])
    return finished(spec, this.network, this.pairs(one, two, x1, x2))


class Held(NamedTuple):
    """Bytes of one example: what is kept of it, and what is there at once of it on the way through the network and back."""

    kept: int
    meanwhile: int


def held(network: Network, spec: Spec, params: Any, x: Any, n: int, m: int, same: bool, known: dict[Any, Held]) -> tuple[Held, int]:
    """What the routes of a block of ``n`` by ``m`` examples hold of one, and while they contract; `known` keeps the former by routes."""
    one = jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x))
    choices = routes(network, spec, n, m, same=same)
    leaves, fixed, _, _ = flat(jax.tree.map(shaped, params))
    way = tuple((c.leaf, c.route, c.term) for c in choices)
    if way not in known:

        def recording(arguments: Any, x: Any) -> Features:
            return record(network, spec, choices, arguments, x)

        arguments = [*leaves, *fixed]
        # XLA takes scratch memory besides: for products of convolutions measured as another sixth.
        known[way] = Held(tree_bytes(jax.eval_shape(recording, arguments, one)), 3 * peak_bytes(recording, arguments, one) // 2)
    return known[way], int(max((c.costs[c.route].held for c in choices), default=0.0))


def bytes_of(network: Network, spec: Spec, params: Any, x: Any, n: int, m: int, same: bool, at_once: int, known: dict[Any, Held]) -> int:
    """About how much memory a block of ``n`` by ``m`` examples needs at work, so many going through the network together."""
    example, contracting = held(network, spec, params, x, n, m, same, known)
    result = result_shape(network, spec, n, m)
    # What is kept is there twice while it is put together.
    kept = 2 * example.kept * (n + m)
    return kept + example.meanwhile * min(max(n, m), at_once) + contracting + 3 * math.prod(result.shape) * result.dtype.itemsize


def at_most(network: Network, spec: Spec, n: int, m: int, same: bool) -> int:
    """More memory than a block of ``n`` by ``m`` examples needs at work, without a trace of its program: no value is let go of."""
    choices = routes(network, spec, n, m, same=same)
    sizes = sizes_of(network, spec, n, m, same)
    kept = 0.0
    for choice in choices:
        if choice.term is None or choice.route == "gradients":
            kept += sizes.outputs * math.prod(network.shapes[choice.leaf])
        if choice.term is not None:
            kept += sum(f.k * f.t * ((1 if f.lookup else f.i) + sizes.outputs * f.j) for f in network.terms.terms[choice.term].factors)
    # A value of the network with its residuals on the way back and its cotangents; what is kept with what it is made of.
    meanwhile = 2 * (1 + sizes.outputs) * held_forward(network.jaxpr) + 4 * sizes.itemsize * kept
    contracting = max((c.costs[c.route].held for c in choices), default=0.0)
    result = result_shape(network, spec, n, m)
    together = 2 * sizes.itemsize * kept * (n + m) + 1.5 * meanwhile * max(n, m)
    return int(together + contracting + 3 * math.prod(result.shape) * result.dtype.itemsize)


def examples_at_once(
    network: Network, spec: Spec, params: Any, x: Any, max_bytes: int, alone: bool, known: dict[Any, Held] | None = None
) -> int:
    """How many examples go through the network together where not all can: what is made of them meanwhile takes an eighth of the memory.

    Those that are only paired with themselves are contracted meanwhile, too.
    """
    n = 1 if alone else x.shape[0]
    example, contracting = held(network, spec, params, x, n, n, not alone, {} if known is None else known)
    return max(1, max_bytes // 8 // (example.meanwhile + (contracting + example.kept if alone else 0)))


def in_groups(compute: Callable[[Any], Any], x: Any, at_once: int) -> Any:
    """What `compute` gives of a batch, example by example, so many at a time; a loop in Python, since XLA's on CPU slow convolutions down.

    Examples
    --------
    >>> in_groups(lambda x: 2 * x, jnp.arange(5), at_once=2)
    Array([0, 2, 4, 6, 8], dtype=int32)
    """
    n = x.shape[0]
    if n <= at_once:
        return compute(x)
    size = math.ceil(n / math.ceil(n / at_once))
    parts = [compute(filled(x, i, size)) for i in range(0, n, size)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *parts)
