"""The tables of `scaling.py` as Markdown."""

from collections import Counter
from typing import Any

import scaling

TITLE = """# Scaling on paper

Written by `python benchmarks/scaling.py --write` (JAX {jax}, {rows} programs compiled for up to {most} pretended CPU devices, none of them
run). Nothing here was measured on a TPU or a GPU: counts are of compiled programs, times are predictions."""

COUNTS = """## Counts

One step of one cell a share of `sweep`: forward, backward, Adam, the whole set as batch, float32. Per device. F is 2 m n k summed over the
matrix products of the loop's body, in brackets over a device's share of the cells' own products: 1 is no product computed twice.
A collective's N is the whole array (one device's before an all-reduce or an all-to-all, all devices' after an all-gather). Sent is
2 N (k - 1) / k for an all-reduce around a ring of k devices, N (k - 1) / k for a gather or an all-to-all, N for a permutation. State is
parameters and Adam's moments; temporary is what XLA's CPU compiler plans beside it, without rematerialization."""

FORMULAS = """## Predictions

With F, the bytes s that each collective sends and the state S from the tables above, and of the machine the rate R of products, memory's
rate B and what a chip sends in a second within a group of k, L(k):

- products: F / R
- state, read and written once: 2 S / B, a floor for what memory takes; activations come on top
- sending: Σ s / L(k)
- without overlap: t = max(F / R, 2 S / B) + Σ s / L(k); with all of it: t = max(F / R, 2 S / B, Σ s / L(k))
- efficiency: cells × F₁ / (chips × R × t), F₁ the products of one cell on one device; the range is from no overlap to all of it

Arrays are float32, products in one bfloat16 pass at the full rate, as a TPU takes float32 by default. Not in it: latency (the number of
collectives is in the counts), what products lose of R in practice, activations through memory. So efficiencies are upper bounds. A row
whose state and temporaries pass the chip's memory says so: it wants smaller batches, or rematerialization, which the counts are without.
Compilers for TPU and GPU may make a reduce-scatter, at half the bytes, of an all-reduce of which each device keeps a part
(fully_sharded's gradients)."""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def amount(n: float, unit: str = "B") -> str:
    """In three digits.

    Examples
    --------
    >>> amount(203751488), amount(0), amount(4)
    ('204 MB', '0 B', '4 B')
    """
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 0.9995 * 10**power:
            return f"{n / 10**power:.3g} {letter}{unit}"
    return f"{n:.3g} {unit}"


def collectives_of(row: Any) -> str:
    """Kinds, axes and sizes, the largest first."""
    total, times = Counter(), Counter()
    for one in row.found:
        key = (one.kind, "×".join(one.axes) or "nothing", one.size)
        total[key] += one.bytes * one.times
        times[key] += one.times
    return "; ".join(f"{times[key]} {key[0]} over {key[1]} ({key[2]}): {amount(n)}" for key, n in total.most_common()) or "none"


def counts(rows: list[Any], one: Any) -> str:
    lines = []
    for row in rows:
        useful = one.flops * row.mesh[0] / row.chips
        held = f"{amount(row.state)}, {amount(row.temporary)}"
        lines.append([row.where, f"{amount(row.flops, 'FLOP')} ({row.flops / useful:.2f})", collectives_of(row), amount(row.sent), held])
    return table(["mesh, rule", "F", "collectives: number, N together", "sent", "state, temporary"], lines)


def forms(known: list[tuple[Any, list[tuple[str, float, float, float]]]]) -> str:
    lines = []
    for row, found in known:
        for what, least, most, counted in found:
            expected = f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"
            lines.append([row.network, row.where, what, expected, f"{counted:,.0f}"])
    return table(["network", "mesh, rule", "formula", "expected", "counted"], lines)


