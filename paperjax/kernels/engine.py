"""Record batches and contract them to kernels, each leaf by its route."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from paperjax.kernels import contract
from paperjax.kernels.factors import Term
from paperjax.kernels.features import Features, features
from paperjax.kernels.network import Network, Spec, directions, flat, n_outputs, read
from paperjax.kernels.routes import Choice
from paperjax.model import Model

# One key of a path as `jax.tree_util.keystr` writes it: quoted, bracketed or an attribute.
KEY = re.compile(r"""\['(?:[^'\\]|\\.)*'\]|\["(?:[^"\\]|\\.)*"\]|\[[^\]'"]*\]|\.[^.\[]+""")


class Recorded(NamedTuple):
    """Numbers of the terms whose factors are kept, of those whose gradients are formed, and of the other leaves by route."""

    kept: tuple[int, ...]
    formed: tuple[int, ...]
    gradients: tuple[int, ...]
    vectors: tuple[int, ...]


def recorded(choices: tuple[Choice, ...], network: Network) -> Recorded:
    """What the routes need; a bias goes with its product."""
    lead = {c.term: c.route for c in reversed(choices) if c.term is not None and network.terms.terms[c.term].leaf == c.leaf}
    # Where only the bias is wanted, its product leads all the same.
    lead |= {c.term: c.route for c in choices if c.term is not None and c.term not in lead}
    numbers = [tuple(sorted(n for n, route in lead.items() if route == name)) for name in ("gram", "gradients")]
    leaves = [tuple(sorted({c.leaf for c in choices if c.term is None and c.route == name})) for name in ("jacobian", "ntvp")]
    return Recorded(*numbers, *leaves)


def record(network: Network, spec: Spec, choices: tuple[Choice, ...], arguments: Any, x: Any) -> Features:
    """What the routes need of one batch."""
    what = recorded(choices, network)
    kept, formed = ([network.terms.terms[n] for n in numbers] for numbers in (what.kept, what.formed))
    found = features(network.jaxpr, kept, formed, what.gradients, arguments, len(network.shapes), x, directions(network, spec))
    return jax.tree.map(functools.partial(contracted_in, network, spec), found)


def contracted_in(network: Network, spec: Spec, a: Any) -> Any:
    """An array in the precision of its contraction: what is asked for, or its own, but not less than that of the outputs."""
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a
    if spec.wide:
        return a.astype(jnp.float64)
    return a if jnp.finfo(a.dtype).bits >= jnp.finfo(network.dtype).bits else a.astype(network.dtype)


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
    examples: tuple[int, int],
    vectors: Any = None,
) -> dict[str, Any]:
    """The kernel between two recorded batches: ``{"": whole}``, or one for each leaf or layer.

    ``vectors(leaf numbers)`` gives the kernel of leaves that go by products with vectors.
    """
    what = recorded(choices, network)
    total: dict[str, Any] = {}
    # Products of gradients whose kernels are only summed are summed as they are made.
    simple, together = spec.per is None and weigh.of is None, []

    def add(leaf: int, kernel: Any, layers: int) -> None:
        kernel = weigh(leaf, kernel)
        if layers:
            for n in range(layers):
                _into(total, f"{_parent(network.paths[leaf])}, layer {n}", kernel[n])
        else:
            _into(total, {None: "", "leaf": network.paths[leaf], "layer": _parent(network.paths[leaf])}[spec.per], kernel)

    def apart(number: int) -> bool:
        """Whether the kernels of a leaf and of its bias are not simply added."""
        term = network.terms.terms[number]
        return not simple or {c.leaf for c in choices if c.term == number} != {term.leaf, term.bias} - {None}

    def add_term(number: int, one: Any, parts: tuple[Any, ...], axes: tuple[int, ...]) -> None:
        term = network.terms.terms[number]
        layers = network.terms.layers.get(term.leaf, 0) if spec.per == "layer" else 0
        kernels = contract.by_layers(one, layers, parts, axes) if layers else one(*parts)
        wanted = {c.leaf for c in choices if c.term == number}
        for leaf, kernel in zip((term.leaf, term.bias), kernels):
            if leaf in wanted:
                add(leaf, kernel, layers)

    for n, number in enumerate(what.kept):
        gram = functools.partial(contract.gram, network.terms.terms[number], outputs=spec.outputs)
        add_term(number, gram, ((first.a[n], second.a[n]), (first.b[n], second.b[n])), (1, 2))
    for n, number in enumerate(what.formed):
        if not apart(number):
            together.append(contract.outputs_first((first.formed[n], second.formed[n]), spec.outputs))
            continue
        formed = functools.partial(_of_gradients, network.terms.terms[number], outputs=spec.outputs)
        add_term(number, formed, ((first.formed[n], second.formed[n]),), (1,))
    for n, leaf in enumerate(what.gradients):
        layers = network.terms.layers.get(leaf, 0) if spec.per == "layer" else 0
        pair = (first.gradients[n], second.gradients[n])
        if simple:
            together.append(pair)
            continue
        if layers:
            kernel = jnp.stack([contract.gradients_product([(pair[0][:, :, i], pair[1][:, :, i])], spec.outputs) for i in range(layers)])
        else:
            kernel = contract.gradients_product([pair], spec.outputs)
        add(leaf, kernel, layers)
    if together:
        _into(total, "", contract.gradients_product(together, spec.outputs))
    for leaf in what.vectors:
        add(leaf, vectors(leaf), 0)
    # What the network does not use has a kernel of zeros.
    zeros, used = _zeros(network, spec, examples), {c.leaf for c in choices}
    for leaf, path in enumerate(network.paths):
        name = {None: "", "leaf": path, "layer": _parent(path)}[spec.per]
        counts = spec.only is None or path in spec.only
        if counts and leaf not in used and not any(there == name or there.startswith(f"{name}, layer ") for there in total):
            total[name] = zeros
    return total


def _zeros(network: Network, spec: Spec, examples: tuple[int, int]) -> Any:
    (n, m), o = examples, n_outputs(network, spec)
    return jnp.zeros({"full": (n, o, m, o), "trace": (n, m), "diagonal": (n, o, m)}[spec.outputs], network.dtype)


def _of_gradients(term: Term, gradients: tuple[Any, Any], outputs: str) -> list[Any]:
    """The kernels of a leaf and of its bias, from the gradients of both."""
    if term.bias is None:
        return [contract.gradients_product([contract.outputs_first(gradients, outputs)], outputs)]
    i = term.factors[0].i
    slices = [(g[..., :i], g[..., i : i + 1]) for g in gradients]
    return [contract.gradients_product([contract.outputs_first(pair, outputs)], outputs) for pair in zip(*slices)]


def _into(total: dict[str, Any], name: str, kernel: Any) -> None:
    total[name] = total[name] + kernel if name in total else kernel


def _parent(path: str) -> str:
    """The path of the module that a leaf belongs to: all but its last key, whatever stands in a key's quotes."""
    keys = [key.start() for key in KEY.finditer(path)]
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
        found = [jax.jacrev(functools.partial(outputs, net, leaf, x))(leaves[leaf]) for net, x in zip(networks, (x1, x2))]
        found = [contracted_in(networks[0], spec, g) for g in found]
        name = {None: "", "leaf": path, "layer": _parent(path)}[spec.per]
        _into(total, name, weigh(leaf, contract.gradients_product([(found[0], found[1])], spec.outputs)))
    return total
