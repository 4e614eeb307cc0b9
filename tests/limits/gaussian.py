"""Expectations under a Gaussian pair by another route: Gauss–Legendre in polar coordinates, cut where an argument changes sign."""

import itertools

import numpy as np
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
