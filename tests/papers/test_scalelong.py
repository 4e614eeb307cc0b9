import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.papers.parametrization.scalelong import law, unet


def test_two_levels_written_out():
    width, k1, k2 = 6, 1.0, 0.7
    x = jax.random.normal(jax.random.key(0), (3, width))
    model = unet(width, 2, 0.7)
    params = model.init(jax.random.key(1), x)

    def run(name, h, i=...):
        w1, w2 = (np.asarray(params[name][part])[i] for part in ("in", "out"))
        return np.maximum(np.asarray(h) @ w1, 0) @ w2

    a1 = run("down", x, 0)
    a2 = run("down", a1, 1)
    inner = run("up", k2 * a2 + run("middle", a2), 1)
    np.testing.assert_allclose(model.apply(params, x), run("up", k1 * a1 + inner, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [1.0, 0.7])
def test_the_law_holds_at_every_width_in_expectation(kappa):
    width, depth, draws = 16, 2, 4000
    x = jnp.ones((1, width))
    model = unet(width, depth, kappa)

    def mean_square(key):
        return jnp.mean(model.apply(model.init(key, x), x) ** 2)

    found = np.asarray(jax.jit(jax.vmap(mean_square))(jax.random.split(jax.random.key(2), draws)))
    assert abs(found.mean() - law(depth, kappa)[0]) < 4 * found.std() / np.sqrt(draws)


def test_scaling_bounds_the_law():
    assert law([2, 12], 1.0).tolist() == [3, 13]
    assert (law(range(1, 40), 0.7) < 1 + 1 / (1 - 0.7**2)).all()
