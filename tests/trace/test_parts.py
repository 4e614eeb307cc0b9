"""Layers that are written in parts, side by side or one after the other: what is read, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj
from paperjax.trace import Use, read
from tests.trace.test_read import EXPERTS, WIDTHS, heads_one_by_one, pair
from tests.trace.zoo_models import ROWS, SEQUENCE


def test_heads_and_copies_one_by_one_are_both_suggested():
    with pytest.raises(ValueError, match=r"out=\(2,\), stack=\(0,\)\).* if axis 0 counts copies, with .*out=\(0, 2\)\)"):
        read(pj.family(heads_one_by_one, x=ROWS), *EXPERTS)


def listed_heads(width, n):
    """Attention whose heads are a list, each of size 4, with one matrix for all of their outputs."""
    names = [f"{name}{i}" for name in "qkv" for i in range(n)]

    def apply(p, x):
        h, out = x @ p["u"], []
        for i in range(n):
            q, k, v = (h @ p[f"{name}{i}"] for name in "qkv")
            out.append(jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 2.0), v))
        return (h + jnp.concatenate(out, -1) @ p["o"]) @ p["out"]

    return pair({"u": (5, width), "o": (4 * n, width), "out": (width, 3)} | dict.fromkeys(names, (width, 4)), apply)


def test_heads_in_a_list_are_refused_where_their_number_grows():
    """One leaf of shape (heads, d, 4) leads to d coordinates and is hidden; d/4 leaves of shape (d, 4) are the same function."""
    family = pj.family(lambda width: listed_heads(width, width // 4), x=SEQUENCE)
    with pytest.raises(ValueError, match="one of a list whose number grows") as refused:
        read(family, *WIDTHS)
    lines = str(refused.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [f"['{name}{i}']" for name in "kqv" for i in range(4)]
    assert all("Use(inside=(0,), out=(1,))} if each is a copy by itself; heads belong in one leaf" in line for line in lines)
    uses = {f"['{name}{i}']": Use(inside=(0,), out=(1,)) for name in "qkv" for i in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        roles = {leaf.path: leaf.role for leaf in read(family, *WIDTHS, uses=uses).leaves}
    assert {roles[path] for path in uses} == {"output"}


def summed_heads(width, n, how):
    """Attention whose heads are a list, each of size 4 and with an output matrix of its own; the results are added up."""
    shapes = {"u": (5, width), "out": (width, 3)}
    for i in range(n):
        shapes |= {f"{name}{i}": (width, 4) for name in "qkv"} | {f"o{i}": (4, width)}

    def apply(p, x):
        stream = h = x @ p["u"]
        terms = []
        for i in range(n):
            q, k, v = (h @ p[f"{name}{i}"] for name in "qkv")
            head = jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 2.0), v)
            terms.append(head @ p[f"o{i}"])
        for term in terms if how == "one after the other" else ():
            stream = stream + term
        return (h + jnp.stack(terms).sum(0) if how == "stacked" else h + sum(terms) if how == "sum" else stream) @ p["out"]

    return pair(shapes, apply)


@pytest.mark.parametrize("how", ["sum", "stacked", "one after the other"])
def test_heads_in_a_list_that_are_added_up_are_refused_where_their_number_grows(how):
    """One leaf of shape (heads, 4, d) sums over all of d coordinates; d/4 leaves of shape (4, d) are the same function."""
    with pytest.raises(ValueError, match="one of a list whose number grows") as refused:
        read(pj.family(lambda width: summed_heads(width, width // 4, how), x=SEQUENCE), *WIDTHS)
    assert {line.split()[0] for line in str(refused.value).splitlines()[1:]} >= {f"['o{i}']" for i in range(4)}
    with pytest.warns(UserWarning, match="and no axis of heads grows"):
        program = read(pj.family(lambda width: summed_heads(width, 2, how), x=SEQUENCE), *WIDTHS)
    assert {leaf.path: leaf.role for leaf in program.leaves}["['o0']"] == "input"


@pytest.mark.parametrize("kind", ["skips", "time"])
def test_sums_over_layers_are_no_list_of_heads(kind):
    """WaveNet's skip connections, and an embedding of time that every block's stream takes in by a matrix of its own."""

    def make(width, depth):
        shapes = {"u": (5, width), "out": (width, 3)}
        for i in range(depth):
            shapes |= {f"w{i}": (width, width), f"s{i}": (width if kind == "skips" else 5, width)}

        def apply(p, x):
            h, skips = x @ p["u"], []
            for i in range(depth):
                h = h + jnp.tanh(h @ p[f"w{i}"])
                if kind == "time":
                    h = h + jnp.sin(x) @ p[f"s{i}"]
                skips.append(h @ p[f"s{i}"] if kind == "skips" else h)
            return (sum(skips) if kind == "skips" else h) @ p["out"]

        return pair(shapes, apply)

    program = read(pj.family(make, x=ROWS), {"width": 8, "depth": 2}, {"width": 16, "depth": 4})
    roles = {leaf.path: leaf.role for leaf in program.leaves}
    assert roles["['s3']"] == ("hidden" if kind == "skips" else "input")
    assert len(program.adds) == 4


@pytest.mark.parametrize("grows", ["size", "nothing"])
def test_heads_in_a_list_of_fixed_number_are_what_they_are(grows):
    def make(width):
        size = width // 2 if grows == "size" else 4
        shapes = {"u": (5, width), "o": (2 * size, width), "out": (width, 3), "v0": (width, size), "v1": (width, size)}

        def apply(p, x):
            h = x @ p["u"]
            return (h + jnp.concatenate([h @ p["v0"], h @ p["v1"]], -1) @ p["o"]) @ p["out"]

        return pair(shapes, apply)

    roles = {leaf.path: leaf.role for leaf in read(pj.family(make, x=SEQUENCE), *WIDTHS).leaves}
    assert roles["['v0']"] == roles["['v1']"] == ("hidden" if grows == "size" else "output")


@pytest.mark.parametrize("loop", ["python", "fori"])
def test_layers_that_one_leaf_holds_may_be_taken_one_by_one(loop):
    def make(width, depth):
        def apply(p, x):
            h = x @ p["u"]
            if loop == "fori":
                h = jax.lax.fori_loop(0, depth, lambda i, h: jnp.tanh(h @ p["w"][i] + p["b"][i][None]), h)
            for i in range(depth if loop == "python" else 0):
                h = jnp.tanh(h @ p["w"][i] + p["b"][i][None])
            return h @ p["out"]

        return pair({"u": (5, width), "w": (depth, width, width), "b": (depth, width), "out": (width, 3)}, apply)

    program = read(pj.family(make, x=ROWS), {"width": 8, "depth": 2}, {"width": 16, "depth": 4})
    assert {leaf.path: leaf.role for leaf in program.leaves} == {
        "['b']": "vector",
        "['out']": "output",
        "['u']": "input",
        "['w']": "hidden",
    }
