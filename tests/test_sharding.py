"""Meshes: an Experiment over sweep, data and model is the Experiment on one device; what does not fit or divide is refused."""

import itertools
import subprocess
import sys
from concurrent.futures import Future

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import paperjax as pj
from paperjax import driver
from paperjax.sharding import Uses, fully_sharded, mesh, parse_mesh, placement, tensor_parallel, uses_of
from tests.test_resume import KilledError, kill, stop_at_save
from tests.zoo import as_users_run_it

RNG = np.random.default_rng(0)


def dataset(*shape):
    x = RNG.normal(size=(16, *shape)).astype(np.float32)
    y = RNG.normal(size=(16, 2)).astype(np.float32)
    return pj.data.Dataset(x, y, x[:4], y[:4])


def classes(data):
    labels = [(y[:, 0] > 0).astype(np.int32) for y in (data.y_train, data.y_test)]
    return pj.data.Dataset(data.x_train, labels[0], data.x_test, labels[1])


NETWORKS = {
    "mlp": (lambda width: pj.models.mlp(width, depth=2, outputs=2), dataset(5)),
    "cnn": (lambda width: pj.models.cnn(width, depth=2, outputs=2), dataset(4, 4, 2)),
    "transformer": (lambda width: pj.models.transformer(width, depth=1, heads=2, outputs=2), dataset(3, 4)),
    "classes": (lambda width: pj.models.mlp(width, depth=2, outputs=2), classes(dataset(5))),
}
SMALL = dict(sweep=1, data=1, model=2)


def experiment(name, **fields):
    family, data = NETWORKS[name]
    # Every layout has cells one by one, so that none differs by how many run together.
    return pj.Experiment(
        family, data, optimizer=optax.adam, parametrization=pj.mup, base=dict(width=8),
        grid=pj.grid(width=[16], lr=[1e-3, 1e-2], seed=2), steps=4, batch=8, measure_at=[0, 2, 4],
        loss="cross_entropy" if name == "classes" else "mse", **fields,
    )  # fmt: skip


