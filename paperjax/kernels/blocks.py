"""A kernel too large for the memory, block by block: how large the blocks are, and the loop over them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from paperjax.kernels.store import Block, Store
from paperjax.progress import progress_bar

# With fewer examples the kernel of a batch with itself is not cut for the sake of symmetry.
HALVED = 1024


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
    devices
        Among how many the columns of a block are divided; `at_once` and `block_bytes` are of each.

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
    devices: int = 1

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """First examples of each block, row by row."""
        high, broad = self.block
        across = range(0, self.columns, broad)
        return [(i, j) for i in range(0, self.rows, high) for j in across if not self.symmetric or j + broad > i]

    @property
    def blocks(self) -> list[Block]:
        """Where each block is."""
        high, broad = self.block
        return [Block(i, j, min(high, self.rows - i), min(broad, self.columns - j)) for i, j in self.pairs]

    def __str__(self) -> str:
        grid = math.ceil(self.rows / self.block[0]) * math.ceil(self.columns / self.block[1])
        half = "; the lower half by symmetry" if len(self.pairs) < grid else ""
        over = f", over {self.devices} devices" if self.devices > 1 else ""
        return (
            f"kernel of {self.rows} x {self.columns} examples ({_mb(self.result_bytes)}) in {len(self.pairs)} blocks of {self.block[0]} x "
            f"{self.block[1]}, {_mb(self.block_bytes)} each{over}{half}"
        )


def plan_blocks(
    rows: int, columns: int, symmetric: bool, bytes_of: Callable[[int, int, int], int], at_once: int, max_bytes: int, result: int
) -> BlockPlan:
    """Blocks that fit in a budget and record as little as they can.

    What is recorded of the rows of a block is kept while blocks beside it are computed, and that of the columns is recorded for each block
    anew, ``rows columns / height`` examples in all: blocks are as high as they can be, and as broad as goes through the network at once.
    Those of one batch with itself are an eighth of it high at most, if it has the examples for that: none below the diagonal could be
    left out of blocks of its whole height.

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
    >>> print(plan_blocks(16_000, 16_000, True, lambda n, m, at_once: 8 * n * m, 400, 8 * 10**8, 8 * 256 * 10**6))
    kernel of 16000 x 16000 examples (1953 MiB) in 180 blocks of 2000 x 400, 6.104 MiB each; the lower half by symmetry
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
    high = largest(lambda n: bytes_of(n, broad, broad) <= max_bytes, _highest(rows, symmetric))
    if high < broad:
        broad = largest(lambda n: bytes_of(min(n, rows), n, n) <= max_bytes, broad)
        high = min(broad, rows)
    # Even blocks waste little on filling up the last.
    block = (math.ceil(rows / math.ceil(rows / high)), math.ceil(columns / math.ceil(columns / broad)))
    return BlockPlan(rows, columns, block, block[1], symmetric, bytes_of(*block, block[1]), result)


def divided(
    rows: int,
    columns: int,
    symmetric: bool,
    bytes_of: Callable[[int, int, int], int],
    at_once: int,
    max_bytes: int,
    result: int,
    devices: int,
) -> BlockPlan:
    """Blocks whose columns are divided among devices, each of which keeps to the budget.

    What is recorded of the rows of a block is on every device, so that a device's part of a block is planned like a block of one device.
    A kernel of one batch with itself has at least eight rows of blocks, if it has the examples for that: computed at once it would be
    the whole of it, not half.

    Parameters
    ----------
    rows, columns, symmetric, bytes_of, at_once, max_bytes, result
        See `plan_blocks`.
    devices
        How many.

    Examples
    --------
    >>> print(divided(10_000, 10_000, True, lambda n, m, at_once: 8 * n * m, 100, 10**8, 8 * 10**8, 4))
    kernel of 10000 x 10000 examples (762.9 MiB) in 36 blocks of 1252 x 1252, 2.99 MiB each, over 4 devices; the lower half by symmetry
    """
    most = _highest(max(rows, columns), symmetric)
    part = plan_blocks(min(rows, most), math.ceil(min(columns, most) / devices), False, bytes_of, at_once, max_bytes, result)
    high, each = math.ceil(rows / math.ceil(rows / part.block[0])), part.block[1]
    # As high as broad, blocks of a row begin on the diagonal, and not one before it.
    if symmetric and 0 < each * devices - high < devices and bytes_of(each * devices, each, part.at_once) <= max_bytes:
        high = each * devices
    needed = bytes_of(high, each, part.at_once)
    return BlockPlan(rows, columns, (high, each * devices), part.at_once, symmetric, needed, result, devices)


def _highest(rows: int, symmetric: bool) -> int:
    return min(rows, max(HALVED, math.ceil(rows / 8))) if symmetric else rows


def run_blocks(
    plan: BlockPlan,
    record: Callable[[Any], Any],
    keep: Callable[[Any], Any],
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
        ``examples -> features``.
    keep
        What is kept of the features of a row of blocks while the row is worked on.
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
    high, broad = plan.block
    missing = set(plan.blocks if store is None else store.missing(plan.blocks))
    last, recorded, row = -1, None, None
    with progress_bar("kernel", float(sum(block.height * block.width for block in plan.blocks)), show) as bar:
        for block in plan.blocks:
            i, j, rows, columns = block
            if block in missing:
                if i != last:
                    last, recorded = i, record(filled(x1, i, high))
                    row = keep(recorded)
                column = recorded if plan.symmetric and (i, high) == (j, broad) else record(filled(x2, j, broad))
                for name, found in compute(row, column).items():
                    part = np.asarray(found)[:rows, :columns]
                    into[name][i : i + rows, j : j + columns] = part
                    if plan.symmetric and (i, high) != (j, broad):
                        into[name][j : j + columns, i : i + rows] = mirror(part)
                if store is not None:
                    store.finished(block)
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
