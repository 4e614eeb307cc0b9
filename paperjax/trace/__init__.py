"""The jaxpr reader: leaves, contraction sites, axis roles, residual streams, laws at initialization."""

from paperjax.trace.program import Leaf, Program, Use, read

__all__ = ["Leaf", "Program", "Use", "read"]
