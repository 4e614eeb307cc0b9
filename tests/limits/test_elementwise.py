"""Functions of numbers that are means over a growing axis: what they make of its fluctuations is looked at where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import SENTENCES, VECTORS, W, dense, plain


def repeated_and_summed(m, n):
    return jnp.sum(jnp.broadcast_to(m, (m.shape[0], n)), 1, keepdims=True) / n**0.5


# A mean of zero fluctuates by n^-1/2, and each of these makes that of order 1.
MADE_LARGE = {
    "square": lambda m, n: n * m**2,
    "erf": lambda m, n: n**0.5 * jax.lax.erf(m),
    "exponential": lambda m, n: n**0.5 * jnp.expm1(m),
    "sum over all": repeated_and_summed,
    "product": lambda m, n: m @ jnp.full((1, 1), n**0.5, m.dtype),
}


def network(number, times=False):
    def forward(draw, x, n):
        h = dense(draw, x, n)
        m = number(jnp.mean(h, 1, keepdims=True), n)
        return dense(draw, jax.nn.relu(h) * m if times else jax.nn.relu(h + m), 1)

    return plain(forward)


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("name", MADE_LARGE)
def test_what_makes_fluctuations_large_is_refused(name, times):
    with pytest.raises(ValueError, match=f"what a {'mul' if times else 'add'} takes for its mean.*stays random"):
        pj.limit(network(MADE_LARGE[name], times), VECTORS, progress=False)


def times_entries(draw, h, m, n):
    return jax.nn.relu(h) + m * draw(n)[None]


def added_at(draw, h, m, n):
    return jnp.mean(jnp.broadcast_to(m[:, None], (len(h), 3, n)).at[:, 1].add(h), 1)


def in_every_step(draw, h, m, n):
    # The first pass takes what is carried for Gaussian, and the next finds that it is not.
    def step(h, leaves):
        return jnp.tanh(h @ leaves[0] / n**0.5 + m * leaves[1][None]), None

    return lax.scan(step, h, (draw(7, n, n), draw(7, n)))[0]


@pytest.mark.parametrize(("forward", "what"), [(times_entries, "mul"), (added_at, "scatter-add"), (in_every_step, "mul")])
def test_a_random_number_that_meets_a_leaf_or_positions_is_refused(forward, what):
    def network(draw, x, n):
        h = dense(draw, x, n)
        return dense(draw, forward(draw, h, n**0.5 * jnp.mean(h, 1, keepdims=True), n), 1)

    with pytest.raises(ValueError, match=f"what a {what} takes for its mean.*stays random"):
        pj.limit(plain(network), VECTORS, ntk=False, progress=False)


def test_the_largest_of_several_fluctuates_as_they_do():
    def forward(draw, x, n):
        h = dense(draw, x, n)
        return dense(draw, jax.nn.relu(h[:, 0] + n**0.5 * jnp.max(jnp.mean(h, 2), 1, keepdims=True)), 1)

    with pytest.raises(ValueError, match=r"what a add takes for its mean.*stays random"):
        pj.limit(plain(forward), SENTENCES, progress=False)


def test_functions_that_leave_them_small_are_those_of_the_mean():
    def forward(draw, x, n):
        h = dense(draw, x, n)
        m = jnp.mean(h, 1, keepdims=True)
        return dense(draw, jax.nn.relu(h + jnp.expm1(m)) * jnp.exp(-(m**2)) * (1 + jnp.log1p(m**2)), 1)

    ours = pj.limit(plain(forward), VECTORS, progress=False)
    at_zero = pj.limit(network(lambda m, n: jnp.zeros_like(m)), VECTORS, progress=False)
    np.testing.assert_allclose(ours.nngp, at_zero.nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, at_zero.ntk, rtol=1e-12)


def computed_once(draw, x, n):
    d, h = draw(n)[None], dense(draw, x, n, b=None)
    d, h = jax.nn.silu(d), jax.nn.silu(h) + jnp.tanh(h + jnp.tanh(h))
    return dense(draw, h + d, 1)


def computed_again(draw, x, n):
    d, w = draw(n), draw(x.shape[-1], n)

    def layer():
        return (W / x.shape[-1] ** 0.5) * (x @ w)

    d = d[None] * jax.nn.sigmoid(0.5 * (2 * d)[None])
    h = layer() * jax.nn.sigmoid(layer()) + jnp.tanh(layer() + jnp.tanh(layer()))
    return dense(draw, h + d, 1)


def test_what_is_computed_twice_is_one_value():
    found, expected = (pj.limit(plain(f), VECTORS, progress=False) for f in (computed_again, computed_once))
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-12)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-12)
