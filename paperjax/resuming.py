"""A saved training state on the devices there are now: laid out on other lanes, checked, and put in place."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from paperjax import processes
from paperjax.layout import Layout


def on_lanes(layout: Layout, lanes: int, owners: int) -> Layout:
    """The layout of the same cells on at most `lanes` lanes, a multiple of the number of processes (`owners`).

    Raises
    ------
    ValueError
        If the processes cannot share the cells evenly.

    Examples
    --------
    >>> on_lanes(Layout(lanes=4, map=1, vmap=2), lanes=2, owners=2), on_lanes(Layout(lanes=4, map=1, vmap=2), lanes=8, owners=1)
    (Layout(lanes=2, map=2, vmap=2), Layout(lanes=8, map=1, vmap=1))
    """
    # The number of cells of a call must stay, since the saved state has that many; and every process has its share.
    if lanes == layout.lanes and lanes % owners == 0:
        return layout
    able = [n for n in range(owners, lanes + 1, owners) if layout.cells % n == 0]
    if not able:
        raise ValueError(
            f"the saved run has {layout.cells} cells in a call, which {owners} processes with {lanes} devices cannot share evenly. "
            f"Go on with a number of processes that divides {layout.cells}."
        )
    share = layout.cells // able[-1]
    vmap = math.gcd(share, layout.vmap)
    return Layout(able[-1], share // vmap, vmap)


def unpack(saved: list[Any], like: PyTree) -> PyTree:
    """The saved leaves as a state like `like`, where that lies, whatever mesh the saved ones lay on.

    Raises
    ------
    ValueError
        If they do not fit.
    """
    leaves, tree = jax.tree.flatten(like)
    for old, new in itertools.zip_longest(saved, map(bits, leaves)):
        if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError("the checkpoint's training state does not fit this Experiment's: name another checkpoint folder.")
    placed = [_placed(old, bits(new).sharding) for old, new in zip(saved, leaves)]
    restored = [jax.random.wrap_key_data(old, impl=jax.random.key_impl(new)) if is_key(new) else old for old, new in zip(placed, leaves)]
    return jax.tree.unflatten(tree, restored)


def _placed(old: Any, where: Any) -> Any:
    if isinstance(old, jax.Array) and old.sharding == where:
        return old
    return jax.device_put(old, where) if isinstance(old, jax.Array) or not processes.many() else processes.place(old, where)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def bits(leaf: Any) -> Any:
    """A leaf that NumPy knows: of a key its numbers."""
    # An optimizer may carry a key (gradient noise).
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def apart(was: str, now: str, most: int = 200) -> tuple[str, str]:
    """Two texts cut to where they part: descriptions of closures are long and begin alike."""
    same = next((i for i, (a, b) in enumerate(zip(was, now)) if a != b), min(len(was), len(now)))
    start = max(0, same - 60) if max(len(was), len(now)) > most else 0

    def part(text: str) -> str:
        return ("..." if start else "") + text[start : start + most] + ("..." if len(text) > start + most else "")

    return part(was), part(now)
