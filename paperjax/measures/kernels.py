"""How far the tangent kernel of a network has moved since its initialization."""

from typing import Any

from jaxtyping import Array, PyTree, Scalar

from paperjax.kernels.ntk import ntk
from paperjax.kernels.spectrum import kernel_distance, movement
from paperjax.model import Model


def kernel_change(model: Model, params: PyTree, params0: PyTree, data: Any, examples: int = 64) -> Scalar:
    """Relative change of the tangent kernel since initialization, on the first training inputs.

    ``|Theta - Theta_0| / |Theta_0|`` in Frobenius' norm, Theta the kernel traced over outputs; see `paperjax.kernels.movement`.

    After training to a given loss it falls with the width n as ``1/n`` under NTP for a smooth activation, for ReLU as ``n^-3/4`` where
    flips of gates make most of it, and it is of order 1 under muP.

    Parameters
    ----------
    model
        Any model that `paperjax.ntk` takes.
    params, params0
        The parameters now and at the start.
    data
        Has ``x_train``.
    examples
        How many training inputs, from the first on; at most all. The cost is that of two kernels of so many.

    Returns
    -------
    Array
        A number of at least 0, in float32 or, with ``jax_enable_x64``, float64. With unchanged parameters it is 0, or where the two
        kernels are compiled differently their rounding, 1e-7 in float32.

    Raises
    ------
    ValueError
        As `paperjax.ntk`, and if the kernel is 0 at the start.

    Notes
    -----
    Every trained leaf counts alike, so it is the kernel that SGD follows where one learning rate is for all: in the forms of a
    parametrization whose SGD exponents c are equal, as `ntp` and `mup_table9` have them.

    References
    ----------
    Jacot, Gabriel and Hongler, arXiv 1806.07572, Theorem 2; Huang and Yau, arXiv 1909.08156, on the 1/n.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import jax.numpy as jnp
    >>> product = Model(lambda key, x: jnp.ones(2), lambda p, x: p[0] * p[1] * x)  # its kernel is |p|² x x'
    >>> data = SimpleNamespace(x_train=jnp.array([1.0, 2.0, 3.0]))
    >>> kernel_change(product, jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0]), data)
    Array(1.5, dtype=float32)
    """
    return movement(*_kernels(model, params, params0, data, examples))


def kernel_turn(model: Model, params: PyTree, params0: PyTree, data: Any, examples: int = 64) -> Scalar:
    """Kernel distance from initialization, which is blind to the kernel's size, on the first training inputs.

    ``1 - <Theta, Theta_0> / (|Theta| |Theta_0|)`` in Frobenius' product (`paperjax.kernels.kernel_distance`); where the kernel changes by
    little, half the square of the part of `kernel_change` that is no factor: of order ``n^-2`` in the width n under NTP for a smooth
    activation, of order 1 under muP.

    Parameters, Raises and the kernel that is meant are those of `kernel_change`.

    Returns
    -------
    Array
        A number from 0 to 1.

    References
    ----------
    Fort et al., arXiv 2010.15110, Section 2.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import jax.numpy as jnp
    >>> squares = Model(lambda key, x: jnp.ones(2), lambda p, x: x @ jnp.square(p))  # its kernel is 4 sum_i p_i² x_i x'_i
    >>> data = SimpleNamespace(x_train=jnp.eye(2))
    >>> kernel_turn(squares, jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]), data).round(4)  # 1 - 1/sqrt(2)
    Array(0.2929, dtype=float32)
    """
    return kernel_distance(*_kernels(model, params, params0, data, examples))


def _kernels(model: Model, params: PyTree, params0: PyTree, data: Any, examples: int) -> tuple[Array, Array]:
    """At the start, and now."""
    x = data.x_train[:examples]
    return ntk(model, params0, x, outputs="trace"), ntk(model, params, x, outputs="trace")
