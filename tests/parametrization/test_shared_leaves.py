"""A leaf with several uses: its plan is that of its roles, in whatever order the network has them, and a planned network is planned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from tests.parametrization.trajectories import distance, trajectory
from tests.zoo import as_users_run_it

X = np.random.default_rng(0).normal(size=(6, 5))
Y = np.random.default_rng(1).normal(size=(6, 3))
BASE, TARGET = {"width": 4}, {"width": 32}
FORMS = [pj.mup, pj.mup_table8, pj.mup_table9]


@pytest.fixture(autouse=True)
def double():
    with as_users_run_it(), jax.enable_x64(True):
        yield


def drawn(**shapes):
    def init(key, x):
        return {k: jax.random.normal(jax.random.fold_in(key, i), s) / s[0] ** 0.5 for i, (k, s) in enumerate(shapes.items())}

    return init


def memory(width, reads_first=False):
    """Rows that are compared with the features and then summed; `reads_first` sums some before, times 0."""

    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        if reads_first:
            h = h + 0.0 * (jax.nn.softmax(x) @ p["m"])
        return jnp.tanh(h + jax.nn.softmax(h @ p["m"].T / width**0.5) @ p["m"]) @ p["o"]

    return pj.Model(drawn(a=(5, width), m=(5, width), o=(width, 3)), apply)


def autoencoder(width, reads_first=False):
    """A bottleneck of 5 that is encoded and decoded by one matrix."""

    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        if reads_first:
            h = h + 0.0 * (x @ p["b"].T)
        return jnp.tanh((h @ p["b"] / width) @ p["b"].T) @ p["o"]

    return pj.Model(drawn(a=(5, width), b=(width, 5), o=(width, 3)), apply)


def run(plan, rule):
    tx = plan.optimizer(optax.sgd, 0.05, momentum=0.9) if rule == "sgd" else plan.optimizer(optax.adamw, 0.02, eps=1e-3, weight_decay=0.1)
    return trajectory(plan.model.apply, plan.model.init(jax.random.key(0), X), tx, jnp.asarray(X), jnp.asarray(Y), steps=4)


def planned(network, scheme, rule, **settings):
    return pj.plan(lambda width: network(width, **settings), scheme, base=BASE, target=TARGET, optimizer=rule, x=X)


networks = pytest.mark.parametrize("network", [memory, autoencoder], ids=lambda n: n.__name__)


@networks
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_the_order_of_uses_is_nothing_to_the_plan(network, rule):
    first, other = (planned(network, pj.mup, rule, reads_first=r) for r in (False, True))
    assert [(a.path, a.role, a.factors) for a in first.leaves] == [(b.path, b.role, b.factors) for b in other.leaves]
    shared = next(leaf for leaf in first.leaves if leaf.role == "input+output")
    # Tensor Programs V, Table 3 at n = 8: the input's column; the readout's 1/n stands on the activation.
    assert shared.factors[1:4] == ((1.0, 8.0, 1.0) if rule == "sgd" else (1.0, 1.0, 1 / 8))
    # The model has n^-1/2, or n^-1, of the output use itself; the wanted is n^-1 in all.
    assert [s.factor for s in first.scalings] == ([pytest.approx(8**-0.5)] if network is memory else [])


@networks
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_forms_of_mup_are_one_trajectory(network, rule):
    table3, *others = (run(planned(network, scheme, rule), rule) for scheme in FORMS)
    assert max(distance(other, table3) for other in others) < 1e-10


@networks
@pytest.mark.parametrize("scheme", [pj.mup, pj.mup_table8, pj.spectral, pj.ntp], ids=lambda s: s.name)
def test_planning_what_is_planned_changes_nothing(network, scheme):
    def under(width):
        return pj.plan(network, scheme, base=BASE, target={"width": width}, x=X).model

    again = pj.plan(under, scheme, base=BASE, target=TARGET, x=X)
    assert again.scalings == ()
    for leaf in again.leaves:
        assert leaf.factors[:2] == (pytest.approx(1.0, rel=1e-6),) * 2, leaf.path


def twice(width, divided):
    """One matrix in two layers, of which the model multiplies one (0 or 1), or both, by n^-1/2."""

    def apply(p, x):
        h = x @ p["a"]
        for layer in (0, 1):
            h = jnp.tanh((h @ p["w"]) * (width**-0.5 if layer in divided else 1.0))
        return h @ p["o"]

    return pj.Model(drawn(a=(5, width), w=(width, width), o=(width, 3)), apply)


@pytest.mark.parametrize("divided", [(0,), (1,), (0, 1)], ids=str)
def test_what_the_model_multiplies_one_use_by(divided):
    # At the base both numbers are in front of one weight; at the target each use has the power that the table wants.
    def effective(width):
        plan = pj.plan(lambda width: twice(width, divided), pj.mup, base=BASE, target={"width": width}, optimizer="sgd", x=X)
        return plan.model, plan

    (model, plan), hand = effective(32), [4**-0.5 if layer in divided else 1.0 for layer in (0, 1)]
    params = model.init(jax.random.key(0), X)
    h = X @ params["a"]
    for factor in hand:
        h = jnp.tanh(h @ params["w"] * factor)
    np.testing.assert_allclose(model.apply(params, X), h @ params["o"], rtol=1e-10)
    assert len(plan.scalings) == (0 if len(divided) == 2 else 1)


def test_a_shared_bias_that_the_model_multiplies_in_one_place_is_refused():
    def network(width):
        def apply(p, x):
            h = jnp.tanh(x @ p["a"] + p["b"][None])
            return jnp.tanh((h @ p["w"] + p["b"][None]) * width**-0.5) @ p["o"]

        return pj.Model(drawn(a=(5, width), b=(width,), w=(width, width), o=(width, 3)), apply)

    with pytest.raises(ValueError, match=r"\['b'\] is used in several places that want different factors.*it is added.*Use two leaves"):
        pj.plan(network, pj.mup, base=BASE, target=TARGET, x=X)


def test_a_readout_joined_with_another_leaf_is_refused():
    def network(width):
        def apply(p, x):
            h = jnp.tanh(jax.nn.one_hot(jnp.argmax(x, -1), 5) @ p["e"])
            return h @ jnp.concatenate([p["e"].T, p["more"]], axis=1)

        return pj.Model(drawn(e=(5, width), more=(width, 2)), apply)

    with pytest.raises(ValueError, match=r"\['e'\] is used in several places.*joined with \['more'\]"):
        pj.plan(network, pj.mup, base=BASE, target=TARGET, x=X)
