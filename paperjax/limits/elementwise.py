"""Primitives that act entry by entry."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from paperjax.limits import contractions as con
from paperjax.limits import fields as fl
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.functions import NotGaussianError, form_of, function, is_polynomial
from paperjax.limits.joined import by_part
from paperjax.limits.nodes import Axes, Det, Node, Wide
from paperjax.limits.positions import by_position

SCALED = ("mul", "div")
LINEAR = ("add", "add_any", "sub", "neg", *SCALED)
FOLLOWED = (*LINEAR, "sqrt", "rsqrt", "abs", "max", "min", "tanh", "logistic", "sin", "cos")
"""The noise in what these make is known (their slopes are at most 1, or given below), so that only the result need settle."""
JUMPS = ("sign", "gt", "ge", "lt", "le", "eq", "ne")


def broadcasting(eqn: Any, **changed: Any) -> Callable[..., Any]:
    """The primitive of an equation for operands of one shape or scalars, real numbers in the precision of the most precise."""
    primitive, params = eqn.primitive, {**eqn.params, **changed}
    entrywise = len({tuple(atom.aval.shape) for atom in eqn.invars}) == 1

    def fn(*operands: Any) -> Any:
        arrays = [jnp.asarray(a) for a in operands]
        real = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
        if real:
            best = max(real, key=lambda dtype: jnp.finfo(dtype).bits)
            arrays = [a.astype(best) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
        whole = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.integer)]
        if len(set(whole)) > 1:
            longest = max(whole, key=lambda dtype: jnp.iinfo(dtype).bits)
            arrays = [a.astype(longest) if jnp.issubdtype(a.dtype, jnp.integer) else a for a in arrays]
        if entrywise and len(arrays) > 1:
            shape = np.broadcast_shapes(*(a.shape for a in arrays))
            arrays = [jnp.broadcast_to(a, shape) for a in arrays]
        return primitive.bind(*arrays, **params)

    return fn


def elementwise(name: str, fn: Callable[..., Any], operands: Sequence[Node], axes: Axes, draws: bool = False) -> Node:
    """A primitive of values whose axes are `axes`, or scalars; linear ones stay linear, and what has no form is drawn if it may be."""
    if all(isinstance(node, Det) for node in operands):
        return _known(name, fn, operands, axes)  # type: ignore[arg-type]
    if any(isinstance(node, nd.Mixed) for node in operands):
        apart = by_part(lambda parts, mine: elementwise(name, fn, parts, mine, draws), operands, axes)
        if apart is not None:
            return apart
    wide = [isinstance(node, Wide) for node in operands]
    if not _of_each(name, operands):
        apart = by_position(lambda parts, mine: elementwise(name, fn, parts, mine, draws), operands, axes)
        if apart is not None:
            return apart
    if name in ("add", "add_any", "sub"):
        u, v = (st.same(st.as_wide(_shaped(node, axes)), axes) for node in operands)
        return added(u, v if name != "sub" else scaled(v, -1.0, axes), axes)
    if name == "neg":
        return scaled(operands[0], -1.0, axes)
    if name == "mul":
        if all(wide):
            made = multiplied(*operands, axes)  # type: ignore[arg-type]
            # Functions of fields that depend on each other: a grid over four of them resolves little.
            several = isinstance(made, nd.Prod) and not fl.independent(*operands) and not all(map(fl.is_gaussian, operands))  # type: ignore[arg-type]
            return drawn(fn, operands, axes) if draws and several and not is_polynomial(made) else made
        u, v = operands if wide[0] else operands[::-1]
        return scaled(u, v, axes)
    if name == "div" and not wide[1]:
        by = operands[1]
        assert isinstance(by, Det)
        return scaled(operands[0], st.det(by.axes, lambda a: 1 / a, by), axes)
    if name == "select_n" and not wide[0] and not (draws and any(map(_infinite, operands[1:]))):
        which = operands[0]
        assert isinstance(which, Det)
        total: Node | None = None
        for i, case in enumerate(operands[1:]):
            here = st.det(which.axes, lambda w, i=i: jnp.asarray(w.astype(int) == i).astype(jnp.zeros(()).dtype), which)
            if isinstance(case, Det) and case.number == 0:
                continue
            term = scaled(st.as_wide(_shaped(case, axes)), here, axes)
            total = term if total is None else added(total, term, axes)  # type: ignore[arg-type]
        assert total is not None
        return total
    if name in ("square", "integer_pow") and _power(fn, name) == 2:
        return multiplied(operands[0], operands[0], axes)  # type: ignore[arg-type]
    if name in ("max", "min") and all(wide) and all(map(fl.is_gaussian, operands)) and live_fields(operands) > 1:  # type: ignore[arg-type]
        # max(u, v) = (u + v + |u - v|) / 2, whose terms have closed forms.
        u, v = (st.same(node, axes) for node in operands)  # type: ignore[arg-type]
        sign = 1.0 if name == "max" else -1.0
        between = function(jnp.abs, [nd.Add(axes, u, scaled(v, -1.0, axes))], axes)
        return scaled(nd.Add(axes, nd.Add(axes, u, v), scaled(between, sign, axes)), 0.5, axes)
    if draws and (live_fields(operands) > 2 or (name in ("max", "min") and all(wide))):
        made = None if live_fields(operands) == math.inf else function(fn, operands, axes)
        return made if made is not None and is_polynomial(made) else drawn(fn, operands, axes)
    return function(fn, operands, axes)


def _of_each(name: str, operands: Sequence[Node]) -> bool:
    """Whether moments of the result are known from those of operands, whatever these are functions of."""
    if name in ("add", "add_any", "sub", "neg") or (name == "div" and isinstance(operands[1], Det)):
        return True
    if name == "mul":
        u, v = operands
        return isinstance(u, Det) or isinstance(v, Det) or (isinstance(u, Wide) and isinstance(v, Wide) and fl.independent(u, v))
    return name == "select_n" and isinstance(operands[0], Det)


def drawn(fn: Callable[..., Any], operands: Sequence[Node], axes: Axes) -> nd.Drawn:
    """A function entry by entry whose moments are drawn."""
    return nd.Drawn(axes, fn, tuple(st.same(node, axes) if isinstance(node, Wide) else node for node in operands))


def live_fields(operands: Sequence[Node]) -> float:
    """Of how many Gaussian fields values are functions; infinitely many if of several positions, or of numbers that the data give."""
    try:
        forms = [form_of(node) for node in operands]
    except NotGaussianError:
        raise
    except NotImplementedError:
        return math.inf
    return math.inf if any(form.dets for form in forms) else len({z for form in forms for z in form.fields if not fl.is_still(z)})


def _infinite(node: Node) -> bool:
    return isinstance(node, Det) and node.const is not None and not bool(np.all(np.isfinite(node.const)))


def _power(fn: Callable[..., Any], name: str) -> int | None:
    return 2 if name == "square" or float(nd.fold(fn, np.array(3.0))) == 9 else None


def _known(name: str, fn: Callable[..., Any], operands: Sequence[Det], axes: Axes) -> Det:
    noise = None
    if any(node.noise is not None for node in operands):
        n = len(operands)
        sizes = [node.noise if node.noise is not None else Det((), const=np.zeros(())) for node in operands]
        noise = st.det((), lambda *both: _carried(name, fn, both[:n], both[n:]), *sizes, *operands)
    shape = nd.rep_shape(axes)
    made = st.det(axes, lambda *a: jnp.broadcast_to(fn(*a), shape), *operands)
    return Det(made.axes, made.fn, made.args, made.const, noise)


def _carried(name: str, fn: Callable[..., Any], noises: Sequence[Any], values: Sequence[Any]) -> Any:
    """The noise of a function of deterministic arrays, to first order, of a product to second, of all others by what it moves them."""
    if name not in (*FOLLOWED, "convert_element_type"):
        return _moved(fn, noises, values)
    least, most = ([f(jnp.abs(v)) for v in values] for f in (jnp.min, jnp.max))
    if name in ("sqrt", "rsqrt"):
        return noises[0] / 2 / least[0] ** (0.5 if name == "sqrt" else 1.5)
    if name == "mul":
        noises = noises[0] * most[1], noises[1] * most[0], noises[0] * noises[1]
    elif name == "div":
        noises = noises[0] / least[1], noises[1] * most[0] / least[1] ** 2
    return jnp.sqrt(sum(jnp.square(s) for s in noises))


def _moved(fn: Callable[..., Any], noises: Sequence[Any], values: Sequence[Any]) -> Any:
    """How far the noise of an operand moves a function: of a square at 0 that is of second order, and may be made large afterwards."""
    at, most = fn(*values), jnp.zeros(())
    if not jnp.issubdtype(at.dtype, jnp.floating):
        return most
    for i, (noise, value) in enumerate(zip(noises, values)):
        for shift in (noise, -noise) if jnp.issubdtype(value.dtype, jnp.floating) else ():
            there = fn(*values[:i], value + shift, *values[i + 1 :])
            # Beyond the end of a domain (a logarithm) it is nothing.
            most = jnp.maximum(most, jnp.max(jnp.nan_to_num(jnp.abs(there - at), nan=0.0)))
    return most


def relative(node: Node, name: str, wide: Wide | None = None) -> Node:
    """What the law of large numbers neglects in a number that meets a wide value: of the number where it multiplies, else of the value."""
    if not isinstance(node, Det) or node.noise is None or name not in LINEAR:
        return node
    of = node if name in SCALED or wide is None else st.rms_of_sum(wide, None, 1)
    # Of a number whose mean is 0 all is noise.
    return dataclasses.replace(node, noise=st.det((), lambda noise, a: noise / jnp.max(jnp.abs(a)), node.noise, of))


def at_jump(name: str, given: Sequence[Node]) -> list[Node]:
    """Where numbers are compared, what is neglected is small against their difference or it may turn the result."""
    noisy = [node for node in given if isinstance(node, Det) and node.noise is not None]
    if name not in JUMPS or not noisy:
        return list(given)
    dets = [node for node in given if isinstance(node, Det)]

    def size(noise: Any, a: Any, *b: Any) -> Any:
        return noise / jnp.min(jnp.abs(a - b[0] if b else a))

    return [
        node if node not in noisy else dataclasses.replace(node, noise=st.det((), size, node.noise, *dets))  # type: ignore[arg-type]
        for node in given
    ]


def _shaped(node: Node, axes: Axes) -> Node:
    return st.same_shape(node, axes) if isinstance(node, Det) and node.axes != axes else node


def added(u: Wide, v: Wide, axes: Axes) -> Wide:
    """A sum; zero is not added."""
    for one, two in ((u, v), (v, u)):
        if isinstance(one, nd.Const) and one.value.number == 0:
            return two
    return nd.Add(axes, u, v)


def scaled(u: Node, by: Any, axes: Axes) -> Wide:
    """A wide value times a deterministic one."""
    assert isinstance(u, Wide)
    if not isinstance(by, Det):
        by = Det((), const=np.asarray(by, np.float64))
    if by.number == 1:
        return u
    if by.axes and by.axes != axes:
        by = st.same_shape(by, axes)
    if isinstance(u, nd.Const):
        return nd.Const(axes, st.det(axes, lambda a, b: jnp.broadcast_to(a * b, nd.rep_shape(axes)), u.value, by))
    return fl.scale(st.same(u, axes), by, axes)


def multiplied(u: Wide, v: Wide, axes: Axes) -> Wide:
    """A product of two wide values: one function of a field, if it is of one field, else a product."""
    if fl.independent(u, v):
        return con.product([u, v], axes)
    for one, two in ((u, v), (v, u)):
        apart = _shifted(one)
        if apart is not None:
            # (relu(h) - m)^2 for a mean m: products of relu(h), and multiples.
            return nd.Add(axes, multiplied(apart[0], two, axes), scaled(two, apart[1].value, axes))
    try:
        forms = form_of(u), form_of(v)
    except NotImplementedError:
        return con.product([u, v], axes)
    if len({z for form in forms for z in form.fields if not fl.is_still(z)}) <= 1 and not any(form.dets for form in forms):
        return function(lambda a, b: a * b, [u, v], axes)
    for one, two in ((u, v), (v, u)):
        parts = _by_dependence(one, two)
        if parts:
            # relu(h) (h + g): a function of h, and a product with g.
            met, free = parts
            return nd.Add(axes, multiplied(one, st.same(met, axes), axes), con.product([one, st.same(free, axes)], axes))
    return con.product([u, v], axes)


def _shifted(u: Wide) -> tuple[Wide, nd.Const] | None:
    """What is not Gaussian and a number that the data give, which are added."""
    if not isinstance(u, nd.Add):
        return None
    for one, two in ((u.u, u.v), (u.v, u.u)):
        if isinstance(two, nd.Const) and two.value.number is None and not fl.is_gaussian(one):
            return one, two
    return None


def _by_dependence(u: Wide, v: Wide) -> tuple[Wide, Wide] | None:
    """A Gaussian v as a sum of what shares random numbers with u and of what shares none, if there is some of both."""
    if not fl.is_gaussian(v):
        return None
    moving, still = fl.moving_and_still(v)
    free = [term for term in (*moving, *still) if fl.independent(term, u)]
    met = [term for term in (*moving, *still) if term not in free]
    return (fl.total(met), fl.total(free)) if free and met else None
