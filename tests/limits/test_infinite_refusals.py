"""What `limit` refuses: networks without a limit, or whose limit is not known, and bad input; the message says what to do."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from tests.limits.ntk_networks import IMAGES, SENTENCES, VECTORS, conv, dense, flat, plain

TOKENS = np.arange(6).reshape(3, 2)


def no_width(draw, x, n):
    return dense(draw, jnp.tanh(dense(draw, x, 7)), 1)


def outer(draw, x, n):
    h, g = dense(draw, x, n), dense(draw, x, n)
    both = jnp.tanh(h[:, :, None] * g[:, None, :])
    return jnp.einsum("bij,ijk->bk", both, draw(n, n, 1)) / n


def bilinear(draw, x, n):
    h, g = dense(draw, x, n), dense(draw, x, n)
    return jnp.einsum("bi,bj,ijk->bk", h, g, draw(n, n, 1)) / n


def of(phi):
    return lambda draw, x, n: dense(draw, phi(dense(draw, x, n)), 1)


def batch_mean(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jnp.tanh(h - jnp.broadcast_to(jnp.mean(h, 0), h.shape)), 1)


def root_attention(draw, x, n):
    h = dense(draw, x, n)
    queries, keys, values = (dense(draw, h, n) for _ in range(3))
    weights = jax.nn.softmax(queries @ jnp.swapaxes(keys, 1, 2) / n**0.5, -1)
    return dense(draw, flat(weights @ values), 1)


def tied_readout(draw, x, n):
    table = draw(11, n)
    h = table[x]
    return (h + dense(draw, jnp.tanh(h), n)) @ table.T / n**0.5


def transposed(draw, x, n):
    h, w = jnp.tanh(dense(draw, x, n)), draw(n, n)
    h = jnp.tanh(h @ w / n**0.5)
    return dense(draw, jnp.tanh(h @ w.T / n**0.5), 1)


def max_pooling(draw, x, n):
    return dense(draw, flat(nn.max_pool(jax.nn.relu(conv(draw, x, n)), (2, 2), (2, 2))), 1)


def global_maximum(draw, x, n):
    return dense(draw, jnp.max(jax.nn.relu(conv(draw, x, n)), (1, 2)), 1)


def dropout(draw, x, n):
    h = jax.nn.relu(dense(draw, x, n))
    return dense(draw, h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape).astype(h.dtype), 1)


def one_gate(draw, x, n):
    h = dense(draw, x, n)
    gate = jnp.broadcast_to(jax.nn.sigmoid(dense(draw, h, 1)), h.shape)
    return dense(draw, jnp.tanh(dense(draw, h * gate, n)), 1)


def shuffled(h):
    """Channels of four groups in turn."""
    return jnp.swapaxes(h.reshape(h.shape[0], 4, -1), 1, 2).reshape(h.shape)


def shuffle_with_a_skip(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jnp.tanh(h + shuffled(h)), 1)


def shuffle_and_one_matrix(draw, x, n):
    h, w = jax.nn.relu(dense(draw, x, n)), draw(n, n)
    return dense(draw, jnp.tanh((h @ w + shuffled(h) @ w) / n**0.5), 1)


def one_leaf_in_two_orders(draw, x, n):
    h, w = jax.nn.relu(dense(draw, x, n)), draw(n, 4, n // 4)
    both = h @ w.reshape(n, n) + h @ jnp.swapaxes(w, 1, 2).reshape(n, n)
    return dense(draw, jnp.tanh(both / n**0.5), 1)


def rows_of_one_leaf_in_two_orders(draw, x, n):
    h, w = jax.nn.relu(dense(draw, x, n)), draw(4, n // 4, n)
    both = h @ w.reshape(n, n) + h @ jnp.swapaxes(w, 0, 1).reshape(n, n)
    return dense(draw, jnp.tanh(both / n**0.5), 1)


def shuffle_inner(draw, x, n):
    h = jax.nn.relu(dense(draw, x, n))
    return dense(draw, h * (jnp.einsum("bi,bi->b", h, shuffled(h))[:, None] / n), 1)


def random_gate(draw, x, n):
    h, g = dense(draw, x, n), dense(draw, x, n)
    return dense(draw, jax.nn.relu(h) * (jnp.sum(h * g, 1, keepdims=True) / n**0.5), 1)


def added_parts_of_one_leaf(draw, x, n):
    h = jnp.tanh(jnp.einsum("bi,pij->pbj", jax.nn.relu(dense(draw, x, n)), draw(3, n, n)) / n**0.5)
    return dense(draw, h.sum(0), 1)


def weight_normalisation(draw, x, n):
    w = draw(n, n)
    return dense(draw, jnp.tanh(jax.nn.relu(dense(draw, x, n)) @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))), 1)


def random_shift(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jax.nn.relu(h + jnp.sum(h, 1, keepdims=True) / n**0.5), 1)


def amplified_mean(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jax.nn.relu(h) * jnp.mean(h, 1, keepdims=True) * n**0.5, 1)


def amplified_size(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jax.nn.relu(h) * (jnp.abs(jnp.mean(h, 1, keepdims=True)) * n**0.5), 1)


def noise_times_growing(draw, x, n):
    h, g = dense(draw, x, n), dense(draw, x, n)
    total, inner = (jnp.sum(h * u, 1, keepdims=True) for u in (h, g))
    return dense(draw, jax.nn.relu(h) * (total * inner / n**1.5), 1)


def noisy_denominator(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jax.nn.relu(h) / (n**0.5 + jnp.sum(h, 1, keepdims=True)) * n**0.5, 1)


def sign_of_a_mean(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jax.nn.relu(h) * jnp.sign(jnp.mean(h, 1, keepdims=True)), 1)


def where_a_mean(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jnp.sum(jnp.where(jnp.mean(h, 2, keepdims=True) > 0, h, jnp.zeros_like(h)), 1), 1)


def position_of_largest_mean(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, jnp.take_along_axis(h, jnp.argmax(jnp.mean(h, 2), 1)[:, None, None], 1)[:, 0], 1)


def finite_layer(draw, x, n):
    return dense(draw, jnp.tanh(dense(draw, jnp.tanh(dense(draw, x, n)), 7)), 1)


def largest_of_three(draw, x, n):
    a, b, c = (dense(draw, x, n) for _ in range(3))
    return dense(draw, jnp.maximum(jnp.maximum(a, b), c), 1)


def branch(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, h * 2 if n > 1024 else h - jnp.mean(h, 1, keepdims=True), 1)


NETWORKS = {
    "no width": (no_width, VECTORS, ValueError, r"no axis of any leaf grows with width.*family\(lambda width"),
    "two growing axes of one array": (outer, VECTORS, NotImplementedError, r"two growing axes.*outer product"),
    "two growing axes in one sum": (bilinear, VECTORS, NotImplementedError, r"pj\.limit: .*"),
    "exponential of a large variance": (of(lambda h: jnp.exp(40 * h)), VECTORS, ValueError, r"not finite.*exp of a large variance"),
    "exponential of a square": (of(lambda h: jnp.exp(h**2)), VECTORS, ValueError, r"a function of wide values has no expectation"),
    "exponential of a fourth power": (of(lambda h: jnp.exp(h**4)), VECTORS, ValueError, r"^pj\.limit: a function of wide values has no"),
    "a root of negative numbers": (of(jnp.sqrt), VECTORS, ValueError, r"is NaN near -0\.0001: a root.*jnp\.abs"),
    "one over a field": (of(lambda h: 1 / h), VECTORS, ValueError, r"a value that grows near 0 so fast.*mean square is infinite"),
    "statistics of the batch": (batch_mean, VECTORS, ValueError, r"examples of a batch meet.*batch statistics.*LayerNorm"),
    "attention over sqrt(d)": (root_attention, SENTENCES, ValueError, r"stays random.*1/sqrt\(d\) do; scaled by 1/d they settle"),
    "readout tied to the embedding": (tied_readout, TOKENS, NotImplementedError, r"\[0\].*the other way round.*embedding table.*Untie"),
    "a matrix and its transpose": (transposed, VECTORS, NotImplementedError, r"\[2\].*the other way round.*transpose"),
    "parts of one leaf that are added": (added_parts_of_one_leaf, VECTORS, NotImplementedError, r"3 independent.*a leaf of its own"),
    "weight normalisation": (weight_normalisation, VECTORS, NotImplementedError, r"weight normalisation.*variance 1 / fan_in"),
    "max pooling": (max_pooling, IMAGES, NotImplementedError, r"reduce_window_max.*max pooling"),
    "maximum over positions": (global_maximum, IMAGES, NotImplementedError, r"reduce_max.*max pooling"),
    "dropout": (dropout, VECTORS, NotImplementedError, r"random key|dropout"),
    "a gate with one output": (one_gate, VECTORS, NotImplementedError, r"one random number.*gate"),
    "a shuffle with a skip": (shuffle_with_a_skip, VECTORS, NotImplementedError, "primitive add.*two orders.*shuffle.*layers of its own"),
    "a shuffle and one matrix": (shuffle_and_one_matrix, VECTORS, NotImplementedError, r"\[2\].*before and after a shuffle"),
    "columns in two orders": (one_leaf_in_two_orders, VECTORS, NotImplementedError, "primitive add.*two orders"),
    "rows in two orders": (rows_of_one_leaf_in_two_orders, VECTORS, NotImplementedError, r"\[2\].*before and after a shuffle"),
    "a product with a shuffle": (shuffle_inner, VECTORS, NotImplementedError, "primitive dot_general.*two orders.*shuffle"),
    "a random number that multiplies": (random_gate, VECTORS, ValueError, "what a mul takes for its mean.*stays random"),
    "a random number that is added": (random_shift, VECTORS, ValueError, "what a add takes for its mean.*stays random"),
    "a mean of zero, made large": (amplified_mean, VECTORS, ValueError, "what a mul takes for its mean.*stays random"),
    "its size, made large": (amplified_size, VECTORS, ValueError, "what a mul takes for its mean.*stays random"),
    "a noise times a large number": (noise_times_growing, VECTORS, ValueError, "what a mul takes for its mean.*stays random"),
    "a random denominator": (noisy_denominator, VECTORS, ValueError, "what a div takes for its mean.*stays random"),
    "the sign of a mean of zero": (sign_of_a_mean, VECTORS, ValueError, "what a sign takes for its mean.*stays random"),
    "a choice by a mean of zero": (where_a_mean, SENTENCES, ValueError, "what a gt takes for its mean.*stays random"),
    "the largest mean": (position_of_largest_mean, SENTENCES, NotImplementedError, "primitive argmax.*ties are broken"),
    "six fields at once": (largest_of_three, VECTORS, NotImplementedError, r"over 6 fields at once.*opt in to Monte Carlo.*samples=4096"),
    "a branch on the width": (branch, VECTORS, NotImplementedError, r"trace.*changes with its width.*reduce_sum at.*mul at"),
    "a finite layer behind a wide one": (finite_layer, VECTORS, NotImplementedError, r"\[4\].*behind a layer that does"),
    "a readout that grows": (lambda draw, x, n: dense(draw, x, n), VECTORS, NotImplementedError, r"output itself grows.*finite readout"),
    "a mean for a readout": (lambda d, x, n: jnp.mean(dense(d, x, n), 1, keepdims=True), VECTORS, NotImplementedError, "deterministic"),
    "a sum that is not scaled": (lambda d, x, n: dense(d, x, n) @ d(n, 1), VECTORS, ValueError, r"NNGP changes.*n\^1\.00.*1/sqrt\(n\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    forward, x, kind, message = NETWORKS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        pj.limit(plain(forward), x, progress=False)


def drawn(draw):
    def family(width):
        def init(key, x):
            first, last = jax.random.split(key)
            return {"w": draw(first, (x.shape[1], width)), "v": jax.random.normal(last, (width, 1))}

        return init, lambda params, x: width**-0.5 * (jnp.tanh(x @ params["w"]) @ params["v"])

    return family


def uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def sorted_entries(key, shape):
    return jnp.sort(jax.random.normal(key, shape), 0)


LAW = {"['w']": pj.limits.normal(1 / 3)}


def test_a_leaf_that_is_not_gaussian():
    message = r"\['w'\] is drawn from a uniform law.*gaussian=True.*laws=\{\"\['w'\]\": pj\.limits\.normal\(0\.333333\)\}"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pj.limit(drawn(uniform), VECTORS, progress=False)
    consent, declared = pj.limit(drawn(uniform), VECTORS, gaussian=True), pj.limit(drawn(uniform), VECTORS, laws=LAW)
    np.testing.assert_allclose(consent.ntk, declared.ntk, rtol=1e-12)


def test_a_leaf_whose_law_init_does_not_tell():
    with pytest.raises(ValueError, match=r"(?s)\['w'\] \(5, 1024\): sort.*laws=\{\"\['w'\]\": pj\.limits\.normal"):
        pj.limit(drawn(sorted_entries), VECTORS)
    with pytest.raises(ValueError, match=r"laws names a leaf \"\['W'\]\".*Did you mean"):
        pj.limit(drawn(sorted_entries), VECTORS, laws={"['W']": pj.limits.normal(1.0)})
    assert pj.limit(drawn(sorted_entries), VECTORS, laws=LAW, ntk=False).nngp.shape == (3, 3)


def test_a_leaf_that_is_not_drawn():
    def given(key, shape):
        return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    with pytest.raises(ValueError, match=r"(?s)\['w'\].*init does not draw.*laws=\{\"\['w'\]\": pj\.limits\.normal"):
        pj.limit(drawn(given), VECTORS)
    declared = pj.limit(drawn(given), VECTORS, laws=LAW, ntk=False, progress=False)
    np.testing.assert_allclose(declared.nngp, pj.limit(drawn(uniform), VECTORS, laws=LAW, ntk=False, progress=False).nngp, rtol=1e-6)


def test_a_pair_that_does_not_fit_is_refused_before_it_is_made():
    """Of 2^32 pairs of positions; the memory of the machine is not touched."""

    def pooled(draw, x, n):
        return dense(draw, jnp.mean(jax.nn.relu(conv(draw, x, n)), (1, 2)), 1)

    images = np.ones((2, 256, 256, 1), np.float32)
    with pytest.raises(ValueError, match=r"(?s)one pair of examples takes.*max_bytes is 1 GB.*fewer positions"):
        pj.limit(plain(pooled), images, ntk=False, max_bytes=10**9, progress=False)


def test_files_that_no_disk_holds_are_refused_before_tiles_are_listed(tmp_path):
    with pytest.raises(OSError, match=r"(?s)the kernels take 8e\+03 GB.*Choose another disk"):
        pj.limit(NET, HUGE, ntk=False, out=tmp_path / "kernels", progress=False)
    assert not list(tmp_path.glob("**/*.npy"))


def test_a_bias_that_fades_with_the_width():
    """Equinox draws a readout's bias from +-1/sqrt(n)."""

    def family(width):
        return lambda key: eqx.nn.MLP(5, 1, width, 1, key=key)

    with pytest.raises(ValueError, match=r"(?s)nearly settled.*Equinox.*at=dict\(width=1 << 22\)"):
        pj.limit(family, VECTORS, gaussian=True, ntk=False, progress=False)
    assert pj.limit(family, VECTORS, gaussian=True, ntk=False, progress=False, at=dict(width=1 << 22)).nngp.shape == (3, 3)


