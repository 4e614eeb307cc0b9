"""Reading a kernel: its spectrum, how many directions it has, how well it fits the labels, and how far it has moved.

Plain functions of arrays, differentiable where their formula is, in the layouts of `paperjax.ntk`. Those that need one matrix take
``(N, N)`` or ``(N, N, *out, *out)``; those that take labels take the diagonal layout ``(N, N, *out)`` too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from paperjax.kernels.lanczos import Lanczos, lanczos
from paperjax.kernels.matrix import Numbers, as_matrix, check_finite, check_symmetric, fold, known, precision, working
from paperjax.kernels.modes import Inputs, read

__all__ = [
    "Lanczos", "Spectrum", "alignment", "as_matrix", "cumulative_power", "effective_dimension", "eigenvalues", "kernel_distance",
    "label_gradient_alignment", "lanczos", "movement", "participation",
]  # fmt: skip


class Spectrum(NamedTuple):
    """Of a symmetric kernel.

    Attributes
    ----------
    eigenvalues
        ``(n,)``, descending.
    vectors
        ``(n, N, *out)``, orthonormal; ``vectors[i]`` belongs to ``eigenvalues[i]``.
    """

    eigenvalues: Array
    vectors: Array


def eigenvalues(kernel: Numbers) -> Spectrum:
    """All eigenvalues and eigenvectors of a kernel, ``K v_i = lambda_i v_i``, the largest first.

    Parameters
    ----------
    kernel
        ``(N, N)``, or ``(N, N, *out, *out)`` with n = N O rows.

    Returns
    -------
    Spectrum
        Float64 if ``jax_enable_x64`` is on, else float32. Each eigenvalue carries an error of a few rounding units *of the largest*, so
        in float32 those below 1e-6 of it are noise, of either sign. They are returned as they are.

    Raises
    ------
    ValueError
        If the kernel is not finite, not square or not symmetric.

    Examples
    --------
    >>> spectrum = eigenvalues(jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> spectrum.eigenvalues.tolist(), jnp.abs(spectrum.vectors[0]).tolist()
    ([3.0, 1.0], [0.0, 1.0])
    """
    matrix = _symmetric(kernel)
    values, vectors = jnp.linalg.eigh(matrix)
    shape = (jnp.shape(kernel)[0], *jnp.shape(kernel)[2 : 1 + jnp.ndim(kernel) // 2])
    return Spectrum(values[::-1], vectors.T[::-1].reshape(-1, *shape))


def effective_dimension(kernel: Numbers, ridge: Any) -> Scalar:
    """Degrees of freedom of ridge regression, ``tr K (K + ridge)^-1 = sum_i lambda_i / (lambda_i + ridge)``.

    Between 0 and the rank, and falling in the ridge. Negative eigenvalues, which are rounding, count as 0.

    Parameters
    ----------
    kernel
        ``(N, N)`` or ``(N, N, *out, *out)``.
    ridge
        A positive number, in the units of the kernel's eigenvalues, and well above the rounding of the largest: below about 1e-6 of it
        in float32 (1e-15 in float64) directions that are rounding are counted.

    Raises
    ------
    ValueError
        As `eigenvalues`, and if `ridge` is not positive.

    References
    ----------
    Zhang, "Learning bounds for kernel regression using effective data dimensionality", 2005.

    Examples
    --------
    >>> effective_dimension(jnp.array([[1.0, 0.0], [0.0, 3.0]]), 1.0)
    Array(1.25, dtype=float32)
    """
    ridge = working(ridge)
    if ridge.ndim or (known(ridge) and not bool((ridge > 0) & jnp.isfinite(ridge))):
        raise ValueError(f"ridge = {ridge}: it must be a positive number.")
    values = jnp.maximum(jnp.linalg.eigvalsh(_symmetric(kernel)), 0)
    return jnp.sum(values / (values + ridge))


def participation(kernel: Numbers) -> Scalar:
    """Participation ratio of the spectrum, ``(tr K)² / tr K²``: how many eigenvalues share the trace.

    From 1, one direction, to n, all alike. It needs no eigenvalues.

    Parameters
    ----------
    kernel
        ``(N, N)`` or ``(N, N, *out, *out)``.

    Raises
    ------
    ValueError
        As `eigenvalues`, and if the kernel is 0.

    Examples
    --------
    >>> participation(jnp.eye(3)), participation(jnp.ones((3, 3)))
    (Array(3., dtype=float32), Array(1., dtype=float32))
    """
    matrix = _sized(_symmetric(kernel))
    return jnp.square(jnp.trace(matrix)) / _positive("the kernel", jnp.sum(jnp.square(matrix)))


def alignment(kernel: Numbers, y: Any, *, centered: bool = False) -> Scalar:
    """Kernel-target alignment, the cosine between the kernel and the Gram matrix of the labels.

    ``A = <K, L> / (|K| |L|)`` in Frobenius' product. A kernel ``(N, N)`` is compared with ``L_nm = sum_o y_no y_mo``. A kernel with
    outputs is compared, as a matrix of N O rows, with ``L = vec(y) vec(y)ᵀ``; for the other comparison take the kernel of
    ``outputs="trace"``. Centred, K and y have their means over examples removed first, ``H K H`` and ``H y`` with ``H = 1 - 11ᵀ/N``.

    Parameters
    ----------
    kernel
        ``(N, N)``, ``(N, N, *out)`` or ``(N, N, *out, *out)``.
    y
        ``(N, *out)``, floating.
    centered
        Whether to centre.

    Returns
    -------
    Array
        A number in [0, 1] for a positive semi-definite kernel; 1 if K is a multiple of L. Invariant under scaling of both.

    Raises
    ------
    ValueError
        As `eigenvalues`, and if shapes do not fit, or the kernel or labels are 0 (after centring: constant).

    References
    ----------
    Cristianini et al., "On kernel-target alignment", 2001; centred: Cortes, Mohri and Rostamizadeh, arXiv 1203.0550.

    Examples
    --------
    >>> y = jnp.array([1.0, -1.0])
    >>> alignment(jnp.outer(y, y), y), alignment(jnp.ones((2, 2)), y)
    (Array(1., dtype=float32), Array(0., dtype=float32))
    """
    inputs = _read_sized(kernel, y)
    blocks, labels = inputs.train, inputs.y
    if centered:
        labels = labels - labels.mean(axis=0, keepdims=True)
        blocks = _centered(inputs)
    columns = fold(labels, inputs.form)
    product = jnp.einsum("bnq,bnm,bmq->", columns, blocks, columns, precision="highest")
    if inputs.form.kind == "shared":
        size = jnp.sum(jnp.square(jnp.einsum("bnq,bmq->nm", columns, columns, precision="highest")))
    else:
        size = jnp.square(jnp.sum(jnp.square(columns)))
    kernel_size = _positive("the kernel", jnp.sum(jnp.square(blocks)), inputs.train, inputs.eps)
    squares = jnp.sum(jnp.square(inputs.y))
    return product / jnp.sqrt(kernel_size * _positive("the Gram matrix of the labels", size, squares, precision(labels) ** 2))


def label_gradient_alignment(kernel: Numbers, y: Any) -> Scalar:
    """Label-gradient alignment (LGA), the correlation between the entries of the NTK and of the labels' Gram matrix.

    ``LGA = <K - mean(K), L - mean(L)> / (|K - mean(K)| |L - mean(L)|)`` with ``L_nm = sum_o y_no y_mo`` and means over all N²
    entries; unlike in `alignment`, rows and columns keep theirs. A kernel with outputs is first traced over them.

    Parameters
    ----------
    kernel
        ``(N, N)``, ``(N, N, *out)`` or ``(N, N, *out, *out)``.
    y
        ``(N, *out)``, floating: one-hot rows, or ±1.

    Returns
    -------
    Array
        A number in [-1, 1]. Adding a constant to the kernel, or one-hot labels of other values, changes nothing.

    Raises
    ------
    ValueError
        As `alignment`; the kernel and the Gram matrix must not be constant.

    References
    ----------
    Mok et al., "Demystifying the Neural Tangent Kernel from a Practical Perspective", arXiv 2203.14577. Their code sets entries of L
    below 1 to -1, which for one-hot labels changes nothing.

    Examples
    --------
    >>> y = jnp.array([1.0, 1.0, -1.0])
    >>> label_gradient_alignment(3.0 + jnp.outer(y, y), y).round(5)
    Array(1., dtype=float32)
    """
    inputs = _read_sized(kernel, y)
    n, form = inputs.y.shape[0], inputs.form
    if form.kind == "full":
        traced = jnp.einsum("nomo->nm", inputs.train[0].reshape(n, -1, n, inputs.train.shape[1] // n))
    else:
        traced = inputs.train.sum(axis=0)
    rows = inputs.y.reshape(n, -1)
    gram = jnp.matmul(rows, rows.T, precision="highest")
    a, b = traced - traced.mean(), gram - gram.mean()
    sizes = _positive("the kernel less its mean", jnp.sum(a**2), traced, inputs.eps) * _positive(
        "the labels' Gram matrix less its mean", jnp.sum(b**2), gram, precision(gram)
    )
    return jnp.sum(a * b) / jnp.sqrt(sizes)


def cumulative_power(kernel: Numbers, y: Any) -> Float[Array, " directions"]:
    """How much of the labels lies in the kernel's leading directions, ``C_k = sum_{i <= k} |v_iᵀ y|² / |y|²``.

    Parameters
    ----------
    kernel
        ``(N, N)``, ``(N, N, *out)`` or ``(N, N, *out, *out)``.
    y
        ``(N, *out)``, floating. A kernel shared over outputs acts on each alike: N directions, each the sum over outputs.

    Returns
    -------
    Array
        ``(n,)`` for k = 1..n, rising to 1; n is N if shared, else N O. Inside a space of equal eigenvalues the order is arbitrary.

    Raises
    ------
    ValueError
        As `alignment`.

    References
    ----------
    Canatar, Bordelon and Pehlevan, arXiv 2006.13198.

    Examples
    --------
    >>> cumulative_power(jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([3.0, 4.0])).round(2)
    Array([0.64, 1.  ], dtype=float32)
    """
    inputs = _read_sized(kernel, y)
    values, vectors = jnp.linalg.eigh(inputs.train)
    parts = jnp.einsum("bni,bnq->biq", vectors, fold(inputs.y, inputs.form), precision="highest")
    power = jnp.sum(jnp.square(parts), axis=-1).reshape(-1)
    return jnp.cumsum(power[jnp.argsort(-values.reshape(-1))]) / _positive("y", jnp.sum(jnp.square(inputs.y)))


def kernel_distance(k1: Numbers, k2: Numbers) -> Scalar:
    """Kernel distance, ``1 - <K1, K2> / (|K1| |K2|)`` in Frobenius' product: 0 for kernels that differ by a factor.

    Parameters
    ----------
    k1, k2
        Of one shape, any layout, also of two sets of inputs.

    Returns
    -------
    Array
        A number from 0 to 1 for positive semi-definite kernels. Computed as half the square of the distance between the normalized
        kernels, so that small distances are not lost in 1.

    Raises
    ------
    ValueError
        If shapes differ, a number is not finite, or a kernel is 0.

    References
    ----------
    Fort et al., arXiv 2010.15110, Section 2.

    Examples
    --------
    >>> kernel_distance(jnp.eye(2), 5 * jnp.eye(2)).round(5), kernel_distance(jnp.eye(2), jnp.ones((2, 2))).round(4)
    (Array(0., dtype=float32), Array(0.2929, dtype=float32))
    """
    one, two = (_sized(kernel) for kernel in _pair(k1, k2))
    unit1 = one / jnp.sqrt(_positive("k1", jnp.sum(jnp.square(one))))
    unit2 = two / jnp.sqrt(_positive("k2", jnp.sum(jnp.square(two))))
    return jnp.sum(jnp.square(unit1 - unit2)) / 2


def movement(k1: Numbers, k2: Numbers) -> Scalar:
    """Relative change of a kernel from `k1` to `k2`, ``|K2 - K1| / |K1|`` in Frobenius' norm.

    Over training it falls with the width n as 1/n under NTP for a smooth activation (Huang and Yau, arXiv 1909.08156), and is of order 1
    under muP.

    Parameters
    ----------
    k1, k2
        Of one shape, any layout, also of two sets of inputs.

    Raises
    ------
    ValueError
        As `kernel_distance`.

    Examples
    --------
    >>> movement(jnp.eye(2), 3 * jnp.eye(2))
    Array(2., dtype=float32)
    """
    before, after = _pair(k1, k2)
    before, after = _sized(before), _sized(after, before)
    return jnp.sqrt(jnp.sum(jnp.square(after - before)) / _positive("k1", jnp.sum(jnp.square(before))))


def _symmetric(kernel: Any) -> Array:
    matrix = as_matrix(working(kernel))
    check_finite("the kernel", matrix)
    check_symmetric("the kernel", matrix[None], precision(kernel))
    return (matrix + matrix.T) / 2


def _sized(a: Array, like: Array | None = None) -> Array:
    """An array over the largest number in it, or in another: squares of numbers beyond 1e±19 leave float32."""
    largest = jax.lax.stop_gradient(jnp.abs(a if like is None else like).max(initial=0))
    return a / jnp.where(largest > 0, largest, 1)


def _read_sized(kernel: Any, y: Any) -> Inputs:
    """Kernel and labels for what does not depend on the scale of either."""
    inputs = read(kernel, y)
    return inputs._replace(train=_sized(inputs.train), y=_sized(inputs.y))


def _centered(inputs: Inputs) -> Array:
    """``H K H`` over examples, for every pair of outputs."""
    blocks, n = inputs.train, inputs.y.shape[0]
    split = blocks.reshape(blocks.shape[0], n, -1, n, blocks.shape[2] // n)
    split = split - split.mean(axis=1, keepdims=True)
    return (split - split.mean(axis=3, keepdims=True)).reshape(blocks.shape)


def _pair(k1: Any, k2: Any) -> tuple[Array, Array]:
    one, two = working(k1), working(k2)
    if one.shape != two.shape:
        raise ValueError(f"k1 has shape {one.shape} and k2 {two.shape}: they must be kernels of the same inputs and outputs.")
    check_finite("k1", one)
    check_finite("k2", two)
    return one, two


def _positive(name: str, squares: Array, whole: Any = 0.0, eps: float = 0.0) -> Array:
    """A sum of squares, if it is more than the rounding of what it is a part of."""
    if known(squares, whole) and not bool(squares > (10 * eps) ** 2 * jnp.sum(jnp.square(whole))):
        raise ValueError(f"{name} is 0 everywhere, so nothing can be relative to it.")
    return squares
