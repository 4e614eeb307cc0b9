"""The gradient of a leaf in factors: ``G[k, i, j] = sum_t a[k, t, i] b[k, t, j]`` at every product it enters.

`k` runs over what the product does one by one (layers of a scan, experts, channel groups), `i` over what it sums, `j` over what it leaves
free, and `t` over all places of one example where the same numbers are used: positions, pixels, steps of a recurrence. `a` is what the leaf
meets, `b` the derivative of the output by the result.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paperjax.trace import primitives as prim
from paperjax.trace.interpret import operand_of
from paperjax.trace.products import Product, Uses


class Factor(NamedTuple):
    """One product of a leaf, with its sizes.

    Attributes
    ----------
    product
        Where and how.
    layers
        How many slices of the leaf the scans around it take; they come first in `k`.
    k, t, i, j
        The sizes above; for a lookup `i` counts rows, and `a` is the number of the row.
    swapped
        Whether `i` and `j` have changed places against the first factor of its leaf.
    """

    product: Product
    layers: int
    k: int
    t: int
    i: int
    j: int
    swapped: bool = False

    @property
    def lookup(self) -> bool:
        """Whether the leaf is a table and the data choose rows."""
        return self.product.eqn.primitive.name == "gather"

    @property
    def tap(self) -> tuple[int, ...]:
        """Where to record `a`."""
        return operand_of(self.product.path, _data_operand(self.product))


class Term(NamedTuple):
    """Factors of one leaf whose gradients fall on the same entries of it, and a bias that shares their `b`.

    Attributes
    ----------
    leaf
        Number of the leaf.
    factors
        The kernel sums over all pairs of them.
    bias, bias_scale
        The leaf that is added to the result of the one factor, and the number it is multiplied by.
    """

    leaf: int
    factors: tuple[Factor, ...]
    bias: int | None = None
    bias_scale: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the factors are one, stacked along `t`."""
        return not any(f.swapped for f in self.factors) and len({f.lookup for f in self.factors}) == 1


class Terms(NamedTuple):
    """A model's leaves in factors: the terms, why the leaves in `others` have none, and how many layers a scanned leaf holds."""

    terms: tuple[Term, ...]
    others: dict[int, str]
    layers: dict[int, int]


def find_terms(uses: Uses) -> Terms:
    """Group the products of each leaf; a leaf that has another use as well goes to the others."""
    of: dict[int, list[Product]] = {}
    for product in uses.products:
        of.setdefault(product.value.leaf, []).append(product)
    others, terms = dict(uses.elsewhere), []
    for leaf, products in of.items():
        if leaf in others:
            continue
        found = _grouped(leaf, [_factor(product) for product in products])
        if found is None:
            others[leaf] = "its uses overlap in part"
        else:
            terms += found
    biases = [(i, p.bias) for i, term in enumerate(terms) for p in [term.factors[0].product] if p.bias is not None]
    taken = [bias.leaf for _, bias in biases] + [t.leaf for t in terms]
    for product in uses.products:
        if product.bias is not None and product.value.leaf in others:
            others.setdefault(product.bias.leaf, "add")
    for i, bias in biases:
        if bias.leaf in others:
            continue
        if len(terms[i].factors) > 1 or taken.count(bias.leaf) > 1 or not _constant_column(terms[i].factors[0]):
            others[bias.leaf] = "add"
        else:
            terms[i] = terms[i]._replace(bias=bias.leaf, bias_scale=bias.scale)
    gone = {t.leaf for t in terms if t.leaf in others}
    kept = [t._replace(bias=None) if t.bias in others else t for t in terms if t.leaf not in gone]
    return Terms(tuple(kept), others, uses.layers)


def _grouped(leaf: int, factors: list[Factor]) -> list[Term] | None:
    if len(factors) == 1:
        return [Term(leaf, tuple(factors))]
    entries = [_entries(f) for f in factors]
    sets = [np.unique(e) for e in entries]
    groups: list[list[int]] = []
    for n, own in enumerate(sets):
        group = next((g for g in groups if np.intersect1d(sets[g[0]], own, assume_unique=True).size), None)
        if group is None:
            groups.append([n])
            continue
        first, this = entries[group[0]], entries[n]
        if this.shape == first.shape and np.array_equal(this, first):
            group.append(n)
        elif this.swapaxes(1, 2).shape == first.shape and np.array_equal(this.swapaxes(1, 2), first):
            factors[n] = factors[n]._replace(swapped=True)
            group.append(n)
        else:
            return None
    # What overlaps one group only must not overlap another.
    if sum(sets[g[0]].size for g in groups) != np.unique(np.concatenate([sets[g[0]] for g in groups])).size:
        return None
    return [Term(leaf, tuple(factors[n] for n in group)) for group in groups]


