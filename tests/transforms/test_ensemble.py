"""Laws of independent copies of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from paperjax.losses import mse
from paperjax.model import Model, as_model, check_model, count, join, split
from paperjax.models import cnn, mlp, two_layer
from paperjax.transforms import center, ensemble, linearize, subspace
from tests.transforms.compiled import X, ntk, run, start

NETWORK = mlp(5, 2, 2, activation=jnp.tanh)
K = 3


def member(params, i):
    return jax.tree.map(lambda leaf: leaf[i], params)


@pytest.mark.parametrize(
    "model",
    [NETWORK, two_layer(6, 2, readout="signs", train_readout=False), subspace(NETWORK, 7), linearize(center(NETWORK))],
    ids=["mlp", "frozen readout", "subspace", "linearised and centred"],
)
def test_members_are_the_network_of_their_own_key(model, x64):
    key = jax.random.key(0)
    init, apply = jax.jit(model.init), jax.jit(model.apply)
    params = jax.jit(ensemble(model, K).init)(key, X)
    outputs, mean = jax.jit(lambda p: (run(ensemble(model, K, reduce=None), p, X), run(ensemble(model, K), p, X)))(params)
    assert outputs.shape == (4, K, 2)
    for i, own in enumerate(jax.random.split(key, K)):
        alone = init(own, X)
        # Frozen parts belong to the members too.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), member(params, i), alone)
        np.testing.assert_allclose(outputs[:, i], apply(alone, X), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mean, outputs.mean(axis=1), rtol=1e-12, atol=1e-14)
    assert count(params) == K * count(alone)


def test_one_member_is_the_network(x64):
    params = start(ensemble(NETWORK, 1), 1, X)
    np.testing.assert_allclose(run(ensemble(NETWORK, 1), params, X), run(NETWORK, member(params, 0), X), rtol=1e-12)


def test_an_ensemble_of_ensembles_is_one_of_all(x64):
    nested = ensemble(ensemble(NETWORK, 2), 3)
    params = start(nested, 2, X)
    flat = jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), params)
    np.testing.assert_allclose(run(nested, params, X), run(ensemble(NETWORK, 6), flat, X), rtol=1e-12)


def test_the_ntk_of_the_mean_is_the_mean_ntk_over_the_size(x64):
    params = start(ensemble(NETWORK, K), 3, X)
    members = np.mean([ntk(NETWORK, member(params, i)) for i in range(K)], axis=0)
    np.testing.assert_allclose(ntk(ensemble(NETWORK, K), params), members / K, rtol=1e-10)


def test_gradients_of_the_mean_share_its_residual(x64):
    """``(1/k) J_i' (mean - y)``, J_i the member's Jacobian: not the gradient of the member's own loss."""
    params = start(ensemble(NETWORK, K), 4, X)
    y = jnp.asarray(np.random.default_rng(1).standard_normal((4, 2)))
    residual = 2 * (run(ensemble(NETWORK, K), params, X) - y) / y.size
    gradient = jax.grad(lambda p: jnp.mean((run(ensemble(NETWORK, K), p, X) - y) ** 2))(params)
    for i in range(K):
        pulled = jax.vjp(lambda p: run(NETWORK, p, X), member(params, i))[1](residual / K)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14), member(gradient, i), pulled)


def test_members_train_by_themselves_under_all_their_outputs(x64):
    """k times the learning rate on (batch, k, out) is SGD on each member; and so is training under vmap, then stacking."""
    model, lr = ensemble(NETWORK, K, reduce=None), 0.1
    params = start(model, 5, X)
    y = jnp.asarray(np.random.default_rng(1).standard_normal((4, 2)))
    together = jax.grad(lambda p: mse(run(model, p, X), jnp.repeat(y[:, None], K, axis=1)))(params)
    apart = jax.vmap(jax.grad(lambda p: mse(run(NETWORK, p, X), y)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(K * lr * a, lr * b, rtol=1e-9, atol=1e-14), together, apart)


def test_integer_and_key_leaves_are_the_members_own():
    model = Model(
        lambda key, x: {"w": jnp.ones((3, 1)), "key": key, "n": jax.random.randint(key, (), 0, 1000)},
        lambda p, x: x @ p["w"] * p["n"].astype(x.dtype) + jax.random.normal(p["key"], (1, 1)),
    )
    wrapped = ensemble(model, K)
    params = wrapped.init(jax.random.key(6), X.astype("float32"))
    assert len(set(params["n"].tolist())) == K
    assert count(params) == 3 * K
    trained, given = split(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), join(trained, given), params))
    assert check_model(wrapped, X.astype("float32"))[1].shape == (4, 1)


def test_images_and_old_keys():
    images = jnp.ones((2, 8, 8, 1))
    model = ensemble(cnn(4, 1), 2, reduce=None)
    params = model.init(jax.random.PRNGKey(0), images)
    assert model.apply(params, images).shape == (2, 2, 10)


def test_equal_members_where_init_ignores_its_key():
    import equinox as eqx

    net = as_model(eqx.nn.Linear(3, 1, key=jax.random.key(0)))
    x = X.astype("float32")
    params = start(ensemble(net, K), 1, x)
    np.testing.assert_allclose(ensemble(net, K, reduce=None).apply(params, x).std(axis=1), 0, atol=1e-7)


@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_that_are_refused(size):
    with pytest.raises(ValueError, match="size = "):
        ensemble(NETWORK, size)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(Exception, match="reduce"):
        ensemble(NETWORK, 2, reduce="sum")  # type: ignore[arg-type]


def test_parameters_of_another_size_are_refused():
    x = X.astype("float32")
    params = start(ensemble(NETWORK, 2), 0, x)
    with pytest.raises(ValueError, match=r"hold 2 members.*size = 3"):
        ensemble(NETWORK, 3).apply(params, x)


def test_a_plan_scales_members_as_it_does_the_network():
    """The trace sees that the axis over members is one of copies, and does not grow."""
    factors = []
    for wrap in (lambda m: m, lambda m: ensemble(m, K), lambda m: pj.transforms.rescale(m, 0.5)):
        family = pj.family(lambda width, wrap=wrap: wrap(mlp(width, 2, 2)), x=X.astype("float32"))
        plan = pj.plan(family, pj.mup, base={"width": 4}, target={"width": 16}, optimizer=optax.adam)
        factors.append([(leaf.role, leaf.factors) for leaf in plan.leaves])
    assert factors[0] == factors[1] == factors[2]


def test_a_plan_of_a_linearised_network_is_refused_and_a_linearised_plan_works():
    def family(wrap):
        return pj.family(lambda width: wrap(mlp(width, 2, 2)), x=X.astype("float32"))

    sizes = {"base": {"width": 4}, "target": {"width": 16}}
    with pytest.raises(ValueError, match=r"\['trained'\]\['hidden'\]\['w'\].*at sub"):
        pj.plan(family(linearize), pj.mup, **sizes)
    plan = pj.plan(family(lambda m: m), pj.mup, **sizes)
    x = X.astype("float32")
    params = start(linearize(plan.model), 0, x)
    np.testing.assert_allclose(linearize(plan.model).apply(params, x), plan.model.apply(params["trained"], x), rtol=1e-6)
