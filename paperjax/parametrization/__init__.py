"""The abc algebra, the tables of the papers, and plans: a parametrization resolved against any family."""

from paperjax.parametrization.abc import Depth, Exponent, Parametrization, abc
from paperjax.parametrization.classify import Classification, classify
from paperjax.parametrization.plan import Plan
from paperjax.parametrization.planning import plan
from paperjax.parametrization.tables import (
    completep,
    depth_mup,
    mean_field,
    mup,
    mup_table8,
    mup_table9,
    ntp,
    spectral,
    standard,
    standard_full_align,
    u_mup,
    wd_layerwise,
)

__all__ = [
    "Classification",
    "Depth",
    "Exponent",
    "Parametrization",
    "Plan",
    "abc",
    "classify",
    "completep",
    "depth_mup",
    "mean_field",
    "mup",
    "mup_table8",
    "mup_table9",
    "ntp",
    "plan",
    "spectral",
    "standard",
    "standard_full_align",
    "u_mup",
    "wd_layerwise",
]
