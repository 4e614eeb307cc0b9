"""The reader of compiled programs, on programs of which it is known what they do, and on groups of devices that NumPy makes."""

import doctest
import itertools
import json
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec as P

import paperjax as pj


@pytest.fixture(scope="module")
def hlo(benchmark_module):
    return benchmark_module("scaling_hlo")


def test_examples(hlo):
    assert doctest.testmod(hlo).failed == 0


ROTATE = [(0, 1), (1, 0)]
# On a part (4, 6) of float32 on each of two devices: bytes of the whole array, times a step, bytes sent.
KNOWN = {
    "all-reduce": (lambda a: jax.lax.psum(a, "data"), 96, 1, 96),
    "all-gather": (lambda a: jax.lax.all_gather(a, "data").sum(0) / 2, 192, 1, 96),
    "reduce-scatter": (lambda a: jnp.tile(jax.lax.psum_scatter(a, "data", tiled=True), (2, 1)), 96, 1, 48),
    "all-to-all": (lambda a: jax.lax.all_to_all(a, "data", 0, 0, tiled=True), 96, 1, 48),
    "collective-permute": (lambda a: jax.lax.ppermute(a, "data", ROTATE), 96, 1, 96),
    "three times": (lambda a: jax.lax.scan(lambda b, _: (jax.lax.psum(b, "data") / 2, None), a, length=3)[0], 96, 3, 288),
    "nothing": (lambda a: 2 * a, 0, 0, 0),
}


def compiled(step, mesh, names="data"):
    """The text of a program that takes as many steps as the call says."""
    specs = P(names)

    def steps(a, n):
        # What is outside the loop is no part of a step.
        first = jax.lax.psum(a.sum(), mesh.axis_names) * 0
        return jax.lax.fori_loop(0, n, lambda _, b: step(b), a) + first

    fn = jax.shard_map(steps, mesh=mesh, in_specs=(specs, P()), out_specs=specs, check_vma=False)
    return jax.jit(fn).lower(jax.ShapeDtypeStruct((8, 6), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()


@pytest.mark.parametrize("name", KNOWN)
def test_collectives_of_a_step(hlo, name):
    step, size, times, sent = KNOWN[name]
    program = hlo.parse(compiled(step, pj.mesh(data=2)))
    found = hlo.collectives(program, hlo.step_body(program), {"sweep": 1, "data": 2, "model": 1})
    if not size:
        assert found == []
        return
    kind = name if name in hlo.KINDS else "all-reduce"
    assert {(one.kind, one.axes, one.size) for one in found} == {(kind, ("data",), 2)}
    assert (sum(one.bytes * one.times for one in found), sum(one.times for one in found)) == (size * times, times)
    assert sum(one.sent for one in found) == sent


def axes_found():
    """In a process with eight devices: the axes that are read off a sum over each set of axes, in two orders of the devices."""
    sys.path.insert(0, "benchmarks")
    import scaling_hlo as hlo

    found, sizes = [], {"sweep": 2, "data": 2, "model": 2}
    for names in itertools.chain.from_iterable(itertools.combinations(sizes, n) for n in (1, 2, 3)):
        program = hlo.parse(compiled(lambda a: jax.lax.psum(a, names), pj.mesh(**sizes), tuple(sizes)))  # noqa: B023
        (one,) = hlo.collectives(program, hlo.step_body(program), sizes)
        found.append((list(names), list(one.axes), one.size))
    print(json.dumps(found))


def test_axes_of_a_mesh_of_eight():
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8)\nfrom tests.benchmarks.test_scaling_hlo import axes_found\naxes_found()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    for asked, read, size in json.loads(done.stdout):
        assert (read, size) == (asked, 2 ** len(asked))


def test_products_are_counted_on_one_device(hlo):
    w = jnp.ones((6, 6))

    def step(a):
        # 2 · 4 · 6 · 6 twice in a scan, and once for the product with itself, 2 · 4 · 6 · 4.
        a, _ = jax.lax.scan(lambda b, _: (b @ w, None), a, length=2)
        return a + (a @ a.T).sum()

    program = hlo.parse(compiled(step, pj.mesh(data=2)))
    assert hlo.product_flops(program, hlo.step_body(program)) == 2 * 2 * 4 * 6 * 6 + 2 * 4 * 6 * 4


@st.composite
def reorders(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    return shape, order, draw(st.sampled_from([k for k in range(1, int(np.prod(shape)) + 1) if np.prod(shape) % k == 0]))


@given(reorders())
def test_groups_of_a_reordered_array(hlo, case):
    shape, order, size = case
    expected = np.arange(np.prod(shape)).reshape(shape).transpose(order).reshape(-1, size)
    written = f"[{expected.shape[0]},{size}]<=[{','.join(map(str, shape))}]T({','.join(map(str, order))})"
    for text in (written, "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in expected) + "}"):
        found = hlo.replica_groups(f"replica_groups={text}, use_global_device_ids=true", int(np.prod(shape)))
        np.testing.assert_array_equal(found, expected)


@given(reorders(), st.data())
def test_groups_of_a_mesh(hlo, case, data):
    shape, order, _ = case
    joined = sorted(data.draw(st.sets(st.sampled_from(range(len(shape))), min_size=1)))
    devices = np.arange(np.prod(shape)).reshape([shape[i] for i in np.argsort(order)]).transpose(order)
    assert devices.shape == tuple(shape)
    last = np.moveaxis(devices, joined, range(len(shape) - len(joined), len(shape)))
    expected = last.reshape(-1, int(np.prod([shape[i] for i in joined])))
    axes = ",".join(f"'axis_{i}'={n}" for i, n in enumerate(shape))
    of = ",".join(str(shape[i]) for i in np.argsort(order))
    names = ",".join(f"'axis_{i}'" for i in joined)
    text = f"replica_groups=mesh[{axes}], device_ids=([{of}]T({','.join(map(str, order))})) {{{names}}}, to_apply=%add"
    np.testing.assert_array_equal(hlo.replica_groups(text, int(np.prod(shape))), expected)


def test_groups_of_all(hlo):
    assert hlo.replica_groups("replica_groups={}, to_apply=%add", 4) == [(0, 1, 2, 3)]


LOOP = """HloModule m

%body (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%p), index=0
  LINE
  ROOT %t = (f32[4]{0}) tuple(%r)
}

%cond (p: (f32[4])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[4]) -> (f32[4]) {
  %a = f32[4]{0} parameter(0)
  %t = (f32[4]{0}) tuple(%a)
  ROOT %w = (f32[4]{0}) while(%t), condition=%cond, body=%body
}
"""
GROUPS = "replica_groups={{0,1}}, to_apply=%add"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%r = f32[4]{0} ragged-all-to-all(%g), replica_groups={{0,1}}", "ragged-all-to-all, which is not counted"),
        ("%r = f32[4]{0} all-reduce(%g), replica_groups=spiral(2), to_apply=%add", "not known here: replica_groups=spiral"),
        ("%r = f32[4]{0} all-reduce(%g), replica_groups={{0},{1,2}}, to_apply=%add", r"groups of \[1, 2\] devices"),
        ("%r = (f32[4]{0}) while(%p), condition=%cond, body=%cond", "as long as only a run knows"),
        ("%r = q7[4]{0} add(%g, %g)\n  %s = q7[4]{0} all-reduce(%r), " + GROUPS, "type 'q7'"),
    ],
    ids=["ragged", "spiral", "uneven", "loop", "type"],
)
def test_what_is_not_known_is_refused(hlo, line, message):
    program = hlo.parse(LOOP.replace("LINE", line))
    with pytest.raises(ValueError, match=message):
        hlo.collectives(program, hlo.step_body(program), {"data": 2})


