"""Infinitely wide networks in training against networks of finite width, written in NumPy, and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj

X = np.random.default_rng(0).standard_normal((3, 5))
Y = np.array([1.0, -1.0, 1.0])
GAMMA, LR, STEPS = 1.5, 0.08, 8


def trained(width, depth, seed):
    """Kernels ``Phi^l(t, t)`` of a linear muP network, from the definition in the module's docstring."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((width, X.shape[1]))] + [rng.standard_normal((width, width)) for _ in range(depth - 1)]
    readout, kernels = rng.standard_normal(width), []
    fans = [X.shape[1]] + [width] * (depth - 1)
    for _ in range(STEPS):
        values = [X.T]
        for w, fan in zip(weights, fans):
            values.append(w @ values[-1] / fan**0.5)
        error = Y - readout @ values[-1] / (GAMMA * width)
        kernels.append([v.T @ v / width for v in values[1:]])
        g, changes = np.repeat(readout[:, None], len(Y), 1), []
        for layer in reversed(range(depth)):
            # lr gamma^2 N df/dW; for W^0 the root of D stands where that of N does.
            changes.append(LR * GAMMA * (g * error) @ values[layer].T / fans[layer] ** 0.5)
            g = weights[layer].T @ g / fans[layer] ** 0.5
        readout = readout + LR * GAMMA * values[-1] @ error
        weights = [w + change for w, change in zip(weights, reversed(changes))]
    return np.array(kernels).transpose(1, 0, 2, 3)


def solve(**options):
    return pj.limits.mean_field_dynamics(X, Y, **{"depth": 2, "gamma": GAMMA, "learning_rate": LR, "steps": STEPS, **options})


def distance(kernels, answer):
    equal = np.einsum("ltatb->ltab", answer.features)
    return np.linalg.norm(kernels - equal) / np.linalg.norm(equal)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_linear_networks_of_width_2048(depth):
    answer, lazy = solve(depth=depth), solve(depth=depth, gamma=0.0)
    # 3 %, and four seeds, for one differs by about sqrt(2 / 2048) at the start.
    kernels = np.mean([trained(2048, depth, seed) for seed in range(4)], axis=0)
    assert distance(kernels, answer) < 0.03
    assert distance(kernels, lazy) > 2 * distance(kernels, answer)


def test_the_difference_falls_as_the_root_of_the_width():
    answer, widths = solve(), np.array([32, 64, 128, 256])
    means = [np.mean([distance(trained(n, 2, seed), answer) for seed in range(24)]) for n in widths]
    assert abs(np.polyfit(np.log(widths), np.log(means), 1)[0] + 0.5) < 0.15


def test_two_layers_follow_the_exact_recursion():
    """m, A, M of the single-sample linear net: moments of u and r that steps of gradient descent mix, exactly."""
    answer = pj.limits.mean_field_dynamics(np.ones((1, 1)), np.ones(1), depth=1, gamma=GAMMA, learning_rate=LR, steps=STEPS)
    # (h, z) = rotation of (u, r): h' = h + v z, z' = z + v h, v = lr gamma (y - f), f = E h z / gamma.
    state, found = np.eye(2), []
    for _ in range(STEPS):
        covariance = state @ state.T
        f = covariance[0, 1] / GAMMA
        found.append((f, covariance[0, 0], covariance[1, 1]))
        v = LR * GAMMA * (1 - f)
        state = np.array([[1, v], [v, 1]]) @ state
    t = np.arange(STEPS)
    ours = answer.predictions[:, 0], answer.features[0, t, 0, t, 0], answer.gradients[0, t, 0, t, 0]
    # The tolerance of the fixed point.
    np.testing.assert_allclose(np.transpose(ours), found, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("phi", [jnp.tanh, jax.nn.relu])
def test_one_hidden_layer_does_what_sampled_coordinates_do(phi):
    """At depth 1 the coordinates are independent: a second route simulates them forward in time, without a fixed point."""
    answer = solve(depth=1, phi=phi, samples=2000, replicas=2, key=jax.random.key(0))
    rng = np.random.default_rng(7)
    half, feature_map = 20_000, {jnp.tanh: np.tanh, jax.nn.relu: lambda h: np.maximum(h, 0)}[phi]
    slope = {jnp.tanh: lambda h: 1 - np.tanh(h) ** 2, jax.nn.relu: lambda h: (h > 0) * 1.0}[phi]
    w, r = rng.standard_normal((half, 5)), rng.standard_normal(half)
    w, r, values = np.vstack([w, w]), np.hstack([r, -r]), []
    for _ in range(STEPS):
        h = w @ X.T / 5**0.5
        value = feature_map(h)
        values.append(value)
        error = Y - r @ value / (GAMMA * len(r))
        step = LR * GAMMA * (slope(h) * r[:, None] * error) @ X / 5**0.5
        w, r = w + step, r + LR * GAMMA * value @ error
    kernels = np.array([v.T @ v / len(r) for v in values])[None]
    # 4,000 coordinates: about 2 % of noise.
    assert distance(kernels, answer) < 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gamma": -1.0}, "gamma = -1.0"),
        ({"depth": 0}, "at least 1 is needed"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"damping": 1.0}, r"in \[0, 1\)"),
        ({"steps": 0}, "steps = 0"),
        ({"samples": 3}, "samples are even"),
        ({"replicas": 1}, "two replicas"),
        ({"tolerance": 0.0}, "tolerance = 0"),
        ({"phi": jnp.tanh, "depth": 1}, r"key=jax\.random\.key"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        solve(**options)


def test_no_convergence_says_how_far_and_suggests_damping():
    with pytest.raises(RuntimeError, match=r"changed a kernel or the predictions by [\d.]+ of their size.*Raise damping"):
        solve(rounds=3)


def test_deep_nonlinear_networks_are_refused():
    with pytest.raises(NotImplementedError, match="responses between layers"):
        solve(phi=jnp.tanh, key=jax.random.key(0))
