"""Functions of wide values that have no expectation: which they are, and what is said of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paperjax.limits.expectation import NoExpectationError
from paperjax.limits.panels import MOST_BREAKS, STEEP, breaks
from paperjax.limits.sampled import sampled, slope


@runtime_checkable
class Expecting(Protocol):
    """What is asked of `paperjax.limits.moments.Run`."""

    @property
    def cache(self) -> dict[Any, Any]:
        """See there."""
        ...

    @property
    def shift(self) -> Any:
        """See there."""
        ...


@contextlib.contextmanager
def told() -> Iterator[None]:
    """An expectation that is not found, in terms of the network.

    Raises
    ------
    ValueError
        In place of `NoExpectationError`.
    """
    try:
        yield
    except NoExpectationError as error:
        raise ValueError(
            "pj.limit: a function of wide values has no expectation, or none that is found here: its integral does not settle at variance "
            f"{error.variance:g}. Is its mean infinite (does it grow faster than exponentials do)? Does it oscillate fast, have more than "
            f"{MOST_BREAKS} kinks or one beyond 100, or compute in float32 inside? Take a function that grows less, or clip what enters it."
        ) from error


STEPS = np.array([1e-4, 1e-6, 1e-8, 1e-10])
"""From a break, or from 0, where poles are that are no breaks: a power of them is told from what levels off."""


def refuse_infinite(run: Expecting, fn: Callable[..., Any], name: bytes) -> None:
    """Refuse functions whose square, or whose slope's in a tangent kernel, has no integral at a break: a sum over a grid is finite."""
    tangent = run.shift is not None
    if ("finite", name, tangent) in run.cache:
        return
    points = np.asarray((0.0, *breaks(sampled(fn))))[:, None, None] + np.array([[-1.0], [1.0]]) * STEPS
    for what, f in (("value", fn), ("slope", slope(fn)))[: 2 if tangent else 1]:
        sizes = np.abs(sampled(f).at(points))
        if what == "value" and np.isnan(sizes[..., 0]).any():
            raise ValueError(
                f"pj.limit: a function of wide values is NaN near {round(points[np.isnan(sizes)][0], 4) + 0.0:g}: a root, a logarithm or a "
                "power of negative numbers? Gaussian values have both signs. Take it of what is positive (jnp.abs, a square, a softplus)."
            )
        powers = np.diff(np.log(np.maximum(sizes, 1e-300))) / -np.diff(np.log(STEPS))
        fast, steep = (np.all(powers[..., [0, 2]] > power, -1) for power in (0.49, STEEP))
        if what == "slope" and np.any(steep) and not np.any(fast):
            raise ValueError(
                f"pj.limit: a function of wide values has a slope that grows near {round(points[steep][0, -1], 4) + 0.0:g} as "
                f"|h|^-{powers[steep][0, -1]:.2g}: the tangent kernel exists, and its integrals are not found to 1e-10 here. Ask for "
                "ntk=False, or smooth the function there ((h^2 + 1e-6)^0.4 for |h|^0.8)."
            )
        if np.any(fast):
            said = {
                "value": "and so is the NNGP. Smooth the function there.",
                "slope": "and so is the tangent kernel of an example with itself. Ask for ntk=False, or smooth the function there "
                "(sqrt(h^2 + 1)).",
            }
            raise ValueError(
                f"pj.limit: a function of wide values has a {what} that grows near {round(points[fast][0, -1], 4) + 0.0:g} so fast (as "
                f"|h|^-1/2, or faster) that its mean square is infinite, {said[what]}"
            )
    run.cache["finite", name, tangent] = True