def perceptron(width, depth):
    def forward(draw, x, n):
        for _ in range(depth):
            x = jnp.tanh(dense(draw, x, n))
        return dense(draw, x, 1)

    return plain(forward)(width)


def scanned(width, depth):
    def init(key, x):
        first, hidden = jax.random.split(key)
        return {"v": jax.random.normal(first, (x.shape[1], width)), "w": jax.random.normal(hidden, (depth, width, width))}

    def apply(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w / width**0.5), None), x @ params["v"], params["w"])
        return h[:, :1]

    return init, apply


@pytest.mark.parametrize(("family", "message"), [(perceptron, "number of leaves changes"), (scanned, "number of steps of a scan grows")])
def test_a_depth_among_the_wide_sizes(family, message):
    with pytest.raises((ValueError, NotImplementedError), match=rf"(?s){message}.*sizes=dict\(depth=\.\.\.\)"):
        pj.limit(family, VECTORS, at=dict(width=16, depth=2))


HUGE = np.broadcast_to(np.float32(1), (10**6, 5))
NET = plain(of(jnp.tanh))
HOLES = np.where(np.arange(15).reshape(3, 5) == 7, np.nan, VECTORS)
CALLS = {
    "a NaN": (dict(x1=HOLES), ValueError, r"x1 has a NaN.*example 1"),
    "a NaN in x2": (dict(x1=VECTORS, x2=HOLES), ValueError, r"x2 has a NaN.*example 1"),
    "one example": (dict(x1=VECTORS[0]), TypeError, r"x\[None\]"),
    "no examples": (dict(x1=VECTORS[:0]), ValueError, r"x1 has no examples"),
    "other features": (dict(x1=VECTORS, x2=VECTORS[:, :4]), ValueError, r"shape \(5,\), and x2 of \(4,\)"),
    "complex numbers": (dict(x1=VECTORS.astype(np.complex64)), TypeError, r"x1 is of complex64.*two features"),
    "kernels larger than the memory": (dict(x1=HUGE), ValueError, r"1000000 x 1000000.*GB.*to a folder, out="),
    "a pair larger than the budget": (dict(x1=VECTORS, max_bytes=10), ValueError, r"one pair of examples.*give more memory"),
    "an unknown size": (dict(x1=VECTORS, sizes=dict(wdth=3)), ValueError, r"sizes names 'wdth'.*width"),
    "no size left": (dict(x1=VECTORS, sizes=dict(width=3)), ValueError, r"no size is left"),
    "an unknown part": (dict(x1=VECTORS, per="layer"), ValueError, r'per = \'layer\': it is None or "leaf"'),
    "an unknown precision": (dict(x1=VECTORS, dtype="float16"), ValueError, r"float16.*float64"),
    "a fractional width": (dict(x1=VECTORS, at=dict(width=1.5)), TypeError, r"at names width = 1\.5.*whole number"),
    "one name": (dict(x1=VECTORS, wide="width"), TypeError, r"one name.*wide=\['width'\]"),
    "no name": (dict(x1=VECTORS, wide=[]), ValueError, r"wide=\[\] names none"),
    "a width of two kinds": (dict(x1=VECTORS, wide=["width"], sizes=dict(width=5)), ValueError, r"wide and sizes both name 'width'"),
    "a base without a plan": (dict(x1=VECTORS, base=dict(width=64)), ValueError, r"no parametrization= is given"),
    "Adam without a plan": (dict(x1=VECTORS, optimizer="adam"), ValueError, r"of gradient descent; Adam.*ntk=False"),
    "an unknown optimizer": (dict(x1=VECTORS, optimizer="sdg"), ValueError, r"optimizer 'sdg'.*Did you mean 'sgd'"),
    "a list": (dict(x1=VECTORS.tolist()), TypeError, r"x1 is a list.*jnp\.asarray"),
    "tokens for a dense layer": (dict(x1=np.arange(3)), (TypeError, ValueError), r"fails on examples of shape \(\) and dtype int"),
    "no base": (dict(x1=VECTORS, parametrization=pj.ntp), ValueError, r"needs base=dict\(width="),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    arguments, kind, message = CALLS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        pj.limit(NET, **arguments)


def test_standard_parametrization_under_one_learning_rate():
    def family(width):
        return nn.Sequential([nn.Dense(width, kernel_init=nn.initializers.normal(0.5)), nn.relu, nn.Dense(1)])

    with pytest.raises(ValueError, match=r"NTK changes with the width, about as n\^1\.00.*pj\.ntp"):
        pj.limit(family, VECTORS, progress=False)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("sgd", r"NNGP changes.*n\^-1\.00.*as in muP.*features move.*pj\.ntp"), ("adam", "of gradient descent; Adam.*ntk=False")],
)
def test_mup_has_no_fixed_kernel(optimizer, message):
    init = nn.initializers.normal(0.5)

    def family(width):
        return nn.Sequential([nn.Dense(width, kernel_init=init), nn.relu, nn.Dense(1, kernel_init=init)])

    with pytest.raises(ValueError, match=f"(?s){message}"):
        pj.limit(family, VECTORS, parametrization=pj.mup, base=dict(width=64), optimizer=optimizer, progress=False)


def test_a_correction_of_order_one_over_the_width():
    def unbiased(draw, x, n):
        h = dense(draw, x, n)
        return dense(draw, jax.nn.relu(h / jnp.std(h, 1, keepdims=True, ddof=1)), 1)

    with pytest.raises(ValueError, match=r"(?s)nearly settled.*ddof=1.*at=dict\(width=1 << 22\)"):
        pj.limit(plain(unbiased), VECTORS, progress=False)
    assert pj.limit(plain(unbiased), VECTORS, at=dict(width=1 << 22), progress=False).nngp.shape == (3, 3)
