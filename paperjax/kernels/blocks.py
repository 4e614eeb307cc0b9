"""A kernel too large for the memory, block by block: how large the blocks are, the loop over them, a file that survives the process."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import PyTree

from paperjax.progress import progress_bar


class BlockPlan(NamedTuple):
    """How a kernel of ``rows`` by ``columns`` examples is cut.

    Attributes
    ----------
    rows, columns
        Examples of the two batches.
    block
        Examples of either batch in one block; the last ones are filled up with copies, so that one program does for all.
    at_once
        How many examples go through the network together.
    symmetric
        Whether the batches are one: blocks below the diagonal are not computed.
    block_bytes
        What one block needs while it is computed.
    result_bytes
        What the whole kernel takes.

    Examples
    --------
    >>> print(BlockPlan(1000, 1000, (500, 100), 50, True, 2**20, 4 * 10**6))
    kernel of 1000 x 1000 examples (3.815 MiB) in 15 blocks of 500 x 100, 1 MiB each; the lower half by symmetry
    """

    rows: int
    columns: int
    block: tuple[int, int]
    at_once: int
    symmetric: bool
    block_bytes: int
    result_bytes: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """First examples of each block, row by row."""
        high, broad = self.block
        across = range(0, self.columns, broad)
        return [(i, j) for i in range(0, self.rows, high) for j in across if not self.symmetric or j + broad > i]

    def __str__(self) -> str:
        half = "; the lower half by symmetry" if self.symmetric and len(self.pairs) > 1 else ""
        return (
            f"kernel of {self.rows} x {self.columns} examples ({_mb(self.result_bytes)}) in {len(self.pairs)} blocks of {self.block[0]} x "
            f"{self.block[1]}, {_mb(self.block_bytes)} each{half}"
        )


def plan_blocks(
    rows: int, columns: int, symmetric: bool, bytes_of: Callable[[int, int, int], int], at_once: int, max_bytes: int, result: int
) -> BlockPlan:
    """Blocks that fit in a budget and record as little as they can.

    What is recorded of the rows of a block is kept while blocks beside it are computed, and that of the columns is recorded for each block
    anew, ``rows columns / height`` examples in all: blocks are as high as they can be, and as broad as goes through the network at once.

    Parameters
    ----------
    rows, columns, symmetric
        See `BlockPlan`.
    bytes_of
        ``(n, m, at_once) -> bytes`` that a block of n by m examples needs, with so many going through the network together.
    at_once
        How many that should be, where not all can.
    max_bytes
        The budget.
    result
        Bytes of the whole kernel.

    Raises
    ------
    MemoryError
        If not even a single pair of examples fits; the message says how much would.

    Examples
    --------
    >>> plan_blocks(1000, 1000, True, lambda n, m, at_once: 8 * n * m, 100, 8 * 10**5, 8 * 10**6).block
    (1000, 100)
    >>> plan_blocks(1000, 1000, True, lambda n, m, at_once: 8 * n * m, 100, 8 * 60**2, 8 * 10**6).block
    (59, 59)
    """
    together = max(rows, columns)
    whole = bytes_of(rows, columns, together)
    if whole <= max_bytes:
        return BlockPlan(rows, columns, (rows, columns), together, symmetric, whole, result)
    least = bytes_of(1, 1, 1)
    if least > max_bytes:
        raise MemoryError(
            f"a single pair of examples needs about {_mb(least)} ({least} bytes), and max_bytes is {_mb(max_bytes)}. "
            f"Give max_bytes={least} or more, or ask for less: outputs='trace', one output, or leaves=."
        )

    def largest(fits: Callable[[int], bool], most: int) -> int:
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    broad = min(at_once, columns)
    high = largest(lambda n: bytes_of(n, broad, broad) <= max_bytes, rows)
    if high < broad:
        broad = largest(lambda n: bytes_of(min(n, rows), n, n) <= max_bytes, broad)
        high = min(broad, rows)
    # Even blocks waste little on filling up the last.
    block = (math.ceil(rows / math.ceil(rows / high)), math.ceil(columns / math.ceil(columns / broad)))
    return BlockPlan(rows, columns, block, block[1], symmetric, bytes_of(*block, block[1]), result)


class Store:
    """A kernel in a NumPy file, with a note beside it of which blocks are there."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any, plan: BlockPlan, fingerprint: str):
        self.note, wanted = (
            path.with_suffix(path.suffix + ".json"),
            {"fingerprint": fingerprint, "shape": list(shape), "block": list(plan.block)},
        )
        self.wanted, self.done = wanted, set()
        if path.exists() and self.note.exists():
            found = json.loads(self.note.read_text())
            differs = [name for name in wanted if found.get(name) != wanted[name]]
            if differs:
                raise ValueError(
                    f"{path} holds blocks of another kernel ({', '.join(differs)} differ): give another file, or delete this one and "
                    f"{self.note.name}."
                )
            self.done = {tuple(pair) for pair in found["done"]}
        elif path.exists():
            raise ValueError(f"{path} is there already, without a note of its blocks ({self.note}): give another file, or delete it.")
        self.array = np.lib.format.open_memmap(path, mode="r+" if self.done else "w+", dtype=dtype, shape=shape)

    def finished(self, pair: tuple[int, int]) -> None:
        """Note that a block is on disk."""
        self.array.flush()
        self.done.add(pair)
        # Written whole and then renamed: a process that is killed leaves the old note.
        new = self.note.with_suffix(".new")
        new.write_text(json.dumps({**self.wanted, "done": sorted(self.done)}))
        new.replace(self.note)


