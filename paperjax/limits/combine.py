"""The law of entries computed of others one by one: scales and shifts, functions of a draw, sums and products of independent ones."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from paperjax.limits.entries import Draw, Function, Haar, Mixed, Number, Random, Triangle, Unread, Value, function_of
from paperjax.limits.rounded import in_float64

_COMPARISONS = {"lt": True, "le": True, "gt": False, "ge": False}


def entrywise(eqn: Any, values: Sequence[Value], new: Callable[[], int]) -> Random | Unread:
    """The law of an elementwise primitive of draws and numbers, all of one shape."""
    name = eqn.primitive.name
    draws = [value for value in values if isinstance(value, Random)]
    others = [value for value in values if not isinstance(value, Random | Number)]
    if others or not draws:
        return Unread(name)
    linear = _linear(eqn, values) if len(draws) == 1 else None
    if linear is not None:
        return linear
    if len(draws) == 2 and len(values) == 2:
        first, second = draws
        if not {source.root for source in first.sources} & {source.root for source in second.sources}:
            return _independent(name, first, second, new)
        if isinstance(first, Draw) and isinstance(second, Draw) and name in ("add", "sub", "add_any"):
            sign = -1 if name == "sub" else 1
            if (first.variable, first.grid) == (second.variable, second.grid):
                scale, shift = first.scale + sign * second.scale, first.shift + sign * second.shift
                return dataclasses.replace(first, scale=scale, shift=shift, repeated=first.repeated or second.repeated)
    if all(isinstance(draw, Draw | Function) for draw in draws):
        return _function(eqn, values)
    return Unread(f"{name} of {' and '.join(map(str, draws))}")


def _linear(eqn: Any, values: Sequence[Value]) -> Random | Unread | None:
    """Of one draw: what keeps its law up to scale and shift, an inverse error function, a comparison; `None` for other functions."""
    name = eqn.primitive.name
    at, draw = next((i, value) for i, value in enumerate(values) if isinstance(value, Random))
    numbers = [value.value for value in values if isinstance(value, Number)]
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if name in ("neg", "mul", "div") and not (name == "div" and (at == 1 or not floating)):
        factor = -1.0 if name == "neg" else numbers[0] if name == "mul" else math.nan if numbers[0] == 0 else 1 / numbers[0]
        return _scaled(draw, factor) if math.isfinite(factor) else Unread(f"{name} by {numbers[0]}")
    if name in ("add", "sub", "add_any"):
        if name == "sub" and at == 1:
            draw = _scaled(draw, -1.0)
        shift = -numbers[0] if name == "sub" and at == 0 else numbers[0]
        return _shifted(draw, shift) if math.isfinite(shift) else Unread(f"{name} of {shift}")
    if name == "convert_element_type" and floating and not isinstance(draw, Function):
        return draw
    if not isinstance(draw, Draw) or draw.scale == 0:
        return None
    if name == "erf_inv":
        return _normal(draw, float(jnp.finfo(eqn.outvars[0].aval.dtype).eps))
    if name in _COMPARISONS:
        below = draw.below(numbers[0])
        true = below if _COMPARISONS[name] == (at == 0) else 1 - below
        grid = ("two", draw.grid, draw.scale, draw.shift, numbers[0])
        return Function(np.array([False, True]), np.array([1 - true, true]), draw.variable, grid, draw.sources, draw.repeated)
    if name in ("max", "min", "clamp"):
        # JAX clips its draws to the support that they have.
        low, high = draw.support
        slack = 4 * float(jnp.finfo(eqn.outvars[0].aval.dtype).eps) * max(abs(low), abs(high)) if math.isfinite(high - low) else 0.0
        lower, upper = (numbers[0], numbers[1]) if name == "clamp" else (numbers[0], math.inf) if name == "max" else (-math.inf, numbers[0])
        if (name != "clamp" or at == 1) and lower <= low + slack and upper >= high - slack:
            return draw
    return None


def _scaled(draw: Random, factor: float) -> Random:
    if isinstance(draw, Draw):
        return dataclasses.replace(draw, scale=draw.scale * factor, shift=draw.shift * factor)
    if isinstance(draw, Function):
        return dataclasses.replace(draw, values=np.asarray(draw.values, np.float64) * factor)
    if isinstance(draw, Haar):
        return dataclasses.replace(draw, gain=draw.gain * abs(factor))
    return dataclasses.replace(draw, mean=draw.mean * factor, variance=draw.variance * factor**2, what=_times(draw.what, factor))


def _times(what: str, factor: float) -> str:
    return what if factor == 1 else f"{factor:.6g} times ({what})"


def _shifted(draw: Random, shift: float) -> Random | Unread:
    if shift == 0:
        return draw
    if isinstance(draw, Draw):
        return dataclasses.replace(draw, shift=draw.shift + shift)
    if isinstance(draw, Function):
        return dataclasses.replace(draw, values=np.asarray(draw.values, np.float64) + shift)
    if isinstance(draw, Haar):
        return Unread(f"an orthogonal matrix plus {shift:.6g}")
    return dataclasses.replace(draw, mean=draw.mean + shift, what=f"{shift:.6g} plus ({draw.what})")


def _normal(draw: Draw, eps: float) -> Draw | Unread:
    """``sqrt(2) erf_inv(U)`` is a standard normal for U uniform on (-1, 1), and one cut at the images of its ends for less than that."""
    low, high = draw.support
    if draw.base != "uniform" or low < -1 - eps or high > 1 + eps:
        return Unread(f"erf_inv of a draw that is {draw}")
    # JAX draws from between the floats next to -1 and 1.
    ends = [math.copysign(math.inf, end) if abs(end) >= 1 - eps else math.sqrt(2) * float(special.erfinv(end)) for end in (low, high)]
    base = "normal" if ends == [-math.inf, math.inf] else "truncated_normal"
    scale = math.copysign(math.sqrt(0.5), draw.scale)
    if scale < 0:
        ends = [-ends[1], -ends[0]]
    return Draw(base, draw.variable, draw.sources, scale, 0.0, *ends, repeated=draw.repeated)


def _function(eqn: Any, values: Sequence[Value]) -> Function | Unread:
    name = eqn.primitive.name
    at = [function_of(value) if isinstance(value, Draw | Function) else value for value in values]
    functions = [value for value in at if isinstance(value, Function)]
    first = functions[0]
    if any((f.variable, f.grid) != (first.variable, first.grid) for f in functions):
        return Unread(f"{name} of draws that depend on each other")
    pole = (
        (name == "div" and isinstance(at[1], Function))
        or name == "rsqrt"
        or (name == "integer_pow" and eqn.params["y"] < 0)
        or (name == "pow" and not (isinstance(at[1], Number) and at[1].value >= 0))
    )
    if pole:
        return Unread(f"{name} of a draw, which may have no variance")
    found = in_float64(
        eqn, [value.values if isinstance(value, Function) else value.value for value in at if isinstance(value, Function | Number)]
    )
    if found is None or not np.all(np.isfinite(found)):
        return Unread(f"{name} of {values[0] if isinstance(values[0], Random) else 'a draw'}")
    found = np.broadcast_to(found, first.weights.shape)
    return dataclasses.replace(first, values=found, repeated=any(f.repeated for f in functions))


def _independent(name: str, first: Random, second: Random, new: Callable[[], int]) -> Random | Unread:
    """Sums of independent normals are normal; of other sums and products the moments are exact, whatever the laws."""
    if name not in ("mul", "add", "sub", "add_any") or isinstance(first, Haar) or isinstance(second, Haar):
        return Unread(f"{name} of {first} and {second}")
    sources, repeated = first.sources | second.sources, first.repeated or second.repeated
    (m, v), (n, w) = first.moments, second.moments
    if name == "mul":
        # E X²Y² - (E X E Y)².
        return Mixed(m * n, v * w + v * n * n + w * m * m, f"the product of two draws: {first}; {second}", sources, repeated)
    mean = m - n if name == "sub" else m + n
    if isinstance(first, Draw) and isinstance(second, Draw) and first.base == second.base == "normal":
        return Draw("normal", new(), sources, math.sqrt(v + w), mean, repeated=repeated)
    return Mixed(mean, v + w, f"the sum of two draws: {first}; {second}", sources, repeated)


def decomposed(eqn: Any, inputs: Sequence[Value]) -> Sequence[Value]:
    """Q and R of a matrix of independent normals: Q is Haar, up to the signs of R's diagonal (Mezzadri, arXiv math-ph/0609050)."""
    value, n = inputs[0], len(eqn.outvars)
    if not (isinstance(value, Draw) and value.base == "normal" and value.shift == 0):
        return [Unread("qr of entries that are not normal of mean 0")] * n
    sources = frozenset(source.moved("qr") for source in value.sources)
    return [Haar(1.0, eqn.outvars[0].aval.shape[-2], sources, value.repeated), *[Triangle()] * (n - 1)]


def with_triangle(name: str, inputs: Sequence[Value]) -> Value:
    """What an operation makes of R: its diagonal, the signs of that, and Q with its columns turned by them."""
    triangles = [value for value in inputs if isinstance(value, Triangle)]
    rest = [value for value in inputs if isinstance(value, Random)]
    if rest:
        turned = name == "mul" and len(inputs) == 2 and isinstance(rest[0], Haar) and triangles[0].signs
        return rest[0] if turned else Unread(f"{name} with the triangle of a QR decomposition")
    if name == "sign" or (name == "div" and len(triangles) == 2):
        return Triangle(True)
    return Triangle(all(triangle.signs for triangle in triangles) and name not in ("add", "sub", "mul", "reduce_sum"))
