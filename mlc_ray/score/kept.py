"""What a pass of a score has done, kept in the score's folder as it comes: what is there is not asked for again.

A block of rows is a Parquet file, written whole: the pass's columns, and the key of each row. The key names all that
the columns follow from: the row's texts, and the model and settings that the pass works with. So a file that something
else made is left alone, and a pass may be cut into other blocks, for other engines, than before. The files go once the
score is complete: on an object store they are all that is there of it until then.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.runs import KEPT_FOLDER
from mlc_ray.storage import Place, fingerprint

logger = logging.getLogger(__name__)
_KEY = pa.field("key", pa.string())


class Kept:
    """What is there of one pass.

    Args:
        place: the score's folder.
        name: of the pass.
        made_by: all that its columns follow from, beside the texts of a row; canonical JSON must hold it.
        reads: the columns that the pass reads.
        columns: those that it adds.
    """

    def __init__(self, place: Place, name: str, made_by: Any, reads: Sequence[str], columns: pa.Schema) -> None:
        self._place, self.columns = place / KEPT_FOLDER / name, columns
        self._made_by, self._reads = made_by, reads
        self._found = self._read()

    def look(self, table: pa.Table) -> tuple[list[str], list[dict[str, Any] | None]]:
        """The key of each row, and what the pass made of it; None for rows of which that is not there."""
        keys = row_keys(self._made_by, table, self._reads)
        return keys, [self._found.get(key) for key in keys]

    def land(self, keys: Sequence[str], columns: pa.Table) -> None:
        """Keep the columns of the rows with these keys; where that fails, a warning says so, and they are not kept."""
        buffer = io.BytesIO()
        pq.write_table(columns.append_column(_KEY, pa.array(keys, pa.string())), buffer, write_page_checksum=True)
        file = self._place / f"{fingerprint(keys)}.parquet"
        try:
            file.write_parts([buffer.getbuffer()])
        except OSError as error:  # a storage that is full or away for a while; the rows are in memory
            logger.warning("%d rows could not be kept: %s; if this ends early, they are asked again", len(keys), error)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._place.is_dir():
            return {}
        return {row.pop("key"): row for file in self._place.iterdir() for row in self._rows_in(file)}

    def _rows_in(self, file: Place) -> list[dict[str, Any]]:
        with file.open() as opened:
            content = opened.read()
        try:
            table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s is damaged (%s); its rows are asked again", file, str(error).splitlines()[0])
            return []
        return table.to_pylist() if table.schema.remove_metadata().equals(pa.schema([*self.columns, _KEY])) else []


def row_keys(made_by: Any, table: pa.Table, reads: Sequence[str]) -> list[str]:
    """The key of every row, as `Kept` has it."""
    by = fingerprint(made_by)
    rows = table.select([column for column in reads if column in table.column_names]).to_pylist()
    return [fingerprint([by, row]) for row in rows]
