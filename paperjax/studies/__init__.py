"""Ready-made Experiments: the coordinate check, and the transfer of learning rates."""

from paperjax.studies.coordinates import CoordCheck, coord_check

__all__ = ["CoordCheck", "coord_check"]
