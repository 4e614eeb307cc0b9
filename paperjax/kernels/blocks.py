"""A kernel too large for the memory, block by block: how large the blocks are, the loop over them, a file that survives the process."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
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
    symmetric
        Whether the batches are one: blocks below the diagonal are not computed.
    block_bytes
        What one block needs while it is computed.
    result_bytes
        What the whole kernel takes.

    Examples
    --------
    >>> print(BlockPlan(1000, 1000, 250, True, 2**20, 4 * 10**6))
    kernel of 1000 x 1000 examples (3.815 MiB) in 10 blocks of 250 x 250, 1 MiB each; the lower half by symmetry
    """

    rows: int
    columns: int
    block: int
    symmetric: bool
    block_bytes: int
    result_bytes: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """First examples of each block, row by row."""
        across = range(0, self.columns, self.block)
        return [(i, j) for i in range(0, self.rows, self.block) for j in across if not self.symmetric or j >= i]

    def __str__(self) -> str:
        half = "; the lower half by symmetry" if self.symmetric and len(self.pairs) > 1 else ""
        return (
            f"kernel of {self.rows} x {self.columns} examples ({_mb(self.result_bytes)}) in {len(self.pairs)} blocks of {self.block} x "
            f"{self.block}, {_mb(self.block_bytes)} each{half}"
        )


def plan_blocks(rows: int, columns: int, symmetric: bool, bytes_of: Callable[[int, int], int], max_bytes: int, result: int) -> BlockPlan:
    """The largest blocks that fit in a budget.

    Parameters
    ----------
    rows, columns, symmetric
        See `BlockPlan`.
    bytes_of
        ``(n, m) -> bytes`` that a block of n by m examples needs.
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
    >>> plan_blocks(1000, 1000, True, lambda n, m: 8 * n * m, 8 * 300**2, 8 * 10**6).block
    250
    """
    least = bytes_of(1, 1)
    if least > max_bytes:
        raise MemoryError(
            f"a single pair of examples needs about {_mb(least)} ({least} bytes), and max_bytes is {_mb(max_bytes)}. "
            f"Give max_bytes={least} or more, or ask for less: outputs='trace', one output, or leaves=."
        )
    large = max(rows, columns)
    low, high = (large if bytes_of(rows, columns) <= max_bytes else 1), large
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_of(min(middle, rows), min(middle, columns)) <= max_bytes:
            low = middle
        else:
            high = middle - 1
    # Even blocks waste little on filling up the last.
    block = math.ceil(large / math.ceil(large / low))
    return BlockPlan(rows, columns, block, symmetric, bytes_of(min(block, rows), min(block, columns)), result)


class Store:
    """A kernel in a NumPy file, with a note beside it of which blocks are there."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any, plan: BlockPlan, fingerprint: str):
        self.note, wanted = path.with_suffix(path.suffix + ".json"), {"fingerprint": fingerprint, "shape": list(shape), "block": plan.block}
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
    >>> import jax.numpy as jnp
    >>> fingerprint(jnp.ones(2), "full") == fingerprint(jnp.ones(2), "full") != fingerprint(jnp.zeros(2), "full")
    True
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, str):
            digest.update(leaf.encode())
        else:
            array = np.asarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


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
    with progress_bar("kernel", float(plan.rows * plan.columns), show) as bar:
        for i, j in plan.pairs:
            rows, columns = min(plan.block, plan.rows - i), min(plan.block, plan.columns - j)
            if store is None or (i, j) not in store.done:
                if i != last:
                    last, row = i, record(_filled(x1, i, min(plan.block, plan.rows)))
                column = row if plan.symmetric and i == j else record(_filled(x2, j, min(plan.block, plan.columns)))
                for name, block in compute(row, column).items():
                    found = np.asarray(block)[:rows, :columns]
                    into[name][i : i + rows, j : j + columns] = found
                    if plan.symmetric and i != j:
                        into[name][j : j + columns, i : i + rows] = mirror(found)
                if store is not None:
                    store.finished((i, j))
            bar.advance(rows * columns * (2 if plan.symmetric and i != j else 1))


def _say(line: str, show: bool | None) -> None:
    from rich.console import Console

    console = Console(stderr=True, emoji=False, highlight=False)
    if show or (show is None and console.is_terminal):
        console.print(line)


def _filled(x: Any, start: int, size: int) -> Any:
    """So many examples from `start` on, the last one again and again where there are no more."""
    return x[np.minimum(np.arange(start, start + size), x.shape[0] - 1)]


def _mb(n: float) -> str:
    return f"{n / 2**20:.4g} MiB"
