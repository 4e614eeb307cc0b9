import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.papers.parametrization.wd_layerwise_scaling import largest, mixed_top, steady_rms


@pytest.mark.parametrize(("lr", "decay", "b1"), [(0.01, 1.0, 0.0), (0.01, 1.0, 0.9), (0.1, 2.0, 0.95)])
def test_the_steady_state_is_the_sum_of_squared_responses(lr, decay, b1):
    # What one gradient of size 1 does to w at every later step, by running the optimizer's own recursion.
    m, w, response = 1 - b1, 0.0, []
    for _ in range(5000):
        w, m = (1 - lr * decay) * w - lr * m, b1 * m
        response.append(w)
    assert steady_rms(lr, decay, b1) == pytest.approx(np.sqrt(np.sum(np.square(response))), rel=1e-6)


def test_momentum_leaves_the_slow_limit_alone():
    lr, decay = 1e-5, 0.1
    assert steady_rms(lr, decay, 0.9) == pytest.approx(np.sqrt(lr / (2 * decay)), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05])
def test_the_spike_is_that_of_a_random_matrix(share):
    d, lr, decay, b1 = 400, 0.01, 1.0, 0.9
    size = np.hypot(share, 1 - share)
    noise = np.random.default_rng(0).standard_normal((d, d)) * (1 - share) / size * steady_rms(lr, decay, b1)
    # At 0.01 the spike is above the edge: 4 against 1.35.
    found = np.linalg.norm(share / size / decay + noise, ord=2)
    assert mixed_top(d, share, lr, decay, b1) == pytest.approx(found, rel=0.02)


def test_the_top_singular_value_without_a_factorization():
    w = np.random.default_rng(1).standard_normal((48, 48)).astype(np.float32)
    for matrix in (w, 1e-3 * w, np.ones_like(w)):
        assert float(largest(jnp.asarray(matrix))) == pytest.approx(np.linalg.norm(matrix, ord=2), rel=1e-3)
