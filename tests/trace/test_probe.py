"""Two networks of a family must have leaves of the same kinds; what a family says when it cannot be built."""

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj
from paperjax.trace import read
from paperjax.trace.probe import cause, refuse_unbuildable
from tests.trace.zoo_models import ROWS

SIZES = {"width": 16}, {"width": 64}


def chain(names):
    """A network of matrices in a row, whose names a width decides; the first is an input's, the last an output's."""

    def make(width):
        here = names(width)
        shapes = [(5, width), *[(width, width)] * (len(here) - 2), (width, 3)]

        def init(key, x):
            return {name: jax.random.normal(jax.random.fold_in(key, i), s) for i, (name, s) in enumerate(zip(here, shapes))}

        def apply(p, x):
            for name in here[:-1]:
                x = jnp.tanh(x @ p[name])
            return x @ p[here[-1]]

        return init, apply

    return pj.family(make, x=ROWS)


@pytest.mark.parametrize(
    ("small", "large", "lost"),
    [
        (["u", "extra", "v"], ["u", "v"], "extra"),
        (["w0", "w1", "w2"], ["w0", "w1"], "w2"),
        (["u0", "bottleneck0", "u2"], ["u0", "u1", "u2"], "bottleneck0"),
    ],
    ids=["named", "a numbered one fewer", "a numbered kind"],
)
def test_a_leaf_that_vanishes_is_refused(small, large, lost):
    family = chain(lambda width: small if width < 32 else large)
    with pytest.raises(ValueError, match=rf"\['{lost}'\] is there at the base \(width=16\) and has no like at the target \(width=64\)"):
        read(family, *SIZES)


def test_a_leaf_that_appears_is_refused():
    with pytest.raises(ValueError, match=r"leaf \['extra'\] is there at width=64 and has no like at width=16"):
        read(chain(lambda width: ["u", "v"] if width < 32 else ["u", "extra", "v"]), *SIZES)


def test_numbered_layers_may_become_more_in_a_row_of_several_kinds():
    """The base's w2 is its readout, of which the target has none by that number and shape but one that plays its part."""
    program = read(chain(lambda width: [f"w{i}" for i in range(0, width // 8 + 3, 2)]), *SIZES)
    assert {leaf.path: leaf.role for leaf in program.leaves} == {
        f"['w{i}']": "input" if i == 0 else "output" if i == 10 else "hidden" for i in range(0, 11, 2)
    }


@pytest.mark.parametrize("make", ["named", "in one row"])
def test_a_size_that_widens_layers_and_adds_ones_of_a_new_kind_is_refused(make):
    """The base's one layer is (5, n), and the target's others are (n, n): against it their fan-in would have grown from 5."""

    def family(width):
        n = width // 16
        sizes = [(5, width), *[(width, width)] * (n - 1)] + ([(width, 3)] if make == "in one row" else [])
        last = {} if make == "in one row" else {"out": jnp.zeros((width, 3))}

        def apply(p, x):
            for i in range(len(sizes)):
                x = x @ p[f"w{i}"]
            return x if make == "in one row" else x @ p["out"]

        return pj.Model(lambda key, x: {f"w{i}": jnp.zeros(s) for i, s in enumerate(sizes)} | last, apply)

    fam = pj.family(family, x=ROWS)
    with pytest.raises(ValueError, match=r"width adds layers of a kind that the smaller network has none of, or one name"):
        read(fam, dict(width=16), dict(width=64))
    # With one of each kind at the base the layers are what they are.
    program = read(fam, dict(width=32), dict(width=128))
    assert [(leaf.base_shape, leaf.role) for leaf in program.leaves if leaf.path in ("['w0']", "['w1']", "['w7']")] == [
        ((5, 32), "input"), ((32, 32), "hidden"), ((32, 32), "hidden"),
    ]  # fmt: skip


def heads(width):
    assert width % 4 == 0
    return lambda key, x: jnp.ones((5, width)), lambda w, x: x @ w


def test_what_a_family_cannot_be_built_at_is_named():
    refuse_unbuildable(pj.family(heads), {"width": 8}, ROWS)
    with pytest.raises(ValueError, match=r"the family fails at width=6: AssertionError: assert \(6 % 4\) == 0\. Choose"):
        refuse_unbuildable(pj.family(heads), {"width": 6}, ROWS)
    with pytest.raises(ValueError, match=r"the family fails at width=4\.0, depth=1: TypeError: Shapes must be 1D sequences of concrete"):
        refuse_unbuildable(
            pj.family(lambda width, depth: (lambda key, x: jnp.ones((5, width)), jnp.matmul)), {"width": 4.0, "depth": 1}, ROWS
        )
    with pytest.raises(ValueError, match="the family fails at width=4: TypeError: dot_general requires"):
        refuse_unbuildable(pj.family(lambda width: (lambda key, x: jnp.ones((width, 1)), lambda w, x: x @ w)), {"width": 4}, ROWS)


def test_a_size_that_cannot_be_probed_says_what_a_bare_assertion_asks():
    def net(width, heads):
        assert width % heads == 0
        return lambda key, x: {"u": jnp.ones((5, width)), "v": jnp.ones((width, 1))}, lambda p, x: x @ p["u"] @ p["v"]

    with pytest.raises(ValueError, match=r"failed at heads = 5: AssertionError: assert \(24 % 5\) == 0"):
        read(pj.family(net, x=ROWS), {"width": 10, "heads": 5}, {"width": 24, "heads": 6})


def test_an_error_without_a_message_or_a_place():
    assert cause(RuntimeError()) == "RuntimeError: no message"
    assert cause(TypeError("two\n  lines.")) == "TypeError: two lines"
