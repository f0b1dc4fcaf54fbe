"""Progress on stderr: a line every 30 seconds in a log, nothing for short work, a bar on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from sparselora.runs import progress as module
from sparselora.runs.progress import Progress, duration


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


def test_a_log_gets_a_line_every_thirty_seconds_with_the_time_left(clock, capsys):
    with Progress(100, "step", "training", describe=lambda: "loss 1.32") as progress:
        for _ in range(100):
            clock.now += 4
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    # 30 s fall between the 7th and the 8th step of 4 s.
    assert lines[0] == "training: step 8 of 100, loss 1.32, 6 min left"  # 92 × 4 s = 368 s
    assert lines[1] == "training: step 16 of 100, loss 1.32, 6 min left"  # 336 s
    assert len(lines) == 100 // 8


def test_short_work_says_nothing_and_never_asks_for_a_description(clock, capsys):
    def describe() -> str:
        raise AssertionError("read only when a line is due")

    with Progress(10, "row", describe=describe) as progress:
        for _ in range(10):
            clock.now += 2.9
            progress.update()
    assert capsys.readouterr().err == ""


def test_what_an_earlier_process_has_done_does_not_shorten_the_time_left(clock, capsys):
    with Progress(100, "step", done=50) as progress:
        clock.now += 30
        progress.update(10)
    assert capsys.readouterr().err == "step 60 of 100, 2 min left\n"  # 40 of them at 3 s each


def test_a_line_of_its_own_restarts_the_clock_and_hidden_progress_is_silent(clock, capsys):
    with Progress(100, "step") as progress, Progress(100, "step", is_shown=False) as hidden:
        clock.now += 29
        progress.say("epoch 1 of 2: loss 0.5")
        hidden.say("epoch 1 of 2: loss 0.5")
        clock.now += 29
        progress.update()
        hidden.update()
        assert capsys.readouterr().err == "epoch 1 of 2: loss 0.5\n"
        clock.now += 1
        progress.update()
        hidden.update()
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_gets_a_bar_and_no_lines(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "_BAR_AFTER_S", 0.0)
    with Progress(4, "layer", "layers") as progress:
        clock.now += 100
        progress.update(4)
        progress.say("half of them")
    text = terminal.getvalue()
    assert "layers" in text
    assert "half of them\n" in text
    assert "left" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3569, "59 min"), (3570, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
