"""An Experiment: a family of networks, data, a loss, an optimizer and a grid; ``run()`` gives labelled arrays."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paperjax.binding import nearest
from paperjax.cell import FIELD_AXES, MEASURE_NAMES, cell_functions, is_dataset, takers
from paperjax.describe import describe
from paperjax.grid import Grid, grid
from paperjax.layout import Layout
from paperjax.losses import check_labels, resolve_loss
from paperjax.measures.collapse import check_classes
from paperjax.parametrization import Parametrization
from paperjax.sharding import AXES, Rule, tensor_parallel
from paperjax.train import measurement_steps, optimizer_factory

if TYPE_CHECKING:
    import xarray


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained, on what, how, and over which grid.

    Every callable gets the arguments that it names, and an axis of the grid reaches whoever names it. Axes that leave shapes
    alone (learning rate, seed, output scale, weight decay, ...) run as one compiled program; the others (width, depth, batch,
    names) are looped over. Nobody says which is which: an axis with which the program can be traced is of the first kind.

    Attributes
    ----------
    family
        Callable from named sizes to a network; `paperjax.family`, or any callable that it would take. It may also name
        `key`, for fixed randomness of the network.
    data
        A `Dataset`, or a callable that names axes, `key`, or both, and returns one; it is traced, so it must be JAX code.
    loss
        ``"mse"``, ``"cross_entropy"``, ``"logistic"``, or ``loss(f, y, ...)`` naming axes after the first two.
    optimizer
        A name in optax, a factory called with ``learning_rate`` (the axis `lr`) and every other axis that it names, or an
        ``optax.GradientTransformation``.
    grid
        The axes; see `paperjax.grid`.
    parametrization, base
        A `Parametrization` (``pj.mup``) and the sizes of the network that it starts from, ``dict(width=64)``: every network of the grid
        is trained under its `paperjax.plan`. Without one a network is trained as it is. The parametrization may be an axis.
    steps
        Number of updates, up to the last measurement: what comes after it would leave no trace, and is not run.
    batch
        Minibatch size, without replacement; ``None`` is the full batch. May be an axis.
    measure_at
        Number of evenly spaced measurement steps (both ends counted), ``"log"``, or the steps.
    measures
        Functions that name any of ``model, params, data, params0, step, loss, key`` and axes, and return an array.
        ``train_loss`` (on all training examples) is always there.
    max_bytes
        Memory budget of the cells that run together; by default half of what the device has.
    layout
        A `Layout`, to overrule the one chosen.
    mesh
        From `paperjax.mesh`: the cells of the grid go over ``sweep``, the examples of a batch over ``data``, and parameters over ``model``
        as `sharding` says (`fully_sharded` takes ``data`` and ``model`` for one axis, batches and all). Without one, cells go over all
        devices. Of a full batch each device holds its own examples; minibatches are drawn from all, which then lie on every device.
    sharding
        A rule from what a leaf's axes are for to where they lie: `paperjax.sharding.tensor_parallel`, `paperjax.sharding.fully_sharded`,
        or a function like them. The optimizer's state follows its leaf.
    checkpoint
        Folder for checkpoints, or a bucket's URL (``gs://bucket/run``); running again with the same goes on where it stopped, bit for bit.
        Of several processes, all must see it.
    save_every
        Seconds between checkpoints. A cell that is done is always saved.

    Notes
    -----
    The numbers are those of `paperjax.train.train`: equal in the last bit when a run is resumed; equal to float tolerance
    (relative 1e-5 in float32 over short trainings) however cells are laid out, chunked or swept with others. Meshes of
    ``sweep`` alone, ``pj.mesh()`` of one device among them, give the same bits where as many cells run together (`layout`); sums over
    ``data`` and ``model`` are added up in another order, to that tolerance. A checkpoint goes on under any mesh.
    A step gives its state's memory to the next. Activations are kept for the way back unless the network has layers under
    `jax.checkpoint` (Flax's ``nn.remat``), which either rule leaves as they are.

    Examples
    --------
    >>> import optax, paperjax as pj
    >>> exp = pj.Experiment(
    ...     lambda width: pj.models.mlp(width, depth=1, outputs=10), pj.data.one_hot(pj.data.digits()), loss="mse", optimizer=optax.sgd,
    ...     grid=pj.grid(width=[4, 8], lr=[0.1, 0.2], seed=2), steps=2, measure_at=[0, 2])
    >>> dict(exp.run().train_loss.sizes)
    {'width': 2, 'lr': 2, 'seed': 2, 'step': 2}
    """

    family: Any
    data: Any
    _: dataclasses.KW_ONLY
    loss: str | Callable[..., Any] = "mse"
    optimizer: Any = "sgd"
    grid: Grid = dataclasses.field(default_factory=grid)
    parametrization: Parametrization | None = None
    base: Mapping[str, Any] | None = None
    steps: int = 100
    batch: int | None = None
    measure_at: int | str | Sequence[int] = 11
    measures: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    max_bytes: int | None = None
    layout: Layout | None = None
    mesh: Mesh | None = None
    sharding: Rule = tensor_parallel
    checkpoint: str | Path | None = None
    save_every: float = 30.0

    def run(self, progress: bool | None = None, verbose: bool = False, title: str = "", axes: "Axes | None" = None) -> "xarray.Dataset":
        """Train every cell of the grid.

        Parameters
        ----------
        progress
            Show a progress bar with the time left; by default only on a terminal.
        verbose
            Print the kind of every axis and the layout of every program.
        title
            What the progress bar calls the run.
        axes
            What `check` gave, where it was called already; it is called here by default.

        Returns
        -------
        xarray.Dataset
            Dimensions are the grid's axes in order, then ``step``. Variables are ``train_loss``, the measures, and
            ``diverged_at`` (the step at which the loss was first not finite; NaN if it never was).

        Raises
        ------
        ValueError, TypeError
            If a part does not fit the others; found before anything is trained.
        KeyboardInterrupt
            After Ctrl-C, with the state saved if there is a `checkpoint`; the message says how to go on. After SIGTERM too, as
            `paperjax.interrupts.Preempted`, if there is one.
        ProcessLost
            If another process of the run has died.
        """
        from paperjax.driver import drive

        return drive(self, progress, verbose, title, axes)

    @property
    def points(self) -> tuple[int, ...]:
        """The measurement steps."""
        return measurement_steps(self.measure_at, self.steps)

    def describe(self) -> dict[str, str]:
        """Every field as a stable text, for the record and for telling whether two Experiments are the same."""
        shown = {"mesh": None if self.mesh is None else dict(self.mesh.shape)}
        return {f.name: describe(shown[f.name] if f.name in shown else getattr(self, f.name)) for f in dataclasses.fields(self)}

    def replace(self, **fields: Any) -> "Experiment":
        """The same Experiment with some fields changed.

        Raises
        ------
        TypeError
            If a name is no field.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in fields:
            if name not in known:
                raise TypeError(f"Experiment has no field {name!r}. {nearest(name, known)}")
        return dataclasses.replace(self, **fields)

    def check(self) -> "Axes":
        """Refuse what cannot run, with the reason, and tell the kinds of the axes; nothing is trained or allocated.

        Raises
        ------
        ValueError, TypeError
            Naming the field, axis or leaf at fault.
        """
        self._check_fields()
        static = self._first_values()
        try:
            shapes = self._trace(static, {})
        except ZeroDivisionError as error:
            raise ValueError(f"the network cannot be built at {_sizes(static)}: a size is 0, or becomes 0 when divided.") from error
        self._check_labels(static, shapes)
        self._check_names(shapes)
        # Every value of an axis that may change shapes is tried, so that the last width does not fail an hour later.
        kinds = self._axis_kinds(static)
        for combination in kinds.combinations(self.grid)[1:]:
            here = {**self.grid.fixed, **combination}
            found = self._trace(here, {name: self.grid.axes[name][0] for name in kinds.scalar})
            self._check_labels(here, found)
            for name in self.measures:
                if found[name].shape != shapes[name].shape:
                    raise ValueError(
                        f"measure {name!r} has shape {found[name].shape} at {_sizes(here)} and {shapes[name].shape} at {_sizes(static)}: a "
                        "measure must have one shape over the whole grid. Reduce it (mean, norm), or run one Experiment per size."
                    )
        self._check_seeds(kinds)
        return kinds

    def _check_fields(self) -> None:
        resolve_loss(self.loss)
        optimizer_factory(self.optimizer)
        _ = self.points
        if not isinstance(self.grid, Grid):
            raise TypeError(f"grid must be made by pj.grid(...), not {type(self.grid).__name__}.")
        if not callable(self.family):
            raise TypeError(f"family must be a callable from sizes to a network, not {self.family!r}. For one network: lambda: network.")
        if not (is_dataset(self.data) or callable(self.data)):
            raise TypeError(f"data must be a Dataset or a callable that returns one, not a {type(self.data).__name__}.")
        if self.max_bytes is not None and not (_is_number(self.max_bytes) and 1 <= self.max_bytes < float("inf")):
            raise ValueError(f"max_bytes = {self.max_bytes!r}: give a positive number of bytes, or None for half of the memory.")
        if not (_is_number(self.save_every) and self.save_every >= 0):
            raise ValueError(f"save_every = {self.save_every!r}: give the seconds between checkpoints, 0 for one after every call.")
        if self.layout is not None and not isinstance(self.layout, Layout):
            raise TypeError(f"layout must be a pj.Layout(lanes, map, vmap) or None, not {self.layout!r}.")
        if self.mesh is not None and not (isinstance(self.mesh, Mesh) and tuple(self.mesh.axis_names) == AXES):
            raise TypeError(f"mesh must be one made by pj.mesh(sweep=, data=, model=), or None, not {self.mesh!r}.")
        if not callable(self.sharding):
            raise TypeError(f"sharding must be a rule such as pj.sharding.tensor_parallel, not {self.sharding!r}.")
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, Path)):
            raise TypeError(f"checkpoint must be the name of a folder or None, not {self.checkpoint!r}.")
        if not isinstance(self.measures, Mapping):
            raise TypeError(
                f"measures must be a dict of functions by name, dict(error=pj.measures.error), not a {type(self.measures).__name__}."
            )
        schemes = self.grid.values("parametrization") if "parametrization" in self.grid.names else (self.parametrization,)
        for scheme in schemes:
            if scheme is not None and not isinstance(scheme, Parametrization):
                raise TypeError(f"parametrization must be one such as pj.mup, or None, not {scheme!r}.")
        if self.base is not None and not isinstance(self.base, Mapping):
            raise TypeError(f"base must be a dict of sizes, dict(width=64), not {self.base!r}.")
        if (self.base is not None) == all(scheme is None for scheme in schemes):
            raise ValueError(
                "a parametrization is relative to a base: give both, parametrization=pj.mup, base=dict(width=64), or neither. "
                f"Here parametrization = {describe(self.parametrization)} and base = {self.base!r}."
            )
        for batch in self.grid.values("batch") if "batch" in self.grid.names else (self.batch,):
            if batch is not None and (isinstance(batch, bool) or not isinstance(batch, (int, np.integer))):
                raise TypeError(f"batch = {batch!r}: give a whole number of examples, or None for full batches.")
        for seed in self.grid.values("seed") if "seed" in self.grid.names else ():
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
                raise ValueError(f"seed = {seed!r}: a seed is a whole number from 0 to 2^31 - 1.")
        reserved = {"step", "diverged_at", "train_loss", *self.grid.names}
        for name, measure in self.measures.items():
            if not callable(measure):
                raise TypeError(f"measure {name!r} is a {type(measure).__name__}, not a function.")
            if "/" in name:
                raise ValueError(f"a measure cannot be called {name!r}: a netCDF file has no name with a slash.")
            if name in reserved:
                raise ValueError(f"a measure cannot be called {name!r}: the Result uses that name for itself or for an axis.")
        if {"lr", "learning_rate"} <= set(self.grid.names):
            raise ValueError("the grid has both lr and learning_rate, two names of one thing: keep one of them.")
        known = takers(self)
        for name in self.grid.names:
            if name in MEASURE_NAMES and name not in FIELD_AXES:
                raise ValueError(f"an axis cannot be called {name!r}: measures get something else by that name.")
            if name == "steps":
                raise ValueError("steps cannot be an axis: run the longest, and read earlier steps off the Result (measure_at).")
            if name not in known:
                hint = "The optimizer is already built; pass its factory (optax.sgd) instead. " if name in ("lr", "learning_rate") else ""
                raise ValueError(
                    f"axis {name!r} is taken by nothing: it is no size of the family, no argument of data, loss, "
                    "optimizer or a measure, and no "
                    f"field that can be swept. {hint}{nearest(name, known)}"
                )
        for data in self.grid.values("data") if "data" in self.grid.names else (self.data,):
            if is_dataset(data):
                _check_finite(data)

    def _first_values(self) -> dict[str, Any]:
        return {name: self.grid.values(name)[0] for name in self.grid.names}

    def _trace(self, static: Mapping[str, Any], traced: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        data = static.get("data", self.data)
        axes = {name: scalar_like(value) for name, value in traced.items()}
        return jax.eval_shape(self._all_of_it(static), axes, data if is_dataset(data) else None)

    def _all_of_it(self, static: Mapping[str, Any]) -> Callable[..., Any]:
        # The outputs are measured too, to know their shape; measures are given no parts by this name.
        outputs = {"_outputs": lambda model, params, data: model.apply(params, data.x_train)}
        functions = cell_functions(self.replace(measures={**self.measures, **outputs}), static)

        def all_of_it(axes: Any, shared: Any) -> Any:
            state, constants = functions.setup(axes, shared)
            state = functions.advance(axes, state, constants, shared, 0, 1)
            return functions.measure(axes, state, constants, shared, jnp.int32(0))

        return all_of_it

    def _check_labels(self, static: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        data, loss = static.get("data", self.data), resolve_loss(static.get("loss", self.loss))
        if is_dataset(data):
            for name in ("y_train", "y_test"):
                check_labels(loss, np.asarray(getattr(data, name)), shapes["_outputs"].shape, f"the labels {name}")
            check_classes(self.measures, np.asarray(data.y_train), shapes["_outputs"].shape[-1])

    def _check_names(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        taken = {*self.measures, *self.grid.names}
        for name in self.measures:
            for i in range(len(shapes[name].shape)):
                if f"{name}_{i}" in taken:
                    raise ValueError(
                        f"axis {i} of measure {name!r} is called {name}_{i} in the Result, as a measure or axis is: rename it."
                    )

    def _axis_kinds(self, first: Mapping[str, Any]) -> "Axes":
        numbers = [n for n, vs in self.grid.axes.items() if n not in FIELD_AXES and all(_is_number(v) for v in vs)]
        static: dict[str, str] = {n: "its values are not numbers" for n in self.grid.axes if n not in numbers and n not in FIELD_AXES}
        static |= {n: f"a field of the Experiment ({n})" for n in self.grid.axes if n in FIELD_AXES}

        def reason(names: Sequence[str]) -> str | None:
            rest = {name: value for name, value in first.items() if name not in names}
            try:
                self._trace(rest, {name: first[name] for name in names})
            except Exception as error:  # noqa: BLE001 Concrete values passed, so what fails is the tracing; the reason is kept and shown.
                return f"its value sets a shape or is used by Python ({type(error).__name__} when traced)"
            return None

        if reason(numbers) is not None:
            static |= {name: why for name in numbers if (why := reason([name])) is not None}
        return Axes(tuple(n for n in numbers if n not in static), static)

    def _check_seeds(self, kinds: "Axes") -> None:
        if len(self.grid.axes.get("seed", ())) < 2 or "seed" not in kinds.scalar:
            return
        static = {n: v for n, v in self._first_values().items() if n != "seed"}
        everything, data = self._all_of_it(static), static.get("data", self.data)
        traced = jax.make_jaxpr(lambda seed: everything({"seed": seed}, data if is_dataset(data) else None))(scalar_like(0))
        if not _reaches_output(traced.jaxpr):
            raise ValueError(
                "the seeds change nothing: the network's init does not use its key, the data are fixed and batches "
                "are full, so every seed is the "
                "same run and its standard error would be 0. A Flax nnx or Equinox instance has its numbers already: give a constructor "
                "(lambda rngs: ..., lambda key: ...), or drop the seed axis."
            )


@dataclasses.dataclass(frozen=True)
class Axes:
    """The kinds of a grid's axes: `scalar` names run in one program; `static` maps the looped names to the reason why."""

    scalar: tuple[str, ...]
    static: Mapping[str, str]

    def combinations(self, grid: Grid) -> list[dict[str, Any]]:
        """Every combination of the looped axes, the last varying fastest."""
        names = [name for name in grid.axes if name in self.static]
        return [dict(zip(names, values)) for values in itertools.product(*(grid.axes[name] for name in names))]

    def cells(self, grid: Grid) -> dict[str, np.ndarray]:
        """Every combination of the scalar axes as flat arrays, the last varying fastest."""
        values = [np.asarray([scalar_array(v) for v in grid.axes[name]]) for name in self.scalar]
        mesh = np.meshgrid(*values, indexing="ij") if values else []
        return {name: m.reshape(-1) for name, m in zip(self.scalar, mesh)}


def scalar_array(value: Any) -> np.ndarray:
    """A number of the grid as the compiled program gets it: int32, or the default float type of JAX."""
    return np.asarray(value, jnp.result_type(int) if isinstance(value, int) else jnp.result_type(float))


def scalar_like(value: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `scalar_array`."""
    return jax.ShapeDtypeStruct((), scalar_array(value).dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_finite(data: Any) -> None:
    for name in ("x_train", "y_train", "x_test", "y_test"):
        value = np.asarray(getattr(data, name))
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            bad = np.argwhere(~np.isfinite(value))[0]
            raise ValueError(
                f"Dataset {getattr(data, 'name', '')}: {name}{bad.tolist()} is not finite. Training on it would give "
                "NaN: clean the data first."
            )


def _sizes(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _reaches_output(jaxpr: Any) -> bool:
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(isinstance(v, jax.extend.core.Var) and v in reached for v in eqn.invars):
            reached |= set(eqn.outvars)
    return any(isinstance(v, jax.extend.core.Var) and v in reached for v in jaxpr.outvars)
