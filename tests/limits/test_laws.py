import functools
import math

import equinox as eqx
import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import paperjax as pj
from paperjax.limits.laws import Law, constant, leaf_laws, normal, orthogonal, truncated_normal, uniform
from paperjax.limits.rounded import unrounded
from paperjax.model import Frozen, Model, as_model, family
from paperjax.trace.initial import read_laws
from tests.zoo import as_users_run_it

INIT = jax.nn.initializers
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
# Of a standard normal cut at ±2: 1 - 4 phi(2) / erf(sqrt(2)), here from the error function of the standard library.
CUT = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
EXACT = dict(rtol=1e-12, atol=1e-15)  # A dozen float64 operations.
SHAPE = (3, 12)  # fan_in 3, fan_out 12, their mean 7.5.


def drawn(fn, x=X, **kwargs):
    """The law of one array that is drawn with a key."""
    return leaf_laws(Model(lambda key, x: {"w": fn(key)}, lambda params, x: x), x, **kwargs)["['w']"]


def pair(key, scale):
    a, b = jax.random.split(key)
    return jnp.concatenate([jax.random.normal(a, (3, 4)), scale * jax.random.normal(b, (3, 4))], axis=1)


def kept(key):
    return jax.random.bernoulli(key, 0.25, SHAPE).astype(jnp.float32)


def step(key, _):
    after, now = jax.random.split(key)
    return after, jax.random.normal(now, (4,))


