"""The classification theorem of Tensor Programs IV, against the paper's text with one c and against measured networks."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.parametrization import Classification, classify

quarter = st.integers(-6, 6).map(lambda k: k / 4)
triple = st.tuples(quarter, quarter, quarter)


def theorem(a, b, c, hidden_layers):
    """Arrays a, b of L + 1 layers and one c, as the paper's Section 3 writes it."""
    L = hidden_layers
    a, b = ([None, t[0]] + [t[1]] * (L - 1) + [t[2]] for t in (a, b))
    r = min(a[L + 1] + b[L + 1], 2 * a[L + 1] + c) + c - 1 + min(2 * a[k] + (k == 1) for k in range(1, L + 1))
    stable = (
        a[1] + b[1] == 0
        and all(a[k] + b[k] == 0.5 for k in range(2, L + 1))
        and a[L + 1] + b[L + 1] >= 0.5
        and r >= 0
        and 2 * a[L + 1] + c >= 1
        and a[L + 1] + b[L + 1] + r >= 1
    )
    nontrivial = a[L + 1] + b[L + 1] + r == 1 or 2 * a[L + 1] + c == 1
    if not stable:
        return "unstable", r
    return ("trivial" if not nontrivial else "feature learning" if r == 0 else "kernel"), r


# Half of the examples satisfy the equalities of stability, which random numbers would hardly ever do.
stable_start = st.tuples(triple, quarter).map(lambda p: (p[0], (-p[0][0], 0.5 - p[0][1], max(0.5 - p[0][2], p[1]))))


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.one_of(stable_start, st.tuples(triple, triple)), quarter, st.integers(1, 4))
def test_one_learning_rate_is_the_papers_theorem(ab, c, hidden_layers):
    found = classify((*ab, c), hidden_layers)
    assert (found.regime, found.r) == theorem(*ab, c, hidden_layers)
    assert isinstance(found, Classification)


@hypothesis.settings(max_examples=200)
@hypothesis.given(stable_start, triple, triple, st.sampled_from(["sgd", "adam"]))
def test_no_shift_changes_the_class(ab, c, theta, optimizer):
    scheme = pj.abc("any", *ab, c, c)
    before, after = classify(scheme, 3, optimizer), classify(scheme.shifted(theta), 3, optimizer)
    assert (before.regime, before.why) == (after.regime, after.why)
    assert math.isclose(before.r, after.r, abs_tol=1e-12)


@hypothesis.given(stable_start, triple)
def test_learning_rates_of_each_layer_reduce_to_one_by_the_symmetry(ab, c):
    # Shifts theta = (c_l - c_1) / 2 bring every layer to the first one's c; then the paper's own theorem speaks.
    theta = tuple((each - c[0]) / 2 for each in c)
    a, b = (tuple(v + sign * t for v, t in zip(table, theta)) for table, sign in zip(ab, (1, -1)))
    assert classify((*ab, c), 2)[:2] == theorem(a, b, c[0], 2)


def test_twelve_points():
    points = {
        ((0, 0, 0), (0, 0.5, 0.5), 0): "unstable", ((0, 0, 0), (0, 0.5, 0.5), 1): "kernel", ((0, 0, 0), (0, 0.5, 0.5), 2): "trivial",
        ((0, 0.5, 0.5), (0, 0, 0), 0): "kernel", ((0, 0.5, 0.5), (0, 0, 0), -0.5): "unstable", ((0, 0.5, 0.5), (0, 0, 0), 1): "trivial",
        ((-0.5, 0, 0.5), (0.5, 0.5, 0.5), 0): "feature learning", ((-0.5, 0, 0.5), (0.5, 0.5, 0.5), 1): "trivial",
        ((-0.5, 0, 0.5), (0.5, 0.5, 0.5), -1): "unstable", ((0, 0.5, 1), (0, 0, 0), -1): "feature learning",
        ((0, 0, 0), (0, 0, 0.5), 1): "unstable", ((0.5, 0, 0.5), (0, 0.5, 0.5), 0): "unstable",
    }  # fmt: skip
    for point, regime in points.items():
        assert classify(point, 3).regime == regime, point


def moved(a, b, c, optimizer, widths=(256, 4096)):
    """Measured power of the width in the change of the last features of one hidden layer, and of the function, by one step."""
    changes = []
    for n in widths:
        rng = np.random.default_rng(0)
        u, v = rng.normal(size=(n, 2)) * n ** -b[0], rng.normal(size=(1, n)) * n ** -b[2]
        x = np.array([0.6, -0.8])

        def both(p, x=x, n=n):
            h = jnp.tanh(n ** -a[0] * p[0] @ x)
            return h, (n ** -a[2] * p[1] @ h)[0]

        def loss(p, both=both):
            return -both(p)[1]

        params = (jnp.asarray(u), jnp.asarray(v))
        grads = jax.grad(loss)(params)
        steps = [g if optimizer == "sgd" else jnp.sign(g) for g in grads]
        after = tuple(p - 1e-3 * n ** -c[k] * s for p, s, k in zip(params, steps, (0, 2)))
        (h0, f0), (h1, f1) = both(params), both(after)
        changes.append((float(jnp.sqrt(jnp.mean((h1 - h0) ** 2))), float(abs(f1 - f0))))
    return np.log(np.array(changes[1]) / np.array(changes[0])) / np.log(widths[1] / widths[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mup", "mup_table9", "ntp", "standard_full_align", "mean_field"])
def test_r_is_measured(name, optimizer, x64):
    # Two layers at widths 256 and 4096, linear response: features move by n^-r. (Adam's first step is the sign of the gradient.)
    scheme = getattr(pj, name)
    a, b, c = ([t[k].power(k) for k in ("input", "hidden", "output")] for t in (scheme.a, scheme.b, scheme.c[optimizer]))
    found = classify(scheme, 1, optimizer)
    features, function = moved(a, b, c, optimizer)
    assert features == pytest.approx(-found.r, abs=0.1)
    # The slower of the theorem's last two conditions is how far the function goes.
    assert function == pytest.approx(1 - min(v.value for v in found.conditions[-2:]), abs=0.15)


def test_bad_input():
    with pytest.raises(ValueError, match="hidden_layers = 0"):
        classify(pj.mup, 0)
    with pytest.raises(ValueError, match="novograd"):
        classify(pj.mup, 2, "novograd")
    with pytest.raises(ValueError, match="three exponents"):
        classify(((0, 0), (0, 0.5, 0.5), 0), 2)


def test_faithful_eps():
    late = pj.abc("eps too large", *((0, 0, 0), (0, 0.5, 1), (-1, 0, 1), (0, 1, 1)), eps=(0, 0, 0))
    assert classify(late, 2, "adam").faithful is False
    assert classify(((0, 0, 0), (0, 0.5, 1), (0, 1, 1)), 2, "adam").faithful is None
