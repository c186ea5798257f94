"""One line of progress for every phase of a command: how far, how fast, and the time left.

    with phase("answering", total=384, unit="prompts") as progress:
        progress.advance(16)

On a terminal (`draw_on`, which the command line calls) the line is redrawn in place while the phase lasts; phases that
last at the same time share it. Everywhere else it is a message of the logger `mlc_ray.progress`, every 15 seconds and
once at the end: a program that uses the library shows it or not as it configures logging.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

logger = logging.getLogger(__name__)

LOG_SECONDS = 15.0
DRAW_SECONDS = 0.25
_BAR = 20
_CLEAR = "\r\x1b[K"


class Display:
    """The last line of a terminal, redrawn in place; other text goes above it."""

    def __init__(self, stream: TextIO, width: int | None = None) -> None:
        self._stream, self._width = stream, width
        self._lock = threading.Lock()
        self._line = ""

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._width or shutil.get_terminal_size().columns

    def draw(self, line: str) -> None:
        """Show `line`, cut to the terminal's width: one that wraps could not be redrawn. "" takes it away."""
        with self._lock:
            line = line[: self.width - 1]
            if line or self._line:
                self._stream.write(_CLEAR + line)
                self._stream.flush()
            self._line = line

    def write(self, text: str) -> None:
        """Write a line of text that stays, above the one that is redrawn."""
        with self._lock:
            self._stream.write(f"{_CLEAR if self._line else ''}{text}\n{self._line}")
            self._stream.flush()


_display: Display | None = None
_shown: list[Phase] = []  # phases that last, the first to begin first


def draw_on(display: Display | None) -> None:
    """Draw the progress of this process on a terminal from now on; None: log it instead."""
    global _display
    _display = display


def terminal_width() -> int | None:
    """Columns of the terminal that progress is drawn on; None where it is logged."""
    return None if _display is None else _display.width


class Phase:
    """How far one phase is; made by `phase`. `total` is None where it is not known beforehand."""

    def __init__(self, name: str, total: int | None = None, unit: str = "", done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._first = self._began = done
        self._started = self._moved = time.monotonic()
        self._first_at: float | None = None

    def advance(self, number: int = 1) -> None:
        """`number` more are done."""
        self.update(self.done + number)

    def update(self, done: int) -> None:
        """`done` are done by now, in all."""
        if done == self.done:
            return
        self.done, self._moved = done, time.monotonic()
        if self._first_at is None:
            self._first, self._first_at = done, self._moved

    @property
    def rate(self) -> float:
        """Done per second; without the start, once there are two times to tell from, a second apart or more.

        What comes in blocks is counted one by one, within microseconds.
        """
        if self._first_at is not None and self._moved - self._first_at >= 1.0:
            return (self.done - self._first) / (self._moved - self._first_at)
        return (self.done - self._began) / max(self._moved - self._started, 1e-9)

    def line(self, *, bar: bool = False) -> str:
        """What is shown: name, count, rate and time left."""
        now = time.monotonic()
        parts = [counted(f"{self.done}{'' if self.total is None else f' of {self.total}'}", self.unit)]
        if self.rate <= 0:
            parts.append(f"{clock(now - self._started)} so far")
        else:
            parts.append(_speed(self.rate))
            if self.total is not None:
                left = (self.total - self.done) / self.rate - (now - self._moved)
                parts.append(f"{clock(max(left, 0.0))} left")
        drawn = f"{_drawn_bar(self.done, self.total)}  " if bar and self.total else ""
        return f"{self.name}: {drawn}{', '.join(parts)}"

    def end_line(self) -> str:
        """What is shown at the end."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        short = "" if self.total is None or self.done >= self.total else f" of {self.total}"
        return f"{self.name}: {counted(f'{self.done}{short}', self.unit)} in {clock(seconds)}"


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Phase]:
    """Show a phase's progress while the block runs; `done` are done before it begins."""
    shown = Phase(name, total, unit, done)
    _shown.append(shown)
    ended = threading.Event()
    ticker = threading.Thread(target=_show, args=(shown, ended), name=f"progress of {name}", daemon=True)
    ticker.start()
    try:
        yield shown
    finally:
        ended.set()
        ticker.join()
        _shown.remove(shown)
        if _display is not None:
            _display.draw("")
        logger.info(shown.end_line())


def _show(shown: Phase, ended: threading.Event) -> None:
    if _display is None:
        while not ended.wait(LOG_SECONDS):
            logger.info(shown.line())
        return
    while True:
        if shown is _shown[0]:  # the terminal has one line for all
            _display.draw("; ".join([shown.line(bar=True), *(each.line() for each in _shown[1:])]))
        if ended.wait(DRAW_SECONDS):
            return


def counted(number: object, unit: str) -> str:
    """A number and its unit, given in the plural: "3 engines", "1 engine", "2 of 4 engines"."""
    return f"{number} {unit.removesuffix('s') if str(number) == '1' else unit}".rstrip()


def _drawn_bar(done: int, total: int) -> str:
    filled = min(_BAR, _BAR * done // total)
    return "━" * filled + "╌" * (_BAR - filled)


def _speed(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def clock(seconds: float) -> str:
    """A duration as 1:05 or 1:00:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
