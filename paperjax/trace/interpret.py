"""Run a traced function again with some of its values scaled, or recorded: no hook in the user's model.

The function is traced anew and its equations are bound one by one; a path (equation numbers from the outside in, as in `walk`) says where
to act. Loops, branches and rematerialized blocks are rebuilt only where a path leads into them.
"""

import hashlib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from paperjax.trace import primitives as prim

Path = tuple[int, ...]


def operand_of(path: Path, number: int) -> Path:
    """The tap of an equation's operand of that number, where a path alone taps its result; what `edited` takes and returns as a key.

    Examples
    --------
    >>> operand_of((3, 0, 2), 1)
    (3, 0, 2, -2)
    """
    # No equation has a negative number, and keys of one kind sort, as a scan's dict of taps must.
    return (*path, ~number)


class Edit(NamedTuple):
    """What to do at an equation: `change` its operand of that number, or its result if `operand` is ``None``."""

    op: str
    operand: int | None
    change: Callable[[Any], Any]


def rescaled(jaxpr: jex.ClosedJaxpr, args: Sequence[Any], scalings: Sequence[Any]) -> list[Any]:
    """Run a trace with some values inside it multiplied by numbers.

    Parameters
    ----------
    jaxpr, args
        The trace, and its flat arguments.
    scalings
        Each has ``path``, ``op`` (the primitive expected there), ``operand`` (which operand; ``None`` for the result) and ``factor``.

    Returns
    -------
    list
        The flat results.

    Raises
    ------
    ValueError
        If another primitive stands at a path: the trace is not the one that the paths were found in.

    Examples
    --------
    >>> import types
    >>> double = types.SimpleNamespace(path=(0,), op="sin", operand=None, factor=2.0)
    >>> rescaled(jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(0.0), [jnp.pi / 2], [double])[0].item()
    3.0
    """

    def times(factor: float) -> Callable[[Any], Any]:
        return lambda value: value * jnp.asarray(factor, value.dtype)

    edits: dict[Path, list[Edit]] = {}
    for s in scalings:
        edits.setdefault(tuple(s.path), []).append(Edit(s.op, s.operand, times(s.factor)))
    return _evaluate(jaxpr, args, (), _places(edits, ()), {})[0]


def wiring_of(jaxpr: jex.ClosedJaxpr) -> str:
    """A digest of which primitives a trace has and which result goes into which, whatever their shapes and dtypes.

    Paths that were found in one trace are those of another of the same wiring.

    Examples
    --------
    >>> short, long, cast = (jnp.ones(n, dtype) for n, dtype in ((2, "float32"), (9, "float32"), (2, "int8")))
    >>> f = lambda x: jnp.sin(x.astype("float32"))
    >>> wiring_of(jax.make_jaxpr(f)(short)) == wiring_of(jax.make_jaxpr(f)(long))
    True
    >>> wiring_of(jax.make_jaxpr(f)(short)) == wiring_of(jax.make_jaxpr(f)(cast))
    False
    """
    # Layers that call one function share its jaxpr.
    known: dict[int, str] = {}

    def wired(closed: jex.ClosedJaxpr) -> str:
        inner = closed.jaxpr
        if id(inner) not in known:
            count = itertools.count()
            number = {var: str(next(count)) for var in (*inner.constvars, *inner.invars)}

            def atoms(of: Sequence[Any]) -> list[str]:
                return ["." if isinstance(atom, jex.Literal) else number[atom] for atom in of]

            lines = []
            for eqn in inner.eqns:
                lines.append(" ".join([eqn.primitive.name, *atoms(eqn.invars), *map(wired, prim.inner_jaxprs(eqn))]))
                number.update((var, str(next(count))) for var in eqn.outvars)
            lines.append(" ".join(atoms(inner.outvars)))
            known[id(inner)] = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        return known[id(inner)]

    return wired(jaxpr)


def edited(
    fn: Callable[..., Any], edits: Mapping[Path, Sequence[Edit]], taps: Sequence[Path]
) -> tuple[Callable[..., Any], Callable[..., tuple[Any, dict[Path, Any]]]]:
    """The function with edits, and the same returning its tapped values too.

    Parameters
    ----------
    fn
        A pure function of pytrees of arrays.
    edits
        By path.
    taps
        Paths of equations whose (first) results are wanted, or `operand_of` them; inside a scan they come stacked along a new first axis.

    Returns
    -------
    plain, tapped
        ``plain(*args) -> result`` and ``tapped(*args) -> (result, {path: value})``.
    """

    def tapped(*args: Any) -> tuple[Any, dict[Path, Any]]:
        flat, tree = jax.tree.flatten(args)
        jaxpr, shape = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)), return_shape=True)(*flat)
        outputs, seen = _evaluate(jaxpr, flat, (), _places(edits, taps), {})
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), seen

    return (lambda *args: tapped(*args)[0]), tapped


