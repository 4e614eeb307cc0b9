"""What the trace knows of JAX's primitives; no other module of the package names one, but for `paperjax.reach` below it.

A primitive falls in one of a few classes by what it does to an array that holds a parameter: it moves its entries (`MOVES`),
acts on each entry by itself (everything that keeps the shape), contracts axes, looks entries up, or calls another jaxpr. What is
in no class is opaque, and a parameter that meets it is unresolved.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval as pe

# Entries keep their values and find a new place; axes are followed through.
RESHAPING = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "unstack")
# The same axes, possibly fewer entries along them, or padding between.
KEEPING_AXES = (
    "convert_element_type", "reduce_precision", "slice", "dynamic_slice", "rev", "pad", "copy", "copy_p", "stop_gradient", "name",
    "sharding_constraint", "optimization_barrier", "device_put", "mesh_cast", "reshard", "pvary", "pcast", "layout_constraint",
    "split", "tile",
)  # fmt: skip
# The same entries, once for each of something that there is more of.
SPREADING = ("broadcast_in_dim", "tile")
# Each entry of the result is one entry of the first operand, and none comes twice: the transpose undoes them on what they keep.
MOVES = (
    "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "slice", "split", "unstack", "copy", "copy_p", "name",
    "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint", "mesh_cast", "reshard", "pvary", "pcast",
)  # fmt: skip
# Of those, what leaves each entry where it is.
IN_PLACE = (
    "copy", "copy_p", "name", "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint", "mesh_cast",
    "reshard", "pvary", "pcast",
)  # fmt: skip
ADDITIVE = ("add", "sub", "add_any")
# f(c x) = c f(x) for every c > 0. `max` and `select_n` are looked at one by one.
HOMOGENEOUS = ("abs", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "cummax", "cummin", "sort")
# Linear in their activations.
LINEAR = (
    "neg", "reduce_sum", "cumsum", "reduce_window_sum", "real", "imag", "complex", "conj", "gather", "concatenate", "scatter-add",
    "dynamic_update_slice", "fft", "psum", "stack", "all_gather", "ppermute", "all_to_all",
)  # fmt: skip
# Sums over axes, with a result of each or of all the terms so far.
SUMS = ("reduce_sum", "cumsum")
# The power of their operand that they are.
POWERS = {"rsqrt": -0.5, "sqrt": 0.5}
ROOTS = {power: name for name, power in POWERS.items()}
# Conditions, and places: how large their operands are does not reach on.
CHOICES = ("eq", "ge", "gt", "le", "lt", "ne", "and", "or", "not", "xor", "is_finite", "sign", "argmax", "argmin")
# No entry of theirs is negative, so that a sum of n of them is of order n.
POSITIVE = ("exp", "exp2", "logistic", "abs", "square")
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "cos", "cosh",
    "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le",
    "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "rem", "round", "rsqrt",
    "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
)  # fmt: skip
# Names of the parameters under which a primitive that simply calls a function keeps it.
CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# They keep a function under such a name, and do not simply call it.
NOT_CALLED = ("scan", "while", "cond", "reduce", "reduce_window", "pallas_call", "run_state", "custom_lin")


class Contraction(NamedTuple):
    """How a product treats the axes of one operand: summed over, free, or run over one by one; each names axes of that operand.

    `groups` counts independent channel groups of a convolution.
    """

    contracted: tuple[int, ...]
    free: tuple[int, ...]
    stack: tuple[int, ...]
    window: tuple[int, ...] = ()
    groups: int = 1


def closed(jaxpr: Any) -> jex.ClosedJaxpr:
    """A jaxpr with its constants, of one that may have none."""
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def called(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
    """The function that a calling primitive (jit, remat, custom_jvp, ...) calls with its operands; `None` for any other."""
    if eqn.primitive.name in NOT_CALLED:
        return None
    for name in CALLED:
        inner = eqn.params.get(name)
        if isinstance(inner, (jex.ClosedJaxpr, jex.Jaxpr)) and len(closed(inner).jaxpr.invars) == len(eqn.invars):
            return closed(inner)
    return None


def inner_jaxprs(eqn: jex.JaxprEqn) -> list[jex.ClosedJaxpr]:
    """The functions that an equation calls, in whatever way; not the hand-written derivatives that come with some."""
    inner = called(eqn)
    if inner is not None:
        return [inner]
    found = [eqn.params[name] for name in ("jaxpr", "cond_jaxpr", "body_jaxpr") if name in eqn.params] + list(
        eqn.params.get("branches", ())
    )
    return [closed(jaxpr) for jaxpr in found if isinstance(jaxpr, (jex.ClosedJaxpr, jex.Jaxpr))]


def dot_axes(eqn: jex.JaxprEqn, operand: int) -> Contraction:
    """How ``dot_general`` treats the axes of its operand 0 or 1."""
    contracted, batch = eqn.params["dimension_numbers"]
    rank = len(eqn.invars[operand].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    inside, stack = tuple(contracted[operand]), tuple(batch[operand])
    free = tuple(axis for axis in range(rank) if axis not in inside and axis not in stack)
    return Contraction(inside, free, stack)


def conv_axes(eqn: jex.JaxprEqn) -> Contraction:
    """How a convolution treats the axes of its kernel: ``rhs_spec`` is (out, in, *window)."""
    out, inside, *window = eqn.params["dimension_numbers"].rhs_spec
    groups = max(eqn.params["feature_group_count"], eqn.params["batch_group_count"])
    return Contraction((inside,), (out,), (), tuple(window), groups)


def dot_output(eqn: jex.JaxprEqn, operand: int) -> dict[int, int]:
    """Where each stack or free axis of the operand of a ``dot_general`` lies in its result."""
    batch = eqn.params["dimension_numbers"][1]
    axes = [dot_axes(eqn, 0), dot_axes(eqn, 1)]
    place = {axis: i for i, axis in enumerate(batch[operand])}
    start = len(batch[0]) + (len(axes[0].free) if operand == 1 else 0)
    return place | {axis: start + i for i, axis in enumerate(axes[operand].free)}


def gather_axes(eqn: jex.JaxprEqn) -> Contraction:
    """How ``gather`` treats the axes of its operand: looked up (`contracted`) or taken whole (`free`)."""
    numbers, whole = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    batching, taken = tuple(numbers.operand_batching_dims), eqn.params["slice_sizes"]
    # A slice under vmap has an index for each of its axes, those that it takes whole among them.
    looked_up = tuple(a for a in numbers.start_index_map if taken[a] < whole[a] or a in numbers.collapsed_slice_dims)
    return Contraction(looked_up, tuple(a for a in range(len(whole)) if a not in looked_up and a not in batching), batching)


def slice_axes(eqn: jex.JaxprEqn) -> Contraction:
    """How ``dynamic_slice`` treats the axes of its operand: looked up where it takes a part, taken whole elsewhere."""
    whole, taken = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]  # pyright: ignore[reportAttributeAccessIssue]
    looked_up = tuple(axis for axis, (n, k) in enumerate(zip(whole, taken)) if k < n)
    return Contraction(looked_up, tuple(axis for axis in range(len(whole)) if axis not in looked_up), ())


def gather_output(eqn: jex.JaxprEqn) -> list[tuple[int, ...]]:
    """For each axis of the result of ``gather``, the axes of its operand that it runs over."""
    numbers = eqn.params["dimension_numbers"]
    rank = len(eqn.invars[0].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = iter([axis for axis in range(rank) if axis not in gone])
    # One row is one row, whether or not an axis of size 1 is left of it.
    looked = tuple(axis for axis in gather_axes(eqn).contracted if eqn.params["slice_sizes"][axis] == 1)
    batching = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims))
    found, index_axis = [], 0
    for axis in range(len(eqn.outvars[0].aval.shape)):  # pyright: ignore[reportAttributeAccessIssue]
        if axis in numbers.offset_dims:
            axis_of = next(whole)
            found.append(() if axis_of in looked else (axis_of,))
        else:
            found.append((batching[index_axis],) if index_axis in batching else looked)
            index_axis += 1
    return found


def moved_axes(eqn: jex.JaxprEqn) -> list[tuple[int, ...]]:
    """For each axis of the result of a reshaping primitive, the axes of its operand that it runs over (none if it is new)."""
    name = eqn.primitive.name
    before, after = (tuple(v.aval.shape) for v in (eqn.invars[0], eqn.outvars[0]))  # pyright: ignore[reportAttributeAccessIssue]
    if name == "transpose":
        return [(axis,) for axis in eqn.params["permutation"]]
    if name == "unstack":
        return [(axis,) for axis in range(len(before)) if axis != eqn.params["axis"]]
    if name == "stack":
        new = eqn.params["axis"] % len(after)
        return [() if axis == new else (axis - (axis > new),) for axis in range(len(after))]
    if name == "broadcast_in_dim":
        place = {new: old for old, new in enumerate(eqn.params["broadcast_dimensions"])}
        return [(place[axis],) if axis in place and before[place[axis]] == after[axis] else () for axis in range(len(after))]
    return _regrouped(before, after)


def _regrouped(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, ...]]:
    """Axes of row-major `after` over axes of `before`: equal products of sizes form a group, whose axes all run over each other."""
    found: list[tuple[int, ...]] = [() for _ in after]
    old = [axis for axis in range(len(before)) if before[axis] != 1]
    new = [axis for axis in range(len(after)) if after[axis] != 1]
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(old.pop(0))
                a *= before[left[-1]]
            else:
                right.append(new.pop(0))
                b *= after[right[-1]]
        for axis in right:
            found[axis] = tuple(left)
    return found


def moved_entries(eqn: jex.JaxprEqn, entries: np.ndarray) -> list[np.ndarray]:
    """Where entries of an array go under one of `MOVES`: `entries` are numbers in the places of its operand."""
    if eqn.primitive.name in IN_PLACE:
        return [entries]
    # The most frequent ones by numpy: JAX compiles a program for each.
    if eqn.primitive.name == "broadcast_in_dim":
        shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        sizes = dict(zip(places, entries.shape))
        return [np.broadcast_to(entries.reshape([sizes.get(axis, 1) for axis in range(len(shape))]), shape)]
    if eqn.primitive.name == "reshape":
        order = eqn.params["dimensions"]
        return [(entries if order is None else entries.transpose(order)).reshape(eqn.params["new_sizes"])]
    if eqn.primitive.name == "transpose":
        return [entries.transpose(eqn.params["permutation"])]
    with jax.ensure_compile_time_eval():
        found = eqn.primitive.bind(entries, **eqn.params)
    return [np.asarray(part) for part in (found if eqn.primitive.multiple_results else [found])]


def summed_axes(eqn: jex.JaxprEqn) -> tuple[int, ...]:
    """Axes that one of `SUMS` sums over."""
    return tuple(map(int, eqn.params["axes"])) if eqn.primitive.name == "reduce_sum" else (eqn.params["axis"],)


def mixed_axes(eqn: jex.JaxprEqn) -> list[tuple[int, int]]:
    """Axes along which a primitive lets entries meet or leaves some out, as ``(number of the operand, axis)``."""
    name, p = eqn.primitive.name, eqn.params
    first = tuple(eqn.invars[0].aval.shape) if eqn.invars else ()  # pyright: ignore[reportAttributeAccessIssue]
    after = tuple(eqn.outvars[0].aval.shape) if eqn.outvars else ()  # pyright: ignore[reportAttributeAccessIssue]
    if name == "dot_general":
        return [(i, axis) for i in (0, 1) for axis in p["dimension_numbers"][0][i]]
    if name == "conv_general_dilated":
        return [(0, axis) for axis in p["dimension_numbers"].lhs_spec[1:]]
    if name == "gather":
        return [(0, int(axis)) for axis in p["dimension_numbers"].start_index_map]
    if name.startswith("scatter"):
        return [(0, int(axis)) for axis in p["dimension_numbers"].scatter_dims_to_operand_dims]
    if name in ("slice", "dynamic_slice", "pad"):
        return [(0, axis) for axis, (n, m) in enumerate(zip(first, after)) if n != m]
    if name == "dynamic_update_slice":
        return [(0, axis) for axis, (n, m) in enumerate(zip(first, eqn.invars[1].aval.shape)) if n != m]  # pyright: ignore[reportAttributeAccessIssue]
    if name in ("rev", "concatenate", "sort"):
        named = p["dimensions"] if name == "rev" else (p["dimension"],)
        return [(i, int(axis)) for i in range(len(eqn.invars)) for axis in named]
    if "window_dimensions" in p:
        return [(0, axis) for axis, n in enumerate(p["window_dimensions"]) if n > 1]
    if name == "fft":
        return [(0, axis) for axis in range(len(first) - len(p["fft_lengths"]), len(first))]
    if name.startswith(("reduce_", "argm")) and "axes" in p:
        return [(0, int(axis)) for axis in p["axes"]]
    if name.startswith("cum") or name == "top_k":
        return [(0, p["axis"])]
    if name == "approx_top_k":
        return [(0, p["reduction_dimension"])]
    return []


def fold_scalar(eqn: jex.JaxprEqn, values: Sequence[Any]) -> Any:
    """The number that all entries of a result equal, given those that all entries of each operand equal; `None` where one is not known."""
    name = eqn.primitive.name
    if not values or any(value is None for value in values) or len(eqn.outvars) != 1:
        return None
    if name in RESHAPING or name in ("slice", "copy", "stop_gradient", "rev", "tile"):
        return values[0]
    if name not in (*ELEMENTWISE, "convert_element_type"):
        return None
    # A user's strict rules of promotion are about the user's code.
    with jax.ensure_compile_time_eval():
        numbers = [np.asarray(value, atom.aval.dtype) for value, atom in zip(values, eqn.invars)]  # pyright: ignore[reportAttributeAccessIssue]
        return np.asarray(eqn.primitive.bind(*numbers, **eqn.params))


def trace(fn: Callable[..., Any], *args: Any) -> jex.ClosedJaxpr:
    """The jaxpr of a function of abstract or concrete arrays; nothing is computed."""
    return jax.make_jaxpr(fn)(*args)


def used(traced: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The same without what no result depends on, such as a mean that is only looked at; it takes as many arguments."""
    jaxpr = traced.jaxpr
    needed, kept = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    jaxpr = jaxpr.replace(eqns=kept[::-1])
    least, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    # JAX makes functions with a derivative of their own anew, so that equal ones are not seen to be: only where there is a reason.
    return jex.ClosedJaxpr(least if _equations(least) < _equations(jaxpr) else jaxpr, traced.consts)


def _equations(jaxpr: jex.Jaxpr) -> int:
    return sum(1 + sum(_equations(inner.jaxpr) for inner in inner_jaxprs(eqn)) for eqn in jaxpr.eqns)
