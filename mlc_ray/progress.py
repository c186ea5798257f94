"""One line of progress for every phase of a command: how far, how fast, and the time left.

    with phase("answering", total=384, unit="prompts") as progress:
        progress.advance(16)

On a terminal the line is redrawn in place; in a log it is written anew every 15 seconds, and once at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

LOG_SECONDS = 15.0


class Phase:
    """How far one phase is; made by `phase`. `total` is None where nobody knows it beforehand."""

    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self._stream = stream
        self._started = self._shown = time.monotonic()

    def advance(self, number: int = 1) -> None:
        """`number` more are done."""
        self.update(self.done + number)

    def update(self, done: int) -> None:
        """`done` are done by now, in all."""
        self.done = done
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{self.line()}")
            self._stream.flush()
        elif time.monotonic() - self._shown >= LOG_SECONDS:
            self._shown = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """What is shown: name, count, rate and time left."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self.done / seconds
        of = "" if self.total is None else f" of {self.total}"
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total is not None and rate > 0 else ""
        return f"{self.name}: {self.done}{of} {self.unit}, {rate:.1f}/s{left}"

    def end(self) -> None:
        """Write the last line."""
        seconds = time.monotonic() - self._started
        start = "\r\x1b[K" if self._stream.isatty() else ""
        print(f"{start}{self.name}: {self.done} {self.unit} in {seconds:.0f} s", file=self._stream, flush=True)


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """Show a phase's progress on standard error while the block runs."""
    shown = Phase(name, total, unit, sys.stderr)
    yield shown
    shown.end()
