"""Networks as functions of their sizes, each returning a `paperjax.Model`."""

from paperjax.models import initializers
from paperjax.models.cnn import cnn
from paperjax.models.mlp import linear_net, mlp
from paperjax.models.resmlp import resmlp
from paperjax.models.transformer import transformer
from paperjax.models.two_layer import two_layer

__all__ = ["cnn", "initializers", "linear_net", "mlp", "resmlp", "transformer", "two_layer"]
