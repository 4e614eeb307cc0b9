"""Elementwise functions at numbers, by numpy: read once into a list of ufuncs, since JAX compiles each operation and its derivatives."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun
from jaxtyping import Array
from scipy import special

Phi = Callable[[Array], Array]
Rule = Callable[..., np.ndarray]


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Float64 and concrete values inside, also under a trace, without touching the caller's flags.

    Examples
    --------
    >>> with double():
    ...     print(jnp.zeros(()).dtype)
    float64
    """
    enable = getattr(jax, "enable_x64", None)  # jax.experimental has it before jax 0.8.
    if enable is None:
        enable = jax.experimental.enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    # Constants in phi are likely of the caller's dtype, float32.
    with enable(True), jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        yield


def name_of(phi: Phi) -> str:
    """What messages call phi.

    Examples
    --------
    >>> import math
    >>> name_of(math.sin)
    'sin'
    """
    return getattr(phi, "__name__", None) or repr(phi)


def slope(f: Phi) -> Phi:
    """``f'``, almost everywhere, by JAX.

    Examples
    --------
    >>> slope(jnp.square)(jnp.ones(()))
    Array(2., dtype=float32)
    """
    return f.slope if isinstance(f, Sampled) else _slope(f)


def _slope(f: Phi) -> Phi:
    return lambda h: jax.jvp(f, (h,), (jnp.ones_like(h),))[1]


def _integer_power(x: np.ndarray, y: int) -> np.ndarray:
    """By squaring, as XLA does."""
    total, square, n = np.ones_like(x), x, abs(y)
    while n:
        total = total * square if n % 2 else total
        square, n = square * square, n // 2
    return total if y >= 0 else 1 / total


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    which = np.asarray(which)
    return np.where(which, cases[1], cases[0]) if which.dtype == bool else np.select([which == i for i in range(len(cases))], cases)


def _same(x: np.ndarray) -> np.ndarray:
    return x


UFUNCS: dict[str, Rule] = {
    "abs": np.abs, "acos": np.arccos, "acosh": np.arccosh, "add": np.add, "add_any": np.add, "and": np.bitwise_and, "asin": np.arcsin,
    "asinh": np.arcsinh, "atan": np.arctan, "atan2": np.arctan2, "atanh": np.arctanh, "cbrt": np.cbrt, "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(low, x), high), "copy": _same, "copy_p": _same, "cos": np.cos, "cosh": np.cosh,
    "digamma": special.psi, "div": np.divide, "eq": np.equal, "erf": special.erf, "erf_inv": special.erfinv, "erfc": special.erfc,
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "floor": np.floor, "ge": np.greater_equal, "gt": np.greater,
    "is_finite": np.isfinite, "le": np.less_equal, "lgamma": special.gammaln, "log": np.log, "log1p": np.log1p, "logistic": special.expit,
    "lt": np.less, "max": np.maximum, "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative, "not": np.invert,
    "or": np.bitwise_or, "pow": np.power, "rem": np.fmod, "rsqrt": lambda x: 1 / np.sqrt(x), "select_n": _select, "sign": np.sign,
    "sin": np.sin, "sinh": np.sinh, "sqrt": np.sqrt, "square": np.square, "stop_gradient": _same, "sub": np.subtract, "tan": np.tan,
    "tanh": np.tanh, "xor": np.bitwise_xor,
}  # fmt: skip
"""Elementwise primitives of real numbers."""

ANALYTIC = {
    "add", "add_any", "broadcast_in_dim", "copy", "copy_p", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "integer_pow", "logistic",
    "mul", "neg", "sin", "sinh", "square", "sub", "tanh",
}  # fmt: skip
"""Those without a kink, a jump or a pole on the real line."""

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_INLINED = {
    "pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat", "remat2",
    "checkpoint",
}  # fmt: skip
_EXACT_IN_INTEGERS = {
    "abs", "add", "add_any", "and", "clamp", "eq", "ge", "gt", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "select_n",
    "sign", "sub", "xor",
}  # fmt: skip


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _type(atom: Any) -> Any:
    return atom.aval.dtype


