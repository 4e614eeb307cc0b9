"""What the entry points of a kernel refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.kernels import explain, ntk, operator
from paperjax.model import Frozen, Model
from tests.kernels.test_ntk import MODEL, PARAMS, X1, X2
from tests.zoo import as_users_run_it

pytestmark = pytest.mark.usefixtures("x64")


def bad_params(**changed):
    return [{**PARAMS[0], **changed}, *PARAMS[1:]]


def weights(of_one):
    return [{"w": 1.0, "b": 1.0}, {"w": of_one, "b": 1.0}, {"w": 1.0, "b": 1.0}]


def on_the_host(y):
    shape = jax.ShapeDtypeStruct((*y.shape[:-1], 3), y.dtype)
    return jax.pure_callback(lambda a: np.zeros((*a.shape[:-1], 3)), shape, y, vmap_method="broadcast_all")


REFUSED = {
    "empty batch": (lambda: ntk(MODEL, PARAMS, X1[:0]), ValueError, "x1 has shape"),
    "features differ": (lambda: ntk(MODEL, PARAMS, X1, X2[:, :2]), ValueError, r"examples of float64\[3\] and x2 of float64\[2\]"),
    "NaN": (lambda: ntk(MODEL, bad_params(b=PARAMS[0]["b"] * jnp.nan), X1), ValueError, r"\[0\]\['b'\] holds NaN"),
    "NaN in x1": (lambda: ntk(MODEL, PARAMS, X1.at[2, 1].set(jnp.nan)), ValueError, r"x1 holds NaN .* 1 of 6 examples, .* number 2"),
    "infinity in x2": (lambda: ntk(MODEL, PARAMS, X1, X2.at[0].set(jnp.inf), max_bytes=10_000), ValueError, "x2 holds NaN or infinity"),
    "NaN in x1, the operator's": (lambda: operator(MODEL, PARAMS, X1 * jnp.nan), ValueError, "x1 holds NaN .* in 6 of 6"),
    "complex": (lambda: ntk(MODEL, bad_params(b=PARAMS[0]["b"].astype(complex)), X1), ValueError, r"\[0\]\['b'\] is complex"),
    "no array": (lambda: ntk(Model(MODEL.init, lambda p, x: (MODEL.apply(p, x), "y")), PARAMS, X1), TypeError, "not an array"),
    "classes": (lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x).argmax(1)), PARAMS, X1), TypeError, "int"),
    "sum over the batch": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x - x.mean(0, keepdims=True))), PARAMS, X1),
        ValueError,
        "depend on each other.*: reduce_sum",
    ),
    "a branch on the size of the batch": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, jnp.sin(x) if len(x) > 1 else x)), PARAMS, X1),
        ValueError,
        "one example by itself is not computed as in a batch of 6",
    ),
    "own rows": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x)[jnp.arange(len(x)), 1]), PARAMS, X1),
        ValueError,
        "each picks its own row.* map over them",
    ),
    "a site without a derivative": (
        lambda: ntk(Model(MODEL.init, lambda p, x: jax.lax.nextafter(MODEL.apply(p, x), jnp.ones((len(x), 2)))), PARAMS, X1),
        ValueError,
        "'nextafter' not implemented.*jax.custom_jvp",
    ),
    "a site out of JAX's reach": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, on_the_host(MODEL.apply(p, x)))), PARAMS, X1),
        ValueError,
        "Pure callbacks do not support JVP.*lax.stop_gradient",
    ),
    "nothing trained": (lambda: ntk(MODEL, Frozen(PARAMS), X1), ValueError, "no trained parameter"),
    "too little memory": (lambda: ntk(MODEL, PARAMS, X1, max_bytes=100), MemoryError, "Give max_bytes="),
    "unknown output": (lambda: ntk(MODEL, PARAMS, X1, outputs=2), ValueError, "names no output"),
    "output that is no number": (lambda: ntk(MODEL, PARAMS, X1, outputs=1.5), TypeError, "'full', 'trace', 'diagonal', or the number"),
    "output True": (lambda: ntk(MODEL, PARAMS, X1, outputs=True), TypeError, "the number of one output"),
    "no outputs": (lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x)[:, :0]), PARAMS, X1), ValueError, "size 0"),
    "complex outputs": (lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x) * (1 + 1j)), PARAMS, X1), TypeError, "real and"),
    "dict of batches": (lambda: ntk(MODEL, PARAMS, {"a": X1}), TypeError, "x1 is a dict of arrays"),
    "no route": (lambda: ntk(MODEL, PARAMS, X1, route=None), TypeError, "the name of a route"),
    "explained, features differ": (lambda: explain(MODEL, PARAMS, X1, X2[:, :2]), ValueError, "x2 of float64"),
    "explained, empty batch": (lambda: explain(MODEL, PARAMS, X1[:0]), ValueError, "x1 has shape"),
    "unknown form": (lambda: ntk(MODEL, PARAMS, X1, outputs="traces"), ValueError, "trace"),
    "unknown leaf": (lambda: ntk(MODEL, PARAMS, X1, leaves=["[0]['v']"]), ValueError, r"\[0\]\['w'\]|\[0\]\['b'\]"),
    "no leaf": (lambda: ntk(MODEL, PARAMS, X1, leaves=[]), ValueError, "a list of paths, at least one"),
    "leaf without a list": (lambda: ntk(MODEL, PARAMS, X1, leaves="[0]['w']"), ValueError, "a list of paths"),
    "unknown route": (lambda: ntk(MODEL, PARAMS, X1, route="jacobains"), ValueError, "jacobian"),
    "route of an unknown leaf": (lambda: ntk(MODEL, PARAMS, X1, route={"[7]": "jacobian"}), ValueError, "not trained here"),
    "weights of another shape": (lambda: ntk(MODEL, PARAMS, X1, weights={"w": 1.0}), ValueError, "pytree like params"),
    "file and parts": (lambda: ntk(MODEL, PARAMS, X1, out="k.npy", per="leaf"), ValueError, "holds one array"),
    "file inside of a program": (lambda: jax.jit(lambda p: ntk(MODEL, p, X1, out="k.npy"))(PARAMS), ValueError, "outside of jit"),
    "diagonal of two batches": (lambda: ntk(MODEL, PARAMS, X1, X2, diagonal=True), ValueError, "leave out x2"),
    "weight of another shape": (
        lambda: ntk(MODEL, PARAMS, X1, weights=[{"w": 1.0, "b": jnp.ones(2)}, *PARAMS[1:]]),
        ValueError,
        r"\[0\]\['b'\] is none: one has shape \(2,\)",
    ),
    "weight that is no number": (lambda: ntk(MODEL, PARAMS, X1, weights=weights(None)), ValueError, r"\[1\]\['w'\] is none: None"),
    "weight that is NaN": (lambda: ntk(MODEL, PARAMS, X1, weights=weights(np.nan)), ValueError, r"weight of \[1\]\['w'\] is nan"),
    "squeezed in between": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x)[:, None].squeeze()), PARAMS, X1),
        ValueError,
        r"shape \(2,\), without the batch as first axis. .* x.squeeze\(\(1, 2\)\)",
    ),
    "squeezed to one number": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x)[:, None].squeeze()[..., :1]), PARAMS, X1),
        ValueError,
        r"one example gives outputs of shape \(\), and one of 6 of shape \(1,\)",
    ),
    "squeezed at the end": (
        lambda: ntk(Model(MODEL.init, lambda p, x: MODEL.apply(p, x)[:, :1].squeeze()), PARAMS, X1),
        ValueError,
        r"shape \(\), without the batch",
    ),
    "unknown parts": (lambda: ntk(MODEL, PARAMS, X1, per="layers"), ValueError, "'leaf', 'layer'"),
    "unknown precision": (lambda: ntk(MODEL, PARAMS, X1, accumulate="double"), ValueError, "float64"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    call, error, message = REFUSED[what]
    with as_users_run_it(), pytest.raises(error, match=message):
        call()


def test_networks_that_fill_in_what_is_missing_have_a_kernel():
    filled = Model(MODEL.init, lambda p, x: MODEL.apply(p, jnp.nan_to_num(x)))
    with as_users_run_it():
        np.testing.assert_array_equal(ntk(filled, PARAMS, X1.at[0, 0].set(jnp.nan)), ntk(filled, PARAMS, X1.at[0, 0].set(0.0)))


def test_layers_are_named_by_keys_that_hold_dots_and_brackets():
    params = {"block.0": {"w": jnp.ones(3)}, "it's [1]": {"w": jnp.ones(3), "v.0": jnp.ones(3)}}
    model = Model(lambda key, x: params, lambda p, x: x @ p["block.0"]["w"] * (x @ p["it's [1]"]["w"]) + x @ p["it's [1]"]["v.0"])
    with as_users_run_it():
        layers = ntk(model, params, X1, per="layer", outputs="trace")
        leaves = ntk(model, params, X1, per="leaf", outputs="trace")
    assert set(layers) == {"['block.0']", """["it's [1]"]"""}
    np.testing.assert_allclose(layers["['block.0']"], leaves["['block.0']['w']"], rtol=1e-12)


def test_own_rows_by_a_map_over_examples():
    def own(params, x):
        return MODEL.apply(params, x)[jnp.arange(len(x)), (x[:, 0] > 0).astype(int)]

    mapped = Model(MODEL.init, lambda p, x: jax.vmap(lambda row: own(p, row[None])[0])(x))
    full, pick = ntk(MODEL, PARAMS, X1), (X1[:, 0] > 0).astype(int)
    wanted = full[jnp.arange(6)[:, None], jnp.arange(6)[None], pick[:, None], pick[None]]
    np.testing.assert_allclose(ntk(mapped, PARAMS, X1), wanted, rtol=1e-12)
