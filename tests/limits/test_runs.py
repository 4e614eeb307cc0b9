"""Programs that repeat themselves by chance, against the same programs not rolled."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp

from paperjax.limits.roll import rolled

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
