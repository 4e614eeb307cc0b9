#!/usr/bin/env python3
"""Bring one run to its end, whatever happens to the TPU.

    babysit.py [--config FILE] [--keep] [--dry-run]

It looks at the queued resource and at the run, does what comes next (create, push and set up, start, wait, delete and create again), and
looks again; so it can itself be killed and started again at any moment. The run id, RUN_ID, and the commit stay the same, so a run goes on
from its checkpoint. It calls the scripts beside it and nothing else. When the run has ended, it fetches it and deletes the TPU (not with
--keep).

Exit status: the run's own 0, 1 or 2 (verified; a claim not verified; it could not be run); 3 after RETRIES failures in a row, or if the
results cannot be fetched (then the TPU is left); 4 if there is no quota; 5 if the request is QUEUE_TIMEOUT seconds old and not served; 6 if
the scripts cannot be run as they are configured; 130 after Ctrl-C, which leaves the TPU as it is. On 3, 4 and 5 the request is deleted,
since it costs money or quota (not with --keep).
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import configuration
from signs import hosts_of, out_of_quota, pause
from topology import topology

GAVE_UP, NO_QUOTA, STUCK, MISCONFIGURED, INTERRUPTED = 3, 4, 5, 6, 130
# What the scripts exit with if an option or a variable is wrong.
WRONG_OPTION = 2
FINAL = (0, 1, 2)
QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "STATE_UNSPECIFIED")
GOING = ("SUSPENDING", "DELETING")
DEAD = ("FAILED", "SUSPENDED")


class Done(NamedTuple):
    """How a script ended, and what it printed."""

    status: int
    out: str
    errors: str


class Outside(NamedTuple):
    """The world as the babysitter sees it; tests put in their own."""

    script: Callable[..., Done]
    now: Callable[[], float]
    sleep: Callable[[float], None]
    say: Callable[[str], None]
    uniform: Callable[[float, float], float]


class Settings(NamedTuple):
    """Numbers of config.env."""

    hosts: int
    poll: float
    queue_timeout: float
    healthy: float
    backoff: float
    backoff_limit: float
    grace: float
    retries: int
    replace_after: int
    resume: int


class Ended(Exception):  # noqa: N818 It is no error, but how a run of the loop below ends.
    """There is nothing more to do."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def settings(config: Mapping[str, str]) -> Settings:
    """Read the numbers that the loop needs.

    Raises
    ------
    ValueError
        A variable is no number, or the accelerator type cannot be had from the Cloud TPU API.
    """
    found = topology(config["ACCELERATOR_TYPE"])
    if found.gke_only:
        raise ValueError(f"ACCELERATOR_TYPE={config['ACCELERATOR_TYPE']} can only be had through GKE; gke/submit.sh restarts it by itself.")
    names = ("POLL_SECONDS", "QUEUE_TIMEOUT", "HEALTHY_SECONDS", "BACKOFF_SECONDS", "BACKOFF_LIMIT", "GRACE_SECONDS")
    poll, queue, healthy, backoff, limit, grace = (configuration.number(config, name) for name in names)
    retries, replace_after, resume = (int(configuration.number(config, name)) for name in ("RETRIES", "REPLACE_AFTER", "RESUME_EXIT_CODE"))
    return Settings(found.hosts, poll, queue, healthy, backoff, limit, grace, retries, replace_after, resume)


class Memory(NamedTuple):
    """What the loop remembers; all of it may be forgotten without harm, but for the count of failures in a row."""

    failures: int = 0
    deaf: int = 0
    prepared: bool = False
    queued_since: float | None = None
    running_since: float | None = None
    partly_since: float | None = None
    told: str = ""


class Watch(NamedTuple):
    """What is looked after, and by what means."""

    name: str
    commit: str
    settings: Settings
    outside: Outside


def babysit(watch: Watch) -> Ended:
    """Look and act until there is nothing more to do; returns how it ended."""
    memory = Memory()
    while True:
        try:
            memory = step(watch, memory)
        except Ended as end:
            return end


def step(watch: Watch, memory: Memory) -> Memory:
    """Look once, do one thing, wait.

    Raises
    ------
    Ended
        There is nothing more to do.
    """
    looked = _call(watch, "status.sh", "--state")
    if looked.status != 0:
        return _failed(watch, memory, "Google does not say how the TPU is", looked)
    state, _, message = looked.out.strip().partition("\t")
    memory = _tell(watch, memory, f"{watch.name} is {state}")
    if state != "ACTIVE":
        memory = memory._replace(deaf=0, prepared=False, running_since=None, partly_since=None)
    if state not in QUEUED:
        memory = memory._replace(queued_since=None)
    if state == "ACTIVE":
        return _active(watch, memory)
    if state == "MISSING":
        return _create(watch, memory)
    if state in QUEUED:
        return _queued(watch, memory)
    if state in GOING:
        return _wait(watch, memory)
    if state in DEAD:
        return _replace(watch, memory, state, message)
    raise Ended(MISCONFIGURED, f"{watch.name} is in a state that is not known here: {state}. Nothing was done about it.")


