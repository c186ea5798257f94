"""One replica of a pool: an actor that holds a stage, and what the pool's process knows of it.

The actor answers two kinds of calls, each in a thread of its own: those that work, one after another, and those that
ask how it is, at once. So a process that is stopped, or that waits for a GPU for ever, is told from one that is slow:
the first does not answer, the second answers that its engine has made no step.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlc_ray.capacity import Need
from mlc_ray.cluster import gpus_held
from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Engine, engine_environment, steps_done
from mlc_ray.generate.stage import Stage
from mlc_ray.log_files import OwnLog, keeping, own_log
from mlc_ray.storage import model_for_now

logger = logging.getLogger(__name__)

LIGHT_CPUS = 0.1
"""Reserved by an actor without an engine, and by an engine that is used in turn with training."""

_LIGHT = EngineSection()  # how long an actor without an engine may take, and how often it is tried
_KILL_SECONDS = 10.0
DIED = "died"
STATES = ("starting", "working", "idle", "gone")
Weights = tuple[str | None, bool]
"""A folder or hub name, and whether it is an adapter's; (None, True) is no adapter."""


class EngineDiedError(MlcRayError):
    """Engines died, hung or failed more often than `engine.retries` allows; the message says which, where and why."""


@dataclass(frozen=True)
class Part:
    """One stage of a score and where it runs.

    `name` is what progress calls it. With an `engine` each of its replicas is an actor with that engine's CPUs and
    GPUs; without, `actors` light ones. `in_turn` is for engines that work in turn with training: they reserve nothing
    of Ray, and on GPUs their memory is given back between uses (`EnginePool.awake`). An actor that dies is started
    again, unless what it knows ends with it (`once`): what an endpoint has cost so far.
    """

    name: str
    stage: type[Stage]
    settings: Mapping[str, Any]
    engine: EngineSection | None = None
    actors: int = 1
    in_turn: bool = False
    once: bool = False

    @property
    def columns(self) -> pa.Schema:
        """What the stage adds."""
        return self.stage.adds(**self.settings)

    @property
    def replicas(self) -> int:
        """Number of actors."""
        if self.engine is None:
            return self.actors
        assert self.engine.replicas != "auto", "decided by now (score.plan)"
        return self.engine.replicas

    @property
    def limits(self) -> EngineSection:
        """How long an actor may take for what, and how often it is tried."""
        return self.engine or _LIGHT

    def places(self, device: Device) -> list[Need]:
        """What each actor reserves, and where it may lie, for `cluster.fits`."""
        if self.engine is None or self.in_turn:
            labels = {} if self.engine is None else self.engine.label_selector
            return [Need(LIGHT_CPUS, 0.0, labels)] * self.replicas
        return [place_of(self.engine, device)] * self.replicas

    def options(self, device: Device) -> dict[str, Any]:
        """Ray's options of each actor."""
        cpus, gpus, labels = self.places(device)[0]
        # Set when the process starts: OpenMP reads its settings once, when torch is loaded.
        variables = {} if self.engine is None else engine_environment(self.engine, device)
        options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}
        return {**options, "label_selector": dict(labels)} if labels else options


def place_of(engine: EngineSection, device: Device) -> Need:
    """What one engine reserves, all of it on one node."""
    gpus = float(engine.tensor_parallel if device == "gpu" else 0)
    return Need(engine.cpus_per_replica, gpus, engine.label_selector)


@dataclass(frozen=True)
class Where:
    """A process: its node's id and address, its pid and when it began (in the kernel's ticks), its log file."""

    node: str
    address: str
    pid: int
    began: str
    log: str

    @classmethod
    def here(cls) -> Where:
        """Of this process, which is an actor's."""
        node = ray.get_runtime_context().get_node_id()
        address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        return cls(node, address, os.getpid(), _began(os.getpid()), os.path.realpath("/proc/self/fd/2"))

    def __str__(self) -> str:
        return f"node {self.node[:8]} ({self.address}), pid {self.pid}, log {self.log}"


