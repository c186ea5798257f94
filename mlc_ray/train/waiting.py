"""How long workers wait for a place on the nodes: with a word on what they wait for, and not for ever.

Where a cluster has not what workers need, Ray Train asks for it again every minute, in silence and without end: at the
start of a run, when a node is lost, and where an elastic run has less than its fewest workers.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)

from mlc_ray.capacity import Need, amount
from mlc_ray.cluster import ClusterError, gpus_held
from mlc_ray.logs import send_warnings

logger = logging.getLogger(__name__)

_WAITING = (InitializingState, ReschedulingState, RestartingState, SchedulingState)
_SAY_SECONDS = 60.0
_TRY_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class EndWithoutRoom(ControllerCallback):
    """Ends a run whose workers find no place for a time, and warns of it every minute before.

    Ray Train has no public callback for it, but takes those of its controller beside those of users.

    Args:
        parts: what the workers need, of an elastic run the fewest.
        seconds: how long they wait.
        now: a clock.
    """

    def __init__(self, parts: list[Need], seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.parts, self.seconds, self.now = parts, seconds, now
        self.since: float | None = None
        self.said = 0.0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by Ray Train's controller at every step of it; while it places workers, after each try.

        Raises:
            ClusterError: they have waited for too long.
        """
        if not isinstance(current_state, _WAITING):
            self.since = None
            return
        now = self.now()
        if self.since is None:
            self.since = self.said = now
        waited = now - self.since
        if waited >= self.seconds:
            raise ClusterError(
                f"the workers, {amount(self.parts)}, found no place in {waited:.0f} s "
                f"(cluster.wait_seconds={self.seconds:g}): {gpus_held()}; end what uses them (`ray list actors`), add "
                "nodes, ask for fewer workers, or raise cluster.wait_seconds"
            )
        if now - self.said >= _SAY_SECONDS:
            self.said = now
            send_warnings()
            logger.warning(
                "the workers, %s, have waited for a place for %.0f s of cluster.wait_seconds=%g: %s",
                amount(self.parts), waited, self.seconds, gpus_held(),
            )  # fmt: skip


@contextmanager
def tries_of(seconds: float) -> Iterator[None]:
    """Within, a run that is started tries to place its workers for a minute at a time, or for `seconds` if it is less.

    A user's own setting of the variable that says so wins.
    """
    given = os.environ.get(_TRY_SECONDS)
    os.environ.setdefault(_TRY_SECONDS, str(min(_SAY_SECONDS, seconds)))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(_TRY_SECONDS)
