import functools
import json
import subprocess

import numpy as np
import optax
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj
from paperjax.result import label, provenance, versions
from tests.zoo import blobs, line


def halved(learning_rate):
    return optax.sgd(learning_rate / 2)


@pytest.fixture(scope="module")
def experiment():
    return pj.Experiment(
        line, blobs(), optimizer=optax.sgd, steps=4, batch=8, measure_at=3, measures={"w": lambda params: params, "n": lambda step: step},
        grid=pj.grid(lr=[0.1, 1e30], seed=3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(experiment):
    return experiment.run()


def test_save_and_load_are_each_others_inverse(result, tmp_path):
    path = pj.save(result, tmp_path / "result.nc")
    found = pj.load(path)
    xr.testing.assert_identical(found, result)  # Attributes and coordinates too.
    for name, value in result.variables.items():
        assert found[name].dtype == value.dtype, name
    assert not np.isfinite(found.train_loss.sel(lr=1e30).isel(step=-1)).any()
    # A saved file can be written again, over itself.
    xr.testing.assert_identical(pj.load(pj.save(found, str(path))), result)


def test_save_and_load_keep_names_flags_and_integers(tmp_path):
    data = xr.Dataset(
        {"a": (("optimizer", "flag"), np.array([[1, 2], [3, 4]], np.int32)), "ok": ("flag", [True, False]), "nan": ("flag", [np.nan, 1.0])},
        {"optimizer": ["sgd", "½ λ"], "flag": [True, False], "fixed": "text", "number": 3, "half": 0.5},
        {"layout": "1 lane × map 1", "seconds": 1.5},
    )
    xr.testing.assert_identical(pj.load(pj.save(data, tmp_path / "x.nc")), data)


def test_a_result_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Result at"):
        pj.load(tmp_path / "none.nc")
    with pytest.raises(OSError, match="none"):
        pj.save(xr.Dataset(), tmp_path / "none" / "x.nc")


def test_provenance(experiment, result):
    fields = json.loads(result.attrs["experiment"])
    assert set(fields) == {
        "family", "data", "loss", "optimizer", "grid", "steps", "batch", "measure_at", "measures", "max_bytes", "layout", "checkpoint",
        "save_every", "parametrization", "base", "mesh", "sharding",
    }  # fmt: skip
    assert fields["steps"] == "4"
    assert fields["loss"] == "'mse'"
    assert fields == experiment.describe()
    assert json.loads(result.attrs["versions"]) == versions()
    assert json.loads(result.attrs["versions"])["paperjax"] == pj.__version__
    assert "cpu" in result.attrs["device"]
    assert result.attrs["wall_seconds"] > result.attrs["run_seconds"] > 0
    assert result.attrs["compile_seconds"] > 0
    assert "lane" in result.attrs["layout"]
    assert result.attrs["created"].endswith("+00:00")


def test_the_git_commit_is_recorded_inside_a_repository_only(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git" not in provenance(experiment)

    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@e", *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance(experiment)["git"] == commit
    (tmp_path / "file").write_text("1")
    git("add", "file")
    assert provenance(experiment)["git"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert "unknown" in provenance(experiment)["git"]


# Standard errors -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(0, 10**6))
def test_sem_is_the_standard_error_of_the_mean(n, seed):
    values = np.random.default_rng(seed).normal(size=(3, n))
    found = pj.sem(xr.DataArray(values, dims=("lr", "seed")))
    assert found.dims == ("lr",)
    np.testing.assert_allclose(found, values.std(1, ddof=1) / np.sqrt(n), rtol=1e-12)
    np.testing.assert_allclose(pj.sem(xr.DataArray(values, dims=("a", "b")), "a"), values.std(0, ddof=1) / np.sqrt(3), rtol=1e-12)


def test_sem_does_not_leave_out_diverged_cells():
    values = xr.DataArray([[1.0, np.nan, 2.0], [1.0, 2.0, 3.0]], dims=("lr", "seed"))
    found = pj.sem(values)
    assert np.isnan(found[0])
    assert float(found[1]) == pytest.approx(1 / np.sqrt(3))


def test_sem_refusals(result):
    with pytest.raises(ValueError, match=r"no dimension 'width'; it has \['lr', 'seed', 'step'\]"):
        pj.sem(result.train_loss, "width")
    with pytest.raises(ValueError, match="one value along 'seed' has no standard error"):
        pj.sem(result.train_loss.isel(seed=[0]))
    assert pj.sem(result.train_loss).dims == ("lr", "step")


# Labels ----------------------------------------------------------------------------------------------------------------


def test_labels_of_values():
    assert label(0.5) == 0.5
    assert label(True) is True
    assert label("mse") == "mse"
    assert label(None) == "None"
    assert label(optax.sgd) == "sgd"
    assert label(functools.partial(halved, learning_rate=1.0)) == "halved"
    assert label(optax.sgd(0.1)) == "GradientTransformationExtraArgs"
    assert "0x" not in label(object())
    named = pj.data.Dataset(*blobs(), name="blobs")
    assert label(named) == "blobs"


def test_coordinates_of_callables_datasets_and_numbers():
    from paperjax.experiment import Axes
    from paperjax.result import assemble

    first, second = (pj.data.Dataset(*blobs(seed=s), name="blobs") for s in (0, 1))
    axes = {
        "optimizer": [optax.sgd, halved],
        "data": [first, second],
        "batch": [4, None],
        "lr": [0.1, 0.2],
        "flag": [True, False],
        "ready": [optax.sgd(0.1), optax.sgd(0.2)],
    }
    exp = pj.Experiment(line, first, grid=pj.grid(**axes, loss="mse", alpha=0.5, other=first), steps=2, measure_at=2)
    out = {"train_loss": np.arange(128.0).reshape(32, 2, 2), "_diverged_at": np.full((32, 2), -1)}
    kinds = Axes(("lr",), {n: "" for n in axes if n != "lr"})
    found = assemble(exp, kinds, out, {})
    coords = {name: found[name].values.tolist() for name in found.coords}
    assert coords["optimizer"] == ["sgd", "halved"]
    assert coords["data"] == ["blobs #0", "blobs #1"]
    assert coords["batch"] == ["4", "None"]
    assert coords["lr"] == [0.1, 0.2]
    assert coords["flag"] == [True, False]
    assert coords["ready"] == ["GradientTransformationExtraArgs #0", "GradientTransformationExtraArgs #1"]
    assert (coords["loss"], coords["alpha"], coords["other"]) == ("mse", 0.5, "blobs")
    assert found.train_loss.dims == (*axes, "step")
    # Looped axes first, the last fastest; then the traced ones: the numbers say where they came from.
    at = found.train_loss.isel(optimizer=1, data=0, batch=1, lr=1, flag=0, ready=1, step=0)
    assert float(at) == 4 * (16 * 1 + 8 * 0 + 4 * 1 + 2 * 0 + 1) + 2 * 1


def test_where_and_when_cells_diverged(result):
    assert result.diverged_at.attrs["long_name"]
    assert np.isnan(result.diverged_at.sel(lr=0.1)).all()
    assert (result.diverged_at.sel(lr=1e30) >= 1).all()
    assert result.diverged_at.dtype == float
