"""What `limit` is asked: options of a wrong kind, laws that are functions of the width, and programs of another optimizer."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits import asked
from tests.limits.ntk_networks import VECTORS

INIT = nn.initializers.normal(0.5)
# Without the types that tests check at every call, which users do without.
WRONG = {
    "sizes without values": (lambda: asked.named("sizes", ["width"]), TypeError, r"sizes = \['width'\].*sizes=dict\(name=value\)"),
    "a number for a key": (lambda: asked.drawn(0, 100), TypeError, r"key = 0.*jax\.random\.key\(0\)"),
    "half a sample": (lambda: asked.drawn(jax.random.key(0), 100.5), TypeError, r"samples = 100\.5 is no whole number"),
    "memory in words": (lambda: asked.options(None, None, "sgd", True, None, "float64", "1GB"), ValueError, r"max_bytes = '1GB'.*bytes"),
    "a number for a base": (lambda: asked.options(pj.ntp, 64, "sgd", True, None, "float64", None), TypeError, r"base = 64.*base=dict"),
    "several inputs": (lambda: asked.batches({"a": VECTORS}, None), TypeError, r"x1 is a dict.*jnp\.concatenate"),
    "no numbers": (lambda: asked.batches(jax.ShapeDtypeStruct((2, 5), "float32"), None), TypeError, r"x1 is a ShapeDtypeStruct.*numbers"),
    "a mask": (lambda: asked.batches(VECTORS, np.ma.masked_greater(VECTORS, 1.0)), TypeError, r"x2 is a MaskedArray.*x\.filled"),
    "objects": (lambda: asked.batches(VECTORS.astype(object), None), TypeError, r"x1 is of object.*np\.asarray\(x1, np\.float32\)"),
    "no features": (lambda: asked.batches(VECTORS[:, :0], None), ValueError, r"x1 has no features: its shape is \(3, 0\)"),
    "no sizes": (lambda: asked.widths(pj.family(lambda: 0), {}, None, {}), ValueError, r"takes no sizes.*lambda width"),
    "a size that nothing gives": (
        lambda: asked.widths(pj.family(lambda width, heads: 0), {}, ["width"], {}), TypeError, r"heads must be given.*sizes=dict\(heads="
    ),
    "another size": (lambda: asked.declared(lambda wdth: {}, dict(width=4)), TypeError, r"function of wdth, and the sizes are width"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kinds(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_key_of_a_family_is_no_width():
    assert asked.widths(pj.family(lambda width, key: 0), {}, None, {}) == {"width": asked.WIDTH}


class Dropping(eqx.Module):
    layer: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __call__(self, x):
        return self.drop(self.layer(x))


@pytest.mark.parametrize(
    "family",
    [
        lambda width: nn.Sequential([nn.Dense(width), nn.Dropout(0.5, deterministic=False), nn.Dense(1)]),
        lambda width: lambda key: Dropping(eqx.nn.Linear(5, width, key=key), eqx.nn.Dropout(0.5)),
    ],
)
def test_dropout_that_is_on(family):
    with pytest.raises(ValueError, match=r"fails on examples of shape \(5,\).*Switch dropout off.*deterministic=True.*inference="):
        pj.limit(family, VECTORS)


def test_what_is_only_looked_at_is_not_looked_at():
    """A mean over the batch and an order of neurons, on which the output does not depend."""

    def family(width, looks):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                h = nn.relu(nn.Dense(width, kernel_init=INIT)(x))
                if looks:
                    self.sow("intermediates", "mean", h.mean())
                    self.sow("intermediates", "largest", jnp.sort(h)[:, -1])
                return nn.Dense(1, use_bias=False, kernel_init=INIT)(h) / width**0.5

        return Net()

    found, wanted = (pj.limit(lambda width, looks=looks: family(width, looks), VECTORS, wide=["width"]) for looks in (True, False))
    np.testing.assert_array_equal(found.nngp, wanted.nngp)
    np.testing.assert_array_equal(found.ntk, wanted.ntk)


def test_a_depth_of_thousands_is_told_at_once_and_in_few_words():
    def family(width, depth):
        def init(key, x):
            return [jax.random.normal(key, (x.shape[1], width)), *(jax.random.normal(key, (width, width)) for _ in range(depth))]

        return init, lambda params, x: x @ params[0]

    with pytest.raises(ValueError, match=r"the number of leaves changes with width, depth.*sizes=dict\(depth"):
        pj.limit(family, VECTORS)
    with pytest.raises(ValueError, match=r"(?s)The law of 41 of the 41.*and 32 more, so they are not.*and 33 more") as said:
        pj.limit(family, VECTORS, sizes=dict(depth=40))
    assert len(str(said.value)) < 3000


def test_draws_of_a_whole_number_that_is_written_with_a_point():
    assert asked.drawn(jax.random.key(0), 1e3).samples == 125


def test_no_kernel_of_a_program_that_was_read_for_adam():
    def family(width):
        return nn.Sequential([nn.Dense(width, kernel_init=INIT), nn.relu, nn.Dense(1, kernel_init=INIT)])

    program = pj.limit(family, VECTORS, parametrization=pj.ntp, base=dict(width=64), optimizer="adam", ntk=False).program
    with pytest.raises(ValueError, match=r"of gradient descent; Adam.*ntk=False.*read for such an optimizer"):
        pj.limit(program, VECTORS)
    assert pj.limit(program, VECTORS, ntk=False).nngp.shape == (3, 3)
    with pytest.raises(ValueError, match=r"x1 is of int.*was traced for float"):
        pj.limit(program, VECTORS.astype(int), ntk=False)


def standard(width):
    """Entries that ``init`` does not tell of, but for the biases."""

    def unread(key, shape, dtype=jnp.float32):
        return jnp.sort(jax.random.normal(key, shape, dtype), 0)

    return nn.Sequential([nn.Dense(n, kernel_init=unread) if n else nn.relu for n in (width, 0, width, 0, 1)])


def test_variances_that_fall_with_the_width():
    """He's at all layers: the arc-cosine kernel, twice."""
    paths = [f"['layers_{i}']['kernel']" for i in (0, 2, 4)]

    def laws(width):
        return dict(zip(paths, map(pj.limits.normal, (2 / 5, 2 / width, 1 / width))))

    found = pj.limit(standard, VECTORS, laws=laws, ntk=False, progress=False).nngp
    k = 2 / 5 * VECTORS @ VECTORS.T
    for scale in (2, 1):
        size = np.sqrt(np.outer(np.diag(k), np.diag(k)))
        angle = np.arccos(np.clip(k / size, -1, 1))
        k = scale * size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    np.testing.assert_allclose(found, k, rtol=1e-7)
    with pytest.raises(ValueError, match=r"NNGP changes with the width, about as n\^2\.00.*laws=lambda width"):
        pj.limit(standard, VECTORS, laws=laws(1024), ntk=False, progress=False)


