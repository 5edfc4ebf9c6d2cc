"""Progress bars and remarks on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Terminal:
    """Shows the course of a step; implements `memmc.pipeline.progress.Progress`.

    On a terminal each stage is a bar; elsewhere (a log file, a pipe) each stage
    is one line, so that logs stay readable.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage; the one before it is finished."""
        self._finish_stage()
        if not self._console.is_terminal:
            self._console.print(f"{name} ..." if total is None else f"{name}: {total:g} ...")
            return
        if self._bars is None:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=32),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bars.start()
        self._task = self._bars.add_task(name, total=total, note="")

    def advance(self, done: float, note: str = "") -> None:
        """Move the current bar."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, note=note)

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        (self._bars.console if self._bars else self._console).print(text, soft_wrap=True)

    def close(self) -> None:
        """Finish and remove the live display."""
        self._finish_stage()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _finish_stage(self) -> None:
        if self._bars is not None and self._task is not None:
            task = next(task for task in self._bars.tasks if task.id == self._task)
            total = task.total if task.total is not None else 1
            self._bars.update(self._task, total=total, completed=total)
            self._task = None
