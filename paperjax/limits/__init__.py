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
from paperjax.limits.critical import Edge, edge_of_chaos
from paperjax.limits.criticality import Criticality, PhaseDiagram, criticality, phase_diagram
from paperjax.limits.depth import DepthLimit, Flow, depth_limit, residual_flow
from paperjax.limits.dual import dual
from paperjax.limits.expectation import Mean, mean, moment, pair
from paperjax.limits.high_dim_gd import Descent, PopulationLimit, Statistics, high_dim_gd, population_limit, quadratic_test_loss
from paperjax.limits.infinite import Limit, limit
from paperjax.limits.joint import Expectation, expect, isserlis
from paperjax.limits.laws import Law, constant, leaf_laws, normal, orthogonal, truncated_normal, uniform
from paperjax.limits.mean_field_dynamics import Dynamics, mean_field_dynamics
from paperjax.limits.program import Program
from paperjax.limits.quadrature import quadrature
from paperjax.limits.random_features import FeatureLayer, Target, feature_layers, network_target, random_features_error, single_index
from paperjax.limits.recognise import Affine, Term, recognise
from paperjax.limits.rectified import rectified_monomial, signed_power
from paperjax.limits.recursion import Kernels, mlp_kernels
from paperjax.limits.rg_flow import ExactFluctuations, RGFlow, Weights, exact_fluctuations, optimal_ratio, rg_flow
from paperjax.limits.ridge import RidgeEquivalent, ridge_equivalent
from paperjax.limits.softmax_features import Frame, cross_entropy_frame, cross_entropy_minimiser
from paperjax.limits.tp4_limit import FeatureLimit, LimitReport, tp4_limit
from paperjax.limits.tp4_linear import tp4_linear
from paperjax.limits.unconstrained_features import CollapseThreshold, Minimiser, collapse_threshold, mse_minimiser

__all__ = [
    "Affine", "CollapseThreshold", "Criticality", "DepthLimit", "Descent", "Dual", "Dynamics", "Edge", "ExactFluctuations", "Expectation",
    "FeatureLayer", "FeatureLimit", "Flow", "Frame", "Kernels", "Law", "Limit", "LimitReport", "Mean", "Minimiser", "PhaseDiagram",
    "PopulationLimit", "Program", "RGFlow", "RidgeEquivalent", "Statistics", "Target", "Term", "Weights", "absolute", "collapse_threshold",
    "constant", "cos", "criticality", "cross_entropy_frame", "cross_entropy_minimiser", "depth_limit", "dual", "edge_of_chaos", "erf",
    "exact_fluctuations", "exp", "expect", "feature_layers", "gelu", "high_dim_gd", "identity", "isserlis", "leaf_laws", "leaky_relu",
    "limit", "mean", "mean_field_dynamics", "mlp_kernels", "moment", "monomial", "mse_minimiser", "network_target", "normal",
    "optimal_ratio", "orthogonal", "pair", "phase_diagram", "piecewise_linear", "polynomial", "population_limit", "quadratic_test_loss",
    "quadrature", "random_features_error", "recognise", "rectified_monomial", "relu", "residual_flow", "rg_flow", "ridge_equivalent",
    "sign", "signed_power", "sin", "single_index", "step", "tp4_limit", "tp4_linear", "truncated_normal", "uniform",
]  # fmt: skip
