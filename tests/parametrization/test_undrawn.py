"""Leaves that init does not draw: numbers of an instance are asked about, and an override settles what a table cannot."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paperjax as pj
from tests.zoo import as_users_run_it

eqx = pytest.importorskip("equinox")

X = jnp.ones((4, 5))
BASE, TARGET = {"width": 16}, {"width": 64}


@pytest.fixture(autouse=True)
def usual():
    with as_users_run_it():
        yield


class Nnx(nnx.Module):
    def __init__(self, width, rngs):
        self.a, self.b, self.o = (nnx.Linear(*s, rngs=rngs) for s in ((5, width), (width, width), (width, 2)))

    def __call__(self, x):
        return self.o(nnx.relu(self.b(nnx.relu(self.a(x)))))


def with_numpy(draw):
    def network(width):
        def init(key, x):
            rng = np.random.default_rng(0)
            shapes = {"a": (5, width), "b": (width, width), "o": (width, 2)}
            return {k: jnp.asarray(draw(rng, s) / s[0] ** 0.5, jnp.float32) for k, s in shapes.items()}

        return pj.Model(init, lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["o"])

    return network


def eqx_mlp(width, key):
    return eqx.nn.MLP(5, 2, width, 2, key=key)


GIVEN = {
    "nnx instance": (lambda width: Nnx(width, nnx.Rngs(0)), lambda width: lambda rngs: Nnx(width, rngs)),
    "equinox instance": (lambda width: eqx_mlp(width, jax.random.key(0)), lambda width: lambda key: eqx_mlp(width, key)),
    "numpy": (with_numpy(lambda rng, s: rng.normal(size=s)), None),
    "numpy, centred and joined": (with_numpy(lambda rng, s: np.concatenate([rng.normal(size=(s[0] - 1, s[1])), np.ones((1, s[1]))])), None),
}


@pytest.mark.parametrize("name", GIVEN)
def test_numbers_that_init_does_not_draw_are_asked_about(name):
    instance, constructor = GIVEN[name]
    for scheme in (pj.mup, pj.standard):
        with pytest.raises(
            ValueError, match=r"leaf \S+: it starts at unequal numbers that init does not draw.*Give the constructor.*init_std="
        ):
            pj.plan(instance, scheme, base=BASE, target=TARGET, x=X)
    # At one size nothing scales.
    pj.plan(instance, pj.mup, base=TARGET, target=TARGET, x=X)
    if constructor is not None:
        drawn = pj.plan(constructor, pj.mup, base=BASE, target=TARGET, x=X)
        told = {leaf.path: lambda fan_in, fan_out: fan_in**-0.5 for leaf in drawn.leaves if len(leaf.shape) == 2 or leaf.role == "vector"}
        plan = pj.plan(instance, pj.mup, base=BASE, target=TARGET, x=X, init_std=told)
        ours = {leaf.path: leaf.factors for leaf in plan.leaves if len(leaf.shape) == 2}
        # Table 3 at n = 4, where the model's own is fan_in^-1/2.
        assert sorted(f.init_scale for f in ours.values()) == pytest.approx([0.5, 1.0, 1.0])


def rows(hidden, position):
    """A hidden matrix and a table of positions by formula, between drawn ones."""

    def network(width):
        def init(key, x):
            drawn = nn.initializers.lecun_normal()
            first, last = (drawn(k, s) for k, s in zip(jax.random.split(key), ((5, width), (width, 2))))
            return {"a": first, "w": hidden(width), "p": position(width), "o": last}

        return pj.Model(init, lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"] + p["p"]) @ p["w"]) @ p["o"])

    return network


def sines(width):
    at, over = jnp.arange(4.0)[:, None], jnp.arange(float(width))[None]
    return jnp.sin(at / 100 ** (over / width))


def test_formulas_that_do_not_know_the_key():
    # What is added entry by entry (positions, the rates of a state space) keeps its numbers: the input's column does not know n.
    plan = pj.plan(rows(lambda width: jnp.zeros((width, width)), sines), pj.mup_table9, base=BASE, target=TARGET, x=X)
    factors = {leaf.path: leaf.factors for leaf in plan.leaves}["['p']"]
    assert (factors.init_scale, factors.multiplier) == (0.5, 2.0)
    # A matrix by formula may be an identity, whose norm knows no width, or sum over it: only its author knows.
    network = rows(jnp.eye, sines)
    with pytest.raises(ValueError, match=r"\['w'\]: it starts at numbers that do not.* and as hidden.*fan_in \*\* -0\.5"):
        pj.plan(network, pj.mup, base=BASE, target=TARGET, x=X)
    told = {"['w']": lambda fan_in, fan_out: fan_in**-0.5}
    for scheme in (pj.mup, pj.mup_table9, pj.ntp):
        plan = pj.plan(network, scheme, base=BASE, target=TARGET, x=X, init_std=told)
        factors = {leaf.path: leaf.factors for leaf in plan.leaves}["['w']"]
        assert factors.init_scale * factors.multiplier == pytest.approx(1.0)
