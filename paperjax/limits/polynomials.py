"""Expectations of products of polynomials of jointly Gaussian fields, exact in any number of fields.

With u the fields of one example and v those of another, ``C_ij = E u_i v_j``, and tables m of whole numbers with row sums r and column
sums c, ``E g(u) h(v) = sum_m E[d^r g(u)] E[d^c h(v)] prod_ij C_ij^m_ij / m_ij!``. It is Price's theorem (1958),
``d/dC_ij E g h = E d_i g d_j h``, taken as often as a polynomial can be differentiated, and Isserlis' sum over pairings (1918), of which
those with equal m are one term. What is of one example alone follows by Stein's lemma, ``E z_i z^a = sum_j K_ij a_j z^(a - e_j)``.
Nothing is divided by, so covariances may be singular; derivatives in them are those of a polynomial.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array

from paperjax.limits.sampled import double, rule

Powers = tuple[int, ...]
"""Of each field."""
Covariances = Sequence[Sequence[Array | float | None]]
"""``None`` where it is 0 whatever the data."""

MOST_DEGREE = 24
MOST_MONOMIALS = 500
MOST_TERMS = 2000

_SIZE = 3
_INLINED = ("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
_SAME = ("copy", "copy_p", "broadcast_in_dim", "reshape", "convert_element_type")
_REAL = ("float64", "float32")


class Polynomial(NamedTuple):
    """Coefficients of monomials, and the total degree; `terms` is ``None`` where there are more than are followed.

    Examples
    --------
    >>> polynomial(lambda u, v: 2 * u * (u - v) ** 2, 2).terms
    {(3, 0): 2.0, (2, 1): -4.0, (1, 2): 2.0}
    """

    terms: Mapping[Powers, float] | None
    degree: int


class TooManyTermsError(Exception):
    """A sum over pairings that is longer than `MOST_TERMS`."""


# Which polynomial a function is.


def polynomial(fn: Callable[..., Any], fields: int) -> Polynomial | None:
    """The polynomial that an elementwise function of several fields is, read from its trace; ``None`` if it is not known to be one.

    Sums, differences, products, whole powers and quotients by numbers are followed. Anything else that a field goes into is no
    polynomial, whatever its values are: a `jnp.where`, a function whose derivative was written by hand, a rounding to half precision.

    Parameters
    ----------
    fn
        Of so many arrays of one shape.
    fields
        How many.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> polynomial(lambda u, v: jnp.tanh(u) * v, 2) is None
    True
    """
    with double():
        closed = jax.make_jaxpr(fn)(*[jax.ShapeDtypeStruct((_SIZE,), np.float64)] * fields)
    if len(closed.jaxpr.outvars) != 1:
        return None
    single = [Polynomial({tuple(int(i == j) for j in range(fields)): 1.0}, 1) for i in range(fields)]
    found = _walk(closed.jaxpr, closed.consts, single, fields)
    return None if found is None else _whole(found[0], fields)


Value = Polynomial | np.ndarray


def _whole(value: Value, fields: int) -> Polynomial | None:
    """A number as a polynomial."""
    if isinstance(value, Polynomial):
        return value
    if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value):
        return None
    return Polynomial({(0,) * fields: float(value)} if value else {}, 0)


def _walk(jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Value], fields: int) -> list[Value] | None:
    """Polynomials, and numbers, that a function makes of some; ``None`` if anything on the way is neither."""
    env: dict[Any, Value | None] = dict(zip(jaxpr.invars, operands))
    env |= {var: None if isinstance(const, Tracer) else _number(np.asarray(const)) for var, const in zip(jaxpr.constvars, consts)}

    def read(atoms: Sequence[Any]) -> list[Value] | None:
        found = [_number(np.asarray(atom.val)) if isinstance(atom, Literal) else env[atom] for atom in atoms]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None

    for eqn in jaxpr.eqns:
        given = read(eqn.invars)
        atoms: list[Any] = [*eqn.invars, *eqn.outvars]
        if given is None or any(tuple(atom.aval.shape) not in ((), (_SIZE,)) for atom in atoms):
            return None
        if eqn.primitive.name in _INLINED:
            inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
            pair = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            outs = _walk(*pair, given, fields)
        else:
            made = _made(eqn, given, fields)
            outs = None if made is None else [made]
        if outs is None:
            return None
        env.update(zip(eqn.outvars, outs))
    return read(jaxpr.outvars)


def _number(array: np.ndarray) -> np.ndarray | None:
    return None if array.size == 0 or np.any(array != array.flat[0]) else np.asarray(array.flat[0])


def _made(eqn: Any, given: Sequence[Value], fields: int) -> Value | None:
    """What an equation makes of polynomials and numbers."""
    name = eqn.primitive.name
    if not any(isinstance(value, Polynomial) for value in given):
        known = rule(eqn)
        with np.errstate(all="ignore"):
            return None if known is None else np.asarray(known(*given), eqn.outvars[0].aval.dtype)
    if any(str(atom.aval.dtype) not in _REAL for atom in (*eqn.invars, *eqn.outvars)):
        return None
    whole = [_whole(value, fields) for value in given]
    first, last = whole[0], whole[-1]
    if first is None or last is None:
        return None
    if name in _SAME:
        return first
    if name in ("add", "add_any", "sub"):
        return _sum(first, last, -1.0 if name == "sub" else 1.0)
    if name == "neg":
        return _sum(Polynomial({}, 0), first, -1.0)
    if name == "mul":
        return _product(first, last)
    if name == "div" and not isinstance(given[1], Polynomial) and given[1]:
        return _product(first, Polynomial({(0,) * fields: 1 / float(given[1])}, 0))
    power = eqn.params["y"] if name == "integer_pow" else 2 if name == "square" else None
    if name == "pow" and not isinstance(given[1], Polynomial):
        power = float(given[1])
    if power is None or power < 0 or power != int(power):
        return None
    # One factor too many is as good as all.
    factors = [first] * min(int(power), MOST_DEGREE + 1)
    return functools.reduce(_product, factors, Polynomial({(0,) * fields: 1.0}, 0))


def _kept(terms: dict[Powers, float], degree: int) -> Polynomial:
    return Polynomial(None if len(terms) > MOST_MONOMIALS else {powers: c for powers, c in terms.items() if c}, degree)


def _sum(one: Polynomial, two: Polynomial, sign: float) -> Polynomial:
    degree = max(one.degree, two.degree)
    if one.terms is None or two.terms is None:
        return Polynomial(None, degree)
    terms = dict(one.terms)
    for powers, c in two.terms.items():
        terms[powers] = terms.get(powers, 0.0) + sign * c
    return _kept(terms, degree)


def _product(one: Polynomial, two: Polynomial) -> Polynomial:
    degree = one.degree + two.degree
    if one.terms is None or two.terms is None or degree > MOST_DEGREE:
        return Polynomial(None, degree)
    terms: dict[Powers, float] = {}
    for a, x in one.terms.items():
        for b, y in two.terms.items():
            powers = tuple(i + j for i, j in zip(a, b))
            terms[powers] = terms.get(powers, 0.0) + x * y
    return _kept(terms, degree)


# What it is expected to be.


def expected(g: Polynomial, h: Polynomial, left: Covariances, across: Covariances, right: Covariances) -> Array | float | None:
    """``E g(u) h(v)``; ``None`` where it is 0 whatever the data. Arrays broadcast; what is of one side alone is computed in its own shape.

    Parameters
    ----------
    g, h
        Polynomials of u, and of v.
    left, across, right
        Covariances of u with u, of u with v, of v with v.

    Raises
    ------
    TooManyTermsError
        If the sum has more than `MOST_TERMS` terms, or a polynomial more than `MOST_MONOMIALS`, or a degree above `MOST_DEGREE`.

    Examples
    --------
    ``E (u1 u2)(v1 v2) = C_11 C_22 + C_12 C_21 + K_12 K_12'``:

    >>> g = polynomial(lambda a, b: a * b, 2)
    >>> expected(g, g, [[1.0, 0.5], [0.5, 1.0]], [[2.0, 3.0], [5.0, 7.0]], [[1.0, 0.25], [0.25, 1.0]])
    29.125
    """
    if g.terms is None or h.terms is None:
        raise TooManyTermsError
    if not g.terms or not h.terms:
        return None
    pattern = [[[None if k is None else 1.0 for k in row] for row in block] for block in (left, across, right)]
    # Counted in numbers first, of which there is no trace.
    _total(_Alone(g.terms, pattern[0], MOST_TERMS), pattern[1], _Alone(h.terms, pattern[2], MOST_TERMS))
    return _total(_Alone(g.terms, left), across, _Alone(h.terms, right))


def mean(g: Polynomial, cov: Covariances) -> Array | float | None:
    """``E g(u)``; see `expected`.

    Raises
    ------
    TooManyTermsError
        As there.

    Examples
    --------
    >>> mean(polynomial(lambda a: a**4, 1), [[2.0]])
    12.0
    """
    return expected(g, Polynomial({(): 1.0}, 0), cov, [[] for _ in cov], [])


class _Alone:
    """``E d^r g`` over the fields of one example."""

    def __init__(self, terms: Mapping[Powers, float], cov: Covariances, most: int | None = None) -> None:
        self.terms, self.cov, self.most = terms, cov, most
        self.moments: dict[Powers, Any] = {}
        self.means: dict[Powers, Any] = {}

    def reaches(self, r: Powers) -> bool:
        """Whether a derivative is not 0 throughout."""
        return any(all(i <= j for i, j in zip(r, powers)) for powers in self.terms)

    def derivative(self, r: Powers) -> Any:
        """``E d^r g``."""
        if r not in self.means:
            total = None
            for powers, c in self.terms.items():
                if all(i <= j for i, j in zip(r, powers)):
                    fallen = c
                    for i, j in zip(r, powers):
                        fallen *= float(np.prod(range(j - i + 1, j + 1)))
                    total = _plus(total, self.moment(tuple(j - i for i, j in zip(r, powers))), fallen)
            self.means[r] = total
        return self.means[r]

    def moment(self, powers: Powers) -> Any:
        """``E u^powers``."""
        if not any(powers):
            return 1.0
        if sum(powers) % 2:
            return None
        if powers not in self.moments:
            if self.most is not None and len(self.moments) > self.most:
                raise TooManyTermsError
            i = next(i for i, p in enumerate(powers) if p)
            rest = _less(powers, i)
            total = None
            for j, k in enumerate(self.cov[i]):
                below = self.moment(_less(rest, j)) if rest[j] and k is not None else None
                total = total if below is None else _plus(total, k * below, rest[j])
            self.moments[powers] = total
        return self.moments[powers]


def _less(powers: Powers, i: int) -> Powers:
    return (*powers[:i], powers[i] - 1, *powers[i + 1 :])


def _more(powers: Powers, i: int) -> Powers:
    return (*powers[:i], powers[i] + 1, *powers[i + 1 :])


def _plus(total: Any, term: Any, times: float) -> Any:
    """``total + times · term``, of which either may be nothing."""
    if term is None:
        return total
    term = term if times == 1 else times * term
    return term if total is None else total + term


def _tables(g: _Alone, h: _Alone, across: Covariances) -> Iterator[tuple[Powers, Powers, Any, float]]:
    """``r, c, prod C^m`` and ``prod 1 / m!`` of each table m."""
    edges = [(i, j, k) for i, row in enumerate(across) for j, k in enumerate(row) if k is not None]

    def visit(first: int, times: int, r: Powers, c: Powers, product: Any, weight: float) -> Iterator[tuple[Powers, Powers, Any, float]]:
        yield r, c, product, weight
        for e in range(first, len(edges)):
            i, j, k = edges[e]
            again = times + 1 if e == first else 1
            more, other = _more(r, i), _more(c, j)
            if g.reaches(more) and h.reaches(other):
                yield from visit(e, again, more, other, k if product is None else product * k, weight / again)

    fields = [len(next(iter(side.terms), ())) for side in (g, h)]
    return visit(0, 0, (0,) * fields[0], (0,) * fields[1], None, 1.0)


def _total(g: _Alone, across: Covariances, h: _Alone) -> Any:
    sums: dict[Powers, dict[Powers, Any]] = {}
    for count, (r, c, product, weight) in enumerate(_tables(g, h, across)):
        if g.most is not None and count > g.most:
            raise TooManyTermsError
        if g.derivative(r) is not None and h.derivative(c) is not None:
            by_c = sums.setdefault(r, {})
            by_c[c] = _plus(by_c.get(c), 1.0 if product is None else product, weight)
    total = None
    for r, by_c in sums.items():
        inner = None
        for c, table in by_c.items():
            inner = _plus(inner, h.derivative(c) * table, 1.0)
        total = _plus(total, g.derivative(r) * inner, 1.0)
    return total


def kept(cache: dict[Any, Any], fn: Callable[..., Any], fields: int) -> Polynomial | None:
    """The polynomial that a function is, if it is one."""
    if ("polynomial", fn) not in cache:
        cache["polynomial", fn] = polynomial(fn, fields)
    return cache["polynomial", fn]


def of_polynomials(two: Sequence[Polynomial | None], *covariances: Covariances) -> tuple[bool, Array | float | None, str]:
    """The expectation of a product of polynomials, if it is known; if it has too many terms, what there is to say of that."""
    g, h = two
    if g is None or h is None:
        return False, None, ""
    try:
        return True, expected(g, h, *covariances), ""
    except TooManyTermsError:
        return False, None, (
            f"a product of polynomials of degrees {g.degree} and {h.degree}, of {len(covariances[0])} and {len(covariances[2])} fields, "
            f"is a sum over pairings of more than {MOST_TERMS} terms, or beyond degree {MOST_DEGREE}: "
        )  # fmt: skip
