"""How much of a GPU is used: model FLOPs of a muP transformer's training step, of `pj.ntk`, and of a sweep, over its measured matmul peak.

    python benchmarks/gpu.py                    # on a GPU
    python benchmarks/gpu.py --small            # toy sizes anywhere: that it runs, not how fast
    python benchmarks/gpu.py --any-device       # full sizes on what there is

The peak is a chain of square products in one compiled program, in bfloat16 and in float32 at JAX's default precision, in the same process;
every ratio says which. The step is forward, backward and Adam with float32 parameters that are cast to bfloat16 where used, without
rematerialization; its operations are 6 N + 12 L D T a token (Chowdhery et al., arXiv 2204.02311, appendix B; N without the tables that
are looked up), checked against those that PaperJAX counts in the trace (products, and every other result once an element). Kernels are
counted as in `ntk.py`, for the N (N + 1) / 2 pairs that a symmetric one needs. The sweep is that of `sweep.py`, as one Experiment and one
cell after another, losses compared first.
"""

import argparse
import sys
import time

import ntk_models
import ntk_workers
import sweep

STEP = {"width": 2048, "depth": 8, "heads": 16, "vocab": 32768, "time": 1024, "batch": 8}
KERNELS = (("mlp", 0, 1024, "full"), ("mlp", 0, 4096, "trace"), ("transformer", 64, 256, "trace"))
SWEEPS = ((64, 3, 128, 500), (256, 3, 256, 200), (1024, 3, 1024, 50))
SMALL_STEP = {"width": 64, "depth": 2, "heads": 4, "vocab": 64, "time": 16, "batch": 4}
SMALL_KERNELS = (("mlp", 0, 4, "full"), ("transformer", 4, 4, "trace"))
SMALL_SWEEPS = ((8, 2, 16, 5),)
ROW = "{:<44} {:>12} {:>14} {:>22} {:>22}"