def replayed(
    jaxpr: jex.ClosedJaxpr,
    args: Sequence[Any],
    taps: Sequence[Path],
    added: Mapping[Path, Any],
    instead: Mapping[Path, Callable[[Sequence[Any]], list[Any]]] | None = None,
    through: Callable[[Any], Any] = lambda result: result,
) -> tuple[list[Any], dict[Path, Any]]:
    """Run a trace with something added to results inside it, and with other values recorded.

    Parameters
    ----------
    jaxpr
        The trace.
    args
        Its flat arguments.
    taps
        As for `edited`.
    added
        By path, what is added to the (first) result there; inside a scan with a new first axis, one row a step, as taps come out of it.
        Zeros change nothing, and the derivative with respect to them is the cotangent of the result.
    instead
        By path, what computes the results from the operands in place of the equation there.
    through
        What the results with something added pass through: an identity that does something to cotangents.

    Returns
    -------
    outputs, seen
        The flat results, and the tapped values by path.

    Examples
    --------
    >>> trace = jax.make_jaxpr(lambda x: jnp.sin(x) ** 2)(1.0)
    >>> square = lambda d: replayed(trace, [jnp.float32(0.5)], [], {(0,): d})[0][0]
    >>> bool(jnp.allclose(jax.grad(square)(0.0), 2 * jnp.sin(0.5)))
    True
    """
    return _evaluate(jaxpr, args, (), _places({}, taps, tuple(added), instead or {}, through), added)


class _Places(NamedTuple):
    edits: Mapping[Path, tuple[Edit, ...]]
    taps: frozenset[Path]
    operands: Mapping[Path, tuple[int, ...]]
    above: frozenset[Path]
    added: frozenset[Path]
    instead: Mapping[Path, Callable[[Sequence[Any]], list[Any]]]
    through: Callable[[Any], Any]

    @property
    def all(self) -> frozenset[Path]:
        """Every equation at which something is to be done."""
        return frozenset((*self.edits, *self.taps, *self.operands, *self.added, *self.instead))

    def meets(self, path: Path) -> bool:
        """Whether something is to be done at this equation or inside it."""
        return any(path in where for where in (self.above, self.edits, self.taps, self.operands, self.added, self.instead))

    def inside(self, path: Path) -> bool:
        return path in self.above


def _places(
    edits: Mapping[Path, Sequence[Edit]],
    taps: Sequence[Path],
    added: Sequence[Path] = (),
    instead: Mapping[Path, Callable[[Sequence[Any]], list[Any]]] = types.MappingProxyType({}),
    through: Callable[[Any], Any] = lambda result: result,
) -> _Places:
    at = {tuple(path): tuple(e) for path, e in edits.items()}
    results = frozenset(tuple(path) for path in taps if path[-1] >= 0)
    operands: dict[Path, tuple[int, ...]] = {}
    for path in taps:
        if path[-1] < 0:
            operands[tuple(path[:-1])] = (*operands.get(tuple(path[:-1]), ()), ~path[-1])
    above = frozenset(path[:n] for path in (*at, *results, *operands, *added, *instead) for n in range(len(path)))
    return _Places(at, results, operands, above, frozenset(map(tuple, added)), instead, through)


def _evaluate(
    jaxpr: jex.ClosedJaxpr, args: Sequence[Any], path: Path, where: _Places, added: Mapping[Path, Any]
) -> tuple[list[Any], dict[Path, Any]]:
    values: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts))
    values.update(zip(jaxpr.jaxpr.invars, args))
    seen: dict[Path, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    n = len(path)
    missing = [p for p in where.all if p[:n] == path and len(p) > n and p[n] >= len(jaxpr.jaxpr.eqns)]
    if missing:
        raise ValueError(_another(missing[0], "there is no such equation", "one"))
    for run in _runs(jaxpr.jaxpr, path, where):
        here, eqn = (*path, run.start), jaxpr.jaxpr.eqns[run.start]
        if not where.meets(here):
            values.update(_untouched(jaxpr.jaxpr, run, values))
            continue
        operands = [read(atom) for atom in eqn.invars]
        edits = where.edits.get(here, ())
        for edit in edits:
            if edit.op != eqn.primitive.name:
                raise ValueError(_another(here, f"it is a {eqn.primitive.name}", f"a {edit.op}"))
            if edit.operand is not None:
                operands[edit.operand] = edit.change(jnp.asarray(operands[edit.operand]))
        seen |= {operand_of(here, number): jnp.asarray(operands[number]) for number in where.operands.get(here, ())}
        if where.inside(here):
            outputs, more = _inside(eqn, operands, here, where, added)
        else:
            outputs, more = where.instead[here](operands) if here in where.instead else _bind(jaxpr.jaxpr, eqn, operands), {}
        for edit in edits:
            if edit.operand is None:
                outputs[0] = edit.change(outputs[0])
        if here in where.added:
            outputs[0] = where.through(outputs[0] + added[here])
        if here in where.taps:
            seen[here] = outputs[0]
        seen |= more
        values.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.jaxpr.outvars], seen


