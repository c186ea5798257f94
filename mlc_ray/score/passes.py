"""The passes of a score over its prompts: answering, translating, judging.

Those that have devices of their own work at once (`plan.side_by_side`), and what one has done of a block goes on to the
next one (`score.chain`); the others follow each other. Each keeps what its engines have done block by block
(`score.kept`), and adds its columns to one file, `responses.parquet`, as it ends. So no prompt is answered twice: a
score that an error, a dead driver or Ctrl-C interrupted goes on behind the last block that was done. An error of a
judge does not end the answering before it: another one can judge the responses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device
from mlc_ray.generate.pool import EnginePool, work
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.judges.panel import Reader
from mlc_ray.runs import REPLIES_FILE
from mlc_ray.score.chain import Pass, chain
from mlc_ray.score.kept import Kept
from mlc_ray.score.plan import USAGE_SUFFIX, Judging, answering, reading, side_by_side
from mlc_ray.score.request import Request
from mlc_ray.score.results import write_responses
from mlc_ray.score.stages import RESPONSES, TRANSLATED
from mlc_ray.score.thoughts import warn_of_thoughts
from mlc_ray.storage import Place, engine_versions, installed_engines
from mlc_ray.types import ENGINE_FAULT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Planned:
    """A pass to come: its name, what it is made by and reads (`score.kept`), and its engines where they are open."""

    name: str
    part: Part
    made_by: Any
    reads: Sequence[str]
    unit: str
    pool: EnginePool | None = None


@dataclass(frozen=True)
class Passes:
    """What works on one score. `folder`, on this machine, is what `place` is to become: it may be that itself."""

    request: Request
    folder: Path
    place: Place
    device: Device

    def answer_and_judge(
        self, judging: Judging, prompts: pa.Table, pool: EnginePool | None, earlier: pa.Table | None = None
    ) -> pa.Table:
        """`prompts` with the policy's answers and their verdicts, also in the folder's file.

        By the engines of `pool` if there is one. Answers in `earlier` stay, but where engines failed.
        """
        own = answering(self.request.resolved, self.request.config, judging, self.device, in_turn=False)
        part = own if pool is None else pool.part
        first = _Planned("answering", part, made_by(self.request, judging), PROMPTS.names, "prompts", pool)
        if earlier is not None:
            self._keep(first, earlier)
        return self._work([first, *self._reading(judging, len(prompts))], prompts)

    def _keep(self, planned: _Planned, earlier: pa.Table) -> None:
        keep(Kept(self.place, planned.name, planned.made_by, planned.reads, planned.part.columns), earlier)

    def judge(self, judging: Judging, table: pa.Table) -> pa.Table:
        """Responses with their verdicts, also in the folder's file."""
        return self._work(self._reading(judging, len(table)), table)

    def _reading(self, judging: Judging, rows: int) -> list[_Planned]:
        for file in self.folder.glob(f"*{USAGE_SUFFIX}"):
            file.unlink()  # of an earlier judge
        parts = reading(judging, self.device, rows=rows, usage=self.folder, replies=self.place / REPLIES_FILE)
        by = judged_by(judging)
        return [_Planned(name, part, by, read_by(part), "responses") for name, part in parts.items()]

    def _work(self, planned: Sequence[_Planned], table: pa.Table) -> pa.Table:
        """`table` with the columns of all passes; the file has those of each pass once it has ended."""
        is_open = planned[0].pool is not None
        for group in side_by_side([each.part for each in planned], self.device, is_open=is_open):
            table = self._work_at_once(planned[: len(group)], table)
            planned = planned[len(group) :]
        return table

    def _work_at_once(self, planned: Sequence[_Planned], table: pa.Table) -> pa.Table:
        passes = [self._pass(each, len(table)) for each in planned]
        chain(passes, table)
        left = [(each, one) for each, one in zip(planned, passes, strict=True) if one.done < len(table)]
        for one in passes[: len(passes) - len(left)]:  # nothing is left of the first ones alone
            one.job.ended()
        try:
            with ExitStack() as stack:
                jobs = []
                for at, (each, one) in enumerate(left):  # the first ones have their place first
                    stack.enter_context(one.lasting)
                    jobs.append((one.lasting.enter_context(self._engines(each, wait=at == 0)), one.job))
                for _, one in left:
                    one.show()
                work(jobs)
        except MlcRayError:
            if planned[0].unit == "responses" or passes[0].job.is_over:
                logger.error("the responses are kept; go on with `mlc-ray judge %s`", self.place)
            raise
        return passes[-1].table

    def _pass(self, planned: _Planned, rows: int) -> Pass:
        part = planned.part
        return Pass(
            part,
            self.device,
            rows,
            kept=Kept(self.place, planned.name, planned.made_by, planned.reads, part.columns),
            # What has no engine takes seconds, or has a cache of its own (an endpoint's replies).
            keeps=part.engine is not None,
            unit=planned.unit,
            ended=self._answered if planned.unit == "prompts" else lambda table: write_responses(table, self.folder),
        )

    def _engines(self, planned: _Planned, *, wait: bool) -> AbstractContextManager[EnginePool]:
        """The engines of an open pool, with the model's weights, or new ones, which end with the block."""
        if planned.pool is not None:
            return self._awake(planned.pool)
        return EnginePool.open(planned.part, self.device, wait=wait)

    @contextmanager
    def _awake(self, pool: EnginePool) -> Iterator[EnginePool]:
        with pool.awake():
            if pool.weights != self.request.resolved:
                pool.swap(self.request.resolved)
            yield pool

    def _answered(self, table: pa.Table) -> None:
        write_responses(table, self.folder)
        warn_of_thoughts(table, self.request.config)
        warn_of_faults(table)


def made_by(request: Request, judging: Judging) -> list[Any]:
    """What the model's answers follow from, beside a prompt: a part of the keys of rows that are kept."""
    by: list[Any] = [request.decoding, engine_versions(request.versions)]
    if judging.judge.runs == "prompts":
        by.append([judging.judge.identity, dict(judging.ways)])
    return by


def judged_by(judging: Judging) -> list[Any]:
    """What verdicts follow from, beside a response: a part of the keys of rows that are kept."""
    return [judging.identity, *map(_asked, judging.readers), installed_engines()]


def read_by(part: Part) -> list[str]:
    """The columns that a pass of translating or judging reads."""
    return [*RESPONSES.names, *TRANSLATED.names, *part.settings.get("earlier", ())]


def _asked(reader: Reader) -> list[Any]:
    """What a judge is asked, as JSON."""
    cells = sorted(reader.cells.items())
    return [reader.name, [[*cell, {str(measure): via for measure, via in ways.items()}] for cell, ways in cells]]


def keep(kept: Kept, earlier: pa.Table) -> None:
    """Keep answers of an earlier call, but those that engines failed to give."""
    answers = earlier.filter(pc.not_equal(earlier["finish"], ENGINE_FAULT))
    kept.land(kept.look(answers)[0], answers.select(kept.columns.names))


def warn_of_faults(table: pa.Table) -> None:
    """Warn of prompts that engines failed to answer."""
    if faults := table["finish"].to_pylist().count(ENGINE_FAULT):
        what = "%d of %d prompts have no answer: engines fail on each of them alone; the column `fault` says how"
        logger.warning(what, faults, len(table))
