"""A `Plan`: a parametrization resolved against a family at a base and a target size; numbers for every leaf, no code."""

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paperjax.binding import nearest
from paperjax.model import Model, as_model, split
from paperjax.parametrization.factors import Factors
from paperjax.parametrization.optimizer import planned_optimizer
from paperjax.parametrization.scaling import Scaling, scaled
from paperjax.parametrization.show import render

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class PlannedLeaf:
    """One row of a plan.

    Attributes
    ----------
    path, shape, dtype
        The leaf in the target's parameters.
    role, axes
        Roles joined by ``+``; for each axis, the sizes that make it grow.
    inside, out, stack
        Axes that are contracted (a convolution's window among them) or looked up, that are free, and that are run over one by one, at
        the use that decides for the leaf.
    rule
        Which optimizer's rule the leaf follows: the plan's, but ``"adam"`` for what is no matrix under Muon.
    init_std
        Standard deviation of its entries under the plan; a constant leaf has 0. ``None`` where not known, which a NaN becomes.
    factors
        See `Factors`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    axes: tuple[str, ...]
    inside: tuple[int, ...]
    out: tuple[int, ...]
    stack: tuple[int, ...]
    rule: str
    init_std: float | None
    factors: Factors

    def __post_init__(self) -> None:
        # NaN is unequal to itself and no JSON.
        if self.init_std is not None and math.isnan(self.init_std):
            object.__setattr__(self, "init_std", None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Per-leaf factors of a parametrization at a target size; see `plan`.

    Attributes
    ----------
    name, rule, decay_mode
        Of the parametrization; ``"sgd"``, ``"adam"`` or ``"muon"``; see `plan`.
    base, target
        The sizes, as plain Python numbers and tuples.
    leaves
        One row for each trained leaf, in the order of the flattened parameters.
    scalings
        Factors on activations.
    copies
        Given leaves that start as trained ones, which the plan scales like those: ``(path of the copy, path of the leaf)``.
    wiring, batch
        With factors on activations: how the equations of the trace that they stand in are wired, and which batch it was made with.
    network
        The target network without the plan; ``None`` in a plan read from JSON until `bind` gives it one.
    """

    name: str
    rule: str
    decay_mode: str
    base: tuple[tuple[str, Any], ...]
    target: tuple[tuple[str, Any], ...]
    leaves: tuple[PlannedLeaf, ...]
    scalings: tuple[Scaling, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    wiring: str = ""
    batch: str = ""
    network: Model | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("base", "target"):
            object.__setattr__(self, name, tuple((size, _plain(value)) for size, value in getattr(self, name)))

    # Pytrees shaped like the parameters -------------------------------------------------------------------------------

    def factors(self, field: str, params: Any) -> Any:
        """One field of `Factors` as a pytree of numbers shaped like `params`; ``None`` stands where nothing is trained.

        Raises
        ------
        ValueError
            If `params` are not those of the target: the message names the first leaf that differs.
        """
        trained = split(params)[0]
        leaves, tree = jax.tree_util.tree_flatten_with_path(trained)
        self._refuse_others(leaves)
        return jax.tree.unflatten(tree, [getattr(leaf.factors, field) for leaf in self.leaves])

    def _refuse_others(self, leaves: Any) -> None:
        planned = {leaf.path: leaf for leaf in self.leaves}
        given = {jax.tree_util.keystr(path): tuple(jnp.shape(value)) for path, value in leaves}
        sizes = ", ".join(f"{k}={v}" for k, v in self.target)
        for path, shape in given.items():
            if path not in planned:
                raise ValueError(f"the plan for {sizes} has no leaf {path}. {nearest(path, planned)} Make a plan for this model.")
            if shape != planned[path].shape:
                raise ValueError(
                    f"leaf {path} has shape {shape}, and the plan for {sizes} was made for {planned[path].shape}: a plan holds at its "
                    "target only. Make one with target=... of this model's sizes."
                )
        missing = [path for path in planned if path not in given]
        if missing:
            raise ValueError(f"the plan for {sizes} has a leaf {missing[0]} that the parameters lack. Make a plan for this model.")

    # The model --------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The target network with the plan's initialization and multipliers.

        ``init(key, x)`` is the network's own, each leaf times its ``init_scale``; ``apply(params, x)`` is the network's own at
        ``multiplier * params``. Factors on activations are found again where the batch's dtype or shape makes another trace of it, and
        the batch is refused, when ``apply`` is called, where they are not.

        Raises
        ------
        ValueError
            If the plan has no network yet (it was read from JSON): call `bind`.
        """
        if self.network is None:
            raise ValueError("this plan has no network: it was read from a file. Give it one with plan.bind(family(**dict(plan.target))).")
        network = self.network

        def scale(field: str, params: Any) -> Any:
            factors = {leaf.path: getattr(leaf.factors, field) for leaf in self.leaves}
            factors |= {copy: factors[leaf] for copy, leaf in self.copies}
            self.factors(field, params)

            def scaled(path: Any, leaf: Any) -> Any:
                factor = factors.get(jax.tree_util.keystr(path), 1.0)
                return leaf if factor == 1.0 else leaf * jnp.asarray(factor, leaf.dtype)

            return jax.tree_util.tree_map_with_path(scaled, params)

        def init(key: Any, x: Any) -> Any:
            return scale("init_scale", network.init(key, x))

        inner = scaled(network.apply, self) if self.scalings else network.apply

        def apply(params: Any, x: Any) -> Any:
            return inner(scale("multiplier", params), x)

        return Model(init, apply)

    def bind(self, network: Any) -> "Plan":
        """The same plan with a network to apply it to."""
        return dataclasses.replace(self, network=as_model(network))

    # JSON -------------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON, without the network; `from_json` reads it.

        Raises
        ------
        TypeError
            If a size is neither a number, text, nor a tuple or a dict of such.
        """

        def refused(value: Any) -> Any:
            raise TypeError(
                f"a size of the plan is {value!r} (a {type(value).__name__}), which JSON cannot hold: sizes are numbers, texts, or tuples "
                "of them. What is no size stands in the family itself: pj.family(lambda width: net(width, activation))."
            )

        return self._json(refused)

    def _json(self, default: Any) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("network", "leaves", "scalings")}
        leaves = [{**dataclasses.asdict(leaf), "factors": leaf.factors._asdict()} for leaf in self.leaves]
        return json.dumps(
            {"format": FORMAT, **fields, "leaves": leaves, "scalings": [dataclasses.asdict(s) for s in self.scalings]},
            indent=1,
            default=default,
        )

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            If the text is no JSON, of another format, lacks a field, has one that no plan has, or a factor that is no finite number.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"this text is no plan: it is not JSON ({error}). Write one with plan.to_json().") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"this is no plan of format {FORMAT}: write it anew with plan.to_json().")
        _check_record(record, [f.name for f in dataclasses.fields(Plan) if f.name != "network"], "the plan")
        try:
            leaves = tuple(_leaf(leaf) for leaf in record.pop("leaves"))
            scalings = tuple(_scaling(s) for s in record.pop("scalings"))
            base, target, copies = (tuple((k, v) for k, v in record.pop(name)) for name in ("base", "target", "copies"))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a value of this plan has another form than plan.to_json() gives it: {error}. Write it anew.") from error
        return Plan(**record, base=base, target=target, leaves=leaves, scalings=scalings, copies=copies)

    # The optimizer ----------------------------------------------------------------------------------------------------

    def optimizer(self, factory: Any, learning_rate: Any, **settings: Any) -> Any:
        """An optax optimizer whose learning rate, eps and weight decay are the plan's for every leaf; see `planned_optimizer`."""
        return planned_optimizer(self, factory, learning_rate, **settings)

    def muon_dimension_numbers(self, params: Any) -> Any:
        """``optax.contrib.MuonDimensionNumbers`` for each hidden matrix, from the axes that the trace found; ``None`` for the other leaves.

        Axes that are neither contracted nor free (scanned layers, experts) are a batch of matrices.

        Parameters
        ----------
        params
            The target's parameters, or a tree of which some are left out (as optax's masks do).

        Raises
        ------
        ValueError
            If the plan was not made for Muon.
        """
        from optax import contrib

        if self.rule != "muon":
            raise ValueError(f"the plan was made for optimizer={self.rule!r}: make it with optimizer='muon'.")
        planned = {leaf.path: leaf for leaf in self.leaves}

        def numbers(path: Any, value: Any) -> Any:
            leaf = planned.get(jax.tree_util.keystr(path))
            return None if leaf is None or leaf.rule != "muon" else contrib.MuonDimensionNumbers(leaf.inside, leaf.out)

        return jax.tree_util.tree_map_with_path(numbers, params)

    # Printing ---------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return render(self)

    def __hash__(self) -> int:
        return int.from_bytes(hashlib.sha256(self._json(repr).encode()).digest()[:8], "big")


