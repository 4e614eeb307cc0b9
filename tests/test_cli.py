"""The command line from end to end, on a paper that trains in milliseconds."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import paperjax as pj
from paperjax.cli import main
from paperjax.experiment import Experiment
from paperjax.finder import find, load, text
from paperjax.overrides import CODE, FLAGS, HOW, apply
from paperjax.report import load_results
from paperjax.report.record import verdict_from_json
from paperjax.runner import FILES

PAPER = Path(__file__).parent / "cli_papers/dynamics/gradient_descent.py"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Runs go to a folder of their own, and tables are wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


TRAINED = {}


@pytest.fixture(autouse=True)
def _train_once(monkeypatch):
    """What was trained without a checkpoint is not trained again for another test."""
    run = Experiment.run

    def run_once(self, **options):
        if self.checkpoint is not None:
            return run(self, **options)
        key = re.sub(r"papers_elsewhere\.\w+\.\w+", "", str(self.describe()))
        if key not in TRAINED:
            TRAINED[key] = run(self, **options)
        return TRAINED[key]

    monkeypatch.setattr(Experiment, "run", run_once)


@pytest.fixture
def papers(tmp_path):
    """A folder with the paper, and a function that adds another with some words replaced."""

    def add(slug, area="dynamics", **replace):
        source = PAPER.read_text(encoding="utf-8").replace("gradient-descent", slug)
        for old, new in {**replace, 'area="dynamics"': f'area="{area}"'}.items():
            assert old in source
            source = source.replace(old, new)
        path = tmp_path / "papers" / area.replace("-", "_") / f"{slug.replace('-', '_')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return tmp_path / "papers"

    add("gradient-descent")
    return add


# What breaks the claim, and what makes its control hold.
FAILS = {"1e-4, ": "1e-4, ", "(1.0 - 2.0 * float(result.lr[1]))": "(1.0 - 2.1 * float(result.lr[1]))"}
VACUOUS = {"lr=[0.2, 0.3]": "lr=[0.2, 0.1]"}


def test_run_leaves_everything(papers, capsys):
    assert main(["run", "gradient-descent"], papers("other")) == 0
    folder = Path("paperjax-runs/gradient-descent-quick")
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    printed = capsys.readouterr().out
    for column in ("claim", "predicted", "measured ± s.e.", "tolerance", "verdict", "control's verdict"):
        assert column in printed
    for file in FILES:
        assert str(folder / file) in printed

    # (1 - 2 · 0.1)^8 for the claim and (1 - 2 · 0.3)^8 for the control.
    record = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    verdict = verdict_from_json(record["claims"][0])
    assert (record["status"], verdict.status, record["changes"]) == ("verified", "verified", [])
    assert verdict.predicted == pytest.approx(0.16777216)
    assert verdict.measured.value == pytest.approx(0.16777216, rel=1e-5)
    assert verdict.control_measured.value == pytest.approx(0.4**8, rel=1e-4)
    assert record["versions"]["paperjax"] == pj.__version__
    results = load_results(folder / "result.nc")
    assert results["wrong"].lr.values.tolist() == [0.2, 0.3]
    assert "A. &lt;Cauchy&gt;" in (folder / "report.html").read_text(encoding="utf-8")


def test_run_with_fields(papers, capsys):
    words = [
        "--grid",
        "lr=0.1,0.2,0.4",
        "seed=2",
        "--steps",
        "3",
        "--measure-at",
        "0,3",
        "--layout",
        "1",
        "1",
        "1",
        "--out",
        "here",
        "--size",
        "full",
    ]
    assert main(["run", "gradient-descent", *words], papers("other")) == 1  # The control is given the same axis, so it holds.
    result = load_results("here/result.nc")["true"]
    assert dict(result.train_loss.sizes) == {"lr": 3, "seed": 2, "step": 2}
    assert result.step.values.tolist() == [0, 3]
    assert "1 lane" in result.attrs["layout"]
    record = json.loads(Path("here/claims.json").read_text(encoding="utf-8"))
    assert record["changes"] == ["--grid lr=0.1,0.2,0.4 seed=2", "--steps 3", "--measure-at 0,3"]
    assert record["claims"][0]["predicted"] == pytest.approx(0.6**6)
    assert "vacuous" in capsys.readouterr().out
    command = "paperjax run gradient-descent --size full --grid lr=0.1,0.2,0.4 seed=2 --steps 3 --measure-at 0,3"
    assert command in Path("here/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("replace", "status", "said"), [(FAILS, "failed", "✗ fails"), (VACUOUS, "vacuous", "vacuous: the control holds too")]
)
def test_run_exits_with_1(papers, capsys, replace, status, said):
    assert main(["run", "bad", "--out", "out"], papers("bad", **replace)) == 1
    assert json.loads(Path("out/claims.json").read_text(encoding="utf-8"))["status"] == status
    assert said in capsys.readouterr().out


def test_checkpoints_are_apart_and_taken_up(papers, capsys):
    for _ in range(2):
        assert main(["run", "gradient-descent", "--checkpoint", "saved"], papers("other")) == 0
    assert sorted(p.name for p in Path("saved").iterdir()) == ["true", "wrong"]
    assert main(["run", "gradient-descent", "--checkpoint", "saved", "--steps", "5"], papers("other")) == 2
    assert "steps was 4 and is now 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gradient-decsent"], "there is no paper 'gradient-decsent'. Did you mean 'gradient-descent'?"),
        (["gradient-descent", "--grid", "width=3"], "no experiment of this paper has the axis 'width'. Known: lr, seed."),
        (["gradient-descent", "--grid", "lr"], "write the axis, '=' and its values"),
        (["gradient-descent", "--grid", "lr=1", "lr=2"], "twice"),
        (["gradient-descent", "--grid", "lr=fast"], "'fast' is not a number"),
        (["gradient-descent", "--grid", "lr=-1"], "must be positive"),
        (["gradient-descent", "--grid", "seed=0"], "at least 1"),
        (["gradient-descent", "--grid", "seed=1"], "--grid seed=1: experiment 'true' would have one seed"),
        (["gradient-descent", "--grid", "seed=7,"], "--grid seed=7,: experiment 'true' would have one seed"),
        (["gradient-descent", "--grid", "seed=two"], "number of seeds"),
        (["gradient-descent", "--steps", "-1"], "steps = -1"),
        (["gradient-descent", "--optimizer", "sgdd"], "Did you mean 'sgd'"),
        (["gradient-descent", "--loss", "msee"], "Did you mean 'mse'"),
        (["gradient-descent", "--measure-at", "often"], "--measure-at often"),
        (["gradient-descent", "--layout", "0", "1", "1"], "lanes"),
        (["gradient-descent", "--batch", "3"], "batch = 3 with 2 training examples: it must lie in 1..2, or be None (--batch full)"),
        (["gradient-descent", "--batch", "0"], "batch = 0 with 2 training examples: it must lie in 1..2, or be None (--batch full)"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(papers, capsys, words, said):
    assert main(["run", *words], papers("other")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list(Path("paperjax-runs").glob("*/*"))


def test_verbose_shows_the_traceback(papers, capsys):
    assert main(["run", "gradient-descent", "--steps", "-1", "--verbose"], papers("other")) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--checkpoint"])
def test_unwritable_folder_is_found_before_training(papers, capsys, monkeypatch, flag):
    Path("file").write_text("", encoding="utf-8")
    monkeypatch.setattr(Experiment, "run", lambda *a, **k: pytest.fail("trained"))
    assert main(["run", "gradient-descent", flag, "file/out"], papers("other")) == 2
    error = capsys.readouterr().err
    assert "the folder file/out cannot be written (Not a directory)" in error
    assert "--out DIR" in error


def test_a_fault_in_the_last_experiment_is_found_before_training(papers, capsys, monkeypatch):
    folder = papers("bad", **{"dict(true=true, wrong=true.replace(": 'dict(true=true, wrong=true.replace(loss="msee", '})
    monkeypatch.setattr(Experiment, "run", lambda *a, **k: pytest.fail("trained"))
    assert main(["run", "bad"], folder) == 2
    assert "unknown loss 'msee'" in capsys.readouterr().err


def test_a_figure_that_breaks_leaves_results_and_claims(papers, capsys):
    folder = papers("bad", **{"return drawing": 'raise ValueError("no ink")'})
    assert main(["run", "gradient-descent", "--out", "out"], folder) == 0
    assert main(["run", "bad", "--out", "out"], folder) == 2
    error = capsys.readouterr().err
    assert "no ink" in error
    assert "its results are in out/result.nc" in error
    # What an earlier run left is not taken for this one's.
    assert sorted(p.name for p in Path("out").iterdir()) == ["claims.json", "result.nc"]


def test_ctrl_c(papers, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt("stopped, and saved in there.")

    monkeypatch.setattr(Experiment, "run", stop)
    assert main(["run", "gradient-descent"], papers("other")) == 130
    assert capsys.readouterr().err.strip() == "stopped, and saved in there."


def test_list(papers, capsys):
    folder = papers("bad", **FAILS)
    papers("plane-wave", area="depth")
    main(["run", "gradient-descent", "--steps", "3"], folder)
    main(["run", "bad"], folder)
    capsys.readouterr()

    def listed(*words):
        assert main(["list", *words], folder) == 0
        printed = capsys.readouterr().out
        return [slug for slug in ("bad", "gradient-descent", "plane-wave") if f" {slug} " in printed], printed

    slugs, printed = listed()
    assert slugs == ["bad", "gradient-descent", "plane-wave"]
    for status in ("✓ verified (quick, --steps 3)", "✗ failed (quick)", "not-run"):
        assert status in printed
    assert listed("--area", "depth")[0] == ["plane-wave"]
    assert listed("--status", "verified")[0] == ["gradient-descent"]
    assert listed("--status", "failed")[0] == ["bad"]
    assert listed("--status", "not-run", "--tier", "T")[0] == ["plane-wave"]
    assert listed("--runs", "nowhere", "--status", "not-run")[0] == slugs
    slugs, printed = listed("--tier", "X")
    assert slugs == []
    assert "No paper is like that" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--area", "dynamic"], "--area dynamic: there is no such area. Did you mean 'dynamics'? Known: depth, dynamics."),
        (["--tier", "Y"], "--tier Y: there is no such tier. Known: A, M, T, X."),
        (["--status", "verifed"], "--status verifed: there is no such status. Did you mean 'verified'? Known: failed, not-run,"),
    ],
)
def test_list_of_what_there_is_not(papers, capsys, words, said):
    assert main(["list", *words], papers("plane-wave", area="depth")) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_claims_that_are_exact_need_no_seeds(papers):
    exact = {
        ", seed=4), steps": "), steps",
        "lr=[0.2, 0.3], seed=4": "lr=[0.2, 0.3]",
        "estimate((": "Estimate(float((",
        ".isel(step=0)).values)": ".isel(step=0)).values), 0.0)",
        "Paper, estimate": "Estimate, Paper",
        "relative.transpose(": 'relative.expand_dims("seed").transpose(',
    }
    assert main(["run", "exact"], papers("exact", **exact)) == 0


def test_list_with_a_broken_paper(papers, capsys):
    folder = papers("broken", **{"import jax\n": "import jaxx\n"})
    assert main(["list"], folder) == 2
    captured = capsys.readouterr()
    assert "gradient-descent" in captured.out
    assert "broken.py does not import: ModuleNotFoundError: No module named 'jaxx'" in captured.err


def test_show(papers, capsys):
    assert main(["show", "gradient-descent"], papers("other")) == 0
    printed = capsys.readouterr().out
    for expected in (
        "Gradient Descent on One Weight", "A. <Cauchy>, 1847", "the loss by (1 - 2 lr)^(2 t).", "[eq. 1]", "0.0001: float32 rounding",
        "another learning rate (true → wrong)", "two points", "paperjax run gradient-descent --size quick   # 1 s on two CPU cores",
    ):  # fmt: skip
        assert expected in printed


def test_verify(papers, capsys):
    folder = papers("bad", **FAILS)
    assert main(["verify", "gradient-descent"], folder) == 0
    assert main(["verify", "--all", "--runs", "runs"], folder) == 1
    printed = capsys.readouterr().out
    assert "1 of 1" in printed
    assert "the loss falls by (1 - 2 lr)^(2 t): ✗ fails" in printed
    assert sorted(p.name for p in Path("runs").iterdir()) == ["bad-quick", "gradient-descent-quick"]
    papers("cannot", **{'optimizer="sgd"': 'optimizer="sgdd"'})
    assert main(["verify", "cannot", "gradient-descent"], folder) == 2
    captured = capsys.readouterr()
    assert "could not run" in captured.out
    assert "✓ verified (quick)" in captured.out
    assert "unknown optimizer" in captured.err
    for words in ([], ["--all", "bad"]):
        assert main(["verify", *words], folder) == 2
        assert "name some papers, or --all of them" in capsys.readouterr().err


def test_papers_out_of_place(papers, tmp_path):
    folder = papers("other")
    assert list(find(folder)) == ["gradient-descent", "other"]
    assert text("gradient_descent", folder).startswith("Gradient descent on one weight")
    shutil.copy(folder / "dynamics/other.py", folder / "dynamics/third.py")
    with pytest.raises(ValueError, match=r"PAPER.slug is 'other', and the file's place says 'third'"):
        load("third", folder)
    (folder / "depth").mkdir()
    shutil.move(folder / "dynamics/third.py", folder / "depth/other.py")
    with pytest.raises(ValueError, match="two papers are called other"):
        find(folder)
    (folder / "depth/other.py").write_text("PAPER = 3\n", encoding="utf-8")
    shutil.move(folder / "depth/other.py", folder / "depth/fourth.py")
    with pytest.raises(ValueError, match=r"fourth.py defines no PAPER = Paper\(...\) at its top level, but a int"):
        load("fourth", folder)
    with pytest.raises(FileNotFoundError, match="no folder of papers"):
        find(tmp_path / "nowhere")


def test_every_field_of_an_experiment_is_a_flag_or_code():
    assert {*FLAGS, *CODE} == {field.name for field in dataclasses.fields(Experiment)}
    assert set(HOW) < set(FLAGS)


def named(value):
    return type("Thing", (), {"name": value})()


def test_values_of_axes():
    things = [named("circle"), named("line")]
    e = Experiment(
        lambda width: None, lambda key: None,
        grid=pj.grid(width=[64, 128], lr=[0.1, 1.0], data=things, optimizer=["sgd", "adam"], shuffled=[False, True], alpha=0.5, seed=8),
    )  # fmt: skip

    def axes(*words):
        return apply({"a": e}, {"grid": words})["a"].grid

    assert axes("width=32").axes["width"] == (32,)
    assert axes("width=32,48").axes["width"] == (32, 48)
    assert [type(v) for v in axes("lr=1,2").axes["lr"]] == [float, float]
    assert axes("optimizer=lion").axes["optimizer"] == ("lion",)
    assert axes("shuffled=True").axes["shuffled"] == (True,)
    assert axes("data=line").axes["data"] == (things[1],)
    assert axes("alpha=2").fixed["alpha"] == 2.0
    assert axes("alpha=1,2").axes["alpha"] == (1.0, 2.0)
    assert axes("seed=3").axes["seed"] == (0, 1, 2)
    assert axes("seed=7,").axes["seed"] == (7,)
    assert list(axes("lr=3").axes) == list(e.grid.axes)
    with pytest.raises(ValueError, match="Choose among: circle, line"):
        axes("data=square")
    changed = apply({"a": e, "b": e.replace(grid=pj.grid(seed=2))}, {"grid": ("lr=3",), "batch": "full", "checkpoint": "c"})
    assert changed["b"].grid.axes == {"seed": (0, 1)}
    assert (changed["a"].checkpoint, changed["b"].checkpoint, changed["a"].batch) == (os.path.join("c", "a"), os.path.join("c", "b"), None)


def test_help_and_typing_errors(capsys):
    for words, said in ((["--help"], "verify"), (["run", "--help"], "--save-every SECONDS"), (["list", "--help"], "--status")):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 2


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "python",
        "jaxlib",
        "orbax-checkpoint",
        "devices (cpu)",
        "cores",
        "memory",
        "cache of data sets",
        "matmul against NumPy",
        "equinox (optional)",
    ):
        assert expected in printed
    assert "ok: largest relative error" in printed


def test_doctor_finds_a_wrong_product(capsys, monkeypatch):
    monkeypatch.setattr("jax.numpy.matmul", lambda a, b, precision: a @ b + 1e-2)
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_of_its_own(papers):
    """One CPU device per core, set by the command line; Ctrl-C ends it with 130, a message, and what was trained saved."""
    folder = papers("slow", **{"dict(quick=4, full=6)": "dict(quick=2_000_000_000, full=6)", "measure_at=steps + 1": "measure_at=2"})
    program = "import sys; from pathlib import Path; from paperjax.cli import main; sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
    start = [sys.executable, "-c", program, str(folder), "run"]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [*start, "gradient-descent", "--out", "out"], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert load_results("out/result.nc")["true"].attrs["device"].startswith(f"{cores} ×")

    asked = ["slow", "--checkpoint", "saved", "--save-every", "0.1", "--out", "slow"]
    with subprocess.Popen([*start, *asked], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            while not any(path.name.isdigit() for path in Path("saved/true").glob("*")) and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert error.index("stopping after this call") < error.index("saved in")
    assert "Traceback" not in error
