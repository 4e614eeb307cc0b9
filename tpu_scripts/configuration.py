"""The variables of config.env, read as lib.sh reads them: the environment before the file, the file before config.env.example."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
EXAMPLE = SCRIPTS / "config.env.example"


def variables(path: Path) -> dict[str, str]:
    """Parse lines of ``NAME=value``; blank lines and comments are passed over.

    Raises
    ------
    ValueError
        A line is something else; the message names file and line.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Z_]+)=(.*)", line)
        if not match:
            raise ValueError(f"{path}:{number}: {line!r} is not NAME=value.")
        found[match[1]] = match[2]
    return found


def load(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All variables.

    Parameters
    ----------
    path
        The file; by default config.env beside this module, if there is one.
    environment
        What goes before the file.

    Raises
    ------
    ValueError
        The file is not there or not of that form, or has a variable that config.env.example lacks.
    """
    found = variables(EXAMPLE)
    if path is None and (SCRIPTS / "config.env").exists():
        path = SCRIPTS / "config.env"
    if path is not None:
        if not path.exists():
            raise ValueError(f"--config {path}: there is no such file. Copy {EXAMPLE} there and fill it in.")
        given = variables(path)
        if unknown := sorted(given.keys() - found.keys()):
            raise ValueError(f"{path}: there is no variable {unknown[0]}; config.env.example has them all.")
        found |= given
    return found | {name: environment[name] for name in found if name in environment}


def number(config: Mapping[str, str], name: str) -> float:
    """A variable as a number.

    Raises
    ------
    ValueError
        It is none, or negative.

    Examples
    --------
    >>> number({"RETRIES": "8"}, "RETRIES")
    8.0
    """
    try:
        value = float(config[name])
    except ValueError:
        raise ValueError(f"{name}={config[name]} is not a number; config.env.example has the default.") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={config[name]} must be a number that is not negative.")
    return value
