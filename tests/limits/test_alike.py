"""Programs that are one but for rounding, and the audit of a limit, which needs no kernels then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.limits import audit
from paperjax.limits.alike import alike
from paperjax.limits.moments import Run


def traced(fn):
    return jax.make_jaxpr(fn)(jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, y: 4.0 * x / 4.0 + y, lambda x, y: 8.0 * x / 8.0 + y),
        (lambda x, y: jnp.sum(x * 2.0) / 2.0, lambda x, y: jnp.sum(x * 6.0) / 6.0),
        (lambda x, y: jnp.sqrt(4.0 * x) / 2.0, lambda x, y: jnp.sqrt(9.0 * x) / 3.0),
        (lambda x, y: 0.0 * x + 3.0 * y / 3.0, lambda x, y: 0.0 * x + 5.0 * y / 5.0),
        (lambda x, y: jnp.tanh(x * (0.1 * 3)), lambda x, y: jnp.tanh(x * 0.3)),
        (lambda x, y: jax.lax.scan(lambda c, r: (c * r, c), 1.0, x)[0], lambda x, y: jax.lax.scan(lambda c, r: (c * r, c), 1.0, x)[0]),
    ],
)
def test_numbers_that_cancel(one, other, x64):
    assert alike(traced(one), traced(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, y: 4.0 * x, lambda x, y: 8.0 * x),
        (lambda x, y: 4.0 * x + y, lambda x, y: 8.0 * x + y),
        (lambda x, y: jnp.tanh(4.0 * x) / 4.0, lambda x, y: jnp.tanh(8.0 * x) / 8.0),
        (lambda x, y: x - y, lambda x, y: y - x),
        (lambda x, y: jnp.sin(x), lambda x, y: jnp.cos(x)),
        (lambda x, y: jnp.sum(x), lambda x, y: jnp.sum(x) + 0.0),
        (lambda x, y: jnp.maximum(4.0 * x, 0.5) / 4.0, lambda x, y: jnp.maximum(8.0 * x, 0.5) / 8.0),
        (lambda x, y: x * np.array([1.0, 2.0, 3.0]), lambda x, y: x * np.array([1.0, 2.0, 4.0])),
        (
            lambda x, y: jax.lax.scan(lambda c, r: (c * r + 4.0, c), 1.0, x)[0],
            lambda x, y: jax.lax.scan(lambda c, r: (c * r + 8.0, c), 1.0, x)[0],
        ),
        (lambda x, y: jax.jit(lambda z: z * 4.0)(x), lambda x, y: jax.jit(lambda z: z * 8.0)(x)),
    ],
)
def test_other_programs(one, other, x64):
    assert not alike(traced(one), traced(other))


def net(power):
    """A relu layer, a tanh layer and a readout, with biases that start at 0; hidden weights of variance ``width^-power``."""

    def make(width):
        sizes = {"u": (3, width), "w": (width, width), "v": (width, 1)}

        def init(key, x):
            keys = jax.random.split(key, 3)
            scales = {"u": 3**-0.5, "w": width ** (-power / 2), "v": width**-0.5}
            weights = {name: jax.random.normal(k, sizes[name]) * scales[name] for name, k in zip(sizes, keys)}
            return {**weights, "b": jnp.zeros((1, width)), "c": jnp.zeros((1, width))}

        def apply(p, x):
            h = jax.nn.relu(x @ p["u"] + 0.5 * p["b"])
            return jnp.tanh(h @ p["w"] + p["c"]) @ p["v"]

        return init, apply

    return make


X = np.array([[0.5, 1.0, -0.3], [0.2, -0.4, 0.8]])


def test_a_network_is_one_program_at_all_widths(monkeypatch):
    def none(*args):
        raise AssertionError("kernels at another width were computed")

    monkeypatch.setattr(audit, "kernels", none)
    pj.limit(net(1), X, ntk=False)


def test_another_power_of_the_width_is_still_seen():
    with pytest.raises(ValueError, match="changes with the width"):
        pj.limit(net(1.5), X, ntk=False)


@pytest.mark.parametrize("phi", [jnp.tanh, jnp.sin])
def test_widths_that_cancel_but_for_a_nonlinear_function_are_seen(phi):
    """``phi(sqrt(n) h) / sqrt(n)`` fades as 1/n in its square, though it would be h without phi."""

    def make(width):
        def init(key, x):
            keys = jax.random.split(key, 3)
            return [jax.random.normal(k, shape) for k, shape in zip(keys, ((3, width), (width, width), (width, 1)))]

        return init, lambda p, x: phi(phi(x @ p[0]) @ p[1]) @ p[2] / width

    with pytest.raises(ValueError, match=r"changes with the width, about as n\^-[01]\.[09]"):
        pj.limit(make, X, ntk=False)


@pytest.mark.slow
def test_biases_that_start_at_zero_are_those_of_small_variance(x64):
    """The tangent kernel's part of a bias at 0, which moves a function as its field does, against one that is hardly off 0.

    At variance e of the bias the kernel is off by the order of e.
    """
    from paperjax.limits import normal

    scheme = dict(parametrization=pj.ntp, base=dict(width=64), per="leaf")
    at_0 = pj.limit(net(1), X, **scheme).ntk
    near = pj.limit(net(1), X, laws={"['b']": normal(1e-9), "['c']": normal(1e-9)}, **scheme).ntk
    for path in ("['b']", "['c']"):
        assert np.abs(at_0[path]).min() > 1e-2
        np.testing.assert_allclose(at_0[path], near[path], rtol=1e-6)


def test_what_is_asked_needs_no_expectation(monkeypatch):
    """Looking at a program makes marks alone, which tell functions apart."""
    from paperjax.limits import gaussians

    def none(*args, **kwargs):
        raise AssertionError("an expectation was made")

    for name in ("ranged", "mean", "trained"):
        monkeypatch.setattr(gaussians, name, none)
    found = []
    monkeypatch.setattr("paperjax.limits.infinite.kernels", lambda program, *args: found.append(program) or 1 / 0)
    for phi in (jnp.tanh, jax.nn.silu):

        def with_phi(width, phi=phi):
            def init(key, x):
                first, last = jax.random.split(key)
                return {"u": jax.random.normal(first, (3, width)), "v": jax.random.normal(last, (width, 1)) * width**-0.5}

            return init, lambda p, x: phi(x @ p["u"]) @ p["v"]

        with pytest.raises(ZeroDivisionError):
            pj.limit(with_phi, X, ntk=False)
    form = jax.ShapeDtypeStruct((3,), jnp.float32)
    one, other = (program.seen(form, False).kernel for program in found)
    assert not alike(one, other)
    assert Run((X,), lambda leaf: 1.0).looks is False
