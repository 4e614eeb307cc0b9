"""The posterior against Gaussian-process regression, SupNTK against its rules in plain Python, and the spectrum on the circle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.papers.infinite_width import neural_contextual_bandits_ntk_ucb as paper


def ntk(u):
    """Of two hidden layers of ReLU, over its diagonal, from the arc-cosine kernels (Cho and Saul, 2009)."""
    theta, covariance = u, u
    for _ in range(2):
        angle = np.arccos(np.clip(covariance, -1, 1))
        theta = theta * (1 - angle / np.pi)
        covariance = (np.sin(angle) + covariance * (np.pi - angle)) / np.pi
        theta = theta + covariance
    return theta / 3


def test_eigenvalues_on_the_circle():
    """Equidistant points of a circle: a Fourier transform, which folds the degrees n, 2n, ... onto the first."""
    n = 4096
    values, times = paper.modes(2)
    fourier = np.fft.fft(ntk(np.cos(2 * np.pi * np.arange(n) / n))).real / n
    np.testing.assert_allclose(values[:100], fourier[:100], rtol=2e-3)
    assert (times[1:-1] == 2).all()


@pytest.mark.parametrize("d", [2, 3, 4, 6])
def test_eigenvalues_decay_as_k_to_the_minus_d(d):
    """And those of the NNGP kernel, two powers faster; k + (d - 2)/2 leaves a next order of k^-2."""
    k = np.arange(16, 65)
    for which, power in (("ntk", d), ("nngp", d + 2)):
        if d == 6 and which == "nngp":
            continue  # k^-8 is lost in the rounding before k = 64.
        values = paper.modes(d, which)[0][16:65]
        for parity in (0, 1):
            slope = np.polyfit(np.log(k + (d - 2) / 2)[parity::2], np.log(values[parity::2]), 1)[0]
            assert slope == pytest.approx(-power, abs=0.1)


def test_multiplicities_on_the_sphere():
    """2k + 1 for d = 3, (k + 1)^2 for d = 4; times the eigenvalues they add up to the kernel's diagonal."""
    k = np.arange(50)
    np.testing.assert_allclose(paper.modes(3)[1][:50], 2 * k + 1)
    np.testing.assert_allclose(paper.modes(4)[1][:50], (k + 1) ** 2)
    for d in paper.DIMS:
        values, times = paper.modes(d)
        assert values @ times == pytest.approx(1)
        assert 0 < values[-1] * times[-1] < 0.01


@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0])
def test_bound_holds_for_any_points(spread):
    """Also where they are all the same, or close together."""
    rng = np.random.default_rng(0)
    x = np.array([1.0, 0, 0]) + spread * rng.normal(size=(80, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    gain = np.linalg.slogdet(np.eye(80) + ntk(x @ x.T) / paper.NOISE)[1] / 2
    assert gain < paper.gain_formula(80, 3)
    assert paper.mean_gain(80, 3) < paper.gain_formula(80, 3)


def test_minimum_is_where_the_equivalent_is_self_consistent():
    """``s = r - r/T sum N mu / (mu + r/T)`` at the r of the minimum."""
    values, times = paper.modes(3)
    r = np.geomspace(paper.NOISE, 1.1, 20001)
    best = r[np.argmin([paper.gain_formula(300, 3, one) for one in r])]
    assert best - best / 300 * (times @ (values / (values + best / 300))) == pytest.approx(paper.NOISE, rel=1e-3)


def test_posterior_is_that_of_gaussian_process_regression():
    """Two sets that do not see each other's observations, a point that is seen twice, and a round without observation."""
    k = paper.kernel(paper.sphere(jax.random.key(0), 9, 3))
    nothing = jnp.zeros((2, 9))
    now = paper.Posterior(nothing, jnp.stack([jnp.diagonal(k)] * 2), jnp.zeros((7, 9)), jnp.full(7, -1))
    seen = [(0, 1.0, 0), (3, -1.0, 1), (0, 0.5, 0), (5, 9.0, 2), (7, 2.0, 1), (3, 0.1, 0), (8, 0.7, 1)]
    for t, (at, y, member) in enumerate(seen):
        now = paper.observe(k, now, t, at, y, member)
    for s in (0, 1):
        at, y = np.array([i for i, _, m in seen if m == s]), jnp.array([y for _, y, m in seen if m == s])
        answer = pj.predict.posterior(k[at][:, at], y, k[:, at], k, noise=paper.NOISE)
        np.testing.assert_allclose(now.mean[s], answer.mean, atol=1e-5)
        np.testing.assert_allclose(now.variance[s], np.diagonal(answer.covariance), atol=1e-5)


def by_the_rules(mean, std):
    """SupNTK's choice as it is written: stage after stage, over the arms that are left."""
    sets = len(mean)
    left = list(range(mean.shape[1]))
    for s in range(1, sets + 1):
        width, upper = std[s - 1], mean[s - 1] + std[s - 1]
        if all(width[a] <= 2.0**-sets for a in left):
            return max(left, key=lambda a: upper[a]), sets
        if any(width[a] > 2.0**-s for a in left):
            return max(left, key=lambda a: width[a]), s - 1
        best = max(upper[a] for a in left)
        left = [a for a in left if upper[a] >= best - 2.0 ** (1 - s)]
    raise AssertionError("the last stage exploits or explores")


def test_sup_follows_its_rules():
    rng = np.random.default_rng(1)
    choose, found = jax.jit(lambda mean, std: paper.sup(mean, std, 1.0)), set()
    for _ in range(200):
        mean = rng.normal(size=(4, 6)).astype(np.float32)
        std = (2.0 ** -rng.uniform(0, 5, size=(4, 1)) * rng.uniform(0.3, 1, size=(4, 6))).astype(np.float32)
        at, member = choose(mean, std)
        assert (int(at), int(member)) == by_the_rules(mean, std)
        found.add(int(member))
    assert len(found) >= 4


def test_gain_of_the_rounds_is_the_log_determinant():
    k = paper.kernel(paper.sphere(jax.random.key(2), 20, 3))
    arms = jnp.arange(12)[:, None]
    _, each = paper.play(k, jnp.zeros(20), arms, jnp.zeros(12), paper.ucb, 1.0)
    _, logdet = np.linalg.slogdet(np.eye(12) + np.asarray(k)[:12, :12] / paper.NOISE)
    assert float(each.sum()) == pytest.approx(logdet / 2, rel=1e-5)
