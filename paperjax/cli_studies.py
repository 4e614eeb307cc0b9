"""The command line's studies of a family in a user's own file: ``paperjax coord-check path.py:family`` and ``paperjax transfer``."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from paperjax.binding import argument_names, nearest
from paperjax.cli_family import SCHEMES, Where, family_of, load_file, pairs, refuse_sizes, scheme_of
from paperjax.model import Family, check_model
from paperjax.parametrization import Parametrization
from paperjax.report import save_figure, save_results
from paperjax.runner import prepare_folder
from paperjax.studies import CoordCheck, EdgeError, Transfer, coord_check, transfer

# Inputs that are drawn where the file has none, and the size of drawn targets: under SGD a change is proportional to the residual,
# which must not depend on the width as the outputs at the start do.
EXAMPLES, TARGETS = 32, 10.0
WIDTHS = (64, 128, 256, 512)


def _texts(hint: str, metavar: str = "NAME=VALUE ...") -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {hint})")


@dataclasses.dataclass(frozen=True)
class Study:
    """What the studies share."""

    where: Where
    """The file and the name of the family in it: a `paperjax.family(fn, x=batch)`."""
    parametrization: Annotated[str, tyro.conf.arg(metavar="|".join([*(n.replace("_", "-") for n in SCHEMES), "none"]))] = "mup"
    """Which parametrization; the name of one of your own in the file; or none, for the family as it is."""
    widths: Annotated[tuple[int, ...], _texts(" ".join(map(str, WIDTHS)), "N ...")] = ()
    """Values of the size `width`; the first is the base."""
    depths: Annotated[tuple[int, ...], _texts("widths vary", "N ...")] = ()
    """Values of the size `depth`, in place of widths."""
    sizes: Annotated[tuple[str, ...], _texts("from the file's base")] = ()
    """Sizes that stay the same, such as depth=4."""
    base: Annotated[tuple[str, ...], _texts("the smallest")] = ()
    """Sizes of the network that was tuned, where it is not the smallest one."""
    data: Annotated[str | None, _texts("data, else x and y", "NAME")] = None
    """Name in the file of a Dataset or a pair (x, y). By default its `data`, else its `x` and `y`."""
    loss: Literal["mse", "cross_entropy", "logistic"] = "mse"
    """mse takes targets of the shape of the output, cross_entropy integer classes."""
    optimizer: str = "adam"
    """A name in optax, such as adam or sgd."""
    out: Annotated[Path | None, _texts("paperjax-runs/STUDY-FAMILY-PARAMETRIZATION", "DIR")] = None
    """Where figure.png, figure.svg, table.csv and result.nc go."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class CoordCheckCommand(Study):
    """Check that every activation of a family in a file of yours moves alike at every width (or depth), as muP asks.

    Networks of several widths are trained for a few steps. Without y, targets are random, N(0, 100) in the shape of the output; without x,
    so are 32 inputs, N(0, 1) in the shape of the family's batch. Exits with 1 if the change of any stream, preactivation or output grows
    or vanishes with the width, or is undecided.
    """

    steps: int = 3
    """Updates."""
    learning_rate: float = 1e-3
    """At the base; small, for what is expected is the linear response."""
    seeds: int = 8
    """How many initializations."""
    batch: int = 32
    """The first so many examples are the batch of every step."""


@dataclasses.dataclass(frozen=True)
class TransferCommand(Study):
    """Find how far the best learning rate of a family in a file of yours moves with the width (or depth), on the data in that file.

    Exits with 2 if the best of some width is the first or last of the grid.
    """

    steps: int = 100
    """Updates."""
    learning_rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="RATE ...")] = tuple(2.0**-k for k in range(12, 2, -1))
    """At the base; at least four, evenly spaced in their logarithm."""
    seeds: int = 4
    """How many initializations."""
    batch: Annotated[int | None, _texts("all examples", "N")] = None
    """Minibatch size."""


class Asked(NamedTuple):
    """A study's command line, looked up in the file: what `coord_check` and `transfer` share."""

    family: Family
    scheme: Parametrization | None
    data: Any
    widths: tuple[int, ...] | None
    depths: tuple[int, ...] | None
    base: dict[str, Any] | None
    sizes: dict[str, Any]


def run_coord_check(command: CoordCheckCommand, runs: Path) -> tuple[CoordCheck, list[Path]]:
    """`paperjax coord-check`: the check, and the files it has left."""
    asked, folder = look_up(command), _folder(command, "coord-check", runs)
    found = coord_check(
        asked.family, asked.scheme, asked.data, asked.widths, asked.depths, command.optimizer, command.steps, command.learning_rate,
        command.seeds, None, command.loss, asked.base, command.batch, **asked.sizes,
    )  # fmt: skip
    files = [save_results({"coordinates": found.data}, folder / "result.nc"), write_table(found.table(), folder)]
    return found, [*save_figure(found.plot(), folder), *files]


