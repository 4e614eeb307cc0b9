"""The solver against the closed form, scipy's solver and the second-order equation."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from paperjax.kernels import predict
from tests.kernels.problems import OUT, M, N, close, problem


@pytest.mark.parametrize(("kind", "loss"), [pytest.param("shared", "mse", marks=pytest.mark.slow), ("diagonal", "half_sum_of_squares")])
def test_the_solver_agrees_with_the_closed_form(x64, kind, loss):
    (k, y, k_test), starts, _, _ = problem(kind)
    times = np.array([2.0, 0.0, 0.5])
    got = predict.gradient_flow_ode(k, y, k_test, loss=loss)(times, *starts)
    wanted = predict.gradient_flow(k, y, k_test, loss=loss)(times, *starts)
    close(got.train, wanted.train, 1e-6)
    close(got.test, wanted.test, 1e-6)


@pytest.mark.parametrize("integer", [True, False])
def test_cross_entropy_against_scipy(x64, integer):
    (k, _, k_test), starts, dense, _ = problem()
    labels = np.array([0, 1, 1, 0])
    y = labels if integer else np.eye(OUT)[labels]

    def field(_, state):
        f = state[: N * OUT].reshape(N, OUT)
        p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
        slope = ((p - np.eye(OUT)[labels]) / N).ravel()
        return -np.concatenate([dense[0] @ slope, dense[1] @ slope])

    wanted = scipy.integrate.solve_ivp(field, (0, 20), np.concatenate([s.ravel() for s in starts]), rtol=1e-10, atol=1e-10).y[:, -1]
    got = predict.gradient_flow_ode(k, y, k_test, loss="cross_entropy")(20.0, *starts)
    close(got.train, wanted[: N * OUT].reshape(N, OUT), 1e-6)
    close(got.test, wanted[N * OUT :].reshape(M, OUT), 1e-6)


@pytest.mark.slow
def test_a_loss_of_ones_own_and_a_stiff_solver(x64):
    import diffrax

    y = np.array([1.0, -2.0])
    # f' = -lambda sign-like tanh(f - y): sinh(f - y) decays as exp(-lambda t).
    f = predict.gradient_flow_ode(
        np.diag([1.0, 1e4]), y, loss=lambda f, y: jnp.sum(jnp.log(jnp.cosh(f - y))), solver=diffrax.Kvaerno5(), max_steps=500
    )
    close(f(2.0).train, y + np.arcsinh(np.sinh(-y) * np.exp(-2.0 * np.array([1.0, 1e4]))), 1e-6)


@pytest.mark.slow
def test_friction_is_the_second_order_equation(x64):
    (k, y, k_test), starts, dense, _ = problem()
    friction, t = 0.7, 3.0
    size, tests = N * OUT, M * OUT
    # State: f - y, f_test and their speeds.
    generator = np.zeros((2 * (size + tests),) * 2)
    both = size + tests
    generator[:both, both:] = np.eye(both)
    generator[both : both + size, :size], generator[both + size :, :size] = -2 / y.size * dense[0], -2 / y.size * dense[1]
    generator[both:, both:] = -friction * np.eye(both)
    start = np.concatenate([(starts[0] - y).ravel(), starts[1].ravel(), np.zeros(both)])
    end = scipy.linalg.expm(t * generator) @ start
    got = predict.gradient_flow_ode(k, y, k_test, loss="mse", friction=friction)(t, *starts)
    close(got.train, y + end[:size].reshape(N, OUT), 1e-6)
    close(got.test, end[size:both].reshape(M, OUT), 1e-6)
    lr = 1e-8
    discrete = predict.gradient_descent(k, y, k_test, learning_rate=lr, momentum=1 - friction * lr**0.5)(round(t / lr**0.5), *starts)
    close(discrete.train, got.train, 1e-4)
    close(discrete.test, got.test, 1e-4)


def test_a_solver_that_does_not_arrive_says_so():
    k, y = np.diag(np.array([1.0, 1e4], np.float32)), np.ones(2, np.float32)
    with pytest.raises(RuntimeError, match=r"did not reach t = 100: 50 steps.*max_steps 50"):
        predict.gradient_flow_ode(k, y, loss="mse", max_steps=50)(100.0)


def test_the_solver_refuses():
    k, y = np.eye(2, dtype=np.float32), np.ones(2, np.float32)
    f = predict.gradient_flow_ode(k, y, loss="mse")
    for t in (np.inf, -1.0, []):
        with pytest.raises(ValueError, match="finite"):
            f(t)
    with pytest.raises(ValueError, match="rtol"):
        predict.gradient_flow_ode(k, y, loss="mse", rtol=1e-9)
    with pytest.raises(ValueError, match="atol"):
        predict.gradient_flow_ode(k, y, loss="mse", atol=1e-12)
    with pytest.raises(ValueError, match="unknown loss 'mae'"):
        predict.gradient_flow_ode(k, y, loss="mae")
    with pytest.raises(ValueError, match="must be one number"):
        predict.gradient_flow_ode(k, y, loss=lambda f, y: f - y)
    with pytest.raises(ValueError, match=r"outputs=\(classes,\)"):
        predict.gradient_flow_ode(k, np.array([0, 1]), loss="cross_entropy")
    with pytest.raises(ValueError, match=r"lie in 0\.\.2"):
        predict.gradient_flow_ode(k, np.array([0, 2]), loss="cross_entropy", outputs=(2,))
    with pytest.raises(ValueError, match="friction"):
        predict.gradient_flow_ode(k, y, loss="mse", friction=-1.0)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        predict.gradient_flow_ode(-k, y, loss="mse")
    with pytest.raises(ValueError, match="empty"):
        predict.gradient_flow_ode(k, np.float32(1.0), loss="mse")
