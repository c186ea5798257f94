"""A pool without Ray: its stage runs in this process, fed by the real queue of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from mlc_ray.generate.blocks import Job
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part


class LocalPool(EnginePool):
    """A pool without actors; `asked` are the prompts of the rows that came to be worked on.

    Args:
        part: as of a pool.
        work: gives the part's columns (default: its stage).
        fails: whether a row fails whenever it is tried.
    """

    def __init__(
        self,
        part: Part,
        *,
        work: Callable[[pa.Table], pa.Table] | None = None,
        fails: Callable[[dict[str, Any]], bool] = lambda row: False,
    ) -> None:
        super().__init__(part, "cpu", None, [])
        self.fails = fails
        self.work = part.stage(**part.settings) if work is None else work
        self.asked: list[str] = []

    def advance(self, job: Job, *, patient: bool = False) -> None:
        while job.queue:
            piece = job.queue.popleft()
            self.asked += piece.rows["prompt"].to_pylist()
            if any(map(self.fails, piece.rows.to_pylist())):
                job.failed(piece, "it died", "")
            else:
                job.take(piece, self.work(piece.rows))

    def swap(self, weights: str | None, *, lora: bool = False) -> dict[str, float]:
        self.weights = weights
        return {"transfer": 0.0, "proof": 0.0}
