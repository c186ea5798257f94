"""What the command line shows, and where everything else goes.

Within `command_line()` the terminal shows this package's messages (loggers `mlc_ray.*`) and progress, and results on
standard output. All output of libraries goes into one file: Python's logging, warnings and `sys.stderr`, what C++
writes to file descriptor 2, and the output of Ray's workers, which `cluster.connect` passes on to `libraries`.
`keep_in` puts that file into the run's folder. None of this happens in a program that uses the library.

Warnings of this package in a Ray worker (`send_warnings`) are marked lines of the worker's output; the driver logs them
(`show_warnings`).
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mlc_ray.errors import MlcRayError
from mlc_ray.progress import Display, draw_on
from mlc_ray.secrets import hide

LOG_FILE = "libraries.log"
_SENT = re.compile(r"mlc_ray (WARNING|ERROR|CRITICAL): (.+)")

logger = logging.getLogger(__name__)


class _Handler(logging.Handler):
    """This package's own messages: plain text, warnings and errors with their level in front."""

    def __init__(self, stream: TextIO, display: Display | None) -> None:
        super().__init__()
        self._stream, self._display = stream, display

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, above the line of progress if there is one."""
        text = hide(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
            if self._display is not None:
                text = f"\x1b[1;33m{text}\x1b[0m"
        if self._display is not None:
            self._display.write(text)
        else:
            print(text, file=self._stream, flush=True)


class _Lossy(io.FileIO):
    """A file that drops what a full disk does not take: Ray's thread that brings workers' output would end by it."""

    _has_warned = False

    def write(self, data: Any) -> int:
        """Write bytes, or drop them, with one warning."""
        try:
            return super().write(data)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True  # first: the warning is written here too
                logger.warning("what libraries write is lost while their file cannot be written: %s", error)
            return len(data)


class _Capture:
    """The file that libraries write to: a temporary one until its folder is known."""

    def __init__(self) -> None:
        self.path: Path | None = None
        with tempfile.TemporaryFile() as file:
            self._fd = os.dup(file.fileno())
        self.stream = io.TextIOWrapper(
            _Lossy(self._fd, "w"), encoding="utf-8", errors="backslashreplace", write_through=True
        )
        self._kept = os.dup(2)
        os.dup2(self._fd, 2)

    def keep_in(self, folder: Path) -> Path:
        self.path = folder / LOG_FILE
        with self.path.open("ab") as file:
            file.write(self.text().encode("utf-8"))
            os.dup2(file.fileno(), self._fd)
            os.dup2(file.fileno(), 2)
        return self.path

    def text(self) -> str:
        """What was written before the folder was known."""
        with open(os.dup(self._fd), "rb") as source:
            source.seek(0)
            return source.read().decode("utf-8", errors="backslashreplace")

    def end(self) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)
        self.stream.close()


_capture: _Capture | None = None


def libraries() -> TextIO | None:
    """Where the output of libraries is to go; None where no command line runs, and it is not redirected."""
    return None if _capture is None else _capture.stream


def keep_in(folder: Path) -> None:
    """Keep the output of libraries in a folder (of several in one command, the first), and log where."""
    if _capture is not None and _capture.path is None:
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("the output of Ray, vLLM and other libraries goes to %s", _capture.keep_in(folder))


@contextmanager
def command_line() -> Iterator[None]:
    """Show only this package's messages on standard error while the block runs.

    The output of libraries is shown after all if the block ends by an exception that is not an `MlcRayError` and no
    folder keeps that output.
    """
    global _capture
    if _capture is not None:  # a command that calls another
        yield
        return
    stderr = sys.stderr
    terminal = _real(stderr)
    display = Display(terminal) if terminal.isatty() else None
    ours, root = logging.getLogger("mlc_ray"), logging.getLogger()
    levels = ours.level, root.level
    handler = _Handler(terminal, display)
    _capture = _Capture()
    others = logging.StreamHandler(_capture.stream)
    others.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    ours.addHandler(handler)
    root.addHandler(others)
    ours.setLevel(logging.INFO)
    root.setLevel(logging.INFO)
    sys.stderr = _capture.stream
    draw_on(display)
    try:
        yield
    except Exception as error:
        if _capture.path is None and not isinstance(error, MlcRayError):
            terminal.write(_capture.text())
        raise
    finally:
        draw_on(None)
        sys.stderr = stderr
        ours.removeHandler(handler)
        root.removeHandler(others)
        ours.setLevel(levels[0])
        root.setLevel(levels[1])
        logging.captureWarnings(False)
        _capture.end()
        _capture = None
        if terminal is not stderr:
            terminal.close()


class _Sender(logging.Handler):
    """One line on standard error for each message, as `_SENT` reads it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message; its line breaks become spaces."""
        # Not by print, which Ray Train may patch.
        sys.stderr.write(f"mlc_ray {record.levelname}: {' '.join(hide(record.getMessage()).split())}\n")
        sys.stderr.flush()


def send_warnings() -> None:
    """In a Ray worker: write warnings and errors of the loggers `mlc_ray.*` for the driver's `show_warnings`."""
    ours = logging.getLogger("mlc_ray")
    if not any(isinstance(handler, _Sender) for handler in ours.handlers):  # a process may be used again
        ours.addHandler(_Sender(logging.WARNING))
        ours.propagate = False  # else a handler of the root's writes them again


def quiet_workers() -> None:
    """In a Ray worker: keep notices about Ray's and PyTorch's own calls out of the console; our warnings stay."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for name in list(logging.root.manager.loggerDict):
        if "ray/train/" in name:  # Ray Train's loggers bear their files' names; they print all metrics at every report
            logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")


def show_warnings(lines: Iterable[str]) -> list[str]:
    """Log here what workers sent by `send_warnings`, and return the other lines of what they wrote."""
    others = []
    for line in lines:
        if sent := _SENT.match(line):
            logger.log(logging.getLevelNamesMapping()[sent[1]], "%s", sent[2])
        else:
            others.append(line)
    return others


def _real(stream: TextIO) -> TextIO:
    """A stream to where standard error goes now: descriptor 2 itself is about to go elsewhere."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # replaced by something in memory
        return stream
    return open(os.dup(2), "w", encoding=stream.encoding, errors="backslashreplace") if number == 2 else stream
