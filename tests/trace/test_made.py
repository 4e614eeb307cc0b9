"""Weights that the data make of one leaf: what a later product sums over is refused, and attention's products are not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.trace import Use, read

X = np.random.default_rng(0).normal(size=(4, 6, 5))
BASE, TARGET = {"width": 16}, {"width": 64}


def family(shapes, apply):
    """``shapes(width)`` of the leaves, and ``apply(params, x, width)``."""

    def make(width):
        def init(key, x):
            drawn = jax.random.split(key, len(shapes(width)))
            return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(drawn, shapes(width).items())}

        return pj.Model(init, lambda p, x: apply(p, x, width))

    return pj.family(make, x=X)


def hyper(use, h=jnp.tanh, **more):
    """``use(h, W)`` of features h and of a matrix W for each example, (batch, n, n), that five numbers make of H."""

    def apply(p, x, n):
        made = x[:, 0] @ p["H"] + p.get("b", 0.0)
        return jnp.tanh(use(h(x @ p["u"]), made.reshape(-1, n, n))) @ p["v"]

    return family(lambda n: {"u": (5, n), "H": (5, n * n), "v": (n, 3), **{k: (n * n,) for k in more}}, apply)


def over_time(h, made):
    return jax.lax.scan(lambda c, h_t: (jnp.tanh(jnp.einsum("bi,bio->bo", c, made) + h_t), None), h[:, 0], h.transpose(1, 0, 2))[0]


REFUSED = {
    "a product": hyper(lambda h, made: jnp.einsum("bti,bio->bto", h, made)),
    "from the other side": hyper(lambda h, made: jnp.einsum("bti,boi->bto", h, made)),
    # Both sides are linear in leaves, as attention's queries and keys are.
    "of a projection": hyper(lambda h, made: jnp.einsum("bti,bio->bto", h, made), h=lambda h: h),
    "of a function of its entries": hyper(lambda h, made: jnp.einsum("bti,bio->bto", h, jnp.tanh(made))),
    "entry by entry": hyper(lambda h, made: (h[:, :, :, None] * made[:, None]).sum(2)),
    "example by example": hyper(jax.vmap(lambda h, made: h @ made)),
    "in a loop": hyper(over_time),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_axis_that_is_fan_in_and_fan_out_at_once_is_refused(name):
    with pytest.raises(ValueError, match=r"\['H'\] \(5, 4096\), axis 1 \(grows with width\): at (dot_general|reduce_sum)") as refused:
        read(REFUSED[name], BASE, TARGET)
    parts = re.search(
        r"a leaf of shape (\(.*?\)), .*? pj\.trace\.(Use\(.*?\))\}.* uses=\{\"\['H'\]\": pj.trace.(Use\(.*?\))\}", str(refused.value)
    )
    assert parts is not None
    turned = name == "from the other side"
    assert (parts[1], eval(parts[2])) == ("(5, 64, 64)", Use((0, 2), (1,)) if turned else Use((0, 1), (2,)))
    assert eval(parts[3]) == Use((0,), (1,))
    program = read(REFUSED[name], BASE, TARGET, uses={"['H']": Use((0,), (1,))})
    assert {leaf.path: leaf.role for leaf in program.leaves}["['H']"] == "input"


def test_what_is_added_to_such_a_matrix_is_refused_with_it():
    biased = hyper(lambda h, made: jnp.einsum("bti,bio->bto", h, made), b=True)
    with pytest.raises(ValueError, match=r"(?s)\['H'\] .*\n  \['b'\] .*a leaf of shape \(64, 64\), .*Use\(inside=\(0,\), out=\(1,\)\)"):
        read(biased, BASE, TARGET)


def test_with_an_axis_for_each_part_its_plan_is_that_of_a_hidden_matrix():
    """W_io = sum_k c_k H_kio + b_io acts on h: H and b are hidden, with Adam's learning rate 1/n and standard deviation n^-1/2."""

    def apply(p, x, n):
        made = jnp.einsum("bk,kio->bio", x[:, 0], p["H"]) + p["b"]
        return jnp.einsum("bti,bio->bto", jnp.tanh(x @ p["u"]), made) @ p["v"]

    split = family(lambda n: {"u": (5, n), "H": (5, n, n), "b": (n, n), "v": (n, 3)}, apply)
    plan = pj.plan(split, pj.mup, BASE, TARGET, "adam", uses={"['H']": Use((0, 1), (2,)), "['b']": Use((0,), (1,))})
    found = {leaf.path: leaf for leaf in plan.leaves}
    for path in ("['H']", "['b']"):
        factors = found[path].factors
        assert (found[path].role, factors.learning_rate, factors.multiplier) == ("hidden", 0.25, 1.0)
        assert factors.init_scale == pytest.approx(0.5)
    assert plan.scalings == ()