def peak(dtype, size, products=8):
    """Operations a second of ``size × size`` products, one after another."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    # Without the scale, numbers grow until they are infinite.
    chain = jax.jit(lambda a: jax.lax.fori_loop(0, products, lambda _, b: (b @ a) * jnp.asarray(size**-0.5, dtype), a))
    jax.block_until_ready(chain(a))
    return 2 * size**3 * products / ntk_workers.timed(lambda: jax.block_until_ready(chain(a)), 5)


def bfloat16_family(sizes):
    """The transformer whose float32 parameters are cast where they are used."""
    import jax
    import jax.numpy as jnp

    import paperjax as pj

    def family(width):
        whole = pj.models.transformer(width, sizes["depth"], sizes["heads"], vocab=sizes["vocab"], attention_exponent=1.0)

        def apply(params, x):
            return whole.apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x)

        return pj.Model(whole.init, apply)

    return family


def training_step(sizes):
    """``(step, state, model FLOPs)`` of the muP transformer; ``step(state)`` is compiled and gives ``(state, loss)``.

    Raises
    ------
    ValueError
        If the closed form is not what the trace has.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import paperjax as pj
    from paperjax.layout import work
    from paperjax.losses import cross_entropy

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, sizes["vocab"], (sizes["batch"], sizes["time"] + 1)), jnp.int32)
    x, y = tokens[:, :-1], tokens[:, 1:]
    base, target = {"width": sizes["width"] // 4}, {"width": sizes["width"]}
    plan = pj.plan(bfloat16_family(sizes), pj.mup, base=base, target=target, optimizer="adam", x=x)
    tx = plan.optimizer(optax.adam, 1e-3)

    def loss(params):
        return cross_entropy(plan.model.apply(params, x).astype(jnp.float32), y)

    def step(state):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def start(key):
        params = plan.model.init(key, x)
        return params, tx.init(params)

    used, depth = sizes["batch"] * sizes["time"], sizes["depth"]
    products = 12 * depth * sizes["width"] ** 2 + sizes["vocab"] * sizes["width"]
    flops = used * (6 * products + 12 * depth * sizes["width"] * sizes["time"])
    params = jax.eval_shape(lambda key: start(key)[0], jax.random.key(0))
    traced, _ = work(jax.value_and_grad(loss), params)
    # What is no product: more of it in a small network.
    if not flops <= traced <= (1.1 if sizes["width"] >= 1024 else 2) * flops:
        raise ValueError(f"6 N + 12 L D T is {flops:.4g} operations a step, and the trace has {traced:.4g}: one of them is wrong.")
    state = jax.jit(start)(jax.random.key(0))
    return jax.jit(step, donate_argnums=0).lower(state).compile(), state, flops


def time_step(sizes, repeats):
    """Seconds of a step and its model FLOPs; an error if it does not learn."""
    step, state, flops = training_step(sizes)
    losses, times = [], []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        state, loss = step(state)
        losses.append(float(loss))
        times.append(time.perf_counter() - began)
    if not losses[-1] < losses[0]:
        raise ValueError(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} on one batch: this is no training.")
    return ntk_workers.median(times[2:]), flops


def time_kernel(kind, length, n, outputs, repeats):
    """Seconds of one call of `pj.ntk`, its operations, and those that are needed for half of the pairs."""
    import jax
    import jax.numpy as jnp

    import paperjax as pj

    params, x = ntk_models.draw(kind, n, length)
    params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    x = jnp.asarray(x, jnp.int32 if kind == "transformer" else jnp.float32)
    model = pj.Model(lambda key, x: {}, ntk_models.network(kind))

    def call():
        return jax.block_until_ready(pj.ntk(model, params, x, outputs=outputs))

    call()
    counted = ntk_workers.kernel_operations(model, params, x, n, outputs)
    needed = counted["passes"] + counted["sides"] + counted["pairs"] * (n + 1) / (2 * n)
    return ntk_workers.timed(call, repeats), needed


def time_sweep(width, depth, batch, steps):
    """Seconds a cell and step as one Experiment, and one cell after another; operations of a step."""
    import jax
    import jax.numpy as jnp

    from paperjax.layout import work

    made = sweep.experiment(width, depth, batch, steps)
    model, x, y = made.family(), jnp.asarray(made.data.x_train), jnp.asarray(made.data.y_train)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    flops, _ = work(jax.grad(lambda params: jnp.mean((model.apply(params, x) - y) ** 2)), params)
    loop = sweep.loop_worker()["run"]
    # At full precision: rounded to TensorFloat-32, sums that differ in their last bits go on to other losses.
    with jax.default_matmul_precision("highest"):
        short = min(steps, sweep.CHECK_STEPS)
        found = sweep.experiment(width, depth, batch, short).run(progress=False).train_loss.isel(step=-1)
        sweep.compare("the Experiment", loop(width, depth, batch, short)["losses"], found.values.reshape(-1).tolist())
    result, alone = made.run(progress=False), loop(width, depth, batch, steps)
    return result.attrs["run_seconds"] / sweep.CELLS / steps, alone["run"] / sweep.CELLS / steps, flops


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--any-device", action="store_true", help="full sizes without a GPU")
    parser.add_argument("--width", type=int, help=f"of the transformer (default {STEP['width']}); a multiple of 64")
    parser.add_argument("--batch", type=int, help=f"sequences a step (default {STEP['batch']})")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls, of which the median counts (default 10)")
    args = parser.parse_args()
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    if device.platform != "gpu" and not (args.small or args.any_device):
        sys.exit(
            f"gpu.py: JAX sees {device.device_kind} ({device.platform}) and no GPU. Install CUDA's JAX (pip install '.[cuda]') and look at "
            "`paperjax doctor`; or give --small (toy sizes, here) or --any-device (full sizes, here)."
        )
    given = {"width": args.width, "batch": args.batch}
    sizes = (SMALL_STEP if args.small else STEP) | {name: value for name, value in given.items() if value is not None}
    if sizes["width"] < 64 or sizes["width"] % 64:
        parser.error(f"--width {sizes['width']}: give a multiple of 64, which heads of the base's width divide too.")
    square = 256 if args.small else 8192
    peaks = {name: peak(getattr(jnp, name), square) for name in ("bfloat16", "float32")}
    print(f"{device.device_kind}, JAX {jax.__version__}; products of {square} x {square}: ", end="")
    print(", ".join(f"{p / 1e12:.4g} TFLOP/s in {name}" for name, p in peaks.items()))
    if args.small:
        print("Toy sizes: these numbers say that it runs, and nothing else.")
    print(ROW.format("", "seconds", "GFLOP", "of the bfloat16 peak", "of the float32 peak"))

    def show(what, seconds, flops):
        shares = [f"{flops / seconds / peaks[name]:.2%}" for name in ("bfloat16", "float32")]
        print(ROW.format(what, f"{seconds:.3e}", f"{flops / 1e9:.4g}", *shares), flush=True)

    show(f"muP transformer step, bfloat16, width {sizes['width']}", *time_step(sizes, args.repeats))
    for kind, length, n, outputs in SMALL_KERNELS if args.small else KERNELS:
        what = f"pj.ntk, {kind}{f' of {length}' if length else ''}, N {n}, {outputs}"
        show(what, *time_kernel(kind, length, n, outputs, args.repeats))
    for width, depth, batch, steps in SMALL_SWEEPS if args.small else SWEEPS:
        together, alone, flops = time_sweep(width, depth, batch, steps)
        what = f"{sweep.CELLS} cells, {width} x {depth}, batch {batch}"
        show(f"{what}: a cell's step", together, flops)
        show("    one by one", alone, flops)
        print(f"    one by one / together: {alone / together:.2f}")


if __name__ == "__main__":
    main()
