"""Networks with free features, minimised by L-BFGS from random starts: the route that knows nothing of singular values."""

import numpy as np
from scipy.optimize import minimize


def log_softmax(z):
    z = z - z.max(0)
    return z - np.log(np.exp(z).sum(0))


def minimised(sizes, decay, *, bias=False, loss="mse", seeds=4, scale=0.7):
    """The lowest of several local minima: ``(loss, [W_1, ..., W_M, H, b])``, features by example."""
    return min((descent(sizes, decay, bias, loss, seed, scale) for seed in range(seeds)), key=lambda found: found[0])


def descent(sizes, decay, bias, loss, seed, scale):
    K, N, M = len(sizes), sum(sizes), len(decay) - 1
    y = np.repeat(np.eye(K), sizes, axis=1)
    shapes = [*[(K, K)] * M, (K, N), (K, 1)]
    cuts = np.cumsum([np.prod(shape) for shape in shapes])[:-1]

    def parts(flat):
        return [part.reshape(shape) for part, shape in zip(np.split(flat, cuts), shapes)]

    def value(flat):
        *weights, h, b = parts(flat)
        layers = [h]
        for w in weights:
            layers.append(w @ layers[-1])
        z = layers[-1] + bias * b
        if loss == "mse":
            total, g = ((z - y) ** 2).sum() / (2 * N), (z - y) / N
        else:
            log_p = log_softmax(z)
            total, g = -(y * log_p).sum() / N, (np.exp(log_p) - y) / N
        total += sum(lam / 2 * (w**2).sum() for lam, w in zip(decay, (*weights, h)))
        grads, g_b = [], bias * g.sum(1, keepdims=True)
        for w, below, lam in zip(weights[::-1], layers[-2::-1], decay[-2::-1]):
            grads.append(g @ below.T + lam * w)
            g = w.T @ g
        return total, np.concatenate([part.ravel() for part in (*grads[::-1], g + decay[-1] * h, g_b)])

    start = scale * np.random.default_rng(seed).standard_normal(cuts[-1] + K)
    found = minimize(value, start, jac=True, method="L-BFGS-B", options=dict(maxiter=20_000, maxfun=40_000, ftol=1e-16, gtol=1e-11))
    return float(found.fun), parts(found.x)


def product(weights, h):
    for w in weights:
        h = w @ h
    return h
