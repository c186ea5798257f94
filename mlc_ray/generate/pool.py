"""One pool for scores and searches: Ray actors that each hold a stage, fed with blocks of rows from one queue.

    prompts = Blocks.put(table, part, device)      # into Ray's object store, once
    with Pool.open(part, device) as pool:
        answers = pool.map(prompts)                # the new columns, block for block, in the object store as well
        pool.swap(folder)                          # the same engines serve other weights, which is verified
        answers = pool.map(prompts)
    table = answers.table()

A free actor takes the next block, so that a slow one does not delay the others; results are ordered by the block's
number, and the order of rows within a block never changes. The columns that a stage adds stay in the object store until
they are read: the actors of the next stage get them from there, beside the blocks of prompts, and not through the
driver.

A pool belongs to one process, which calls one method at a time. An actor that dies ends the call with Ray's own error;
no block is retried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Engine, engine_environment
from mlc_ray.generate.stage import Stage
from mlc_ray.progress import Phase, phase
from mlc_ray.storage import model_for_now

LIGHT_CPUS = 0.1
"""Reserved by an actor without an engine, and by an engine that is used in turn with training."""

# The most and the least rows of a block. One block is what an engine works on at a time: too small, and its batch is
# not full; too large, and progress comes late and the last engine works alone. SmolLM2-135M on two cores, 192 prompts
# of 24 new tokens: blocks of 64 take 4 % more CPU time than all at once, blocks of 32 take 15 %.
_BLOCK_ROWS: Mapping[Device, tuple[int, int]] = {"cpu": (64, 16), "gpu": (512, 128)}
_BLOCKS_PER_REPLICA = 4
_QUEUED = 2  # blocks given to an actor at once: the second travels while the first is worked on
_CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class Part:
    """One stage of a score and where it runs.

    `name` is what progress calls it. With an `engine` each of its replicas is an actor with that engine's CPUs and
    GPUs; without, `actors` light ones. `in_turn` is for engines that work in turn with training: they reserve nothing
    of Ray, and on GPUs their memory is given back between uses (`Pool.awake`).
    """

    name: str
    stage: type[Stage]
    settings: Mapping[str, Any]
    engine: EngineSection | None = None
    actors: int = 1
    in_turn: bool = False

    @property
    def replicas(self) -> int:
        """Number of actors."""
        return self.actors if self.engine is None else self.engine.replicas

    def places(self, device: Device) -> list[tuple[float, float]]:
        """(CPUs, GPUs) that each actor reserves, for `cluster.fits`."""
        if self.engine is None or self.in_turn:
            return [(LIGHT_CPUS, 0.0)] * self.replicas
        gpus = self.engine.tensor_parallel if device == "gpu" else 0
        return [(self.engine.cpus_per_replica, float(gpus))] * self.replicas

    def options(self, device: Device) -> dict[str, Any]:
        """Ray's options of each actor."""
        cpus, gpus = self.places(device)[0]
        # Set when the process starts: OpenMP reads its settings once, when torch is loaded.
        variables = {} if self.engine is None else engine_environment(self.engine, device)
        return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}


@dataclass(frozen=True)
class Blocks:
    """A table in Ray's object store, in blocks of consecutive rows; what travels between processes is references."""

    references: tuple[Any, ...]
    lengths: tuple[int, ...]

    @classmethod
    def put(cls, table: pa.Table, part: Part, device: Device) -> Blocks:
        """Cut a table into blocks of a size that suits the actors of `part`, and put them into the object store."""
        rows = block_rows(len(table), part.replicas, device)
        # `take` copies: a slice would be stored with all of the table behind it.
        blocks = [table.take(list(range(first, min(first + rows, len(table))))) for first in range(0, len(table), rows)]
        return cls(tuple(ray.put(block) for block in blocks), tuple(map(len, blocks)))

    def __len__(self) -> int:
        return sum(self.lengths)

    def table(self) -> pa.Table:
        """All rows, in order."""
        return pa.concat_tables(ray.get(list(self.references)))


def side_by_side(table: pa.Table, columns: Sequence[Blocks]) -> pa.Table:
    """`table` with what the stages of pools added to it."""
    return _joined([table, *(blocks.table() for blocks in columns)])


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    table, *others = tables
    for other in others:
        for name in other.column_names:
            table = table.append_column(name, other[name])
    return table


