"""Passes of a score that follow one another row by row: what one has done, the next one works on meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mlc_ray.generate.blocks import Job, Piece, block_size, joined
from mlc_ray.generate.engine import Device
from mlc_ray.generate.replica import Part
from mlc_ray.progress import phase
from mlc_ray.score.kept import Kept

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Pass:
    """One pass over the rows of a score: rows come in any order, and go on with the columns of `part`.

    Args:
        part: what works on them.
        rows: how many come in all.
        kept: what is there of them already, and where blocks that are done are kept.
        keeps: whether they are.
        unit: what a row is called in the progress; None shows none.
        ended: is told, once all rows are done, of all of them in their order.
    """

    part: Part
    device: Device
    rows: int
    _: KW_ONLY
    kept: Kept | None = None
    keeps: bool = False
    unit: str | None = None
    ended: Callable[[pa.Table], None] = lambda table: None
    next: Pass | None = field(default=None, init=False)
    done: int = field(default=0, init=False)  # rows that were there
    lasting: ExitStack = field(default_factory=ExitStack, init=False)
    """What lasts until all rows are done: the pool, where it is for this pass alone."""
    _places: list[int] = field(default_factory=list, init=False)  # of the rows of the job, in the whole table
    _keys: list[str] = field(default_factory=list, init=False)  # of those
    _made: list[tuple[Sequence[int], pa.Table]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        size = block_size(self.part, self.device, self.rows)
        self.job = Job(self.part, size, self._took, ended=self._ended)

    def show(self) -> None:
        """Show the progress from now on."""
        if self.done and self.kept is not None:
            logger.info("%s: %d of %d %s are done already", self.part.name, self.done, self.rows, self.unit)
        if self.unit is not None:
            shown = phase(self.part.name, self.rows, self.unit, done=self.done)
            self.job.progress = self.lasting.enter_context(shown)

    def add(self, places: Sequence[int], table: pa.Table) -> None:
        """Rows come, from these places of the whole table."""
        if not len(table):
            self._go_on(places, joined(table, self.part.columns.empty_table()))
            return
        keys, found = self.kept.look(table) if self.kept is not None else ([], [])
        if any(row is not None for row in found):
            self._add_known(places, keys, table, found)
        else:
            self._ask(places, keys, table)

    def _add_known(
        self, places: Sequence[int], keys: Sequence[str], table: pa.Table, found: Sequence[dict[str, Any] | None]
    ) -> None:
        """Rows come of which some are done already, as `found` says."""
        there = [at for at, row in enumerate(found) if row is not None]
        rows = table.take(pa.array(there, pa.int64()))
        self.job.known(rows.take(pa.array([0], pa.int64())))  # not a slice, which would hold all of them
        self.done += len(there)
        if self.job.progress is not None:
            self.job.progress.advance(len(there))
        columns = pa.Table.from_pylist([found[at] for at in there], schema=self.part.columns)
        self._go_on([places[at] for at in there], joined(rows, columns))
        missing = [at for at, row in enumerate(found) if row is None]
        if missing:
            rows = table.take(pa.array(missing, pa.int64()))
            self._ask([places[at] for at in missing], [keys[at] for at in missing], rows)

    @property
    def table(self) -> pa.Table:
        """All rows with their columns, in order."""
        order = np.argsort([place for some, _ in self._made for place in some])
        return pa.concat_tables([table for _, table in self._made]).take(pa.array(order, pa.int64()))

    def _ask(self, places: Sequence[int], keys: Sequence[str], table: pa.Table) -> None:
        self._places.extend(places)
        self._keys.extend(keys)
        self.job.add(table)

    def _took(self, piece: Piece, columns: pa.Table, marked: bool) -> None:
        if self.keeps and self.kept is not None and not marked:
            self.kept.land(self._keys[piece.first : piece.stop], columns)
        self._go_on(self._places[piece.first : piece.stop], joined(piece.rows, columns))

    def _go_on(self, places: Sequence[int], table: pa.Table) -> None:
        self._made.append((places, table))
        if self.next is not None:
            self.next.add(places, table)

    def _ended(self) -> None:
        table = self.table
        self.ended(table)
        self.lasting.close()
        self._made.clear()
        if self.next is None:
            self._made.append((range(len(table)), table))
        else:
            self.next.job.close()


def chain(passes: Sequence[Pass], table: pa.Table) -> None:
    """Have each pass take what the one before it has done, and the first one `table`."""
    for one, other in pairwise(passes):
        one.next = other
    passes[0].add(range(len(table)), table)
    passes[0].job.close()