def _check_record(record: Any, names: Sequence[str], what: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{what} is {record!r}, not a record of its fields ({', '.join(names)}). Write it anew with plan.to_json().")
    missing, more = [n for n in names if n not in record], [n for n in record if n not in names]
    if missing:
        raise ValueError(f"{what} lacks the field {missing[0]!r}: the file was cut or edited. Write it anew with plan.to_json().")
    if more:
        raise ValueError(f"{what} has a field {more[0]!r} that no plan has. {nearest(more[0], names)} Write it anew with plan.to_json().")


def _leaf(record: Any) -> PlannedLeaf:
    _check_record(record, [f.name for f in dataclasses.fields(PlannedLeaf)], "a leaf of the plan")
    what = f"leaf {record['path']} of the plan"
    _check_record(record["factors"], Factors._fields, f"{what}: its factors")
    for name, value in record["factors"].items():
        _check_number(value, f"{what}: its {name}")
    tuples = {name: tuple(record[name]) for name in ("shape", "axes", "inside", "out", "stack")}
    return PlannedLeaf(**{**record, **tuples, "factors": Factors(**record["factors"])})


def _scaling(record: Any) -> Scaling:
    _check_record(record, [f.name for f in dataclasses.fields(Scaling)], "a factor of the plan on an activation")
    _check_number(record["factor"], "a factor of the plan on an activation")
    return Scaling(**{**record, "path": tuple(record["path"]), "leaves": tuple(map(tuple, record["leaves"]))})


def _check_number(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} is {value!r}, not a finite number of at least 0. Write the plan anew with plan.to_json().")


def _plain(value: Any) -> Any:
    """A size as Python's own numbers and tuples: what JSON holds, and what comes back from it equal."""
    if isinstance(value, np.ndarray | jax.Array):
        return _plain(value.tolist())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