# The variances are those that the initializers' documentation defines: 1 / fan_in, 2 / fan_in, 2 / (fan_in + fan_out), ...
INITIALIZERS = {
    "lecun_normal": (INIT.lecun_normal(), "truncated_normal", 0.0, 1 / 3),
    "lecun_uniform": (INIT.lecun_uniform(), "uniform", 0.0, 1 / 3),
    "he_normal": (INIT.he_normal(), "truncated_normal", 0.0, 2 / 3),
    "he_uniform": (INIT.he_uniform(), "uniform", 0.0, 2 / 3),
    "glorot_normal": (INIT.glorot_normal(), "truncated_normal", 0.0, 1 / 7.5),
    "glorot_uniform": (INIT.glorot_uniform(), "uniform", 0.0, 1 / 7.5),
    "scaling_normal": (INIT.variance_scaling(0.7, "fan_out", "normal"), "normal", 0.0, 0.7 / 12),
    "scaling_uniform": (INIT.variance_scaling(5.0, "fan_avg", "uniform"), "uniform", 0.0, 5 / 7.5),
    "scaling_truncated": (INIT.variance_scaling(0.1, "fan_in", "truncated_normal"), "truncated_normal", 0.0, 0.1 / 3),
    "normal": (INIT.normal(0.02), "normal", 0.0, 0.02**2),
    "truncated_normal": (INIT.truncated_normal(0.02), "truncated_normal", 0.0, 0.02**2 * CUT),
    # scipy.stats.truncnorm(-1, 3): mean 0.2827861107271541, variance 0.6161417353578291.
    "cut_askew": (
        INIT.truncated_normal(0.5, lower=-1.0, upper=3.0),
        "truncated_normal",
        0.5 * 0.2827861107271541,
        0.25 * 0.6161417353578291,
    ),
    "uniform": (INIT.uniform(0.3), "uniform", 0.15, 0.09 / 12),
    "orthogonal": (INIT.orthogonal(2.0), "orthogonal", 0.0, 4 / 12),
    "zeros": (INIT.zeros, "constant", 0.0, 0.0),
    "ones": (INIT.ones, "constant", 1.0, 0.0),
    "constant": (INIT.constant(0.3), "constant", 0.3, 0.0),
}
DRAWS = {
    "over_root": (lambda key: jax.random.normal(key, SHAPE) * 2.0 / jnp.sqrt(3.0), "normal", 0.0, 4 / 3),
    "over_power": (lambda key: jax.random.normal(key, SHAPE) / 7**0.5, "normal", 0.0, 1 / 7),
    "shifted": (lambda key: 0.1 - 3.0 * jax.random.normal(key, SHAPE), "normal", 0.1, 9.0),
    "computed_scale": (lambda key: jax.random.normal(key, SHAPE) / jnp.sqrt(jnp.prod(jnp.asarray([3, 5]))), "normal", 0.0, 1 / 15),
    "jitted": (jax.jit(lambda key: jax.random.normal(key, SHAPE) * 0.3), "normal", 0.0, 0.09),
    "vmapped": (lambda key: jax.vmap(lambda k: INIT.he_normal()(k, SHAPE))(jax.random.split(key, 5)), "truncated_normal", 0.0, 2 / 3),
    "vmapped_haar": (lambda key: jax.vmap(lambda k: INIT.orthogonal()(k, SHAPE))(jax.random.split(key, 5)), "orthogonal", 0.0, 1 / 12),
    "folded_in": (lambda key: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (4,)))(jnp.arange(5)), "normal", 0.0, 1.0),
    "mapped": (lambda key: jax.lax.map(lambda k: jax.random.uniform(k, (4,)), jax.random.split(key, 5)), "uniform", 0.5, 1 / 12),
    "scanned_index": (
        lambda key: jax.lax.map(lambda i: jax.random.normal(jax.random.fold_in(key, i), (4,)), jnp.arange(5)), "normal", 0.0, 1.0,
    ),
    "scanned_carry": (lambda key: jax.lax.scan(step, key, None, length=5)[1], "normal", 0.0, 1.0),
    "raw_key": (lambda key: jax.random.normal(jax.random.split(jax.random.key_data(key))[1], SHAPE) * 0.1, "normal", 0.0, 0.01),
    "half": (lambda key: jax.random.normal(key, SHAPE, jnp.float16) * jnp.float16(0.1), "normal", 0.0, 0.01),
    "brain": (lambda key: jax.random.normal(key, SHAPE, jnp.bfloat16) * jnp.bfloat16(0.5), "normal", 0.0, 0.25),
    "barrier": (lambda key: jax.lax.optimization_barrier((jnp.ones(3), jax.random.normal(key, (3,))))[1], "normal", 0.0, 1.0),
    "reshaped": (lambda key: jnp.flip(jax.random.normal(key, (2, 18))).T.reshape(SHAPE)[:2], "normal", 0.0, 1.0),
    "sum": (lambda key: jax.random.normal(key, SHAPE) + 2.0 * jax.random.normal(jax.random.fold_in(key, 1), SHAPE), "normal", 0.0, 5.0),
    "doubled": (lambda key: jax.random.normal(key, SHAPE) + jax.random.normal(key, SHAPE), "normal", 0.0, 4.0),
    "doubled_moved": (lambda key: (lambda w: w.T.reshape(36) + w.T.reshape(36))(jax.random.normal(key, SHAPE)), "normal", 0.0, 4.0),
    "fused": (lambda key: pair(key, 1.0), "normal", 0.0, 1.0),
    "unequal_parts": (lambda key: pair(key, 2.0), "other", 0.0, (1 + 4) / 2),
    "branch": (
        lambda key: jax.lax.cond(jnp.asarray(True), lambda k: 2.0 * jax.random.normal(k, (3,)), lambda k: jax.random.uniform(k, (3,)), key),
        "normal", 0.0, 4.0,
    ),
    "padded": (lambda key: jnp.pad(jax.random.normal(key, (3, 4)), ((0, 0), (0, 4))), "other", 0.0, 1 / 2),
    "delta_orthogonal": (lambda key: INIT.delta_orthogonal()(key, (3, 3, 2, 4)), "other", 0.0, 1 / 4 / 9),
    "masked": (lambda key: jax.random.normal(key, SHAPE) * kept(jax.random.fold_in(key, 1)), "other", 0.0, 0.25),
    "signs": (lambda key: jax.random.rademacher(key, SHAPE, jnp.float32) * 0.5, "other", 0.0, 0.25),
    "square": (lambda key: jax.random.normal(key, SHAPE) ** 2, "other", 1.0, 2.0),
    "half_normal": (lambda key: jnp.abs(jax.random.normal(key, SHAPE)), "other", math.sqrt(2 / math.pi), 1 - 2 / math.pi),
    "exactly_zero": (lambda key: jax.random.normal(key, SHAPE) * 0.0, "constant", 0.0, 0.0),
    "qr": (
        lambda key: (lambda q, r: q * jnp.sign(jnp.diagonal(r))[None])(*jnp.linalg.qr(jax.random.normal(key, (5, 4)))),
        "orthogonal", 0.0, 1 / 5,
    ),
}  # fmt: skip
TABLE = {name: (lambda key, init=init: init(key, SHAPE), *rest) for name, (init, *rest) in INITIALIZERS.items()} | DRAWS


