"""Where a parameter, merely moved and scaled by a number, meets an array in a product: a leaf whose gradient is an outer product.

The gradient of a leaf that is used so is ``sum_t a_t b_t^T`` of what it meets and of the cotangent of the result. `walk` asks what a use
means for the width of a network; here the entries of the leaf are followed one by one, and what is not certain is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from paperjax.trace import primitives as prim

PRODUCTS = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}


class Moved(NamedTuple):
    """A value whose entries are entries of one leaf, times a number.

    Attributes
    ----------
    leaf
        Number of the leaf.
    scale
        The number.
    loops
        The scans around it, from the outside in: true for one that takes a slice of the leaf a step, false for one that uses the same
        entries in each step.
    entries
        ``() -> array``: for each entry of the value, its number in the flattened leaf; slices of scans come first. Computed on demand.
    copies
        Whether an entry of the leaf may come several times.
    whole
        Whether it is the leaf as it came in.
    """

    leaf: int
    scale: float
    loops: tuple[bool, ...]
    entries: Callable[[], np.ndarray]
    copies: bool = False
    whole: bool = True


class Product(NamedTuple):
    """One use of a leaf in a product with something else.

    Attributes
    ----------
    value
        The leaf, as it enters.
    eqn, path
        The equation, and where it stands, as in `paperjax.trace.graph.Site`.
    operand
        Which operand of the equation the leaf is.
    lengths
        Lengths of the scans around it, one for each of ``value.loops``.
    bias, spread
        A leaf that is added to the result at once, with the entries of it that each entry of the result gets; nothing else uses the result.
    """

    value: Moved
    eqn: jex.JaxprEqn
    path: tuple[int, ...]
    operand: int
    lengths: tuple[int, ...]
    bias: Moved | None = None
    spread: Callable[[], np.ndarray] | None = None


class Uses(NamedTuple):
    """All uses of the leaves of a function.

    Attributes
    ----------
    products
        In the order of execution.
    elsewhere
        For each leaf that is used in any other way, the primitive of the first such use.
    layers
        For each leaf that is used through scans over its first axis only, the length of that axis.
    """

    products: tuple[Product, ...]
    elsewhere: dict[int, str]
    layers: dict[int, int]


def find_products(jaxpr: jex.ClosedJaxpr, n_leaves: int) -> Uses:
    """Follow the first `n_leaves` inputs of a traced function to their products.

    Returns
    -------
    Uses
        A leaf whose gradient its products give in full is not in ``elsewhere``; a leaf without any use is in neither.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> def net(w, v, b, x):
    ...     return jnp.tanh(x @ (w / 2) + b) @ v.T
    >>> uses = find_products(jax.make_jaxpr(net)(*(jnp.ones(s) for s in [(3, 4), (2, 4), (4,), (1, 3)])), 3)
    >>> [(p.value.leaf, p.eqn.primitive.name, p.value.scale, p.bias and p.bias.leaf) for p in uses.products], uses.elsewhere
    ([(0, 'dot_general', 0.5, 2), (1, 'dot_general', 1.0, None)], {})
    """
    finder = _Finder()
    inputs: list[Moved | None] = []
    for i, var in enumerate(jaxpr.jaxpr.invars):
        shape = tuple(var.aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
        inputs.append(Moved(i, 1.0, (), _numbered(shape)) if i < n_leaves else None)
    for value in finder.jaxpr(jaxpr, inputs, [None] * len(inputs), (), ())[0]:
        finder.other(value, "the output")
    layers = {leaf: n for leaf, n in finder.scanned.items() if leaf not in finder.loose}
    return Uses(tuple(finder.products), finder.elsewhere, layers)


def _numbered(shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)


class _Finder:
    def __init__(self) -> None:
        self.products: list[Product] = []
        self.elsewhere: dict[int, str] = {}
        self.scanned: dict[int, int] = {}
        self.loose: set[int] = set()

    def other(self, value: Moved | None, how: str) -> None:
        if value is not None:
            self.elsewhere.setdefault(value.leaf, how)
            self.used(value)

    def used(self, value: Moved) -> None:
        if not any(value.loops):
            self.loose.add(value.leaf)

    def jaxpr(
        self,
        jaxpr: jex.ClosedJaxpr,
        inputs: Sequence[Moved | None],
        known: Sequence[Any],
        path: tuple[int, ...],
        lengths: tuple[int, ...],
    ) -> tuple[list[Moved | None], list[Any]]:
        """What the outputs are, given what the inputs are and the number that all entries of an input equal, where it is known."""
        values: dict[Any, Moved | None] = dict(zip(jaxpr.jaxpr.invars, inputs))
        numbers = {var: _scalar(const) for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts)}
        numbers |= dict(zip(jaxpr.jaxpr.invars, known))

        def read(atom: Any) -> Moved | None:
            return None if isinstance(atom, jex.Literal) else values.get(atom)

        def number(atom: Any) -> Any:
            return _scalar(atom.val) if isinstance(atom, jex.Literal) else numbers.get(atom)

        counts = Counter(v for eqn in jaxpr.jaxpr.eqns for v in eqn.invars if not isinstance(v, jex.Literal))
        counts.update(v for v in jaxpr.jaxpr.outvars if not isinstance(v, jex.Literal))
        results: dict[Any, tuple[int, Callable[[], np.ndarray]]] = {}
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            at = [number(atom) for atom in eqn.invars]
            if not any(value is not None for value in operands):
                if len(eqn.outvars) == 1:
                    numbers[eqn.outvars[0]] = prim.fold_scalar(eqn, at)
                self.carry_result(eqn, results, counts)
                continue
            if self.biased(eqn, operands, results):
                continue
            found, folded = self.equation(eqn, operands, at, (*path, i), lengths)
            values.update(zip(eqn.outvars, found))
            numbers.update(zip(eqn.outvars, folded))
            made = self.products[-1] if self.products else None
            if made is not None and made.path == (*path, i) and counts[eqn.outvars[0]] == 1:
                shape = tuple(eqn.outvars[0].aval.shape)
                results[eqn.outvars[0]] = len(self.products) - 1, _numbered(shape)
        return [read(atom) for atom in jaxpr.jaxpr.outvars], [number(atom) for atom in jaxpr.jaxpr.outvars]

    def equation(
        self, eqn: Any, operands: list[Moved | None], numbers: list[Any], path: tuple[int, ...], lengths: tuple[int, ...]
    ) -> tuple[list[Moved | None], list[Any]]:
        name = eqn.primitive.name
        unknown: list[Any] = [None] * len(eqn.outvars)
        inner = prim.called(eqn)
        if inner is not None and not name.startswith("custom_"):
            return self.jaxpr(inner, operands, numbers, (*path, 0), lengths)
        if name == "scan":
            self.scan(eqn, operands, numbers, path, lengths)
            return unknown, unknown
        first = operands[0]
        if first is not None and name in prim.MOVES and _stays_real(eqn):
            more = {"copies": first.copies or _repeats(eqn), "whole": first.whole and name in prim.IN_PLACE}
            return [first._replace(entries=_then(first, eqn, i), **more) for i in range(len(eqn.outvars))], unknown
        if name == "neg" and first is not None:
            return [first._replace(scale=-first.scale)], unknown
        if name in ("mul", "div") and len([v for v in operands if v is not None]) == 1:
            value, own = (first, 0) if first is not None else (operands[1], 1)
            assert value is not None
            factor = numbers[1 - own]
            # One number that meets an array is copied; multiplied by 0 a leaf has no factors that a bias could share.
            stays = eqn.invars[own].aval.shape == eqn.outvars[0].aval.shape and (name == "mul" or own == 0)
            if stays and factor is not None and not np.iscomplexobj(factor) and factor != 0 and np.isfinite(factor):
                factor = float(factor)
                return [value._replace(scale=value.scale * factor if name == "mul" else value.scale / factor)], unknown
        for i, value in enumerate(operands):
            if value is None:
                continue
            if i in PRODUCTS.get(name, ()) and _fits(eqn) and not value.copies:
                self.products.append(Product(value, eqn, path, i, lengths))
                self.used(value)
            else:
                self.other(value, name)
        return unknown, unknown

    def scan(self, eqn: Any, operands: list[Moved | None], numbers: list[Any], path: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        inside: list[Moved | None] = []
        for i, value in enumerate(operands):
            if n_consts <= i < n_consts + n_carry:
                self.other(value, "the carry of a scan")
                value = None
            elif value is not None:
                if i >= n_consts and value.whole and self.scanned.setdefault(value.leaf, eqn.params["length"]) != eqn.params["length"]:
                    self.loose.add(value.leaf)
                if i >= n_consts and not value.whole:
                    self.loose.add(value.leaf)
                value = value._replace(loops=(*value.loops, i >= n_consts), whole=value.whole and i < n_consts)
            inside.append(value)
        known = [number if i < n_consts else None for i, number in enumerate(numbers)]
        for value in self.jaxpr(prim.closed(eqn.params["jaxpr"]), inside, known, (*path, 0), (*lengths, eqn.params["length"]))[0]:
            self.other(value, "the result of a scan")

    # A bias: what is added to the result of a product, and to nothing else -------------------------------------------

    def carry_result(self, eqn: Any, results: dict[Any, Any], counts: Counter[Any]) -> None:
        """A result that is only moved is still that result."""
        atom = eqn.invars[0] if eqn.invars else None
        if isinstance(atom, jex.Literal) or atom not in results or eqn.primitive.name not in prim.MOVES or len(eqn.outvars) != 1:
            return
        which, entries = results[atom]
        if not _repeats(eqn) and eqn.primitive.name not in ("slice", "split", "unstack") and counts[eqn.outvars[0]] == 1:
            results[eqn.outvars[0]] = which, lambda: prim.moved_entries(eqn, entries())[0]

    def biased(self, eqn: Any, operands: list[Moved | None], results: dict[Any, Any]) -> bool:
        if eqn.primitive.name not in ("add", "add_any"):
            return False
        for i, value in enumerate(operands):
            other = eqn.invars[1 - i]
            if value is None or isinstance(other, jex.Literal) or other not in results:
                continue
            which, entries = results[other]
            product = self.products[which]
            if product.bias is None and product.value.loops == value.loops:
                spread = _spread(entries, value, tuple(product.eqn.outvars[0].aval.shape))
                self.products[which] = product._replace(bias=value, spread=spread)
                self.used(value)
                return True
        return False


def _spread(entries: Callable[[], np.ndarray], bias: Moved, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """For each entry of a product's result the entry of the bias that is added to it."""

    def spread() -> np.ndarray:
        of = bias.entries()
        sliced = of.reshape(-1, *of.shape[sum(bias.loops) :])
        rows = []
        for part in sliced:
            row = np.empty(int(np.prod(shape)), np.int64)
            row[entries().reshape(-1)] = np.broadcast_to(part, entries().shape).reshape(-1)
            rows.append(row.reshape(shape))
        return np.stack(rows).reshape(*of.shape[: sum(bias.loops)], *shape)

    return spread


