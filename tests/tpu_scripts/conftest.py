"""The scripts in a git repository of their own, and a ``gcloud`` that plays a part."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tpu_scripts.cases import CONFIG, repository

HERE = Path(__file__).parent
MODULES = ("configuration", "topology", "signs", "cost", "babysit", "worker_main")


@pytest.fixture(scope="session")
def scripts(tmp_path_factory):
    """The folder of the scripts, in a repository with one commit."""
    return repository(tmp_path_factory.mktemp("scripts") / "repository")


@pytest.fixture(scope="session")
def modules(scripts):
    """The Python among the scripts."""
    sys.path.insert(0, str(scripts))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(scripts))


@pytest.fixture
def config(tmp_path):
    """Writes a config.env; returns its path."""

    def write(**changes):
        path = tmp_path / "config.env"
        path.write_text("".join(f"{name}={value}\n" for name, value in (CONFIG | changes).items()))
        return path

    return write


@pytest.fixture
def script(scripts, tmp_path):
    """Runs a script in an empty folder and without the environment's variables."""

    def run(name, *options, **environment):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": "/tmp", **environment}
        command = [sys.executable if name.endswith(".py") else "bash", str(scripts / name), *map(str, options)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts the fake ``gcloud`` on PATH with a play; returns the function that reads its calls."""
    folder = tmp_path / "gcloud"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "gcloud"
    # It is started dozens of times: without packages, and compiled once.
    path = f"sys.path.insert(0, {str(HERE)!r})"
    program.write_text(f"#!{sys.executable} -S\nimport sys\n{path}\nimport fake_gcloud\nsys.exit(fake_gcloud.main(sys.argv[1:]))\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(folder))

    def play(**parts):
        (folder / "play.json").write_text(json.dumps({"hosts": 4, "lives": [{}], **parts}))
        return lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []

    return play
