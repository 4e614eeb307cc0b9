"""Curvature of the loss: the largest eigenvalue of its Hessian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import eigh_tridiagonal
from jaxtyping import Array, PyTree, Scalar

from paperjax.losses import resolve_loss
from paperjax.model import Model, join, split


def sharpness(
    model: Model,
    params: PyTree,
    data: Any,
    loss: str | Callable[..., Any],
    iterations: int = 20,
    examples: int | None = None,
) -> Scalar:
    """Largest eigenvalue of the Hessian of the training loss in the trained parameters, by the Lanczos method on Hessian-vector products.

    ``lambda_1 = max_v v^T H v / v^T v``, ``H = d² loss(f(theta, x), y) / d theta²``. Gradient descent on a quadratic loss diverges at
    learning rates above ``2 / lambda_1``.

    At the initialization of a perceptron in standard parametrization it is of order ``depth * width`` (Iyer, Hanin and Rolnick,
    arXiv 2212.07295); under NTP and muP, where every leaf counts with its own learning rate, it is to be read with those.

    Parameters
    ----------
    model, params
        Any model; `Frozen` leaves, and those that are not floating point, are held fixed.
    data
        Has ``x_train`` and ``y_train``.
    loss
        A name (``"mse"``) or a callable ``loss(f, y) -> scalar``; an Experiment gives its own.
    iterations
        Hessian-vector products, static; at most the number of parameters are taken. Each costs about two gradients.
    examples
        How many training examples, from the first on; by default all.

    Returns
    -------
    Array
        A number in the dtype of the parameters; negative if all curvature is. It is a Rayleigh quotient, so it comes from below: exact to
        rounding once `iterations` reaches the number of distinct eigenvalues, and within 1 % in 20 iterations where the next eigenvalue
        is below 0.9 of the largest, as it is at init. NaN where the network or its loss is.

    Raises
    ------
    ValueError
        If `iterations` or `examples` is below 1, no parameter is trained, or the trained leaves differ in dtype.

    References
    ----------
    Golub and Van Loan, Matrix Computations, Chapter 10.

    Examples
    --------
    Linear regression, loss ``mean (x w - y)²``: its Hessian is ``2 X^T X / n``, here diag(4, 1).

    >>> from types import SimpleNamespace
    >>> line = Model(lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
    >>> data = SimpleNamespace(x_train=jnp.array([[2.0, 0.0], [0.0, 1.0]]), y_train=jnp.ones((2, 1)))
    >>> round(float(sharpness(line, jnp.zeros((2, 1)), data, "mse")), 5)
    4.0
    """
    for name, number in (("iterations", iterations), ("examples", examples)):
        if number is not None and number < 1:
            raise ValueError(f"sharpness: {name} = {number}; it must be at least 1.")
    trained, given = split(params)
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(trained)}
    if len(dtypes) != 1:
        found = f"trained leaves of {', '.join(sorted(map(str, dtypes)))}" if dtypes else "no parameter that is trained"
        raise ValueError(f"sharpness: there is {found}; a Hessian needs trained leaves, all of one dtype.")
    theta, unravel = ravel_pytree(trained)
    x, y = data.x_train[:examples], data.y_train[:examples]

    def gradient(theta: Array) -> Array:
        return jax.grad(lambda theta: resolve_loss(loss)(model.apply(join(unravel(theta), given), x), y))(theta)

    def product(v: Array) -> Array:
        return jax.jvp(gradient, (theta,), (v,))[1]

    return _largest_eigenvalue(product, theta, min(iterations, theta.size))


def _largest_eigenvalue(product: Callable[[Array], Array], like: Array, steps: int) -> Scalar:
    """Largest Ritz value of a symmetric operator on vectors like `like`, after `steps` products.

    Not by matfree, which keeps all Lanczos vectors, each as large as the network. Without them rounding makes copies of eigenvalues that
    have converged, which leaves the largest where it is (Paige, 1980).
    """
    eps = jnp.finfo(like.dtype).eps

    def step(carry: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        before, v, below = carry
        image = product(v) - below * before
        diagonal = jnp.vdot(v, image)
        rest = image - diagonal * v
        size = jnp.linalg.norm(rest)
        # Rounding is all that is left of an exhausted space. What follows is zeros, put out of the way below. NaN must stay NaN.
        gone = size <= 100 * eps * jnp.linalg.norm(image)
        after = jnp.where(gone, jnp.zeros_like(rest), rest / jnp.where(gone, 1, size))
        return (v, after, jnp.where(gone, 0, size)), (diagonal, size)

    start = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
    first = (jnp.zeros_like(start), start / jnp.linalg.norm(start), jnp.zeros((), like.dtype))
    _, (diagonal, below) = jax.lax.scan(step, first, length=steps)
    ended = jnp.cumsum(below == 0) > 0
    # A block of its own, whose eigenvalue, a Rayleigh quotient, is none above the largest.
    diagonal = diagonal.at[1:].set(jnp.where(ended[:-1], diagonal[0], diagonal[1:]))
    # By bisection, so that there is no factorization, which cells of an Experiment cannot do at once on a CPU.
    return eigh_tridiagonal(diagonal, below[:-1], eigvals_only=True, select="i", select_range=(steps - 1, steps - 1))[0]
