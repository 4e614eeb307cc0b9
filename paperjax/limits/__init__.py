"""Infinitely wide networks: the duals of activations, and the kernels that follow from them."""

from paperjax.limits.closed_forms import (
    Dual,
    absolute,
    cos,
    erf,
    exp,
    gelu,
    identity,
    leaky_relu,
    monomial,
    piecewise_linear,
    polynomial,
    relu,
    sign,
    sin,
    step,
)
from paperjax.limits.dual import dual
from paperjax.limits.laws import Law, constant, leaf_laws, normal, orthogonal, truncated_normal, uniform
from paperjax.limits.quadrature import quadrature
from paperjax.limits.recursion import Kernels, mlp_kernels

__all__ = [
    "Dual", "Kernels", "Law", "absolute", "constant", "cos", "dual", "erf", "exp", "gelu", "identity", "leaf_laws", "leaky_relu",
    "mlp_kernels", "monomial", "normal", "orthogonal", "piecewise_linear", "polynomial", "quadrature", "relu", "sign", "sin", "step",
    "truncated_normal", "uniform",
]  # fmt: skip
