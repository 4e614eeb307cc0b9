"""Neural collapse of the last layer's features: NC1 within classes, NC2 of their means, NC3 of means and readout."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree, Scalar

from paperjax.measures.features import last_features, readout_weights
from paperjax.model import Model

Frame = Literal["simplex", "orthogonal"]


def class_means(features: Float[Array, "batch features"], y: Any, classes: int | None = None) -> Float[Array, "classes features"]:
    """Mean of the features of each class.

    Parameters
    ----------
    features
        Shape (batch, features).
    y
        Integer classes ``(batch,)``, or one-hot rows ``(batch, classes)``.
    classes
        K; by default the largest label plus one, or the length of the rows. Under ``jit`` integers cannot be looked at: give it.

    Returns
    -------
    Array
        At least in float32.

    Raises
    ------
    ValueError
        If a class has no example, there is one class only, a label is none of the classes, or shapes do not fit. Under ``jit`` labels
        cannot be looked at: there the mean of a class without examples is NaN, and so is all that is made of it.
    TypeError
        If labels are neither integers nor rows.

    Examples
    --------
    >>> class_means(jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]))
    Array([[2.],
           [5.]], dtype=float32)
    """
    return _means(features, y, classes, "class_means")[0]


def within_class(features: Float[Array, "batch features"], y: Any, classes: int | None = None) -> Scalar:
    """NC1, ``tr(S_W S_B^+) / K``: 0 when all examples of a class have the same features.

    ``S_W`` is the mean over examples of ``(h - mu_y)(h - mu_y)^T``, and ``S_B`` that over classes of ``(mu_k - mu)(mu_k - mu)^T`` with mu
    the mean of the means, so classes count equally whatever their sizes. Directions in which means do not differ are left out.

    Parameters
    ----------
    features, y, classes
        As in `class_means`.

    Returns
    -------
    Array
        At least 0, invariant under rotations, shifts and scales of the features; NaN where all means are equal.

    Raises
    ------
    ValueError, TypeError
        As `class_means` does.

    References
    ----------
    Papyan, Han and Donoho, arXiv 2008.08186.

    Examples
    --------
    >>> h = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    >>> within_class(h, jnp.array([0, 0, 1, 1]))  # All spread is where means do not differ.
    Array(0., dtype=float32)
    """
    mu_KxD, label_B, h_BxD = _means(features, y, classes, "within_class")
    u_KxD, spread_K = _between(mu_KxD)
    along_BxK = (h_BxD - mu_KxD[label_B]) @ u_KxD.T
    kept = spread_K > spread_K[0] * len(spread_K) * jnp.finfo(spread_K.dtype).eps
    ratios = jnp.mean(jnp.square(along_BxK), axis=0) / jnp.where(kept, jnp.square(spread_K), 1.0)
    # S_B is the squared spread over K.
    return jnp.where(spread_K[0] > 0, jnp.sum(jnp.where(kept, ratios, 0.0)), jnp.nan)


def class_cosines(
    features: Float[Array, "batch features"], y: Any, classes: int | None = None, centred: bool = True
) -> Float[Array, "classes classes"]:
    """Cosines between the means of classes, less the mean of the means if `centred`: -1/(K - 1) for a simplex, 0 for a frame.

    Parameters
    ----------
    features, y, classes
        As in `class_means`.
    centred
        Networks with a bias form a simplex around their mean; without, and with squared error, an orthogonal frame around 0.

    Returns
    -------
    Array
        Shape (classes, classes); NaN for a mean of 0.

    Examples
    --------
    >>> class_cosines(jnp.eye(3), jnp.arange(3))[0]
    Array([ 1. , -0.5, -0.5], dtype=float32)
    """
    mu_KxD = _maybe_centred(_means(features, y, classes, "class_cosines")[0], centred)
    unit_KxD = mu_KxD / jnp.linalg.norm(mu_KxD, axis=1, keepdims=True)
    return unit_KxD @ unit_KxD.T


def frame_distance(features: Float[Array, "batch features"], y: Any, classes: int | None = None, frame: Frame = "simplex") -> Scalar:
    """NC2, ``| G / |G|_F - E / |E|_F |_F`` of the Gram matrix G of class means and that of a frame E, lengths included.

    Parameters
    ----------
    features, y, classes
        As in `class_means`.
    frame
        ``"simplex"``: means less their mean, and ``E = 1 - 11^T / K``. ``"orthogonal"``: means as they are, and E = 1.

    Returns
    -------
    Array
        Between 0 and 2^(1/2); NaN where all means are 0 (for the simplex, equal).

    Raises
    ------
    ValueError, TypeError
        As `class_means` does, and if frame is another word.

    Examples
    --------
    >>> frame_distance(jnp.eye(3), jnp.arange(3), frame="orthogonal")
    Array(0., dtype=float32)
    """
    if frame not in ("simplex", "orthogonal"):
        raise ValueError(f"frame_distance: frame = {frame!r} is neither 'simplex' nor 'orthogonal'.")
    mu_KxD = _maybe_centred(_means(features, y, classes, "frame_distance")[0], frame == "simplex")
    K = mu_KxD.shape[0]
    E_KxK = jnp.eye(K, dtype=mu_KxD.dtype) - (1 / K if frame == "simplex" else 0)
    return _apart(mu_KxD @ mu_KxD.T, E_KxK)


def self_duality(
    weights: Float[Array, "classes features"],
    features: Float[Array, "batch features"],
    y: Any,
    centred: bool = True,
) -> Scalar:
    """NC3, ``| W / |W|_F - M / |M|_F |_F`` of the readout's rows and the class means, less the mean of the means if `centred`.

    Parameters
    ----------
    weights
        Shape (classes, features).
    features, y
        As in `class_means`.
    centred
        As in `class_cosines`. W is taken as it is.

    Returns
    -------
    Array
        Between 0 and 2; NaN where W or the means are 0.

    Raises
    ------
    ValueError, TypeError
        As `class_means` does, and if there are not as many coordinates in a row of the weights as in a feature.

    Examples
    --------
    >>> self_duality(4 * jnp.eye(2), jnp.eye(2), jnp.arange(2), centred=False)
    Array(0., dtype=float32)
    """
    mu_KxD = _maybe_centred(_means(features, y, weights.shape[0], "self_duality")[0], centred)
    if weights.shape != mu_KxD.shape:
        raise ValueError(f"self_duality: weights have shape {weights.shape} and class means {mu_KxD.shape}; they must be equal.")
    return _apart(weights.astype(mu_KxD.dtype), mu_KxD)


def nc1(model: Model, params: PyTree, data: Any) -> Scalar:
    """`within_class` of the last features of the training examples, for an Experiment.

    Parameters
    ----------
    model
        Any model with a hidden layer; the trace finds what goes into its readout.
    params, data
        As an Experiment hands them out; data has ``x_train`` and ``y_train``.

    Raises
    ------
    ValueError, TypeError
        As `within_class` and `paperjax.measures.last_features` do.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import paperjax as pj
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0, 0.0], [0.0, 1.0]]), y_train=jnp.array([0, 1]))
    >>> model = pj.models.linear_net(2, 1, outputs=2)
    >>> nc1(model, {"first": {"w": jnp.eye(2)}, "readout": {"w": jnp.eye(2)}}, data)
    Array(0., dtype=float32)
    """
    return within_class(last_features(model, params, data.x_train), data.y_train, _outputs(model, params, data))


def nc2(model: Model, params: PyTree, data: Any, frame: Frame = "simplex") -> Scalar:
    """`frame_distance` of the last features of the training examples; ``functools.partial(nc2, frame="orthogonal")`` for the other frame.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import paperjax as pj
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0, 0.0], [0.0, 1.0]]), y_train=jnp.array([0, 1]))
    >>> model = pj.models.linear_net(2, 1, outputs=2)
    >>> nc2(model, {"first": {"w": jnp.eye(2)}, "readout": {"w": jnp.eye(2)}}, data, frame="orthogonal")
    Array(0., dtype=float32)
    """
    return frame_distance(last_features(model, params, data.x_train), data.y_train, _outputs(model, params, data), frame)


def nc3(model: Model, params: PyTree, data: Any, centred: bool = True) -> Scalar:
    """`self_duality` of the readout and the last features of the training examples; W is the derivative of outputs in features.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import paperjax as pj
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0, 0.0], [0.0, 1.0]]), y_train=jnp.array([0, 1]))
    >>> model = pj.models.linear_net(2, 1, outputs=2)
    >>> nc3(model, {"first": {"w": jnp.eye(2)}, "readout": {"w": 4 * jnp.eye(2)}}, data, centred=False)
    Array(0., dtype=float32)
    """
    return self_duality(readout_weights(model, params, data.x_train), last_features(model, params, data.x_train), data.y_train, centred)


def check_classes(measures: Mapping[str, Callable[..., Any]], y: Any, outputs: int) -> None:
    """Refuse labels that `nc1`, `nc2` or `nc3` among the measures cannot be taken of, before they are out of sight under ``jit``.

    Raises
    ------
    ValueError, TypeError
        As `class_means` does, naming the measure.

    Examples
    --------
    >>> check_classes({"nc1": nc1}, np.array([0, 1]), 2)
    """
    for name, measure in measures.items():
        if getattr(measure, "func", measure) in (nc1, nc2, nc3):
            _labels(y, len(y), outputs, f"measure {name!r}")


def _outputs(model: Model, params: PyTree, data: Any) -> int:
    return jax.eval_shape(model.apply, params, data.x_train).shape[-1]


def _labels(y: Any, batch: int, classes: int | None, where: str) -> tuple[Array, int]:
    """Integer labels, and how many classes there are; each is refused by name if it can be looked at."""
    rows = y.ndim == 2
    if not rows and not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{where}: labels are {y.dtype}{list(y.shape)}; give integer classes (batch,) or one-hot rows (batch, classes).")
    if y.ndim not in (1, 2) or y.shape[0] != batch:
        raise ValueError(f"{where}: labels have shape {y.shape} for a batch of {batch}; give (batch,), or rows (batch, classes).")
    # Labels that are the data's own stay to be looked at, whatever is traced around them.
    label_B = y if not rows else jnp.argmax(y, axis=1) if isinstance(y, Tracer) else np.argmax(np.asarray(y), axis=1)
    known = None if isinstance(label_B, Tracer) else np.asarray(label_B)
    if rows:
        K = y.shape[1]
    elif classes is not None:
        K = classes
    elif known is None:
        raise ValueError(f"{where}: under jit labels cannot be looked at, so say how many classes there are: classes=.")
    else:
        K = int(known.max()) + 1 if batch else 0
    if classes not in (None, K):
        raise ValueError(f"{where}: labels are rows of {K} for {classes} classes.")
    if K < 2:
        raise ValueError(f"{where}: {K} class(es); collapse is between the features of two or more. Use labels of two at least.")
    if known is not None:
        if batch and (known.min() < 0 or known.max() >= K):
            raise ValueError(f"{where}: labels lie in {known.min()}..{known.max()}, and the classes are 0..{K - 1}.")
        absent = np.flatnonzero(np.bincount(known, minlength=K) == 0)
        if len(absent):
            raise ValueError(
                f"{where}: no example of class {', '.join(map(str, absent))} of 0..{K - 1} is there, so it has no mean. Measure on a "
                "batch with all classes, or renumber the labels."
            )
    return jnp.asarray(label_B), K


def _means(features: Array, y: Any, classes: int | None, where: str) -> tuple[Array, Array, Array]:
    """Means by class, integer labels, and features, at least in float32."""
    h_BxD = features.astype(jnp.float32) if features.dtype.itemsize < 4 else features
    label_B, K = _labels(y, h_BxD.shape[0], classes, where)
    one_hot_BxK = jax.nn.one_hot(label_B, K, dtype=h_BxD.dtype)
    count_K = jnp.sum(one_hot_BxK, axis=0)
    return (one_hot_BxK.T @ h_BxD) / jnp.where(count_K > 0, count_K, jnp.nan)[:, None], label_B, h_BxD


def _maybe_centred(mu_KxD: Array, centred: bool) -> Array:
    return mu_KxD - jnp.mean(mu_KxD, axis=0, keepdims=True) if centred else mu_KxD


def _between(mu_KxD: Array) -> tuple[Array, Array]:
    """Orthonormal directions in which means differ, and by how much, from the largest."""
    _, s, u_KxD = jnp.linalg.svd(_maybe_centred(mu_KxD, True), full_matrices=False)
    return u_KxD, s


def _apart(a: Array, b: Array) -> Scalar:
    return jnp.linalg.norm(a / jnp.linalg.norm(a) - b / jnp.linalg.norm(b))
