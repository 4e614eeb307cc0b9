"""Functions of (model, params, data) to measure while a network trains; an Experiment gives each what it names."""

from paperjax.measures.collapse import class_cosines, class_means, frame_distance, nc1, nc2, nc3, self_duality, within_class
from paperjax.measures.connectivity import barrier, dropout_path, dropout_variance, keep, losses_along
from paperjax.measures.curvature import sharpness
from paperjax.measures.features import feature_change, last_features, output_change, readout_weights
from paperjax.measures.kernels import kernel_change, kernel_turn
from paperjax.measures.matrices import spectral_norm, stable_rank
from paperjax.measures.moments import excess_kurtosis
from paperjax.measures.performance import accuracy, error, misclassified, parameter_change, test_loss, train_accuracy, train_error

__all__ = [
    "accuracy", "barrier", "class_cosines", "class_means", "dropout_path", "dropout_variance", "error", "excess_kurtosis",
    "feature_change", "frame_distance", "keep", "kernel_change", "kernel_turn", "last_features", "losses_along", "misclassified", "nc1",
    "nc2", "nc3", "output_change", "parameter_change", "readout_weights", "self_duality", "sharpness", "spectral_norm", "stable_rank",
    "test_loss", "train_accuracy", "train_error", "within_class",
]  # fmt: skip
