"""Gaussian fields in the sample have the moments that are asked for, and responses are derivatives."""

import numpy as np
import pytest

from paperjax.limits.mean_field_noise import beyond, new_field, response, reveal, with_dual

S, STEPS, P = 200, 3, 2


def kernel_of(rank):
    root = np.random.default_rng(rank).standard_normal((STEPS * P + 3, rank))
    return root @ root.T


def revealed(kernel, sign, negligible=1e-12):
    rng, field, values = np.random.default_rng(1), new_field(sign, S // 2), []
    for t in range(STEPS):
        field, new, _ = reveal(field, kernel[t * P : (t + 1) * P, : (t + 1) * P], rng, negligible)
        values.append(new)
    return field, np.concatenate(values), rng


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rank", [3, 9])
def test_second_moments_are_the_kernel(rank, sign):
    kernel = kernel_of(rank)
    field, values, rng = revealed(kernel, sign)
    own, further = STEPS * P, slice(STEPS * P, None)
    np.testing.assert_allclose(values @ values.T / S, kernel[:own, :own], atol=1e-10)
    np.testing.assert_allclose(values.mean(axis=1), 0, atol=1e-10)
    assert len(field.pivots) == min(rank, own)
    # Points that are drawn on top, given the field.
    more, left_out = beyond(field, kernel[further, :own][:, field.pivots], kernel[further, further], rng, 1e-12)
    np.testing.assert_allclose(more @ values.T / S, kernel[further, :own], atol=1e-10)
    np.testing.assert_allclose(more @ more.T / S, kernel[further, further], atol=1e-10)
    assert left_out < 1e-10


def test_what_is_negligible_or_has_no_room_is_reported():
    kernel = np.diag([1.0, 1.0, 1e-4])
    _, values, left_out = reveal(new_field(1, 50), kernel, np.random.default_rng(0), 1e-3)
    assert left_out == pytest.approx(1e-4 / np.mean(np.diagonal(kernel)))
    assert not values[2].any()
    _, _, left_out = reveal(new_field(1, 2), np.eye(3), np.random.default_rng(0), 1e-3)
    assert left_out == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_new_noise_keeps_clear_of_rows_that_it_is_shown(sign):
    rows = np.random.default_rng(2).standard_normal((4, S))
    _, values, _ = reveal(new_field(sign, S // 2), np.eye(3), np.random.default_rng(0), 1e-3, rows)
    np.testing.assert_allclose(values @ rows.T, 0, atol=1e-10)


def test_the_response_of_a_linear_function_is_its_matrix():
    """Values ``B field`` with E field field^T = E w w^T respond to w as ``B w``, by Stein's lemma."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((STEPS * P, S))
    field, values, _ = revealed(w @ w.T / S, -1)
    slopes = rng.standard_normal((4, STEPS * P))
    np.testing.assert_allclose(response(slopes @ values, with_dual(field, w)), slopes @ w, atol=1e-10)
