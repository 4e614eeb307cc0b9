"""A strided convolution as one of stride 1 over blocks of pixels, the same numbers with another derivative.

The derivative of a strided convolution by its image is a convolution of what comes back with zeros in between. XLA on CPU multiplies those
zeros, ``s^d`` times the products there are for stride ``s`` in ``d`` axes. Over blocks of ``s^d`` pixels, each a pixel of as many more
channels, the window is that of the blocks it meets, and nothing lies in between; only the window's edge is filled up with zeros.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paperjax.trace.products import Product

# Rows and columns from which on a transposed copy of a matrix is worth its time.
LARGE = 256


class Axis(NamedTuple):
    """One axis of the window: pixels, size of the kernel, stride, padding in front, places of the result."""

    size: int
    window: int
    stride: int
    padding: int
    places: int

    @property
    def apart(self) -> bool:
        """Whether windows of one pixel leave pixels out."""
        return self.window == 1

    @property
    def ahead(self) -> int:
        """Blocks in front of the image."""
        return -(-self.padding // self.stride)

    @property
    def shift(self) -> int:
        """Zeros in front of the window, which make it begin where a block does."""
        return self.ahead * self.stride - self.padding

    @property
    def blocks(self) -> int:
        """Blocks that a window meets."""
        return 1 if self.apart else -(-(self.window + self.shift) // self.stride)

    @property
    def needed(self) -> int:
        """Blocks that all windows together meet, those in front included."""
        return self.places + self.blocks - 1


def in_blocks(eqn: Any, platform: str) -> Callable[[Sequence[Any]], list[Any]] | None:
    """What computes a strided convolution over blocks, or ``None`` where that saves no products.

    Parameters
    ----------
    eqn
        An equation of a trace, of whatever primitive.
    platform
        As JAX names it. Accelerators' convolutions leave zeros out by themselves.

    Returns
    -------
    callable or None
        ``(image, kernel) -> [result]``.

    Examples
    --------
    >>> def strided(x, w):
    ...     return lax.conv(x, w, (2, 2), "SAME")
    >>> import jax
    >>> x, w = jnp.arange(72.0).reshape(1, 2, 6, 6), jnp.arange(54.0).reshape(3, 2, 3, 3)
    >>> eqn = jax.make_jaxpr(strided)(x, w).eqns[0]
    >>> bool(jnp.allclose(in_blocks(eqn, "cpu")((x, w))[0], strided(x, w)))
    True
    """
    if platform != "cpu" or eqn.primitive.name != "conv_general_dilated":
        return None
    p = eqn.params
    if max(p["window_strides"]) == 1 or max(p["rhs_dilation"]) > 1 or max(p["lhs_dilation"]) > 1 or p["batch_group_count"] > 1:
        return None
    image, kernel, result = (tuple(var.aval.shape) for var in (*eqn.invars, *eqn.outvars))
    numbers = p["dimension_numbers"]
    sizes, windows, places = ([shape[a] for a in spec[2:]] for shape, spec in zip((image, kernel, result), numbers))
    axes = [Axis(*of) for of in zip(sizes, windows, p["window_strides"], (low for low, _ in p["padding"]), places)]
    # Products for each pair of channels, over blocks and with zeros in between.
    met = math.prod(a.places if a.apart else a.needed * a.stride * a.blocks for a in axes)
    if min(a.padding for a in axes) < 0 or met >= math.prod(a.size * a.window for a in axes):
        return None
    return lambda operands: [_in_blocks(p, axes, *operands)]


def _in_blocks(p: Any, axes: Sequence[Axis], x: Any, w: Any) -> Any:
    numbers, groups, d = p["dimension_numbers"], p["feature_group_count"], len(axes)
    x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    w = w.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    # Pixels that windows meet, without those of the padding in front, which the convolution adds; single pixels are picked.
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *map(_reach, axes), (0, 0, 0)])
    for number, a in enumerate(axes, 1):
        if a.apart:
            x = lax.slice_in_dim(x, 0, None, a.stride, number)
    w = jnp.pad(w, [(0, 0) if a.apart else (a.shift, a.blocks * a.stride - a.shift - a.window) for a in axes] + [(0, 0)] * 2)
    # (n, blocks and pixels in them by axis, groups, channels) to (n, blocks, groups, pixels, channels).
    inside = [1 if a.apart else a.stride for a in axes]
    blocks = [size // s for size, s in zip(x.shape[1:], inside)]
    x = x.reshape(x.shape[0], *(n for pair in zip(blocks, inside) for n in pair), groups, -1)
    x = x.transpose(0, *range(1, 2 * d, 2), 2 * d + 1, *range(2, 2 * d + 1, 2), 2 * d + 2).reshape(x.shape[0], *blocks, -1)
    w = w.reshape(*(n for a, s in zip(axes, inside) for n in (a.blocks, s)), *w.shape[-2:])
    w = w.transpose(*range(0, 2 * d, 2), *range(1, 2 * d, 2), 2 * d, 2 * d + 1).reshape(*(a.blocks for a in axes), -1, w.shape[-1])
    padding = [(0, 0) if a.apart else (a.ahead, a.needed - a.ahead - n) for a, n in zip(axes, blocks)]
    places = tuple(range(1, d + 1))
    dimensions = lax.ConvDimensionNumbers((0, d + 1, *places), (d + 1, d, *range(d)), (0, d + 1, *places))
    y = lax.conv_general_dilated(
        x,
        w,
        [1] * d,
        padding,
        dimension_numbers=dimensions,
        feature_group_count=groups,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    back = [0] * (d + 2)
    for axis, place in zip((0, d + 1, *places), numbers.out_spec):
        back[place] = axis
    return y.transpose(back)


def _reach(a: Axis) -> tuple[int, int, int]:
    """How the image is padded before it is cut: picked pixels by the padding itself, blocks to whole ones, or cut off where none is met."""
    if a.apart:
        return a.padding, (a.places - 1) * a.stride + 1 - a.padding - a.size, 0
    most = (a.needed - a.ahead) * a.stride
    return 0, min(most, -(-a.size // a.stride) * a.stride) - a.size, 0


def large(shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a matrix whose transpose is worth a copy."""
    return len(shape) == 2 and min(shape) >= LARGE