def _create(watch: Watch, memory: Memory) -> Memory:
    done = _call(watch, "create.sh")
    if done.status == 0:
        return _wait(watch, memory._replace(queued_since=watch.outside.now()))
    _refuse_without_quota(watch, done.errors)
    return _failed(watch, memory, "it could not be asked for", done)


def _queued(watch: Watch, memory: Memory) -> Memory:
    now = watch.outside.now()
    since = now if memory.queued_since is None else memory.queued_since
    if now - since >= watch.settings.queue_timeout:
        raise Ended(
            STUCK,
            f"{watch.name} was not served within QUEUE_TIMEOUT={watch.settings.queue_timeout:g} s. Another ZONE, a smaller "
            "ACCELERATOR_TYPE or another PROVISIONING may be served sooner.",
        )
    return _wait(watch, memory._replace(queued_since=since))


def _replace(watch: Watch, memory: Memory, state: str, message: str) -> Memory:
    # It keeps its name, and its part of the quota, until it is deleted.
    deleted = _call(watch, "teardown.sh")
    _refuse_without_quota(watch, message)
    if deleted.status != 0:
        return _failed(watch, memory, "it could not be deleted", deleted)
    why = "it was preempted" if state == "SUSPENDED" else f"the request failed: {message or 'Google gives no reason'}"
    return _failed(watch, memory, why)


def _active(watch: Watch, memory: Memory) -> Memory:
    looked = _call(watch, "status.sh", "--run")
    hosts = hosts_of(looked.out)
    if looked.status != 0 or len(hosts) != watch.settings.hosts:
        # A new TPU has no host.sh to answer.
        if not memory.prepared:
            return _prepare(watch, memory)
        return _deaf(watch, memory._replace(prepared=False), f"{len(hosts)} of {watch.settings.hosts} hosts answer", looked)
    memory = _tell(watch, memory._replace(deaf=0), f"the run: {', '.join(f'{host} {what}' for host, what in sorted(hosts.items()))}")
    going = [host for host, what in hosts.items() if what == "running"]
    if len(going) == len(hosts):
        return _healthy(watch, memory)
    if going:
        return _partly(watch, memory)
    return _ended(watch, memory._replace(running_since=None, partly_since=None), hosts)


def _prepare(watch: Watch, memory: Memory) -> Memory:
    for script, *options in (("push_code.sh", "--sha", watch.commit), ("setup_host.sh",)):
        done = _call(watch, script, *options)
        if done.status != 0:
            return _deaf(watch, memory, f"{script} failed", done)
    return memory._replace(prepared=True)


def _deaf(watch: Watch, memory: Memory, why: str, done: Done) -> Memory:
    # Google sometimes calls a TPU ACTIVE that is preempted or broken.
    memory = memory._replace(deaf=memory.deaf + 1)
    if memory.deaf < watch.settings.replace_after:
        return _failed(watch, memory, why, done)
    deleted = _call(watch, "teardown.sh")
    why = f"{why}, REPLACE_AFTER={watch.settings.replace_after} times in a row, so the TPU is deleted, to be asked for again"
    return _failed(watch, memory._replace(deaf=0), why, deleted if deleted.status != 0 else done)


def _healthy(watch: Watch, memory: Memory) -> Memory:
    now = watch.outside.now()
    since = now if memory.running_since is None else memory.running_since
    failures = 0 if now - since >= watch.settings.healthy else memory.failures
    return _wait(watch, memory._replace(running_since=since, failures=failures, partly_since=None))


def _partly(watch: Watch, memory: Memory) -> Memory:
    # The others notice by themselves, by JAX's heartbeat; if not, they are stopped.
    now = watch.outside.now()
    since = now if memory.partly_since is None else memory.partly_since
    if now - since < watch.settings.grace:
        return _wait(watch, memory._replace(partly_since=since))
    why = f"some hosts went on without the others for GRACE_SECONDS={watch.settings.grace:g} s, and are stopped"
    return _failed(watch, memory._replace(partly_since=now), why, _call(watch, "run.sh", "--stop"))


def _ended(watch: Watch, memory: Memory, hosts: Mapping[str, str]) -> Memory:
    # Worker 0 writes the reports; its word counts.
    first = hosts.get("w-0", "lost")
    if first in [f"exit {status}" for status in FINAL]:
        status = int(first.removeprefix("exit "))
        words = ("all claims are verified", "a claim is not verified", "it could not be run; its log says why")
        raise Ended(status, f"the run has ended: {words[status]}.")
    if first == f"exit {watch.settings.resume}":
        memory = _failed(watch, memory, "the run saved its state and asks to be started again")
    elif any(what != "never" for what in hosts.values()):
        memory = _failed(watch, memory, f"the run broke: worker 0 says {first}; logs.sh --worker all says more")
    memory = memory if memory.prepared else _prepare(watch, memory)
    if not memory.prepared:
        return memory
    started = _call(watch, "run.sh")
    return _wait(watch, memory) if started.status == 0 else _failed(watch, memory, "run.sh failed", started)


