"""Kernel regression on 50,000 examples by conjugate gradients: the kernel in a file, no factorization, the error reported.

    python benchmarks/solve.py                # 9.3 GiB of disk, two minutes on two cores
    python benchmarks/solve.py --n 5000       # a minute, and compared with a Cholesky factorization

The kernel is the infinite-width NTK of a ReLU network with one hidden layer on points of a sphere, the labels a polynomial of degree 2 with
noise. What is printed: products with the kernel, the time of all, the relative residual, the bound on the solution's error, and the error
on labels that were not seen.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paperjax.kernels import conjugate_gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000, help="training examples")
    parser.add_argument("--ridge", type=float, default=1e-2, help="over the mean diagonal")
    parser.add_argument("--rank", type=int, default=500, help="of the preconditioner; 0 for none")
    parser.add_argument("--folder", type=Path, help="where the file lies for the time (default: the system's temporary folder)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.n + 1000, 20))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    teacher = x @ rng.normal(size=(20, 2)) * 3
    y = teacher[:, :1] * teacher[:, 1:] + teacher[:, :1]
    noisy = y + 0.1 * rng.normal(size=y.shape)

    @jax.jit
    def kernel(rows, columns):
        u = jnp.clip(jnp.matmul(rows, columns.T, precision="highest"), -1, 1)
        turned = (jnp.pi - jnp.arccos(u)) / jnp.pi
        # NTK of one hidden ReLU layer on the sphere: arc-cosine kernels of order 1 and 0 (Cho and Saul, NeurIPS 2009).
        return jnp.sqrt(1 - u**2) / jnp.pi + 2 * u * turned

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = np.lib.format.open_memmap(f"{folder}/kernel.npy", mode="w+", dtype=np.float32, shape=(args.n, args.n))
        began = time.perf_counter()
        for i in range(0, args.n, 500):
            file[i : i + 500] = kernel(x[i : i + 500], x[: args.n])
        file.flush()
        print(f"kernel of {args.n} x {args.n}, {file.nbytes / 2**30:.1f} GiB, written in {time.perf_counter() - began:.0f} s", flush=True)
        ridge = args.ridge * float(file[0, 0])
        stored = np.load(f"{folder}/kernel.npy", mmap_mode="r")
        began = time.perf_counter()
        found = conjugate_gradients(
            stored, noisy[: args.n], ridge=ridge, rank=args.rank, key=jax.random.key(0), tolerance=3e-5, max_bytes=0
        )
        took = time.perf_counter() - began
        print(f"{found.steps} products and a preconditioner of rank {args.rank}: {took:.0f} s")
        print(f"relative residual {found.residual.max():.1e}, solution within {found.error.max():.1e} of its norm")
        predicted = np.concatenate([kernel(x[i : i + 200], x[: args.n]) @ jnp.float32(found.x) for i in range(args.n, args.n + 1000, 200)])
        unseen = y[args.n :]
        print(f"labels not seen: {np.mean((predicted - unseen) ** 2) / np.mean(unseen**2):.2e} of their mean square left")
        if args.n <= 10_000:
            began = time.perf_counter()
            exact = np.linalg.solve(stored.astype(np.float64) + ridge * np.eye(args.n), noisy[: args.n])
            off = np.linalg.norm(found.x - exact) / np.linalg.norm(exact)
            print(f"a factorization takes {time.perf_counter() - began:.0f} s and differs by {off:.1e}")


if __name__ == "__main__":
    main()
