"""A live line for long work; silent when nobody looks."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """What a training loop tells about itself."""

    def update(self, step: int, loss: float, alive: int) -> None:
        """Called after steps, rarely enough to cost nothing."""


class Bar:
    """A progress bar on a terminal: rate, time left, loss, members alive. Quiet elsewhere.

    Args:
        total: Steps in all.
        members: Members in all.
        start: Steps already done.
        show: True or False to decide; None shows it when standard error is a terminal.
        label: What goes on.
    """

    def __init__(
        self,
        total: int,
        members: int,
        start: int = 0,
        show: bool | None = None,
        label: str = "training",
    ) -> None:
        self.total, self.members, self.start = total, members, start
        self.show = sys.stderr.isatty() if show is None else show
        self.label = label
        self.begun = self.drawn = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, told="")
        return self

    def due(self) -> bool:
        """Whether it is time to draw again (ten times a second)."""
        return self.show and time.monotonic() - self.drawn > 0.1

    def update(self, step: int, loss: float, alive: int) -> None:
        """Draws the line."""
        if self._bar is None:
            return
        self.drawn = time.monotonic()
        rate = (step - self.start) * self.members / max(self.drawn - self.begun, 1e-9)
        told = f"{rate:,.0f} member-steps/s  loss {loss:.4g}  {alive}/{self.members} alive"
        self._bar.update(self._task, completed=step, told=told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
