"""Where a list of equations repeats itself: runs of equal blocks, wired alike."""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LENGTHS = 8
"""Periods tried at each length of the pattern looked for, the most frequent ones."""


class Wiring(NamedTuple):
    """Equations as numbers.

    Attributes
    ----------
    codes
        (n,) What each equation is; equal numbers are equal equations but for what they read.
    reads, first_read
        All values read, equation after equation, and where each equation begins among them, (n + 1,). Values made by equations are
        numbered from 0 in order; those from outside are negative, the same for the same variable or literal.
    first_made
        (n + 1,) The first value that each equation makes.
    results
        The values that are results.
    free
        Whether a negative value is a literal, by ``-1 - value``.
    family, place
        For each value made: the number of the array whose row it is, or -1, and which row.
    """

    codes: np.ndarray
    reads: np.ndarray
    first_read: np.ndarray
    first_made: np.ndarray
    results: np.ndarray
    free: np.ndarray
    family: np.ndarray
    place: np.ndarray


class Run(NamedTuple):
    """`repeats` blocks of `period` equations each, from equation `start` on.

    Attributes
    ----------
    kinds
        Of each value that a block reads: INSIDE the block, CARRIED from the block before, SHARED by all, or one of a COLUMN.
    reads
        (repeats, values read) what each block reads.
    """

    start: int
    period: int
    repeats: int
    kinds: np.ndarray
    reads: np.ndarray

    @property
    def stop(self) -> int:
        """The equation after the last."""
        return self.start + self.period * self.repeats


INSIDE, CARRIED, SHARED, COLUMN = range(4)


def row_step(values: np.ndarray, wiring: Wiring) -> tuple[int, int, int] | None:
    """``(array, first row, step)`` if the values are rows of one array at equal steps, else None."""
    if values[0] < 0 or (values < 0).any():
        return None
    family, place = wiring.family[values], wiring.place[values]
    if family[0] < 0 or (family != family[0]).any():
        return None
    steps = np.diff(place)
    if len(steps) and ((steps != steps[0]).any() or steps[0] == 0):
        return None
    return int(family[0]), int(place[0]), int(steps[0]) if len(steps) else 1


