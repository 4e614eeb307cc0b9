"""The closed recursion of the quadratic network against descent of its neurons by NumPy, and against its limits."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from paperjax.limits import Statistics, high_dim_gd, population_limit, quadratic_test_loss
from tests.zoo import as_users_run_it

D, P, N = 5, 12, 7


def network(w_NxD, x_PxD, alpha, eps):
    h = x_PxD @ w_NxD.T
    return alpha * (h + eps / 2 * h**2).mean(axis=1)


def descended(w_NxD, x_PxD, beta, alpha, eps, lr, steps, centred=True):
    """Train losses and the last weights, of neurons one by one."""
    y, width = (x_PxD @ beta) ** 2 / 2, len(w_NxD)
    origin, losses = (network(w_NxD, x_PxD, alpha, eps) if centred else 0), []
    for step in range(steps + 1):
        r = network(w_NxD, x_PxD, alpha, eps) - origin - y
        losses.append(np.mean(r**2))
        if step < steps:
            slope_PxN = (1 + eps * x_PxD @ w_NxD.T) * alpha / width
            w_NxD = w_NxD - lr * width / alpha**2 * 2 * (slope_PxN * r[:, None]).T @ x_PxD / len(x_PxD)
    return np.array(losses), w_NxD


def statistics(w_NxD):
    return Statistics(w_NxD.mean(axis=0), w_NxD.T @ w_NxD / len(w_NxD))


@hypothesis.given(seed=st.integers(0, 2**31), alpha=st.floats(0.3, 20.0), eps=st.floats(0.2, 2.0), centred=st.booleans())
def test_is_what_the_neurons_do(seed, alpha, eps, centred):
    """To rounding, at any width, on any points and with any β."""
    rng = np.random.default_rng(seed)
    w, x, beta = rng.standard_normal((N, D)), rng.standard_normal((P, D)) / D**0.5, rng.standard_normal(D)
    lr = 0.05 / (1 + eps) ** 2 * min(alpha, 1.0)
    losses, last = descended(w, x, beta, alpha, eps, lr, 30, centred)
    run = high_dim_gd(beta, alpha=alpha, eps=eps, learning_rate=lr, steps=30, x=x, start=statistics(w), centred=centred)
    np.testing.assert_allclose(run.train_loss, losses, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(run.last.mean, statistics(last).mean, atol=1e-10)
    np.testing.assert_allclose(run.last.second, statistics(last).second, atol=1e-10)
    np.testing.assert_allclose(run.time, lr * np.arange(31))


def test_test_loss_is_that_of_points():
    """Of 200,000 points and their negatives, to four of their standard errors."""
    rng = np.random.default_rng(0)
    w, beta, alpha, eps = rng.standard_normal((N, D)), rng.standard_normal(D), 1.3, 0.7
    run = high_dim_gd(beta, alpha=alpha, eps=eps, learning_rate=0.05, steps=20, x=rng.standard_normal((P, D)) / D**0.5, start=statistics(w))
    half = rng.standard_normal((200_000, D)) / D**0.5
    f = [
        alpha * fresh @ (run.last.mean - w.mean(axis=0))
        + alpha * eps / 2 * np.sum(fresh @ (run.last.second - statistics(w).second) * fresh, axis=1)
        - (fresh @ beta) ** 2 / 2
        for fresh in (half, -half)
    ]
    pairs = np.mean(np.square(f), axis=0)
    assert abs(pairs.mean() - run.test_loss[-1]) < 4 * pairs.std() / len(pairs) ** 0.5


def test_the_population_is_many_points():
    """The gradient of 100,000 points, off by (D² / points)^1/2 = 0.02 or so of its size."""
    rng = np.random.default_rng(1)
    x, beta = rng.standard_normal((100_000, D)) / D**0.5, np.ones(D)
    start = statistics(rng.standard_normal((N, D)))
    settings = dict(alpha=1.0, eps=1.0, learning_rate=0.3, steps=25, start=start)
    ours, theirs = high_dim_gd(beta, **settings), high_dim_gd(beta, x=x, **settings)
    np.testing.assert_allclose(ours.test_loss, theirs.test_loss, atol=0.02)
    assert ours.test_loss[-1] < 0.7 * ours.test_loss[0]
    np.testing.assert_array_equal(ours.train_loss, ours.test_loss)


def test_wide_networks_tend_to_infinite_width():
    """As N^-1/2: the largest difference of the losses, over widths a factor 4 apart."""
    rng = np.random.default_rng(2)
    x, beta = rng.standard_normal((40, D)) / D**0.5, np.ones(D)
    settings = dict(alpha=0.5, eps=1.0, learning_rate=0.2, steps=60, x=x)
    limit, widths = high_dim_gd(beta, **settings), np.array([50, 200, 800, 3200])
    off = [
        np.mean([
            np.abs(high_dim_gd(beta, **settings, start=statistics(rng.standard_normal((n, D)))).test_loss - limit.test_loss).max()
            for _ in range(24)
        ])
        for n in widths.tolist()
    ]  # fmt: skip
    assert np.polyfit(np.log(widths), np.log(off), 1)[0] == pytest.approx(-0.5, abs=0.12)


@pytest.mark.parametrize(("laziness", "end"), [(0.3, 0.25), (5.0, 0.4)])
def test_high_dimension(laziness, end):
    """Descent on the population is the logistic law up to 1/D, of which a step is, once the trace, by exp(-2 t / D), is gone."""
    off = []
    for d in (40, 80):
        rate = 0.1 * d
        run = high_dim_gd(np.ones(d), alpha=laziness * d, eps=1.0, learning_rate=rate, steps=round(end * d**2 / rate))
        tau = run.time / d**2
        limit = population_limit(tau, alpha=laziness, eps=1.0)
        off.append(np.abs(run.test_loss - limit.loss)[tau > 5 / 40].max())
        np.testing.assert_array_equal(run.last.mean, 0)
    assert off[1] < 0.1 * limit.loss[tau > 5 / 40].max()
    assert 0.4 < off[1] / off[0] < 0.6


@hypothesis.given(alpha=st.floats(0.01, 50.0), eps=st.floats(0.1, 3.0))
def test_the_logistic_law_solves_its_equation(alpha, eps):
    tau = np.linspace(0, 2 * alpha / eps / (1 + alpha * eps), 2001)
    found = population_limit(tau, alpha=alpha, eps=eps)
    k = alpha * eps
    right = 4 * eps / alpha * (1 - k * found.overlap) * (1 + found.overlap)
    # Of second order in the step of 1/1000.
    np.testing.assert_allclose(np.gradient(found.overlap, tau)[1:-1], right[1:-1], rtol=1e-3, atol=1e-4 * np.abs(right).max())
    np.testing.assert_allclose(found.loss, (1 - k * found.overlap) ** 2 / 2, atol=1e-9)


def test_lazy_and_rich_ends():
    tau = np.linspace(0, 1, 5)
    np.testing.assert_allclose(population_limit(tau, alpha=1e6, eps=0.7).loss, np.exp(-8 * 0.7**2 * tau) / 2, rtol=1e-4)
    k = 1e-6
    half = population_limit(np.array([0.9, 1.1]) * np.log(1 / k) * k / 4, alpha=k, eps=1.0)
    assert half.loss[0] > 0.3 > 0.1 > half.loss[1]


def test_at_the_target_nothing_moves():
    """``w̄ = w̄_0``, ``M - M_0 = β βᵀ / (αε)`` has loss 0."""
    beta = np.array([1.0, -2.0, 0.5])
    assert float(quadratic_test_loss(np.zeros(3), np.outer(beta, beta) / 1.5, beta, alpha=3.0, eps=0.5)) == pytest.approx(0, abs=1e-12)


GOOD = dict(beta=np.ones(3), alpha=1.0, eps=1.0, learning_rate=0.1, steps=3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(alpha=0.0), ValueError, "alpha = 0"),
        (dict(alpha=-1.0), ValueError, "alpha = -1"),
        (dict(eps=0.0), ValueError, "eps = 0"),
        (dict(learning_rate=np.nan), ValueError, "learning_rate = nan"),
        (dict(steps=-1), ValueError, "steps = -1"),
        (dict(beta=np.zeros(0)), ValueError, "beta is empty"),
        (dict(beta=np.zeros(3)), ValueError, "beta is empty, 0"),
        (dict(x=np.zeros((0, 3))), ValueError, r"x has shape \(0, 3\)"),
        (dict(x=np.ones(3)), ValueError, r"x has shape \(3,\)"),
        (dict(x=np.ones((2, 3)) + 1j), ValueError, "x is complex"),
        (dict(beta=np.ones((3, 1))), ValueError, r"beta has shape \(3, 1\)"),
        (dict(start=Statistics(np.ones(3), np.zeros((3, 3)))), ValueError, "an eigenvalue below 0"),
        (dict(start=Statistics(np.ones(2), np.eye(2))), ValueError, "start has shapes"),
        (dict(learning_rate=1e3, steps=200), FloatingPointError, "diverges"),
    ],
)
def test_refuses(change, error, says):
    given = GOOD | change
    with as_users_run_it(), pytest.raises(error, match=says):
        high_dim_gd(given.pop("beta"), **given)


def test_limit_refuses():
    with pytest.raises(ValueError, match="alpha = 0"):
        population_limit(np.zeros(1), alpha=0.0, eps=1.0)
    with pytest.raises(ValueError, match="a time is negative"):
        population_limit(np.array([-1.0]), alpha=1.0, eps=1.0)
