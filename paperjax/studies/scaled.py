"""A family at several values of one size, under a parametrization or as it is: networks and optimizers for an Experiment."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paperjax.model import Family, Model, as_model, batch_form
from paperjax.model import family as make_family
from paperjax.parametrization import Parametrization, Plan, plan
from paperjax.train import resolve_optimizer


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Networks of a family that differ in one size.

    Attributes
    ----------
    axis, sizes
        The size that varies, and its values, increasing.
    networks
        By size, with the parametrization applied.
    plans
        By size; empty without a parametrization.
    optimizer, settings
        A name in optax or a factory, and its further arguments.
    parametrization
        Its name; "as it is" without one.
    """

    axis: str
    sizes: tuple[int, ...]
    networks: Mapping[int, Model]
    plans: Mapping[int, Plan]
    optimizer: Any
    settings: Mapping[str, Any]
    parametrization: str

    def network(self) -> Callable[..., Model]:
        """``(size) -> network``, the argument called `axis`."""
        return _named(lambda **given: self.networks[int(given[self.axis])], self.axis)

    def factory(self) -> Callable[..., Any]:
        """``(learning_rate, size) -> optimizer``, the last argument called `axis`."""

        def build(**given: Any) -> Any:
            if not self.plans:
                return resolve_optimizer(self.optimizer, {**self.settings, "learning_rate": given["learning_rate"]})
            return self.plans[int(given[self.axis])].optimizer(self.optimizer, given["learning_rate"], **self.settings)

        return _named(build, "learning_rate", self.axis)

    def multiplier(self, path: str, size: int) -> float:
        """What the plan multiplies a leaf by; 1 without a plan."""
        return self._factor(path, size, "multiplier")

    def learning_rate(self, path: str, size: int) -> float:
        """What the plan multiplies a leaf's learning rate by; 1 without a plan."""
        return self._factor(path, size, "learning_rate")

    def _factor(self, path: str, size: int, field: str) -> float:
        if not self.plans:
            return 1.0
        return next(getattr(leaf.factors, field) for leaf in self.plans[size].leaves if leaf.path == path)


def scaled(
    family: Any,
    parametrization: Parametrization | None,
    x: Any,
    widths: Sequence[int] | None,
    depths: Sequence[int] | None,
    optimizer: Any,
    base: Mapping[str, Any] | None,
    fixed: Mapping[str, Any],
    settings: Mapping[str, Any],
    at_least: int,
    what: str,
) -> Scaled:
    """Resolve what a study is asked to compare; every plan is made here, before anything is trained.

    Raises
    ------
    ValueError
        If not exactly one of `widths` and `depths` is given, there are too few values, or a plan cannot be made.
    """
    if (widths is None) == (depths is None):
        raise ValueError(
            f"{what} compares networks of several widths or of several depths: give widths=[...] or depths=[...], one of them."
        )
    axis, values = ("width", widths) if widths is not None else ("depth", depths)
    assert values is not None
    sizes = tuple(sorted({int(v) for v in values}))
    if len(sizes) < max(at_least, len(tuple(values))):
        raise ValueError(
            f"{what}: {axis}s = {list(values)} has {len(sizes)} distinct value(s), each to be given once; a law in the {axis} needs "
            f"at least {at_least}."
        )
    if axis in fixed:
        raise ValueError(f"{what}: {axis} is given as {axis}s=[...] and as {axis}={fixed[axis]}: keep the first.")
    fam = family if isinstance(family, Family) else make_family(family)
    for name in (axis, *fixed):
        if name not in fam.sizes:
            raise ValueError(
                f"{what}: the family takes no size {name!r}; it takes {', '.join(fam.sizes) or 'none'}. "
                f"If it has another name there, rename it: pj.family(lambda {name}: ...)."
            )
    batch = batch_form(x, f"{what}: x")
    if parametrization is None:
        networks = {size: as_model(fam(**{**fixed, axis: size})) for size in sizes}
        return Scaled(axis, sizes, networks, {}, optimizer, settings, "as it is")
    start = {**fixed, axis: sizes[0], **(base or {})}
    plans = {size: plan(fam, parametrization, start, {**fixed, axis: size}, optimizer, batch) for size in sizes}
    return Scaled(axis, sizes, {size: p.model for size, p in plans.items()}, plans, optimizer, settings, parametrization.name)


def exponent(at: Callable[[int], float], sizes: Sequence[int]) -> float:
    """The power of the size that a positive number scales with, from its values at the first and the last; -inf if it is 0."""
    first, last = at(sizes[0]), at(sizes[-1])
    if first == 0 and last == 0:
        return -math.inf
    if not (first > 0 and last > 0):
        return math.nan
    return math.log(last / first) / math.log(sizes[-1] / sizes[0])


def _named(fn: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The function with a signature of these names: an Experiment passes an axis to whoever names it."""

    def call(**given: Any) -> Any:
        return fn(**given)

    kind = inspect.Parameter.KEYWORD_ONLY
    call.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # pyright: ignore[reportFunctionMemberAccess]
    return call
