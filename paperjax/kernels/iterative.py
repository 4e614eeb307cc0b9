"""Regression with kernels that are too large for a factorization: conjugate gradients, preconditioned, over the devices of a mesh."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from paperjax.devices import check_mesh, device_budget
from paperjax.progress import progress_bar

Product = Callable[[np.ndarray], np.ndarray]
# Of the whole time, products are all: a part of a kernel in a file is read in pieces of so many bytes.
PIECE_BYTES = 2**28


class Iterated(NamedTuple):
    """Of a regularised linear system, by steps.

    Attributes
    ----------
    x
        ``(N, *out)``, float64.
    residual
        ``|y - (K + ridge) x| / |y|`` of each system, computed anew from `x`.
    error
        A bound on ``|x - x*| / |x*|``, with `x*` the solution: ``residual |y| / (ridge |x| - residual |y|)``, infinite where that says
        nothing. (No eigenvalue of ``K + ridge`` is below the ridge.)
    steps
        Products with the kernel in all, preconditioner and checks apart.
    """

    x: Float[np.ndarray, "..."]
    residual: Float[np.ndarray, "..."]
    error: Float[np.ndarray, "..."]
    steps: int


def conjugate_gradients(
    kernel: Any,
    y: Any,
    *,
    ridge: float,
    rank: int = 0,
    key: Array | None = None,
    tolerance: float = 1e-5,
    steps: int = 1000,
    mesh: Mesh | None = None,
    max_bytes: int | None = None,
    progress: bool | None = None,
) -> Iterated:
    """Solve ``(K + ridge) x = y`` by preconditioned conjugate gradients: products with the kernel alone, N² each, and no factorization.

    The number of steps grows with the root of the condition number of ``P^-1 (K + ridge)``. Nyström's preconditioner ``P`` of rank `r`
    takes `r` products at once, and leaves a condition number of about ``(λ_r + ridge) / ridge``, λ_r the kernel's r-th eigenvalue.

    Parameters
    ----------
    kernel
        ``(N, N)``, symmetric and positive semi-definite, such as the file that ``ntk(..., out=)`` writes, opened by
        ``numpy.load(file, mmap_mode="r")``; or a function ``v -> K v`` of arrays like `y`, such as `paperjax.kernels.operator`. Products
        are in its own precision (float16 in float32), everything else in float64.
    y
        ``(N, *out)``. With an array each output is a system of its own; a function takes `y` as a whole.
    ridge
        Added to the diagonal, 0 or more.
    rank
        Of the preconditioner, 0 for none.
    key
        Draws the preconditioner; needed if there is one. The solution depends on it by less than the error.
    tolerance
        Of the relative residual.
    steps
        At most so many.
    mesh
        Of devices among which the kernel's rows are divided; each holds ``N² / devices`` numbers. The mesh may span processes that see one
        file. Without ``jax_enable_x64`` devices hold a float64 kernel in float32.
    max_bytes
        Without a mesh: a NumPy array larger than this stays where it is, and every product reads it once, piece by piece. By default
        half of the memory.
    progress
        Whether to show a bar; on a terminal if `None`.

    Returns
    -------
    Iterated
        With a warning that says how far it came if that is not `tolerance`.

    Raises
    ------
    ValueError
        If shapes do not fit, the kernel is not symmetric or not positive definite with the ridge, or there are NaNs.
    TypeError
        If the kernel is not of floating-point numbers, or `mesh` is no mesh.

    References
    ----------
    Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49, 1952. Frangella, Tropp and Udell, Randomized Nyström preconditioning,
    arXiv 2110.02820, Algorithm 2.1.

    Examples
    --------
    >>> x = np.linspace(0, 1, 50)
    >>> kernel = np.exp(-np.subtract.outer(x, x) ** 2)
    >>> found = conjugate_gradients(kernel, np.sin(x), ridge=1e-2, rank=5, key=jax.random.key(0))
    >>> bool(found.residual < 1e-5), found.steps < 10
    (True, True)
    """
    y = np.asarray(y, np.float64)
    if not ridge >= 0 or not tolerance > 0 or steps < 1 or rank < 0:
        raise ValueError(
            f"ridge = {ridge!r}, tolerance = {tolerance!r}, steps = {steps!r}, rank = {rank!r}: 0 or more, above 0, 1 or more, 0 or more."
        )
    if not y.ndim or not y.size:
        raise ValueError(f"y has shape {y.shape}: give one value for each example, (N,) or (N, *out).")
    if not np.isfinite(y).all():
        raise ValueError(
            f"y holds {y[~np.isfinite(y)][0]} at {tuple(int(i) for i in np.argwhere(~np.isfinite(y))[0])}: labels must be finite."
        )
    if mesh is not None:
        check_mesh(mesh)
    if callable(kernel):
        if mesh is not None:
            raise ValueError("mesh divides the rows of an array. A function places its own work: leave mesh out.")
        rhs, product, dtype = y.reshape(-1, 1), _of_function(kernel, y.shape), np.dtype(jnp.result_type(float))
    else:
        if kernel.shape != (y.shape[0], y.shape[0]):
            raise ValueError(
                f"kernel has shape {kernel.shape}, and y {y.shape[0]} examples: give (N, N), one kernel for all outputs. Of a kernel with "
                "outputs, (N, N, O, O), the matrix is paperjax.kernels.as_matrix(kernel), and y.reshape(-1) goes with it."
            )
        rhs, product, dtype = y.reshape(y.shape[0], -1), _of_array(kernel, mesh, max_bytes), np.dtype(kernel.dtype)
        dtype = dtype if mesh is None else jax.dtypes.canonicalize_dtype(dtype)
    rank = min(rank, rhs.shape[0])
    if rank and key is None:
        raise ValueError("a preconditioner (rank above 0) is drawn: give key=jax.random.key(0), say.")
    _check_symmetric(product, rhs.shape[0], dtype)
    precondition = _nystrom(product, rhs.shape[0], rank, key, ridge, dtype) if rank else lambda r: r
    x, residual, taken = _iterate(lambda v: product(v) + ridge * v, precondition, rhs, tolerance, steps, progress)
    out = y.shape[1:] if not callable(kernel) else ()
    off = residual * np.linalg.norm(rhs, axis=0)
    least = ridge * np.linalg.norm(x, axis=0) - off
    error = np.where(off == 0, 0.0, np.divide(off, least, out=np.full_like(off, np.inf), where=least > 0))
    return Iterated(x.reshape(y.shape), residual.reshape(out), error.reshape(out), taken)


def _iterate(
    product: Product, precondition: Product, rhs: np.ndarray, tolerance: float, steps: int, progress: bool | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Conjugate gradients of all columns side by side, started again from the true residual until that is small."""
    norms = np.linalg.norm(rhs, axis=0)
    scale = np.where(norms == 0, 1.0, norms)
    x, taken, reached = np.zeros_like(rhs), 0, np.inf
    residual = rhs.copy()
    with progress_bar("conjugate gradients", -np.log(tolerance), progress) as bar:
        shown = 0.0
        while True:
            off = np.linalg.norm(residual, axis=0) / scale
            # Rounding in the products sets a bound that starting again does not pass.
            if off.max() <= tolerance or off.max() > reached / 2 or taken >= steps:
                break
            reached, gradient = off.max(), residual.copy()
            z = precondition(gradient)
            p, rz = z, np.sum(gradient * z, 0)
            while taken < steps:
                towards = product(p)
                taken += 1
                curved = np.sum(p * towards, 0)
                busy = np.linalg.norm(gradient, axis=0) > tolerance / 2 * scale
                if not np.isfinite(curved).all() or (curved[busy] <= 0).any():
                    raise ValueError(
                        f"the kernel with its ridge is not positive definite: v^T (K + ridge) v = {curved[busy].min():.3g} after {taken} "
                        "steps. Is it a kernel of one set of examples with itself? Rounding of a float32 kernel asks for a ridge of about "
                        "1e-7 N times its mean diagonal."
                    )
                # Columns that have arrived stay where they are.
                alpha = np.divide(rz, curved, out=np.zeros_like(rz), where=busy)
                x += alpha * p
                gradient = gradient - alpha * towards
                left = (np.linalg.norm(gradient, axis=0) / scale).max()
                bar.advance(max(0.0, -np.log(max(left, tolerance)) - shown))
                shown = max(shown, -np.log(max(left, tolerance)))
                if left <= tolerance / 2:
                    break
                z = precondition(gradient)
                new = np.sum(gradient * z, 0)
                p = z + np.divide(new, rz, out=np.zeros_like(rz), where=busy) * p
                rz = new
            residual = rhs - product(x)
    if off.max() > tolerance:
        why = f"{steps} steps" if taken >= steps else "the precision of the kernel's numbers"
        warnings.warn(
            f"conjugate gradients ended at a relative residual of {off.max():.2g}, not {tolerance:.2g}, for {why}: a larger ridge, a "
            "larger rank of the preconditioner or more steps help, and a kernel in float64 where its precision is the bound.",
            UserWarning,
            stacklevel=3,
        )
    return x, np.where(norms == 0, 0.0, off), taken


