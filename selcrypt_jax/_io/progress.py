"""Progress of long work: bars on a terminal, and an occasional line in a log."""

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

FIRST, THEN = 10.0, 30.0
"""Seconds before the first line in a log, and between any two lines after it."""


def bars(console: Console) -> Progress:
    """Bars that show the share done and the time left, estimated from the last five minutes.

    If the console is not a terminal: a line after 10 seconds, then one every 30 seconds.
    """
    kind = Progress if console.is_terminal else _Lines
    return kind(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        speed_estimate_period=300,
    )


class Pace:
    """Decides when to write a line to a log: after 10 seconds, then every 30 seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = clock() + FIRST

    def __call__(self) -> bool:
        """Whether to write a line now; if so, the next one is due in 30 seconds."""
        now = self._clock()
        if now < self._due:
            return False
        self._due = now + THEN
        return True


class _Lines(Progress):
    """Prints the current task as a line, from a thread, since one step may take minutes."""

    _thread: threading.Thread | None = None

    def start(self) -> None:
        super().start()
        if self._thread is None:
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._print_lines, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
        super().stop()

    def _print_lines(self) -> None:
        began, wait = time.monotonic(), FIRST
        while not self._ended.wait(wait):
            wait = THEN
            task = next((t for t in self.tasks if t.started and not t.finished), None)
            if task is not None:
                share = "" if task.total is None else f": {task.percentage:.0f} %"
                seconds = time.monotonic() - began
                text = f"{task.description}{share}, after {seconds:.0f} s"
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)
