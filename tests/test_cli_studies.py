"""`paperjax coord-check` and `paperjax transfer` for a user's own file."""

import csv
import re

import numpy as np
import pytest
import tyro

from paperjax.cli import main
from paperjax.cli_studies import CoordCheckCommand, look_up
from paperjax.report import load_results
from tests.zoo import as_users_run_it

FILE = """
from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import paperjax as pj


@dataclasses.dataclass
class Shape:
    outputs: int = 1


rng = np.random.default_rng(0)
learnt = rng.normal(size=(16, 4)).astype("float32")
pair = (learnt, learnt[:, :1])
spoilt = (learnt, 1e15 * learnt[:, :1])
shape = Shape()
linear = lambda width, depth: pj.models.linear_net(width, depth=depth, outputs=shape.outputs)
family = pj.family(linear, x=jnp.ones((2, 4)))
units = pj.family(lambda units: linear(units, 1), x=jnp.ones((2, 4)))
headed = pj.family(lambda width, heads: linear(width, heads), x=jnp.ones((2, 4)))
tokens = pj.family(lambda width: pj.models.transformer(width, 1, 1, vocab=5), x=jnp.ones((2, 4), int))
base = dict(width=4, depth=1)
halved = pj.abc("halved", a=(0, 0, 0), b=(0, 0.5, 1), c_sgd=(-1, 0, 1), c_adam=(0, 0.5, 0.5))
"""
WIDE = ["--widths", "16", "32", "64", "128"]
QUICK = ["--steps", "1", "--seeds", "2"]
FILES = ["figure.png", "figure.svg", "result.nc", "table.csv"]


@pytest.fixture(name="file")
def _file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    with as_users_run_it():
        yield path


def rows(folder):
    with (folder / "table.csv").open() as table:
        return list(csv.DictReader(table))


