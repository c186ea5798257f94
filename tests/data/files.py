"""What tests read and write of data in one call: a whole source, and token rows that are in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlc_ray.data.sources import Reading, Row, SourceFile
from mlc_ray.data.store import finish_artifact, shard_file, write_shard
from mlc_ray.storage import Place


def read_file(file: SourceFile) -> Iterator[Row]:
    """Every record of a source, as `Reading.rows`.

    Raises:
        BundleFileError: as there; or no bundle is of the kind that the source asks for.
    """
    reading = Reading(file)
    yield from reading.rows()
    reading.seen.check(file)


def write_rows(folder: Path, tables: Iterable[pa.Table], **manifest: Any) -> None:
    """An artefact with a shard of each table."""
    shards = [write_shard(Place(folder), shard_file(n), [table]) for n, table in enumerate(tables)]
    finish_artifact(Place(folder), shards, **manifest)
