"""Products of two wide values, head by head: attention whose logits stay random, in the limit of many heads.

Of a head of fixed size logits ``q k' / sqrt(d)`` are no numbers, however wide the network is, but heads are independent, so what sums
over many of them is Gaussian, of a covariance that is an expectation over one head (Hron et al., arXiv 2006.10540). That of
``A v``, v independent of A, is ``sum E[A A'] E[v v']``, and that of the logits ``d E[q q'] E[k k']``: attention without a softmax is exact.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

from paperjax.limits import fields as fl
from paperjax.limits.nodes import Axes, Paired, Wide, coordinates, rep_size

Moments = Array | None
Labels = list[int]

KNOWN = (
    "Of a fixed number of heads, attention with logits over sqrt(d) has a mixture of Gaussians for a limit, and no kernel; of a growing "
    "number it is Gaussian (Hron et al., arXiv 2006.10540): let heads grow in number and not in size, or scale logits by 1/d."
)


@runtime_checkable
class Runs(Protocol):
    """What is needed of `paperjax.limits.moments.Run`."""

    def second(self, u: Wide, v: Wide, s: int, t: int, diag: bool = False) -> Moments:
        """See there."""
        ...

    def mean(self, u: Wide, s: int) -> Moments:
        """See there."""
        ...


def paired(u: Wide, v: Wide, axes: Axes, numbers: Any, count: int) -> Paired:
    """``dot_general`` of two wide values that sums over finite axes; `count` of independent coordinates are among them.

    Raises
    ------
    NotImplementedError
        If no axis grows with which one and the other are independent copies, or one is shared along an axis that grows.
    """
    (inside, v_inside), (batch, v_batch) = numbers
    growing = [sum(atom.grows for i in which for atom in w.axes[i]) for w, which in ((u, batch), (v, v_batch))]
    if not growing[0] or growing[0] != growing[1]:
        raise NotImplementedError(
            "a product of two wide values that sums over no growing axis (attention logits of heads whose size and number are fixed, or "
            f"an outer product), which stays random at infinite width. {KNOWN}"
        )
    for w, which, others in ((u, batch, inside), (v, v_batch, v_inside)):
        if any(atom.grows for i in range(len(w.axes)) if i not in which and i not in others for atom in w.axes[i]):
            raise NotImplementedError("a product of two wide values that sums over one of two growing axes, or shares keys among heads.")
    pairs = [*zip(inside, v_inside), *zip(batch, v_batch)]
    if any(rep_size(u.axes[i]) != rep_size(v.axes[j]) or coordinates(u.axes[i]) != coordinates(v.axes[j]) for i, j in pairs):
        raise NotImplementedError("a product of two wide values of which one is independent and the other not along an axis of both.")
    return Paired(axes, u, v, numbers, count)


def _labels(node: Paired, fresh: Callable[[], int], out: Labels | None) -> tuple[Labels, Labels, Labels]:
    """Of the axes of its two factors and of itself, for `jnp.einsum`."""
    (inside, v_inside), (batch, v_batch) = node.numbers
    u = [fresh() for _ in node.u.axes]
    v = [fresh() for _ in node.v.axes]
    for i, j in (*zip(inside, v_inside), *zip(batch, v_batch)):
        v[j] = u[i]
    free, v_free = ([k for i, k in enumerate(w) if i not in a and i not in b] for w, a, b in ((u, inside, batch), (v, v_inside, v_batch)))
    made = [*(u[i] for i in batch), *free, *v_free]
    if out is None:
        return u, v, made
    same = dict(zip(made, out))
    return [same.get(k, k) for k in u], [same.get(k, k) for k in v], out


def _counter() -> Callable[[], int]:
    numbers = iter(range(10**6))
    return lambda: next(numbers)


def mean(run: Runs, node: Paired, s: int) -> Moments:
    """``E`` of it."""
    u, v, out = _labels(node, _counter(), None)
    if not fl.independent(node.u, node.v):
        both = run.second(node.u, node.v, s, s)
        return None if both is None else node.count * jnp.einsum(both, [*u, *v], out)
    a, b = run.mean(node.u, s), run.mean(node.v, s)
    return None if a is None or b is None else node.count * jnp.einsum(a, u, b, v, out)


def exact(a: Wide, b: Wide) -> bool:
    """Whether `second` knows the expectation of the product of two values."""
    if not (isinstance(a, Paired) and isinstance(b, Paired)):
        # Three Gaussian factors.
        return any(isinstance(w, Paired) and all(map(fl.is_gaussian, (w.u, w.v, z))) for w, z in ((a, b), (b, a)))
    if a.count != b.count or (a is not b and a.count > 1 and not (plain(a) and plain(b))):
        return False
    if _apart((a.u, b.u), (a.v, b.v)):
        return a.count == 1 or _copies((a.u, b.u)) or _copies((a.v, b.v))
    return all(map(fl.is_gaussian, (a.u, a.v, b.u, b.v))) and plain(a) and plain(b)


def plain(node: Paired) -> bool:
    """Whether its factors have no other finite axes of independent coordinates than those that are summed over."""
    (inside, v_inside), _ = node.numbers
    return not any(
        atom.kind == "iid" and not atom.grows
        for w, which in ((node.u, inside), (node.v, v_inside))
        for i, axis in enumerate(w.axes)
        if i not in which
        for atom in axis
    )


def second(run: Runs, a: Wide, b: Wide, s: int, t: int, diag: bool) -> Moments:
    """``E`` of the product of two, one at each example.

    Of four Gaussian factors by Isserlis' theorem; of others if those on the left are independent of those on the right.

    Raises
    ------
    NotImplementedError
        If it is neither.
    """
    if not exact(a, b):
        raise NotImplementedError(
            "products of wide values that share random numbers and are not Gaussian (values that are keys, logits that meet their own "
            f"queries). {DRAW}"
        )
    if not (isinstance(a, Paired) and isinstance(b, Paired)):
        return None
    fresh = _counter()
    u, v, out = _labels(a, fresh, None)
    u2, v2, out2 = _labels(b, fresh, list(out) if diag else None)
    made = out if diag else [*out, *out2]

    def product(left: tuple[Any, ...], right: tuple[Any, ...]) -> Moments:
        x, y = run.second(*left[:4]), run.second(*right[:4])
        return None if x is None or y is None else jnp.einsum(x, left[4], y, right[4], made)

    straight = product((a.u, b.u, s, t, [*u, *u2]), (a.v, b.v, s, t, [*v, *v2]))
    if _apart((a.u, b.u), (a.v, b.v)):
        return None if straight is None else a.count * straight
    crossed = product((a.u, b.v, s, t, [*u, *v2]), (a.v, b.u, s, t, [*v, *u2]))
    alone = product((a.u, a.v, s, s, [*u, *v]), (b.u, b.v, t, t, [*u2, *v2]))
    terms = [k * n for k, n in ((straight, a.count), (crossed, a.count), (alone, a.count**2)) if k is not None]
    return sum(terms[1:], start=terms[0]) if terms else None


DRAW = "Its expectation over a coordinate can be drawn: opt in to Monte Carlo with key=jax.random.key(0), samples=4096."


def _apart(left: tuple[Wide, ...], right: tuple[Wide, ...]) -> bool:
    return all(fl.independent(p, q) for p in left for q in right)


def _copies(nodes: tuple[Wide, ...]) -> bool:
    """Whether coordinates of values along a finite axis are independent, of mean 0."""
    return all(fl.is_gaussian(w) and not fl.joins_positions(w) for w in nodes)
