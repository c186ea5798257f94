"""Files of optimizer state: ranges of parameters in safetensors, found again by name and range.

state/index.json                     of each trainable parameter its number of elements, and the ranges with their files
state/RANK-NUMBER.safetensors        what one worker wrote, cut at `FILE_BYTES`; keys are "KIND NAME START"
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place, StorageError, checksum
from mlc_ray.train.engines.base import STATE_KINDS, StateShard

FILE_BYTES = 2**29
"""A file is written once it holds so much: it is in host memory until then, and as safetensors' bytes once more. It is
larger by less than a shard, which an engine keeps short (`mlc_ray.train.engines.base.pieces`)."""

_HEADER_BYTES = 100_000_000  # what the format allows

Range = tuple[int, int, str]
"""Start and stop in the flattened parameter, and the file's name."""

Written = tuple[int, str]
"""Bytes of a file and its checksum."""


class CheckpointError(MlcRayError):
    """A checkpoint is missing, incomplete or does not fit; the message quotes the path and names the fix."""


def write_file(place: Place, content: bytes) -> Written:
    """Write a whole file, on this machine to the disk itself; returns what a manifest says of it."""
    place.write_bytes(content)
    return len(content), checksum(content)


def write_shards(
    folder: Place, rank: int, shards: Iterable[StateShard]
) -> tuple[dict[str, list[Range]], dict[str, Written]]:
    """Write what this worker owns into `folder`, one file after another.

    Returns:
        The ranges by parameter, and what is written by file name.
    """
    ranges: dict[str, list[Range]] = {}
    written: dict[str, Written] = {}
    for number, part in enumerate(_by_size(shards)):
        file = f"{rank:05d}-{number:05d}.safetensors"
        tensors = {
            _key(kind, shard.name, shard.start): shard.tensors[kind].contiguous()
            for shard in part
            for kind in STATE_KINDS
        }
        written[file] = write_file(folder / file, save(tensors))
        for shard in part:
            ranges.setdefault(shard.name, []).append((shard.start, shard.stop, file))
    return ranges, written


def index_of(parts: Sequence[Mapping[str, list[Range]]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The index of all workers' ranges; `sizes` are the trainable parameters' numbers of elements.

    Raises:
        CheckpointError: The engine left elements out, or had them written twice.
    """
    index = {}
    for name, size in sizes.items():
        ranges = sorted(each for part in parts for each in part.get(name, ()))
        reached = 0
        for start, stop, _ in ranges:
            if start != reached:
                break
            reached = stop
        if reached != size or sum(stop - start for start, stop, _ in ranges) != size:
            raise CheckpointError(
                f"the engine's owned_state gives {name!r} as the ranges {[each[:2] for each in ranges]}, which are not "
                f"its {size} elements, each once; correct the engine"
            )
        index[name] = {"elements": size, "ranges": ranges}
    if unknown := sorted({name for part in parts for name in part} - sizes.keys()):
        raise CheckpointError(f"the engine's owned_state gives {unknown[0]!r}, which is no trainable parameter")
    return index


class FloatsFile:
    """A safetensors file of float32 vectors on any storage, of which only the bytes asked for are read."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._opened = place.open()
        self.file: BinaryIO = self._opened.__enter__()
        try:
            length = int.from_bytes(self.file.read(8), "little")
            if length > _HEADER_BYTES:
                raise ValueError(f"its header would have {length} bytes")
            self.header: dict[str, Any] = json.loads(self._read(8, length))
            self.start = 8 + length
            end = self.start + max(each["data_offsets"][1] for each in self.header.values())
            if (size := self.file.seek(0, os.SEEK_END)) != end:
                raise ValueError(f"it has {size} bytes instead of {end}")
        except BaseException:
            self.close()
            raise

    def values(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a vector.

        Raises:
            ValueError, KeyError: The file is not what its header says, or has no such vector.
        """
        entry = self.header[key]
        first, end = entry["data_offsets"]
        if entry["dtype"] != "F32" or not 0 <= start <= stop <= (end - first) // 4:
            raise ValueError(f"{key!r} is not a float32 vector of {stop} elements or more")
        return torch.frombuffer(
            bytearray(self._read(self.start + first + 4 * start, 4 * (stop - start))), dtype=torch.float32
        )

    def close(self) -> None:
        """Read no more."""
        self._opened.__exit__(None, None, None)

    def _read(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        if len(content := self.file.read(length)) != length:
            raise ValueError(f"it ends after {offset + len(content)} bytes, which is too early")
        return content


class ShardReader:
    """Reads any range from the files that hold it, and nothing else of them."""

    def __init__(self, folder: Place, index: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.files: dict[str, FloatsFile] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuse a checkpoint of other trainable parameters than those with these numbers of elements.

        Raises:
            CheckpointError: It is one.
        """
        written = {name: entry["elements"] for name, entry in self.index.items()}
        if differing := sorted(name for name in written.keys() | sizes.keys() if written.get(name) != sizes.get(name)):
            name = differing[0]
            raise CheckpointError(
                f"{str(self.folder)!r} is of another model: {name!r} has {written.get(name, 'no')} elements there and "
                f"{sizes.get(name, 'no')} here; resume with the model and the adapters it was written with"
            )

    def __call__(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The values of elements `start` to `stop` of parameter `name`, [stop - start] each, by kind.

        Raises:
            CheckpointError: A file cannot be read, is no safetensors file, or does not hold what the index says.
        """
        ranges: list[Sequence[Any]] = self.index[name]["ranges"]
        first = bisect_right(ranges, start, key=itemgetter(0)) - 1
        pieces: dict[str, list[Tensor]] = {kind: [] for kind in STATE_KINDS}
        for begin, end, file in ranges[first:]:
            if begin >= stop:
                break
            for kind, values in pieces.items():
                values.append(self._slice(file, _key(kind, name, begin), max(start - begin, 0), min(stop, end) - begin))
        return {kind: values[0] if len(values) == 1 else torch.cat(values) for kind, values in pieces.items()}

    def _slice(self, file: str, key: str, start: int, stop: int) -> Tensor:
        path = self.folder / file
        try:
            if file not in self.files:
                self.files[file] = FloatsFile(path)
            return self.files[file].values(key, start, stop)
        except StorageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"{str(path)!r} is damaged: {error}; remove its checkpoint to go on from the one before"
            ) from None


def _by_size(shards: Iterable[StateShard]) -> Iterator[list[StateShard]]:
    """Shards in lists of at least `FILE_BYTES`, but for the last."""
    part: list[StateShard] = []
    size = 0
    for shard in shards:
        part.append(shard)
        size += sum(tensor.nbytes for tensor in shard.tensors.values())
        if size >= FILE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind} {name} {start}"
