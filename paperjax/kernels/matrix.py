"""Kernels of networks with several outputs as matrices, and what a kernel must be before anything is computed with it."""

from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Num

Numbers = Num[Array, "..."] | Num[np.ndarray, "..."]


class Form(NamedTuple):
    """How a kernel treats the outputs.

    Attributes
    ----------
    kind
        ``"full"``, ``"diagonal"`` or ``"shared"``.
    outputs
        Shape of the network's output without the batch.
    """

    kind: str
    outputs: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the kernel after the two batches."""
        return {"full": self.outputs * 2, "diagonal": self.outputs, "shared": ()}[self.kind]


def as_matrix(kernel: Numbers) -> Num[Array, "rows columns"]:
    """A kernel between outputs as a matrix, ``K[(n, o), (m, p)] = kernel[n, m, o, p]``.

    Rows run over examples and, fastest, over outputs, so ``as_matrix(kernel) @ y.reshape(-1)`` is the kernel applied to labels
    `y` of shape ``(M, *out)``.

    Parameters
    ----------
    kernel
        ``(N, M)``, returned as it is, or ``(N, M, *out, *out)``.

    Returns
    -------
    Array
        ``(N O, M O)`` with O the product of `out`, of the dtype of `kernel`.

    Raises
    ------
    ValueError
        If the axes after the first two are not two equal halves: a kernel of ``outputs="diagonal"`` is one matrix per output.

    Examples
    --------
    >>> kernel = jnp.einsum("nm,op->nmop", jnp.ones((2, 3)), jnp.eye(2))
    >>> as_matrix(kernel).shape
    (4, 6)
    >>> as_matrix(kernel)[0].tolist()
    [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    """
    kernel = jnp.asarray(kernel)
    rest = kernel.shape[2:]
    half = len(rest) // 2
    if kernel.ndim < 2 or rest[:half] != rest[half:]:
        raise ValueError(
            f"a kernel of shape {kernel.shape} is no matrix: the axes must be (N, M) or (N, M, *out, *out). "
            "A kernel of outputs='diagonal' is one matrix for each output: take kernel[:, :, o], or outputs='full'."
        )
    n, m = kernel.shape[:2]
    order = (0, *range(2, 2 + half), 1, *range(2 + half, 2 + 2 * half))
    return kernel.transpose(order).reshape(n * prod(rest[:half]), m * prod(rest[:half]))


def form_of(kernel: Array, outputs: tuple[int, ...], name: str = "k_train") -> Form:
    """The form of a kernel that acts on functions with values of shape `outputs`.

    Parameters
    ----------
    kernel
        ``(N, M)`` (shared), ``(N, M, *out)`` (diagonal) or ``(N, M, *out, *out)`` (full).
    outputs
        ``out``.
    name
        How the message calls the kernel.

    Raises
    ------
    ValueError
        If it is none of the three.

    Examples
    --------
    >>> form_of(jnp.ones((3, 3, 2, 2)), (2,)).kind, form_of(jnp.ones((3, 3, 2, 2)), (2, 2)).kind
    ('full', 'diagonal')
    """
    kinds = {outputs * 2: "full", outputs: "diagonal", (): "shared"}
    if kernel.ndim < 2 or kernel.shape[2:] not in kinds:
        raise ValueError(
            f"{name} has shape {kernel.shape}, and y has outputs of shape {outputs}: the kernel must be (N, M), shared over outputs, "
            f"or (N, M, *{outputs}) for outputs='diagonal', or (N, M, *{outputs * 2}) for outputs='full'. "
            "Give y as (N, *out), with the output axes of the network (y[:, None] for one output)."
        )
    return Form(kinds[kernel.shape[2:]], outputs)


def fold_kernel(kernel: Array, form: Form) -> Float[Array, "blocks n m"]:
    """A kernel as a stack of matrices which act apart: one for each output if diagonal, else one.

    Examples
    --------
    >>> fold_kernel(jnp.ones((3, 3, 2)), Form("diagonal", (2,))).shape
    (2, 3, 3)
    """
    if form.kind == "diagonal":
        return jnp.moveaxis(kernel.reshape(*kernel.shape[:2], prod(form.outputs)), 2, 0)
    return as_matrix(kernel)[None]


def unfold_kernel(blocks: Array, form: Form) -> Array:
    """Undo `fold_kernel`.

    Examples
    --------
    >>> unfold_kernel(jnp.ones((2, 3, 3)), Form("diagonal", (2,))).shape
    (3, 3, 2)
    """
    if form.kind == "shared":
        return blocks[0]
    if form.kind == "diagonal":
        return jnp.moveaxis(blocks, 0, 2).reshape(*blocks.shape[1:], *form.outputs)
    size, half = prod(form.outputs), len(form.outputs)
    n, m = (side // size for side in blocks.shape[1:])
    order = (0, 1 + half, *range(1, 1 + half), *range(2 + half, 2 + 2 * half))
    return blocks[0].reshape(n, *form.outputs, m, *form.outputs).transpose(order)


def fold(values: Array, form: Form) -> Float[Array, "*times blocks n columns"]:
    """Values ``(*times, N, *out)`` as the columns that the blocks of `fold_kernel` act on.

    Examples
    --------
    >>> [fold(jnp.ones((5, 2)), Form(kind, (2,))).shape for kind in ("shared", "full", "diagonal")]
    [(1, 5, 2), (1, 10, 1), (2, 5, 1)]
    """
    split = values.ndim - len(form.outputs)
    flat = values.reshape(*values.shape[:split], prod(form.outputs))
    if form.kind == "shared":
        return flat[..., None, :, :]
    if form.kind == "full":
        return flat.reshape(*flat.shape[:-2], 1, -1, 1)
    return jnp.swapaxes(flat, -1, -2)[..., None]


def unfold(columns: Array, form: Form) -> Array:
    """Undo `fold`.

    Examples
    --------
    >>> unfold(jnp.ones((7, 2, 5, 1)), Form("diagonal", (2,))).shape
    (7, 5, 2)
    """
    if form.kind == "diagonal":
        flat = jnp.swapaxes(columns[..., 0], -1, -2)
        return flat.reshape(*flat.shape[:-1], *form.outputs)
    times = columns.shape[:-3]
    return columns.reshape(*times, -1, *form.outputs)


def working(x: Any) -> Float[Array, "..."]:
    """`x` in float64 if ``jax_enable_x64`` is on, else in float32.

    Examples
    --------
    >>> working(np.ones(2)).dtype
    dtype('float32')
    """
    if jnp.iscomplexobj(x):
        raise TypeError("complex numbers: kernels and outputs must be real.")
    return jnp.asarray(x).astype(jnp.result_type(float))


def precision(x: Any) -> float:
    """Rounding unit of what `x` was computed in and of what is computed from it, whichever is coarser.

    Examples
    --------
    >>> precision(np.ones(2)) == precision(np.ones(2, np.float32)) == float(np.finfo(np.float32).eps)
    True
    """
    own = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    return max(float(jnp.finfo(own).eps), float(jnp.finfo(jnp.result_type(float)).eps))


def known(*arrays: Any) -> bool:
    """Whether all these have values, rather than being traced by `jax.jit` and the like.

    Examples
    --------
    >>> known(jnp.ones(2), None)
    True
    """
    return not any(isinstance(array, Tracer) for array in arrays)


def check_finite(name: str, x: Array) -> None:
    """Refuse NaN and infinities, saying where.

    Raises
    ------
    ValueError
        If there is one. Traced values pass.

    Examples
    --------
    >>> check_finite("y", jnp.ones(3))
    """
    if known(x) and not np.isfinite(np.asarray(x)).all():
        bad = np.argwhere(~np.isfinite(np.asarray(x)))
        raise ValueError(
            f"{name} holds {np.asarray(x)[tuple(bad[0])]} at {tuple(int(i) for i in bad[0])}, and {len(bad)} of its {x.size} numbers are "
            "not finite. A network that diverged, or float16, gives such; look at its parameters and inputs first."
        )


def check_symmetric(name: str, blocks: Float[Array, "blocks n n2"], eps: float) -> None:
    """Refuse a kernel that is not that of one set of inputs with itself.

    Parameters
    ----------
    name
        How the message calls it.
    blocks
        From `fold_kernel`.
    eps
        Rounding unit; asymmetry below its root, relative to the largest entry, passes as rounding.

    Raises
    ------
    ValueError
        If it is not square or not symmetric. Traced values pass.

    Examples
    --------
    >>> check_symmetric("k_train", jnp.eye(3)[None], 1e-7)
    """
    if blocks.shape[1] != blocks.shape[2] or not blocks.shape[1]:
        raise ValueError(
            f"{name} is {blocks.shape[1]} by {blocks.shape[2]} as a matrix. It must be that of the training inputs with themselves, square "
            "and not empty; the kernel (test, train) goes into k_test."
        )
    if known(blocks):
        matrix = np.asarray(blocks)
        gap, size = np.abs(matrix - matrix.mT), np.abs(matrix).max()
        if gap.max() > eps**0.5 * size:
            _, i, j = (int(k) for k in np.unravel_index(gap.argmax(), gap.shape))
            raise ValueError(
                f"{name} is not symmetric: as matrix it differs from its transpose by {float(gap.max()):.3g} at {(i, j)}, and the largest "
                f"entry is {float(size):.3g}. It must be the kernel of one set of inputs with itself, in the order (N, N, *out, *out)."
            )
