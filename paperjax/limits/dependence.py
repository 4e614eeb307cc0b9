"""Values whose coordinates are not independent, or not of what multiplies them, or not alike: they have no known limit, and are refused."""

import math

from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd
from paperjax.limits.subsets import apart


def refuse_shared(node: nd.Node, before: nd.Axes, after: nd.Axes) -> None:
    """Refuse a random value that would be the same for all coordinates of a growing axis.

    Raises
    ------
    NotImplementedError
        If it is random, and an axis of size 1 (or none) becomes one that grows.
    """
    grows = any(atom.grows for new, old in zip(after, before) if not old for atom in new)
    if not grows or not isinstance(node, nd.Wide) or not fl.sources(node):
        return
    if any(atom.grows for axis in before for atom in axis):
        raise NotImplementedError(
            "an array with two growing axes, on which coordinates of one meet all coordinates of the other (an outer product, channels "
            "mixed with channels): its entries are not independent, and sums over both axes are no sums of independent numbers. (Of a "
            "matrix of weights times a gain: multiply what goes in, or what comes out, (h * g) @ w.)"
        )
    raise NotImplementedError(
        "one random number (a gate with a single output, a readout that is fed back) is repeated along a growing axis, so that all "
        "coordinates share it: what they make is Gaussian given that number, and a mixture without it. Let the gate have an output "
        "for each coordinate."
    )


def refuse_own(node: nd.Node, own: nd.Key, path: str) -> None:
    """Refuse a matrix that multiplies what was made of its own entries the other way round.

    In ``W' phi(W x)`` the sum has a part that is not random, ``x E phi'`` (Yang, arXiv 2006.14548, on transposes), and in ``E' E[i]``
    one that grows. ``W phi(W x)`` is as if the two were independent.

    Raises
    ------
    NotImplementedError
        If a coordinate of `node` depends on entries of the leaf, used as its transpose, as a table or as a vector.
    """
    leaf, entries, way = own
    if not isinstance(node, nd.Wide):
        return
    for key in fl.sources(node):
        if key[0] == leaf and key[2] != way and not apart(key[1], entries):
            raise NotImplementedError(
                f"{path}: it multiplies what it made itself, the other way round (a matrix and its transpose, an embedding table and a "
                "readout tied to it, with nothing but a skip or a function in between). The two are not independent, at infinite width "
                "either, and the limit is not known here. Untie them, or put a layer with weights between them."
            )


def refuse_given(mean: float, path: str) -> None:
    """Refuse entries that act as activations and are not drawn, but differ from one to the next.

    Raises
    ------
    ValueError
        If the leaf has no mean.
    """
    if math.isnan(mean):
        raise ValueError(
            f"pj.limit: {path}: init does not draw this leaf, and its entries differ from one to the next (decays, frequencies, a table of "
            "positions), so it has no law. Numbers that are not trained and differ along finite axes only are followed where the network "
            "makes them itself and they are no leaf; along a growing axis coordinates are not alike. Or draw it by jax.random, or declare "
            f'the law of its entries: laws={{"{path}": pj.limits.normal(variance)}}.'
        )
