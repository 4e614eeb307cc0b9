"""How far a network has moved since its initialization: in its last features, and in its outputs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from paperjax.model import Model, join, split
from paperjax.trace import primitives as prim
from paperjax.trace.graph import Site, Walk
from paperjax.trace.interpret import Edit, Path, edited, operand_of
from paperjax.trace.streams import CONTRACTING
from paperjax.trace.walk import walk

# Values that a loop hands on: they are no result of an equation that could be recorded.
_IN_LOOPS = ("input", "carry", "carried", "row", "rows")


def feature_change(model: Model, params: PyTree, params0: PyTree, data: Any) -> Scalar:
    """Relative RMS change of the last hidden layer's features since initialization, on the training inputs.

    ``sqrt(sum (z - z_0)² / sum z_0²)`` over training examples and coordinates, z being what goes into the readout: the other operand of
    the last product with a parameter on the way to the outputs. The trace finds it, so nothing of the model is annotated.

    Under a stable abc parametrization it is of order ``n^-r`` in the width n, with the r of `paperjax.classify` (Tensor Programs IV,
    arXiv 2011.14522, Section 3): of order 1 under muP, ``n^-1/2`` under NTP, and under SP with a learning rate of order 1/n.

    Parameters
    ----------
    model
        Any model with a hidden layer: a product with a parameter before the last one.
    params, params0
        The parameters now and at the start. Of several last products, those whose features can move count, all together.
    data
        Has ``x_train``.

    Returns
    -------
    Array
        A number of at least 0, at least in float32; infinite or NaN where the features are 0 at the start.

    Raises
    ------
    ValueError
        If the network has no hidden layer, or the last product is one of a loop's over layers, so that none is the readout.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import paperjax as pj
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> model = pj.models.linear_net(2, 1, outputs=1)
    >>> before = {"first": {"w": jnp.eye(2)}, "readout": {"w": jnp.ones((2, 1))}}
    >>> after = {"first": {"w": jnp.array([[1.0, 0.0], [0.5, 1.0]])}, "readout": {"w": jnp.zeros((2, 1))}}
    >>> feature_change(model, after, before, data)  # sqrt(0.25 / 2)
    Array(0.35355338, dtype=float32)
    """
    taps = list(_readout_sites(model, params, data.x_train, "feature_change"))
    recorded = edited(model.apply, {}, taps)[1]
    now, before = (recorded(p, data.x_train)[1] for p in (params, params0))
    moved = [_squares(_wide(now[tap]) - _wide(before[tap])) for tap in taps]
    return jnp.sqrt(sum(moved[1:], moved[0]) / sum((_squares(_wide(before[tap])) for tap in taps[1:]), _squares(_wide(before[taps[0]]))))


def output_change(model: Model, params: PyTree, params0: PyTree, data: Any) -> Scalar:
    """RMS change of the outputs since initialization, ``sqrt(mean (f - f_0)²)`` over training examples and outputs.

    Of order 1 in the width under every stable and nontrivial abc parametrization (muP, NTP, SP with a learning rate of order 1/n), and
    of order n in the first step of SGD under SP with a learning rate of order 1 (arXiv 2011.14522, Section 3).

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> line = Model(lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    >>> data = SimpleNamespace(x_train=jnp.array([[1.0], [-1.0]]))
    >>> output_change(line, jnp.array([[3.0]]), jnp.array([[1.0]]), data)
    Array(2., dtype=float32)
    """
    now, before = (_wide(model.apply(p, data.x_train)) for p in (params, params0))
    return jnp.sqrt(jnp.mean(jnp.square(now - before)))


def last_features(model: Model, params: PyTree, x: Any) -> Float[Array, "batch features"]:
    """What goes into the readout, for each example: the other operand of the last product with a parameter, flattened.

    Raises
    ------
    ValueError
        As `feature_change` does, and if there are several readouts.

    Examples
    --------
    >>> import paperjax as pj
    >>> model = pj.models.linear_net(2, 1, outputs=1)
    >>> last_features(model, {"first": {"w": jnp.eye(2)}, "readout": {"w": jnp.ones((2, 1))}}, jnp.array([[3.0, 4.0]]))
    Array([[3., 4.]], dtype=float32)
    """
    tap = _only(_readout_sites(model, params, x, "last_features"))[0]
    features = edited(model.apply, {}, [tap])[1](params, x)[1][tap]
    return features.reshape(x.shape[0], -1)


def readout_weights(model: Model, params: PyTree, x: Any) -> Float[Array, "outputs features"]:
    """``df/dz`` of the first example's outputs f in its `last_features` z: the last weights, with all that multiplies them.

    Raises
    ------
    ValueError
        As `last_features` does.

    Examples
    --------
    >>> import paperjax as pj
    >>> model = pj.models.linear_net(2, 1, outputs=1)
    >>> readout_weights(model, {"first": {"w": jnp.eye(2)}, "readout": {"w": jnp.array([[5.0], [6.0]])}}, jnp.array([[3.0, 4.0]]))
    Array([[5., 6.]], dtype=float32)
    """
    x = x[:1]
    tap, op = _only(_readout_sites(model, params, x, "readout_weights"))
    z = edited(model.apply, {}, [tap])[1](params, x)[1][tap]
    place, operand = (tap[:-1], ~tap[-1]) if tap[-1] < 0 else (tap, None)

    def outputs(moved: Array) -> Array:
        return edited(model.apply, {place: [Edit(op, operand, lambda z: z + moved)]}, [])[0](params, x)[0].reshape(-1)

    return jax.jacrev(outputs)(jnp.zeros_like(z)).reshape(-1, z.size)


def _wide(x: Array) -> Array:
    # Not promote_types, which under strict promotion refuses bfloat16.
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _squares(x: Array) -> Scalar:
    return jnp.sum(jnp.square(x))


def _readout_sites(model: Model, params: PyTree, x: Any, where: str) -> dict[Path, str]:
    """Taps of what goes into the last products with parameters, and the primitive at each."""
    found, n_trained = _walk(model, params, x)
    above = _Ancestors(found)
    hidden = [site for site in _last(found) if above.contracts(site.operand)]
    if not hidden:
        raise ValueError(
            f"{where}: no product with a parameter comes before the last one, so the network has no hidden layer whose features "
            "could change. For a linear model measure its parameters (parameter_change) or its outputs (output_change)."
        )
    # A fixed copy of the network (paperjax.transforms.center) has features too, which say nothing of how far these have moved.
    moving = [site for site in hidden if above.trained(site.operand, n_trained)] or hidden
    return dict(_tap(site, found, where) for site in moving)


def _only(sites: dict[Path, str]) -> tuple[Path, str]:
    if len(sites) > 1:
        raise ValueError(
            f"last_features: {len(sites)} different values go into last products with parameters, so the network has no one last layer of "
            "features. Measure them with functions of features, paperjax.measures.within_class."
        )
    return next(iter(sites.items()))


def _walk(model: Model, params: PyTree, x: Any) -> tuple[Walk, int]:
    """The walk with given leaves among the parameters, and how many leaves are trained; those come first."""
    trained, given = split(params)
    leaves, tree = jax.tree.flatten(trained)
    rest, rest_tree = jax.tree.flatten(given)
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in rest]
    weights = [leaf for leaf, is_weight in zip(rest, floating) if is_weight]
    others = [leaf for leaf, is_weight in zip(rest, floating) if not is_weight]

    def apply(leaves: Any, weights: Any, others: Any, x: Any) -> Any:
        left = iter(weights), iter(others)
        merged = [next(left[0] if is_weight else left[1]) for is_weight in floating]
        return model.apply(join(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(rest_tree, merged)), x)

    return walk(prim.trace(apply, leaves, weights, others, x), len(leaves) + len(weights)), len(leaves)


def _last(found: Walk) -> list[Site]:
    """Uses of parameters from which a path leads to the outputs that meets no other product with a parameter."""
    made: dict[int, list[Site]] = {}
    for site in found.sites:
        if site.kind in CONTRACTING:
            made.setdefault(site.node, []).append(site)
    left, seen, last = [value.node for value in found.outputs if value.node is not None], set(), []
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        last += made.get(node, [])
        left += () if node in made else found.nodes[node].parents
    return last


class _Ancestors:
    """What an activation is made of."""

    def __init__(self, found: Walk):
        self.nodes = found.nodes
        self.sites: dict[int, list[Site]] = {}
        for site in found.sites:
            self.sites.setdefault(site.node, []).append(site)

    def uses(self, node: int | None) -> list[Site]:
        left, seen, uses = [] if node is None else [node], set(), []
        while left:
            here = left.pop()
            if here not in seen:
                seen.add(here)
                uses += self.sites.get(here, [])
                left += self.nodes[here].parents
        return uses

    def contracts(self, node: int | None) -> bool:
        return any(site.kind in CONTRACTING for site in self.uses(node))

    def trained(self, node: int | None, n_trained: int) -> bool:
        return any(site.leaf < n_trained for site in self.uses(node))


def _tap(site: Site, found: Walk, where: str) -> tuple[Path, str]:
    if site.scans:
        raise ValueError(
            f"{where}: the last product with a parameter ({site.op}) runs in a loop over layers, so none of them is the readout. "
            "Take the last layer out of the loop."
        )
    if site.side is not None:
        return operand_of(site.path, site.side), site.op
    assert site.operand is not None
    made = found.nodes[site.operand]
    if made.op in _IN_LOOPS:
        raise ValueError(
            f"{where}: what goes into the readout ({site.op}) comes straight from a loop ({made.op}), where it cannot be recorded. "
            "Write the readout as one product, features @ weights."
        )
    return made.path, made.op
