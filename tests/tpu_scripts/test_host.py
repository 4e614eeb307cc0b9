"""``host.sh`` on a host that is this machine: a home folder of its own, tmux, and stand-ins for Python, uv and gcloud."""

import os
import shutil
import subprocess
import time

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

# Stands for Python: as worker_main.py it saves and exits with 75 at SIGTERM.
PYTHON = """#!/usr/bin/env bash
case $1 in
  -u)
    trap 'echo saved; exit 75' TERM
    echo "worker $*"
    for _ in $(seq 600); do sleep 0.05; done ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "$*" >> "$HOME/uv-calls"
case $1 in
  --version) echo "uv 0.13.9" ;;
  venv) mkdir -p venv/bin && cp "$HOME/python" venv/bin/python ;;
  pip) if [ ! -e "$HOME/failed-once" ]; then touch "$HOME/failed-once"; exit 1; fi ;;
esac
"""


@pytest.fixture
def host(scripts, tmp_path):
    """Runs host.sh with a home that has the pushed source; every session is ended afterwards."""
    home = tmp_path / "home"
    tools = home / "bin"
    tools.mkdir(parents=True)
    source = home / "paperjax" / "source"
    shutil.copytree(scripts, source / "tpu_scripts")
    (source / "COMMIT").write_text("0123\n")
    # No metadata server; and no bucket may be written.
    executable(tools / "curl", "#!/bin/sh\nexit 6\n")
    executable(tools / "gcloud", "#!/bin/sh\necho 'ERROR: 403' >&2\nexit 1\n")
    executable(tools / "hostname", "#!/bin/sh\necho t1v-n-0a1b2c3d-w-0\n")
    executable(home / ".local" / "bin" / "uv", UV)
    executable(home / "python", PYTHON)
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "TMUX_TMPDIR": str(tools),
        "BACKOFF_SECONDS": "0",
    }

    def run(*words):
        command = ["bash", str(source / "tpu_scripts" / "host.sh"), *words]
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)

    run.home, run.environment = home, environment
    yield run
    subprocess.run(["tmux", "kill-server"], env=environment, capture_output=True, check=False)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def state(host):
    return host("state", "run-1").stdout.removeprefix("paperjax-run w-0 ").strip()


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_setup_tries_again_and_does_nothing_the_second_time(host):
    first = host("setup")
    assert first.returncode == 0, first.stderr
    assert "attempt 1 of 5 failed" in first.stderr
    assert "set up: python 3.12" in first.stdout
    calls = (host.home / "uv-calls").read_text()
    second = host("setup")
    assert "already set up" in second.stdout
    assert (host.home / "uv-calls").read_text() == calls


def test_setup_gives_up_with_the_command_that_fails(host):
    executable(host.home / ".local" / "bin" / "uv", UV.replace("pip) if", "pip) exit 1; if"))
    done = host("setup")
    assert done.returncode == 1
    assert "gave up after 5 attempts" in done.stderr
    assert "requirements.txt" in done.stderr


def test_a_run_from_start_to_the_resume_status(host):
    host("setup")
    assert state(host) == "never"
    words = ("start", "run-1", "-", "--timeout", "300", "--", "run", "a-paper", "--optimizer", "it's odd")
    started = host(*words)
    assert started.returncode == 0, started.stderr
    log = host.home / "paperjax" / "runs" / "run-1" / "log"
    until(lambda: log.exists() and "worker" in log.read_text())
    assert log.read_text() == "worker -u source/tpu_scripts/worker_main.py --timeout 300 -- run a-paper --optimizer it's odd\n"
    assert state(host) == "running"
    assert "running already" in host(*words).stdout

    # Nothing is installed under a run that goes on.
    (host.home / "paperjax" / "source" / "COMMIT").write_text("4567\n")
    refused = host("setup")
    assert (refused.returncode, "run.sh --stop" in refused.stderr) == (1, True)

    assert "SIGTERM" in host("stop", "run-1").stdout
    until(lambda: state(host) == "exit 75")
    assert host("logs", "run-1", "1", "no").stdout == "saved\n"
    assert "not running" in host("stop", "run-1").stdout


def test_a_run_whose_session_is_gone_is_lost(host):
    host("setup")
    host("start", "run-1", "-", "--", "run", "a-paper")
    log = host.home / "paperjax" / "runs" / "run-1" / "log"
    until(lambda: log.exists() and "worker" in log.read_text())
    pid = int((host.home / "paperjax" / "runs" / "run-1" / "pid").read_text())
    shell = int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout)
    # As a host that loses power, not one that is shut down.
    os.kill(shell, 9)
    os.kill(pid, 9)
    until(lambda: state(host) == "lost")


def test_starting_without_setup_is_refused(host):
    done = host("start", "run-1", "-", "--", "run", "a-paper")
    assert (done.returncode, "setup_host.sh first" in done.stderr) == (2, True)


def test_a_bucket_without_credentials_is_refused_before_the_run(host):
    host("setup")
    done = host("start", "run-1", "gs://my-bucket/runs", "--", "run", "a-paper")
    assert done.returncode == 2
    for words in ("BUCKET=gs://my-bucket/runs", "roles/storage.objectAdmin", "SERVICE_ACCOUNT"):
        assert words in done.stderr
    assert state(host) == "never"


# A bucket that is a folder.
BUCKET = """#!/usr/bin/env bash
at() { echo "${1/gs:\\/\\//$HOME/bucket/}"; }
case $2 in
  cp) mkdir -p "$(dirname "$(at "$4")")" && cat "${3/#-//dev/stdin}" > "$(at "$4")" ;;
  cat) cat "$(at "$3")" ;;
  rsync) mkdir -p "$(at "$4")" && cp -r "$(at "$3")/." "$(at "$4")" ;;
esac
"""


def test_a_new_host_begins_from_what_the_old_one_left_in_the_bucket(host):
    executable(host.home / "bin" / "gcloud", BUCKET)
    host("setup")
    words = ("start", "run-1", "gs://my-bucket/runs", "--", "run", "a-paper")
    assert host(*words).returncode == 0
    folder = host.home / "paperjax" / "runs" / "run-1"
    until(lambda: (folder / "log").exists() and "worker" in (folder / "log").read_text())
    (folder / "checkpoint").write_text("step 100")
    host("stop", "run-1")
    until(lambda: state(host) == "exit 75")
    until(lambda: subprocess.run(["tmux", "has-session"], env=host.environment, capture_output=True, check=False).returncode != 0)
    shutil.rmtree(folder)
    started = host(*words)
    assert started.returncode == 0, started.stderr
    assert (folder / "checkpoint").read_text() == "step 100"
    until(lambda: state(host) == "running")
