"""The contenders of `limit.py`: processes that answer a line of JSON with a line of JSON."""

import ctypes
import gc
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ntk_workers import quietly


def median(values):
    """The middle one, or the mean of two."""
    return float(np.median(values))


def status(field):
    """A size of this process in bytes, from Linux; 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def serve(build, extra):
    """Answers from ``build(kind, depth, x)``: a call that returns both kernels when they are there."""
    now = {}

    def timed():
        wall, cpu = time.perf_counter(), time.process_time()
        kernels = now["call"]()
        return kernels, time.perf_counter() - wall, time.process_time() - cpu

    def first(kind, depth, path, save):
        now["x"] = np.load(path)
        now["call"] = build(kind, depth, now["x"], now)
        kernels, cold, _ = timed()
        for i, name in enumerate(("nngp", "ntk")):
            np.save(f"{save}-{name}.npy", np.asarray(kernels[i]))
        del kernels
        warm = timed()[1]
        return {"compile": max(cold - warm, 0.0), **now.get("said", {})}

    def run():
        # The shortest of as many as fit a second: other processes only add.
        found, began = [], time.perf_counter()
        while not found or (time.perf_counter() - began < 1 and len(found) < 20):
            found.append(timed()[1:])
        return {"wall": min(w for w, _ in found), "cpu": min(c for _, c in found)}

    def memory():
        """Megabytes beyond the kernels, at most."""
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return float("nan")
        # What was freed and is kept for later goes back first, or it would hide what is used now: by JAX, which lets go of the arrays that
        # it took over when Python collects its garbage, then by the C library.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = status("VmRSS")
        kernels = timed()[0]
        size = sum(k.size * k.dtype.itemsize for k in kernels)
        return max(status("VmHWM") - before - size, 0) / 1e6

    return {"first": first, "run": run, "memory": memory, **extra(now)}


def paperjax_worker():
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    import paperjax as pj

    class Perceptron(nn.Module):
        width: int
        depth: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.depth):
                h = nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.normal(1.0))(x)
                x = nn.relu(h * (2 / x.shape[-1]) ** 0.5)
            return nn.Dense(1, use_bias=False, kernel_init=nn.initializers.normal(1.0))(x) / x.shape[-1] ** 0.5

    class Myrtle(nn.Module):
        width: int
        depth: int

        @nn.compact
        def __call__(self, x):
            for layer in range(self.depth):
                h = nn.Conv(self.width, (3, 3), use_bias=False, kernel_init=nn.initializers.normal(1.0))(x)
                x = nn.relu(h * (2 / (9 * x.shape[-1])) ** 0.5)
                if 0 < layer < self.depth - 1:
                    x = nn.avg_pool(x, (2, 2), (2, 2))
            x = jnp.mean(x, (1, 2))
            return nn.Dense(1, use_bias=False, kernel_init=nn.initializers.normal(1.0))(x) / x.shape[-1] ** 0.5

    def scanned(width, depth):
        def init(key, x):
            a, b, c = jax.random.split(key, 3)
            first = jax.random.normal(a, (x.shape[-1], width))
            return first, jax.random.normal(b, (depth - 1, width, width)), jax.random.normal(c, (width, 1))

        def apply(params, x):
            first, hidden, last = params
            x = jax.nn.relu(x @ first * (2 / x.shape[-1]) ** 0.5)
            x, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w * (2 / width) ** 0.5), None), x, hidden)
            return x @ last / width**0.5

        return init, apply

    spent = []
    # XLA's part of compilation, which JAX reports.
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: spent.append(duration_secs) if event.endswith("backend_compile_duration") else None
    )

    def build(kind, depth, x, now):
        network = {"fc": Perceptron, "myrtle": Myrtle, "scan": scanned}[kind]
        spent.clear()

        def call():
            if "program" not in now:
                found = pj.limit(network, now["x"], sizes=dict(depth=depth), dtype="float32", progress=False)
                now["program"] = found.program
                now["said"] = {"tile": sum(spent), "programs": len(spent)}
            else:
                found = pj.limit(now["program"], now["x"], dtype="float32", progress=False)
            return jax.block_until_ready((found.nngp, found.ntk))

        now.pop("program", None)
        return call

    def extra(now):
        def exact(save):
            some = now["x"][:200] if now["x"].ndim == 2 else now["x"][:2]
            found = pj.limit(now["program"], some, progress=False)
            for name in ("nngp", "ntk"):
                np.save(f"{save}-{name}.npy", getattr(found, name))
            return True

        def fill(size):
            """Seconds to write new memory of that size, with as many threads as cores."""
            cores = os.cpu_count() or 1

            def once():
                began = time.perf_counter()
                made = np.empty(size, np.uint8)
                parts = np.array_split(made, cores)
                with ThreadPoolExecutor(cores) as pool:
                    list(pool.map(lambda part: part.fill(1), parts))
                return time.perf_counter() - began

            return min(once() for _ in range(3))

        return {"exact": exact, "fill": fill}

    return serve(build, extra)


def nt_worker():
    import jax  # The old one.

    with quietly():
        from neural_tangents import stax  # pyright: ignore[reportMissingImports]

    def build(kind, depth, x, now):
        layers = []
        for layer in range(depth):
            if kind == "fc":
                layers += [stax.Dense(512, 2**0.5), stax.Relu()]
                continue
            layers += [stax.Conv(64, (3, 3), padding="SAME", W_std=2**0.5), stax.Relu()]
            if 0 < layer < depth - 1:
                layers.append(stax.AvgPool((2, 2), (2, 2)))
        layers += [stax.GlobalAvgPool()] if kind == "myrtle" else []
        kernel = jax.jit(stax.serial(*layers, stax.Dense(1, 1.0))[2], static_argnums=2)
        on_device = jax.numpy.asarray(x)
        return lambda: jax.block_until_ready(tuple(kernel(on_device, None, ("nngp", "ntk"))))

    return serve(build, lambda now: {})


def main(name):
    out, sys.stdout = sys.stdout, sys.stderr
    answers = {"paperjax": paperjax_worker, "nt": nt_worker}[name]()
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        verb, *args = json.loads(line)
        try:
            answer = answers[verb](*args)
        except Exception as error:  # noqa: BLE001  The referee says it.
            answer = {"error": f"{name}, {verb}: {type(error).__name__}: {error}"[:600]}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
