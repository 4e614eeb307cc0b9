"""What the entry points of a kernel refuse: batches, parameters and weights that would give numbers of something else."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paperjax.kernels.network import SQUEEZED, abstract, read, settings, signature
from paperjax.model import Frozen, Model, split
from paperjax.trace.batch import coupling, size_read


def batch(name: str, x: Any, host: bool = False) -> Any:
    """A batch as an array, of at least one example; on the host if told to."""
    if isinstance(x, Mapping) or (isinstance(x, (tuple, list)) and any(hasattr(part, "shape") for part in x)):
        raise TypeError(
            f"{name} is a {type(x).__name__} of arrays, and must be one array, batch first: join them, and let the model take them apart."
        )
    if host:
        x = np.asarray(x)
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    x = x if host or isinstance(x, jax.Array) else jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {x.shape}: an empty batch has no kernel. Give at least one example, with the batch as first axis."
        )
    return x


def check_placed(**trees: Any) -> None:
    """Refuse arrays that are cut along explicit mesh axes: what a kernel does to them would have to say where each result goes.

    Raises
    ------
    ValueError
        If an array's type names a mesh axis. Those of automatic axes, and copies on every device, pass.
    """
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            spec = jax.typeof(leaf).sharding.spec if isinstance(leaf, jax.Array) else ()
            if any(part is not None for part in spec):
                whole = "jax.device_get of it" if name == "params" else f"ntk(..., mesh=mesh) with {name} on the host (jax.device_get)"
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is divided over explicit mesh axes, {spec}, and the kernel's products do not say "
                    "where their results go. jax.make_mesh makes such axes by default: make the mesh with "
                    f"axis_types=(jax.sharding.AxisType.Auto,) * n for its n axes, or give {whole}."
                )


def check_kinds(x1: Any, x2: Any) -> None:
    """Refuse batches of examples of two kinds."""
    if x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype:
        raise ValueError(
            f"x1 has examples of {x1.dtype}{list(x1.shape[1:])} and x2 of {x2.dtype}{list(x2.shape[1:])}: a kernel is between examples of "
            "one kind. Did a batch axis go missing, or was one of them flattened?"
        )


def check_apart(model: Model, params: Any, x: Any, instead: str) -> None:
    """Refuse a model whose examples depend on each other, or that computes one by itself in another way."""
    one = signature((params, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)))
    met = _coupling(model, *one, settings())
    if met is not None:
        raise ValueError(
            f"the examples of a batch depend on each other, or on their number or places: {met} runs over the batch (batch statistics? "
            "dropout?). A kernel between examples is then one of whole batches. Use running averages "
            f"(BatchNorm(use_running_average=True)), switch dropout off, or {instead}. If they do not in truth (each picks its own row, "
            "x[arange(N), place]; lax.map in batches), map over them: lambda params, x: vmap(lambda row: apply(params, row[None])[0])(x)."
        )
    read_off = _size_read(model, *signature((params, x)), one, settings())
    if read_off is not None:
        raise ValueError(
            f"one example by itself is not computed as in a batch of {x.shape[0]}: the model reads the batch's size off it ({read_off}; "
            f"'if x.shape[0] > 1'?), and a kernel between examples is that of each by itself. Take the size out of the model, or {instead}."
        )


# Traces take longer than small kernels: one for each model and shapes.
@functools.lru_cache(maxsize=64)
def _coupling(model: Model, structure: Any, shapes: tuple[Any, ...], context: Any) -> str | None:
    params, x = abstract(structure, shapes)
    return coupling(model.apply, params, x, _traced(model, structure, shapes, context)[0])


@functools.lru_cache(maxsize=64)
def _size_read(model: Model, structure: Any, shapes: tuple[Any, ...], one: tuple[Any, ...], context: Any) -> str | None:
    alone, together = (_traced(model, *of, context)[0] for of in (one, (structure, shapes)))
    params, x = abstract(structure, shapes)
    return size_read(model.apply, params, x, alone, together)


@functools.lru_cache(maxsize=8)
def _traced(model: Model, structure: Any, shapes: tuple[Any, ...], context: Any) -> Any:
    """The trace of a model, and the shapes of what it returns."""
    del context
    return jax.make_jaxpr(model.apply, return_shape=True)(*abstract(structure, shapes))


@functools.lru_cache(maxsize=64)
def outputs_of(model: Model, structure: Any, shapes: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """Shapes of the arrays that a model returns, and how they are put together."""
    x = abstract(structure, shapes)[1]
    try:
        y = _traced(model, structure, shapes, settings())[1]
    except TypeError as error:
        if "not a valid JAX type" in str(error):
            raise TypeError(f"the model returns something that is not an array: {error}") from error
        raise
    found = jax.tree.leaves(y)
    for path, leaf in jax.tree_util.tree_leaves_with_path(y):
        name = jax.tree_util.keystr(path) or "the output"
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(f"{name} is {leaf.dtype}, and a kernel is between real outputs: return real and imaginary part as two outputs.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name} is {leaf.dtype}, which has no derivative: return the scores, not their argmax.")
        if 0 in leaf.shape:
            raise ValueError(f"{name} has shape {leaf.shape}: an output of size 0 has no kernel.")
        if not leaf.shape or leaf.shape[0] != x.shape[0]:
            raise ValueError(f"{name} has shape {leaf.shape} for a batch of {x.shape[0]}: the first axis must be the batch.")
    if not found:
        raise TypeError("the model returns no array, so there is nothing to take the kernel of.")
    return found, jax.tree.structure(y)


def check_one(model: Model, params: Any, x: Any, which: int, y: Any) -> None:
    """Refuse a model that gives an example by itself an output of another shape than one of a larger batch."""
    out = read(model, params, x, which).out
    if out != tuple(y.shape[1:]):
        raise ValueError(
            f"a batch of one example gives outputs of shape {out}, and one of {y.shape[0]} of shape {tuple(y.shape[1:])}. {SQUEEZED}"
        )


def trained_paths(params: Any, stacklevel: int = 3) -> tuple[str, ...]:
    """Paths of the trained leaves; integers among the others are said."""
    paths = []
    trained, given = split(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        name = jax.tree_util.keystr(path)
        paths.append(name)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"parameter {name} is complex: its kernel is not defined here (real and imaginary parts would train apart). Keep them as "
                "two real leaves and build the complex numbers inside the model."
            )
    if not paths:
        raise ValueError("the model has no trained parameter, so its kernel is zero: are all of them Frozen or integers?")
    whole = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and _is_alone(given, path)
    ]
    if whole:
        warnings.warn(f"integers among the parameters do not count in the kernel: {', '.join(whole)}.", UserWarning, stacklevel=stacklevel)
    return tuple(paths)


def check_finite(params: Any) -> None:
    """Refuse NaN and infinity in trained leaves, where their numbers are known."""
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(split(params)[0]) if not isinstance(leaf, Tracer)]
    for (path, _), finite in zip(leaves, jax.device_get([_all_finite(leaf) for _, leaf in leaves])):
        if not finite:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"parameter {name} holds NaN or infinity: the network diverged, or was never initialized.")


def _all_finite(a: Any) -> Any:
    if jax.default_backend() != "cpu" and not isinstance(a, np.ndarray):
        return jnp.isfinite(a).all()
    a = np.asarray(a)
    if a.dtype in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            # A sum that is finite has finite terms, and takes a quarter of the time.
            if np.isfinite(a.sum()):
                return True
    return np.isfinite(a).all()


def check_finite_batch(model: Model, params: Any, name: str, x: Any) -> None:
    """Refuse NaN and infinity in a batch, where its numbers are known and the network does not fill them in."""
    if isinstance(x, Tracer) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return
    if _all_finite(x):
        return
    bad = np.flatnonzero(~np.isfinite(np.asarray(x)).reshape(x.shape[0], -1).all(1))
    y = jax.tree.leaves(model.apply(params, jnp.asarray(x[bad[0] : bad[0] + 1])))
    if not all(isinstance(leaf, Tracer) or bool(jnp.isfinite(leaf).all()) for leaf in y):
        raise ValueError(
            f"{name} holds NaN or infinity in {len(bad)} of {x.shape[0]} examples, the first of them number {bad[0]}, and so would the "
            "rows of its kernel. Leave those examples out, or fill in what is missing."
        )


def _is_alone(given: Any, path: Any) -> bool:
    """Whether a given leaf stands by itself, not inside a `Frozen` node."""
    return path in [p for p, _ in jax.tree_util.tree_leaves_with_path(given)] and not any(
        getattr(key, "name", None) == "value" for key in path
    )


def leaf_weights(params: Any, weights: Any) -> list[Any]:
    """The numbers of the trained leaves, in their order, of a pytree like `params`; what is given needs none."""

    def chosen(path: Any, leaf: Any, weight: Any) -> Any:
        if isinstance(leaf, Frozen) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return None
        name = jax.tree_util.keystr(path)
        if not isinstance(weight, (int, float, np.ndarray, np.generic, jax.Array)) or jnp.shape(weight) != ():
            got = f"one has shape {jnp.shape(weight)}" if hasattr(weight, "shape") else repr(weight)
            raise ValueError(f"weights must be one number for each leaf, and that of {name} is none: {got}.")
        if not isinstance(weight, Tracer) and not np.isfinite(np.asarray(weight, np.float64)):
            raise ValueError(f"the weight of {name} is {weight}: weights must be finite. 0 leaves a leaf out.")
        return weight

    try:
        found = jax.tree_util.tree_map_with_path(chosen, params, weights, is_leaf=lambda node: isinstance(node, Frozen))
    except ValueError as error:
        if "pytree" not in str(error):
            raise
        raise ValueError(
            f"weights must be a pytree like params, one number for each leaf (such as plan.factors('learning_rate', params)): {error}"
        ) from error
    return jax.tree.leaves(found)
