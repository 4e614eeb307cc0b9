"""Seconds that `pj.limits.mean_field_dynamics` takes for a linear network of three hidden layers; the size is that of the 60 s target.

python benchmarks/dmft.py
python benchmarks/dmft.py --steps 25  # 17 s on two busy cores; the cost grows as the cube of steps x samples, so 100 steps miss it
"""

import argparse
import time

import numpy as np

import paperjax as pj


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--gamma", type=float, default=1.5)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((given.samples, 40)), np.sign(rng.standard_normal(given.samples))
    began = time.perf_counter()
    # Training to time 0.2, whatever the number of steps.
    answer = pj.limits.mean_field_dynamics(
        x, y, depth=given.depth, gamma=given.gamma, learning_rate=0.2 / given.steps, steps=given.steps, tolerance=1e-4
    )
    seconds = time.perf_counter() - began
    print(f"depth {given.depth}, {given.steps} steps, {given.samples} samples: {seconds:.1f} s, {answer.rounds} rounds")


if __name__ == "__main__":
    main()