def run(name, rule=tensor_parallel, **sizes):
    made = mesh(**sizes) if sizes else None
    lanes = min(sizes.get("sweep", 1), 4)
    return losses(experiment(name, mesh=made, sharding=rule, layout=pj.Layout(lanes, 4 // lanes, 1)))


def losses(made):
    # Adam promotes dtypes.
    with as_users_run_it():
        return made.run(progress=False).train_loss.to_numpy()


def agrees(found, reference, exact):
    if exact:
        np.testing.assert_array_equal(found, reference)
    else:
        # Sums over a batch and over a fan-in are added up in another order, four Adam steps long.
        np.testing.assert_allclose(found, reference, rtol=1e-5)


@pytest.mark.parametrize("sizes", [dict(sweep=2), dict(data=2), dict(model=2)], ids=["sweep", "data", "model"])
def test_two_devices_are_one(sizes):
    agrees(run("mlp", **sizes), run("mlp", sweep=1), exact="sweep" in sizes)


def meshes(name):
    """All that fit, and for the networks that take long to compile those of all eight devices: any two sizes meet in one of them."""
    if name == "classes":
        # Integer labels: of interest where scores are divided, too.
        return [(2, 2, 2), (1, 4, 2)]
    least = 1 if name == "mlp" else 8
    return [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if least <= np.prod(sizes) <= 8]


def everything(name):
    """The whole table, in a process with eight devices."""
    reference = run(name, sweep=1)
    for sizes in meshes(name):
        for rule in (tensor_parallel, fully_sharded) if sizes == (2, 2, 2) else (tensor_parallel,):
            agrees(run(name, rule, **dict(zip(("sweep", "data", "model"), sizes))), reference, exact=sizes[1] * sizes[2] == 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_mesh_of_eight_devices(name):
    told = "jax.config.update('jax_num_cpu_devices', 8); jax.config.update('jax_disable_most_optimizations', True)"
    code = f"import jax; {told}\nfrom tests.test_sharding import everything\neverything({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]


def watch(monkeypatch, around=lambda program, args: program(*args)):
    """The compiled training loops of what runs, as they come; `around` calls them."""
    programs, original = [], driver.compile_cells

    def watched(*args):
        compiled = original(*args)
        programs.append(compiled.advance.result())
        done = Future()
        done.set_result(lambda *args: around(programs[-1], args))
        return compiled._replace(advance=done)

    monkeypatch.setattr(driver, "compile_cells", watched)
    return programs


@pytest.mark.parametrize("rule", [tensor_parallel, fully_sharded])
def test_the_old_state_gives_its_memory_to_the_new_one(monkeypatch, rule):
    sizes = []

    def around(program, args):
        state = jax.tree.leaves(args[1])
        sizes.append(sum(leaf.addressable_shards[0].data.nbytes for leaf in state))
        found = jax.block_until_ready(program(*args))
        assert all(leaf.is_deleted() for leaf in state)
        return found

    programs = watch(monkeypatch, around)
    run("mlp", rule, model=2)
    # Parameters, moments and all: a training step needs no second copy of any.
    assert programs[0].memory_analysis().alias_size_in_bytes == sizes[0] > 0


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(self.width)(nn.tanh(nn.Dense(self.width)(x))))


class Net(nn.Module):
    width: int
    layer: type

    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = self.layer(self.width, name=f"layer {n}")(x)
        return nn.Dense(2)(x)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [tensor_parallel, fully_sharded])
def test_layers_that_are_computed_again_on_the_way_back(monkeypatch, rule):
    programs = watch(monkeypatch)

    def of(layer, sizes):
        made = experiment("mlp", mesh=sizes and mesh(**sizes), sharding=rule, layout=pj.Layout(1, 4, 1))
        return losses(made.replace(family=lambda width: Net(width, layer)))

    reference = of(Layer, {"sweep": 1})
    sizes = {"model": 2} if rule is tensor_parallel else {"data": 2}
    agrees(of(Layer, sizes), reference, exact=False)
    agrees(of(nn.remat(Layer), sizes), reference, exact=False)
    kept, again = (program.as_text().count(" tanh(") for program in programs[1:])
    assert again > kept


def test_batches_are_divided_and_nothing_leaves_the_devices(monkeypatch):
    def around(program, args):
        numbers = [jax.device_put(k, program.input_shardings[0][-1]) for k in args[-2:]]
        with jax.transfer_guard("disallow"):
            return program(*args[:-2], *numbers)

    programs = watch(monkeypatch, around)
    run("mlp", data=2)
    # The gradients of each half of a batch are added up over both devices.
    assert "all-reduce" in programs[0].as_text()


@pytest.mark.parametrize("other", [None, dict(sweep=2), dict(data=2)], ids=["none", "sweep", "data"])
def test_a_checkpoint_goes_on_under_another_mesh(monkeypatch, tmp_path, other):
    begun = experiment("mlp", mesh=mesh(model=2), layout=pj.Layout(1, 4, 1), checkpoint=tmp_path, save_every=0)
    with monkeypatch.context() as patch:
        # In the middle of the training of all cells.
        stop_at_save(patch, 2, kill)
        with pytest.raises(KilledError):
            losses(begun)
    found = losses(begun.replace(mesh=None if other is None else mesh(**other)))
    agrees(found, run("mlp"), exact=False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(sweep=4, data=2), r"takes 8 devices, and there are 2.*would fit: data=2; sweep=2.*cpu_devices\(8\)"),
        (dict(sweep=3, data=-1), "takes 3 devices, and there are 2"),
        (dict(sweep=-1, data=-1), "both -1"),
        (dict(model=0), "model = 0"),
        (dict(model=True), "model = True"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh(**sizes)


def test_what_is_left_is_taken():
    assert dict(mesh(data=-1).shape) == {"sweep": 1, "data": len(jax.devices()), "model": 1}


@pytest.mark.parametrize("text", ["sweep", "rows=2", "sweep=a", "sweep=1,sweep=1", ""])
def test_command_lines_that_say_no_mesh(text):
    with pytest.raises(ValueError, match="is not one of sweep=N"):
        parse_mesh(text)


NET = pj.Model(lambda key, x: {"w": jnp.ones((5, 6)), "b": jnp.ones(6)}, lambda p, x: x @ p["w"] + p["b"][None])


@pytest.mark.parametrize(
    ("rule", "batch", "message"),
    [
        (tensor_parallel, 7, r"batch of 7.*data=2.*data=1 would, or a batch of 6"),
        (lambda leaf, sizes: P("model"), None, r"axis 0 of leaf \['w'\] \(5, 6\) over 2 devices.*5 does not divide: 1 would"),
        (lambda leaf, sizes: P("sweep"), None, r"leaf \['b'\] \(6,\).*'sweep' is the cells'"),
        (lambda leaf, sizes: P(None, None, "model"), None, r"specification"),
    ],
    ids=["batch", "axis", "sweep", "rank"],
)
def test_what_does_not_divide(rule, batch, message):
    with pytest.raises(ValueError, match=message):
        placement(mesh(data=2) if batch else mesh(model=2), rule, NET, jnp.ones((8, 5)), batch)


def test_uses_are_the_traces():
    w, b = uses_of(NET, jnp.ones((2, 5)))[::-1]
    assert (w.inside, w.out, b.out) == ((0,), (1,), (0,))


def test_optimizers_follow_their_leaf():
    made = placement(mesh(model=2), tensor_parallel, NET, jnp.ones((8, 5)), None)
    state = jax.eval_shape(optax.adamw(1e-3).init, jax.eval_shape(NET.init, jax.random.key(0), jnp.ones((8, 5))))
    paths = [(jax.tree_util.keystr(path), a.shape) for path, a in jax.tree_util.tree_leaves_with_path(state)]
    where = {path: made.spec(path, shape) for path, shape in paths}
    assert {path: spec for path, spec in where.items() if spec != P()} == {
        "[0].mu['w']": P(None, "model"), "[0].nu['w']": P(None, "model")
    }  # fmt: skip


def test_what_writes_into_a_stream_is_divided_along_its_fan_in():
    uses = uses_of(pj.models.transformer(16, depth=2, heads=2, vocab=8), jnp.zeros((2, 3), int))
    assert {use.path for use in uses if use.writes} == {"['blocks']['down']", "['blocks']['out']", "['embedding']"}
    found = {use.path: tensor_parallel(use, SMALL) for use in uses}
    # Stacked layers, width, heads, units of a head: heads are divided, as Shoeybi et al. (arXiv 1909.08053, section 3) have it.
    heads, units, across = P(None, None, "model"), P(None, None, "model"), P(None, "model")
    assert {path: spec for path, spec in found.items() if spec != P()} == {
        "['blocks']['query']": heads, "['blocks']['key']": heads, "['blocks']['value']": heads, "['blocks']['up']": units,
        "['blocks']['out']": across, "['blocks']['down']": across, "['embedding']": P("model"), "['readout']": P(None, "model"),
    }  # fmt: skip


def test_a_users_network_is_read_alike():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            h = nn.Embed(8, 16)(tokens) + self.param("position", nn.initializers.normal(), (1, 3, 16))
            h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
            h = h + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(h))))
            return nn.Dense(8)(nn.LayerNorm()(h))

    net = Network()
    uses = uses_of(pj.Model(net.init, net.apply), jnp.zeros((2, 3), int))
    writers = {use.path for use in uses if use.writes and use.inside}
    names = ("['Dense_0']['kernel']", "['Embed_0']['embedding']", "['MultiHeadDotProductAttention_0']['out']['kernel']")
    assert writers == {f"['params']{name}" for name in names}


def test_stacked_layers_are_not_divided_by_tensors():
    assert tensor_parallel(Uses("['w']", (4, 3, 8), (1,), (2,), (0,)), SMALL) == P(None, None, "model")
    assert fully_sharded(Uses("['w']", (4, 3, 5), (1,), (2,), (0,)), {**SMALL, "data": 1}) == P(("data", "model"))
