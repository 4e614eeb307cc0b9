"""The polynomial arcsine against NumPy's, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.limits.arcsine import arcsine, root_and_arcsine

POINTS = np.concatenate([np.linspace(-1, 1, 4001), [0.5, -0.5, 1 - 1e-15, -1 + 1e-12, 1e-300]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_to_rounding(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = POINTS.astype(dtype)
        # A few units of a number of at most pi/2; relative, so that small angles are as good.
        np.testing.assert_allclose(arcsine(jnp.asarray(x)), np.arcsin(x), rtol=8 * np.finfo(dtype).eps)
        assert np.all(np.asarray(arcsine(jnp.asarray([1.0, -1.0], dtype))) == np.asarray([np.pi / 2, -np.pi / 2], dtype))
        assert np.isnan(arcsine(jnp.asarray(1.5, dtype)))


def test_in_kernels_of_single_precision_to_the_rounding_of_a_right_angle():
    x = POINTS.astype("float32")
    root, angle = root_and_arcsine(jnp.asarray(x))
    np.testing.assert_allclose(angle, np.arcsin(x.astype("float64")), atol=2 * np.finfo("float32").eps)
    np.testing.assert_allclose(root, np.sqrt(1 - x.astype("float64") ** 2), atol=np.finfo("float32").eps)
    right = np.float32(np.pi / 2)
    assert np.array_equal(root_and_arcsine(jnp.asarray([-1.0, 0.0, 1.0]))[1], [-right, 0, right])


def test_other_precisions_are_left_to_jax():
    x = jnp.asarray([0.25, -0.75], jnp.bfloat16)
    assert np.array_equal(arcsine(x), jnp.arcsin(x))


def test_gradients_are_finite_at_the_ends():
    with jax.enable_x64(True):
        x = np.array([-1.0, -0.6, 0.3, 1.0, 1.5])
        inside = x[1:3]
        root, angle = (jax.vmap(jax.grad(lambda z, part=part: root_and_arcsine(z)[part])) for part in (0, 1))
        np.testing.assert_allclose(root(inside), -inside / np.sqrt(1 - inside**2), rtol=1e-14)
        np.testing.assert_allclose(angle(inside), 1 / np.sqrt(1 - inside**2), rtol=1e-14)
        ends = x[[0, 3, 4]]
        assert np.all(np.asarray(root(ends)) == 0)
        assert np.all(np.asarray(angle(ends)) == 0)
