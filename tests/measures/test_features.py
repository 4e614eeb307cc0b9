"""Features that the trace finds against features computed by hand, and against what their authors' libraries record."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.measures import feature_change, output_change
from paperjax.model import Frozen, Model
from paperjax.models.layers import affine, through
from tests.zoo import Data, blobs, line

DATA = blobs(n=6, features=4)
X = jnp.asarray(DATA.x_train)


def two(model, x=X, noise=0.3):
    """Parameters, and others near them; what is given is the same in both, as after training."""
    before = model.init(jax.random.key(0), x)
    trained, given = pj.model.split(before)
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + noise * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return pj.model.join(jax.tree.unflatten(tree, moved), given), before


def relative(now, before):
    return float(np.linalg.norm(np.asarray(now) - before) / np.linalg.norm(before))


def measured(model, data=DATA, x=X):
    after, before = two(model, x)
    return float(feature_change(model, after, before, data)), after, before


def mlp_features(p, x, phi=jax.nn.relu):
    z = phi(affine(p["first"], x))
    return through(lambda z, layer: phi(affine(layer, z)), z, p["hidden"]) if "hidden" in p else z


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_mlp(depth):
    # Nine hidden layers are a scan, whose result the readout takes; two are unrolled.
    found, after, before = measured(pj.models.mlp(5, depth, 2))
    assert found == pytest.approx(relative(mlp_features(after, X), mlp_features(before, X)), rel=1e-5)


def test_batch_and_width_of_one_size_are_told_apart():
    # Features and readout are both (6, 6): only the trace says which is which.
    found, after, before = measured(pj.models.mlp(6, 1, 6))
    assert found == pytest.approx(relative(mlp_features(after, X), mlp_features(before, X)), rel=1e-5)


def test_resmlp():
    model = pj.models.resmlp(5, 3, 2, block="post")

    def features(p):
        def block(h, layer):
            return h + 3**-0.5 * jax.nn.relu(h @ layer["w"])

        return through(block, X @ p["first"]["w"], p["blocks"])

    found, after, before = measured(model)
    assert found == pytest.approx(relative(features(after), features(before)), rel=1e-5)


class Linen(nn.Module):
    """A convolution, a norm, and a readout that flax calls by a name that says nothing."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(nn.gelu(nn.Conv(3, (3, 3))(x))).reshape(x.shape[0], -1)
        self.sow("features", "h", h)
        return jax.nn.log_softmax(nn.Dense(2, name="a")(h))


@pytest.mark.slow
def test_a_linen_network_against_its_own_record():
    x = jax.random.normal(jax.random.key(3), (4, 5, 5, 1))
    model = pj.as_model(Linen())
    found, after, before = measured(model, Data(x, None, None, None), x)

    def own(params):
        return Linen().apply({"params": params["params"]}, x, mutable=["features"])[1]["features"]["h"][0]

    assert found == pytest.approx(relative(own(after), own(before)), rel=1e-5)


