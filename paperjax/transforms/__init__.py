"""Functions from a `paperjax.Model` to a `paperjax.Model`."""

from paperjax.transforms.center import center
from paperjax.transforms.ensemble import ensemble
from paperjax.transforms.linearize import linearize, taylor
from paperjax.transforms.mask import grasp, keep_largest, mask, snip, synflow
from paperjax.transforms.rescale import rescale
from paperjax.transforms.subspace import Projection, dense, fastfood, sparse, subspace

__all__ = [
    "Projection", "center", "dense", "ensemble", "fastfood", "grasp", "keep_largest", "linearize", "mask", "rescale", "snip", "sparse",
    "subspace", "synflow", "taylor",
]  # fmt: skip
