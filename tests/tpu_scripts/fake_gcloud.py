"""A stand-in for ``gcloud`` in the tests: one queued resource, which lives as a play says.

FAKE_GCLOUD is a folder with ``play.json``: ``create_errors``, what Google answers to the first requests; ``hosts``; and ``lives``, one
for each time that it is created: ``queue``, its states before ACTIVE; ``ssh_failures``, how many connections fail first; ``run``, what the
hosts say of the run each time they are asked after it was started (the last word stays); ``end``, the state after these words, with
``message``.
It leaves ``world.json`` and ``calls``, a line for each call.
"""

import functools
import json
import os
import shlex
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_GCLOUD", "."))
BORN = {"alive": True, "queued": 0, "failed": 0, "pushed": False, "set_up": False, "started": False, "asked": 0}


def answer(words, world):
    match words:
        case ["compute", "tpus", "queued-resources", verb, *rest]:
            return {"describe": describe, "create": create, "delete": delete}[verb](rest, world)
        case ["compute", "tpus", "tpu-vm", "ssh" | "scp" as verb, *rest]:
            return remote(verb, rest, world)
        case ["storage", *_]:
            return 1, "", "ERROR: (gcloud.storage.cp) HTTPError 403: the caller does not have storage.objects.create access."
    return 2, "", f"ERROR: (gcloud) unrecognized arguments: {shlex.join(words)}"


@functools.cache
def play():
    return json.loads((FOLDER / "play.json").read_text())


def life(world):
    return play()["lives"][min(world["life"], len(play()["lives"]) - 1)]


def missing(name):
    return 1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'queuedResources/{name}' was not found"


def state_of(world):
    now = life(world)
    if world["queued"] < len(now.get("queue", [])):
        return now["queue"][world["queued"]]
    if now.get("end") and world["asked"] >= len(now.get("run", [])):
        return now["end"]
    return "ACTIVE"


def describe(rest, world):
    if not world["alive"]:
        return missing(rest[0])
    found = state_of(world)
    world["queued"] += 1
    message = life(world).get("message", "") if found == "FAILED" else ""
    return 0, f"{found}\t{message}" if message else found, ""


def create(rest, world):
    if world["refused"] < len(play().get("create_errors", [])):
        world["refused"] += 1
        return 1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.create) {play()['create_errors'][world['refused'] - 1]}"
    if world["alive"]:
        return 1, "", f"ERROR: ALREADY_EXISTS: {rest[0]}"
    world.update(BORN, life=world["life"] + 1)
    return 0, "", f"Create request issued for: [{rest[0]}]"


def delete(rest, world):
    if not world["alive"]:
        return missing(rest[0])
    world["alive"] = False
    return 0, "", ""


def remote(verb, rest, world):
    if not world["alive"] or state_of(world) != "ACTIVE":
        return 1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the TPU is not there"
    if world["failed"] < life(world).get("ssh_failures", 0):
        world["failed"] += 1
        return 255, "", "ssh: connect to host 10.0.0.2 port 22: Connection refused"
    if verb == "scp":
        if "--recurse" in rest:
            (Path([word for word in rest if not word.startswith("-")][1]) / "out").mkdir(parents=True, exist_ok=True)
        return 0, "", ""
    command = next(word for word in rest if word.startswith("--command="))
    if "mkdir" in command:
        world["pushed"] = True
    elif command.startswith("--command=cat"):
        return 0, "", ""
    elif not world["pushed"]:
        return 127, "", "bash: paperjax/source/tpu_scripts/host.sh: No such file or directory"
    elif "host.sh setup" in command:
        world["set_up"] = True
    elif "host.sh state" in command:
        words = life(world)["run"]
        what = words[min(world["asked"], len(words) - 1)] if world["started"] else "never"
        world["asked"] += world["started"]
        each = what if isinstance(what, list) else [what] * play()["hosts"]
        return 0, "\n".join(f"paperjax-run w-{host} {word}" for host, word in enumerate(each)), "Using ssh batch size of 4."
    elif "host.sh start" in command:
        if not world["set_up"]:
            return 2, "", "host.sh: there is no Python; setup_host.sh first."
        world["started"] = True
    return 0, "", ""


def main(words):
    left = FOLDER / "world.json"
    world = json.loads(left.read_text()) if left.exists() else {"life": -1, "alive": False, "refused": 0}
    status, out, errors = answer(words, world)
    left.write_text(json.dumps(world))
    with (FOLDER / "calls").open("a") as calls:
        calls.write(f"{shlex.join(words)}\n")
    if out:
        print(out)
    if errors:
        print(errors, file=sys.stderr)
    return status
