"""Kernels at infinite width in files: those in memory, taken up again where a run was stopped, and of no other network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.kernels.store import Store
from paperjax.limits import tiles
from tests.limits.ntk_networks import VECTORS, dense, plain

X = np.random.default_rng(0).normal(size=(9, 5))
limit = functools.partial(pj.limit, progress=False)
FILES = {"nngp.npy", "ntk.npy", "blocks.json"}


def net(draw, x, n, phi=jax.nn.relu):
    return dense(draw, phi(dense(draw, x, n)), 1)


@pytest.fixture(scope="module")
def program():
    return limit(plain(net), X).program


def mesh():
    return jax.make_mesh((2,), ("pairs",))


def agrees(found, wanted):
    for name in ("nngp", "ntk"):
        k = getattr(found, name)
        assert isinstance(k, np.memmap)
        # Tiles of another size round otherwise.
        np.testing.assert_allclose(k, getattr(wanted, name), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("x2", [None, VECTORS], ids=["itself", "another"])
def test_files_hold_what_memory_does(program, tmp_path, x2, dtype):
    wanted = limit(program, X, x2, dtype=dtype)
    found = limit(program, X, x2, dtype=dtype, out=tmp_path / "K")
    assert {path.name for path in (tmp_path / "K").iterdir()} == FILES
    for name in ("nngp", "ntk"):
        stored = np.load(tmp_path / "K" / f"{name}.npy")
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored, getattr(wanted, name))
        np.testing.assert_array_equal(stored, getattr(found, name))


def test_leaves_and_the_covariance_alone(program, tmp_path):
    parts = limit(program, X, out=tmp_path / "leaves", per="leaf").ntk
    wanted = limit(program, X, per="leaf").ntk
    assert set(parts) == set(wanted)
    for path, kernel in parts.items():
        np.testing.assert_array_equal(kernel, wanted[path])
    assert limit(program, X, out=tmp_path / "nngp", ntk=False).ntk is None
    assert {path.name for path in (tmp_path / "nngp").iterdir()} == FILES - {"ntk.npy"}


@pytest.mark.parametrize("first", [None, "mesh"])
def test_taken_up_again_on_another_mesh(tmp_path, monkeypatch, first):
    wanted = limit(plain(net), X)
    monkeypatch.setattr(tiles, "TILE", 2)
    # Notes as they are after a second of tiles.
    monkeypatch.setattr(tiles, "_workers", lambda *args: 1)
    written, finished = [], Store.finished

    def stopping(self, block):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(block)
        finished(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "finished", stopping)
        with pytest.raises(KeyboardInterrupt):
            limit(plain(net), X, out=tmp_path, mesh=mesh() if first else None)
    begun = list(written)
    monkeypatch.setattr(Store, "finished", lambda self, block: (written.append(block), finished(self, block)))
    # Larger tiles, which those that are there may cover in part.
    monkeypatch.setattr(tiles, "TILE", 2 if first else 4)
    agrees(limit(plain(net), X, out=tmp_path, mesh=None if first else mesh()), wanted)
    if first:
        assert not set(begun) & set(written[7:]), "none is computed again"
    # All there: none is computed.
    count = len(written)
    agrees(limit(plain(net), X, out=tmp_path), wanted)
    assert len(written) == count


def test_a_half_filled_file_is_not_taken_for_another_network(program, tmp_path):
    limit(program, X, out=tmp_path)
    others = {
        "network": lambda: limit(plain(functools.partial(net, phi=jnp.tanh)), X, out=tmp_path),
        "examples": lambda: limit(program, X + 1, out=tmp_path),
        "laws": lambda: limit(plain(net), X, out=tmp_path, laws={"[0]": pj.limits.normal(4.0)}),
        "options, shapes": lambda: limit(program, X, out=tmp_path, per="leaf"),
        "shapes": lambda: limit(program, X, out=tmp_path, dtype="float32"),
    }
    for differ, other in others.items():
        with pytest.raises(ValueError, match=rf"holds blocks of another kernel \({differ} differ\).*blocks\.json"):
            other()


def test_refused(program, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        limit(program, X, out=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        limit(program, X, out=tmp_path / "absent" / "K")
    with pytest.raises(ValueError, match="out= is given in a function that is being traced"):
        jax.jit(lambda x: limit(program, x, out=tmp_path / "K").nngp)(jnp.asarray(X))
    with pytest.raises(ValueError, match="out= is not for kernels that are drawn"):
        limit(plain(net), X, key=jax.random.key(0), samples=16, out=tmp_path / "K")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