def _constant_column(factor: Factor) -> bool:
    """Whether each entry of the bias goes to one `j` (of one `k`) and to all places `t` of it."""
    spread = factor.product.spread
    assert spread is not None
    product, got = factor.product, spread()
    out = _shape(product.eqn.outvars[0])
    # A bias that all steps of a recurrence share is one column.
    loops = [n if stack else 1 for n, stack in zip(product.lengths, product.value.loops)]
    got = np.asarray(results(product, np.broadcast_to(got.reshape(*loops, *out), (*product.lengths, *out))))
    first = got[:, :1, :]
    return bool((got == first).all()) and np.unique(first).size == first.size


def _stacked(product: Product) -> tuple[int, ...]:
    return tuple(n for n, stack in zip(product.lengths, product.value.loops) if stack)


def _factor(product: Product) -> Factor:
    eqn = product.eqn
    tap = jax.ShapeDtypeStruct((*product.lengths, *_shape(eqn.invars[_data_operand(product)])), jnp.float32)
    if eqn.primitive.name == "gather":
        tap = jax.ShapeDtypeStruct(tap.shape, jnp.int32)
    out = jax.ShapeDtypeStruct((*product.lengths, *_shape(eqn.outvars[0])), jnp.float32)
    a, b = jax.eval_shape(lambda x: operands(product, x), tap), jax.eval_shape(lambda x: results(product, x), out)
    i = _shape(eqn.invars[0])[eqn.params["dimension_numbers"].start_index_map[0]] if eqn.primitive.name == "gather" else a.shape[2]
    return Factor(product, math.prod(_stacked(product)), b.shape[0], b.shape[1], i, b.shape[2])


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _data_operand(product: Product) -> int:
    return 1 if product.eqn.primitive.name == "gather" else 1 - product.operand


def _split_loops(product: Product, array: Any) -> Any:
    """``(loops, rest)`` to ``(stacked, reused, rest)``."""
    loops = product.value.loops
    n = len(loops)
    order = [i for i in range(n) if loops[i]] + [i for i in range(n) if not loops[i]]
    array = array.transpose(*order, *range(n, array.ndim))
    sizes = [math.prod(m for m, stack in zip(product.lengths, loops) if stack is which) for which in (True, False)]
    return array.reshape(*sizes, *array.shape[n:])


def operands(product: Product, tap: Any) -> Any:
    """`a` of one example, ``(k, t, i)``, of what was recorded; for a lookup the rows ``(k, t)``, -1 for none."""
    eqn, array = product.eqn, _split_loops(product, tap)
    stacked, reused = array.shape[:2]
    if eqn.primitive.name == "dot_general":
        axes = prim.dot_axes(eqn, 1 - product.operand)
        contract, batch = eqn.params["dimension_numbers"]
        inside, stack = contract[1 - product.operand], batch[1 - product.operand]
        array = array.transpose(0, *(2 + a for a in stack), 1, *(2 + a for a in axes.free), *(2 + a for a in inside))
        shape = _shape(eqn.invars[1 - product.operand])
        k, t, i = (math.prod(shape[a] for a in which) for which in (stack, axes.free, inside))
        return array.reshape(stacked * k, reused * t, i)
    if eqn.primitive.name == "gather":
        return _rows(eqn, array.reshape(stacked, -1))
    return _patches(eqn, array)


