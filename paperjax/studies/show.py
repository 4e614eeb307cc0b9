"""Tables and figures of the studies."""

import io
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from paperjax.report.figure import COLOURS, DASHES, MARKERS, panels, points, prediction, style
from paperjax.trace.probe import pattern_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More rows than this are shown as one for layers of one kind, the one that is furthest from flat.
ROWS = 30
KINDS = ("preactivation", "branch", "stream", "attention", "output")


def render(table: Any, width: int = 140) -> str:
    """A rich table as plain text."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False, color_system=None, emoji=False).print(table)
    return buffer.getvalue().rstrip()


def coordinate_table(check: Any) -> str:
    """The exponents of a `CoordCheck` as text: at the start, after the first step and after the last, with what is expected."""
    from rich import box
    from rich.table import Table

    how = f"{check.parametrization}, {check.optimizer}, learning rate {check.learning_rate:g}"
    title = f"coordinate check of {how}: exponents of the {check.axis}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("quantity", overflow="fold")
    table.add_column("kind")
    last = [check.steps] if check.steps > 1 else []
    for name in ("at the start", "expected", "Δ, step 1", "expected", *(f"Δ, step {t}" for t in last)):
        table.add_column(name, justify="right")
    table.add_column("after the last step")
    rows = check.table()
    n = len(check.quantities)
    by_step = {step: rows[step * n : (step + 1) * n] for step in (0, 1, check.steps)}
    for members in _grouped(check):
        worst = max(members, key=lambda i: _deviation(by_step[check.steps][i]))
        start, first, end = (by_step[step][worst] for step in (0, 1, check.steps))
        name = _own_name(check.quantities[worst])
        if len(members) > 1:
            name += f" (furthest from flat of {len(members)})"
        cells = [_exponent(start), _power(start.expected), _exponent(first), _power(first.expected)]
        table.add_row(name, start.kind, *cells, *([_exponent(end)] if last else []), end.verdict)
    lines = [render(table), f"{'passes' if check.passes else 'fails'}: every change flat to ±{check.tolerance:g} after step {check.steps}"]
    if any(row.verdict == "undecided" for row in by_step[check.steps]):
        lines.append(f"undecided: an interval wider than ±{check.tolerance:g} says neither; give more seeds, or a wider range of sizes")
    if not check.note and check.linear > 0.1:
        lines.append(f"the first step moved values by up to {check.linear:.2g} of themselves: too far for what is expected of small steps")
    return "\n".join([*lines, *([check.note] if check.note else [])])


def _grouped(check: Any) -> list[list[int]]:
    if len(check.quantities) <= ROWS:
        return [[i] for i in range(len(check.quantities))]
    return _alike(check)


def _alike(check: Any) -> list[list[int]]:
    """Quantities of one kind, one name but for its numbers, and one prediction: Flax's Dense_0 and Dense_1 may be input and readout."""
    found: dict[Any, list[int]] = {}
    for i, (q, predicted) in enumerate(zip(check.quantities, check.predicted)):
        powers = tuple("none" if math.isnan(power) else round(power, 3) for power in predicted)
        found.setdefault((pattern_of(q.name), q.kind, powers), []).append(i)
    return list(found.values())


def _called(check: Any, members: list[int], among: list[list[int]]) -> str:
    """The name of one, or what the names of several have in common, if no others have it too."""
    first = check.quantities[members[0]]
    if len(members) == 1:
        return _own_name(first)
    others = [m for m in among if m is not members and pattern_of(check.quantities[m[0]].name) == pattern_of(first.name)]
    return f"{_own_name(first)} and {len(members) - 1} more" if others else readable(pattern_of(first.name))


def _own_name(quantity: Any) -> str:
    return readable(quantity.name) + ("" if quantity.layer is None else f" layer {quantity.layer}")


def _deviation(row: Any) -> float:
    return abs(row.exponent) if math.isfinite(row.exponent) else -1.0


def _exponent(row: Any) -> str:
    return row.verdict if math.isnan(row.exponent) else f"{row.exponent:+.2f} ± {(row.high - row.low) / 2:.2f}"


def _power(value: float) -> str:
    return "" if math.isnan(value) else ("0 exactly" if math.isinf(value) else f"{value:+.2f}")


def coordinate_figure(check: Any) -> "Figure":
    """One row of panels for each kind of quantity; columns are the start, the first step and the last."""
    columns = [("value", 0, "size at the start"), ("change", 1, "change after step 1")]
    if check.steps > 1:
        columns.append(("change", check.steps, f"change after step {check.steps}"))
    groups: dict[str, list[list[int]]] = {}
    for members in _alike(check):
        groups.setdefault(check.quantities[members[0]].kind, []).append(members)
    kinds = [kind for kind in KINDS if kind in groups]
    with style():
        figure, axes = panels(len(kinds), len(columns), (3.7, 2.7))
        figure.suptitle(f"{check.parametrization}, {check.optimizer}, learning rate {check.learning_rate:g}", fontsize=10)
        for row, kind in enumerate(kinds):
            for column, (what, step, title) in enumerate(columns):
                ax = axes[row, column]
                names = _labels([_called(check, members, groups[kind]) for members in groups[kind]])
                for k, (name, members) in enumerate(zip(names, groups[kind])):
                    _series(ax, check, name, members, what, step, k)
                ax.set_xscale("log", base=2)
                ax.set_xticks(check.sizes, [str(n) for n in check.sizes])
                ax.minorticks_off()
                _at_least_a_decade(ax)
                if row == 0:
                    ax.set_title(title)
                if row == len(kinds) - 1:
                    ax.set_xlabel(check.axis)
                if column == 0:
                    ax.set_ylabel(f"{kind}: rms")
            axes[row, len(columns) - 1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7.5)
    return figure