def _nystrom(product: Product, n: int, rank: int, key: Any, ridge: float, dtype: np.dtype) -> Product:
    """Nyström's approximation ``U Λ U^T`` and the inverse of what it makes of the kernel (arXiv 2110.02820, Algorithm 2.1)."""
    test, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (n, rank)), np.float64))
    seen = product(test)
    shift = max(float(np.finfo(dtype).eps), np.finfo(np.float64).eps) * np.linalg.norm(seen)
    seen = seen + shift * test
    core = test.T @ seen
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    # A root of the core instead of its Cholesky factor: rounding may leave it without one.
    kept = values > shift / 2
    half = seen @ (vectors[:, kept] / np.sqrt(values[kept]))
    u, sizes, _ = np.linalg.svd(half, full_matrices=False)
    eigenvalues = np.maximum(sizes**2 - shift, 0.0)
    last = eigenvalues[-1] + ridge
    gains = np.divide(last, eigenvalues + ridge, out=np.ones_like(eigenvalues), where=(eigenvalues + ridge > 0) & (last > 0))

    def apply(r: np.ndarray) -> np.ndarray:
        inside = u.T @ r
        return r + u @ ((gains - 1)[:, None] * inside)

    return apply


def _check_symmetric(product: Product, n: int, dtype: np.dtype) -> None:
    pair = np.random.default_rng(0).choice([-1.0, 1.0], (n, 2))
    seen = product(pair)
    if not np.isfinite(seen).all():
        raise ValueError(
            "a product with the kernel is NaN or infinite: the network diverged, or blocks of a file are still to be computed."
        )
    one, other = pair[:, 0] @ seen[:, 1], pair[:, 1] @ seen[:, 0]
    # Rounding of N entries is random; asymmetry of a hundredth of an entry is not.
    room = 100 * float(np.finfo(dtype).eps) * np.sqrt(n) * np.abs(seen).max()
    if abs(one - other) > max(room, 1e-12 * np.abs(seen).max() * n):
        raise ValueError(
            f"the kernel is not symmetric: u^T K v = {one:.6g} and v^T K u = {other:.6g}. Is it of one set of examples with itself?"
        )