def fingerprint(*trees: PyTree) -> str:
    """A hash of the numbers, shapes and settings that a kernel is a function of.

    Examples
    --------
    >>> fingerprint(jnp.ones(2), "full") == fingerprint(jnp.ones(2), "full") != fingerprint(jnp.zeros(2), "full")
    True
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, str):
            digest.update(leaf.encode())
        else:
            keys = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(leaf) if keys else leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def of_trace(jaxpr: jex.ClosedJaxpr) -> list[Any]:
    """What a network computes, for its `fingerprint`: its trace in words, without places in memory, and the numbers that it holds.

    Examples
    --------
    >>> tanh, relu = (fingerprint(of_trace(jax.make_jaxpr(f)(1.0))) for f in (jnp.tanh, jax.nn.relu))
    >>> tanh == relu, relu == fingerprint(of_trace(jax.make_jaxpr(lambda x: jax.nn.relu(x))(1.0)))
    (False, True)
    """
    # What a set holds is printed in another order by each process.
    text = re.sub(r"frozenset\(\{(.*?)\}\)", lambda found: str(sorted(found[1].split(", "))), str(jaxpr))
    return [re.sub(r"0x[0-9a-f]+", "", text), *jaxpr.consts]


def run_blocks(
    plan: BlockPlan,
    record: Callable[[Any], Any],
    compute: Callable[[Any, Any], Mapping[str, Any]],
    x1: Any,
    x2: Any,
    into: Mapping[str, Any],
    mirror: Callable[[Any], Any],
    store: Store | None = None,
    show: bool | None = None,
) -> None:
    """Fill arrays block by block.

    Parameters
    ----------
    plan
        The blocks.
    record
        ``examples -> features``; those of a row of blocks are kept while the row is worked on.
    compute
        ``(features, features) -> {name: block}``.
    x1, x2
        The batches.
    into
        By name, an array ``(rows, columns, ...)``.
    mirror
        What a block is below the diagonal, of the block above it.
    store
        Where finished blocks are noted.
    show
        Whether to show the plan and a progress bar; on a terminal if `None`.
    """
    _say(str(plan), show)
    last, row = -1, None
    high, broad = plan.block

    def cells(i: int, j: int) -> tuple[int, int]:
        return min(high, plan.rows - i), min(broad, plan.columns - j)

    with progress_bar("kernel", float(sum(math.prod(cells(i, j)) for i, j in plan.pairs)), show) as bar:
        for i, j in plan.pairs:
            rows, columns = cells(i, j)
            if store is None or (i, j) not in store.done:
                if i != last:
                    last, row = i, record(filled(x1, i, high))
                column = row if plan.symmetric and (i, high) == (j, broad) else record(filled(x2, j, broad))
                for name, block in compute(row, column).items():
                    found = np.asarray(block)[:rows, :columns]
                    into[name][i : i + rows, j : j + columns] = found
                    if plan.symmetric and (i, high) != (j, broad):
                        into[name][j : j + columns, i : i + rows] = mirror(found)
                if store is not None:
                    store.finished((i, j))
            bar.advance(rows * columns)


def _say(line: str, show: bool | None) -> None:
    from rich.console import Console

    console = Console(stderr=True, emoji=False, highlight=False)
    if show or (show is None and console.is_terminal):
        console.print(line)


def filled(x: Any, start: int, size: int) -> Any:
    """So many examples from `start` on, the last one again and again where there are no more."""
    return x[np.minimum(np.arange(start, start + size), x.shape[0] - 1)]


def _mb(n: float) -> str:
    return f"{n / 2**20:.4g} MiB"
