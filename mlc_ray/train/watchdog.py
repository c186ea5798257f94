"""A worker that makes no progress ends with an error, instead of holding its machines without a word.

The watchdog is a thread of the worker. It cannot run while C code holds Python's global lock; collectives, kernels and
file systems, where workers hang, release it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlc_ray.errors import MlcRayError
from mlc_ray.runs import LOGS_FOLDER
from mlc_ray.storage import Place

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LINGER = 5.0  # once one worker hangs all do, within about a second: each should have told where before Ray ends them
_TOGETHER = 60.0  # what workers tell within so many seconds is of one hang
_RECENT = 90.0  # from a hang to the end of fit(): 15 s to tell of it, then Ray's look at its workers, and their end
_TELLING = 10.0  # the storage that the stacks are written to may be what hangs


class HangError(MlcRayError):
    """Workers made no progress for `cluster.hang_timeout` seconds; the message says where each of them waits."""


@dataclass(frozen=True)
class Hang:
    """Where a worker was when it had made no progress for `seconds`; `step` is the last that it ended."""

    lease: str
    rank: int
    host: str
    step: int
    doing: str
    seconds: float
    stacks: str
    time: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, after step {self.step}, while {self.doing} (stacks: {self.stacks})"


class Watchdog:
    """Ends this process where nothing is heard of it for `timeout` seconds (0: never).

    Before that it writes all threads' stacks and a `Hang` into `logs/` of the run's folder.
    """

    def __init__(self, timeout: float, run_folder: Path | Place, *, lease: str, rank: int, step: int) -> None:
        self.timeout, self.folder, self.lease, self.rank = timeout, Place(run_folder) / LOGS_FOLDER, lease, rank
        self.step, self.doing, self.heard, self.paused = step, "starting", time.monotonic(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout:
            self._thread.start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Something went on: what begins now, and the last optimizer step that ended, where it is another one."""
        self.step, self.doing, self.heard = self.step if step is None else step, doing, time.monotonic()

    def over(self, items: Iterator[T], waiting: str, using: str) -> Iterator[T]:
        """The same items; each is a beat when it is asked for and when it has come."""
        while True:
            self.beat(waiting)
            try:
                item = next(items)
            except StopIteration:
                return
            self.beat(using)
            yield item

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Watch nothing in this block, which may wait for as long as it takes."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1
            self.heard = time.monotonic()

    @contextlib.contextmanager
    def while_changing(self, look: Callable[[], object]) -> Iterator[None]:
        """In this block, count as a beat whenever `look` returns something else; it is called four times in the limit.

        A thread of its own calls it, so that the worker still ends where `look` itself hangs, as on a file system.
        """
        ended = threading.Event()

        def follow() -> None:
            before = None
            while True:
                try:
                    found = look()
                except OSError:  # a look that fails is not progress
                    found = before
                if before is not None and found != before and not ended.is_set():
                    self.heard = time.monotonic()
                before = found
                if ended.wait(self.timeout / 4):
                    return

        if self.timeout:
            threading.Thread(target=follow, name="watchdog-progress", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def silent(self) -> float:
        """Seconds since the last beat; 0 while off."""
        return 0.0 if self.paused else time.monotonic() - self.heard

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout / 4)):
            if (silent := self.silent()) > self.timeout:
                try:
                    telling = threading.Thread(target=self._tell, args=(silent,), name="watchdog-tells", daemon=True)
                    telling.start()
                    telling.join(_TELLING)
                    time.sleep(_LINGER)
                finally:
                    os._exit(1)  # the training thread is stuck in a call that no exception reaches

    def _tell(self, silent: float) -> None:
        name = f"hang-{self.lease[:8]}-step-{self.step:06d}-rank-{self.rank:05d}"
        stacks = self.folder / f"{name}.txt"
        hang = Hang(
            self.lease, self.rank, socket.gethostname(), self.step, self.doing, silent, str(stacks), time.time()
        )
        logger.error("no progress for %.0f s: %s; the worker ends", silent, hang)
        try:
            with tempfile.TemporaryFile() as file:
                faulthandler.dump_traceback(file.fileno(), all_threads=True)
                file.seek(0)
                stacks.write_text(file.read().decode("utf-8", errors="replace"))
            (self.folder / f"{name}.json").write_json(asdict(hang))
        except OSError as error:  # the log has the message at least
            logger.error("the stacks could not be written to %s: %s", stacks, error)


def hang_error(run_folder: Path | Place, lease: str, *, what: str, to_go_on: str) -> HangError | None:
    """The error that tells of the last hang of a driver's workers, if it is why they have just ended.

    A hang of more than 90 s ago is not: the workers were started again after it. Where the storage is away, a warning
    says that it could not be read.

    Args:
        run_folder: the run's.
        lease: of that driver; hangs under an earlier one are left out.
        what: what its workers did, for the message.
        to_go_on: what to do then.
    """
    try:
        found: list[dict[str, Any]] = [
            file.read_json()
            for file in (Place(run_folder) / LOGS_FOLDER).iterdir()
            if file.name.startswith("hang-") and file.name.endswith(".json")
        ]
    except OSError as fault:
        logger.warning("whether a worker hung could not be read: %s", fault)
        return None
    hangs = sorted((Hang(**each) for each in found if each["lease"] == lease), key=lambda hang: (hang.rank, -hang.time))
    last = max((hang.time for hang in hangs), default=0.0)
    if time.time() - last > _RECENT:
        return None
    hangs = [hang for hang in hangs if last - hang.time < _TOGETHER]
    told = "; ".join(str(hang) for hang in hangs)
    return HangError(
        f"{what} made no progress for {max(hang.seconds for hang in hangs):.0f} s: {told}. The worker "
        "to look at is the one that does something else than wait for the others. Where a step or part of the loading "
        f"takes that long, raise cluster.hang_timeout; to go on: {to_go_on}"
    )