@pytest.mark.parametrize("name", TABLE)
def test_laws_are_those_of_the_closed_forms(name):
    fn, kind, mean, variance = TABLE[name]
    law = drawn(fn)
    assert law.kind == kind
    np.testing.assert_allclose((law.mean, law.variance), (mean, variance), **EXACT)
    assert law.gaussian == (kind in ("normal", "constant"))
    assert law.detail


@pytest.mark.parametrize("name", ["laplace", "exponential", "gumbel", "logistic"])
def test_functions_of_one_draw_have_their_moments_by_quadrature(name):
    mean, variance = {
        "laplace": (0.0, 2.0), "exponential": (1.0, 1.0), "gumbel": (np.euler_gamma, math.pi**2 / 6), "logistic": (0.0, math.pi**2 / 3),
    }[name]  # fmt: skip
    law = drawn(lambda key: getattr(jax.random, name)(key, SHAPE))
    assert law.kind == "other"
    assert not law.gaussian
    np.testing.assert_allclose((law.mean, law.variance), (mean, variance), rtol=1e-9, atol=1e-9)  # What the docstring promises.


def test_kinks_and_jumps_are_met_as_well_as_promised():
    clipped = drawn(lambda key: jnp.clip(jax.random.normal(key, SHAPE), -1.3, 1.3))
    # E min(Z², c²) = erf(c / sqrt 2) - 2 c phi(c) + c² (1 - erf(c / sqrt 2)).
    c, inside = 1.3, math.erf(1.3 / math.sqrt(2))
    expected = inside - 2 * c * math.exp(-c * c / 2) / math.sqrt(2 * math.pi) + c * c * (1 - inside)
    np.testing.assert_allclose((clipped.mean, clipped.variance), (0.0, expected), rtol=1e-5, atol=1e-12)
    steps = drawn(lambda key: jnp.floor(10.0 * jax.random.uniform(key, SHAPE)))
    np.testing.assert_allclose((steps.mean, steps.variance), (4.5, 99 / 12), rtol=1e-3)  # The uniform law on 0, ..., 9.


@pytest.mark.parametrize("name", ["lecun_normal", "he_uniform", "scaling_normal", "cut_askew"])
def test_laws_in_double_precision_are_the_same(name, x64):
    fn, kind, mean, variance = TABLE[name]
    law = drawn(lambda key: fn(key).astype(jnp.float64))
    assert law.kind == kind
    np.testing.assert_allclose((law.mean, law.variance), (mean, variance), **EXACT)
    wide = drawn(lambda key: jax.random.normal(key, SHAPE, jnp.float64) / 7**0.5)
    np.testing.assert_allclose(wide.variance, 1 / 7, **EXACT)


@pytest.mark.parametrize("name", [*INITIALIZERS, "shifted", "over_root", "square", "half_normal", "vmapped"])
def test_laws_are_those_that_the_trace_reads_from_quantiles(name):
    # Another reader of the same jaxpr: 4096 bit patterns in place of the draws, whose outermost ones are at 3.7 standard deviations.
    fn, _, mean, variance = TABLE[name]
    (law,) = read_laws(jax.make_jaxpr(lambda key, x: fn(key))(jax.random.key(0), X), 1)
    np.testing.assert_allclose((law.mean, law.std), (mean, math.sqrt(variance)), rtol=1e-2, atol=1e-3)


