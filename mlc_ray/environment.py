"""Variables of the driver's environment that the workers of a joined cluster get.

Their values are often secrets. Ray's own way, `env_vars` of a runtime environment, has every node write them into a log
(`runtime_env_agent.log`, Ray 2.60) and the dashboard show them. So the runtime environment holds only the name of an
entry in the memory of the cluster's head, and a function that every worker process calls when it starts (`take`)
fetches the entry. Whoever may run code on the cluster could do so too while the entry is there: until the driver ends,
or, where it is killed and cannot remove it, until the cluster does.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

logger = logging.getLogger(__name__)

_KEY = "MLC_RAY_ENVIRONMENT"
_NAMESPACE = b"mlc_ray"
_SECONDS = 60.0  # a worker may be up before the driver has left the entry
_PAUSE = 0.1
_left: set[str] = set()  # names that this process, a driver, has left for its workers


def chosen(patterns: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose name is, or matches, one of `patterns`."""
    return {
        name: value for name, value in environment.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def runtime_env() -> dict[str, Any]:
    """The runtime environment of a driver that will `leave` variables; without any value."""
    return {"env_vars": {_KEY: uuid.uuid4().hex}, "worker_process_setup_hook": f"{__name__}.take"}


def leave(variables: Mapping[str, str], environment: Mapping[str, Any]) -> None:
    """Leave variables for the workers of this driver, which has joined with this runtime environment, until it ends."""
    from ray.experimental.internal_kv import _internal_kv_put

    _left.update(variables)
    key = environment["env_vars"][_KEY].encode()
    _internal_kv_put(key, json.dumps(dict(variables)).encode(), namespace=_NAMESPACE)
    atexit.register(_remove, key)


def _remove(key: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    with suppress(Exception):  # the cluster may be gone, and the entry with it
        _internal_kv_del(key, namespace=_NAMESPACE)


def lacking(patterns: Sequence[str]) -> list[str]:
    """The chosen variables of this process, a driver in a Ray that it joined before, that its workers do not get."""
    return sorted(chosen(patterns, os.environ).keys() - _left)


def warn_of_lacking(patterns: Sequence[str]) -> None:
    """Warn where a driver joined its Ray without variables that are to be passed on: Ray takes them then alone."""
    import ray
    from ray._private import worker

    node = worker._global_node  # there is no public way to ask who started a Ray
    if worker.global_worker.mode != ray.SCRIPT_MODE or (node is not None and node.is_head()):
        return  # a worker, which has what its driver left; a Ray whose workers inherited all of this process's
    if missing := lacking(patterns):
        logger.warning(
            "env=%s: workers do not get %s: this process joined its Ray before, without them; name all of them where "
            "it is joined first", list(patterns), ", ".join(missing),
        )  # fmt: skip


def not_set(patterns: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Those of `patterns` that no variable is, or matches."""
    return [pattern for pattern in patterns if not chosen([pattern], environment)]


def take() -> None:
    """Called by every worker process when it starts: set the variables that its driver left.

    Raises:
        TimeoutError: the driver left none; it has probably ended.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    deadline = time.monotonic() + _SECONDS
    while (left := _internal_kv_get(os.environ[_KEY].encode(), namespace=_NAMESPACE)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the driver of this worker left no environment in {_SECONDS:g} s; has it ended?")
        time.sleep(_PAUSE)
    os.environ.update(json.loads(left))
