"""A plan as a table that a reader can check against the paper."""

import io
import re
from collections.abc import Sequence
from typing import Any

NUMBERS = ("init std", "× init", "× weight", "× lr", "× eps", "× wd", "× lr·wd")


def render(plan: Any, width: int = 160) -> str:
    """The plan as text: leaf | role | axes | init std | × init | × weight | × lr | × eps | × wd | × lr·wd.

    Every column after the standard deviation is a factor relative to the base. Leaves of equal shape, role and factors whose paths
    differ by numbers alone are one row.

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
    Console(file=buffer, width=width, highlight=False, color_system=None, emoji=False).print(table(plan, width))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()


def table(plan: Any, width: int = 160) -> Any:
    """The plan as a ``rich.table.Table`` for a terminal of so many columns; see `render`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def sizes(pairs: Any) -> str:
        return ", ".join(f"{k}={v}" for k, v in pairs)

    rows = [_row(group) for group in _alike(plan.leaves)]
    heads = ("leaf", "role", "axes", *NUMBERS)
    widths = [max(len(heads[i]), *(len(row[i]) for row in rows)) for i in range(len(heads))]
    # Numbers and roles stand on one line; paths and axes share the rest of the terminal.
    rest = width - 1 - sum(w + 2 for w in (*widths[3:], widths[1])) - 4
    axes = min(widths[2], max(18, rest - widths[0], rest // 2 - 4))
    room = max(16, min(widths[0], rest - axes))
    decay = {"coupled": "lr × decay", "independent": "decay alone"}[plan.decay_mode]
    out = Table(
        box=box.SIMPLE_HEAD,
        # Text is printed as it is: names of the user's may look like rich's markup or its emoji.
        title=Text(
            f"{plan.name}, {plan.rule} rule, a step shrinks weights by {decay}: {sizes(plan.base)} → {sizes(plan.target)}", "table.title"
        ),
        title_justify="left",
        caption=Text("\n".join(_scalings(plan)), "table.caption"),
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    out.add_column("leaf", min_width=room, overflow="fold")
    out.add_column("role", no_wrap=True)
    out.add_column("axes", max_width=axes)
    for name in NUMBERS:
        out.add_column(name, justify="right", no_wrap=True)
    for path, *cells in rows:
        out.add_row(*map(Text, (broken(path, room), *cells)))
    return out


def _scalings(plan: Any) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for s in plan.scalings:
        what = f"× {_number(s.factor)} on {'the result' if s.operand is None else f'operand {s.operand}'} of {s.op}", s.why
        counts[what] = counts.get(what, 0) + 1
    return [f"{what}{f', {n} places' if n > 1 else ''}: {why}" for (what, why), n in counts.items()]


def _alike(leaves: Sequence[Any]) -> list[list[Any]]:
    from paperjax.trace.probe import pattern_of

    groups: dict[Any, list[Any]] = {}
    for leaf in leaves:
        key = (pattern_of(leaf.path), leaf.shape, leaf.role, leaf.axes, leaf.rule, _number(leaf.init_std, 6), leaf.factors)
        groups.setdefault(key, []).append(leaf)
    return list(groups.values())


def _row(group: list[Any]) -> list[str]:
    leaf, f = group[0], group[0].factors
    axes = " × ".join(f"{n}:{a}" if a else f"{n}" for n, a in zip(leaf.shape, leaf.axes)) or "scalar"
    numbers = (leaf.init_std, f.init_scale, f.multiplier, f.learning_rate, f.eps, f.weight_decay, f.learning_rate * f.weight_decay)
    role = f"{leaf.role}, Muon" if leaf.rule == "muon" else leaf.role
    return [merged([leaf.path for leaf in group]), role, axes, *map(_number, numbers)]


def merged(paths: Sequence[str]) -> str:
    """Paths that differ by numbers alone as one, as short as a reader needs it.

    Examples
    --------
    >>> merged(["['blocks_0']['w']", "['blocks_1']['w']", "['blocks_2']['w']"])
    'blocks_{0…2}.w'
    >>> merged(["['layers'][0].weight", "['layers'][3].weight"])
    'layers[{0,3}].weight'
    """
    parts = [re.split(r"(\d+)", path) for path in paths]
    out = []
    for i, pieces in enumerate(zip(*parts)):
        values = sorted({int(p) for p in pieces}) if i % 2 else []
        if len(values) < 2:
            out.append(pieces[0])
        elif values == list(range(values[0], values[-1] + 1)) and len(values) > 2:
            out.append(f"{{{values[0]}…{values[-1]}}}")
        else:
            out.append(f"{{{','.join(map(str, values))}}}")
    return re.sub(r"\['([^']*)'\]", r".\1", "".join(out)).lstrip(".")


def broken(path: str, room: int) -> str:
    """A path over several lines of so many characters, parted between its components, or between the words of a long one.

    Examples
    --------
    >>> print(broken("encoder.blocks.attention.query.kernel", 20))
    encoder.blocks
    .attention.query
    .kernel
    >>> print(broken("MultiHeadDotProductAttention_0.key", 20))
    MultiHeadDotProduct
    Attention_0.key
    """
    lines = [""]
    for component in re.split(r"(?=[.\[])", path):
        words = [component] if len(component) <= room else re.split(r"(?<=[a-z0-9}])(?=[A-Z_])", component)
        for word in words:
            if lines[-1] and len(lines[-1]) + len(word) > room:
                lines.append("")
            lines[-1] += word
    return "\n".join(lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "?" if value is None else f"{value:.{digits}g}"