def block_rows(rows: int, replicas: int, device: Device) -> int:
    """Rows of a block: several blocks for each replica where there are enough rows, so that none works alone long."""
    most, least = _BLOCK_ROWS[device]
    if replicas == 1:
        return most
    balanced = min(most, max(least, math.ceil(rows / (_BLOCKS_PER_REPLICA * replicas))))
    return max(1, min(balanced, rows // replicas))


class Worker:
    """An actor of a pool. An expected error is returned beside the result, not raised: for one that is raised Ray logs
    a traceback for every result that was not fetched.
    """

    def __init__(self, stage: type[Stage], settings: Mapping[str, Any]) -> None:
        self._stage, self._settings = stage, settings
        self._copy = ExitStack()  # of the weights that are served, where they come from a URL

    def __repr__(self) -> str:  # before each line that Ray passes on
        return self._stage.__name__

    def run(self, *columns: pa.Table) -> tuple[pa.Table | None, MlcRayError | None]:
        """The stage's columns for the rows of one block, whose tables lie side by side."""
        try:
            return self._made(_joined(columns)), None
        except MlcRayError as error:
            return None, error

    def call(self, method: str, *arguments: Any) -> tuple[Any, MlcRayError | None]:
        """One of the methods below."""
        try:
            return getattr(self, f"_{method}")(*arguments), None
        except MlcRayError as error:
            return None, error

    def _start(self) -> None:
        self._made = self._stage(**self._settings)

    def _swap(self, weights: str | None, lora: bool) -> dict[str, float]:
        with ExitStack() as copy:
            folder = None if weights is None else copy.enter_context(model_for_now(weights))
            seconds = self._made.swap(folder, lora=lora)
            self._copy.close()
            self._copy = copy.pop_all()  # kept: vLLM may read an adapter again
        return seconds

    def _wake(self) -> None:
        self._engine().wake_up()

    def _sleep(self) -> None:
        self._engine().sleep()

    def _close(self) -> None:
        self._made.close()
        self._copy.close()

    def _engine(self) -> Engine:
        if self._made.engine is None:
            raise RuntimeError(f"{self!r} has no engine that could sleep")
        return self._made.engine


@dataclass
class Pool:
    """The actors of one `Part`; `open` it, `map` blocks, `swap` weights, `close` it. Also a context manager.

    `weights` are those that its engines serve: the model they were started with, or what `swap` was given last; None
    after a swap that failed.
    """

    part: Part
    device: Device
    weights: str | None
    actors: list[Any] = field(default_factory=list)

    @classmethod
    def open(cls, part: Part, device: Device) -> Pool:
        """Start the actors and wait until all are up.

        Raises:
            MlcRayError: what the stage raises, engines above all, as itself.
        """
        return cls.open_all([part], device)[0]

    @classmethod
    def open_all(cls, parts: Sequence[Part], device: Device) -> list[Pool]:
        """Several pools, whose actors start at once; raises as `open` does, and leaves nothing running then."""
        pools = [cls(part, device, part.settings.get("model")) for part in parts]
        try:
            for pool in pools:
                actor = ray.remote(Worker).options(**pool.part.options(device))
                pool.actors = [actor.remote(pool.part.stage, pool.part.settings) for _ in range(pool.part.replicas)]
            _start(pools)
            for pool in pools:
                if pool.sleeps:
                    pool._each("sleep")
        except BaseException:
            for pool in pools:
                pool.kill()
            raise
        return pools

    @property
    def sleeps(self) -> bool:
        """Whether the engines give their memory back between uses."""
        return self.part.in_turn and self.device == "gpu"

    def map(self, *inputs: Blocks, progress: Phase | None = None) -> Blocks:
        """The stage's columns for every row.

        Args:
            inputs: the tables that the stage reads, cut alike; it sees their columns side by side.
            progress: is told of the rows of every block that is done.

        Raises:
            MlcRayError: what the stage raises, as itself.
        """
        if any(blocks.lengths != inputs[0].lengths for blocks in inputs):
            raise ValueError("blocks of several lengths cannot lie side by side")
        queue = iter(range(len(inputs[0].lengths)))
        results: dict[int, Any] = {}
        running: dict[Any, tuple[int, Any, Any]] = {}  # reference of an error or None -> block, its columns, actor

        def give(actor: Any) -> None:
            for block in queue:
                columns, fault = actor.run.options(num_returns=2).remote(*(each.references[block] for each in inputs))
                running[fault] = (block, columns, actor)
                return

        for actor in [actor for _ in range(_QUEUED) for actor in self.actors]:
            give(actor)
        while running:
            (fault, *_), _ = ray.wait(list(running), num_returns=1)
            block, columns, actor = running.pop(fault)
            _raise(ray.get(fault))
            results[block] = columns
            give(actor)
            if progress is not None:
                progress.advance(inputs[0].lengths[block])
        return Blocks(tuple(results[block] for block in range(len(results))), inputs[0].lengths)

    def swap(self, weights: str | None, *, lora: bool = False) -> dict[str, float]:
        """Have all engines serve other weights, and prove it (`generate.swap`).

        Args:
            weights: a Hugging Face folder or hub name; with `lora` a peft folder, or None for no adapter.

        Returns:
            Seconds of the `transfer` and of the `proof`, of the slowest engine.

        Raises:
            StaleWeightsError: an engine does not serve them.
        """
        self.weights = None  # until it is verified, it is unknown what they serve
        found = self._each("swap", weights, lora)
        self.weights = weights
        return {name: max(seconds[name] for seconds in found) for name in found[0]}

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While the block runs, engines that sleep between uses have their memory; the others always do."""
        if not self.sleeps:
            yield
            return
        self._each("wake")
        try:
            yield
        finally:  # training needs the memory even after an error
            self._each("sleep")

    def close(self) -> None:
        """End the actors. Engines free their memory first: Ray calls a GPU free as soon as it has sent the signal."""
        closing = [actor.call.remote("close") for actor in self.actors]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the actors at once, even in the middle of a block."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _each(self, method: str, *arguments: Any) -> list[Any]:
        return _call(self.actors, method, *arguments)


def _start(pools: Sequence[Pool]) -> None:
    """Wait until all actors are up, or one raises; an engine may take minutes, so those are counted."""
    starting = {actor.call.remote("start"): pool for pool in pools for actor in pool.actors}
    engines = sum(pool.part.engine is not None for pool in starting.values())
    with phase("starting engines", engines, "engines") if engines else nullcontext() as progress:
        while starting:
            (reference, *_), _ = ray.wait(list(starting), num_returns=1)
            _, error = ray.get(reference)
            _raise(error)
            if starting.pop(reference).part.engine is not None and progress is not None:
                progress.advance()


def _call(actors: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
    done = ray.get([actor.call.remote(method, *arguments) for actor in actors])
    for _, error in done:
        _raise(error)
    return [result for result, _ in done]


def _raise(error: MlcRayError | None) -> None:
    if error is not None:
        raise error


@contextmanager
def expected_errors() -> Iterator[None]:
    """Raise an expected error of an actor as it was raised there, instead of Ray's, which holds a traceback."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MlcRayError):
            raise error.cause from None
        raise
