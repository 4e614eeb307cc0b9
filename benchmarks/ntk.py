"""`pj.ntk` against neural-tangents (its best implementation) and against both routes of torch.func: the same arrays, kernels compared.

    python benchmarks/ntk.py              # about an hour on two cores, most of it finding out what the others do best
    python benchmarks/ntk.py --quick      # small batches and few rounds
    python benchmarks/ntk.py --only cnn --no-torch

Every contender is a process of its own, warm, and they take turns (A B C A B C ...), so that a drift of the machine's speed meets all of
them. A time is of a call from arrays to kernel, second argument left out; compilation (with tracing) is a call from no program at all
less a later one, once a round.

Before anything is timed, kernels are compared: a way whose kernel differs by over 1e-3 of the norm is out, and if none of a library's
ways agrees with paperjax, the workload is not timed and the run ends with an error.

neural-tangents 0.6.5 runs on jax 0.4.25 in a virtual environment of its own under the cache folder; so does PyTorch. Each is tried in
all its ways on a part of the batch, then on all of it in those ways that were within ten times of the best; the fastest one is timed.
(neural-tangents' AUTO compiles its three implementations and takes the one of fewest counted operations: one of those three, with more to
compile.)
Ways that end without an answer or pass --patience are out; so is a contender that cannot be had, saying why.

The last columns are operations that paperjax counts in a second, over those of a jitted 2048 x 2048 x 2048 product in the same process, in
the same round: those of the forward and backward passes that it records (as XLA counts them before it rewrites them), of gradients of
examples where it forms them, and of what makes the kernel of each leaf, for all N x N pairs and, in brackets, for the N (N + 1) / 2 that a
symmetric kernel needs.
"""

import argparse
import json
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from ntk_models import OUTPUTS, draw
from ntk_workers import median