def _call(watch: Watch, script: str, *options: str) -> Done:
    done = watch.outside.script(script, *options)
    if done.status == WRONG_OPTION:
        raise Ended(MISCONFIGURED, f"{script}: {done.errors.strip()}")
    return done


def _refuse_without_quota(watch: Watch, text: str) -> None:
    if out_of_quota(text):
        raise Ended(
            NO_QUOTA,
            f"there is no quota for {watch.name}: {text.strip()} Requests that are SUSPENDED or FAILED hold some until they are deleted "
            "(gcloud compute tpus queued-resources list); else ask for more in the console, or change ZONE or PROVISIONING.",
        )


def _failed(watch: Watch, memory: Memory, why: str, done: Done | None = None) -> Memory:
    words = f": {done.errors.strip().splitlines()[-1]}" if done and done.errors.strip() else ""
    failures, most = memory.failures + 1, watch.settings.retries
    if failures > most:
        raise Ended(GAVE_UP, f"{why}{words}. That is failure {failures} in a row, and RETRIES={most}.")
    seconds = pause(failures, watch.outside.uniform, watch.settings.backoff, watch.settings.backoff_limit)
    watch.outside.say(f"{why}{words}; failure {failures} of {most}, again in {seconds:.0f} s")
    watch.outside.sleep(seconds)
    return memory._replace(failures=failures)


def _wait(watch: Watch, memory: Memory) -> Memory:
    watch.outside.sleep(watch.settings.poll)
    return memory


def _tell(watch: Watch, memory: Memory, what: str) -> Memory:
    if what != memory.told:
        watch.outside.say(what)
    return memory._replace(told=what)


def finish(end: Ended, keep: bool, outside: Outside) -> int:
    """Fetch the run, delete the TPU, say how it ended; returns the exit status."""
    status, keep = end.status, keep or end.status == MISCONFIGURED
    if status in (*FINAL, GAVE_UP):
        fetched = outside.script("fetch.sh")
        if fetched.status != 0:
            outside.say(f"not all of the run could be fetched: {fetched.errors.strip()}")
        if fetched.status != 0 and status in (0, 1):
            # There are results, on that disk only.
            status, keep = GAVE_UP, True
    if keep:
        outside.say("the TPU, if there is one, is left as it is and costs money; fetch.sh, then teardown.sh, which deletes it.")
    else:
        deleted = outside.script("teardown.sh")
        if deleted.status != 0:
            outside.say(f"it could not be deleted and may cost money: {deleted.errors.strip()}. teardown.sh tries again.")
    outside.say(str(end))
    return status


def dry_run(script: Callable[..., Done], say: Callable[[str], None]) -> int:
    """Print the commands of a run to which nothing happens, in order."""
    order = (
        ("status.sh", "--state"),
        ("create.sh",),
        ("wait.sh",),
        ("push_code.sh",),
        ("setup_host.sh",),
        ("status.sh", "--run"),
        ("run.sh",),
        ("fetch.sh",),
        ("teardown.sh",),
    )
    for name, *options in order:
        done = script(name, *options, "--dry-run")
        if done.status != 0:
            say(done.errors.rstrip())
            return MISCONFIGURED
        say(f"# {' '.join((name, *options))}\n{done.out.rstrip()}")
    return 0


def scripts(path: Path | None) -> Callable[..., Done]:
    """A function that runs a script of this folder with the same configuration."""

    def script(name: str, *options: str) -> Done:
        given = [] if path is None else ["--config", str(path)]
        done = subprocess.run(["bash", str(configuration.SCRIPTS / name), *options, *given], capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return script


def main(arguments: list[str] | None = None) -> int:
    """Babysit; returns the exit status."""
    parser = argparse.ArgumentParser(description="Bring one run to its end, whatever happens to the TPU.")
    parser.add_argument("--config", type=Path, help="by default config.env beside this script")
    parser.add_argument("--keep", action="store_true", help="do not delete the TPU at the end")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of an undisturbed run, and run nothing")
    given = parser.parse_args(arguments)

    def say(what: str) -> None:
        print(what if given.dry_run else f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {what}", flush=True)

    outside = Outside(scripts(given.config), time.monotonic, time.sleep, say, random.Random().uniform)
    try:
        config = configuration.load(given.config)
        numbers = settings(config)
        if given.dry_run:
            return dry_run(outside.script, outside.say)
        commit = outside.script("push_code.sh", "--print")
        if commit.status != 0:
            raise ValueError(commit.errors.strip())
        name = f"{config['TPU_NAME']} ({config['ACCELERATOR_TYPE']}, {config['ZONE']})"
        return finish(babysit(Watch(name, commit.out.strip(), numbers, outside)), given.keep, outside)
    except ValueError as error:
        print(f"babysit.py: {error}", file=sys.stderr)
        return MISCONFIGURED
    except KeyboardInterrupt:
        print("babysit.py: stopped. The TPU and the run go on; start babysit.py again to look after them, or teardown.sh.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
