"""Which results of a traced function depend on which of its arguments."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex

# Primitives that call a function with their own operands and return its results, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def reached(jaxpr: jex.ClosedJaxpr, marked: Sequence[bool]) -> list[bool]:
    """Whether each result of a traced function depends on a marked argument.

    Parameters
    ----------
    jaxpr
        The trace.
    marked
        One for each flat argument.

    Returns
    -------
    list of bool
        One for each flat result. False is certain; true is not, where a primitive is one that is not looked into, or multiplies by zero.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> f = lambda a, b: jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + 1, c[1] * b), (a, a))
    >>> reached(jax.make_jaxpr(f)(1.0, 2.0), [False, True])
    [False, True]
    """
    finder = _Finder()
    results = finder.jaxpr(jaxpr, marked)
    # What an effect does to others (a value written to a reference) is not followed.
    return [True] * len(results) if finder.escaped else results


class _Finder:
    def __init__(self) -> None:
        self.escaped = False

    def jaxpr(self, jaxpr: Any, marked: Sequence[bool]) -> list[bool]:
        inner = jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
        known: dict[Any, bool] = dict(zip(inner.invars, marked, strict=True))

        def read(atoms: Sequence[Any]) -> list[bool]:
            return [not isinstance(atom, jex.Literal) and known.get(atom, False) for atom in atoms]

        for eqn in inner.eqns:
            inputs = read(eqn.invars)
            found = self.equation(eqn, inputs) if any(inputs) else [False] * len(eqn.outvars)
            known.update(zip(eqn.outvars, found, strict=True))
        return read(inner.outvars)

    def equation(self, eqn: jex.JaxprEqn, inputs: list[bool]) -> list[bool]:
        name, p, n = eqn.primitive.name, eqn.params, len(eqn.outvars)
        if name in CALLS:
            return self.jaxpr(p[CALLS[name]], inputs)
        if name == "scan":
            before, n_carry = p["num_consts"], p["num_carry"]
            consts, rows = inputs[:before], inputs[before + n_carry :]
            return self.settled(lambda carry: self.jaxpr(p["jaxpr"], [*consts, *carry, *rows]), inputs[before : before + n_carry])
        if name == "while":
            first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
            found = self.settled(lambda carry: self.jaxpr(p["body_jaxpr"], [*inputs[first:second], *carry]), inputs[second:])
            return [True] * n if any(self.jaxpr(p["cond_jaxpr"], [*inputs[:first], *found])) else found
        if name == "cond":
            branches = [self.jaxpr(branch, inputs[1:]) for branch in p["branches"]]
            return [inputs[0] or any(results) for results in zip(*branches)]
        self.escaped |= bool(eqn.effects)
        return [True] * n

    def settled(self, step: Callable[[list[bool]], list[bool]], carry: list[bool]) -> list[bool]:
        """The results of a loop's step when another step reaches no more of its carry."""
        while True:
            results = step(carry)
            joined = [a or b for a, b in zip(carry, results)]
            if joined == carry:
                return [*carry, *results[len(carry) :]]
            carry = joined
