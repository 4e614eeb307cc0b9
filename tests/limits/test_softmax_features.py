"""Neural collapse under cross-entropy against networks minimised by L-BFGS."""

import math

import numpy as np
import pytest

from paperjax.limits import cross_entropy_frame, cross_entropy_minimiser
from tests.limits.free_features import minimised, product
from tests.zoo import as_users_run_it


@pytest.mark.parametrize(
    ("sizes", "bias"), [([4, 4, 4], False), ([8, 5, 3], False), ([8, 5, 3], True), ([16, 16, 2, 2], True)], ids=lambda value: str(value)
)
def test_is_what_lbfgs_finds(sizes, bias):
    theory = cross_entropy_minimiser(sizes, weight_decay=0.01, feature_decay=0.02, bias=bias)
    loss, (w, h, b) = minimised(sizes, [0.01, 0.02], bias=bias, loss="cross_entropy", seeds=1)
    # One start is enough: with as many hidden units as classes, every local minimum is global (arXiv 2309.09725).
    assert theory.loss == pytest.approx(loss, rel=1e-10)
    first = np.cumsum([0, *sizes[:-1]])
    close = dict(atol=1e-5, rtol=1e-5)  # the root of what the loss is known to
    np.testing.assert_allclose(theory.outputs, (w @ h)[:, first], **close)
    np.testing.assert_allclose(theory.means_gram, h[:, first].T @ h[:, first], **close)
    np.testing.assert_allclose(theory.classifier_gram, w @ w.T, **close)
    np.testing.assert_allclose(theory.bias, bias * (b - b.mean())[:, 0], **close)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_balanced_is_a_simplex_of_the_margin_in_closed_form(classes):
    found = cross_entropy_minimiser([10] * classes, weight_decay=1e-3, feature_decay=2e-3)
    simplex = (classes * np.eye(classes) - 1) / (classes - 1)
    np.testing.assert_allclose(found.cosines, simplex, atol=1e-7)
    np.testing.assert_allclose(found.classifier_gram / found.classifier_gram[0, 0], simplex, atol=1e-7)
    margin = math.log(1 / math.sqrt(10 * 2e-6) - classes + 1)
    assert found.outputs[0, 0] - found.outputs[1, 0] == pytest.approx(margin, rel=1e-7)
    frame = cross_entropy_frame(classes, 10, 1, weight_decay=1e-3, feature_decay=2e-3)
    assert frame.margin == pytest.approx(margin, rel=1e-9)
    assert frame.loss == pytest.approx(found.loss, rel=1e-12)
    np.testing.assert_allclose(frame.cosines, simplex)


@pytest.mark.parametrize(("factor", "gone"), [(1.001, True), (0.999, False)])
def test_balanced_vanishes_where_it_is_said_to(factor, gone):
    """n λ_W λ_H = 1 / K²."""
    decay = math.sqrt(factor / (10 * 16))
    found = cross_entropy_minimiser([10] * 4, weight_decay=decay, feature_decay=decay)
    assert (found.singular_values.max() == 0) == gone
    assert (cross_entropy_frame(4, 10, 1, weight_decay=decay, feature_decay=decay).margin == 0) == gone
    assert not gone or found.loss == pytest.approx(math.log(4), rel=1e-12)


def test_small_classes_lose_their_angle():
    """Minority collapse (arXiv 2309.09725): small classes get one direction, which a bias does not undo."""
    s = cross_entropy_minimiser([50, 50, 2, 2], weight_decay=0.01, feature_decay=0.02, bias=True).singular_values
    assert (s > 0).sum() == 2


