"""What a limit is held against: kernels that change with the width, noise that stays, numbers that are not finite, too little memory."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from paperjax.limits import nodes as nd
from paperjax.limits import program as pg
from paperjax.limits.alike import alike
from paperjax.limits.pairs import as_double
from paperjax.limits.program import Program
from paperjax.limits.tiles import kernels


def audit_noise(program: Program, wider: Program, x1: Any) -> None:
    """What is neglected must fade with the width."""
    x = pg.largest(pg.example(x1) if isinstance(x1, Tracer) else np.asarray(x1))
    with nd.usual(True), nd.numbers():
        for (where, here), (_, there) in zip(program.noise(x), wider.noise(x)):
            if here > 1e-12 and not there < 0.85 * here:
                raise ValueError(
                    f"pj.limit: what a {where} takes for its mean at infinite width fluctuates by {here:.3g} at one width and {there:.3g} "
                    "at twice that, so it stays random. Attention logits scaled by 1/sqrt(d) do; scaled by 1/d they settle. (Or let heads "
                    "grow in number and not in size: that limit is known, Hron et al., arXiv 2006.10540; see key= and samples=.)"
                )


def audit(program: Program, wider: Program, x1: Any, x2: Any, ntk: bool, made: Any, dtype: str) -> None:
    """The kernels must not change with the width: they are looked at where they are not the same program at both."""
    traced = any(isinstance(x, Tracer) for x in (x1, x2))
    some = [pg.example(x1)] if traced else [np.asarray(x[:2]) for x in (x1, x2) if x is not None]
    first, second = some[0], some[1] if len(some) > 1 else None
    with nd.usual(True):
        one = as_double(jax.ShapeDtypeStruct(first.shape[1:], first.dtype))
        if alike(*(which.seen(one, ntk).kernel for which in (program, wider))):
            return

    def of(which: Program) -> Any:
        return kernels(which, first, second, ntk, False, np.dtype("float64"), 1 << 30, False)

    # Numbers, in a function that is being traced too: there, kernels of given examples are traced values as well.
    traced = traced or (made is not None and any(isinstance(k, Tracer) for k in made))
    with nd.numbers():
        found = [[k[:2, :2] for k in made] if made is not None and not traced else of(program), of(wider)]
    tolerance = 1e-6 if dtype == "float64" or made is None or traced else 1e-3
    for name, here, there in zip(("NNGP", "NTK"), *found):
        here, there = np.asarray(here), np.asarray(there)
        scale = np.abs(there).max()
        if np.abs(here - there).max() > tolerance * scale:
            power = math.log2(scale / np.abs(here).max()) if np.abs(here).max() else math.inf
            raise ValueError(f"pj.limit: the {name} changes with the width, about as n^{power:.2f}, so it has no limit. {why(name, power)}")


def check_result(n: int, m: int, program: Program, ntk: bool, per: str | None, dtype: str) -> None:
    """Refuse kernels that the machine's memory does not hold."""
    each = np.dtype(dtype).itemsize * math.prod(program.shape) ** 2
    copies = 1 + (len(program.paths) if per == "leaf" else 1) * ntk
    wanted = n * m * each * copies
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > 0.9 * have:
        raise ValueError(
            f"pj.limit: the kernels of {n} x {m} examples take {wanted / 1e9:.1f} GB, and the machine has {have / 1e9:.1f} GB. Write "
            'them to a folder, out=...; or ask for ntk=False, or dtype="float32".'
        )


def why(name: str, power: float) -> str:
    """The likely cause of a kernel that changes with the width as this power of it, and what to do."""
    if abs(power) < 0.05:
        return (
            "It is nearly settled: is there a correction of order 1/n, such as a variance with ddof=1, 1/(n - 1), or biases of variance "
            "1/(3 n), as Equinox draws them after the first layer? Write it without, declare what such biases come to, "
            "laws={path: pj.limits.constant(0.0)}, or trace where it is below 1e-6 of the kernel, at=dict(width=1 << 22)."
        )
    if name == "NTK":
        return (
            "Under one learning rate for all leaves that is so in standard parametrization: pass parametrization=pj.ntp, "
            "base=dict(width=...), or ask for ntk=False."
        )
    if power < 0:
        return (
            "The output at init fades: a readout over 1/n, as in muP and mean field, where features move and no kernel that stays fixed "
            "describes training. For kernels take parametrization=pj.ntp. Or is a sum over the width scaled by 1/n?"
        )
    return (
        "Is a sum over the width not scaled by 1/sqrt(n)? Or does laws= declare one variance for all widths? Where it falls with the "
        "width, give a function of it: laws=lambda width: {path: pj.limits.normal(1 / width)}."
    )
