"""Ready-made Experiments: the coordinate check, and the transfer of learning rates."""

from paperjax.studies.coordinates import CoordCheck, coord_check
from paperjax.studies.learning_rates import ArgminOnEdge, Optimum, Transfer, transfer

__all__ = ["ArgminOnEdge", "CoordCheck", "Optimum", "Transfer", "coord_check", "transfer"]
