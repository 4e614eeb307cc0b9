"""The dry-runs whose output is kept in ``golden/``: a script, its options, and what its config.env has beyond conftest's.

``python tests/tpu_scripts/cases.py`` writes them anew; read the difference before committing it.
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = HERE.parent.parent / "tpu_scripts"
GOLDEN = HERE / "golden"
CONFIG = {"PROJECT": "my-project", "ZONE": "us-west4-a", "ACCELERATOR_TYPE": "v5litepod-16", "SLUG": "tp6-depth-mup", "SIZE": "quick"}
GKE = {
    "CLUSTER": "my-cluster",
    "REGION": "us-west4",
    "IMAGE": "registry.example/my-project/paperjax/paperjax:1",
    "BUCKET": "gs://my-bucket/runs",
}
SHARED = {"VENV": "/shared/venv", "RUNS": "/shared/runs"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "create-spot": (["create.sh"], {}),
    "create-reserved": (["create.sh"], {"PROVISIONING": "reserved", "ACCELERATOR_TYPE": "v5p-128", "VALID_UNTIL": ""}),
    "create-on-demand": (
        ["create.sh"],
        {
            "PROVISIONING": "on-demand",
            "ACCELERATOR_TYPE": "v4-8",
            "ZONE": "us-central2-b",
            "NETWORK": "n",
            "SUBNETWORK": "s",
            "INTERNAL_IPS": "yes",
        },
    ),
    "create-v6e": (
        ["create.sh"],
        {"ACCELERATOR_TYPE": "v6e-8", "SERVICE_ACCOUNT": "tpu@my-project.iam.gserviceaccount.com", "VALID_UNTIL": "1d12h"},
    ),
    "wait": (["wait.sh"], {}),
    "push_code": (["push_code.sh"], {}),
    "setup_host": (["setup_host.sh"], {}),
    "setup_host-one": (["setup_host.sh", "--worker", "3"], {"INTERNAL_IPS": "yes"}),
    "host-setup": (["host.sh", "--dry-run", "setup"], {}),
    "host-start": (["host.sh", "--dry-run", "start", "run-1", "gs://my-bucket/runs", "--timeout", "300", "--", "run", "tp6-depth-mup"], {}),
    "run": (["run.sh"], {"RUN_OPTIONS": "--grid lr=0.1,0.2 seed=4"}),
    "run-options": (["run.sh", "intrinsic-dimension", "--optimizer", "it's odd"], {"MESH": "none", "BUCKET": "gs://my-bucket/runs"}),
    "run-stop": (["run.sh", "--stop"], {}),
    "babysit": (["babysit.py"], {}),
    "status": (["status.sh"], {}),
    "logs": (["logs.sh"], {}),
    "logs-follow": (["logs.sh", "--worker", "2", "--lines", "9", "--follow"], {}),
    "fetch": (["fetch.sh"], {}),
    "fetch-bucket": (["fetch.sh", "--from-bucket", "--to", "here"], {"BUCKET": "gs://my-bucket/runs"}),
    "profile": (["profile.sh", "--seconds", "2"], {}),
    "teardown": (["teardown.sh"], {}),
    "cost": (["cost.py", "--elapsed"], {}),
    "topology": (["topology.py", "v5p-128", "--check", "--zone", "us-east5-a", "--project", "my-project"], {}),
    "worker_main": (
        shlex.split(
            "worker_main.py --coordinator 10.0.0.2:8476 --num-processes 4 --process-id 1 --profiler-port 9012 --dry-run "
            "-- run tp6-depth-mup --mesh sweep=4,data=4"
        ),
        {},
    ),
    "gke-node_pool": (["gke/node_pool.sh"], GKE),
    "gke-node_pool-tpu7x": (["gke/node_pool.sh"], GKE | {"ACCELERATOR_TYPE": "tpu7x-128", "PROVISIONING": "reserved", "RESERVATION": "r"}),
    "gke-node_pool-delete": (["gke/node_pool.sh", "--delete"], GKE),
    "gke-submit": (["gke/submit.sh"], GKE | {"ACCELERATOR_TYPE": "tpu7x-16", "RUN_OPTIONS": "--steps 50"}),
    "gke-xpk": (["gke/xpk.sh"], GKE | {"ACCELERATOR_TYPE": "tpu7x-16", "XPK_STORAGE": "runs"}),
    "slurm-submit": (["slurm/submit.sh"], SHARED | {"NODES": "2", "PARTITION": "gpu", "ACCOUNT": "theory"}),
}
# These read no config.env.
WITHOUT_CONFIG = ("host.sh", "topology.py", "worker_main.py")


def repository(folder: Path) -> Path:
    """Commit the scripts to a repository of their own; returns their folder there. In the developer's there may be changes."""
    shutil.copytree(SCRIPTS, folder / "tpu_scripts", ignore=shutil.ignore_patterns("config.env", "__pycache__"))
    (folder / ".gitignore").write_text("__pycache__/\nconfig.env\n")
    git = ["git", "-C", str(folder), "-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--no-gpg-sign", "--message", "scripts"]):
        subprocess.run([*git, *words], check=True)
    return folder / "tpu_scripts"


def dry_run(name: str, scripts: Path, folder: Path) -> str:
    """Run a case in an empty folder, with nothing on PATH that could do harm; paths and the commit are replaced by words."""
    (script, *options), changes = CASES[name]
    config = folder / "config.env"
    config.write_text("".join(f"{key}={value}\n" for key, value in (CONFIG | changes).items()))
    words = [*options] if script in WITHOUT_CONFIG else [*options, "--config", str(config), "--dry-run"]
    if script == "topology.py":
        words.append("--dry-run")
    if script == "host.sh":
        # What push_code.sh leaves.
        source = folder / "paperjax" / "source"
        (source / "tpu_scripts").mkdir(parents=True, exist_ok=True)
        (source / "tpu_scripts" / "requirements.txt").write_text("jax\n")
        (source / "COMMIT").write_text(f"{COMMIT}\n")
    # No gcloud, no kubectl, no sbatch: a dry-run that runs one fails.
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for tool in ("bash", "basename", "dirname", "sed", "git", "cat", "cut", "sha256sum", "hostname"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip())
    python = tools / "python3"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    environment = {"PATH": str(tools), "HOME": str(folder), "TMPDIR": "/tmp"}
    command = [str(python) if script.endswith(".py") else "bash", str(scripts / script), *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    repository = scripts.parent
    commit = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return done.stdout.replace(str(repository.resolve()), "REPOSITORY").replace(str(folder), "HOME").replace(commit, "COMMIT")


def main() -> None:
    """Write all golden files."""
    with tempfile.TemporaryDirectory() as place:
        scripts = repository(Path(place, "repository"))
        for name in CASES:
            folder = Path(place, name)
            folder.mkdir()
            (GOLDEN / f"{name}.txt").write_text(dry_run(name, scripts, folder))


if __name__ == "__main__":
    main()
