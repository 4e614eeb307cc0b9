"""The dual of an activation: what a wide layer does to covariances."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paperjax.limits import closed_forms
from paperjax.limits.closed_forms import Dual
from paperjax.limits.expectation import closed, pair
from paperjax.limits.quadrature import NotSmoothError, quadrature
from paperjax.limits.sampled import sampled


def dual(phi: Callable[[Array], Array] | Dual) -> Dual:
    """The dual of an activation: ``E phi(u) phi(v)`` and ``E phi'(u) phi'(v)`` over ``(u, v) ~ N(0, [[k11, k12], [k12, k22]])``.

    A wide layer with independent weights of variance ``1 / fan_in`` takes the covariances k of its inputs to ``value(k)``, and
    gradients on their way back by the factor ``derivative(k)`` (Daniely, Frostig and Singer, arXiv 1602.05897; Jacot, Gabriel and
    Hongler, arXiv 1806.07572). Use float64 where it matters; see `Dual`.

    Parameters
    ----------
    phi
        A function of ``jax.nn``, ``jnp`` or ``jax.scipy.special`` as it is: ``jax.nn.relu``, ``jax.nn.leaky_relu`` (also in a
        ``functools.partial``), ``jnp.abs``, ``jnp.sign``, ``jax.scipy.special.erf``, ``jnp.sin``, ``jnp.cos``, ``jnp.exp``,
        ``jnp.square``, ``jax.nn.identity`` and ``functools.partial(jax.nn.gelu, approximate=False)`` have closed forms, and so have
        they by another spelling, scaled and added, see `recognise`. `piecewise_linear`, `leaky_relu`, `polynomial`, `monomial` and
        `step` of this package are `Dual` already. Every other elementwise function goes to `quadrature`, ``jax.nn.gelu`` among them,
        which approximates by a tanh; and where a grid does not do (``jax.nn.relu6``, a tanh with a sharp bend), to `pair`, whose
        results are NaN where variances are traced and turn out to be above 100. See `pair` for two functions.

    Returns
    -------
    Dual

    Raises
    ------
    ValueError
        If phi is not elementwise, is not finite, or no quadrature here converges.
    TypeError
        If phi closes over a traced value.

    Examples
    --------
    >>> dual(jax.nn.relu)
    <dual of relu>
    >>> dual(jax.nn.relu).value(1.0, 0.0, 1.0).round(6)  # 1 / (2 pi)
    Array(0.159155, dtype=float32)
    >>> dual(jnp.tanh).derivative(1.0, 1.0, 1.0).round(4)
    Array(0.4644, dtype=float32)
    >>> dual(lambda h: jnp.maximum(h, 0.3 * h))
    <dual of 0.65 h + 0.35 signed 1(1 h)>
    """
    if isinstance(phi, Dual):
        return phi
    if not callable(phi):
        raise TypeError(f"dual: phi = {phi!r} is neither a function nor a Dual. Give the function itself: dual(jax.nn.relu).")
    if isinstance(phi, functools.partial) and not phi.args:
        if phi.func is jax.nn.leaky_relu and set(phi.keywords) <= {"negative_slope"}:
            return closed_forms.leaky_relu(phi.keywords.get("negative_slope", _LEAK))
        if phi.func is jax.nn.gelu and phi.keywords == {"approximate": False}:
            return closed_forms.gelu
    for known, its_dual in _KNOWN:
        if phi is known:
            return its_dual
    # What is not elementwise is told by `quadrature`.
    exact = closed(phi, phi) if sampled(phi).elementwise else None
    if exact:
        return exact
    try:
        return quadrature(phi)
    except NotSmoothError:
        return pair(phi)


_LEAK = 0.01
"""``negative_slope`` of jax.nn.leaky_relu."""

_KNOWN = (
    (jax.nn.relu, closed_forms.relu),
    (jax.nn.leaky_relu, closed_forms.leaky_relu(_LEAK)),
    (jax.nn.identity, closed_forms.identity),
    (jnp.positive, closed_forms.identity),
    (jnp.abs, closed_forms.absolute),
    (jax.lax.abs, closed_forms.absolute),
    (jnp.absolute, closed_forms.absolute),
    (jnp.sign, closed_forms.sign),
    (jax.lax.sign, closed_forms.sign),
    (jax.scipy.special.erf, closed_forms.erf),
    (jax.lax.erf, closed_forms.erf),
    (jnp.sin, closed_forms.sin),
    (jax.lax.sin, closed_forms.sin),
    (jnp.cos, closed_forms.cos),
    (jax.lax.cos, closed_forms.cos),
    (jnp.exp, closed_forms.exp),
    (jax.lax.exp, closed_forms.exp),
    (jnp.square, closed_forms.monomial(2)),
    (jax.lax.square, closed_forms.monomial(2)),
)
