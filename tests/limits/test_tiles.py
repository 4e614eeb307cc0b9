"""Kernels of many pairs: tiles against each other, single against double precision, programs used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits import tiles
from tests.limits.ntk_networks import PHIS, B, W, conv, dense, perceptron, plain

RNG = np.random.default_rng(0)
DISTINCT = RNG.normal(size=(5, 784))
DISTINCT *= 28 / np.linalg.norm(DISTINCT, axis=1, keepdims=True)
NEAR = DISTINCT[:1] + 1e-4 * RNG.normal(size=(3, 784))
ROWS = np.concatenate([DISTINCT, DISTINCT[:2], NEAR, -DISTINCT[:1], 0 * DISTINCT[:1]]).astype(np.float32)
"""Repeated, nearly repeated, opposite and zero rows, of so many features that a sum of them in single precision is off by 1e-6."""


@pytest.fixture(scope="module")
def relu():
    return {dtype: pj.limit(plain(perceptron("relu", 3, None)[0]), ROWS, dtype=dtype, progress=False) for dtype in ("float64", "float32")}


@pytest.mark.parametrize("name", ["nngp", "ntk"])
def test_single_precision(relu, name):
    exact, single = np.asarray(getattr(relu["float64"], name)), np.asarray(getattr(relu["float32"], name))
    assert single.dtype == np.float32
    assert np.isfinite(single).all()
    assert np.array_equal(single, single.T)
    # Float32 rounding: the diagonal and pairs that nearly meet are computed in double precision.
    np.testing.assert_allclose(single.diagonal(), exact.diagonal(), rtol=1e-6)
    apart = exact[:10, :10]
    np.testing.assert_allclose(single[:10, :10], apart, atol=1e-6 * apart.max())
    # The angle of almost opposite rows is off by the root of rounding, over the 1e-4 that it is.
    np.testing.assert_allclose(single, exact, atol=1e-5 * exact.max())
    for k, room in ((single, 1e-6), (exact, 1e-13)):
        # Sums of 12 rows of rounding.
        assert np.linalg.eigvalsh(k.astype(np.float64)).min() > -room * k.max()
        # Repeated rows.
        np.testing.assert_allclose(k[5:7], k[:2], atol=room * k.max())


def test_a_program_is_used_again(relu):
    program = relu["float64"].program
    compiled = len(program.made)
    again = pj.limit(program, ROWS[::-1], progress=False)
    assert len(program.made) == compiled
    for name in ("nngp", "ntk"):
        whole = np.asarray(getattr(relu["float64"], name))
        np.testing.assert_allclose(np.asarray(getattr(again, name))[::-1, ::-1], whole, rtol=1e-12, atol=1e-12 * whole.max())


def test_a_program_describes_its_network(relu):
    program = relu["float64"].program
    with pytest.raises(ValueError, match="sizes would describe a network, and a program is one already"):
        pj.limit(program, ROWS, sizes=dict(depth=3))
    with pytest.raises(ValueError, match=r"examples of shape \(5,\), and the program was traced for \(784,\)"):
        pj.limit(program, ROWS[:, :5])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_tiles_are_blocks_of_one_kernel(relu, dtype, monkeypatch):
    whole = relu[dtype]
    # Sides that do not divide the number of rows, and pairs that come back to a tile from another precision.
    monkeypatch.setattr(tiles, "TILE", 5)
    monkeypatch.setattr(tiles, "PAIRS", 3)
    program = pj.limit(plain(perceptron("relu", 3, None)[0]), ROWS, dtype=dtype, progress=False).program
    assert any(key[0].startswith("tile") and program.made[key][0] < len(ROWS) for key in program.made)
    blocks = pj.limit(program, ROWS[:7], ROWS, dtype=dtype, progress=False)
    again = pj.limit(program, ROWS, dtype=dtype, progress=False)
    for name in ("nngp", "ntk"):
        k = np.asarray(getattr(whole, name), np.float64)
        # Rounding; in single precision tiles of two sizes add up in another order, which almost opposite rows show.
        room = (1e-12 if dtype == "float64" else 1e-5) * k.max()
        np.testing.assert_allclose(np.asarray(getattr(again, name)), k, atol=room)
        np.testing.assert_allclose(np.asarray(getattr(blocks, name)), k[:7], atol=room)


@pytest.mark.slow
def test_positions_and_scans_in_single_precision():
    images = RNG.normal(size=(3, 3, 3, 2)).astype(np.float32)
    images[2] = images[0]

    def pooled(draw, x, n):
        return dense(draw, jnp.mean(jax.nn.relu(conv(draw, jax.nn.relu(conv(draw, x, n)), n)), (1, 2)), 1)

    def scanned(draw, x, n):
        h = jax.nn.relu(dense(draw, x.reshape(len(x), -1), n, b=None))
        hidden = draw(4, n, n)
        h, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w * (2 / n) ** 0.5), None), h, hidden)
        return dense(draw, h, 1, b=None)

    for forward in (pooled, scanned):
        exact, single = (pj.limit(plain(forward), images, dtype=dtype, progress=False) for dtype in ("float64", "float32"))
        for name in ("nngp", "ntk"):
            k, got = np.asarray(getattr(exact, name)), np.asarray(getattr(single, name))
            np.testing.assert_allclose(got.diagonal(), k.diagonal(), rtol=1e-6)
            # Float32 rounding of sums over positions.
            np.testing.assert_allclose(got, k, atol=1e-5 * k.max())
            np.testing.assert_allclose(got[2], got[0], atol=1e-6 * k.max())


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("phi", [jnp.sign, lambda u: jnp.where(u > 0, 1.0, 0.0), lambda u: jnp.where(u > 0.5, 1.0, 0.0) - 0.3])
def test_a_jump_makes_no_root_of_single_precision(phi, depth):
    def forward(draw, x, n):
        for _ in range(depth):
            x = phi(dense(draw, x, n, b=None))
        return dense(draw, x, 1, b=None)

    x = np.random.default_rng(0).normal(size=(4, 8))
    x = np.concatenate([x, x + 1e-4 * np.random.default_rng(1).normal(size=x.shape), -x[:1]]).astype("float32")
    exact, single = (
        np.asarray(pj.limit(plain(forward), x, ntk=False, dtype=dtype, progress=False).nngp) for dtype in ("float64", "float32")
    )
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, atol=1e-6 * exact.max())


def test_near_duplicates_in_tiles_that_are_smaller_than_those_of_double_precision_would_be(monkeypatch):
    # Of 3 x 3 tiles of 8 there are too few, so that they are halved, and of 4 x 4 tiles of 6 there are not.
    monkeypatch.setattr(tiles.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(tiles, "TILE", 8)
    monkeypatch.setattr(tiles, "PAIRS", 3)
    monkeypatch.setattr(tiles, "_side", lambda step, pair, *_: 8 if pair[-1].dtype == np.float32 else 6)
    x = (1 + 1e-4 * np.random.default_rng(1).normal(size=(20, 5))).astype(np.float32)
    exact, single = (pj.limit(plain(perceptron("relu", 2, None)[0]), x, dtype=dtype, progress=False) for dtype in ("float64", "float32"))
    for name in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(single, name), getattr(exact, name), rtol=1e-6)


@pytest.mark.parametrize("per", [None, "leaf"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_examples_and_positions_change_places(dtype, per):
    x = RNG.normal(size=(9, 2, 3, 3)).astype(dtype)
    found = pj.limit(plain(lambda draw, x, n: dense(draw, jax.nn.relu(conv(draw, x, n)), 1)), x, dtype=dtype, per=per, progress=False)
    for k in jax.tree.leaves((found.nngp, found.ntk)):
        # Examples with themselves too, exactly.
        assert k.shape == (9, 9, 2, 3, 2, 3)
        assert np.array_equal(k, np.transpose(k, (1, 0, 4, 5, 2, 3)))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["erf", "gelu", "relu", "sin", "exp"])
def test_a_pair_does_not_depend_on_how_many_are_computed_at_once(name, dtype):
    # As many as fill vectors of processors, and more: XLA compiles other code for them than for a few.
    phi = {"gelu": lambda u: jax.nn.gelu(u, approximate=False), "exp": lambda u: jnp.exp(u / 4), "sin": jnp.sin}.get(name) or getattr(
        jax.nn if name == "relu" else jax.lax, name
    )
    x = np.random.default_rng(2).normal(size=(33, 5))
    found = [pj.limit(plain(lambda draw, x, n: dense(draw, phi(dense(draw, x, n)), 1)), x[:1], dtype=dtype, progress=False)]
    found += [pj.limit(found[0].program, x[:n], dtype=dtype, progress=False) for n in (5, 8, 16, 33)]
    pairs = [pj.limit(found[0].program, x[i : i + 1], x[i + 1 : i + 2], dtype=dtype, progress=False) for i in range(4)]
    room = 1e-13 if dtype == "float64" else 1e-6
    for kernel in ("nngp", "ntk"):
        whole = np.asarray(getattr(found[-1], kernel))
        alone = [np.asarray(getattr(pair, kernel))[0, 0] for pair in pairs]
        np.testing.assert_allclose(np.diagonal(whole, 1)[:4], alone, atol=room * whole.max())
        for k in (np.asarray(getattr(some, kernel)) for some in found):
            np.testing.assert_allclose(k, whole[: len(k), : len(k)], atol=room * whole.max())


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("phi", ["erf", "gelu", "sin", "relu"])
def test_functions_of_whole_vectors(phi):
    # Loops long enough for the widest vectors of a processor, in which XLA's own arctangent was wrong once (jaxlib 0.10.2, 512 bits).
    forward, _ = perceptron(phi, 2, B)
    rows = RNG.normal(size=(256, 5))
    ours = pj.limit(plain(forward), rows, progress=False)
    with jax.enable_x64(True):
        recursion = pj.limits.mlp_kernels(rows @ rows.T / 5, depth=2, phi=PHIS[phi][0], weight_variance=W**2, bias_variance=B**2)
        for ours_, theirs in ((ours.nngp, recursion.nngp), (ours.ntk, recursion.ntk)):
            np.testing.assert_allclose(ours_, np.asarray(theirs), rtol=1e-12, atol=1e-12 * np.max(np.asarray(theirs)))
