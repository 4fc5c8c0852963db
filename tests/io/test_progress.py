"""Progress of long work, on a terminal and in a log."""

import io
import time

import pytest
from rich.console import Console

from selcrypt_jax._io import progress


def test_a_log_gets_a_line_after_ten_seconds_and_then_every_thirty():
    now = 0.0
    due = progress.Pace(lambda: now)
    lines = []
    for now in range(120):
        if due():
            lines.append(now)
    assert lines == [10, 40, 70, 100]


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_in_a_log_are_lines(terminal, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.05)
    monkeypatch.setattr(progress, "THEN", 0.05)
    out = io.StringIO()
    with progress.bars(Console(file=out, force_terminal=terminal, width=60)) as bars:
        task = bars.add_task("DnCNN: [20] attacks", total=4)
        bars.advance(task)
        deadline = time.monotonic() + 20
        while "25 %" not in out.getvalue() and not terminal and time.monotonic() < deadline:
            time.sleep(0.01)
        bars.update(task, completed=4)
    lines = [line for line in out.getvalue().splitlines() if " %, after " in line]
    assert bool(lines) != terminal
    assert all(line.startswith("DnCNN: [20] attacks: 25 %, after ") for line in lines)