def by_rows(product: Product, rows: int, platform: str) -> Callable[[Sequence[Any]], list[Any]] | None:
    """What computes a product ``x W`` whose derivative by `x` reads by rows, or ``None`` where that saves nothing.

    Eigen reads a transposed matrix by columns, 640 cotangents against 1024 x 1024 in 17.2 ms of one core; by rows, from a copy, in 14.7 ms.
    The smaller one of the two is copied: ``y W^T`` or ``(W y^T)^T``.

    Parameters
    ----------
    product
        A leaf's product.
    rows
        How many cotangents there are of each place.
    platform
        As JAX names it.
    """
    eqn = product.eqn
    if platform != "cpu" or eqn.primitive.name != "dot_general" or rows < LARGE:
        return None
    shape = tuple(eqn.invars[product.operand].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    contract, batch = eqn.params["dimension_numbers"]
    data = 1 - product.operand
    if not large(shape) or batch != ((), ()) or tuple(contract[product.operand]) != (0,) or data != 0:
        return None
    if tuple(contract[data]) != (len(eqn.invars[data].aval.shape) - 1,):  # pyright: ignore[reportAttributeAccessIssue]
        return None

    dtype = eqn.invars[data].aval.dtype  # pyright: ignore[reportAttributeAccessIssue]

    def bound(x: Any, w: Any) -> Any:
        return eqn.primitive.bind(x, w, **eqn.params)

    compute = jax.custom_vjp(bound)

    # The derivative by the weights is formed where it is asked for alone: a matrix for each cotangent, which kernels never read.
    def forward(x: Any, w: Any) -> tuple[Any, tuple[Any, Any]]:
        return bound(x.value, w.value), (x.value if w.perturbed else None, w.value)

    def backward(kept: tuple[Any, Any], y: Any) -> tuple[Any, Any]:
        x, w = kept
        matmul = functools.partial(jnp.matmul, precision=eqn.params["precision"])
        places = math.prod(y.shape[:-1])
        if rows * places < min(shape):
            by_x = matmul(w, y.reshape(places, -1).T).T.reshape(*y.shape[:-1], -1)
        else:
            by_x = matmul(y, lax.optimization_barrier(w.T))
        return by_x.astype(dtype), None if x is None else jax.linear_transpose(lambda w: bound(x, w), w)(y)[0]

    compute.defvjp(forward, backward, symbolic_zeros=True)
    return lambda operands: [compute(*operands)]
