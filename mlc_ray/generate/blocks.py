"""The rows of one `EnginePool.map`, in blocks: what is still to do, and what comes of it. Nothing here calls Ray."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mlc_ray.generate.engine import Device
from mlc_ray.generate.replica import EngineDiedError, Part
from mlc_ray.progress import Phase

logger = logging.getLogger(__name__)

# The most and the least rows of a block. One block is what an engine works on at a time: too small, and its batch is
# not full; too large, and progress comes late and the last engine works alone. SmolLM2-135M on two cores, 192 prompts
# of 24 new tokens: blocks of 64 take 4 % more CPU time than all at once, blocks of 32 take 15 %.
_BLOCK_ROWS: Mapping[Device, tuple[int, int]] = {"cpu": (64, 16), "gpu": (512, 128)}
_BLOCKS_PER_REPLICA = 4
# Rows that are given up one after another, for each replica, before it is the engines that are to blame: bad rows stand
# together, as those of one benchmark do.
_GIVEN_UP = 16

Landed = Callable[[int, pa.Table], None]
"""Is told of the columns that are there, and of the row that they begin at."""


def joined(table: pa.Table, columns: pa.Table) -> pa.Table:
    """`table` with further columns beside its own."""
    for name in columns.column_names:
        table = table.append_column(name, columns[name])
    return table


def block_rows(rows: int, replicas: int, device: Device) -> int:
    """Rows of a block: several blocks for each replica where there are enough rows, so that none works alone long."""
    most, least = _BLOCK_ROWS[device]
    if replicas == 1:
        return most
    balanced = min(most, max(least, math.ceil(rows / (_BLOCKS_PER_REPLICA * replicas))))
    return max(1, min(balanced, rows // replicas))


@dataclass(frozen=True)
class Piece:
    """Rows of a table, from `first` to before `stop`, which begin `offset` rows into the block that holds them."""

    block: Any
    offset: int
    first: int
    stop: int
    tries: int = 0

    def again(self, retries: int) -> list[Piece]:
        """What to try after a failure: the piece, its halves, or for a single row nothing more."""
        tries = self.tries + 1
        if tries <= retries:
            return [Piece(self.block, self.offset, self.first, self.stop, tries)]
        if len(self) == 1:
            return []
        middle = (self.first + self.stop) // 2
        # Halves are tried once, since what failed by chance has had its tries; a row that stands alone has all of them.
        halves = ((self.first, middle), (middle, self.stop))
        return [
            Piece(self.block, self.offset + first - self.first, first, stop, retries if stop - first > 1 else 0)
            for first, stop in halves
        ]

    def __len__(self) -> int:
        return self.stop - self.first


@dataclass
class Job:
    """The rows of one `map`: what is still to do, and what is done."""

    table: pa.Table
    part: Part
    queue: deque[Piece]
    progress: Phase | None
    landed: Landed | None
    done: dict[int, pa.Table] = field(default_factory=dict)  # by the first row of a piece
    given_up: int = 0  # rows since a piece was done

    def __post_init__(self) -> None:
        self.left = len(self.table)

    @property
    def columns(self) -> pa.Table:
        """The columns of all rows, in order."""
        return pa.concat_tables([self.part.columns.empty_table(), *(self.done[at] for at in sorted(self.done))])

    def take(self, piece: Piece, columns: pa.Table) -> None:
        """A piece is done."""
        self.given_up = 0
        self._fill(piece, columns)
        if self.landed is not None:
            self.landed(piece.first, columns)

    def failed(self, piece: Piece, fault: str, at: str) -> None:
        """A replica failed on a piece: it is tried again, in halves, or given up.

        Raises:
            EngineDiedError: everything fails.
        """
        if rest := piece.again(self.part.limits.retries):
            self.queue.extendleft(reversed(rest))
            return
        self.given_up += 1
        if self.given_up > _GIVEN_UP * self.part.replicas:
            raise EngineDiedError(
                f"engines failed on {self.given_up} rows in a row, each alone; the last: {fault}{at}; remove the cause"
            )
        logger.warning("row %d is given up: %s", piece.first, fault)
        row = self.table.slice(piece.first, 1)
        rows = self.part.stage.given_up(row, fault, **self.part.settings)
        self._fill(piece, pa.Table.from_pylist(rows, schema=self.part.columns))

    def _fill(self, piece: Piece, columns: pa.Table) -> None:
        self.done[piece.first] = columns
        self.left -= len(piece)
        if self.progress is not None:
            self.progress.advance(len(piece))
