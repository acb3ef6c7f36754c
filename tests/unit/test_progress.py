"""Progress where the output is no terminal: lines at the start of a phase, at intervals, and at its end."""

import io
import re
import time

import pytest
from rich.console import Console

from vllm_babai.progress import CountingProgress, counting_progress, line

DEADLINE = 20.0  # seconds in which a line must come


class Log:
    """A console that is no terminal, and what was written to it."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, width=40, soft_wrap=True)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + DEADLINE
        while text not in self.file.getvalue():
            assert time.monotonic() < end, f"no {text!r} in {self.lines}"
            time.sleep(0.001)


@pytest.fixture
def log() -> Log:
    return Log()


def progress(log: Log, log_seconds: float) -> CountingProgress:
    return counting_progress("linears", log.console, log_seconds=log_seconds)


def test_a_phase_writes_a_line_when_it_starts_and_when_it_ends(log: Log) -> None:
    with progress(log, 3600.0) as shown, shown.phase("planning", 4, "linears") as phase:
        assert re.fullmatch(r"planning: 0 of 4 linears, 0:00:00 elapsed", log.lines[0])
        phase.at("model.layers.3.self_attn.q_proj")
        for _ in range(4):
            phase.advance()
        assert len(log.lines) == 1
    assert re.fullmatch(
        r"planning model\.layers\.3\.self_attn\.q_proj: 4 of 4 linears, \d:\d\d:\d\d elapsed", log.lines[-1]
    )
    assert len(log.lines) == 2


def test_lines_come_at_intervals_while_nothing_is_done(log: Log) -> None:
    with progress(log, 0.001) as shown, shown.phase("quantizing", 3, "linears") as phase:
        phase.at("model.layers.0")
        log.wait_for("quantizing model.layers.0: 0 of 3 linears")
        phase.advance()
        log.wait_for("quantizing model.layers.0: 1 of 3 linears")
    written = len(log.lines)
    shown._writer.join(DEADLINE)
    assert not shown._writer.is_alive()
    assert len(log.lines) == written


def test_the_time_left_is_told_once_it_can_be_known(log: Log) -> None:
    seconds = iter(range(0, 100_000, 60))
    with counting_progress("blocks", log.console, log_seconds=3600.0, get_time=lambda: float(next(seconds))) as shown:
        task = shown.add_task("measuring", total=10)
        for _ in range(4):
            shown.advance(task)
        text = line(shown.tasks[0])
    assert re.fullmatch(r"measuring: 4 of 10 blocks, \d+:\d\d:\d\d elapsed, 0:0[5-9]:\d\d left", text)


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with counting_progress("linears", console, log_seconds=0.001) as shown, shown.phase("planning", 2, "linears"):
        assert not shown._writer.is_alive()
    assert "elapsed" not in file.getvalue()
