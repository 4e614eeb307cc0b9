"""The movement of a kernel against Jacobians written out, and against what is known of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.measures import kernel_change, kernel_turn
from paperjax.model import Model
from tests.zoo import blobs

DATA = blobs(n=6, features=4)
X = jnp.asarray(DATA.x_train)


def two(model):
    """Parameters, and others near them."""
    before = model.init(jax.random.key(0), X)
    leaves, tree = jax.tree.flatten(before)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]), before


def gram(model, params, x):
    """The kernel traced over outputs, from the whole Jacobian."""
    jacobians = jax.tree.leaves(jax.jacobian(model.apply)(params, x))
    flat = np.concatenate([np.asarray(j, np.float64).reshape(*j.shape[:2], -1) for j in jacobians], axis=2)
    return np.einsum("nop,mop->nm", flat, flat)


@pytest.mark.parametrize("examples", [pytest.param(64, marks=pytest.mark.slow), 3])
def test_against_jacobians(examples):
    model = pj.models.mlp(5, 2, 2, activation=jnp.tanh)
    after, before = two(model)
    now, start = (gram(model, p, X[:examples]) for p in (after, before))
    change = np.linalg.norm(now - start) / np.linalg.norm(start)
    turn = 1 - np.sum(now * start) / np.linalg.norm(now) / np.linalg.norm(start)
    assert float(kernel_change(model, after, before, DATA, examples)) == pytest.approx(change, rel=1e-5)
    assert float(kernel_turn(model, after, before, DATA, examples)) == pytest.approx(turn, rel=1e-4)


def test_a_linearized_network_keeps_its_kernel():
    model = pj.models.mlp(5, 1, 2, activation=jnp.tanh)
    line = pj.transforms.linearize(model)
    before = line.init(jax.random.key(0), X)
    after = {**before, "trained": jax.tree.map(lambda leaf: leaf + 1, before["trained"])}
    assert float(kernel_change(line, after, before, DATA)) < 1e-6
    assert float(kernel_turn(line, after, before, DATA)) < 1e-12


def test_a_factor_is_no_turn():
    # f = a w x with one input: the kernel is (a² + w²) x x', of one direction.
    model = Model(lambda key, x: jnp.ones(2), lambda p, x: p[0] * p[1] * x[:, 0])
    before, after = jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0])
    assert float(kernel_change(model, after, before, DATA)) == pytest.approx(1.0, rel=1e-6)
    assert float(kernel_turn(model, after, before, DATA)) < 1e-12


def test_in_an_experiment():
    measures = {"change": kernel_change, "turn": kernel_turn}
    experiment = pj.Experiment(
        lambda width: pj.models.mlp(width, 1, 2, activation=jnp.tanh),
        pj.data.Dataset(X, jnp.ones((6, 2)), X, jnp.ones((6, 2)), "ones", "generated"),
        grid=pj.grid(width=4, lr=0.1, seed=2),
        steps=3,
        measure_at=[0, 3],
        measures=measures,
    )
    result = experiment.run(progress=False)
    assert (result.change.isel(step=0) < 1e-6).all()
    assert (result.change.isel(step=1) > 1e-3).all()
    assert (result.turn.isel(step=1) > 0).all()


def test_bad_input():
    model = pj.models.mlp(5, 1, 2)
    after, before = two(model)
    with pytest.raises(ValueError, match="example"):
        kernel_change(model, after, before, DATA, examples=0)
    broken = {**after, "readout": {"w": jnp.full_like(after["readout"]["w"], jnp.nan), "b": after["readout"]["b"]}}
    with pytest.raises(ValueError, match="NaN"):
        kernel_change(model, broken, before, DATA)
