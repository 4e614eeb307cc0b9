"""Networks of other libraries as a pair of pure functions; `paperjax.as_model` chooses among them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from paperjax.binding import argument_names
from paperjax.params import Frozen
from paperjax.reach import reached

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def from_pair(init: Callable[..., Any], apply: Callable[..., Any]) -> Pair:
    """Check the signatures of a bare pair."""
    for fn, name, wanted in ((init, "init", "init(key, x)"), (apply, "apply", "apply(params, x)")):
        required, optional = argument_names(fn)
        if len(required) > 2 or len(required) + len(optional) < 2:
            raise TypeError(
                f"the pair's {name} takes {', '.join(required + optional) or 'nothing'}; it must be {wanted}. "
                "For a Haiku transform, pass hk.without_apply_rng(transform)."
            )
    return init, apply


def from_linen(module: Any) -> Pair:
    """A linen module: ``params`` are trained, other collections `Frozen`."""

    def init(key: PRNGKeyArray, x: Array | np.ndarray) -> PyTree:
        variables = module.init(key, x)
        rest = {name: value for name, value in variables.items() if name != "params"}
        params = variables.get("params", {})
        return {"params": params, "state": Frozen(rest)} if rest else params

    def apply(params: PyTree, x: Array | np.ndarray) -> Array:
        if isinstance(params, Mapping) and isinstance(params.get("state"), Frozen):
            rest = params["state"].value
            return module.apply({"params": params["params"], **rest}, x, mutable=list(rest))[0]
        return module.apply({"params": params}, x)

    return init, apply


def from_nnx(make: Callable[..., Any], fixed: Any = None) -> Pair:
    """An nnx constructor or instance: ``nnx.Param`` is trained, the rest of the state `Frozen`."""
    from flax import nnx

    def parts(module: Any) -> Any:
        return nnx.split(module, nnx.Param, ...)

    # The static graph is the same whatever the key, and eval_shape draws nothing.
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0))) if fixed is None else fixed
    graph, params_template, rest_template = parts(abstract)

    def init(key: PRNGKeyArray, x: Array | np.ndarray) -> PyTree:
        _, params, rest = parts(make(nnx.Rngs(key)))
        pure, frozen = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        return {"params": pure, "state": Frozen(frozen)} if jax.tree.leaves(frozen) else pure

    def merged(params: PyTree) -> Any:
        params_state, rest_state = jax.tree.map(lambda leaf: leaf, (params_template, rest_template))
        if isinstance(params.get("state"), Frozen):
            nnx.replace_by_pure_dict(rest_state, params["state"].value)
            params = params["params"]
        nnx.replace_by_pure_dict(params_state, params)
        return nnx.merge(graph, params_state, rest_state)

    # One more trace for each form of the arguments, not for each call.
    @functools.lru_cache
    def is_random(structure: Any, forms: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
        params, x = jax.tree.unflatten(structure, forms)
        graph, keys, rest = nnx.split(merged(params), nnx.RngKey, ...)
        jaxpr = jax.make_jaxpr(lambda keys, rest, x: nnx.merge(graph, keys, rest)(x))(keys, rest, x)
        n_keys = len(jax.tree.leaves(keys))
        return any(reached(jaxpr, [i < n_keys for i in range(len(jaxpr.jaxpr.invars))]))

    def apply(params: PyTree, x: Array | np.ndarray) -> Array:
        module = merged(params)
        before = jax.tree.leaves(nnx.state(module, nnx.RngCount))
        y = module(x)
        moved = any(a is not b for a, b in zip(before, jax.tree.leaves(nnx.state(module, nnx.RngCount))))
        # A recurrent cell draws a key for a first carry of zeros: what counts is what comes out.
        if moved and is_random(*_forms((params, x))):
            raise TypeError(
                "the nnx module draws random numbers when it is called (Dropout?) and its output depends on them, so apply(params, x) "
                "would use the same ones at every step and in every measure. Turn that off: build it with deterministic=True, or rate=0."
            )
        return y

    return init, apply


def _forms(tree: PyTree) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Structure of a tree, and shapes and dtypes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    forms = map(jax.typeof, leaves)
    return structure, tuple(jax.ShapeDtypeStruct(form.shape, form.dtype, weak_type=form.weak_type) for form in forms)


def equinox_module() -> type | None:
    """Equinox's ``Module`` if Equinox has been imported: without it there is no module to know."""
    import sys

    equinox = sys.modules.get("equinox")
    return None if equinox is None else equinox.Module


def from_equinox(make: Callable[..., Any]) -> Pair:
    """An Equinox constructor: inexact arrays are trained, other arrays `Frozen`; ``apply`` maps the module over the batch."""
    import equinox as eqx

    def init(key: PRNGKeyArray, x: Array | np.ndarray) -> PyTree:
        params, rest = eqx.partition(make(key=key), eqx.is_inexact_array)
        arrays = eqx.filter(rest, eqx.is_array)
        return {"params": params, "state": Frozen(arrays)} if jax.tree.leaves(arrays) else params

    def apply(params: PyTree, x: Array | np.ndarray) -> Array:
        # eval_shape replaces arrays by their shapes; what is left is the module's static part.
        static = eqx.filter(eqx.filter_eval_shape(make, key=jax.random.key(0)), lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
        if isinstance(params, dict):
            params = eqx.combine(params["params"], params["state"].value)
        return jax.vmap(eqx.combine(params, static))(x)

    return init, apply
