"""Positions side by side and positions that are set, against the same network with each position by itself."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paperjax as pj
from tests.limits.ntk_networks import plain

limit = functools.partial(pj.limit, progress=False)
X = np.random.default_rng(0).normal(size=(3, 4, 5))
TWO = np.array([2, 0])


def dense(draw, h, n):
    return h @ draw(h.shape[-1], n) / math.sqrt(h.shape[-1])


def network(phi, change, bend=jnp.square):
    """A learned token (1, n) and four positions that are not Gaussian, changed to a list of positions or to all of them, then `phi`."""

    def forward(draw, x, n):
        token, other, h = draw(n), draw(n), bend(dense(draw, x, n))
        made = change(token, other, h)
        if not isinstance(made, list):
            return dense(draw, jnp.mean(phi(made), 1), 1)
        each = [phi(jnp.broadcast_to(position, (len(x), n))) for position in made]
        return dense(draw, sum(each) / len(each), 1)

    return plain(forward)


def normed(h):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True))


def row(token, h):
    return jnp.broadcast_to(token, (len(h), 1, h.shape[-1]))


def of(h, *positions):
    return [h[:, t] for t in positions]


CHANGES = {
    "joined": (lambda c, d, h: jnp.concatenate([row(c, h), h], 1), lambda c, d, h: [c, *of(h, 0, 1, 2, 3)]),
    "joined and cut": (
        lambda c, d, h: jnp.concatenate([h[:, :2], row(c, h), (2 - h)], 1)[:, 1:5],
        lambda c, d, h: [h[:, 1], c, *of((2 - h), 0, 1)],
    ),
    "joined and added to": (
        lambda c, d, h: jnp.concatenate([row(c, h), h], 1) + jnp.stack([c, d, c + d, d, d])[None],
        lambda c, d, h: [2 * c, h[:, 0] + d[None], h[:, 1] + (c + d)[None], h[:, 2] + d[None], h[:, 3] + d[None]],
    ),
    "one set": (lambda c, d, h: h.at[:, 0].set(c), lambda c, d, h: [c, *of(h, 1, 2, 3)]),
    "the last set": (lambda c, d, h: h.at[:, -1].set(c), lambda c, d, h: [*of(h, 0, 1, 2), c]),
    "several set": (lambda c, d, h: h.at[:, TWO].set(jnp.stack([c, d])), lambda c, d, h: [d, h[:, 1], c, h[:, 3]]),
    "set twice": (lambda c, d, h: h.at[:, :3].set(2 - h[:, 1:]).at[:, 1].set(d), lambda c, d, h: [
        2 - h[:, 1], d, 2 - h[:, 3], h[:, 3]]),
    "set to a number": (lambda c, d, h: h.at[:, 1:3].set(0.5), lambda c, d, h: [h[:, 0], 0.5 + 0 * c, 0.5 + 0 * c, h[:, 3]]),
    "a number where nothing is set": (
        lambda c, d, h: jnp.full((len(h), 6, h.shape[-1]), 0.5).at[:, 1:5].set(h),
        lambda c, d, h: [0.5 + 0 * c, *of(h, 0, 1, 2, 3), 0.5 + 0 * c],
    ),
    "out of bounds": (lambda c, d, h: h.at[:, np.array([7, 1])].set(jnp.stack([c, d])), lambda c, d, h: [h[:, 0], d, *of(h, 2, 3)]),
    "a slice set": (
        lambda c, d, h: lax.dynamic_update_slice(h, 2 - h[:, :2], (0, 2, 0)),
        lambda c, d, h: [*of(h, 0, 1), *of((2 - h), 0, 1)],
    ),
    "a slice set beyond the end": (
        lambda c, d, h: lax.dynamic_update_slice(h, 2 - h[:, :2], (0, 3, 0)),
        lambda c, d, h: [*of(h, 0, 1), *of((2 - h), 0, 1)],
    ),
    "set in a loop": (lambda c, d, h: lax.fori_loop(0, 3, lambda i, h: h.at[:, i].set(c), h), lambda c, d, h: [c, c, c, h[:, 3]]),
    "vmapped": (lambda c, d, h: jax.vmap(lambda h: h.at[1].set(c))(h), lambda c, d, h: [h[:, 0], c, *of(h, 2, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_function_of_positions_is_that_of_each(name):
    found, expected = (limit(network(lambda h: 1 + h**3, change), X) for change in CHANGES[name])
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-9)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-9)


def softened(h):
    return jnp.tanh(h) * jnp.sin(h)


@pytest.mark.slow
@pytest.mark.parametrize("phi", [jnp.exp, normed, softened, lambda h: jnp.maximum(h, h / 3 - 0.4)], ids=["exp", "norm", "gate", "max"])
def test_other_functions(phi):
    # A maximum has a break at -0.6, where tanh passes once.
    bend = jnp.sin if phi is softened else jnp.tanh
    found, expected = (limit(network(phi, change, bend), X) for change in CHANGES["several set"])
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-8)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-8)


def test_what_has_no_limit_here_says_so():
    def twice(c, d, h):
        return h.at[:, np.array([1, 1])].set(jnp.stack([c, d]))

    with pytest.raises(NotImplementedError, match="scatter: entries that are set twice"):
        limit(network(jnp.exp, twice), X)

    def forward(draw, x, n):
        h = jax.vmap(lambda h, x: h.at[jnp.argmax(x[:, 0])].set(0.0))(dense(draw, x, n), x)
        return dense(draw, jnp.mean(h, 1), 1)

    with pytest.raises(NotImplementedError, match="scatter: entries are set at positions that the data choose"):
        limit(plain(forward), X)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.at[:, 0].set(0.0),
        lambda y: y.at[:, 0].add(y[:, 1]),
        lambda y: y.at[:, np.array([0, 2])].set(0.0),
        lambda y: lax.dynamic_update_slice(y, jnp.zeros((len(y), 1), y.dtype), (0, 0)),
        lambda y: jnp.zeros((len(y), 4), y.dtype).at[:, 1:].set(y),
    ],
)
def test_some_of_independent_outputs_are_not_set(change):
    with pytest.raises(NotImplementedError, match="some coordinates of an axis of independent ones"):
        limit(plain(lambda draw, x, n: change(dense(draw, jnp.tanh(dense(draw, x, n)), 3))), X[:, 0])


def test_numbers_of_a_network_are_not_rounded_where_it_is_traced_in_single_precision():
    def forward(draw, x, n):
        # JAX keeps such an index as it was first traced, in whole numbers of 32 bits.
        return dense(draw, jnp.mean(jnp.square(dense(draw, x, n)[:, TWO]), 1), 1)

    def after(draw, x, n):
        return dense(draw, jnp.mean(jnp.square(dense(draw, x, n)[:, ::2][:, :2]), 1), 1)

    np.testing.assert_allclose(limit(plain(forward), X).nngp, limit(plain(after), X).nngp, rtol=1e-13)
