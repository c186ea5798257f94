"""What a pass of a score has done, kept in the score's folder as it comes: what is there is not asked for again.

A block of rows is a Parquet file, written whole: the pass's columns, and the key of each row. The key names all that
the columns follow from: the row's texts, and the model and settings that the pass works with. So a file that something
else made is left alone, and a pass may be cut into other blocks, for other engines, than before. The files go once the
score is complete: on an object store they are all that is there of it until then.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.runs import KEPT_FOLDER
from mlc_ray.storage import Place, fingerprint

_KEY = pa.field("key", pa.string())


class Kept:
    """What is there of one pass over `table`.

    Args:
        place: the score's folder.
        name: of the pass.
        made_by: all that its columns follow from, beside the texts of a row; canonical JSON must hold it.
        table: the rows to work on.
        reads: the columns of `table` that the pass reads.
        columns: those that it adds.
    """

    def __init__(
        self, place: Place, name: str, made_by: Any, table: pa.Table, reads: Sequence[str], columns: pa.Schema
    ) -> None:
        self._place, self._columns = place / KEPT_FOLDER / name, columns
        self._keys = row_keys(made_by, table, reads)
        self._found = self._read()
        self._table = table
        self._missing = [index for index, key in enumerate(self._keys) if key not in self._found]

    @property
    def done(self) -> int:
        """How many rows are there."""
        return len(self._keys) - len(self._missing)

    @property
    def missing(self) -> pa.Table:
        """The rows that are not."""
        return self._table if not self.done else self._table.take(pa.array(self._missing, pa.int64()))

    def land(self, first: int, columns: pa.Table) -> None:
        """Keep the columns of rows of `missing`, from the row `first` on."""
        keys = [self._keys[index] for index in self._missing[first : first + len(columns)]]
        buffer = io.BytesIO()
        pq.write_table(columns.append_column(_KEY, pa.array(keys, pa.string())), buffer)
        (self._place / f"{fingerprint(keys)}.parquet").write_parts([buffer.getbuffer()])

    def whole(self, columns: pa.Table) -> pa.Table:
        """The columns of all rows: what was there, and those of `missing`."""
        if not self.done:
            return columns
        rows = [self._found.get(key, {}) for key in self._keys]
        for index, row in zip(self._missing, columns.to_pylist(), strict=True):
            rows[index] = row
        return pa.Table.from_pylist(rows, schema=self._columns)

    def _read(self) -> dict[str, dict[str, Any]]:
        wanted, found = set(self._keys), {}
        for file in self._place.iterdir() if self._place.is_dir() else []:
            with file.open() as opened:
                table = pq.read_table(opened)
            if table.schema.remove_metadata().equals(pa.schema([*self._columns, _KEY])):
                for row in table.to_pylist():
                    if (key := row.pop("key")) in wanted:
                        found[key] = row
        return found


def row_keys(made_by: Any, table: pa.Table, reads: Sequence[str]) -> list[str]:
    """The key of every row, as `Kept` has it."""
    by = fingerprint(made_by)
    rows = table.select([column for column in reads if column in table.column_names]).to_pylist()
    return [fingerprint([by, row]) for row in rows]
