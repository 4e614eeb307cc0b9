"""The cell against a plain one, and its statistics against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.papers.hyper_meta import ntk_nas_lga as paper


def plain(arch, params, x, width):
    """The same network in NumPy: node by node, row by row."""

    def normalised(h):
        return h / np.sqrt((h**2).sum() / (8 * width) + 1e-5)

    outputs = []
    for image in x.reshape(-1, 8, 8):
        nodes = [image @ params["stem"], *(np.zeros((8, params["stem"].shape[1])) for _ in range(3))]
        for edge, (start, end) in enumerate(paper.EDGES):
            h, operation = nodes[start], arch // 5**edge % 5
            rows = np.concatenate([0 * h[:1], h, 0 * h[:1]])
            if operation == 1:
                nodes[end] = nodes[end] + h
            elif operation == 2:
                nodes[end] = nodes[end] + np.array([rows[r : r + 3].mean(axis=0) for r in range(8)])
            elif operation >= 3:
                taps = (1,) if operation == 3 else (0, 1, 2)
                each = [sum(np.maximum(rows[r + t], 0) @ params["cell"][edge, t] for t in taps) for r in range(8)]
                nodes[end] = nodes[end] + normalised(np.array(each))
        outputs.append(normalised(np.maximum(nodes[3], 0)).mean(axis=0) @ params["readout"])
    return np.array(outputs)


def test_every_operation_on_every_edge():
    x = jax.random.normal(jax.random.key(1), (3, 64))
    params = paper.network(0, 4, 6).init(jax.random.key(0), x)
    apply = jax.jit(lambda arch: paper.network(arch, 4, 6).apply(params, x))
    for arch in paper.draw(20):
        expected = plain(arch, jax.tree.map(np.asarray, params), np.asarray(x), 4)
        np.testing.assert_allclose(apply(jnp.int32(arch)), expected, rtol=1e-4, atol=1e-5)


def test_unused_channels_stay_at_zero():
    x = jax.random.normal(jax.random.key(1), (3, 64))
    model = paper.network(jnp.int32(4 + 5 * 1 + 25 * 2 + 125 * 3 + 625 * 4 + 3125 * 1), 4, 6)
    params = model.init(jax.random.key(0), x)
    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, x) ** 2))(params)
    for tree in (params, gradient):
        for unused in (tree["stem"][:, 4:], tree["readout"][4:], tree["cell"][..., 4:]):
            assert not np.any(unused)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_connected_is_a_path():
    paths = ((2,), (0, 4), (1, 5), (0, 3, 5))
    for chosen in itertools.product((0, 3), repeat=6):
        arch = sum(operation * 5**e for e, operation in enumerate(chosen))
        assert paper.connected(arch) == any(all(chosen[e] for e in path) for path in paths)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=12)
    found = paper.jackknife(np.mean, x)
    assert found.value == pytest.approx(x.mean())
    assert found.stderr == pytest.approx(x.std(ddof=1) / 12**0.5)


def test_other_architectures_are_others():
    assert not set(paper.draw(100)) & set(paper.draw(100, 100))
