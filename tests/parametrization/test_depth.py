"""Depth: which branches are counted together, what belongs to one, and what no table of residual branches is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)


def network(shapes, apply):
    """Normal leaves of variance 1/fan_in (biases of variance 1), by name and shape."""

    def init(key, x):
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, s) / (s[-2] ** 0.5 if len(s) > 1 else 1.0) for k, (name, s) in zip(keys, shapes.items())}

    return pj.Model(init, apply)


def factors(make, base, target, scheme=pj.depth_mup, optimizer="adam"):
    plan = pj.plan(pj.family(make, x=X), scheme, base=base, target=target, optimizer=optimizer)
    return plan, {leaf.path.strip("[]'"): leaf.factors for leaf in plan.leaves}


def by_layer(body, **per_layer):
    """A family over depth, a Python loop of `body(p, i, h)`, with leaves ``name + number`` for every layer."""

    def make(depth, width=8):
        shapes = {"u": (5, width), "v": (width, 3)}
        for i in range(depth):
            shapes |= {f"{name}{i}": shape(width) for name, shape in per_layer.items()}

        def apply(p, x):
            h = x @ p["u"]
            for i in range(depth):
                h = body(p, i, h)
            return h @ p["v"]

        return network(shapes, apply)

    return make


def square(n):
    return (n, n)


def vector(n):
    return (n,)


def relu_of(p, i, h):
    return jax.nn.relu(h) @ p[f"w{i}"]


def norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


WAYS = {
    "together": lambda p, i, h: h + (relu_of(p, i, h) + p[f"b{i}"][None]),
    "bias last": lambda p, i, h: h + relu_of(p, i, h) + p[f"b{i}"][None],
    "bias first": lambda p, i, h: h + p[f"b{i}"][None] + relu_of(p, i, h),
    "in steps": lambda p, i, h: (h + relu_of(p, i, h)).reshape(-1, 2, h.shape[-1] // 2).reshape(h.shape) + p[f"b{i}"][None],
}


@pytest.mark.parametrize("scheme", [pj.depth_mup, pj.completep], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_of_a_branch_is_one_wherever_it_is_added(way, scheme):
    """``h + f + b`` is ``h + (f + b)``: hidden biases follow their branch, multiplier m^-alpha (arXiv 2310.02244; 2505.01618, Table 1)."""
    plan, found = factors(by_layer(WAYS[way], w=square, b=vector), dict(depth=2), dict(depth=32), scheme)
    wanted = {"Depth-muP": 16**-0.5, "CompleteP": 1 / 16}[scheme.name]
    assert found["b31"].multiplier == found["w31"].multiplier == pytest.approx(wanted)
    assert found["b31"] == found["w31"]
    assert found["u"].multiplier == found["v"].multiplier == 1
    params = plan.network.init(jax.random.key(0), X)
    same = pj.plan(pj.family(by_layer(WAYS["together"], w=square, b=vector), x=X), scheme, base=dict(depth=2), target=dict(depth=32))
    np.testing.assert_allclose(plan.model.apply(params, X), same.model.apply(params, X), rtol=1e-4, atol=1e-4)


def test_a_bias_beside_the_branch_of_a_scan():
    def make(depth):
        def apply(p, x):
            def step(h, layer):
                return h + jax.nn.relu(h) @ layer["w"] + layer["b"][None], None

            return jax.lax.scan(step, x @ p["u"], {"w": p["w"], "b": p["b"]})[0] @ p["v"]

        return network({"u": (5, 8), "w": (depth, 8, 8), "b": (depth, 8), "v": (8, 3)}, apply)

    found = factors(make, dict(depth=4), dict(depth=64))[1]
    assert found["b"].eps == found["w"].eps
    assert found["b"].multiplier == found["b"].learning_rate == pytest.approx(1 / 4)


def deepnorm(kind, looped=False):
    """Post-norm layers, ``norm(a h + f(h))`` with a = (2 L)^1/4 (DeepNet, arXiv 2203.00555), in two spellings."""

    def make(depth):
        a = (2 * depth) ** 0.25

        def layer(h, w):
            f = jax.nn.relu(h) @ w
            return norm(a * h + f if kind == "on the stream" else h + f / a)

        def apply(p, x):
            h = x @ p["u"]
            if looped:
                return jax.lax.scan(lambda h, w: (layer(h, w), None), h, p["w"])[0] @ p["v"]
            for i in range(depth):
                h = layer(h, p[f"w{i}"])
            return h @ p["v"]

        layers = {"w": (depth, 8, 8)} if looped else {f"w{i}": (8, 8) for i in range(depth)}
        return network({"u": (5, 8), "v": (8, 3)} | layers, apply)

    return make


@pytest.mark.parametrize("looped", [False, True], ids=["python", "scan"])
def test_a_number_on_the_streams_side_before_a_norm_is_the_branchs(looped):
    """``norm(a h + f) = norm(h + f / a)``: the model divides the branch by 16^1/4 itself, and Depth-muP wants 16^1/2 of it."""
    plans = [factors(deepnorm(kind, looped), dict(depth=2), dict(depth=32))[1] for kind in ("on the stream", "on the branch")]
    last = "w" if looped else "w31"
    assert plans[0][last].multiplier == pytest.approx(16**-0.25)
    assert plans[0][last] == pytest.approx(plans[1][last])


@pytest.mark.parametrize("spelling", ["after", "before", "scan", "scan of two"])
def test_a_stream_that_fades_is_refused(spelling):
    root = 2**-0.5

    def make(depth):
        def layer(h, w):
            f = jax.nn.relu(h) @ w
            h = h * root + f * root if spelling == "before" else (h + f) * root
            return h + jax.nn.relu(h) @ w if spelling == "scan of two" else h

        def apply(p, x):
            h = x @ p["u"]
            if "scan" in spelling:
                return jax.lax.scan(lambda h, w: (layer(h, w), None), h, p["w"])[0] @ p["v"]
            for i in range(depth):
                h = layer(h, p["w"][i])
            return h @ p["v"]

        return network({"u": (5, 8), "w": (depth, 8, 8), "v": (8, 3)}, apply)

    with pytest.raises(ValueError, match="multiplied by a number at each add"):
        factors(make, dict(depth=2), dict(depth=32))
    # Width alone: no depth is scaled, and nothing is refused; nor is a number after the last add.
    factors(make, dict(depth=2), dict(depth=32), pj.mup)


def test_a_number_after_the_last_add_is_no_fading():
    def make(depth):
        def apply(p, x):
            h = x @ p["u"]
            for i in range(depth):
                h = h + relu_of(p, i, h)
            return (h / 3.0) @ p["v"]

        return network({"u": (5, 8), "v": (8, 3)} | {f"w{i}": (8, 8) for i in range(depth)}, apply)

    assert factors(make, dict(depth=2), dict(depth=32))[1]["w31"].multiplier == pytest.approx(0.25)


def two_stacks(enc, dec):
    shapes = {"u": (5, 8), "m": (8, 8), "v": (8, 3)} | {f"e{i}": (8, 8) for i in range(enc)} | {f"d{i}": (8, 8) for i in range(dec)}

    def apply(p, x):
        h = x @ p["u"]
        for i in range(enc):
            h = h + jax.nn.relu(h) @ p[f"e{i}"]
        h = h @ p["m"]
        for i in range(dec):
            h = h + jax.nn.relu(h) @ p[f"d{i}"]
        return h @ p["v"]

    return network(shapes, apply)


def stages(depths):
    """Numbers of a stage and of a layer in one name."""
    names = [f"stage{s}_layer{i}" for s, n in enumerate(depths) for i in range(n)]

    def apply(p, x):
        h = x @ p["u"]
        for name in names:
            h = h + jax.nn.relu(h) @ p[name]
        return h @ p["v"]

    return network({"u": (5, 8), "v": (8, 3)} | dict.fromkeys(names, (8, 8)), apply)


def long_skip(depth):
    def apply(p, x):
        h = x @ p["u"]
        z = jax.nn.relu(h) @ p["down"]
        for i in range(depth):
            z = z + jax.nn.relu(z) @ p[f"w{i}"]
        return (h + z @ p["up"]) @ p["v"]

    return network({"u": (5, 8), "down": (8, 16), "up": (16, 8), "v": (8, 3)} | {f"w{i}": (16, 16) for i in range(depth)}, apply)


def groups(depth):
    def body(p, i, h):
        z = h
        for k in range(2):
            z = z + jax.nn.relu(z) @ p[f"w{k}_{i}"]
        return h + jax.nn.relu(z) @ p[f"o{i}"]

    return by_layer(body, w0_=square, w1_=square, o=square)(depth)


HALF = 16**-0.5
# Of a branch whose number grows by 16, by hand: multiplier and Adam's learning rate 16^-1/2; of one whose number stays, 1.
COUNTED = {
    "encoder and decoder": (two_stacks, dict(enc=2, dec=2), dict(enc=32, dec=2), {"e31": (HALF, HALF), "d1": (1, 1), "m": (1, 1)}),
    "stages": (stages, dict(depths=(1, 2)), dict(depths=(1, 32)), {"stage0_layer0": (1, 1), "stage1_layer31": (HALF, HALF)}),
    "a long skip": (long_skip, dict(depth=2), dict(depth=32), {"w31": (HALF, HALF), "up": (1, 1), "down": (1, 1)}),
    # What is inside a branch is f, which the factor on the branch leaves alone; its weights learn as those of the branch.
    "groups": (groups, dict(depth=2), dict(depth=32), {"o31": (HALF, HALF), "w0_31": (1, HALF), "w1_31": (1, HALF)}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_kind_of_branch_is_counted_by_itself(name):
    make, base, target, wanted = COUNTED[name]
    found = factors(make, base, target)[1]
    for leaf, numbers in wanted.items():
        assert (found[leaf].multiplier, found[leaf].learning_rate) == pytest.approx(numbers), leaf


@pytest.mark.parametrize("loop", ["python", "scan"])
def test_layers_that_share_their_weights_are_refused_where_their_number_grows(loop):
    """ALBERT (arXiv 1909.11942): the update of a shared weight is a sum over layers, which no table here scales."""

    def make(depth):
        def step(h, p):
            return h + jnp.tanh(h @ p["w"]) @ p["o"]

        def apply(p, x):
            h = x @ p["u"]
            if loop == "scan":
                return jax.lax.scan(lambda h, _: (step(h, p), None), h, None, length=depth)[0] @ p["v"]
            for _ in range(depth):
                h = step(h, p)
            return h @ p["v"]

        return network({"u": (5, 8), "w": (8, 8), "o": (8, 8), "v": (8, 3)}, apply)

    with pytest.raises(ValueError, match=r"\['o'\], \['w'\]: layers share it"):
        factors(make, dict(depth=2), dict(depth=4))
    assert factors(make, dict(depth=2), dict(depth=4), pj.mup)[1]["w"].multiplier == 1


@pytest.mark.parametrize("loop", ["python", "scan"])
@pytest.mark.parametrize("scheme", [pj.depth_mup, pj.completep], ids=lambda s: s.name)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_what_layers_share_and_write_with_weights_of_their_own_is_as_a_leaf_outside_of_them(loop, scheme, rule):
    """T5's table of relative positions, DETR's embedding of positions: every layer adds it, behind weights of its own.

    Its gradient is a sum over L layers of L^-alpha, through independent weights (alpha = 1/2) or weights that learned alike (alpha = 1):
    of order 1 in both. Under Depth-muP one step of Adam moves the output by 0.0090, 0.0082, 0.0094, 0.0084 through such a leaf alone
    at 4, 16, 64 and 256 layers (width 64, four seeds).
    """
    m = 16

    def make(depth):
        def step(h, own, p):
            return h + jnp.tanh(h @ own["w"] + p["s"][None]) @ own["o"]

        def apply(p, x):
            h = x @ p["u"]
            if loop == "scan":
                return jax.lax.scan(lambda h, own: (step(h, own, p), None), h, {"w": p["w"], "o": p["o"]})[0] @ p["v"]
            for i in range(depth):
                h = step(h, {"w": p[f"w{i}"], "o": p[f"o{i}"]}, p)
            return h @ p["v"]

        each = {n: (depth, 8, 8) for n in "wo"} if loop == "scan" else {f"{n}{i}": (8, 8) for n in "wo" for i in range(depth)}
        return network({"u": (5, 8), "s": (8,), "v": (8, 3)} | each, apply)

    plan = pj.plan(pj.family(make, x=X), scheme, base=dict(depth=2), target=dict(depth=2 * m), optimizer=rule)
    found = {leaf.path[2:-2]: leaf.factors for leaf in plan.leaves}
    alpha = scheme.depth.alpha
    assert found["s"] == found["v"] == (1.0,) * 5
    own, writer = (found["w"], found["o"]) if loop == "scan" else (found["w31"], found["o31"])
    rate = m ** (alpha - 1 if rule == "adam" else 2 * alpha - 1)
    assert (own.multiplier, own.learning_rate) == pytest.approx((1, rate))
    assert (writer.multiplier, writer.learning_rate) == pytest.approx((m**-alpha, rate))


def embedded(factor):
    """Tokens times sqrt(d) at the start of a residual stream, or drawn as large, and pre-norm branches."""

    def family(width, depth):
        def init(key, x):
            keys = jax.random.split(key, 2 + 2 * depth)
            layers = [
                {"a": jax.random.normal(a, (width, width)) * width**-0.5, "b": jax.random.normal(b, (width, width)) * width**-0.5}
                for a, b in zip(keys[2::2], keys[3::2])
            ]
            table = jax.random.normal(keys[0], (7, width)) * (width**-0.5 if factor else 1.0)
            return {"table": table, "layers": layers, "out": jax.random.normal(keys[1], (width, 3)) * width**-0.5}

        def apply(p, x):
            h = p["table"][x] * (width**0.5 if factor else 1.0)
            for layer in p["layers"]:
                h = h + jnp.tanh(h / jnp.sqrt((h**2).mean(-1, keepdims=True)) @ layer["a"]) @ layer["b"]
            return h @ p["out"]

        return pj.Model(init, apply)

    return family


@pytest.mark.parametrize("scheme", [pj.depth_mup, pj.completep])
def test_a_number_of_the_embedding_is_not_the_first_branchs(scheme):
    """The first branch is added to the embedding times sqrt(d); that number is the embedding's, whichever branch comes next."""
    tokens = np.zeros((2, 4), np.int32)

    def branches(factor):
        fam = pj.family(embedded(factor), x=tokens)
        plan = pj.plan(fam, scheme, base=dict(width=16, depth=2), target=dict(width=64, depth=4), optimizer="adam")
        return {leaf.path: leaf.factors.multiplier for leaf in plan.leaves if "layers" in leaf.path}

    assert branches(True) == pytest.approx(branches(False))
    assert len({round(m, 9) for path, m in branches(True).items() if path.endswith("['b']")}) == 1