@pytest.mark.parametrize(
    ("line", "bytes_", "kind"),
    [
        ("%s = (f32[4]{0}, f32[8]{0}) all-gather-start(%g), replica_groups=[1,2]<=[2], dimensions={0}\n"
         "  %r = f32[8]{0} all-gather-done(%s)", 32, "all-gather"),
        ("%s = f32[4]{0} all-reduce-start(f32[4]{0} %g), " + GROUPS + "\n  %r = f32[4]{0} all-reduce-done(%s)", 16, "all-reduce"),
        ("%r = (f32[4]{0}, bf16[6]{0}) all-reduce(%g, /*index=1*/%h), " + GROUPS + "\n  %h = bf16[6]{0} parameter(1)", 28, "all-reduce"),
    ],
    ids=["gather", "reduce", "tuple"],
)  # fmt: skip
def test_as_other_compilers_write_it(hlo, line, bytes_, kind):
    """Beginnings and ends apart, as on TPU and GPU; several arrays at once."""
    program = hlo.parse(LOOP.replace("LINE", line))
    assert hlo.collectives(program, hlo.step_body(program), {"data": 2}) == [hlo.Collective(kind, ("data",), 2, bytes_, 1)]


@pytest.mark.parametrize("text", ["", "HloModule m"])
def test_no_program(hlo, text):
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse(text)


def test_no_loop_of_steps(hlo):
    text = jax.jit(lambda a: a + 1).lower(jnp.ones(3)).compile().as_text()
    with pytest.raises(ValueError, match="0 loops of unknown length"):
        hlo.step_body(hlo.parse(text))
