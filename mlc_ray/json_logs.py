"""Logs as JSON lines, in files of a folder: one for the driver, one for each worker. Off unless it is asked for.

    with json_lines(folder / "worker-00000.jsonl", run="mine", worker=0) as lines:
        lines.step = lambda: 3

Written are the messages of this package from INFO on, and those of libraries that go through Python's logging from
WARNING on; an exception that ends the block is the last line. Credentials are left out (`secrets.hide`). Handlers of a
program that uses the library get what they get without the file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mlc_ray.secrets import hide

logger = logging.getLogger(__name__)
_OURS = "mlc_ray"


class JsonLines(logging.Handler):
    """Adds a line to a file for each message; `step` is asked for the step that it belongs to, `trial` for which."""

    def __init__(self, file: Path, *, run: str, trial: str, worker: int | None) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        super().__init__()  # now: Python closes at its end what was begun, also one without a file
        self.step: Callable[[], int | None] = lambda: None
        self.trial = trial
        self._run, self._worker = run, worker
        self._process = {"host": socket.gethostname(), "pid": os.getpid()}
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message; a disk that does not take it costs the line, not the run."""
        if record.levelno < logging.WARNING and record.name.partition(".")[0] != _OURS:
            return
        try:
            self._file.write(self.line(record) + "\n")
        except Exception:  # a full disk, a message after the end, a library's message that its arguments do not fit
            self.handleError(record)

    def line(self, record: logging.LogRecord) -> str:
        """A message as JSON."""
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": hide(record.getMessage()),
            "run": self._run,
            "trial": self.trial,
            "worker": self._worker,
            "step": self.step(),
            **self._process,
        }
        if record.exc_info:
            said["exception"] = hide(self._formatter.formatException(record.exc_info))
        return json.dumps(said, ensure_ascii=False)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the terminal and the file of libraries have the message as well."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class _LastResort(logging.Handler):
    """What no handler takes Python writes to standard error, from WARNING on; beside the file it goes on to do so."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__(handler.level)
        self._handler = handler

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on a message that nobody but the file takes."""
        at: logging.Logger | None = logging.getLogger(record.name)
        while at is not None:
            if not all(isinstance(each, (JsonLines, _LastResort)) for each in at.handlers):
                return
            at = at.parent if at.propagate else None
        self._handler.handle(record)


class _AsBefore(logging.Filter):
    """For a handler that was there: this package's messages from the level on that they had before the file."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it would get the message without the file; a logger under ours may have a level of its own."""
        at: logging.Logger | None = logging.getLogger(record.name)
        while at is not None and not at.level:
            at = at.parent
        return at is None or at.name != _OURS or record.levelno >= self._level


@contextmanager
def json_lines(file: Path, *, run: str, trial: str = "", worker: int | None = None) -> Iterator[JsonLines]:
    """Write what is logged while the block runs, by any thread of this process.

    Args:
        file: is added to.
        run: what the run is called, and
        trial: which trial of a search or cell of a study it is, if it is one.
        worker: the rank of a worker, the number of an engine; None for the driver.
    """
    handler = JsonLines(file, run=run, trial=trial, worker=worker)
    ours, root = logging.getLogger(_OURS), logging.getLogger()
    level = ours.level
    there = {each for at in (root, *_loggers_of_ours()) for each in at.handlers if not isinstance(each, JsonLines)}
    as_before = _AsBefore(ours.getEffectiveLevel())
    if ours.getEffectiveLevel() > logging.INFO:
        ours.setLevel(logging.INFO)
        for each in there:
            each.addFilter(as_before)
    beside = [] if root.handlers or logging.lastResort is None else [_LastResort(logging.lastResort)]
    for each in (handler, *beside):
        root.addHandler(each)
    if not ours.propagate:  # in workers (`logs.send_warnings`)
        ours.addHandler(handler)
    try:
        yield handler
    except BaseException as error:
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, "ended by %s: %s", (type(error).__name__, error),
            (type(error), error, error.__traceback__),
        )  # fmt: skip
        handler.handle(record)  # into this file alone: whoever catches it shows it
        raise
    finally:
        for each in (handler, *beside):
            root.removeHandler(each)
        for each in there:
            each.removeFilter(as_before)
        ours.removeHandler(handler)
        ours.setLevel(level)
        handler.close()


def _loggers_of_ours() -> Iterator[logging.Logger]:
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == _OURS:
            yield logger