BATCHES = (("mlp", 0, 64), ("mlp", 0, 256), ("cnn", 0, 16), ("cnn", 0, 64), ("resnet", 0, 8), ("transformer", 16, 16))
BATCHES += (("transformer", 16, 64), ("transformer", 64, 8))
ONLY_FULL = (("resnet", 0, 8), ("transformer", 64, 8))
WORKLOADS = {
    f"{kind}{f'-t{length}' if length else ''}-n{n}-{outputs}": (kind, length, n, outputs)
    for kind, length, n in BATCHES
    for outputs in ("full", "trace")
    if outputs == "full" or (kind, length, n) not in ONLY_FULL
}
WAYS = {
    "paperjax": ("auto",),
    "nt": ("STRUCTURED_DERIVATIVES", "JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"),
    "torch": ("contraction", "products"),
}
OLD_JAX = ("jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "scipy<1.13", "neural-tangents==0.6.5")
TARGETS, MEAN_TARGET, TOLERANCE = {"nt": 1.3, "torch": 1.0}, 2.0, 1e-3
PEAK_TARGETS = {"mlp": 0.8, "transformer": 0.5}
ROW = "{:>22} {:>9} {:>9} {:>10} {:>12} {:>12} {:>17} {:>14}"


class Failed(Exception):
    """A contender's way that came to nothing."""


class Differs(Failed):
    """Another kernel than the reference."""


class Wrong(Exception):
    """No way of a library has the kernel of paperjax, or paperjax has none."""


class Worker:
    """A contender in a process of its own, started again when it ended or passed its time."""

    def __init__(self, python, name):
        self.python, self.name = python, name
        self.start()

    def start(self):
        """Start the process and wait until it has imported what it needs."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        env |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.holds = None  # What a new process was asked for last, if it answered.
        if self.name != "paperjax":
            # An old XLA ends at a flag that it does not know.
            env.pop("XLA_FLAGS", None)
        command = [self.python, str(Path(__file__).with_name("ntk_workers.py")), self.name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.answer(None)

    def ask(self, *request, patience=None):
        """Send a request, wait for the answer, at most `patience` seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        try:
            found = self.answer(patience)
        except Failed:
            self.stop()
            self.start()
            raise
        if isinstance(found, dict) and "error" in found:
            raise Failed(found["error"])
        return found

    def answer(self, patience):
        """The next line of the process."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], patience)[0]:
            raise Failed(f"no answer in {patience:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed("its process ended (out of memory?)")
        return json.loads(line)

    def stop(self):
        """End the process."""
        self.process.kill()
        self.process.wait()


def environment(name, given, test, packages, python=sys.executable):
    """A Python that runs `test`: the one given, or a virtual environment made here."""
    if given:
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paperjax" / name
    found = cache / "bin" / "python"
    if not found.exists():
        print(f"making a virtual environment in {cache} (once): {' '.join(packages)}", flush=True)
        if python == sys.executable:
            venv.create(cache, with_pip=True)
        else:
            subprocess.run([python, "-m", "venv", cache], check=True)
    if subprocess.run([found, "-c", test], capture_output=True, check=False).returncode != 0:
        subprocess.run([found, "-m", "pip", "install", "-q", *packages], check=True)
    return str(found)


def old_python():
    """A Python that jaxlib 0.4.25 has wheels for."""
    if (3, 9) <= sys.version_info[:2] <= (3, 12):
        return sys.executable
    for version in ("3.12", "3.11", "3.10", "3.9"):
        found = shutil.which(f"python{version}")
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    raise OSError("jax 0.4.25 has wheels for Python 3.9 to 3.12, and none of them is here (--nt-python names one)")


def start_workers(args):
    """All contenders that can be had, by name."""
    workers = {"paperjax": Worker(sys.executable, "paperjax")}
    peers = {
        "nt": ("neural-tangents", args.no_nt, args.nt_python, "import neural_tangents", OLD_JAX, old_python),
        "torch": ("PyTorch", args.no_torch, args.torch_python, "import torch, numpy", ("torch==2.13.0", "numpy"), lambda: sys.executable),
    }
    for name, (title, left_out, given, test, packages, python) in peers.items():
        if left_out:
            continue
        try:
            made = environment(f"benchmark-{name}", given, test, packages, given or python())
            workers[name] = Worker(made, name)
        except (OSError, subprocess.CalledProcessError, Failed) as error:
            print(f"{title} left out: {error}", flush=True)
    return workers


class Referee:
    """One workload's files and rules."""

    def __init__(self, folder, workload, patience):
        kind, length, self.n, self.outputs = self.workload = workload
        self.patience = patience
        self.path = str(folder / "arrays.npz")
        params, x = draw(kind, self.n, length)
        self.entries = sum(p.size for p in params.values())
        np.savez(self.path, allow_pickle=False, x=x, **params)
        self.saved = str(folder / "kernel.npy")
        self.kernel = None

    def first(self, worker, way, n):
        """First and second call on `n` of the examples; the kernel must be that of paperjax."""
        patience = None if worker.name == "paperjax" else self.patience
        worker.holds = None
        found = worker.ask("first", way, self.workload, n, self.path, self.saved, patience=patience)
        worker.holds = way, n
        kernel = np.load(self.saved) * (OUTPUTS if worker.name == "nt" and self.outputs == "trace" else 1)
        if self.kernel is None:
            self.kernel = kernel
        reference = self.kernel[:n, :n]
        if kernel.shape != reference.shape:
            raise Differs(f"a kernel of shape {kernel.shape}, not {reference.shape}")
        off = np.linalg.norm(kernel - reference) / np.linalg.norm(reference)
        if not off < TOLERANCE:
            raise Differs(f"not the kernel of paperjax, by {off:.1e} of its norm")
        return found

    def ready(self, worker):
        """Bring a contender to its best way on the whole batch: what the first call took, that way, and remarks on the others."""
        if len(WAYS[worker.name]) == 1:
            return WAYS[worker.name][0], self.first(worker, WAYS[worker.name][0], self.n), []
        part, remarks, left = min(self.n, max(16, self.n // 4)), [], WAYS[worker.name]
        best, tried, differs = "", {}, False
        # A part of the batch first: a way that is hopeless there need not be waited for on the whole.
        for n in sorted({part, self.n}):
            tried = {}
            for way in left:
                try:
                    self.fits(worker, way, n)
                    tried[way] = self.first(worker, way, n)
                except Failed as failed:
                    differs |= isinstance(failed, Differs)
                    remarks.append(f"{way} at N = {n}: {failed}")
            if not tried:
                # With no other way of the same library to bear paperjax out, it may be paperjax that is wrong.
                if differs:
                    raise Wrong(f"{worker.name}: {'; '.join(remarks)}")
                raise Failed("; ".join(remarks))
            best = min(tried, key=lambda way: tried[way]["seconds"])
            slow = {way: t["seconds"] for way, t in tried.items() if t["seconds"] > 10 * tried[best]["seconds"]}
            remarks += [f"{way} at N = {n}: {1e3 * t['seconds']:.1f} ms" for way, t in tried.items()]
            left = tuple(way for way in left if way in tried and way not in slow)
            # Work grows at most with the square of the batch.
            if n < self.n and tried[best]["seconds"] * (self.n / n) ** 2 > 2 * self.patience:
                raise Failed("; ".join([*remarks, f"about {tried[best]['seconds'] * (self.n / n) ** 2:.0f} s at N = {self.n}"]))
        if worker.holds != (best, self.n):
            self.first(worker, best, self.n)
        return best, tried[best], remarks

    def fits(self, worker, way, n):
        """Refuse a way of neural-tangents that holds Jacobians for which there is no memory (swapping would slow everything)."""
        needs = 2 * 4 * n * OUTPUTS * self.entries
        if worker.name != "nt" or way == "STRUCTURED_DERIVATIVES" or sys.platform != "linux":
            return
        lines = Path("/proc/meminfo").read_text().splitlines()
        have = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        if needs > 0.7 * have:
            raise Failed(f"two Jacobians are {needs / 1e9:.0f} GB, {have / 1e9:.0f} GB are free")


def run_workload(name, workers, folder, rounds, patience):
    """Print the row of one workload; the ratios of times to paperjax's, and paperjax's share of the peak."""
    referee = Referee(folder, WORKLOADS[name], patience)
    ways, firsts, notes = {}, {}, []
    for who, worker in workers.items():
        try:
            ways[who], firsts[who], remarks = referee.ready(worker)
        except Failed as failed:
            if who == "paperjax":
                raise Wrong(f"paperjax: {failed}") from failed
            remarks = [f"left out: {failed}"]
        if remarks:
            notes.append(f"{who}: {'; '.join([ways[who] + ' it is', *remarks] if who in ways else remarks)}")
    times, compiles, peaks = {who: [] for who in ways}, {who: [] for who in ways}, []
    for _ in range(rounds):
        for who, found in times.items():
            # Seconds of a call that takes that long do not depend on the moment: it is not repeated.
            long = firsts[who]["seconds"] > 30
            compiles[who].append(firsts[who]["compile"] if long else workers[who].ask("compile"))
            found.append(firsts[who]["seconds"] if long else workers[who].ask("run"))
        peaks.append(workers["paperjax"].ask("peak"))
    ours = times["paperjax"]
    ratios = {who: median([t / p for t, p in zip(ts, ours)]) for who, ts in times.items() if who != "paperjax"}
    counted = workers["paperjax"].ask("operations", WORKLOADS[name], referee.path)
    alone, n = counted["passes"] + counted["sides"], referee.n
    flops = [alone + counted["pairs"], alone + counted["pairs"] * (n + 1) / (2 * n)]
    fraction = [median([f / t / p for t, p in zip(ours, peaks)]) for f in flops]
    row = [name, *(f"{1e3 * median(times[who]):.2f}" if who in times else "-" for who in ("paperjax", "nt", "torch"))]
    row += [f"{ratios[who]:.2f} ({TARGETS[who]})" if who in ratios else "-" for who in ("nt", "torch")]
    row.append(", ".join(f"{median(compiles[who]):.2f} s" if who in compiles else "-" for who in ("paperjax", "nt")))
    print(ROW.format(*row, f"{fraction[0]:.0%} ({fraction[1]:.0%})"), flush=True)
    routes = "; ".join(f"{route} {' '.join(leaves)}" for route, leaves in counted["routes"].items())
    shares = ", ".join(f"{what} {counted[what] / 1e9:.2f}" for what in ("passes", "sides", "pairs"))
    for note in (f"paperjax: {routes}", f"10^9 operations: {shares}; peak {median(peaks) / 1e9:.0f} in a second", *notes):
        print(f"{'':>4}{note}", flush=True)
    return ratios | {"peak": fraction[0]}


def geometric_mean(numbers):
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest batch of every network, fewer rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7; quick 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"workloads whose names begin so: {', '.join(WORKLOADS)}")
    parser.add_argument("--nt-python", help="a Python that has neural-tangents 0.6.5 and jax 0.4.25 (default: an environment is made)")
    parser.add_argument("--torch-python", help="a Python that has PyTorch (default: an environment is made)")
    parser.add_argument("--no-nt", action="store_true", help="leave neural-tangents out")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--patience", type=float, help="seconds that one way's first calls may take (default 300; quick 60)")
    args = parser.parse_args()
    names = [name for name in WORKLOADS if not args.only or name.startswith(tuple(args.only))]
    if args.quick:
        names = [name for name in names if WORKLOADS[name][2] == min(w[2] for w in WORKLOADS.values() if w[:2] == WORKLOADS[name][:2])]
    if not names:
        parser.error(f"no workload begins with {', '.join(args.only or ())} here: {', '.join(WORKLOADS)}")
    rounds = args.rounds or (2 if args.quick else 7)
    patience = args.patience or (60 if args.quick else 300)
    workers = start_workers(args)
    print(f"{rounds} rounds, {os.cpu_count()} cores. Milliseconds for one kernel, medians; ratios of times, target in brackets.")
    header = ("network, batch, kernel", "paperjax", "nt", "torch", "nt / pj", "torch / pj", "compile pj, nt", "of peak (half)")
    print(ROW.format(*header), flush=True)
    found, wrong = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                try:
                    found.append({"network": name.split("-")[0]} | run_workload(name, workers, Path(folder), rounds, patience))
                except Wrong as error:
                    print(f"{name:>22} not timed. {error}", flush=True)
                    wrong.append(name)
    finally:
        for worker in workers.values():
            worker.stop()
    for who in workers:
        ratios = [r[who] for r in found if who in r]
        if ratios:
            mean = geometric_mean(ratios)
            goal = f"target {MEAN_TARGET}, each {TARGETS[who]}" if who == "nt" else f"target: each at least {TARGETS[who]}"
            print(f"{who} / paperjax over {len(ratios)} workloads: geometric mean {mean:.2f}, least {min(ratios):.2f} ({goal})")
    for network, goal in PEAK_TARGETS.items():
        shares = [r["peak"] for r in found if r["network"] == network]
        if shares:
            mean = geometric_mean(shares)
            print(f"{network} of peak over {len(shares)} workloads: geometric mean {mean:.0%}, least {min(shares):.0%} (target {goal:.0%})")
    if wrong:
        raise SystemExit(f"kernels that differ, or are not there: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
