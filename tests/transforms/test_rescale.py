"""Laws of a network times a number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from paperjax.models import mlp
from paperjax.transforms import center, ensemble, linearize, rescale, taylor
from tests.transforms.compiled import X, ntk, run, start
from tests.zoo import blobs

NETWORK = mlp(5, 2, 2, activation=jnp.tanh)


def test_outputs_scale_as_alpha_and_the_ntk_as_its_square(x64):
    params = start(NETWORK, 0, X)
    model = rescale(NETWORK, -3.0)
    np.testing.assert_allclose(run(model, params, X), -3 * run(NETWORK, params, X), rtol=1e-12)
    np.testing.assert_allclose(ntk(model, params), 9 * ntk(NETWORK, params), rtol=1e-12)


def test_scales_multiply_and_pass_through_linear_transforms(x64):
    params = start(linearize(NETWORK), 1, X)
    np.testing.assert_allclose(
        run(rescale(linearize(NETWORK), 6.0), params, X), run(linearize(rescale(rescale(NETWORK, 2.0), 3.0)), params, X), rtol=1e-12
    )


def test_alpha_may_be_traced_and_leaves_the_dtype_alone():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), NETWORK.init(jax.random.key(0), X.astype("float32")))
    outputs = jax.jit(jax.vmap(lambda alpha: rescale(NETWORK, alpha).apply(params, X.astype(jnp.bfloat16))))(jnp.array([1.0, 2.0]))
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(2 * outputs[0], outputs[1])
    assert rescale(NETWORK, 2).apply(params, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert jax.grad(lambda alpha: jnp.sum(rescale(NETWORK, alpha).apply(params, X.astype(jnp.bfloat16)).astype(float)))(1.0) != 0


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), jnp.array(jnp.nan)])
def test_what_is_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha = (inf|nan).*finite"):
        rescale(NETWORK, alpha)


def test_training_is_lazy_as_alpha_grows(x64):
    """Under gradient flow of the loss over alpha², parameters move as 1 / alpha and f - f_lin vanishes as 1 / alpha (arXiv 1812.07956)."""
    x, y = jnp.asarray(X), jnp.asarray(np.random.default_rng(1).standard_normal((4, 2)))
    at_start = start(center(NETWORK), 2, X)

    @jax.jit
    def trained(alpha):
        def last(model, params):
            f = rescale(model, alpha)

            def step(trained, _):
                gradient = jax.grad(lambda t: jnp.mean((f.apply({**params, "trained": t}, x) - y) ** 2))(trained)
                return jax.tree.map(lambda w, g: w - 0.05 / alpha**2 * g, trained, gradient), None

            t = jax.lax.scan(step, params["trained"], length=200)[0]
            return f.apply({**params, "trained": t}, x), t

        f, theta = last(center(NETWORK), at_start)
        # About zero outputs, the linearised network is centred too: f_lin - f_lin(theta_0).
        f_lin, _ = last(center(linearize(NETWORK)), start(center(linearize(NETWORK)), 2, x))
        moved = sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(at_start["trained"])))
        return jnp.sqrt(moved), jnp.linalg.norm(f - f_lin)

    alphas = np.geomspace(10, 160, 5)
    moved, off = zip(*map(trained, alphas))
    assert abs(np.polyfit(np.log(alphas), np.log(moved), 1)[0] + 1) < 0.05
    assert abs(np.polyfit(np.log(alphas), np.log(off), 1)[0] + 1) < 0.1


def test_in_an_experiment():
    """Scales share a program; each order is one of its own."""

    def net(alpha, order):
        return rescale(ensemble(taylor(center(mlp(3, 1, 1, activation=jnp.tanh)), order), 2), alpha)

    grid = pj.grid(lr=[0.05], alpha=[0.5, 2.0], order=[1, 2])
    result = pj.Experiment(net, blobs(), optimizer=optax.sgd, grid=grid, steps=3, measure_at=[0, 3]).run()
    loss = result.train_loss.squeeze().transpose("alpha", "order", "step").values
    # All start at 0, and then differ.
    assert np.ptp(loss[..., 0]) < 1e-6
    assert np.all(loss[..., -1] < loss[..., 0])
    assert len(np.unique(loss[..., -1])) == 4
