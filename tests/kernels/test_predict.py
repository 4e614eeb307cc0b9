"""Predictions against linear dynamics written out: matrix exponentials and training loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paperjax as pj
from paperjax.kernels import modes, predict
from paperjax.losses import mse
from tests.kernels.problems import KINDS, OUT, M, N, close, flowed, problem
from tests.zoo import Data, line

# Gradient flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "loss", "rate"), [*((kind, "mse", 2 / (N * OUT)) for kind in KINDS), ("full", "half_sum_of_squares", 1.0)]
)
def test_flow_is_the_matrix_exponential(x64, kind, loss, rate):
    (k, y, k_test), starts, dense, _ = problem(kind)
    times = np.array([0.0, 0.3, 2.0, 50.0])
    got = predict.gradient_flow(k, y, k_test, loss=loss)(times, *starts)
    assert got.train.shape == (4, N, OUT)
    assert got.test.shape == (4, M, OUT)
    for i, t in enumerate(times):
        train, test = flowed(dense, y, starts, rate * t)
        close(got.train[i], train)
        close(got.test[i], test)


@pytest.mark.parametrize("kind", KINDS)
def test_flow_in_the_limits(x64, kind):
    (k, y, k_test), starts, dense, _ = problem(kind)
    f = predict.gradient_flow(k, y, k_test)
    start, end = f(0, *starts), f(np.inf, *starts)
    np.testing.assert_array_equal(start.train, starts[0])
    np.testing.assert_array_equal(start.test, starts[1])
    close(end.train, y, 1e-9)
    close(end.test, starts[1] + (dense[1] @ np.linalg.solve(dense[0], (y - starts[0]).ravel())).reshape(M, OUT), 1e-9)
    late = f(1e7, *starts)
    close(late.test, end.test, 1e-8)
    speed = (f(1e-6, *starts).test - start.test) / 1e-6
    close(speed, -2 / y.size * (dense[1] @ (starts[0] - y).ravel()).reshape(M, OUT), 1e-5)


def test_flow_from_zero_is_the_default_and_the_test_kernel_is_optional(x64):
    (k, y, k_test), _, _, _ = problem()
    alone, both = predict.gradient_flow(k, y)(1.5), predict.gradient_flow(k, y, k_test)(1.5, np.zeros((N, OUT)), np.zeros((M, OUT)))
    assert alone.test is None
    close(alone.train, both.train, 1e-14)


def test_flow_goes_on_from_where_it_was(x64):
    (k, y, k_test), starts, _, _ = problem()
    f = predict.gradient_flow(k, y, k_test)
    half = f(0.7, *starts)
    whole, on = f(1.9, *starts), f(1.2, *half)
    close(on.train, whole.train, 1e-12)
    close(on.test, whole.test, 1e-12)


def test_axes_of_times_come_first(x64):
    (k, y, k_test), starts, _, _ = problem("diagonal")
    f = predict.gradient_flow(k, y, k_test)
    grid = np.array([[0.0, 1.0, np.inf], [3.0, 0.5, 7.0]])
    got = f(grid, *starts)
    assert got.train.shape == (2, 3, N, OUT)
    close(got.test[1, 2], f(7.0, *starts).test, 1e-13)
    with pytest.raises(ValueError, match="0 or more"):
        f([1.0, -1.0])
    with pytest.raises(ValueError, match="0 or more"):
        f(np.nan)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_shared_kernel_is_the_same_kernel_for_each_output(x64, kind):
    (k, y, k_test), starts, _, _ = problem("shared")
    spread = np.eye(OUT) if kind == "full" else np.ones(OUT)
    wide, wide_test = (np.multiply.outer(kernel, spread) for kernel in (k, k_test))
    one, other = predict.gradient_flow(k, y, k_test)(1.3, *starts), predict.gradient_flow(wide, y, wide_test)(1.3, *starts)
    close(one.train, other.train, 1e-12)
    close(one.test, other.test, 1e-12)


@pytest.mark.parametrize("outputs", [(), (1,), (2, 3)])
def test_any_axes_of_outputs(x64, outputs):
    rng = np.random.default_rng(1)
    jac = rng.normal(size=(N + M, *outputs, 30))
    axes = "abc"[: len(outputs)]
    kernel = np.einsum(f"n{axes}z,m{axes.upper()}z->nm{axes}{axes.upper()}", jac, jac)
    y = rng.normal(size=(N, *outputs))
    got = predict.gradient_flow(kernel[:N, :N], y, kernel[N:, :N])(np.inf)
    flat = jac.reshape(N + M, -1, 30)
    weights = np.linalg.pinv(flat[:N].reshape(-1, 30)) @ y.ravel()
    close(got.train, y, 1e-8)
    close(got.test, (flat[N:] @ weights).reshape(M, *outputs), 1e-8)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**20), rank=st.integers(1, 6))
def test_loss_falls_and_what_the_kernel_has_no_direction_for_stays(seed, rank):
    rng = np.random.default_rng(seed)
    jac, y = rng.normal(size=(6, rank)), rng.normal(size=(6, 1))
    order, rotation = rng.permutation(6), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    with jax.enable_x64(True):
        f = predict.gradient_flow(jac @ jac.T, y)
        path = np.asarray(f(np.array([0.0, 0.1, 1.0, 30.0, np.inf])).train)
        permuted = predict.gradient_flow((jac @ jac.T)[order][:, order], y[order])(1.0).train
        rotated = predict.gradient_flow(rotation @ (jac @ jac.T) @ rotation.T, rotation @ y)(1.0).train
    losses = ((path - y) ** 2).sum((1, 2))
    assert (np.diff(losses) <= 1e-12).all()
    projection = jac @ np.linalg.pinv(jac)
    np.testing.assert_allclose(path[-1], projection @ y, atol=1e-9)
    np.testing.assert_allclose(path - projection @ path, 0, atol=1e-9)
    np.testing.assert_allclose(permuted, path[2][order], atol=1e-9)
    np.testing.assert_allclose(rotated, rotation @ path[2], atol=1e-9)


def test_a_singular_kernel_in_float32_learns_the_mean_of_contradicting_labels():
    x = np.array([[1.0, 0.3], [1.0, 0.3], [0.2, 1.0]], np.float32)
    y, x_test = np.array([3.0, 1.0, 0.5], np.float32), np.array([[0.4, 0.4]], np.float32)
    f = predict.gradient_flow(x @ x.T, y, x_test @ x.T)
    for t in (1e4, 1e12, np.inf):
        got = f(t)
        assert got.train.dtype == jnp.float32
        close(got.train, [2.0, 2.0, 0.5], 1e-4)
        close(got.test, x_test @ (np.linalg.pinv(x) @ y), 1e-4)


def test_rtol_says_which_eigenvalues_are_zero(x64):
    k, y = np.diag([1.0, 1e-3]), np.ones(2)
    close(predict.gradient_flow(k, y)(np.inf).train, [1.0, 1.0])
    close(predict.gradient_flow(k, y, rtol=1e-2)(np.inf).train, [1.0, 0.0])
    close(predict.gradient_flow(np.zeros((2, 2)), y)(np.inf).train, [0.0, 0.0])


def test_flow_can_be_jitted_and_differentiated(x64):
    (k, y, k_test), starts, _, _ = problem()

    def at(k, y, t):
        return predict.gradient_flow(k, y, k_test)(t, *starts).test

    close(jax.jit(at)(k, y, 1.5), at(k, y, 1.5), 1e-12)
    slope = jax.jacobian(lambda t: at(k, y, t))(1.5)
    close(slope, (at(k, y, 1.5 + 1e-6) - at(k, y, 1.5 - 1e-6)) / 2e-6, 1e-6)
    direction = np.random.default_rng(5).normal(size=k.shape)
    direction = direction + direction.transpose(1, 0, 3, 2)
    tangent = jax.jvp(lambda k: at(k, y, 1.5), (jnp.asarray(k),), (jnp.asarray(direction),))[1]
    close(tangent, (at(k + 1e-6 * direction, y, 1.5) - at(k - 1e-6 * direction, y, 1.5)) / 2e-6, 1e-6)


# Gradient descent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "nesterov", "loss"), [(0.0, False, "mse"), (0.9, False, "mse"), (0.9, True, "half_sum_of_squares"), (0.4, True, "mse")]
)
def test_descent_is_a_training_loop(x64, momentum, nesterov, loss):
    rng = np.random.default_rng(3)
    jac, y, f0 = rng.normal(size=(N + M, OUT, 5)), rng.normal(size=(N, OUT)), rng.normal(size=(N + M, OUT))
    kernel = np.einsum("nop,mqp->nmoq", jac, jac)
    optimizer = optax.sgd(0.02, momentum, nesterov)

    def objective(theta):
        f = f0[:N] + jnp.einsum("nop,p->no", jac[:N], theta)
        return mse(f, y) if loss == "mse" else jnp.sum((f - y) ** 2) / 2

    def step(state, _):
        theta, inner = state
        updates, inner = optimizer.update(jax.grad(objective)(theta), inner)
        return (theta + updates, inner), theta

    _, thetas = jax.lax.scan(step, (jnp.zeros(5), optimizer.init(jnp.zeros(5))), None, length=61)
    steps = np.array([0, 1, 2, 7, 60])
    f = predict.gradient_descent(kernel[:N, :N], y, kernel[N:, :N], learning_rate=0.02, momentum=momentum, nesterov=nesterov, loss=loss)
    got = f(steps, f0[:N], f0[N:])
    wanted = f0 + np.einsum("nop,sp->sno", jac, thetas[steps])
    close(got.train, wanted[:, :N], 1e-11)
    close(got.test, wanted[:, N:], 1e-11)
    close(f(7, f0[:N], f0[N:]).train, wanted[3, :N], 1e-11)


def test_time_is_the_learning_rate_times_the_steps_of_the_package():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)).astype(np.float32), rng.normal(size=(12, 2)).astype(np.float32)
    data, model = Data(x[:8], y[:8], x[8:], y[8:]), line(2)
    trained = pj.train(
        model, model.init(jax.random.key(0), data.x_train), data, optimizer=optax.sgd(1e-2), steps=100, measure_at=[100],
        measures={"f": lambda params: model.apply(params, x)},
    )  # fmt: skip
    kernels = x[:8] @ x[:8].T, y[:8], x[8:] @ x[:8].T
    exact = predict.gradient_descent(*kernels, learning_rate=1e-2)(100)
    np.testing.assert_allclose(trained.measures["f"][-1], np.concatenate(exact), atol=2e-6)
    flow = predict.gradient_flow(*kernels)(1e-2 * 100)
    np.testing.assert_allclose(np.concatenate(flow), np.concatenate(exact), atol=1e-2)
    finer = predict.gradient_descent(*kernels, learning_rate=1e-5)(100_000)
    np.testing.assert_allclose(np.concatenate(flow), np.concatenate(finer), atol=2e-5)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_a_million_steps_in_float32(momentum, nesterov):
    # A float32 loop would lose the slow modes in 1 - 1e-6; the closed forms of the 2 by 2 matrix do not, in float64.
    values = np.array([1.0, 1e-2, 1e-4, 1e-6])
    lr, steps = 0.5, 1_000_000
    f = predict.gradient_descent(
        np.diag(values).astype(np.float32), np.ones(4, np.float32), 1e3 * np.eye(4, dtype=np.float32), learning_rate=lr, momentum=momentum,
        nesterov=nesterov, loss="half_sum_of_squares", rtol=0.0,
    )  # fmt: skip
    got = f(steps)
    wanted = []
    for x in lr * values:
        ahead = momentum if nesterov else 0.0
        matrix = np.array([[1 - x * (1 + ahead), -x * momentum * (ahead if nesterov else 1)], [1, momentum]])
        wanted.append(1 - np.linalg.matrix_power(matrix, steps)[0, 0])
    np.testing.assert_allclose(got.train, wanted, rtol=2e-5)
    np.testing.assert_allclose(got.test, 1e3 * np.array(wanted) / values, rtol=2e-5)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
def test_the_edge_of_stability_is_where_the_spectral_radius_is_one(x64, momentum, nesterov):
    top, n = 3.0, 4
    k, y = np.diag([top, 1.0, 0.5, 0.1]), np.ones(n)
    rate = 2 / n
    with pytest.raises(ValueError, match="largest eigenvalue of k_train is 3") as refused:
        predict.gradient_descent(k, y, learning_rate=100.0, momentum=momentum, nesterov=nesterov)
    edge = float(str(refused.value).split("stability, ")[1].split(":")[0])

    def radius(lr):
        ahead, x = (momentum if nesterov else 0.0), lr * rate * top
        step = np.array([[1 - x * (1 + ahead), -x * momentum * (ahead if nesterov else 1)], [1, momentum]])
        return np.abs(np.linalg.eigvals(step)).max()

    assert radius(0.999 * edge) < 1 < radius(1.001 * edge)
    f = predict.gradient_descent(k, y, learning_rate=0.99 * edge, momentum=momentum, nesterov=nesterov)
    close(f(1_000_000).train, y, 1e-9)


def test_descent_refuses_what_is_no_rate_no_momentum_and_no_count():
    k, y = np.eye(2, dtype=np.float32), np.ones(2, np.float32)
    for lr in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="learning_rate"):
            predict.gradient_descent(k, y, learning_rate=lr)
    for momentum in (1.0, -0.1):
        with pytest.raises(ValueError, match="momentum"):
            predict.gradient_descent(k, y, learning_rate=0.1, momentum=momentum)
    f = predict.gradient_descent(k, y, learning_rate=0.1)
    for steps in (-1, 0.5, []):
        with pytest.raises(ValueError, match="whole numbers"):
            f(steps)


def test_descent_can_be_jitted(x64):
    (k, y, k_test), starts, _, _ = problem()

    def after(lr, steps):
        return predict.gradient_descent(k, y, k_test, learning_rate=lr, momentum=0.5)(steps, *starts).test

    close(jax.jit(after)(0.3, jnp.array([3, 40])), after(0.3, jnp.array([3, 40])), 1e-12)


# What is refused -------------------------------------------------------------------------------------------------------


def refused(message, k, y, k_test=None, error=ValueError, **options):
    with pytest.raises(error, match=message):
        predict.gradient_flow(k, y, k_test, **options)


def test_kernels_that_are_none():
    (k, y, k_test), _, _, _ = problem("shared")
    bad = k.copy()
    bad[1, 2] = np.nan
    refused(r"k_train holds nan at \(1, 2\)", bad, y)
    refused(r"k_test holds inf at \(0, 0\)", k, y, np.full((M, N), np.inf))
    refused("y holds nan", k, np.where(y > 0, np.nan, y))
    refused("not symmetric", k + np.triu(np.ones((N, N))), y)
    refused("not positive semi-definite: its lowest", k - 10 * np.eye(N), y)
    refused("3 by 4 as a matrix", k_test, y)
    refused("and not empty", np.zeros((0, 0)), np.zeros((0, 2)))
    refused("complex", k + 0j, y, error=TypeError)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda k: {"w": k}, r"k_train is a dict.*one kernel.*sum\(k\.values\(\)\)"),
        (lambda k: pj.limits.Limit(k, k, None), r"k_train is a Limit.*its \.ntk or \.nngp"),
    ],
)
def test_what_holds_several_kernels(kernel, message):
    (k, y, _), _, _, _ = problem("shared")
    with pytest.raises(TypeError, match=message):
        # Without the types that tests check at every call.
        modes.read(kernel(k), y)


def test_shapes_that_do_not_fit():
    (k, y, k_test), starts, _, _ = problem()
    refused(r"k_train has shape \(4, 4, 2, 2\), and y has outputs of shape \(3,\)", k, np.ones((N, 3)))
    refused(r"y\[:, None\] for one output", k, np.ones(N))
    refused("k_train has shape", np.ones(4), np.ones(4))
    refused("y has 3 examples and k_train 4", k, y[:3])
    refused("must be .N, .out.", k, np.float32(1.0))
    refused(r"k_test has shape \(4, 3, 2, 2\).*the other way round", k, y, k_test.swapaxes(0, 1))
    refused(r"k_test has shape \(3, 4\)", k, y, k_test[..., 0, 0])
    refused("class labels", k, np.ones((N, OUT), int), error=TypeError)
    refused("no closed form", k, y, loss="cross_entropy")
    f = predict.gradient_flow(k, y, k_test)
    with pytest.raises(ValueError, match="f0_train is given and f0_test is not"):
        f(1.0, starts[0])
    with pytest.raises(ValueError, match="f0_test is given and f0_train is not"):
        f(1.0, None, starts[1])
    with pytest.raises(ValueError, match=r"f0_test has shape \(4, 2\)"):
        f(1.0, starts[0], starts[0])
    with pytest.raises(ValueError, match="no k_test"):
        predict.gradient_flow(k, y)(1.0, *starts)
    with pytest.raises(ValueError, match="f0_train holds nan"):
        predict.gradient_flow(k, y)(1.0, np.full((N, OUT), np.nan))


def test_rounding_is_no_reason_to_refuse():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2)).astype(np.float32)
    k = x @ x.T + 1e-6 * rng.normal(size=(30, 30)).astype(np.float32)
    assert np.linalg.eigvalsh((k + k.T) / 2)[0] < 0
    assert np.isfinite(predict.gradient_flow(k, x[:, 0])(1e9).train).all()
