"""PaperJAX: where deep-learning theory papers run."""

from paperjax import data, kernels, limits, measures, models, trace, transforms
from paperjax.claims import Claim, Control, Estimate, Paper, estimate, fit_slope, judge
from paperjax.devices import cpu_devices
from paperjax.experiment import Experiment
from paperjax.grid import Grid, grid, linspace, logspace
from paperjax.kernels import ntk, predict
from paperjax.layout import Layout
from paperjax.limits import limit
from paperjax.model import Family, Frozen, Model, as_model, family
from paperjax.parametrization import (
    Depth,
    Exponent,
    Parametrization,
    Plan,
    abc,
    classify,
    completep,
    depth_mup,
    mean_field,
    mup,
    mup_table8,
    mup_table9,
    ntp,
    plan,
    spectral,
    standard,
    standard_full_align,
    u_mup,
    wd_layerwise,
)  # fmt: skip
from paperjax.result import load, save, sem
from paperjax.sharding import mesh
from paperjax.studies import coord_check, transfer
from paperjax.train import log_steps, train

__all__ = [
    "Claim", "Control", "Depth", "Estimate", "Experiment", "Exponent", "Family", "Frozen", "Grid", "Layout", "Model", "Paper",
    "Parametrization", "Plan", "abc", "as_model", "classify", "completep", "coord_check", "cpu_devices", "data", "depth_mup", "estimate",
    "family", "fit_slope", "grid", "judge", "kernels", "limit", "limits", "linspace", "load", "log_steps", "logspace", "mean_field",
    "measures", "mesh", "models", "mup", "mup_table8", "mup_table9", "ntk", "ntp", "plan", "predict", "save", "sem", "spectral", "standard",
    "standard_full_align", "trace", "train", "transfer", "transforms", "u_mup", "wd_layerwise",
]  # fmt: skip
__version__ = "0.1.0"