def test_moments_are_those_of_samples():
    names = ["lecun_normal", "glorot_uniform", "cut_askew", "orthogonal", "shifted", "sum", "unequal_parts", "masked", "square", "uniform"]
    laws = {name: drawn(TABLE[name][0]) for name in names}
    keys = jax.random.split(jax.random.key(3), 2000)
    entries = jax.jit(lambda keys: {name: jax.vmap(TABLE[name][0])(keys) for name in names})(keys)
    for name, law in laws.items():
        sample = np.asarray(entries[name], np.float64).ravel()
        # 4.5 standard errors; the fourth moment is the sample's.
        error = sample.std() / math.sqrt(sample.size)
        assert abs(sample.mean() - law.mean) < 4.5 * error, name
        deviation = (sample - law.mean) ** 2
        assert abs(deviation.mean() - law.variance) < 4.5 * deviation.std() / math.sqrt(sample.size), name


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return nn.Dense(3)(h), None


class Scanned(nn.Module):
    split: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": self.split}, length=4)()(x, None)[0]


IMAGES, TOKENS = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
CHANNELS = jax.ShapeDtypeStruct((1, 3, 4, 4), jnp.float32)
ZERO = ("constant", 0.0)
# Flax's defaults are lecun_normal, and N(0, 1 / features) for embeddings; Equinox's are uniform on ±1 / sqrt(fan_in), N(0, 1) there.
NETWORKS = {
    "linen.Dense": (nn.Dense(4), X, {"['bias']": ZERO, "['kernel']": ("truncated_normal", 1 / 3)}),
    "linen.scan": (
        Scanned(), X, {f"['ScanBlock_0']['Dense_0']['{k}']": v for k, v in (("bias", ZERO), ("kernel", ("truncated_normal", 1 / 3)))},
    ),
    "linen.LayerNorm": (nn.LayerNorm(), X, {"['bias']": ZERO, "['scale']": ("constant", 0.0)}),
    "nnx.Linear": (lambda rngs: nnx.Linear(3, 4, rngs=rngs), X, {"['bias']": ZERO, "['kernel']": ("truncated_normal", 1 / 3)}),
    "nnx.Conv": (
        lambda rngs: nnx.Conv(3, 4, (3, 3), rngs=rngs), IMAGES, {"['bias']": ZERO, "['kernel']": ("truncated_normal", 1 / 27)},
    ),
    "nnx.Embed": (lambda rngs: nnx.Embed(10, 4, rngs=rngs), TOKENS, {"['embedding']": ("normal", 1 / 4)}),
    "eqx.Linear": (lambda key: eqx.nn.Linear(3, 4, key=key), X, {".weight": ("uniform", 1 / 9), ".bias": ("uniform", 1 / 9)}),
    "eqx.Conv2d": (
        lambda key: eqx.nn.Conv2d(3, 4, 3, key=key), CHANNELS, {".weight": ("uniform", 1 / 81), ".bias": ("uniform", 1 / 81)},
    ),
    "eqx.Embedding": (lambda key: eqx.nn.Embedding(10, 4, key=key), TOKENS, {".weight": ("normal", 1.0)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_defaults_of_the_libraries(name):
    network, x, expected = NETWORKS[name]
    laws = leaf_laws(as_model(network), x)
    assert {path: law.kind for path, law in laws.items()} == {path: kind for path, (kind, _) in expected.items()}
    for path, (_, variance) in expected.items():
        np.testing.assert_allclose(laws[path].variance, variance, **EXACT)


@pytest.mark.parametrize(("scheme", "variances"), [(pj.ntp, (1 / 3, 1 / 64, 1 / 64)), (pj.mup, (1 / 3, 1 / 192, 1 / (64 * 9)))])
def test_a_plan_scales_the_laws(scheme, variances):
    # NTP draws at every width as at the base (its multiplier is n^-1/2), muP draws hidden weights with n^-1/2 and the readout with n^-1:
    # Tensor Programs V (arXiv 2203.03466), Table 3.
    net = family(lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(1)]), X)
    laws = leaf_laws(pj.plan(net, scheme, base={"width": 64}, target={"width": 192}).model, X)
    found = [laws[f"['layers_{i}']['kernel']"] for i in (0, 2, 4)]
    assert {law.kind for law in found} == {"truncated_normal"}
    np.testing.assert_allclose([law.variance for law in found], variances, **EXACT)


def test_given_numbers_are_told_from_one_number():
    def init(key, x):
        table = np.arange(4, dtype=np.float32)
        return {"eye": jnp.eye(3), "one": jnp.sum(jnp.ones(4)) * jnp.ones(5), "pos": jnp.sin(jnp.arange(6.0)), "table": jnp.asarray(table)}

    laws = leaf_laws(Model(init, None), X)
    assert {path: law.kind for path, law in laws.items()} == {
        "['eye']": "given", "['one']": "constant", "['pos']": "given", "['table']": "given",
    }  # fmt: skip
    assert laws["['one']"].mean == 4.0
    assert math.isnan(laws["['eye']"].variance)
    assert not laws["['eye']"].gaussian


def test_frozen_leaves_have_laws_and_integers_have_none():
    laws = leaf_laws(Model(lambda key, x: {"a": Frozen(jax.random.normal(key, (3,))), "n": jnp.arange(3)}, None), X)
    assert list(laws) == ["['a'].value"]
    assert laws["['a'].value"].kind == "normal"


def test_parts_of_one_draw_are_independent_leaves():
    laws = leaf_laws(Model(lambda key, x: dict(zip("qkv", jnp.split(jax.random.normal(key, (3, 6)), 3, axis=1))), None), X)
    assert {law.kind for law in laws.values()} == {"normal"}


def test_different_parts_are_both_named():
    assert drawn(lambda key: pair(key, 2.0)).detail == "parts with laws of their own: normal of variance 1; normal of variance 4"


def test_nothing_of_a_leafs_size_is_allocated():
    # 4 TB of parameters.
    law = drawn(lambda key: INIT.he_normal()(key, (1_000_000, 1_000_000)) * jnp.ones((1, 1)))
    np.testing.assert_allclose(law.variance, 2e-6, **EXACT)


def norm(key):
    w = jax.random.normal(key, SHAPE)
    return w / jnp.linalg.norm(w)


UNREAD = {
    "spectral": (norm, "reduce_sum"),
    "heavy tails": (lambda key: jax.random.cauchy(key, SHAPE), "tan of uniform"),
    "pole": (lambda key: 1.0 / jax.random.normal(key, SHAPE), "may have no variance"),
    "gamma": (lambda key: jax.random.gamma(key, 2.0, SHAPE), "random_gamma"),
    "while": (lambda key: jax.lax.while_loop(lambda w: w[0, 0] < 0, lambda w: -w, jax.random.normal(key, SHAPE)), "while"),
    "unequal scales": (lambda key: jax.random.normal(key, SHAPE) * jnp.arange(1.0, 13.0)[None], "differ from entry to entry"),
    "one random gain": (lambda key: jax.random.normal(key, SHAPE) * jax.random.normal(jax.random.fold_in(key, 1)), "repeat one draw"),
    "broadcast": (lambda key: jnp.broadcast_to(jax.random.normal(key, (1, 12)), SHAPE), "repeat one draw"),
    "one key in vmap": (lambda key: jax.vmap(lambda s: s * jax.random.normal(key, (3,)))(jnp.ones(4)), "repeat one draw"),
    "one key in scan": (lambda key: jax.lax.map(lambda s: s * jax.random.normal(key, (3,)), jnp.ones(4)), "repeat one draw"),
    "joined twice": (lambda key: jnp.concatenate([jax.random.normal(key, (3, 4))] * 2), "repeat one draw"),
    "nan": (lambda key: jnp.full(SHAPE, jnp.nan), "every entry is nan"),
    "complex": (lambda key: jax.random.normal(key, SHAPE, jnp.complex64), "complex"),
    "not Haar": (lambda key: jnp.linalg.qr(jax.random.uniform(key, (4, 4)))[0], "qr of entries that are not normal"),
    "triangle": (lambda key: jnp.linalg.qr(jax.random.normal(key, (4, 4)))[1], "triangle"),
    "symmetric": (lambda key: (lambda w: w + w.T)(jax.random.normal(key, (3, 3))), "add of draws that depend on each other"),
    "neighbours": (lambda key: (lambda w: w[1:] + w[:-1])(jax.random.normal(key, (4,))), "add of draws that depend on each other"),
    "every step": (
        lambda key: (lambda w: jax.lax.map(lambda row: row + w[0], w))(jax.random.normal(key, (4, 4))), "add of draws that depend on each",
    ),
    "correlated": (
        lambda key: (lambda w: w * jax.lax.erf_inv(jax.random.uniform(key, SHAPE) - 0.5))(jax.random.normal(key, SHAPE)), "depend on each",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_refused_with_the_way_out(name):
    fn, why = UNREAD[name]
    with pytest.raises(ValueError, match="1 of the 1 leaves cannot be taken from init") as caught:
        drawn(fn)
    assert why in str(caught.value)
    told = str(caught.value).split("laws=")[1].split("}")[0] + "}"
    declared = eval(told, {"pj": type("pj", (), {"limits": type("limits", (), {"normal": staticmethod(normal)})})})
    law = drawn(fn, declared=declared)
    assert law.kind == "normal"
    assert law.variance > 0


def test_every_unread_leaf_is_listed():
    def init(key, x):
        return {"a": norm(key), "b": x.mean(axis=0), "c": jnp.ones(3)}

    with pytest.raises(ValueError, match=r"2 of the 3 leaves") as caught:
        leaf_laws(Model(init, None), X)
    assert "['a'] (3, 12): reduce_sum" in str(caught.value)
    assert "['b'] (3,): it depends on the batch" in str(caught.value)
    assert "{\"['a']\": pj.limits.normal(1 / 3), \"['b']\": pj.limits.normal(1.0)}" in str(caught.value)


def test_leaves_of_one_key_are_refused():
    model = Model(lambda key, x: {"a": jax.random.normal(key, SHAPE), "b": jax.random.normal(key, (3,))}, None)
    with pytest.raises(ValueError, match=r"\['a'\] \(3, 12\): drawn with the same key as \['b'\]"):
        leaf_laws(model, X)
    laws = leaf_laws(model, X, declared={"['b']": normal(1.0)})
    assert [law.kind for law in laws.values()] == ["normal", "normal"]
    with pytest.raises(ValueError, match="repeat one draw"):
        leaf_laws(as_model(Scanned(split=False)), X)


def normals(key, *shape):
    return jax.random.normal(key, shape)


def each(keys):
    return jax.vmap(lambda key: normals(key, 6))(keys)


def in_a_scan(key):
    return jax.lax.scan(lambda key, _: (jax.random.split(key)[0], normals(jax.random.split(key)[1], 6)), key, length=4)[1]


split, fold = jax.random.split, jax.random.fold_in
# Of JAX 0.10.2: all of these pairs hold equal numbers.
ONE_KEY = {
    "splits in two and in three": lambda key: (normals(split(key)[1], 6), normals(split(key, 3)[1], 6)),
    "a split and a number folded in": lambda key: (normals(split(key)[1], 6), normals(fold(key, 1), 6)),
    "a split of a split": lambda key: (normals(split(split(key)[1], 5)[2], 6), normals(fold(fold(key, 1), 2), 6)),
    "a table of splits": lambda key: (normals(split(key, (2, 3))[1, 0], 6), normals(fold(key, 3), 6)),
    "numbers folded in by vmap": lambda key: (each(jax.vmap(lambda i: fold(key, i))(jnp.arange(3))), normals(split(key)[1], 6)),
    "some of many": lambda key: (each(split(key, 3)), each(split(key, 5)[2:])),
    "all steps of a map": lambda key: (jax.lax.map(lambda k: normals(k, 6), split(key, 3)), normals(fold(key, 1), 6)),
    "the first step of a scan": lambda key: (in_a_scan(key), normals(split(key, 3)[1], 6)),
    "a clone": lambda key: (normals(key, 6), normals(jax.random.clone(key), 6)),
    "the numbers of a key": lambda key: (normals(key, 6), normals(jax.random.wrap_key_data(jax.random.key_data(key)), 6)),
    "a key of the old kind": lambda key: (normals(split(jax.random.key(3))[1], 6), normals(split(jax.random.PRNGKey(3))[1], 6)),
    "an array and a row of it": lambda key: (lambda w: (w, w[1]))(normals(key, 4, 6)),
    "rows that overlap": lambda key: (lambda w: (w[:3], w[1:]))(normals(key, 4, 6)),
    "a row, and every other one": lambda key: (lambda w: (w[2], w[::2]))(normals(key, 4, 6)),
    "a row, and it after a transpose": lambda key: (lambda w: (w[2], w.T[:, 2]))(normals(key, 4, 6)),
    "a row, and a row of a list": lambda key: (lambda w: (w[1], jnp.stack([normals(fold(key, 7), 6), w[1]])[1]))(normals(key, 4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_KEY)
def test_one_key_is_known_however_it_was_made(name):
    one, other = (np.asarray(w).ravel() for w in ONE_KEY[name](jax.random.key(0)))
    assert np.isin(one, other).any()
    with pytest.raises(ValueError, match=r"(?s)\['a'\].*drawn with the same key as \['b'\], so they are not independent"):
        leaf_laws(Model(lambda key, x: dict(zip("ab", ONE_KEY[name](key))), None), X)


APART = {
    "children of children": lambda key: (normals(split(split(key)[0])[0], 6), normals(split(split(key)[1])[0], 6)),
    "a key and its child": lambda key: (normals(key, 6), normals(split(key)[0], 6)),
    "some and the others": lambda key: (lambda keys: (each(keys[:2]), normals(keys[2], 6)))(split(key, 3)),
    "rows": lambda key: (lambda w: (w[1], w[2]))(normals(key, 4, 6)),
    "every other row": lambda key: (lambda w: (w[::2], w[1::2]))(normals(key, 4, 6)),
    "parts of parts": lambda key: (lambda w: (w[2][:3], w[2][3:]))(normals(key, 4, 6)),
    "a chain, in a scan": lambda key: (in_a_scan(split(key)[0]), normals(split(key)[1], 6)),
    "rows that are added": lambda key: (lambda w: (w[0], w[1] + normals(fold(key, 1), 6)))(normals(key, 4, 6)),
}


@pytest.mark.parametrize("name", APART)
def test_other_keys_and_parts_are_independent(name):
    one, other = (np.asarray(w).ravel() for w in APART[name](jax.random.key(0)))
    assert not np.isin(one, other).any()
    laws = leaf_laws(Model(lambda key, x: dict(zip("ab", APART[name](key))), None), X)
    assert [law.kind for law in laws.values()] == ["normal", "normal"]


def test_declared_laws_are_checked():
    model = as_model(nn.Dense(4))
    assert leaf_laws(model, X, {"['kernel']": normal(0.5)})["['kernel']"] == normal(0.5)
    with pytest.raises(ValueError, match=r"Did you mean .*kernel"):
        leaf_laws(model, X, {"['kernl']": normal(0.5)})
    with as_users_run_it(), pytest.raises(TypeError, match=r"must be a law"):
        leaf_laws(model, X, {"['kernel']": 0.5})
    with as_users_run_it(), pytest.raises(TypeError, match=r"give \{path: law\}"):
        leaf_laws(model, X, [normal(0.5)])
    with as_users_run_it(), pytest.raises(TypeError, match=r"takes a Model, not a Dense"):
        leaf_laws(nn.Dense(4), X)
    with as_users_run_it(), pytest.raises(TypeError, match=r"variance = True is no number"):
        normal(True)


def test_constructors_are_the_laws_that_are_read():
    for name, law in {
        "scaling_normal": normal(0.7 / 12), "uniform": uniform(0.0, 0.3), "cut_askew": truncated_normal(scale=0.5, low=-1.0, high=3.0),
        "lecun_normal": truncated_normal(variance=1 / 3), "orthogonal": orthogonal(2.0, 12), "constant": constant(0.3),
    }.items():  # fmt: skip
        read = drawn(TABLE[name][0])
        assert (read.kind, read.detail) == (law.kind, law.detail)
        np.testing.assert_allclose((read.mean, read.variance), (law.mean, law.variance), **EXACT)
    np.testing.assert_allclose(truncated_normal(scale=1.0).std, 0.87962566103423978, **EXACT)  # The constant of jax.nn.initializers.
    np.testing.assert_allclose(truncated_normal(scale=1.0, low=0.0, high=math.inf).mean, math.sqrt(2 / math.pi), **EXACT)
    np.testing.assert_allclose(truncated_normal(scale=1.0, low=-math.inf, high=math.inf).variance, 1.0, **EXACT)
    assert normal(0.0, 2.0) == constant(2.0)


BAD = [
    (lambda: normal(-1.0), ValueError, "variance = -1.0"),
    (lambda: normal(math.nan), ValueError, "variance = nan"),
    (lambda: normal(1.0, math.inf), ValueError, "mean = inf"),
    (lambda: uniform(1.0, 0.0), ValueError, "above"),
    (lambda: truncated_normal(scale=1.0, variance=1.0), ValueError, "one of them"),
    (lambda: truncated_normal(), ValueError, "one of them"),
    (lambda: truncated_normal(scale=-1.0), ValueError, "scale = -1.0"),
    (lambda: truncated_normal(scale=1.0, low=2.0, high=2.0), ValueError, "not below"),
    (lambda: constant(math.nan), ValueError, "value = nan"),
    (lambda: orthogonal(1.0, 0), ValueError, "longer = 0"),
    (lambda: orthogonal(-1.0, 4), ValueError, "gain = -1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_laws_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_law_is_a_tuple_that_knows_whether_it_is_gaussian():
    assert Law("normal", 0.0, 1.0).gaussian
    assert not uniform(-1.0, 1.0).gaussian
    assert uniform(1.0, 1.0).gaussian


@given(st.integers(1, 60), st.integers(1, 4096))
def test_simple_numbers_survive_their_rounding(p, q):
    for number in (p / q, -p / q, math.sqrt(p / q)):
        np.testing.assert_allclose(unrounded(np.float32(number), np.float32), number, rtol=4e-16)
    assert unrounded(np.float64(p / q), np.float64) == p / q


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_no_number_moves_by_more_than_its_rounding(number):
    # One and a half units in the last place, each at most eps.
    np.testing.assert_allclose(unrounded(np.float32(number), np.float32), number, rtol=1.5 * np.finfo(np.float32).eps)


def test_a_symmetric_law_by_quadrature_has_mean_0():
    # Of a Laplace law of scale 1 the variance is 2.
    law = drawn(lambda key: jax.random.laplace(key, SHAPE) / 3**0.5)
    assert (law.kind, law.mean) == ("other", 0.0)
    np.testing.assert_allclose(law.variance, 2 / 3, rtol=1e-9)


def test_of_such_a_law_the_gaussian_needs_consent():
    laplace = lambda key, shape, dtype: jax.random.laplace(key, shape, dtype) / shape[0] ** 0.5  # noqa: E731
    net = lambda width: nn.Sequential([nn.Dense(width, kernel_init=laplace), nn.relu, nn.Dense(1, kernel_init=INIT.normal(0.1))])  # noqa: E731
    limit = functools.partial(pj.limit, net, jnp.ones((1, 3)), ntk=False, progress=False, at=dict(width=64))
    laws = lambda width: {"['layers_2']['kernel']": normal(1 / width)}  # noqa: E731
    with pytest.raises(ValueError, match=r"\['layers_0'\]\['kernel'\] is drawn from no normal law.*gaussian=True"):
        limit(laws=laws)
    # E relu² = q / 2, q = |x|² 2 / 3.
    np.testing.assert_allclose(limit(laws=laws, gaussian=True).nngp, [[1.0]], rtol=1e-6)
