"""A sweep of 13 learning rates × 8 seeds as one Experiment, against the same cells one by one, in JAX and in PyTorch.

    python benchmarks/sweep.py            # about 15 minutes on two cores
    python benchmarks/sweep.py --quick    # about 3 minutes, fewer rounds and steps

Networks are MLPs (width × depth, batch) trained on that many digits by full-batch SGD with the mean squared error. Every
contender is a process of its own, warm, and they take turns (A B C A B C ...), so that a drift of the machine's speed meets
all of them. Before anything is timed, their losses after 50 steps are compared: all start from the same parameters.

Run time is per cell, without compilation; compile time (with tracing) stands apart. "whole sweep" is wall time from the call to
the labelled result, everything counted, at the number of steps given. The last line is what an Experiment costs for one cell,
against one bare jitted scan of the same 2,000 steps.

PyTorch gets a virtual environment of its own under the cache folder; where it cannot be had, its column is left out, saying why.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

SIZES = ((16, 2, 32), (64, 3, 128), (256, 3, 256), (256, 3, 1797))
# Final losses are compared after so many: later a ReLU flipped by rounding may send a cell another way (one in 104 after 1,000).
CHECK_STEPS = 50
STEPS = {False: (1000, 200, 60, 16), True: (400, 80, 20, 6)}
LEARNING_RATES, SEEDS = 13, 8
CELLS = LEARNING_RATES * SEEDS
ROW = "{:>13} {:>5} {:>9} {:>9} {:>9} {:>16} {:>17} {:>17} {:>21}  {}"
TARGETS = {"loop": (2.0, 1.8, 1.25, 1.0), "torch": (50.0, 8.0, 1.8, 1.4)}


# The workers: each answers a line of JSON with a line of JSON. -------------------------------------------------------------


def experiment(width, depth, batch, steps, **fields):
    import numpy as np
    import optax

    import paperjax as pj

    digits = pj.data.one_hot(pj.data.digits())
    x, y = np.concatenate([digits.x_train, digits.x_test]), np.concatenate([digits.y_train, digits.y_test])
    data = pj.data.Dataset(x[:batch], y[:batch], x[:1], y[:1], digits.name, digits.source)
    grid = pj.grid(lr=pj.logspace(-3, -1, LEARNING_RATES), seed=SEEDS)
    settings = {"loss": "mse", "optimizer": optax.sgd, "grid": grid, "steps": steps, "measure_at": 1, **fields}
    return pj.Experiment(lambda: pj.models.mlp(width, depth, 10), data, **settings)


def paperjax_worker():
    import paperjax as pj

    pj.cpu_devices()

    def run(width, depth, batch, steps):
        began = time.perf_counter()
        result = experiment(width, depth, batch, steps).run()
        wall = time.perf_counter() - began
        return {
            "run": result.attrs["run_seconds"],
            "compile": result.attrs["compile_seconds"],
            "wall": wall,
            "layout": result.attrs["layout"],
            "losses": result.train_loss.isel(step=-1).values.reshape(-1).tolist(),
        }

    return {"run": run}


def loop_worker():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import paperjax as pj

    def parts(width, depth, batch):
        data = experiment(width, depth, batch, 1).data
        return pj.models.mlp(width, depth, 10), jnp.asarray(data.x_train), jnp.asarray(data.y_train)

    def compiled(width, depth, batch, steps):
        model, x, y = parts(width, depth, batch)

        def loss(params):
            return jnp.mean((model.apply(params, x) - y) ** 2)

        def init(seed):
            return model.init(jax.random.fold_in(jax.random.key(seed), 0), x)

        def train(params, lr):
            tx = optax.sgd(lr)

            def step(carry, _):
                params, state = carry
                value, gradient = jax.value_and_grad(loss)(params)
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), value

            (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
            return params, losses, loss(params)

        init = jax.jit(init).lower(jnp.int32(0)).compile()
        params = init(jnp.int32(0))
        return init, jax.jit(train).lower(params, jnp.float32(0.1)).compile()

    def run(width, depth, batch, steps):
        began = time.perf_counter()
        init, train = compiled(width, depth, batch, steps)
        ready = time.perf_counter()
        losses = []
        for lr in pj.logspace(-3, -1, LEARNING_RATES):
            for seed in range(SEEDS):
                losses.append(train(init(jnp.int32(seed)), jnp.float32(lr))[2].block_until_ready())
        done = time.perf_counter()
        return {"run": done - ready, "compile": ready - began, "wall": done - began, "losses": [float(v) for v in losses]}

    def export(width, depth, batch, path):
        model, x, y = parts(width, depth, batch)
        init = jax.jit(lambda seed: model.init(jax.random.fold_in(jax.random.key(seed), 0), x))
        arrays = {"x": np.asarray(x), "y": np.asarray(y)}
        for seed in range(SEEDS):
            params = init(jnp.int32(seed))
            layers = [params["first"], *(jax.tree.map(lambda a: a[i], params["hidden"]) for i in range(depth - 1)), params["readout"]]  # noqa: B023
            for i, layer in enumerate(layers):
                arrays |= {f"w{seed}_{i}": np.asarray(layer["w"]), f"b{seed}_{i}": np.asarray(layer["b"])}
        np.savez(path, allow_pickle=False, **arrays)
        return {}

    def bare(width, depth, batch, steps):
        init, train = compiled(width, depth, batch, steps)
        params = init(jnp.int32(0))
        began = time.perf_counter()
        train(params, jnp.float32(0.01))[2].block_until_ready()
        bare_seconds = time.perf_counter() - began
        one = experiment(width, depth, batch, steps, grid=pj.grid(lr=[0.01], seed=[0]), measure_at=11)
        began = time.perf_counter()
        result = one.run()
        wall = time.perf_counter() - began
        attrs = result.attrs
        return {"bare": bare_seconds, "experiment": attrs["run_seconds"], "fixed": wall - attrs["run_seconds"] - attrs["compile_seconds"]}

    return {"run": run, "export": export, "bare": bare}


def torch_worker():
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]  It lives in an environment of its own.

    def run(width, depth, batch, steps, path):
        arrays = np.load(path)
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
        losses = []
        began = time.perf_counter()
        for lr in np.logspace(-3, -1, LEARNING_RATES):
            for seed in range(SEEDS):
                layers = []
                for i in range(depth + 1):
                    w, b = arrays[f"w{seed}_{i}"], arrays[f"b{seed}_{i}"]
                    linear = torch.nn.Linear(*w.shape)
                    linear.weight.data, linear.bias.data = torch.from_numpy(np.ascontiguousarray(w.T)), torch.from_numpy(b)
                    layers += [linear, torch.nn.ReLU()]
                model = torch.nn.Sequential(*layers[:-1])
                optimizer = torch.optim.SGD(model.parameters(), lr=float(lr))
                for _ in range(steps):
                    optimizer.zero_grad()
                    loss = torch.nn.functional.mse_loss(model(x), y)
                    loss.backward()
                    optimizer.step()
                losses.append(torch.nn.functional.mse_loss(model(x), y).item())
        return {"run": time.perf_counter() - began, "compile": 0.0, "wall": time.perf_counter() - began, "losses": losses}

    return {"run": run}


def serve(name):
    answers = {"paperjax": paperjax_worker, "loop": loop_worker, "torch": torch_worker}[name]()
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        verb, *args = json.loads(line)
        print(json.dumps(answers[verb](*args)), file=out, flush=True)


# The referee. ----------------------------------------------------------------------------------------------------------------


class Worker:
    """A contender in a process of its own."""

    def __init__(self, python, name):
        self.process = subprocess.Popen([python, __file__, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *request):
        """Send a request, wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended without an answer to {request}; its error is above.")
        return json.loads(line)