def _another(path: Path, there: str, wanted: str) -> str:
    return (
        f"equation {path} of the trace: {there}, where the plan found {wanted}. The model, the batch's rank or JAX's version is another. "
        "Make the plan anew with them."
    )


def _runs(jaxpr: jex.Jaxpr, path: Path, where: _Places) -> Iterator[range]:
    """Equations with something to do one by one, the others in runs as long as they come."""
    start = 0
    for i in range(len(jaxpr.eqns)):
        if where.meets((*path, i)):
            if start < i:
                yield range(start, i)
            yield range(i, i + 1)
            start = i + 1
    if start < len(jaxpr.eqns):
        yield range(start, len(jaxpr.eqns))


def _untouched(jaxpr: jex.Jaxpr, run: range, values: Mapping[Any, Any]) -> dict[Any, Any]:
    """What a run of equations makes, by JAX's own evaluator."""
    eqns = jaxpr.eqns[run.start : run.stop]
    made = {var for eqn in eqns for var in eqn.outvars}
    needed = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal) and v not in made))
    later = {v for eqn in jaxpr.eqns[run.stop :] for v in eqn.invars if not isinstance(v, jex.Literal)}
    later |= {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = [var for eqn in eqns for var in eqn.outvars if var in later]
    part = jaxpr.replace(constvars=[], invars=needed, outvars=kept, eqns=eqns)
    return dict(zip(kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))(*(values[var] for var in needed))))


def _bind(around: jex.Jaxpr, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # How a primitive is bound is nobody else's to know. Each operand has a variable of its own: one of ``x + x`` may have been changed.
    fresh = [jex.Var(atom.aval) for atom in eqn.invars]
    alone = around.replace(constvars=[], invars=fresh, outvars=list(eqn.outvars), eqns=[eqn.replace(invars=fresh)])
    return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*operands))


def _inside(eqn: Any, operands: list[Any], path: Path, where: _Places, added: Mapping[Path, Any]) -> tuple[list[Any], dict[Path, Any]]:
    name = eqn.primitive.name
    inner = prim.called(eqn)
    if inner is not None and name.startswith("custom_"):
        raise ValueError(
            f"a value inside a {name} (equation {path}) would have to be changed, and its derivative is written by hand: take the "
            "parameters out of the function with the custom derivative."
        )
    if inner is not None:

        def run(*args: Any) -> Any:
            return _evaluate(inner, args, (*path, 0), where, added)

        if name in ("checkpoint", "remat", "remat2"):
            run = jax.checkpoint(run, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
        return run(*operands)
    if name == "scan":
        return _scan(eqn, operands, path, where, added)
    if name == "while":
        return _while(eqn, operands, path, where)
    if name == "cond":
        branches = [prim.closed(b) for b in eqn.params["branches"]]
        _no_taps(where, path, name)
        functions = [lambda *args, i=i, b=b: _evaluate(b, args, (*path, i), where, added)[0] for i, b in enumerate(branches)]
        return list(jax.lax.switch(operands[0], functions, *operands[1:])), {}
    raise ValueError(f"values inside a {name} (equation {path}) cannot be changed or recorded.")


def _scan(eqn: Any, operands: list[Any], path: Path, where: _Places, added: Mapping[Path, Any]) -> tuple[list[Any], dict[Path, Any]]:
    p, body = eqn.params, prim.closed(eqn.params["jaxpr"])
    n_consts, n_carry = p["num_consts"], p["num_carry"]
    consts, carry, rows = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]

    inside = {at: rows for at, rows in added.items() if at[: len(path)] == path}

    def step(carry: Any, row: Any) -> Any:
        row, more = row
        outputs, seen = _evaluate(body, [*consts, *carry, *row], (*path, 0), where, more)
        return outputs[:n_carry], (outputs[n_carry:], seen)

    over = (list(rows), inside)
    carry, (stacked, seen) = jax.lax.scan(step, list(carry), over, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *stacked], seen


def _while(eqn: Any, operands: list[Any], path: Path, where: _Places) -> tuple[list[Any], dict[Path, Any]]:
    _no_taps(where, path, "while")
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = prim.closed(eqn.params["cond_jaxpr"]), prim.closed(eqn.params["body_jaxpr"])
    cond_consts, body_consts, start = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
    final = jax.lax.while_loop(
        lambda carry: jex.jaxpr_as_fun(cond)(*cond_consts, *carry)[0],
        lambda carry: _evaluate(body, [*body_consts, *carry], (*path, 1), where, {})[0],
        list(start),
    )
    return list(final), {}


def _no_taps(where: _Places, path: Path, name: str) -> None:
    if any(tap[: len(path)] == path for tap in (*where.taps, *where.operands, *where.added)):
        raise ValueError(f"values inside a {name} (equation {path}) cannot be recorded: their number is known only when it runs.")