@pytest.mark.parametrize(("classes", "depth", "starts"), [(3, 3, 3), (4, 3, 6), (6, 2, 3)])
def test_the_cross_polytope_beats_the_simplex_and_is_found(classes, depth, starts):
    decay = 3e-3
    given = dict(weight_decay=decay, feature_decay=decay)
    simplex = cross_entropy_frame(classes, 2, depth, **given)
    found, (*weights, h, _) = minimised([2] * classes, [decay] * (depth + 1), loss="cross_entropy", seeds=starts, scale=0.5)
    s = np.linalg.svd(product(weights, h), compute_uv=False)
    if classes % 2:
        assert found == pytest.approx(simplex.loss, rel=1e-8)
        best = simplex
    else:
        best = cross_entropy_frame(classes, 2, depth, frame="cross-polytope", **given)
        assert found == pytest.approx(best.loss, rel=1e-8)
        assert best.loss < 0.97 * simplex.loss
        assert best.cosines[0].tolist() == [1, -1] + [0] * (classes - 2)
    np.testing.assert_allclose(s[: best.rank], best.singular_value, rtol=1e-4)
    np.testing.assert_allclose(s[best.rank :], 0, atol=1e-3)
    np.testing.assert_allclose(np.linalg.svd(weights[0], compute_uv=False)[: best.rank], best.weights[0], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.svd(h, compute_uv=False)[: best.rank], best.features, rtol=1e-4)


@pytest.mark.parametrize(("classes", "depth"), [(6, 2), (4, 3), (4, 8), (20, 3)])
def test_whatever_the_decay(classes, depth):
    assert classes * 2 ** (-(depth - 1) / (depth + 1)) < classes - 1
    for decay in np.geomspace(1e-6, 1e-2, 9):
        given = dict(weight_decay=decay, feature_decay=2 * decay)
        simplex, rival = (cross_entropy_frame(classes, 3, depth, frame=frame, **given) for frame in ("simplex", "cross-polytope"))
        assert rival.loss < simplex.loss or simplex.margin == 0


@pytest.mark.parametrize("decay", [1e-3, 0.02, 0.2])
def test_a_frame_is_at_its_best_size(decay):
    found = cross_entropy_frame(5, 3, 2, weight_decay=[decay, 2 * decay], feature_decay=decay)
    alpha = np.linspace(0, 30, 300_001)
    loss = np.log1p(4 * np.exp(-alpha)) + 1.5 * 2 ** (1 / 3) * decay * 4 * (math.sqrt(3) * alpha) ** (2 / 3)
    assert found.loss == pytest.approx(loss.min(), rel=1e-7)
    assert found.margin == pytest.approx(alpha[loss.argmin()], abs=1e-4)


SOME = dict(weight_decay=0.1, feature_decay=0.1)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: cross_entropy_minimiser([3, 0], **SOME), ValueError, "class 1 has no example"),
        (lambda: cross_entropy_minimiser([3], **SOME), ValueError, r"1 class\(es\)"),
        (lambda: cross_entropy_minimiser([3, 2], weight_decay=-0.1, feature_decay=0.1), ValueError, "weight_decay of layer 1"),
        (lambda: cross_entropy_minimiser([3, 2], weight_decay=0.1, feature_decay=0.0), ValueError, "feature_decay = 0"),
        (lambda: cross_entropy_minimiser([3, 2], weight_decay=1e-16, feature_decay=1e-16), RuntimeError, "so little decay"),
        (lambda: cross_entropy_frame(1, 3, 1, **SOME), ValueError, r"1 class\(es\)"),
        (lambda: cross_entropy_frame(3, 0, 1, **SOME), ValueError, "class 0 has no example"),
        (lambda: cross_entropy_frame(3, 2, 0, **SOME), ValueError, "depth = 0"),
        (lambda: cross_entropy_frame(3, 2, 1, **SOME, frame="cross-polytope"), ValueError, "classes = 3 is odd"),
        (lambda: cross_entropy_frame(4, 2, 1, **SOME, frame="cube"), ValueError, "'cube' is neither"),
    ],
)  # fmt: skip
def test_refuses(call, error, says):
    with as_users_run_it(), pytest.raises(error, match=says):
        call()
