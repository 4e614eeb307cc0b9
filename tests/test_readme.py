"""What the README shows, runs: its commands are called by CI, its Python here, at sizes that take seconds."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SMALLER = {
    "steps=500": "steps=2",
    "steps=1000": "steps=2",
    "width=[64, 128, 256]": "width=[4, 8]",
    "width=256": "width=4",
    "lr=pj.logspace(-2, 1, 13)": "lr=pj.logspace(-2, 1, 2)",
    "seed=8": "seed=2",
    "seed=4": "seed=2",
    "target=dict(width=1024, depth=32)": "target=dict(width=128, depth=8)",
    "widths=[64, 128, 256, 512], depth=4": "widths=[4, 8, 16, 32], depth=2",
    "n_train=512, n_test=512": "n_train=16, n_test=16",
}


def small(text):
    for ours, theirs in SMALLER.items():
        text = text.replace(ours, theirs)
    return text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The reader has JAX's default promotion; optax's Adam needs it.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_replacement_is_in_the_readme():
    assert all(any(ours in block for block in BLOCKS) for ours in SMALLER)


@pytest.mark.slow
def test_sweep_and_axes(here):
    names = {}
    exec(small(BLOCKS[0]), names)
    assert dict(names["result"].test_error.sizes) == {"width": 2, "lr": 2, "seed": 2, "step": 11} or names["result"].step.size >= 2
    assert list(names["result"].test_error.dims) == ["width", "lr", "seed", "step"]
    exec(small(BLOCKS[1]), names)


def test_your_network(here):
    import flax.linen as nn
    import jax.numpy as jnp
    from flax import nnx

    class MyFlaxNet(nn.Module):
        width: int
        depth: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.depth):
                x = nn.relu(nn.Dense(self.width)(x))
            return nn.Dense(1)(x)

    class MyNNXNet(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 64, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    names = {"MyFlaxNet": MyFlaxNet, "MyNNXNet": MyNNXNet, "batch": jnp.ones((2, 3))}
    exec("import paperjax as pj\n" + BLOCKS[2], names)
    x = names["batch"]
    params = names["small"].init(jax.random.key(0), x)
    assert names["small"].apply(params, x).shape == (2, 64)


def residual(width, depth):
    """What the reader's network may be where a family is asked for."""
    import flax.linen as nn

    class MyFlaxNet(nn.Module):
        width: int
        depth: int

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(self.width)(x)
            for _ in range(self.depth):
                h = h + nn.Dense(self.width)(nn.relu(h))
            return nn.Dense(1)(h)

    return MyFlaxNet(width, depth)


@pytest.mark.slow
def test_mup(here):
    x = jax.random.normal(jax.random.key(0), (8, 3))
    names = {"batch": x, "data": (x, x[:, :1])}
    exec("import jax, optax, paperjax as pj\n", names)
    names["family"] = names["pj"].family(lambda width, depth: residual(width, depth), x=x)
    exec(small(BLOCKS[3]), names)
    # Width 64 to 128, depth 4 to 8: a hidden weight's Adam learning rate is times 1/2 · 2^-1/2.
    hidden = next(leaf for leaf in names["plan"].leaves if leaf.path == "['Dense_1']['kernel']")
    assert hidden.factors.learning_rate == pytest.approx(2**-1.5)
    names["tx"].init(names["params"])


def test_kernel(here):
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (6, 3))
    names = {"x1": x[:4], "x2": x[4:], "y": x[:4, :2]}
    exec("import jax, paperjax as pj\nmodel = pj.models.mlp(8, 2, 2)", names)
    names["params"] = names["model"].init(jax.random.key(1), x)
    with jax.numpy_rank_promotion("allow"):
        exec(BLOCKS[4].replace("depth=3", "depth=2"), names)
    assert [k.shape for k in names["K"]] == [(4, 4, 2, 2), (2, 4, 2, 2)]
    assert bool(jnp.isfinite(names["f_t"].test).all())
    assert names["limit"].shape == (4, 4)


@pytest.mark.slow
def test_limit(here):
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    names = {"x1": x[:3], "x2": x[3:]}
    exec("import paperjax as pj\n", names)
    names["family"] = names["pj"].family(lambda width, depth: residual(width, depth), x=x)
    exec(BLOCKS[5], names)
    # A residual layer adds half of the second moment of what a ReLU passes of it: (1 + 1/2)^4 for four.
    one = names["pj"].limit(names["family"], x, sizes=dict(depth=4), parametrization=names["pj"].ntp, base=dict(width=64), gaussian=True)
    assert one.nngp.diagonal() == pytest.approx((x**2).sum(1) / 3 * 1.5**4, rel=1e-5)
    assert names["K"].nngp == pytest.approx(one.nngp[:3, 3:])
    assert names["K"].ntk == pytest.approx(one.ntk[:3, 3:])


def test_the_two_commands_are_there():
    for command in ("pip install . && paperjax run intrinsic-dimension", 'pip install ".[test]" && pytest'):
        assert re.search(rf"^{re.escape(command)}$", README, flags=re.MULTILINE)


def test_links_and_pictures_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), f"README.md points to {target}"
