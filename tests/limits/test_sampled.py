"""Functions sampled by numpy: as JAX has them, with their derivatives; what is not elementwise is left to JAX or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits.sampled import Sampled, rule, sample, slope, tape

POINTS = np.concatenate([np.linspace(-6, 6, 41) + 1e-3, [0.0, 30.0, -30.0]])
INSIDE = np.linspace(-0.9, 0.9, 21) + 1e-3
ABOVE = np.linspace(1.1, 6, 21)
lax = jax.lax
PRIMITIVES = {
    **{
        name: (getattr(lax, name), POINTS)
        for name in (
            *("abs", "ceil", "cbrt", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "floor", "is_finite", "logistic", "neg"),
            *("round", "sign", "sin", "sinh", "square", "tan", "tanh"),
        )
    },
    **{name: (getattr(lax, name), INSIDE) for name in ("acos", "asin", "atanh", "erf_inv", "log1p")},
    **{name: (getattr(lax, name), ABOVE) for name in ("acosh", "lgamma", "digamma", "log", "rsqrt", "sqrt")},
    "asinh": (lax.asinh, POINTS),
    "atan": (lax.atan, POINTS),
    "atan2": (lambda x: lax.atan2(x, 2 - x), POINTS),
    "clamp": (lambda x: lax.clamp(-1.0, x, 2.0), POINTS),
    "comparisons": (
        lambda x: sum(jnp.where(at, i + x, x) for i, at in enumerate([x > 1, x <= 0.5, x >= -2, x < -3, x == 0, x != 0])),
        POINTS,
    ),
    "logic": (lambda x: jnp.where(~((x > 0) & (x < 1) | (x < -2) ^ (x > -4)), x, 3.0), POINTS),
    "max, min": (lambda x: jnp.maximum(x, 0.5) * jnp.minimum(1.0, x), POINTS),
    "div, sub": (lambda x: (1 - x) / (2 + x * x), POINTS),
    "integer_pow": (lambda x: x**7 + (x * x + 1) ** -3, POINTS),
    "pow": (lambda x: lax.pow(x, 1.7), ABOVE),
    "rem": (lambda x: lax.rem(x, 1.5), POINTS),
    "cases": (lambda x: lax.select_n((x > 0).astype(int) + (x > 2).astype(int), x, 2 * x, x * x), POINTS),
    "float32": (lambda x: jnp.tanh(x.astype(jnp.float32)).astype(x.dtype), POINTS),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_are_those_of_jax(name, x64):
    """Within a few roundings, of the value or of the size 1 of what it is the difference of."""
    phi, points = PRIMITIVES[name]
    real = lambda x: phi(x).astype(x.dtype)  # noqa: E731
    found = Sampled(real)
    assert found.elementwise
    assert found.tape is not None
    eps = 2.0**-52 if name != "float32" else 2.0**-22
    np.testing.assert_allclose(found.at(points), jax.jit(real)(points), rtol=16 * eps, atol=16 * eps)


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "mish": jax.nn.mish,
    "checkpointed": jax.checkpoint(lambda h: jnp.tanh(h) * h),
    "clipped": lambda h: jnp.clip(h, -1, 2) ** 3,
    "constant": lambda h: jnp.full_like(h, 2.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_jax(name, x64):
    phi = ACTIVATIONS[name]
    found = Sampled(phi)
    x = jnp.asarray(POINTS)
    # What cancels in each derivative is larger than the one before.
    for order, room in enumerate((4e-15, 4e-14, 4e-13)):
        assert found.tape is not None
        np.testing.assert_allclose(found.at(POINTS), jax.jit(phi)(x), rtol=1e-13, atol=room, err_msg=f"derivative {order}")
        phi, found = slope(phi), found.slope


def test_derivatives_are_remembered():
    found = Sampled(jnp.tanh)
    assert slope(found) is slope(found)
    assert slope(found).slope is found.slope.slope


@pytest.mark.parametrize(
    ("phi", "analytic"),
    [
        (jax.nn.gelu, True),
        (jax.nn.silu, True),
        (lambda h: h**3, True),
        (lambda h: h**-2, False),
        (jax.nn.relu, False),
        (lambda h: jnp.where(h > 0, jnp.tanh(h), h), False),
        (lambda h: jnp.tanh(h.astype(jnp.float32)).astype(h.dtype), False),
    ],
)
def test_what_is_analytic(phi, analytic):
    found = Sampled(phi).tape
    assert found is not None
    assert found.analytic is analytic


def test_what_the_result_does_not_need_is_left_out():
    def phi(h):
        jnp.exp(h)
        return jnp.tanh(h) * jnp.sin(jnp.ones(()))

    found = Sampled(phi).tape
    assert found is not None
    # The sine of 1 is a number.
    assert [step.rule for step in found.steps] == [np.tanh, np.multiply]


def test_what_numpy_has_not_is_left_to_jax(x64):
    phi = lambda h: lax.igamma(2.0 * jnp.ones_like(h), h)  # noqa: E731
    found = Sampled(phi)
    assert found.tape is None
    np.testing.assert_allclose(found.at(ABOVE), phi(jnp.asarray(ABOVE)), rtol=1e-14)
    assert found.at(ABOVE).shape == ABOVE.shape


@pytest.mark.parametrize(
    "phi",
    [
        jax.nn.softmax,
        jnp.cumsum,
        jnp.sum,
        lambda h: h > 0,
        lambda h: (h, h),
        lambda h: h / h.shape[0],
        lambda h: h[::-1],
        lambda h: h + jnp.arange(len(h)).reshape(h.shape),
        lambda h: 2.0,
    ],
)
def test_what_is_not_elementwise(phi):
    assert sample(phi, np.arange(1.0, 5.0)) is None


def test_a_traced_value_inside_is_refused():
    with pytest.raises(TypeError, match="closes over a traced value"):
        jax.jit(lambda a: Sampled(lambda h: jnp.tanh(a * h)).elementwise or a)(2.0)


def test_other_arrays_and_numbers_are_left_to_jax():
    assert tape(jax.make_jaxpr(lambda h: h * jnp.arange(3.0))(jnp.zeros(3))) is None
    (eqn,) = jax.make_jaxpr(lambda h: lax.div(h, jnp.int32(2)))(jnp.int32(3)).eqns
    assert rule(eqn) is None
