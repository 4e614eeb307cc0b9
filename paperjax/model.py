"""A network as two pure functions, and a family of networks as a function of its sizes.

``Model(init, apply)`` is all that the rest of PaperJAX knows of a network; `as_model` brings Flax (linen and nnx),
Equinox and bare ``(init, apply)`` pairs to it. ``family(fn)`` is a scaling law's subject: a callable from named sizes
to a `Model`.
"""

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from paperjax.adapters import equinox_module, from_equinox, from_linen, from_nnx, from_pair
from paperjax.binding import argument_names, call_by_name, nearest
from paperjax.params import Frozen, count, join, split

__all__ = ["Family", "Frozen", "Model", "as_model", "check_model", "count", "family", "join", "split"]


class Model(NamedTuple):
    """A network as two pure functions: ``params = init(key, x)`` and ``y = apply(params, x)``.

    Attributes
    ----------
    init
        ``(key, x) -> params``: draws a pytree of arrays. Only the shape and dtype of the batch `x` matter.
    apply
        ``(params, x) -> y``: batch first in `x` and in `y`; one floating-point array out.

    Notes
    -----
    Leaves inside a `Frozen` node, and leaves that are not floating point, are never trained.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> linear = Model(lambda key, x: {"w": jnp.ones((x.shape[1], 1))}, lambda params, x: x @ params["w"])
    >>> x = jnp.ones((3, 2))
    >>> linear.apply(linear.init(jax.random.key(0), x), x).shape
    (3, 1)
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def as_model(network: Any) -> Model:
    """Bring a network of another library to a `Model`.

    Parameters
    ----------
    network
        One of

        - a `Model`, returned as it is;
        - a Flax linen ``Module``. Parameters are ``variables["params"]``; further collections (batch statistics) are
          kept beside them as `Frozen`, and what a call writes to them is dropped: a ``BatchNorm`` that uses the
          batch's statistics works, a running average never moves;
        - a Flax nnx constructor, a callable with the one required argument ``rngs``, such as
          ``lambda rngs: Net(64, rngs=rngs)``; or an nnx instance. Its state besides parameters is `Frozen` likewise; a
          module whose output depends on random numbers that it draws when called (active dropout) is refused;
        - an Equinox constructor, a callable with the one required argument ``key``; or an Equinox module. Equinox
          modules act on one example, so ``apply`` is ``jax.vmap`` of the module over the batch;
        - a bare pair ``(init, apply)`` with ``init(key, x)`` and ``apply(params, x)``; a Haiku transform is one after
          ``hk.without_apply_rng``.

    Returns
    -------
    Model
        An *instance* (nnx, Equinox) already holds its numbers: its ``init`` ignores the key, so every seed is the same
        network. Pass the constructor to draw a new one per seed.

    Raises
    ------
    TypeError
        If `network` is none of these; the message says what was given and what would do.

    Examples
    --------
    >>> import flax.linen as nn
    >>> model = as_model(nn.Dense(3))
    >>> x = jnp.ones((5, 2))
    >>> jax.tree.map(jnp.shape, model.init(jax.random.key(0), x))
    {'bias': (3,), 'kernel': (2, 3)}
    """
    if isinstance(network, Model):
        return network
    # A second or more to import.
    import flax.linen as nn
    from flax import nnx

    if isinstance(network, nn.Module):
        return Model(*from_linen(network))
    if isinstance(network, nnx.Module):
        return Model(*from_nnx(lambda rngs: network, fixed=network))
    equinox = equinox_module()
    if equinox is not None and isinstance(network, equinox):
        return Model(*from_equinox(lambda key: network))
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        return Model(*from_pair(*network))
    if callable(network):
        required, _ = argument_names(network)
        if required == ("rngs",):
            return Model(*from_nnx(network))
        if required == ("key",):
            return Model(*from_equinox(network))
    raise TypeError(
        f"as_model does not know what to do with {network!r} (a {type(network).__name__}). It takes a Model, a Flax linen module, "
        "an nnx module or a constructor `lambda rngs: ...`, an Equinox module or a constructor `lambda key: ...`, or a pair (init, apply)."
    )


def batch_form(x: Any, what: str = "x") -> jax.ShapeDtypeStruct:
    """Shape and dtype of a batch.

    Parameters
    ----------
    x
        One array, batch first, or its ``jax.ShapeDtypeStruct``.
    what
        How the message calls it.

    Raises
    ------
    TypeError
        If it is anything else.

    Examples
    --------
    >>> batch_form(jnp.ones((3, 2)))
    ShapeDtypeStruct(shape=(3, 2), dtype=float32)
    >>> batch_form({"tokens": jnp.ones((3, 2)), "mask": jnp.ones(3)})
    Traceback (most recent call last):
    ...
    TypeError: x is a dict with 'tokens', 'mask', and must be one array, batch first, or its jax.ShapeDtypeStruct. ...
    """
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        if len(x.shape) > 0:
            return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
        got = "has shape ()"
    elif isinstance(x, Mapping):
        got = f"is a {type(x).__name__} with {', '.join(map(repr, x)) or 'nothing in it'}"
    else:
        got = f"is a {type(x).__name__}" + (f" of length {len(x)}" if isinstance(x, list | tuple) else "")
    raise TypeError(
        f"{what} {got}, and must be one array, batch first, or its jax.ShapeDtypeStruct. Numbers become one by np.asarray; a network "
        "of several inputs takes them joined, jnp.concatenate([a, b], axis=1), and takes them apart in apply."
    )


def check_model(model: Model, x: Any, what: str = "the model") -> tuple[PyTree, jax.ShapeDtypeStruct]:
    """Refuse a model whose output is not one floating-point array with the batch first; nothing is computed.

    Parameters
    ----------
    model
        The model to look at, through ``jax.eval_shape``.
    x
        A batch, or its ``jax.ShapeDtypeStruct``.
    what
        How the message calls the model.

    Returns
    -------
    params, y
        Shapes and dtypes of the parameters and of the output.

    Raises
    ------
    TypeError
        If the output is a list, a tuple or a dict, or not floating point, or if `x` is not one array.
    ValueError
        If the output has no batch axis or another batch size than `x`, or a leaf has an axis of size 0.

    Examples
    --------
    >>> check_model(Model(lambda key, x: jnp.ones((2, 3)), lambda w, x: x @ w), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """
    x = batch_form(x)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if 0 in leaf.shape:
            raise ValueError(
                f"{what}: parameter {jax.tree_util.keystr(path)} has shape {leaf.shape}, an axis of size 0. A size of "
                "the family is probably 0."
            )
    y = jax.eval_shape(model.apply, params, x)
    if not isinstance(y, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{what}: apply(params, x) returns a {type(y).__name__}, not one array. Return the array alone, "
            "or wrap it: Model(model.init, lambda params, x: model.apply(params, x)[0])."
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"{what}: apply(params, x) returns {y.dtype}, not a floating-point array: return the scores, not their argmax.")
    if len(y.shape) == 0 or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"{what}: apply(params, x) returns shape {y.shape} for a batch of {x.shape[0]} (x has shape {x.shape}). The first axis of the "
            "output must be the batch: return one row per example, and take no mean over examples inside the model."
        )
    return params, y


@dataclasses.dataclass(frozen=True)
class Family:
    """A callable from named sizes to a `Model`; see `family`."""

    make: Callable[..., Any]
    x: jax.ShapeDtypeStruct | None = None

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes that the family must or may be given, in the order of its signature."""
        required, optional = argument_names(self.make)
        return tuple(name for name in required + optional if name != "rngs")

    def __call__(self, **sizes: Any) -> Model:
        """Build the network of these sizes.

        Raises
        ------
        TypeError
            If a size is unknown or missing, or the callable names `key` and none is given.
        ValueError
            If a whole-number size is below 1, or a size is NaN.
        """
        for name, value in sizes.items():
            if name not in self.sizes:
                raise TypeError(f"the family takes no size {name!r}. {nearest(name, self.sizes)}")
            if name != "seed" and isinstance(value, numbers.Integral) and not isinstance(value, bool) and value < 1:
                raise ValueError(
                    f"size {name} = {value}: a whole-number size must be at least 1 (write {float(value)} for a plain number)."
                )
            if isinstance(value, numbers.Real) and math.isnan(value):
                raise ValueError(f"size {name} is NaN: give a number.")
        required, _ = argument_names(self.make)
        if "key" in required and "key" not in sizes:
            raise TypeError(
                "the family names 'key', which is for fixed randomness of the network: give one, family(..., key=jax.random.key(0)); an "
                "Experiment gives one per seed. For an Equinox network that init draws, return its constructor: "
                "lambda width: lambda key: Net(width, key=key)."
            )
        if "rngs" in required:
            return as_model(lambda rngs: call_by_name(self.make, {**sizes, "rngs": rngs}, "the family"))
        return as_model(call_by_name(self.make, sizes, "the family"))

    def shapes(self, x: Any = None, **sizes: Any) -> PyTree:
        """Shapes and dtypes of the parameters at these sizes; nothing is allocated.

        Raises
        ------
        ValueError
            If neither `x` nor the family's own example batch is there.
        TypeError
            If `x` is not one array.
        """
        x = self.x if x is None else x
        if x is None:
            raise ValueError("the family has no example batch: pass one here, or build it as family(fn, x=batch).")
        return check_model(self(**sizes), x, f"family({', '.join(f'{k}={v}' for k, v in sizes.items())})")[0]


def family(fn: Callable[..., Any], x: Float[Array, "batch *features"] | Any = None) -> Family:
    """Make a family out of a callable from named sizes to a network.

    Parameters
    ----------
    fn
        Takes sizes by keyword (``width``, ``depth``, ... any names) and returns anything that `as_model` takes. A size
        that does not change shapes (an output scale, a variance) may be a traced scalar. If it also takes ``rngs``, it is
        a constructor of nnx modules, such as ``lambda width, rngs: nnx.Linear(3, width, rngs=rngs)``, and ``init`` draws
        the parameters. If it also takes ``key``, that is one more thing to be given: fixed randomness of the network.
    x
        An example batch: one array, of which only shape and dtype are kept. An `Experiment` uses its own data instead.

    Returns
    -------
    Family
        ``family(width=64, depth=2)`` is a `Model`.

    Raises
    ------
    TypeError
        If `fn` is not callable, or is a network itself, or `x` is not one array (or its ``jax.ShapeDtypeStruct``).

    Examples
    --------
    >>> import flax.linen as nn
    >>> f = family(lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(1)]), x=jnp.ones((2, 3)))
    >>> f.sizes
    ('width',)
    >>> count(f.shapes(width=64))
    321
    """
    if isinstance(fn, Family):
        return fn
    if not callable(fn):
        raise TypeError(f"family needs a callable from sizes to a network, not {fn!r}. For one fixed network: family(lambda: network).")
    flax = [getattr(sys.modules.get(name), "Module", None) for name in ("flax.linen", "flax.nnx")]
    if isinstance(fn, tuple(filter(None, flax))):
        raise TypeError(
            f"family needs a callable from sizes to a network, and a {type(fn).__name__} is one network already: "
            f"family(lambda width: {type(fn).__name__}(width, ...)), or, if it has no size, family(lambda: network)."
        )
    return Family(fn, None if x is None else batch_form(x))
