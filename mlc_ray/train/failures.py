"""How an error or Ctrl-C ends a run: errors of workers as themselves, Ctrl-C as Python has it."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError, UserCallback, WorkerGroupError

from mlc_ray.errors import MlcRayError
from mlc_ray.logs import send_warnings
from mlc_ray.runs import FAILED_FILE
from mlc_ray.storage import Place
from mlc_ray.train.divergence import DivergedError

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=BaseException)


class EndAtOwnError(UserCallback):
    """Ends a run at once when a worker raises an `MlcRayError`: its fix is a setting or a file, not another try.

    Ray Train starts the workers again, up to `cluster.max_failures` times, whatever they raise; but where a callback
    raises, it ends the run. Any other error is logged, for what is done about it is done in silence.

    Args:
        max_failures: how often it starts them again.
        goes_on: where they go on from, as "from the last checkpoint".
    """

    def __init__(self, max_failures: int, goes_on: str) -> None:
        self.max_failures, self.goes_on = max_failures, goes_on

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called by Ray Train's controller with what workers raised, by rank."""
        for _, error in sorted(worker_exceptions.items()):
            # Not where a storage failed: it may be back at the next try.
            if (own := own_error(error)) is not None and not isinstance(own, OSError):
                raise own
        if self.max_failures and worker_exceptions:
            send_warnings()
            rank, error = min(worker_exceptions.items(), key=lambda item: item[0])
            said = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "worker %d failed (%s); where cluster.max_failures=%d allows, all workers start again %s",
                rank, said[-1], self.max_failures, self.goes_on,
            )  # fmt: skip


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the `MlcRayError` that is inside the error of this block, if there is one; else that error."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from None  # what was around it, with tracebacks, is in the log of Ray's workers


@contextmanager
def keyboard_interrupt(message: str) -> Iterator[None]:
    """Make Ctrl-C end this block, a `fit()` of Ray's, by a `KeyboardInterrupt`, and restore the handler of SIGINT.

    Ray Train replaces that handler by one that ends the workers and then raises `SystemExit`, without a word; Ray Tune
    by one that ends the trials, after which `fit()` returns as if all was done. At SIGTERM Ray raises `SystemExit` too,
    which stays one: Python's wakeup descriptor says which signals came, whoever handled them.

    Args:
        message: what the `KeyboardInterrupt` says.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled, and Ray's set, in it alone
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    came, wakeup = os.pipe()
    os.set_blocking(came, False)
    os.set_blocking(wakeup, False)
    others = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):  # the second before Ray Train has set its handler
        if signal.SIGINT in _signals(came, others):
            raise KeyboardInterrupt(message) from None
        raise
    else:
        if signal.SIGINT in _signals(came, others):
            raise KeyboardInterrupt(message)
    finally:
        if handler is not None:  # None: not set by Python
            signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(others)
        _signals(came, others)
        os.close(came)
        os.close(wakeup)


def _signals(came: int, others: int) -> bytes:
    """The signals that came, one a byte, read once and passed on to the wakeup descriptor `others` (-1: none)."""
    try:
        numbers = os.read(came, 4096)
    except BlockingIOError:
        return b""
    if others >= 0:
        with suppress(BlockingIOError):  # it is full, which wakes its reader as well
            os.write(others, numbers)
    return numbers


@contextmanager
def failure_kept(run_folder: Place) -> Iterator[None]:
    """Write into a run's folder by which error this block, its training, ends; what was written before is removed.

    A `DivergedError` is not written: `diverged.json` has it.
    """
    file = run_folder / FAILED_FILE
    try:
        file.remove()
        yield
    except BaseException as error:
        if not isinstance(error, DivergedError):
            try:
                file.write_json({"message": said_of(error)})
            except OSError as fault:
                logger.warning("%s does not say that the run failed: %s", run_folder, fault)
        raise


def said_of(error: BaseException) -> str:
    """What an error says: ours as they are, a worker's death and any other in a line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    if (known := own_error(error) or death_of(error)) is not None:
        return str(known)
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


_DEATHS = (OutOfMemoryError, NodeDiedError, RayActorError, WorkerCrashedError)
_OUT_OF_MEMORY = re.compile(r"Memory usage (\d+)B exceeded threshold of \d+B \([^()]* of (\d+)B limit\)")


def death_of(error: BaseException) -> str | None:
    """What became of a worker, in a line, where `error` is Ray's and says that one died; else None."""
    died = next((found for kind in _DEATHS if (found := error_inside(error, kind)) is not None), None)
    if died is None:
        return None
    if (memory := _OUT_OF_MEMORY.search(str(died))) is not None:
        used, there = (int(number) / 2**30 for number in memory.groups())
        return (
            f"a worker was killed because its node ran out of memory: all processes on it took {used:.1f} of "
            f"{there:.1f} GiB; start fewer workers, lower train.tokens_per_forward, or run less beside it "
            "(`mlc-ray plan` says what a run needs)"
        )
    lines = [line.strip() for line in str(died).splitlines() if line.strip()] or [type(died).__name__]
    why = [line for line in lines[1:] if line.startswith("The actor is dead because")]
    return " ".join(["a worker died:", lines[0], *why[:1]])


def own_error(error: BaseException) -> MlcRayError | None:
    """The `MlcRayError` that `error` is, or that is inside it."""
    return error_inside(error, MlcRayError)


def error_inside(error: BaseException, kind: type[E]) -> E | None:
    """The error of a kind that `error` is, or that is inside it: Ray wraps those of tasks, workers, its controller."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, kind) and not isinstance(each, RayTaskError):  # Ray derives a class from both
            return each
        waiting += [inner for inner in _inside(each) if isinstance(inner, BaseException)]
    return None


def _inside(error: BaseException) -> list[Any]:
    # A worker that died is in the error of Ray Train's look at its workers.
    inside: list[Any] = [error.__cause__, getattr(error, "health_check_failure", None)]
    if isinstance(error, RayTaskError):
        inside.append(error.cause)
    if isinstance(error, WorkerGroupError):
        inside += [failure for _, failure in sorted(error.worker_failures.items())]
    if isinstance(error, ControllerError):
        inside.append(error.controller_failure)
    return inside
