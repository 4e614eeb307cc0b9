"""A plan as a table that a reader can check against the paper."""

import io
from typing import Any


def render(plan: Any, width: int = 160) -> str:
    """The plan as text: leaf | role | axes | init std | × init | multiplier | lr | eps | weight decay | lr × wd.

    Parameters
    ----------
    plan
        A `Plan`.
    width
        Columns of the terminal.

    Returns
    -------
    str
    """
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False, color_system=None).print(table(plan))
    return buffer.getvalue().rstrip()


def table(plan: Any) -> Any:
    """The plan as a ``rich.table.Table``; rows of equal factors that differ by numbers in their path alone are one row."""
    from rich import box
    from rich.table import Table

    from paperjax.trace.probe import pattern_of

    def sizes(pairs: Any) -> str:
        return ", ".join(f"{k}={v}" for k, v in pairs)

    out = Table(
        box=box.SIMPLE_HEAD, title=f"{plan.name}, {plan.rule} rule: {sizes(plan.base)} → {sizes(plan.target)}", title_justify="left"
    )
    for name in ("leaf", "role", "axes"):
        out.add_column(name, overflow="fold")
    for name in ("init std", "× init", "multiplier", "× lr", "× eps", "× wd", "× lr·wd"):
        out.add_column(name, justify="right")
    rows: dict[Any, list[str]] = {}
    for leaf in plan.leaves:
        rows.setdefault((pattern_of(leaf.path), leaf.shape, leaf.role, leaf.axes, round(leaf.init_std, 12), leaf.factors), []).append(
            leaf.path
        )
    for (_, shape, role, axes, std, f), paths in rows.items():
        where = paths[0] if len(paths) == 1 else f"{paths[0]} … {len(paths)} alike"
        each = " × ".join(f"{n}{f' ({a})' if a else ''}" for n, a in zip(shape, axes)) or "scalar"
        numbers = (std, f.init_scale, f.multiplier, f.learning_rate, f.eps, f.weight_decay, f.learning_rate * f.weight_decay)
        out.add_row(where, role, each, *(_number(n) for n in numbers))
    for s in plan.scalings:
        out.add_row(f"at {s.op} {'.'.join(map(str, s.path))}", s.why, "", "", "", _number(s.factor), "", "", "", "")
    return out


def _number(value: float) -> str:
    return "?" if value != value else f"{value:.4g}"
