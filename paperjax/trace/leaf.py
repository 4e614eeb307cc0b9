"""A trained leaf as the trace found it, and which of its uses decides how it scales."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from paperjax.trace.graph import Site
from paperjax.trace.initial import Law

# In the order in which they decide for a leaf of several: what writes into the width before what reads it out.
ROLES = ("hidden", "input", "embedding", "vector", "output", "finite")
Infinite = tuple[frozenset[str], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A trained leaf of the target network: what its axes are, and what it was at the base size.

    Attributes
    ----------
    path, shape, dtype
        As in the target's parameters.
    base_shape
        Its shape at the base sizes.
    infinite
        For each axis, the sizes that change it.
    sites
        Its uses by the data, in order.
    roles
        One role for each distinct use, whatever their order; two for tied weights.
    law, base_law, narrow_law
        Its entries at initialization: at the target, at the base, and at the base's widths with the target's depth.
    own_width, own_depth
        The factor that the model itself multiplies the leaf or its product by, target over base: from the widths, for each site, and from
        the depth, for the one that decides.
    own_projection
        Of a query's or key's projection that is written ``(x @ W) / sqrt(n)``: that factor, target over base. It is part of how the logits
        are scaled as well (see `Program`), so it counts as the leaf's own only where a parametrization leaves the logits as they are.
    alike
        Whether the base is sure to have a leaf of this part to compare it with; if not, it is one of the same shape, numbered with it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    base_shape: tuple[int, ...]
    infinite: Infinite
    sites: tuple[Site, ...]
    roles: tuple[str, ...]
    law: Law
    base_law: Law
    narrow_law: Law
    own_width: tuple[float, ...] = ()
    own_depth: float = 1.0
    own_projection: float = 1.0
    alike: bool = True

    @property
    def role(self) -> str:
        """The role, or both of a tied leaf joined by ``+``."""
        return "+".join(self.roles)

    @property
    def deciding(self) -> int:
        """Which of its sites its one initialization and learning rate follow, whatever the order in which the network has them.

        That of the first role in `ROLES`; of several such, the one whose fan-in grows most, and that the model multiplies by least.
        """

        def rank(k: int) -> tuple[Any, ...]:
            (fan_in, fan_out), (base_in, base_out) = self.fans(site=k), self.fans(base=True, site=k)
            own = abs(math.log(self.own_width[k])) if self.own_width else 0.0
            return ROLES.index(role_of(self.sites[k], self.infinite)), -fan_in / max(1, base_in), -fan_out / max(1, base_out), -fan_in, own

        return min(range(len(self.sites)), key=rank)

    @property
    def own(self) -> float:
        """Of `own_width`, that of the use that decides."""
        return self.own_width[self.deciding] if self.own_width else 1.0

    def kind_of(self, site: int, among: Sequence[Site] | None = None) -> tuple[Any, ...]:
        """What uses of one kind have in common: role and axes."""
        found = (self.sites if among is None else among)[site]
        return role_of(found, self.infinite), found.kind, found.inside, found.out

    def first_of(self, kind: tuple[Any, ...], among: Sequence[Site] | None = None) -> int:
        """The number of the first use of a kind, and 0 where there is none."""
        sites = self.sites if among is None else among
        return next((k for k in range(len(sites)) if self.kind_of(k, sites) == kind), 0)

    def fans(self, base: bool = False, site: int | None = None) -> tuple[int, int]:
        """Fan-in and fan-out of a use, by default the one that decides: products of the contracted and of the free axes.

        Of a lookup the fan-in is 1; of an elementwise use both are what its axes amount to, fan-in 1. So too of a leaf without uses.
        """
        shape = self.base_shape if base else self.shape
        if not self.sites:
            return 1, math.prod(shape)
        used = self.sites[self.deciding if site is None else site]
        inside = () if used.kind in ("lookup", "elementwise") else used.inside + used.window
        return math.prod(shape[a] for a in inside), math.prod(shape[a] for a in used.out)


def roles_of(sites: Sequence[Site], infinite: Infinite) -> tuple[str, ...]:
    """The distinct roles of a leaf's uses, in the order of `ROLES`."""
    found = {role_of(site, infinite) for site in sites}
    return tuple(role for role in ROLES if role in found) or ("finite",)


def role_of(site: Site, infinite: Infinite) -> str:
    """The role that one use gives a leaf whose axes are infinite for the sizes named; see `paperjax.trace.program.read`."""
    inside = any(infinite[a] for a in site.inside)
    out = any(infinite[a] for a in site.out)
    if site.kind == "elementwise":
        return "vector" if out else "finite"
    if site.kind == "lookup":
        return "embedding" if out else "finite"
    if site.kind == "convolution" and site.groups > 1 and not inside and out:
        return "vector"
    return {(True, True): "hidden", (False, True): "input", (True, False): "output", (False, False): "finite"}[inside, out]
