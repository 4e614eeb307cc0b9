"""Functions from a `paperjax.Model` to a `paperjax.Model`."""

from paperjax.transforms.center import center
from paperjax.transforms.ensemble import ensemble
from paperjax.transforms.linearize import linearize, taylor
from paperjax.transforms.rescale import rescale
from paperjax.transforms.subspace import Projection, dense, fastfood, sparse, subspace

__all__ = ["Projection", "center", "dense", "ensemble", "fastfood", "linearize", "rescale", "sparse", "subspace", "taylor"]
