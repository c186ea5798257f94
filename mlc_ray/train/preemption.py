"""Notices that workers are about to be taken away, and what a run does about them: it saves before it is too late.

A notice is seen by one worker or by all, at different times. It rides on a reduction that each step makes anyway, so
that all workers know of it after the same step, and save together.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

from mlc_ray.errors import MlcRayError
from mlc_ray.runs import STOP_FILE
from mlc_ray.storage import Place

logger = logging.getLogger(__name__)


class Notice(IntEnum):
    """What a worker was told; the largest of all workers' counts.

    SAVE: a node is to be taken away; one checkpoint is saved, and training goes on until Ray starts the workers anew.
    RESTART: a worker's process got SIGTERM; a checkpoint is saved, and the workers end, to be started anew.
    END: the driver got SIGTERM; a checkpoint is saved, and the run ends.
    """

    NONE = 0
    SAVE = 1
    RESTART = 2
    END = 3


class PreemptedError(MlcRayError):
    """The run was told to end before its last step; it saved a checkpoint, and the message says how to go on.

    Args:
        message: what to tell.
        step: the optimizer step of the checkpoint.
    """

    exit_status: ClassVar[int] = 128 + signal.SIGTERM

    def __init__(self, message: str, *, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class WorkersPreemptedError(RuntimeError):
    """Workers ended after a checkpoint since one got SIGTERM; Ray starts them again (`cluster.max_failures`).

    Where it does not, since none of these is left, the run ends by a `PreemptedError`.

    Args:
        message: what to tell.
        step: the optimizer step of the checkpoint.
    """

    def __init__(self, message: str, *, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


def ended_by(notice: Notice, step: int) -> Exception:
    """The error by which workers end after a checkpoint of `step`, for a notice that is RESTART or END."""
    if notice is Notice.END:
        return PreemptedError(f"SIGTERM, after a checkpoint of step {step}", step=step)
    return WorkersPreemptedError(f"a worker got SIGTERM; all ended after a checkpoint of step {step}", step=step)


class Sigterm:
    """Whether this process got SIGTERM, which ends it no more the first time; a second one does what it did before."""

    def __init__(self) -> None:
        self._got = threading.Event()

    def catch(self) -> None:
        """Begin; in the main thread, as Python asks."""
        before = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: Any) -> None:
            self._got.set()
            signal.signal(number, before if before is not None else signal.SIG_DFL)

        signal.signal(signal.SIGTERM, note)

    def __call__(self) -> Notice:
        """RESTART from the signal on."""
        return Notice.RESTART if self._got.is_set() else Notice.NONE


SIGTERM = Sigterm()
"""Of this process."""


_LOOKS_EVERY = 2.0  # into a file elsewhere, by a thread: a step that asked a store itself would wait for the answer
_ASKS_EVERY = 2.0  # where the file could not be written


class StopFile:
    """Whether the driver that holds a lease asks its workers to end, by a file in the run's folder."""

    def __init__(self, run_folder: Path | Place, lease: str) -> None:
        self.path, self.lease = Place(run_folder) / STOP_FILE, lease
        self._last, self._has_warned = Notice.NONE, False
        self._follower: threading.Thread | None = None
        if not self.path.is_local:
            self._follower = threading.Thread(target=self._follow, name="stop-file", daemon=True)

    def __call__(self) -> Notice:
        """END once the file has the lease's id: that of an earlier driver's is not obeyed."""
        if self._follower is None:
            return self._look()
        if self._follower.ident is None:
            self._follower.start()
        return self._last

    def _follow(self) -> None:
        while self._last is Notice.NONE:
            self._last = self._look()
            time.sleep(_LOOKS_EVERY)

    def _look(self) -> Notice:
        try:
            found = self.path.read_text()
        except FileNotFoundError:
            found = ""
        except OSError as error:  # it is looked at again, every two seconds or every step: said once until it is read
            if not self._has_warned:
                logger.warning("whether the driver asks for the end cannot be read now: %s", error)
            self._has_warned = True
            return Notice.NONE
        self._has_warned = False
        return Notice.END if found == self.lease else Notice.NONE

    @contextmanager
    def at_sigterm(self) -> Iterator[None]:
        """In the driver: write the file at the first SIGTERM in this block; a second one does what it did before.

        Where the storage does not take it, a thread tries again until it does, or the block ends.

        Only the main thread handles signals; elsewhere, as in a trial of a search, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)
        restored = before if before is not None else signal.SIG_DFL  # None: not set by Python

        def ask(number: int, frame: Any) -> None:
            signal.signal(number, restored)
            logger.warning("SIGTERM: the run ends after its next step and a checkpoint of it; a second one ends it now")
            if not self._ask():
                asking.start()

        ended = threading.Event()
        asking = threading.Thread(target=self._ask_again, args=(ended,), name="ask-for-the-end", daemon=True)
        signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, restored)
            ended.set()
            if asking.ident is not None:  # it was started
                asking.join()
            try:
                self.path.remove()
            except OSError as error:  # no later driver has this lease, so none obeys the file
                logger.warning("%s is left behind: %s", self.path, error)

    def _ask(self) -> bool:
        try:
            self.path.write_text(self.lease)
        except OSError as error:
            logger.warning("the workers could not be told of SIGTERM, and will be later: %s", error)
            return False
        return True

    def _ask_again(self, ended: threading.Event) -> None:
        while not ended.wait(_ASKS_EVERY) and not self._ask():
            pass


def highest(sources: list[Callable[[], Notice]]) -> Callable[[], Notice]:
    """The notice of several sources at once."""
    return lambda: max((source() for source in sources), default=Notice.NONE)