def _of_function(kernel: Callable[[Any], Any], shape: tuple[int, ...]) -> Product:
    each = jax.jit(lambda columns: jax.lax.map(lambda v: kernel(v.reshape(shape)).reshape(-1), columns))

    def product(v: np.ndarray) -> np.ndarray:
        return np.asarray(each(jnp.asarray(v.T, jnp.result_type(float))), np.float64).T

    return product


def _of_array(kernel: Any, mesh: Mesh | None, max_bytes: int | None) -> Product:
    n = kernel.shape[0]
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"kernel is {kernel.dtype}: give real floating numbers.")
    dtype = np.dtype(kernel.dtype if kernel.dtype.itemsize > 2 else np.float32)

    def times(rows: Any, v: Any) -> Any:
        return jnp.matmul(rows.astype(v.dtype), v, precision="highest")

    if mesh is not None:
        return _over_mesh(kernel, mesh, dtype, times)
    budget = device_budget(jax.devices()) if max_bytes is None else max_bytes
    held_by_jax = jax.dtypes.canonicalize_dtype(dtype) == dtype
    if isinstance(kernel, np.ndarray) and (kernel.nbytes > budget or not held_by_jax):
        height = max(1, min(n, PIECE_BYTES // (n * kernel.itemsize)))
        # Float64 without jax_enable_x64 is NumPy's work.
        one = jax.jit(times) if held_by_jax else np.matmul

        def by_pieces(v: np.ndarray) -> np.ndarray:
            v = np.asarray(v, dtype)
            return np.concatenate([np.asarray(one(np.asarray(kernel[i : i + height], dtype), v), np.float64) for i in range(0, n, height)])

        return by_pieces
    held, one = jnp.asarray(kernel), jax.jit(times)
    return lambda v: np.asarray(one(held, jnp.asarray(v, dtype)), np.float64)


def _over_mesh(kernel: Any, mesh: Mesh, dtype: Any, times: Callable[[Any, Any], Any]) -> Product:
    """Each device multiplies its rows; the results, N numbers a column, go to all."""
    # Rows of an array of JAX's, which may lie on other devices, go by way of the host.
    kernel = np.asarray(kernel) if isinstance(kernel, jax.Array) else kernel
    n, axes = kernel.shape[0], tuple(mesh.axis_names)
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # Without jax_enable_x64 devices hold no float64.
    height = -(-n // mesh.devices.size)
    by_rows = NamedSharding(mesh, PartitionSpec(axes))

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(height * mesh.devices.size)
        block = np.zeros((stop - start, n), dtype)
        found = np.asarray(kernel[start : min(stop, n)], dtype)
        block[: found.shape[0]] = found
        return block

    held = jax.make_array_from_callback((height * mesh.devices.size, n), by_rows, rows)
    whole = NamedSharding(mesh, PartitionSpec())

    @jax.jit
    def product(held: Any, v: Any) -> Any:
        def part(rows: Any, v: Any) -> Any:
            return jax.lax.all_gather(times(rows, v), axes, tiled=True)

        specs = (PartitionSpec(axes), PartitionSpec())
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(held, v)[:n]

    def everywhere(v: np.ndarray) -> np.ndarray:
        v = np.asarray(v, dtype)
        placed = jax.make_array_from_callback(v.shape, whole, lambda index: v[index])
        return np.asarray(product(held, placed).addressable_data(0), np.float64)

    return everywhere