def _then(value: Moved, eqn: Any, result: int) -> Callable[[], np.ndarray]:
    def entries() -> np.ndarray:
        before = value.entries()
        n = sum(value.loops)
        slices = before.reshape(-1, *before.shape[n:])
        after = np.stack([prim.moved_entries(eqn, part)[result] for part in slices])
        return after.reshape(*before.shape[:n], *after.shape[1:])

    return entries


def _repeats(eqn: Any) -> bool:
    """Whether an entry comes several times."""
    return eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.size != eqn.outvars[0].aval.size


def _stays_real(eqn: Any) -> bool:
    return eqn.primitive.name != "convert_element_type" or jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)


def _fits(eqn: Any) -> bool:
    name, p = eqn.primitive.name, eqn.params
    if name == "conv_general_dilated":
        return p["batch_group_count"] == 1
    if name == "gather":
        numbers, shape = p["dimension_numbers"], eqn.invars[0].aval.shape
        if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims or eqn.invars[1].aval.ndim < 1:
            return False
        axis = numbers.start_index_map[0]
        whole = all(size == (1 if i == axis else shape[i]) for i, size in enumerate(p["slice_sizes"]))
        return whole and tuple(numbers.collapsed_slice_dims) == (axis,)
    return True


def _scalar(value: Any) -> Any:
    """A known number without axes."""
    known = np.shape(value) == () and not isinstance(value, Tracer) and not jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended)
    return value if known else None
