"""Counts of whole Experiments against closed forms, and the arithmetic of predictions."""

import os
import subprocess
import sys

import pytest

from tests.benchmarks.conftest import FOLDER
from tests.zoo import as_users_run_it

TINY = {"width": 8, "depth": 2, "features": 4, "outputs": 4, "examples": 8}


@pytest.fixture(scope="module")
def scaling(benchmark_module):
    return benchmark_module("scaling")


@pytest.fixture(scope="module")
def rows(scaling):
    # Adam promotes dtypes.
    with as_users_run_it():
        shapes = [((1, 1, 1), scaling.TENSOR), ((2, 1, 1), scaling.TENSOR), ((1, 2, 1), scaling.TENSOR), ((1, 2, 1), scaling.FULLY)]
        return [scaling.count("mlp", TINY, shape, rule) for shape, rule in shapes]


def test_closed_forms_hold(scaling, rows):
    one, sweep, data, fully = rows
    assert [scaling.check(row, one, TINY)[0][0].split(":")[0] for row in (sweep, fully)] == [
        "a sweep alone",
        "state a device = state / data (and leaves that do not divide)",
    ]
    # Weights 4 x 8, 8 x 8 and 8 x 4, biases 8, 8 and 4, and the loss, in float32.
    assert data.bytes("all-reduce", "data") == 4 * (32 + 64 + 32 + 8 + 8 + 4 + 1)
    scaling.check(data, one, TINY)
    # Forward, gradients of weights, cotangents of all layers but the first: 8 examples, 2 m n k each.
    assert one.flops == 2 * 8 * (2 * (32 + 64 + 32) + 64 + 32)


@pytest.mark.parametrize(
    ("row", "wrong", "message"),
    [
        (1, lambda row, found: row._replace(found=found), "collectives in the step = 0"),
        (2, lambda row, found: row._replace(found=found + found), "gradient and loss. That is 596 to 596, and 1192 was counted"),
        (2, lambda row, found: row._replace(flops=1.1 * row.flops), "products a device"),
        (3, lambda row, found: row._replace(state=2 * row.state), "state a device"),
    ],
)
def test_closed_forms_can_fail(scaling, rows, row, wrong, message):
    with pytest.raises(ValueError, match=message):
        scaling.check(wrong(rows[row], rows[2].found), rows[0], TINY)


def test_predictions_by_hand(scaling, benchmark_module):
    pod, _ = scaling.MACHINES
    one_gigabyte = benchmark_module("scaling_hlo").Collective("all-reduce", ("data",), 256, 10**9, 1)
    one = scaling.Row("mlp", (1, 1, 1), scaling.TENSOR, 256 * 1.97e12, [], 0, 0)
    row = scaling.Row("mlp", (1, 256, 1), scaling.TENSOR, 1.97e12, [one_gigabyte], 819 * 10**6, 0)
    found = scaling.predict(row, one, pod)
    # 10 ms of products; 2 ms for the state; 2 GB (1 - 1/256) at 200 GB/s.
    assert found[:3] == pytest.approx((0.01, 0.002, 0.01 * 255 / 256))
    assert found.apart == pytest.approx(1 / (1 + 255 / 256))
    assert found.hidden == pytest.approx(1)


@pytest.mark.parametrize(("k", "links"), [(2, 1), (8, 1), (16, 2), (128, 2), (256, 4)])
def test_links_of_a_torus(scaling, k, links):
    assert scaling.v5e_link(k) == links * 400e9 / 4 / 2


def test_the_report_is_of_these_formulas(scaling, benchmark_module):
    tables, text = benchmark_module("scaling_tables"), (FOLDER / "scaling.md").read_text()
    for part in (tables.COUNTS, tables.FORMULAS, tables.WHAT, *(chip.sources for chip in scaling.MACHINES)):
        assert part in text
    for n, meshes in scaling.MESHES.items():
        for shape, rule in meshes:
            where = scaling.Row("", shape, rule, 0, [], 0, 0).where
            # Of both networks: a count and a prediction.
            assert text.count(f"| {where} |") >= 4, (n, where)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_small_run():
    # LLVM's optimizations come after the program that is read, of which nothing is run.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    line = [sys.executable, FOLDER / "scaling.py", "--small"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "### 8 x H200" in done.stdout
    assert "| transformer | data 8, fully_sharded | all-gather over data" in done.stdout


def test_only_all_of_it_is_written(scaling, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--write", "--small"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "leave --small and --chips out" in capsys.readouterr().err
