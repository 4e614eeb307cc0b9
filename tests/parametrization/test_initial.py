"""Any sensible initialization comes out with the wanted power of the width, by sampling at two sizes; constants are left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj

pytestmark = pytest.mark.slow

X = jnp.ones((2, 4))
BASE, TARGET = 32, 128
INITS = {
    "normal": nn.initializers.normal(0.02), "uniform": nn.initializers.uniform(0.1), "lecun": nn.initializers.lecun_normal(),
    "glorot": nn.initializers.glorot_uniform(), "he": nn.initializers.he_normal(), "truncated": nn.initializers.truncated_normal(0.3),
    "orthogonal": nn.initializers.orthogonal(), "fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "uniform"),
}  # fmt: skip


def net(init):
    def make(width):
        shapes = {"u": (4, width), "w": (width, width), "v": (width, 3)}

        def first(key, x):
            return {k: init(jax.random.fold_in(key, i), s, jnp.float32) for i, (k, s) in enumerate(shapes.items())}

        return pj.Model(first, lambda p, x: jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"]) @ p["v"])

    return pj.family(make, x=X)


def spread(model):
    return {k: float(np.std(leaf)) for k, leaf in model.init(jax.random.key(0), X).items()}


@pytest.mark.parametrize("name", INITS)
def test_powers_of_the_width(name):
    family = net(INITS[name])
    for scheme, powers in ((pj.mup, (0, 0.5, 1)), (pj.mup_table8, (0, 0.5, 0))):
        plan = pj.plan(family, scheme, base={"width": BASE}, target={"width": TARGET})
        small, large = spread(family(width=BASE)), spread(plan.model)
        for leaf, power in zip("uwv", powers):
            # The smallest leaf has 96 entries, whose standard deviation is known to 1 / sqrt(2 × 96) = 7%; half a power is 100%.
            assert large[leaf] / small[leaf] == pytest.approx((TARGET / BASE) ** -power, rel=0.2), leaf
        stds = {leaf.path: leaf.init_std for leaf in plan.leaves}
        assert large["w"] == pytest.approx(stds["['w']"], rel=0.03)


def test_embedding_of_1_over_sqrt_d():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Embed(50, self.width)(x).mean(1))

    tokens = jnp.zeros((2, 4), int)
    plan = pj.plan(pj.family(lambda width: Net(width), x=tokens), pj.mup, base={"width": 16}, target={"width": 64})
    drawn = plan.model.init(jax.random.key(0), tokens)["Embed_0"]["embedding"]
    # Flax draws 1/sqrt(d); muP's embedding does not know the width: 1/sqrt(16), the base's.
    assert float(jnp.std(drawn)) == pytest.approx(16**-0.5, rel=0.05)


def test_constants_stay():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(nn.Dense(self.width, bias_init=nn.initializers.constant(0.3))(x))
            zero = nn.Dense(self.width, kernel_init=nn.initializers.zeros)(h)
            return nn.Dense(3, kernel_init=nn.initializers.ones)(h + zero)

    family = pj.family(lambda width: Net(width), x=X)
    plan = pj.plan(family, pj.mup, base={"width": 8}, target={"width": 32})
    ours, theirs = plan.model.init(jax.random.key(0), X), family(width=32).init(jax.random.key(0), X)
    factors = {leaf.path: leaf.factors for leaf in plan.leaves}
    for path in ("['Dense_0']['bias']", "['LayerNorm_0']['scale']", "['Dense_1']['kernel']", "['Dense_2']['kernel']"):
        assert factors[path].init_scale == 1.0
        module, name = path[2:-2].split("']['")
        assert (ours[module][name] == theirs[module][name]).all()
    # What starts at a constant still learns at its own rate.
    assert factors["['Dense_1']['kernel']"].learning_rate == 0.25


def test_a_told_std_stands_for_one_that_is_read():
    plan = pj.plan(
        net(INITS["lecun"]), pj.mup, base={"width": 16}, target={"width": 64}, init_std={"['w']": lambda fan_in, fan_out: fan_in**-1.0}
    )
    assert {leaf.path: leaf.factors.init_scale for leaf in plan.leaves}["['w']"] == pytest.approx(2.0)


def per_fan_in(mean, std):
    """A network whose finite output bias is drawn with a mean and a standard deviation that look at the width."""

    def make(width):
        def init(key, x):
            u, v, b = jax.random.split(key, 3)
            bias = mean(width) + std(width) * jax.random.uniform(b, (3,), minval=-1.0)
            return {"u": jax.random.normal(u, (4, width)), "v": jax.random.normal(v, (width, 3)) / width**0.5, "b": bias}

        return pj.Model(init, lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"] + p["b"][None])

    return pj.family(make, x=X)


@pytest.mark.parametrize("scheme", [pj.mup, pj.mup_table9, pj.ntp], ids=lambda s: s.name)
def test_a_finite_bias_stays_at_the_bases_law(scheme):
    # Tensor Programs V, Tables 3, 8 and 9: exponents of what does not grow are 0. PyTorch and Equinox draw it from
    # U(-1/sqrt(n), 1/sqrt(n)), whose standard deviation is 1/sqrt(3 n).
    family = per_fan_in(lambda width: 0.0, lambda width: width**-0.5)
    for target in (16, 1024):
        plan = pj.plan(family, scheme, base={"width": 16}, target={"width": target})
        bias = next(leaf for leaf in plan.leaves if leaf.path == "['b']")
        assert bias.role == "finite"
        assert bias.init_std == pytest.approx(48**-0.5, rel=1e-3)
        drawn, own = (net.init(jax.random.key(0), X)["b"] for net in (plan.model, family(width=target)))
        np.testing.assert_allclose(drawn, own * (target / 16) ** 0.5, rtol=1e-5)


def test_equinox_draws_its_output_bias_so():
    eqx = pytest.importorskip("equinox")

    def make(width):
        def net(key):
            u, v = jax.random.split(key)
            return eqx.nn.Sequential([eqx.nn.Linear(4, width, key=u), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(width, 2, key=v)])

        return net

    plan = pj.plan(pj.family(make, x=X), pj.mup, base={"width": 16}, target={"width": 1024})
    assert [(leaf.path, leaf.role) for leaf in plan.leaves][-1] == (".layers[2].bias", "finite")
    assert plan.leaves[-1].factors.init_scale == pytest.approx(8.0)
    assert plan.leaves[-1].init_std == pytest.approx(48**-0.5, rel=1e-3)


def test_a_finite_law_that_no_factor_can_keep_is_refused():
    shifted = per_fan_in(lambda width: 1.0, lambda width: width**-0.5)
    with pytest.raises(ValueError, match=r"\['b'\] is finite.*from 1 and 0.144 to 1 and 0.0722, which no one factor undoes"):
        pj.plan(shifted, pj.mup, base={"width": 16}, target={"width": 64})
    # A mean in proportion is kept with the rest.
    together = per_fan_in(lambda width: width**-0.5, lambda width: width**-0.5)
    plan = pj.plan(together, pj.mup, base={"width": 16}, target={"width": 64})
    assert {leaf.path: leaf.factors.init_scale for leaf in plan.leaves}["['b']"] == pytest.approx(2.0)
