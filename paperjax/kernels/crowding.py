"""Rows of a matrix that fall on the same lines of a CPU's cache, and how they are kept from it."""

import itertools
import math

import jax

# Bytes after which addresses share a set of the first cache: 64 sets of 64-byte lines, of 8 or 12 ways.
PERIOD, LINE = 4096, 64
# Rows read side by side begin at PERIOD / gcd(stride, PERIOD) places of it. Products of 64 rows take up to twice as long with four.
CROWDED = 1024
# Entries from which on it is worth the work.
WORTH, ROWS = 2**19, 64


def crowded(rows: int, columns: int, itemsize: int) -> bool:
    """Whether so many rows, read side by side, drive each other out of the cache of the CPU that computes here.

    Examples
    --------
    >>> crowded(64, 166400, 4), crowded(64, 167050, 4)
    (True, False)
    """
    if jax.default_backend() != "cpu" or rows < ROWS or rows * columns < WORTH:
        return False
    return math.gcd(columns * itemsize, PERIOD) >= CROWDED


def spare(outputs: int, k: int, j: int, i: int, itemsize: int) -> tuple[int, int]:
    """How many `j` and `i` of zeros keep the rows of gradients ``(N, outputs, k, j, i)`` apart, of examples and of their outputs alike.

    Batches of all sizes have the same, since kernels are between two of them.

    Examples
    --------
    >>> spare(10, 1, 256, 65, 4), spare(10, 1, 64, 64, 4), spare(10, 1, 255, 65, 4)
    ((1, 0), (0, 1), (0, 0))
    """
    ways = sorted(itertools.product((0, 1), (0, 1)), key=lambda more: (j + more[0]) * (i + more[1]))
    for more_j, more_i in ways:
        entries = k * (j + more_j) * (i + more_i)
        if not crowded(ROWS, outputs * entries, itemsize) and not crowded(ROWS * outputs, entries, itemsize):
            return more_j, more_i
    return 0, 0
