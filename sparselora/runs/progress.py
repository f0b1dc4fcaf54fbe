"""Progress of a long loop on stderr: a bar on a terminal, and in a log a line every 30 seconds with the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from types import TracebackType

from tqdm import tqdm

from sparselora.runs.process import complain

LOG_EVERY_S = 30.0
"""Seconds between two lines in a log: at most 120 lines an hour, and nobody waits long to see that a run is alive."""
_BAR_AFTER_S = 2.0


class Progress:
    """Context manager that counts the units of work of one loop and shows them on stderr.

    Work that ends within 30 seconds (on a terminal, 2) leaves no trace.

        with Progress(len(layers), "layer") as progress:
            for layer in layers:
                ...
                progress.update()

    Attributes:
        total: units of work in all.
        done: units of work that are done.

    Args:
        total: units of work in all, those of ``done`` included.
        unit: noun for one of them.
        label: name of the loop, in front of every line.
        done: units that an earlier process has done; they do not count towards the time left.
        describe: called when a line is due; what it returns, such as the current loss, becomes part of it.
        is_shown: False counts and shows nothing, for the processes of a distributed run other than the first.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str = "",
        *,
        done: int = 0,
        describe: Callable[[], str] = lambda: "",
        is_shown: bool = True,
    ) -> None:
        self.total = total
        self.done = done
        self._unit = unit
        self._label = label
        self._describe = describe
        self._is_shown = is_shown
        self._earlier = done
        self._began = self._spoke = monotonic()
        self._bar: tqdm[None] | None = None
        if is_shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=label or None, unit=unit, delay=_BAR_AFTER_S, leave=False,
                file=sys.stderr,
            )  # fmt: skip

    def update(self, count: int = 1) -> None:
        """Count ``count`` more units as done, and write a line if one is due."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif monotonic() - self._spoke >= LOG_EVERY_S:
            self.say(self._line())

    def say(self, text: str) -> None:
        """Write a line of its own now, above the bar if there is one."""
        if not self._is_shown:
            return
        self._spoke = monotonic()
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            complain(text)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self) -> str:
        fresh, elapsed = self.done - self._earlier, monotonic() - self._began
        left = max(0, self.total - self.done) * elapsed / max(1, fresh)
        place = f"{self._unit} {self.done:,} of {self.total:,}"
        parts = [place, self._describe(), f"{duration(left)} left"]
        return (f"{self._label}: " if self._label else "") + ", ".join(part for part in parts if part)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Return ``seconds`` in the one or two units a reader needs: ``40 s``, ``7 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
