"""The trace kernel of 50,000 x 50,000 images under a small CNN, as a job in blocks that is killed and taken up again.

    python benchmarks/ntk_blocks.py                     # 30 blocks of the job, some minutes on two cores
    python benchmarks/ntk_blocks.py --all --out k.npy   # the whole job, 10 GB on disk

The job is one call of `pj.ntk(..., out=FILE, max_bytes=...)` in a process of its own. It prints its plan, is killed (SIGKILL) after a third
of the blocks asked for, started again with the same call, and killed again. Reported: seconds a block once the program is compiled, and
the time of all blocks at that rate; what the second process found done; and the most memory of each process beyond what it held when JAX
and the data were ready, its own pages against max_bytes, and together with the pages of the kernel's file that the system keeps for it.
One block of the file is compared with the kernel of its examples computed at once.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from paperjax.kernels.blocks import BlockPlan

SHAPE, WIDTH, DEPTH = (28, 28, 1), 16, 3
TOLERANCE = 1e-5


def parts(n):
    """The network, its parameters, and so many images of noise."""
    import jax

    import paperjax as pj

    x = jax.random.normal(jax.random.key(1), (n, *SHAPE))
    model = pj.models.cnn(WIDTH, DEPTH)
    return model, model.init(jax.random.key(0), x[:1]), jax.block_until_ready(x)


def job(n, out, max_bytes):
    """The call itself; a line when the data are ready, then the plan and the bar on stderr."""
    import paperjax as pj

    model, params, x = parts(n)
    print("ready", flush=True)
    pj.ntk(model, params, x, outputs="trace", out=out, max_bytes=max_bytes, progress=True)


def memory(pid):
    """Bytes of a process: its own pages, and with those of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return found["RssAnon"], found["VmRSS"]


def done(note):
    """Blocks that are on disk."""
    return len(json.loads(note.read_text())["done"]) if note.exists() else 0


def run_until(blocks, args, out, log):
    """Run the job until so many blocks are done, then kill it: seconds at which each block was there, and its largest memory."""
    note = out.with_suffix(out.suffix + ".json")
    command = [sys.executable, __file__, "--job", str(args.examples), str(out), str(int(args.max_gib * 2**30))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit("the job ended before its data were ready; its error is above")
    before = memory(process.pid)
    first, there, times, peak = done(note), done(note), [], (0, 0)
    while process.poll() is None and there < blocks:
        time.sleep(0.02)
        try:
            peak = tuple(max(a, b) for a, b in zip(peak, memory(process.pid)))
        except (OSError, KeyError):
            continue  # It has just ended; poll says how.
        if done(note) > there:
            there = done(note)
            times.append(time.perf_counter())
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the job ended with {process.returncode}; its error is above")
    return first, there, times, tuple(p - b for p, b in zip(peak, before))


def check(out, n, block):
    """The second block, against the kernel of the same examples computed at once."""
    import paperjax as pj

    model, params, x = parts(n)
    size = min(64, block)
    whole = np.asarray(pj.ntk(model, params, x[:size], x[block : block + size], outputs="trace"))
    kernel = np.load(out, mmap_mode="r")
    here, mirrored = kernel[:size, block : block + size], kernel[block : block + size, :size]
    off = np.linalg.norm(here - whole) / np.linalg.norm(whole)
    if not off < TOLERANCE or not np.array_equal(here, mirrored.T):
        raise SystemExit(f"the file's kernel is off by {off:.1e} of its norm, or is not symmetric")
    return off


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--blocks", type=int, default=30, help="how many blocks to run before the job is left")
    parser.add_argument("--max-gib", type=float, default=2.0, help="max_bytes of the job, in GiB")
    parser.add_argument("--all", action="store_true", help="run to the end, without killing it")
    parser.add_argument("--out", type=Path, help="the kernel's file (default: one that is deleted at the end)")
    args = parser.parse_args()
    if args.job:
        job(int(args.job[0]), args.job[1], int(args.job[2]))
        return
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which this system does not have")
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder) / "kernel.npy"
        stops = [args.examples**2] if args.all else [max(1, args.blocks // 3), args.blocks]
        rates = []
        for blocks in stops:
            first, there, times, (own, whole) = run_until(blocks, args, out, sys.stderr)
            gaps = np.diff(times)
            rates += gaps.tolist()
            print(
                f"found {first} blocks done, left {there}; at most {own / 2**30:.2f} GiB of its own beyond the data "
                f"({own / args.max_gib / 2**30:.0%} of max_bytes), {whole / 2**30:.2f} GiB with the file's pages",
                flush=True,
            )
        _, _, high, broad = json.loads(out.with_suffix(out.suffix + ".json").read_text())["done"][0]
        total, rate = len(BlockPlan(args.examples, args.examples, (high, broad), broad, True, 0, 0).pairs), float(np.median(rates))
        # A row of blocks begins with recording its own examples, which takes no longer than as many columns' blocks.
        seconds = rate * (total + math.ceil(args.examples / high) * high / broad)
        print(f"{rate:.2f} s a block of {high} x {broad}, {1e6 * rate / high / broad:.2f} us a pair of images")
        print(f"at that rate all {total} blocks take at most {seconds / 3600:.2f} h")
        print(f"the second block differs from the kernel computed at once by {check(out, args.examples, broad):.1e}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
