"""Workers that Ray killed for memory are ended, so that others find their place."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback

from mlc_ray.train.workers import _Config


class Group(list[int]):
    """Workers of which each was killed for memory: what is asked of them is answered by that."""

    def execute_async(self, *_: Any, **__: Any) -> list[None]:
        return [None for _ in self]


def test_a_worker_that_ray_killed_for_memory_does_not_keep_the_others_from_being_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")

    monkeypatch.setattr(ray, "get", killed)
    group: Any = Group([0, 1])
    BackendSetupCallback(_Config(backend="gloo")).before_execution_group_shutdown(group)
