"""The shell scripts: what they would do, word for word; what they refuse; shellcheck; and the real gcloud's linter."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.cases import CASES, GOLDEN, dry_run

SHELL = ("*.sh", "gke/*.sh", "slurm/*.sh", "slurm/*.sbatch")


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_exact_commands_and_runs_none(name, scripts, tmp_path):
    assert dry_run(name, scripts, tmp_path) == (GOLDEN / f"{name}.txt").read_text()


def test_every_script_has_a_case(scripts):
    library = {"lib.sh", "configuration.py", "signs.py"}
    found = {str(path.relative_to(scripts)) for pattern in (*SHELL[:3], "*.py") for path in scripts.glob(pattern)}
    assert found - library == {words[0] for words, _ in CASES.values()}


def test_scripts_say_what_they_do_and_name_their_options(scripts, script):
    for path in [path for pattern in SHELL[:3] for path in scripts.glob(pattern) if path.name not in ("lib.sh", "host.sh")]:
        done = script(str(path.relative_to(scripts)), "--help")
        assert done.returncode == 0, done.stderr
        assert "--dry-run" in done.stdout
        for option in set(re.findall(r"^ +(--[a-z-]+)(?: \|[^)]*)?\)", path.read_text(), flags=re.MULTILINE)):
            assert option in done.stdout, f"{path.name} --help does not name {option}"


def test_shellcheck_is_clean(scripts):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip('there is no shellcheck; pip install ".[test]" brings it')
    files = sorted(str(path) for pattern in SHELL for path in scripts.glob(pattern))
    done = subprocess.run(
        [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def gcloud_commands():
    lines = [line for path in sorted(GOLDEN.glob("*.txt")) for line in path.read_text().splitlines() if line.startswith("gcloud ")]
    # Two commands in one; the linter takes no substitution.
    return sorted({re.sub(r"\$\(gcloud [^)]*\)", "LATEST", line) for line in lines})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_itself_knows_all_commands_and_flags(tmp_path):
    commands = gcloud_commands()
    assert len(commands) > 20
    wrong = "gcloud compute tpus queued-resources create n --zone=z --no-such-flag=1"
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": command} for command in [*commands, wrong]]))
    # With a folder of its own, so that nobody's account is read; the linter asks nobody.
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    words = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(commands) + 1
    assert [(each["command_string"], each["error_message"]) for each in found[:-1] if not each["success"]] == []
    assert not found[-1]["success"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("create.sh", {"ZONE": ""}, "ZONE is not set"),
        ("create.sh", {"ACCELERATOR_TYPE": "v5litepod-12"}, "Nearest: v5litepod-8 (8 chips), v5litepod-16 (16 chips)"),
        ("create.sh", {"ACCELERATOR_TYPE": "tpu7x-8"}, "gke/submit.sh"),
        ("create.sh", {"PROVISIONING": "free"}, "spot, on-demand, reserved"),
        ("create.sh", {"VALID_UNTIL": "soon"}, "VALID_UNTIL=soon"),
        ("create.sh", {"TPU_NAME": "My TPU"}, "TPU_NAME=My TPU"),
        ("create.sh", {"ZNOE": "z"}, "config.env:6: there is no variable ZNOE"),
        ("create.sh", {"INTERNAL_IPS": "maybe"}, "INTERNAL_IPS=maybe"),
        ("wait.sh", {"POLL_SECONDS": "often"}, "POLL_SECONDS=often"),
        ("run.sh", {"SLUG": ""}, "SLUG is not set"),
        ("run.sh", {"SLUG": "rm -rf"}, "SLUG=rm -rf"),
        ("run.sh", {"SIZE": "big"}, "neither quick nor full"),
        ("run.sh", {"BUCKET": "s3://bucket"}, "gs://bucket/folder"),
        ("run.sh", {"RUN_ID": "../other"}, "RUN_ID=../other"),
        ("run.sh", {"ACCELERATOR_TYPE": "v9-8"}, "v4-N (v4)"),
        ("profile.sh", {"PROFILER_PORT": "0"}, "PROFILER_PORT=0"),
        ("gke/submit.sh", {"RUN_ID": "Run_1", "IMAGE": "i", "BUCKET": "gs://b"}, "Kubernetes"),
        ("gke/submit.sh", {"IMAGE": "i"}, "BUCKET is not set"),
        ("gke/xpk.sh", {"CLUSTER": "c", "IMAGE": "i"}, "XPK_STORAGE is not set"),
        ("gke/node_pool.sh", {"CLUSTER": "c", "REGION": "r", "PROVISIONING": "reserved"}, "RESERVATION is not set"),
        ("slurm/submit.sh", {"VENV": "venv", "RUNS": "/runs"}, "VENV=venv"),
        ("slurm/submit.sh", {"VENV": "/venv", "RUNS": "/runs", "NODES": "two"}, "NODES=two"),
    ],
)
def test_wrong_configuration_is_refused_with_its_name(name, changes, words, script, config, gcloud):
    calls = gcloud()
    done = script(name, "--config", config(**changes))
    assert done.returncode == 2
    assert words in done.stderr
    assert not calls()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("create.sh", ["--spot"], "unknown option --spot"),
        ("run.sh", ["--size", "full"], "before the paper"),
        ("logs.sh", ["--worker", "all", "--follow"], "--worker 0"),
        ("logs.sh", ["--lines"], "--lines needs a value"),
        ("profile.sh", ["--seconds", "long"], "--seconds long"),
        ("push_code.sh", ["--sha", "no-such-commit"], "no-such-commit: the repository has no such commit"),
        ("host.sh", ["dance"], "unknown command 'dance'"),
    ],
)
def test_wrong_options_are_refused(name, options, words, script, config):
    done = script(name, *([] if name == "host.sh" else ["--config", config()]), *options)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_missing_config_is_refused_with_the_way_out(script, tmp_path):
    done = script("create.sh", "--config", tmp_path / "none.env")
    assert done.returncode == 2
    assert "config.env.example" in done.stderr


def test_the_environment_goes_before_the_file(script, config):
    done = script("teardown.sh", "--dry-run", "--config", config(), ZONE="europe-west4-b")
    assert "--zone=europe-west4-b" in shlex.split(done.stdout)


def test_a_dirty_tree_is_refused_unless_a_commit_is_named(scripts, script, config):
    stray = scripts / "stray.txt"
    stray.write_text("not committed")
    try:
        done = script("push_code.sh", "--dry-run", "--config", config())
        assert done.returncode == 2
        assert "stray.txt" in done.stderr
        named = script("push_code.sh", "--sha", "HEAD", "--print", "--config", config())
        assert re.fullmatch(r"[0-9a-f]{40}\n", named.stdout), named.stderr
    finally:
        stray.unlink()


@pytest.mark.parametrize(
    ("life", "changes", "status", "words"),
    [
        ({"queue": ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]}, {}, 0, "is ACTIVE"),
        ({"end": "SUSPENDED"}, {}, 1, "preempted"),
        ({"end": "SUSPENDING"}, {}, 1, "preempted"),
        ({"end": "FAILED", "message": "no such network"}, {}, 1, "no such network"),
        ({"end": "DELETING"}, {}, 1, "being deleted"),
        ({"end": "HIBERNATING"}, {}, 1, "not known here: HIBERNATING"),
        ({"queue": ["WAITING_FOR_RESOURCES"] * 9}, {"QUEUE_TIMEOUT": "0"}, 124, "QUEUE_TIMEOUT=0"),
    ],
)
def test_waiting_ends_in_every_state(life, changes, status, words, script, config, gcloud, tmp_path):
    gcloud(lives=[life])
    environment = {"FAKE_GCLOUD": str(tmp_path / "gcloud"), "PATH": os.environ["PATH"]}
    given = config(POLL_SECONDS="0", **changes)
    assert script("create.sh", "--config", given, **environment).returncode == 0
    done = script("wait.sh", "--config", given, **environment)
    assert done.returncode == status
    assert words in done.stdout + done.stderr


def test_what_is_not_there_cannot_be_waited_for_but_can_be_deleted(script, config, gcloud, tmp_path):
    calls = gcloud()
    environment = {"FAKE_GCLOUD": str(tmp_path / "gcloud"), "PATH": os.environ["PATH"]}
    waited = script("wait.sh", "--config", config(), **environment)
    assert (waited.returncode, "create.sh first" in waited.stderr) == (1, True)
    assert script("teardown.sh", "--config", config(), **environment).returncode == 0
    assert not any(" delete " in call for call in calls())


def test_the_jobset_is_yaml_that_fits_the_slice(script, config):
    yaml = pytest.importorskip("yaml")
    given = config(ACCELERATOR_TYPE="tpu7x-16", IMAGE="image:1", BUCKET="gs://bucket/a/b", RUN_OPTIONS='--optimizer a"b&c')
    shown = script("gke/submit.sh", "--dry-run", "--config", given).stdout
    manifest = yaml.safe_load(shown.partition("<<'EOF'\n")[2].removesuffix("EOF\n"))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    # tpu7x-16 is 8 chips on 2 hosts: https://cloud.google.com/tpu/docs/tpu7x, 2x2x2.
    assert (job["parallelism"], job["completions"], container["resources"]["limits"]["google.com/tpu"]) == (2, 2, 4)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu7x", "cloud.google.com/gke-tpu-topology": "2x2x2"}
    assert container["command"][-2:] == ["--optimizer", 'a"b&c']
    attributes = pod["volumes"][0]["csi"]["volumeAttributes"]
    assert (attributes["bucketName"], attributes["mountOptions"]) == ("bucket", "implicit-dirs,only-dir:a/b")
    assert "@" not in json.dumps(manifest)
