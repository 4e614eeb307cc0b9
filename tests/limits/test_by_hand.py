"""Derivatives written by hand: those of the function are followed, others are refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits.by_hand import other_derivative
from tests.limits.ntk_networks import VECTORS, dense, plain

limit = functools.partial(pj.limit, progress=False)


@jax.custom_vjp
def straight_through(h):
    return jnp.sign(h)


straight_through.defvjp(lambda h: (jnp.sign(h), h), lambda h, g: (g * (jnp.abs(h) < 1),))


@jax.custom_vjp
def clipped_far_out(h):
    return 2 * h


clipped_far_out.defvjp(lambda h: (2 * h, h), lambda h, g: (2 * g * (jnp.abs(h) < 5),))


@jax.custom_jvp
def leaky(h, slope):
    return jnp.maximum(h, 0)


leaky.defjvp(lambda p, t: (leaky(*p), t[0] * jnp.where(p[0] > 0, jnp.ones_like(p[0]), p[1])))


@jax.custom_jvp
def stable(h):
    return jnp.log1p(jnp.exp(h))


stable.defjvp(lambda p, t: (stable(*p), t[0] * jax.nn.sigmoid(p[0])))

wrapped = jax.custom_jvp(jax.nn.relu)
wrapped.defjvp(lambda p, t: (jax.nn.relu(*p), 2 * t[0]))

FUNCTIONS = {
    "straight_through": straight_through, "clipped_far_out": clipped_far_out, "leaky": lambda h: leaky(h, 0.3), None: stable,
}  # fmt: skip


def network(phi):
    def forward(draw, x, n):
        h = jax.nn.relu(dense(draw, x, n))
        return dense(draw, phi(dense(draw, h, n)), 1)

    return plain(forward)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_derivative_is_compared_with_that_of_the_function(name):
    (eqn,) = jax.make_jaxpr(FUNCTIONS[name])(jnp.zeros((1, 1024))).eqns
    assert other_derivative(eqn) == name


def test_relu_has_its_own():
    (eqn,) = jax.make_jaxpr(jax.nn.relu)(jnp.zeros((1, 64))).eqns
    assert eqn.primitive.name.startswith("custom_jvp")
    assert other_derivative(eqn) is None


@pytest.mark.parametrize(
    ("phi", "found"), [(jax.nn.relu, None), (stable, "stable \\(of too many entries"), (wrapped, "relu \\(of too many")]
)
def test_of_many_entries_no_numbers_are_made(phi, found):
    (eqn,) = jax.make_jaxpr(phi)(jax.ShapeDtypeStruct((1, 1 << 40), jnp.float32)).eqns
    name = other_derivative(eqn)
    assert name is found if found is None else re.match(found, name)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name])
def test_the_tangent_kernel_of_another_derivative_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"the derivative of {name} was written by hand.*ntk=False"):
        limit(network(FUNCTIONS[name]), VECTORS)


def test_outputs_at_init_do_not_depend_on_it():
    ours, sign = (limit(network(phi), VECTORS, ntk=False).nngp for phi in (straight_through, jnp.sign))
    np.testing.assert_array_equal(ours, sign)


@pytest.mark.parametrize("at", ["value", "leaf"])
def test_a_gradient_that_is_stopped(at):
    """The outputs at init do not depend on it, and the tangent kernel is refused."""

    def net(stop):
        def forward(draw, x, n):
            u = draw(x.shape[1], n)
            h = dense(draw, jax.nn.relu(x @ (stop(u) if at == "leaf" else u)), n)
            return dense(draw, h + (stop if at == "value" else jnp.asarray)(jax.nn.relu(h)), 1)

        return plain(forward)

    ours, free = (limit(net(stop), VECTORS[:2], ntk=False).nngp for stop in (jax.lax.stop_gradient, jnp.asarray))
    np.testing.assert_array_equal(ours, free)
    with pytest.raises(NotImplementedError, match=r"stop_gradient: .*pj.Frozen.*ntk=False"):
        limit(net(jax.lax.stop_gradient), VECTORS[:2])
