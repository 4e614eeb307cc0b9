"""The contenders of `ntk.py`: processes that answer a line of JSON with a line of JSON."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from ntk_models import network


def serve_kernels(build, clear=None, extra=None):
    """Answers from ``build(way, kind, outputs, params, x)``: a call that returns when the kernel is there; ``clear()`` forgets programs."""
    now = {}

    def cold():
        """The call's result, and how long it took from no program at all."""
        if clear:
            clear()
        now["call"] = now["build"]()
        began = time.perf_counter()
        kernel = now["call"]()
        return kernel, time.perf_counter() - began

    def first(way, workload, n, path, save):
        kind, _, _, outputs = workload
        arrays = dict(np.load(path))
        x = arrays.pop("x")[:n]
        now["build"] = lambda: build(way, kind, outputs, arrays, x)
        kernel, took = cold()
        np.save(save, np.asarray(kernel))
        # Nothing is compiled in PyTorch: a second call of this length says no more.
        warm = took if took > 20 and not clear else timed(now["call"], 1)
        warm = timed(now["call"], min(5, math.ceil(1 / warm))) if warm < 1 else warm
        now["seconds"] = warm
        return {"compile": max(took - warm, 0.0), "seconds": warm}

    def run():
        now["seconds"] = timed(now["call"], min(20, math.ceil(0.5 / now["seconds"])))
        return now["seconds"]

    def compile_again():
        _, took = cold()
        return max(took - timed(now["call"], 3), 0.0)

    return {"first": first, "run": run, "compile": compile_again, **(extra or {})}


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def timed(call, repeats):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def kernel_operations(model, params, x, n, outputs):
    """Operations of `pj.ntk` of `n` examples with themselves: the recorded passes, work on each example, and on all pairs."""
    import jax

    from paperjax.kernels import engine
    from paperjax.kernels import network as networks

    read = networks.read(model, params, x)
    spec = networks.Spec(outputs=outputs)
    chosen = networks.routes(read, spec, n, n, same=True)
    sides = pairs = 0.0
    for choice, double in zip(chosen, networks.routes(read, spec, 2 * n, 2 * n, same=True)):
        # Of 2n examples, work on pairs is four times that of n, work on each one twice.
        # A bias that shares its weight's Gram matrix costs nothing, and is only listed with the route that the weight takes.
        once = choice.costs[choice.route].flops
        twice = double.costs[choice.route].flops if once else 0.0
        pairs += (twice - 2 * once) / 2
        sides += once - (twice - 2 * once) / 2
    lowered = jax.jit(lambda params, x: engine.record(read, spec, chosen, jax.tree.leaves(params), x)).lower(params, x)
    # XLA counts the gradients that are formed on the way, too.
    passes = (lowered.cost_analysis() or {})["flops"] - sides
    routes = {}
    for choice in chosen:
        routes.setdefault(choice.route, []).append(read.paths[choice.leaf].strip("[]'"))
    return {"passes": passes, "sides": sides, "pairs": pairs, "routes": routes}


def paperjax_worker():
    import jax
    import jax.numpy as jnp

    from paperjax.kernels import ntk
    from paperjax.model import Model

    def model(kind):
        return Model(lambda key, x: {}, network(kind))

    def build(way, kind, outputs, params, x):
        net, params, x = model(kind), jax.tree.map(jnp.asarray, params), jnp.asarray(x)
        return lambda: jax.block_until_ready(ntk(net, params, x, outputs=outputs, route=way))

    def operations(workload, path):
        kind, _, n, outputs = workload
        params = dict(np.load(path))
        x = params.pop("x")
        return kernel_operations(model(kind), params, x, n, outputs)

    size = 2048
    square = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(lambda a: a @ a)

    def peak():
        return 2 * size**3 / timed(lambda: product(square).block_until_ready(), 4)

    return serve_kernels(build, jax.clear_caches, {"operations": operations, "peak": peak})


@contextlib.contextmanager
def quietly():
    """Without what TensorFlow, which neural-tangents brings along, writes past Python's sys.stderr."""
    shown, hidden = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(hidden, 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)


def nt_worker():
    import jax  # The old one.
    import jax.numpy as jnp

    with quietly():
        import neural_tangents as nt  # pyright: ignore[reportMissingImports]

    def build(way, kind, outputs, params, x):
        params, x = {name: jnp.asarray(p) for name, p in params.items()}, jnp.asarray(x)
        way = nt.NtkImplementation[way]
        axes = (-1,) if outputs == "trace" else ()
        f = network(kind)
        # Its type of a network names the arguments.
        empirical = nt.empirical_ntk_fn(f, trace_axes=axes, vmap_axes=0, implementation=way)  # pyright: ignore[reportArgumentType]
        kernel = jax.jit(empirical, static_argnums=1)
        # neural-tangents' trace is a mean over outputs; the referee multiplies.
        return lambda: kernel(x, None, params).block_until_ready()

    return serve_kernels(build, jax.clear_caches)


def torch_worker():
    import ntk_torch
    import torch  # pyright: ignore[reportMissingImports]  It lives in an environment of its own.

    def build(way, kind, outputs, params, x):
        kernel = ntk_torch.ROUTES[way](ntk_torch.network(kind), ntk_torch.torch_params(params), outputs)
        x = ntk_torch.torch_inputs(kind, x)

        def call():
            with torch.no_grad():
                return kernel(x)

        return call

    return serve_kernels(build)


def serve(name):
    if sys.platform == "linux":
        # A way that needs more memory than there is must end itself, not a neighbour.
        Path("/proc/self/oom_score_adj").write_text("1000")
    out, sys.stdout = sys.stdout, sys.stderr
    answers = {"paperjax": paperjax_worker, "nt": nt_worker, "torch": torch_worker}[name]()
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        verb, *args = json.loads(line)
        try:
            answer = answers[verb](*args)
        except Exception as error:  # noqa: BLE001  The referee says it: one of several ways may fail.
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
