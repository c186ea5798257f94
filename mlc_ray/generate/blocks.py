"""The rows that a pool works on, in blocks: what is still to do, and what comes of it. Nothing here calls Ray."""

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
from mlc_ray.monitoring import count
from mlc_ray.progress import Phase

logger = logging.getLogger(__name__)

# The most and the least rows of a block. One block is what an engine works on at a time: too small, and its batch is
# not full; too large, and progress comes late and the last engine works alone. SmolLM2-135M on two cores, 192 prompts
# of 24 new tokens: blocks of 64 take 4 % more CPU time than all at once, blocks of 32 take 15 %.
_BLOCK_ROWS: Mapping[Device, tuple[int, int]] = {"cpu": (64, 16), "gpu": (512, 128)}
_BLOCKS_PER_REPLICA = 4
_PROBES = 3

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


def block_size(part: Part, device: Device, rows: int) -> int:
    """Rows of a block of `part`, of which `rows` come in all."""
    return part.limits.block_rows or block_rows(rows, part.replicas, device)


@dataclass
class Block:
    """Rows that an actor gets at once, and where they lie in Ray's object store as soon as one does."""

    rows: pa.Table
    stored: Any = None


@dataclass(frozen=True)
class Piece:
    """Rows of a job, from `first` to before `stop`, which begin `offset` rows into the block that holds them.

    A `probe` is asked to learn whether engines work at all; `repeated` is one whose row is done already.
    """

    block: Block
    offset: int
    first: int
    stop: int
    tries: int = 0
    probe: bool = False
    repeated: bool = False

    @property
    def rows(self) -> pa.Table:
        """What is asked."""
        return self.block.rows.slice(self.offset, len(self))

    def part(self, first: int, stop: int, *, tries: int = 0, probe: bool = False) -> Piece:
        """Rows of the piece, counted as `first` and `stop` are."""
        return Piece(self.block, self.offset + first - self.first, first, stop, tries, probe)

    def again(self, retries: int) -> list[Piece]:
        """What to try after a failure: the piece, its halves, or for a single row nothing more."""
        tries = self.tries + 1
        if tries <= retries:
            return [self.part(self.first, self.stop, tries=tries)]
        if len(self) == 1:
            return []
        middle = (self.first + self.stop) // 2
        # Halves are tried once, since what failed by chance has had its tries; a row that stands alone has all of them.
        halves = ((self.first, middle), (middle, self.stop))
        return [self.part(first, stop, tries=retries if stop - first > 1 else 0) for first, stop in halves]

    def __len__(self) -> int:
        return self.stop - self.first


