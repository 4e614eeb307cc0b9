"""One contract for every paper: a new one is tested by being there."""

import ast
import dataclasses
import itertools
from pathlib import Path

import pytest

import paperjax
from paperjax.claims import SIZES
from paperjax.finder import find, load
from paperjax.runner import FILES, run_paper

PAPERS = find()
# run by .ci/run as the README's first command
ELSEWHERE = {"intrinsic-dimension"}


def test_the_first_papers_are_there():
    assert {"intrinsic-dimension", "grokking-lazy-rich", "xor-benign-grokking"} <= set(PAPERS)


@pytest.mark.parametrize("slug", PAPERS)
def test_file_and_entry_agree(slug):
    paper, path = load(slug), Path(PAPERS[slug])
    assert paper.slug == slug == path.stem.replace("_", "-")
    assert paper.area == path.parent.name.replace("_", "-")
    module = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert paper.title in module.splitlines()[0]
    assert paper.arxiv in module
    for word in ("Claims", "Control", "toleran", "Run time", f"paperjax run {slug}"):
        assert word in module, f"the docstring of {path.name} does not say its {word}"


@pytest.mark.parametrize("slug", PAPERS)
def test_holds_nothing_but_the_paper(slug):
    path = Path(PAPERS[slug])
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("paperjax.papers"), "papers never import each other"


@pytest.mark.slow
@pytest.mark.parametrize("slug", PAPERS)
def test_quick_experiments_can_run(slug):
    paper = load(slug)
    for name, experiment in paper.plan("quick").items():
        experiment.check()
        seeds = experiment.grid.axes.get("seed", ())
        # What a claim measures has a standard error; a deterministic baseline needs none.
        assert len(seeds) >= 2 or "direct" in name or "exact" in name, f"{name} has {len(seeds)} seeds"


@pytest.mark.parametrize("slug", PAPERS)
def test_every_claim_has_its_reason_at_every_size(slug):
    paper = load(slug)
    for size in SIZES:
        assert paper.claims_at(size)
    for claim in paper.claims:
        assert len(claim.why) > 20
        assert len(claim.control.says) > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("slug", [slug for slug in PAPERS if slug not in ELSEWHERE])
def test_quick_run_verifies_every_claim(slug, tmp_path):
    run = run_paper(load(slug), "", "quick", {}, tmp_path / slug)
    assert {v.says: v.status for v in run.verdicts} == {v.says: "verified" for v in run.verdicts}
    assert all((tmp_path / slug / file).stat().st_size for file in FILES)


def test_nothing_imports_papers_but_the_finder():
    root = Path(paperjax.__file__).parent
    for path in root.rglob("*.py"):
        if "papers" in path.relative_to(root).parts or path.name == "finder.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not any(name.startswith("paperjax.papers") for name in names), f"{path} imports a paper"


def test_floors_import_down_only():
    floors = [
        {
            "adapters", "binding", "describe", "model", "params", "reach", "data", "checkpoint", "devices", "interrupts", "progress",
            "processes",
        },
        {"losses", "models", "trace", "transforms", "train", "grid", "interop"},
        {"measures", "kernels", "layout", "cell", "compiling", "parametrization", "planned", "sharding"},
        {"limits", "experiment", "driver", "result", "resuming", "explained"},
        {"claims", "estimates"},
        {"report", "studies", "runner", "overrides", "finder", "doctor"},
        {"papers", "cli", "cli_family", "cli_launch", "cli_studies"},
    ]  # fmt: skip
    level = {name: i for i, floor in enumerate(floors) for name in floor}
    root = Path(paperjax.__file__).parent
    for path in root.rglob("*.py"):
        own = path.relative_to(root).with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in level, f"{own} has no floor"
        top_level = ast.parse(path.read_text()).body
        for node in itertools.chain(top_level):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paperjax."):
                other = node.module.split(".")[1]
                assert level[other] <= level[own], f"{path.relative_to(root)} (floor {level[own]}) imports {other} (floor {level[other]})"


def test_a_paper_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("intrinsic-dimension").title = "another"