def predictions(rows: list[Any], ones: dict[str, Any], chip: Any) -> str:
    lines = []
    for row in rows:
        found = scaling.predict(row, ones[row.network], chip)
        fits = "" if row.state + row.temporary <= chip.held else "does not fit as it is"
        seconds = [f"{1e3 * t:.3g}" for t in (found.products, found.state, found.sending)]
        lines.append([row.network, row.where, *seconds, f"{found.apart:.1%} to {found.hidden:.1%}", fits])
    return table(["network", "mesh, rule", "products, ms", "state, ms", "sending, ms", "efficiency", "memory"], lines)


def megatron(row: Any, sizes: dict[str, int]) -> str:
    """What fan-out and fan-in in turns would send, beside what was counted."""
    _, data, model = row.mesh
    tokens = sizes["examples"] // data * sizes.get("time", 1)
    # A transformer's block has two pairs, of which each takes an all-reduce forward and one backward; a perceptron has half a pair a layer.
    pairs = 2 * sizes["depth"] if row.network == "transformer" else sizes["depth"] / 2
    best = 2 * pairs * 2 * (model - 1) / model * tokens * sizes["width"] * scaling.ITEM
    over = sum(one.sent for one in row.found if "model" in one.axes)
    return f"{row.network}, {row.where}: {amount(over)} sent over model, {over / best:.1f} times the {amount(best)} of pairs"


def report(sizes: dict[str, dict[str, int]], rows: list[Any], ones: dict[str, Any]) -> str:
    """All of it, every closed form checked."""
    import jax

    parts = [TITLE.format(jax=jax.__version__, rows=len(rows) + len(ones), most=max(row.chips for row in rows)), COUNTS]
    known = [(row, scaling.check(row, ones[row.network], sizes[row.network])) for row in rows]
    for network, one in ones.items():
        total = sum(n for n, _ in scaling.leaves(network, sizes[network], (1, 1, 1), scaling.TENSOR).values())
        size = ", ".join(f"{name} {n:,}" for name, n in sizes[network].items())
        alone = f"{amount(one.flops, 'FLOP')}, state {amount(one.state)}, temporary {amount(one.temporary)}"
        parts.append(
            f"### {network}: {size}\n\nP = {total:,} parameters, 4 P = {amount(4 * total)}; on one device F₁ = {alone}.\n\n"
            + counts([row for row in rows if row.network == network], one)
        )
    parts += ["## What was known beforehand\n\nA run in which one of these is off ends with an error.\n\n" + forms(known)]
    pairs = [megatron(row, sizes[row.network]) for row in rows if row.rule == scaling.TENSOR and row.mesh[2] > 1]
    parts += [WHAT + "\n\n" + "\n".join(f"- {line}" for line in pairs)]
    parts += [FORMULAS]
    for chip in scaling.MACHINES:
        here = [row for row in rows if row.chips == chip.chips]
        if here:
            parts.append(f"### {chip.name}\n\n{chip.sources}\n\n{predictions(here, ones, chip)}")
    return "\n\n".join(parts) + "\n"


WHAT = """## What the rules do

`tensor_parallel` divides a matrix along its fan-out, and along its fan-in if it writes into a residual stream, which the trace shows: what
Shoeybi et al. (arXiv 1909.08053) do by hand. Streams are whole everywhere, and a branch ends in one all-reduce. On the way back XLA
all-reduces the cotangents of query, key and value in one call but as three arrays, where their sum would do at a third of the bytes; a
compiler that has XLA's pass `all-reduce-reassociate` may send that. A network without a stream (the MLP)
has every matrix divided along its fan-out, and XLA gathers activations before a product and all-reduces cotangents after it.
`fully_sharded` divides leaves and batches over `data` and `model` together: both are one axis to it, and no product is computed twice.
Where a batch has fewer rows than a matrix, XLA moves activations instead
of gathering the matrix. In a sweep whose cells are spread over `data` too, it gathers the cotangents of all tokens for the gradient of an
embedding; without the sweep it adds up the gradient."""
