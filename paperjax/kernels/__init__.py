"""Empirical kernels: the neural tangent kernel of any model, its spectrum, and what training does to it."""

from paperjax.kernels.ntk import ntk

__all__ = ["ntk"]
