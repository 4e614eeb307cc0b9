"""Features drawn layer by layer have the law of the network's."""

import jax
import jax.numpy as jnp
import numpy as np

from paperjax.papers.gp_bayes import nngp_scale_mixture as paper

NETWORKS, WIDTH = 10_000, 24


def test_features_drawn_from_gram_matrices_have_the_law_of_the_networks():
    """Products of features of two inputs, their mean over units and its square, at a width where they fluctuate."""
    data = paper.inputs(jax.random.key(0))
    x, model = data.x_train[:2], paper.network(WIDTH)

    def drawn(key):
        params = model.init(key, x)
        return model.apply({**params, "readout": {"w": jnp.eye(WIDTH)}}, x)

    def moments(phi_PxN):
        one, other = phi_PxN
        products = jnp.stack([jnp.mean(one**2), jnp.mean(one * other), jnp.mean(other**2)])
        return jnp.concatenate([products, products**2])

    found = []
    for k, of_one in ((1, drawn), (2, lambda key: paper.features(key, x, WIDTH))):
        keys = jax.random.split(jax.random.key(k), NETWORKS)
        found.append(np.asarray(jax.jit(jax.vmap(lambda key, of_one=of_one: moments(of_one(key))))(keys), np.float64))
    error = np.sqrt(sum(m.var(axis=0, ddof=1) / NETWORKS for m in found))
    # Of six numbers none is five standard errors off; an error of a tenth of a mean is seen.
    assert (np.abs(found[0].mean(axis=0) - found[1].mean(axis=0)) < 5 * error).all()
    assert (5 * error[:3] < 0.1 * found[0].mean(axis=0)[:3]).all()
