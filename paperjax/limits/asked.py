"""What `limit` is asked, looked at before anything is traced: batches, sizes, draws, options."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paperjax.binding import argument_names, nearest
from paperjax.limits.buffers import all_finite
from paperjax.limits.draws import GROUPS, Draws
from paperjax.limits.laws import Law
from paperjax.model import Family
from paperjax.parametrization.factors import rule_of

WIDTH = 1024
"""Where a network is traced if nothing else is said; nothing of that size is allocated."""

NO_WIDTH = ("seed", "key", "rngs")
"""Names of a family's arguments that are no sizes."""

_NO_KERNEL = (
    "pj.limit: a tangent kernel is of gradient descent; Adam and its like divide by the size of the gradient, so what they do to the "
    'output is no sum of products of gradients. Ask for ntk=False, or optimizer="sgd".'
)


def batches(x1: Any, x2: Any) -> tuple[Any, Any]:
    """Two batches of one network; whole numbers count as floating-point ones where the other batch has those."""
    _batch(x1, "x1", None)
    if x2 is None:
        return x1, None
    _batch(x2, "x2", x1)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in (x1, x2)]
    if floating == [True, False]:
        x2 = x2.astype(x1.dtype)
    elif floating == [False, True]:
        x1 = x1.astype(x2.dtype)
    return x1, x2


def _batch(x: Any, name: str, like: Any) -> None:
    if not isinstance(x, jax.Array | np.ndarray) or isinstance(x, np.ma.MaskedArray):
        how = {
            "dict": "join several inputs in one array, jnp.concatenate([a, b], axis=1), and take them apart in the network",
            "MaskedArray": "fill what is missing, x.filled(...), or leave it out",
            "ShapeDtypeStruct": "kernels are of numbers",
        }.get(type(x).__name__, "jnp.asarray(...)")
        raise TypeError(f"{name} is a {type(x).__name__}, and must be an array of examples, (N, *features): {how}.")
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool) or (np.dtype(x.dtype).itemsize > 8 and x.dtype.kind == "f"):
        raise TypeError(f"{name} is of {x.dtype}, and must hold numbers that JAX has: np.asarray({name}, np.float32), or whole ones.")
    if len(x.shape) == 0 or (len(x.shape) < 2 and not jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} of shape {tuple(x.shape)} is not a batch of examples, (N, *features): give x[None] for one example.")
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} is of {x.dtype}, and a limit is of real examples. Give real and imaginary parts as two features.")
    if 0 in x.shape:
        raise ValueError(f"{name} has no {'features' if x.shape[0] else 'examples'}: its shape is {tuple(x.shape)}.")
    if like is not None and tuple(x.shape[1:]) != tuple(like.shape[1:]):
        raise ValueError(f"x1 has examples of shape {tuple(like.shape[1:])}, and x2 of {tuple(x.shape[1:])}: they go into one network.")
    if not isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.floating) and not all_finite(np.asarray(x)):
        bad = int(np.argwhere(~np.isfinite(np.asarray(x)))[0][0])
        raise ValueError(f"{name} has a NaN or an infinity, the first in example {bad}. Fill or leave out missing values.")


def options(parametrization: Any, base: Any, optimizer: Any, ntk: bool, per: Any, dtype: Any, max_bytes: Any) -> str:
    """The rule that an optimizer follows, once the options that do not depend on the network are seen to fit together."""
    if per not in (None, "leaf"):
        raise ValueError(f'per = {per!r}: it is None or "leaf".')
    if dtype not in ("float64", "float32"):
        raise ValueError(f'dtype = {dtype!r}: "float64", or "float32" for speed.')
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int | float | np.number) or not max_bytes > 0):
        raise ValueError(f"max_bytes = {max_bytes!r}: a number of bytes above 0, such as 2 * 10**9.")
    if parametrization is not None and base is None:
        raise ValueError("a parametrization needs base=dict(width=...), the network that was tuned; see pj.plan.")
    named("base", base)
    if parametrization is None and base is not None:
        raise ValueError("base= is of a plan, and no parametrization= is given, such as pj.ntp: say which, or leave base= out.")
    rule = rule_of(optimizer)
    if ntk and rule != "sgd":
        raise ValueError(_NO_KERNEL)
    return rule


def of_gradient_descent(rule: str) -> None:
    """Refuse a tangent kernel under learning rates of another optimizer."""
    if rule != "sgd":
        raise ValueError(f"{_NO_KERNEL} (The program was read for such an optimizer.)")