def test_mup_passes_and_leaves_its_table_and_figure(file, tmp_path, capsys):
    assert main(["coord-check", f"{file}:family", *WIDE, "--seeds", "4", "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "muP, adam" in shown
    assert "passes" in shown
    folder = tmp_path / "paperjax-runs/coord-check-family-mup"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(f"coord-check-family-mup/{name}" in shown for name in FILES)
    table = rows(folder)
    assert list(table[0]) == ["quantity", "kind", "layer", "what", "step", "exponent", "low", "high", "expected", "verdict"]
    last = [row for row in table if row["step"] == "2"]
    assert {row["verdict"] for row in last} == {"flat"}
    change = load_results(folder / "result.nc")["coordinates"].change
    # The table is the fit to the sizes beside it.
    here = np.log(change.isel(quantity=-1).sel(step=2)).mean("seed")
    assert float(last[-1]["exponent"]) == pytest.approx(np.polyfit(np.log(here.width), here, 1)[0], abs=1e-5)


def test_the_family_as_it_is_fails(file, tmp_path, capsys):
    line = ["coord-check", f"{file}:family", "--parametrization", "none", *WIDE, *QUICK, "--out", str(tmp_path / "as-it-is")]
    assert main([*line, "--learning-rate", "1e-4"]) == 1
    assert "fails" in capsys.readouterr().out
    outputs = rows(tmp_path / "as-it-is")[-1]
    # Adam moves each of n readout weights by one step along its activation: Δf = n times a step.
    assert (outputs["quantity"], outputs["expected"], outputs["verdict"]) == ("outputs", "1.0", "grows")


def asked(*line):
    return look_up(tyro.cli(CoordCheckCommand, args=line))


def test_what_is_read_from_the_file(file):
    found = asked(f"{file}:family", "--data", "pair", "--parametrization", "halved", "--base", "width=32")
    assert found.scheme is not None
    assert found.scheme.name == "halved"
    assert (found.widths, found.depths, found.sizes, found.base) == ((64, 128, 256, 512), None, {"depth": 1}, {"width": 32})
    assert [part.shape for part in found.data] == [(16, 4), (16, 1)]
    found = asked(f"{file}:family", "--depths", "2", "4", "8", "16", "--sizes", "width=8")
    assert (found.widths, found.depths, found.sizes) == (None, (2, 4, 8, 16), {"width": 8})


def test_random_examples_have_the_shapes_of_batch_and_output(file):
    x, y = asked(f"{file}:family").data
    assert (x.shape, y.shape) == ((32, 4), (32, 1))
    assert float(y.std()) == pytest.approx(10, rel=0.3)
    file.write_text(f"{FILE}\nx = learnt")
    x, y = asked(f"{file}:family").data
    assert (x.shape, y.shape) == ((16, 4), (16, 1))
    file.write_text(f"{FILE}\nx = y = 2 * learnt\ndata = pair")
    assert asked(f"{file}:family").data[0][0, 0] == asked(f"{file}:family", "--data", "pair").data[0][0, 0]


RATES = ["--learning-rates", *(str(2.0**-k) for k in range(7, -1, -1))]


def test_transfer(file, tmp_path, capsys):
    line = ["transfer", f"{file}:family", "--data", "pair", "--widths", "8", "16", "--optimizer", "sgd", "--steps", "5", "--seeds", "2"]
    assert main([*line, *RATES]) == 0
    shown = capsys.readouterr().out
    assert "learning-rate transfer of muP, sgd" in shown
    assert "per doubling of the width" in shown
    folder = tmp_path / "paperjax-runs/transfer-family-mup"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [row["size"] for row in rows(folder)] == ["8", "16"]
    assert load_results(folder / "result.nc")["transfer"].train_loss.sizes["lr"] == 8


def test_an_optimum_at_the_edge_leaves_its_losses(file, tmp_path, capsys):
    line = ["transfer", f"{file}:family", "--data", "pair", "--widths", "8", "16", "--optimizer", "sgd", "--steps", "5", "--seeds", "2"]
    assert main([*line, "--learning-rates", "1e-4", "2e-4", "4e-4", "8e-4"]) == 2
    error = capsys.readouterr().err
    assert "the upper edge 0.0008 at width 8, 16" in error
    folder = tmp_path / "paperjax-runs/transfer-family-mup"
    assert str(folder.relative_to(tmp_path) / "result.nc") in error
    assert [path.name for path in folder.iterdir()] == ["result.nc"]


CHECK, TRANSFER = ["coord-check", "{}:family"], ["transfer", "{}:family"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coord-check", "absent.py:family"], "there is no file absent.py"),
        (["coord-check", "{}:famly"], "has no 'famly'.*'family'"),
        ([*CHECK, "--parametrization", "mupp"], "--parametrization mupp: there is none of that name.*'mup'"),
        ([*CHECK, "--widths", "8", "16", "32"], r"3 distinct value\(s\).*at least 4"),
        ([*CHECK, "--widths", "8", "16", "16", "32"], "each to be given once"),
        ([*CHECK, "--widths", "0", "8", "16", "32"], "size width = 0: a whole-number size must be at least 1"),
        ([*CHECK, "--widths", "8", "--depths", "1"], "--widths and --depths are both given"),
        ([*CHECK, "--sizes", "dept=1"], "no size 'dept'.*Did you mean 'depth'"),
        ([*CHECK, "--sizes", "depth"], "--sizes depth: write NAME=VALUE"),
        ([*CHECK, "--base", "width=1024"], "base width = 1024 is larger"),
        ([*CHECK, "--seeds", "1"], "at least 2"),
        ([*CHECK, "--steps", "0"], "at least one step"),
        ([*CHECK, "--optimizer", "adamm"], "'adamm'.*'adam'"),
        ([*CHECK, "--parametrization", "none", "--optimizer", "adamm"], "'adamm'.*'adam'"),
        ([*CHECK, "--data", "pairs"], "--data pairs: the file has none of that name.*'pair'"),
        ([*CHECK, "--data", "base"], "data must be a Dataset or a pair of arrays"),
        ([*CHECK, "--loss", "cross_entropy"], "--loss cross_entropy needs something to learn"),
        (["coord-check", "{}:headed"], "the family needs heads too: give --sizes heads=.*base = dict.heads="),
        (["coord-check", "{}:units"], "takes no size 'width'; it takes units"),
        (["coord-check", "{}:tokens"], "integers .tokens, it seems. need their inputs"),
        ([*CHECK, "--data", "spoilt", "--optimizer", "sgd", "--learning-rate", "1e9", *WIDE, *QUICK], "at width=16, step 1.*not finite"),
        ([*CHECK, "--out", "{}"], "cannot be written"),
        (TRANSFER, "transfer needs something to learn"),
        ([*TRANSFER, "--data", "pair", "--learning-rates", "0.1", "0.2", "0.4"], "give at least 4"),
        ([*TRANSFER, "--data", "pair", "--learning-rates", "0.1", "0.2", "0.3", "0.4"], "evenly spaced in their logarithm"),
        ([*TRANSFER, "--data", "pair", "--widths", "8"], "at least 2"),
    ],
)
def test_bad_command_lines_are_refused(file, capsys, arguments, message):
    assert main([text.format(file) for text in arguments]) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("line", "message"), [("widht + 1", r"NameError: name 'widht' is not defined \(line \d+\)"), ("x = (", "SyntaxError")]
)
def test_a_file_that_does_not_run(file, capsys, line, message):
    file.write_text(f"{FILE}\n{line}\n")
    assert main(["coord-check", f"{file}:family"]) == 2
    assert re.search(message, capsys.readouterr().err)
