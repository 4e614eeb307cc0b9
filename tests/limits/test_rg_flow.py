"""The flow of a finite network against its closed forms and against networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits import criticality, exact_fluctuations, mlp_kernels, optimal_ratio, rg_flow

relu, identity = jax.nn.relu, jax.nn.identity


def haar(rng, n):
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


@pytest.mark.parametrize(("phi", "C_W", "growth"), [(relu, 2.0, 5.0), (identity, 1.0, 2.0), (jnp.abs, 1.0, 2.0)])
def test_scale_invariant_vertex_is_linear_in_depth_and_that_of_infinite_width(phi, C_W, growth):
    flow = rg_flow(phi, 6, C_W=C_W)
    np.testing.assert_allclose(flow.vertex, growth * np.arange(6), atol=1e-9)
    np.testing.assert_allclose(flow.vertex, exact_fluctuations(phi, 6, 10**7).vertex, atol=1e-4)  # 1/n
    np.testing.assert_allclose(flow.norm_variance, exact_fluctuations(phi, 6, 10**7).norm_variance, atol=1e-4)


@pytest.mark.parametrize(("phi", "C_W", "growth"), [(relu, 2.0, 3.0), (identity, 1.0, 0.0)])
def test_orthogonal_norms_fluctuate_less(phi, C_W, growth):
    flow = rg_flow(phi, 6, C_W=C_W, weights="orthogonal")
    np.testing.assert_allclose(flow.norm_variance, growth * np.arange(6), atol=1e-9)
    exact = exact_fluctuations(phi, 6, 10**7, "orthogonal")
    np.testing.assert_allclose(flow.norm_variance, exact.norm_variance, atol=1e-4)  # 1/n
    np.testing.assert_allclose(flow.vertex, exact.vertex, atol=1e-4)


def test_the_ntk_of_a_deep_linear_orthogonal_network_does_not_fluctuate():
    """Exactly: W_l^T W_l = 1, so that of layer l is |x|² times the identity."""
    flow = rg_flow(identity, 20, C_W=1.0, weights="orthogonal")
    for fluctuation in (flow.D, flow.F, flow.A, flow.B):
        np.testing.assert_allclose(fluctuation, 0, atol=1e-9)
    np.testing.assert_allclose(flow.theta, np.arange(1, 21))


@pytest.mark.parametrize(("phi", "a1"), [(jnp.tanh, -2.0), (jnp.sin, -1.0)])
def test_at_criticality_with_zero_fixed_point(phi, a1):
    """K falls as 1 / (-a1 l), and V / K² grows by 2/3 a layer (arXiv 2106.10165, section 5.4)."""
    flow = rg_flow(phi, 300, C_W=1.0)
    assert 1 / flow.K[-1] - 1 / flow.K[-51] == pytest.approx(-50 * a1, rel=0.02)  # 1/l
    assert np.diff(flow.vertex)[-1] == pytest.approx(2 / 3, abs=0.01)  # 1/l


def test_orthogonal_over_gaussian_at_depth_20():
    """tanh at criticality: the variance of |z|² is over a hundred times smaller with orthogonal weights."""
    gaussian, orthogonal = (rg_flow(jnp.tanh, 20, C_W=1.0, weights=weights).norm_variance[-1] for weights in ("gaussian", "orthogonal"))
    assert gaussian > 100 * orthogonal > 0


def test_mean_of_the_ntk_is_that_of_the_recursion():
    with jax.enable_x64(True):
        flow = rg_flow(jnp.tanh, 4, C_W=1.3, C_b=0.1, K=1.4)
        # mlp_kernels has weights of variance 1, and an NTK of all parameters.
        kernels = mlp_kernels(jnp.ones((1, 1)), 3, jnp.tanh, weight_variance=1.3, bias_variance=0.1)
    np.testing.assert_allclose(flow.K[-1], kernels.nngp[0, 0], rtol=1e-8)
    np.testing.assert_allclose(flow.theta[-1], kernels.ntk[0, 0], rtol=1e-8)


def kurtosis(phi, C_W, depth, width, nets, seed):
    """Excess over 3 of pre-activations by layer, and its standard error; z_1 given the layer below is normal: 3 E v² / (E v)² - 3."""
    rng = np.random.default_rng(seed)
    h = np.ones((nets, width))
    v = np.empty((depth, nets))
    for layer in range(depth):
        v[layer] = C_W * (h**2).mean(1)
        if layer < depth - 1:
            # Rotations of the layer's vector change nothing: a normal vector of its norm is what W h is.
            h = np.asarray(phi(np.sqrt(v[layer])[:, None] * rng.standard_normal((nets, width))))
    first, second = v.mean(1), (v**2).mean(1)
    ratio = second / first**2 - 1
    influence = (v**2 / second[:, None] - 2 * v / first[:, None]) * (ratio + 1)[:, None]
    return width * ratio, width * influence.std(1) / math.sqrt(nets)


@pytest.mark.parametrize(("phi", "C_W", "by_numpy"), [(relu, 2.0, lambda z: np.maximum(z, 0)), (identity, 1.0, lambda z: z)])
def test_excess_kurtosis_of_20000_networks_is_the_exact_one(phi, C_W, by_numpy):
    width, depth = 40, 7  # six hidden layers: L/n = 0.15
    found, error = kurtosis(by_numpy, C_W, depth, width, 20_000, 0)
    exact = exact_fluctuations(phi, depth, width).vertex
    assert np.all(np.abs(found[1:] / exact[1:] - 1) < 0.05)
    assert np.all(np.abs(found - exact) < 4 * error + 1e-9)
    # Leading order is off by more than the tolerance, so that the test tells them apart.
    assert rg_flow(phi, depth, C_W=C_W).vertex[-1] < 0.95 * exact[-1]


def test_slope_of_tanh_over_20000_networks():
    depth, width = 26, 160
    found, error = kurtosis(np.tanh, 1.0, depth, width, 20_000, 1)
    flow = rg_flow(jnp.tanh, depth, C_W=1.0)
    slope = np.polyfit(np.arange(10, depth), found[10:], 1)[0]
    assert abs(slope - 2 / 3) < 0.05
    assert np.all(np.abs(found - flow.vertex) <= 4 * error + 0.16 * flow.vertex)  # the next order is about L/n = 0.16 of it


CASES = {"tanh": (jnp.tanh, np.tanh, lambda h: 1 - h**2, 1.3, 0.1), "relu": (relu, lambda z: np.maximum(z, 0), np.sign, 2.0, 0.0)}


def finite_network(case, weights, n, nets):
    """Pre-activations and NTKs of all neurons in the third layer, by hand in numpy; K = 1 in the first."""
    _, phi, slope_at, C_W, C_b = CASES[case]
    rng = np.random.default_rng(0)
    z, H = np.empty((nets, n)), np.empty((nets, n, n))
    for net in range(nets):
        h, back = np.full(n, math.sqrt((1 - C_b) / C_W)), np.zeros((n, n))
        for _ in range(3):
            W = math.sqrt(C_W) * (haar(rng, n) if weights == "orthogonal" else rng.standard_normal((n, n)) / math.sqrt(n))
            H[net] = (C_b + C_W * (h @ h) / n) * np.eye(n) + W @ back @ W.T
            z[net] = W @ h + math.sqrt(C_b) * rng.standard_normal(n)
            h = phi(z[net])
            slope = slope_at(h)
            back = slope[:, None] * H[net] * slope
    return z, H


@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("case", CASES)
def test_vertex_and_ntk_fluctuations_of_networks(case, weights):
    n, nets = 64, 1500
    z, H = finite_network(case, weights, n, nets)
    phi, _, _, C_W, C_b = CASES[case]
    flow = rg_flow(phi, 3, C_W=C_W, C_b=C_b, weights=weights)
    off = ~np.eye(n, dtype=bool)
    pairs = n * (n - 1)
    z2, diagonal = z**2, np.einsum("bii->bi", H)
    K, theta = z2.mean(), diagonal.mean()
    per_net = {
        "V": n * ((z2.sum(1) ** 2 - (z2**2).sum(1)) / pairs - 2 * K * (z2.mean(1) - K) - K**2),
        "D": n * ((diagonal.sum(1) * z2.sum(1) - (diagonal * z2).sum(1)) / pairs - theta * z2.mean(1) - K * diagonal.mean(1) + theta * K),
        "F": n * np.einsum("bij,bi,bj->b", H * off, z, z, optimize=True) / pairs,
        "A": n * ((diagonal.sum(1) ** 2 - (diagonal**2).sum(1)) / pairs - 2 * theta * (diagonal.mean(1) - theta) - theta**2),
        "B": n * (H**2 * off).sum((1, 2)) / pairs,
    }
    assert theta == pytest.approx(flow.theta[-1], rel=0.03)  # chance, and 1/n
    # The next order in 1/n of one is made of all of its kind: A's has B in it.
    kin = {"V": (flow.V, 2 * flow.K**2), "D": (flow.D, flow.F), "F": (flow.D, flow.F), "A": (flow.A, 2 * flow.B), "B": (flow.A, flow.B)}
    for name, values in per_net.items():
        expected, error = getattr(flow, name)[-1], values.std() / math.sqrt(nets)
        size = max(abs(other[-1]) for other in kin[name])
        assert abs(values.mean() - expected) < 4 * error + 3 * size / n, (name, values.mean(), expected, error)


def test_optimal_ratio_is_where_mutual_information_peaks():
    """Of two outputs whose common variance is log-normal, by quadrature: ``x² (1 - c x) / 8``, which is largest at ``x = 2 / (3 c)``."""
    t, w = np.polynomial.hermite_e.hermegauss(61)
    w = w / w.sum()
    z = np.linspace(-12, 12, 801)
    step = z[1] - z[0]

    def shrink(x):
        s = np.exp(math.sqrt(math.log1p(x)) * t - math.log1p(x) / 2)
        f = np.exp(-(z[:, None] ** 2) / (2 * s)) / np.sqrt(2 * np.pi * s)
        joint, alone = (f * w) @ f.T, f @ w
        positive = joint > 1e-300
        information = (joint * np.log(np.where(positive, joint / np.outer(alone, alone), 1.0))).sum() * step**2
        return (1 - 8 * information / x**2) / x

    c = 2 * shrink(0.002) - shrink(0.004)  # to second order in x
    assert optimal_ratio(1.0, 2) == pytest.approx(2 / (3 * c), rel=0.005)
    assert optimal_ratio(5.0, 2) == pytest.approx(optimal_ratio(1.0, 2) / 5)


def test_a_half_stable_point_keeps_the_kernel():
    found = criticality(jax.nn.silu)
    assert found.K is not None
    assert found.C_W is not None
    assert found.C_b is not None
    flow = rg_flow(jax.nn.silu, 10, C_W=found.C_W, C_b=found.C_b, K=found.K)
    np.testing.assert_allclose(flow.K, found.K, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(depth=0), ValueError, "depth = 0"),
        (dict(C_W=-1.0), ValueError, "C_W = -1"),
        (dict(C_W=0.0), ValueError, "cuts the network"),
        (dict(C_b=math.nan), ValueError, "C_b = nan"),
        (dict(K=0.0), ValueError, "an input that is not 0"),
        (dict(learning_rates=(0.0, -1.0)), ValueError, r"learning_rates\[1\] = -1"),
        (dict(learning_rates=(0.0, 0.0)), ValueError, "train nothing"),
        (dict(phi=lambda h: jnp.exp(h * h)), ValueError, "no finite second moment"),
        (dict(phi=jnp.sign), ValueError, "jumps"),
        (dict(phi=jnp.square, depth=30), ValueError, "Does the kernel explode"),
    ],
)
def test_refuses(change, error, says):
    given = dict(phi=jnp.tanh, depth=3, C_W=1.0) | change
    with pytest.raises(error, match=says):
        rg_flow(given.pop("phi"), given.pop("depth"), **given)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: exact_fluctuations(jnp.tanh, 3, 10), "not linear on either side"),
        (lambda: exact_fluctuations(relu, 0, 10), "depth = 0"),
        (lambda: exact_fluctuations(relu, 3, 0), "width = 0"),
        (lambda: optimal_ratio(0.0), "growth = 0"),
        (lambda: optimal_ratio(1.0, 0), "outputs = 0"),
    ],
)
def test_other_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