@dataclass
class Job:
    """Rows that a pool works on: what is still to do, and what is done. More may be added meanwhile, until `close`.

    Args:
        part: of the pool.
        size: rows of a block.
        took: is told of each piece that is done, with its columns and whether its one row is marked as failed; in any
            order.
        ended: is told once nothing is left.
        progress: is told of the rows that are done.
    """

    part: Part
    size: int
    took: Callable[[Piece, pa.Table, bool], None]
    ended: Callable[[], None] = lambda: None
    progress: Phase | None = None
    queue: deque[Piece] = field(default_factory=deque)
    added: int = 0  # rows
    left: int = 0  # rows, and a probe of one that is done
    closed: bool = False
    fruitless: int = 0  # failures of engines since a piece was done
    _proven: Piece | None = None  # a row that was done once
    _probes: int = 0  # of those failures, the ones on probes
    _probing: bool = False
    _held: deque[Piece] = field(default_factory=deque)  # wait for more rows, since none was ever done

    @property
    def is_over(self) -> bool:
        """Whether nothing is left, and nothing comes."""
        return self.closed and not self.left

    @property
    def bound(self) -> int:
        """How many failures in a row, with nothing done in between, make a probe of the next try."""
        return (self.part.limits.retries + 1) * (self.part.replicas + 1)

    def add(self, rows: pa.Table) -> None:
        """More rows; they are numbered on from those before, and no block holds rows of two calls."""
        for start in range(0, len(rows), self.size):
            # `take` copies: a slice would be stored with all of the table behind it.
            some = rows.take(pa.array(range(start, min(start + self.size, len(rows))), pa.int64()))
            self.queue.append(Piece(Block(some), 0, self.added, self.added + len(some)))
            self.added += len(some)
            self.left += len(some)
        if self._held:
            self._release(probe=True)

    def close(self) -> None:
        """No more rows are added."""
        self.closed = True
        if self._held:
            self._release(probe=True)

    def known(self, row: pa.Table) -> None:
        """A row on which engines did not fail earlier: it tells engines that fail from rows on which they do."""
        self._proven = Piece(Block(row), 0, 0, 1, probe=True, repeated=True)
        if self._held:
            self._release(probe=True)

    def take(self, piece: Piece, columns: pa.Table) -> None:
        """A piece is done."""
        self.fruitless = self._probes = 0
        self._probing = self._probing and not piece.probe
        if piece.repeated:
            self.left -= 1
            return
        self._proven = Piece(piece.block, piece.offset, piece.first, piece.first + 1, probe=True, repeated=True)
        if self._held:
            self._release()
        self._fill(piece, columns, marked=False)

    def failed(self, piece: Piece, fault: str, at: str) -> None:
        """A replica failed on a piece: it is tried again, in halves, or given up.

        After `bound` failures in a row a single row is asked to learn what is to blame, the rows or the engines: one
        that was done before, else some from all over the queue; three times. While no row was ever done and more
        come, the first rows may all be bad: one is asked of the newest, and the rest waits for more, or for `close`.

        Raises:
            EngineDiedError: engines fail on those too.
        """
        self.fruitless += 1
        self.left -= piece.repeated
        early = not self.closed and self._proven is None
        if piece.probe:
            self._probes += not early
            self._probing = False
            if self._probes == _PROBES:
                raise EngineDiedError(
                    f"engines failed {self.fruitless} times in a row, with nothing done in between; the last: "
                    f"{fault}{at}; remove the cause"
                )
        if not piece.repeated:
            self._again(piece, fault)
        if early and (piece.probe or self._held):
            self._held.extend(self.queue)
            self.queue.clear()
        elif self.fruitless >= self.bound and not self._probing:
            self._probe()

    def _release(self, *, probe: bool = False) -> None:
        """What waited is asked; with `probe` a row first, the newest."""
        self.queue.extendleft(reversed(self._held))
        self._held.clear()
        if probe:
            self._probe()

    def _again(self, piece: Piece, fault: str) -> None:
        if rest := piece.again(self.part.limits.retries):
            self.queue.extendleft(reversed(rest))
            return
        logger.warning("row %d is given up: %s", piece.first, fault)
        count("mlc_engine_rows_given_up", part=self.part.name)
        rows = self.part.stage.given_up(piece.rows, fault, **self.part.settings)
        self._fill(piece, pa.Table.from_pylist(rows, schema=self.part.columns), marked=True)

    def _probe(self) -> None:
        """Have a row asked next that says whether engines work at all."""
        if self._proven is not None:
            probe = self._proven
            self.left += 1  # nobody is to be busy with it once the job is over
        elif self.queue:
            at = len(self.queue) - 1 - self._probes * len(self.queue) // _PROBES
            piece = self.queue[at]
            del self.queue[at]
            if len(piece) > 1:
                self.queue.insert(at, piece.part(piece.first, piece.stop - 1, tries=piece.tries))
            probe = piece.part(piece.stop - 1, piece.stop, probe=True)
        else:
            return
        self._probing = True
        self.queue.appendleft(probe)

    def _fill(self, piece: Piece, columns: pa.Table, *, marked: bool) -> None:
        self.left -= len(piece)
        if self.progress is not None:
            self.progress.advance(len(piece))
        self.took(piece, columns, marked)
