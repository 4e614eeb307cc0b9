"""Critical points against the book's numbers, scipy's quadrature of the definitions, and networks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special

from paperjax.limits import criticality, phase_diagram
from paperjax.limits.criticality import Criticality

erf = jax.scipy.special.erf
gelu = functools.partial(jax.nn.gelu, approximate=False)


def bump(h):
    """A user's activation: even, smooth, grows like abs."""
    return h * erf(h)


def normal_mean(f, K):
    """By scipy's adaptive quadrature, to 1e-13."""
    s = math.sqrt(K)
    return sum(
        integrate.quad(lambda z: f(s * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), a, b, epsabs=1e-14, epsrel=1e-13, limit=200)[0]
        for a, b in ((-12, -2), (-2, 0), (0, 2), (2, 12))
    )


def density(h):
    return math.exp(-h * h / 2) / math.sqrt(2 * math.pi)


# Value, first and second derivative by hand.
HALF_STABLE = {
    "gelu": (
        gelu,
        lambda h: h * special.ndtr(h),
        lambda h: special.ndtr(h) + h * density(h),
        lambda h: (2 - h * h) * density(h),
    ),
    "swish": (
        jax.nn.silu,
        lambda h: h * special.expit(h),
        lambda h: special.expit(h) * (1 + h * special.expit(-h)),
        lambda h: special.expit(h) * special.expit(-h) * (2 + h * (special.expit(-h) - special.expit(h))),
    ),
    "x erf(x)": (
        bump,
        lambda h: h * math.erf(h),
        lambda h: math.erf(h) + 2 * h * math.exp(-h * h) / math.sqrt(math.pi),
        lambda h: 4 * (1 - h * h) * math.exp(-h * h) / math.sqrt(math.pi),
    ),
}
# Roberts, Yaida and Hanin, sections 5.3 and 5.4.
BOOK = {"gelu": ((3 + math.sqrt(17)) / 2, 1.98305826, 0.17292239), "swish": (14.32017362, 1.98800468, 0.55514317)}


@pytest.mark.parametrize("name", HALF_STABLE)
def test_half_stable_points_are_those_of_the_definition(name):
    phi, f, f1, f2 = HALF_STABLE[name]
    found = criticality(phi)
    assert found.universality == "half-stable"
    assert found.K is not None
    assert found.C_W is not None
    # chi_parallel = chi_perp = 1 says that E phi phi'' is 0, by an integral that the package does not use.
    K = optimize.brentq(lambda K: normal_mean(lambda h: f(h) * f2(h), K), found.K * 0.9, found.K * 1.1, xtol=1e-13)
    C_W = 1 / normal_mean(lambda h: f1(h) ** 2, K)
    C_b = K - C_W * normal_mean(lambda h: f(h) ** 2, K)
    np.testing.assert_allclose([found.K, found.C_W, found.C_b], [K, C_W, C_b], rtol=0, atol=1e-8)
    np.testing.assert_allclose([found.chi_parallel, found.chi_perp], 1, atol=1e-10)
    if name in BOOK:
        np.testing.assert_allclose([found.K, found.C_W, found.C_b], BOOK[name], rtol=0, atol=1e-8)  # eight decimals are printed


@pytest.mark.parametrize(
    ("phi", "C_W", "K", "kind", "a1"),
    [
        (jax.nn.relu, 2.0, None, "scale-invariant", None),
        (jnp.abs, 1.0, None, "scale-invariant", None),
        (jax.nn.identity, 1.0, None, "scale-invariant", None),
        (jax.nn.leaky_relu, 2 / (1 + 0.01**2), None, "scale-invariant", None),
        (jnp.tanh, 1.0, 0.0, "K* = 0", -2.0),
        (jnp.sin, 1.0, 0.0, "K* = 0", -1.0),
        (erf, math.pi / 4, 0.0, "K* = 0", -2.0),
        (jax.nn.hard_tanh, 1.0, 0.0, "K* = 0", 0.0),
        (lambda h: h - h**5 / 100, 1.0, 0.0, "K* = 0", 0.0),
    ],
)
def test_classes_of_the_book(phi, C_W, K, kind, a1):
    found = criticality(phi)
    assert found.universality == kind
    assert found.C_b == 0
    assert found.K == K
    assert found.a1 == (None if a1 is None else pytest.approx(a1, abs=1e-12))
    np.testing.assert_allclose([found.C_W, found.chi_parallel, found.chi_perp], [C_W, 1, 1], atol=1e-8)


@pytest.mark.parametrize("phi", [jax.nn.sigmoid, jax.nn.softplus, jnp.cos, jnp.square, jnp.ones_like])
def test_no_critical_point_is_said(phi):
    found = criticality(phi)
    assert found[:4] == (None, None, None, "none")
    assert "none" in str(found)