def find_runs(wiring: Wiring, fewest: int, saved: int, gathers: Callable[[int], bool]) -> list[Run]:
    """Runs that do not overlap, in order; the longest savings are taken first.

    Candidates are stretches in which the codes repeat with a period. Periods come from patterns of 1, 2, 4, ... equations: the most
    frequent distances from one occurrence to the next. Every level is a sort, so all is ``O(n log² n)`` for n equations, and each
    candidate is then checked against the wiring in the time of its length.

    Parameters
    ----------
    wiring
        The equations. `family` and `place` are filled in for the values of the runs found.
    fewest
        Blocks in a run, at least.
    saved
        Equations that a run saves, at least.
    gathers
        Whether the equation puts its operands into one array.
    """
    n = len(wiring.codes)
    taken = np.zeros(n, bool)
    runs: list[Run] = []
    while np.count_nonzero(~taken) > saved:
        heap: list[tuple[int, int, int, int, Run | None]] = []

        def push(start: int, length: int, period: int, heap=heap) -> None:
            most = (length // period - 1) * period
            if length >= fewest * period and most >= saved:
                heapq.heappush(heap, (-most, period, start, length, None))

        for start, length, period in _stretches(np.where(taken, -1 - np.arange(n), wiring.codes), fewest):
            push(start, length, period)
        before = len(runs)
        while heap:
            _, period, start, length, run = heapq.heappop(heap)
            held = np.flatnonzero(taken[start : start + length])
            if held.size:
                edges = np.concatenate([[-1], held, [length]])
                for i in np.flatnonzero(np.diff(edges) > 1):
                    push(start + int(edges[i]) + 1, int(edges[i + 1] - edges[i]) - 1, period)
            elif run is None:
                run = _best_run(wiring, start, length, period, fewest)
                gain = 0 if run is None else _gain(wiring, run, gathers)
                if gain >= saved:
                    heapq.heappush(heap, (-gain, period, start, length, run))
            else:
                taken[run.start : run.stop] = True
                _name_rows(wiring, run)
                runs.append(run)
                push(start, run.start - start, period)
                push(run.stop, start + length - run.stop, period)
        if len(runs) == before:
            break
    return sorted(runs, key=lambda run: run.start)


def _stretches(codes: np.ndarray, fewest: int) -> list[tuple[int, int, int]]:
    """``(start, length, period)`` of the stretches that repeat."""
    n = len(codes)
    periods: set[int] = set()
    patterns, width = np.unique(codes, return_inverse=True)[1], 1
    while len(patterns) > 1:
        order = np.argsort(patterns, kind="stable")
        same = patterns[order][1:] == patterns[order][:-1]
        apart = np.diff(order)[same]
        apart = apart[apart <= n // fewest]
        if not same.any():
            break
        often = np.bincount(apart)
        periods.update(int(p) for p in np.argsort(-often, kind="stable")[:LENGTHS] if often[p] > 0)
        if len(patterns) <= width:
            break
        pairs = patterns[:-width].astype(np.int64) * (n + 1) + patterns[width:]
        patterns, width = np.unique(pairs, return_inverse=True)[1], 2 * width
    found = []
    for p in sorted(periods):
        equal = np.concatenate([[False], codes[:-p] == codes[p:], [False]])
        edges = np.flatnonzero(np.diff(equal.astype(np.int8)))
        starts, stops = edges[::2], edges[1::2]
        long = stops - starts >= (fewest - 1) * p
        found += [(int(a), int(b - a) + p, p) for a, b in zip(starts[long], stops[long])]
    return found


def _best_run(wiring: Wiring, start: int, length: int, period: int, fewest: int) -> Run | None:
    """The longest run of equally wired blocks in a stretch that repeats."""
    phase = _phase(wiring, start, length, period, fewest)
    if phase is None:
        return None
    start += phase
    blocks = (length - phase) // period
    a, b = wiring.first_read[start], wiring.first_read[start + blocks * period]
    reads = wiring.reads[a:b].reshape(blocks, -1)
    base = wiring.first_made[start + period * np.arange(blocks)][:, None]
    made = int(wiring.first_made[start + period] - wiring.first_made[start])
    back = reads - base
    inside = back >= 0
    near = (back >= -made) & (reads >= 0)
    far = np.where(near, -1, reads).max(axis=1, initial=-1)
    wires = np.where(near, back, made)
    like_last = np.concatenate([[False], (wires[1:] == wires[:-1]).all(axis=1)])
    # The first block of a run reads its carried values from anywhere before.
    starts = np.concatenate([((inside[1:] == inside[:-1]) & (~inside[1:] | (back[1:] == back[:-1]))).all(axis=1), [False]])
    best = (0, 0)
    block = 0
    while block < blocks:
        alike = block + 1
        while alike < blocks and like_last[alike]:
            alike += 1
        # Blocks from `block` to `alike` are wired alike. What they share must be there before the first one.
        first = block - 1 if block > 0 and starts[block - 1] else block
        now = first
        for i in range(first, alike + 1):
            end = i == alike
            if end or (i > now and far[i] >= base[now, 0]):
                best = max(best, (i - now, -now))
                if end:
                    break
                while base[now, 0] <= far[i]:
                    now += 1
        block = alike
    repeats, now = best[0], -best[1]
    if repeats < fewest:
        return None
    reads = reads[now : now + repeats]
    shared = (reads == reads[0]).all(axis=0)
    kinds = np.where(inside[now + 1], INSIDE, np.where(near[now + 1], CARRIED, np.where(shared, SHARED, COLUMN)))
    return Run(start + now * period, period, repeats, kinds, reads)


def _phase(wiring: Wiring, start: int, length: int, period: int, fewest: int) -> int | None:
    """Where to cut blocks so that the fewest values cross, and none crosses two cuts; None if there is no such place."""
    middle = start + max(period, (length - 2 * period) // 2)
    here, there = (wiring.reads[wiring.first_read[i] : wiring.first_read[i + period]] for i in (middle, middle + period))
    reader = np.repeat(np.arange(middle, middle + period), np.diff(wiring.first_read[middle : middle + period + 1]))
    made = int(wiring.first_made[middle + period] - wiring.first_made[middle])
    maker = np.searchsorted(wiring.first_made, here, side="right") - 1
    # What was made longer ago is no carry, but perhaps one of the results of another run.
    moving = (here >= 0) & (there == here + made) & (maker >= start) & (reader - maker < 2 * period)
    value, reader, maker = here[moving], reader[moving], maker[moving]
    # Each value once, with its last reader: a value of two periods ago is the same as one now.
    _, which = np.unique(value % made if made else value, return_inverse=True)
    span = np.zeros(which.max(initial=-1) + 1, np.int64)
    np.maximum.at(span, which, reader - maker)
    at = np.zeros_like(span)
    at[which] = maker % period
    crossing, twice = np.zeros(period + 1, np.int64), np.zeros(period + 1, np.int64)
    for counts, over in ((crossing, np.minimum(span, period)), (twice, np.maximum(span - period, 0))):
        # Cuts just before the equations ``maker + 1, ..., maker + over``, on a circle of the period.
        first, last = (at + 1) % period, (at + 1) % period + over
        np.add.at(counts, first, 1)
        np.add.at(counts, np.minimum(last, period), -1)
        np.add.at(counts, np.where(last > period, 0, period), 1)
        np.add.at(counts, np.where(last > period, last - period, period), -1)
    crossing, twice = np.cumsum(crossing[:-1]), np.cumsum(twice[:-1])
    offset = (np.arange(period) + start) % period
    phases = [int(p) for p in np.flatnonzero(twice[offset] == 0) if (length - p) // period >= fewest]
    return min(phases, key=lambda p: (crossing[offset[p]], p), default=None)


def columns(run: Run) -> list[np.ndarray]:
    """The different columns of values that a run reads."""
    return list({column.tobytes(): column for column in run.reads.T[run.kinds == COLUMN]}.values())


def _gain(wiring: Wiring, run: Run, gathers: Callable[[int], bool]) -> int:
    """Equations saved, less those that put columns together and, where nothing is carried, take results apart."""
    gain = (run.repeats - 1) * run.period
    for column in columns(run):
        literal = (column < 0).all() and wiring.free[-1 - column].all()
        if not literal and row_step(column, wiring) is None:
            gain -= run.repeats // 2
    if not (run.kinds == CARRIED).any():
        after = wiring.first_read[run.stop]
        low, high = wiring.first_made[run.start], wiring.first_made[run.stop]
        ours = after + np.flatnonzero((wiring.reads[after:] >= low) & (wiring.reads[after:] < high))
        alone = [r for r in np.unique(np.searchsorted(wiring.first_read, ours, side="right") - 1) if not gathers(int(r))]
        results = (wiring.results >= low) & (wiring.results < high)
        gain -= 2 * (len(alone) + int(results.sum()))
    return gain


def _name_rows(wiring: Wiring, run: Run) -> None:
    low, high = wiring.first_made[run.start], wiring.first_made[run.stop]
    made = (high - low) // run.repeats
    values = np.arange(low, high)
    # Rows of outer arrays have even numbers.
    wiring.family[low:high] = 2 * ((values - low) % made + low) + 1
    wiring.place[low:high] = (values - low) // made


def segments(n: int, runs: Sequence[Run]) -> list[range | Run]:
    """The runs, and the equations between them."""
    parts: list[range | Run] = []
    at = 0
    for run in runs:
        parts += [range(at, run.start), run]
        at = run.stop
    return [part for part in [*parts, range(at, n)] if isinstance(part, Run) or len(part)]
