"""Expectations under a Gaussian pair by other routes: Gauss–Legendre in polar coordinates, cut where an argument changes sign; adaptive."""

import itertools

import numpy as np
import scipy.integrate
import scipy.special


def expectation(f, g, k11, k12, k22):
    """``E f(u) g(v)``. In ``u = s1 r cos t, v = s2 r cos(t - t0)``, cos t0 = rho, a kink or a jump at 0 is a line of constant t."""
    s1, s2 = k11**0.5, k22**0.5
    t0 = np.arccos(np.clip(k12 / (s1 * s2), -1, 1)) if s1 * s2 > 0 else np.pi / 2
    cuts = np.unique(np.r_[np.array([np.pi / 2, 3 * np.pi / 2, t0 + np.pi / 2, t0 + 3 * np.pi / 2]) % (2 * np.pi), 0.0, 2 * np.pi])
    x, w = scipy.special.roots_legendre(80)
    r, w_r = 7 * (x + 1), 7 * w
    total = 0.0
    for a, b in itertools.pairwise(cuts):
        t, w_t = (a + b) / 2 + (b - a) / 2 * x, (b - a) / 2 * w
        u, v = s1 * np.outer(r, np.cos(t)), s2 * np.outer(r, np.cos(t - t0))
        total += w_r * r * np.exp(-(r**2) / 2) @ (f(u) * g(v)) @ w_t
    return total / (2 * np.pi)


def adaptive(f, g, k11, k12, k22, breaks_f=(0.0,), breaks_g=(0.0,)):
    """``E f(u) g(v)`` by adaptive Gauss–Kronrod in u and v themselves, cut at their breaks; in one dimension where v = ±u."""
    s1, s2 = k11**0.5, k22**0.5

    def single(h, s, cuts):
        if s == 0:
            return float(h(np.zeros(1))[0])
        ends = np.unique(np.clip([-10 * s, *cuts, 10 * s], -10 * s, 10 * s))
        bell = lambda u: np.exp(-((u / s) ** 2) / 2) / (s * np.sqrt(2 * np.pi))  # noqa: E731
        integrand = lambda u: float(h(np.array([u]))[0]) * bell(u)  # noqa: E731
        return sum(scipy.integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-13, limit=400)[0] for a, b in itertools.pairwise(ends))

    if s1 == 0 or s2 == 0:
        return single(f, s1, breaks_f) * single(g, s2, breaks_g)
    rho = k12 / (s1 * s2)
    if abs(rho) > 1 - 1e-12:
        ratio = np.sign(rho) * s2 / s1
        return single(lambda u: f(u) * g(ratio * u), s1, [*breaks_f, *(b / ratio for b in breaks_g)])
    determinant = k11 * k22 - k12**2

    def integrand(x):
        u, v = x[:, 0], x[:, 1]
        return f(u) * g(v) * np.exp(-(k22 * u * u - 2 * k12 * u * v + k11 * v * v) / (2 * determinant)) / (2 * np.pi * determinant**0.5)

    cuts = [np.unique(np.clip([-9 * s, *b, 9 * s], -9 * s, 9 * s)) for s, b in ((s1, breaks_f), (s2, breaks_g))]
    boxes = itertools.product(*(itertools.pairwise(c) for c in cuts))
    options = dict(rule="gk21", rtol=1e-12, atol=1e-13 * s1 * s2, max_subdivisions=3000)
    return sum(float(scipy.integrate.cubature(integrand, [a[0], b[0]], [a[1], b[1]], **options).estimate) for a, b in boxes)
