"""What no factor of a plan can bring to order 1 is warned of, and nothing else is.

Features that learn are correlated, so their sum over n coordinates is of order n, whatever it is at initialization (Tensor Programs IV,
arXiv 2011.14522, section 2): what a leaf does not weigh wants n^-1 from the model.
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.zoo import as_users_run_it

X = np.random.default_rng(0).normal(size=(4, 6, 5))
SIZES = {"base": {"width": 8}, "target": {"width": 32}}


@pytest.fixture(autouse=True)
def _usual_promotion():
    with as_users_run_it():
        yield


def model(shapes, apply):
    """``shapes(width)`` of the leaves, which all start with unit variance, and ``apply(params, x, width)``."""

    def family(width):
        def init(key, x):
            drawn = jax.random.split(key, len(shapes(width)))
            return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(drawn, shapes(width).items())}

        return pj.Model(init, lambda p, x: apply(p, x, width))

    return family


def planned(family, scheme=pj.mup, **settings):
    return pj.plan(pj.family(family, x=X), scheme, **SIZES, optimizer="adam", **settings)


def features(head, **leaves):
    """A head on ``tanh(tanh(x u) w)``, of shape (batch, positions, width)."""
    sizes = {"one": 1, "some": 3}

    def shapes(width):
        at = {**sizes, "width": width, "in": 5}
        return {name: tuple(at[a] for a in axes) for name, axes in {"u": ("in", "width"), "w": ("width", "width"), **leaves}.items()}

    return model(shapes, lambda p, x, n: head(jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"]), p, n))


def heads(combine):
    """Width / 4 heads of 4 coordinates each; `combine` sums over them."""
    return model(
        lambda width: {"u": (5, width // 4, 4), "o": (4, 3)}, lambda p, x, n: combine(jnp.einsum("bti,ihd->bthd", x, p["u"]), p, n)
    )


def unit(h):
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


def layer_norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)


SCALED = {
    "a committee": (features(lambda h, p, n: h.sum(-1) / n**0.5), -0.5),
    "a committee of relus": (model(lambda width: {"w": (5, width)}, lambda p, x, n: jax.nn.relu(x @ p["w"]).sum(-1) / n**0.5), -0.5),
    "a plain sum": (features(lambda h, p, n: h.sum((1, 2))), 0.0),
    "a product with ones": (features(lambda h, p, n: h @ jnp.ones(n)), 0.0),
    "a product with NumPy's ones, over a root": (features(lambda h, p, n: h @ np.ones((n, 1), np.float32) / n**0.5), -0.5),
    "a product with a root": (features(lambda h, p, n: h @ jnp.full(n, n**-0.5)), -0.5),
    "partial sums": (features(lambda h, p, n: jnp.cumsum(h, -1)[..., -1]), 0.0),
    "all partial sums": (features(lambda h, p, n: jnp.tanh(jnp.cumsum(h, -1) / n**0.5) @ p["v"], v=("width", "some")), -0.5),
    "a mean, times a root": (features(lambda h, p, n: h.mean(-1) * n**0.5), -0.5),
    "distances to prototypes": (
        features(lambda h, p, n: -((h[:, :, None] - p["c"][None, None]) ** 2).sum(-1), c=("some", "width")),
        0.0,
    ),
    # What is behind the output matrix is not the sum's, except that it makes a mean of it.
    "one output for all heads": (heads(lambda h, p, n: jnp.einsum("bthd,do->bto", h, p["o"]) / (n // 4) ** 0.5), 0.0),
    "copies of the output matrix": (
        heads(lambda h, p, n: jnp.einsum("bthd,hdo->bto", h, jnp.broadcast_to(p["o"], (n // 4, 4, 3))) / (n // 4) ** 0.5),
        0.0,
    ),
    "a tiled output matrix": (heads(lambda h, p, n: h.reshape(*h.shape[:2], n) @ jnp.tile(p["o"], (n // 4, 1))), 0.0),
    "one output for all heads, one by one": (
        heads(lambda h, p, n: sum(h[:, :, i] @ p["o"] for i in range(n // 4)) / (n // 4) ** 0.5),
        -0.5,
    ),
    "one output for all heads, entry by entry": (heads(lambda h, p, n: (h[..., None] * p["o"][None, None, None]).sum((2, 3))), 0.0),
    "heads in one row": (heads(lambda h, p, n: jnp.tanh(h).reshape(*h.shape[:2], n // 4, 4).sum(2) @ p["o"]), 0.0),
    "squares": (features(lambda h, p, n: (h * h).sum(-1)), 0.0),
    "squares by a product": (features(lambda h, p, n: jnp.einsum("btn,btn->bt", h, h) / n**0.5), -0.5),
    "a length": (features(lambda h, p, n: jnp.linalg.norm(h, axis=-1)), 0.0),
    "coordinates of a unit vector": (features(lambda h, p, n: unit(h).sum(-1)), -0.5),
    "a gate for all coordinates": (features(lambda h, p, n: (h * jnp.tanh(h[..., :1])).sum(-1)), 0.0),
    "beside its own norm": (features(lambda h, p, n: layer_norm(h) * h.sum(-1, keepdims=True)), 0.0),
    # The number before the sum is taken for W's, and undone: (x @ W) / sqrt(n) is an initialization.
    "a root before the sum": (model(lambda width: {"w": (5, width)}, lambda p, x, n: (x @ p["w"] / n**0.5).sum(-1)), 0.0),
    "on a stream that is normed": (features(lambda h, p, n: layer_norm(h[..., :4] + h.sum(-1, keepdims=True))), 0.0),
}

SILENT = {
    "a mean": features(lambda h, p, n: h.mean(-1)),
    "a mean by ones": features(lambda h, p, n: h @ jnp.ones(n) / n),
    "a mean by a product": features(lambda h, p, n: h @ jnp.full((n, 1), 1 / n)),
    "a mean by partial sums": features(lambda h, p, n: jnp.cumsum(h / n, -1)[..., -1]),
    "partial means": features(lambda h, p, n: (jnp.cumsum(h, -1) / n) @ p["v"], v=("width", "some")),
    "partial sums over positions": features(lambda h, p, n: jnp.cumsum(h, 1) @ p["v"], v=("width", "some")),
    "a norm by ones": features(
        lambda h, p, n: h / jnp.sqrt((h**2) @ jnp.ones((n, 1)) / n + 1e-6) @ p["v"], v=("width", "some")
    ),
    "a softmax by ones": features(lambda h, p, n: jnp.exp(h) / (jnp.exp(h) @ jnp.ones((n, 1))) @ p["v"], v=("width", "some")),
    "a readout by ones": features(lambda h, p, n: (h * p["v"][None]) @ jnp.ones(n), v=("one", "width")),
    "a sum over its size": features(lambda h, p, n: h.sum(-1) / n),
    "a division before the sum": features(lambda h, p, n: (h / n).sum(-1)),
    "a division before the sum of a projection": model(lambda width: {"w": (5, width)}, lambda p, x, n: (x @ p["w"] / n).sum(-1)),
    "a mean of squares": features(lambda h, p, n: (h**2).sum(-1) / n),
    "a root mean square": features(lambda h, p, n: jnp.sqrt((h**2).mean(-1))),
    "a variance": features(lambda h, p, n: h.var(-1)),
    "an unbiased variance": features(lambda h, p, n: h.var(-1, ddof=1)),
    "a mean of distances": features(lambda h, p, n: jnp.exp(-((h - p["c"][None]) ** 2).sum(-1) / n), c=("one", "width")),
    "a pool over positions": features(lambda h, p, n: h.mean(1) @ p["v"], v=("width", "some")),
    "a sum over positions": features(lambda h, p, n: h.sum(1) @ p["v"], v=("width", "some")),
    "squeeze and excite": features(
        lambda h, p, n: (h * jax.nn.sigmoid(h.mean(1, keepdims=True) @ p["a"] @ p["b"])).mean(1) @ p["v"],
        a=("width", "some"), b=("some", "width"), v=("width", "some"),
    ),
    "a readout entry by entry": features(lambda h, p, n: (h * p["v"][None]).sum(-1), v=("one", "width")),
    "norms": features(lambda h, p, n: (unit(h) + layer_norm(h) + jax.nn.softmax(h)) @ p["v"], v=("width", "some")),
    "logarithms": features(lambda h, p, n: jax.nn.logsumexp(h, -1, keepdims=True) + jax.nn.log_softmax(h) @ p["v"], v=("width", "some")),
    "flax's norms": features(
        lambda h, p, n: sum(m.apply({}, h) for m in FLAX_NORMS) @ p["v"], v=("width", "some"),
    ),
    "a share": features(lambda h, p, n: (jnp.exp(h) / jnp.exp(h).sum(-1, keepdims=True)).sum(-1)),
    "a length that is kept below a bound": features(
        lambda h, p, n: (h * jnp.minimum(1.0, 2.0 / jnp.linalg.norm(h, axis=-1, keepdims=True))) @ p["v"], v=("width", "some")
    ),
    "a cosine": features(lambda h, p, n: (unit(h) * unit(h[:, ::-1])).sum(-1)),
    "a product of features over n": features(lambda h, p, n: jnp.einsum("btn,bsn->bts", h, jnp.tanh(h)) / n),
    "one output for all heads, over their number": heads(lambda h, p, n: jnp.einsum("bthd,do->bto", h, p["o"]) / (n // 4)),
    "copies of the output matrix, over their number": heads(
        lambda h, p, n: jnp.einsum("bthd,hdo->bto", h, jnp.broadcast_to(p["o"], (n // 4, 4, 3))) / (n // 4)
    ),
    "one output for all heads, one by one, over their number": heads(
        lambda h, p, n: sum(h[:, :, i] @ p["o"] for i in range(n // 4)) / (n // 4)
    ),
    "each head's output over their number": heads(lambda h, p, n: sum((h[:, :, i] / (n // 4)) @ p["o"] for i in range(n // 4))),
    "the number of heads, before the sum": heads(lambda h, p, n: jnp.einsum("bthd,do->bto", h / (n // 4), p["o"])),
    "the nearest prototype": features(
        lambda h, p, n: jax.nn.one_hot(((h[:, :, None] - p["c"][None, None]) ** 2).sum(-1).argmin(-1), 3) @ p["c"], c=("some", "width")
    ),
    "a decision": features(lambda h, p, n: jnp.where(h.sum(-1, keepdims=True) > 0, h, 0.0) @ p["v"], v=("width", "some")),
    "heads that are normed": heads(lambda h, p, n: layer_norm(h.sum(2)) @ p["o"]),
    "data alone": features(lambda h, p, n: h @ p["v"] * jnp.broadcast_to(X[..., :1], h.shape).sum(-1, keepdims=True), v=("width", "some")),
}  # fmt: skip
FLAX_NORMS = (
    nn.LayerNorm(use_scale=False, use_bias=False), nn.RMSNorm(use_scale=False), nn.GroupNorm(2, use_scale=False, use_bias=False),
    nn.InstanceNorm(use_scale=False, use_bias=False),
)  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_a_sum_that_no_leaf_weighs_is_warned_of(name):
    family, exponent = SCALED[name]
    with pytest.warns(UserWarning, match=r"a sum \(equation .* made runs over") as seen:
        planned(family)
    (said,) = (str(one.message) for one in seen)
    assert f"multiplies it by n^{exponent:.2g}," in said
    assert "wants n^-1" in said
    # A parametrization whose features do not learn has nothing to say.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(family, pj.ntp)


@pytest.mark.parametrize("name", SILENT)
def test_means_norms_and_decisions_are_not(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(SILENT[name])


def test_a_layer_that_repeats_is_warned_of_once():
    def make(width, depth):
        def apply(p, x):
            h = jnp.tanh(x @ p["u"])
            for w in p["w"]:
                h = jnp.tanh(h @ w) + h.sum(-1, keepdims=True)
            return h

        shapes = {"u": (5, width), "w": [(width, width)] * depth}
        init = lambda key, x: jax.tree.map(lambda s: jax.random.normal(key, s), shapes, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
        return pj.Model(init, apply)

    family = pj.family(make, x=X)
    with pytest.warns(UserWarning, match="made runs over 32 coordinates, 8 at the base") as seen:
        pj.plan(family, pj.mup, base={"width": 8, "depth": 2}, target={"width": 32, "depth": 6}, optimizer="adam")
    assert len({str(one.message) for one in seen}) == len(seen) == 2


@pytest.mark.parametrize("deeper", [True, False])
def test_a_sum_over_layers_is_no_sum_over_a_width(deeper):
    """Skips of all layers are summed; their number is the depth."""

    def make(width, depth):
        def init(key, x):
            keys = jax.random.split(key, 3)
            shapes = {"u": (5, width), "w": (depth, width, width), "v": (width, 3)}
            return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}

        def apply(p, x):
            step = lambda h, w: (jnp.tanh(h @ w), h)  # noqa: E731
            _, skips = jax.lax.scan(step, x @ p["u"], p["w"])
            return skips.sum(0) @ p["v"]

        return pj.Model(init, apply)

    sizes = {"width": 8, "depth": 2}, {"width": 32 if not deeper else 8, "depth": 6}
    pj.plan(pj.family(make, x=X), pj.mup, base=sizes[0], target=sizes[1], optimizer="adam")


MEANS = {
    "mean": lambda h, n: h.mean(-1, keepdims=True),
    "after": lambda h, n: h.sum(-1, keepdims=True) / n,
    "before": lambda h, n: (h / n).sum(-1, keepdims=True),
    "times": lambda h, n: (h * (1 / n)).sum(-1, keepdims=True),
    "by ones": lambda h, n: h @ jnp.ones((n, 1)) / n,
    "by ones, before": lambda h, n: (h / n) @ jnp.ones((n, 1)),
    "by a product": lambda h, n: h @ jnp.full((n, 1), 1 / n),
    "by partial sums": lambda h, n: jnp.cumsum(h, -1)[..., -1:] / n,
    "by partial sums, before": lambda h, n: jnp.cumsum(h / n, -1)[..., -1:],
}


@pytest.mark.parametrize("spelling", MEANS)
@pytest.mark.parametrize("scheme", [pj.mup, pj.ntp, pj.standard], ids=lambda s: s.name)
def test_a_mean_has_one_plan_in_all_spellings(spelling, scheme):
    def family(mean):
        return model(lambda width: {"w": (5, width), "v": (1, 3)}, lambda p, x, n: mean(jax.nn.relu(x @ p["w"]), n) @ p["v"])

    ours, theirs = (planned(family(MEANS[one]), scheme) for one in (spelling, "mean"))
    assert [leaf.factors for leaf in ours.leaves] == [leaf.factors for leaf in theirs.leaves]


SUMMED = {
    "a sum": lambda h, v: (h * v).sum(-1),
    "ones": lambda h, v: (h * v) @ jnp.ones(h.shape[-1]),
    "NumPy's ones": lambda h, v: (h * v) @ np.ones(h.shape[-1], np.float32),
}


@pytest.mark.parametrize("spelling", SUMMED)
def test_a_readout_that_is_summed_by_a_product_with_ones_is_a_readout(spelling):
    """sum_i v_i h_i: Table 3 of Tensor Programs V at a ratio of 4, standard deviation and learning rate 1/4."""
    plan = planned(features(lambda h, p, n: SUMMED[spelling](h, p["v"][None, None]), v=("width",)))
    (leaf,) = (leaf for leaf in plan.leaves if leaf.path == "['v']")
    assert (leaf.role, leaf.factors.init_scale, leaf.factors.learning_rate) == ("output", 0.25, 0.25)


def test_a_leaf_whose_products_are_added_up_one_by_one_is_refused():
    with pytest.raises(ValueError, match=r"\['v'\] \(32,\), axis 0 .*at cumsum, .*added up one after the other.*Use\("):
        planned(features(lambda h, p, n: jnp.cumsum(h * p["v"][None, None], -1), v=("width",)))


ONE_FOR_ALL = {
    "the mean of the heads": lambda h, o, heads: h.mean(2) @ o,
    "after the product": lambda h, o, heads: jnp.einsum("bthd,do->bto", h, o) / heads,
    "before the product": lambda h, o, heads: jnp.einsum("bthd,do->bto", h / heads, o),
    "between": lambda h, o, heads: (h.sum(2) / heads) @ o,
    "with copies": lambda h, o, heads: jnp.einsum("bthd,hdo->bto", h, jnp.broadcast_to(o, (heads, *o.shape))) / heads,
    "with tiles": lambda h, o, heads: h.reshape(*h.shape[:2], -1) @ jnp.tile(o, (heads, 1)) / heads,
    "entry by entry": lambda h, o, heads: (h[..., None] * o[None, None, None]).sum((2, 3)) / heads,
    "one by one": lambda h, o, heads: sum(h[:, :, i] @ o for i in range(heads)) / heads,
}


@pytest.mark.parametrize("spelling", ONE_FOR_ALL)
def test_a_mean_of_heads_has_one_plan_in_all_spellings(spelling):
    """The number of heads is the mean's, and not what a leaf behind it or before it is multiplied by."""

    def family(combine):
        def apply(p, x, n):
            h = jnp.einsum("bti,ihd->bthd", x, p["u"])
            return jnp.tanh(combine(h, p["o"], n // 4)) @ p["v"]

        return model(lambda width: {"u": (5, width // 4, 4), "o": (4, width), "v": (width, 3)}, apply)

    ours, theirs = (planned(family(ONE_FOR_ALL[one])) for one in (spelling, "the mean of the heads"))
    assert [leaf.factors for leaf in ours.leaves] == [leaf.factors for leaf in theirs.leaves]
    assert [leaf.factors.multiplier for leaf in ours.leaves] == [1.0, 1.0, 1.0]


def test_logits_that_are_summed_by_a_product_with_ones_are_logits():
    family = features(
        lambda h, p, n: ((h @ p["q"])[:, :, None] * (h @ p["k"])[:, None]) @ jnp.ones(n) / n**0.5,
        q=("width", "width"),
        k=("width", "width"),
    )
    (scaling,) = planned(family).scalings
    assert (scaling.factor, scaling.sort, scaling.op) == (pytest.approx(0.5), "product", "dot_general")


def hypernetwork(width):
    """A matrix that the data make of four, for each example its own."""
    shapes = {"u": (5, width), "maker": (4, width, width), "v": (width, 3)}

    def apply(p, x):
        made = jnp.einsum("btk,kio->btio", x[..., :4], p["maker"])
        return jnp.einsum("bti,btio->bto", jnp.tanh(x @ p["u"]), made) @ p["v"]

    return pj.Model(lambda key, x: {n: jax.random.normal(key, s) for n, s in shapes.items()}, apply)


def test_what_the_caller_settled_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = planned(hypernetwork, uses={"['maker']": pj.trace.Use(inside=(0, 1), out=(2,))})
    assert {leaf.path: leaf.role for leaf in plan.leaves}["['maker']"] == "hidden"


def test_what_the_caller_settled_elsewhere_says_nothing_of_it():
    with pytest.warns(UserWarning, match="a product of two activations"):
        planned(
            features(lambda h, p, n: jnp.einsum("btn,bsn->bts", h, jnp.tanh(h)) @ jnp.ones((6, 1)) * p["s"][None], s=("one", "one")),
            uses={"['s']": pj.trace.Use(out=(0, 1), kind="elementwise")},
        )
