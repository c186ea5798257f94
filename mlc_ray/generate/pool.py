"""One supervised pool for scores and searches: actors that each hold a stage, fed with blocks of rows from one queue.

    with EnginePool.open(part, device) as pool:
        answers = pool.map(prompts)        # the new columns, row for row
        pool.swap(folder)                  # the same engines serve other weights, which is verified
        answers = pool.map(prompts)

An idle actor takes the next block, so that a slow one does not delay the others. What an actor made of a block comes to
the pool's process at once, where nothing that happens to an actor or its node can take it away; `map` can hand it on as
it comes.

An engine that dies, hangs or fails is started again with the weights that it served, swapped and proved as ever, and
its block is given to whoever is idle. A block that engines failed on `engine.retries` + 1 times is halved, again and
again, until the rows on which they fail stand alone; those are marked (`Stage.given_up`), and everything else has its
answer. A pool whose engines die of everything stops with `EngineDiedError`. What a stage itself raises as a
`MlcRayError` (a setting, a limit of cost) is nothing that another try would change: it ends the call.

A pool belongs to one process, which calls one method at a time. `work` has several pools at work at once, each on rows
that another one has done.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions

from mlc_ray.errors import MlcRayError
from mlc_ray.generate.blocks import Job, Landed, Piece, block_size
from mlc_ray.generate.engine import Device
from mlc_ray.generate.replica import DIED, STATES, EngineDiedError, Part, Replica, Weights, reason
from mlc_ray.generate.stage import TOKENS
from mlc_ray.monitoring import count, measure
from mlc_ray.progress import Phase, phase

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0
_LOOK_SECONDS = 1.0  # between looks after the actors; a block takes seconds at least


@dataclass(frozen=True)
class _Outcome:
    """What became of a replica's call: a result, or why there is none, and where that was."""

    replica: Replica
    result: Any = None
    fault: str | None = None
    at: str = ""


