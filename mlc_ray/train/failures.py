"""Errors of ours on their way from a worker to the driver, which Ray wraps into its own, and tries again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayTaskError
from ray.train import ControllerError, UserCallback, WorkerGroupError

from mlc_ray.errors import MlcRayError


class EndAtOwnError(UserCallback):
    """Ends a run at once when a worker raises an error of ours: its cure is a setting or a file, not another try.

    Ray Train tries whatever a worker raises `cluster.max_failures` times again; what a callback raises, it does not.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called by Ray Train's controller with what workers raised, by rank."""
        for _, error in sorted(worker_exceptions.items()):
            if (own := own_error(error)) is not None:
                raise own


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of ours that the block's error wraps in place of that one, which passes where it wraps none."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from None  # what was around it, with tracebacks, is in the log of Ray's workers


def own_error(error: BaseException) -> MlcRayError | None:
    """The error of ours that `error` is or wraps: Ray's of a task, of the workers or of the controller, or a cause."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, MlcRayError) and not isinstance(each, RayTaskError):  # Ray derives a class from both
            return each
        waiting += [inner for inner in _inside(each) if isinstance(inner, BaseException)]
    return None


def _inside(error: BaseException) -> list[Any]:
    inside: list[Any] = [error.__cause__]
    if isinstance(error, RayTaskError):
        inside.append(error.cause)
    if isinstance(error, WorkerGroupError):
        inside += [failure for _, failure in sorted(error.worker_failures.items())]
    if isinstance(error, ControllerError):
        inside.append(error.controller_failure)
    return inside