def torch_python(given):
    """A Python with PyTorch: the one given, or a virtual environment made here."""
    if given:
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paperjax" / "benchmark-torch"
    python = cache / "bin" / "python"
    if not python.exists():
        print(f"making a virtual environment with PyTorch in {cache} (once)", flush=True)
        venv.create(cache, with_pip=True)
    have = subprocess.run([python, "-c", "import torch, numpy"], capture_output=True, check=False).returncode == 0
    if not have:
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", "numpy"], check=True)
    return str(python)


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def compare(name, reference, losses):
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, reference))
    # Sums in another order: 1e-7 a step, grown over the training; a wrong network is off by far more than a per mille.
    if not worst < 1e-3:
        raise SystemExit(f"{name} does not compute the same: losses after {CHECK_STEPS} steps differ by {worst:.2%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 5; quick 3)")
    parser.add_argument("--sizes", type=int, nargs="+", default=range(len(SIZES)), help="which of the sizes, counted from 0")
    parser.add_argument("--torch-python", help="a Python that has PyTorch (default: a virtual environment is made)")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    args = parser.parse_args()
    if args.worker:
        serve(args.worker)
        return
    rounds = args.rounds or (3 if args.quick else 5)
    workers = {"paperjax": Worker(sys.executable, "paperjax"), "loop": Worker(sys.executable, "loop")}
    if not args.no_torch:
        try:
            workers["torch"] = Worker(torch_python(args.torch_python), "torch")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"PyTorch left out: {error}")
    print(
        f"{CELLS} cells, {rounds} rounds, {os.cpu_count()} cores. Microseconds per cell and step, medians; "
        "ratios of times, target in brackets."
    )
    header = (
        "size",
        "steps",
        "paperjax",
        "loop",
        "torch",
        "loop / paperjax",
        "torch / paperjax",
        "compile pj, loop",
        "whole sweep pj, loop",
        "layout",
    )
    print(ROW.format(*header))
    path = str(Path(os.environ.get("TMPDIR", "/tmp")) / f"paperjax-sweep-{os.getpid()}.npz")
    for i in args.sizes:
        size, steps = SIZES[i], STEPS[args.quick][i]
        workers["loop"].ask("export", *size, path)
        extra = {"paperjax": (), "loop": (), "torch": (path,)}
        times = {name: [] for name in workers}
        short = {name: worker.ask("run", *size, min(steps, CHECK_STEPS), *extra[name])["losses"] for name, worker in workers.items()}
        for name in workers:
            compare(name, short["loop"], short[name])
        for _ in range(rounds):
            answers = {name: worker.ask("run", *size, steps, *extra[name]) for name, worker in workers.items()}
            for name, answer in answers.items():
                times[name].append(answer)
        run = {name: median([t["run"] for t in ts]) / CELLS / steps * 1e6 for name, ts in times.items()}
        ratio = {name: median([t["run"] / p["run"] for t, p in zip(ts, times["paperjax"])]) for name, ts in times.items()}
        row = ["{}x{}, {}".format(*size), steps]
        row += [f"{run[name]:.2f}" if name in run else "-" for name in ("paperjax", "loop", "torch")]
        row += [f"{ratio[name]:.2f} ({TARGETS[name][i]})" if name in ratio else "-" for name in ("loop", "torch")]
        for what in ("compile", "wall"):
            row.append(", ".join(f"{median([t[what] for t in times[n]]):.2f} s" for n in ("paperjax", "loop")))
        print(ROW.format(*row, times["paperjax"][0]["layout"]), flush=True)
    Path(path).unlink(missing_ok=True)
    costs = [workers["loop"].ask("bare", 64, 3, 128, 2000) for _ in range(3 * rounds)]
    over = median([c["experiment"] / c["bare"] - 1 for c in costs])
    print(
        f"one cell, 64x3, 128, 2000 steps, 11 measurements: Experiment {median([c['experiment'] for c in costs]):.3f} s, bare scan "
        f"{median([c['bare'] for c in costs]):.3f} s: {over:+.1%} (target under 10 %); "
        f"fixed cost besides compiling {median([c['fixed'] for c in costs]):.2f} s"
    )
    for worker in workers.values():
        worker.process.kill()


if __name__ == "__main__":
    main()
