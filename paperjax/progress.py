"""A progress bar with the time left, on a terminal; silence elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Any


class Progress:
    """Something that work is reported to."""

    def __init__(self, bar: Any = None, task: Any = None):
        self._bar, self._task = bar, task

    def advance(self, amount: float) -> None:
        """Report that much more work done."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)


@contextlib.contextmanager
def progress_bar(title: str, total: float, show: bool | None = None) -> Iterator[Progress]:
    """A rich progress bar on standard error.

    Parameters
    ----------
    title
        What is being done.
    total
        Amount of work.
    show
        ``None`` shows it on a terminal only.

    Examples
    --------
    >>> with progress_bar("training", 10.0, show=False) as bar:
    ...     bar.advance(10.0)
    """
    if show is False:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    console = Console(stderr=True, emoji=False)
    if show is None and not console.is_terminal:
        yield Progress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Rich(*columns, console=console) as bar:
        yield Progress(bar, bar.add_task(title, total=total))
