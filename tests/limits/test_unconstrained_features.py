"""Closed forms of neural collapse under squared error against networks minimised by L-BFGS, and their own laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperjax.limits import collapse_threshold, mse_minimiser
from tests.limits.free_features import minimised, product
from tests.zoo import as_users_run_it

CASES = {
    "depth 1": ([10, 6, 3], [0.01, 0.02], False),
    "depth 1, one class vanishes": ([20, 6, 2], [0.06, 0.07], False),
    "depth 1, bias": ([10, 6, 3], [0.01, 0.02], True),
    "depth 2, balanced, bias": ([5, 5, 5, 5], [0.01, 0.005, 0.01], True),
    "depth 3": ([10, 6, 3], [2e-3, 5e-3, 1e-2, 2e-3], False),
    "depth 3, bias": ([10, 6, 3], [2e-3, 5e-3, 1e-2, 2e-3], True),
}


@pytest.mark.parametrize("case", CASES)
def test_is_what_lbfgs_finds(case):
    sizes, decay, bias = CASES[case]
    theory = mse_minimiser(sizes, len(decay) - 1, weight_decay=decay[:-1], feature_decay=decay[-1], bias=bias)
    loss, (*weights, h, b) = minimised(sizes, decay, bias=bias)
    assert theory.loss == pytest.approx(loss, rel=1e-9)
    # The loss is flat at its minimum: parameters are known to the root of what it is known to.
    close = dict(atol=3e-5, rtol=3e-5)
    first = np.cumsum([0, *sizes[:-1]])
    np.testing.assert_allclose(h, np.repeat(h[:, first], sizes, axis=1), **close)
    np.testing.assert_allclose(theory.outputs, product(weights, h)[:, first], **close)
    np.testing.assert_allclose(theory.means_gram, h[:, first].T @ h[:, first], **close)
    np.testing.assert_allclose(theory.classifier_gram, weights[-1] @ weights[-1].T, **close)
    for theirs, ours in zip((*weights, h), (*theory.weights, theory.features)):
        found = np.linalg.svd(theirs, compute_uv=False)
        np.testing.assert_allclose(found[: len(ours)], np.sort(ours)[::-1], **close)
        np.testing.assert_allclose(found[len(ours) :], 0, **close)
    if bias:
        np.testing.assert_allclose(theory.bias, b[:, 0], **close)


decays = st.floats(1e-4, 0.1)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), decays, decays)
def test_the_closed_form_of_one_layer(sizes, weights, features):
    """s_k = (n_k^½ - N (λ_W λ_H)^½)₊, and |w_k|² = s_k (λ_H / λ_W)^½ (arXiv 2301.00437, section 4)."""
    found = mse_minimiser(sizes, weight_decay=weights, feature_decay=features)
    n, N = np.array(sizes, float), sum(sizes)
    s = np.maximum(np.sqrt(n) - N * math.sqrt(weights * features), 0)
    np.testing.assert_allclose(found.singular_values, s, rtol=1e-9, atol=1e-9)  # rounding in n^½ - N (λ_W λ_H)^½
    np.testing.assert_allclose(np.diag(found.classifier_gram), s * math.sqrt(features / weights), rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(1, 5), st.booleans(), decays, decays)
def test_a_minimiser_is_as_low_as_any_other_size(sizes, depth, bias, weights, features):
    found = mse_minimiser(sizes, depth, weight_decay=weights, feature_decay=features, bias=bias)
    N, C = sum(sizes), (weights**depth * features) ** (1 / (depth + 1))

    def loss(s):
        return ((s - found.targets) ** 2).sum() / (2 * N) + (depth + 1) / 2 * C * (s ** (2 / (depth + 1))).sum()

    assert loss(found.singular_values) == pytest.approx(found.loss, rel=1e-12)
    for share in (0.0, 0.2, 0.5, 0.9, 0.99, 1.01):
        assert found.loss <= loss(share * found.targets) * (1 + 1e-12)
        assert found.loss <= loss(share * found.singular_values) * (1 + 1e-12)
    # Every factor pays the same in every mode.
    np.testing.assert_allclose(weights * found.weights**2, np.tile(features * found.features**2, (depth, 1)), rtol=1e-9)
    np.testing.assert_allclose(found.weights.prod(0) * found.features, found.singular_values, rtol=1e-9)


@given(st.integers(2, 7), st.integers(1, 20), st.integers(1, 4))
def test_balanced_geometry(classes, size, depth):
    """Orthogonal without bias, a simplex with one (arXiv 2301.00437, section 3)."""
    little = dict(weight_decay=1e-4 / classes**2, feature_decay=1e-4 / classes**2)
    free, biased = (mse_minimiser([size] * classes, depth, bias=bias, **little) for bias in (False, True))
    np.testing.assert_allclose(free.cosines, np.eye(classes), atol=1e-12)
    simplex = (classes * np.eye(classes) - 1) / (classes - 1)
    np.testing.assert_allclose(biased.cosines, simplex, atol=1e-9)
    np.testing.assert_allclose(biased.classifier_gram / biased.classifier_gram[0, 0], simplex, atol=1e-9)
    np.testing.assert_allclose(biased.bias, 1 / classes)
    # The same modes, one of them fitted by the bias.
    np.testing.assert_allclose(biased.singular_values, free.singular_values[1:], rtol=1e-9)
    assert biased.loss == pytest.approx(free.loss * (classes - 1) / classes, rel=1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_the_threshold_from_both_sides(depth):
    """The decay is set so that 30 examples of 100 are at the threshold, and then moved by one part in a million."""
    unit = collapse_threshold(100, depth, weight_decay=1.0, feature_decay=1.0)
    decay = (30 / unit.size) ** (depth / (depth + 1))
    assert collapse_threshold(100, depth, weight_decay=decay, feature_decay=decay).size == pytest.approx(30)
    less, more = (
        mse_minimiser([70, 30], depth, weight_decay=decay * x, feature_decay=decay * x).singular_values for x in (1 - 1e-6, 1 + 1e-6)
    )
    assert less[1] > 0 == more[1]
    # A jump for deep networks; at depth 1, s goes to 0 as the distance from the threshold.
    assert less[1] / math.sqrt(30) == pytest.approx(unit.jump, abs=1e-5)
    assert min(less[0], more[0]) > 0


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_below_the_threshold_a_minimum_is_left_until_it_is_none(depth):
    at = collapse_threshold(100, depth, weight_decay=0.01, feature_decay=0.01)
    assert at.metastable < at.size
    C, s = 0.01, np.linspace(1e-6, 1, 400_001)
    for factor, minima in ((1.001, 1), (0.999, 0)):
        a = math.sqrt(at.metastable * factor)
        value = (s * a - a) ** 2 / 200 + (depth + 1) / 2 * C * (s * a) ** (2 / (depth + 1))
        rising = np.diff(value) > 0
        assert np.sum(~rising[:-1] & rising[1:]) == minima


def test_more_decay_is_less_signal():
    s = [mse_minimiser([30, 10], 2, weight_decay=x, feature_decay=x).singular_values for x in np.geomspace(1e-6, 0.1, 30)]
    assert (np.diff(s, axis=0) <= 0).all()
    np.testing.assert_allclose(s[0], np.sqrt([30, 10]), rtol=1e-4)  # of the order of N times the decay
    assert s[-1].tolist() == [0, 0]


def test_a_vanished_class_has_no_direction():
    found = mse_minimiser([64, 32, 4], weight_decay=0.03, feature_decay=0.03)
    assert np.isnan(found.cosines[2]).all()
    np.testing.assert_allclose(found.cosines[:2, :2], np.eye(2))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(sizes=[3, 0, 2]), ValueError, "class 1 has no example"),
        (dict(sizes=[3, -1]), ValueError, "size of class 1 = -1"),
        (dict(sizes=[3, 2.5]), TypeError, r"size of class 1 = 2\.5 is no whole number"),
        (dict(sizes=[3]), ValueError, r"1 class\(es\)"),
        (dict(sizes=[]), ValueError, r"0 class\(es\)"),
        (dict(depth=0), ValueError, "depth = 0"),
        (dict(depth=1.0), TypeError, r"depth = 1\.0"),
        (dict(weight_decay=-0.1), ValueError, r"weight_decay of layer 1 = -0\.1"),
        (dict(weight_decay=[0.1, 0.0], depth=2), ValueError, "weight_decay of layer 2 = 0.*need not collapse"),
        (dict(weight_decay=[0.1, 0.1]), ValueError, "2 numbers for depth = 1"),
        (dict(feature_decay=0.0), ValueError, "feature_decay = 0"),
        (dict(feature_decay=math.nan), ValueError, "feature_decay = nan"),
        (dict(feature_decay=math.inf), ValueError, "feature_decay = inf"),
    ],
)
def test_refuses(change, error, says):
    given = dict(sizes=[3, 2], depth=1, weight_decay=0.1, feature_decay=0.1) | change
    with as_users_run_it(), pytest.raises(error, match=says):
        mse_minimiser(given.pop("sizes"), given.pop("depth"), **given)


def test_a_decay_may_be_a_numpy_number():
    with as_users_run_it():
        found = mse_minimiser([3, 2], 2, weight_decay=np.float32(0.25), feature_decay=np.float32(0.125))
    expected = mse_minimiser([3, 2], 2, weight_decay=[0.25, 0.25], feature_decay=0.125)
    np.testing.assert_array_equal(found.singular_values, expected.singular_values)


@pytest.mark.parametrize(("total", "depth", "says"), [(0, 1, "total = 0"), (10, 0, "depth = 0"), (10, -1, "depth = -1")])
def test_threshold_refuses(total, depth, says):
    with pytest.raises(ValueError, match=says):
        collapse_threshold(total, depth, weight_decay=0.1, feature_decay=0.1)
