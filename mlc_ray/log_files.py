"""The JSON lines of what runs (`logging.json_lines`), in `logs/` of its folder, wherever that is.

    with log_file(config.logging, folder):             # the driver's: driver.jsonl
        actor = ... .remote(own_log("scorer", 0))      # None where nobody asked for logs
    with kept(log):                                    # in the actor: scorer-00000-PID.jsonl

An actor has a file for each of its processes: another one may be started in its place, also elsewhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlc_ray.cluster import ClusterError
from mlc_ray.config import LogSection
from mlc_ray.errors import MlcRayError
from mlc_ray.json_logs import JsonLines, json_lines
from mlc_ray.logs import LOG_FILE, keep_in
from mlc_ray.runs import LEASE_FILE, LOGS_FOLDER, names_of
from mlc_ray.storage import Place, local_side
from mlc_ray.storage.mirror import Mirror

logger = logging.getLogger(__name__)
_folder: Place | None = None  # whose logs this process keeps now


@dataclass(frozen=True)
class OwnLog:
    """What an actor keeps its log by: the folder that it works for, what it is, and its number among those."""

    folder: Place
    name: str
    number: int | None = None


@contextmanager
def log_file(settings: LogSection, folder: Place, rank: int | None = None) -> Iterator[JsonLines | None]:
    """Keep what this process logs while the block runs; None where that is not asked for.

    Args:
        settings: whether it is.
        folder: of the run, score, search, ...; of one at a URL, the file is kept on this machine and sent there.
        rank: the worker's; None for the driver.
    """
    if not settings.json_lines:
        yield None
        return
    with _writing(folder, "driver" if rank is None else f"worker-{rank:05d}", rank) as lines:
        yield lines


def own_log(name: str, number: int | None = None) -> OwnLog | None:
    """What an actor is given that this process starts; None where this process keeps no log."""
    return None if _folder is None else OwnLog(_folder, name, number)


@contextmanager
def kept(log: OwnLog | None) -> Iterator[JsonLines | None]:
    """Keep what this actor's process logs, as `log_file` does; where its node lacks the folder, warn and keep none."""
    if log is None:
        yield None
        return
    number = "" if log.number is None else f"-{log.number:05d}"
    who = log.name if log.number is None else f"{log.name} {log.number}"
    with ExitStack() as stack:
        lines = None
        try:
            if log.folder.is_local:
                (Path(log.folder) / LOGS_FOLDER).stat()  # the driver has made it: made here, it would be another one
            file = f"{log.name.replace(' ', '-')}{number}-{os.getpid()}"
            lines = stack.enter_context(_writing(log.folder, file, log.number))
            logger.info("%s begins", who)
        except OSError as error:  # a log must not cost a score
            logger.warning("%s keeps no log: %s; have all nodes share the folder, or use one at a URL", who, error)
        yield lines


def keeping(log: OwnLog | None) -> ExitStack:
    """The same until what is returned is closed, or the process ends."""
    stack = ExitStack()
    stack.enter_context(kept(log))
    return stack


@contextmanager
def output_kept(folder: Place) -> Iterator[None]:
    """Keep the output of libraries in a folder of this machine (`logs.keep_in`) while the block runs.

    Where that ends by one of this package's errors before anything else is written, a setting is wrong: the file is
    removed, so that no folder is left. Only what the cluster failed by is told in it.
    """
    if not folder.is_local:
        yield
        return
    keep_in(Path(folder))
    try:
        yield
    except MlcRayError as error:
        if not isinstance(error, ClusterError) and {each.name for each in folder.iterdir()} <= {LOG_FILE, LEASE_FILE}:
            (folder / LOG_FILE).remove()
        raise


@contextmanager
def _writing(folder: Place, name: str, worker: int | None) -> Iterator[JsonLines]:
    global _folder
    run, trial = names_of(folder)
    before = _folder
    with ExitStack() as stack:
        if folder.is_local:
            file = Path(folder) / LOGS_FOLDER / f"{name}.jsonl"
        else:
            own = local_side(folder) / f"{LOGS_FOLDER}-{name}"
            file = own / f"{name}.jsonl"
            mirror = Mirror(own, folder / LOGS_FOLDER, (file.name,), lambda: None, unsent=True, what="logs")
            stack.enter_context(closing(mirror))
        lines = stack.enter_context(json_lines(file, run=run, trial=trial, worker=worker))
        _folder = folder
        try:
            yield lines
        finally:
            _folder = before
