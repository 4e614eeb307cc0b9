"""Run a paper: train its Experiments, judge its claims, and leave the files of the run in a folder."""

import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

from paperjax import processes
from paperjax.checkpoint import is_url
from paperjax.claims import Paper, Size, Verdict, judge
from paperjax.experiment import Experiment
from paperjax.overrides import apply, command_line
from paperjax.report.figure import save_figure, style
from paperjax.report.html import inline_figure, report
from paperjax.report.record import make_record, save_results, write_record

FILES = ("result.nc", "claims.json", "figure.png", "figure.svg", "report.html")


class Run(NamedTuple):
    """What a run leaves: the folder with `FILES`, the record that ``claims.json`` holds, and the verdicts."""

    folder: Path
    record: dict[str, Any]
    verdicts: tuple[Verdict, ...]


def prepare_folder(folder: str | Path) -> Path:
    """Create a folder, and write and delete a file in it: what cannot be written is found before training, not after.

    Raises
    ------
    OSError
        Naming the folder, the cause and the fix.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"paperjax")
    except OSError as error:
        cause = error.strerror or str(error)
        raise OSError(
            f"the folder {folder} cannot be written ({cause}). Name another with --out DIR, or make this one writable."
        ) from error
    return folder


def run_paper(paper: Paper, text: str, size: Size, given: Mapping[str, Any], folder: str | Path, verbose: bool = False) -> Run:
    """Run a paper at a size with some fields of its Experiments overruled.

    Parameters
    ----------
    paper
        From `paperjax.finder.load`.
    text
        Docstring of its file, for the report.
    size
        ``"quick"`` or ``"full"``.
    given
        As `paperjax.overrides.apply` takes it.
    folder
        Where `FILES` are written. Those of an earlier run are removed once this one has trained.
    verbose
        Print kinds of axes and layouts.

    Returns
    -------
    Run

    Notes
    -----
    Of several processes, process 0 writes the files.

    Raises
    ------
    OSError
        If a folder cannot be written; before anything is trained.
    ValueError, TypeError
        If an Experiment, a claim or the figure does not fit; for Experiments before anything is trained. If it is a claim or
        the figure, the trained results are in the folder.
    """
    folder = prepare_folder(folder) if processes.first() else Path(folder)
    if "checkpoint" in given and not is_url(given["checkpoint"]):
        prepare_folder(given["checkpoint"])
    planned = paper.plan(size)
    experiments = apply(planned, given)
    _check_seeds(planned, experiments)
    # A fault in the last should not show up when the others have trained for an hour.
    axes = {name: e.check() for name, e in experiments.items()}
    began = time.perf_counter()
    # Cells decompose small matrices in loops. LAPACK's threads wait for each other there: on busy cores for 100 times what one takes.
    with threadpool_limits(1, "blas"):
        results = {name: e.run(verbose=verbose, title=f"{paper.slug}: {name}", axes=axes[name]) for name, e in experiments.items()}
    seconds = time.perf_counter() - began
    if not processes.first():
        # The same verdicts, and no files.
        verdicts = tuple(judge(claim, results) for claim in paper.claims_at(size))
        return Run(folder, make_record(paper, size, command_line(given), verdicts, results, seconds), verdicts)

    for file in FILES:
        (folder / file).unlink(missing_ok=True)
    saved = save_results(results, folder / "result.nc")
    try:
        verdicts = tuple(judge(claim, results) for claim in paper.claims_at(size))
        record = make_record(paper, size, command_line(given), verdicts, results, seconds)
        write_record(record, folder / "claims.json")
        with style():
            png, svg = save_figure(paper.figure(results, verdicts), folder)
    except Exception as error:
        error.add_note(f"The training is done, and its results are in {saved}.")
        raise
    command = shlex.join(["paperjax", "run", paper.slug, "--size", size]) + "".join(f" {flag}" for flag in command_line(given))
    page = report(paper, text, verdicts, record, inline_figure(png, svg), command)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return Run(folder, record, verdicts)


def _check_seeds(planned: Mapping[str, Experiment], experiments: Mapping[str, Experiment]) -> None:
    # A paper whose claims are exact may have no seeds; one that has them takes its standard errors over them.
    for name, experiment in experiments.items():
        seeds = experiment.grid.axes.get("seed", ())
        if len(seeds) < 2 <= len(planned[name].grid.axes.get("seed", ())):
            given = "1" if seeds == (0,) else ",".join(map(str, (*seeds, "")))
            raise ValueError(
                f"--grid seed={given}: experiment {name!r} would have one seed, and a claim needs a standard error over seeds. "
                "Give two or more: --grid seed=2, or seed=3,7 for seeds of your choice."
            )
