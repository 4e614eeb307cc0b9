"""Functions of (model, params, data) to measure while a network trains; an Experiment gives each what it names."""

from paperjax.measures.curvature import sharpness
from paperjax.measures.features import feature_change, output_change
from paperjax.measures.kernels import kernel_change, kernel_turn
from paperjax.measures.matrices import spectral_norm, stable_rank
from paperjax.measures.moments import excess_kurtosis
from paperjax.measures.performance import accuracy, error, misclassified, parameter_change, test_loss, train_accuracy, train_error

__all__ = [
    "accuracy", "error", "excess_kurtosis", "feature_change", "kernel_change", "kernel_turn", "misclassified", "output_change",
    "parameter_change",
    "sharpness", "spectral_norm", "stable_rank", "test_loss", "train_accuracy", "train_error",
]  # fmt: skip
