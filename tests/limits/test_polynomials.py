"""Polynomials of several fields: against expectations by hand, Gauss-Hermite sums, recursions written out, and networks of finite width."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits.joint import isserlis
from paperjax.limits.polynomials import MOST_TERMS, TooManyTermsError, expected, mean, polynomial
from tests.limits.ntk_networks import SENTENCES, VECTORS, B, W, dense, flat, plain

limit = functools.partial(pj.limit, progress=False)
rng = np.random.default_rng(0)
A, SHORT = rng.normal(size=(6, 6)) / 2, rng.normal(size=(6, 2)) / 2
COVARIANCES = {"full": A @ A.T, "of rank 2": SHORT @ SHORT.T, "of one example": np.tile(A[:3] @ A[:3].T, (2, 2)), "zero": np.zeros((6, 6))}


def gauss_hermite(f, cov, points):
    """``E f(z)``, exact for polynomials of degree below ``2 points`` in each of the axes of ``z = root x``."""
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0))
    x, w = np.polynomial.hermite_e.hermegauss(points)
    grid = np.stack(np.meshgrid(*[x] * len(cov), indexing="ij")).reshape(len(cov), -1)
    weights = functools.reduce(np.multiply.outer, [w / math.sqrt(2 * np.pi)] * len(cov)).reshape(-1)
    return f(*(root @ grid)) @ weights


# Which polynomial a function is.


def by_hand(u):
    return u**2


by_hand = jax.custom_jvp(by_hand)
by_hand.defjvp(lambda primals, tangents: (primals[0] ** 2, tangents[0]))

READ = {
    "a product": (lambda u, v: u * v, {(1, 1): 1.0}),
    "a difference of powers": (lambda u, v: jnp.square(u) - v**3.0, {(2, 0): 1.0, (0, 3): -1.0}),
    "a power of a sum": (lambda u, v: (u + 2 * v) ** 3, {(3, 0): 1.0, (2, 1): 6.0, (1, 2): 12.0, (0, 3): 8.0}),
    "a quotient by a number": (lambda u, v: -u / (2 * jnp.sqrt(4.0)) + 1 + 0 * v, {(1, 0): -0.25, (0, 0): 1.0}),
    "under jit and checkpoint": (jax.jit(jax.checkpoint(lambda u, v: u * jnp.broadcast_to(v, u.shape))), {(1, 1): 1.0}),
    "in single precision": (lambda u, v: (u.astype(jnp.float32) * v.astype(jnp.float32)).astype(jnp.float64), {(1, 1): 1.0}),
    "a slope": (lambda u, v: jax.jvp(lambda w: w**3 * v, (u,), (jnp.ones_like(u),))[1], {(2, 1): 3.0}),
    "nothing": (lambda u, v: u * v - v * u, {}),
    "a number": (lambda u, v: jnp.full(u.shape, 3.0), {(0, 0): 3.0}),
}
OTHER = {
    "tanh": lambda u, v: jnp.tanh(u) * v,
    "a negative power": lambda u, v: v * u**-1,
    "a root": lambda u, v: v * u**0.5,
    "a quotient": lambda u, v: u / v,
    "a choice": lambda u, v: jnp.where(u > 0, v, v),
    "an absolute value": lambda u, v: jnp.abs(u * v) ** 2,
    "a derivative by hand": lambda u, v: by_hand(u) * v,
    "half precision": lambda u, v: u.astype(jnp.bfloat16).astype(u.dtype) * v,
    "a whole number": lambda u, v: u.astype(int).astype(u.dtype) * v,
    "numbers that differ": lambda u, v: u * v * jnp.arange(u.shape[0]),
    "a sum over entries": lambda u, v: jnp.broadcast_to(jnp.sum(u), u.shape) * v,
    "an infinite number": lambda u, v: u * v * jnp.inf,
}


@pytest.mark.parametrize("name", READ)
def test_polynomials_are_read(name):
    fn, terms = READ[name]
    assert polynomial(fn, 2).terms == terms


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_known_to_be_a_polynomial_is_none(name):
    assert polynomial(OTHER[name], 2) is None


# What it is expected to be.

PAIRS = {
    "products of three": (lambda a, b, c: a * b * c, lambda a, b, c: a * b * c),
    "one squared": (lambda a, b, c: a**2 * b, lambda a, b, c: 1 + b - c**3),
    "skips": (lambda a, b, c: a * (a + b) * (a + c), lambda a, b, c: a * (a + b) * (a + c)),
    "even and odd": (lambda a, b, c: (a * b + c) ** 2, lambda a, b, c: a * b**2 - 2 * c),
}


def entries(cov):
    return [[cov[i, j] for j in range(cov.shape[1])] for i in range(cov.shape[0])]


def blocks(cov):
    cov = jnp.asarray(cov)
    return entries(cov[:3, :3]), entries(cov[:3, 3:]), entries(cov[3:, 3:])


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("name", PAIRS)
def test_sums_over_pairings_are_gauss_hermite_sums(name, kind, x64):
    g, h = PAIRS[name]
    cov = COVARIANCES[kind]
    u, v = (polynomial(f, 3) for f in (g, h))
    left, across, right = blocks(cov)
    wanted = gauss_hermite(lambda *z: g(*z[:3]) * h(*z[3:]), cov, 5)
    np.testing.assert_allclose(expected(u, v, left, across, right), wanted, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mean(u, left) or 0.0, gauss_hermite(g, cov[:3, :3], 5), rtol=1e-11, atol=1e-12)
    # Price: the derivative in a covariance between the two is the expectation of derivatives.
    gradient = jax.grad(lambda c: expected(u, v, left, entries(c), right))(jnp.asarray(cov[:3, 3:]))
    for i, j in itertools.product(range(3), repeat=2):
        slopes = [lambda *z, f=f, i=i: jax.jvp(lambda a: f(*z[:i], a, *z[i + 1 :]), (z[i],), (jnp.ones_like(z[i]),))[1]
                  for f, i in ((g, i), (h, j))]  # fmt: skip
        moved = gauss_hermite(lambda *z, s=slopes: np.asarray(s[0](*z[:3]) * s[1](*z[3:])), cov, 5)
        np.testing.assert_allclose(gradient[i, j], moved, rtol=1e-11, atol=1e-12)


def test_monomials_are_those_of_isserlis(x64):
    for rows in ([0, 0, 1, 2], [0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 2, 2]):
        powers = [rows.count(i) for i in range(3)]
        found = mean(polynomial(lambda a, b, c, p=powers: a ** p[0] * b ** p[1] * c ** p[2], 3), blocks(COVARIANCES["full"])[0])
        np.testing.assert_allclose(found, isserlis((A[:3] @ A[:3].T)[np.ix_(rows, rows)]), rtol=1e-12)


def test_what_is_zero_whatever_the_data_is_none():
    one, odd = polynomial(lambda a, b: a * b, 2), polynomial(lambda a, b: a * b**2, 2)
    independent = [[1.0, None], [None, 1.0]]
    assert expected(one, odd, independent, [[0.5, None], [None, 0.5]], independent) is None
    assert expected(one, one, independent, [[0.5, None], [None, None]], independent) is None
    assert expected(one, polynomial(lambda a, b: 0 * a * b, 2), independent, independent, independent) is None
    assert mean(one, independent) is None


@pytest.mark.parametrize(
    "fn",
    [
        lambda *z: functools.reduce(jnp.multiply, z) ** 2,
        lambda *z: sum(z) ** 30,
        lambda *z: (1 + sum(z)) ** 8,
    ],
    ids=["pairings", "degree", "monomials"],
)
def test_long_sums_are_refused(fn):
    cov = [[1.0] * 6] * 6
    g = polynomial(fn, 6)
    with pytest.raises(TooManyTermsError):
        expected(g, g, cov, cov, cov)


# Networks.


def layer(x, y):
    return W**2 * x @ y.T / x.shape[-1] + B**2


K = layer(VECTORS, VECTORS)
K11, K22 = np.diag(K)[:, None], np.diag(K)[None]
M, DM = K11 * K22 + 2 * K**2, 4 * K
"""``E a² a'²``, and its derivative."""