def test_networks_with_a_users_activation_keep_norm_and_distance():
    """The fixed point, chi_parallel and chi_perp of x erf(x), by wide networks of one layer and small changes of the input."""
    found = criticality(bump)
    assert found.K is not None
    assert found.C_W is not None
    n = 2048
    rng = np.random.default_rng(0)
    moments = []
    for _ in range(60):
        z = math.sqrt(found.K) * rng.standard_normal((n, 1))
        other = rng.standard_normal((n, 1)) * 1e-3  # apart in direction, at the same norm but for 1e-6
        h = np.concatenate([z, 1.001 * z, z + other - z * (z * other).mean() / (z * z).mean()], 1)
        # E over weights is exact: what is left is the mean over the neurons below.
        phi = np.asarray(special.erf(h) * h)
        K = found.C_b + found.C_W * (phi**2).mean(0)
        apart = found.C_W * ((phi[:, 2] - phi[:, 0]) ** 2).mean() / ((h[:, 2] - h[:, 0]) ** 2).mean()
        moments.append([K[0] / found.K, (K[1] - K[0]) / ((h[:, 1] ** 2 - h[:, 0] ** 2).mean()), apart])
    moments = np.array(moments)
    error = moments.std(0) / math.sqrt(len(moments))
    assert np.all(np.abs(moments.mean(0) - 1) < 4 * error + 2e-3)  # 2e-3: the changes are not infinitesimal
    assert np.all(error < 5e-3)


def test_phase_diagram_of_tanh():
    found = phase_diagram(jnp.tanh, np.array([0.0, 0.05]), np.array([0.9, 1.761]))
    # (0.05, 1.761) is on the edge of chaos, arXiv 1611.01232: chi_perp = 1; at C_b = 0 and C_W < 1, K = 0 and both are C_W.
    np.testing.assert_allclose(found.chi_perp[1, 1], 1, atol=1e-3)
    np.testing.assert_allclose([found.chi_perp[0, 0], found.chi_parallel[0, 0]], 0.9, atol=1e-3)
    assert found.chi_perp[0, 1] > 1 > found.chi_perp[1, 0]
    assert np.isnan(phase_diagram(jax.nn.relu, np.array([0.0]), np.array([2.5])).K).all()


def test_prints_as_a_table_and_draws():
    found = criticality(gelu)
    lines = str(found).splitlines()
    assert lines[0] == "activation    gelu(approximate=False)"
    assert "C_W           1.983058257" in lines
    assert isinstance(found, Criticality)


@pytest.mark.parametrize("phi", [jax.nn.relu, jnp.tanh, gelu, jnp.exp])
def test_the_phase_diagram_has_no_blanks_and_reads_in_grey(phi):
    found = criticality(phi)
    figure = found.plot()
    assert len(figure.axes) == 4  # two maps and their colour bars
    figure.canvas.draw()
    maps = figure.axes[:2]
    # 1 is on chi_perp's map at least: tanh has it at C_b > 0 where C_W > 1; relu, gelu, exp at the edge of where K grows.
    assert {"0.5", "1"} <= {text.get_text() for ax in maps for text in ax.texts} or phi is jnp.exp
    for ax in maps:
        image = ax.collections[0]
        # Luma, as a grey print has it.
        assert np.all(np.diff(image.cmap(np.linspace(0, 1, 20))[:, :3] @ [0.299, 0.587, 0.114]) > 0)
        if phi is not jnp.exp:  # Its chi at K = 1,000 is exp(2,000) and more.
            assert not np.ma.getmaskarray(image.get_array()).any()
            assert found.C_W < ax.get_ylim()[1] < (2.1 if phi is jnp.tanh else 1.4) * found.C_W


@pytest.mark.parametrize(
    ("phi", "error", "says"),
    [
        (lambda h: jnp.exp(h * h), ValueError, "no finite second moment"),
        (lambda h: 1 / h, ValueError, "no finite second moment"),
        (jnp.log, ValueError, "no finite second moment"),
        (jnp.sign, ValueError, r"jumps at \[0.0\]"),
        (jax.nn.elu, ValueError, "not smooth at 0"),
        (jax.nn.relu6, ValueError, "not smooth at 0"),
        (jnp.zeros_like, ValueError, "0 everywhere"),
        (jax.nn.softmax, ValueError, "entry by entry"),
        ("relu", Exception, "relu"),
    ],
)
def test_refuses(phi, error, says):
    with pytest.raises(error, match=says):
        criticality(phi)


def test_phase_diagram_refuses_a_negative_variance():
    with pytest.raises(ValueError, match="C_W has the value -1"):
        phase_diagram(jnp.tanh, np.array([0.0]), np.array([-1.0]))
