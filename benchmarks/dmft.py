"""Seconds that `pj.limits.mean_field_dynamics` takes for a network of three hidden layers; the size is that of the 60 s target.

python benchmarks/dmft.py                      # four runs of 2,000 coordinates, tanh
python benchmarks/dmft.py --activation relu
python benchmarks/dmft.py --activation linear  # exact
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import paperjax as pj

ACTIVATIONS = {"linear": None, "tanh": jnp.tanh, "relu": jax.nn.relu}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--coordinates", type=int, default=2000)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--gamma", type=float, default=1.5)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((given.samples, 40)), np.sign(rng.standard_normal(given.samples))
    load, began, used = os.getloadavg()[0], time.perf_counter(), time.process_time()
    # Training to time 1, whatever the number of steps; linear networks, faster, to 0.2.
    end = 0.2 if given.activation == "linear" else 1.0
    answer = pj.limits.mean_field_dynamics(
        x, y, depth=given.depth, gamma=given.gamma, learning_rate=end / given.steps, steps=given.steps,
        phi=ACTIVATIONS[given.activation], samples=given.coordinates, replicas=given.replicas, key=jax.random.key(0),
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    error = np.linalg.norm(answer.stderr[1]) / np.linalg.norm(answer.features)
    print(
        f"{given.activation}, depth {given.depth}, {given.steps} steps, {given.samples} samples: {seconds:.1f} s ({cpu:.1f} s of CPU; load "
        f"{load:.1f} before), kernels' standard error {error:.2%}, left out {answer.residual:.1e}"
    )


if __name__ == "__main__":
    main()
