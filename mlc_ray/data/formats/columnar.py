"""Parquet and Hugging Face datasets as records.

Nothing here runs code or unpickles: Parquet and Arrow are data formats, and `datasets` (5 and later) runs no scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.data.bundles import BundleFileError
from mlc_ray.data.formats.records import Part, Record
from mlc_ray.data.hub import HubName
from mlc_ray.storage import Place

_ROWS_AT_ONCE = 1024
_SHOWN = 5000


def parts_of_parquet(path: str, part_bytes: int) -> list[Part]:
    """A file cut between row groups into parts of about `part_bytes`; nothing where there is one, or it is damaged."""
    try:
        metadata = pq.read_metadata(_source(path))
    except (pa.ArrowException, OSError):  # for the reading itself to report
        return []
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    parts, start, line, size = list[Part](), 0, 1, 0
    for stop, group in enumerate(groups, start=1):
        size += group.total_byte_size
        if size >= part_bytes or stop == len(groups):
            parts.append(Part(start, stop, line))
            line += sum(each.num_rows for each in groups[start:stop])
            start, size = stop, 0
    return parts if len(parts) > 1 else []


def _source(path: str) -> Any:
    """What pyarrow reads row groups from by ranges of bytes."""
    place = Place(path)
    return path if place.is_local else place.open()


def open_parquet(path: str, part: Part | None = None) -> tuple[list[str], Iterator[Record]]:
    """Columns and records of a file, or of a part of it.

    Raises:
        BundleFileError: at once or while iterating, it is not readable.
    """
    try:
        file = pq.ParquetFile(_source(path))
    except (pa.ArrowException, OSError) as error:
        raise BundleFileError(f"{path}: not readable as Parquet: {error}") from None

    def records() -> Iterator[Record]:
        try:
            groups = None if part is None else list(range(part.start, part.stop))
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=groups):
                yield from _table_records(batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise BundleFileError(f"{path}: damaged: {error}") from None

    return list(file.schema_arrow.names), _numbered(records(), 1 if part is None else part.line)


def is_saved_dataset(folder: Place) -> bool:
    """Whether `folder` was written by `datasets`' save_to_disk."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_dataset(path: str) -> Any:
    """The `datasets.Dataset` of a saved folder or of a hub name (`mlc_ray.data.hub`).

    A process loads it once, however many parts of it it reads, and a folder again when a file in it changed.

    Raises:
        BundleFileError: it cannot be loaded, or has several splits and none is named.
    """
    files = [(str(file), file.stat()) for file in sorted(Path(path).rglob("*"))] if Path(path).is_dir() else []
    return _load_dataset(path, tuple((name, state.st_size, state.st_mtime_ns) for name, state in files))


@lru_cache(maxsize=16)
def _load_dataset(path: str, files: tuple[tuple[str, int, int], ...]) -> Any:
    """`files` are a saved folder's, with sizes and times of change."""
    import datasets  # two seconds, and only this format needs it
    from datasets.exceptions import DatasetsError

    hub_name = None if Path(path).is_dir() else HubName.parse(path)
    try:
        if hub_name is None:
            loaded = datasets.load_from_disk(path)
        else:
            loaded = hub_name.load()
    except BundleFileError:
        raise
    except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        raise BundleFileError(f"{path!r} cannot be loaded as a Hugging Face dataset: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            first = next(iter(loaded), "train")
            example = f"{path}/{first}" if hub_name is None else str(replace(hub_name, split=first))
            raise BundleFileError(f"{path!r} has the splits {sorted(loaded)!r}; name one, such as {example!r}")
        loaded = next(iter(loaded.values()))
    return loaded


def parts_of_dataset(path: str, part_bytes: int) -> list[Part]:
    """A dataset cut into ranges of rows of about `part_bytes` each; nothing where there is one.

    Raises:
        BundleFileError: as `load_dataset`.
    """
    dataset = load_dataset(path)
    rows = max(1, len(dataset) * part_bytes // max(1, dataset.data.nbytes))
    starts = range(0, len(dataset), rows)
    return [Part(start, min(start + rows, len(dataset)), start + 1) for start in starts] if len(starts) > 1 else []


def open_dataset(path: str, part: Part | None = None) -> tuple[list[str], Iterator[Record]]:
    """Columns and records of a saved folder or hub dataset, or of a part of it.

    Raises:
        BundleFileError: as `load_dataset`.
    """
    dataset = load_dataset(path)
    first, last = (0, len(dataset)) if part is None else (part.start, part.stop)

    def records() -> Iterator[Record]:
        for start in range(first, last, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, last)
            yield from _table_records(dataset.with_format("arrow")[start:stop].to_pylist())

    return list(dataset.column_names), _numbered(records(), first + 1)


def _table_records(rows: list[dict[str, Any]]) -> Iterator[Record]:
    for row in rows:
        fields = without_nulls(row)
        yield Record(0, json.dumps(fields, ensure_ascii=False, default=repr)[:_SHOWN], fields)


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table without its null cells, and without the nulls in a cell that is a struct."""
    return {key: _without_nulls(value) for key, value in row.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    """A struct column has every language of the file, null where this row lacks it; a map column comes as pairs."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        value = dict(value)
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _numbered(records: Iterator[Record], first: int) -> Iterator[Record]:
    for line, record in enumerate(records, start=first):
        yield Record(line, record.text, record.fields, record.reason)