def drawn(key: Any, samples: Any) -> Draws | None:
    """Groups of draws, if Monte Carlo is consented to."""
    if (key is None) != (samples is None):
        raise ValueError("pj.limit: Monte Carlo needs both key= and samples=.")
    if key is None or samples is None:
        return None
    if not hasattr(key, "dtype"):
        raise TypeError(f"pj.limit: key = {key!r} is no key of random numbers. Make one: jax.random.key(0).")
    if isinstance(samples, bool) or not isinstance(samples, int | float | np.number) or not float(samples).is_integer():
        raise TypeError(f"pj.limit: samples = {samples!r} is no whole number.")
    if samples < 2 * GROUPS:
        raise ValueError(f"pj.limit: samples = {samples}; for a standard error give at least {2 * GROUPS}, and thousands for a percent.")
    with jax.ensure_compile_time_eval():
        return Draws(jax.random.split(key, GROUPS), int(samples) // GROUPS)


def named(which: str, given: Any) -> dict[str, Any]:
    """Sizes by name."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{which} = {given!r} names no values: {which}=dict(name=value).")
    return dict(given or {})


def widths(fam: Family, sizes: dict[str, Any], wide: Sequence[str] | None, at: dict[str, Any]) -> dict[str, int]:
    """The sizes that go to infinity, with the values at which they are traced first."""
    if isinstance(wide, str):
        raise TypeError(f"wide = {wide!r} is one name: give several, or one in a list, wide=[{wide!r}].")
    for which, names in (("sizes", sizes), ("at", at), ("wide", wide or ())):
        for name in names:
            if name not in fam.sizes:
                raise ValueError(f"{which} names {name!r}, and the family takes no such size. {nearest(name, fam.sizes)}")
    for name in wide or ():
        if name in sizes:
            raise ValueError(f"wide and sizes both name {name!r}: what goes to infinity has no finite value. Leave it out of one of them.")
    required, _ = argument_names(fam.make)
    if not fam.sizes:
        raise ValueError(
            "the family takes no sizes, so no width goes to infinity. Let it take one: lambda width: Net(width), every layer of it as wide."
        )
    names = list(wide) if wide is not None else [name for name in fam.sizes if name in required and name not in (*sizes, *NO_WIDTH)]
    if not names and wide is None:
        names = [name for name in fam.sizes if name not in sizes]
    if not names:
        why = "wide=[] names none." if wide is not None else "sizes=... names all that the family takes. Leave the width out of it."
        raise ValueError(f"no size is left to go to infinity: {why}")
    missing = [name for name in required if name not in (*names, *sizes, *NO_WIDTH)]
    if missing:
        raise TypeError(
            f"{', '.join(missing)} must be given to the family, and neither goes to infinity (wide={names}) nor has a finite value: "
            f"name it in wide, or give sizes=dict({missing[0]}=...)."
        )
    for name, value in at.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"at names {name} = {value!r}: a width to trace at is a whole number.")
        if name not in names:
            raise ValueError(f"at names {name!r}, which does not go to infinity ({', '.join(names)}): a finite size is given by sizes=.")
    return {name: int(at.get(name, WIDTH)) for name in names}


def declared(laws: Any, sizes: Mapping[str, Any]) -> Any:
    """The laws that are declared for a network of these sizes."""
    if not callable(laws):
        return laws
    required, optional = argument_names(laws)
    unknown = [name for name in required if name not in sizes]
    if unknown:
        raise TypeError(f"laws is a function of {', '.join(unknown)}, and the sizes are {', '.join(sizes)}. Let it take one of those.")
    return laws(**{name: sizes[name] for name in (*required, *optional) if name in sizes})


def drawn_finely(paths: Sequence[str], laws: Sequence[Law | None], dtypes: Sequence[Any], known: Mapping[str, Law] | None) -> None:
    """Refuse leaves that are drawn in half precision: their few levels are not centred, and sums of many entries drift."""
    for path, law, dtype in zip(paths, laws, dtypes):
        if path in (known or {}) or law is None or not law.variance > 0 or np.dtype(dtype).itemsize != 2:
            continue
        mean = -1.5 * float(jnp.finfo(dtype).eps)
        raise ValueError(
            f"pj.limit: {path} is drawn in {np.dtype(dtype)}, in which JAX's numbers have a mean of about {mean:.1g} standard deviations "
            "in place of 0: a sum over n of them drifts as sqrt(n), and has no limit. Draw in single precision (Flax: "
            "param_dtype=jnp.float32, and dtype=jnp.bfloat16 to compute in half). Or say that the law that is written is meant: "
            f'gaussian=True, or laws={{"{path}": pj.limits.normal({law.variance:.6g})}}.'
        )
