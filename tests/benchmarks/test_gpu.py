"""The GPU benchmark: it says no without one, its counts are checked, and all of it runs on a CPU."""

import subprocess
import sys

import pytest

from tests.benchmarks.conftest import FOLDER
from tests.zoo import as_users_run_it


@pytest.fixture(scope="module")
def gpu(benchmark_module):
    return benchmark_module("gpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "no GPU.*--small.*--any-device"), (["--small", "--width", "72"], "2")],
)
def test_refusals(gpu, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit, match=message):
        gpu.main()


def test_model_flops_are_the_traces(gpu, monkeypatch):
    sizes = {**gpu.SMALL_STEP, "width": 16, "depth": 1, "time": 4, "batch": 2}
    with as_users_run_it():
        _, flops = gpu.time_step(sizes, 1)
        # 8 tokens; 12 · 16² in the block and 64 · 16 in the readout, 6 each; attention 12 · 16 · 4.
        assert flops == 8 * (6 * (12 * 16**2 + 64 * 16) + 12 * 16 * 4)
        monkeypatch.setattr("paperjax.layout.work", lambda *args: (flops / 2, 0))
        with pytest.raises(ValueError, match="one of them is wrong"):
            gpu.training_step(sizes)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_run():
    done = subprocess.run([sys.executable, FOLDER / "gpu.py", "--small", "--repeats", "2"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("muP transformer step", "pj.ntk, mlp", "pj.ntk, transformer", "one by one / together"):
        assert part in done.stdout
