"""The override that a refusal suggests is the one that is meant, or is in words; what the caller says is marked as told."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import paperjax as pj
from paperjax.trace import Use, read
from tests.trace.zoo_models import ROWS, SEQUENCE


class LearnedQueries(nn.Module):
    """Perceiver (arXiv 2103.03206): queries are projections of parameters, keys of the data.

    A stack of as many as there are examples is not seen to spread them, so they could be a weight.
    """

    width: int

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width, name="embed")(x)
        latents = self.param("latents", nn.initializers.normal(1.0), (6, self.width))
        latents = jnp.stack([latents] * x.shape[0])
        return nn.Dense(3, name="head")(nn.MultiHeadDotProductAttention(8, name="attention")(latents, h).mean(1))


class VmappedExperts(nn.Module):
    width: int
    n: int

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width, name="embed")(x)
        gates = jax.nn.softmax(nn.Dense(self.n, name="gate")(h))
        shared: Any = {"in_axes": None, "out_axes": 1, "variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        each = nn.vmap(nn.Dense, axis_size=self.n, **shared)
        return nn.Dense(3, name="head")(jnp.einsum("be,bed->bd", gates, jnp.tanh(each(self.width, name="experts")(h))))


class OneQuery(nn.Module):
    """The class token asks, and four heads share their keys: as a formula, one copy for each coordinate, weighted and summed."""

    width: int

    @nn.compact
    def __call__(self, x):
        h, units = nn.Dense(self.width, name="embed")(x), self.width // 8
        q, k = nn.DenseGeneral((8, units), name="query")(h[:, 0]), nn.Dense(units, name="key")(h)
        weights = jax.nn.softmax(jnp.einsum("bnh,bsh->bns", q, k))
        return nn.Dense(3, name="head")(jnp.einsum("bns,bsd->bnd", weights, h).mean(1))


@pytest.mark.parametrize(
    ("make", "x", "sizes", "leaf", "shape", "suggested"),
    [
        (LearnedQueries, SEQUENCE, ("width",), "['attention']['query']['kernel']", "(64, 8, 8)", ["inside=(0,), out=(1, 2)"]),
        (LearnedQueries, SEQUENCE, ("width",), "['attention']['query']['bias']", "(8, 8)", ["out=(0, 1), kind='elementwise'"]),
        (LearnedQueries, SEQUENCE, ("width",), "['latents']", "(6, 64)",
         ["inside=(0,), out=(1,)", "inside=(1,), out=(0,)", "out=(0, 1), kind='elementwise'"]),
        (VmappedExperts, ROWS, ("width", "n"), "['experts']['kernel']", "(8, 64, 64)",
         ["inside=(1,), out=(2,), stack=(0,)", "inside=(1,), out=(0, 2)"]),
        (VmappedExperts, ROWS, ("width", "n"), "['experts']['bias']", "(8, 64)",
         ["out=(1,), stack=(0,), kind='elementwise'", "out=(0, 1), kind='elementwise'"]),
        (VmappedExperts, ROWS, ("width", "n"), "['gate']['kernel']", "(64, 8)", ["inside=(0,), stack=(1,)", "inside=(0,), out=(1,)"]),
        (OneQuery, SEQUENCE, ("width",), "['query']['kernel']", "(64, 8, 8)",
         ["inside=(0,), out=(1,), stack=(2,)", "inside=(0,), out=(1, 2)"]),
        (OneQuery, SEQUENCE, ("width",), "['query']['bias']", "(8, 8)", []),
    ],
)  # fmt: skip
def test_the_override_that_is_suggested_is_right_or_in_words(make, x, sizes, leaf, shape, suggested):
    base, target = ({name: {"width": width, "n": n}[name] for name in sizes} for width, n in ((16, 2), (64, 8)))
    family = pj.family((lambda width, n: make(width, n)) if "n" in sizes else (lambda width: make(width)), x=x)
    with pytest.raises(ValueError, match="cannot tell how these leaves scale") as refused:
        read(family, base, target)
    lines = [line for line in str(refused.value).splitlines() if line.startswith(f"  {leaf} {shape}")]
    assert bool(lines) == bool(suggested)
    for line in lines:
        assert re.findall(r"Use\((.*?)\)\}", line) == suggested
        assert len(suggested) == 1 or re.search(r"if axis \d counts copies, with .* if it does not$|one by one$", line)


def test_what_the_caller_said_is_marked():
    uses = {"['latents']": Use(out=(1,), stack=(0,), kind="elementwise"), "['attention']['query']['kernel']": Use(inside=(0,), out=(1, 2)),
            "['attention']['query']['bias']": Use(out=(0, 1), kind="elementwise")}  # fmt: skip
    program = read(pj.family(lambda width: LearnedQueries(width), x=SEQUENCE), {"width": 16}, {"width": 64}, uses=uses)
    assert {leaf.path for leaf in program.leaves if any(site.told for site in leaf.sites)} == set(uses)
    assert all(site.told for leaf in program.leaves if leaf.path in uses for site in leaf.sites)
    roles = {leaf.path: leaf.role for leaf in program.leaves if leaf.path in uses}
    assert list(roles.values()) == ["vector", "hidden", "vector"]


def test_no_number_is_taken_from_a_use_that_was_told():
    """The one 1/sqrt(d) of the logits is neither the latents' nor the projection's own."""
    uses = {
        "['latents']": Use(out=(1,), stack=(0,), kind="elementwise"),
        "['attention']['query']['kernel']": Use(inside=(0,), out=(1, 2)),
        "['attention']['query']['bias']": Use(out=(0, 1), kind="elementwise"),
    }
    family = pj.family(lambda width: LearnedQueries(width), x=SEQUENCE)
    plan = pj.plan(family, pj.mup, base={"width": 16}, target={"width": 64}, optimizer="adam", uses=uses)
    assert {leaf.factors.multiplier for leaf in plan.leaves} == {1.0}
    roles = {leaf.path: leaf.role for leaf in plan.leaves}
    assert (roles["['latents']"], roles["['attention']['query']['kernel']"]) == ("vector", "hidden")


def data_make_the_kernel(n_out: int | None = None, bend=lambda kernel: kernel, spec: str = "bi,bio->bo"):
    """CondConv (arXiv 1904.04971) without the convolution: four kernels are mixed by the data, and the mixture acts on the data."""

    def make(width: int):
        n = width if n_out is None else n_out
        normal = jax.random.normal

        def init(key, x):
            k = jax.random.split(key, 4)
            return {
                "u": normal(k[0], (5, width)),
                "w": normal(k[1], (width, width)) / width**0.5,
                "H": normal(k[2], (4, width, n)) / width**0.5,
                "v": normal(k[3], (n, 3)) / n**0.5,
            }

        def apply(p, x):
            h, context = jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"]), x.reshape(x.shape[0], -1)[:, :4]
            return jnp.tanh(jnp.einsum(spec, h, bend(jnp.einsum("bk,kio->bio", context, p["H"])))) @ p["v"]

        return init, apply

    return make


KERNEL, COPIES, NEITHER = "inside=(0, 1), out=(2,)", "inside=(0,), out=(2,), stack=(1,)", "inside=(0,), out=(1, 2)"


@pytest.mark.parametrize(
    ("make", "x", "suggested"),
    [
        (data_make_the_kernel(), ROWS, [KERNEL, COPIES, NEITHER]),
        (data_make_the_kernel(spec="bti,bio->bto"), SEQUENCE, [KERNEL, COPIES, NEITHER]),
        (data_make_the_kernel(n_out=7), ROWS, [KERNEL, COPIES, NEITHER]),
        # Entries of tanh(W) are activations, and a sum over them is no sum over H.
        (data_make_the_kernel(bend=jnp.tanh), ROWS, [COPIES, NEITHER]),
    ],
)
def test_an_axis_that_is_summed_over_later_is_offered_as_such_first(make, x, suggested):
    with pytest.raises(ValueError, match=r"\['H'\] .*, axis 1 .*a kernel that the data make.* if ") as refused:
        read(pj.family(make, x=x), {"width": 8}, {"width": 32})
    assert re.findall(r"\['H'\]\": pj\.trace\.Use\((.*?)\)\}", str(refused.value)) == suggested


def test_the_first_override_of_a_kernel_that_the_data_make_gives_its_plan():
    """sum_i h_i sum_k x_k H_kio is one matrix that acts on the 4 width products x_k h_i: hidden, learning rate 1/4 at 4 times the width."""
    fam = pj.family(data_make_the_kernel(), x=ROWS)
    with pytest.raises(ValueError, match="cannot tell") as refused:
        read(fam, {"width": 8}, {"width": 32})
    suggested = re.search(r"uses=(\{.*?\)\})", str(refused.value))
    assert suggested is not None
    plan = pj.plan(fam, pj.mup, {"width": 8}, {"width": 32}, "adam", uses=eval(suggested[1], {"pj": pj}))
    found = {leaf.path: leaf for leaf in plan.leaves}["['H']"]
    assert (found.role, found.factors.learning_rate, found.factors.multiplier) == ("hidden", 0.25, 1.0)
    assert found.factors.init_scale == pytest.approx(1.0)
    # Written as one product, the trace needs no help and says the same.
    at_once = pj.family(lambda width: (fam.make(width)[0], _at_once), x=ROWS)
    alone = {leaf.path: leaf for leaf in pj.plan(at_once, pj.mup, {"width": 8}, {"width": 32}, "adam").leaves}["['H']"]
    assert (alone.role, alone.factors) == (found.role, found.factors)


def _at_once(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"])
    return (
        jnp.tanh(jnp.einsum("bj,jo->bo", (x[:, :4, None] * h[:, None]).reshape(len(x), -1), p["H"].reshape(-1, p["H"].shape[2]))) @ p["v"]
    )
