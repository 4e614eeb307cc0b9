"""How tiles of pairs are spread over devices: each computes some, and none needs what another does."""

from collections.abc import Callable


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
