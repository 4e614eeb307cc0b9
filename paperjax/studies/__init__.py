"""Ready-made Experiments: the coordinate check, and the transfer of learning rates."""

from paperjax.studies.coordinates import CoordCheck, coord_check
from paperjax.studies.learning_rates import EdgeError, Optimum, Transfer, best_learning_rates, transfer
from paperjax.studies.taps import residual_stream
from paperjax.studies.untrained import untrained

__all__ = [
    "CoordCheck", "EdgeError", "Optimum", "Transfer", "best_learning_rates", "coord_check", "residual_stream", "transfer", "untrained",
]  # fmt: skip