def run_transfer(command: TransferCommand, runs: Path) -> tuple[Transfer, list[Path]]:
    """`paperjax transfer`: the optima, and the files it has left; the losses are left too where an optimum is on the grid's edge."""
    asked, folder = look_up(command), _folder(command, "transfer", runs)
    try:
        found = transfer(
            asked.family, asked.scheme, asked.data, asked.widths, asked.depths, command.learning_rates, command.seeds, command.steps,
            command.optimizer, command.loss, command.batch, asked.base, **asked.sizes,
        )  # fmt: skip
    except EdgeError as error:
        error.add_note(f"The losses are in {save_results({'transfer': error.result}, folder / 'result.nc')}.")
        raise
    files = [save_results({"transfer": found.result}, folder / "result.nc"), write_table(found.table(), folder)]
    return found, [*save_figure(found.plot(), folder), *files]


def look_up(command: Study) -> Asked:
    """Read the family, its parametrization, its data and its sizes from the file."""
    file = load_file(command.where)
    family = family_of(file, command.where)
    scheme = None if command.parametrization == "none" else scheme_of(file, command.parametrization)
    if command.widths and command.depths:
        raise ValueError("--widths and --depths are both given: the networks differ in one size. Give the other as --sizes depth=4.")
    widths, depths = (None, command.depths) if command.depths else (command.widths or WIDTHS, None)
    axis, smallest = ("width", min(widths)) if widths else ("depth", min(command.depths))
    if axis not in family.sizes:
        raise ValueError(
            f"{command.where}: the family takes no size {axis!r}; it takes {', '.join(family.sizes) or 'none'}. "
            f"Rename its argument, or vary the other size: {'--depths' if widths else '--widths'}."
        )
    own = getattr(file, "base", None)
    fixed = {name: own[name] for name in family.sizes if name in own and name != axis} if isinstance(own, dict) else {}
    sizes = {**fixed, **pairs("sizes", command.sizes)}
    missing = [name for name in argument_names(family.make)[0] if name not in (axis, "rngs", *sizes)]
    if missing:
        raise ValueError(
            f"{command.where}: the family needs {', '.join(missing)} too: give --sizes {' '.join(f'{name}=...' for name in missing)}, or "
            f"write base = dict({', '.join(f'{name}=...' for name in missing)}) in the file."
        )
    refuse_sizes(family, *({axis: size, **sizes} for size in widths or command.depths))
    data = data_of(file, command, family, {axis: smallest, **sizes})
    return Asked(family, scheme, data, widths, depths, pairs("base", command.base) or None, sizes)


def data_of(file: Any, command: Study, family: Family, sizes: dict[str, Any]) -> Any:
    """The examples that a study trains on: the file's, or random ones in the shapes of the family's batch and output."""
    name = command.data or "data"
    if hasattr(file, name):
        return getattr(file, name)
    if command.data is not None:
        raise ValueError(
            f"--data {name}: the file has none of that name. {nearest(name, [n for n in vars(file) if not n.startswith('_')])}"
        )
    key_x, key_y = jax.random.split(jax.random.key(0))
    x, y = getattr(file, "x", None), getattr(file, "y", None)
    if y is None and (isinstance(command, TransferCommand) or command.loss != "mse"):
        needs = "transfer" if isinstance(command, TransferCommand) else f"--loss {command.loss}"
        raise ValueError(f"{command.where}: {needs} needs something to learn: write x = ... and y = ... in the file, or data = (x, y).")
    if x is None:
        assert family.x is not None
        if y is not None or not jnp.issubdtype(family.x.dtype, jnp.floating):
            what = "targets y" if y is not None else "integers (tokens, it seems)"
            raise ValueError(f"{command.where}: {what} need their inputs: write x = ... beside the family, or data = (x, y).")
        x = jax.random.normal(key_x, (EXAMPLES, *family.x.shape[1:]), family.x.dtype)
    if y is None:
        output = check_model(family(**sizes), x)[1]
        y = TARGETS * jax.random.normal(key_y, output.shape, output.dtype)
    return x, y


def write_table(rows: Sequence[Any], folder: Path) -> Path:
    """``table.csv``: NamedTuples under the names of their fields."""
    path = folder / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)
    return path


def _folder(command: Study, study: str, runs: Path) -> Path:
    name = "-".join((study, command.where.rpartition(":")[2], command.parametrization.replace("_", "-")))
    return prepare_folder(command.out or runs / name)
