"""What the tests of transforms do to a model, compiled: op by op each would be a compilation of its own."""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from paperjax.model import Model, join, split

X = np.random.default_rng(0).standard_normal((4, 3))


def start(model: Model, seed: int, x: Any) -> Any:
    return jax.jit(lambda key: model.init(key, x))(jax.random.key(seed))


def run(model: Model, params: Any, x: Any) -> Any:
    return jax.jit(model.apply)(params, x)


def moved(params: Any, by: float, seed: int = 1) -> Any:
    """Parameters of a transformed model, its trained ones a way off; given ones as they were."""
    trained, given = split(params)
    flat, unravel = jax.flatten_util.ravel_pytree(trained)
    step = np.random.default_rng(seed).standard_normal(flat.size)
    return join(unravel(flat + jnp.asarray(by * step / np.linalg.norm(step), flat.dtype)), given)


def ntk(model: Model, params: Any) -> np.ndarray:
    trained, given = split(params)
    flat, unravel = jax.flatten_util.ravel_pytree(trained)
    J = jax.jit(jax.jacobian(lambda flat: model.apply(join(unravel(flat), given), X).ravel()))(flat)
    return np.asarray(J @ J.T)
