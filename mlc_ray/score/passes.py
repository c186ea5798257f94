"""The passes of a score over its prompts: answering, translating, judging.

Each keeps what its engines have done block by block (`score.kept`), and adds its columns to one file,
`responses.parquet`, as it ends. So no prompt is answered twice: a score that an error, a dead driver or Ctrl-C
interrupted goes on behind the last block that was done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.errors import MlcRayError
from mlc_ray.generate.blocks import joined
from mlc_ray.generate.engine import Device
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.judges.panel import Reader
from mlc_ray.progress import phase
from mlc_ray.runs import REPLIES_FILE, RESPONSES_FILE
from mlc_ray.score.kept import Kept
from mlc_ray.score.plan import USAGE_SUFFIX, Judging, answering, reading
from mlc_ray.score.request import Request
from mlc_ray.score.stages import RESPONSES, TRANSLATED
from mlc_ray.score.thoughts import warn_of_thoughts
from mlc_ray.storage import Place, library_versions
from mlc_ray.types import ENGINE_FAULT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passes:
    """What works on one score. `folder`, on this machine, is what `place` is to become: it may be that itself."""

    request: Request
    folder: Path
    place: Place
    device: Device

    def answer(self, judging: Judging, prompts: pa.Table, pool: EnginePool | None) -> pa.Table:
        """`prompts` with the policy's answers, also in the folder's file; by the engines of `pool` if there is one."""
        own = answering(self.request.resolved, self.request.config, judging, self.device, in_turn=False)
        part = own if pool is None else pool.part
        by = made_by(self.request)
        if judging.judge.runs == "prompts":
            by.append([judging.judge.identity, dict(judging.ways)])
        kept = self._kept("answering", part, by, prompts, PROMPTS.names)
        table = joined(prompts, kept.whole(self._work(part, kept, "prompts", pool)))
        self.write(table)
        warn_of_thoughts(table, self.request.config)
        _warn_of_faults(table)
        return table

    def judge(self, judging: Judging, table: pa.Table) -> pa.Table:
        """Responses with their verdicts, also in the folder's file."""
        for file in self.folder.glob(f"*{USAGE_SUFFIX}"):
            file.unlink()  # of an earlier judge
        parts = reading(judging, self.device, rows=len(table), usage=self.folder, replies=self.place / REPLIES_FILE)
        by = [judging.identity, *map(_asked, judging.readers), _versions()]
        try:
            for name, part in parts.items():
                reads = [*RESPONSES.names, *TRANSLATED.names, *part.settings.get("earlier", ())]
                kept = self._kept(name, part, by, table, reads)
                table = joined(table, kept.whole(self._work(part, kept, "responses", None)))
                self.write(table)
        except MlcRayError:
            logger.error("the responses are kept; go on with `mlc-ray judge %s`", self.place)
            raise
        return table

    def write(self, table: pa.Table) -> None:
        """Have the folder's file hold `table`."""
        partial = self.folder / f".{RESPONSES_FILE}.part"
        pq.write_table(table, partial)
        partial.replace(self.folder / RESPONSES_FILE)

    def _kept(self, name: str, part: Part, made_by: Any, table: pa.Table, reads: Sequence[str]) -> Kept:
        return Kept(self.place, name, made_by, table, reads, part.columns)

    def _work(self, part: Part, kept: Kept, unit: str, pool: EnginePool | None) -> pa.Table:
        """The columns of what is missing."""
        rows = kept.missing
        if kept.done:
            logger.info("%s: %d of %d %s are done already", part.name, kept.done, kept.done + len(rows), unit)
        if not len(rows):
            return part.columns.empty_table()
        # What has no engine takes seconds, or has a cache of its own (an endpoint's replies).
        landed = kept.land if part.engine is not None else None
        with (
            _engines(part, self.device, pool, self.request.resolved) as engines,
            phase(part.name, len(rows), unit) as progress,
        ):
            return engines.map(rows, progress=progress, landed=landed)


def made_by(request: Request) -> list[Any]:
    """What the model's answers follow from, beside a prompt: a part of the keys of rows that are kept."""
    return [request.decoding, _versions()]


@contextmanager
def _engines(part: Part, device: Device, pool: EnginePool | None, weights: str) -> Iterator[EnginePool]:
    """Engines for `part`: those of `pool`, which serve `weights` then, or new ones, which end with the block."""
    if pool is None:
        with EnginePool.open(part, device) as own:
            yield own
        return
    with pool.awake():
        if pool.weights != weights:
            pool.swap(weights)
        yield pool


def _asked(reader: Reader) -> list[Any]:
    """What a judge is asked, as JSON."""
    cells = sorted(reader.cells.items())
    return [reader.name, [[*cell, {str(measure): via for measure, via in ways.items()}] for cell, ways in cells]]


def _versions() -> Mapping[str, str]:
    """The engine's: another one answers otherwise."""
    return {name: version for name, version in library_versions().items() if name.startswith("vllm")}


def _warn_of_faults(table: pa.Table) -> None:
    if faults := table["finish"].to_pylist().count(ENGINE_FAULT):
        logger.warning(
            "%d of %d prompts have no answer: engines fail on each of them alone; the column `fault` says how", faults,
            len(table),
        )  # fmt: skip
