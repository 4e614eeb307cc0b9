"""The command line: ``paperjax run SLUG``, ``list``, ``show``, ``verify``, ``plan``, ``coord-check``, ``transfer``, ``doctor``.

Exit status: 0 if all is well; 1 if a claim is not verified, or a coordinate check fails (or the doctor finds a fault); 2 if something
could not be run, with one message that says why; 130 after Ctrl-C; 75 after SIGTERM, if the state is saved and the same may be started
again. Of several processes: 69 if the others cannot be reached, 70 if one was lost.
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Nothing but the console script imports this module, so what is heavy may be imported here.
import jax
import tyro
from rich.console import Console
from rich.markup import escape

from paperjax import processes
from paperjax.binding import nearest
from paperjax.claims import SIZES, TIERS, Paper, Size
from paperjax.cli_family import PlanCommand, show_plan
from paperjax.cli_launch import LaunchCommand, ProcessOptions, launch, split_words
from paperjax.cli_studies import CoordCheckCommand, TransferCommand, run_coord_check, run_transfer
from paperjax.devices import cpu_devices
from paperjax.finder import PAPERS, find, load, text
from paperjax.interrupts import Preempted
from paperjax.overrides import chosen, flags
from paperjax.report import table
from paperjax.report.record import RUN_STATUSES, last_records
from paperjax.runner import FILES, Run, prepare_folder, run_paper

RUNS = Path("paperjax-runs")
FIELDS = flags()
if TYPE_CHECKING:
    Fields = Any
else:
    Fields = Annotated[FIELDS, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="experiment")]
CLAIM_FAILED, CANNOT_RUN, INTERRUPTED = 1, 2, 130


@dataclasses.dataclass(frozen=True)
class RunCommand:
    """Run a paper, check its claims against prediction and control, draw its figure.

    Exits with 1 if a claim fails or its control passes.
    """

    slug: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SLUG")]
    """The paper; `paperjax list` shows them."""
    size: Size = "quick"
    """quick (a minute on two cores) or full (the paper's own size)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: paperjax-runs/SLUG-SIZE)")] = None
    """Where result.nc, claims.json, figure.png, figure.svg and report.html go."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say how cells are laid out on the devices; show tracebacks."""
    fields: Fields = dataclasses.field(default_factory=FIELDS)
    processes: Annotated[ProcessOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ProcessOptions)


@dataclasses.dataclass(frozen=True)
class ListCommand:
    """List the papers, with the status of each one's last run."""

    area: Annotated[str | None, tyro.conf.arg(metavar="AREA", help_behavior_hint="(default: all)")] = None
    """Only this area."""
    tier: Annotated[str | None, tyro.conf.arg(metavar="T|M|A|X", help_behavior_hint="(default: all)")] = None
    """Only this tier: T, a theory to be measured; M, a method; A, an architecture; X, a stand-in."""
    status: Annotated[str | None, tyro.conf.arg(metavar="|".join(RUN_STATUSES), help_behavior_hint="(default: all)")] = None
    """Only papers whose last run ended so."""
    runs: Path = RUNS
    """Folder with the runs."""


@dataclasses.dataclass(frozen=True)
class ShowCommand:
    """Show what a paper claims, how each claim is checked, and how long it takes."""

    slug: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SLUG")]
    """The paper; `paperjax list` shows them."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class VerifyCommand:
    """Run several papers and say which are verified. Exits with 1 if one is not, with 2 if one could not run."""

    slugs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SLUG ...]", help_behavior_hint="")] = ()
    """The papers."""
    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """All papers."""
    size: Size = "quick"
    """quick or full."""
    runs: Path = RUNS
    """Folder with the runs; each paper has its own in it."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say how cells are laid out on the devices; show tracebacks."""


@dataclasses.dataclass(frozen=True)
class DoctorCommand:
    """Check the installation: versions, devices, memory, cache, and a product against NumPy."""


Command = (
    Annotated[RunCommand, tyro.conf.subcommand("run")]
    | Annotated[ListCommand, tyro.conf.subcommand("list")]
    | Annotated[ShowCommand, tyro.conf.subcommand("show")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[CoordCheckCommand, tyro.conf.subcommand("coord-check")]
    | Annotated[TransferCommand, tyro.conf.subcommand("transfer")]
    | Annotated[LaunchCommand, tyro.conf.subcommand("launch")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None, papers_folder: Path = PAPERS) -> int:
    """Do what the command line says.

    Parameters
    ----------
    arguments
        Without the program's name; by default those of the process.
    papers_folder
        Where papers are looked for.

    Returns
    -------
    int
        The exit status.
    """
    own, words = split_words(sys.argv[1:] if arguments is None else arguments)
    command = tyro.cli(
        Command,
        prog="paperjax",
        args=own,
        config=(tyro.conf.OmitSubcommandPrefixes,),
        description="Where deep-learning theory papers run.",
    )
    actions = {
        RunCommand: run,
        ListCommand: list_papers,
        ShowCommand: show,
        VerifyCommand: verify,
        PlanCommand: plan_family,
        CoordCheckCommand: check_family,
        TransferCommand: transfer_family,
        DoctorCommand: doctor,
        LaunchCommand: lambda command, papers_folder: launch(command, words, papers_folder),
    }
    try:
        return actions[type(command)](command, papers_folder)
    except KeyboardInterrupt as stop:
        _error(str(stop.args[0]) if stop.args else "stopped.")
        return processes.RESUME if isinstance(stop, Preempted) else INTERRUPTED
    except processes.Unreachable as error:
        _explain(error, False)
        return processes.UNREACHABLE
    except processes.ProcessLost as error:
        _explain(error, False)
        processes.leave(processes.LOST)
    except (ValueError, TypeError, OSError, MemoryError, FloatingPointError) as error:
        _explain(error, getattr(command, "verbose", True))
        # The others may be waiting for this one.
        if isinstance(command, RunCommand) and jax.distributed.is_initialized():
            processes.leave(CANNOT_RUN)
        return CANNOT_RUN


def run(command: RunCommand, papers_folder: Path) -> int:
    """`paperjax run`."""
    _start_devices(command.verbose)
    joined = processes.join(**dataclasses.asdict(command.processes))
    paper = load(command.slug, papers_folder)
    folder = command.out or RUNS / f"{paper.slug}-{command.size}"
    if joined:
        processes.log_to(folder / "logs")
    done = run_paper(paper, text(command.slug, papers_folder), command.size, chosen(command.fields), folder, command.verbose)
    if processes.first():
        _show_run(paper, done)
    return 0 if done.record["status"] == "verified" else CLAIM_FAILED


def list_papers(command: ListCommand, papers_folder: Path) -> int:
    """`paperjax list`."""
    found = find(papers_folder)
    areas = {path.parent.name.replace("_", "-") for path in found.values()}
    for flag, given, known in (("area", command.area, areas), ("tier", command.tier, TIERS), ("status", command.status, RUN_STATUSES)):
        if given is not None and given not in known:
            raise ValueError(f"--{flag} {given}: there is no such {flag}. {nearest(given, known)}")
    records = last_records(command.runs)
    rows, broken = [], []
    for slug in found:
        try:
            paper = load(slug, papers_folder)
        except ValueError as error:
            broken.append(error)
            continue
        record = records.get(slug)
        status = "not-run" if record is None else record["status"]
        if command.area in (None, paper.area) and command.tier in (None, paper.tier) and command.status in (None, status):
            rows.append((slug, paper.title, paper.area, paper.tier, str(len(paper.claims)), table.status_text(record)))
    if rows:
        _out().print(table.plain_table(("paper", "title", "area", "tier", "claims", "last run"), rows))
    else:
        _out().print("No paper is like that." if found else f"There are no papers in {papers_folder}.", markup=False)
    for error in broken:
        _explain(error, False)
    return CANNOT_RUN if broken else 0


def show(command: ShowCommand, papers_folder: Path) -> int:
    """`paperjax show`."""
    paper, out = load(command.slug, papers_folder), _out()
    out.print(f"[bold]{escape(paper.title)}[/bold]")
    out.print(f"{paper.authors}, {paper.year}" + (f", arXiv:{paper.arxiv}" if paper.arxiv else ""), markup=False)
    out.print(f"\n{text(command.slug, papers_folder)}\n", markup=False, highlight=False)
    rows = [
        (
            f"{claim.says} [{claim.source}]" + ("" if len(claim.sizes) == len(SIZES) else f" (only --size {claim.sizes[0]})"),
            f"{table.SYMBOLS[claim.relation]} {'from its formula' if callable(claim.predicted) else table.number(float(claim.predicted))}",
            f"{table.number(float(claim.tolerance))}: {claim.why}",
            f"{claim.control.says} ({', '.join(f'{a} → {b}' for a, b in claim.control.replace.items())})",
        )
        for claim in paper.claims
    ]
    out.print(table.plain_table(("claim", "predicted", "tolerance: why", "control that must fail"), rows))
    if paper.data:
        out.print(f"Data: {paper.data}", markup=False)
    for size, time in paper.run_time.items():
        out.print(f"paperjax run {paper.slug} --size {size}   # {time}", markup=False)
    return 0


def verify(command: VerifyCommand, papers_folder: Path) -> int:
    """`paperjax verify`."""
    if bool(command.slugs) == command.all:
        raise ValueError("verify: name some papers, or --all of them; not both. `paperjax list` shows them.")
    _start_devices(command.verbose)
    papers = [load(slug, papers_folder) for slug in (find(papers_folder) if command.all else dict.fromkeys(command.slugs))]
    prepare_folder(command.runs)
    rows, worst = [], 0
    for paper in papers:
        try:
            done = run_paper(
                paper, text(paper.slug, papers_folder), command.size, {}, command.runs / f"{paper.slug}-{command.size}", command.verbose
            )
        except (ValueError, TypeError, OSError, MemoryError) as error:
            _explain(error, command.verbose)
            rows.append((paper.slug, "✗ could not run", f"0 of {len(paper.claims_at(command.size))}", "", str(error)))
            worst = CANNOT_RUN
            continue
        wrong = [f"{verdict.says}: {table.outcome_word(verdict)}" for verdict in done.verdicts if not verdict.verified]
        verified = f"{len(done.verdicts) - len(wrong)} of {len(done.verdicts)}"
        rows.append((paper.slug, table.status_text(done.record), verified, f"{done.record['seconds']:.1f}", "; ".join(wrong)))
        worst = max(worst, CLAIM_FAILED if wrong else 0)
    _out().print(table.plain_table(("paper", "status", "claims verified", "seconds", "what is wrong"), rows))
    _out().print(f"The reports are in {command.runs}.", markup=False)
    return worst


def plan_family(command: PlanCommand, papers_folder: Path) -> int:
    """`paperjax plan`."""
    from paperjax.parametrization.show import table as plan_table

    out = _out()
    out.print(plan_table(show_plan(command), out.width))
    if command.json is not None:
        out.print(f"{command.json}", markup=False, highlight=False, soft_wrap=True)
    return 0


def check_family(command: CoordCheckCommand, papers_folder: Path) -> int:
    """`paperjax coord-check`."""
    # Before the user's file is run, which may start JAX.
    _start_devices(command.verbose)
    found, files = run_coord_check(command, RUNS)
    _show_study(found, files)
    return 0 if found.passes else CLAIM_FAILED


def transfer_family(command: TransferCommand, papers_folder: Path) -> int:
    """`paperjax transfer`."""
    _start_devices(command.verbose)
    _show_study(*run_transfer(command, RUNS))
    return 0


def doctor(command: DoctorCommand, papers_folder: Path) -> int:
    """`paperjax doctor`."""
    from paperjax.doctor import examine

    _start_devices(True)
    rows, healthy = examine()
    rows.append(("papers", f"{len(find(papers_folder))} in {papers_folder}"))
    _out().print(table.plain_table(("what", "found"), rows))
    return 0 if healthy else CLAIM_FAILED


def _show_run(paper: Paper, done: Run) -> None:
    out = _out()
    out.print(table.verdict_table(done.verdicts, f"{paper.title} ({paper.authors}, {paper.year})"))
    out.print(f"{table.status_text(done.record)} in {done.record['seconds']:.1f} s\n", markup=False, highlight=False)
    for file in FILES:
        out.print(f"{done.folder / file}", markup=False, highlight=False, soft_wrap=True)


def _show_study(found: object, files: Sequence[Path]) -> None:
    _out().print(f"{found}\n", markup=False, highlight=False, soft_wrap=True)
    for file in files:
        _out().print(f"{file}", markup=False, highlight=False, soft_wrap=True)


def _start_devices(verbose: bool) -> None:
    # Who set the number of devices by hand keeps it.
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        cpu_devices()
    except RuntimeError as error:
        # Only when main is called from Python after JAX has started. It runs on the devices there are, perhaps slower.
        if verbose:
            _error(f"note: {error}")


def _out() -> Console:
    # A file or a pipe has no width of its own; tables are easier to read there than at 80 columns.
    # No emoji: they would be made of the user's own "file.py:family:".
    return Console(emoji=False) if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(emoji=False, width=140)


def _error(message: str) -> None:
    Console(stderr=True, emoji=False).print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _explain(error: BaseException, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    else:
        # JAX adds a note about its own tracebacks, which are not shown here.
        notes = [note for note in getattr(error, "__notes__", []) if "JAX" not in note]
        _error("\n".join([f"error: {error}", *notes]))


if __name__ == "__main__":
    sys.exit(main())
