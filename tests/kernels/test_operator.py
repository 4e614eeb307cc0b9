"""The kernel as a linear map: against the kernel, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.kernels import ntk, operator
from paperjax.model import Frozen, Model
from tests.kernels.test_ntk import MODEL, PARAMS, X1, X2, brute

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        return brute(MODEL, PARAMS, X1, X2)


def test_operator_is_the_kernel(exact):
    v = jax.random.normal(jax.random.key(3), (4, 2), jnp.float64)
    for batch in (1, 3, 256):
        np.testing.assert_allclose(operator(MODEL, PARAMS, X1, X2, batch=batch)(v), np.einsum("nmop,mp->no", exact, v), rtol=1e-12)
    with pytest.raises(ValueError, match=r"shape of the outputs, \(4, 2\)"):
        operator(MODEL, PARAMS, X1, X2)(v[:3])


def test_weights():
    params = {"a": Frozen(jnp.ones(2)), "n": jnp.arange(3), "net": PARAMS}
    model = Model(MODEL.init, lambda p, x: MODEL.apply(p["net"], x))
    rates, v = [{"w": 2, "b": 3.0}, {"w": 5.0, "b": 7.0}, {"w": 11.0, "b": 13.0}], jnp.ones((6, 2))
    wanted = jnp.einsum("nmop,mp->no", ntk(MODEL, PARAMS, X1, weights=rates), v)
    with pytest.warns(UserWarning, match="do not count"):
        found = operator(model, params, X1, weights={"a": Frozen(1.0), "n": 1, "net": rates})(v)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@jax.custom_vjp
def sign(x):
    return jnp.sign(x)


sign.defvjp(lambda x: (jnp.sign(x), None), lambda _, y: (y,))


def of(apply):
    return Model(MODEL.init, apply)


REFUSED = {
    "empty batch": (lambda: operator(MODEL, PARAMS, X1[:0]), "x1 has shape"),
    "features differ": (lambda: operator(MODEL, PARAMS, X1, X2[:, :2]), r"examples of float64\[3\] and x2 of float64\[2\]"),
    "NaN": (lambda: operator(MODEL, jax.tree.map(lambda a: a * jnp.nan, PARAMS), X1), r"\[0\]\['b'\] holds NaN"),
    "nothing trained": (lambda: operator(MODEL, Frozen(PARAMS), X1), "no trained parameter"),
    "batch statistics": (
        lambda: operator(of(lambda p, x: MODEL.apply(p, x - x.mean(0, keepdims=True))), PARAMS, X1),
        r"depend on each other.*: reduce_sum.*ntk\(..., coupled=True\)",
    ),
    "squeezed": (lambda: operator(of(lambda p, x: MODEL.apply(p, x)[:, None].squeeze()), PARAMS, X1), "without the batch"),
    "several arrays": (lambda: operator(of(lambda p, x: (MODEL.apply(p, x), x)), PARAMS, X1), "returns 2 arrays"),
    "no batch": (lambda: operator(MODEL, PARAMS, X1, batch=0), "batch = 0: at least one"),
    "weights of another shape": (lambda: operator(MODEL, PARAMS, X1, weights={"w": 1.0}), "pytree like params"),
    "backward only": (
        lambda: operator(of(lambda p, x: sign(MODEL.apply(p, x))), PARAMS, X1)(jnp.ones((6, 2))),
        r"forward derivatives.*custom_jvp",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()