def _series(ax: Any, check: Any, name: str, members: list[int], what: str, step: int, k: int) -> None:
    squares = [np.square(check.samples(i, what, step)) for i in members]
    y = np.sqrt(np.mean(squares, axis=0))
    if not (y > 0).all():
        ax.plot([], [], label=f"{name} (0)", color=COLOURS[k % 6], marker=MARKERS[(k + k // 6) % 6], linestyle="none")
        if not ax.has_data():
            ax.text(0.5, 0.5, "exactly 0", transform=ax.transAxes, ha="center")
        return
    look = dict(color=COLOURS[k % 6], marker=MARKERS[(k + k // 6) % 6])
    points(ax, np.asarray(check.sizes, float), y, name, **look)
    ax.set_yscale("log")
    expected = check.predicted[members[0]][("value", "change").index(what)]
    if step <= 1 and math.isfinite(expected):
        sizes = np.asarray(check.sizes, float)
        middle = math.exp(np.log(y).mean() - expected * np.log(sizes).mean())
        prediction(ax, sizes, middle * sizes**expected, "", color=COLOURS[k % 6], linestyle=DASHES[1 + k % 5])


def _at_least_a_decade(ax: Any) -> None:
    # On a narrower axis noise looks like a slope, and there is no second tick to read it by.
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log" and high < 30 * low:
        middle = math.sqrt(low * high)
        ax.set_ylim(middle / 30**0.5, middle * 30**0.5)


def _labels(names: list[str]) -> list[str]:
    """The last components of dotted names, as few as still tell them apart: a long legend leaves no room for the panels."""
    for kept in (2, 3, 4):
        short = [" ".join(".".join(word.split(".")[-kept:]) for word in name.split(" ")) for name in names]
        if len(set(short)) == len(names):
            return short
    return names


def readable(path: str) -> str:
    """A leaf's path without brackets.

    Examples
    --------
    >>> readable("stream + ['block_3']['mlp']['kernel']")
    'stream + block_3.mlp.kernel'
    """
    return re.sub(r"\['?([^\[\]']*)'?\]", r".\1", path).replace(" .", " ").lstrip(".")


def transfer_table(found: Any) -> str:
    """The optimum of every size of a `Transfer`, and its drift, as text."""
    from rich import box
    from rich.table import Table

    title = f"learning-rate transfer of {found.parametrization}, {found.optimizer}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in (found.axis, "best learning rate", "95 % interval", "log2", "loss there"):
        table.add_column(name, justify="right")
    for o in found.optima:
        interval = f"{2**o.low:.3g} … {2**o.high:.3g}"
        table.add_row(str(o.size), f"{2**o.log2_lr:.3g}", interval, f"{o.log2_lr:+.2f}", f"{o.loss:.4g}")
    low, high = found.drift_interval
    return f"{render(table)}\ndrift of the optimum's log2 per doubling of the {found.axis}: {found.drift:+.2f} [{low:+.2f}, {high:+.2f}]"


def transfer_figure(found: Any) -> "Figure":
    """Loss against learning rate, one curve for each size, its interpolated optimum marked."""
    with style():
        figure, axes = panels(1, 1, (4.8, 3.6))
        ax = axes[0, 0]
        rates = np.asarray(found.learning_rates)
        for k, (o, losses) in enumerate(zip(found.optima, _mean_losses(found))):
            fine = np.isfinite(losses)
            look = dict(color=_shade(k, len(found.optima)), marker=MARKERS[k % 6], linestyle=DASHES[k % 6])
            ax.plot(rates[fine], losses[fine], label=f"{found.axis} {o.size}", **look)
            ax.errorbar(
                2**o.log2_lr, o.loss, xerr=[[2**o.log2_lr - 2**o.low], [2**o.high - 2**o.log2_lr]], color=look["color"], marker="*",
                markersize=11, markeredgecolor="black", markeredgewidth=0.6, capsize=2.5, linestyle="none", zorder=3,
            )  # fmt: skip
        ax.plot([], [], color="black", marker="*", markersize=9, linestyle="none", label="optimum, 95 %")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("learning rate at the base")
        ax.set_ylabel("training loss at the end")
        ax.set_title(f"{found.parametrization}: {found.drift:+.2f} per doubling of the {found.axis}")
        best, start = min(o.loss for o in found.optima), found.start_loss
        ax.set_ylim(best / 1.5, max(1.5 * start, 2 * best))
        ax.legend()
    return figure


def _mean_losses(found: Any) -> np.ndarray:
    return found.losses.transpose("seed", found.axis, "lr").to_numpy().mean(axis=0)


def _shade(k: int, n: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](0.05 + 0.8 * k / max(1, n - 1))
