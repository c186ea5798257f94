"""A pool without Ray: its stage runs in this process, fed by the real queue of blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from mlc_ray.generate.blocks import Job, Landed, Piece
from mlc_ray.generate.replica import Part
from mlc_ray.progress import Phase

_BLOCK_ROWS = 4


class LocalPool:
    """What a score uses of an `EnginePool`; `asked` are the prompts of the rows that came to be worked on.

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
        self.part, self.fails = part, fails
        self.work = part.stage(**part.settings) if work is None else work
        self.weights: str | None = None
        self.asked: list[str] = []

    def map(self, table: pa.Table, *, progress: Phase | None = None, landed: Landed | None = None) -> pa.Table:
        starts = range(0, len(table), _BLOCK_ROWS)
        pieces = deque(Piece(None, 0, first, min(first + _BLOCK_ROWS, len(table))) for first in starts)
        job = Job(table, self.part, pieces, progress, landed)
        while job.left:
            piece = job.queue.popleft()
            rows = table.slice(piece.first, len(piece))
            self.asked += rows["prompt"].to_pylist()
            if any(map(self.fails, rows.to_pylist())):
                job.failed(piece, "it died", "")
            else:
                job.take(piece, self.work(rows))
        return job.columns

    def swap(self, weights: str) -> None:
        self.weights = weights

    @contextmanager
    def awake(self) -> Iterator[None]:
        yield

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass
