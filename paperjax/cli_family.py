"""The command line for a family in a user's own file: ``paperjax plan path.py:family``."""

import ast
import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from paperjax.binding import nearest
from paperjax.model import Family, batch_form, family
from paperjax.parametrization import Parametrization, Plan, plan, tables
from paperjax.trace.probe import refuse_unbuildable

SCHEMES: dict[str, Parametrization] = {name: value for name, value in vars(tables).items() if isinstance(value, Parametrization)}
Where = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH.py:NAME")]
Sizes = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint="(default: the file's own)")]


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Print the plan of a parametrization for a family in a file of yours: init, multiplier, learning rate, eps, decay of every leaf.

    The file's NAME is a `paperjax.family(fn, x=batch)`. Sizes come from --base and --target, or from dicts `base` and `target` in the file.
    """

    where: Where
    """The file and the name of the family in it."""
    parametrization: Annotated[str, tyro.conf.arg(metavar="|".join(n.replace("_", "-") for n in SCHEMES))] = "mup"
    """Which parametrization; or the name of one of your own in the file."""
    base: Sizes = ()
    """Sizes of the network that was tuned, such as width=64 depth=4."""
    target: Sizes = ()
    """Sizes of the network that is wanted."""
    optimizer: str = "adam"
    """A name in optax; its family (SGD, Adam-like) decides the learning rates."""
    weight_decay: Literal["coupled", "independent"] = "coupled"
    """Whether the optimizer multiplies the decay by the learning rate."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: not written)")] = None
    """Write the plan as JSON too."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show tracebacks."""


def show_plan(command: PlanCommand) -> Plan:
    """`paperjax plan`: the plan that the command line asks for, written as JSON where it says so."""
    file = load_file(command.where)
    base, target = sizes_of(file, "base", command.base), sizes_of(file, "target", command.target)
    fam, scheme = family_of(file, command.where), scheme_of(file, command.parametrization)
    try:
        found = plan(fam, scheme, base, target, command.optimizer, weight_decay=command.weight_decay)
    except Exception:
        # Tried only now, for tracing a large network takes time: the family's own errors do not say at which sizes they were raised.
        refuse_sizes(fam, base, target)
        raise
    if command.json is not None:
        try:
            command.json.write_text(found.to_json())
        except OSError as error:
            raise OSError(f"--json {command.json}: cannot be written ({error.strerror}). Name a file in a folder that is there.") from error
    return found


def load_file(where: str) -> Any:
    """The module of a user's file, from ``path.py:name``.

    Raises
    ------
    ValueError
        If the text has no name, the file is not there, or running it raises.
    """
    path, colon, name = where.rpartition(":")
    if not colon or not name:
        raise ValueError(f"{where!r} names no family: write PATH.py:NAME, such as models.py:family.")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}: write PATH.py:NAME, such as models.py:family.")
    # A name that no module has: the file may be called jax.py.
    spec = importlib.util.spec_from_file_location(f"users_file_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, and so Flax and Equinox modules, look their module up by name while it runs.
    sys.modules[spec.name] = module
    # The file's neighbours can be imported from it, as when it is run as a script.
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = next((f" (line {f.lineno})" for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == spec.origin), "")
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}{line}.") from error
    finally:
        sys.path.pop(0)
    return module


def family_of(file: Any, where: str) -> Family:
    """The family of that name in the file; a bare callable takes its batch from the file's `x`."""
    name = where.rpartition(":")[2]
    if not hasattr(file, name):
        raise ValueError(f"{where}: the file has no {name!r}. {nearest(name, [n for n in vars(file) if not n.startswith('_')])}")
    found = getattr(file, name)
    if isinstance(found, Family) and found.x is not None:
        return found
    if not hasattr(file, "x"):
        raise ValueError(f"{where}: the family has no example batch. Write {name} = pj.family(fn, x=batch), or an x = batch beside it.")
    x = batch_form(file.x, f"{where}: x")
    return Family(found.make, x) if isinstance(found, Family) else family(found, x)


def refuse_sizes(fam: Family, *all_sizes: Mapping[str, Any]) -> None:
    """Refuse the first of several sizes that the family cannot be built at, unless it is their names that are wrong."""
    for sizes in all_sizes:
        if set(sizes) <= set(fam.sizes):
            refuse_unbuildable(fam, sizes, fam.x)


def scheme_of(file: Any, name: str) -> Parametrization:
    """A parametrization by its name in PaperJAX, or in the user's file."""
    known = name.replace("-", "_")
    if known in SCHEMES:
        return SCHEMES[known]
    own = getattr(file, name, None)
    if isinstance(own, Parametrization):
        return own
    names = [*SCHEMES, *(n for n, v in vars(file).items() if isinstance(v, Parametrization))]
    raise ValueError(
        f"--parametrization {name}: there is none of that name. {nearest(known, names)} The file may define its own with pj.abc."
    )


def sizes_of(file: Any, which: str, given: tuple[str, ...]) -> dict[str, Any]:
    """Sizes from ``name=value`` texts, or the file's own dict."""
    if not given:
        own = getattr(file, which, None)
        if not isinstance(own, dict):
            raise ValueError(f"no {which} sizes: give --{which} width=64 ..., or write {which} = dict(width=64, ...) in the file.")
        return own
    return pairs(which, given)


def pairs(which: str, given: tuple[str, ...]) -> dict[str, Any]:
    """Sizes from ``name=value`` texts."""
    sizes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--{which} {text}: write NAME=VALUE, such as width=64.")
        try:
            sizes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--{which} {text}: {value!r} is no number.") from error
    return sizes
