"""Papers are found by their files, ``papers/<area>/<slug with underscores>.py``; there is no list to keep."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from paperjax.binding import nearest
from paperjax.claims import Paper

PAPERS = Path(__file__).parent / "papers"


def find(folder: Path = PAPERS) -> dict[str, Path]:
    """The files of all papers by slug, in alphabetical order; none is imported.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If two areas have a paper of the same name.

    Examples
    --------
    >>> all(path.suffix == ".py" for path in find().values())
    True
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of papers at {folder}.")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*.py"), key=lambda path: path.stem):
        if path.stem.startswith("_"):
            continue
        slug = path.stem.replace("_", "-")
        if slug in found:
            raise ValueError(f"two papers are called {slug}: {found[slug]} and {path}. Rename one.")
        found[slug] = path
    return found


def locate(slug: str, folder: Path = PAPERS) -> Path:
    """The file of a paper.

    Raises
    ------
    ValueError
        If there is none by that name; the message has the nearest.

    Examples
    --------
    >>> locate("intrinsic-dimension").name
    'intrinsic_dimension.py'
    """
    found = find(folder)
    name = slug.replace("_", "-")
    if name not in found:
        raise ValueError(f"there is no paper {slug!r}. {nearest(name, found) if found else f'{folder} has none at all.'}")
    return found[name]


def load(slug: str, folder: Path = PAPERS) -> Paper:
    """Import a paper's file and return its ``PAPER``.

    Raises
    ------
    ValueError
        If there is no such paper, its file does not import, or its ``PAPER`` does not fit its place.

    Examples
    --------
    >>> load("intrinsic-dimension").arxiv
    '1804.08838'
    """
    path = locate(slug, folder)
    try:
        module = _import(path, folder)
    except Exception as error:
        raise ValueError(f"the paper's file {path} does not import: {type(error).__name__}: {error}") from error
    paper = getattr(module, "PAPER", None)
    if not isinstance(paper, Paper):
        raise ValueError(
            f"{path} defines no PAPER = Paper(...) at its top level{'' if paper is None else f', but a {type(paper).__name__}'}."
        )
    for field, place in (("slug", path.stem), ("area", path.parent.name)):
        if getattr(paper, field) != place.replace("_", "-"):
            raise ValueError(f"{path}: PAPER.{field} is {getattr(paper, field)!r}, and the file's place says {place.replace('_', '-')!r}.")
    return paper


def text(slug: str, folder: Path = PAPERS) -> str:
    """The docstring of a paper's file, without importing it; empty if it has none.

    Examples
    --------
    >>> bool(text("intrinsic-dimension"))
    True
    """
    path = locate(slug, folder)
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _import(path: Path, folder: Path) -> ModuleType:
    if folder == PAPERS:
        return importlib.import_module(f"paperjax.papers.{path.parent.name}.{path.stem}")
    name = f"papers_elsewhere.{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while it runs.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
