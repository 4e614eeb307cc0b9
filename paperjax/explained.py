"""What an Experiment tells about itself before it runs."""

import math
from collections.abc import Sequence
from typing import Any

from paperjax.cell import FIELD_AXES
from paperjax.experiment import Axes, Experiment


def explain(experiment: Experiment, axes: Axes, programs: Sequence[Any], n_cells: int) -> None:
    """Print the kind of every axis, and how the cells of each program are laid out."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    for name, values in experiment.grid.axes.items():
        why = axes.static.get(name)
        console.print(
            f"axis {name} ({len(values)}): " + ("together in one program" if why is None else f"one program each, since {why}"),
            markup=False,
        )
    for program in programs:
        static = {n: v for n, v in program.static.items() if n not in FIELD_AXES}
        console.print(
            f"{static}: {n_cells} cells in {math.ceil(n_cells / program.layout.cells)} call(s) of {program.layout}; "
            f"{program.flops:.3g} FLOPs a step",
            markup=False,
        )