class Worker:
    """The actor. An expected error is returned beside the result, not raised: for one that is raised Ray logs a
    traceback for every result that was not fetched.
    """

    def __init__(self, stage: type[Stage], settings: Mapping[str, Any], log: OwnLog | None = None) -> None:
        self._stage, self._settings, self._log = stage, settings, keeping(log)
        self._copy = ExitStack()  # of the weights that are served, where they come from a URL

    def __repr__(self) -> str:  # before each line that Ray passes on
        return self._stage.__name__

    def where(self) -> Where:
        """Where the actor runs."""
        return Where.here()

    def beat(self) -> int:
        """How far the actor's engine has come, in steps."""
        return steps_done()

    def call(self, method: str, *arguments: Any) -> tuple[Any, MlcRayError | None]:
        """One of the methods below."""
        try:
            return getattr(self, f"_{method}")(*arguments), None
        except MlcRayError as error:
            return None, error

    def _start(self, weights: Weights | None) -> dict[str, float]:
        """Make the stage, and have it serve `weights`, unless they are those that it is made with."""
        self._made = self._stage(**self._settings)
        return {} if weights is None else self._swap(*weights)

    def _run(self, table: pa.Table, first: int, stop: int) -> pa.Table:
        return self._made(table.slice(first, stop - first))

    def _swap(self, weights: str | None, lora: bool) -> dict[str, float]:
        with ExitStack() as copy:
            folder = None if weights is None else copy.enter_context(model_for_now(weights))
            seconds = self._made.swap(folder, lora=lora)
            self._copy.close()
            self._copy = copy.pop_all()  # kept: vLLM may read an adapter again
        return seconds

    def _ping(self) -> None:
        """Nothing: whoever is asked lives."""

    def _wake(self) -> None:
        self._engine().wake_up()

    def _sleep(self) -> None:
        self._engine().sleep()

    def _close(self) -> None:
        self._made.close()
        self._copy.close()
        self._log.close()

    def _engine(self) -> Engine:
        if self._made.engine is None:
            raise RuntimeError(f"{self!r} has no engine that could sleep")
        return self._made.engine


@dataclass
class Replica:
    """An actor that may be gone, and the one call that it works on.

    `failures` counts the starts and swaps that failed since a call of it succeeded; `lost` says that others go on
    without it.
    """

    part: Part
    device: Device
    number: int
    actor: Any = None
    doing: Any = None
    method: str = ""
    failures: int = 0
    lost: bool = False
    _where: Where | None = None
    _asked_where: Any = None
    _watch: _Watch = field(default_factory=lambda: _Watch())

    def __str__(self) -> str:
        what = "engine" if self.part.engine is not None else "process"
        return f"{what} {self.number + 1} of {self.part.replicas} for {self.part.name}"

    @property
    def is_idle(self) -> bool:
        """Whether it lives and has nothing to do."""
        return self.actor is not None and self.doing is None

    @property
    def state(self) -> str:
        """One of `STATES`."""
        if self.actor is None:
            return "gone"
        return "idle" if self.doing is None else "starting" if self.method == "start" else "working"

    @property
    def where(self) -> Where | None:
        """Where the actor runs; None if it is nowhere yet, or has not said it."""
        if self._where is None and self._asked_where is not None:
            with suppress(ray.exceptions.RayError):  # a time-out is one too
                self._where = ray.get(self._asked_where, timeout=0)
        return self._where

    @property
    def waits_for(self) -> str:
        """What an actor that is nowhere yet waits for, in words."""
        need = self.part.places(self.device)[0]
        return f"no node has it yet: it needs {str(need)[1:-1]} of one node, and {gpus_held()}"

    def begin(self, weights: Weights | None) -> None:
        """Start the actor, with a stage that serves `weights` (None: those it is made with); it is busy with that."""
        remote: Any = ray.remote
        actor = remote(concurrency_groups={"watch": 1})(Worker)
        made = (self.part.stage, self.part.settings, own_log(self.part.name, self.number))
        self.actor = actor.options(**self.part.options(self.device)).remote(*made)
        self._asked_where, self._where, self._watch = self._ask("where"), None, _Watch()
        self.ask("start", weights)

    def ask(self, method: str, *arguments: Any) -> None:
        """Have it do something; what comes of it is `doing`."""
        self.method, self.doing = method, self.actor.call.remote(method, *arguments)
        self._watch.begin()

    def take(self) -> Any:
        """The result of what it did.

        Raises:
            MlcRayError: as the stage raised it.
            RayError: the actor has died, or the stage raised something else.
        """
        reference, self.doing = self.doing, None
        result, error = ray.get(reference)
        if error is not None:
            raise error
        self.failures = 0
        return result

    def trouble(self, seconds: float) -> str | None:
        """Why it is taken for hung, None while it is not.

        Args:
            seconds: since this was asked last.
        """
        limits, watch = self.part.limits, self._watch
        watch.look(seconds, lambda: self._ask("beat"))
        if watch.since_begin <= min(limits.hang_seconds, limits.start_seconds, watch.said + _SAY_SECONDS):
            return None  # none of its bounds is reached, and there is nothing to say
        return self._overdue()

    def _overdue(self) -> str | None:
        limits, watch = self.part.limits, self._watch
        # While it starts it may have no place yet, or hold Python's lock for long.
        if self.method != "start" and watch.unanswered > limits.hang_seconds:
            return f"did not answer for engine.hang_seconds={limits.hang_seconds:g}"
        if self.method == "start" and watch.since_begin - watch.said >= _SAY_SECONDS and self.where is None:
            watch.said = watch.since_begin
            logger.warning(
                "%s has waited for %.0f s of engine.start_seconds=%g: %s",
                self, watch.since_begin, limits.start_seconds, self.waits_for,
            )  # fmt: skip
        if self.method != "run":
            if watch.since_begin > limits.start_seconds:
                waits = "" if self.where else f"; {self.waits_for}"
                return f"did not {self.method} in engine.start_seconds={limits.start_seconds:g}{waits}"
            return None
        # The first step after a start may compile.
        name = "hang_seconds" if watch.steps else "start_seconds"
        bound = limits.hang_seconds if watch.steps else max(limits.start_seconds, limits.hang_seconds)
        if self.part.engine is not None and watch.since_step > bound:
            return f"made no step for engine.{name}={bound:g}"
        return None

    def end(self, *, hung: bool = False) -> None:
        """End the actor at once, also in the middle of its work; `hung`: even one whose process is stopped."""
        if self.actor is None:
            return
        if hung and self.where is not None:
            _kill(self.where)  # Ray's own way waits for an answer of the process
        ray.kill(self.actor)
        self.actor = self.doing = None

    def _ask(self, method: str) -> Any:
        return getattr(self.actor, method).options(concurrency_group="watch").remote()


