"""Sets of entries of a leaf."""

from typing import Any

import numpy as np


def ranges(places: np.ndarray) -> Any:
    """A hashable name of a set of places: first, number and step where they are evenly spaced."""
    flat = np.sort(places, axis=None)
    steps = np.unique(np.diff(flat))
    return (int(flat[0]), flat.size, int(steps[0]) if steps.size else 0) if steps.size <= 1 else flat.tobytes()


def apart(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool | None:
    """Whether two sets of entries of one leaf (`View.entries`) share none; ``None`` if they are neither apart nor equal."""
    if a == b:
        return False
    for one, two in zip(a, b):
        here, there = (np.frombuffer(r, np.int64) if isinstance(r, bytes) else r[0] + r[2] * np.arange(r[1]) for r in (one, two))
        if not np.intersect1d(here, there).size:
            return True
    return None
