"""Other libraries, so that their users can compare and move over."""

from paperjax.interop import neural_tangents

__all__ = ["neural_tangents"]