@dataclass
class _Watch:
    """Signs of life of one actor. Seconds count while somebody looks: a driver that was stopped blames no engine."""

    steps: int = 0
    since_begin: float = 0.0
    since_step: float = 0.0
    unanswered: float = 0.0
    said: float = 0.0
    _asked: Any = None
    _pause: float = 0.0

    def begin(self) -> None:
        self.since_begin = self.since_step = self.unanswered = self.said = 0.0

    def look(self, seconds: float, ask: Any) -> None:
        self.since_begin += seconds
        self.since_step += seconds
        self._pause += seconds
        if self._asked is None:
            if self._pause < _BEAT_SECONDS:
                return
            self._asked, self._pause, self.unanswered = ask(), 0.0, 0.0
        self.unanswered += seconds
        if not ray.wait([self._asked], timeout=0)[0]:
            return
        with suppress(ray.exceptions.RayError):  # of a death, which what it does will tell as well
            if (steps := ray.get(self._asked)) != self.steps:
                self.steps, self.since_step = steps, 0.0
            self._asked, self.unanswered = None, 0.0


_BEAT_SECONDS = 1.0
_SAY_SECONDS = 60.0  # between warnings of an actor for which there is no place


def _began(pid: int) -> str:
    """When a process of this machine began, "" where there is none: its pid may be another's by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _kill(where: Where) -> None:
    """SIGKILL a process on whatever node it is, and wait a moment until it is gone."""
    if where.node == ray.get_runtime_context().get_node_id():
        _kill_here(where.pid, where.began)
        return
    node = NodeAffinitySchedulingStrategy(where.node, soft=False)
    task: Any = ray.remote(num_cpus=0)(_kill_here)
    ray.wait([task.options(scheduling_strategy=node).remote(where.pid, where.began)], timeout=_KILL_SECONDS)


def _kill_here(pid: int, began: str) -> None:
    if began and _began(pid) == began:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS / 2
    while _began(pid) == began and time.monotonic() < deadline:
        time.sleep(0.05)


def reason(error: BaseException) -> str:
    """What an error of Ray's says, without its traceback."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return f"failed by {type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return DIED
    return f"failed by {type(error).__name__}: {str(error).strip().splitlines()[0]}"
