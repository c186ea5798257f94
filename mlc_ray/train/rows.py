"""Files of a run to which every step adds something, on a disk that may be full for a while: that loses no step."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import atomic_file

logger = logging.getLogger(__name__)

_FLUSHED_EVERY = 100  # steps whose numbers are kept at most, to be written again: about 4 KB each


class RowFileError(MlcRayError):
    """A run's file of rows is not the one any more that this process writes; the message names it."""


class RowFile:
    """Appends lines to a file; those that the disk does not take wait in memory and are written before the next one.

    The file is a new one, with what is kept of the old. What a process of an earlier try appends is not in it, and that
    process can tell (`check`).

    Args:
        path: the file.
        size: how many of its bytes are kept; what comes after them is cut off, which a full disk allows too.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with suppress(OSError):  # no room for a copy, or nothing to copy: then nobody appends to the old one either
            _replace_by_beginning(path, size)
        # Not buffered: of a line that is refused it must be known how much is in the file.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(size)
        self._waiting, self._is_refused, self._lock = b"", False, threading.Lock()

    def append(self, line: bytes) -> None:
        """Write a line, now or later; a warning says where it is later."""
        with self._lock:
            self._waiting += line
            try:
                self._write()
            except OSError as error:
                if not self._is_refused:
                    logger.warning("%s cannot be written, and is once the disk takes it: %s", self.path, error)
                self._is_refused = True

    def sync(self) -> None:
        """Have all lines on the disk itself.

        Raises:
            OSError: It does not take them.
        """
        with self._lock:
            self._write()
            os.fsync(self._file.fileno())

    def check(self) -> None:
        """Make sure that the lines written so far are in the file that has the name.

        Raises:
            RowFileError: It was removed, or another one is in its place.
        """
        try:
            is_own = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            is_own = False
        if not is_own:
            raise RowFileError(
                f"{str(self.path)!r} was removed or replaced while this run wrote to it, by another driver of the run "
                "or by hand: no checkpoint is completed whose rows are lost with it. Go on from the last one"
            )

    def close(self) -> None:
        """Write what waits, and end; a warning says where the disk does not take it."""
        with self._lock:
            try:
                self._write()
            except OSError as error:
                logger.warning("%s lacks the last %d bytes: %s", self.path, len(self._waiting), error)
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
        self._is_refused = False


def _replace_by_beginning(path: Path, size: int) -> None:
    with path.open("rb") as old, atomic_file(path) as new:
        new.write(old.read(size))


class EventFiles:
    """TensorBoard's files of a run; steps that the disk did not take are written into another file later.

    Args:
        folder: where they are.
        after: the optimizer step that the run goes on after: later ones of an earlier try are not shown any more.
    """

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._make = folder, SummaryWriter
        self._writer: SummaryWriter | None = None
        self._shown_until = after + 1 if after else 0
        self._steps: list[tuple[int, Mapping[str, float]]] = []  # which may not be on the disk
        self._is_refused = False
        self._lock = threading.Lock()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's numbers, now or later; a warning says where it is later."""
        with self._lock:
            self._steps.append((step, metrics))
            # After a refusal, each try makes a file: only every so many steps, and at `sync`.
            if not self._is_refused or len(self._steps) % _FLUSHED_EVERY == 0:
                self._try(self._steps[-1:], flush=len(self._steps) >= _FLUSHED_EVERY)

    def sync(self) -> None:
        """Have what was added on the disk; a warning says where it does not take it."""
        with self._lock:
            self._try([], flush=True)

    def close(self) -> None:
        """As `sync`, and end."""
        self.sync()
        self._give_up()

    def _try(self, steps: Sequence[tuple[int, Mapping[str, float]]], *, flush: bool) -> None:
        if not self._steps:
            return
        try:
            if self._writer is None:
                self._writer = self._make(str(self.folder), purge_step=self._shown_until)
                steps = self._steps
            for step, metrics in steps:
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)
            if flush:
                self._writer.flush()
                self._steps.clear()
                self._is_refused = False
        except OSError as error:  # its thread has ended by it, and so nothing more can be written by this writer
            if not self._is_refused:
                logger.warning("%s: steps from %d on are written later: %s", self.folder, self._steps[0][0], error)
            self._is_refused = True
            self._shown_until = self._steps[0][0]
            self._give_up()

    def _give_up(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None
