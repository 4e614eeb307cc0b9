"""Rows of a leaf that the data look up: embeddings of tokens, of positions."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from paperjax.limits import contractions as con
from paperjax.limits import moves as st
from paperjax.limits import nodes as nd
from paperjax.limits.nodes import Det, Node
from paperjax.limits.views import View, placed


def lookup(view: View, index: Det, eqn: Any, sizes: tuple[int, ...], law: con.LeafLaw) -> Node:
    """``gather`` of rows of a leaf at indices from the data; what is beyond its first and last row is as in JAX."""
    numbers, taken = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    whole = [nd.full_size(axis)[0] for axis in view.axes]
    looked = [i for i in range(len(whole)) if taken[i] < whole[i]]
    if len(looked) != 1 or taken[looked[0]] != 1 or numbers.operand_batching_dims or tuple(numbers.start_index_map) != (looked[0],):
        raise NotImplementedError(f"{law.path}: a gather from a leaf along {len(looked)} axes, or of more than single rows.")
    offsets = [i for i in range(len(whole)) if i not in numbers.collapsed_slice_dims]
    con.refuse_mean(law)
    axes, batch = [], iter(index.axes[:-1])
    for i in range(len(sizes)):
        if i in numbers.offset_dims:
            source = offsets[list(numbers.offset_dims).index(i)]
            axes.append(() if source in looked else placed([view.parts[source]])[0])
        else:
            axes.append(next(batch))
    out = tuple(axes)
    if not any(atom.grows for axis in out for atom in axis):
        raise NotImplementedError(f"{law.path}: a table none of whose other axes grows.")
    shape, mode = nd.rep_shape(out), lax.GatherScatterMode.from_any(eqn.params["mode"])
    filled = mode == lax.GatherScatterMode.FILL_OR_DROP
    if mode == lax.GatherScatterMode.ONE_HOT:
        raise NotImplementedError(f"{law.path}: a lookup by products with one-hot rows (mode='one_hot'). Leave mode= out.")

    def place(i: Any) -> Any:
        # All other modes take the nearest row.
        i, last = jnp.reshape(i, shape).astype(jnp.int32), whole[looked[0]] - 1
        return jnp.where((i < 0) | (i > last), -1, i) if filled else jnp.clip(i, 0, last)

    rows, beyond = st.det(out, place, index), _filling(eqn.params["fill_value"], law) if filled else None
    return nd.Lookup(out, con.key_of(view, ("rows", looked[0])), rows, view.factor, law.gaussian, law.variance == 0, beyond)


def _filling(value: Any, law: con.LeafLaw) -> float:
    """What is there in place of a row that a table has not."""
    number = math.nan if value is None else float(value)
    if number == 0 or math.isnan(number):
        return number
    raise NotImplementedError(f"{law.path}: a lookup that fills rows beyond the table with {number:g}. Fill them with 0.")