def rule(eqn: Any) -> Rule | None:
    """The numpy function that is this equation of a jaxpr, or None if there is none here.

    Examples
    --------
    >>> rule(jax.make_jaxpr(jnp.tanh)(1.0).eqns[0])
    <ufunc 'tanh'>
    """
    name, params = eqn.primitive.name, eqn.params
    types = [str(_type(atom)) for atom in (*eqn.invars, *eqn.outvars)]
    if len(eqn.outvars) != 1 or not all(t in ("float64", "float32", "bool") or t.startswith(("int", "uint")) for t in types):
        return None
    if name == "convert_element_type":
        return lambda x: x.astype(params["new_dtype"])
    if name == "broadcast_in_dim" or (name == "reshape" and not _shape(eqn.invars[0])):
        # Numpy broadcasts when need be.
        return _same if _shape(eqn.invars[0]) in ((), _shape(eqn.outvars[0])) else None
    if types[0].startswith(("int", "uint")) and name not in _EXACT_IN_INTEGERS:
        return None
    if name == "integer_pow":
        return functools.partial(_integer_power, y=params["y"])
    if name == "round":
        return np.rint if int(params["rounding_method"]) == 1 else lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x)
    return UFUNCS.get(name)


class Step(NamedTuple):
    """One operation: its operands are values or indices of earlier results; `spent` are not needed after it."""

    rule: Rule
    operands: tuple[np.ndarray | int, ...]
    dtype: np.dtype
    out: int
    spent: tuple[int, ...]