def test_a_branch_on_numbers_of_an_example_is_told_as_the_network_s():
    """JAX's error is made of a tracer, not of a text."""

    def apply(params, x):
        return x @ params if x.sum() > 0 else -x @ params

    def family(width):
        return lambda key, x: jax.random.normal(key, (x.shape[-1], width)), apply

    with pytest.raises(TypeError, match=r"the network fails on examples of shape \(5,\).*boolean conversion"):
        pj.limit(family, VECTORS, progress=False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_draws_of_few_levels_are_refused_unless_the_law_that_is_written_is_meant(dtype):
    """Of 4e6 of JAX's half-precision normal numbers the mean is -0.011 (bfloat16) and -0.0018 (float16) standard deviations."""

    def family(width, dtype=dtype):
        kinds = dict(dtype=jnp.float32, param_dtype=dtype)
        return nn.Sequential([nn.Dense(width, kernel_init=INIT, **kinds), nn.relu, nn.Dense(1, **kinds)])

    said = rf"kernel'\] is drawn in {jnp.dtype(dtype)}.*drifts as sqrt\(n\).*param_dtype=jnp\.float32.*gaussian="
    with pytest.raises(ValueError, match=said):
        pj.limit(family, VECTORS, ntk=False, progress=False)
    meant = pj.limit(family, VECTORS, gaussian=True, ntk=False, progress=False).nngp
    fine = pj.limit(lambda width: family(width, jnp.float32), VECTORS, ntk=False, progress=False).nngp
    # The initializer's own numbers, such as 1 / 0.8796, are rounded to the precision.
    np.testing.assert_allclose(meant, fine, rtol=float(jnp.finfo(dtype).eps))


def test_draws_of_few_levels_that_are_made_single_precision_after_that():
    """What is a leaf's dtype does not tell of them."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)

    def family(width):
        return nn.Sequential([nn.Dense(width, kernel_init=draw), nn.relu, nn.Dense(1, kernel_init=INIT)])

    with pytest.raises(ValueError, match=r"layers_0'\]\['kernel'\].*drawn in bfloat16.*made float32 after that; draw in float32"):
        pj.limit(family, VECTORS, ntk=False, progress=False)


def test_a_limit_of_a_function_that_is_compiled():
    def family(width):
        return nn.Sequential([nn.Dense(width, use_bias=False, kernel_init=INIT), nn.relu, nn.Dense(1, use_bias=False, kernel_init=INIT)])

    def of(x):
        return pj.limit(family, x, parametrization=pj.ntp, base=dict(width=64), progress=False)

    x = jnp.asarray(VECTORS, jnp.float32)
    here, compiled, mapped = of(x), jax.jit(of)(x), jax.vmap(of)(x[None])
    for found in (compiled.ntk, mapped.ntk[0]):
        np.testing.assert_allclose(np.asarray(found), np.asarray(here.ntk), rtol=1e-6)
    with jax.disable_jit():
        np.testing.assert_array_equal(np.asarray(of(x).ntk), np.asarray(here.ntk))
    assert isinstance(compiled.program, pj.limits.Program)
    assert [leaf.shape for leaf in jax.tree.leaves(compiled)] == [(3, 3), (3, 3)]


def test_a_law_that_is_not_read_under_a_parametrization():
    kernels = {f"['Dense_{i}']['kernel']": fan for i, fan in ((0, 5), (1, 64))}

    def net(draw):
        class Net(nn.Module):
            width: int

            @nn.compact
            def __call__(self, x):
                for _ in range(2):
                    x = jax.nn.relu(nn.Dense(self.width, kernel_init=draw)(x))
                return nn.Dense(1, kernel_init=nn.initializers.normal(0.1))(x)

        return Net

    def not_read(key, shape, dtype=jnp.float32):
        return jnp.sort(jax.random.normal(key, shape, dtype), 0) / shape[0] ** 0.5

    at = dict(base=dict(width=64), x=VECTORS.astype(np.float32))
    with pytest.raises(ValueError, match=r"could not be followed.*\n.*init_std= are of pj\.plan, not of pj\.limit: give the network under"):
        pj.limit(net(not_read), at["x"], parametrization=pj.ntp, base=at["base"], progress=False)
    # As it says.
    stds = {path: lambda fan_in, fan_out: fan_in**-0.5 for path in kernels}
    planned = lambda width: pj.plan(net(not_read), pj.ntp, target=dict(width=width), init_std=stds, **at).model  # noqa: E731
    ours = pj.limit(planned, at["x"], laws={path: pj.limits.normal(1 / fan) for path, fan in kernels.items()}, progress=False)
    drawn = net(nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
    theirs = pj.limit(drawn, at["x"], parametrization=pj.ntp, base=at["base"], progress=False)
    np.testing.assert_allclose(np.asarray(ours.nngp), np.asarray(theirs.nngp), rtol=1e-6)


def test_biases_that_fade_with_the_width_are_declared_0():
    # Equinox draws all of a layer from +-1/sqrt(fan_in); under the kernel of two layers even a width of 1 << 22 leaves more than 1e-6.
    x, relu = VECTORS / 5, pj.limits.relu.value
    laws = {f".layers[{i}].bias": pj.limits.constant(0.0) for i in (1, 2)}
    ours = pj.limit(lambda width: lambda key: eqx.nn.MLP(5, 1, width, 2, key=key), x, gaussian=True, ntk=False, laws=laws, progress=False)
    with jax.enable_x64(True):
        k = (x @ x.T + 1) / 15
        for _ in range(2):
            q = np.diag(k)
            k = np.asarray(relu(q[:, None], k, q[None])) / 3
    np.testing.assert_allclose(np.asarray(ours.nngp), k, rtol=1e-6)


def test_memory_that_is_written_with_a_point():
    def family(width):
        return nn.Sequential([nn.Dense(width, use_bias=False, kernel_init=INIT), nn.relu, nn.Dense(1, use_bias=False, kernel_init=INIT)])

    little, usual = (pj.limit(family, VECTORS, parametrization=pj.ntp, base=dict(width=64), max_bytes=n) for n in (1e4, None))
    np.testing.assert_array_equal(little.ntk, usual.ntk)
