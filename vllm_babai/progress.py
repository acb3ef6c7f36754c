"""Progress of long work: a bar on a terminal, and plain lines where the output goes to a file or a container's log."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 30.0  # between lines of a log
SPEED_SECONDS = 3600.0  # over which speed is averaged: one linear of a large model takes minutes


class CountingProgress(Progress):
    """Progress whose tasks are counted in units; where its console is no terminal, lines tell of every task.

    A line is written when a task starts, every `log_seconds` while it lasts, and when it ends.
    """

    def __init__(self, unit: str, console: Console, log_seconds: float, **options: Any) -> None:
        counted = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
        )
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        super().__init__(*counted, *times, console=console, disable=not console.is_terminal, **options)
        self.unit = unit
        self.log_seconds = log_seconds
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_lines, daemon=True)

    def start(self) -> None:
        """Show the bar, or begin to write lines."""
        super().start()
        if self.disable and not self._writer.is_alive():
            self._writer.start()

    def stop(self) -> None:
        """Leave the bar as it is, or write how far every task came."""
        super().stop()
        if self.disable and not self._ended.is_set():
            self._ended.set()
            self._writer.join()
            self._log(self.tasks)

    def add_task(self, description: str, *args: Any, unit: str | None = None, **options: Any) -> TaskID:
        """A task like rich's, counted in `unit`; without it in that of the whole progress."""
        task = super().add_task(description, *args, unit=unit or self.unit, **options)
        if self.disable:
            self._log([self._tasks[task]])
        return task

    @contextmanager
    def phase(self, what: str, total: int, unit: str) -> Iterator["Phase"]:
        """A task that lasts as long as the context; its bar is gone afterwards."""
        phase = Phase(self, what, self.add_task(what, total=total, unit=unit))
        yield phase
        if self.disable:
            self._log([self._tasks[phase.task]])
        self.remove_task(phase.task)

    def _write_lines(self) -> None:
        while not self._ended.wait(self.log_seconds):
            self._log(self.tasks)

    def _log(self, tasks: list[Task]) -> None:
        for task in tasks:
            self.console.out(line(task), highlight=False)


class Phase:
    """Counts what is done in one phase of the work."""

    def __init__(self, progress: CountingProgress, what: str, task: TaskID) -> None:
        self.progress = progress
        self.what = what
        self.task = task

    def at(self, name: str) -> None:
        """Say what is being worked on."""
        self.progress.update(self.task, description=f"{self.what} {name}")

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.progress.advance(self.task, count)

    def note(self, text: str) -> None:
        """Write a line besides the count."""
        self.progress.console.out(text, highlight=False)


def line(task: Task) -> str:
    """`quantizing model.layers.2: 17 of 42 linears, 0:01:05 elapsed, 0:02:10 left`, the last where it is known."""
    what = task.description.strip()
    count = f"{int(task.completed)}" if task.total is None else f"{int(task.completed)} of {int(task.total)}"
    left = "" if task.finished or task.time_remaining is None else f", {_clock(task.time_remaining)} left"
    elapsed = _clock(task.finished_time if task.finished else task.elapsed)
    return f"{what + ': ' if what else ''}{count} {task.fields['unit']}, {elapsed} elapsed{left}"


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds, `1:02:03`."""
    minutes, second = divmod(int(seconds or 0), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def counting_progress(
    unit: str = "",
    console: Console | None = None,
    *,
    log_seconds: float = LOG_SECONDS,
    quiet: bool = False,
    **options: Any,
) -> CountingProgress:
    """Progress of tasks that are counted in `unit`, on stderr unless a console is given; options: of rich's Progress.

    Standard output stays free for results, which may be JSON. quiet: nothing is shown.
    """
    options.setdefault("speed_estimate_period", SPEED_SECONDS)
    return CountingProgress(unit, console or Console(stderr=True, soft_wrap=True, quiet=quiet), log_seconds, **options)


def uncounted() -> None:
    """Counts nothing, for callers that show no progress."""


Tick = Callable[[], object]
