"""The network and the outputs that `ntk` is asked about."""

import functools
from typing import Any

import numpy as np

from paperjax.binding import nearest
from paperjax.model import Model, as_model

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


def chosen_outputs(outputs: Any, out: tuple[int, ...]) -> tuple[str, int | None]:
    """What `ntk` is asked of the outputs: how they pair, and the flat number of the one that is wanted."""
    if isinstance(outputs, str):
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs = {outputs!r}. {nearest(outputs, OUTPUTS)} Or the number of one output.")
        return outputs, None
    number = (int, np.integer)
    place = (outputs,) if isinstance(outputs, number) else tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    if not all(isinstance(i, number) and not isinstance(i, bool) for i in place):
        raise TypeError(f"outputs = {outputs!r}: one of {', '.join(map(repr, OUTPUTS))}, or the number of one output.")
    if len(place) != len(out) or not all(-n <= i < n for i, n in zip(place, out)):
        raise ValueError(f"outputs = {outputs!r} names no output: an example's output has shape {out}.")
    return "trace", int(np.ravel_multi_index([i % n for i, n in zip(place, out)], out)) if out else 0
