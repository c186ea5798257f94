"""Safetensors files without a copy of what is in them: written from the tensors' own memory, read by byte ranges.

`safetensors.torch.save` would hold a file's content twice, and Python's global lock while it copies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mlc_ray.storage import Place

Parts = Sequence[bytes | memoryview]
"""A file's content in pieces of memory, in order."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_HEADER_BYTES = 100_000_000  # what the format allows


def parts_of(tensors: Mapping[str, Tensor], *, of_model: bool = False) -> Parts:
    """The safetensors file of these tensors, which are on the CPU and must not change until it is written.

    With `of_model`, it says that PyTorch wrote it, as transformers asks of weights.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if of_model else {}
    contents, end = [], 0
    for name, tensor in tensors.items():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        offsets = [end, end := end + len(content)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        contents.append(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *contents]


def size_of(parts: Parts) -> int:
    """Bytes of a whole file."""
    return sum(len(part) for part in parts)


class FloatsFile:
    """A safetensors file of float32 vectors on any storage, of which only the bytes asked for are read.

    Raises:
        ValueError, KeyError, TypeError: It is none, or was cut short.
        OSError: It cannot be read now.
    """

    def __init__(self, place: Place) -> None:
        self._opened = place.open()
        self.file: BinaryIO = self._opened.__enter__()
        try:
            self.size = self.file.seek(0, os.SEEK_END)
            length = int.from_bytes(self._read(0, 8), "little")
            if length > _HEADER_BYTES:
                raise ValueError(f"its header would have {length} bytes")
            self.header: dict[str, Any] = json.loads(self._read(8, length))
            self.start = 8 + length
            end = self.start + max(each["data_offsets"][1] for each in self.header.values())
            if self.size != end:
                raise ValueError(f"it has {self.size} bytes instead of {end}")
        except BaseException:
            self.close()
            raise

    def values(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a vector.

        Raises:
            ValueError, KeyError, TypeError: There is no such vector.
        """
        entry = self.header[key]
        first, end = entry["data_offsets"]
        if entry["dtype"] != "F32" or not 0 <= start <= stop <= (end - first) // 4:
            raise ValueError(f"{key!r} is not a float32 vector of {stop} elements or more")
        content = self._read(self.start + first + 4 * start, 4 * (stop - start))
        return torch.frombuffer(bytearray(content), dtype=torch.float32)

    def close(self) -> None:
        """Read no more."""
        self._opened.__exit__(None, None, None)

    def _read(self, offset: int, length: int) -> bytes:
        # Looked at first: to seek past the end is an OSError on some stores, which would pass for a fault of theirs.
        if offset + length > self.size:
            raise ValueError(f"it ends after {self.size} bytes, which is too early")
        self.file.seek(offset)
        if len(content := self.file.read(length)) != length:
            raise OSError(f"{len(content)} bytes instead of {length} could be read at {offset}")
        return content