def results(product: Product, tap: Any) -> Any:
    """`b` of one example, ``(k, t, j)``, of what belongs to the result."""
    eqn, array = product.eqn, _split_loops(product, tap)
    stacked, reused = array.shape[:2]
    if eqn.primitive.name == "dot_general":
        place = [prim.dot_output(eqn, n) for n in (0, 1)]
        data, own = prim.dot_axes(eqn, 1 - product.operand), prim.dot_axes(eqn, product.operand)
        stack = range(len(own.stack))
        t_axes, j_axes = [place[1 - product.operand][a] for a in data.free], [place[product.operand][a] for a in own.free]
    elif eqn.primitive.name == "gather":
        j_axes = list(eqn.params["dimension_numbers"].offset_dims)
        stack, t_axes = (), [a for a in range(array.ndim - 2) if a not in j_axes]
    else:
        batch, feature, *window = eqn.params["dimension_numbers"].out_spec
        groups = eqn.params["feature_group_count"]
        shape = array.shape[2:]
        array = array.transpose(0, 2 + feature, 1, 2 + batch, *(2 + a for a in window))
        array = array.reshape(stacked, groups, shape[feature] // groups, -1)
        return array.transpose(0, 1, 3, 2).reshape(stacked * groups, -1, shape[feature] // groups)
    shape = array.shape[2:]
    array = array.transpose(0, *(2 + a for a in stack), 1, *(2 + a for a in t_axes), *(2 + a for a in j_axes))
    k, t, j = (math.prod(shape[a] for a in which) for which in (stack, t_axes, j_axes))
    return array.reshape(stacked * k, reused * t, j)


def _entries(factor: Factor) -> np.ndarray:
    """Numbers of the leaf's entries, ``(k, i, j)``."""
    product = factor.product
    eqn, array = product.eqn, product.value.entries()
    n = sum(product.value.loops)
    array = array.reshape(factor.layers, *array.shape[n:])
    if eqn.primitive.name == "dot_general":
        own = prim.dot_axes(eqn, product.operand)
        contract, batch = eqn.params["dimension_numbers"]
        order = (*batch[product.operand], *contract[product.operand], *own.free)
        return array.transpose(0, *(1 + a for a in order)).reshape(factor.k, factor.i, factor.j)
    if eqn.primitive.name == "gather":
        return np.moveaxis(array, 1 + eqn.params["dimension_numbers"].start_index_map[0], 1).reshape(factor.k, factor.i, factor.j)
    out, inside, *window = (1 + a for a in eqn.params["dimension_numbers"].rhs_spec)
    array = array.transpose(0, out, *window, inside)
    return array.reshape(factor.k, factor.j, factor.i).swapaxes(1, 2)


def _rows(eqn: Any, rows: Any) -> Any:
    n = _shape(eqn.invars[0])[eqn.params["dimension_numbers"].start_index_map[0]]
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        return jnp.where((rows >= 0) & (rows < n), rows, -1)
    return jnp.clip(rows, 0, n - 1)


def _patches(eqn: Any, array: Any) -> Any:
    """What each place of a convolution's result sees, ``(stacked, reused, *image)`` to ``(k, t, i)``."""
    p = eqn.params
    batch, feature, *space = p["dimension_numbers"].lhs_spec
    _, _, *window = p["dimension_numbers"].rhs_spec
    kernel = [_shape(eqn.invars[1])[a] for a in window]
    out = [_shape(eqn.outvars[0])[a] for a in p["dimension_numbers"].out_spec[2:]]
    groups, stacked = p["feature_group_count"], array.shape[0]
    array = array.transpose(0, 1, *(2 + a for a in (batch, *space, feature)))
    array = array.reshape(stacked, -1, *array.shape[3:])
    padding = [(0, 0, 0), (0, 0, 0), *((*pad, d - 1) for pad, d in zip(p["padding"], p["lhs_dilation"])), (0, 0, 0)]
    array = jax.lax.pad(array, jnp.zeros((), array.dtype), padding)
    # Axis by axis: all offsets at once are one large loop, which takes XLA two to four times as long to compile.
    steps = list(zip(itertools.count(2), out, kernel, p["window_strides"], p["rhs_dilation"]))
    for axis, n, size, stride, dilation in reversed(steps):
        starts = [offset * dilation for offset in range(size)]
        seen = [jax.lax.slice_in_dim(array, start, start + (n - 1) * stride + 1, stride, axis) for start in starts]
        array = jnp.stack(seen, 2 + len(out))
    patches = array.reshape(stacked, -1, math.prod(kernel), groups, array.shape[-1] // groups)
    return patches.transpose(0, 3, 1, 2, 4).reshape(stacked * groups, patches.shape[1], -1)
