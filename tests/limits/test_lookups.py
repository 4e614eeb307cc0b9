"""Tables that are looked up beyond their rows: what is there in JAX is there at infinite width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj

ROWS = 5
TOKENS = np.array([[0, 3], [7, 3], [4, 9], [-1, 4], [-8, 2], [-5, 0]])


def networks(looked):
    def family(width):
        def init(key, x):
            one, two = jax.random.split(key)
            return {"table": jax.random.normal(one, (ROWS, width)), "out": jax.random.normal(two, (width, 1))}

        def apply(params, x):
            return jax.nn.relu(looked(params["table"], x)).mean(1) @ params["out"] / params["out"].shape[0] ** 0.5

        return init, apply

    return family


def product(place):
    """Products with one-hot rows, all 0 where there is no such row."""
    return networks(lambda table, x: jax.nn.one_hot(place(x), ROWS) @ table)


WAYS = {
    "brackets": (lambda table, x: table[x], lambda x: jnp.clip(jnp.where(x < 0, x + ROWS, x), 0, ROWS - 1)),
    "clip": (lambda table, x: jnp.take(table, x, 0, mode="clip"), lambda x: jnp.clip(x, 0, ROWS - 1)),
    "wrap": (lambda table, x: jnp.take(table, x, 0, mode="wrap"), lambda x: x % ROWS),
    "fill": (lambda table, x: jnp.take(table, x, 0, mode="fill", fill_value=0.0), lambda x: jnp.where(x < 0, x + ROWS, x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_beyond_the_rows(way):
    looked, place = WAYS[way]
    K, same = pj.limit(networks(looked), TOKENS), pj.limit(product(place), TOKENS)
    np.testing.assert_allclose(K.nngp, same.nngp, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(K.ntk, same.ntk, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("token", [ROWS, -ROWS - 1])
def test_a_token_of_no_row_is_no_number(token):
    family = networks(lambda table, x: jnp.take(table, x, 0))
    with pytest.raises(ValueError, match="a token that its table has no row for"):
        pj.limit(family, np.array([[0, 1], [2, token]]))
    inside = pj.limit(family, TOKENS % ROWS)
    np.testing.assert_array_equal(inside.nngp, pj.limit(networks(lambda table, x: table[x]), TOKENS % ROWS).nngp)


def test_a_table_filled_with_other_numbers_is_refused():
    with pytest.raises(NotImplementedError, match=r"\['table'\].*fills rows beyond the table with 2"):
        pj.limit(networks(lambda table, x: jnp.take(table, x, 0, mode="fill", fill_value=2.0)), TOKENS)
