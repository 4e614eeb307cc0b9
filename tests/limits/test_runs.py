"""Programs that repeat themselves by chance, against the same programs not rolled."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits.roll import rolled
from paperjax.limits.runs import Wiring, find_runs


def chain(codes):
    """Equations that read the one before."""
    n = len(codes)
    apart = np.full(n, -1)
    return Wiring(
        np.array(codes), np.arange(-1, n - 1), np.arange(n + 1), np.arange(n + 1), np.array([n - 1]), np.zeros(1, bool), apart, apart + 0
    )


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1, 2, 3] * 8, [(0, 3, 8)]),
        ([9, 8] + [1, 2, 3] * 8 + [7], [(2, 3, 8)]),
        ([1, 1, 1, 2] * 10, [(0, 4, 10)]),
        ([1, 2] * 10 + [3] + [1, 2, 4, 5] * 10, [(0, 2, 10), (21, 4, 10)]),
        (([1] * 40 + [2]) * 3, [(0, 41, 3)]),
        (([1] * 40 + [2]) * 2, [(0, 1, 40), (41, 1, 40)]),
        ([1, 2, 3, 4, 5, 6, 7, 8] * 2 + [1, 2, 3, 4], []),
        (list(range(100)), []),
        ([1] * 12, []),
        ([], []),
    ],
)
def test_the_runs_of_a_chain(codes, expected):
    runs = find_runs(chain(codes), 3, 16, lambda eqn: False)
    assert [(run.start, run.period, run.repeats) for run in runs] == expected


OPERATIONS = lambda a, *_: jnp.sin(a), lambda a, b, _: a + b, lambda a, b, _: 0.5 * a * b, lambda a, _, constant: a - constant / 3


def written_out(program, values):
    """A program of sine, sum and product, with numbers of its own at some places, and what is kept of it."""
    lines, kept = program
    values = list(values)
    for op, i, j, constant in lines:
        a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
        values.append(OPERATIONS[op](a, b, constant))
    return [values[i % len(values)] for i in kept]


line = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2))


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.data())
def test_programs_of_random_blocks(data):
    """What looks repeated but is wired otherwise here and there is the same after rolling, whatever is kept of it."""
    lines = []
    for _ in range(data.draw(st.integers(1, 3))):
        lines += data.draw(st.lists(line, max_size=4))
        lines += data.draw(st.lists(line, min_size=1, max_size=5)) * data.draw(st.integers(1, 6))
    for _ in range(data.draw(st.integers(0, 2))):
        lines[data.draw(st.integers(0, len(lines) - 1))] = data.draw(line)
    kept = data.draw(st.lists(st.integers(-40, 40), min_size=1, max_size=5))
    f = functools.partial(written_out, (lines, kept))
    args = [jnp.asarray(v) for v in (0.3, -0.8, 1.1)]
    fewest = data.draw(st.integers(3, 4))
    # Without compilation a scan is a loop, and each operation the same as in the program written out: equal to the last bit.
    with jax.disable_jit():
        ours = rolled(lambda *a: f(a), fewest, 1)(*args)
        assert [float(v) for v in ours] == [float(v) for v in f(args)]
