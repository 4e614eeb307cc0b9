"""Branches and loops that the code settles, matrices that are computed of leaves, norms in blocks as they are written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import IMAGES, SENTENCES, VECTORS, W, dense, plain
from tests.limits.wide_networks import NORMAL

relu = jax.nn.relu


def limit(family, x, **options):
    return pj.limit(family, x, progress=False, **options)


def by_a_condition(draw, x, n):
    return dense(draw, lax.cond(n > 32, relu, jnp.tanh, dense(draw, x, n)), 1)


def by_a_switch(draw, x, n):
    return dense(draw, lax.switch(1, [jnp.tanh, relu, jnp.sin], dense(draw, x, n)), 1)


def by_itself(draw, x, n):
    return dense(draw, relu(dense(draw, x, n)), 1)


@pytest.mark.parametrize("forward", [by_a_condition, by_a_switch])
def test_a_branch_that_the_code_chooses_is_taken(forward):
    ours, same = (limit(plain(f), VECTORS) for f in (forward, by_itself))
    np.testing.assert_allclose(ours.nngp, same.nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, same.ntk, rtol=1e-12)


def by_the_width(draw, x, n):
    return dense(draw, lax.cond(n > 1024, relu, jnp.tanh, dense(draw, x, n)), 1)


def while_there_are_steps(draw, x, n):
    h = dense(draw, x, n)
    return dense(draw, lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, relu(c[1])), (0, h))[1], 1)


def of_matrix(made):
    def forward(draw, x, n):
        h = relu(dense(draw, x, n))
        return dense(draw, relu(h @ made(draw, n) * (W / n**0.5)), 1)

    return forward


def gained(draw, n):
    return draw(n)[:, None] * draw(n, n)


REFUSED = {
    "a branch on the width": (by_the_width, r"changes with its width.*branch 0 is taken at one width, and 1 at twice that"),
    "a while loop": (while_there_are_steps, r"primitive while: .*lax\.fori_loop between numbers"),
    "a sum of two leaves": (of_matrix(lambda draw, n: draw(n, n) + draw(n, n)), r"\[2\]: a matrix is.* and others.*h @ u \+ h @ w"),
    "a function of a leaf": (of_matrix(lambda draw, n: jnp.tanh(draw(n, n))), r"\[2\]: a matrix is computed.*draw what a function makes"),
    "a leaf with its neighbours": (of_matrix(lambda draw, n: (lambda w: w + jnp.roll(w, 1, 0))(draw(n, n))), r"\[2\]: a matrix is comp"),
    "a matrix with a gain": (of_matrix(gained), r"primitive mul: an array with two growing axes.*\(h \* g\) @ w"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    forward, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"(?s){message}"):
        limit(plain(forward), VECTORS)


class Normalised(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        h = relu(nn.Dense(self.width, kernel_init=NORMAL)(x))
        return nn.Dense(1, kernel_init=NORMAL)(relu(nn.WeightNorm(nn.Dense(self.width, kernel_init=NORMAL))(h)))


def test_what_a_plan_asks_for_is_said_to_be_of_a_plan():
    with pytest.raises(ValueError, match=r"(?s)pj\.limit: the trace cannot tell.*Such uses= are of pj\.plan.*weight normalisation"):
        limit(lambda width: Normalised(width), VECTORS, parametrization=pj.ntp, base=dict(width=64))


class Beside(nn.Module):
    """Features of the data beside those of a layer, as a DenseNet has them."""

    width: int

    @nn.compact
    def __call__(self, x):
        h = jnp.concatenate([x, relu(nn.Dense(self.width, kernel_init=NORMAL)(x))], -1)
        return nn.Dense(1, kernel_init=NORMAL)(h)


def test_what_a_plan_is_told_of_a_leaf_of_two_kinds_is_of_a_plan():
    with pytest.raises(ValueError, match=r"(?s)pj\.limit: some entries.*Such uses= are of pj\.plan.*each part a leaf"):
        limit(lambda width: Beside(width), VECTORS, parametrization=pj.ntp, base=dict(width=64))


class Mixed(nn.Module):
    width: int
    table: bool

    @nn.compact
    def __call__(self, x):
        g = nn.softmax(self.param("g", nn.initializers.zeros, (2,))) if self.table else jnp.full(2, 1 / 2)
        h = sum(g[i] * jnp.sin(nn.Dense(self.width, kernel_init=NORMAL)(x)) for i in range(2))
        return nn.Dense(1, kernel_init=NORMAL)(h)


def test_a_softmax_of_a_learned_table():
    """At 0 it is 1/2 each. What training does to it stays random."""
    options = dict(parametrization=pj.ntp, base=dict(width=64))
    ours, same = (limit(lambda width, t=table: Mixed(width, t), VECTORS, ntk=False, **options) for table in (True, False))
    np.testing.assert_allclose(ours.nngp, same.nngp, rtol=1e-12)
    with pytest.raises(ValueError, match=r"\['g'\]: all coordinates share this leaf.*Ask for ntk=False"):
        limit(lambda width: Mixed(width, True), VECTORS, **options)


class Depthwise(nn.Module):
    """The norms of a ConvNeXt: after a depthwise convolution, and of a mean over positions of such."""

    width: int
    gain: bool

    @nn.compact
    def __call__(self, x):
        def norm(h):
            return nn.LayerNorm(use_scale=self.gain, use_bias=self.gain)(h)

        n = self.width
        h = nn.Conv(n, (1, 1), kernel_init=NORMAL)(x)
        h = h + norm(nn.Conv(n, (2, 1), feature_group_count=n, kernel_init=NORMAL)(h))
        return nn.Dense(1, kernel_init=NORMAL)(norm(h.mean((1, 2))))


@pytest.mark.slow
def test_gains_after_norms_of_a_depthwise_convolution():
    """A gain of 1 and a shift of 0 change nothing but what they are trained for."""
    options = dict(parametrization=pj.ntp, base=dict(width=64), per="leaf")
    ours, same = (
        limit(lambda width, g=gain: Depthwise(width, g), IMAGES[:2, :2, :2].astype(np.float32), **options) for gain in (True, False)
    )
    np.testing.assert_allclose(ours.nngp, same.nngp, rtol=1e-9)
    for path, k in same.ntk.items():
        np.testing.assert_allclose(ours.ntk[path], k, rtol=1e-9, atol=1e-12)
    # The last gain and shift, of a normalised h and of 1, by hand: h h' is the NNGP, and 1 is 1.
    np.testing.assert_allclose(ours.ntk["['LayerNorm_1']['scale']"], same.nngp, rtol=1e-9)
    np.testing.assert_allclose(ours.ntk["['LayerNorm_1']['bias']"], np.ones((2, 2)), rtol=1e-9)


def test_attention_by_cosines():
    """Cosines of features of one linear layer are those of the examples, so weights are known numbers: by hand."""

    def forward(draw, x, n):
        h = dense(draw, x, n, b=None)
        q = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
        weights = jax.nn.softmax(4 * jnp.einsum("bid,bjd->bij", q, q), -1)
        return dense(draw, jnp.mean(weights @ dense(draw, h, n, b=None), 1), 1, b=None)

    unit = SENTENCES / np.linalg.norm(SENTENCES, axis=-1, keepdims=True)
    weights = np.exp(4 * np.einsum("bid,bjd->bij", unit, unit))
    seen = np.einsum("bij,bjd->bd", weights / weights.sum(-1, keepdims=True), SENTENCES) / 3
    wanted = W**6 * seen @ seen.T / 5
    np.testing.assert_allclose(limit(plain(forward), SENTENCES, ntk=False).nngp, wanted, rtol=1e-6)
