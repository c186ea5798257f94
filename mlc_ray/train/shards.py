"""Files of optimizer state: ranges of parameters in safetensors, found again by name and range.

state/index.json                     of each trainable parameter its number of elements, and the ranges with their files
state/RANK-NUMBER.safetensors        what one worker wrote, cut at `FILE_BYTES`; keys are "KIND NAME START"
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from mlc_ray.checkpoints import first_fault
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place, StorageError
from mlc_ray.train.engines.base import STATE_KINDS, StateShard
from mlc_ray.train.tensor_files import FloatsFile, Parts, parts_of

FILE_BYTES = 2**29
"""A file is written once it holds so much. It is larger by less than a shard, which an engine keeps short
(`mlc_ray.train.engines.base.pieces`)."""

_GO_ON = "remove its checkpoint to go on from the one before"

Range = tuple[int, int, str]
"""Start and stop in the flattened parameter, and the file's name."""


class CheckpointError(MlcRayError):
    """A checkpoint is missing, incomplete or does not fit; the message quotes the path and names the fix."""


@dataclass(frozen=True)
class StateFile:
    """A file of state before it is written: its name, what it holds of which parameter, and its content."""

    name: str
    ranges: Sequence[tuple[str, Range]]
    parts: Parts


def bytes_of(shards: Iterable[StateShard]) -> int:
    """Bytes that a copy of these shards takes: 12 for each element, of which nothing is copied here."""
    return sum(4 * len(STATE_KINDS) * (shard.stop - shard.start) for shard in shards)


def state_files(rank: int, shards: Iterable[StateShard]) -> Iterator[StateFile]:
    """A copy in host memory of what this worker owns, one file after another."""
    for number, part in enumerate(_by_size(map(_copied, shards))):
        name = f"{rank:05d}-{number:05d}.safetensors"
        tensors = {_key(kind, each.name, each.start): each.tensors[kind] for each in part for kind in STATE_KINDS}
        yield StateFile(name, [(each.name, (each.start, each.stop, name)) for each in part], parts_of(tensors))


def index_of(parts: Sequence[Mapping[str, list[Range]]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The index of all workers' ranges; `sizes` are the trainable parameters' numbers of elements.

    Raises:
        CheckpointError: The engine left elements out, or had them written twice.
    """
    index = {}
    for name, size in sizes.items():
        ranges = sorted(each for part in parts for each in part.get(name, ()))
        if not _each_once(ranges, size):
            raise CheckpointError(
                f"the engine's owned_state gives {name!r} as the ranges {[each[:2] for each in ranges]}, which are not "
                f"its {size} elements, each once; correct the engine"
            )
        index[name] = {"elements": size, "ranges": ranges}
    if unknown := sorted({name for part in parts for name in part} - sizes.keys()):
        raise CheckpointError(f"the engine's owned_state gives {unknown[0]!r}, which is no trainable parameter")
    return index


class _Written(BaseModel):
    """What the index says of a parameter."""

    model_config = ConfigDict(extra="forbid", strict=True)

    elements: NonNegativeInt
    ranges: list[tuple[NonNegativeInt, NonNegativeInt, Annotated[str, Field(pattern=r"^\d+-\d+\.safetensors$")]]]


_INDEX = TypeAdapter(dict[str, _Written])


def read_index(file: Place) -> dict[str, Any]:
    """The index of a checkpoint's state, as `index_of` gave it.

    Raises:
        CheckpointError: The file is missing, or is no such index.
    """
    try:
        with file.open() as opened:
            index = _INDEX.validate_json(opened.read())
    except FileNotFoundError:
        raise CheckpointError(f"{str(file)!r} is missing; {_GO_ON}") from None
    except ValidationError as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {first_fault(error)}; {_GO_ON}") from None
    for name, entry in index.items():
        if not _each_once(entry.ranges, entry.elements):
            raise CheckpointError(
                f"{str(file)!r} is damaged: the ranges of {name!r} are not its {entry.elements} elements, each once; "
                f"{_GO_ON}"
            )
    found: dict[str, Any] = _INDEX.dump_python(index)
    return found


def _each_once(ranges: Sequence[Range], size: int) -> bool:
    """Whether ranges, in order, hold each of so many elements once."""
    reached = 0
    for start, stop, _ in ranges:
        if start != reached or stop < start:
            return False
        reached = stop
    return reached == size


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
            CheckpointError: A file is missing, is no safetensors file, or does not hold what the index says.
            OSError: A file cannot be read now.
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
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}; {_GO_ON}") from None


def _copied(shard: StateShard) -> StateShard:
    tensors = {kind: shard.tensors[kind].to("cpu", torch.float32, copy=True) for kind in STATE_KINDS}
    return replace(shard, tensors=tensors)


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
