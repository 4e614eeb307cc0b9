"""What is read off a kernel, against numpy and the laws of each quantity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paperjax.kernels import spectrum
from paperjax.kernels.matrix import Form, fold, fold_kernel, unfold, unfold_kernel

N, OUT = 5, 2


def full(seed=0, n=N, outputs=(OUT,), features=30):
    jac = np.random.default_rng(seed).normal(size=(n, int(np.prod(outputs)), features)) / features**0.5
    kernel = np.einsum("nop,mqp->nmoq", jac, jac)
    return kernel.reshape(n, n, *outputs, *outputs)


def labels(seed=1, n=N):
    return np.random.default_rng(seed).normal(size=(n, OUT))


def gram(seed=0, n=N, features=3):
    x = np.random.default_rng(seed).normal(size=(n, features))
    return x @ x.T


def close(got, wanted, tol=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tol, atol=tol)


matrices = hnp.arrays(np.float64, (4, 3), elements=st.floats(-2, 2, width=16)).filter(lambda x: np.abs(x).max() > 0.1)


# Layouts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [(), (2,), (2, 3)])
def test_as_matrix_acts_as_the_kernel(x64, outputs):
    rng = np.random.default_rng(0)
    kernel, v = rng.normal(size=(4, 5, *outputs, *outputs)), rng.normal(size=(5, *outputs))
    k = len(outputs)
    wanted = np.einsum(kernel, [0, 1, *range(2, 2 + 2 * k)], v, [1, *range(2 + k, 2 + 2 * k)], [0, *range(2, 2 + k)])
    close((spectrum.as_matrix(kernel) @ v.ravel()).reshape(wanted.shape), wanted)
    swapped = kernel.transpose(1, 0, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
    np.testing.assert_array_equal(spectrum.as_matrix(swapped), spectrum.as_matrix(kernel).T)


@pytest.mark.parametrize("shape", [(3,), (3, 3, 2), (3, 3, 2, 3)])
def test_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="is no matrix"):
        spectrum.as_matrix(np.ones(shape))


@pytest.mark.parametrize("kind", ["full", "shared", "diagonal"])
@pytest.mark.parametrize("outputs", [(), (2, 3)])
def test_folding_and_back(kind, outputs):
    rng, form = np.random.default_rng(0), Form(kind, outputs)
    kernel, values = jnp.asarray(rng.normal(size=(4, 5, *form.axes))), jnp.asarray(rng.normal(size=(7, 5, *outputs)))
    np.testing.assert_array_equal(unfold_kernel(fold_kernel(kernel, form), form), kernel)
    np.testing.assert_array_equal(unfold(fold(values, form), form), values)
    image = unfold(jnp.matmul(fold_kernel(kernel, form), fold(values[0], form)), form)
    k = len(outputs)
    out = [*range(2, 2 + k)]
    axes = {"full": [*out, *range(2 + k, 2 + 2 * k)], "diagonal": out, "shared": []}[kind]
    v_axes = [1, *range(2 + k, 2 + 2 * k)] if kind == "full" else [1, *out]
    close(image, np.einsum(np.asarray(kernel), [0, 1, *axes], np.asarray(values[0]), v_axes, [0, *out]), 1e-5)


# Spectrum --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [(), (2,), (3, 2)])
def test_eigenvalues_and_vectors(x64, outputs):
    kernel = full(outputs=outputs)
    got = spectrum.eigenvalues(kernel)
    size = N * int(np.prod(outputs))
    assert got.vectors.shape == (size, N, *outputs)
    flat, matrix = np.asarray(got.vectors).reshape(size, size), np.asarray(spectrum.as_matrix(kernel))
    close(got.eigenvalues, np.linalg.eigvalsh(matrix)[::-1])
    close(flat @ flat.T, np.eye(size))
    close(flat.T @ np.diag(got.eigenvalues) @ flat, matrix)


@settings(max_examples=10)
@given(x=matrices, seed=st.integers(0, 1000))
def test_spectral_numbers_do_not_depend_on_the_basis(x, seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    with jax.enable_x64(True):
        k, y = x @ x.T, np.ones((4, 1))
        turned = rotation @ k @ rotation.T
        close(spectrum.eigenvalues(turned).eigenvalues, spectrum.eigenvalues(k).eigenvalues, 1e-8)
        close(spectrum.effective_dimension(turned, 0.3), spectrum.effective_dimension(k, 0.3), 1e-8)
        close(spectrum.participation(turned), spectrum.participation(k), 1e-8)
        close(spectrum.alignment(turned, rotation @ y), spectrum.alignment(k, y), 1e-8)
        dimension, alignment = float(spectrum.effective_dimension(k, 0.3)), float(spectrum.alignment(k, y))
        assert 0 <= dimension <= np.linalg.matrix_rank(x)
        assert 1 - 1e-9 <= float(spectrum.participation(k)) <= np.linalg.matrix_rank(x) + 1e-9
        assert -1e-9 <= alignment <= 1 + 1e-9
        power = np.asarray(spectrum.cumulative_power(k, y))
        assert (np.diff(power) >= -1e-9).all()
        close(power[-1], 1.0)


def test_effective_dimension(x64):
    k = gram()
    for ridge in (1e-3, 1.0, 50.0):
        close(spectrum.effective_dimension(k, ridge), np.trace(k @ np.linalg.inv(k + ridge * np.eye(N))))
    close(spectrum.effective_dimension(k, 1e-9), 3, 1e-5)
    close(spectrum.effective_dimension(k, 1e9) * 1e9, np.trace(k), 1e-6)
    wide = np.einsum("nm,op->nmop", k, np.eye(OUT))
    close(spectrum.effective_dimension(wide, 1.0), OUT * spectrum.effective_dimension(k, 1.0))
    for ridge in (0.0, -1.0, np.nan, [1.0, 2.0]):
        with pytest.raises(ValueError, match="positive number"):
            spectrum.effective_dimension(k, ridge)


def test_participation(x64):
    values = np.array([3.0, 2.0, 1.0, 0.0])
    close(spectrum.participation(np.diag(values)), 36 / 14)
    close(spectrum.participation(7 * gram()), spectrum.participation(gram()))


# Labels ----------------------------------------------------------------------------------------------------------------


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("centered", [False, True])
def test_alignment_is_a_cosine(x64, centered):
    h = np.eye(N) - centered * np.ones((N, N)) / N
    y, k, wide = labels(), gram(), full()
    close(spectrum.alignment(k, y, centered=centered), cosine(h @ k @ h, h @ y @ y.T @ h))
    h_wide, flat = np.kron(h, np.eye(OUT)), (h @ y).ravel()
    dense = np.asarray(spectrum.as_matrix(wide))
    close(spectrum.alignment(wide, y, centered=centered), cosine(h_wide @ dense @ h_wide, np.outer(flat, flat)))
    diagonal = np.einsum("nmoo->nmo", wide)
    dense = np.asarray(spectrum.as_matrix(np.einsum("nmo,op->nmop", diagonal, np.eye(OUT))))
    close(spectrum.alignment(diagonal, y, centered=centered), cosine(h_wide @ dense @ h_wide, np.outer(flat, flat)))
    close(spectrum.alignment(3 * k, -2 * y, centered=centered), spectrum.alignment(k, y, centered=centered))


def test_alignment_is_one_for_the_labels_own_kernel(x64):
    y = labels()
    for centered in (False, True):
        close(spectrum.alignment(y @ y.T, y, centered=centered), 1.0)
        close(spectrum.alignment(np.einsum("no,mp->nmop", y, y), y, centered=centered), 1.0)
    close(spectrum.alignment(y @ y.T + 5, y, centered=True), 1.0)
    assert spectrum.alignment(y @ y.T + 5, y) < 0.9


def test_label_gradient_alignment_is_the_correlation_of_the_entries(x64):
    wide = full()
    one_hot = np.eye(2)[[0, 1, 1, 0, 1]]
    traced = np.einsum("nmoo->nm", wide)
    wanted = np.corrcoef(traced.ravel(), (one_hot @ one_hot.T).ravel())[0, 1]
    close(spectrum.label_gradient_alignment(wide, one_hot), wanted)
    close(spectrum.label_gradient_alignment(traced, one_hot), wanted)
    close(spectrum.label_gradient_alignment(np.einsum("nmoo->nmo", wide), one_hot), wanted)
    close(spectrum.label_gradient_alignment(4 * traced + 9, one_hot), wanted)
    # Entries of the Gram matrix below 1 set to -1, as the paper's code has it.
    close(np.corrcoef(traced.ravel(), np.where(one_hot @ one_hot.T < 1, -1, 1).ravel())[0, 1], wanted)
    order = np.random.default_rng(0).permutation(N)
    close(spectrum.label_gradient_alignment(traced[order][:, order], one_hot[order]), wanted)


def test_cumulative_power(x64):
    k, y, wide = gram(features=N), labels(), full()
    _, vectors = np.linalg.eigh(k)
    wanted = np.cumsum(((vectors.T @ y) ** 2).sum(1)[::-1]) / (y**2).sum()
    close(spectrum.cumulative_power(k, y), wanted)
    _, vectors = np.linalg.eigh(np.asarray(spectrum.as_matrix(wide)))
    close(spectrum.cumulative_power(wide, y), np.cumsum((vectors.T @ y.ravel())[::-1] ** 2) / (y**2).sum())
    diagonal = np.einsum("nmoo->nmo", wide)
    close(spectrum.cumulative_power(diagonal, y), spectrum.cumulative_power(np.einsum("nmo,op->nmop", diagonal, np.eye(OUT)), y))
    # At the end of each eigenspace of the shared kernel the two layouts have the same power.
    close(spectrum.cumulative_power(np.einsum("nm,op->nmop", k, np.eye(OUT)), y)[OUT - 1 :: OUT], wanted)


# Change ----------------------------------------------------------------------------------------------------------------


def test_distance_and_movement(x64):
    one, two = full(0), full(1)
    close(spectrum.kernel_distance(one, two), 1 - cosine(one, two))
    close(spectrum.movement(one, two), np.linalg.norm(two - one) / np.linalg.norm(one))
    close(spectrum.kernel_distance(one, 3 * one), 0.0)
    close(spectrum.movement(one, 3 * one), 2.0)
    assert spectrum.movement(one, one) == 0
    cross = np.random.default_rng(0).normal(size=(2, 3, 4))
    close(spectrum.kernel_distance(cross, -cross), 2.0)


def test_a_small_distance_is_not_lost():
    one = full(0).astype(np.float32)
    two = one + 1e-4 * full(1).astype(np.float32)
    got = float(spectrum.kernel_distance(one, two))
    wide = one.astype(float), two.astype(float)
    np.testing.assert_allclose(got, 1 - cosine(*wide), rtol=1e-2)
    assert got < 1e-7


@pytest.mark.parametrize(
    "number",
    [
        lambda k: spectrum.effective_dimension(k, 0.5),
        spectrum.participation,
        lambda k: spectrum.alignment(k, labels()[:, 0], centered=True),
        lambda k: spectrum.label_gradient_alignment(k, labels()[:, 0]),
        lambda k: spectrum.kernel_distance(k, gram(3)),
        lambda k: spectrum.movement(gram(3), k),
    ],
)
def test_gradients(x64, number):
    k, rng = gram(features=N), np.random.default_rng(7)
    direction = rng.normal(size=(N, N))
    direction = direction + direction.T
    slope = jnp.vdot(jax.jit(jax.grad(number))(jnp.asarray(k)), direction)
    close(slope, (number(k + 1e-6 * direction) - number(k - 1e-6 * direction)) / 2e-6, 1e-7)


# What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [spectrum.eigenvalues, spectrum.participation, lambda k: spectrum.effective_dimension(k, 1.0)])
def test_kernels_that_are_none(number):
    for bad, message in (
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "the kernel holds nan"),
        (np.array([[1.0, 1.0], [0.0, 1.0]]), "not symmetric"),
        (np.ones((2, 3)), "2 by 3"),
        (np.ones((0, 0)), "0 by 0"),
        (np.ones((2, 2, 3)), "is no matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            number(bad)


def test_nothing_is_divided_by_zero():
    y = labels()
    with pytest.raises(ValueError, match="the kernel is 0"):
        spectrum.participation(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="the kernel is 0"):
        spectrum.alignment(np.zeros((N, N)), y)
    with pytest.raises(ValueError, match="Gram matrix of the labels is 0"):
        spectrum.alignment(gram(), np.ones((N, 1)), centered=True)
    with pytest.raises(ValueError, match="less its mean is 0"):
        spectrum.label_gradient_alignment(np.ones((N, N)), y)
    with pytest.raises(ValueError, match="Gram matrix less its mean is 0"):
        spectrum.label_gradient_alignment(gram(), np.ones((N, 1)))
    # 0.1 less the mean of such is not always 0.
    for constant in (0.1, 0.3, 7.7):
        with pytest.raises(ValueError, match="less its mean is 0"):
            spectrum.label_gradient_alignment(np.full((5, 5), constant, np.float32), np.arange(5.0))
        with pytest.raises(ValueError, match="the kernel is 0"):
            spectrum.alignment(np.full((7, 7), constant, np.float32), np.arange(7.0), centered=True)
        with pytest.raises(ValueError, match="Gram matrix less its mean is 0"):
            spectrum.label_gradient_alignment(np.eye(5), np.full(5, constant))
    with pytest.raises(ValueError, match="y is 0"):
        spectrum.cumulative_power(gram(), np.zeros(N))
    for number in (spectrum.kernel_distance, spectrum.movement):
        with pytest.raises(ValueError, match="k1 is 0"):
            number(np.zeros((2, 2)), np.eye(2))
        with pytest.raises(ValueError, match=r"k1 has shape \(2, 2\) and k2 \(3, 3\)"):
            number(np.eye(2), np.eye(3))
        with pytest.raises(ValueError, match="k2 holds nan"):
            number(np.eye(2), np.full((2, 2), np.nan))


def test_labels_that_do_not_fit():
    for number in (spectrum.alignment, spectrum.label_gradient_alignment, spectrum.cumulative_power):
        with pytest.raises(ValueError, match="y has 4 examples"):
            number(gram(), np.ones(4))
        with pytest.raises(TypeError, match="class labels"):
            number(gram(), np.ones(N, int))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_scale_is_not_lost_in_float32(size):
    kernel, other = (jnp.asarray(full(seed), jnp.float32) for seed in (0, 2))
    y = jnp.asarray(labels(), jnp.float32)

    def numbers(kernel, other, y):
        named = [spectrum.alignment(kernel, y), spectrum.alignment(kernel, y, centered=True), spectrum.label_gradient_alignment(kernel, y)]
        pairs = [spectrum.kernel_distance(kernel, other), spectrum.movement(kernel, other)]
        return jnp.stack([*named, *pairs, spectrum.participation(kernel), *spectrum.cumulative_power(kernel, y)])

    close(numbers(size * kernel, size * other, y / size), numbers(kernel, other, y), 1e-5)
