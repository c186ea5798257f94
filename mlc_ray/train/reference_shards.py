"""What the frozen reference says, on disk: an artefact of shards of rows, written in any order and read by row.

reference-KEY/shard-00003-CHECKSUM.npy   rows of the token artefact, a record each; its columns are what is needed
reference-KEY/manifest.json              written last, with the checksums

A shard's name has the checksum of its content. So a pass that goes on knows which shards are whole, and of two that
write the same artefact, whose numbers may differ by rounding, none changes a file that the other's manifest names.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlc_ray.data.artifacts import local_artifact
from mlc_ray.storage import Place, checksum, fault_of, library_versions, read_manifest, write_manifest
from mlc_ray.types import ReferenceRows

FORMAT = 2
SHARD_BUNDLES = 512
"""Bundles of a shard, which is what a pass loses when it dies: 3 minutes of a CPU that reads 3 bundles a second."""
MOST_SHARDS = 4096
"""Shards are larger where there would be more: each is a file, and a line of the manifest."""
OPEN_SHARDS = 128
"""Shards that are mapped at a time: each holds a file descriptor, of which a process may have 1,024 in all."""

_NAME = re.compile(r"shard-(\d{5})-([0-9a-f]{32})\.npy")


def shard_bundles(bundles: int) -> int:
    """Rows of a shard, the last of which may have fewer, where there are `bundles` rows in all."""
    return max(SHARD_BUNDLES, -(-bundles // MOST_SHARDS))


def shard_ranges(bundles: int) -> list[range]:
    """The rows of each shard; they depend on nothing but the number of rows."""
    each = shard_bundles(bundles)
    return [range(start, min(start + each, bundles)) for start in range(0, bundles, each)]


def records(said: ReferenceRows) -> np.ndarray:
    """The columns that are there as one array [N] of records, as a shard has them."""
    columns: dict[str, np.ndarray] = {name: column for name, column in vars(said).items() if column is not None}
    rows = len(next(iter(columns.values())))
    dtype: Any = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    made = np.empty(rows, dtype=dtype)
    for name, column in columns.items():
        made[name] = column
    return made


def write_shard(folder: Place, number: int, rows: np.ndarray) -> tuple[str, int]:
    """Write `records` as a shard, which appears whole; returns its name and its size in bytes."""
    file = io.BytesIO()
    np.save(file, rows)
    content = file.getvalue()
    name = f"shard-{number:05d}-{checksum(content)}.npy"
    (folder / name).write_bytes(content)
    return name, len(content)


def shard_files(folder: Place) -> list[str]:
    """The names of all shards in a folder, whole or damaged."""
    return [file.name for file in folder.iterdir() if _NAME.fullmatch(file.name)]


def shard_number(name: str) -> int:
    """The number in a shard's name."""
    return int(_parts(name)[0])


def is_whole(shard: Place) -> bool:
    """Whether a shard is byte for byte what was written; reads all of it."""
    return checksum(shard) == _parts(shard.name)[1]


def finish_reference(folder: Place, shards: Mapping[str, int], **fields: Any) -> None:
    """Write the manifest of a folder that has all its shards (name and bytes of each), with the given fields.

    A complete artefact that another run made meanwhile stays as it is.
    """
    if fault_of(folder) is None:
        return
    checksums = {name: _parts(name)[1] for name in shards}
    write_manifest(folder, files=shards, checksums=checksums, versions=library_versions(), **fields)


class StoredReference:
    """What the reference says of all rows of a token artefact; get one from `load_reference`.

    Shards are mapped when they are read, the last `OPEN_SHARDS` of them at a time; all processes of a node share them
    through the page cache.
    """

    def __init__(self, shards: Sequence[Path], each: int) -> None:
        self._shards, self._each = shards, each
        self._mapped = functools.lru_cache(OPEN_SHARDS)(functools.partial(np.load, mmap_mode="r"))

    def take(self, rows: Sequence[int]) -> ReferenceRows:
        """What it says of some rows, in memory."""
        found = np.empty(len(rows), dtype=self._mapped(self._shards[0]).dtype)
        for position, row in enumerate(rows):
            found[position] = self._mapped(self._shards[row // self._each])[row % self._each]
        return ReferenceRows(**{name: np.ascontiguousarray(found[name]) for name in found.dtype.names or ()})


def load_reference(folder: Path | Place) -> StoredReference:
    """What the reference says, by row of the token artefact; a folder elsewhere is fetched, once per machine.

    Raises:
        IncompleteArtifactError: A shard is missing, short or (elsewhere) damaged.
    """
    manifest = read_manifest(folder)
    here = local_artifact(Place(folder), manifest)
    shards = sorted(manifest["files"], key=shard_number)
    return StoredReference([here / name for name in shards], shard_bundles(manifest["bundles"]))


def _parts(name: str) -> tuple[str, str]:
    found = _NAME.fullmatch(name)
    assert found is not None, name
    return found[1], found[2]
