"""Files of kernels: which blocks are there, whose they are, and what is refused."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperjax.kernels import ntk, store
from paperjax.kernels.store import Block, Store, covered
from paperjax.model import Model

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
PARAMS = {"w": np.ones((3, 4), np.float32)}


def of(activation):
    return Model(lambda key, x: None, lambda p, x: activation(x @ p["w"]))


BLOCKS = st.lists(st.builds(Block, st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)), max_size=6)


@given(BLOCKS, BLOCKS, st.booleans())
def test_covered_is_what_cells_say(done, wanted, symmetric):
    cells = np.zeros((10, 10), bool)
    for i, j, h, w in done:
        cells[i : i + h, j : j + w] = True
    cells |= cells.T if symmetric else False
    expected = {block for block in wanted if cells[block.row : block.row + block.height, block.column : block.column + block.width].all()}
    assert covered(done, wanted, symmetric) == expected


def made(folder, every=0.0, what="this", dtype=np.float32):
    form = jax.ShapeDtypeStruct((4, 4), dtype)
    return Store(folder / "note.json", {"k": (folder / "k.npy", form), "l": (folder / "l.npy", form)}, {"numbers": what}, False, every)


def test_blocks_are_noted_at_the_end_and_at_an_error(tmp_path):
    def stopped():
        with made(tmp_path, every=1e6) as first:
            for n in range(2):
                first.arrays["k"][n] = n + 1
                first.finished(Block(n, 0, 1, 4))
            assert len(json.loads((tmp_path / "note.json").read_text())["done"]) == 0, "within the time"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    second = made(tmp_path)
    assert second.missing([Block(0, 0, 2, 4), Block(2, 0, 2, 4)]) == [Block(2, 0, 2, 4)]
    np.testing.assert_array_equal(second.arrays["k"][:, 0], [1, 2, 0, 0])


@pytest.mark.parametrize("files", [(), ("k.npy",)], ids=["before its files", "between its files"])
def test_killed_before_the_first_block(tmp_path, files):
    made(tmp_path)
    for name in {"k.npy", "l.npy"} - set(files):
        (tmp_path / name).unlink()
    assert made(tmp_path).missing([Block(0, 0, 1, 1)])


@pytest.mark.parametrize(
    ("harm", "options", "message"),
    [
        (
            lambda folder: None,
            {"what": "other"},
            r"k\.npy.*holds blocks of another kernel \(numbers differ\).*delete this one and note\.json",
        ),
        (lambda folder: None, {"dtype": np.float64}, r"shapes differ"),
        (lambda folder: (folder / "note.json").write_text("{"), {}, r"note\.json is no note of a kernel's blocks"),
        (lambda folder: (folder / "note.json").write_text('{"done": [[1]]}'), {}, r"is no note"),
        (lambda folder: (folder / "note.json").write_text("[]"), {}, r"is no note"),
        (lambda folder: (folder / "note.json").unlink(), {}, r"k\.npy is there already, without a note"),
        (lambda folder: (folder / "l.npy").unlink(), {}, r"l\.npy is gone or broken"),
        (lambda folder: (folder / "l.npy").write_bytes(b"?"), {}, r"l\.npy is gone or broken"),
        (lambda folder: np.save(folder / "l.npy", np.ones(3)), {}, r"l\.npy holds float64\[3\]"),
    ],
    ids=["another", "dtype", "cut note", "short block", "list", "no note", "file gone", "file cut", "other file"],
)
def test_refused(tmp_path, harm, options, message):
    made(tmp_path).finished(Block(0, 0, 1, 4))
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **options)


def test_no_folder_and_no_room(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        ntk(of(jnp.tanh), PARAMS, X, out=tmp_path / "absent" / "k.npy")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"the kernels take .* GB, and .* has 1e-08 GB free"):
        made(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        (lambda out: ntk(of(jnp.sin), PARAMS, X, out=out), "network"),
        (lambda out: ntk(of(lambda h: jnp.tanh(2 * h)), PARAMS, X, out=out), "network"),
        (lambda out: ntk(of(jnp.tanh), {"w": 2 * PARAMS["w"]}, X, out=out), "numbers"),
        (lambda out: ntk(of(jnp.tanh), PARAMS, X, out=out, weights={"w": 2.0}), "numbers"),
        (lambda out: ntk(of(jnp.tanh), PARAMS, X, X + 1, out=out), "numbers, options"),
        (lambda out: ntk(of(jnp.tanh), PARAMS, X, out=out, outputs="trace"), "options, shapes"),
    ],
    ids=["activation", "factor", "parameters", "weights", "second batch", "outputs"],
)
def test_a_file_of_another_kernel_is_refused_by_what_differs(tmp_path, other, differ):
    ntk(of(jnp.tanh), PARAMS, X, out=tmp_path / "k.npy")
    with pytest.raises(ValueError, match=rf"another kernel \({differ} differ\)"):
        other(tmp_path / "k.npy")


NETWORKS = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
import paperjax as pj
from paperjax.kernels.network import read
from paperjax.kernels.store import trace_fingerprint
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.remat(nn.Dense)(8)(jax.nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))
        return nn.Dense(2)(nn.gelu(h) * np.arange(8.0))
x = jnp.ones((2, 6))
for net in (pj.as_model(Net()), pj.models.mlp(8, 2, 2)):
    print(trace_fingerprint(read(net, jax.eval_shape(net.init, jax.random.key(0), x), x).jaxpr))
"""


@pytest.mark.slow
def test_another_process_traces_the_same_network():
    seen = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        seen.append(subprocess.run([sys.executable, "-c", NETWORKS], capture_output=True, text=True, env=environment, check=True).stdout)
    assert seen[0] == seen[1]
    assert len(set(seen[0].split())) == 2