@dataclass
class EnginePool:
    """The actors of one `Part`; `open` it, `map` rows, `swap` weights, `close` it. Also a context manager.

    `weights` are those that its engines serve: the model they were started with, or what `swap` was given last; None
    after a swap that failed.
    """

    part: Part
    device: Device
    weights: str | None
    replicas: list[Replica]
    _served: Weights | None = None  # None: those that the stage is made with
    _sure: bool = True  # that they serve them: not after a swap that failed
    _pieces: dict[int, Piece] = field(default_factory=dict)  # by the number of the replica that works on it
    _looked: float = 0.0

    @classmethod
    def open(cls, part: Part, device: Device, *, wait: bool = True) -> EnginePool:
        """Start the actors and wait until all are up; without `wait` they are while work goes on.

        Raises:
            EngineDiedError: one of them died, or was not up in `engine.start_seconds`.
            MlcRayError: what the stage raises, engines above all, as itself.
        """
        return cls.open_all([part], device, wait=wait)[0]

    @classmethod
    def open_all(cls, parts: Sequence[Part], device: Device, *, wait: bool = True) -> list[EnginePool]:
        """Several pools, whose actors start at once; raises as `open` does, and leaves nothing running then."""
        pools = [
            cls(part, device, part.settings.get("model"), [Replica(part, device, at) for at in range(part.replicas)])
            for part in parts
        ]
        try:
            for pool in pools:
                for replica in pool.replicas:
                    replica.begin(None)
            if wait:
                _wait_for_all(pools)
            for pool in pools:
                if pool.sleeps:
                    pool._each("sleep", start=False)
        except BaseException:
            for pool in pools:
                pool.kill()
            raise
        return pools

    @property
    def sleeps(self) -> bool:
        """Whether the engines give their memory back between uses."""
        return self.part.in_turn and self.device == "gpu"

    def map(self, table: pa.Table, *, progress: Phase | None = None, landed: Landed | None = None) -> pa.Table:
        """The stage's columns for every row of `table`, in its order.

        Args:
            table: what the stage reads.
            progress: is told of the rows that are done.
            landed: is told of what is done as it comes, in any order; not of rows that are marked as failed.

        Raises:
            EngineDiedError: no engine is left, or they die of whatever they are given.
            MlcRayError: what the stage raises, as itself.
        """
        done: dict[int, pa.Table] = {}

        def took(piece: Piece, columns: pa.Table, marked: bool) -> None:
            done[piece.first] = columns
            if landed is not None and not marked:
                landed(piece.first, columns)

        job = Job(self.part, block_size(self.part, self.device, len(table)), took, progress=progress)
        job.add(table)
        job.close()
        work([(self, job)])
        return pa.concat_tables([self.part.columns.empty_table(), *(done[first] for first in sorted(done))])

    def begin(self) -> None:
        """Be ready for a job.

        Raises:
            RuntimeError: it is unknown which weights would answer.
        """
        if not self._sure:
            raise RuntimeError("after a failed swap, or a start since, it is unknown which weights answer: swap first")
        for replica in self.replicas:
            replica.failures = 0

    def advance(self, job: Job, *, patient: bool = False) -> None:
        """Take what has come of `job` by now, and give its next pieces to who is idle.

        Args:
            job: what the pool works on.
            patient: who has no place on a node yet may wait for one: others that hold it will end.

        Raises:
            EngineDiedError: no engine is left, or they die of whatever they are given.
            MlcRayError: what the stage raises, as itself.
        """
        for found in self._outcomes(patient=patient):
            piece = self._pieces.pop(found.replica.number, None)
            if piece is None:  # a start, and `_feed` says when those failed too often
                continue
            if found.fault is None:
                self._count(found.result)
                job.take(piece, found.result)
            else:
                job.failed(piece, found.fault, found.at)
        self._feed(job.queue)
        self._tell_state(job.left)

    def drop(self) -> None:
        """End who is busy with a piece: what it would give is wanted no more."""
        for number in self._pieces:
            if not self.replicas[number].is_idle:
                self.replicas[number].end()
        self._pieces.clear()

    @property
    def busy(self) -> list[Any]:
        """Ray's references to what its actors are doing."""
        return [replica.doing for replica in self.replicas if replica.doing is not None]

    @property
    def pause(self) -> float:
        """Seconds between looks after its actors."""
        return min(_LOOK_SECONDS, self.part.limits.hang_seconds / 4, self.part.limits.start_seconds / 4)

    def swap(self, weights: str | None, *, lora: bool = False) -> dict[str, float]:
        """Have all engines serve other weights, and prove it (`generate.swap`).

        Args:
            weights: a Hugging Face folder or hub name; with `lora` a peft folder, or None for no adapter.

        Returns:
            Seconds of the `transfer` and of the `proof`, of the slowest engine.

        Raises:
            StaleWeightsError: an engine does not serve them.
            EngineDiedError: all engines die of it.
        """
        self.weights, self._sure = None, False  # until it is verified, it is unknown what they serve
        self._served = (weights, lora)
        found = self._each("swap", weights, lora)
        self.weights, self._sure = weights, True
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
            self._each("sleep", start=False)

    def check(self) -> None:
        """Ask all actors whether they live, and start those that do not again; while they sleep, when they are woken.

        Who is started serves the weights that its stage is made with: `swap` then, unless no others were served.

        Raises:
            EngineDiedError: none of them lives, or comes up.
        """
        self._each("ping", start=not self.sleeps)

    def close(self) -> None:
        """End the actors. Engines free their memory first: Ray calls a GPU free as soon as it has sent the signal."""
        closing = [replica for replica in self.replicas if replica.is_idle]
        for replica in closing:
            replica.ask("close")
        if closing:
            ray.wait([each.doing for each in closing], num_returns=len(closing), timeout=_CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the actors at once, even in the middle of a block."""
        for replica in self.replicas:
            replica.end()
        self._tell_state(0)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    # -------------------------------------------------------------------------------------------------- how it works

    def _feed(self, queue: deque[Piece]) -> None:
        """Give the next pieces to who is idle; who is gone starts again, while there is something to do."""
        for replica in self.replicas:
            if not queue:
                return
            if replica.is_idle:
                piece = queue.popleft()
                self._pieces[replica.number] = piece
                if piece.block.stored is None:
                    piece.block.stored = ray.put(piece.block.rows)
                replica.ask("run", piece.block.stored, piece.offset, piece.offset + len(piece))
            elif replica.actor is None and self._may_start(replica):
                self._again(replica, self._served)
        if all(replica.actor is None for replica in self.replicas):
            raise self._gone()

    def _each(self, method: str, *arguments: Any, start: bool = True) -> list[Any]:
        """What a method of every worker returns.

        With `start`, who is gone or dies of it starts again instead of being asked: for a swap with its weights, else
        with those that the stage is made with. Others that are served may be gone by now: a search removes those of a
        trial that has ended. Who does not start is given up, and not waited for again while another lives.

        Raises:
            EngineDiedError: with `start`, nobody is left.
        """
        asked = set()  # those that are not are still busy with what an earlier call began
        if all(replica.actor is None for replica in self.replicas):
            for replica in self.replicas:
                replica.lost = False
        for replica in self.replicas:
            replica.failures = 0
            if replica.is_idle:
                replica.ask(method, *arguments)
            elif replica.actor is None and start and self._may_start(replica):
                self._begin(replica, method)
            else:
                continue
            asked.add(replica.number)
        results, last = [], None
        while self.busy:
            _wait([self])
            for found in self._outcomes():
                replica = found.replica
                if found.fault is None and replica.number in asked:
                    results.append(found.result)
                elif found.fault is None:
                    replica.ask(method, *arguments)
                    asked.add(replica.number)
                elif start and self._may_start(replica):
                    self._begin(replica, method)
                    asked.add(replica.number)
                elif start:
                    replica.lost, last = True, found
        if start and not results:
            if last is None or self.part.once:
                raise self._gone()
            raise EngineDiedError(f"{last.fault}{last.at}, for good")
        return results

    def _begin(self, replica: Replica, method: str) -> None:
        """Start a replica again instead of asking it for `method`; see `_each`."""
        if method != "swap" and self._served is not None:
            self.weights, self._sure = None, False
        self._again(replica, self._served if method == "swap" else None)

    def _outcomes(self, *, patient: bool = False) -> Iterator[_Outcome]:
        """What has become of calls by now; who died or hangs has ended, and is told of in the log.

        What a stage raised comes last, so that what the others have done is not lost with it.

        Raises:
            MlcRayError: what a stage raised.
            RayTaskError: what the stage of a light actor raised.
        """
        doing = {replica.doing: replica for replica in self.replicas if replica.doing is not None}
        ready, _ = ray.wait(list(doing), num_returns=len(doing), timeout=0) if doing else ([], [])
        now = time.monotonic()
        seconds = min(now - self._looked, 2 * self.pause)  # what is longer, the pool's own process was away
        self._looked = now
        raised: list[Exception] = []
        for reference, replica in doing.items():
            waits = patient and replica.method == "start" and replica.where is None
            if reference in ready:
                try:
                    yield self._taken(replica)
                except Exception as error:
                    raised.append(error)
            elif not waits and (trouble := replica.trouble(seconds)) is not None:
                yield self._ended(replica, trouble, hung=True)
        if raised:
            raise raised[0]

    def _taken(self, replica: Replica) -> _Outcome:
        try:
            return _Outcome(replica, replica.take())
        except ray.exceptions.RayError as error:
            if self.part.engine is None and isinstance(error, ray.exceptions.RayTaskError):
                raise  # a mistake in the code of a judge
            return self._ended(replica, reason(error), hung=False)

    def _ended(self, replica: Replica, trouble: str, *, hung: bool) -> _Outcome:
        at = f" ({replica.where})" if replica.where is not None else ""
        fault = f"{replica} {trouble}"
        replica.failures += replica.method in ("start", "swap")
        replica.end(hung=hung)
        how = "hung" if hung else "died" if trouble == DIED else "failed"
        count("mlc_engine_failures", part=self.part.name, reason=how)
        logger.warning("%s%s%s", fault, at, "" if self._may_start(replica) else "; it is given up")
        return _Outcome(replica, fault=fault, at=at)

    def _again(self, replica: Replica, weights: Weights | None) -> None:
        count("mlc_engine_restarts", part=self.part.name)
        logger.warning("%s is started again", replica)
        replica.begin(weights)

    def _count(self, columns: pa.Table) -> None:
        count("mlc_engine_rows", len(columns), part=self.part.name)
        if TOKENS in columns.column_names:
            count("mlc_engine_tokens", pc.sum(columns[TOKENS]).as_py() or 0, part=self.part.name)

    def _tell_state(self, left: int) -> None:
        states = [replica.state for replica in self.replicas]
        for state in STATES:
            measure("mlc_engines", states.count(state), part=self.part.name, state=state)
        measure("mlc_engine_blocks_in_flight", len(self._pieces), part=self.part.name)
        measure("mlc_engine_rows_left", left, part=self.part.name)

    def _gone(self) -> EngineDiedError:
        why = f"in {self.part.limits.retries + 1} tries; their faults are logged"
        if self.part.once:
            why = "since nobody knows any more what its endpoint has cost so far"
        return EngineDiedError(
            f"all of the {len(self.replicas)} actors for {self.part.name} are gone, and none starts again {why}"
        )

    def _may_start(self, replica: Replica) -> bool:
        return replica.failures <= self.part.limits.retries and not (self.part.once or replica.lost)


def _wait_for_all(pools: Sequence[EnginePool]) -> None:
    """Wait until all actors are up, or one is not; an engine may take minutes, so those are counted."""
    engines = sum(pool.part.replicas for pool in pools if pool.part.engine is not None)
    with phase("starting engines", engines, "engines") if engines else nullcontext() as progress:
        while waiting := [pool for pool in pools if pool.busy]:
            _wait(waiting)
            for pool in waiting:
                for found in pool._outcomes():
                    if found.fault is not None:
                        raise EngineDiedError(found.fault + found.at)
                    if pool.part.engine is not None and progress is not None:
                        progress.advance()


def _wait(pools: Sequence[EnginePool]) -> None:
    """Wait until one of the pools' actors has done what it does, or it is time to look after them."""
    ray.wait([each for pool in pools for each in pool.busy], num_returns=1, timeout=min(pool.pause for pool in pools))


def work(jobs: Sequence[tuple[EnginePool, Job]]) -> None:
    """Have each pool work on its job, all at once, until all are over.

    What a job takes may add rows to those behind it. An error in the first that is not over ends all. One in a later
    job ends that and those behind it; those before it are finished, so that nothing is lost that another try would have
    to do again, and then it is raised.

    Raises:
        EngineDiedError: a pool has no engine left, or they die of whatever they are given.
        MlcRayError: what a stage raises, as itself.
    """
    going, failure = list(jobs), None
    try:
        for pool, _ in going:
            pool.begin()
        while going:
            for at, (pool, job) in enumerate(going):
                try:
                    pool.advance(job, patient=at > 0)
                except Exception as error:
                    if at == 0:
                        raise
                    failure = failure or error
                    _end_from(going, at, error)
                    break
                if job.is_over:
                    job.ended()
            going = [(pool, job) for pool, job in going if not job.is_over]
            if going:
                _wait([pool for pool, _ in going])
    except BaseException:
        for pool, _ in jobs:
            pool.drop()
        raise
    if failure is not None:
        raise failure


def _end_from(going: list[tuple[EnginePool, Job]], at: int, error: Exception) -> None:
    """Take from the jobs the one at a place, which failed, and those behind it."""
    said = reason(error) if isinstance(error, ray.exceptions.RayError) else error
    still = next((f"; {each.part.name} goes on" for each, one in going[:at] if not one.is_over), "")
    logger.error("%s failed, and goes no further: %s%s", going[at][0].part.name, said, still)
    for behind, _ in going[at:]:
        behind.drop()
    del going[at:]


@contextmanager
def expected_errors() -> Iterator[None]:
    """Raise an expected error of an actor as it was raised there, instead of Ray's, which holds a traceback."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MlcRayError):
            raise error.cause from None
        raise
