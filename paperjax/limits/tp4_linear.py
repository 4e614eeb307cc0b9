"""Linear networks of infinite width in muP, exactly: every vector over neurons is a few coefficients in a basis of the initial weights.

One hidden layer, ``f = v . U x``: U and v stay in the span of the columns of U at the start and of v at the start, which are orthogonal,
so the limit is a network of ``D + O`` neurons (Yang and Hu, arXiv 2011.14522, and their code for Omniglot).

Two, ``f = v . W U x`` with a square Gaussian W, ``W W^T`` of the Marchenko-Pastur law: in the orthonormal basis that powers of ``W W^T``
make of a vector independent of W, W is bidiagonal with ones,

    W b_k = a_k + a_{k-1}  if b_0 is a column of U,        W^T a_k = b_k + b_{k-1}  if a_0 is an output's v,

and chains of different vectors are orthogonal. A step reaches half a link further, so of T steps links up to T/2 + 1 are the limit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from paperjax.model import Model
from paperjax.models import linear_net

Answer = tuple[Float[np.ndarray, "T Q O"], Float[np.ndarray, "L T Q Q"]]


class Training(NamedTuple):
    """What is trained, on what and how.

    inputs: ``(Q, D)``. batches: T arrays of rows of it. rates: ``(T, L + 1)``, of every layer at every step. variances: ``(L + 1,)``.
    gradient: of the loss, ``(B, O)``, by step and outputs ``(B, O)`` of its batch. outputs: O.
    """

    inputs: np.ndarray
    batches: list[np.ndarray]
    rates: np.ndarray
    variances: np.ndarray
    gradient: Callable[[int, np.ndarray], np.ndarray]
    outputs: int


def tp4_linear(
    features: int, outputs: int, *, depth: int = 1, steps: int | None = None, variances: tuple[float, ...] | None = None
) -> Model:
    """A finite network that is the infinite-width muP limit of a linear one: trained by any gradients, it gives the limit's outputs.

    Its neurons are the coefficients of `tp4_limit` where ``phi`` is None, and its initial weights are fixed, so that whatever is made of
    gradients (meta-learning, momentum, any loss) is that of the limit, with the learning rates of the paper's muP. The inner product of two
    of its hidden vectors is the mean over neurons of the limit.

    Parameters
    ----------
    features, outputs
        D and O.
    depth
        Hidden layers, 1 or 2.
    steps
        At two hidden layers, the number of updates up to which the network is to be exact; it has ``(D + O) (steps // 2 + 2)`` neurons in
        a layer. With one, ``D + O`` for ever.
    variances
        Of the weights of each layer, as in `tp4_limit`; by default 1.

    Returns
    -------
    Model
        That of `paperjax.models.linear_net`, with deterministic parameters.

    Raises
    ------
    ValueError
        If a size is below 1, depth is neither 1 nor 2, `steps` is missing, or variances are negative or not one for each layer.

    References
    ----------
    Yang and Hu, arXiv 2011.14522: the limit of the linear network with one hidden layer.

    Examples
    --------
    >>> import jax
    >>> model = tp4_linear(2, 1)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> params["readout"]["w"].ravel().tolist()  # orthogonal to the first layer's columns: outputs start at 0
    [0.0, 0.0, 1.0]
    """
    for name, size in (("features", features), ("outputs", outputs)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"tp4_linear: {name} = {size!r}, but it is a whole number of at least 1.")
    if depth not in (1, 2):
        raise ValueError(f"tp4_linear: depth = {depth!r}: one or two hidden layers have closed coefficients.")
    if depth == 2 and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ValueError(f"tp4_linear: steps = {steps!r}: with two hidden layers say up to how many updates it is to be exact.")
    variances = (1.0,) * (depth + 1) if variances is None else variances
    if len(variances) != depth + 1 or not all(0 <= v < np.inf for v in variances):
        raise ValueError(f"tp4_linear: variances = {variances}: one for each of {depth + 1} layers, finite and at least 0.")
    first, hidden, readout = coefficients(features, outputs, depth, steps or 0, np.asarray(variances, np.float64))
    net = linear_net(first.shape[1], depth, outputs)

    def init(key: PRNGKeyArray, x: Float[Array, "batch features"]) -> PyTree:
        del key
        params = {"first": {"w": jnp.asarray(first, x.dtype)}, "readout": {"w": jnp.asarray(readout, x.dtype)}}
        return params if hidden is None else {**params, "hidden": {"w": jnp.asarray(hidden.toarray()[None], x.dtype)}}

    return Model(init, net.apply)


def coefficients(
    features: int, outputs: int, depth: int, steps: int, variances: Float[np.ndarray, " layers"]
) -> tuple[np.ndarray, "sparse.csr_array | None", np.ndarray]:
    """Initial weights ``(D, N)``, ``(N, N)`` (or None) and ``(N, O)`` of the network whose neurons are basis vectors."""
    links = 1 if depth == 1 else steps // 2 + 2
    deviations = np.sqrt(variances)
    start = np.eye(1, links)
    eye = np.eye(features + outputs)
    first = deviations[0] * np.kron(eye[:features], start)
    readout = deviations[-1] * np.kron(eye[features:], start).T
    if depth == 1:
        return first, None, readout
    # Rows are of the layer below, as in h @ w; from a column of U one goes down the chain, to an output's v up.
    down = sparse.eye_array(links) + sparse.eye_array(links, k=-1)
    chains = [sparse.kron(sparse.eye_array(count), link) for count, link in ((features, down), (outputs, down.T))]
    return first, deviations[1] * sparse.block_diag(chains, format="csr"), readout


def descend(training: Training, depth: int) -> tuple[Answer, int]:
    """Outputs and kernels at steps 0 to T, and the number of coefficients."""
    x, rates = training.inputs, training.rates
    steps = len(training.batches)
    first, hidden, v = coefficients(x.shape[1], training.outputs, depth, steps, training.variances)
    # Of the hidden layer what it has learned is of low rank: W = hidden - before @ after.T.
    before, after = np.zeros((len(v), 0)), np.zeros((len(v), 0))
    f, kernels = np.zeros((steps + 1, len(x), training.outputs)), np.zeros((depth, steps + 1, len(x), len(x)))
    for t in range(steps + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            below = x @ first
            top = below if hidden is None else below @ hidden - (below @ before) @ after.T
            f[t] = top @ v
            kernels[0, t], kernels[-1, t] = below @ below.T, top @ top.T
            finite(f[t], t)
            if t == steps:
                break
            at = training.batches[t]
            chi = training.gradient(t, f[t, at])
            back = chi @ v.T
            if hidden is not None:
                back, learned = back @ hidden.T - (back @ after) @ before.T, (rates[t, 1] * below[at].T @ chi, v)
                before, after = (np.concatenate(pair, axis=1) for pair in zip((before, after), learned))
            first, v = first - rates[t, 0] * x[at].T @ back, v - rates[t, -1] * top[at].T @ chi
    return (f, kernels), len(v)


def finite(values: np.ndarray, t: int) -> None:
    """Raise RuntimeError where training diverges."""
    # A square beyond this would overflow on the way to the next kernel.
    if not np.abs(values).max() < 1e100:
        raise RuntimeError(f"tp4_limit: step {t} overflowed: training diverges. Take smaller learning rates.")
