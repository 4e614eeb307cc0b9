"""`pj.limit` against neural-tangents' jitted `kernel_fn`: the same network, the same examples, kernels compared, then times in turns.

    python benchmarks/limit.py                # about 15 minutes on two cores
    python benchmarks/limit.py --only fc-n2000 --rounds 3

Each is a process of its own, warm, and they take turns, so that a drift of the machine's speed meets both. neural-tangents 0.6.5 runs on
jax 0.4.25, in the virtual environment of `ntk.py`. Single precision on both sides. A time is of a call from an array in memory to the NNGP
and the tangent kernel of all N x N pairs, second argument left out; compilation, with tracing, is the first call less a later one. Times
are medians over rounds, their ratio the median of the ratios of each round; the CPU columns count all threads of a process.

Before anything is timed the kernels are compared, away from the diagonal: there neural-tangents is off by up to 2e-3 in single precision
(its correlation of an input with itself is off by rounding, and the angle by the root of that), so ours is held against double precision.

Memory is the most that the process holds during a call beyond what it held before and beyond the two kernels (Linux). The last column is
the time that the two kernels' bytes take to be written at the speed at which this machine fills new memory with two threads, measured in
the same round, over our time: 100 % would be a computation that costs nothing.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from limit_workers import median
from ntk import OLD_JAX, environment, old_python

WORKLOADS = {
    "fc-n2000-d3": ("fc", 3, 2000, 0),
    "fc-n2000-d10": ("fc", 10, 2000, 0),
    "fc-n5000-d3": ("fc", 3, 5000, 0),
    "fc-n5000-d10": ("fc", 10, 5000, 0),
    "myrtle-16": ("myrtle", 4, 16, 16),
    "myrtle-32": ("myrtle", 4, 5, 32),
    "scan-d1000": ("scan", 1000, 200, 0),
}
TARGETS = {"fc-n2000-d3": 4.0, "fc-n5000-d3": 4.0, "fc-n2000-d10": 8.0, "fc-n5000-d10": 8.0, "myrtle-16": 10.0, "myrtle-32": 10.0}
TOLERANCE, DIAGONAL = 1e-3, 1e-6
ROW = "{:>14} {:>10} {:>10} {:>11} {:>11} {:>15} {:>13} {:>13} {:>12}"


class Worker:
    """A contender in a process of its own: a line of JSON is answered by one."""

    def __init__(self, python, name):
        env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        env |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if name == "nt":
            # Packages of the new Python's path would meet the old JAX.
            env.pop("PYTHONPATH", None)
            env.pop("XLA_FLAGS", None)
        command = [python, str(Path(__file__).with_name("limit_workers.py")), name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.answer(600)

    def ask(self, *request):
        """Send a request and wait for what comes back."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer(900)

    def answer(self, patience):
        """The next line of the process."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], patience)[0]:
            raise RuntimeError(f"no answer in {patience} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process of a contender ended (out of memory?)")
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found

    def stop(self):
        """End the process."""
        self.process.kill()
        self.process.wait()


def examples(kind, n, side, features):
    """Normal vectors of norm sqrt(features), or normal images of three channels, two of them the same."""
    rng = np.random.default_rng(0)
    if kind == "myrtle":
        x = rng.normal(size=(n, side, side, 3))
    else:
        x = rng.normal(size=(n, features))
        x *= features**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    x[-1] = x[0]
    return x.astype(np.float32)


def compared(ours, theirs, exact, n):
    """What there is to say of the kernels; an error if they differ."""
    said = []
    for name in ("nngp", "ntk"):
        a, e = ours[name], exact[name]
        if not np.isfinite(a).all():
            raise SystemExit(f"the {name} has a NaN")
        diagonal = np.abs(a.diagonal()[: len(e)] / e.diagonal() - 1).max()
        same = np.abs(a[0] - a[-1]).max() / np.abs(a[0]).max()
        if not diagonal < DIAGONAL or not same < DIAGONAL:
            raise SystemExit(f"the diagonal of the {name} is off by {diagonal:.1e}, repeated rows differ by {same:.1e}")
        said.append(f"{name}: diagonal within {diagonal:.0e} of double precision, repeated rows within {same:.0e}")
        if theirs is not None:
            apart = ~np.eye(n, dtype=bool)
            # The repeated example meets itself off the diagonal.
            apart[0, -1] = apart[-1, 0] = False
            off = np.abs(a - theirs[name])[apart].max() / np.abs(a).max()
            if not off < TOLERANCE:
                raise SystemExit(f"the {name} differs from that of neural-tangents by {off:.1e}")
            said[-1] += f", neural-tangents {off:.0e} apart, {np.abs(theirs[name].diagonal() / a.diagonal() - 1).max():.0e} on the diagonal"
    return said


def run_workload(name, workers, folder, rounds, features):
    """Print the row of a workload."""
    kind, depth, n, side = WORKLOADS[name]
    path = str(folder / "x.npy")
    np.save(path, examples(kind, n, side, features))
    firsts, saved, notes = {}, {}, []
    for who, worker in workers.items():
        if kind == "scan" and who == "nt":
            continue
        firsts[who] = worker.ask("first", kind, depth, path, str(folder / who))
        saved[who] = {k: np.load(folder / f"{who}-{k}.npy", mmap_mode="r") for k in ("nngp", "ntk")}
    workers["paperjax"].ask("exact", str(folder / "exact"))
    exact = {k: np.load(folder / f"exact-{k}.npy") for k in ("nngp", "ntk")}
    notes += compared(saved["paperjax"], saved.get("nt"), exact, n)
    wall, cpu, filled = {who: [] for who in firsts}, {who: [] for who in firsts}, []
    for _ in range(rounds):
        for who in firsts:
            found = workers[who].ask("run")
            wall[who].append(found["wall"])
            cpu[who].append(found["cpu"])
        filled.append(workers["paperjax"].ask("fill", 8 * n * n))
    memory = {who: workers[who].ask("memory") for who in firsts}
    ratios = [median([t / p for t, p in zip(of["nt"], of["paperjax"])]) if "nt" in of else None for of in (wall, cpu)]
    bound = median([f / t for f, t in zip(filled, wall["paperjax"])])
    both = lambda values, form: ", ".join(form.format(values[who]) if who in values else "-" for who in ("paperjax", "nt"))  # noqa: E731
    target = f" ({TARGETS[name]:g})" if name in TARGETS else ""
    print(
        ROW.format(
            name, f"{1e3 * median(wall['paperjax']):.1f}", f"{1e3 * median(wall['nt']):.1f}" if "nt" in wall else "-",
            f"{ratios[0]:.2f}{target}" if ratios[0] else "-", f"{ratios[1]:.2f}" if ratios[1] else "-",
            both({who: f["compile"] for who, f in firsts.items()}, "{:.1f}"), f"{firsts['paperjax'].get('tile', 0):.2f}",
            both(memory, "{:.0f}"), f"{bound:.1%}",
        ),
        flush=True,
    )  # fmt: skip
    for note in notes:
        print(f"{'':>4}{note}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"workloads whose names begin so: {', '.join(WORKLOADS)}")
    parser.add_argument("--features", type=int, default=784, help="of an example of the fully connected networks (default 784)")
    parser.add_argument("--nt-python", help="a Python that has neural-tangents 0.6.5 and jax 0.4.25 (default: an environment is made)")
    args = parser.parse_args()
    names = [name for name in WORKLOADS if not args.only or name.startswith(tuple(args.only))]
    if not names:
        parser.error(f"no workload begins with {', '.join(args.only or ())} here: {', '.join(WORKLOADS)}")
    python = environment("benchmark-nt", args.nt_python, "import neural_tangents", OLD_JAX, args.nt_python or old_python())
    workers = {"paperjax": Worker(sys.executable, "paperjax"), "nt": Worker(python, "nt")}
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{time.strftime('%Y-%m-%d %H:%M')}, {args.rounds} rounds, {os.cpu_count()} cores{load}. Milliseconds a call, targets in brackets."
    )
    print(ROW.format("", "paperjax", "nt", "nt / pj", "CPU nt / pj", "first, s pj, nt", "XLA's, s pj", "MB pj, nt", "of writing"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                run_workload(name, workers, Path(folder), args.rounds, args.features)
    finally:
        for worker in workers.values():
            worker.stop()


if __name__ == "__main__":
    main()
