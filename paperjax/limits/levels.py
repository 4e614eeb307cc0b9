"""How large variances are: integrals without a closed form are made for a range of them, and cost the more the larger it is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paperjax.limits.buffers import all_finite
from paperjax.limits.moments import LARGEST

LEVELS = (1.0, 4.0, 16.0, LARGEST, 1e3, 1e4, 1e5, 1e6)
"""Largest variances."""


def settled(program: Any, asked: Sequence[Any], tapes_of: Callable[[Any], list[Any]]) -> tuple[Any, list[Any]]:
    """A program for variances as large as they are, and what it asks of each example.

    What examples ask is computed for variances up to 100, and up to a million if that does not do; pairs of them need no more than was
    found.
    """
    tapes = tapes_of(program)
    bounded = program.cache.get("bounded", {})
    for level in LEVELS[LEVELS.index(LARGEST) + 1 :]:
        if not bounded or finite(tapes):
            break
        program = program.up_to(level)
        tapes = tapes_of(program)
    if bounded and finite(tapes):
        most = max((_largest(asked, tape, bounded, program) for tape in tapes), default=0.0)
        program = program.up_to(next((level for level in LEVELS if most <= level), program.largest))
    return program, tapes


def ordinary(program: Any, asked: Sequence[Any], tapes_of: Callable[[Any], list[Any]]) -> Any:
    """Whether a program's variances do for examples that are traced and cannot be looked at; ``None`` if there are none to heed."""
    bounded = program.cache.get("bounded", {})
    if not bounded:
        return None
    most = [_largest(asked, jax.tree.map(jax.lax.stop_gradient, tape), bounded, program) for tape in tapes_of(program)]
    # Not a number beyond what the program is for, and that is not below it.
    return jnp.all(jnp.stack([jnp.asarray(m) for m in most]) <= program.largest)


def finite(values: Any) -> bool:
    """Whether all numbers are."""
    return all(all_finite(np.asarray(a)) for a in jax.tree.leaves(values))


def _largest(asked: Sequence[Any], tape: Any, bounded: dict[Any, None], program: Any) -> Any:
    """Of the variances of fields whose functions have no closed form."""
    found: Any = 0.0
    for key, values in zip(asked, tape):
        if key[0] == "second" and key[1] is key[2] and key[1] in bounded:
            on: Any = jnp if isinstance(values, Tracer) else np
            found = on.maximum(found, on.max(on.asarray(values), initial=0.0))
        elif key[0] == "loop":
            need = next(n for (kind, loop, first, cross, _), n in _needs(program.cache) if loop is key[1] and first == key[2] and cross)
            inside = _largest(need.asked, values, bounded, program)
            found = (jnp if isinstance(inside, Tracer) or isinstance(found, Tracer) else np).maximum(found, inside)
    return found


def _needs(cache: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return [(key, value) for key, value in cache.items() if isinstance(key, tuple) and key[0] == "needs"]


def refuse_not_finite(found: Sequence[Any]) -> None:
    """Refuse kernels that hold NaN or infinity, and say where."""
    for name, k in zip(("NNGP", "NTK"), found):
        # In blocks, which need no memory.
        if all(all_finite(k[i : i + 64]) for i in range(0, len(k), 64)):
            continue
        where = np.argwhere(~np.isfinite(np.asarray(k)))[0][:2]
        raise ValueError(
            f"pj.limit: the {name} is not finite at infinite width, first for examples {where[0]} and {where[1]}. Either a function with "
            "infinite expectations (exp of a large variance, a division by a field, a logarithm) acts on wide values, or an integral "
            "without a closed form does not converge: variances above a million (scale the examples), or a product of functions of several "
            "fields, which can be drawn: opt in to Monte Carlo with key=jax.random.key(0), samples=4096. Or the network itself is not "
            "finite there: a token that its table has no row for (Flax's Embed and jnp.take make NaN of it)."
        )
