"""Train a model, and give what it outputs after every step: the same numbers are the same trajectory."""

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 10


def trajectory(apply, params, tx, x, y, steps=STEPS):
    """Outputs before each of so many full-batch steps of the mean squared error, and after the last."""

    def step(state, _):
        params, opt = state
        out, back = jax.vjp(lambda p: apply(p, x), params)
        updates, opt = tx.update(back(2 * (out - y) / out.size)[0], opt, params)
        return (jax.tree.map(jnp.add, params, updates), opt), out

    @jax.jit
    def run(params):
        (params, _), outs = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
        return jnp.concatenate([outs, apply(params, x)[None]])

    return np.asarray(run(params))


def distance(ours, theirs):
    """The largest difference relative to how far the outputs moved (so that ten equal steps near the start do not count as agreement)."""
    moved = np.abs(theirs[-1] - theirs[0]).max()
    assert moved > 1e-3 * np.abs(theirs[0]).max() > 0, "nothing was trained"
    return np.abs(ours - theirs).max() / moved
