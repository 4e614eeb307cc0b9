"""States that are gated again and again: highway networks exactly, recurrent cells drawn; against recursions, and finite widths."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import paperjax as pj
from tests.limits.ntk_networks import SENTENCES, VECTORS, B, W, dense, plain

KEY = jax.random.key(0)
limit = functools.partial(pj.limit, progress=False)
KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


def gram(x):
    return W**2 * x @ x.T / x.shape[-1] + B**2


def expectation(f, k):
    """``E f(u) f(v)`` by trapezoidal sums, which converge exponentially for what is analytic."""
    z = np.linspace(-9, 9, 300)
    weight = np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * np.pi)
    size, found = np.sqrt(np.diag(k)), np.zeros_like(k)
    for i, j in np.ndindex(k.shape):
        c = min(1.0, k[i, j] / (size[i] * size[j]))
        v = size[j] * (c * z[:, None] + math.sqrt(max(0.0, 1 - c * c)) * z)
        found[i, j] = np.einsum("a,a,ab,b", weight, f(size[i] * z), f(v), weight)
    return found


def highway(draw, x, n):
    h = dense(draw, x, n)
    for _ in range(2):
        gate = jax.nn.sigmoid(dense(draw, h, n))
        h = gate * jnp.tanh(dense(draw, h, n)) + (1 - gate) * h
    return dense(draw, h, 1, b=None)


def test_two_highway_layers_are_exact():
    # K' = E[t t'] E[g g'] + E[(1 - t)(1 - t')] K: a gate is independent of what it is applied to, and E g = 0.
    ours, k = limit(plain(highway), VECTORS), gram(VECTORS)
    tangent = k
    for _ in range(2):
        below, moved = W**2 * k + B**2, W**2 * (k + tangent) + B**2
        gates, values, left = (expectation(f, below) for f in (sigmoid, np.tanh, lambda h: 1 - sigmoid(h)))
        slopes = (expectation(f, below) for f in (lambda h: sigmoid(h) * (1 - sigmoid(h)), lambda h: 1 - np.tanh(h) ** 2))
        of_gate, of_value = slopes
        tangent = of_gate * (values + k) * moved + gates * of_value * moved + left * tangent
        k = gates * values + left * k
    np.testing.assert_allclose(ours.nngp, W**2 * k, rtol=1e-10)
    np.testing.assert_allclose(ours.ntk, W**2 * (k + tangent), rtol=1e-10)


def test_three_factors_of_one_side_that_depend_on_each_other():
    # E r(c) [r(c') (1 + P')] = E r(c) r(c') (1 + E P'), P = (r(a) + r(b)) r(a) r(b), E P = 2 E r(a)² E r(b), over pairs of positions.
    def forward(draw, x, n):
        a, b, c = (jax.nn.relu(dense(draw, x, n)) for _ in range(3))
        return dense(draw, jnp.mean(c + c * ((a + b) * a * b), 1), 1, b=None)

    x = SENTENCES[:, :2]
    ours = limit(plain(forward), x, ntk=False)
    k = gram(x.reshape(-1, 5))
    v = np.diag(k)
    c = np.clip(k / np.sqrt(np.outer(v, v)), -1, 1)
    # Of relu's powers 1 and 2 (Cho and Saul 2009, J_1 and J_2), by sums over z for what is mixed.
    z = np.linspace(-9, 9, 3001)
    density = np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * np.pi)
    angle = np.arccos(c)
    one = np.sqrt(np.outer(v, v)) * (np.sin(angle) + (np.pi - angle) * c) / (2 * np.pi)
    two = np.outer(v, v) * (3 * np.sin(angle) * c + (np.pi - angle) * (1 + 2 * c**2)) / (2 * np.pi)
    # E r(u)² r(v): v given u is normal, of E r = s phi(m / s) + m Phi(m / s).
    mixed = np.zeros_like(k)
    for i, j in np.ndindex(k.shape):
        m, s = k[i, j] / math.sqrt(v[i]) * z, math.sqrt(max(v[j] - k[i, j] ** 2 / v[i], 1e-300))
        inner = s * np.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * np.pi) + m * special.ndtr(m / s)
        mixed[i, j] = density @ (np.maximum(math.sqrt(v[i]) * z, 0) ** 2 * inner)
    mean = np.sqrt(v / (2 * np.pi)) * v
    both = two * one + mixed * mixed.T
    second = one * (1 + mean[:, None] + mean[None] + 2 * both)
    np.testing.assert_allclose(ours.nngp, W**2 * second.reshape(3, 2, 3, 2).mean((1, 3)), rtol=1e-5)


class Cell(nn.Module):
    """The last state of a recurrent cell, read out."""

    width: int
    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        cell = self.cell(self.width, kernel_init=KERNEL, recurrent_kernel_init=KERNEL, bias_init=nn.initializers.normal(0.3))
        return nn.Dense(1, kernel_init=KERNEL)(nn.RNN(cell)(x)[:, -1])


CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}
PLAN = dict(parametrization=pj.ntp, base=dict(width=64))
SERIES = SENTENCES[:2, :2].astype(np.float32)


@pytest.mark.slow
def test_an_lstm_is_drawn_with_consent():
    family, width, seeds = (lambda width: Cell(width, nn.LSTMCell)), 256, 64
    ours = limit(family, SERIES, key=KEY, samples=512, **PLAN)
    init, apply = pj.plan(pj.family(family), pj.ntp, base=dict(width=64), target=dict(width=width), x=SERIES).model

    @jax.jit
    def kernels(key):
        leaves = jax.tree.leaves(jax.jacobian(lambda p: apply(p, SERIES)[:, 0])(init(key, SERIES)))
        (readout,) = [g[..., 0] for g in leaves if g.shape == (2, width, 1)]
        # Under the plan weights are drawn as at the base.
        return readout @ readout.T / 64, sum(g.reshape(2, -1) @ g.reshape(2, -1).T for g in leaves)

    found = [np.stack(several) for several in zip(*(kernels(key) for key in jax.random.split(KEY, seeds)))]
    for several, wanted, drawn in zip(found, (ours.nngp, ours.ntk), ours.error):
        error = np.hypot(several.std(0, ddof=1) / seeds**0.5, drawn)
        # Five standard errors of the networks and of the draws, and a bias of a few over the width.
        assert (np.abs(several.mean(0) - wanted) < 5 * error + 3 / width * np.max(wanted)).all()
        assert (error < 0.05 * np.max(wanted)).all()
        assert (np.asarray(drawn) > 0).all()


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells_ask_for_consent(name):
    with pytest.raises(NotImplementedError, match=r"(?s)over 6 fields at once .*LSTM.*key=jax\.random\.key\(0\), samples=4096"):
        limit(lambda width: Cell(width, CELLS[name]), SERIES, **PLAN)
