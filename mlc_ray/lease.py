"""The lease on a folder: one driver at a time works in it, and no second one starts or resumes what is there.

Within a Ray cluster this is exact for drivers that name the folder alike: the holder has an actor whose name is made
from the folder, and Ray gives a name once and frees it when the holder's process dies. The file `lease.json` in the
folder says that name, so that whoever names the folder otherwise, as by another mount, asks for the same actor. Between
clusters, and for a driver without Ray, it goes by the file alone, which the holder writes again every quarter of
`LIFETIME`; a file that was not, whatever it says, is taken over after `LIFETIME`. Its age is measured by the clock of
the storage alone, or where that has none, by watching the file for so long.

Whoever takes over, or on storage without exclusive creation is the first, reads the file back after `SETTLE` seconds.
Of two drivers that do so at once, from two clusters or by two names, both go on only where one needed longer than that
from its look at the old file to its own writing, and then until the next check: whoever finds another's id in the file
ends the run (`LeaseGuard`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_placement_groups
from ray.util.state.exception import RayStateApiException

from mlc_ray.errors import MlcRayError
from mlc_ray.runs import LEASE_FILE
from mlc_ray.storage import Place, StorageFaultError, remove_abandoned

logger = logging.getLogger(__name__)

LIFETIME = 60.0
"""Seconds after which a lease that is not renewed is free."""
SETTLE = 1.0
_POLL = 0.5
_DYING = 5.0  # Ray frees a name within this many seconds of its holder's death
_CHECKED_EVERY = 10.0
_LOOK_AGAIN = 1.0  # a file that is replaced can be missing, or old, for a moment on network file systems
_NAMESPACE = "mlc_ray"


class LeaseError(MlcRayError):
    """Another driver works in the folder; the message says which, since when, and when it can be had."""


@dataclass(frozen=True)
class Holder:
    """Who has a lease: a random id, and the process. One without an id is what a file that is no lease tells.

    `machine` and `started` tell whether a process of this pid is still the same one, where it can be seen from here;
    `node` is the Ray node of the process, which no two clusters share, and `actor` the name that it holds there.
    `renewed` is how often it renewed the lease.
    """

    id: str
    host: str
    pid: int
    machine: str
    started: str
    node: str
    ray_job: str
    since: str
    actor: str = ""
    renewed: int = 0

    @classmethod
    def here(cls, folder: Place | None = None) -> Holder:
        """This process, under a new id, about to take the lease on `folder`."""
        context = ray.get_runtime_context() if ray.is_initialized() else None
        return cls(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()) or "",
            node=context.get_node_id() if context else "",
            ray_job=context.get_job_id() if context else "",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            actor=_name_of(folder) if context and folder else "",
        )

    def has_died(self) -> bool:
        """Whether its process is known to be gone; False where it cannot be seen from here."""
        if not self.started or self.machine != _machine():
            return False
        if (started := _started(self.pid)) is None:  # /proc may hide processes of other users (hidepid)
            return not _exists(self.pid)
        return started != self.started

    def __str__(self) -> str:
        if not self.id:
            return f"an unknown process: {LEASE_FILE} is empty, damaged or of another version"
        job = f", Ray job {self.ray_job}" if self.ray_job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class _Name:
    """The actor that holds a name; it does nothing."""


@contextmanager
def lease(folder: Place, *, wait: bool, lifetime: float = LIFETIME) -> Iterator[str]:
    """Hold the lease on `folder`, which is made if need be, while the block runs.

    What killed processes left half written directly in it is removed first.

    Args:
        folder: what to work in.
        wait: where another holds it, wait whether it renews the lease, and take it over where it does not; else refuse
            at once.
        lifetime: seconds after which the lease is free, unless renewed.

    Yields:
        The lease's id, for a `LeaseGuard`.

    Raises:
        LeaseError: Another driver holds it.
    """
    folder = folder.absolute()
    made = folder.is_local and not folder.exists()
    own = Holder.here(folder)
    actor = _acquire(folder, own, wait=wait, lifetime=lifetime)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(folder, own, lifetime, ended), name="lease", daemon=True)
    renewing.start()
    try:
        remove_abandoned(folder)
        yield own.id
    finally:
        ended.set()
        try:
            renewing.join(_DYING)
            if renewing.is_alive():
                raise OSError(f"a renewal has waited {_DYING:g} s for the storage")
            if (holder := _read(folder)) is not None and holder.id == own.id:
                (folder / LEASE_FILE).remove()
        except OSError as error:
            logger.warning("the lease on %s could not be given back (%s); it ends by itself", folder, error)
        finally:
            _give_name_back(actor)
        if made:
            with suppress(OSError):  # not empty: what the lease was for is there
                Path(folder).rmdir()


class LeaseGuard:
    """Makes sure, in the process that writes into a folder, that its driver still holds the lease.

    Args:
        folder: what is written into.
        id: the lease's.
        lifetime: of the lease, in seconds; where its file cannot be read, it is taken for held for so long from the
            first look that failed. A look so long after the last one is a first one again.
    """

    def __init__(self, folder: Place, id: str, lifetime: float = LIFETIME) -> None:
        self.folder, self.id, self.lifetime = folder, id, lifetime
        self.checked = time.monotonic()
        self._failed: tuple[float, float] | None = None  # from the first of the looks that failed to the last one's end

    def check(self, *, now: bool = False) -> None:
        """Look into the lease file, if the last look is some seconds ago.

        Args:
            now: look whenever the last look was, and wait until the file can be read; for what cannot be undone.

        Raises:
            LeaseError: The lease is another driver's, or nobody's.
            StorageFaultError: Its file could not be read for its lifetime: another driver may have it by now, and only
                who starts again, once the file can be read, knows. `cluster.max_failures` applies.
        """
        if not now and time.monotonic() - self.checked < _CHECKED_EVERY:
            return
        while True:
            looked = self.checked = time.monotonic()
            try:
                holder, is_held = _look_twice(self.folder, self.id)
                break
            except OSError as error:
                first, last = self._failed or (looked, looked)
                if looked - last > self.lifetime:  # nobody looked in between: it may have been back
                    first = looked
                if first == looked:  # it is looked at again every second: said once
                    logger.warning("the lease on %s cannot be read now: %s", self.folder, error)
                ended = time.monotonic()
                self._failed = first, ended
                if (silent := ended - first) > self.lifetime:
                    raise StorageFaultError(
                        f"the lease on {str(self.folder)!r} could not be read for {silent:.0f} s, in which another "
                        f"driver may have taken it: {error}. Go on once the storage is back"
                    ) from error
            if not now:
                return
            time.sleep(_LOOK_AGAIN)
        self._failed = None
        if not is_held:
            raise LeaseError(
                f"the lease on {str(self.folder)!r} was lost to {holder or 'nobody: its file is gone'}; this run "
                "ends, so that two do not write into one folder. The driver or its storage had stopped for longer than "
                "the lease lives; go on once nobody holds it"
            )


def _acquire(folder: Place, own: Holder, *, wait: bool, lifetime: float) -> Any:
    """Take the lease; returns the actor that holds the name in this cluster, or None outside of one."""
    actor, has_name = None, False
    try:
        first, began, said = _read(folder), time.monotonic(), False
        while True:
            if not has_name:
                actor, has_name = _take_name(own)
            holder, watched = _read(folder), time.monotonic() - began
            renewed = holder is not None and holder != first
            unrenewed = 0.0 if renewed else watched
            if has_name and _is_free(folder, holder, own, lifetime, unrenewed) and _write_first(folder, own, holder):
                if holder is not None:
                    _remove_groups_of(holder)
                return actor
            holder = _read(folder)
            dying = holder is None or holder.has_died()
            patience = lifetime + _DYING if wait else _DYING if dying else 0.0
            if (holder is not None and holder != first and not dying) or watched > patience:
                raise LeaseError(_refusal(folder, holder, lifetime))
            if not said and not dying:
                logger.info(
                    "%s is held by %s; waiting until its lease ends, in %.0f s unless it is renewed",
                    folder, holder, max(0.0, lifetime - _age(folder)),
                )  # fmt: skip
                said = True
            time.sleep(_POLL)
    except BaseException:
        _give_name_back(actor)
        raise


def _is_free(folder: Place, holder: Holder | None, own: Holder, lifetime: float, unrenewed: float) -> bool:
    """Whether the lease that the file tells of has ended; the name within this cluster is this process's.

    It has been watched for `unrenewed` seconds, in which it was not renewed.
    """
    if holder is None:
        return True
    is_here = bool(holder.actor) and _is_of_this_cluster(holder)
    if is_here and holder.actor != own.actor:  # it names the folder otherwise: its process lives as long as its actor
        try:
            ray.get_actor(holder.actor, namespace=_NAMESPACE)
            return False
        except ValueError:
            return True
    return is_here or unrenewed > lifetime or holder.has_died() or _age(folder) > lifetime


def _is_of_this_cluster(holder: Holder) -> bool:
    return ray.is_initialized() and holder.node in {str(node["NodeID"]) for node in ray.nodes()}  # type: ignore[no-untyped-call]


def _remove_groups_of(holder: Holder) -> None:
    """Remove the placement groups that a driver of this cluster left, whose process and whose Ray job are dead.

    Ray removes the groups of a job that ends. But Ray Train's controller lives some milliseconds longer than its
    driver, and where workers were just being replaced it makes a group for new ones, which holds their CPUs and GPUs
    for good: its own cleaner (2.60) knows a group once its workers have started.
    """
    if not _is_of_this_cluster(holder) or holder.ray_job == ray.get_runtime_context().get_job_id():
        return
    of_job = ("creator_job_id", "=", holder.ray_job), ("is_detached", "=", False), ("state", "!=", "REMOVED")
    here = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    try:
        left = list_placement_groups(here, filters=list(of_job), detail=True)
    except (RayStateApiException, OSError) as error:  # a cluster without a dashboard
        logger.info("whether %s left placement groups cannot be told: %s", holder, error)
        return
    if left and not _has_ended(holder.ray_job):  # the driver was one process of several
        logger.info("placement groups of %s are left alone: Ray does not know that its job has ended", holder)
        return
    for each in left:
        logger.warning("removing placement group %s, which %s left", each.placement_group_id, holder)
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(each.placement_group_id)))
        remove_placement_group(group)


def _has_ended(ray_job: str) -> bool:
    """Whether Ray knows a job of this cluster, and that its driver is dead."""
    # `ray.util.state.list_jobs` has of each `ray job submit` the last driver alone.
    from ray._private.state import jobs

    return any(each["JobID"] == ray_job and each["IsDead"] for each in jobs())  # type: ignore[no-untyped-call]


def _write_first(folder: Place, own: Holder, before: Holder | None) -> bool:
    """Write the lease file; False where another driver was faster."""
    if before is None and (created := (folder / LEASE_FILE).create(json.dumps(asdict(own)))) is not None:
        return created
    _write(folder, own)
    time.sleep(SETTLE)
    found = _read(folder)
    return found is not None and found.id == own.id


def _write(folder: Place, own: Holder) -> None:
    (folder / LEASE_FILE).write_json(asdict(own))


def _renew(folder: Place, own: Holder, lifetime: float, ended: threading.Event) -> None:
    while not ended.wait(lifetime / 4):
        try:
            holder, is_held = _look_twice(folder, own.id)
            if not is_held:
                logger.error("the lease on %s was lost to %s", folder, holder or "nobody: its file is gone")
                return
            own = replace(own, renewed=own.renewed + 1)
            _write(folder, own)
        except OSError as error:  # the storage may come back before the lease has ended
            logger.warning("the lease on %s could not be renewed: %s", folder, error)


def _name_of(folder: Place) -> str:
    return f"lease-{hashlib.sha256(str(folder).encode('utf-8')).hexdigest()[:16]}"


def _take_name(own: Holder) -> tuple[Any, bool]:
    """The actor that holds the folder's name in this cluster, and whether the name is this process's."""
    if not own.actor:
        return None, True
    here = ray.get_runtime_context().get_node_id()  # another node may be taken away while this process lives
    options: dict[str, Any] = {
        "name": own.actor,
        "namespace": _NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }
    try:
        return ray.remote(_Name).options(**options).remote(), True
    except ValueError:  # the name is taken
        return None, False


def _give_name_back(actor: Any) -> None:
    if actor is not None and ray.is_initialized():
        with suppress(Exception):  # the cluster may be gone, and the name with it
            ray.kill(actor)


def _refusal(folder: Place, holder: Holder | None, lifetime: float) -> str:
    if holder is None:
        return (
            f"{str(folder)!r} is being taken by another driver of this Ray cluster; look what runs there, or try again"
        )
    ends = datetime.fromtimestamp(time.time() + lifetime - _age(folder), UTC).isoformat(timespec="seconds")
    if not holder.id:
        return (
            f"{str(folder / LEASE_FILE)!r} does not say who works there: it is empty, damaged or of another version. "
            f"Remove it if you know that nothing does; else it is taken over after {ends}, unless it is written again "
            "until then"
        )
    return (
        f"{str(folder)!r} is held by {holder}: end that process, or wait for it. If it does not run any more, its "
        f"lease ends at {ends}"
    )


def _look_twice(folder: Place, id: str) -> tuple[Holder | None, bool]:
    """Who the lease file names, and whether that is `id`; where it is not, it is read again a second later."""
    holder = _read(folder)
    if holder is None or holder.id != id:
        time.sleep(_LOOK_AGAIN)
        holder = _read(folder)
    return holder, holder is not None and holder.id == id


def _read(folder: Place) -> Holder | None:
    """Who the lease file names, one without an id where what it says is not a lease; None where there is none.

    Raises:
        OSError: The storage does not let it be read.
    """
    try:
        return Holder(**(folder / LEASE_FILE).read_json())
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # as after a power loss
        return Holder(id="", host="", pid=0, machine="", started="", node="", ray_job="", since="")


def _age(folder: Place) -> float:
    """Seconds since the lease file was written, by the clock that stamps the folder's files; 0 where none is known."""
    now = folder / f".{LEASE_FILE}.now-{uuid.uuid4().hex}"
    try:
        now.write_text("")
        times = now.modified(), (folder / LEASE_FILE).modified()
    except FileNotFoundError:
        return 0.0
    finally:
        now.remove()
    return 0.0 if times[0] is None or times[1] is None else times[0] - times[1]


def _machine() -> str:
    """What tells apart the machines, and the containers on them, that see different processes; "" where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was, "" once it has ended; None where none is seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Whether there is a process, seen or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