def of(fn, number, draw, x, n):
    return dense(draw, fn(*(dense(draw, x, n) for _ in range(number))), 1, b=None)


# With k the covariance of every field: E f f', and its derivative in k, by hand.
BY_HAND = {
    "bilinear": (lambda a, b: a * b, K**2, 2 * K),
    "third order": (lambda a, b, c: a * b * c, K**3, 3 * K**2),
    "a square, gated": (lambda a, b: a**2 * b, M * K, DM * K + M),
    "a square of a sum": (
        lambda a, b, c: (a * b + c) ** 2,
        M**2 + K11**2 * K22 + K11 * K22**2 + 4 * K**3 + M,
        2 * M * DM + 12 * K**2 + DM,
    ),
    "a sum of squares, squared": (
        lambda a, b: (a**2 + b**2) ** 2,
        # E a⁴ a'⁴ = 9 k² k'² + 72 k k' c² + 24 c⁴; E a⁴ a'² b'² = (3 k² k' + 12 k c²) k', E a⁴ b'⁴ = 9 k² k'².
        2 * (9 * K11**2 * K22**2 + 72 * K11 * K22 * K**2 + 24 * K**4) + 18 * K11**2 * K22**2
        + 8 * (3 * K11**2 * K22**2 + 6 * (K11 * K22) * K**2) + 8 * 6 * K11 * K22 * K**2 + 4 * M**2,
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_one_layer_by_hand(name):
    fn, second, slope = BY_HAND[name]
    ours = limit(plain(functools.partial(of, fn, fn.__code__.co_argcount)), VECTORS)
    np.testing.assert_allclose(ours.nngp, W**2 * second, rtol=1e-12)
    if slope is not None:
        # What training the layer does to a field's covariance is to add that covariance.
        np.testing.assert_allclose(ours.ntk, W**2 * (second + slope * K), rtol=1e-12)


def skips(draw, x, n):
    a = dense(draw, x, n)
    return dense(draw, a * (a + dense(draw, a, n)) * (a + dense(draw, a, n)), 1, b=None)


def two_bilinear(draw, x, n):
    h = dense(draw, x, n) * dense(draw, x, n)
    return dense(draw, (dense(draw, h, n) * dense(draw, h, n) + dense(draw, h, n)) ** 2, 1, b=None)


def cubed(draw, x, n):
    a, b, c = (dense(draw, x, n) for _ in range(3))
    return dense(draw, (a * b + c) ** 3, 1, b=None)


def recursion(fn, fields, kernels):
    """NNGP and tangent kernel of ``dense(fn(fields))``, fields of given covariances and tangent kernels, by Gauss-Hermite sums."""
    found = np.zeros((2, *K.shape))
    with jax.enable_x64(True):
        slopes = [lambda *z, i=i: np.asarray(jax.grad(lambda *y: jnp.sum(fn(*y)), i)(*z)) for i in range(fields)]
    for i, j in np.ndindex(K.shape):
        cov = np.zeros((2 * fields, 2 * fields))
        for f, (k, _) in enumerate(kernels):
            cov[np.ix_([f, fields + f], [f, fields + f])] = k[np.ix_([i, j], [i, j])]

        def both(g, cov=cov):
            with jax.enable_x64(True):
                return gauss_hermite(lambda *z: g(*z[:fields]) * g(*z[fields:]), cov, 4)

        found[0, i, j] = both(lambda *z: np.asarray(fn(*z)))
        found[1, i, j] = found[0, i, j] + sum(both(slope) * t[i, j] for slope, (_, t) in zip(slopes, kernels))
    return W**2 * found


def deeper(k, t):
    return W**2 * k + B**2, W**2 * (k + t) + B**2


def test_a_product_across_skips_is_its_recursion():
    ours, below = limit(plain(skips), VECTORS), (K, K)
    wanted = recursion(lambda a, b, c: a * (a + b) * (a + c), 3, [below, deeper(*below), deeper(*below)])
    np.testing.assert_allclose(ours.nngp, wanted[0], rtol=1e-11)
    np.testing.assert_allclose(ours.ntk, wanted[1], rtol=1e-11)


def test_two_layers_are_their_recursion():
    ours, below = limit(plain(two_bilinear), VECTORS), (K**2, 2 * K**2)
    wanted = recursion(lambda a, b, c: (a * b + c) ** 2, 3, [deeper(*below)] * 3)
    np.testing.assert_allclose(ours.nngp, wanted[0], rtol=1e-11)
    np.testing.assert_allclose(ours.ntk, wanted[1], rtol=1e-11)


@pytest.mark.parametrize("pool", [True, False])
def test_positions(pool):
    def forward(draw, x, n):
        h = (dense(draw, x, n) * dense(draw, x, n) + dense(draw, x, n)) ** 2
        return dense(draw, jnp.mean(h, 1) if pool else flat(h), 1, b=None)

    ours, flattened = limit(plain(forward), SENTENCES), SENTENCES.reshape(-1, 5)
    k = layer(flattened, flattened)
    k11, k22 = np.diag(k)[:, None], np.diag(k)[None]
    m = k11 * k22 + 2 * k**2
    second = m**2 + k11**2 * k22 + k11 * k22**2 + 4 * k**3 + m
    slope = (8 * m * k + 12 * k**2 + 4 * k) * k
    for found, each in ((ours.nngp, second), (ours.ntk, second + slope)):
        each = each.reshape(3, 3, 3, 3)
        np.testing.assert_allclose(found, W**2 * (each.mean((1, 3)) if pool else np.einsum("npmp->nm", each) / 3), rtol=1e-12)


def test_single_precision_and_other_bits():
    ours, single = limit(plain(cubed), VECTORS), limit(plain(cubed), VECTORS.astype(np.float32), dtype="float32")
    # Twelve factors in single precision.
    for a, b in ((ours.nngp, single.nngp), (ours.ntk, single.ntk)):
        np.testing.assert_allclose(b, a, rtol=2e-5)


def test_equal_opposite_and_zero_examples():
    x = np.concatenate([VECTORS, VECTORS[:1], -VECTORS[:1], np.zeros((1, 5))])
    ours = limit(plain(cubed), x)
    for k in (np.asarray(ours.nngp), np.asarray(ours.ntk)):
        np.testing.assert_array_equal(k, k.T)
        np.testing.assert_allclose(k[3], k[0], rtol=1e-12)
        assert np.linalg.eigvalsh(k)[0] > -1e-12 * np.trace(k)
    np.testing.assert_allclose(limit(plain(cubed), x[:2], x[2:]).ntk, np.asarray(ours.ntk)[:2, 2:], rtol=1e-12)


def test_gradients_with_respect_to_examples(x64):
    family = plain(functools.partial(of, *BY_HAND["a square of a sum"][:1], 3))
    ours = limit(family, VECTORS[:2])

    def total(x):
        both = limit(ours.program, x)
        return jnp.sum(jnp.asarray([[1.0, -2.0], [0.5, 3.0]]) * (both.nngp + 2 * both.ntk))

    # Twice the same example.
    x, change = jnp.asarray(VECTORS[[0, 0]]), np.random.default_rng(1).normal(size=(2, 5))
    slope = np.sum(jax.grad(total)(x) * change)
    ahead, behind = (total(x + s * 1e-5 * change) for s in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-7)


def test_they_stay_exact_with_consent_to_draws():
    fn, second, _ = BY_HAND["a square of a sum"]
    ours = limit(plain(functools.partial(of, fn, 3)), VECTORS, ntk=False, key=jax.random.key(0), samples=16)
    np.testing.assert_allclose(ours.nngp, W**2 * second, rtol=1e-12)
    assert np.max(ours.error[0]) < 1e-12 * np.max(second)


def test_too_long_a_sum_is_refused_with_its_degrees():
    def forward(draw, x, n):
        # One matrix: all fields depend on each other.
        w = draw(5, n)
        fields = [(c * x + c**2) @ w for c in (0.5, 1.0, 1.5, 2.0)]
        return dense(draw, (fields[0] * fields[1] + fields[2] * fields[3]) ** 4, 1, b=None)

    message = rf"polynomials of degrees 8 and 8, of 4 and 4 fields, .*more than {MOST_TERMS} terms.*over 8 fields.*Monte Carlo"
    with pytest.raises(NotImplementedError, match=f"(?s){message}"):
        limit(plain(forward), VECTORS)


class Gated(nn.Module):
    """Linear gates: of layers of products, and a product across a skip."""

    width: int

    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def layer(h):
            return nn.Dense(self.width, kernel_init=kernel, bias_init=nn.initializers.normal(0.3))(h)

        h = layer(x) * layer(x)
        h = h + layer(h) * (layer(h) + 0.5 * layer(h) ** 2)
        return nn.Dense(1, kernel_init=kernel)((h + layer(x)) ** 2 / 4)


FINITE = {"a gated network": lambda width: Gated(width), "cubed": plain(cubed), "across skips": plain(skips)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FINITE)
def test_finite_widths(name):
    family, x, width, seeds = FINITE[name], VECTORS[:2].astype(np.float32) / 2, 512, 48
    in_flax = dict(parametrization=pj.ntp, base=dict(width=64)) if name == "a gated network" else {}
    ours = limit(family, x, **in_flax)
    init, apply = pj.plan(pj.family(family), pj.ntp, base=dict(width=64), target=dict(width=width), x=x).model if in_flax else family(width)

    @jax.jit
    def kernels(key):
        leaves = jax.tree.leaves(jax.jacobian(lambda p: apply(p, x)[:, 0])(init(key, x)))
        # The readout's part is the covariance of the outputs given the features; the plan draws its weights as at the base.
        (readout,) = [g[..., 0] for g in leaves if g.shape == (2, width, 1)]
        return readout @ readout.T / (64 if in_flax else 1), sum(g.reshape(2, -1) @ g.reshape(2, -1).T for g in leaves)

    found = [np.stack(several) for several in zip(*(kernels(key) for key in jax.random.split(jax.random.key(0), seeds)))]
    for several, wanted in zip(found, (ours.nngp, ours.ntk)):
        error = several.std(0, ddof=1) / seeds**0.5
        # Five standard errors of 48 networks, and a bias of a few over the width.
        assert (np.abs(several.mean(0) - wanted) < 5 * error + 5 / width * np.max(wanted)).all()
        assert (error < 0.1 * np.max(wanted)).all()
