"""`ntk`: the empirical neural tangent kernel of any model."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import PyTree

from paperjax.binding import nearest
from paperjax.devices import device_budget, devices_of, keep_freed_memory
from paperjax.kernels import programs, spread
from paperjax.kernels.blocks import BlockPlan, divided, plan_blocks, run_blocks
from paperjax.kernels.checks import (
    batch,
    check_apart,
    check_finite,
    check_finite_batch,
    check_kinds,
    check_one,
    check_placed,
    leaf_weights,
    outputs_of,
    trained_paths,
)
from paperjax.kernels.inputs import chosen_outputs, model_of
from paperjax.kernels.network import Spec, abstract, read, result_shape, signature, under_trace
from paperjax.kernels.store import Store, fingerprint, trace_fingerprint
from paperjax.layout import replicate
from paperjax.model import Model


def ntk(
    model: Any,
    params: PyTree,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str | int | tuple[int, ...] = "full",
    diagonal: bool = False,
    per: str | None = None,
    weights: PyTree | None = None,
    leaves: Sequence[str] | None = None,
    route: str | Mapping[str, str] = "auto",
    max_bytes: int | None = None,
    accumulate: str | None = None,
    coupled: bool = False,
    out: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> Any:
    r"""The empirical neural tangent kernel of a model, by the cheapest exact way.

    ``K[n, m, o, p] = sum_l w_l sum_i (d f_o(x1_n) / d theta_li) (d f_p(x2_m) / d theta_li)`` over trained leaves ``l`` and their entries.

    Parameters
    ----------
    model
        A `Model`, or what `paperjax.as_model` takes. Its outputs may be a pytree of arrays; the kernel is then one of the same structure,
        each array with itself.
    params
        Its parameters. Leaves that are given, not trained (`Frozen`, integers), do not count.
    x1, x2
        Batches, ``(N, *features)`` and ``(M, *features)``; without `x2` the kernel of `x1` with itself, at half the work where it is
        computed in blocks.
    outputs
        ``"full"``, all pairs of outputs; ``"trace"``, their sum over equal ones; ``"diagonal"``, each output with itself; or one output by
        number (a tuple where an example's output has several axes).
    diagonal
        Only every example of `x1` with itself.
    per
        ``"leaf"`` or ``"layer"``: the contributions by themselves, which add up to the whole. A layer is the module that a leaf belongs to;
        layers that are one leaf under a scan come apart.
    weights
        One number for each leaf, a pytree like `params`. With ``plan.factors("learning_rate", params)`` it is the kernel that training by
        SGD under a plan follows.
    leaves
        Paths of the leaves that count; all by default.
    route
        ``"auto"``; for all leaves ``"jacobian"`` (gradients of every example, contracted) or ``"ntvp"`` (products of the kernel with
        vectors); or a dict from paths to ``"gram"``, ``"gradients"``, ``"jacobian"``, ``"ntvp"``. `paperjax.kernels.explain` prints what
        is chosen.
    max_bytes
        Memory for the work besides the result, of each device; half of the device's by default. What does not fit is computed in blocks,
        but inside of jit, grad or vmap, where the kernel is part of one program.
    accumulate
        ``"float64"`` contracts in double precision what the network computed in its own. Needs ``jax_enable_x64``.
    coupled
        Allow examples of a batch to depend on each other (batch statistics): the gradients are then those of the whole batches.
    out
        A ``.npy`` file for the kernel, filled block by block and taken up again where a run was stopped, with another `max_bytes` or
        `mesh` too. A note beside it, ``.npy.json``, says which blocks are there.
    mesh
        A `jax.sharding.Mesh` of this process's devices: the columns of each block are divided among them, and kernels are the same up to
        rounding, sums being taken in blocks of another size.
    progress
        Show the plan of the blocks and a bar; by default on a terminal, if there are several blocks.

    Returns
    -------
    Array
        ``(N, M, *out, *out)``; ``(N, M)`` for the trace or one output; ``(N, M, *out)`` for the diagonal in outputs. Without the axis M if
        `diagonal`. A dict of them by name with `per`; a memory-mapped array with `out`; NumPy's with `mesh`, since a device may be too
        small for it. In the dtype of the outputs.

    Raises
    ------
    ValueError
        If a batch is empty or gives NaN, the two batches' features differ, a parameter is NaN or complex, the examples of a batch depend
        on each other, a leaf, an output or a route is not there, `out` holds another kernel, `mesh` has another process's devices, or
        arrays are divided over explicit mesh axes.
    MemoryError
        If `max_bytes` is too little for one pair of examples.

    Notes
    -----
    A leaf that only ever meets the data in products (dense, convolution, lookup), after moves and constant factors, has the gradient
    ``sum_t a_t b_t^T``: its kernel is ``sum_ts (a_t . a_s) (b_t . b_s)``, which needs no gradient. Such leaves are found in the trace.
    Others go by their gradients. Inside of jit, the kernel of arrays that are known there is computed while the function is traced.
    On CPU and without `max_bytes`, glibc's malloc keeps freed memory from the first kernel on, up to 1 GiB
    (`paperjax.devices.keep_freed_memory`). With standard parametrization and hidden layers of width n the kernel is of order n; under
    `ntp` of order 1.

    References
    ----------
    Jacot, Gabriel and Hongler, "Neural Tangent Kernel", arXiv 1806.07572. Novak, Sohl-Dickstein and Schoenholz, "Fast Finite Width Neural
    Tangent Kernel", arXiv 2206.08720, on structured derivatives and products with vectors.

    Examples
    --------
    >>> linear = Model(lambda key, x: jnp.ones((2, 3)), lambda w, x: x @ w)
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> ntk(linear, jnp.ones((2, 3)), x, outputs="trace")
    Array([[ 3.,  3.],
           [ 3., 15.]], dtype=float32)
    >>> ntk(linear, jnp.ones((2, 3)), x).shape
    (2, 2, 3, 3)
    """
    model = model_of(model)
    devices = devices_of(mesh, "ntk", params, x1, x2)
    given = (x1,) if x2 is None or x2 is x1 else (x1, x2)
    x1, x2 = ([batch(name, x, bool(devices)) for name, x in zip(("x1", "x2"), given)] * 2)[:2]
    check_placed(params=params, x1=x1, x2=x2)
    same = x2 is x1
    check_kinds(x1, x2)
    paths = trained_paths(params)
    results, tree = outputs_of(model, *signature((params, x1)))
    if not coupled:
        check_apart(model, params, x1, "pass coupled=True for the kernel of x1 and x2 as they stand")
    if per not in (None, "leaf", "layer"):
        raise ValueError(f"per = {per!r}: 'leaf', 'layer', or None for the whole kernel.")
    if accumulate not in (None, "float64"):
        raise ValueError(f"accumulate = {accumulate!r}: 'float64', or None for the network's own precision.")
    if accumulate and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('accumulate="float64" needs double precision: jax.config.update("jax_enable_x64", True) before anything else.')
    if coupled and (diagonal or route != "auto" or out or devices):
        raise ValueError("coupled=True takes whole batches at once: it goes with none of diagonal=True, route=, out= and mesh=.")
    if diagonal and (not same or out):
        raise ValueError("diagonal=True is the kernel of each example of x1 with itself: leave out x2 and out=.")
    if out and per:
        raise ValueError("out= holds one array: leave out per=, or ask for the leaves one by one with leaves=.")
    if not isinstance(route, (str, Mapping)):
        raise TypeError(f"route = {route!r}: the name of a route for all leaves ('auto', 'jacobian', ...), or a dict from paths to names.")
    if leaves is not None and (isinstance(leaves, str) or not len(leaves)):
        raise ValueError(f"leaves = {leaves!r}: a list of paths, at least one, such as [{paths[0]!r}]; None for all.")
    for path in leaves or ():
        if path not in paths:
            raise ValueError(f"leaves names {path!r}, which is not trained here. {nearest(path, paths)}")
    numbers = None if weights is None else leaf_weights(params, weights)
    found = []
    for which, y in enumerate(results):
        name, one = chosen_outputs(outputs, tuple(y.shape[1:]))
        if not coupled:
            check_one(model, params, x1, which, y)
        spec = Spec(
            name,
            (which, one),
            per,
            route if isinstance(route, str) else tuple(sorted(route.items())),
            None if leaves is None else tuple(leaves),
            accumulate is not None,
            coupled,
        )
        if out and len(results) > 1:
            raise ValueError("out= holds one array, and the model returns several: wrap it to return one of them.")
        kernels = _kernel(model, spec, params, numbers, x1, x2, same, diagonal, max_bytes, out, devices, progress)
        found.append(kernels if per else next(iter(kernels.values())))
    return jax.tree.unflatten(tree, found)


def _kernel(
    model: Model, spec: Spec, params: Any, weights: Any, x1: Any, x2: Any, same: bool, diagonal: bool, max_bytes: int | None,
    out: str | Path | None, devices: Sequence[Any], progress: bool | None,
) -> Mapping[str, Any]:  # fmt: skip
    def check_numbers() -> None:
        check_finite(params)
        check_finite_batch(model, params, "x1", x1)
        if not same:
            check_finite_batch(model, params, "x2", x2)

    try:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, weights, x1, x2))) or under_trace(
            model, params, x1, spec
        )
        # In a program around it, blocks and their own compile options would fail.
        if not traced and isinstance(_nothing(), Tracer):
            with jax.ensure_compile_time_eval():
                return _kernel(model, spec, params, weights, x1, x2, same, diagonal, max_bytes, out, devices, progress)
        if traced and (out or devices):
            what = "out= writes a file" if out else "mesh= spreads blocks over devices"
            name = "out=" if out else "mesh="
            raise ValueError(f"{what}, which a program cannot: call ntk outside of jit, grad and vmap, or leave {name} out.")
        budget = _budget(devices) if max_bytes is None else max_bytes
        if spec.coupled or (traced and not diagonal):
            check_numbers()
            return programs.kernel_program(model, spec, params, weights, x1, x2, same)
        line = spread.line_of(devices, read(model, params, x1, spec.which[0])) if devices else None
        if diagonal:
            check_numbers()
            at_once = x1.shape[0] if traced else _at_once(model, spec, *signature((params, x1)), budget)
            if line is not None:
                params, weights = replicate((params, weights), line)
                found = spread.in_shares(lambda x: spread.diagonal_parts(model, spec, params, x, weights, line), x1, at_once, line)
                return {name: np.asarray(kernel)[: x1.shape[0]] for name, kernel in found.items()}
            return programs.in_groups(lambda x: programs.diagonal_program(model, spec, params, weights, x), x1, at_once)
        plan, result = _plan(model, spec, *signature((params, x1, x2)), same, budget, 1 if line is None else line.devices.size)
        if len(plan.pairs) == 1 and out is None and line is None:
            # Kept memory adds to the peak: not where that is limited.
            if max_bytes is None and jax.default_backend() == "cpu":
                keep_freed_memory()
            kernel = programs.kernel_program(model, spec, params, weights, x1, x2, same)
            # After the call, while the device computes: a tenth of a small kernel's time.
            check_numbers()
            return kernel
        check_numbers()
        if out is None:
            some = abstract(*signature((x1[:1], x2[:1])))
            names = jax.eval_shape(lambda a, b: programs.kernel_program(model, spec, params, weights, a, b, False), *some)
            into = {name: np.zeros(result.shape, result.dtype) for name in names}
            _fill(plan, model, spec, params, weights, x1, x2, line, into, None, progress)
            return into if line is not None else {name: jnp.asarray(array) for name, array in into.items()}
        network = trace_fingerprint(read(model, params, x1, spec.which[0]).jaxpr)
        what = {"network": network, "numbers": fingerprint(params, weights, x1, x2), "options": f"{spec}, {same}"}
        with Store(Path(f"{out}.json"), {"": (Path(out), result)}, what, same) as store:
            _fill(plan, model, spec, params, weights, x1, x2, line, store.arrays, store, progress)
        return store.arrays
    except (NotImplementedError, TypeError, ValueError) as error:
        if "custom_vjp" in str(error):
            raise ValueError(
                f"the route 'ntvp' takes forward derivatives, and a part of the model has only backward ones: {error} Leave the route to "
                "the engine ('auto'), or write that part with jax.custom_jvp."
            ) from error
        if "ifferentiation" in str(error) or "support JVP" in str(error):
            loop = "A loop whose length is known (lax.scan, or fori_loop with constant bounds) can be."
            other = "Write that part's derivative (jax.custom_jvp), or let it have none (lax.stop_gradient of what it takes)."
            raise ValueError(
                f"the model cannot be differentiated in the way that its kernel needs: {error} {loop if '_loop' in str(error) else other}"
            ) from error
        raise


@jax.jit
def _nothing() -> Any:
    """Traced where a program is going to have this in it, and a number elsewhere: in vmap or grad, too."""
    return 0


def _fill(
    plan: BlockPlan, model: Model, spec: Spec, params: Any, weights: Any, x1: Any, x2: Any, line: Mesh | None, into: Mapping[str, Any],
    store: Store | None, progress: bool | None,
) -> None:  # fmt: skip
    half = len(next(iter(into.values())).shape) // 2 - 1

    def mirror(block: Any) -> Any:
        order = (1, 0, *range(2 + half, 2 + 2 * half), *range(2, 2 + half)) if spec.outputs == "full" else (1, 0, *range(2, block.ndim))
        return block.transpose(order)

    if line is None:

        def record(x: Any) -> Any:
            return programs.in_groups(lambda x: programs.record_program(model, spec, params, x, plan.block), x, plan.at_once)

        def pair(rows: Any, columns: Any) -> Any:
            return programs.pair_program(model, spec, params, weights, rows, columns)

        run_blocks(plan, record, lambda rows: rows, pair, x1, x2, into, mirror, store, progress)
        return
    params, weights = replicate((params, weights), line)
    shape = plan.block[0], plan.block[1] // plan.devices

    def record_over(x: Any) -> Any:
        return spread.in_shares(lambda x: spread.record_parts(model, spec, params, x, shape, line), x, plan.at_once, line)

    def pair_over(rows: Any, columns: Any) -> Any:
        return spread.pair_parts(model, spec, params, weights, rows, columns, line)

    run_blocks(plan, record_over, lambda rows: spread.everywhere(rows, shape[0], line), pair_over, x1, x2, into, mirror, store, progress)


def _budget(devices: Sequence[Any]) -> int:
    """Of each device; those of a CPU share its memory."""
    here = devices or jax.devices()
    return device_budget(here) // (len(devices) if devices and devices[0].platform == "cpu" else 1)


@functools.lru_cache(maxsize=64)
def _plan(
    model: Model, spec: Spec, structure: Any, shapes: tuple[Any, ...], same: bool, budget: int, devices: int
) -> tuple[BlockPlan, Any]:
    params, x1, x2 = abstract(structure, shapes)
    network = read(model, params, x1, spec.which[0])
    result = result_shape(network, spec, x1.shape[0], x2.shape[0])
    size = math.prod(result.shape) * result.dtype.itemsize
    most = programs.at_most(network, spec, x1.shape[0], x2.shape[0], same)
    if most <= budget and devices == 1:
        n, m = x1.shape[0], x2.shape[0]
        return BlockPlan(n, m, (n, m), max(n, m), same, most, size), result
    held: dict[Any, programs.Held] = {}

    def bytes_of(n: int, m: int, at_once: int) -> int:
        return programs.bytes_of(network, spec, params, x1, n, m, same and n == m == x1.shape[0], at_once, held)

    at_once = programs.examples_at_once(network, spec, params, x1, budget, False, held)
    if devices > 1:
        return divided(x1.shape[0], x2.shape[0], same, bytes_of, at_once, budget, size, devices), result
    return plan_blocks(x1.shape[0], x2.shape[0], same, bytes_of, at_once, budget, size), result


@functools.lru_cache(maxsize=64)
def _at_once(model: Model, spec: Spec, structure: Any, shapes: tuple[Any, ...], budget: int) -> int:
    params, x = abstract(structure, shapes)
    return programs.examples_at_once(read(model, params, x, spec.which[0]), spec, params, x, budget, alone=True)