class Tokens(nn.Module):
    """Tied embedding and readout, around attention."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(7, 4)
        h = embed(x)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        self.sow("features", "h", h)
        return embed.attend(h)


@pytest.mark.slow
def test_a_transformer_with_tied_readout_against_its_own_record():
    x = jax.random.randint(jax.random.key(3), (3, 5), 0, 7)
    found, after, before = measured(pj.as_model(Tokens()), Data(x, None, None, None), x)

    def own(params):
        return Tokens().apply({"params": params["params"]}, x, mutable=["features"])[1]["features"]["h"][0]

    assert found == pytest.approx(relative(own(after), own(before)), rel=1e-5)


def test_a_readout_that_is_not_trained_is_still_the_readout():
    model = pj.models.two_layer(5, readout="signs", train_readout=False)
    found, after, before = measured(model)
    z, z0 = (jax.nn.relu(X @ p["first"]["w"]) for p in (after, before))
    assert found == pytest.approx(relative(z, z0), rel=1e-5)


def test_of_a_centred_network_the_trained_copy_counts():
    model = pj.transforms.center(pj.models.mlp(5, 2, 1))
    found, after, before = measured(model)
    assert found == pytest.approx(relative(mlp_features(after["trained"], X), mlp_features(before["trained"], X)), rel=1e-5)


def test_in_a_random_subspace():
    inner = pj.models.mlp(5, 1, 1)
    model = pj.transforms.subspace(inner, 3)
    after, before = two(model)
    seen = []
    spy = pj.transforms.subspace(Model(inner.init, lambda p, x: seen.append(mlp_features(p, x)) or inner.apply(p, x)), 3)
    for params in (after, before):
        spy.apply(params, X)
    assert float(feature_change(model, after, before, DATA)) == pytest.approx(relative(*seen), rel=1e-5)
    assert relative(*seen) > 0.01


def test_random_features_do_not_move():
    def init(key, x):
        return {"random": Frozen(jax.random.normal(key, (x.shape[1], 5))), "readout": jnp.zeros((5, 1))}

    model = Model(init, lambda p, x: jnp.tanh(x @ p["random"].value) @ p["readout"])
    assert measured(model)[0] == 0


def test_two_heads_that_share_features_count_them_once():
    def init(key, x):
        k = jax.random.split(key, 3)
        return {"w": jax.random.normal(k[0], (x.shape[1], 5)), "a": jnp.ones((5, 1)), "b": jnp.ones((5, 2))}

    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.concatenate([h @ p["a"], jax.nn.softplus(h @ p["b"]), x[:, :1]], axis=1)

    found, after, before = measured(Model(init, apply))
    assert found == pytest.approx(relative(jnp.tanh(X @ after["w"]), jnp.tanh(X @ before["w"])), rel=1e-5)


def test_a_recurrent_network_read_out_at_every_step():
    """The readout runs in a loop over time, where one matrix serves every step: features of all steps count."""

    def init(key, x):
        k = jax.random.split(key, 3)
        return {"u": jax.random.normal(k[0], (1, 5)), "w": 0.4 * jax.random.normal(k[1], (5, 5)), "v": jax.random.normal(k[2], (5, 1))}

    def states(p, x):
        def step(h, x_t):
            h = jnp.tanh(x_t[:, None] @ p["u"] + h @ p["w"])
            return h, h

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.T)[1]

    def apply(p, x):
        def step(h, x_t):
            h = jnp.tanh(x_t[:, None] @ p["u"] + h @ p["w"])
            return h, h @ p["v"]

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.T)[1][:, :, 0].T

    found, after, before = measured(Model(init, apply))
    assert found == pytest.approx(relative(states(after, X), states(before, X)), rel=1e-5)


@pytest.mark.slow
def test_multipliers_of_a_plan_are_no_features():
    family = pj.family(lambda width: pj.models.mlp(width, 2, 2), x=X)
    model = pj.plan(family, pj.mup_table8, base=dict(width=4), target=dict(width=16), optimizer="sgd").model
    found, after, before = measured(model)
    assert found == pytest.approx(relative(mlp_features(after, X), mlp_features(before, X)), rel=1e-5)


def test_inside_a_compiled_experiment_under_a_plan():
    """One step of a linear net, by hand: under NTP's plan U moves by lr (n0/n) x^T (2/B) (f - y) V^T, with V as initialized."""
    base, widths, lr = 4, [16], 0.1
    experiment = pj.Experiment(
        lambda width, gain: pj.models.linear_net(width, 1, 1, weight_variance=gain), DATA, loss="mse", optimizer="sgd",
        parametrization=pj.ntp, base=dict(width=base), grid=pj.grid(width=widths, gain=[1.0, 2.0], lr=lr, seed=2), steps=1,
        measure_at=[0, 1], measures=dict(moved=feature_change, out=output_change),
    )  # fmt: skip
    result = experiment.run()
    assert (result.moved.sel(step=0) == 0).all()
    x, y = (np.asarray(a, np.float64) for a in (DATA.x_train, DATA.y_train))
    for cell in (dict(width=w, gain=g, seed=s) for w in widths for g in (1.0, 2.0) for s in (0, 1)):
        family = pj.family(lambda width: pj.models.linear_net(width, 1, 1, weight_variance=cell["gain"]), x=X)  # noqa: B023
        model = pj.plan(family, pj.ntp, base=dict(width=base), target=dict(width=cell["width"]), optimizer="sgd").model
        params = model.init(jax.random.fold_in(jax.random.key(cell["seed"]), 0), DATA.x_train)
        # The plan's parameters times its multiplier are the weights; the multiplier enters the gradient too, squared in the function.
        m = (cell["width"] / base) ** -0.5
        u, v = np.asarray(params["first"]["w"], np.float64), m * np.asarray(params["readout"]["w"], np.float64)
        du = -lr * x.T @ (2 / len(x) * (x @ u @ v - y)) @ v.T
        assert float(result.moved.sel(step=1, **cell)) == pytest.approx(relative(x @ (u + du), x @ u), rel=1e-3)
        dv = -lr * m**2 * (x @ u).T @ (2 / len(x) * (x @ u @ v - y))
        out = x @ (u + du) @ (v + dv) - x @ u @ v
        assert float(result.out.sel(step=1, **cell)) == pytest.approx(float(np.sqrt(np.mean(out**2))), rel=1e-3)


def test_half_precision_is_summed_in_single():
    model = pj.models.mlp(5, 1, 1)
    x = X.astype(jnp.bfloat16)
    after, before = two(model, x)
    found = feature_change(model, after, before, Data(x, None, None, None))
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(relative(*(mlp_features(p, x).astype(jnp.float32) for p in (after, before))), rel=1e-4)


def test_a_linear_model_has_no_features():
    with pytest.raises(ValueError, match="no hidden layer"):
        feature_change(line(), jnp.ones((4, 1)), jnp.zeros((4, 1)), DATA)


def test_layers_of_a_loop_are_no_readout():
    def init(key, x):
        return {"first": jnp.eye(x.shape[1]), "rest": jax.random.normal(key, (3, x.shape[1], x.shape[1]))}

    model = Model(init, lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["first"], p["rest"])[0])
    with pytest.raises(ValueError, match="loop over layers"):
        feature_change(model, *two(model), DATA)


def test_outputs():
    w, w0 = jnp.array([[1.0], [2.0], [0.0], [1.0]]), jnp.array([[0.5], [2.0], [1.0], [0.0]])
    expected = np.sqrt(np.mean(np.square(DATA.x_train @ np.asarray(w - w0))))
    assert float(output_change(line(), w, w0, DATA)) == pytest.approx(float(expected), rel=1e-5)