def test_copies_that_are_weighted_entry_by_entry_are_refused_as_in_a_product():
    def apply(p, x, n, mix):
        return jnp.tanh(mix(jax.nn.softmax(x @ p["g"]), jnp.einsum("bti,ieo->bteo", x, p["H"]))) @ p["v"]

    lines = []
    for mix in (lambda g, e: jnp.einsum("bte,bteo->bto", g, e), lambda g, e: (g[..., None] * e).sum(2)):
        shapes = lambda n: {"g": (5, n), "H": (5, n, n), "v": (n, 3)}  # noqa: E731
        with pytest.raises(ValueError, match=r"\['H'\] .*axis 1 .*weighted and summed") as refused:
            read(family(shapes, lambda p, x, n, mix=mix: apply(p, x, n, mix)), BASE, TARGET)
        lines.append(re.sub("dot_general|reduce_sum", "the product", str(refused.value)))
    assert lines[0] == lines[1]


def heads(score, shapes=lambda n: {"u": (5, n), "q": (n, n), "k": (n, n)}):
    """Root of width heads of root of width coordinates: both of what an axis is split in grow."""

    def apply(p, x, n):
        h, r = jnp.tanh(x @ p["u"]), round(n**0.5)
        split = lambda y: y.reshape(*y.shape[:2], -1, r)  # noqa: E731
        return score(split(h @ p["q"]), split(h @ p["k"])) / r

    return family(shapes, apply)


def one_key(n):
    return {"u": (5, n), "q": (n, n), "k": (n, round(n**0.5))}


READ = {
    "attention": heads(lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k)),
    "attention, entry by entry": heads(lambda q, k: (q[:, :, None] * k[:, None]).sum(-1)),
    "channels attend": heads(lambda q, k: jnp.einsum("bthd,bthe->bhde", q, k)),
    "multi-query attention": heads(lambda q, k: jnp.einsum("bthd,bskd->bhts", q, k), one_key),
    "multi-query attention, entry by entry": heads(lambda q, k: (q[:, :, None] * k[:, None]).sum(-1), one_key),
    "linear attention": heads(lambda q, k: jnp.einsum("bthd,bhde->bthe", q, jnp.einsum("bshd,bshe->bhde", k, k))),
    "three outputs of a matrix that the data make": family(
        lambda n: {"u": (5, n), "H": (5, 3 * n)},
        lambda p, x, n: jnp.einsum("bti,bio->bto", jnp.tanh(x @ p["u"]), (x[:, 0] @ p["H"]).reshape(-1, n, 3)) / n,
    ),
    "a matrix that the data make acts on four coordinates": family(
        lambda n: {"u": (5, 4), "H": (5, 4 * n), "v": (n, 3)},
        lambda p, x, n: jnp.einsum("bti,bio->bto", x @ p["u"], (x[:, 0] @ p["H"]).reshape(-1, 4, n)) @ p["v"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_products_of_activations_are_none(name):
    read(READ[name], BASE, TARGET)
