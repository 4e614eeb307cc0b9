"""Fields of the Experiments as flags of the command line: ``--steps 50 --optimizer adam --grid lr=0.1,0.2 seed=4``."""

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from paperjax.binding import nearest
from paperjax.experiment import Experiment
from paperjax.layout import Layout
from paperjax.result import label
from paperjax.sharding import parse_mesh

# How a field is written on the command line, and its help. Every field of an Experiment is here or in CODE, which is the
# business of the paper's file.
FLAGS: dict[str, tuple[Any, str, str]] = {
    "loss": (str, "NAME", "mse, cross_entropy or logistic."),
    "optimizer": (str, "NAME", "An optimizer's name in optax, such as sgd or adam."),
    "grid": (
        tuple[str, ...],
        "AXIS=V,V,...",
        "Other values for axes of the paper: lr=0.1,0.2. seed=4 is the seeds 0 to 3; seed=3,7 is the seeds 3 and 7.",
    ),
    "steps": (int, "INT", "Number of updates."),
    "batch": (int | Literal["full"], "INT|full", "Examples in a minibatch, or all of them."),
    "measure_at": (str, "INT|log|STEP,STEP,...", "How many evenly spaced measurements; log; or the steps, such as 0,10,100."),
    "max_bytes": (int, "BYTES", "Memory budget of the cells that run together."),
    "layout": (
        tuple[int, int, int],
        "LANES MAP VMAP",
        "Devices, groups one after another, cells together; --verbose shows the layout that is chosen.",
    ),
    "mesh": (str, "sweep=N", "Spread the cells over so many devices; -1 is all of them."),
    "checkpoint": (str, "DIR", "Save the state in DIR/<experiment>, and go on from what is saved there."),
    "save_every": (float, "SECONDS", "Time between checkpoints."),
}
CODE = ("family", "data", "measures", "parametrization", "base")
# These change how fast and where a run is computed, not what it is.
HOW = ("max_bytes", "layout", "mesh", "checkpoint", "save_every")


def flags() -> type:
    """A dataclass with a field for each flag, ``None`` where nothing is overruled."""
    import tyro

    fields = []
    for name, (kind, metavar, text) in FLAGS.items():
        config = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="(default: the paper's)")
        fields.append((name, Annotated[kind | None, config], dataclasses.field(default=None)))
    return dataclasses.make_dataclass("ExperimentFields", fields, frozen=True)


def chosen(values: Any) -> dict[str, Any]:
    """The flags that were given, from an instance of `flags`."""
    found = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    return {name: value for name, value in found.items() if value is not None}


def command_line(given: Mapping[str, Any]) -> list[str]:
    """The flags that make a run another one, as they are typed, one string each; for the record and for running it again.

    Examples
    --------
    >>> command_line(dict(steps=5, save_every=1.0, grid=("lr=0.1,0.2", "seed=4")))
    ['--steps 5', '--grid lr=0.1,0.2 seed=4']
    """
    lines = []
    for name, value in given.items():
        if name in HOW:
            continue
        parts = value if isinstance(value, tuple) else (value,)
        lines.append(" ".join([f"--{name.replace('_', '-')}", *(shlex.quote(str(part)) for part in parts)]))
    return lines


def apply(experiments: Mapping[str, Experiment], given: Mapping[str, Any]) -> dict[str, Experiment]:
    """The Experiments with the given flags in place; an axis is replaced in every Experiment that has it.

    Raises
    ------
    ValueError
        If a flag cannot be read, or no Experiment has the axis.

    Examples
    --------
    >>> from paperjax.grid import grid
    >>> e = Experiment(lambda width: None, lambda key: None, grid=grid(width=[64, 128], lr=[0.1], seed=8))
    >>> apply(dict(digits=e), dict(steps=5, grid=("lr=1,2", "seed=2")))["digits"].grid.axes
    {'width': (64, 128), 'lr': (1.0, 2.0), 'seed': (0, 1)}
    """
    fields = {name: value for name, value in given.items() if name not in ("grid", "checkpoint")}
    if "batch" in fields:
        fields["batch"] = None if fields["batch"] == "full" else fields["batch"]
    if "layout" in fields:
        fields["layout"] = Layout(*fields["layout"])
    if "mesh" in fields:
        fields["mesh"] = parse_mesh(fields["mesh"])
    if "measure_at" in fields:
        fields["measure_at"] = _measure_at(fields["measure_at"])
    axes = _axes(given.get("grid", ()))
    there = {name for experiment in experiments.values() for name in experiment.grid.names}
    for name in axes:
        if name not in there:
            raise ValueError(f"--grid {name}=...: no experiment of this paper has the axis {name!r}. {nearest(name, there)}")
    changed = {}
    for key, experiment in experiments.items():
        own = {name: _values(name, text, experiment) for name, text in axes.items() if name in experiment.grid.names}
        where = {"checkpoint": os.path.join(given["checkpoint"], key)} if "checkpoint" in given else {}
        changed[key] = experiment.replace(**fields, **where, **({"grid": experiment.grid.replace(**own)} if own else {}))
    return changed


def _axes(texts: Sequence[str]) -> dict[str, str]:
    axes: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (name and equals and values.strip(",")):
            raise ValueError(f"--grid {text}: write the axis, '=' and its values with commas, such as lr=0.1,0.2 or seed=4.")
        if name in axes:
            raise ValueError(f"--grid gives the axis {name!r} twice.")
        axes[name] = values
    return axes


def _values(name: str, text: str, experiment: Experiment) -> Any:
    old = experiment.grid.values(name)
    labels = {str(label(value)): value for value in old}
    several = "," in text
    parts = [part for part in text.split(",") if part]
    if name == "seed" and not several:
        if not re.fullmatch(r"\d+", text):
            raise ValueError(f"--grid seed={text}: give the number of seeds, or the seeds with commas.")
        return int(text)
    values = [labels[part] if part in labels else _value(name, part, old, list(labels)) for part in parts]
    # What the paper has as an axis stays one, since its claims reduce over it; a fixed value stays fixed if one is given.
    return values if several or name in experiment.grid.axes else values[0]


def _value(name: str, part: str, old: Sequence[Any], labels: list[str]) -> Any:
    if all(isinstance(value, str) for value in old):
        return part
    if all(isinstance(value, (bool, int, float)) for value in old):
        if all(isinstance(value, bool) for value in old) and part.lower() in ("true", "false"):
            return part.lower() == "true"
        try:
            number = float(part)
        except ValueError as error:
            raise ValueError(f"--grid {name}={part}: {part!r} is not a number, and the axis has numbers such as {old[0]}.") from error
        # An axis of whole numbers stays one: widths are integers. An axis with a fraction in it stays floating point.
        return int(number) if number.is_integer() and all(isinstance(value, int) for value in old) else number
    raise ValueError(f"--grid {name}={part}: this axis has values that cannot be written here. Choose among: {', '.join(labels)}.")


def _measure_at(text: str) -> Any:
    if text == "log":
        return text
    if not re.fullmatch(r"\d+(,\d+)*,?", text):
        raise ValueError(f"--measure-at {text}: write how many measurements, 'log', or the steps with commas (0,10,100).")
    numbers = [int(part) for part in text.split(",") if part]
    return numbers if "," in text else numbers[0]
