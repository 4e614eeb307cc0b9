"""How tiles of pairs are spread over devices and threads: each computes some, and none needs what another does."""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def enough(side: int, tiles: Callable[[int], int], devices: int) -> int:
    """The side of a tile, made smaller until there are as many tiles as devices.

    Examples
    --------
    >>> import math
    >>> enough(256, lambda side: math.ceil(300 / side) ** 2, 8)
    128
    """
    while side > 1 and tiles(side) < devices:
        side = max(1, side // 2)
    return side


def together(work: Callable[[Any], None], items: Sequence[Any], workers: int, first: Callable[[], None]) -> None:
    """Do work on items in threads, of which this is one; it does `first` before them, which the others do not wait for.

    A thread more has to be started, and on a busy core it waits for milliseconds: this one begins at once.

    Examples
    --------
    >>> found = []
    >>> together(found.append, range(10), 2, lambda: found.append(-1))
    >>> sorted(found) == [-1, *range(10)]
    True
    """
    left = iter(items)

    def go() -> None:
        try:
            for item in left:
                work(item)
        except BaseException:
            # The others need not go on.
            collections.deque(left, 0)
            raise

    with ThreadPoolExecutor(max(1, workers - 1)) as pool:
        others = [pool.submit(go) for _ in range(workers - 1)]
        try:
            first()
        finally:
            go()
        for other in others:
            other.result()
