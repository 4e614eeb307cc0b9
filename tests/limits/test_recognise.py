"""Spellings that are recognised, and what must not be taken for them; what is recognised is what was given."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from paperjax.limits import Affine, Term, recognise
from paperjax.limits.recognise import base_value
from paperjax.limits.sampled import double, sample

erf = jax.scipy.special.erf
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
ROOT_2 = math.sqrt(2)


def one(base, weight=1.0, scale=1.0):
    return (Term(weight, base, scale),)


SPELLINGS = {
    "constant": (lambda x: 0 * x + 2, Affine((2.0,))),
    "identity": (lambda x: x, Affine((0.0, 1.0))),
    "affine": (lambda x: (x - 1) / 4, Affine((-0.25, 0.25))),
    "cube": (lambda x: x * x * x, Affine((0.0, 0.0, 0.0, 1.0))),
    "hermite": (lambda x: x**3 - 3 * x, Affine((0.0, -3.0, 0.0, 1.0))),
    "octic": (lambda x: 1 - x**2 + 0.001 * x**8, Affine((1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.001))),
    "relu": (jax.nn.relu, Affine((0.0, 0.5), one("signed 1", 0.5))),
    "relu by maximum": (lambda x: jnp.maximum(x, 0) * ROOT_2, Affine((0.0, ROOT_2 / 2), one("signed 1", ROOT_2 / 2))),
    "relu by clip": (lambda x: jnp.clip(x, 0, None), Affine((0.0, 0.5), one("signed 1", 0.5))),
    "relu by abs": (lambda x: (x + jnp.abs(x)) / 2, Affine((0.0, 0.5), one("signed 1", 0.5))),
    "relu by mask": (lambda x: x * (x > 0), Affine((0.0, 0.5), one("signed 1", 0.5))),
    "leaky relu by where": (lambda x: jnp.where(x > 0, x, 0.1 * x), Affine((0.0, 0.55), one("signed 1", 0.45))),
    "leaky relu by maximum": (lambda x: jnp.maximum(x, 0.2 * x), Affine((0.0, 0.6), one("signed 1", 0.4))),
    "abs by sqrt": (lambda x: jnp.sqrt(x * x), Affine((0.0, 0.0), one("signed 1"))),
    "sign": (jnp.sign, Affine((0.0, 0.0), one("signed 0"))),
    "step": (lambda x: (x > 0).astype(x.dtype), Affine((0.5, 0.0), one("signed 0", 0.5))),
    "squared relu": (lambda x: jax.nn.relu(x) ** 2, Affine((0.0, 0.0, 0.5), one("signed 2", 0.5))),
    "cubed relu": (lambda x: 2 * jnp.maximum(x, 0) ** 3, Affine((0.0, 0.0, 0.0, 1.0), one("signed 3"))),
    "x |x|": (lambda x: x * jnp.abs(x), Affine((0.0, 0.0, 0.0), one("signed 2"))),
    "erf": (erf, Affine((0.0, 0.0), one("erf"))),
    "normal distribution": (jax.scipy.special.ndtr, Affine((0.5, 0.0), one("erf", 0.5, 1 / ROOT_2))),
    "gelu": (exact_gelu, Affine((0.0, 0.0), one("gelu"))),
    "gelu by erf": (lambda x: x * 0.5 * (1 + erf(x / ROOT_2)), Affine((0.0, 0.0), one("gelu"))),
    "gelu, scaled": (lambda x: 1.5 * exact_gelu(1.25 * x) + x - 2, Affine((-2.0, 1.0), one("gelu", 1.5, 1.25))),
    "sine": (lambda x: 3 + 2 * jnp.sin(x), Affine((3.0, 0.0), one("sin", 2.0))),
    "shifted sine": (
        lambda x: jnp.sin(7 * x + 0.3),
        Affine((0.0, 0.0), (Term(math.cos(0.3), "sin", 7.0), Term(math.sin(0.3), "cos", 7.0))),
    ),
    "snake": (lambda x: x + jnp.sin(x) ** 2, Affine((0.5, 1.0), one("cos", -0.5, 2.0))),
    "slow cosine": (lambda x: jnp.cos(x / 20), Affine((0.0, 0.0), one("cos", 1.0, 0.05))),
    "exponential": (jnp.exp, Affine((0.0, 0.0), one("exp"))),
    "expm1": (lambda x: 2 * jnp.expm1(-x / 2), Affine((-2.0, 0.0), one("exp", 2.0, -0.5))),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    phi, expected = SPELLINGS[spelling]
    found = recognise(phi)
    assert found is not None
    pad = max(len(found.polynomial), len(expected.polynomial))
    given, wanted = (np.pad(np.array(a.polynomial), (0, pad - len(a.polynomial))) for a in (found, expected))
    # The fit's rounding.
    np.testing.assert_allclose(given, wanted, rtol=1e-11, atol=1e-13)
    assert [t.base for t in found.terms] == [t.base for t in expected.terms]
    for ours, theirs in zip(found.terms, expected.terms):
        np.testing.assert_allclose([ours.weight, ours.scale], [theirs.weight, theirs.scale], rtol=1e-11)


@pytest.mark.parametrize(
    "phi",
    [
        jax.nn.gelu,
        jnp.tanh,
        jax.nn.silu,
        jax.nn.elu,
        jax.nn.relu6,
        lambda x: jax.nn.softplus(50 * x) / 50,
        lambda x: jax.nn.softplus(1e4 * x) / 1e4,
        lambda x: jnp.clip(x, -20, 20),
        lambda x: jax.nn.relu(x) + 1e-7 * jnp.tanh(x),
        lambda x: jnp.maximum(x, x * x),
        lambda x: x**9,
        lambda x: (jax.nn.relu(x.astype(jnp.float32)) * jnp.float32(0.1)).astype(x.dtype),
        jnp.log,
        lambda x: jnp.log(jnp.abs(x + 1)),
        lambda x: 1 + jnp.abs(x - 1) ** -0.25,
        jax.nn.softmax,
        jnp.sum,
        lambda x: x > 0,
    ],
)
def test_what_is_none_of_them(phi):
    assert recognise(phi) is None


@hypothesis.given(
    family=st.sampled_from(["erf", "gelu", "sin", "exp"]),
    weight=st.floats(0.1, 3),
    scale=st.floats(0.2, 3),
    const=st.floats(-2, 2),
    slope=st.floats(-2, 2),
)
@hypothesis.settings(max_examples=12)
def test_any_of_a_family_is_found_with_its_values(family, weight, scale, const, slope):
    functions = {"erf": erf, "gelu": exact_gelu, "sin": jnp.sin, "exp": jnp.exp}
    found = recognise(lambda x: weight * functions[family](scale * x) + slope * x + const)
    assert found is not None
    x = np.linspace(-3, 3, 31)
    value = sum(c * x**j for j, c in enumerate(found.polynomial)) + sum(t.weight * base_value(t.base, t.scale * x) for t in found.terms)
    numpy = {"erf": scipy.special.erf, "gelu": lambda h: h * scipy.special.ndtr(h), "sin": np.sin, "exp": np.exp}
    np.testing.assert_allclose(value, weight * numpy[family](scale * x) + slope * x + const, rtol=1e-10, atol=1e-10)


def test_inside_a_trace_and_without_touching_the_flags():
    seen = []
    jax.jit(lambda x: (seen.append(recognise(jax.nn.relu)), x)[1])(1.0)
    assert seen[0] == recognise(jax.nn.relu)
    with double():
        assert jnp.zeros(()).dtype == jnp.float64
    assert jnp.zeros(()).dtype == jnp.float32


def test_a_traced_value_inside_is_refused():
    with pytest.raises(TypeError, match="closes over a traced value"):
        jax.jit(lambda a: recognise(lambda h: jnp.tanh(a * h)) or a)(2.0)


def test_a_sample_of_what_is_not_elementwise_is_none():
    assert sample(jax.nn.softmax, np.arange(4.0)) is None
    assert sample(jnp.cumsum, np.arange(4.0)) is None
    np.testing.assert_array_equal(sample(jnp.square, np.arange(4.0)), np.arange(4.0) ** 2)