class Tape(NamedTuple):
    """An elementwise function as a list of operations of result 0, its argument."""

    steps: tuple[Step, ...]
    out: np.ndarray | int
    analytic: bool

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Its values in float64."""
        results: dict[int, np.ndarray] = {0: x}
        with np.errstate(all="ignore"):
            for step in self.steps:
                value = step.rule(*(results[a] if isinstance(a, int) else a for a in step.operands))
                results[step.out] = np.asarray(value, step.dtype)
                for index in step.spent:
                    del results[index]
        return np.broadcast_to(results[self.out] if isinstance(self.out, int) else self.out, x.shape).astype(np.float64)


def tape(closed: ClosedJaxpr) -> Tape | None:
    """A jaxpr of one array and one result as a `Tape`; None if it has another primitive, or another array in it.

    Examples
    --------
    >>> tape(jax.make_jaxpr(jnp.tanh)(jnp.zeros(3)))(np.zeros(2)).tolist(), tape(jax.make_jaxpr(jnp.cumsum)(jnp.zeros(3)))
    ([0.0, 0.0], None)
    """
    (x,) = closed.jaxpr.invars
    shapes = (), _shape(x)
    found: list[tuple[Rule, tuple[np.ndarray | int, ...], np.dtype]] = []
    names: set[str] = set()

    def walk(jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[np.ndarray | int]) -> list[np.ndarray | int] | None:
        env: dict[Var, np.ndarray | int] = dict(zip(jaxpr.invars, operands))
        for var, const in zip(jaxpr.constvars, consts):
            values = np.asarray(const)
            # As in ones_like(h).
            if values.size == 0 or np.any(values != values.flat[0]):
                return None
            env[var] = values.reshape(-1)[0]

        def read(atom: Any) -> np.ndarray | int:
            return np.asarray(atom.val, _type(atom)) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            given = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            if name in _INLINED:
                inner = next(eqn.params[key] for key in _CALLS if key in eqn.params)
                pair = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                outs = walk(*pair, given)
                if outs is None:
                    return None
            else:
                made = rule(eqn)
                if made is None or any(_shape(atom) not in shapes for atom in (*eqn.invars, *eqn.outvars)):
                    return None
                dtype = np.dtype(_type(eqn.outvars[0]))
                if any(isinstance(a, int) for a in given):
                    narrowed = name == "convert_element_type" and dtype != np.float64
                    pole = name == "integer_pow" and eqn.params["y"] < 0
                    names.add("narrowed" if narrowed else "pole" if pole else "copy" if name == "convert_element_type" else name)
                    found.append((made, tuple(given), dtype))
                    outs = [len(found)]
                else:
                    with np.errstate(all="ignore"):
                        outs = [np.asarray(made(*given), dtype)]
            env.update(zip(eqn.outvars, outs))
        return [read(atom) for atom in jaxpr.outvars]

    outs = walk(closed.jaxpr, closed.consts, [0])
    if outs is None:
        return None
    # Backwards: what the result does not need is left out, and what is not needed any more is let go.
    needed = {outs[0]} if isinstance(outs[0], int) else set()
    steps: list[Step] = []
    for index in range(len(found), 0, -1):
        if index in needed:
            made, given, dtype = found[index - 1]
            read = {a for a in given if isinstance(a, int)}
            steps.append(Step(made, given, dtype, index, tuple(read - needed)))
            needed |= read
    return Tape(tuple(steps[::-1]), outs[0], names <= ANALYTIC)


_LENGTH = 6
_LOOK = np.array([-3.1, -0.7, 0.1, 0.4, 1.0, 2.0])


class Sampled:
    """A function with what has been found about it: how numpy computes it and its derivatives. Called, it is the function itself."""

    def __init__(self, phi: Phi, before: "Sampled | None" = None) -> None:
        self.phi = phi
        self.__name__ = name_of(phi)
        self._before = before

    def __call__(self, h: Array) -> Array:
        """The function itself, of JAX's arrays."""
        return self.phi(h)

    @functools.cached_property
    def slope(self) -> "Sampled":
        """Its derivative."""
        return Sampled(_slope(self.phi), self)

    def _traced(self, shape: tuple[int, ...]) -> ClosedJaxpr | None:
        """The jaxpr at float64 numbers; None if the result has another shape or is not of floating point."""
        before = self._before and self._before._jaxpr

        def derivative(h: Array) -> Array:
            # Of the jaxpr, so that phi's own code is run once.
            assert before
            return jax.jvp(lambda h: jaxpr_as_fun(before)(h)[0], (h,), (np.ones(shape),))[1]

        with double():
            closed, out = jax.make_jaxpr(derivative if before else self.phi, return_shape=True)(jax.ShapeDtypeStruct(shape, np.float64))
        if any(isinstance(const, Tracer) for const in closed.consts):
            raise TypeError(
                f"{self.__name__} closes over a traced value, so it cannot be looked at. Give that value as a Python number, or use a "
                "closed form whose parameters may be traced: leaky_relu(slope), polynomial(coefficients)."
            )
        return closed if isinstance(out, jax.ShapeDtypeStruct) and out.shape == shape and jnp.issubdtype(out.dtype, jnp.floating) else None

    @functools.cached_property
    def _jaxpr(self) -> ClosedJaxpr | None:
        return self._traced((_LENGTH,))

    @functools.cached_property
    def tape(self) -> Tape | None:
        """Its operations, if numpy has all of them."""
        return self._jaxpr and tape(self._jaxpr)

    @functools.cached_property
    def elementwise(self) -> bool:
        """Whether it acts entry by entry, and gives floating-point numbers."""
        if self._before:
            return self._before.elementwise
        column = self._jaxpr and self._traced((_LENGTH // 2, 1))
        if not column:
            return False
        columns = tape(column)
        if self.tape and columns:
            # Constants may come from the shape.
            row, alone = self.tape(_LOOK), columns(_LOOK[::2])
        else:
            row, alone = self._by_jax(_LOOK), self._by_jax(_LOOK[::2, None])[:, 0]
        return np.allclose(row[::2], alone, rtol=1e-5, atol=1e-30, equal_nan=True)

    def _by_jax(self, points: np.ndarray) -> np.ndarray:
        with double():
            return np.asarray(self.phi(jnp.asarray(points, float)), np.float64)

    def at(self, points: np.ndarray) -> np.ndarray:
        """Its values in float64."""
        if self.tape:
            return self.tape(np.asarray(points, np.float64))
        # Of few lengths, so that its operations compile once.
        flat = np.ravel(points)
        padded = np.concatenate([flat, np.ones((1 << max(flat.size - 1, 1).bit_length()) - flat.size)])
        return self._by_jax(padded)[: flat.size].reshape(np.shape(points))


def sampled(phi: Phi) -> Sampled:
    """Phi as `Sampled`, which it may already be.

    Examples
    --------
    >>> sampled(jnp.tanh).slope.at(np.zeros(2)).tolist()
    [1.0, 1.0]
    """
    return phi if isinstance(phi, Sampled) else Sampled(phi)


def sample(phi: Phi, points: np.ndarray) -> np.ndarray | None:
    """``phi(points)`` in float64, or None if phi does not take them, mixes entries, or gives no floating-point numbers of that shape.

    Computed by numpy if phi is made of the primitives of `rule`, else by JAX.

    Raises
    ------
    TypeError
        If phi closes over a traced value.

    Examples
    --------
    >>> sample(jnp.square, np.array([1.0, 2.0])).tolist(), sample(jnp.sum, np.array([1.0, 2.0]))
    ([1.0, 4.0], None)
    """
    found = sampled(phi)
    return found.at(points) if found.elementwise else None
