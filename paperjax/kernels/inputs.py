"""What is asked of `ntk`: batches, parameters, outputs and weights, checked."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paperjax.binding import nearest
from paperjax.kernels.network import abstract
from paperjax.model import Model, as_model, split

OUTPUTS = ("full", "trace", "diagonal")


@functools.lru_cache(maxsize=64)
def _linen(network: Any) -> Model:
    """One `Model` for one module: programs are compiled for a model."""
    return as_model(network)


def model_of(network: Any) -> Model:
    """A `Model` of what the user has."""
    if isinstance(network, Model):
        return network
    import flax.linen as nn

    try:
        return _linen(network) if isinstance(network, nn.Module) else as_model(network)
    except TypeError as error:
        if "unhashable" in str(error):
            return as_model(network)
        raise


def batch(name: str, x: Any, host: bool = False) -> Any:
    """A batch as an array, on the host if told to."""
    if host:
        x = np.asarray(x)
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    x = x if host or isinstance(x, jax.Array) else jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {x.shape}: an empty batch has no kernel. Give at least one example, with the batch as first axis."
        )
    return x


def check_params(params: Any) -> tuple[str, ...]:
    """Paths of the trained leaves; complex ones, and none at all, are refused."""
    paths = []
    trained, given = split(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        name = jax.tree_util.keystr(path)
        paths.append(name)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.complexfloating):
            raise ValueError(
                f"parameter {name} is complex: its kernel is not defined here (real and imaginary parts would train apart). Keep them as "
                "two real leaves and build the complex numbers inside the model."
            )
    if not paths:
        raise ValueError("the model has no trained parameter, so its kernel is zero: are all of them Frozen or integers?")
    whole = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and leaf_is_alone(given, path)
    ]
    if whole:
        warnings.warn(f"integers among the parameters do not count in the kernel: {', '.join(whole)}.", UserWarning, stacklevel=3)
    return tuple(paths)


def check_finite(params: Any) -> None:
    """Refuse parameters that hold NaN or infinity."""
    on = np if jax.default_backend() == "cpu" else jnp
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(split(params)[0]) if not isinstance(leaf, Tracer)]
    for (path, _), finite in zip(leaves, jax.device_get([on.isfinite(on.asarray(leaf)).all() for _, leaf in leaves])):
        if not finite:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"parameter {name} holds NaN or infinity: the network diverged, or was never initialized.")


def leaf_is_alone(given: Any, path: Any) -> bool:
    """Whether a given leaf stands by itself, not inside a `Frozen` node."""
    return path in [p for p, _ in jax.tree_util.tree_leaves_with_path(given)] and not any(
        getattr(key, "name", None) == "value" for key in path
    )


@functools.lru_cache(maxsize=64)
def model_outputs(model: Model, structure: Any, shapes: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """The arrays that a model returns for a batch, as shapes, and how they hang together."""
    params, x = abstract(structure, shapes)
    try:
        y = jax.eval_shape(model.apply, params, x)
    except TypeError as error:
        if "not a valid JAX type" in str(error):
            raise TypeError(f"the model returns something that is not an array: {error}") from error
        raise
    found = jax.tree.leaves(y)
    for path, leaf in jax.tree_util.tree_leaves_with_path(y):
        name = jax.tree_util.keystr(path) or "the output"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name} is {leaf.dtype}, which has no derivative: return the scores, not their argmax.")
        if not leaf.shape or leaf.shape[0] != x.shape[0]:
            raise ValueError(f"{name} has shape {leaf.shape} for a batch of {x.shape[0]}: the first axis must be the batch.")
    if not found:
        raise TypeError("the model returns no array, so there is nothing to take the kernel of.")
    return found, jax.tree.structure(y)


def chosen_outputs(outputs: Any, out: tuple[int, ...]) -> tuple[str, int | None]:
    """What `ntk` is asked of the outputs: how they pair, and the flat number of the one that is wanted."""
    if isinstance(outputs, str):
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs = {outputs!r}. {nearest(outputs, OUTPUTS)} Or the number of one output.")
        return outputs, None
    place = (outputs,) if isinstance(outputs, int) else tuple(outputs)
    if len(place) != len(out) or not all(-n <= i < n for i, n in zip(place, out)):
        raise ValueError(f"outputs = {outputs!r} names no output: an example's output has shape {out}.")
    return "trace", int(np.ravel_multi_index([i % n for i, n in zip(place, out)], out)) if out else 0


def leaf_weights(params: Any, weights: Any) -> list[Any]:
    """One number for each trained leaf."""
    try:
        pairs = jax.tree.map(lambda leaf, weight: weight, params, weights)
    except ValueError as error:
        raise ValueError(
            f"weights must be a pytree like params, one number for each leaf (such as plan.factors('learning_rate', params)): {error}"
        ) from error
    trained = split(params)[0]
    flags = [leaf is not None for leaf in jax.tree.leaves(trained, is_leaf=lambda leaf: leaf is None)]
    found = jax.tree.leaves(pairs, is_leaf=lambda leaf: leaf is None)
    if len(flags) == len(found):
        found = [weight for weight, flag in zip(found, flags) if flag]
    for weight in found:
        if jnp.shape(weight) != ():
            raise ValueError(f"weights must be one number for each leaf, and one has shape {jnp.shape(weight)}.")
    return found
