"""Empirical kernels: the neural tangent kernel of any model, its spectrum, and what training does to it."""

from paperjax.kernels import predict
from paperjax.kernels.explain import Explanation, LeafRoute, explain
from paperjax.kernels.iterative import Iterated, conjugate_gradients
from paperjax.kernels.lanczos import Lanczos, lanczos
from paperjax.kernels.matrix import as_matrix
from paperjax.kernels.ntk import ntk
from paperjax.kernels.operator import operator
from paperjax.kernels.spectrum import (
    Spectrum,
    alignment,
    cumulative_power,
    effective_dimension,
    eigenvalues,
    kernel_distance,
    label_gradient_alignment,
    movement,
    participation,
)
from paperjax.kernels.split import TrainTest, train_test

__all__ = [
    "Explanation", "Iterated", "Lanczos", "LeafRoute", "Spectrum", "TrainTest", "alignment", "as_matrix", "conjugate_gradients",
    "cumulative_power", "effective_dimension", "eigenvalues", "explain", "kernel_distance", "label_gradient_alignment", "lanczos",
    "movement", "ntk", "operator", "participation", "predict", "train_test",
]  # fmt: skip
