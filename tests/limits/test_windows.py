"""Sums over windows against the tap-by-tap definition and XLA's own windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from paperjax.limits.windows import Window, joint_sum, window_adds, window_taps

NHWC = (0, 3, 1, 2)
WINDOWS = {
    "same": Window((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), (3, 3), NHWC, NHWC),
    "valid": Window((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), (3, 2), NHWC, NHWC),
    "strided": Window((2, 3), ((1, 0), (2, 1)), (1, 1), (1, 1), (3, 3), NHWC, NHWC),
    "dilated": Window((1, 2), ((2, 2), (1, 1)), (1, 1), (2, 2), (3, 2), NHWC, NHWC),
    "transposed": Window((1, 1), ((1, 2), (1, 1)), (2, 2), (1, 1), (3, 3), NHWC, NHWC),
    "far beyond": Window((1, 1), ((5, 5), (0, 0)), (1, 1), (1, 1), (3, 1), NHWC, NHWC),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_both_sides_at_once(name):
    window, shape = WINDOWS[name], (1, 5, 4, 1)
    taps = window_taps(window, shape)
    k = np.random.default_rng(0).normal(size=shape * 2).astype(np.float32)

    def one_side(see, a):
        return np.asarray(see(jnp.asarray(a)))[..., 0]

    wanted = 0.0
    for see in taps:
        left = np.stack([one_side(see, k[..., 0, i, j, 0]) for i in range(5) for j in range(4)])
        flat = left.reshape(1, 5, 4, -1)
        wanted = wanted + np.stack([one_side(see, flat[..., p : p + 1]) for p in range(flat.shape[-1])])
    out = (*taps[0](jnp.zeros(shape)).shape[:3], 1)
    found = joint_sum(window, shape, out)
    assert found is not None
    both = np.asarray(found(jnp.asarray(k), None)).reshape(-1, *out[:3])
    # Float32 rounding of nine terms.
    np.testing.assert_allclose(both, wanted, atol=1e-5)
    np.testing.assert_array_equal(both, np.asarray(found(jnp.asarray(k), jnp.ones(()))).reshape(both.shape))


def test_channels_and_other_orders_are_left_to_the_taps():
    assert joint_sum(WINDOWS["same"], (1, 5, 4, 2), (1, 5, 4, 1)) is None
    assert joint_sum(WINDOWS["same"]._replace(out=(0, 3, 2, 1)), (1, 5, 4, 1), (1, 4, 5, 1)) is None


@pytest.mark.parametrize(
    ("strides", "padding", "between"), [((1, 2, 2, 1), "VALID", 1), ((1, 1, 3, 1), "SAME", 1), ((1, 2, 1, 1), "SAME", 2)]
)
def test_pooling_as_adds(strides, padding, between):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 6, 1)).astype(np.float32))

    def pool(x):
        return lax.reduce_window(x, jnp.zeros(()), lax.add, (1, 2, 3, 1), strides, padding, window_dilation=(1, between, between, 1))

    (eqn,) = [eqn for eqn in jax.make_jaxpr(pool)(x).eqns if eqn.primitive.name.startswith("reduce_window")]
    found = window_adds(eqn.params, lambda _: pytest.fail("a small window"))
    # Float32 rounding of six terms.
    np.testing.assert_allclose(found(x), pool(x), atol=1e-5)
    large = {**eqn.params, "window_dimensions": (1, 9, 9, 1)}
    assert window_adds(large, pool) is pool
