"""Attention with logits over sqrt(d) as the number of heads grows, against neural-tangents, by hand, one simulated head, finite widths."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.interop import neural_tangents as nt
from tests.limits.ntk_networks import SENTENCES, W, dense, plain

SIZE = 2
KEY = jax.random.key(0)
limit = functools.partial(pj.limit, progress=False)


def identity(logits):
    return logits


def softmax(logits):
    return jax.nn.softmax(logits, -1)


def causal(logits):
    seen = np.tril(np.ones((3, 3), bool))
    return jax.nn.softmax(jnp.where(jnp.broadcast_to(seen, logits.shape), logits, -jnp.inf), -1)


def attention(mechanism, tied=False, heads=None):
    """Heads of two coordinates, a mean over positions, a readout."""

    def forward(draw, x, n):
        shape = (*x.shape[:2], heads or n // SIZE, SIZE)
        q = dense(draw, x, math.prod(shape[2:]), b=None).reshape(shape)
        k = q if tied else dense(draw, x, math.prod(shape[2:]), b=None).reshape(shape)
        v = dense(draw, x, math.prod(shape[2:]), b=None).reshape(shape)
        weights = mechanism(jnp.einsum("bthd,bshd->bhts", q, k) / SIZE**0.5)
        h = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1)
        return dense(draw, jnp.mean(dense(draw, h, n, b=None), 1), 1, b=None)

    return plain(forward)


@pytest.mark.filterwarnings("ignore:`FanIn` layers assume")
def test_without_a_softmax_it_is_that_of_neural_tangents():
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip(f"neural-tangents is not installed: {nt.INSTALL}")
    ours = limit(attention(identity), SENTENCES[:1], SENTENCES[1:])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(True):
        stds = dict(W_key_std=W, W_query_std=W, W_value_std=W, W_out_std=W)
        heads = nt.stax.GlobalSelfAttention(8, SIZE, SIZE, 64, linear_scaling=False, attention_mechanism="IDENTITY", **stds)
        layers = nt.stax.serial(heads, nt.stax.GlobalAvgPool(), nt.stax.Dense(1, W))
        theirs = layers[2](jnp.asarray(SENTENCES[:1]), jnp.asarray(SENTENCES[1:]), ("nngp", "ntk"))
    # Float64 rounding.
    np.testing.assert_allclose(ours.nngp, theirs.nngp, rtol=1e-10)
    np.testing.assert_allclose(ours.ntk, theirs.ntk, rtol=1e-10)


def test_keys_that_are_queries():
    # Isserlis, by hand: E (q_i q_j)(q'_k q'_l) summed over d coordinates of each is d (ik jl + il jk) + d² ij kl.
    gram = W**2 / 5 * np.einsum("nid,mjd->nimj", SENTENCES, SENTENCES)
    own = np.einsum("ninj->nij", gram)
    logits = np.einsum("nimk,njml->nijmkl", gram, gram) + np.einsum("niml,njmk->nijmkl", gram, gram)
    logits = logits + SIZE * own[:, :, :, None, None, None] * own[None, None, None]
    wanted = W**4 * np.einsum("nijmkl,njml->nm", logits, gram) / 9
    np.testing.assert_allclose(limit(attention(identity, tied=True), SENTENCES, ntk=False).nngp, wanted, rtol=1e-12)


def simulated(mechanism, draws=100_000):
    """The covariance of the output of one head times that of the readout, from draws in numpy."""
    rng = np.random.default_rng(1)
    q, k = (W / 5**0.5 * np.einsum("nid,sda->nsia", SENTENCES, rng.normal(size=(draws, 5, SIZE))) for _ in range(2))
    with jax.enable_x64(True):
        weights = np.asarray(mechanism(jnp.asarray(np.einsum("nsia,nsja->nsij", q, k) / SIZE**0.5)))
    mean = weights.mean(2)
    return W**6 / 5 * np.einsum("nsj,msk,njd,mkd->nm", mean, mean, SENTENCES, SENTENCES) / draws


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", [softmax, causal])
def test_a_softmax_is_drawn(mechanism):
    ours = limit(attention(mechanism), SENTENCES, key=KEY, samples=2048, ntk=False)
    error = np.asarray(ours.error[0])
    # Five standard errors of 2,048 draws; those of 100,000 are a seventh.
    assert (np.abs(ours.nngp - simulated(mechanism)) < 5 * error).all()
    assert (error < 0.03 * np.sqrt(np.outer(*[np.diag(ours.nngp)] * 2))).all()


@functools.cache
def drawn():
    return limit(attention(softmax), SENTENCES, key=KEY, samples=256)


@pytest.mark.slow
def test_drawn_kernels_are_symmetric_and_do_not_depend_on_the_others():
    whole, order = drawn(), np.array([2, 0, 1])
    turned = limit(attention(softmax), SENTENCES[order], key=KEY, samples=256)
    for name in ("nngp", "ntk"):
        k = np.asarray(getattr(whole, name))
        np.testing.assert_array_equal(k, k.T)
        # Draws are the same: the rest is rounding.
        np.testing.assert_allclose(getattr(turned, name), k[np.ix_(order, order)], rtol=1e-9, atol=1e-12)


def two_layers(draw, x, n):
    h = dense(draw, x, n, b=None)
    for _ in range(2):
        q, k, v = (dense(draw, h, n, b=None).reshape(*x.shape[:2], n // SIZE, SIZE) for _ in range(3))
        h = h + jnp.einsum("bhts,bshd->bthd", softmax(jnp.einsum("bthd,bshd->bhts", q, k) / SIZE**0.5), v).reshape(h.shape)
    return dense(draw, jnp.mean(h, 1), 1, b=None)


def test_a_norm_of_what_is_drawn():
    """It divides by the root of what the kernel without it is of an example with itself; what it neglects is drawn, too."""

    def net(draw, x, n, normed):
        q, k, v = (dense(draw, x, n, b=None).reshape(*x.shape[:2], n // SIZE, SIZE) for _ in range(3))
        h = jnp.einsum("bhts,bshd->bthd", softmax(jnp.einsum("bthd,bshd->bhts", q, k) / SIZE**0.5), v)[:, 0].reshape(len(x), -1)
        h = dense(draw, h, n, w=1.0, b=None)
        if normed:
            h = h - jnp.mean(h, -1, keepdims=True)
            h = h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True))
        return dense(draw, h, 1, w=1.0, b=None)

    options = dict(key=KEY, samples=256, ntk=False)
    bare, normed = (limit(plain(functools.partial(net, normed=on)), SENTENCES, **options) for on in (False, True))
    size = np.sqrt(np.diag(bare.nngp))
    # A ratio of means of 32 draws is biased, too.
    np.testing.assert_allclose(np.diag(normed.nngp), 1.0, rtol=1e-6)
    off = np.asarray(normed.nngp) - np.asarray(bare.nngp) / np.outer(size, size)
    assert (np.abs(off) <= 5 * np.asarray(normed.error[0]) + 0.01).all()


@pytest.mark.slow
def test_rounding_is_not_drawn():
    # A value given its equal varies by the rounding of 1, 1e-16, whose root is 1e-8 of noise: another at another width.
    ours = limit(plain(two_layers), SENTENCES[[0, 1, 0]], key=KEY, samples=16, ntk=False)
    np.testing.assert_allclose(ours.nngp[0], ours.nngp[2], rtol=1e-12)


@pytest.mark.slow
def test_the_tangent_kernel_is_that_of_finite_width():
    ours = limit(attention(softmax), SENTENCES, key=KEY, samples=2048)
    init, apply = attention(softmax)(256)
    x = jnp.asarray(SENTENCES, jnp.float32)

    @jax.jit
    def kernel(key):
        gradients = jax.jacobian(lambda p: apply(p, x)[:, 0])(init(key, x))
        return sum(jnp.einsum("i...,j...->ij", g, g) for g in gradients)

    found = np.stack([kernel(key) for key in jax.random.split(jax.random.key(1), 32)])
    spread = np.sqrt(found.var(0, ddof=1) / len(found) + np.asarray(ours.error[1]) ** 2)
    # 128 heads are off their limit by about a percent; five standard errors of 32 networks and of the draws.
    assert (np.abs(found.mean(0) - ours.ntk) < 5 * spread + 0.01 * np.max(ours.ntk)).all()
    np.testing.assert_array_less(spread, 0.03 * np.max(ours.ntk))


def shared_keys(draw, x, n):
    q = dense(draw, x, n, b=None).reshape(*x.shape[:2], n // SIZE, SIZE)
    k = dense(draw, x, SIZE, b=None)
    return dense(draw, jnp.einsum("bthd,bsd->bths", q, k).reshape(x.shape[0], -1), 1)


REFUSED = {
    "a softmax that is not drawn": (attention(softmax), {}, NotImplementedError, r"reduce_max.*key=jax\.random\.key\(0\), samples="),
    "heads fixed in number": (attention(softmax, heads=4), {}, NotImplementedError, r"whose size and number are fixed.*2006\.10540"),
    "heads that share their keys": (plain(shared_keys), {}, NotImplementedError, r"sums over no growing axis"),
    "no samples": (attention(softmax), dict(key=KEY), ValueError, "both key= and samples="),
    "few samples": (attention(softmax), dict(key=KEY, samples=4), ValueError, "samples = 4.*at least 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    family, options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        limit(family, SENTENCES, **options)


@pytest.mark.slow
def test_gradients_of_what_is_drawn_are_refused():
    def total(x):
        return jnp.sum(limit(attention(softmax), x, key=KEY, samples=16, ntk=False).nngp)

    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="no gradients with respect to examples"):
        jax.grad(total)(jnp.asarray(SENTENCES))


def with_common_values(apart):
    """Two heads with queries of their own, whose keys and values are the same; at once, or one `apart` from the other."""

    def forward(draw, x, n):
        b, t, _ = x.shape
        far = np.abs(np.arange(t)[:, None] - np.arange(t)).astype(x.dtype)
        q, k, v = (dense(draw, x, m, b=None) for m in (n, n // 2, n // 2))
        if apart:
            ways = [jnp.einsum("bid,bjd->bij", part, k) / (n // 2) - far[None] for part in jnp.split(q, 2, -1)]
            h = jnp.concatenate([softmax(way) @ v for way in ways], -1)
        else:
            k, v = (jnp.repeat(each[:, :, None], 2, 2) for each in (k, v))
            weights = softmax(jnp.einsum("bihd,bjhd->bhij", q.reshape(b, t, 2, -1), k) / (n // 2) - far[None, None])
            h = jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(b, t, n)
        return dense(draw, jnp.mean(jax.nn.relu(dense(draw, h, n)), 1), 1)

    return plain(forward)


def test_keys_and_values_that_heads_of_their_own_queries_share():
    together, apart = (limit(with_common_values(one_by_one), SENTENCES) for one_by_one in (False, True))
    np.testing.assert_allclose(together.nngp, apart.nngp, rtol=1e-10)
    np.testing.assert_allclose(together.ntk, apart.ntk, rtol=1e-10)


def test_coordinates_that_are_alike_meet_others():
    """A number for each of two heads; and two heads that share what made their own queries."""

    def numbers(draw, x, n):
        h = jnp.einsum("bthd,h->bthd", dense(draw, x, n).reshape(*x.shape[:2], 2, -1), jnp.array([1.0, 0.5], x.dtype))
        return dense(draw, h.reshape(x.shape[0], -1), 1)

    def queries(draw, x, n):
        k = dense(draw, x, n // 2, b=None)
        q = dense(draw, x, n, b=None).reshape(*x.shape[:2], 2, -1) + k[:, :, None]
        logits = jnp.einsum("bihd,bjhd->bhij", q, jnp.repeat(k[:, :, None], 2, 2)) / k.shape[-1]
        return dense(draw, jnp.einsum("bhij,bjd->bihd", softmax(logits), k).reshape(x.shape[0], -1), 1)

    unlike = (numbers, "numbers that differ from one independent coordinate"), (queries, "others that are independent along it")
    for forward, said in unlike:
        with pytest.raises(NotImplementedError, match=said):
            limit(plain(forward), SENTENCES)
