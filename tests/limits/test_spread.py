"""Kernels over the devices of a mesh are those of one device; a mesh that does not fit is refused."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits import spread, tiles
from tests.limits.ntk_networks import VECTORS, dense, plain

X = np.random.default_rng(0).normal(size=(9, 5))
limit = functools.partial(pj.limit, progress=False)


def net(draw, x, n):
    return dense(draw, jax.nn.relu(dense(draw, x, n)), 1)


def mesh():
    return jax.make_mesh((2,), ("pairs",))


@pytest.mark.parametrize("x2", [None, VECTORS])
def test_kernels_are_those_of_one_device(x2):
    assert len(jax.local_devices()) == 2
    one, two = limit(plain(net), X, x2), limit(plain(net), X, x2, mesh=mesh())
    for name in ("nngp", "ntk"):
        # Tiles of another size round otherwise.
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-13, atol=1e-14)


def test_tiles_are_computed_on_every_device(monkeypatch):
    seen, part = [], tiles._Made.part

    def spy(self, *args):
        found = part(self, *args)
        seen.append((self.device, *{next(iter(a.devices())) for a in jax.tree.leaves(found[2:4])}))
        return found

    monkeypatch.setattr(tiles._Made, "part", spy)
    limit(plain(net), X, VECTORS, mesh=mesh())
    # Each is compiled with a tile of its own device, and runs there.
    assert {pair for pair in seen if pair[0] is not None} == {(device, device) for device in mesh().devices.flat}


def test_traced_examples_are_refused():
    with pytest.raises(ValueError, match=r"being traced: .* Call limit outside"):
        jax.jit(lambda x: limit(plain(net), x, mesh=mesh()).nngp)(jnp.asarray(X))


@pytest.mark.parametrize("where", ["first", "work", "submit"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_what_goes_wrong_in_a_thread_ends_all_of_them(where, error, monkeypatch):
    done = []

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *args):
            super().submit(*args)
            if where == "submit":
                raise error

    def first():
        if where == "first":
            raise error

    def work(item, own):
        if where == "work" and threading.current_thread() is threading.main_thread():
            raise error
        # What would wait for ever, and the test with it, is told so.
        own.__self__.result(timeout=60)
        done.append(item)

    if where == "submit":
        monkeypatch.setattr(spread, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(error):
        spread.together(work, range(10**6), 3, first)
    assert len(done) < 10**6
