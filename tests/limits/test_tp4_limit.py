"""The feature-learning limit against networks that the framework trains, mean-field dynamics, kernel descent and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paperjax as pj

RNG = np.random.default_rng(0)
X, TEST = RNG.standard_normal((4, 5)), RNG.standard_normal((2, 5))
Y = np.array([[1.0, 0.5], [-1.0, 0.0], [1.0, -1.0], [-1.0, 0.3]])
STEPS, LR, BASE = 8, 0.1, 8
BATCHES = [[0, 1], [2], [3, 1], [0, 2], [1], [3, 0], [2, 3], [1, 2]]


def solve(depth=2, x=X, y=Y, **options):
    return pj.limits.tp4_limit(x, y, **{"depth": depth, "learning_rate": LR, "steps": STEPS, "key": jax.random.key(0), **options})


def identity(h):
    return h


def squares(f, y):
    return 0.5 * jnp.sum(jnp.square(f - y))


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def mean_field(depth, gamma, lr):
    """The network of `mean_field_dynamics` as one of `tp4_limit`."""
    factors = [(gamma**2 / X.shape[1], gamma**2, 1.0), (1 / X.shape[1], 1.0, 1 / gamma**2)]
    rates, variances = ([*values[:depth], values[-1]] for values in factors)
    return {"rates": rates, "variances": variances, "learning_rate": lr, "loss": squares}


@pytest.mark.parametrize("depth", [1, 2])
def test_linear_full_batches_are_mean_field_dynamics(depth):
    gamma, lr = 1.5, 0.08
    ours = solve(depth, y=Y[:, :1], **mean_field(depth, gamma, lr))
    other = pj.limits.mean_field_dynamics(X, Y[:, 0], depth=depth, gamma=gamma, learning_rate=lr, steps=STEPS + 1)
    # Two routes to what is exact: coefficients on chains, and the march.
    np.testing.assert_allclose(ours.outputs[..., 0], other.predictions, atol=1e-12)
    np.testing.assert_allclose(ours.features, np.einsum("ltatb->ltab", other.features), atol=1e-11)
    assert ours.report.exact
    assert not any(np.any(error) for error in ours.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("phi", [jnp.tanh, jax.nn.relu])
@pytest.mark.parametrize("depth", [1, 2])
def test_full_batches_are_mean_field_dynamics(phi, depth):
    gamma, lr = 1.5, 0.08
    options = {"phi": phi, "replicas": 8}
    ours = solve(depth, y=Y[:, :1], **mean_field(depth, gamma, lr), **options)
    other = pj.limits.mean_field_dynamics(
        X, Y[:, 0], depth=depth, gamma=gamma, learning_rate=lr, steps=STEPS + 1, key=jax.random.key(1), **options
    )
    kernels, errors = (np.einsum("ltatb->ltab", of) for of in (other.features, other.stderr[1]))
    for found, expected, mine, its in (
        (ours.outputs[1:, :, 0], other.predictions[1:], ours.stderr[0][1:, :, 0], other.stderr[0][1:]),
        (ours.features, kernels, ours.stderr[2], errors),
    ):
        assert distance(found, expected) < 0.02
        # Errors of eight runs, and of what is not drawn 1e-3 of a variance.
        assert np.sqrt(np.mean((found - expected) ** 2 / (mine**2 + its**2 + 1e-6))) < 2


class Wide:
    """Networks of the library under muP, on minibatches; of two examples, which are one where the batch has one."""

    def __init__(self, depth, phi, y=Y):
        self.phi, self.y, weight, readout = phi or identity, y, 1.0, 0.5
        options = {"activation": self.phi, "bias": False, "weight_variance": weight, "readout_variance": readout}
        self.family = pj.family(lambda width: pj.models.mlp(width, depth, 2, **options), x=jnp.asarray(X, jnp.float32))
        layers = [(weight / X.shape[1], 1 / BASE), (weight, 1.0), (readout * BASE, float(BASE))]
        variances, rates = zip(*layers[:depth], layers[-1])
        self.limit = functools.partial(solve, depth, y=y, phi=phi, variances=variances, rates=rates, x_test=TEST, batches=BATCHES)

    def trained(self, width, seeds):
        """Outputs ``(seeds, T + 1, Q, O)`` and kernels ``(seeds, L, T + 1, Q, Q)``."""
        plan = pj.plan(self.family, pj.mup, base=dict(width=BASE), target=dict(width=width), optimizer="sgd")
        tx = plan.optimizer(optax.sgd, learning_rate=LR)
        x, y = jnp.asarray(np.concatenate([X, TEST]), jnp.float32), jnp.asarray(self.y, jnp.float32)
        batches = jnp.array([np.resize(batch, 2) for batch in [*BATCHES, [0]]])

        def step(params, at):
            h = [self.phi(x @ params["first"]["w"])]
            if "hidden" in params:
                h.append(self.phi(h[0] @ params["hidden"]["w"][0]))
            grads = jax.grad(lambda p: pj.losses.mse(plan.model.apply(p, x[at]), y[at]))(params)
            updates, _ = tx.update(grads, tx.init(params), params)
            return optax.apply_updates(params, updates), (plan.model.apply(params, x), jnp.stack([v @ v.T / width for v in h]))

        def run(key):
            f, kernels = jax.lax.scan(step, plan.model.init(key, x), batches)[1]
            return f, jnp.swapaxes(kernels, 0, 1)

        return [np.asarray(of) for of in jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(7), seeds))]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("phi", [None, jnp.tanh, jax.nn.relu])
@pytest.mark.parametrize("depth", [1, 2])
def test_wide_networks_approach_it_as_the_root_of_the_width(depth, phi):
    wide = Wide(depth, phi)
    answer = wide.limit(samples=6000)
    limit, features = np.concatenate([answer.outputs, answer.test_outputs], axis=1), answer.features
    widths, seeds = (32, 64, 128, 256), 48
    found = [wide.trained(n, seeds) for n in widths]
    for i, expected in enumerate((limit, features)):
        means = [np.mean([distance(of, expected) for of in fields[i]]) for fields in found]
        assert abs(np.polyfit(np.log(widths), np.log(means), 1)[0] + 0.5) < 0.15
        # 48 networks of width 256 are as one of width 12,000, of chance 1 to 2 %, and off by order 1 / 256 all alike.
        assert distance(np.mean(found[-1][i], axis=0), expected) < 0.05


def kernel_descent(kernel, y=Y):
    """Outputs ``(T + 1, Q, O)`` of a linear model of this kernel that starts at 0, under the mean squared error."""
    kernel, f = np.asarray(kernel), [np.zeros((len(kernel), 2))]
    for batch in BATCHES:
        chi = (f[-1][batch] - y[batch]) / len(batch)
        f.append(f[-1] - LR * kernel[:, batch] @ chi)
    return np.array(f)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("phi", [None, jnp.tanh])
def test_the_lazy_limit_misses(phi):
    """Networks of width 512 are far from descent with the tangent kernel of the same family in NTK parametrization."""
    labels = 2 * Y
    wide, x = Wide(2, phi, labels), np.concatenate([X, TEST])
    f, features = (np.mean(of, axis=0) for of in wide.trained(512, 16))
    ours = wide.limit()
    kernel = pj.limit(wide.family, x, parametrization=pj.ntp, base=dict(width=BASE)).ntk
    outputs = np.concatenate([ours.outputs, ours.test_outputs], axis=1)
    assert 3 * distance(f, outputs) < distance(f, kernel_descent(kernel, labels))
    # Lazy features stay.
    assert 3 * distance(features, ours.features) < distance(features, ours.features[:, :1].repeat(STEPS + 1, axis=1))
    # The first step is that of the tangent kernel in both.
    np.testing.assert_allclose(outputs[1], kernel_descent(kernel, labels)[1], atol=0.02)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("phi", [None, jax.nn.relu])
def test_hidden_layers_that_do_not_learn_are_random_features(x64, depth, phi):
    """Kernel descent with the NNGP kernel of `paperjax.limits.mlp_kernels`."""
    answer = solve(depth, phi=phi, rates=(*[0.0] * depth, 1.0), variances=(*[2.0] * depth, 1.0), batches=BATCHES, x_test=TEST)
    x = np.concatenate([X, TEST])
    kernel = pj.limits.mlp_kernels(jnp.asarray(x @ x.T), depth, phi or pj.limits.identity, 2.0).nngp / 2
    expected = kernel_descent(kernel)
    found = np.concatenate([answer.outputs, answer.test_outputs], axis=1)
    if phi is None:
        np.testing.assert_allclose(found, expected, atol=1e-12)
        np.testing.assert_allclose(answer.features[-1, -1], kernel, atol=1e-12)
    else:
        error = np.concatenate(answer.stderr[:2], axis=1)
        # Standard errors of four runs have heavy tails; and relu's variance is known to 1e-3.
        assert np.sqrt(np.mean((found - expected) ** 2 / (error**2 + 1e-6))) < 3
        assert distance(found, expected) < 0.05


@pytest.mark.parametrize("depth", [1, 2])
def test_sampling_the_identity_is_the_linear_limit(depth):
    exact = solve(depth, batches=BATCHES, x_test=TEST)
    found = solve(depth, batches=BATCHES, x_test=TEST, phi=identity, samples=400, replicas=2)
    # Orthonormal noise makes it exact at depth 1; at 2 but for what is too little to be drawn (1e-3 of a variance).
    atol = (1e-12, 1e-3)[depth - 1]
    for ours, theirs in zip(found[:3], exact[:3]):
        np.testing.assert_allclose(ours, theirs, atol=atol * np.abs(theirs).max())
    assert exact.report.exact
    assert not found.report.exact


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]))
def test_linear_invariances(seed, depth):
    """Rotations of the inputs, the order in a batch, later batches for earlier steps, and points that it does not learn from."""
    rng = np.random.default_rng(seed)
    x, y, rates = rng.standard_normal((3, 4)), rng.standard_normal((3, 1)), rng.uniform(0, 0.2, 6)
    batches = [rng.integers(0, 3, rng.integers(1, 4)) for _ in range(6)]
    options = dict(depth=depth, x=x, y=y, learning_rate=rates, steps=6)
    whole = solve(batches=batches, **options)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    turned = solve(batches=[rng.permutation(b) for b in batches], **{**options, "x": x @ rotation}, x_test=TEST[:, :4])
    np.testing.assert_allclose(turned.outputs, whole.outputs, atol=1e-9)
    np.testing.assert_allclose(turned.features[:, :, :3, :3], whole.features, atol=1e-8)
    start = solve(batches=batches[:3], **{**options, "learning_rate": rates[:3], "steps": 3})
    np.testing.assert_allclose(start.outputs, whole.outputs[:4], atol=1e-9)


@pytest.mark.parametrize("depth", [1, 2])
def test_points_beside_the_batch_are_drawn_as_those_in_it(depth):
    """A copy of the training points is in no batch: its Gaussians are given by those of the batches."""
    answer = solve(depth, phi=jnp.tanh, samples=600, replicas=2, batches=BATCHES, x_test=X)
    # A Gaussian that is known is left undrawn up to 1e-3 of its variance.
    np.testing.assert_allclose(answer.test_outputs, answer.outputs, atol=3e-3)
    np.testing.assert_allclose(answer.features[..., :4, :4], answer.features[..., 4:, 4:], atol=3e-3)


def test_nothing_is_learned_at_learning_rate_0():
    answer = solve(2, phi=jnp.tanh, samples=200, replicas=2, learning_rate=np.zeros(STEPS))
    np.testing.assert_allclose(answer.outputs, 0, atol=1e-12)
    # Four independent examples at the same weights: the Gaussians are drawn once.
    assert answer.report.basis == 4
    assert solve(2, phi=jnp.tanh, samples=200, replicas=2, variances=(1.0, 1.0, 0.0)).outputs[-1].any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 0}, "one or two hidden layers"),
        ({"depth": 3}, "depth = 3.*mean_field_dynamics"),
        ({"learning_rate": -0.1}, "learning_rate = -0.1"),
        ({"learning_rate": [0.1, 0.2]}, r"learning_rate has shape \(2,\).*8 steps"),
        ({"learning_rate": np.nan}, "learning_rate = nan: it is finite"),
        ({"rates": (1.0, -1.0, 1.0)}, "rates = .*one for each of the 3 layers"),
        ({"variances": (1.0, 1.0)}, "variances = .*one for each of the 3 layers"),
        ({"variances": (1.0, 0.0, 1.0)}, "a hidden layer that starts at 0"),
        ({"steps": 0}, "steps = 0"),
        ({"batches": [[0]]}, "1 batches for 8 steps"),
        ({"batches": [*BATCHES[:3], [], *BATCHES[4:]]}, r"the batch of step 3 has shape \(0,\)"),
        ({"batches": [*BATCHES[:3], [4], *BATCHES[4:]]}, r"the batch of step 3 is \[4\].*0\.\.3"),
        ({"batches": [*BATCHES[:3], [0.5], *BATCHES[4:]]}, "whole numbers"),
        ({"loss": lambda f, y: jnp.square(f - y)}, "and not one number"),
        ({"loss": lambda f, y: jnp.sum(jnp.log(f))}, "not finite at step 0"),
        ({"loss": "nse"}, "unknown loss"),
        ({"y": Y[:3]}, r"y has shape \(3, 2\), and x has 4 rows"),
        ({"y": Y[:, 0]}, r"labels of floating point are \(4, outputs\).*y\[:, None\]"),
        ({"outputs": 3}, r"labels of floating point are \(4, 3\)"),
        ({"y": np.arange(4)}, "give outputs=10"),
        ({"y": np.arange(4), "outputs": 0}, "outputs = 0"),
        ({"y": np.arange(4), "outputs": 3, "loss": "cross_entropy"}, r"the classes 0\.\.2"),
        ({"y": Y * np.nan}, "y has entries that are not finite"),
        ({"x": X * np.inf}, "x has entries that are not finite"),
        ({"x_test": TEST[:, :2]}, r"x_test \(2, 2\)"),
        ({"samples": 3}, "samples are even"),
        ({"replicas": 1}, "needs two runs"),
        ({"phi": jnp.tanh, "key": None}, r"key=jax\.random\.key"),
        ({"phi": jnp.sum}, r"maps shape \(2, 3\) to \(\)"),
        ({"phi": jnp.log}, "phi or its derivative is not finite"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        solve(**options)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("phi", [None, jax.nn.relu])
def test_training_that_diverges_says_where(phi, depth):
    with pytest.raises(RuntimeError, match=r"step \d+ overflowed: training diverges.*smaller learning rates"):
        solve(depth, learning_rate=1e4, phi=phi, samples=100, replicas=2)


@pytest.mark.parametrize(("samples", "says"), [(8, "the 4 independent weights"), (16, "of the variance of a field is left out")])
def test_too_few_samples(samples, says):
    with pytest.raises(RuntimeError, match=rf"{says}.*Raise samples, say to {2 * samples}"):
        solve(phi=jax.nn.relu, samples=samples, replicas=2)
