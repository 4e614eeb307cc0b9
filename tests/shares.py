"""Shares of the slow tests: CI runs one of them at a landing, as all take an hour and a half of two cores, two hours of slow ones.

With ``SLOW_SHARE=2/3`` in the environment the second third of the slow tests runs, and besides it those whose names hold a word of
``SLOW_ALSO``; without it, all. A test is always in the same share, whichever others there are.
"""

import os
import zlib


def left_to_others(names):
    """Those of the slow tests with these names that the environment leaves to other runs."""
    share, shares = map(int, os.environ.get("SLOW_SHARE", "1/1").split("/"))
    if not 1 <= share <= shares:
        raise ValueError("SLOW_SHARE is the number of a share, a stroke, and how many shares there are")
    also = os.environ.get("SLOW_ALSO", "").split()
    return {name for name in names if zlib.crc32(name.encode()) % shares != share - 1 and not any(word in name for word in also)}
