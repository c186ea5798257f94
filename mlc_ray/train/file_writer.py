"""A thread that writes a worker's files of a checkpoint, one after another, while the worker does something else."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from mlc_ray.storage import Place, StorageDeniedError, StorageError, checksum
from mlc_ray.train.tensor_files import Parts, size_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

Written = tuple[int, str]
"""Bytes of a file and its checksum."""

PAUSES = (2.0, 10.0)
"""Seconds before the second and the third try of what a storage refused."""


def with_retries(what: str, call: Callable[[], T]) -> T:
    """What `call` returns; where the storage refuses it, it is tried three times. `what` it does is for the log.

    Raises:
        StorageDeniedError: At once: the storage refuses it for good.
        OSError, StorageError: The third try failed too.
    """
    for pause in PAUSES:
        try:
            return call()
        except StorageDeniedError:
            raise
        except (OSError, StorageError) as error:
            logger.warning("%s failed, and is tried again in %.0f s: %s", what, pause, error)
            threading.Event().wait(pause)
    return call()


def write_file(place: Place, parts: Parts) -> Written:
    """Write a whole file, on this machine to the disk itself; returns what a manifest says of it."""
    with_retries(f"writing {place}", lambda: place.write_parts(parts))
    return size_of(parts), checksum(parts)


class Background:
    """A call in a thread of its own; what it raises is kept."""

    def __init__(self, call: Callable[[], None], name: str) -> None:
        self.fault: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self) -> BaseException | None:
        """Wait for the end; what it raised."""
        self._thread.join()
        return self.fault

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.fault = error


class FileWriter:
    """Writes files into a folder in the order in which they are put, holding at most `room` bytes of them, or one.

    After a fault nothing more is written, and what is put is dropped.

    Args:
        folder: where to.
        room: bytes.
        may_write: called before each file; where it raises, that is the fault.

    Attributes:
        written: what is, by name.
        seconds: that writing took.
    """

    def __init__(self, folder: Place, room: int, may_write: Callable[[], None] = lambda: None) -> None:
        self.folder, self.room, self.may_write = folder, room, may_write
        self.written: dict[str, Written] = {}
        self.seconds = 0.0
        self._waiting: deque[tuple[str, Parts] | None] = deque()
        self._held, self._ended = 0, False
        self._changed = threading.Condition()
        self._work = Background(self._write_all, "checkpoint-writer")

    def put(self, name: str, parts: Parts) -> None:
        """Have a file written; waits while there is no room for it."""
        size = size_of(parts)
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._held == 0 or self._held + size <= self.room)
            if not self._ended:
                self._held += size
                self._waiting.append((name, parts))
                self._changed.notify_all()

    def end(self) -> None:
        """Nothing more is put."""
        with self._changed:
            self._waiting.append(None)
            self._changed.notify_all()

    @property
    def writes(self) -> bool:
        """Whether it has not ended yet."""
        return self._work.runs

    def wait(self) -> BaseException | None:
        """Wait for the last file; why one of them could not be written."""
        return self._work.wait()

    def _write_all(self) -> None:
        try:
            while self._write_next():
                pass
        finally:
            with self._changed:
                self._ended = True
                self._waiting.clear()
                self._changed.notify_all()

    def _write_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting))
            if (job := self._waiting.popleft()) is None:
                return False
        name, parts = job
        started = time.monotonic()
        self.may_write()
        self.written[name] = write_file(self.folder / name, parts)
        self.seconds += time.monotonic() - started
        with self._changed:
            self._held -= size_of(parts)
            self._changed.notify_all()
        return True
