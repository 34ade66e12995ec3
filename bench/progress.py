"""Progress bars on the terminal's error stream, so that standard output stays for results."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Bars:
    """A display of bars, one for each job under way; a context manager.

    Args:
        console: where to draw; on something that is not a terminal, each stage is one line when it begins.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
            disable=not self.live,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def job(self, name: str) -> JobBar:
        """A bar for one job, named at its left."""
        return JobBar(self, name)

    def add(self, description: str, total: int) -> TaskID:
        """Draw a new bar."""
        return self._progress.add_task(description, total=total or 1, note="")

    def update(self, task: TaskID, *, advance: int = 0, note: str | None = None) -> None:
        """Move a bar, or change its note."""
        if note is None:
            self._progress.update(task, advance=advance)
        else:
            self._progress.update(task, advance=advance, note=note)

    def remove(self, task: TaskID) -> None:
        """Take a bar away."""
        self._progress.remove_task(task)


class JobBar:
    """The `Progress` of one job: a single bar that is renamed from stage to stage."""

    def __init__(self, bars: Bars, name: str) -> None:
        self._bars = bars
        self._name = name
        self._task: TaskID | None = None

    def begin(self, stage: str, total: int) -> None:
        """Start the stage's bar in place of the last one."""
        self.end()
        self._task = self._bars.add(f"{escape(self._name)}  [cyan]{escape(stage)}", total)
        if not self._bars.live:
            self._bars.console.print(f"{self._name}: {stage}", markup=False, highlight=False)

    def advance(self, steps: int = 1) -> None:
        """Move the bar on."""
        if self._task is not None:
            self._bars.update(self._task, advance=steps)

    def note(self, **values: float) -> None:
        """Show numbers at the bar's right."""
        if self._task is not None:
            self._bars.update(self._task, note=" ".join(f"{name}={value:.3g}" for name, value in values.items()))

    def end(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bars.remove(self._task)
            self._task = None
